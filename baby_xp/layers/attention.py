"""Multi-head causal self-attention: y = concat(heads(x Wqkv)) Wout + b (Vaswani et al. 2017).

As in The Little Baby, head_size (S), the width of all heads together, need not equal n_emb (C), and queries, keys
and values have no bias unless they are given one.
"""

from typing import Any, NamedTuple

from baby_xp.arrays.params import scaled
from baby_xp.layers import dropout, heads, linear, query_key

DROPOUTS = 2  # places in one block: attention weights, output


class Saved(NamedTuple):
    """What backward needs: mostly what the layers within have saved."""

    qkv: Any
    query_key: Any
    heads: Any
    out: Any
    dropout: Any


def spec(C: int, S: int, H: int, residual_scale: float = 1.0, qkv_bias: bool = False, bias: bool = True):
    """qkv (C, 3 S), the three projections side by side, as one product is faster than three; out (S, C)."""
    return {"qkv": linear.spec(C, 3 * S, qkv_bias), "out": scaled(linear.spec(S, C, bias), residual_scale)}


def forward(xp, p, x, shape, noise=(None, None), past=None, steps=query_key.NO_STEPS):
    """x (N, C) -> y (N, C). `noise` is that of its two dropouts, `past` as in heads.forward."""
    qkv, qkv_saved = linear.forward(xp, p["qkv"], x)               # (N, 3 S)
    qkv, query_key_saved = query_key.forward(xp, {}, qkv, shape, steps, past)
    y, heads_saved = heads.forward(xp, {}, qkv, shape, noise[0], past)
    y, out_saved = linear.forward(xp, p["out"], y)                 # (N, C)
    y, dropout_saved = dropout.forward(xp, {}, y, noise[1])
    return y, Saved(qkv_saved, query_key_saved, heads_saved, out_saved, dropout_saved)


def backward(xp, p, saved, dy):
    """dy (N, C) -> dp, dx (N, C)."""
    qkv_saved, query_key_saved, heads_saved, out_saved, dropout_saved = saved
    _, dy = dropout.backward(xp, {}, dropout_saved, dy)
    dout, dy = linear.backward(xp, p["out"], out_saved, dy)        # (N, S)
    _, dqkv = heads.backward(xp, {}, heads_saved, dy)              # (N, 3 S)
    _, dqkv = query_key.backward(xp, {}, query_key_saved, dqkv)
    dp, dx = linear.backward(xp, p["qkv"], qkv_saved, dqkv)        # (N, C)
    return {"qkv": dp, "out": dout}, dx
