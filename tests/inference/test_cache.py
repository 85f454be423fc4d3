"""The key-value cache: its logits are those of the whole text computed at once, at every position."""

import numpy as np
import pytest
from baby_xp_backends import numpy_decoding
from conftest import case_of
from layer_table import LATER, SWITCHES
from threadpoolctl import threadpool_limits

from baby_xp.arrays import params
from baby_xp.config import MODERN, GPTConfig
from baby_xp.inference.generate import Logits, window_start
from baby_xp.models import Model, gpt

N_CTX, V = 7, 11
IDS = np.random.default_rng(0).integers(0, V, 20).astype(np.int32)
NAMED = {**{" ".join(s.values()): s for s in SWITCHES}, **LATER}
NAMED["modern tied capped"] = {**MODERN, "tied_head": True, "logit_cap": 5.0}
FEW = LATER["modern"], LATER["modern smear"]
ALL_SWITCHES = pytest.mark.parametrize("switches", NAMED.values(), ids=list(NAMED))


def model_and_weights(case, switches):
    model = Model(GPTConfig(n_ctx=N_CTX, n_emb=8, head_size=12, n_heads=3, n_layers=2, dropout=0.3, **switches), V)
    flat = params.draw(model.spec, 0, "float64")
    flat = flat + np.random.default_rng(1).normal(0, 0.3, flat.shape)
    return model, model.layout.unpack(case.xp, case.asarray(flat))


def test_decoding_token_by_token_gives_the_logits_of_the_whole(backend):
    if backend.variant == "jax jit":
        pytest.skip("generation is not compiled")
    # slow where each operation takes long: there, a few combinations without a common switch are enough
    for name, switches in NAMED.items():
        if not backend.variant.startswith("numpy") and switches not in (*SWITCHES[::7], *FEW):
            continue
        model, p = model_and_weights(backend, switches)
        whole, _ = model.forward(backend.xp, p, backend.asarray(IDS[None, :N_CTX]))
        whole, cache = backend.to_numpy(whole), None
        for t in range(N_CTX):
            logits, saved = gpt.forward(
                backend.xp, p, backend.asarray(IDS[None, t : t + 1]), model.config, cache=cache
            )
            cache = gpt.cache_of(backend.xp, saved)
            np.testing.assert_allclose(backend.to_numpy(logits)[0], whole[t], atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", ["numpy", "numpy plain"])
@ALL_SWITCHES
def test_pieces_of_any_length_give_the_logits_of_the_whole(kind, switches):
    case = case_of(kind)
    model, p = model_and_weights(case, switches)
    whole, _ = model.forward(case.xp, p, IDS[None, :N_CTX])
    for cut in range(1, N_CTX):
        _, saved = gpt.forward(case.xp, p, IDS[None, :cut], model.config)
        cache = gpt.cache_of(case.xp, saved)
        logits, _ = gpt.forward(case.xp, p, IDS[None, cut:N_CTX], model.config, cache=cache)
        np.testing.assert_allclose(logits, whole[cut:], atol=1e-12)


@ALL_SWITCHES
@pytest.mark.parametrize("kind", ["numpy", "numpy plain"])
def test_cached_and_uncached_logits_are_equal_past_the_context(kind, switches):
    """Both equal the logits of the window computed at once, whatever the length of the prompt."""
    case = case_of(kind)
    model, p = model_and_weights(case, switches)
    uncached, expected = Logits(case.backend, model, p, False), {}
    texts = np.stack([IDS, IDS[::-1], (IDS + 3) % V])
    for length in range(1, len(IDS) + 1):
        window = texts[:, window_start(length, N_CTX) : length]
        expected[length] = model.forward(case.xp, p, window)[0].reshape(*window.shape, V)[:, -1]
        np.testing.assert_allclose(uncached.next(texts[:, :length].tolist()), expected[length], atol=1e-12)
    for first in (1, 3, N_CTX, 12):
        cached = Logits(case.backend, model, p, True)
        for length in range(first, len(IDS) + 1):
            np.testing.assert_allclose(cached.next(texts[:, :length].tolist()), expected[length], atol=1e-12)


@pytest.mark.parametrize("size", [30.0, 3e3])
@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("name", ["pre mha mlp", "modern", "modern smear"])
def test_decoding_handles_scores_that_are_far_apart(size, first, name):
    """exp of such a score is infinite or 0: NumPy's step must detect that and keep the cache correct."""
    case = case_of("numpy")
    model, p = model_and_weights(case, NAMED[name])
    for block in p["blocks"].values():
        block["attention"]["qkv"]["weight"][:, :24] *= size  # queries and keys
    logits = Logits(case.backend, model, p, True)
    for length in range(first, N_CTX + 1):
        expected, _ = model.forward(case.xp, p, IDS[None, :length])
        np.testing.assert_allclose(logits.next([IDS[:length].tolist()])[0], expected[-1], atol=1e-9)


@pytest.mark.parametrize("size", [3.0, 30.0])
def test_decoding_handles_scores_that_are_all_very_low(size):
    """If the keys are the negative queries, a token's own score is -|q|^2: exp gives 0, and the sum is 0."""
    case = case_of("numpy")
    model, p = model_and_weights(case, SWITCHES[0])
    for block in p["blocks"].values():
        weight = block["attention"]["qkv"]["weight"]
        weight[:, :12] *= size
        weight[:, 12:24] = -weight[:, :12]
    logits = Logits(case.backend, model, p, True)
    for length in range(1, N_CTX + 1):
        expected, _ = model.forward(case.xp, p, IDS[None, :length])
        np.testing.assert_allclose(logits.next([IDS[:length].tolist()])[0], expected[-1], atol=1e-9)


@pytest.mark.parametrize("kind", ["numpy", "numpy plain"])
def test_decoding_computes_only_the_new_tokens(kind, monkeypatch):
    case = case_of(kind)
    model, p = model_and_weights(case, SWITCHES[0])
    lengths, decode = [], gpt.decode
    watched = lambda xp, p, ids, *rest: lengths.append(ids.shape[1]) or decode(xp, p, ids, *rest)  # noqa: E731
    monkeypatch.setattr(gpt, "decode", watched)
    logits = Logits(case.backend, model, p, True)
    for length in range(3, 10):
        logits.next([IDS[:length].tolist()])
    assert lengths == [3, 1, 1, 1, 1, 5, 1]  # the prompt, four tokens, a new window of 8 - 3 tokens, one token


@pytest.mark.parametrize("name", ["pre mha mlp", "modern", "modern tied capped", "modern smear"])
def test_the_fast_step_does_not_call_the_plain_forward_pass(monkeypatch, name):
    case = case_of("numpy")
    model, p = model_and_weights(case, NAMED[name])
    logits = Logits(case.backend, model, p, True)
    monkeypatch.setattr(gpt, "forward", None)
    assert all(logits.next([IDS[:length].tolist()]).shape == (1, V) for length in range(3, 10))


def test_blas_gets_its_threads_back_after_a_token():
    case = case_of("numpy")
    model, p = model_and_weights(case, SWITCHES[0])
    threads = lambda: [library.get_num_threads() for library in numpy_decoding.blas()]  # noqa: E731
    with threadpool_limits(3, user_api="blas"):
        before = threads()
        Logits(case.backend, model, p, True).next([[1, 2, 3]])
        assert threads() == before
        with numpy_decoding.OneThread():
            assert set(threads()) <= {1}
        assert threads() == before
