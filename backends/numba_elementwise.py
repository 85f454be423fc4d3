"""Element by element, and row by row, by vectors: GELU and layer norm. See simd.py. Arrays are flat."""

from baby_xp_backends.numba_cache import compiled
from baby_xp_backends.numba_maths import exp, inlined
from baby_xp_backends.simd import W, load, load_first, spread, sqrt, store, store_first, total

from baby_xp.layers import gelu, layernorm

FLOATS = "f4[::1]"
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


@compiled(f"void({', '.join([FLOATS] * 6)})")
def layernorm_forward(x, gain, bias, y, xhat, rstd):
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
def layernorm_backward(dy, gain, xhat, rstd, dx, dgain, dbias):
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
