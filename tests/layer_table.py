"""Every layer and model, in one table: test_layers.py runs its tests for each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from baby_xp.arrays import params
from baby_xp.arrays.rng import Noise
from baby_xp.arrays.tree import Layout, leaves
from baby_xp.config import MODERN, EquationConfig, GPTConfig
from baby_xp.layers import (
    Shape,
    attention,
    block,
    cross_entropy,
    dropout,
    embedding,
    gelu,
    heads,
    layernorm,
    linear,
    mixture_of_experts,
    mixture_of_heads,
    mlp,
    query_key,
    relu2,
    rmsnorm,
    rmsnorm_gain,
    rotary,
    smear,
    soft_cap,
    softmax,
    swiglu,
    tanh,
)
from baby_xp.layers.block import ATTENTIONS, NETWORKS, Parts
from baby_xp.layers.query_key import Steps
from baby_xp.models import Model

B, T, H, C, S, V = 3, 5, 2, 6, 8, 11
N = B * T
SHAPE = Shape(B, T, H)
RATE = 0.3
SWITCHES = [
    {"c_sequence": s, "c_attention": a, "c_network": n}
    for s in ("pre", "post")
    for a in ("mha", "moh")
    for n in ("mlp", "moe")
]
"""All combinations of the three switches that The Little Baby has."""
OTHERS = {
    "c_sequence": "post", "c_attention": "moh", "c_network": "moe", "norm": "rmsnorm-gain", "smear": True,
    "embedding_norm": True, "activation": "swiglu", "qkv_bias": True, "linear_bias": False, "tied_head": True,
    "logit_cap": 5.0,
}  # fmt: skip
"""With `MODERN`, each value of every switch."""
LATER = {"modern": MODERN, "others": OTHERS, "modern smear": {**MODERN, "smear": True}, "smear": {"smear": True}}


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    forward(xp, p, x, streams) -> y, saved; backward(xp, p, saved, dy) -> dp, dx. `x` is a float array that a
    gradient flows to, unless x_flows is false; `streams` (places, B) keys dropout.
    """

    name: str
    spec: Any
    x: Callable[[np.random.Generator], np.ndarray]
    forward: Callable
    backward: Callable
    x_flows: bool = True


def floats(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.normal(0, 1.5, shape)


def ids(*shape: int, below: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.integers(0, below, shape).astype(np.int32)


def _noise(streams, first: int, count: int):
    return [(streams[i, :], RATE) for i in range(first, first + count)]


def _simple(name: str, module, spec, x, *arguments, x_flows: bool = True) -> Entry:
    def forward(xp, p, x, streams):
        return module.forward(xp, p, x, *arguments)

    def backward(xp, p, saved, dy):
        result = module.backward(xp, p, saved, dy)
        return result if x_flows else (result, None)

    return Entry(name, spec, x, forward, backward, x_flows)


def _cross_entropy() -> Entry:
    targets = np.random.default_rng(7).integers(0, V, N).astype(np.int32)

    def forward(xp, p, logits, streams):
        # made from a range, so that the targets are on the same device as the other arrays
        at = xp.arange(V, dtype=xp.int32, device=xp.device)
        return cross_entropy.forward(xp, p, logits, xp.concat([at[int(t) : int(t) + 1] for t in targets]))

    return Entry("cross entropy", {}, floats(N, V), forward, cross_entropy.backward)


def _noisy(name: str, module, spec, x, places: int, wrap=lambda noise: (noise,)) -> Entry:
    def forward(xp, p, x, streams):
        return module.forward(xp, p, x, *wrap(_noise(streams, 0, places)))

    return Entry(name, spec, x, forward, module.backward)


def _block(sequence: str, c_attention: str, c_network: str) -> Entry:
    parts = Parts(sequence, ATTENTIONS[c_attention], NETWORKS[c_network])

    def forward(xp, p, x, streams):
        return block.forward(xp, p, x, parts, SHAPE, _noise(streams, 0, parts.dropouts))

    def backward(xp, p, saved, dy):
        return block.backward(xp, p, saved, dy, parts)

    return Entry(
        f"block {sequence} {c_attention} {c_network}", block.spec(parts, C, S, H), floats(N, C), forward, backward
    )


def _gpt(name: str, **switches) -> Entry:
    config = GPTConfig(n_ctx=T + 1, n_emb=C, head_size=S, n_heads=H, n_layers=2, dropout=RATE, **switches)
    return _model(Model(config, V), ids(B, T, below=V), name)


def _model(model: Model, x, name: str) -> Entry:
    def forward(xp, p, x, streams):
        return model.forward(xp, p, x, Noise(streams, RATE))

    def backward(xp, p, saved, dy):
        return model.backward(xp, p, saved, dy), None

    return Entry(name, model.spec, x, forward, backward, x_flows=False)


TABLE = [
    _simple("linear", linear, linear.spec(C, 4), floats(N, C)),
    _simple("linear without bias", linear, linear.spec(C, 4, bias=False), floats(N, C)),
    _simple("embedding", embedding, embedding.spec(V, C), ids(N, below=V), x_flows=False),
    _simple("layer norm", layernorm, layernorm.spec(C), floats(N, C)),
    _simple("gelu tanh", gelu, {}, floats(N, C), "tanh"),
    _simple("gelu erf", gelu, {}, floats(N, C), "erf"),
    _simple("rms norm", rmsnorm, {}, floats(N, C)),
    _simple("rms norm with gain", rmsnorm_gain, rmsnorm_gain.spec(C), floats(N, C)),
    _simple("relu squared", relu2, {}, floats(N, C)),
    _simple("swiglu", swiglu, {}, floats(N, 2 * C)),
    _simple("soft cap", soft_cap, {}, floats(N, V), 2.0),
    _simple("smear", smear, smear.spec(C), floats(N, C), SHAPE),
    _simple("rotary", rotary, {}, floats(B, T, H, 4), 3),
    _simple("queries and keys", query_key, {}, floats(N, 3 * S), SHAPE, Steps(True, True)),
    _simple("tanh", tanh, {}, floats(N, C)),
    _simple("softmax", softmax, {}, floats(B, H, T, T)),
    _cross_entropy(),
    _noisy("dropout", dropout, {}, floats(N, C), 1, lambda noise: noise),
    _noisy("dropout of odd size", dropout, {}, floats(B, H, 3, 3), 1, lambda noise: noise),
    _simple("heads", heads, {}, floats(N, 3 * S), SHAPE),
    _noisy("heads with dropout", heads, {}, floats(N, 3 * S), 1, lambda noise: (SHAPE, noise[0])),
    _noisy("attention", attention, attention.spec(C, S, H), floats(N, C), 2, lambda noise: (SHAPE, noise)),
    _simple("attention without dropout", attention, attention.spec(C, S, H), floats(N, C), SHAPE),
    _noisy(
        "mixture of heads",
        mixture_of_heads,
        mixture_of_heads.spec(C, S, H),
        floats(N, C),
        2,
        lambda noise: (SHAPE, noise),
    ),
    _noisy("mlp", mlp, mlp.spec(C), floats(N, C), 1),
    _noisy("mixture of experts", mixture_of_experts, mixture_of_experts.spec(C), floats(N, C), 1),
    *[_block(s, a, n) for s in ("pre", "post") for a in ("mha", "moh") for n in ("mlp", "moe")],
    _gpt("gpt"),
    _gpt("gpt post moh moe erf", c_sequence="post", c_attention="moh", c_network="moe", gelu="erf"),
    *[_gpt(f"gpt {name}", **switches) for name, switches in LATER.items()],
    _model(Model(EquationConfig(n_emb=2, n_hidden=5), 13), ids(B, 4, below=13), "equations"),
    _model(
        Model(EquationConfig(n_emb=2, n_hidden=5, activation="gelu"), 13), ids(B, 4, below=13), "equations gelu"
    ),
]


@dataclass(frozen=True)
class Numbers:
    """Host numbers for one entry: parameters, input, streams of dropout, and the gradient that comes in."""

    layout: Layout
    flat: np.ndarray
    x: np.ndarray
    streams: np.ndarray
    seed: int

    def dy(self, shape) -> np.ndarray:
        return np.random.default_rng(self.seed + 1).normal(0, 1, shape)


def numbers_for(entry: Entry, seed: int = 0) -> Numbers:
    """Parameters far from their usual small initial values, so that every term of a gradient matters."""
    rng = np.random.default_rng(seed)
    layout = Layout.of(entry.spec)
    usual = params.draw(entry.spec, seed, "float64") if list(leaves(entry.spec)) else np.zeros(0)
    flat = usual + rng.normal(0, 0.4, usual.shape)
    streams = rng.integers(-(2**31), 2**31, (8, B)).astype(np.int32)
    return Numbers(layout, flat, entry.x(rng), streams, seed)


def noting(kernels: dict[str, Callable], called: set[str]) -> dict[str, Callable]:
    """The same replacements, each of which adds its name to `called` when it is called."""

    def wrapped(name: str) -> Callable:
        return lambda xp, *arguments: called.add(name) or kernels[name](xp, *arguments)

    return {name: wrapped(name) for name in kernels}
