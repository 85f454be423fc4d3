"""The products of Muon's iteration by vectors, see simd.py and numba_products.py.

Nearly all of them are products of symmetric matrices that commute, as all are polynomials in one Gram matrix. Such
a product is symmetric, so that what lies below the diagonal blocks is copied, not computed.
"""

import numpy as np
from baby_xp_backends import numpy_muon
from baby_xp_backends.numba_library import COMPILING, FLOATS, compiled, flat
from baby_xp_backends.numba_products import COLUMNS, DEPTH, LARGEST, ROWS, SCRATCH, backward, forward, of_weight
from baby_xp_backends.simd_width import W

from baby_xp.training import muon

if COMPILING:
    from baby_xp_backends.simd import axpy_rows, load, load_rows, repeat, spread, store, store_rows, transposed


@compiled(f"void({FLOATS}, i8, i8)")
def mirror(c, at, R):
    """Copy what lies above the diagonal blocks (W, W) of a matrix (R, R), which begins at c[at], to below them."""
    for j in range(0, R, W):
        for i in range(0, j, W):
            store_rows(c, at + j * R + i, R, transposed(load_rows(c, at + i * R + j, R, W)))


@compiled(f"void({FLOATS}, i8, i8, i8, {FLOATS}, i8)")
def commuting(matrices, a, b, c, scratch, R):
    """c (R, R) = a b, for symmetric a and b that commute; a, b and c say where they begin in `matrices`."""
    for j in range(0, R, COLUMNS):
        for start in range(0, R, DEPTH):
            depth = min(DEPTH, R - start)
            for k in range(depth):
                store(scratch, k * COLUMNS, load(matrices, b + (start + k) * R + j))
                store(scratch, k * COLUMNS + W, load(matrices, b + (start + k) * R + j + W))
            for i in range(j + W, j + COLUMNS, ROWS):  # of these rows, the first vector is below the diagonal
                at, row = c + i * R + j + W, a + i * R + start
                q = load_rows(matrices, at, R, ROWS) if start else repeat(spread(0.0), ROWS)
                for k in range(depth):
                    q = axpy_rows(load(scratch, k * COLUMNS + W), matrices, row + k, R, q)
                store_rows(matrices, at, R, q)
            for i in range(0, j + W, ROWS):
                at, row = c + i * R + j, a + i * R + start
                if start == 0:
                    p, q = repeat(spread(0.0), ROWS), repeat(spread(0.0), ROWS)
                else:
                    p, q = load_rows(matrices, at, R, ROWS), load_rows(matrices, at + W, R, ROWS)
                for k in range(depth):
                    p = axpy_rows(load(scratch, k * COLUMNS), matrices, row + k, R, p)
                    q = axpy_rows(load(scratch, k * COLUMNS + W), matrices, row + k, R, q)
                store_rows(matrices, at, R, p)
                store_rows(matrices, at + W, R, q)
    mirror(matrices, c, R)


@compiled(f"void({FLOATS}, {FLOATS}, {FLOATS}, {FLOATS}, i8, i8, f8, f8, f8)")
def chain(gram, product, matrices, scratch, R, iterations, a, b, c):
    """product (R, R) is written: as numpy_muon.Products.chain, of one matrix. matrices: room for four of them."""
    size = R * R
    q, done, other = size, 2 * size, 3 * size
    for i in range(0, size, W):
        store(matrices, i, load(gram, i))
    for iteration in range(iterations):
        if iteration:
            commuting(matrices, q, 0, other, scratch, R)
            commuting(matrices, q, other, 0, scratch, R)
        commuting(matrices, 0, 0, q, scratch, R)
        for i in range(0, size, W):
            store(matrices, q + i, load(matrices, q + i) * c + load(matrices, i) * b)
        for i in range(R):
            matrices[q + i * (R + 1)] += np.float32(a)
        if iteration:
            commuting(matrices, q, done, other, scratch, R)
            done, other = other, done
        else:
            for i in range(0, size, W):
                store(matrices, done + i, load(matrices, q + i))
    for i in range(0, size, W):
        store(product, i, load(matrices, done + i))


class Products(numpy_muon.Products):
    """As numpy_muon.Products, for float32 and sizes of whole vectors; BLAS has the others."""

    def gram(self, x, tall):
        n, A, B = x.shape
        R = min(A, B)
        if not fit(A, B):
            return super().gram(x, tall)
        found = np.empty((n, R, R), np.float32)
        for one, out in zip(x, found, strict=True):
            same = flat(one)
            if tall:
                of_weight(same, same, out.reshape(-1), SCRATCH, A, B, B, True)
            else:
                backward(same, same, out.reshape(-1), SCRATCH, A, A, B, True)
            mirror(out.reshape(-1), 0, R)
        return found

    def chain(self, gram, iterations):
        R = gram.shape[1]
        if not fit(R, R):
            return super().chain(gram, iterations)
        found, room = np.empty_like(gram), np.empty(4 * R * R, np.float32)
        for one, out in zip(gram, found, strict=True):
            chain(flat(one), out.reshape(-1), room, SCRATCH, R, iterations, *muon.COEFFICIENTS)
        return found

    def apply(self, product, x, tall):
        _, A, B = x.shape
        if not fit(A, B):
            return super().apply(product, x, tall)
        found, zeros = np.empty(x.shape, np.float32), np.zeros(B, np.float32)
        for one, other, out in zip(product, x, found, strict=True):
            first, second = (other, one) if tall else (one, other)
            forward(flat(first), flat(second), zeros, out.reshape(-1), SCRATCH, A, first.shape[1], B)
        return found


def fit(A: int, B: int) -> bool:
    """Whether the kernels take matrices of A x B, and their products."""
    return A % COLUMNS == 0 and B % COLUMNS == 0 and A * B <= LARGEST
