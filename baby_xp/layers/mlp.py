"""The feed-forward network of a block: y = gelu(x Wup + b) Wdown + b, four times as wide inside."""

from baby_xp.arrays.params import scaled
from baby_xp.layers import dropout, gelu, linear

DROPOUTS = 1  # places in one block: output
EXPANSION = 4


def spec(C: int, residual_scale: float = 1.0):
    """up (C, F), down (F, C), F = 4 C."""
    F = EXPANSION * C
    return {"up": linear.spec(C, F), "down": scaled(linear.spec(F, C), residual_scale)}


def forward(xp, p, x, noise=(None,), form: str = "tanh"):
    """x (N, C) -> y (N, C). `noise` is that of its dropout, `form` that of its GELU."""
    h, up_saved = linear.forward(xp, p["up"], x)                   # (N, F)
    h, gelu_saved = gelu.forward(xp, {}, h, form)
    y, down_saved = linear.forward(xp, p["down"], h)               # (N, C)
    y, dropout_saved = dropout.forward(xp, {}, y, noise[0])
    return y, (up_saved, gelu_saved, down_saved, dropout_saved)


def backward(xp, p, saved, dy):
    """dy (N, C) -> dp, dx (N, C)."""
    up_saved, gelu_saved, down_saved, dropout_saved = saved
    _, dy = dropout.backward(xp, {}, dropout_saved, dy)
    ddown, dh = linear.backward(xp, p["down"], down_saved, dy)     # (N, F)
    _, dh = gelu.backward(xp, {}, gelu_saved, dh)
    dup, dx = linear.backward(xp, p["up"], up_saved, dh)           # (N, C)
    return {"up": dup, "down": ddown}, dx
