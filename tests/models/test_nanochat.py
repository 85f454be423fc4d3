"""The modern switches make NanoChat's model: compared with one in PyTorch, and with that of transformers."""

import numpy as np
import pytest
from conftest import case_of

from baby_xp.arrays import params
from baby_xp.arrays.tree import leaves
from baby_xp.config import MODERN, GPTConfig
from baby_xp.layers import cross_entropy
from baby_xp.models import Model

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
F = torch.nn.functional

V, C, H, L, T = 11, 12, 2, 3, 9
IDS, TARGETS = np.random.default_rng(0).integers(0, V, (2, 3, T)).astype(np.int32)
CAPS = pytest.mark.parametrize("cap", [0.0, 15.0, 2.0])


def model_and_weights(cap: float, **more):
    """A model, and weights far from their small first values."""
    switches = {**MODERN, "logit_cap": cap, **more}
    model = Model(GPTConfig(n_ctx=T + 2, n_emb=C, n_heads=H, n_layers=L, **{"head_size": 16, **switches}), V)
    flat = params.draw(model.spec, 0, "float64")
    return model, flat + np.random.default_rng(1).normal(0, 0.4, flat.shape)


def rotation(D: int):
    """exp(-i t f) for each position t and frequency f: (T, D / 2) complex numbers."""
    frequencies = 10_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.outer(torch.arange(T, dtype=torch.float64), frequencies)
    return torch.polar(torch.ones_like(angles), -angles)


def rotated(x):
    """x (B, H, T, D): the first half of the channels are real parts, the second half imaginary parts."""
    real, imaginary = x.chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * rotation(x.shape[-1])
    return torch.cat([turned.real, turned.imag], dim=-1)


def norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def oracle(p, ids, cap: float):
    """Logits (B, T, V), with PyTorch's own functions; p: our tree of parameters, with smear or without."""
    x = norm(F.embedding(ids, p["wte"]["weight"]))
    if "smear" in p:
        share = p["smear"]["scale"] * torch.sigmoid(x @ p["smear"]["gate"]["weight"])
        x = norm(torch.cat([x[:, :1], x[:, 1:] + share[:, 1:] * x[:, :-1]], dim=1))
    for block in p["blocks"].values():
        qkv = norm(x) @ block["attention"]["qkv"]["weight"]
        q, k, v = (one.unflatten(-1, (H, -1)).transpose(1, 2) for one in qkv.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(norm(rotated(q)), norm(rotated(k)), v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2) @ block["attention"]["out"]["weight"]
        x = x + F.relu(norm(x) @ block["network"]["up"]["weight"]).square() @ block["network"]["down"]["weight"]
    logits = norm(x) @ p["lm_head"]["weight"]
    return cap * torch.tanh(logits / cap) if cap else logits


@pytest.mark.parametrize("kind", ["numpy", "numpy plain"])
@pytest.mark.parametrize(("cap", "more"), [(0.0, {}), (15.0, {}), (2.0, {}), (0.0, {"smear": True})])
def test_logits_and_gradients_are_those_of_an_independent_model(kind, cap, more):
    case, (model, flat) = case_of(kind), model_and_weights(cap, **more)
    logits, saved = model.forward(case.xp, model.layout.unpack(np, flat), IDS)
    losses, loss_saved = cross_entropy.forward(case.xp, {}, logits, TARGETS.reshape(-1))
    _, dlogits = cross_entropy.backward(case.xp, {}, loss_saved, np.ones_like(losses))
    dp = dict(leaves(model.backward(case.xp, model.layout.unpack(np, flat), saved, dlogits)))

    weights = torch.tensor(flat, requires_grad=True)
    expected = oracle(model.layout.unpack(torch, weights), torch.tensor(IDS), cap)
    targets = torch.tensor(TARGETS.reshape(-1).astype(np.int64))
    loss = F.cross_entropy(expected.flatten(0, 1), targets, reduction="sum")
    loss.backward()
    np.testing.assert_allclose(logits, expected.detach().numpy().reshape(-1, V), atol=1e-12)
    assert float(losses.sum()) == pytest.approx(loss.item(), rel=1e-13)
    for path, at in model.layout.slices.items():
        np.testing.assert_allclose(dp[path].reshape(-1), weights.grad[at].numpy(), atol=1e-11, err_msg=path)


@CAPS
def test_logits_are_those_of_transformers(cap, monkeypatch):
    """Of NanoChatForCausalLM with the same weights, whose norms and angles are made float64 like all else."""
    nanochat = pytest.importorskip("transformers.models.nanochat.modeling_nanochat")
    monkeypatch.setattr(nanochat.NanoChatRMSNorm, "forward", lambda self, x: self._norm(x))
    monkeypatch.setattr(nanochat.NanoChatRotaryEmbedding, "forward", in_float64)
    model, flat = model_and_weights(cap, head_size=C)
    config = nanochat.NanoChatConfig(
        vocab_size=V, hidden_size=C, intermediate_size=4 * C, num_hidden_layers=L, num_attention_heads=H,
        max_position_embeddings=T, final_logit_softcapping=cap or None, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = nanochat.NanoChatForCausalLM(config).double().eval()
    p = model.layout.unpack(np, flat)
    state = {"model.embed_tokens.weight": p["wte"]["weight"], "lm_head.weight": p["lm_head"]["weight"].T}
    for i, block in p["blocks"].items():
        names = *(f"self_attn.{letter}_proj" for letter in "qkvo"), "mlp.fc1", "mlp.fc2"
        parts = *np.split(block["attention"]["qkv"]["weight"], 3, axis=1), block["attention"]["out"]["weight"]
        parts = *parts, block["network"]["up"]["weight"], block["network"]["down"]["weight"]
        state |= {f"model.layers.{i}.{name}.weight": part.T for name, part in zip(names, parts, strict=True)}
    theirs.load_state_dict({name: torch.tensor(weight) for name, weight in state.items()})
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS, dtype=torch.int64)).logits.numpy().reshape(-1, V)
    logits, _ = model.forward(case_of("numpy plain").xp, p, IDS)
    np.testing.assert_allclose(logits, expected, atol=1e-12)


def in_float64(self, x, position_ids):
    """As NanoChatRotaryEmbedding.forward, which computes in float32."""
    D = 2 * len(self.inv_freq)
    frequencies = 10_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = position_ids[..., None].double() * torch.cat([frequencies, frequencies])
    return angles.cos(), angles.sin()
