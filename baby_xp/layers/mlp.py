"""The feed-forward network of a block: y = activation(x Wup + b) Wdown + b, four times as wide inside.

The activation is a module: gelu, relu2 or swiglu.
"""

from baby_xp.arrays.params import scaled
from baby_xp.layers import dropout, gelu, linear

DROPOUTS = 1  # places in one block: output
EXPANSION = 4


def spec(C: int, residual_scale: float = 1.0, activation=gelu, bias: bool = True):
    """up (C, F), down (F, C); up is (C, 2 F) for an activation that makes one channel of two."""
    F = width(C, activation)
    up = linear.spec(C, activation.INPUTS * F, bias)
    return {"up": up, "down": scaled(linear.spec(F, C, bias), residual_scale)}


def width(C: int, activation) -> int:
    """Hidden channels F: 4 C, or 8 C / 3 where up has twice as many, for the same number of weights."""
    return 2 * EXPANSION * C // (activation.INPUTS + 1)


def forward(xp, p, x, noise=(None,), activation=gelu, *form):
    """x (N, C) -> y (N, C). `noise` is that of its dropout, `form` the activation's, if it has several."""
    h, up_saved = linear.forward(xp, p["up"], x)                   # (N, F)
    h, activation_saved = activation.forward(xp, {}, h, *form)
    y, down_saved = linear.forward(xp, p["down"], h)               # (N, C)
    y, dropout_saved = dropout.forward(xp, {}, y, noise[0])
    return y, (up_saved, activation_saved, down_saved, dropout_saved)


def backward(xp, p, saved, dy, activation=gelu):
    """dy (N, C) -> dp, dx (N, C)."""
    up_saved, activation_saved, down_saved, dropout_saved = saved
    _, dy = dropout.backward(xp, {}, dropout_saved, dy)
    ddown, dh = linear.backward(xp, p["down"], down_saved, dy)     # (N, F)
    _, dh = activation.backward(xp, {}, activation_saved, dh)
    dup, dx = linear.backward(xp, p["up"], up_saved, dh)           # (N, C)
    return {"up": dup, "down": ddown}, dx
