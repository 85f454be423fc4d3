"""Products of small linear layers by vectors, see simd.py. The kernels take flat arrays.

A tile of the result, ROWS x 2 vectors, stays in registers while the sum runs over DEPTH terms. The factor whose
rows are vectors is copied first, DEPTH x COLUMNS of it at a time, so that it lies in order in the first-level
cache, where all tiles of these columns find it. BLAS is made for larger matrices: at these sizes its preparations
cost more than they gain.
"""

import numpy as np
from baby_xp_backends import numpy_kernels
from baby_xp_backends.numba_library import COMPILING, FLOATS, compiled, flat
from baby_xp_backends.simd_width import W

from baby_xp.arrays.tree import gradient_of

if COMPILING:
    from baby_xp_backends.simd import (
        axpy,
        axpy_rows,
        load,
        load_rows,
    prefetch_rows,
        repeat,
        spread,
        store,
        store_rows,
        transposed,
    )

ROWS = 8 if W == 16 else 4
COLUMNS = 2 * W
DEPTH = 128
BLOCK = 256
"""Rows that are multiplied by all columns before the next ones: so many stay in the second-level cache."""
LARGEST = 1 << 16
"""Elements of the largest weight that is multiplied here: larger ones need more levels of blocks, as in BLAS."""


@compiled(f"void({', '.join([FLOATS] * 5)}, i8, i8, i8)")
def forward(x, weight, bias, y, scratch, N, C, F):
    """y (N, F) = x (N, C) weight (C, F) + bias (F,)."""
    for top in range(0, N, BLOCK):
        for j in range(0, F, COLUMNS):
            for start in range(0, C, DEPTH):
                depth = min(DEPTH, C - start)
                for k in range(depth):
                    store(scratch, k * COLUMNS, load(weight, (start + k) * F + j))
                    store(scratch, k * COLUMNS + W, load(weight, (start + k) * F + j + W))
                for i in range(top, min(N, top + BLOCK), ROWS):
                    at = i * F + j
                    prefetch_rows(y, at, F, ROWS)
                    prefetch_rows(y, at + W, F, ROWS)
                    if start == 0:
                        p, q = repeat(load(bias, j), ROWS), repeat(load(bias, j + W), ROWS)
                    else:
                        p, q = load_rows(y, at, F, ROWS), load_rows(y, at + W, F, ROWS)
                    for k in range(depth):
                        p = axpy_rows(load(scratch, k * COLUMNS), x, i * C + start + k, C, p)
                        q = axpy_rows(load(scratch, k * COLUMNS + W), x, i * C + start + k, C, q)
                    store_rows(y, at, F, p)
                    store_rows(y, at + W, F, q)


@compiled(f"void({', '.join([FLOATS] * 4)}, i8, i8, i8, b1)")
def backward(dy, weight, dx, scratch, N, C, F, upper):
    """dx (N, C) = dy (N, F) times the transpose of weight (C, F). upper: without what lies below the diagonal."""
    for top in range(0, N, BLOCK):
        for j in range(0, C, COLUMNS):
            for start in range(0, F, DEPTH):
                depth = min(DEPTH, F - start)
                for k in range(0, depth, W):
                    for half in range(0, COLUMNS, W):
                        block = transposed(load_rows(weight, (j + half) * F + start + k, F, W))
                        store_rows(scratch, k * COLUMNS + half, COLUMNS, block)
                for i in range(top, min(j + COLUMNS if upper else N, top + BLOCK), ROWS):
                    at = i * C + j
                    prefetch_rows(dx, at, C, ROWS)
                    prefetch_rows(dx, at + W, C, ROWS)
                    if start == 0:
                        p, q = repeat(spread(0.0), ROWS), repeat(spread(0.0), ROWS)
                    else:
                        p, q = load_rows(dx, at, C, ROWS), load_rows(dx, at + W, C, ROWS)
                    for k in range(depth):
                        p = axpy_rows(load(scratch, k * COLUMNS), dy, i * F + start + k, F, p)
                        q = axpy_rows(load(scratch, k * COLUMNS + W), dy, i * F + start + k, F, q)
                    store_rows(dx, at, C, p)
                    store_rows(dx, at + W, C, q)


@compiled(f"void({', '.join([FLOATS] * 4)}, i8, i8, i8, b1)")
def of_weight(x, dy, dweight, scratch, N, C, F, upper):
    """dweight (C, F) = the transpose of x (N, C) times dy (N, F). x is copied too, in panels of W columns.

    upper: without what lies below the diagonal.
    """
    copied = DEPTH * COLUMNS
    for start in range(0, N, DEPTH):
        depth = min(DEPTH, N - start)
        for i in range(0, C, W):
            for k in range(depth):
                store(scratch, copied + i * DEPTH + k * W, load(x, (start + k) * C + i))
        for j in range(0, F, COLUMNS):
            for k in range(depth):
                store(scratch, k * COLUMNS, load(dy, (start + k) * F + j))
                store(scratch, k * COLUMNS + W, load(dy, (start + k) * F + j + W))
            for i in range(0, j + COLUMNS if upper else C, ROWS):
                at, column = i * F + j, copied + i // W * W * DEPTH + i % W
                prefetch_rows(dweight, at, F, ROWS)
                prefetch_rows(dweight, at + W, F, ROWS)
                if start == 0:
                    p, q = repeat(spread(0.0), ROWS), repeat(spread(0.0), ROWS)
                else:
                    p, q = load_rows(dweight, at, F, ROWS), load_rows(dweight, at + W, F, ROWS)
                for k in range(depth):
                    p = axpy(load(scratch, k * COLUMNS), scratch, column + k * W, p)
                    q = axpy(load(scratch, k * COLUMNS + W), scratch, column + k * W, q)
                store_rows(dweight, at, F, p)
                store_rows(dweight, at + W, F, q)


SCRATCH = np.empty(DEPTH * (COLUMNS + LARGEST // COLUMNS), np.float32)


def fit(N: int, C: int, F: int) -> bool:
    """Whether the kernels take these sizes: of N, C and F, F as columns and the others as rows or terms."""
    return N > 0 and N % ROWS == 0 and F % COLUMNS == 0 and C * F <= LARGEST


def linear_forward(xp, p, x):
    weight = p["weight"]
    (N, C), F = x.shape, weight.shape[1]
    if x.dtype != np.float32 or not fit(N, C, F):
        return numpy_kernels.linear_forward(xp, p, x)
    y = np.empty((N, F), x.dtype)
    bias = p["bias"] if "bias" in p else np.zeros(F, x.dtype)
    forward(flat(x), flat(weight), flat(bias), y.reshape(-1), SCRATCH, N, C, F)
    return y, (x,)


def linear_backward(xp, p, saved, dy):
    (x,), weight = saved, p["weight"]
    (N, C), F = x.shape, weight.shape[1]
    if dy.dtype != np.float32 or x.dtype != np.float32 or C % COLUMNS or not fit(N, C, F):
        return numpy_kernels.linear_backward(xp, p, saved, dy)
    dweight, dx = gradient_of(p, "weight"), np.empty((N, C), x.dtype)
    if dweight is None or not dweight.flags.carray:
        dweight = np.empty((C, F), x.dtype)
    of_weight(flat(x), flat(dy), dweight.reshape(-1), SCRATCH, N, C, F, False)
    backward(flat(dy), flat(weight), dx.reshape(-1), SCRATCH, N, C, F, False)
    dp = {"weight": dweight}
    if "bias" in p:
        dp["bias"] = np.matmul(numpy_kernels.ones(N, dy.dtype), dy, out=gradient_of(p, "bias"))
    return dp, dx
