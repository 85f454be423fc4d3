"""Attention by vectors, see simd.py, in tiles of W queries and W keys: nothing of T x T is kept.

A vector holds one number of each of W queries, and W of them, for W keys, are a tile of scores. Every product sums
outer products: one vector is multiplied by each of W numbers, and the W sums stay in registers. For that each head
is first copied to `scratch`: as rows of tokens, and as tiles of columns, where the same channel of W tokens is a
vector. Forward computes all scores of W queries first, so that exp can be shifted by the largest of each; backward
computes them again.

Arrays are flat. qkv (B, T, 3, H, D): queries, keys and values. shift, inverse (B, H, N): the largest score of a
query, and 1 / the sum of exp(score - shift); N and C are T and D, rounded up to whole vectors. streams (B,),
threshold: dropout's, see rng.py; a threshold of 0 is no dropout.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from baby_xp_backends import numpy_kernels
from baby_xp_backends.numba_library import COMPILING, FLOATS, INTEGERS, aligned, compiled, flat, inlined
from baby_xp_backends.simd_width import W

from baby_xp.arrays import rng
from baby_xp.layers import Shape, heads

if COMPILING:
    from baby_xp_backends.numba_maths import exp_of_negative, mix
    from baby_xp_backends.simd import (
        axpy,
        axpy_rows,
        lanes,
        load,
        load_first,
        load_rows,
        select,
        spread,
        store,
        store_first,
        store_rows,
        total,
        transposed,
        zero_rows,
    )


@inlined
def _whole(n):
    """n, rounded up to whole vectors."""
    return (n + W - 1) // W * W


@inlined
def _copy(source, base, step, T, D, scratch, to):
    """T rows of D numbers, which begin `step` apart -> (N, C): zeros follow each, and the last one is repeated."""
    for i in range(_whole(T)):
        for c in range(0, D, W):
            row = load_first(source, base + min(i, T - 1) * step + c, min(W, D - c))
            store(scratch, to + i * _whole(D) + c, row)


@inlined
def _transpose(source, base, step, N, C, scratch, to):
    """N rows of C numbers, which begin `step` apart -> (N / W, C, W): tiles of columns."""
    for i in range(0, N, W):
        for c in range(0, C, W):
            tile = transposed(load_rows(source, base + i * step + c, step, W))
            store_rows(scratch, to + i * C + c * W, W, tile)


@inlined
def _hash(place, stream):
    """The hash from which the dropout of the weights at these places in the sample is taken."""
    return mix(mix(place >> 1) ^ stream)


@inlined
def _bits_of(hashed, place):
    """The 16 bits of the weights at these places."""
    return (hashed >> ((place & 1) << 4)) & 0xFFFF


@inlined
def _kept(place, stream, threshold, T):
    """Whether dropout keeps the weights at these places, and those at the next ones: two masks."""
    hashed = _hash(place, stream)
    if T & 1:
        after = _bits_of(_hash(place + 1, stream), place + 1)
        return _bits_of(hashed, place) >= threshold, after >= threshold
    return (hashed & 0xFFFF) >= threshold, (hashed >> 16) >= threshold  # one hash serves a pair of keys


@compiled(f"void({', '.join([FLOATS] * 4)}, {INTEGERS}, i8, f8, i8, i8, i8, i8, {FLOATS})")
def forward(qkv, y, shift, inverse, streams, threshold, survivor_scale, B, T, H, D, scratch):
    """y (B, T, H, D), shift and inverse are written."""
    N, C, token, scale = _whole(T), _whole(D), 3 * H * D, 1 / math.sqrt(D)  # token: from one to the next in qkv
    values, columns, scores = 2 * N * C, 3 * N * C, 5 * N * C  # places in scratch; columns of queries and keys
    out, whole = scores + N * W, N == T and C == D
    for b in range(B):
        stream = spread(streams[b])
        for h in range(H):
            for part in range(3):
                base, rows = b * T * token + (part * H + h) * D, part * N * C
                if part == 2 or not whole:
                    _copy(qkv, base, token, T, D, scratch, rows)
                if part < 2 and whole:
                    _transpose(qkv, base, token, N, C, scratch, columns + rows)
                elif part < 2:
                    _transpose(scratch, rows, C, N, C, scratch, columns + rows)
            for first in range(0, T, W):
                query, end, top = lanes() + first, first + W, spread(-math.inf)
                for start in range(0, end, W):
                    tile = zero_rows(W)
                    for d in range(0, D * W, W):
                        q, keys = load(scratch, columns + first * C + d), columns + (N + start) * C
                        tile = axpy(q, scratch, keys + d, tile)
                    store_rows(scratch, scores + start * W, W, tile)
                    for j in range(start, start + W):
                        score = load(scratch, scores + j * W)
                        if start == first:
                            score = select(query >= j, score, -math.inf)
                        top = select(score > top, score, top)
                top, sums, places = top * scale, spread(0.0), (query + h * T) * T
                for j in range(0, end, 2):
                    at = scores + j * W
                    e = exp_of_negative(load(scratch, at) * scale - top)
                    e1 = exp_of_negative(load(scratch, at + W) * scale - top)
                    if j >= first:
                        e, e1 = select(query >= j, e, 0.0), select(query > j, e1, 0.0)
                    sums = sums + (e + e1)
                    if threshold:
                        keep, keep1 = _kept(places + j, stream, threshold, T)
                        e, e1 = select(keep, e, 0.0), select(keep1, e1, 0.0)
                    store(scratch, at, e)
                    store(scratch, at + W, e1)
                at = (b * H + h) * N + first
                store(shift, at, top)
                store(inverse, at, 1.0 / sums)
                for c in range(0, D, W):
                    tile = zero_rows(W)
                    for j in range(end):
                        tile = axpy(load(scratch, values + j * C + c), scratch, scores + j * W, tile)
                    store_rows(scratch, out, W, tile)
                    for i in range(min(W, T - first)):
                        row = load(scratch, out + i * W) * (inverse[at + i] * survivor_scale)
                        store_first(y, ((b * T + first + i) * H + h) * D + c, row, min(W, D - c))


def forward_scratch(T: int, D: int) -> int:
    """Numbers that forward needs as scratch."""
    N, C = -(-T // W) * W, -(-D // W) * W
    return 5 * N * C + N * W + W * W


@compiled(f"void({', '.join([FLOATS] * 6)}, {INTEGERS}, i8, f8, i8, i8, i8, i8, {FLOATS})")
def backward(qkv, y, dy, shift, inverse, dqkv, streams, threshold, survivor_scale, B, T, H, D, scratch):
    """y, dy (B, T, H, D); dqkv, as qkv, is written."""
    N, C, token, scale = _whole(T), _whole(D), 3 * H * D, 1 / math.sqrt(D)
    keys, dys, columns, dqs = N * C, 3 * N * C, 4 * N * C, 8 * N * C  # rows of queries, keys, values, dy; columns
    along = 9 * N * C
    kepts, dscores, out = along + N, along + N + N * W, along + N + 2 * N * W
    for b in range(B):
        stream = spread(streams[b])
        for h in range(H):
            base, row = b * T * token + h * D, (b * H + h) * N
            for part in range(3):
                _copy(qkv, base + part * H * D, token, T, D, scratch, part * N * C)
            _copy(dy, (b * T * H + h) * D, H * D, T, D, scratch, dys)
            for i in range(T):
                # the sum over keys of dweights * weights is the sum over channels of dy * y
                sums, factor = spread(0.0), inverse[row + i] * survivor_scale
                for c in range(0, D, W):
                    d = load(scratch, dys + i * C + c)
                    sums = sums + d * load_first(y, ((b * T + i) * H + h) * D + c, min(W, D - c))
                    store(scratch, dys + i * C + c, d * factor)
                scratch[along + i] = total(sums) * inverse[row + i]
            for part in range(4):
                _transpose(scratch, part * N * C, C, N, C, scratch, columns + part * N * C)
            for start in range(0, T, W):
                for first in range(start, T, W):
                    to_tile = (first - start) * W
                    for part in range(2):  # the scores, then the gradients of the weights
                        tile = zero_rows(W)
                        x, others = 3 * part * N * C + first * C, (1 + part) * N * C + start * C
                        for at in range(columns, columns + D * W, W):
                            tile = axpy(load(scratch, at + x), scratch, at + others, tile)
                        store_rows(scratch, (dscores if part else kepts) + to_tile, W, tile)
                    query, top, mean = lanes() + first, load(shift, row + first), load(scratch, along + first)
                    places = (query + h * T) * T
                    for j in range(start, start + W, 2):
                        at = to_tile + (j - start) * W
                        e = exp_of_negative(load(scratch, kepts + at) * scale - top)
                        e1 = exp_of_negative(load(scratch, kepts + at + W) * scale - top)
                        if start == first:
                            e, e1 = select(query >= j, e, 0.0), select(query > j, e1, 0.0)
                        de, de1 = load(scratch, dscores + at), load(scratch, dscores + at + W)
                        kept, kept1 = e, e1
                        if threshold:
                            keep, keep1 = _kept(places + j, stream, threshold, T)
                            kept, kept1 = select(keep, e, 0.0), select(keep1, e1, 0.0)
                            de, de1 = select(keep, de, 0.0), select(keep1, de1, 0.0)
                        store(scratch, kepts + at, kept)
                        store(scratch, kepts + at + W, kept1)
                        store(scratch, dscores + at, e * scale * (de - mean))
                        store(scratch, dscores + at + W, e1 * scale * (de1 - mean))
                    for c in range(0, D, W):
                        at = dqs + first * C + c
                        tile = load_rows(scratch, at, C, W) if start else zero_rows(W)
                        for j in range(W):
                            k = load(scratch, keys + (start + j) * C + c)
                            tile = axpy(k, scratch, dscores + to_tile + j * W, tile)
                        store_rows(scratch, at, C, tile)
                for part in range(2):  # the gradients of the keys, then of the values
                    for c in range(0, D, W):
                        tile = zero_rows(W)
                        for i in range(start, T):
                            x = load(scratch, (dys if part else 0) + i * C + c)
                            at = (kepts if part else dscores) + (i // W * W - start) * W + i % W
                            tile = axpy_rows(x, scratch, at, W, tile)
                        store_rows(scratch, out, W, tile)
                        for i in range(min(W, T - start)):
                            at = base + (1 + part) * H * D + (start + i) * token + c
                            store_first(dqkv, at, load(scratch, out + i * W), min(W, D - c))
            for i in range(T):
                for c in range(0, D, W):
                    store_first(dqkv, base + i * token + c, load(scratch, dqs + i * C + c), min(W, D - c))


def backward_scratch(T: int, D: int) -> int:
    """Numbers that backward needs as scratch."""
    N, C = -(-T // W) * W, -(-D // W) * W
    return 9 * N * C + N + 2 * N * W + W * W


class SavedOutput(NamedTuple):
    """What heads_backward needs; k and v are views of qkv, and the cache."""

    k: Any
    v: Any
    qkv: Any
    shape: Shape
    y: Any
    shift: Any
    inverse: Any
    noise: Any


def heads_forward(xp, p, qkv, shape, noise=None, past=None):
    """As heads.forward. It keeps the largest score and the sum of each query."""
    if qkv.dtype != np.float32 or past is not None:
        return numpy_kernels.heads_forward(xp, p, qkv, shape, noise, past)
    B, T, H = shape
    D, N = qkv.shape[1] // (3 * H), -(-T // W) * W
    y = np.empty((B * T, H * D), qkv.dtype)
    shift, inverse = np.empty((2, B * H * N), qkv.dtype)
    scratch = aligned(forward_scratch(T, D))
    forward(flat(qkv), y.reshape(-1), shift, inverse, *_dropout(noise, B), B, T, H, D, scratch)
    _, k, v = heads.split(np, qkv, shape)
    return y, SavedOutput(k, v, qkv, shape, y, shift, inverse, noise)


def heads_backward(xp, p, saved, dy):
    if not isinstance(saved, SavedOutput):
        return numpy_kernels.heads_backward(xp, p, saved, dy)
    _, _, qkv, (B, T, H), y, shift, inverse, noise = saved
    D = qkv.shape[1] // (3 * H)
    dqkv = np.empty(qkv.shape, qkv.dtype)
    inputs = flat(qkv), y.reshape(-1), flat(np.asarray(dy, np.float32)), shift, inverse
    scratch = aligned(backward_scratch(T, D))
    backward(*inputs, dqkv.reshape(-1), *_dropout(noise, B), B, T, H, D, scratch)
    return {}, dqkv


def _dropout(noise, B: int):
    """Streams (B,), threshold and the factor of survivors."""
    if noise is None:
        return np.zeros(B, np.int32), 0, 1.0
    stream, rate = noise
    return flat(stream), rng.drop_threshold(rate), rng.survivor_scale(rate)
