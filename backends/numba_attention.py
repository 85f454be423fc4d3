"""Attention of narrow heads by vectors, see simd.py: nothing of T x T is kept.

A vector holds one number of each of W queries (forward) or W keys (backward). The D channels of these tokens are a
tuple of vectors and stay in registers, while the tokens of the other side pass by one at a time. Forward computes
the scores of W queries into the cache first, so that exp can be shifted by the largest; backward computes them
again.

Arrays are flat. qkv (B, T, 3, H, D): queries, keys and values. shift, inverse (B, H, T): the largest score of a
query, and 1 / the sum of exp(score - shift). streams (B,), threshold: dropout's, see rng.py; a threshold of 0 is
no dropout. `scratch` is the caller's memory, of scratch_size numbers.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from baby_xp_backends import numpy_kernels
from baby_xp_backends.numba_library import COMPILING, FLOATS, INTEGERS, compiled, flat, inlined
from baby_xp_backends.simd_width import W

from baby_xp.arrays import rng
from baby_xp.layers import Shape, heads

if COMPILING:
    from baby_xp_backends.numba_maths import exp_of_negative, mix
    from baby_xp_backends.simd import (
        add_outer,
        axpy,
        bits,
        dot,
        floats,
        lanes,
        load,
        load_rows,
        select,
        spread,
        store,
        store_rows,
        totals,
        zero_rows,
    )

HALF = 0xFFFF


@inlined
def _hash(place, stream):
    """The hash from which the dropout of the elements at these places in the sample is taken."""
    return mix(mix(place >> 1) ^ stream)


@inlined
def _bits_of(hashed, place):
    """The 16 bits of the elements at these places."""
    return (hashed >> ((place & 1) << 4)) & HALF


def _forward(D: int):
    scale = 1 / math.sqrt(D)

    @compiled(f"void({FLOATS}, {FLOATS}, {FLOATS}, {FLOATS}, {INTEGERS}, i8, f8, i8, i8, i8, {FLOATS})")
    def forward(qkv, y, shift, inverse, streams, threshold, survivor_scale, B, T, H, scratch):
        """y (B, T, H, D), shift and inverse are written."""
        token, key, value = 3 * H * D, H * D, 2 * H * D  # to the next token, from queries to keys, to values
        factors, scores = W * D, W * D + W
        for b in range(B):
            stream = spread(streams[b])
            for h in range(H):
                base = b * T * token + h * D
                for first in range(0, T, W):
                    number = min(W, T - first)
                    for i in range(number):
                        for d in range(D):
                            scratch[d * W + i] = qkv[base + (first + i) * token + d] * scale
                    q, end, query = load_rows(scratch, 0, W, D), first + number, lanes() + first
                    top = spread(-math.inf)
                    for j in range(end):
                        score = dot(q, qkv, base + key + j * token)
                        store(scratch, scores + j * W, score)
                        if j > first:
                            score = select(query >= j, score, -math.inf)
                        top = select(score > top, score, top)
                    places = (query + h * T) * T
                    sums, sum_of_values, hashed = spread(0.0), zero_rows(D), query
                    for j in range(end):
                        e = exp_of_negative(load(scratch, scores + j * W) - top)
                        if j > first:
                            e = select(query >= j, e, 0.0)
                        sums = sums + e
                        if threshold:
                            if (T | j) & 1 == 0 or T & 1:  # a hash serves a pair of keys, in rows of even length
                                hashed = _hash(places + j, stream)
                            e = select(_bits_of(hashed, places + j) >= threshold, e, 0.0)
                        sum_of_values = axpy(e, qkv, base + value + j * token, sum_of_values)
                    store_rows(scratch, 0, W, sum_of_values)
                    store(scratch, scores, top)
                    store(scratch, factors, 1.0 / sums)
                    for i in range(number):
                        shift[(b * H + h) * T + first + i] = scratch[scores + i]
                        inverse[(b * H + h) * T + first + i] = scratch[factors + i]
                        factor = scratch[factors + i] * survivor_scale
                        for d in range(D):
                            y[((b * T + first + i) * H + h) * D + d] = scratch[d * W + i] * factor

    return forward


def _backward(D: int):
    scale = 1 / math.sqrt(D)
    signature = f"void({', '.join([FLOATS] * 6)}, {INTEGERS}, i8, f8, i8, i8, i8, {FLOATS})"

    @compiled(signature)
    def backward(qkv, y, dy, shift, inverse, dqkv, streams, threshold, survivor_scale, B, T, H, scratch):
        """y, dy (B, T, H, D); dqkv, as qkv, is written."""
        token, key, value = 3 * H * D, H * D, 2 * H * D
        keys, values = 0, W * D  # places in scratch: vectors, a row for each query, sums
        queries = 2 * W * D
        dys = queries + T * D
        along, dqs = dys + T * D, dys + T * D + T
        # in rows of even length a hash serves a pair of keys: then a vector has every second key, and the next
        # vector has the others
        step = 1 if T & 1 else 2
        hashes = dqs + (T * D + W) * W
        for b in range(B):
            stream = spread(streams[b])
            for h in range(H):
                base, row = b * T * token + h * D, (b * H + h) * T
                for i in range(T):
                    at = ((b * T + i) * H + h) * D
                    sum_of_both = np.float32(0.0)
                    for d in range(D):
                        sum_of_both += y[at + d] * dy[at + d]
                        scratch[queries + i * D + d] = qkv[base + i * token + d] * scale
                        scratch[dys + i * D + d] = dy[at + d] * (inverse[row + i] * survivor_scale)
                    scratch[along + i] = sum_of_both * inverse[row + i]
                for i in range(T * D + W):
                    store(scratch, dqs + i * W, spread(0.0))
                for block in range(0, T, step * W):
                    for start in range(block, block + step):
                        for lane in range(W):
                            j = min(start + step * lane, T - 1)
                            for d in range(D):
                                scratch[keys + d * W + lane] = qkv[base + key + j * token + d]
                                scratch[values + d * W + lane] = qkv[base + value + j * token + d]
                        k, v = load_rows(scratch, keys, W, D), load_rows(scratch, values, W, D)
                        dk, dv = zero_rows(D), zero_rows(D)
                        places = lanes() * step + start
                        masked = start + step * (W - 1)  # queries before this one do not see all of the keys
                        for i in range(start, T):
                            e = exp_of_negative(dot(k, scratch, queries + i * D) - shift[row + i])
                            if i < masked:
                                e = select(places <= i, e, 0.0)
                            de = dot(v, scratch, dys + i * D)
                            kept = e
                            if threshold:
                                place = places + (h * T + i) * T
                                if start == block:
                                    hashed = _hash(place, stream)
                                    store(scratch, hashes + i * W, floats(hashed))
                                else:
                                    hashed = bits(load(scratch, hashes + i * W))
                                keep = _bits_of(hashed, place) >= threshold
                                kept, de = select(keep, e, 0.0), select(keep, de, 0.0)
                            dv = axpy(kept, scratch, dys + i * D, dv)
                            dscore = e * (de - scratch[along + i])
                            dk = axpy(dscore, scratch, queries + i * D, dk)
                            add_outer(dscore, k, scratch, dqs + i * D * W)
                        store_rows(scratch, keys, W, dk)
                        store_rows(scratch, values, W, dv)
                        for lane in range(min(W, (T - start + step - 1) // step)):
                            j = start + step * lane
                            for d in range(D):
                                dqkv[base + key + j * token + d] = scratch[keys + d * W + lane]
                                dqkv[base + value + j * token + d] = scratch[values + d * W + lane]
                for i in range(0, T * D, W):
                    store(scratch, queries + i, totals(load_rows(scratch, dqs + i * W, W, W)) * scale)
                for i in range(T):
                    for d in range(D):
                        dqkv[base + i * token + d] = scratch[queries + i * D + d]

    return backward


WIDTHS = (8,)
FORWARD, BACKWARD = ({D: make(D) for D in WIDTHS} for make in (_forward, _backward))


def scratch_size(D: int, T: int) -> int:
    """Numbers that a kernel needs as scratch."""
    return 2 * W * D + 2 * T * D + T + W * (T * D + 2 * W + T + D)


class SavedNarrow(NamedTuple):
    """What heads_backward needs for narrow heads; q, k and v are views of qkv, and k and v the cache."""

    k: Any
    v: Any
    qkv: Any
    shape: Shape
    y: Any
    shift: Any
    inverse: Any
    noise: Any


def heads_forward(xp, p, qkv, shape, noise=None, past=None):
    """As heads.forward. Of narrow heads it keeps the largest score and the sum of each query."""
    B, T, H = shape
    D = qkv.shape[1] // (3 * H)
    if qkv.dtype != np.float32 or D not in WIDTHS or past is not None:
        return numpy_kernels.heads_forward(xp, p, qkv, shape, noise, past)
    y = np.empty((B * T, H * D), qkv.dtype)
    shift, inverse = np.empty(B * H * T, qkv.dtype), np.empty(B * H * T, qkv.dtype)
    scratch = np.zeros(scratch_size(D, T), np.float32)
    arguments = *_dropout(noise, B), B, T, H, scratch
    FORWARD[D](flat(qkv), y.reshape(-1), shift, inverse, *arguments)
    _, k, v = heads.split(np, qkv, shape)
    return y, SavedNarrow(k, v, qkv, shape, y, shift, inverse, noise)


def heads_backward(xp, p, saved, dy):
    if not isinstance(saved, SavedNarrow):
        return numpy_kernels.heads_backward(xp, p, saved, dy)
    _, _, qkv, (B, T, H), y, shift, inverse, noise = saved
    D = qkv.shape[1] // (3 * H)
    dqkv = np.empty(qkv.shape, qkv.dtype)
    scratch = np.empty(scratch_size(D, T), np.float32)
    dy = flat(np.asarray(dy, np.float32))
    arguments = dqkv.reshape(-1), *_dropout(noise, B), B, T, H, scratch
    BACKWARD[D](flat(qkv), y.reshape(-1), dy, shift, inverse, *arguments)
    return {}, dqkv


def _dropout(noise, B: int):
    """Streams (B,), threshold and the factor of survivors."""
    if noise is None:
        return np.zeros(B, np.int32), 0, 1.0
    stream, rate = noise
    return flat(stream), rng.drop_threshold(rate), rng.survivor_scale(rate)
