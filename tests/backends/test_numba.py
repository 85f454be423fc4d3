"""The kernels by numba: each gives what the plain function gives, and the disk keeps them."""

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import case_of

pytest.importorskip("numba", reason="numba is not installed")

from baby_xp_backends import numba_kernels, numba_library, numba_muon, numpy_kernels, numpy_muon

from baby_xp.arrays import registry, rng
from baby_xp.arrays.namespace import REPLACEABLE
from baby_xp.arrays.tree import Parameters
from baby_xp.layers import (
    Shape,
    cross_entropy,
    dropout,
    embedding,
    gelu,
    heads,
    layernorm,
    linear,
    query_key,
    relu2,
    rmsnorm,
    rmsnorm_gain,
    swiglu,
)
from baby_xp.layers.query_key import Steps
from baby_xp.training import muon, optimizers


@pytest.fixture(autouse=True, scope="module")
def checked_arrays():
    """Kernels check nothing: here, that each array is of its type, contiguous and of one axis."""

    def checking(dtype: str):
        class Checked:
            @staticmethod
            def from_param(array):
                assert (array.dtype, array.ndim) == (np.dtype(dtype), 1)
                assert array.flags.c_contiguous
                return ctypes.py_object(array)

        return Checked

    kinds = numba_library.FLOATS, numba_library.INTEGERS, numba_library.PLACES
    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            patch.setitem(numba_library.C_TYPES, kind, checking(kind.partition("[")[0]))
        numba_library.library.cache_clear()
        yield
    numba_library.library.cache_clear()


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
    assert set(numba_kernels.KERNELS) <= set(REPLACEABLE)
    assert " with numba " in registry.load("numpy").version
    for options in ({"dtype": "float64"}, {"kernels": "numpy"}):
        other = registry.load("numpy", **options)
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


@pytest.mark.parametrize(("D", "spread"), [(8, 10.0), (8, 300.0), (32, 10.0), (32, 100.0)])
def test_attention_holds_for_scores_that_lie_far_apart(fast, plain, D, spread):
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


@pytest.mark.parametrize(("N", "C", "F"), [
    (8, 32, 32), (16, 64, 192), (24, 256, 64), (160, 96, 32), (40, 20, 64), (9, 32, 32), (8, 32, 65), (0, 32, 32),
])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(fast, plain, N, C, F, bias):
    """With gradients written where the step wants them, and without; also of sizes that BLAS takes."""
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


# ids of tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "V"), [(0, 20), (3, 5), (7, 16), (9, 31), (40, 65), (5, 300)])
def test_cross_entropy(fast, plain, N, V):
    logits, dy = drawn(N, V, spread=5.0), drawn(N, seed=1)
    targets = np.random.default_rng(2).integers(0, V, N).astype(np.int32)
    losses, saved = cross_entropy.forward(fast, {}, logits, targets)
    expected, saved0 = cross_entropy.forward(plain, {}, logits.astype(np.float64), targets)
    np.testing.assert_allclose(losses, expected, rtol=2e-6, atol=2e-6)
    dlogits = cross_entropy.backward(fast, {}, saved, dy)[1]
    expected = cross_entropy.backward(plain, {}, saved0, dy.astype(np.float64))[1]
    np.testing.assert_allclose(dlogits, expected, rtol=2e-6, atol=1e-6)
    assert (losses.dtype, dlogits.dtype) == (np.float32, np.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_cross_entropy_of_logits_that_are_huge_or_not_finite(fast, plain):
    logits, targets = drawn(6, 33), np.arange(6, dtype=np.int32)
    logits[0] = np.linspace(-1e4, 1e4, 33)
    logits[1] = -1e30
    logits[2, 30] = -np.inf
    logits[3, 32], logits[4, 5], logits[5] = np.nan, np.inf, -np.inf
    losses, (probabilities, _) = cross_entropy.forward(fast, {}, logits, targets)
    expected, (expected_probabilities, _) = cross_entropy.forward(plain, {}, logits.astype(np.float64), targets)
    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    np.testing.assert_allclose(probabilities, expected_probabilities, rtol=2e-6, atol=2e-38)


@pytest.mark.parametrize("C", [1, 16, 21, 128])
def test_rows_are_added_by_id(fast, plain, C):
    ids, dy = np.random.default_rng(0).integers(0, 7, 50).astype(np.int32), drawn(50, C)
    close(embedding.sum_by_id(fast, ids, dy, 8), embedding.sum_by_id(plain, ids, dy.astype(np.float64), 8))
    in_order = np.zeros((8, C), np.float32)
    for one, row in zip(ids, dy, strict=True):
        in_order[one] += row
    assert embedding.sum_by_id(fast, ids, dy, 8).tobytes() == in_order.tobytes()


def test_ids_that_are_outside_are_refused(fast):
    for wrong in (-1, 20):
        ids = np.array([3, wrong], np.int32)
        with pytest.raises(IndexError):
            cross_entropy.forward(fast, {}, drawn(2, 20), ids)
        with pytest.raises(IndexError):
            embedding.sum_by_id(fast, ids, drawn(2, 20), 20)


# dropout, optimizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 2), (1, 32), (3, 34), (4, 33), (2, 7, 100), (6, 128)])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_is_the_same_bit_for_bit(fast, shape, rate):
    plain32 = case_of("numpy plain", "float32").xp
    B = 3 if shape == (6, 128) else shape[0]  # tokens, a few of each sample
    stream = np.random.default_rng(2).integers(-(2**31), 2**31, B).astype(np.int32)
    x, dy = drawn(*shape), drawn(*shape, seed=1)
    results = []
    for xp in (fast, plain32):
        y, saved = dropout.forward(xp, {}, x, (stream, rate))
        results.append([y, dropout.backward(xp, {}, saved, dy)[1]])
    for found, expected in zip(*results, strict=True):
        assert found.shape == shape
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("size", [3, 16, 1000, 70_001])
def test_adamw(fast, plain, size):
    w, g, m = (drawn(size, seed=seed) for seed in range(3))
    v, decays = drawn(size, seed=3) ** 2, np.arange(size).astype(np.float32) % 2
    rates = [np.array([x], np.float32) for x in (0.7, 1e-2, 0.3, 0.05)]
    more = 0.9, 0.99, 0.1
    found = optimizers.adamw(fast, w, g, m, v, decays, *rates, *more)
    expected = optimizers.adamw(plain, *(one.astype(np.float64) for one in (w, g, m, v, decays, *rates)), *more)
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    new = np.empty((3, size), np.float32)
    optimizers.adamw_into(fast, new, w, g, m, v, decays, *rates, *more)
    assert new.tobytes() == np.stack(found).tobytes()


@pytest.mark.parametrize(("n", "shape"), [
    (1, (2, 3)), (1, (4, 4)), (3, (5, 12)), (2, (40, 10)), (3, (64, 256)), (2, (256, 64)), (1, (96, 96)),
    (1, (160, 256)), (1, (256, 160)), (1, (512, 160)),
])  # fmt: skip
@pytest.mark.parametrize("iterations", [1, 5])
def test_muon(fast, plain, n, shape, iterations):
    """Also of matrices that lie in the flat buffer in another order, with others between them."""
    size = shape[0] * shape[1]
    begins = [7 + 2 * size * (n - 1 - i) for i in range(n)]
    matrices = [(slice(begin, begin + size), shape) for begin in begins]
    w, g, m = (drawn(7 + 2 * n * size, seed=seed) for seed in range(3))
    scale, lr = np.array([0.7], np.float32), np.array([1e-2], np.float32)
    new = np.zeros((2, len(w)), np.float32)
    muon.update_into(fast, new, matrices, w, g, m, scale, lr, 0.1, 5.0, 0.9, iterations)
    stacked = [np.stack([flat[at].reshape(shape) for at, _ in matrices]) for flat in (w, g, m)]
    arguments = scale, 5 * lr, 0.9, 0.1, iterations
    found = muon.muon(fast, *stacked, *arguments)
    expected = muon.muon(plain, *(one.astype(np.float64) for one in stacked), *arguments)
    close(found[0], expected[0], 1e-6 if iterations == 1 else 2e-4)
    close(found[1], expected[1])
    for flat, matrices_of_stack in zip(new, found, strict=True):
        for (at, _), one in zip(matrices, matrices_of_stack, strict=True):
            assert flat[at].tobytes() == one.tobytes()
            flat[at] = 0
    assert not new.any()


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (64, 64), (160, 256), (256, 160), (33, 64), (512, 256)])
def test_the_products_of_muon(shape):
    """Also of sizes that BLAS takes."""
    x = drawn(2, *shape) / 16
    tall = shape[0] > shape[1]
    products, expected = numba_muon.Products(), numpy_muon.Products()
    double = x.astype(np.float64)
    gram = expected.gram(double, tall)
    close(products.gram(x, tall), gram, 1e-5)
    gram /= np.trace(gram, axis1=1, axis2=2)[:, None, None]
    for iterations in (1, 2, 5):
        found = products.chain(gram.astype(np.float32), iterations)
        close(found, expected.chain(gram, iterations), 1e-5 * 3**iterations)
    close(products.apply(gram.astype(np.float32), x, tall), expected.apply(gram, double, tall), 1e-5)


# the cache -----------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
import numpy as np
from baby_xp.arrays import registry
from baby_xp.layers import gelu
backend = registry.load("numpy")
first = backend.first_use()
backend.before_workers()
backend = registry.load("numpy")
y, _ = gelu.tanh_form(backend.xp, np.linspace(-3, 3, 50, dtype=np.float32))
print(json.dumps([sys.argv[1] in sys.modules, first is not None, y.tobytes().hex()]))
"""
COMPILER = "llvmlite" if (sys.platform, platform.machine()) == ("linux", "x86_64") else "numba"
"""The library that a process must not load which finds compiled kernels."""


def start(folder, **more):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "XDG_CACHE_HOME": str(folder / "other"), **more}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, COMPILER],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def finish(child):
    out, err = child.communicate(timeout=300)
    assert (child.returncode, err) == (0, "")
    return json.loads(out)


def old_folder(parent, name, days, files=(numba_library.CODE, numba_library.NAMES)):
    """A folder that was last used so many days ago."""
    folder = parent / name
    folder.mkdir()
    for file in files:
        (folder / file).write_text("")
    then = time.time() - days * 86400
    os.utime(folder, (then, then))
    return folder


@pytest.mark.slow
def test_the_disk_keeps_what_was_compiled_and_notices_what_was_damaged(tmp_path):
    """Two processes compile at once, and a third one loads, without numba; after damage it is compiled again."""
    unused = old_folder(tmp_path, "a" * 24, days=31)
    both = [start(tmp_path), start(tmp_path)]
    results = [finish(child) for child in both]
    assert all(result[:2] == [True, True] for result in results)
    assert finish(start(tmp_path)) == [False, False, results[0][2]]
    assert not unused.exists()
    (kept,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert numba_library.is_whole(kept)
    os.utime(kept, (0, 0))
    finish(start(tmp_path))
    assert kept.stat().st_mtime > time.time() - 600
    code, names = kept / numba_library.CODE, kept / numba_library.NAMES
    for damage in (lambda: code.write_bytes(code.read_bytes()[:-100]), code.unlink, lambda: names.write_text("{")):
        damage()
        assert not numba_library.is_whole(kept)
        assert finish(start(tmp_path)) == [True, True, results[0][2]]
        assert finish(start(tmp_path)) == [False, False, results[0][2]]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_does_not_matter(tmp_path):
    (tmp_path / "file").write_text("")
    here = tmp_path / "file" / "below"
    assert finish(start(here))[:2] == [True, True]


def test_what_numba_cannot_compile_ends_in_one_line(tmp_path):
    child = start(tmp_path, NUMBA_DISABLE_JIT="1")
    last = child.communicate(timeout=300)[1].splitlines()[-1]
    assert child.returncode == 1
    assert "BabyError: numba could not compile the kernels: " in last
    assert last.endswith("; without them: --kernels numpy")
    assert list(tmp_path.iterdir()) == []


def test_the_key_follows_from_sources_and_settings(monkeypatch):
    before = numba_library.key()
    monkeypatch.setenv("NUMBA_OPT", "1")
    assert numba_library.key() != before


def test_folders_that_are_no_longer_used_are_removed(tmp_path):
    old_folder(tmp_path, "a" * 24, 31)
    old_folder(tmp_path, "b" * 24, 400, ["kernels.o", "kernels.json"])
    old_folder(tmp_path, "new-ab_cd123", 31, [numba_library.CODE])
    old_folder(tmp_path, "c" * 24, 29)
    old_folder(tmp_path, "d" * 24, 31, [numba_library.NAMES, "mine.txt"])
    old_folder(tmp_path, "e" * 23, 31)
    old_folder(tmp_path, "f" * 24, 31, [])
    old_folder(tmp_path, "new-kernels", 31)
    elsewhere = old_folder(tmp_path, "elsewhere", 31)
    (tmp_path / ("0" * 24)).symlink_to(elsewhere)
    (tmp_path / ("1" * 24)).write_text("")
    os.utime(tmp_path / ("1" * 24), (0, 0))
    numba_library.remove_unused(tmp_path)
    left = ["0" * 24, "1" * 24, "c" * 24, "d" * 24, "e" * 23, "elsewhere", "f" * 24, "new-kernels"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert all(list(path.iterdir()) for path in (tmp_path / ("d" * 24), elsewhere))
    numba_library.remove_unused(tmp_path / "missing")


def test_a_folder_that_another_process_removes_is_made_again(tmp_path, monkeypatch):
    numba_library.library()
    whole = numba_library.ready()

    def compile_into(command, **options):
        shutil.copytree(whole, command[-1], dirs_exist_ok=True)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(numba_library, "ready", lambda: tmp_path / "removed")
    monkeypatch.setattr(subprocess, "run", compile_into)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    numba_library.library.cache_clear()
    assert numba_library.library().kernels
    assert [path.name for path in tmp_path.iterdir()] == [numba_library.key()]
