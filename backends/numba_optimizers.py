"""AdamW by vectors, see simd.py, in one pass over memory; and what Muon does beside matrix products.

The kernels take flat arrays. Their last vector overlaps the one before.
"""

import math

import numpy as np
from baby_xp_backends import numba_muon, numpy_kernels, numpy_muon
from baby_xp_backends.numba_library import COMPILING, FLOATS, compiled, flat
from baby_xp_backends.simd_width import W

from baby_xp.training import muon

if COMPILING:
    from baby_xp_backends.simd import load, sqrt, store

PRODUCTS = numba_muon.Products()


@compiled(f"void({', '.join([FLOATS] * 8 + ['f8'] * 8)})")
def adamw_elements(w, g, m, v, decays, new_w, new_m, new_v, in1, keep1, in2, keep2, root, eps, rate, pull):
    """new_w, new_m, new_v (P,) are written, P at least W."""
    for i in range(0, len(w), W):
        at = min(i, len(w) - W)
        own, gradient = load(w, at), load(g, at)
        first = load(m, at) * keep1 + gradient * in1
        second = load(v, at) * keep2 + gradient * gradient * in2
        step = first / (sqrt(second) * root + eps)
        store(new_m, at, first)
        store(new_v, at, second)
        store(new_w, at, own - step * rate - own * load(decays, at) * pull)


@compiled(f"void({FLOATS}, {FLOATS}, i8[::1], i8, f8, f8, {FLOATS}, {FLOATS})")
def nesterov(g, m, begins, size, share, momentum, new_m, directions):
    """Of n matrices of `size` elements, at least W, that begin at these places of the buffers g, m, new_m (P,):
    the new running means, and the directions (n, size), are written. share: what a gradient adds to its mean.
    """
    for number in range(len(begins)):
        begin = begins[number]
        for i in range(0, size, W):
            at = min(i, size - W)
            gradient = load(g, begin + at) * share
            mean = load(m, begin + at) * momentum + gradient
            store(new_m, begin + at, mean)
            store(directions, number * size + at, mean * momentum + gradient)


@compiled(f"void({FLOATS}, {FLOATS}, i8[::1], i8, f8, {FLOATS})")
def descend(w, steps, begins, size, keep, new_w):
    """As nesterov: from w (P,) and the steps (n, size), new_w (P,) is written."""
    for number in range(len(begins)):
        begin = begins[number]
        for i in range(0, size, W):
            at = min(i, size - W)
            step = load(steps, number * size + at)
            store(new_w, begin + at, load(w, begin + at) * keep - step)


def adamw(xp, w, *more):
    new = np.empty_like(w), np.empty_like(w), np.empty_like(w)
    adamw_into(xp, new, w, *more)
    return new


def adamw_into(xp, new, w, g, m, v, decays, *rates):
    """rates: scale, lr, bias1, bias2, beta1, beta2, weight_decay, as in optimizers.adamw."""
    if w.dtype != np.float32 or len(w) < W:
        numpy_kernels.adamw_into(xp, new, w, g, m, v, decays, *rates)
    else:
        constants = numpy_kernels.adamw_constants(np.float32, *rates)
        adamw_elements(*map(flat, (w, g, m, v, decays)), *new, *constants)


def muon_step(xp, w, g, m, scale, lr, momentum, weight_decay, iterations):
    """As muon.muon: for one process, which gives the same as several that use muon_update_into, bit for bit."""
    shape = w.shape[1:]
    if w.dtype != np.float32 or math.prod(shape) < W:
        return muon.muon.__wrapped__(xp, w, g, m, scale, lr, momentum, weight_decay, iterations)
    new = np.empty_like(w), np.empty_like(w)
    begins = np.arange(len(w)) * math.prod(shape)
    arrays = [array.reshape(-1) for array in new] + [flat(array) for array in (w, g, m)]
    _muon(begins, shape, arrays, scale, lr, momentum, weight_decay, iterations)
    return new


def muon_update_into(xp, new, matrices, w, g, m, scale, lr, weight_decay, rate, momentum, iterations):
    """As muon.update_into: matrices are read where they lie, and written where they belong."""
    if w.dtype != np.float32 or min((math.prod(shape) for _, shape in matrices), default=W) < W:
        more = weight_decay, rate, momentum, iterations
        muon.update_into.__wrapped__(xp, new, matrices, w, g, m, scale, lr, *more)
        return
    arrays = [new[0], new[1], *map(flat, (w, g, m))]
    for stack in muon.stacks(matrices, muon.TILE):
        begins = np.array([at.start for at, _ in stack])
        _muon(begins, stack[0][1], arrays, scale, rate * lr, momentum, weight_decay, iterations)


def _muon(begins, shape, arrays, scale, lr, momentum, weight_decay, iterations):
    """One step for matrices of this shape that begin at these places of the arrays (P,): new w, new m, w, g, m."""
    new_w, new_m, w, g, m = arrays
    size, directions = math.prod(shape), np.empty((len(begins), *shape), np.float32)
    nesterov(g, m, begins, size, (1 - momentum) * scale[0], momentum, new_m, directions.reshape(-1))
    factor = np.float32(lr[0] * muon.step_size(*shape))
    steps = numpy_muon.orthogonalize_scaled(directions, iterations, factor, PRODUCTS)
    descend(w, steps.reshape(-1), begins, size, 1 - lr[0] * weight_decay, new_w)
