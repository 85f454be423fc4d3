"""Activation functions by vectors, see simd.py.

The kernels take flat arrays of at least W elements, or rows of at least W: the last vector overlaps the one before
it, and some elements are computed twice. NumPy computes what is shorter.
"""

import math

import numpy as np
from baby_xp_backends import numpy_kernels
from baby_xp_backends.numba_library import COMPILING, FLOATS, compiled, flat, inlined
from baby_xp_backends.simd_width import W

from baby_xp.layers import gelu, relu2, swiglu

if COMPILING:
    from baby_xp_backends.numba_maths import exp_of_negative, sigmoid
    from baby_xp_backends.simd import bits, floats, load, select, spread, store

TWICE = 2 * gelu.ROOT_2_OVER_PI
CUBIC = TWICE * gelu.CUBIC
ROOT_HALF, DENSITY = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)
ERFCX = tuple(np.polynomial.chebyshev.cheb2poly(gelu.ERFCX_SERIES[:10])[::-1].tolist())
"""erfcx as a polynomial in u, see gelu.erf, the highest power first; to 2e-8."""
MAGNITUDE = 0x7FFFFFFF
"""All bits but that of the sign."""


# GELU ---------------------------------------------------------------------------------------------------


@inlined
def tanh_pair(x):
    """x (1 + tanh(u)) / 2 = x sigmoid(2 u), and its derivative."""
    square = x * x
    cdf = sigmoid(x * (TWICE + CUBIC * square))
    y = x * cdf
    return y, cdf + y * (1.0 - cdf) * (TWICE + 3 * CUBIC * square)


@inlined
def erf_pair(x):
    """x Phi(x), and its derivative Phi(x) + x phi(x). Phi(-|x|) = exp(-x^2 / 2) erfcx(|x| / sqrt(2)) / 2."""
    z, square = floats(bits(x) & MAGNITUDE) * ROOT_HALF, x * x
    u, erfcx = (z - 2.0) / (z + 2.0), spread(0.0)
    for coefficient in ERFCX:
        erfcx = erfcx * u + coefficient
    e = select(square > 174.0, 0.0, exp_of_negative(square * -0.5))
    below = e * erfcx * 0.5
    cdf = select(x < 0.0, below, 1.0 - below)
    return x * cdf, cdf + x * e * DENSITY


@compiled(f"void({FLOATS}, {FLOATS}, {FLOATS})")
def gelu_tanh(x, y, derivative):
    """y and derivative are written."""
    for start in range(0, len(x), W):
        at = min(start, len(x) - W)
        one, slope = tanh_pair(load(x, at))
        store(y, at, one)
        store(derivative, at, slope)


@compiled(f"void({FLOATS}, {FLOATS}, {FLOATS})")
def gelu_erf(x, y, derivative):
    """As gelu_tanh."""
    for start in range(0, len(x), W):
        at = min(start, len(x) - W)
        one, slope = erf_pair(load(x, at))
        store(y, at, one)
        store(derivative, at, slope)


def gelu_tanh_form(xp, x):
    return _by(gelu_tanh, x) if _suits(x) else numpy_kernels.gelu_tanh_form(xp, x)


def gelu_erf_form(xp, x):
    return _by(gelu_erf, x) if _suits(x) else gelu.erf_form.__wrapped__(xp, x)


def _suits(x) -> bool:
    return x.dtype == np.float32 and x.size >= W


def _by(kernel, x):
    y, derivative = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)
    kernel(flat(x), y.reshape(-1), derivative.reshape(-1))
    return y, derivative


# ReLU squared -------------------------------------------------------------------------------------------


@inlined
def _relu(x):
    return select(x <= 0.0, 0.0, x)  # NaN stays


@compiled(f"void({FLOATS}, {FLOATS})")
def relu2_elements(x, y):
    """y is written."""
    for start in range(0, len(x), W):
        at = min(start, len(x) - W)
        relu = _relu(load(x, at))
        store(y, at, relu * relu)


@compiled(f"void({FLOATS}, {FLOATS}, {FLOATS})")
def relu2_derivative(x, dy, dx):
    """dx is written."""
    for start in range(0, len(x), W):
        at = min(start, len(x) - W)
        store(dx, at, 2.0 * _relu(load(x, at)) * load(dy, at))


def relu2_forward(xp, p, x):
    """As relu2.forward. It saves x, which needs no array of its own."""
    if not _suits(x):
        return relu2.forward.__wrapped__(xp, p, x)
    y = np.empty(x.shape, x.dtype)
    relu2_elements(flat(x), y.reshape(-1))
    return y, (x,)


def relu2_backward(xp, p, saved, dy):
    (x,) = saved
    if not _suits(x):
        return relu2.backward.__wrapped__(xp, p, saved, dy)
    dx = np.empty(x.shape, x.dtype)
    relu2_derivative(flat(x), flat(np.asarray(dy, x.dtype)), dx.reshape(-1))
    return {}, dx


# SwiGLU -------------------------------------------------------------------------------------------------


@compiled(f"void({FLOATS}, {FLOATS}, i8)")
def swiglu_rows(x, y, F):
    """x (N, 2 F): a and b side by side; y (N, F) is written."""
    for row in range(len(y) // F):
        for start in range(0, F, W):
            i = min(start, F - W)
            a, b = load(x, 2 * row * F + i), load(x, (2 * row + 1) * F + i)
            store(y, row * F + i, a * sigmoid(a) * b)


@compiled(f"void({FLOATS}, {FLOATS}, {FLOATS}, i8)")
def swiglu_rows_backward(x, dy, dx, F):
    """dx (N, 2 F) is written."""
    for row in range(len(dy) // F):
        for start in range(0, F, W):
            i = min(start, F - W)
            of_a, of_b = 2 * row * F + i, (2 * row + 1) * F + i
            a, d = load(x, of_a), load(dy, row * F + i)
            cdf = sigmoid(a)
            silu = a * cdf
            store(dx, of_a, d * load(x, of_b) * (cdf + silu * (1.0 - cdf)))
            store(dx, of_b, d * silu)


def swiglu_forward(xp, p, x):
    """As swiglu.forward. It saves x alone: the sigmoid is computed again."""
    N, F = len(x), x.shape[1] // 2
    if x.dtype != np.float32 or F < W:
        return swiglu.forward.__wrapped__(xp, p, x)
    y = np.empty((N, F), x.dtype)
    swiglu_rows(flat(x), y.reshape(-1), F)
    return y, (x,)


def swiglu_backward(xp, p, saved, dy):
    if len(saved) > 1:
        return swiglu.backward.__wrapped__(xp, p, saved, dy)
    (x,) = saved
    dx = np.empty(x.shape, x.dtype)
    swiglu_rows_backward(flat(x), flat(np.asarray(dy, x.dtype)), dx.reshape(-1), x.shape[1] // 2)
    return {}, dx
