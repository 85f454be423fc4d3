"""The products of Muon's iteration by vectors, see simd.py and numba_products.py.

Nearly all of them are products of symmetric matrices that commute, as all are polynomials in one Gram matrix. Such
a product is symmetric, so that what lies below the diagonal blocks is copied, not computed.
"""

import numpy as np
from baby_xp_backends import numpy_muon
from baby_xp_backends.numba_library import COMPILING, FLOATS, compiled, flat
from baby_xp_backends.numba_products import COLUMNS, DEPTH, LARGEST, ROWS, SCRATCH, backward, forward, of_weight
from baby_xp_backends.simd_width import W

if COMPILING:
    from baby_xp_backends.simd import axpy_rows, load, load_rows, repeat, spread, store, store_rows, transposed


@compiled(f"void({FLOATS}, i8)")
def mirror(c, R):
    """Copy what lies above the diagonal blocks of c (R, R) to below them."""
    for j in range(0, R, W):
        for i in range(0, j // COLUMNS * COLUMNS, W):
            store_rows(c, j * R + i, R, transposed(load_rows(c, i * R + j, R, W)))


@compiled(f"void({', '.join([FLOATS] * 4)}, i8)")
def commuting(a, b, c, scratch, R):
    """c (R, R) = a b, for symmetric a and b that commute."""
    for j in range(0, R, COLUMNS):
        for start in range(0, R, DEPTH):
            depth = min(DEPTH, R - start)
            for k in range(depth):
                store(scratch, k * COLUMNS, load(b, (start + k) * R + j))
                store(scratch, k * COLUMNS + W, load(b, (start + k) * R + j + W))
            for i in range(0, j + COLUMNS, ROWS):
                at = i * R + j
                if start == 0:
                    p, q = repeat(spread(0.0), ROWS), repeat(spread(0.0), ROWS)
                else:
                    p, q = load_rows(c, at, R, ROWS), load_rows(c, at + W, R, ROWS)
                for k in range(depth):
                    p = axpy_rows(load(scratch, k * COLUMNS), a, i * R + start + k, R, p)
                    q = axpy_rows(load(scratch, k * COLUMNS + W), a, i * R + start + k, R, q)
                store_rows(c, at, R, p)
                store_rows(c, at + W, R, q)
    mirror(c, R)


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
            mirror(out.reshape(-1), R)
        return found

    def commuting(self, a, b):
        R = a.shape[1]
        if not fit(R, R):
            return super().commuting(a, b)
        found = np.empty_like(a)
        for one, other, out in zip(a, b, found, strict=True):
            commuting(flat(one), flat(other), out.reshape(-1), SCRATCH, R)
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
