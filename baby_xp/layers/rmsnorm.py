"""RMSNorm: divide the channels by their root mean square (Zhang and Sennrich 2019), here without a gain.

Unlike layer norm it subtracts no mean and has no parameters.
"""

from baby_xp.arrays.namespace import replaceable

EPS = 1e-6


def spec(C: int):
    """No parameters."""
    return {}


@replaceable
def forward(xp, p, x):
    """x (..., C) -> y (..., C)."""
    square = xp.mean(x * x, axis=-1, keepdims=True)                # (..., 1)
    rstd = 1 / xp.sqrt(square + EPS)                               # (..., 1)
    y = x * rstd                                                   # (..., C)
    return y, (y, rstd)


@replaceable
def backward(xp, p, saved, dy):
    """dy (..., C) -> dp, dx (..., C)."""
    y, rstd = saved
    # up to EPS, y keeps its root mean square of 1: no gradient flows along y
    along_y = xp.mean(dy * y, axis=-1, keepdims=True)              # (..., 1)
    return {}, rstd * (dy - along_y * y)                           # (..., C)
