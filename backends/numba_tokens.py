"""Cross-entropy, and the gradient of an embedding, by vectors, see simd.py. The kernels take flat arrays.

A row of logits has at least W of them: its last vector overlaps the one before.
"""

import math

import numpy as np
from baby_xp_backends.numba_library import COMPILING, FLOATS, INTEGERS, compiled, flat
from baby_xp_backends.simd_width import W

from baby_xp.layers import cross_entropy, embedding

if COMPILING:
    from baby_xp_backends.numba_maths import exp_of_negative
    from baby_xp_backends.simd import lanes, load, load_first, select, spread, store, store_first, total
    from baby_xp_backends.simd_lanes import highest


@compiled(f"void({FLOATS}, {INTEGERS}, {FLOATS}, {FLOATS}, {FLOATS})")
def cross_entropy_rows(logits, targets, probabilities, totals, at_target):
    """logits (N, V). Written: probabilities (N, V); with logits shifted so that the largest is 0, the sum of
    their exp and the one of the target, totals and at_target (N,).
    """
    V = len(logits) // max(1, len(targets))
    for row in range(len(targets)):
        base, target = row * V, targets[row]
        tops, sums = spread(-math.inf), spread(0.0)
        for i in range(0, V, W):
            x = load(logits, base + min(i, V - W))
            tops = select(x > tops, x, tops)
        top = highest(tops)
        for i in range(0, V, W):
            at = min(i, V - W)
            e = exp_of_negative(load(logits, base + at) - top)
            store(probabilities, base + at, e)
            sums = sums + select(lanes() >= i - at, e, 0.0)  # without the lanes that overlap
        totals[row] = total(sums)
        at_target[row] = logits[base + target] - top
        inverse = 1 / spread(totals[row])
        last = load(probabilities, base + V - W) * inverse
        for i in range(0, V - V % W, W):
            store(probabilities, base + i, load(probabilities, base + i) * inverse)
        store(probabilities, base + V - W, last)


@compiled(f"void({FLOATS}, {INTEGERS}, {FLOATS}, {FLOATS})")
def cross_entropy_rows_backward(probabilities, targets, dy, dlogits):
    """dlogits (N, V) is written."""
    V = len(probabilities) // max(1, len(targets))
    for row in range(len(targets)):
        base, weight = row * V, dy[row]
        for i in range(0, V, W):
            at = base + min(i, V - W)
            store(dlogits, at, load(probabilities, at) * weight)
        at = base + targets[row]
        dlogits[at] = (probabilities[at] - np.float32(1)) * weight


@compiled(f"void({INTEGERS}, {FLOATS}, {FLOATS}, i8)")
def add_rows(ids, dy, sums, C):
    """dy (N, C); sums (V, C) are zeros and become sums."""
    whole = C // W * W
    n = C - whole
    for row in range(len(ids)):
        at, to = row * C, ids[row] * C
        for i in range(0, whole, W):
            store(sums, to + i, load(sums, to + i) + load(dy, at + i))
        if n:
            store_first(sums, to + whole, load_first(sums, to + whole, n) + load_first(dy, at + whole, n), n)


def cross_entropy_forward(xp, p, logits, targets):
    if logits.dtype != np.float32 or logits.shape[1] < W:
        return cross_entropy.forward.__wrapped__(xp, p, logits, targets)
    probabilities, ids = np.empty(logits.shape, np.float32), _within(logits.shape[1], targets)
    totals, at_target = np.empty((2, len(logits)), np.float32)
    cross_entropy_rows(flat(logits), ids, probabilities.reshape(-1), totals, at_target)
    return np.log(totals) - at_target, (probabilities, targets)


def cross_entropy_backward(xp, p, saved, dy):
    probabilities, targets = saved
    if dy.dtype != np.float32 or probabilities.shape[1] < W:
        return cross_entropy.backward.__wrapped__(xp, p, saved, dy)
    dlogits, ids = np.empty(probabilities.shape, np.float32), _within(probabilities.shape[1], targets)
    cross_entropy_rows_backward(flat(probabilities), ids, flat(dy), dlogits.reshape(-1))
    return {}, dlogits


def sum_by_id(xp, ids, dy, V):
    if dy.dtype != np.float32:
        return embedding.sum_by_id.__wrapped__(xp, ids, dy, V)
    sums = np.zeros((V, dy.shape[1]), np.float32)
    add_rows(_within(V, ids), flat(dy), sums.reshape(-1), dy.shape[1])
    return sums


def _within(V: int, ids) -> np.ndarray:
    """ids (N,) as the kernels take them, which do not check them. Raises IndexError if one is not below V."""
    ids = flat(np.asarray(ids, np.int32))
    if ids.size and (ids.min() < 0 or ids.max() >= V):
        raise IndexError(f"a token id is not from 0 to {V - 1}")
    return ids
