"""Linear layer: y = x W + b."""

from baby_xp.arrays.namespace import replaceable
from baby_xp.arrays.params import normal, zeros


def spec(C: int, F: int, bias: bool = True, std: float = 0.02):
    """Weight (C, F), normal with the given std; bias (F,), zero."""
    weight = {"weight": normal(C, F, std=std)}
    return {**weight, "bias": zeros(F)} if bias else weight


@replaceable
def forward(xp, p, x):
    """x (N, C) -> y (N, F)."""
    y = x @ p["weight"]                                            # (N, F)
    if "bias" in p:
        y = y + p["bias"]
    return y, (x,)


@replaceable
def backward(xp, p, saved, dy):
    """dy (N, F) -> dp, dx (N, C)."""
    (x,) = saved
    dp = {"weight": xp.matrix_transpose(x) @ dy}                   # (C, F)
    if "bias" in p:
        dp["bias"] = xp.sum(dy, axis=0)                            # (F,)
    return dp, dy @ xp.matrix_transpose(p["weight"])               # (N, C)
