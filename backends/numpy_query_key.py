"""Queries and keys before attention, on NumPy: rotation and QK-norm in few passes over whole rows.

The plain form computes with halves of heads, whose loops are too short for NumPy. With cosines and sines repeated
for all heads, y = x cos + swap(x) sin', where swap exchanges the two halves of every head and sin' has the signs:
halves are only copied, and the products are of whole rows.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from baby_xp.layers import Shape, query_key, rmsnorm, rotary
from baby_xp.layers.query_key import Steps


class Saved(NamedTuple):
    """What backward needs. The result is what heads.forward keeps anyway."""

    shape: Shape
    steps: Steps
    y: Any
    rstd: Any


def forward(xp, p, qkv, shape, steps, past=None):
    """As query_key.forward."""
    if not any(steps):
        return qkv, None
    t = 0 if past is None else past[0].shape[2]
    y, rstd = np.empty_like(qkv), None
    qk, v = query_key.split(np, y, shape)                          # views of y
    x, v[...] = query_key.split(np, qkv, shape)
    if steps.rotary:
        rotate(x, qk, *tables(t, shape, x.shape[3], x.dtype))
        x = qk
    if steps.norm:
        rstd = 1 / np.sqrt(np.vecdot(x, x)[..., None] / x.shape[3] + rmsnorm.EPS)
        np.multiply(x, rstd, out=qk)
    return y, Saved(shape, steps, y, rstd)


def backward(xp, p, saved, dqkv):
    """As query_key.backward."""
    if saved is None:
        return {}, dqkv
    shape, steps, y, rstd = saved
    dx = np.empty_like(dqkv)
    dqk, dv = query_key.split(np, dx, shape)                       # views of dx
    dy, dv[...] = query_key.split(np, dqkv, shape)
    if steps.norm:
        y, _ = query_key.split(np, y, shape)
        into = np.empty(dy.shape, dy.dtype) if steps.rotary else dqk
        np.multiply(y, np.vecdot(dy, y)[..., None] / -dy.shape[3], out=into)
        into += dy
        into *= rstd
        dy = into
    if steps.rotary:
        cos, sin = tables(0, shape, dy.shape[3], dy.dtype)
        rotate(dy, dqk, cos, -sin)
    return {}, dx


def rotate(x, y, cos, sin) -> None:
    """Rotate x (B, T, 2 H, D) into y."""
    halves = (*x.shape[:3], 2, -1)
    y.reshape(halves)[...] = x.reshape(halves)[..., ::-1, :]
    y *= sin
    y += x * cos


def tables(t: int, shape: Shape, D: int, dtype):
    """Cosines, and sines with signs, (T, 2 H, D) each: those of the positions t to t + T - 1, for each head."""
    end = t + shape.T
    return tuple(table[t:end] for table in _tables(1 << (end - 1).bit_length(), shape.H, D, dtype))


@functools.lru_cache(maxsize=8)
def _tables(length: int, H: int, D: int, dtype):
    angles = np.outer(np.arange(length), rotary.BASE ** (-2 / D * np.arange(D // 2)))  # (length, D / 2)
    cos, sin = np.cos(angles), np.sin(angles)
    tables = np.concatenate([cos, cos], axis=1), np.concatenate([sin, -sin], axis=1)
    return tuple(np.repeat(table[:, None, :], 2 * H, axis=1).astype(dtype) for table in tables)
