"""Layer normalisation over channels: y = gain * xhat + bias, xhat = (x - mean) / std (Ba et al. 2016)."""

from baby_xp.arrays.namespace import replaceable
from baby_xp.arrays.params import ones, zeros

EPS = 1e-5


def spec(C: int):
    """Gain (C,), one; bias (C,), zero."""
    return {"gain": ones(C), "bias": zeros(C)}


@replaceable
def forward(xp, p, x):
    """x (N, C) -> y (N, C)."""
    centred = x - xp.mean(x, axis=-1, keepdims=True)               # (N, C)
    variance = xp.mean(centred * centred, axis=-1, keepdims=True)  # (N, 1)
    rstd = 1 / xp.sqrt(variance + EPS)                             # (N, 1)
    xhat = centred * rstd                                          # (N, C)
    return p["gain"] * xhat + p["bias"], (xhat, rstd)


@replaceable
def backward(xp, p, saved, dy):
    """dy (N, C) -> dp, dx (N, C)."""
    xhat, rstd = saved
    dxhat = p["gain"] * dy                                         # (N, C)
    # up to EPS, xhat keeps mean 0 and variance 1: no gradient flows along 1 or xhat
    along_one = xp.mean(dxhat, axis=-1, keepdims=True)             # (N, 1)
    along_xhat = xp.mean(dxhat * xhat, axis=-1, keepdims=True)     # (N, 1)
    dx = rstd * (dxhat - along_one - along_xhat * xhat)            # (N, C)
    return {"gain": xp.sum(dy * xhat, axis=0), "bias": xp.sum(dy, axis=0)}, dx
