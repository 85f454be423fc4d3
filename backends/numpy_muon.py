"""Muon on NumPy: the same as baby_xp/training/muon.py, with fewer operations. See numpy_kernels.py."""

import numpy as np

from baby_xp.training import muon


def step(xp, w, g, m, scale, lr, momentum, weight_decay, iterations):
    kind = w.dtype.type
    direction = g * kind((1 - momentum) * scale[0])
    new_m = m * kind(momentum)
    new_m += direction
    new_w = new_m * kind(momentum)
    direction += new_w
    direction = muon.orthogonalize(xp, direction, iterations)
    direction *= kind(lr[0] * muon.step_size(*w.shape[1:]))
    np.multiply(w, kind(1 - lr[0] * weight_decay), out=new_w)
    new_w -= direction
    return new_w, new_m


CHAIN = 5
"""Iterations of Newton-Schulz on the Gram matrix alone. Each multiplies the error of a small eigenvalue by 12."""


def orthogonalize(xp, x, iterations):
    """As muon.orthogonalize, with fewer operations where a matrix is not nearly square.

    What an iteration multiplies x by is a polynomial in the Gram matrix G = x x^T, and all these commute: the next
    iteration's G is q(G) G q(G), so that x itself is needed at the end alone.
    """
    tall, narrow, wide = x.shape[1] > x.shape[2], min(x.shape[1:]), max(x.shape[1:])
    flat = x.reshape(len(x), -1)
    x = x / np.maximum(np.sqrt(np.vecdot(flat, flat)), muon.EPS)[:, None, None]
    chain = CHAIN if 2 * wide > 3 * narrow else 1
    for first in range(0, iterations, chain):
        other = x.swapaxes(1, 2)
        gram = other @ x if tall else x @ other                    # (n, R, R), R the smaller side
        product = q = _newton_schulz(gram)
        for _ in range(first + 1, min(first + chain, iterations)):
            gram = q @ (q @ gram)
            q = _newton_schulz(gram)
            product = q @ product
        x = x @ product if tall else product @ x
    return x


def _newton_schulz(gram):
    """The factor a + b G + c G^2 of one iteration, (n, R, R)."""
    a, b, c = muon.COEFFICIENTS
    q = gram @ gram
    q *= c
    q += b * gram
    q.reshape(len(q), -1)[:, :: q.shape[1] + 1] += a
    return q
