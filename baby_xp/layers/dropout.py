"""Dropout: in training, each element is set to zero with probability `rate`, and the others are scaled by
1 / (1 - rate).

Srivastava et al. 2014, in the inverted form, which needs nothing at evaluation. A hash of step, sample and place
in the model decides which elements survive (see rng.py), not a generator with a state.
"""

from baby_xp.arrays import rng
from baby_xp.arrays.namespace import replaceable


def forward(xp, p, x, noise=None):
    """x, any shape whose first axis is B or N, sample by sample -> y, of the same shape.

    `noise` is (stream (B,) int32, rate), or None where nothing is to be dropped.
    """
    if noise is None:
        return x, None
    stream, rate = noise
    y, keep = drop(xp, x, stream, rate)
    return y, (keep, rate)


def backward(xp, p, saved, dy):
    """dy, shaped as x -> dp, dx."""
    if saved is None:
        return {}, dy
    keep, rate = saved
    return {}, select(xp, keep, dy, rate)


@replaceable
def drop(xp, x, stream, rate: float):
    """x -> y, shaped as x, and what `select` needs to find the survivors again: here their mask, shaped as x."""
    B = stream.shape[0]
    size = 1
    for length in x.shape:
        size *= length
    keep = xp.reshape(rng.keep_mask(xp, stream, size // B, rate), x.shape)
    return select(xp, keep, x, rate), keep


@replaceable
def select(xp, keep, x, rate: float):
    """Survivors scaled, the others zero."""
    return xp.where(keep, x * rng.survivor_scale(rate), xp.zeros_like(x))
