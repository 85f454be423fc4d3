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

from baby_xp.arrays import registry
from baby_xp.arrays.namespace import REPLACEABLE
from baby_xp.arrays.tree import Parameters
from baby_xp.layers import Shape, gelu, heads, layernorm, linear, query_key, relu2, rmsnorm, rmsnorm_gain, swiglu
from baby_xp.layers.query_key import Steps


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
    largest = max(1, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * largest)


def test_float32_alone_is_computed_by_numba():
    assert set(numpy_backend.numba_kernels()) == set(numpy_backend.BY_NUMBA) <= set(REPLACEABLE)
    assert " with numba " in registry.load("numpy").version
    for options in ({"dtype": "float64"}, {"kernels": "numpy"}):
        other = registry.load("numpy", **options)
        assert "numba" not in other.version
        assert other.xp.kernels == numpy_kernels.KERNELS
    assert registry.load("numpy", kernels="plain").xp.kernels == {}


@pytest.mark.parametrize(("B", "T", "H", "D"), [
    (1, 1, 1, 8), (3, 5, 2, 8), (2, 16, 2, 8), (2, 31, 1, 8), (5, 33, 3, 8), (1, 64, 16, 8), (2, 70, 1, 8),
    (3, 9, 2, 16), (2, 40, 2, 6),
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


@pytest.mark.parametrize("spread", [10.0, 300.0])
def test_attention_holds_for_scores_that_lie_far_apart(fast, plain, spread):
    qkv = drawn(2 * 40, 3 * 16, spread=spread)
    y, saved = heads.forward(fast, {}, qkv, Shape(2, 40, 2))
    expected, saved0 = heads.forward(plain, {}, qkv.astype(np.float64), Shape(2, 40, 2))
    close(y, expected, 2e-5 * spread)
    dy = np.ones_like(y)
    close(heads.backward(fast, {}, saved, dy)[1], heads.backward(plain, {}, saved0, dy)[1], 1e-4 * spread)


def test_attention_shows_numbers_that_are_not_finite_from_their_token_on(fast):
    for value in (np.nan, np.inf):
        qkv = drawn(40, 24)
        qkv[20] = value
        y, _ = heads.forward(fast, {}, qkv, Shape(1, 40, 1))
        assert np.isnan(y[20:]).any(axis=1).all()


@pytest.mark.parametrize(("N", "C", "F"), [
    (8, 32, 32), (16, 64, 192), (24, 256, 64), (160, 96, 32), (40, 20, 64), (9, 32, 32), (8, 32, 65), (0, 32, 32),
])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(fast, plain, N, C, F, bias):
    """With gradients written where the step wants them, and without; N, C and F of sizes that BLAS takes too."""
    p = {"weight": drawn(C, F), **({"bias": drawn(F, seed=3)} if bias else {})}
    x, dy = drawn(N, C, seed=1), drawn(N, F, seed=2)
    double = {name: value.astype(np.float64) for name, value in p.items()}
    expected, saved0 = linear.forward(plain, double, x.astype(np.float64))
    expected_dp, expected_dx = linear.backward(plain, double, saved0, dy.astype(np.float64))
    y, saved = linear.forward(fast, p, x)
    close(y, expected, 1e-5)
    views = {name: np.full(value.shape, np.nan, np.float32) for name, value in p.items()}
    for own in (p, Parameters(p, views)):
        dp, dx = linear.backward(fast, own, saved, dy)
        close(dx, expected_dx, 1e-5)
        for name, value in expected_dp.items():
            close(dp[name], value, 1e-5)
    assert dp["weight"] is views["weight"]


def compare(fast, plain, layer, p, x, dy, *arguments, tolerance=5e-6):
    """y, the gradients and dx by the kernels, and by the plain functions in float64."""
    results = []
    for xp, kind in ((fast, np.float32), (plain, np.float64)):
        own, own_x = {name: value.astype(kind) for name, value in p.items()}, x.astype(kind)
        own_x.flags.writeable = False
        y, saved = layer.forward(xp, own, own_x, *arguments)
        dp, dx = layer.backward(xp, own, saved, dy.astype(kind))
        results.append([y, *dp.values(), dx])
    for found, expected in zip(*results, strict=True):
        close(found, expected, tolerance)


ACTIVATIONS = pytest.mark.parametrize(
    ("activation", "form"), [(gelu, ["tanh"]), (gelu, ["erf"]), (relu2, []), (swiglu, [])],
    ids=["gelu tanh", "gelu erf", "relu2", "swiglu"],
)  # fmt: skip


@ACTIVATIONS
@pytest.mark.parametrize("F", [1, 15, 16, 170])
def test_activations(fast, plain, activation, form, F):
    x, dy = drawn(7, activation.INPUTS * F, spread=3.0), drawn(7, F, seed=1)
    compare(fast, plain, activation, {}, x, dy, *form, tolerance=2e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@ACTIVATIONS
def test_activations_hold_far_from_zero(fast, plain, activation, form):
    x = np.array([0, -0.0, 1e-30, -5, -8, 20, -20, 87.5, -87.5, 90, -90, 1e4, -1e4, np.inf, -np.inf, np.nan])
    x = np.concatenate([x, x[:3]]).astype(np.float32)[None]
    if activation is swiglu:
        x = np.concatenate([x, x[:, ::-1]], axis=1)
    results = []
    for xp, kind in ((fast, np.float32), (plain, np.float64)):
        y, saved = activation.forward(xp, {}, x.astype(kind), *form)
        results.append([y, activation.backward(xp, {}, saved, np.ones_like(y))[1]])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("C", [1, 6, 16, 64, 200])
@pytest.mark.parametrize("norm", [layernorm, rmsnorm, rmsnorm_gain])
def test_norms(fast, plain, norm, C):
    x, dy = drawn(9, C, spread=3.0) + 5, drawn(9, C, seed=1)
    p = {name: drawn(C, seed=seed) for seed, name in enumerate(norm.spec(C), 2)}
    compare(fast, plain, norm, p, x, dy, tolerance=1e-4 if C == 1 else 1e-5)


@pytest.mark.parametrize("steps", [Steps(True, True), Steps(True, False), Steps(False, True)])
@pytest.mark.parametrize(("B", "T", "H", "D"), [(2, 5, 2, 32), (1, 3, 1, 64), (2, 4, 3, 16), (1, 9, 2, 12)])
def test_queries_and_keys(fast, plain, B, T, H, D, steps):
    qkv, dqkv, shape = drawn(B * T, 3 * H * D), drawn(B * T, 3 * H * D, seed=1), Shape(B, T, H)
    compare(fast, plain, query_key, {}, qkv, dqkv, shape, steps)
    past = 2 * (np.zeros((B, H, 7, D), np.float32),)
    found, expected = (query_key.forward(xp, {}, qkv, shape, steps, past)[0] for xp in (fast, plain))
    close(found, expected)


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
