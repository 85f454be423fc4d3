"""Softmax over the last axis: y = exp(x) / sum(exp(x))."""

from baby_xp.arrays.namespace import replaceable


@replaceable
def forward(xp, p, x):
    """x, any shape -> y, of the same shape; -inf gives an exact zero."""
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))              # the largest is exp(0): no overflow
    y = e / xp.sum(e, axis=-1, keepdims=True)
    return y, (y,)


@replaceable
def backward(xp, p, saved, dy):
    """dy, shaped as x -> dp, dx."""
    (y,) = saved
    return {}, y * (dy - xp.sum(dy * y, axis=-1, keepdims=True))
