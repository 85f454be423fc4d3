"""Faster forms of the functions marked @replaceable, for CuPy alone, as CUDA kernels of our own.

Same arguments, same results up to rounding, masks bit for bit; `saved` may hold other things, as the forward and
the backward of a layer are replaced together. What makes them faster: a chain of elementwise operations is one
launch that reads and writes each array once, where CuPy would launch one kernel per operation and keep every
intermediate result in memory. No kernel makes the host wait, and none adds up in an order left to chance: the same
numbers come out each time.

`real` is float or double: the source is compiled once for each. Rows are summed by a warp, 32 threads that hand
their numbers to each other; columns by blocks of rows, whose sums are then added up in the same way.

This file needs no CuPy: it comes in with `xp`, whose `launch` and `batched_product` are those of cupy_backend.py.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from baby_xp.arrays import rng
from baby_xp.layers import embedding, gelu, heads, layernorm
from baby_xp.training.optimizers import EPS

BLOCK, WARP = 256, 32
"""Threads of a block, and those of them that work on one row."""
MOST_BLOCKS = 4096
"""Of an elementwise kernel: enough to fill any GPU; each thread then takes several elements."""
ONE_HOT_IDS = 1024
"""Ids up to which the product with one-hot rows is the cheaper way to add up rows by id."""

CONSTANTS = {
    "ROOT_2_OVER_PI": gelu.ROOT_2_OVER_PI, "CUBIC": gelu.CUBIC, "ROOT_HALF": math.sqrt(0.5),
    "ONE_OVER_ROOT_2_PI": 1 / math.sqrt(2 * math.pi), "LAYERNORM_EPS": layernorm.EPS, "ADAMW_EPS": EPS,
}  # fmt: skip
HASH = {"GOLDEN": rng.GOLDEN, "FIRST": rng.FIRST, "SECOND": rng.SECOND}


def source(dtype: str) -> str:
    """The CUDA source of all kernels for "float32" or "float64"."""
    kind = {"float32": "float", "float64": "double"}[dtype]
    lines = [f"typedef {kind} real;"]
    lines += [f"#define {name} ((real){value!r})" for name, value in CONSTANTS.items()]
    lines += [f"#define LOWEST ((real){float(np.finfo(dtype).min)!r})"]
    lines += [f"#define {name} {value % 2**32}u" for name, value in HASH.items()]
    return "\n".join([*lines, *SOURCES])


def elements(size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Grid and block of a kernel over `size` elements."""
    return (max(1, min(MOST_BLOCKS, -(-size // BLOCK))),), (BLOCK,)


def rows(number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Grid and block of a kernel that gives each row a warp."""
    return (max(1, -(-number // (BLOCK // WARP))),), (BLOCK,)


def int32(xp, x):
    """Ids or keys as the kernels read them."""
    return xp.ascontiguousarray(xp.astype(x, xp.int32, copy=False))


def real(x, value: float):
    """A number to hand to a kernel, in the precision of array x."""
    return x.dtype.type(value)


SOURCES = [
    r"""
typedef unsigned int u32;
typedef long long i64;

// the elements of a thread: neighbours in a warp read neighbours in memory
#define EACH(i, size) \
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < (size); i += (i64)gridDim.x * blockDim.x)
// the row of a warp, and the columns of a thread
#define ROW ((i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32)
#define COLUMNS(c, width) for (int c = threadIdx.x % 32; c < (width); c += 32)

// every thread of the warp gets the sum, and each the same one: the order of two summands does not matter
__device__ real warp_sum(real value) {
    for (int far = 16; far > 0; far /= 2) value += __shfl_xor_sync(0xffffffffu, value, far);
    return value;
}

__device__ real warp_max(real value) {
    for (int far = 16; far > 0; far /= 2) {
        real other = __shfl_xor_sync(0xffffffffu, value, far);
        value = value > other ? value : other;
    }
    return value;
}
"""
]
"""What the kernels share; each adds its own below."""


# sums over columns --------------------------------------------------------------------------------------

# For gradients of biases and gains, which add up over all tokens. CuPy's `sum` over the first axis would do for
# one of them; layer norm needs two, of dy and of dy * xhat, and reads dy once here.
SOURCES.append(r"""
extern "C" __global__ void column_sums(
        const real* __restrict__ a, const real* __restrict__ b, real* __restrict__ sums, i64 N, int C, int rows) {
    __shared__ real of_rows[2][8][32];
    int c = blockIdx.x * 32 + threadIdx.x, width = b ? 2 * C : C;
    i64 begin = (i64)blockIdx.y * rows, end = begin + rows < N ? begin + rows : N;
    real sum = 0, product = 0;
    if (c < C) {
        for (i64 n = begin + threadIdx.y; n < end; n += 8) {
            real value = a[n * C + c];
            sum += value;
            if (b) product += value * b[n * C + c];
        }
    }
    of_rows[0][threadIdx.y][threadIdx.x] = sum;
    of_rows[1][threadIdx.y][threadIdx.x] = product;
    __syncthreads();
    if (threadIdx.y == 0 && c < C) {
        for (int y = 1; y < 8; y++) {
            sum += of_rows[0][y][threadIdx.x];
            product += of_rows[1][y][threadIdx.x];
        }
        sums[(i64)blockIdx.y * width + c] = sum;
        if (b) sums[(i64)blockIdx.y * width + C + c] = product;
    }
}
""")


def column_sums(xp, a, b=None):
    """Sums of a (N, C) over its rows -> (C,); with b (N, C), those of a and then those of a * b -> (2 C,)."""
    N, C = a.shape
    width, together = (C if b is None else 2 * C), max(8, math.isqrt(N))
    parts = max(1, -(-N // together))
    sums = xp.empty((parts, width), dtype=a.dtype)
    grid = (-(-C // 32), parts)
    xp.launch("column_sums", a.dtype, (grid, (32, 8)), a, b, sums, np.int64(N), np.int32(C), np.int32(together))
    return sums[0, :] if parts == 1 else column_sums(xp, sums)


# linear -------------------------------------------------------------------------------------------------

# The products are cuBLAS's. The bias goes into the product's own array, and its gradient is a sum over columns.


def linear_forward(xp, p, x):
    y = x @ p["weight"]
    if "bias" in p:
        y += p["bias"]
    return y, (x,)


def linear_backward(xp, p, saved, dy):
    (x,) = saved
    dp = {"weight": x.T @ dy}
    if "bias" in p:
        dp["bias"] = column_sums(xp, xp.ascontiguousarray(dy))
    return dp, dy @ p["weight"].T


# embedding ----------------------------------------------------------------------------------------------

# For vocabularies too large for one-hot rows. One block per token: it returns if an earlier token has the same id,
# so one block is left for each id that occurs, and this adds up the rows of that id in their order. scatter_add
# would add them in an order left to chance, and a sort would make the host wait.
SOURCES.append(r"""
extern "C" __global__ void sum_by_id(
        const int* __restrict__ ids, const real* __restrict__ dy, real* __restrict__ sums, int N, int C) {
    __shared__ int tile[256];
    int n = blockIdx.x, id = ids[n], seen = 0;
    for (int at = threadIdx.x; at < n; at += blockDim.x) seen |= ids[at] == id;
    if (__syncthreads_or(seen)) return;
    for (int first = 0; first < C; first += blockDim.x) {
        int c = first + threadIdx.x;
        real sum = 0;
        for (int begin = n; begin < N; begin += 256) {
            __syncthreads();  // the tile before is no longer read
            if (begin + threadIdx.x < N) tile[threadIdx.x] = ids[begin + threadIdx.x];
            __syncthreads();
            int length = N - begin < 256 ? N - begin : 256;
            if (c < C) {
                for (int i = 0; i < length; i++) {
                    if (tile[i] == id) sum += dy[(i64)(begin + i) * C + c];
                }
            }
        }
        if (c < C) sums[(i64)id * C + c] = sum;
    }
}
""")


def sum_by_id(xp, ids, dy, V: int):
    N, C = dy.shape
    if V <= ONE_HOT_IDS or N == 0:
        return embedding.sum_by_id.__wrapped__(xp, ids, dy, V)
    dy, sums = xp.ascontiguousarray(dy), xp.zeros((V, C), dtype=dy.dtype)
    xp.launch("sum_by_id", dy.dtype, ((N,), (BLOCK,)), int32(xp, ids), dy, sums, np.int32(N), np.int32(C))
    return sums


# layer norm ---------------------------------------------------------------------------------------------

# One warp per row: the row's three passes find it in the cache, and nothing but results is written.
SOURCES.append(r"""
extern "C" __global__ void layernorm_forward(
        const real* __restrict__ x, const real* __restrict__ gain, const real* __restrict__ bias,
        real* __restrict__ y, real* __restrict__ xhat, real* __restrict__ rstd, i64 N, int C) {
    i64 n = ROW;
    if (n >= N) return;
    x += n * C; y += n * C; xhat += n * C;
    real sum = 0, squares = 0;
    COLUMNS(c, C) sum += x[c];
    real mean = warp_sum(sum) / C;
    COLUMNS(c, C) squares += (x[c] - mean) * (x[c] - mean);
    real scale = 1 / sqrt(warp_sum(squares) / C + LAYERNORM_EPS);
    COLUMNS(c, C) {
        real normed = (x[c] - mean) * scale;
        xhat[c] = normed;
        y[c] = gain[c] * normed + bias[c];
    }
    if (threadIdx.x % 32 == 0) rstd[n] = scale;
}

extern "C" __global__ void layernorm_backward(
        const real* __restrict__ xhat, const real* __restrict__ rstd, const real* __restrict__ gain,
        const real* __restrict__ dy, real* __restrict__ dx, i64 N, int C) {
    i64 n = ROW;
    if (n >= N) return;
    xhat += n * C; dy += n * C; dx += n * C;
    real along_one = 0, along_xhat = 0;
    COLUMNS(c, C) {
        real dxhat = gain[c] * dy[c];
        along_one += dxhat;
        along_xhat += dxhat * xhat[c];
    }
    along_one = warp_sum(along_one) / C;
    along_xhat = warp_sum(along_xhat) / C;
    COLUMNS(c, C) dx[c] = rstd[n] * (gain[c] * dy[c] - along_one - along_xhat * xhat[c]);
}
""")


def layernorm_forward(xp, p, x):
    x, (N, C) = xp.ascontiguousarray(x), x.shape
    y, xhat, rstd = xp.empty_like(x), xp.empty_like(x), xp.empty((N, 1), dtype=x.dtype)
    arguments = x, p["gain"], p["bias"], y, xhat, rstd, np.int64(N), np.int32(C)
    xp.launch("layernorm_forward", x.dtype, rows(N), *arguments)
    return y, (xhat, rstd)


def layernorm_backward(xp, p, saved, dy):
    xhat, rstd = saved
    dy, (N, C) = xp.ascontiguousarray(dy), dy.shape
    dx = xp.empty_like(dy)
    xp.launch("layernorm_backward", dy.dtype, rows(N), xhat, rstd, p["gain"], dy, dx, np.int64(N), np.int32(C))
    sums = column_sums(xp, dy, xhat)
    return {"gain": sums[C:], "bias": sums[:C]}, dx


# GELU ---------------------------------------------------------------------------------------------------

# Value and derivative in one launch instead of sixteen.
SOURCES.append(r"""
extern "C" __global__ void gelu_tanh(
        const real* __restrict__ x, real* __restrict__ y, real* __restrict__ derivative, i64 size) {
    EACH(i, size) {
        real at = x[i], square = at * at;
        real t = tanh(ROOT_2_OVER_PI * at * (1 + CUBIC * square));
        real cdf = (real)0.5 * (1 + t);
        real du = ROOT_2_OVER_PI * (1 + 3 * CUBIC * square);
        y[i] = at * cdf;
        derivative[i] = cdf + (real)0.5 * at * (1 - t * t) * du;
    }
}

extern "C" __global__ void gelu_erf(
        const real* __restrict__ x, real* __restrict__ y, real* __restrict__ derivative, i64 size) {
    EACH(i, size) {
        real at = x[i];
        real cdf = (real)0.5 * (1 + erf(at * ROOT_HALF));
        real density = exp((real)-0.5 * at * at) * ONE_OVER_ROOT_2_PI;
        y[i] = at * cdf;
        derivative[i] = cdf + at * density;
    }
}
""")


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

# rng.py's hash, in unsigned numbers, whose shift is the logical one and whose overflow is defined. A hash is
# worked out for each element, though two share one: arithmetic is cheap beside memory.
SOURCES.append(r"""
__device__ u32 mix(u32 x) {
    x += GOLDEN;
    x = (x ^ (x >> 16)) * FIRST;
    x = (x ^ (x >> 15)) * SECOND;
    return x ^ (x >> 16);
}

__device__ u32 fold(u32 key, u32 data) { return mix(mix(key) ^ data); }

__device__ bool survives(u32 stream, i64 element, u32 threshold) {
    u32 bits = mix(stream ^ mix((u32)(element >> 1)));
    return ((bits >> (16 * (element & 1))) & 0xffffu) >= threshold;
}

extern "C" __global__ void streams(
        const int* __restrict__ seed, const int* __restrict__ step, const int* __restrict__ samples,
        int* __restrict__ keys, int places, int B) {
    u32 key = fold((u32)seed[0], (u32)step[0]);
    EACH(i, (i64)places * B) keys[i] = (int)fold(fold(key, (u32)(i / B)), (u32)samples[i % B]);
}

extern "C" __global__ void keep_mask(
        const int* __restrict__ stream, bool* __restrict__ keep, int B, i64 size, u32 threshold) {
    for (int b = blockIdx.y; b < B; b += gridDim.y) {
        EACH(i, size) keep[b * size + i] = survives((u32)stream[b], i, threshold);
    }
}

extern "C" __global__ void drop(
        const real* __restrict__ x, const int* __restrict__ stream, real* __restrict__ y, bool* __restrict__ keep,
        int B, i64 size, u32 threshold, real scale) {
    for (int b = blockIdx.y; b < B; b += gridDim.y) {
        EACH(i, size) {
            bool kept = survives((u32)stream[b], i, threshold);
            keep[b * size + i] = kept;
            y[b * size + i] = kept ? x[b * size + i] * scale : 0;
        }
    }
}

extern "C" __global__ void scale_kept(
        const bool* __restrict__ keep, const real* __restrict__ x, real* __restrict__ y, i64 size, real scale) {
    EACH(i, size) y[i] = keep[i] ? x[i] * scale : 0;
}
""")


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
    size, threshold, scale = np.int64(x.size // B), np.uint32(rng.drop_threshold(rate)), rng.survivor_scale(rate)
    arguments = x, stream, y, keep, np.int32(B), size, threshold, real(x, scale)
    xp.launch("drop", x.dtype, _samples(B, x.size // B), *arguments)
    return y, keep


def dropout_select(xp, keep, x, rate: float):
    keep, x = xp.ascontiguousarray(keep), xp.ascontiguousarray(x)
    y = xp.empty_like(x)
    arguments = keep, x, y, np.int64(x.size), real(x, rng.survivor_scale(rate))
    xp.launch("scale_kept", x.dtype, elements(x.size), *arguments)
    return y


def _samples(B: int, size: int):
    """Grid and block of a kernel over B samples of `size` elements."""
    (blocks,), block = elements(size)
    return (blocks, min(B, 65535)), block


# softmax ------------------------------------------------------------------------------------------------

# For the gates of mixtures: one warp per row.
SOURCES.append(r"""
extern "C" __global__ void softmax_forward(const real* __restrict__ x, real* __restrict__ y, i64 N, int C) {
    i64 n = ROW;
    if (n >= N) return;
    x += n * C; y += n * C;
    real top = x[0], sum = 0;
    COLUMNS(c, C) top = x[c] > top ? x[c] : top;
    top = warp_max(top);
    COLUMNS(c, C) sum += exp(x[c] - top);
    sum = warp_sum(sum);
    COLUMNS(c, C) y[c] = exp(x[c] - top) / sum;
}

extern "C" __global__ void softmax_backward(
        const real* __restrict__ y, const real* __restrict__ dy, real* __restrict__ dx, i64 N, int C) {
    i64 n = ROW;
    if (n >= N) return;
    y += n * C; dy += n * C; dx += n * C;
    real along = 0;
    COLUMNS(c, C) along += dy[c] * y[c];
    along = warp_sum(along);
    COLUMNS(c, C) dx[c] = y[c] * (dy[c] - along);
}
""")


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

# The heads are laid out for the products in one copy, as CuPy's own batched product would copy each transposed
# operand anyway. Between the products, all that happens to a row of scores happens in one launch: causal mask,
# softmax and dropout, in place. Scores that the mask hides are never read. The dropout mask is not kept: the hash
# gives it again on the way back.
SOURCES.append(r"""
// (N, P H D) -> (P, B, H, T, D): one block per token
extern "C" __global__ void to_heads(
        const real* __restrict__ x, real* __restrict__ y, int T, int H, int D, int P) {
    i64 n = blockIdx.x, N = gridDim.x, b = n / T, t = n % T;
    int S = H * D;
    for (int c = threadIdx.x; c < P * S; c += blockDim.x) {
        int part = c / S, h = c % S / D, d = c % D;
        y[part * N * S + ((b * H + h) * T + t) * D + d] = x[n * P * S + c];
    }
}

// and back
extern "C" __global__ void from_heads(
        const real* __restrict__ y, real* __restrict__ x, int T, int H, int D, int P) {
    i64 n = blockIdx.x, N = gridDim.x, b = n / T, t = n % T;
    int S = H * D;
    for (int c = threadIdx.x; c < P * S; c += blockDim.x) {
        int part = c / S, h = c % S / D, d = c % D;
        x[n * P * S + c] = y[part * N * S + ((b * H + h) * T + t) * D + d];
    }
}

// scores (B, H, T, T) become weights; `dropped` gets what dropout leaves of them, unless `stream` is null
extern "C" __global__ void causal_softmax(
        real* __restrict__ scores, const int* __restrict__ stream, real* __restrict__ dropped,
        i64 N, int H, int T, u32 threshold, real scale) {
    i64 n = ROW;
    if (n >= N) return;
    scores += n * T;
    int seen = n % T + 1;  // a token sees itself and those before it
    real top = scores[0], sum = 0;
    COLUMNS(c, seen) top = scores[c] > top ? scores[c] : top;
    top = warp_max(top);
    COLUMNS(c, seen) sum += exp(scores[c] - top);
    sum = warp_sum(sum);
    i64 of_sample = (i64)H * T, row = n % of_sample * T;
    u32 key = stream ? (u32)stream[n / of_sample] : 0;
    COLUMNS(c, T) {
        real weight = c < seen ? exp(scores[c] - top) / sum : 0;
        scores[c] = weight;
        if (stream) dropped[n * T + c] = survives(key, row + c, threshold) ? weight * scale : 0;
    }
}

// gradients of what dropout left become those of the scores
extern "C" __global__ void causal_softmax_backward(
        const real* __restrict__ weights, const int* __restrict__ stream, real* __restrict__ gradients,
        i64 N, int H, int T, u32 threshold, real scale) {
    i64 n = ROW;
    if (n >= N) return;
    weights += n * T; gradients += n * T;
    int seen = n % T + 1;
    i64 of_sample = (i64)H * T, row = n % of_sample * T;
    u32 key = stream ? (u32)stream[n / of_sample] : 0;
    real along = 0;
    COLUMNS(c, seen) {
        real gradient = gradients[c];
        if (stream) gradient = survives(key, row + c, threshold) ? gradient * scale : 0;
        gradients[c] = gradient;  // this thread's own from here on
        along += gradient * weights[c];
    }
    along = warp_sum(along);
    COLUMNS(c, T) gradients[c] = c < seen ? weights[c] * (gradients[c] - along) : 0;
}
""")


def heads_forward(xp, p, qkv, shape, noise=None, past=None):
    """As heads.forward. It saves the dropout's key instead of its mask."""
    if past is not None:
        return heads.forward.__wrapped__(xp, p, qkv, shape, noise, past)
    qkv = to_heads(xp, qkv, shape, 3)
    q, k, v = qkv[0, ...], qkv[1, ...], qkv[2, ...]  # (B, H, T, D) each
    weights = xp.batched_product(q, k, transpose_b=True, factor=1 / math.sqrt(q.shape[-1]))
    stream, rate = (None, 0.0) if noise is None else (int32(xp, noise[0]), noise[1])
    dropped = weights if noise is None else xp.empty_like(weights)
    _rows_of_scores(xp, "causal_softmax", weights, stream, dropped, weights.shape, rate)
    y = xp.batched_product(dropped, v)  # (B, H, T, D)
    return from_heads(xp, y[None, ...]), heads.Saved(q, k, v, weights, dropped, (stream, rate))


def heads_backward(xp, p, saved, dy):
    q, k, v, weights, dropped, (stream, rate) = saved
    B, H, T, D = q.shape
    dy = to_heads(xp, dy, (B, T, H), 1)[0, ...]
    d = xp.batched_product(dy, v, transpose_b=True)  # (B, H, T, T), of what dropout left
    _rows_of_scores(xp, "causal_softmax_backward", weights, stream, d, d.shape, rate)
    dqkv, factor = xp.empty((3, B, H, T, D), dtype=dy.dtype), 1 / math.sqrt(D)
    xp.batched_product(d, k, factor=factor, out=dqkv[0, ...])
    xp.batched_product(d, q, transpose_a=True, factor=factor, out=dqkv[1, ...])
    xp.batched_product(dropped, dy, transpose_a=True, out=dqkv[2, ...])
    return {}, from_heads(xp, dqkv)


def _rows_of_scores(xp, name: str, first, stream, other, shape, rate: float):
    """One of the two kernels over rows of scores (B, H, T, T)."""
    B, H, T, _ = shape
    threshold, scale = np.uint32(rng.drop_threshold(rate)), real(first, rng.survivor_scale(rate))
    arguments = first, stream, other, np.int64(B * H * T), np.int32(H), np.int32(T), threshold, scale
    xp.launch(name, first.dtype, rows(B * H * T), *arguments)


def to_heads(xp, x, shape, parts: int):
    """x (N, parts S) -> (parts, B, H, T, D)."""
    x, (B, T, H) = xp.ascontiguousarray(x), shape
    D = x.shape[1] // (parts * H)
    y = xp.empty((parts, B, H, T, D), dtype=x.dtype)
    sizes = (np.int32(size) for size in (T, H, D, parts))
    xp.launch("to_heads", x.dtype, ((B * T,), (BLOCK,)), x, y, *sizes)
    return y


def from_heads(xp, y):
    """y (parts, B, H, T, D) -> (N, parts S)."""
    parts, B, H, T, D = y.shape
    x = xp.empty((B * T, parts * H * D), dtype=y.dtype)
    sizes = (np.int32(size) for size in (T, H, D, parts))
    xp.launch("from_heads", y.dtype, ((B * T,), (BLOCK,)), y, x, *sizes)
    return x


# cross-entropy ------------------------------------------------------------------------------------------

# One warp per token, one pass over its logits: where a larger one turns up, the sum so far is scaled down. The
# largest logit and the sum are kept, two numbers per token, not the probabilities: a step's largest array if the
# vocabulary is large. The first `top` is finite, so that a logit of -inf adds nothing.
SOURCES.append(r"""
extern "C" __global__ void cross_entropy_forward(
        const real* __restrict__ logits, const int* __restrict__ targets, real* __restrict__ losses,
        real* __restrict__ tops, real* __restrict__ sums, i64 N, int V) {
    i64 n = ROW;
    if (n >= N) return;
    logits += n * V;
    real top = LOWEST, sum = 0;
    COLUMNS(c, V) {
        real logit = logits[c];
        if (logit > top) {
            sum = sum * exp(top - logit) + 1;
            top = logit;
        } else {
            sum += exp(logit - top);
        }
    }
    real highest = warp_max(top);
    sum = warp_sum(sum * exp(top - highest));
    if (threadIdx.x % 32 == 0) {
        losses[n] = log(sum) - (logits[targets[n]] - highest);
        tops[n] = highest;
        sums[n] = sum;
    }
}

extern "C" __global__ void cross_entropy_backward(
        const real* __restrict__ logits, const int* __restrict__ targets, const real* __restrict__ tops,
        const real* __restrict__ sums, const real* __restrict__ dy, real* __restrict__ dlogits, i64 N, int V) {
    i64 n = ROW;
    if (n >= N) return;
    logits += n * V; dlogits += n * V;
    COLUMNS(c, V) dlogits[c] = (exp(logits[c] - tops[n]) / sums[n] - (c == targets[n])) * dy[n];
}
""")


def cross_entropy_forward(xp, p, logits, targets):
    logits, targets, (N, V) = xp.ascontiguousarray(logits), int32(xp, targets), logits.shape
    losses, tops, sums = (xp.empty((N,), dtype=logits.dtype) for _ in range(3))
    arguments = logits, targets, losses, tops, sums, np.int64(N), np.int32(V)
    xp.launch("cross_entropy_forward", logits.dtype, rows(N), *arguments)
    return losses, (logits, targets, tops, sums)


def cross_entropy_backward(xp, p, saved, dy):
    logits, targets, tops, sums = saved
    dlogits, (N, V) = xp.empty_like(logits), logits.shape
    arguments = logits, targets, tops, sums, xp.ascontiguousarray(dy), dlogits, np.int64(N), np.int32(V)
    xp.launch("cross_entropy_backward", logits.dtype, rows(N), *arguments)
    return {}, dlogits


# optimizer ----------------------------------------------------------------------------------------------

# All parameters in one launch. What changes from step to step (rate, clipping, bias corrections) is read from
# arrays on the device: the host need not wait for it.
SOURCES.append(r"""
extern "C" __global__ void adamw(
        const real* __restrict__ w, const real* __restrict__ g, const real* __restrict__ m,
        const real* __restrict__ v, const real* __restrict__ decays,
        const real* __restrict__ scale, const real* __restrict__ lr,
        const real* __restrict__ bias1, const real* __restrict__ bias2,
        real* __restrict__ new_w, real* __restrict__ new_m, real* __restrict__ new_v,
        i64 size, real keep1, real in1, real keep2, real in2, real weight_decay) {
    EACH(i, size) {
        real gradient = scale[0] * g[i];
        real first = keep1 * m[i] + in1 * gradient;
        real second = keep2 * v[i] + in2 * gradient * gradient;
        real step = (first / bias1[0]) / (sqrt(second / bias2[0]) + ADAMW_EPS);
        new_w[i] = w[i] - lr[0] * (step + weight_decay * decays[i] * w[i]);
        new_m[i] = first;
        new_v[i] = second;
    }
}

// the sum of the squares of a warp's elements
extern "C" __global__ void squares(const real* __restrict__ x, real* __restrict__ sums, i64 size) {
    real sum = 0;
    EACH(i, size) sum += x[i] * x[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[ROW] = sum;
}

// one warp
extern "C" __global__ void root_of_sum(const real* __restrict__ x, real* __restrict__ y, int size) {
    real sum = 0;
    COLUMNS(c, size) sum += x[c];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) y[0] = sqrt(sum);
}
""")


def adamw(xp, w, g, m, v, decays, scale, lr, bias1, bias2, beta1, beta2, weight_decay):
    new = tuple(xp.empty_like(w) for _ in range(3))
    numbers = (real(w, number) for number in (beta1, 1 - beta1, beta2, 1 - beta2, weight_decay))
    arrays = w, xp.ascontiguousarray(g), m, v, xp.astype(decays, w.dtype, copy=False), scale, lr, bias1, bias2
    xp.launch("adamw", w.dtype, elements(w.size), *arrays, *new, np.int64(w.size), *numbers)
    return new


def global_norm(xp, gradients):
    gradients = xp.ascontiguousarray(gradients)
    (blocks,), block = elements(gradients.size)
    blocks = min(blocks, 256)
    sizes = ((blocks * (BLOCK // WARP),), (1,))
    sums, norm = (xp.empty(size, dtype=gradients.dtype) for size in sizes)
    xp.launch("squares", gradients.dtype, ((blocks,), block), gradients, sums, np.int64(gradients.size))
    xp.launch("root_of_sum", gradients.dtype, ((1,), (WARP,)), sums, norm, np.int32(sums.size))
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
    "optimizers.global_norm": global_norm,
}
