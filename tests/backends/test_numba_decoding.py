"""Generation by the compiled step: its logits are those of the plain forward pass, for all switches."""

import numpy as np
import pytest
from conftest import case_of
from layer_table import LATER, SWITCHES

pytest.importorskip("numba", reason="numba is not installed")

from baby_xp_backends import numba_decoding

from baby_xp.arrays import params, registry
from baby_xp.config import MODERN, GPTConfig
from baby_xp.errors import BabyError
from baby_xp.inference.generate import Logits, window_start
from baby_xp.models import Model, gpt
from baby_xp.resources import counts

N_CTX, V = 7, 11
IDS = np.random.default_rng(0).integers(0, V, 20).astype(np.int32)
TEXTS = np.stack([IDS, IDS[::-1], (IDS + 3) % V])
SMALL = {"n_ctx": N_CTX, "n_emb": 8, "head_size": 12, "n_heads": 3, "n_layers": 2}
WIDE = {"n_ctx": 41, "n_emb": 70, "head_size": 80, "n_heads": 2, "n_layers": 1}
NAMED = {**{" ".join(s.values()): s for s in SWITCHES}, **LATER}
NAMED["modern tied capped"] = {**MODERN, "tied_head": True, "logit_cap": 5.0}
NAMED["erf and biases"] = {"gelu": "erf", "qkv_bias": True, "norm": "rmsnorm-gain", "embedding_norm": True}
NAMED["rotary post"] = {"positions": "rotary", "c_sequence": "post", "head_bias": False, "linear_bias": False}
BESIDE = {name: NAMED[name] for name in dict.fromkeys([*[*NAMED][::3], "modern smear"])}


@pytest.fixture
def backend():
    return registry.load("numpy")


def model_and_weights(backend, switches, sizes=SMALL):
    """The model, its weights on the backend, and the same in float64."""
    model = Model(GPTConfig(**sizes, **switches), V)
    flat = params.draw(model.spec, 0)
    flat += np.random.default_rng(1).normal(0, 0.3, flat.shape).astype(np.float32)
    return model, *(model.layout.unpack(backend.xp, flat.astype(kind)) for kind in ("float32", "float64"))


def expected(model, p, texts):
    """The logits (B, V) after texts (B, length), by the plain pass over their window."""
    window = texts[:, window_start(texts.shape[1], model.config.n_ctx) :]
    logits, _ = model.forward(case_of("numpy plain").xp, p, window)
    return logits.reshape(*window.shape, V)[:, -1]


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("switches", NAMED.values(), ids=list(NAMED))
def test_the_logits_are_those_of_the_plain_pass(backend, switches, monkeypatch):
    model, p, exact = model_and_weights(backend, switches)
    wanted = [expected(model, exact, TEXTS[:, :length]) for length in range(1, len(IDS) + 1)]
    monkeypatch.setattr(gpt, "forward", None)
    for first in (1, 3, N_CTX, 12):
        logits = Logits(backend, model, p)
        for length in range(first, len(IDS) + 1):
            close(logits.next(TEXTS[:, :length].tolist()), wanted[length - 1])


@pytest.mark.parametrize("switches", BESIDE.values(), ids=list(BESIDE))
def test_a_text_does_not_depend_on_what_is_computed_with_it(backend, switches, monkeypatch):
    """Bit for bit: not on other texts, nor on the pieces that it is computed in. With heads of several panels."""
    model, p, exact = model_and_weights(backend, switches, WIDE)
    texts = np.random.default_rng(2).integers(0, V, (19, 41)).astype(np.int32)
    together = Logits(backend, model, p).next(texts.tolist())
    close(together, expected(model, exact, texts))
    monkeypatch.setattr(numba_decoding, "AT_ONCE", 9)
    alone = Logits(backend, model, p)
    for length in (3, 4, 41):
        logits = alone.next([texts[5, :length].tolist()])
    assert logits.tobytes() == together[5:6].tobytes()


@pytest.mark.parametrize("size", [30.0, 3e3])
@pytest.mark.parametrize("name", ["pre mha mlp", "modern"])
def test_scores_may_lie_far_apart(backend, size, name):
    model, p, exact = model_and_weights(backend, NAMED[name])
    for tree in (p, exact):
        for block in tree["blocks"].values():
            block["attention"]["qkv"]["weight"][:, :24] *= size  # queries and keys
    wanted = expected(model, exact, TEXTS[:, :N_CTX])
    assert np.abs(Logits(backend, model, p).next(TEXTS[:, :N_CTX].tolist()) - wanted).max() < 1e-5 * size


def test_numbers_that_are_not_finite_are_reported(backend):
    model, p, _ = model_and_weights(backend, NAMED["modern"])
    p["blocks"]["1"]["network"]["up"]["weight"][3, 3] = np.nan
    with pytest.raises(BabyError, match="not finite"):
        Logits(backend, model, p).next([[1, 2, 3]])


def test_what_does_not_fit_is_refused(backend):
    model, p, _ = model_and_weights(backend, NAMED["modern"])
    prepared = gpt.prepare(backend.xp, p, model.config)
    for ids in ([[0, V]], [[-1]]):
        with pytest.raises(IndexError, match="from 0 to 10"):
            gpt.decode(backend.xp, prepared, np.array(ids, np.int32), model.config)
    _, cache = gpt.decode(backend.xp, prepared, IDS[None, :5], model.config)
    for ids in (IDS[None, :3], IDS[:2, None]):
        with pytest.raises(ValueError, match="do not fit"):
            gpt.decode(backend.xp, prepared, ids, model.config, cache)


def test_numbers_of_other_types_are_left_to_numpy(backend):
    model, _, exact = model_and_weights(backend, NAMED["modern"])
    logits, _ = gpt.decode(backend.xp, gpt.prepare(backend.xp, exact, model.config), IDS[None, :5], model.config)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, expected(model, exact, IDS[None, :5]), atol=1e-12)


@pytest.mark.parametrize("smear", [False, True])
@pytest.mark.parametrize("sizes", [SMALL, WIDE, {**SMALL, "n_ctx": 64}], ids=["7", "41", "64"])
def test_the_count_of_a_cache_has_its_whole_panels(backend, sizes, smear):
    model, p, _ = model_and_weights(backend, {"smear": smear}, sizes)
    caches = [numba_decoding.Cache(B, numba_decoding.Prepared(backend.xp, p, model.config).sizes) for B in (1, 3)]
    one, three = (cache.array.nbytes for cache in caches)
    assert (three - one) / 2 == counts.cache_bytes(model.config, 4, backend.xp.cache_multiple)
