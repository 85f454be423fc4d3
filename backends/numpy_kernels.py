"""Faster forms of the functions marked @replaceable, for NumPy alone.

Same arguments, same results to rounding (a test compares each with its plain form); `saved` may hold other
things, as the forward and the backward of a layer are replaced together. What makes them faster:

- work in place on arrays of their own, in pieces that stay in the cache: a pass over an array that outgrows
  the cache costs two to three times as much;
- sums over the last axis as products with ones, which BLAS does four times as fast as `sum`;
- no `where` with a random mask, whose branches cost 4 ns an element: multiply by the mask instead.
"""

import functools
import math

import numpy as np

from baby_xp import rng
from baby_xp.layers import gelu, heads, layernorm
from baby_xp.optim import EPS

PIECE = 65536
"""Elements of one piece: few enough for the cache, and enough that the calls, 1 to 2 microseconds each, vanish."""


def pieces(rows: int, width: int):
    """Slices of rows such that a piece of (rows, width) has about PIECE elements."""
    step = max(1, PIECE // max(1, width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@functools.lru_cache(maxsize=64)
def ones(n: int, dtype) -> np.ndarray:
    """(n,) ones, for sums as products."""
    return np.ones(n, dtype)


# linear -------------------------------------------------------------------------------------------------


def linear_forward(xp, p, x):
    y = x @ p["weight"]
    if "bias" in p:
        y += p["bias"]
    return y, (x,)


def linear_backward(xp, p, saved, dy):
    (x,) = saved
    dp = {"weight": x.T @ dy}
    if "bias" in p:
        dp["bias"] = ones(dy.shape[0], dy.dtype) @ dy
    return dp, dy @ p["weight"].T


# layer norm ---------------------------------------------------------------------------------------------


def layernorm_forward(xp, p, x):
    N, C = x.shape
    y, xhat, rstd = np.empty_like(x), np.empty_like(x), np.empty((N, 1), x.dtype)
    mean_of = ones(C, x.dtype) / C
    for s in pieces(N, C):
        centred = np.subtract(x[s], (x[s] @ mean_of)[:, None], out=xhat[s])
        power = np.vecdot(centred, centred)[:, None] / C
        np.divide(1, np.sqrt(power + layernorm.EPS), out=rstd[s])
        centred *= rstd[s]
        np.multiply(centred, p["gain"], out=y[s])
        y[s] += p["bias"]
    return y, (xhat, rstd)


def layernorm_backward(xp, p, saved, dy):
    xhat, rstd = saved
    N, C = dy.shape
    dx, dgain, mean_of = np.empty_like(dy), np.zeros(C, dy.dtype), ones(C, dy.dtype) / C
    for s in pieces(N, C):
        along = dy[s] * xhat[s]
        dgain += ones(len(along), dy.dtype) @ along
        dxhat = np.multiply(dy[s], p["gain"], out=dx[s])
        along_one = (dxhat @ mean_of)[:, None]
        along_xhat = np.vecdot(dxhat, xhat[s])[:, None] / C
        dxhat -= along_one
        dxhat -= np.multiply(xhat[s], along_xhat, out=along)
        dxhat *= rstd[s]
    return {"gain": dgain, "bias": ones(N, dy.dtype) @ dy}, dx


# GELU ---------------------------------------------------------------------------------------------------


def gelu_tanh_form(xp, x):
    """(1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)): without AVX-512, NumPy's tanh costs twice its exp."""
    y, slope = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)
    flat_x, flat_y, flat_slope = np.ascontiguousarray(x).reshape(-1), y.reshape(-1), slope.reshape(-1)
    a, b = np.empty(min(PIECE, x.size), x.dtype), np.empty(min(PIECE, x.size), x.dtype)
    for s in pieces(x.size, 1):
        _gelu_piece(flat_x[s], flat_y[s], flat_slope[s], a[: s.stop - s.start], b[: s.stop - s.start])
    return y, slope


def _gelu_piece(x, y, slope, below, square):
    twice = 2 * gelu.ROOT_2_OVER_PI
    np.multiply(x, x, out=square)
    np.multiply(square, -twice * gelu.CUBIC, out=below)
    below -= twice
    below *= x                                                     # -2 u
    with np.errstate(over="ignore"):                               # exp(-2 u) = inf gives 0, as it should
        np.exp(below, out=below)
    below += 1
    np.divide(1, below, out=below)
    np.multiply(x, below, out=y)
    square *= 3 * twice * gelu.CUBIC
    square += twice                                                # 2 du
    square *= y
    np.subtract(1, below, out=slope)
    slope *= square
    slope += below


# softmax and attention ----------------------------------------------------------------------------------


def softmax_forward(xp, p, x):
    y = x - np.max(x, axis=-1, keepdims=True)
    np.exp(y, out=y)
    y /= np.sum(y, axis=-1, keepdims=True)
    return y, (y,)


def heads_forward(xp, p, qkv, shape, noise=None, past=None):
    if past is not None:
        return heads.forward.__wrapped__(xp, p, qkv, shape, noise, past)
    q, k, v = heads.split(xp, qkv, shape)
    B, H, T, D = q.shape
    scale = qkv.dtype.type(1 / math.sqrt(D))
    weights = np.empty((B, H, T, T), qkv.dtype)
    y = np.empty((B, T, H, D), qkv.dtype)
    keep, rate = None, 0.0
    if noise is not None:
        rate = noise[1]
        keep = rng.keep_mask(xp, noise[0], H * T * T, rate).reshape(weights.shape)
    for b, h in _blocks(B, H, T):
        # scaled before the product: (T, D) has fewer elements than (T, T)
        w = np.matmul(q[b, h] * scale, k[b, h].swapaxes(-1, -2), out=weights[b, h])
        _causal_softmax(w)
        if keep is not None:
            w = w * keep[b, h]
        np.matmul(w, v[b, h], out=y[b].swapaxes(0, 1)[h])
    if keep is not None:
        y *= qkv.dtype.type(rng.survivor_scale(rate))
    return y.reshape(B * T, H * D), (q, k, v, weights, y, keep, rate)


def heads_backward(xp, p, saved, dy):
    q, k, v, weights, y, keep, rate = saved
    B, H, T, D = q.shape
    dy = dy.reshape(B, T, H, D)
    # the sum over keys of dweights * weights is the sum over channels of dy * y
    along = np.vecdot(dy, y).swapaxes(1, 2)[..., None]             # (B, H, T, 1)
    if keep is not None:
        dy = dy * dy.dtype.type(rng.survivor_scale(rate))
    dy = dy.swapaxes(1, 2)                                         # (B, H, T, D)
    dqkv = np.empty((B, T, 3, H, D), dy.dtype)
    dq, dk, dv = (dqkv[:, :, i].swapaxes(1, 2) for i in range(3))
    for b, h in _blocks(B, H, T):
        w = weights[b, h]
        dw = dy[b, h] @ v[b, h].swapaxes(-1, -2)
        dropped = w
        if keep is not None:
            dw *= keep[b, h]
            dropped = w * keep[b, h]
        np.matmul(dropped.swapaxes(-1, -2), dy[b, h], out=dv[b, h])
        dw -= along[b, h]
        dw *= w                                                    # dscores, but for the scale
        np.matmul(dw, k[b, h], out=dq[b, h])
        np.matmul(dw.swapaxes(-1, -2), q[b, h], out=dk[b, h])
    dqkv[:, :, :2] *= dy.dtype.type(1 / math.sqrt(D))              # dq and dk
    return {}, dqkv.reshape(B * T, 3 * H * D)


def _blocks(B: int, H: int, T: int):
    """(sample, slice of heads) such that a block's (heads, T, T) scores stay in the cache."""
    step = max(1, PIECE // (T * T))
    return [(b, slice(h, min(h + step, H))) for b in range(B) for h in range(0, H, step)]


def _causal_softmax(scores):
    """In place, over the last axis of (heads, T, T), with zeros above the diagonal.

    It shifts by the largest score of the block, not of each row: that is one fast pass. Where a row then
    underflows, the block is done again row by row.
    """
    T, kind = scores.shape[-1], scores.dtype
    before = scores.copy() if _spread_is_wide(scores) else None
    scores -= np.max(scores)
    np.exp(scores, out=scores)
    scores *= _lower_triangle(T, kind)
    total = scores @ ones(T, kind)
    if before is not None and np.min(total) < np.finfo(kind).tiny * 1e8:
        np.copyto(scores, np.where(_lower_triangle(T, kind) > 0, before, -np.inf))
        scores -= np.max(scores, axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores @ ones(T, kind)
    scores *= (1 / total)[..., None]


def _spread_is_wide(scores) -> bool:
    """Whether some row could underflow when shifted by the largest score of the block."""
    limit = -0.9 * math.log(np.finfo(scores.dtype).tiny)
    return bool(np.max(scores) - np.min(scores) > limit)


@functools.lru_cache(maxsize=8)
def _lower_triangle(T: int, dtype) -> np.ndarray:
    return np.tri(T, dtype=dtype)


# dropout ------------------------------------------------------------------------------------------------


def keep_mask(xp, stream, size: int, rate: float):
    pairs = (size + 1) // 2
    inner = _hashed_counters(pairs)
    keep = np.empty((len(stream), 2 * pairs), dtype=bool)
    threshold = np.uint16(rng.drop_threshold(rate))
    bits, shifted = np.empty(min(PIECE, pairs), np.uint32), np.empty(min(PIECE, pairs), np.uint32)
    for row, key in zip(keep, stream.view(np.uint32), strict=True):
        for s in pieces(pairs, 1):
            n = s.stop - s.start
            np.bitwise_xor(inner[s], key, out=bits[:n])
            _mix(bits[:n], shifted[:n])
            # the halves of a hash lie low half first in memory, which is the order of the plain form
            np.greater_equal(bits[:n].view(np.uint16), threshold, out=row[2 * s.start : 2 * s.stop])
    return keep[:, :size]


@functools.lru_cache(maxsize=16)
def _hashed_counters(pairs: int) -> np.ndarray:
    bits = np.arange(pairs, dtype=np.uint32)
    _mix(bits, np.empty_like(bits))
    bits.flags.writeable = False
    return bits


def _mix(bits, shifted):
    """rng.mix on uint32, in place."""
    bits += np.uint32(rng.GOLDEN % 2**32)
    for shift, factor in ((16, rng.FIRST), (15, rng.SECOND), (16, None)):
        np.right_shift(bits, np.uint32(shift), out=shifted)
        bits ^= shifted
        if factor is not None:
            bits *= np.uint32(factor % 2**32)


def dropout_select(xp, keep, x, rate: float):
    y = x * keep
    y *= x.dtype.type(rng.survivor_scale(rate))
    return y


# optimizer ----------------------------------------------------------------------------------------------


def adamw(xp, w, g, m, v, decays, scale, lr, bias1, bias2, beta1, beta2, weight_decay):
    new = np.empty_like(w), np.empty_like(w), np.empty_like(w)
    constants = _adamw_constants(w.dtype.type, scale, lr, bias1, bias2, beta1, beta2, weight_decay)
    scratch = np.empty(min(PIECE, len(w)), w.dtype)
    for s in pieces(len(w), 1):
        _adamw_piece(scratch[: s.stop - s.start], *(array[s] for array in (w, g, m, v, decays, *new)), *constants)
    return new


def _adamw_constants(kind, scale, lr, bias1, bias2, beta1, beta2, weight_decay):
    first = kind((1 - beta1) * scale[0]), kind(beta1)
    second = kind((1 - beta2) * scale[0] ** 2), kind(beta2)
    rate, pull = kind(lr[0] / bias1[0]), kind(lr[0] * weight_decay)
    return *first, *second, kind(1 / math.sqrt(bias2[0])), kind(EPS), rate, pull


def _adamw_piece(a, w, g, m, v, decays, new_w, new_m, new_v, in1, keep1, in2, keep2, root, eps, rate, pull):
    np.multiply(g, in1, out=a)
    np.multiply(m, keep1, out=new_m)
    new_m += a
    np.multiply(g, g, out=a)
    a *= in2
    np.multiply(v, keep2, out=new_v)
    new_v += a
    np.sqrt(new_v, out=a)
    a *= root
    a += eps
    np.divide(new_m, a, out=a)
    a *= rate
    np.subtract(w, a, out=new_w)
    np.multiply(w, decays, out=a)
    a *= pull
    new_w -= a


def global_norm(xp, gradients):
    return np.sqrt(np.dot(gradients, gradients)).reshape(1)


KERNELS = {
    "linear.forward": linear_forward,
    "linear.backward": linear_backward,
    "layernorm.forward": layernorm_forward,
    "layernorm.backward": layernorm_backward,
    "gelu.tanh_form": gelu_tanh_form,
    "softmax.forward": softmax_forward,
    "heads.forward": heads_forward,
    "heads.backward": heads_backward,
    "rng.keep_mask": keep_mask,
    "dropout.select": dropout_select,
    "optim.adamw": adamw,
    "optim.global_norm": global_norm,
}
