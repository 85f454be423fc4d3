"""Faster forms of the functions marked @replaceable, for CuPy alone, as CUDA kernels of our own.

Same arguments, same results up to rounding, masks bit for bit; `saved` may hold other things, as the forward and
the backward of a layer are replaced together. What makes them faster: a chain of elementwise operations is one
launch that reads and writes each array once, where CuPy would launch one kernel per operation and keep every
intermediate result in memory. No kernel makes the host wait, and none adds up in an order left to chance: the same
numbers come out each time.

The kernels are in cuda/*.cu, compiled once for float and once for double. Rows are summed by a warp, 32 threads
that hand their numbers to each other; columns by blocks of rows, whose sums the last block then adds up.

This file needs no CuPy: that comes in with `xp`, whose `launch`, `counters` and `product` are cupy_backend.py's.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from baby_xp.arrays import rng
from baby_xp.arrays.tree import gradient_of
from baby_xp.layers import embedding, heads, softmax
from baby_xp.resources.counts import NARROW_HEAD
from baby_xp.training import schedules

BLOCK, WARP = 256, 32
"""Threads of a block, and those of them that work on one row."""
MOST_BLOCKS = 4096
"""Of an elementwise kernel: enough to fill any GPU; each thread then takes several elements."""
ONE_HOT_IDS = 1024
"""Ids up to which the product with one-hot rows is the cheaper way to add up rows by id."""
QUERIES, WIDEST = 8, 64
"""Of the kernels for attention in one launch, see attention.cu: queries of a block, and the widest heads that they
can decode. In training they serve heads up to NARROW_HEAD wide; beyond that cuBLAS's products are faster."""
ALIGNED, WIDE, MANY = 64, 1024, 256
"""Rows of a matrix begin at a multiple of ALIGNED elements, as cuBLAS's fast kernels want it, where they are at
least WIDE and the product has at least MANY rows, which pays for the copy of the weights."""
SCHEDULES = ["constant", "cosine", "linear"]
"""The kernel `rates` knows them by their number."""

FOLDER = Path(__file__).with_name("cuda")


def source(dtype: str) -> str:
    """The CUDA source of all kernels for "float32" or "float64"."""
    files = [FOLDER / "common.cuh", *sorted(FOLDER.glob("*.cu"))]
    text = "\n".join(re.sub(r'#include "common.cuh"\n', "", file.read_text(encoding="utf-8")) for file in files)
    return {"float32": "", "float64": "#define DOUBLE\n"}[dtype] + text


def elements(size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Grid and block of a kernel over `size` elements."""
    return (max(1, min(MOST_BLOCKS, -(-size // BLOCK))),), (BLOCK,)


def rows(number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Grid and block of a kernel that gives each row a warp."""
    return (max(1, -(-number // (BLOCK // WARP))),), (BLOCK,)


def parts_of(N: int) -> tuple[int, int]:
    """How many blocks share the sum of N rows, and the rows of each: both about the root of N."""
    together = max(8, math.isqrt(N))
    return max(1, -(-N // together)), together


def int32(xp, x):
    """Ids or keys as the kernels read them."""
    return xp.ascontiguousarray(xp.astype(x, xp.int32, copy=False))


def real(x, value: float):
    """A number to hand to a kernel, in the precision of array x."""
    return x.dtype.type(value)


def with_stride(xp, x):
    """x (N, C), or a copy, the elements of each row side by side; and the distance of two rows, in elements."""
    if x.strides[1] != x.itemsize:
        x = xp.ascontiguousarray(x)
    return x, np.int64(x.strides[0] // x.itemsize if x.shape[0] > 1 else x.shape[1])


# sums over columns --------------------------------------------------------------------------------------


def column_sums(xp, a, out=None):
    """Sums of a (N, C) over its rows -> (C,), which is `out` if given."""
    a, stride = with_stride(xp, a)
    N, C = a.shape
    parts, together = parts_of(N)
    sums = xp.empty((C,), dtype=a.dtype) if out is None else out
    partial, groups = xp.empty((parts, C), dtype=a.dtype), -(-C // 32)
    sizes = np.int64(N), np.int32(C), stride, np.int32(together)
    xp.launch("column_sums", a.dtype, ((groups, parts), (32, 8)), a, partial, xp.counters(groups), sums, *sizes)
    return sums


# linear -------------------------------------------------------------------------------------------------

# The products are cuBLAS's. The bias goes into the product's own array, and its gradient is a sum over columns.


def linear_forward(xp, p, x):
    weight = p["weight"]
    if x.shape[0] >= MANY and not is_aligned(weight.shape[1]):
        weight = empty_aligned(xp, weight.shape, weight.dtype)
        weight[...] = p["weight"]
    y = xp.product(x, weight, out=empty_aligned(xp, (x.shape[0], weight.shape[1]), x.dtype))
    if "bias" in p:
        y += p["bias"]
    return y, (x, weight)


def linear_backward(xp, p, saved, dy):
    x, weight = saved
    dp = {"weight": product_into(xp, x, dy, gradient_of(p, "weight"))}
    if "bias" in p:
        dp["bias"] = column_sums(xp, dy, gradient_of(p, "bias"))
    return dp, xp.product(dy, weight, transpose_b=True)


def product_into(xp, x, dy, out):
    """x^T dy (C, F), in `out` if that is not None: at once where its rows are aligned, else by a copy."""
    if out is None or is_aligned(dy.shape[1]):
        return xp.product(x, dy, transpose_a=True, out=out)
    out[...] = xp.product(x, dy, transpose_a=True, out=empty_aligned(xp, out.shape, dy.dtype))
    return out


def is_aligned(width: int) -> bool:
    """Whether the rows of a matrix may lie one after the other; a narrow one is too small to matter."""
    return width < WIDE or width % ALIGNED == 0


def empty_aligned(xp, shape, dtype):
    """An uninitialised matrix, with unused elements between its rows where that makes products faster."""
    N, C = shape
    width = C if is_aligned(C) else -(-C // ALIGNED) * ALIGNED
    return xp.empty((N, width), dtype=dtype)[:, :C]


# embedding ----------------------------------------------------------------------------------------------


def sum_by_id(xp, ids, dy, V: int):
    N, C = dy.shape
    if N == 0:
        return embedding.sum_by_id.__wrapped__(xp, ids, dy, V)
    ids, dy = int32(xp, ids), xp.ascontiguousarray(dy)
    if V <= ONE_HOT_IDS:
        onehot = xp.empty((N, V), dtype=dy.dtype)
        xp.launch("one_hot", dy.dtype, elements(N * V), ids, onehot, np.int64(N * V), np.int32(V))
        return xp.product(onehot, dy, transpose_a=True)
    sums, order = xp.zeros((V, C), dtype=dy.dtype), xp.argsort(ids, stable=True)
    xp.launch("sum_sorted", dy.dtype, ((N,), (BLOCK,)), order, ids, dy, sums, np.int32(N), np.int32(C))
    return sums


# layer norm ---------------------------------------------------------------------------------------------


def layernorm_forward(xp, p, x):
    x, (N, C) = xp.ascontiguousarray(x), x.shape
    y, xhat, rstd = xp.empty_like(x), xp.empty_like(x), xp.empty((N, 1), dtype=x.dtype)
    arguments = x, p["gain"], p["bias"], y, xhat, rstd, np.int64(N), np.int32(C)
    xp.launch("layernorm_forward", x.dtype, rows(N), *arguments)
    return y, (xhat, rstd)


def layernorm_backward(xp, p, saved, dy):
    xhat, rstd = saved
    dy, (N, C) = xp.ascontiguousarray(dy), dy.shape
    parts, together = parts_of(N)
    dx, partial = xp.empty_like(dy), xp.empty((parts, 2, C), dtype=dy.dtype)
    dp = {name: gradient_of(p, name) for name in ("gain", "bias")}
    dp = {name: xp.empty((C,), dtype=dy.dtype) if out is None else out for name, out in dp.items()}
    arrays = xhat, rstd, p["gain"], dy, dx, partial, xp.counters(1), dp["gain"], dp["bias"]
    sizes = np.int64(N), np.int32(C), np.int32(together)
    xp.launch("layernorm_backward", dy.dtype, ((parts,), (BLOCK,)), *arrays, *sizes)
    return dp, dx


# GELU ---------------------------------------------------------------------------------------------------


def gelu_tanh_form(xp, x):
    return _gelu(xp, "gelu_tanh", x)


def gelu_erf_form(xp, x):
    return _gelu(xp, "gelu_erf", x)


def _gelu(xp, name: str, x):
    x = xp.ascontiguousarray(x)
    y, derivative = xp.empty_like(x), xp.empty_like(x)
    xp.launch(name, x.dtype, elements(x.size), x, y, derivative, np.int64(x.size))
    return y, derivative


# dropout ------------------------------------------------------------------------------------------------


def streams(xp, seed, step, samples, places: int):
    B = samples.shape[0]
    keys = xp.empty((places, B), dtype=xp.int32)
    arguments = *(int32(xp, x) for x in (seed, step, samples)), keys, np.int32(places), np.int32(B)
    xp.launch("streams", np.dtype("float32"), elements(places * B), *arguments)
    return keys


def keep_mask(xp, stream, size: int, rate: float):
    stream, B = int32(xp, stream), stream.shape[0]
    keep = xp.empty((B, size), dtype=xp.bool)
    arguments = stream, keep, np.int32(B), np.int64(size), np.uint32(rng.drop_threshold(rate))
    xp.launch("keep_mask", np.dtype("float32"), _samples(B, size), *arguments)
    return keep


def dropout_drop(xp, x, stream, rate: float):
    x, stream, B = xp.ascontiguousarray(x), int32(xp, stream), stream.shape[0]
    y, keep = xp.empty_like(x), xp.empty(x.shape, dtype=xp.bool)
    size, (threshold, scale) = np.int64(x.size // B), _rate(x, rate)
    xp.launch("drop", x.dtype, _samples(B, x.size // B), x, stream, y, keep, np.int32(B), size, threshold, scale)
    return y, keep


def dropout_select(xp, keep, x, rate: float):
    keep, x = xp.ascontiguousarray(keep), xp.ascontiguousarray(x)
    y = xp.empty_like(x)
    xp.launch("scale_kept", x.dtype, elements(x.size), keep, x, y, np.int64(x.size), _rate(x, rate)[1])
    return y


def _rate(x, rate: float):
    """A rate as the kernels read it: the number below which bits are dropped, the factor of what survives."""
    return np.uint32(rng.drop_threshold(rate)), real(x, rng.survivor_scale(rate))


def _samples(B: int, size: int):
    """Grid and block of a kernel over B samples of `size` elements."""
    (blocks,), block = elements(size)
    return (blocks, min(B, 65535)), block


# softmax ------------------------------------------------------------------------------------------------


def softmax_forward(xp, p, x):
    x, C = xp.ascontiguousarray(x), x.shape[-1]
    y, N = xp.empty_like(x), x.size // C
    xp.launch("softmax_forward", x.dtype, rows(N), x, y, np.int64(N), np.int32(C))
    return y, (y,)


def softmax_backward(xp, p, saved, dy):
    (y,) = saved
    dy, C = xp.ascontiguousarray(dy), dy.shape[-1]
    dx, N = xp.empty_like(dy), dy.size // C
    xp.launch("softmax_backward", dy.dtype, rows(N), y, dy, dx, np.int64(N), np.int32(C))
    return {}, dx


# attention ----------------------------------------------------------------------------------------------


class SavedInOneLaunch:
    """What the backward pass in one launch needs. Keys and values are views, made only when they are read."""

    def __init__(self, xp, qkv, shape, outputs, dropout):
        self.xp, self.qkv, self.shape, self.outputs, self.dropout = xp, qkv, shape, outputs, dropout

    k = property(lambda self: heads.split(self.xp, self.qkv, self.shape)[1])
    v = property(lambda self: heads.split(self.xp, self.qkv, self.shape)[2])


def heads_forward(xp, p, qkv, shape, noise=None, past=None):
    """As heads.forward. It saves the dropout's key instead of its mask."""
    (_, T, H), qkv, S = shape, xp.ascontiguousarray(qkv), qkv.shape[1] // 3
    D = S // H
    if past is not None:
        return heads_after(xp, qkv, shape, past)
    stream, rate = (None, 0.0) if noise is None else (int32(xp, noise[0]), noise[1])
    if D <= NARROW_HEAD:
        strides = T * 3 * S, D, 3 * S
        outputs = attend(xp, qkv, shape, qkv[:, S:], qkv[:, 2 * S :], strides, 0, stream, rate)
        return outputs[0], SavedInOneLaunch(xp, qkv, shape, outputs, (stream, rate))
    q, k, v = heads_apart(xp, qkv, shape, 3)  # (B, H, T, D) each
    weights = xp.product(q, k, transpose_b=True, factor=1 / math.sqrt(D))
    dropped = weights if noise is None else xp.empty_like(weights)
    _rows_of_scores(xp, "causal_softmax", weights, stream, dropped, weights.shape, rate)
    y = xp.product(dropped, v)  # (B, H, T, D)
    return heads_together(xp, y[None, ...]), heads.Saved(q, k, v, weights, dropped, (stream, rate))


def heads_after(xp, qkv, shape, past):
    """The forward pass of tokens that come after others, whose keys and values are `past`; without dropout."""
    q, k, v = heads.split(xp, qkv, shape)
    joined = (xp.concat([before, new], axis=2) for before, new in zip(past, (k, v), strict=True))
    k, v = (xp.ascontiguousarray(array) for array in joined)  # a library may keep the order of the views
    _, H, total, D = k.shape
    saved = heads.Saved(q, k, v, None, None, None)
    if D <= WIDEST:
        return attend(xp, qkv, shape, k, v, (H * total * D, total * D, D), total - shape.T)[0], saved
    scores = xp.product(xp.ascontiguousarray(q), k, transpose_b=True, factor=1 / math.sqrt(D))
    scores += heads.causal_mask(xp, shape.T, total, scores.dtype)
    weights, _ = softmax.forward(xp, {}, scores)
    return heads.side_by_side(xp, xp.product(weights, v)), saved


def attend(xp, qkv, shape, k, v, strides, past: int, stream=None, rate: float = 0.0):
    """Attention in one launch: queries of qkv (N, 3 S), keys and values with strides of sample, head, token
    -> y (N, S), and of each query's scores the largest and the sum of the exponentials (B, H, T).
    """
    (B, T, H), S = shape, qkv.shape[1] // 3
    outputs = tuple(xp.empty(size, dtype=qkv.dtype) for size in ((B * T, S), (B, H, T), (B, H, T)))
    sizes = (np.int32(size) for size in (T, past, H, S // H))
    arguments = qkv, k, v, *map(np.int64, strides), stream, *outputs, *sizes, *_rate(qkv, rate)
    xp.launch("attention_forward", qkv.dtype, ((B * H, -(-T // QUERIES)), (BLOCK,)), *arguments)
    return outputs


def heads_backward(xp, p, saved, dy):
    if isinstance(saved, SavedInOneLaunch):
        (B, T, H), qkv, dy = saved.shape, saved.qkv, xp.ascontiguousarray(dy)
        (stream, rate), dqkv = saved.dropout, xp.empty_like(qkv)
        sizes = (np.int32(size) for size in (T, H, dy.shape[1] // H))
        arguments = qkv, *saved.outputs, dy, stream, dqkv, *sizes, *_rate(qkv, rate)
        xp.launch("attention_backward", qkv.dtype, ((B * H, -(-T // QUERIES), 2), (BLOCK,)), *arguments)
        return {}, dqkv
    q, k, v, weights, dropped, (stream, rate) = saved
    B, H, T, D = q.shape
    (dy,) = heads_apart(xp, dy, (B, T, H), 1)
    d = xp.product(dy, v, transpose_b=True)  # (B, H, T, T), of what dropout left
    _rows_of_scores(xp, "causal_softmax_backward", weights, stream, d, d.shape, rate)
    dqkv, factor = xp.empty((3, B, H, T, D), dtype=dy.dtype), 1 / math.sqrt(D)
    xp.product(d, k, factor=factor, out=dqkv[0, ...])
    xp.product(d, q, transpose_a=True, factor=factor, out=dqkv[1, ...])
    xp.product(dropped, dy, transpose_a=True, out=dqkv[2, ...])
    return {}, heads_together(xp, dqkv)


def _rows_of_scores(xp, name: str, first, stream, other, shape, rate: float):
    """One of the two kernels over rows of scores (B, H, T, T)."""
    B, H, T, _ = shape
    sizes = np.int64(B * H * T), np.int32(H), np.int32(T)
    xp.launch(name, first.dtype, rows(B * H * T), first, stream, other, *sizes, *_rate(first, rate))


def heads_apart(xp, x, shape, parts: int):
    """x (N, parts S) -> `parts` arrays (B, H, T, D)."""
    (B, T, H), D = shape, x.shape[1] // (parts * shape[2])
    y = xp.empty((parts, B, H, T, D), dtype=x.dtype)
    _move_heads(xp, xp.ascontiguousarray(x), y, y.shape, apart=True)
    return [y[part, ...] for part in range(parts)]


def heads_together(xp, y):
    """y (parts, B, H, T, D) -> (N, parts S)."""
    parts, B, H, T, D = y.shape
    x = xp.empty((B * T, parts * H * D), dtype=y.dtype)
    _move_heads(xp, y, x, y.shape, apart=False)
    return x


def _move_heads(xp, before, after, shape, apart: bool) -> None:
    parts, B, H, T, D = shape
    sizes = (np.int32(size) for size in (T, H, D, parts, apart))
    xp.launch("move_heads", before.dtype, ((B * T,), (BLOCK,)), before, after, *sizes)


# cross-entropy ------------------------------------------------------------------------------------------


def cross_entropy_forward(xp, p, logits, targets):
    (logits, stride), targets, (N, V) = with_stride(xp, logits), int32(xp, targets), logits.shape
    losses, tops, sums = (xp.empty((N,), dtype=logits.dtype) for _ in range(3))
    arguments = logits, targets, losses, tops, sums, np.int64(N), np.int32(V), stride
    xp.launch("cross_entropy_forward", logits.dtype, rows(N), *arguments)
    return losses, (logits, targets, tops, sums)


def cross_entropy_backward(xp, p, saved, dy):
    logits, targets, tops, sums = saved
    (logits, stride), (N, V) = with_stride(xp, logits), logits.shape
    dlogits = xp.empty((N, int(stride)), dtype=logits.dtype)[:, :V]
    arguments = logits, targets, tops, sums, xp.ascontiguousarray(dy), dlogits, np.int64(N), np.int32(V), stride
    xp.launch("cross_entropy_backward", logits.dtype, rows(N), *arguments)
    return {}, dlogits


# optimizer ----------------------------------------------------------------------------------------------

# All parameters in one launch. What changes from step to step is read from arrays on the device: the host need not
# wait for it.


def adamw(xp, w, g, m, v, decays, scale, lr, bias1, bias2, beta1, beta2, weight_decay):
    new = tuple(xp.empty_like(w) for _ in range(3))
    numbers = (real(w, number) for number in (beta1, 1 - beta1, beta2, 1 - beta2, weight_decay))
    arrays = w, xp.ascontiguousarray(g), m, v, xp.astype(decays, w.dtype, copy=False), scale, lr, bias1, bias2
    xp.launch("adamw", w.dtype, elements(w.size), *arrays, *new, np.int64(w.size), *numbers)
    return new


def rates(xp, norm, step, config):
    numbers, schedule = xp.empty((4,), dtype=norm.dtype), np.int32(SCHEDULES.index(config.schedule))
    decay = (0, 1) if config.schedule == "constant" else schedules.decay(config)
    settings = config.peak_lr, config.min_lr, config.warmup_steps, *decay, config.clip
    scalars = (real(norm, number) for number in (*settings, math.log(config.beta1), math.log(config.beta2)))
    xp.launch("rates", norm.dtype, ((1,), (1,)), norm, int32(xp, step), numbers, schedule, *scalars)
    return tuple(numbers[i : i + 1] for i in range(4))


def global_norm(xp, gradients):
    gradients = xp.ascontiguousarray(gradients)
    (blocks,), block = elements(gradients.size)
    blocks = min(blocks, 256)
    partial, norm = (xp.empty((size,), dtype=gradients.dtype) for size in (blocks, 1))
    arguments = gradients, partial, xp.counters(1), norm, np.int64(gradients.size)
    xp.launch("global_norm", gradients.dtype, ((blocks,), block), *arguments)
    return norm


KERNELS: dict[str, Callable[..., Any]] = {
    "linear.forward": linear_forward,
    "linear.backward": linear_backward,
    "embedding.sum_by_id": sum_by_id,
    "layernorm.forward": layernorm_forward,
    "layernorm.backward": layernorm_backward,
    "gelu.tanh_form": gelu_tanh_form,
    "gelu.erf_form": gelu_erf_form,
    "rng.streams": streams,
    "rng.keep_mask": keep_mask,
    "dropout.drop": dropout_drop,
    "dropout.select": dropout_select,
    "softmax.forward": softmax_forward,
    "softmax.backward": softmax_backward,
    "heads.forward": heads_forward,
    "heads.backward": heads_backward,
    "cross_entropy.forward": cross_entropy_forward,
    "cross_entropy.backward": cross_entropy_backward,
    "optimizers.adamw": adamw,
    "optimizers.rates": rates,
    "optimizers.global_norm": global_norm,
}
