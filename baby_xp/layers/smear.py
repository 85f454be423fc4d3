"""Smear: to each token's vector, a gated share of the vector of the token before it is added.

    n = rmsnorm(x);  y_t = n_t + scale sigmoid(n_t gate) n_(t-1)

The first token of a text has none before it. From the record runs of modded-nanogpt (Jordan et al. 2024, "smear
token embed forward 1 position") and from nanochat (Karpathy 2025, "smear"). The scale is zero at first, so that a
model begins as it would without this layer.
"""

from typing import Any, NamedTuple

from baby_xp.arrays.params import zeros
from baby_xp.layers import Shape, linear, rmsnorm


class Saved(NamedTuple):
    """What backward needs, and the normed vectors (N, C), of which the last of each text is the next `before`."""

    shape: Shape
    normed: Any
    gate: Any
    norm: Any


def spec(C: int):
    """gate (C, 1), without bias; scale (1,), zero."""
    return {"gate": linear.spec(C, 1, bias=False), "scale": zeros(1)}


def forward(xp, p, x, shape, before=None):
    """x (N, C) -> y (N, C). `before` is what `last` gave for the tokens before these, or None."""
    normed, norm_saved = rmsnorm.forward(xp, {}, x)                # (N, C)
    logit = normed @ p["gate"]["weight"]                           # (N, 1)
    gate = 0.5 * (1 + xp.tanh(0.5 * logit))                        # sigmoid; exp(-logit) could overflow
    y = normed + p["scale"] * gate * earlier(xp, normed, shape, before)
    return y, Saved(shape, normed, gate, norm_saved)


def backward(xp, p, saved, dy):
    """dy (N, C) -> dp, dx (N, C). For a forward pass without `before`."""
    shape, normed, gate, norm_saved = saved
    dshare = xp.vecdot(dy, earlier(xp, normed, shape))[:, None]    # (N, 1), of scale * gate
    dlogit = p["scale"] * dshare * gate * (1 - gate)               # (N, 1)
    dgate = {"weight": xp.matrix_transpose(normed) @ dlogit}       # (C, 1)
    # a product of matrices with one column and one row would be slow
    through_gate = dlogit * xp.matrix_transpose(p["gate"]["weight"])  # (N, C)
    dnormed = dy + through_gate + later(xp, p["scale"] * gate * dy, shape)
    _, dx = rmsnorm.backward(xp, {}, norm_saved, dnormed)
    return {"gate": dgate, "scale": xp.sum(gate * dshare, axis=0)}, dx


def earlier(xp, x, shape, before=None):
    """Each token's row of x (N, C) becomes that of the token before; the first of a text is `before`, or zero."""
    x = xp.reshape(x, (shape.B, shape.T, -1))                      # (B, T, C)
    first = xp.zeros_like(x[:, :1, :]) if before is None else before[:, None, :]
    return xp.reshape(xp.concat([first, x[:, :-1, :]], axis=1), (shape.B * shape.T, -1))


def later(xp, x, shape):
    """Each token's row of x (N, C) becomes that of the token after; the last of a text is zero."""
    x = xp.reshape(x, (shape.B, shape.T, -1))                      # (B, T, C)
    return xp.reshape(xp.concat([x[:, 1:, :], xp.zeros_like(x[:, :1, :])], axis=1), (shape.B * shape.T, -1))


def last(xp, saved):
    """From what forward saved: the normed vectors (B, C) of the last token of each text."""
    return xp.reshape(saved.normed, (saved.shape.B, saved.shape.T, -1))[:, -1, :]
