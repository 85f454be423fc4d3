"""RMSNorm with a learned gain for each channel: y = gain * x / rms (Zhang and Sennrich 2019)."""

from baby_xp.arrays.namespace import replaceable
from baby_xp.arrays.params import ones
from baby_xp.layers import rmsnorm


def spec(C: int):
    """Gain (C,), one."""
    return {"gain": ones(C)}


@replaceable
def forward(xp, p, x):
    """x (N, C) -> y (N, C)."""
    xhat, rmsnorm_saved = rmsnorm.forward(xp, {}, x)               # (N, C)
    return p["gain"] * xhat, (xhat, rmsnorm_saved)


@replaceable
def backward(xp, p, saved, dy):
    """dy (N, C) -> dp, dx (N, C)."""
    xhat, rmsnorm_saved = saved
    _, dx = rmsnorm.backward(xp, {}, rmsnorm_saved, p["gain"] * dy)
    return {"gain": xp.sum(dy * xhat, axis=0)}, dx
