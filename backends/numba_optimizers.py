"""AdamW by vectors, see simd.py, in one pass over memory."""

import numpy as np
from baby_xp_backends import numpy_kernels
from baby_xp_backends.numba_cache import compiled
from baby_xp_backends.numba_maths import FLOATS, flat
from baby_xp_backends.simd import W, load, sqrt, store


@compiled(f"void({', '.join([FLOATS] * 8 + ['f8'] * 8)})")
def adamw_elements(w, g, m, v, decays, new_w, new_m, new_v, in1, keep1, in2, keep2, root, eps, rate, pull):
    """new_w, new_m, new_v (P,) are written, P at least W."""
    for i in range(0, len(w), W):
        at = min(i, len(w) - W)  # the last vector overlaps the one before
        own, gradient = load(w, at), load(g, at)
        first = load(m, at) * keep1 + gradient * in1
        second = load(v, at) * keep2 + gradient * gradient * in2
        step = first / (sqrt(second) * root + eps)
        store(new_m, at, first)
        store(new_v, at, second)
        store(new_w, at, own - step * rate - own * load(decays, at) * pull)


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
