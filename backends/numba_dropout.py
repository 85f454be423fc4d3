"""Dropout by vectors, see simd.py: hash, comparison and product in one pass, in the backward pass again."""

import numpy as np
from baby_xp_backends import numpy_kernels
from baby_xp_backends.numba_library import COMPILING, FLOATS, INTEGERS, compiled, flat
from baby_xp_backends.simd_width import W

from baby_xp.arrays import rng
from baby_xp.layers import dropout

if COMPILING:
    from baby_xp_backends.numba_maths import mix
    from baby_xp_backends.simd import lanes, load, select, spread, store
    from baby_xp_backends.simd_lanes import halves


@compiled(f"void({FLOATS}, {INTEGERS}, i8, f8, {FLOATS})")
def scale_survivors(x, streams, threshold, scale, y):
    """x (B, size), flat, the size even and at least 2 W; y, as x, is written."""
    size = len(x) // len(streams)
    for b in range(len(streams)):
        stream = spread(streams[b])
        for i in range(0, size, 2 * W):
            place = min(i, size - 2 * W)  # the last vectors overlap those before
            first, second = halves(mix(mix(lanes() + (place >> 1)) ^ stream))
            at = b * size + place
            store(y, at, select(first >= threshold, load(x, at) * scale, 0.0))
            store(y, at + W, select(second >= threshold, load(x, at + W) * scale, 0.0))


def dropout_drop(xp, x, stream, rate):
    """As dropout.drop, but `dropout_select` finds the survivors again from the stream, which is what is saved."""
    size = x.size // max(1, len(stream))
    if x.dtype != np.float32 or size % 2 or size < 2 * W:
        return dropout.drop.__wrapped__(xp, x, stream, rate)
    return dropout_select(xp, stream, x, rate), stream


def dropout_select(xp, keep, x, rate):
    if keep.dtype == np.bool:
        return numpy_kernels.dropout_select(xp, keep, x, rate)
    y = np.empty(x.shape, x.dtype)
    scale_survivors(flat(x), flat(keep), rng.drop_threshold(rate), rng.survivor_scale(rate), y.reshape(-1))
    return y
