"""Mixture-of-heads attention: a softmax gate per token weighs the heads, then one projection from D.

The Little Baby's `moh`: y = (sum over h of gate(x)_h head_h(x)) Wout + b. Where multi-head attention
concatenates its heads, this adds them up, with weights that depend on the token.
"""

from typing import Any, NamedTuple

from baby_xp.arrays.params import scaled
from baby_xp.layers import dropout, heads, linear, query_key, softmax

DROPOUTS = 2  # places in one block: attention weights, output


class Saved(NamedTuple):
    """What backward needs: mostly what the layers within have saved."""

    qkv: Any
    query_key: Any
    heads: Any
    gate: Any
    softmax: Any
    y: Any
    out: Any
    dropout: Any


def spec(C: int, S: int, H: int, residual_scale: float = 1.0, qkv_bias: bool = False, bias: bool = True):
    """qkv (C, 3 S), gate (C, H), out (D, C)."""
    return {
        "qkv": linear.spec(C, 3 * S, qkv_bias),
        "gate": linear.spec(C, H, bias=False),
        "out": scaled(linear.spec(S // H, C, bias), residual_scale),
    }


def forward(xp, p, x, shape, noise=(None, None), past=None, steps=query_key.NO_STEPS):
    """x (N, C) -> y (N, C). `noise` is that of its two dropouts, `past` as in heads.forward."""
    qkv, qkv_saved = linear.forward(xp, p["qkv"], x)               # (N, 3 S)
    qkv, query_key_saved = query_key.forward(xp, {}, qkv, shape, steps, past)
    y, heads_saved = heads.forward(xp, {}, qkv, shape, noise[0], past)
    gate, gate_saved = linear.forward(xp, p["gate"], x)            # (N, H)
    gate, softmax_saved = softmax.forward(xp, {}, gate)
    y = xp.reshape(y, (x.shape[0], shape.H, -1))                   # (N, H, D)
    mixed = xp.sum(gate[:, :, None] * y, axis=1)                   # (N, D)
    out, out_saved = linear.forward(xp, p["out"], mixed)           # (N, C)
    out, dropout_saved = dropout.forward(xp, {}, out, noise[1])
    saved = qkv_saved, query_key_saved, heads_saved, gate_saved, softmax_saved, y, out_saved, dropout_saved
    return out, Saved(*saved)


def backward(xp, p, saved, dy):
    """dy (N, C) -> dp, dx (N, C)."""
    qkv_saved, query_key_saved, heads_saved, gate_saved, softmax_saved, y, out_saved, dropout_saved = saved
    (gate,) = softmax_saved
    _, dy = dropout.backward(xp, {}, dropout_saved, dy)
    dout, dmixed = linear.backward(xp, p["out"], out_saved, dy)    # (N, D)
    dgate = xp.sum(dmixed[:, None, :] * y, axis=-1)                # (N, H)
    dheads = gate[:, :, None] * dmixed[:, None, :]                 # (N, H, D)
    _, dgate = softmax.backward(xp, {}, softmax_saved, dgate)
    dgate, dx_gate = linear.backward(xp, p["gate"], gate_saved, dgate)
    _, dqkv = heads.backward(xp, {}, heads_saved, xp.reshape(dheads, (y.shape[0], -1)))
    _, dqkv = query_key.backward(xp, {}, query_key_saved, dqkv)
    dqkv, dx = linear.backward(xp, p["qkv"], qkv_saved, dqkv)
    return {"qkv": dqkv, "gate": dgate, "out": dout}, dx + dx_gate
