"""Norms of rows by vectors, see simd.py. The kernels take flat arrays."""

import numpy as np
from baby_xp_backends import numpy_kernels
from baby_xp_backends.numba_cache import compiled
from baby_xp_backends.numba_maths import FLOATS, flat
from baby_xp_backends.simd import W, load, load_first, spread, sqrt, store, store_first, total

from baby_xp.layers import layernorm


@compiled(f"void({', '.join([FLOATS] * 6)})")
def layernorm_rows(x, gain, bias, y, xhat, rstd):
    """x (N, C); y, xhat (N, C) and rstd (N,) are written."""
    C = len(gain)
    whole = C // W * W
    n = C - whole
    for row in range(len(rstd)):
        base = row * C
        sums = spread(0.0)
        for at in range(base, base + whole, W):
            sums = sums + load(x, at)
        if n:
            sums = sums + load_first(x, base + whole, n)
        mean, squares = total(sums) / C, spread(0.0)
        for at in range(base, base + whole, W):
            centred = load(x, at) - mean
            squares = squares + centred * centred
        if n:
            for at in range(base + whole, base + C):
                centred = load_first(x, at, 1) - mean
                store_first(xhat, at, centred * centred, 1)
            squares = squares + load_first(xhat, base + whole, n)
        scale = 1.0 / sqrt(spread(total(squares) / C + layernorm.EPS))
        store_first(rstd, row, scale, 1)
        for i in range(0, whole, W):
            normed = (load(x, base + i) - mean) * scale
            store(xhat, base + i, normed)
            store(y, base + i, normed * load(gain, i) + load(bias, i))
        if n:
            normed = (load_first(x, base + whole, n) - mean) * scale
            store_first(xhat, base + whole, normed, n)
            store_first(y, base + whole, normed * load_first(gain, whole, n) + load_first(bias, whole, n), n)


@compiled(f"void({', '.join([FLOATS] * 7)})")
def layernorm_rows_backward(dy, gain, xhat, rstd, dx, dgain, dbias):
    """dx (N, C) is written; dgain, dbias (C,) are zeros and become sums."""
    C = len(gain)
    whole = C // W * W
    n = C - whole
    for row in range(len(rstd)):
        base = row * C
        along_one, along_xhat = spread(0.0), spread(0.0)
        for i in range(0, whole, W):
            d, x = load(dy, base + i), load(xhat, base + i)
            store(dgain, i, load(dgain, i) + d * x)
            store(dbias, i, load(dbias, i) + d)
            d = d * load(gain, i)
            along_one, along_xhat = along_one + d, along_xhat + d * x
        if n:
            d, x = load_first(dy, base + whole, n), load_first(xhat, base + whole, n)
            store_first(dgain, whole, load_first(dgain, whole, n) + d * x, n)
            store_first(dbias, whole, load_first(dbias, whole, n) + d, n)
            d = d * load_first(gain, whole, n)
            along_one, along_xhat = along_one + d, along_xhat + d * x
        one, two, scale = total(along_one) / C, total(along_xhat) / C, rstd[row]
        for i in range(0, whole, W):
            d, x = load(dy, base + i) * load(gain, i), load(xhat, base + i)
            store(dx, base + i, (d - one - x * two) * scale)
        if n:
            d, x = load_first(dy, base + whole, n) * load_first(gain, whole, n), load_first(xhat, base + whole, n)
            store_first(dx, base + whole, (d - one - x * two) * scale, n)


def layernorm_forward(xp, p, x):
    if x.dtype != np.float32:
        return numpy_kernels.layernorm_forward(xp, p, x)
    y, xhat, rstd = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype), np.empty((len(x), 1), x.dtype)
    inputs = flat(x), flat(p["gain"]), flat(p["bias"])
    layernorm_rows(*inputs, y.reshape(-1), xhat.reshape(-1), rstd.reshape(-1))
    return y, (xhat, rstd)


def layernorm_backward(xp, p, saved, dy):
    xhat, rstd = saved
    if dy.dtype != np.float32 or xhat.dtype != np.float32:
        return numpy_kernels.layernorm_backward(xp, p, saved, dy)
    dx, (dgain, dbias) = np.empty(dy.shape, dy.dtype), np.zeros((2, dy.shape[1]), dy.dtype)
    inputs = flat(dy), flat(p["gain"]), flat(xhat), flat(rstd)
    layernorm_rows_backward(*inputs, dx.reshape(-1), dgain, dbias)
    return {"gain": dgain, "bias": dbias}, dx
