"""Rotary position embedding: the vector at position t is rotated by angles proportional to t (Su et al. 2021).

Channel i of the first half and channel i of the second half are the two coordinates of a point, which is rotated
by t * BASE^(-2 i / D). The scalar product of a rotated query and a rotated key then depends on how far apart they
are, not on where they are.
"""

import math

BASE = 10_000


def forward(xp, p, x, t: int = 0):
    """x (B, T, H, D), D even, at the positions t to t + T - 1 -> y (B, T, H, D).

    The direction is that of NanoChat: (a, b) -> (a cos + b sin, b cos - a sin).
    """
    cos, sin = tables(xp, t, x.shape[1], x.shape[3], x.dtype)      # (T, 1, D / 2) each
    return rotated(xp, x, cos, sin), (cos, sin)


def backward(xp, p, saved, dy):
    """dy (B, T, H, D) -> dp, dx (B, T, H, D): the rotation back, as a rotation's transpose is its inverse."""
    cos, sin = saved
    return {}, rotated(xp, dy, cos, -sin)


def rotated(xp, x, cos, sin):
    """Each pair (a, b) of x (B, T, H, D) rotated by the angles of its position."""
    half = x.shape[3] // 2
    a, b = x[..., :half], x[..., half:]                            # (B, T, H, D / 2) each
    return xp.concat([a * cos + b * sin, b * cos - a * sin], axis=-1)


def tables(xp, t: int, T: int, D: int, dtype):
    """Cosines and sines (T, 1, D / 2) of the angles at the positions t to t + T - 1."""
    positions = xp.arange(t, t + T, dtype=dtype, device=xp.device)
    pairs = xp.arange(D // 2, dtype=dtype, device=xp.device)
    frequencies = xp.exp(-2 * math.log(BASE) / D * pairs)          # (D / 2,), BASE^(-2 i / D)
    angles = positions[:, None, None] * frequencies[None, None, :]
    return xp.cos(angles), xp.sin(angles)
