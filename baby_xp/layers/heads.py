"""Causal scaled dot-product attention, all heads side by side (Vaswani et al. 2017, section 3.2.1).

What multi-head attention and mixture-of-heads attention share: from queries, keys and values in one array,
to one output for each head. It has no parameters of its own.
"""

import math
from typing import Any, NamedTuple

from baby_xp.arrays.namespace import replaceable
from baby_xp.layers import dropout, softmax


class Saved(NamedTuple):
    """What backward needs. A backend's replacement may save other things, but always k and v: see forward."""

    q: Any
    k: Any
    v: Any
    weights: Any
    dropped: Any
    dropout: Any


@replaceable
def forward(xp, p, qkv, shape, noise=None, past=None):
    """qkv (N, 3 S): queries, keys and values side by side -> y (N, S): the heads' outputs side by side.

    `past` is None, or the keys and values (B, H, t, D) of the t tokens before these ones; `saved.k` and `saved.v`
    are those up to and including these tokens: the cache for the next call. `noise` is dropout's.
    """
    q, k, v = split(xp, qkv, shape)                                # (B, H, T, D) each
    if past is not None:
        k, v = xp.concat([past[0], k], axis=2), xp.concat([past[1], v], axis=2)
    scores = q @ xp.matrix_transpose(k) / math.sqrt(q.shape[-1])   # (B, H, T, t + T)
    scores = scores + causal_mask(xp, scores.shape[-2], scores.shape[-1], scores.dtype)
    weights, _ = softmax.forward(xp, {}, scores)
    dropped, dropout_saved = dropout.forward(xp, {}, weights, noise)
    y = dropped @ v                                                # (B, H, T, D)
    return side_by_side(xp, y), Saved(q, k, v, weights, dropped, dropout_saved)


@replaceable
def backward(xp, p, saved, dy):
    """dy (N, S) -> dp, dqkv (N, 3 S). For a forward pass without `past`."""
    q, k, v, weights, dropped, dropout_saved = saved
    B, H, T, D = q.shape
    dy = xp.permute_dims(xp.reshape(dy, (B, T, H, D)), (0, 2, 1, 3))
    ddropped = dy @ xp.matrix_transpose(v)                         # (B, H, T, T)
    _, dweights = dropout.backward(xp, {}, dropout_saved, ddropped)
    _, dscores = softmax.backward(xp, {}, (weights,), dweights)
    dscores = dscores / math.sqrt(D)
    dq = dscores @ k
    dk = xp.matrix_transpose(dscores) @ q
    dv = xp.matrix_transpose(dropped) @ dy
    return {}, xp.concat([side_by_side(xp, d) for d in (dq, dk, dv)], axis=1)


def split(xp, qkv, shape):
    """(N, 3 S) -> queries, keys, values (B, H, T, D) each."""
    qkv = xp.reshape(qkv, (shape.B, shape.T, 3, shape.H, -1))
    qkv = xp.permute_dims(qkv, (2, 0, 3, 1, 4))                    # (3, B, H, T, D)
    return qkv[0, ...], qkv[1, ...], qkv[2, ...]


def side_by_side(xp, y):
    """(B, H, T, D) -> (N, S)."""
    B, H, T, D = y.shape
    return xp.reshape(xp.permute_dims(y, (0, 2, 1, 3)), (B * T, H * D))


def causal_mask(xp, T: int, total: int, dtype):
    """(T, total): 0 where a token sees another, -inf at those after it. The T tokens are the last of total."""
    at = xp.arange(total - T, total, device=xp.device)[:, None]
    seen = xp.arange(total, device=xp.device)[None, :] <= at
    zero = xp.zeros((T, total), dtype=dtype, device=xp.device)
    return xp.where(seen, zero, zero - math.inf)
