"""The tests of a layer, for every row of the layer table.

Gradients are compared with finite differences, which need only the forward pass, and with the automatic
differentiation of JAX and PyTorch on the same source. Then every backend is compared with NumPy.
"""

import functools

import numpy as np
import pytest
from conftest import case_of
from layer_table import TABLE, numbers_for

from baby_xp.arrays.tree import leaves
from baby_xp.layers import rmsnorm

ENTRIES = pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
TOLERANCE = {"float64": 1e-11, "float32": 2e-5}
"""Largest difference from NumPy in float64, in units of the largest number of the array."""


@functools.cache
def _run(variant: str, dtype: str, name: str):
    """Forward and backward of an entry on a backend -> y, dp by path, dx, all on the host."""
    case, entry = case_of(variant, dtype), next(entry for entry in TABLE if entry.name == name)
    xp, numbers = case.xp, numbers_for(entry)
    flat, x, streams = case.asarray(numbers.flat), case.asarray(numbers.x), case.asarray(numbers.streams)
    dy = case.asarray(numbers.dy(forward_on_numpy(entry, numbers).shape))

    def both(flat, x, streams, dy):
        p = numbers.layout.unpack(xp, flat)
        y, saved = entry.forward(xp, p, x, streams)
        dp, dx = entry.backward(xp, p, saved, dy)
        return y, dp, dx

    y, dp, dx = case.compile(both)(flat, x, streams, dy)
    dp = {path: case.to_numpy(leaf) for path, leaf in leaves(dp)}
    return case.to_numpy(y), dp, None if dx is None else case.to_numpy(dx)


def run(case, entry):
    """Like _run, cached for all tests that use the same numbers."""
    return _run(case.variant, case.dtype, entry.name)


def forward_on_numpy(entry, numbers, flat=None, x=None, kind="numpy plain"):
    case = case_of(kind)
    p = numbers.layout.unpack(case.xp, case.asarray(numbers.flat if flat is None else flat))
    y, _ = entry.forward(case.xp, p, case.asarray(numbers.x if x is None else x), case.asarray(numbers.streams))
    return case.to_numpy(y)


def distance(a, b) -> float:
    return float(np.max(np.abs(a - b), initial=0) / max(1e-3, np.max(np.abs(b), initial=0)))


@ENTRIES
def test_backward_mirrors_forward(backend, entry):
    """The same tree of gradients as of parameters, and a gradient for the input, all shaped alike."""
    numbers = numbers_for(entry)
    _, dp, dx = run(backend, entry)
    shapes = zip(numbers.layout.paths, numbers.layout.shapes, strict=True)
    assert {path: leaf.shape for path, leaf in dp.items()} == dict(shapes)
    assert dx is None if not entry.x_flows else dx.shape == numbers.x.shape


@pytest.mark.parametrize("kind", ["numpy", "numpy plain"])
@ENTRIES
def test_gradients_match_finite_differences(entry, kind):
    """Along random directions, each parameter array on its own: (f(w + h d) - f(w - h d)) / 2 h = gradient . d."""
    numbers = numbers_for(entry)
    dy = numbers.dy(forward_on_numpy(entry, numbers).shape)
    _, dp, dx = run(case_of(kind), entry)
    h = 3e-6  # the error of the slope is about h^2 times the third derivative, and 1e-14 / h by rounding
    for path, at in numbers.layout.slices.items():
        direction, size = np.zeros_like(numbers.flat), at.stop - at.start
        direction[at] = np.random.default_rng(size).normal(0, 1, size)
        slope = _slope(
            lambda step, d=direction: forward_on_numpy(entry, numbers, flat=numbers.flat + step * d), dy, h
        )
        found = float(np.sum(dp[path].reshape(-1) * direction[at]))
        assert found == pytest.approx(slope, rel=2e-7, abs=2e-7), path
    if entry.x_flows:
        direction = np.random.default_rng(1).normal(0, 1, numbers.x.shape)
        slope = _slope(lambda step: forward_on_numpy(entry, numbers, x=numbers.x + step * direction), dy, h)
        assert float(np.sum(dx * direction)) == pytest.approx(slope, rel=2e-7, abs=2e-7)


def _slope(function, dy, h: float) -> float:
    return float(np.sum((function(h) - function(-h)) * dy) / (2 * h))


@ENTRIES
def test_gradients_match_jax(entry):
    """jax.vjp of the same forward source."""
    case, numbers = case_of("jax"), numbers_for(entry)
    import jax

    streams = case.asarray(numbers.streams)

    def forward(flat, x):
        return entry.forward(case.xp, numbers.layout.unpack(case.xp, flat), x, streams)[0]

    flat, x = case.asarray(numbers.flat), case.asarray(numbers.x)
    if entry.x_flows:
        y, pull = jax.vjp(forward, flat, x)
    else:
        y, pull = jax.vjp(lambda flat: forward(flat, x), flat)
    oracle = [np.asarray(gradient) for gradient in pull(case.asarray(numbers.dy(y.shape)))]
    _compare_with_oracle(entry, numbers, oracle)


@ENTRIES
def test_gradients_match_torch(entry):
    """PyTorch's autograd through the same forward source."""
    case, numbers = case_of("torch"), numbers_for(entry)
    flat = case.asarray(numbers.flat).requires_grad_(True)
    x = case.asarray(numbers.x)
    x = x.requires_grad_(True) if entry.x_flows else x
    y, _ = entry.forward(case.xp, numbers.layout.unpack(case.xp, flat), x, case.asarray(numbers.streams))
    y.backward(case.asarray(numbers.dy(tuple(y.shape))))
    oracle = [np.zeros(0) if flat.grad is None else flat.grad.numpy()]
    _compare_with_oracle(entry, numbers, oracle + ([x.grad.numpy()] if entry.x_flows else []))


def _compare_with_oracle(entry, numbers, oracle):
    _, dp, dx = run(case_of("numpy plain"), entry)
    packed = np.concatenate([np.zeros(0), *(dp[path].reshape(-1) for path in numbers.layout.paths)])
    assert distance(packed, oracle[0]) < 1e-12
    if entry.x_flows:
        assert distance(dx, oracle[1]) < 1e-12


@pytest.mark.parity
@ENTRIES
def test_every_backend_matches_numpy(backend, plain, entry):
    _compare(run(backend, entry), run(plain, entry), "float64")


@pytest.mark.parity
@ENTRIES
def test_every_backend_matches_numpy_in_float32(backend32, plain, entry):
    y, dp, dx = run(backend32, entry)
    assert y.dtype == np.float32
    assert all(leaf.dtype == np.float32 for leaf in dp.values())
    assert dx is None or dx.dtype == np.float32
    _compare((y, dp, dx), run(plain, entry), "float32")


def _compare(found, expected, dtype):
    (y, dp, dx), (y0, dp0, dx0) = found, expected
    assert distance(y, y0) < TOLERANCE[dtype]
    for path in dp0:
        assert distance(dp[path], dp0[path]) < TOLERANCE[dtype], path
    if dx0 is not None:
        assert distance(dx, dx0) < TOLERANCE[dtype]


def test_rmsnorm_adds_a_millionth_to_the_mean_square():
    """As NanoChat does; it shows where the channels are small."""
    x = np.array([[3e-3, -4e-3]])  # mean square 1.25e-5
    y, _ = rmsnorm.forward(case_of("numpy plain").xp, {}, x)
    np.testing.assert_allclose(y, x / np.sqrt(1.25e-5 + 1e-6), rtol=1e-12)
