"""Norms of rows by vectors, see simd.py.

The kernels take flat arrays of rows whose length C is a multiple of W. NumPy computes rows of other lengths.
Forward has a loop for each array that it writes: NumPy's arrays do not begin at cache lines, and then stores that
alternate between two arrays take up to twice as long.
"""

import math

import numpy as np
from baby_xp_backends import numpy_kernels
from baby_xp_backends.numba_library import COMPILING, FLOATS, compiled, flat, inlined
from baby_xp_backends.simd_width import W

from baby_xp.layers import layernorm, rmsnorm, rmsnorm_gain

if COMPILING:
    from baby_xp_backends.simd import load, spread, store, total


def _suits(x) -> bool:
    return x.dtype == np.float32 and x.shape[-1] % W == 0


# layer norm ---------------------------------------------------------------------------------------------


@compiled(f"void({', '.join([FLOATS] * 6)})")
def layernorm_rows(x, gain, bias, y, xhat, rstd):
    """x (N, C); y, xhat (N, C) and rstd (N,) are written."""
    C = len(gain)
    for row in range(len(rstd)):
        base = row * C
        sums, squares = spread(0.0), spread(0.0)
        for at in range(base, base + C, W):
            sums = sums + load(x, at)
        mean = total(sums) / C
        for at in range(base, base + C, W):
            centred = load(x, at) - mean
            squares = squares + centred * centred
        scale = 1.0 / math.sqrt(total(squares) / C + layernorm.EPS)
        rstd[row] = scale
        for i in range(0, C, W):
            store(xhat, base + i, (load(x, base + i) - mean) * scale)
        for i in range(0, C, W):
            store(y, base + i, load(xhat, base + i) * load(gain, i) + load(bias, i))


@compiled(f"void({', '.join([FLOATS] * 7)})")
def layernorm_rows_backward(dy, gain, xhat, rstd, dx, dgain, dbias):
    """dx (N, C) is written; dgain, dbias (C,) are zeros and become sums."""
    C = len(gain)
    for row in range(len(rstd)):
        base = row * C
        along_one, along_xhat = spread(0.0), spread(0.0)
        for i in range(0, C, W):
            d, x = load(dy, base + i), load(xhat, base + i)
            store(dgain, i, load(dgain, i) + d * x)
            store(dbias, i, load(dbias, i) + d)
            d = d * load(gain, i)
            along_one, along_xhat = along_one + d, along_xhat + d * x
        one, two, scale = total(along_one) / C, total(along_xhat) / C, rstd[row]
        for i in range(0, C, W):
            d, x = load(dy, base + i) * load(gain, i), load(xhat, base + i)
            store(dx, base + i, (d - one - x * two) * scale)


def layernorm_forward(xp, p, x):
    if not _suits(x):
        return numpy_kernels.layernorm_forward(xp, p, x)
    y, xhat, rstd = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype), np.empty((len(x), 1), x.dtype)
    inputs = flat(x), flat(p["gain"]), flat(p["bias"])
    layernorm_rows(*inputs, y.reshape(-1), xhat.reshape(-1), rstd.reshape(-1))
    return y, (xhat, rstd)


def layernorm_backward(xp, p, saved, dy):
    xhat, rstd = saved
    if not _suits(xhat):
        return numpy_kernels.layernorm_backward(xp, p, saved, dy)
    dx, (dgain, dbias) = np.empty(xhat.shape, xhat.dtype), np.zeros((2, xhat.shape[1]), xhat.dtype)
    inputs = flat(np.asarray(dy, xhat.dtype)), flat(p["gain"]), flat(xhat), flat(rstd)
    layernorm_rows_backward(*inputs, dx.reshape(-1), dgain, dbias)
    return {"gain": dgain, "bias": dbias}, dx


# RMSNorm ------------------------------------------------------------------------------------------------


@inlined
def _mean_product(a, b, at, C):
    """The mean of a times b over the C elements from `at` on."""
    sums = spread(0.0)
    for i in range(at, at + C, W):
        sums = sums + load(a, i) * load(b, i)
    return total(sums) / C


@compiled(f"void({', '.join([FLOATS] * 3)}, i8)")
def rmsnorm_rows(x, y, rstd, C):
    """x (N, C); y (N, C) and rstd (N,) are written."""
    for row in range(len(rstd)):
        scale = 1.0 / math.sqrt(_mean_product(x, x, row * C, C) + rmsnorm.EPS)
        rstd[row] = scale
        for at in range(row * C, row * C + C, W):
            store(y, at, load(x, at) * scale)


@compiled(f"void({', '.join([FLOATS] * 4)}, i8)")
def rmsnorm_rows_backward(dy, y, rstd, dx, C):
    """dx (N, C) is written."""
    for row in range(len(rstd)):
        along, scale = _mean_product(dy, y, row * C, C), rstd[row]
        for at in range(row * C, row * C + C, W):
            store(dx, at, (load(dy, at) - load(y, at) * along) * scale)


@compiled(f"void({', '.join([FLOATS] * 5)})")
def rmsnorm_gain_rows(x, gain, y, xhat, rstd):
    """x (N, C); y, xhat (N, C) and rstd (N,) are written."""
    C = len(gain)
    for row in range(len(rstd)):
        base = row * C
        scale = 1.0 / math.sqrt(_mean_product(x, x, base, C) + rmsnorm.EPS)
        rstd[row] = scale
        for i in range(0, C, W):
            store(xhat, base + i, load(x, base + i) * scale)
        for i in range(0, C, W):
            store(y, base + i, load(xhat, base + i) * load(gain, i))


@compiled(f"void({', '.join([FLOATS] * 6)})")
def rmsnorm_gain_rows_backward(dy, gain, xhat, rstd, dx, dgain):
    """dx (N, C) is written; dgain (C,) is zeros and becomes a sum."""
    C = len(gain)
    for row in range(len(rstd)):
        base, sums = row * C, spread(0.0)
        for i in range(0, C, W):
            along = load(dy, base + i) * load(xhat, base + i)
            store(dgain, i, load(dgain, i) + along)
            sums = sums + along * load(gain, i)
        along_xhat, scale = total(sums) / C, rstd[row]
        for i in range(0, C, W):
            d = load(dy, base + i) * load(gain, i)
            store(dx, base + i, (d - load(xhat, base + i) * along_xhat) * scale)


def rmsnorm_forward(xp, p, x):
    if not _suits(x):
        return numpy_kernels.rmsnorm_forward(xp, p, x)
    y, rstd = np.empty(x.shape, x.dtype), np.empty((*x.shape[:-1], 1), x.dtype)
    rmsnorm_rows(flat(x), y.reshape(-1), rstd.reshape(-1), x.shape[-1])
    return y, (y, rstd)


def rmsnorm_backward(xp, p, saved, dy):
    y, rstd = saved
    if not _suits(y):
        return numpy_kernels.rmsnorm_backward(xp, p, saved, dy)
    dx = np.empty(y.shape, y.dtype)
    rmsnorm_rows_backward(flat(np.asarray(dy, y.dtype)), flat(y), flat(rstd), dx.reshape(-1), y.shape[-1])
    return {}, dx


def rmsnorm_gain_forward(xp, p, x):
    if not _suits(x):
        return rmsnorm_gain.forward.__wrapped__(xp, p, x)
    y, xhat, rstd = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype), np.empty((len(x), 1), x.dtype)
    rmsnorm_gain_rows(flat(x), flat(p["gain"]), y.reshape(-1), xhat.reshape(-1), rstd.reshape(-1))
    return y, (xhat, (xhat, rstd))


def rmsnorm_gain_backward(xp, p, saved, dy):
    xhat, (_, rstd) = saved
    if not _suits(xhat):
        return rmsnorm_gain.backward.__wrapped__(xp, p, saved, dy)
    dx, dgain = np.empty(xhat.shape, xhat.dtype), np.zeros(xhat.shape[1], xhat.dtype)
    inputs = flat(np.asarray(dy, xhat.dtype)), flat(p["gain"]), flat(xhat), flat(rstd)
    rmsnorm_gain_rows_backward(*inputs, dx.reshape(-1), dgain)
    return {"gain": dgain}, dx
