"""Rotation and QK-norm of queries and keys by vectors, see simd.py: one head of one token after the other.

A vector has LANES numbers, so that the halves of a head 16 wide are vectors; NumPy computes heads whose halves are
no multiple of that. Arrays are flat. qkv (B, T, 3, H, D); rstd (B, T, 2 H), that of queries and then of keys; cos,
sin (T, D / 2), those of the angles of a position.
"""

import math

import numpy as np
from baby_xp_backends import numpy_query_key
from baby_xp_backends.numba_library import COMPILING, FLOATS, compiled, flat
from baby_xp_backends.numpy_query_key import Saved
from baby_xp_backends.simd_width import W

from baby_xp.layers import rmsnorm

LANES = min(W, 8)

if COMPILING:
    from baby_xp_backends.simd import of_width, store, total

    _own = of_width(LANES)
    load, spread = _own.load, _own.spread


@compiled(f"void({', '.join([FLOATS] * 5)}, i8, i8, i8, b1, b1)")
def heads_of_tokens(qkv, cos, sin, y, rstd, T, H, D, rotary, norm):
    """y, as qkv, and rstd are written."""
    half, S = D // 2, H * D
    for token in range(len(qkv) // (3 * S)):
        of_angles = token % T * half
        for head in range(2 * H):
            base, squares = 3 * S * token + D * head, spread(0.0)
            for i in range(0, half, LANES):
                a, b = load(qkv, base + i), load(qkv, base + half + i)
                if rotary:
                    c, s = load(cos, of_angles + i), load(sin, of_angles + i)
                    a, b = a * c + b * s, b * c - a * s
                squares = squares + a * a + b * b
                store(y, base + i, a)
                store(y, base + half + i, b)
            if norm:
                scale = 1.0 / math.sqrt(total(squares) / D + rmsnorm.EPS)
                rstd[2 * H * token + head] = scale
                for at in range(base, base + D, LANES):
                    store(y, at, load(y, at) * scale)
        for at in range(3 * S * token + 2 * S, 3 * S * (token + 1), LANES):
            store(y, at, load(qkv, at))


@compiled(f"void({', '.join([FLOATS] * 6)}, i8, i8, i8, b1, b1)")
def heads_of_tokens_backward(dy, y, cos, sin, rstd, dx, T, H, D, rotary, norm):
    """dx, as dy shaped as qkv, is written."""
    half, S = D // 2, H * D
    for token in range(len(dy) // (3 * S)):
        of_angles = token % T * half
        for head in range(2 * H):
            base, along, scale = 3 * S * token + D * head, 0.0, 1.0
            if norm:
                sums = spread(0.0)
                for at in range(base, base + D, LANES):
                    sums = sums + load(dy, at) * load(y, at)
                along, scale = total(sums) / D, rstd[2 * H * token + head]
            for i in range(0, half, LANES):
                a, b = load(dy, base + i), load(dy, base + half + i)
                if norm:
                    a = (a - load(y, base + i) * along) * scale
                    b = (b - load(y, base + half + i) * along) * scale
                if rotary:
                    c, s = load(cos, of_angles + i), load(sin, of_angles + i)
                    a, b = a * c - b * s, b * c + a * s
                store(dx, base + i, a)
                store(dx, base + half + i, b)
        for at in range(3 * S * token + 2 * S, 3 * S * (token + 1), LANES):
            store(dx, at, load(dy, at))


def _suits(qkv, shape) -> bool:
    return qkv.dtype == np.float32 and qkv.shape[1] // (3 * shape.H) % (2 * LANES) == 0


def _turns(t: int, shape, D: int):
    """Flat cosines and sines of the positions t to t + T - 1."""
    end = t + shape.T
    tables = numpy_query_key.half_tables(1 << (end - 1).bit_length(), D, np.float32)
    return [flat(table[t:end]) for table in tables]


def query_key_forward(xp, p, qkv, shape, steps, past=None):
    if not (any(steps) and _suits(qkv, shape)):
        return numpy_query_key.forward(xp, p, qkv, shape, steps, past)
    (B, T, H), t = shape, 0 if past is None else past[0].shape[2]
    D = qkv.shape[1] // (3 * H)
    y, rstd = np.empty(qkv.shape, qkv.dtype), np.empty((B, T, 2 * H, 1), qkv.dtype)
    heads_of_tokens(flat(qkv), *_turns(t, shape, D), y.reshape(-1), rstd.reshape(-1), T, H, D, *steps)
    return y, Saved(shape, steps, y, rstd)


def query_key_backward(xp, p, saved, dqkv):
    if saved is None or not _suits(saved.y, saved.shape):
        return numpy_query_key.backward(xp, p, saved, dqkv)
    shape, steps, y, rstd = saved
    D, dx = y.shape[1] // (3 * shape.H), np.empty(y.shape, y.dtype)
    inputs = flat(np.asarray(dqkv, y.dtype)), flat(y), *_turns(0, shape, D), flat(rstd)
    heads_of_tokens_backward(*inputs, dx.reshape(-1), shape.T, shape.H, D, *steps)
    return {}, dx
