"""Muon on NumPy: the same as baby_xp/training/muon.py, with fewer operations. See numpy_kernels.py."""

import numpy as np

from baby_xp.training import muon

CHAIN = 5
"""Iterations of Newton-Schulz on the Gram matrix alone. Each multiplies the error of a small eigenvalue by 12."""


def step(xp, w, g, m, scale, lr, momentum, weight_decay, iterations):
    kind = w.dtype.type
    direction = g * kind((1 - momentum) * scale[0])
    new_m = m * kind(momentum)
    new_m += direction
    new_w = new_m * kind(momentum)
    direction += new_w
    np.multiply(w, kind(1 - lr[0] * weight_decay), out=new_w)
    new_w -= orthogonalize_scaled(direction, iterations, kind(lr[0] * muon.step_size(*w.shape[1:])))
    return new_w, new_m


def orthogonalize(xp, x, iterations):
    return orthogonalize_scaled(x, iterations, x.dtype.type(1))


def orthogonalize_scaled(x, iterations: int, factor):
    """factor times muon.orthogonalize, with fewer operations where a matrix is not nearly square.

    What an iteration multiplies x by is a polynomial in the Gram matrix G = x x^T, and all these commute: the next
    iteration's G is q(G) G q(G), so that x itself is needed at the end alone.
    """
    tall, narrow, wide = x.shape[1] > x.shape[2], min(x.shape[1:]), max(x.shape[1:])
    chain = CHAIN if 2 * wide > 3 * narrow else 1
    for first in range(0, iterations, chain):
        other, last = x.swapaxes(1, 2), min(first + chain, iterations)
        gram = other @ x if tall else x @ other                    # (n, R, R), R the smaller side
        if first == 0:
            norm = np.maximum(np.sqrt(_diagonal(gram).sum(axis=1)), muon.EPS)[:, None, None]
            gram /= norm * norm
        product = q = _newton_schulz(gram)
        for _ in range(first + 1, last):
            gram = q @ (q @ gram)
            q = _newton_schulz(gram)
            product = q @ product
        if first == 0:
            product = product / norm
        if last == iterations:
            product *= factor
        x = x @ product if tall else product @ x
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
