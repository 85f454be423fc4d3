"""Faster forms of some of the functions in numpy_kernels.py: float32 alone, by numba. The extra `fast` has it.

Same arguments, same results up to rounding. Arrays of other types go to NumPy's functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from baby_xp_backends import numba_attention, numba_elementwise, numpy_kernels

from baby_xp.arrays import rng
from baby_xp.layers import Shape, heads


def flat(array) -> np.ndarray:
    """The elements one after the other, as the kernels take them: a copy of what has gaps or is read-only."""
    return (array if array.flags.carray else np.array(array, order="C")).reshape(-1)


def gelu_tanh_form(xp, x):
    if x.dtype != np.float32:
        return numpy_kernels.gelu_tanh_form(xp, x)
    y, derivative = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)
    numba_elementwise.gelu_tanh(flat(x), y.reshape(-1), derivative.reshape(-1))
    return y, derivative


def layernorm_forward(xp, p, x):
    if x.dtype != np.float32:
        return numpy_kernels.layernorm_forward(xp, p, x)
    y, xhat, rstd = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype), np.empty((len(x), 1), x.dtype)
    inputs = flat(x), flat(p["gain"]), flat(p["bias"])
    numba_elementwise.layernorm_forward(*inputs, y.reshape(-1), xhat.reshape(-1), rstd.reshape(-1))
    return y, (xhat, rstd)


def layernorm_backward(xp, p, saved, dy):
    xhat, rstd = saved
    if dy.dtype != np.float32 or xhat.dtype != np.float32:
        return numpy_kernels.layernorm_backward(xp, p, saved, dy)
    dx, (dgain, dbias) = np.empty(dy.shape, dy.dtype), np.zeros((2, dy.shape[1]), dy.dtype)
    inputs = flat(dy), flat(p["gain"]), flat(xhat), flat(rstd)
    numba_elementwise.layernorm_backward(*inputs, dx.reshape(-1), dgain, dbias)
    return {"gain": dgain, "bias": dbias}, dx


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
    if qkv.dtype != np.float32 or D not in numba_attention.WIDTHS or past is not None:
        return numpy_kernels.heads_forward(xp, p, qkv, shape, noise, past)
    y = np.empty((B * T, H * D), qkv.dtype)
    shift, inverse = np.empty(B * H * T, qkv.dtype), np.empty(B * H * T, qkv.dtype)
    scratch = np.zeros(numba_attention.scratch_size(D, T), np.float32)
    arguments = *_dropout(noise, B), B, T, H, scratch
    numba_attention.FORWARD[D](flat(qkv), y.reshape(-1), shift, inverse, *arguments)
    _, k, v = heads.split(np, qkv, shape)
    return y, SavedNarrow(k, v, qkv, shape, y, shift, inverse, noise)


def heads_backward(xp, p, saved, dy):
    if not isinstance(saved, SavedNarrow):
        return numpy_kernels.heads_backward(xp, p, saved, dy)
    _, _, qkv, (B, T, H), y, shift, inverse, noise = saved
    D = qkv.shape[1] // (3 * H)
    dqkv = np.empty(qkv.shape, qkv.dtype)
    scratch = np.empty(numba_attention.scratch_size(D, T), np.float32)
    dy = flat(np.asarray(dy, np.float32))
    arguments = dqkv.reshape(-1), *_dropout(noise, B), B, T, H, scratch
    numba_attention.BACKWARD[D](flat(qkv), y.reshape(-1), dy, shift, inverse, *arguments)
    return {}, dqkv


def _dropout(noise, B: int):
    """Streams (B,), threshold and the factor of survivors."""
    if noise is None:
        return np.zeros(B, np.int32), 0, 1.0
    stream, rate = noise
    return flat(stream), rng.drop_threshold(rate), rng.survivor_scale(rate)


KERNELS: dict[str, Callable[..., Any]] = {
    "layernorm.forward": layernorm_forward,
    "layernorm.backward": layernorm_backward,
    "gelu.tanh_form": gelu_tanh_form,
    "heads.forward": heads_forward,
    "heads.backward": heads_backward,
}
