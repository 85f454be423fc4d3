"""Faster forms of the functions marked @replaceable, for NumPy alone.

Same arguments, same results up to rounding (a test compares each with its plain form); `saved` may hold other
things, as the forward and the backward of a layer are replaced together. What makes them faster:

- work in place on arrays of their own, in tiles that stay in the cache: a pass over an array that outgrows
  the cache costs two to three times as much;
- sums over the last axis as products with ones, which BLAS does four times as fast as `sum`;
- no `where` with a random mask, whose branches cost 4 ns per element: multiply by the mask instead.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from baby_xp_backends import numpy_decoding, numpy_muon, numpy_query_key

from baby_xp.arrays import rng
from baby_xp.arrays.tree import gradient_of, leaves
from baby_xp.layers import gelu, heads, layernorm, rmsnorm
from baby_xp.training.optimizers import EPS

TILE = 65536
"""Elements of one tile: few enough for the cache, and enough that the calls, 1 to 2 microseconds each, vanish."""


def tiles(rows: int, width: int):
    """Slices of rows such that a tile of (rows, width) has about TILE elements."""
    step = max(1, TILE // max(1, width))
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
    dp = {"weight": np.matmul(x.T, dy, out=gradient_of(p, "weight"))}
    if "bias" in p:
        dp["bias"] = np.matmul(ones(dy.shape[0], dy.dtype), dy, out=gradient_of(p, "bias"))
    return dp, dy @ p["weight"].T


# layer norm ---------------------------------------------------------------------------------------------


def layernorm_forward(xp, p, x):
    N, C = x.shape
    y, xhat, rstd = np.empty_like(x), np.empty_like(x), np.empty((N, 1), x.dtype)
    mean_of = ones(C, x.dtype) / C
    for s in tiles(N, C):
        centred = np.subtract(x[s], (x[s] @ mean_of)[:, None], out=xhat[s])
        variance = np.vecdot(centred, centred)[:, None] / C
        np.divide(1, np.sqrt(variance + layernorm.EPS), out=rstd[s])
        centred *= rstd[s]
        np.multiply(centred, p["gain"], out=y[s])
        y[s] += p["bias"]
    return y, (xhat, rstd)


def layernorm_backward(xp, p, saved, dy):
    xhat, rstd = saved
    N, C = dy.shape
    dx, dgain, mean_of = np.empty_like(dy), np.zeros(C, dy.dtype), ones(C, dy.dtype) / C
    for s in tiles(N, C):
        along = dy[s] * xhat[s]
        dgain += ones(len(along), dy.dtype) @ along
        dxhat = np.multiply(dy[s], p["gain"], out=dx[s])
        along_one = (dxhat @ mean_of)[:, None]
        along_xhat = np.vecdot(dxhat, xhat[s])[:, None] / C
        dxhat -= along_one
        dxhat -= np.multiply(xhat[s], along_xhat, out=along)
        dxhat *= rstd[s]
    return {"gain": dgain, "bias": ones(N, dy.dtype) @ dy}, dx


# RMSNorm ------------------------------------------------------------------------------------------------


def rmsnorm_forward(xp, p, x):
    rstd = 1 / np.sqrt(np.vecdot(x, x)[..., None] / x.shape[-1] + rmsnorm.EPS)
    y = x * rstd
    return y, (y, rstd)


def rmsnorm_backward(xp, p, saved, dy):
    y, rstd = saved
    dx = y * (np.vecdot(dy, y)[..., None] / -dy.shape[-1])
    dx += dy
    dx *= rstd
    return {}, dx


# GELU ---------------------------------------------------------------------------------------------------


def gelu_tanh_form(xp, x):
    """(1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)): without AVX-512, NumPy's tanh costs twice its exp."""
    y, derivative = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)
    flat_x, flat_y, flat_derivative = np.ascontiguousarray(x).reshape(-1), y.reshape(-1), derivative.reshape(-1)
    a, b = np.empty(min(TILE, x.size), x.dtype), np.empty(min(TILE, x.size), x.dtype)
    for s in tiles(x.size, 1):
        _gelu_tile(flat_x[s], flat_y[s], flat_derivative[s], a[: s.stop - s.start], b[: s.stop - s.start])
    return y, derivative


def _gelu_tile(x, y, derivative, cdf, square):
    twice = 2 * gelu.ROOT_2_OVER_PI
    np.multiply(x, x, out=square)
    np.multiply(square, -twice * gelu.CUBIC, out=cdf)
    cdf -= twice
    cdf *= x                                                     # -2 u
    with np.errstate(over="ignore"):                               # exp(-2 u) = inf gives 0, as it should
        np.exp(cdf, out=cdf)
    cdf += 1
    np.divide(1, cdf, out=cdf)
    np.multiply(x, cdf, out=y)
    square *= 3 * twice * gelu.CUBIC
    square += twice                                                # 2 du
    square *= y
    np.subtract(1, cdf, out=derivative)
    derivative *= square
    derivative += cdf


# attention ----------------------------------------------------------------------------------------------


class SavedHeads(NamedTuple):
    """What heads_backward needs; k and v are also the cache."""

    q: Any
    k: Any
    v: Any
    blocks: list
    y: Any
    inverse: Any
    scale: Any


def heads_forward(xp, p, qkv, shape, noise=None, past=None):
    """As heads.forward. It keeps exp(scores) and their sums, not the weights, which saves a pass each way."""
    if past is not None:
        return heads.forward.__wrapped__(xp, p, qkv, shape, noise, past)
    q, k, v = heads.split(xp, qkv, shape)
    B, H, T, D = q.shape
    kind, rate = qkv.dtype, 0.0 if noise is None else noise[1]
    q = q * kind.type(1 / math.sqrt(D))
    y, totals = np.empty((B, T, H, D), kind), np.empty((B, T, H), kind)
    heads_of_y, totals_of_rows = y.swapaxes(1, 2), totals.swapaxes(1, 2)
    drop = None if noise is None else _weight_dropout(xp, noise[0], H, T, rate)
    saved = []
    for at in _blocks(B, H, T, D):
        b, h, rows, keys = at
        e, totals_of_rows[b, h, rows] = _causal_exp(q[b, h, rows], k[b, h, keys])
        kept = e if drop is None else drop(e, at)
        np.matmul(kept, v[b, h, keys], out=heads_of_y[b, h, rows])
        saved.append((e, kept))
    inverse = np.divide(1, totals.reshape(B * T, H))
    scale = inverse @ _spread(H, D, kind, rng.survivor_scale(rate))
    y = y.reshape(B * T, H * D)
    y *= scale
    return y, SavedHeads(q, k, v, saved, y, inverse, scale)


def heads_backward(xp, p, saved, dy):
    q, k, v, blocks, y, inverse, scale = saved
    B, H, T, D = q.shape
    kind = dy.dtype
    # the sum over keys of dweights * weights is the sum over channels of dy * y
    along = ((dy * y) @ _spread(H, D, kind, 1.0).T) * inverse      # (N, H)
    along = np.ascontiguousarray(along.reshape(B, T, H).swapaxes(1, 2))[..., None]
    dy = (dy * scale).reshape(B, T, H, D).swapaxes(1, 2)           # (B, H, T, D)
    dqkv = np.empty((B, T, 3, H, D), kind)
    dq, dk, dv = (dqkv[:, :, i].swapaxes(1, 2) for i in range(3))
    for at, (e, kept) in zip(_blocks(B, H, T, D), blocks, strict=True):
        b, h, rows, keys = at
        dscores = dy[b, h, rows] @ v[b, h, keys].swapaxes(-1, -2)
        if kept is e:
            dscores -= along[b, h, rows]
            dscores *= e
        else:
            dscores *= kept
            dscores -= e * along[b, h, rows]
        np.matmul(dscores, k[b, h, keys], out=dq[b, h, rows])
        _add_product(kept.swapaxes(-1, -2), dy[b, h, rows], dv[b, h], keys)
        _add_product(dscores.swapaxes(-1, -2), q[b, h, rows], dk[b, h], keys)
    dq *= kind.type(1 / math.sqrt(D))
    return {}, dqkv.reshape(B * T, 3 * H * D)


@functools.lru_cache(maxsize=16)
def _blocks(B: int, H: int, T: int, D: int) -> list[tuple[slice, slice, slice, slice]]:
    """Slices of samples, heads, rows and keys such that a block's scores stay in the cache.

    Rows come a few at a time, each with the keys up to the last of them: so most of what the causal mask would
    hide is never computed. The last rows, which see all keys, come first.
    """
    size = 2 * TILE  # small products gain more from being computed together than they lose in the cache
    n, found = max(32, D), []
    for start in range((T - 1) // n * n, -1, -n):
        rows, keys = slice(start, min(start + n, T)), slice(0, min(start + n, T))
        together = max(1, size // ((rows.stop - rows.start) * keys.stop))  # heads
        if together >= H:
            found += [(slice(b, b + together // H), slice(0, H), rows, keys) for b in range(0, B, together // H)]
        else:
            parts = [slice(h, min(h + together, H)) for h in range(0, H, together)]
            found += [(slice(b, b + 1), h, rows, keys) for b in range(B) for h in parts]
    return found


LARGEST_TOTAL = 1e13
"""A row's sum of exp(scores), or its inverse, above which the row's scores are shifted first."""


def _causal_exp(q, k):
    """exp(scores) (b, h, rows, keys), zero where the mask hides, and their sums (b, h, rows).

    The softmax does not change when a row's scores are shifted, and mostly they need not be: where a sum shows
    that a row was too high or too low for that, the block is computed again, shifted by the largest of each row.
    """
    scores = q @ k.swapaxes(-1, -2)
    n, keys = scores.shape[-2:]
    visible, kind = _visible(n, keys, scores.dtype), scores.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        e = np.exp(scores, out=scores)
        e *= visible
        totals = e @ ones(keys, kind)
    if not (np.min(totals) > 1 / LARGEST_TOTAL and np.max(totals) < LARGEST_TOTAL):
        scores = np.where(visible > 0, q @ k.swapaxes(-1, -2), -np.inf)
        e = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
        totals = e @ ones(keys, kind)
    return e, totals


def _add_product(a, b, total, keys):
    """total[keys] += a @ b; the first block covers all keys and begins the total."""
    if keys.stop == total.shape[-2]:
        np.matmul(a, b, out=total)
    else:
        total[..., keys, :] += a @ b


@functools.lru_cache(maxsize=64)
def _visible(n: int, keys: int, dtype) -> np.ndarray:
    """(n, keys): 1 at the keys that the last n of this many tokens see, else 0."""
    return np.tri(n, keys, keys - n, dtype=dtype)


@functools.lru_cache(maxsize=16)
def _spread(H: int, D: int, dtype, factor: float) -> np.ndarray:
    """(H, H D): a product with it repeats each head's number over its D channels; with its transpose, sums them.

    Numpy's own loops over so few channels cost ten times as much.
    """
    return np.kron(np.eye(H), np.full((1, D), factor)).astype(dtype)


def _weight_dropout(xp, stream, H: int, T: int, rate: float):
    """A function (block of weights, its place) -> the block without those that the mask of rng.py drops."""
    threshold = np.uint16(rng.drop_threshold(rate))
    keys_of_samples = stream.view(np.uint32)[:, None, None, None]
    if T % 2:  # rows do not start at the first half of a hash
        keep = rng.keep_mask(xp, stream, H * T * T, rate).reshape(-1, H, T, T)
        return lambda weights, at: weights * keep[at]
    inner = _hashed_counters(H * T * T // 2).reshape(H, T, T // 2)

    def drop(weights, at):
        b, h, rows, keys = at
        bits = np.bitwise_xor(inner[h, rows, : keys.stop // 2], keys_of_samples[b])
        _mix(bits, np.empty_like(bits))
        return weights * np.greater_equal(bits.view(np.uint16), threshold)

    return drop


# dropout ------------------------------------------------------------------------------------------------


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
    adamw_into(xp, new, w, g, m, v, decays, scale, lr, bias1, bias2, beta1, beta2, weight_decay)
    return new


def adamw_into(xp, new, w, g, m, v, decays, scale, lr, bias1, bias2, beta1, beta2, weight_decay):
    constants = adamw_constants(w.dtype.type, scale, lr, bias1, bias2, beta1, beta2, weight_decay)
    scratch = np.empty(min(TILE, len(w)), w.dtype)
    for s in tiles(len(w), 1):
        _adamw_tile(scratch[: s.stop - s.start], *(array[s] for array in (w, g, m, v, decays, *new)), *constants)


def adamw_constants(kind, scale, lr, bias1, bias2, beta1, beta2, weight_decay):
    first = kind((1 - beta1) * scale[0]), kind(beta1)
    second = kind((1 - beta2) * scale[0] ** 2), kind(beta2)
    rate, pull = kind(lr[0] / bias1[0]), kind(lr[0] * weight_decay)
    return *first, *second, kind(1 / math.sqrt(bias2[0])), kind(EPS), rate, pull


def _adamw_tile(a, w, g, m, v, decays, new_w, new_m, new_v, in1, keep1, in2, keep2, root, eps, rate, pull):
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


def add_tree(xp, layout, flat, tree):
    """In place, without packing the tree first."""
    by_path = dict(leaves(tree))
    for path, at in layout.slices.items():
        flat[at] += by_path[path].reshape(-1)
    return flat


KERNELS: dict[str, Callable[..., Any]] = {
    "linear.forward": linear_forward,
    "linear.backward": linear_backward,
    "layernorm.forward": layernorm_forward,
    "layernorm.backward": layernorm_backward,
    "rmsnorm.forward": rmsnorm_forward,
    "rmsnorm.backward": rmsnorm_backward,
    "gelu.tanh_form": gelu_tanh_form,
    "query_key.forward": numpy_query_key.forward,
    "query_key.backward": numpy_query_key.backward,
    "heads.forward": heads_forward,
    "heads.backward": heads_backward,
    "dropout.select": dropout_select,
    "muon.orthogonalize": numpy_muon.orthogonalize,
    "optimizers.adamw": adamw,
    "step.add_tree": add_tree,
    "optimizers.adamw_into": adamw_into,
    "gpt.prepare": numpy_decoding.prepare,
    "gpt.decode": numpy_decoding.decode,
}
