"""Muon on NumPy: the same as baby_xp/training/muon.py, with fewer operations. See numpy_kernels.py."""

import numpy as np

from baby_xp.training import muon

CHAIN = 5
"""Iterations of Newton-Schulz on the Gram matrix alone. Each multiplies the error of a small eigenvalue by 12."""


def orthogonalize(xp, x, iterations):
    return orthogonalize_scaled(x, iterations, x.dtype.type(1))


class Products:
    """The products of stacks of matrices that the iteration consists of; R is the smaller side of a matrix."""

    def gram(self, x, tall: bool):
        """The products (n, R, R) of the matrices x with themselves, transposed."""
        other = x.swapaxes(1, 2)
        return other @ x if tall else x @ other

    def chain(self, gram, iterations: int):
        """What so many iterations multiply matrices by, of which these are the Gram matrices (n, R, R)."""
        product = q = _newton_schulz(gram)
        for _ in range(1, iterations):
            gram = q @ (q @ gram)
            q = _newton_schulz(gram)
            product = q @ product
        return product

    def apply(self, product, x, tall: bool):
        """`product` (n, R, R) times x, on the smaller side of x."""
        return x @ product if tall else product @ x


def orthogonalize_scaled(x, iterations: int, factor, products=Products()):  # noqa: B008, it has no state
    """factor times muon.orthogonalize, with fewer operations where a matrix is not nearly square.

    What an iteration multiplies x by is a polynomial in the Gram matrix G = x x^T, and all these commute: the next
    iteration's G is q(G) G q(G), so that x itself is needed at the end alone.
    """
    tall, narrow, wide = x.shape[1] > x.shape[2], min(x.shape[1:]), max(x.shape[1:])
    chain = CHAIN if 2 * wide > 3 * narrow else 1
    for first in range(0, iterations, chain):
        last, gram = min(first + chain, iterations), products.gram(x, tall)
        if first == 0:
            norm = np.maximum(np.sqrt(_diagonal(gram).sum(axis=1)), muon.EPS)[:, None, None]
            gram /= norm * norm
        product = products.chain(gram, last - first)
        if first == 0:
            product = product / norm
        if last == iterations:
            product *= factor
        x = products.apply(product, x, tall)
    return x


def _newton_schulz(gram):
    """The factor G (b + c G) + a of one iteration, (n, R, R)."""
    a, b, c = muon.COEFFICIENTS
    factor = c * gram
    _diagonal(factor)[:] += b
    q = gram @ factor
    _diagonal(q)[:] += a
    return q


def _diagonal(matrices):
    """A view of the diagonals (n, R) of contiguous matrices (n, R, R)."""
    return matrices.reshape(len(matrices), -1)[:, :: matrices.shape[1] + 1]
