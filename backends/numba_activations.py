"""Activation functions by vectors, see simd.py, with what they save for the backward pass."""

import numpy as np
from baby_xp_backends import numpy_kernels
from baby_xp_backends.numba_cache import compiled
from baby_xp_backends.numba_maths import FLOATS, exp, flat, inlined
from baby_xp_backends.simd import W, load, load_first, store, store_first

from baby_xp.layers import gelu

TWICE = 2 * gelu.ROOT_2_OVER_PI
CUBIC = TWICE * gelu.CUBIC


@inlined
def _gelu(x):
    """x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), and its derivative."""
    square = x * x
    cdf = 1.0 / (1.0 + exp(x * (-TWICE - CUBIC * square)))
    y = x * cdf
    return y, cdf + y * (1.0 - cdf) * (TWICE + 3 * CUBIC * square)


@compiled(f"void({FLOATS}, {FLOATS}, {FLOATS})")
def gelu_tanh(x, y, derivative):
    """y and derivative are written."""
    whole = len(x) // W * W
    for at in range(0, whole, W):
        one, slope = _gelu(load(x, at))
        store(y, at, one)
        store(derivative, at, slope)
    if whole < len(x):
        n = len(x) - whole
        one, slope = _gelu(load_first(x, whole, n))
        store_first(y, whole, one, n)
        store_first(derivative, whole, slope, n)


def gelu_tanh_form(xp, x):
    if x.dtype != np.float32:
        return numpy_kernels.gelu_tanh_form(xp, x)
    y, derivative = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)
    gelu_tanh(flat(x), y.reshape(-1), derivative.reshape(-1))
    return y, derivative
