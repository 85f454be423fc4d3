"""Queries and keys before attention, on NumPy: rotation and QK-norm in few passes over whole rows.

The plain form computes with halves of heads, whose loops are too short for NumPy. With cosines and sines repeated
for all heads, y = x cos + swap(x) sin', where swap exchanges the two halves of every head and sin' has the signs:
halves are only copied, and the products are of whole rows. Queries and keys are copied out of the array that they
share with the values, because NumPy is two to three times as fast on arrays without gaps.
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
    x = rotated(x, *tables(t, shape, x.shape[3], x.dtype)) if steps.rotary else x.copy()
    if steps.norm:
        rstd = 1 / np.sqrt(np.vecdot(x, x)[..., None] / x.shape[3] + rmsnorm.EPS)
        x *= rstd
    qk[...] = x
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
        dy, along = dy.copy(), query_key.split(np, y, shape)[0].copy()
        along *= np.vecdot(dy, along)[..., None] / -dy.shape[3]
        dy += along
        dy *= rstd
    if steps.rotary:
        cos, sin = tables(0, shape, dy.shape[3], dy.dtype)
        dy = rotated(dy, cos, -sin)
    dqk[...] = dy
    return {}, dx


def rotated(x, cos, sin) -> np.ndarray:
    """x (B, T, 2 H, D) rotated."""
    y = np.empty(x.shape, x.dtype)
    halves = (*x.shape[:3], 2, -1)
    y.reshape(halves)[...] = x.reshape(halves)[..., ::-1, :]
    y *= sin
    y += x * cos
    return y


def tables(t: int, shape: Shape, D: int, dtype):
    """Cosines, and sines with signs, (T, 2 H, D) each: those of the positions t to t + T - 1, for each head."""
    end = t + shape.T
    return tuple(table[t:end] for table in _tables(1 << (end - 1).bit_length(), shape.H, D, dtype))


@functools.lru_cache(maxsize=8)
def _tables(length: int, H: int, D: int, dtype):
    cos, sin = half_tables(length, D, np.float64)
    tables = np.concatenate([cos, cos], axis=1), np.concatenate([sin, -sin], axis=1)
    return tuple(np.repeat(table[:, None, :], 2 * H, axis=1).astype(dtype) for table in tables)


@functools.lru_cache(maxsize=8)
def half_tables(length: int, D: int, dtype):
    """Cosines and sines (length, D / 2) of the angles at the positions from 0 on."""
    angles = np.outer(np.arange(length), rotary.BASE ** (-2 / D * np.arange(D // 2)))
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
