"""The kernels by numba: each gives what the plain function gives, and the disk keeps them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import case_of

pytest.importorskip("numba", reason="numba is not installed")

from baby_xp_backends import numba_cache, numpy_backend, numpy_kernels

from baby_xp.arrays import registry, rng
from baby_xp.arrays.namespace import REPLACEABLE
from baby_xp.layers import Shape, gelu, heads, layernorm


@pytest.fixture
def fast():
    return registry.load("numpy").xp


@pytest.fixture
def plain():
    """In float64, the better oracle."""
    return case_of("numpy plain").xp


def drawn(*shape, seed=0, spread=1.0):
    return np.random.default_rng(seed).normal(0, spread, shape).astype(np.float32)


def close(found, expected, tolerance=2e-6):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * max(1, np.abs(expected).max()))


def test_float32_alone_is_computed_by_numba():
    assert set(numpy_backend.numba_kernels()) == set(numpy_backend.BY_NUMBA) <= set(REPLACEABLE)
    backend, other = registry.load("numpy"), registry.load("numpy", dtype="float64")
    assert " with numba " in backend.version
    assert "numba" not in other.version
    assert other.xp.kernels == numpy_kernels.KERNELS
    assert registry.load("numpy", kernels="plain").xp.kernels == {}


@pytest.mark.parametrize(("B", "T", "H", "D"), [
    (1, 1, 1, 8), (3, 5, 2, 8), (2, 16, 2, 8), (2, 31, 1, 8), (5, 33, 3, 8), (1, 64, 16, 8), (2, 70, 1, 8),
    (3, 9, 2, 16), (2, 40, 2, 6), (1, 17, 3, 1), (2, 37, 1, 4), (2, 19, 2, 24), (1, 65, 1, 32), (2, 18, 1, 40),
    (1, 50, 2, 64),
])  # fmt: skip
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_attention(fast, plain, B, T, H, D, rate):
    qkv, dy = drawn(B * T, 3 * H * D), drawn(B * T, H * D, seed=1)
    noise = (np.random.default_rng(2).integers(-(2**31), 2**31, B).astype(np.int32), rate) if rate else None
    y, saved = heads.forward(fast, {}, qkv, Shape(B, T, H), noise)
    expected, saved0 = heads.forward(plain, {}, qkv.astype(np.float64), Shape(B, T, H), noise)
    close(y, expected)
    close(saved.k, saved0.k, 0)
    _, dqkv = heads.backward(plain, {}, saved0, dy.astype(np.float64))
    close(heads.backward(fast, {}, saved, dy)[1], dqkv, 1e-5)


@pytest.mark.parametrize("T", [31, 32])
def test_attention_drops_what_the_mask_drops(fast, plain, T):
    """Values such that y is the matrix of weights."""
    B, H, rate = 2, 3, 0.3
    qkv = drawn(B, T, 3, H, T)
    qkv[:, :, 2] = np.eye(T)[:, None]
    stream = np.array([5, -6], np.int32)
    y, _ = heads.forward(fast, {}, qkv.reshape(B * T, -1), Shape(B, T, H), (stream, rate))
    kept = rng.keep_mask(plain, stream, H * T * T, rate).reshape(B, H, T, T)
    np.testing.assert_array_equal(y.reshape(B, T, H, T).swapaxes(1, 2) > 0, kept & np.tri(T, dtype=bool))


@pytest.mark.parametrize("D", [8, 32])
@pytest.mark.parametrize("spread", [10.0, 300.0])
def test_attention_holds_for_scores_that_lie_far_apart(fast, plain, spread, D):
    qkv = drawn(2 * 40, 3 * 2 * D, spread=spread)
    y, saved = heads.forward(fast, {}, qkv, Shape(2, 40, 2))
    expected, saved0 = heads.forward(plain, {}, qkv.astype(np.float64), Shape(2, 40, 2))
    close(y, expected, 2e-5 * spread)
    dy = np.ones_like(y)
    close(heads.backward(fast, {}, saved, dy)[1], heads.backward(plain, {}, saved0, dy)[1], 1e-4 * spread)


@pytest.mark.parametrize("D", [8, 32])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_attention_shows_numbers_that_are_not_finite_from_their_token_on(fast, value, D):
    qkv = drawn(40, 3 * D)
    qkv[20] = value
    y, saved = heads.forward(fast, {}, qkv, Shape(1, 40, 1))
    assert np.isnan(y[20:]).any(axis=1).all()
    assert np.isnan(heads.backward(fast, {}, saved, np.ones_like(y))[1]).any()


@pytest.mark.parametrize("size", [1, 15, 16, 1000])
def test_gelu(fast, plain, size):
    x = np.concatenate([drawn(size, spread=4.0), np.array([-1e4, -40, -10, 0, 10, 1e4], np.float32)])
    for found, expected in zip(gelu.tanh_form(fast, x), gelu.tanh_form(plain, x.astype(np.float64)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=5e-7)
    assert np.isnan(gelu.tanh_form(fast, np.full(20, np.nan, np.float32))).all()


@pytest.mark.parametrize("C", [1, 6, 16, 200])
def test_layer_norm(fast, plain, C):
    x, dy = drawn(9, C, spread=3.0) + 5, drawn(9, C, seed=1)
    x.flags.writeable = False
    p = {"gain": drawn(C, seed=2), "bias": drawn(C, seed=3)}
    results = []
    for xp, kind in ((fast, np.float32), (plain, np.float64)):
        own = {name: value.astype(kind) for name, value in p.items()}
        y, saved = layernorm.forward(xp, own, x.astype(kind) if kind is np.float64 else x)
        dp, dx = layernorm.backward(xp, own, saved, dy.astype(kind))
        results.append([y, dp["gain"], dp["bias"], dx])
    for found, expected in zip(*results, strict=True):
        close(found, expected, 1e-4 if C == 1 else 1e-5)


# the cache -----------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
from numba.core import event
compiled = []
class Listener(event.Listener):
    def on_start(self, event): compiled.append(1)
    def on_end(self, event): pass
event.register("numba:compile", Listener())
import numpy as np
from baby_xp.arrays import registry
from baby_xp.layers import gelu
backend = registry.load("numpy")
first = backend.first_use()
backend.before_workers()
backend = registry.load("numpy")
y, _ = gelu.tanh_form(backend.xp, np.linspace(-3, 3, 50, dtype=np.float32))
print(json.dumps([bool(compiled), first is not None, y.tobytes().hex()]))
"""


def start(folder, **more):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "XDG_CACHE_HOME": str(folder / "other"), **more}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(child):
    out, err = child.communicate(timeout=300)
    assert (child.returncode, err) == (0, "")
    return json.loads(out)


@pytest.mark.slow
def test_the_disk_keeps_what_was_compiled_and_notices_what_was_damaged(tmp_path):
    """Two processes compile at once, and a third one loads; a file that was cut or lost is compiled again."""
    both = [start(tmp_path), start(tmp_path)]
    results = [finish(child) for child in both]
    assert all(result[:2] == [True, True] for result in results)
    assert finish(start(tmp_path)) == [False, False, results[0][2]]
    (kept,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert numba_cache.is_whole(kept)
    biggest = max(kept.rglob("*.nbc"), key=lambda path: path.stat().st_size)
    for damage in (lambda: biggest.write_bytes(biggest.read_bytes()[:-100]), biggest.unlink):
        damage()
        assert not numba_cache.is_whole(kept)
        assert finish(start(tmp_path)) == [True, True, results[0][2]]
        assert finish(start(tmp_path)) == [False, False, results[0][2]]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_does_not_matter(tmp_path):
    (tmp_path / "file").write_text("")
    here = tmp_path / "file" / "below"
    assert finish(start(here))[:2] == [True, True]


def test_the_key_follows_from_sources_and_settings(monkeypatch):
    before = numba_cache.key()
    monkeypatch.setenv("NUMBA_OPT", "1")
    assert numba_cache.key() != before
