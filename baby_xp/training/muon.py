"""Muon: momentum whose matrices are made orthogonal before each step (Jordan et al. 2024).

    m = mu m + (1 - mu) g;  w = w - lr (s orthogonalize((1 - mu) g + mu m) + weight_decay w)

The gradient of a weight matrix mostly has few large singular values. An orthogonal update moves along all of its
singular directions by the same amount.
"""

import math
from typing import NamedTuple

from baby_xp.arrays.namespace import replaceable
from baby_xp.config import TrainConfig

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""a, b, c of the polynomial a s + b s^3 + c s^5 of a singular value s. Jordan chose them such that it is as steep
as possible at 0 and, iterated, keeps s near 1."""
EPS = 1e-7
"""Least norm to divide by: that of a matrix of zeros is 0."""
TILE = 65536
"""Elements of the matrices that a backend which computes in tiles takes together: few enough for the cache."""


class Settings(NamedTuple):
    """rate: Muon's learning rate as a multiple of AdamW's."""

    rate: float
    momentum: float
    iterations: int


def settings(config: TrainConfig) -> Settings:
    """Those of a config."""
    return Settings(config.muon_lr / config.lr, config.muon_momentum, config.muon_iterations)


def update(xp, matrices, w, g, m, scale, lr, weight_decay: float, rate: float, momentum: float, iterations: int):
    """One step of Muon: flat buffers w, g, m (P,) -> (slice, new w, new m) of each of the matrices, flat.

    matrices: the slice of the flat buffers and the shape of each. scale, lr (1,): the factor that clips the
    gradients, and AdamW's learning rate. The rest: Settings. Matrices of one shape are computed together.
    """
    for stack in stacks(matrices, xp.tokens_at_once and TILE):
        arrays = [_stacked(xp, flat, stack) for flat in (w, g, m)]
        new_w, new_m = muon(xp, *arrays, scale, rate * lr, momentum, weight_decay, iterations)
        for i, (at, _) in enumerate(stack):
            yield at, xp.reshape(new_w[i, ...], (-1,)), xp.reshape(new_m[i, ...], (-1,))


@replaceable
def update_into(xp, new, matrices, w, g, m, scale, lr, *settings) -> None:
    """As update, on NumPy alone; the new w and m of the matrices go into the first two arrays (P,) of `new`."""
    for at, new_w, new_m in update(xp, matrices, w, g, m, scale, lr, *settings):
        new[0][at], new[1][at] = new_w, new_m


def _stacked(xp, flat, stack):
    """(n, R, C); a single matrix is not copied where the library has views."""
    if len(stack) == 1:
        at, shape = stack[0]
        return xp.reshape(flat[at], (1, *shape))
    return xp.stack([xp.reshape(flat[at], shape) for at, shape in stack])


def stacks(matrices, most: int | None = None):
    """Lists of matrices of the same shape, of at most about `most` elements together; None: of all."""
    for shape in dict.fromkeys(shape for _, shape in matrices):
        alike = [one for one in matrices if one[1] == shape]
        number = max(1, most // math.prod(shape)) if most else len(alike)
        yield from (alike[first : first + number] for first in range(0, len(alike), number))


@replaceable
def muon(xp, w, g, m, scale, lr, momentum: float, weight_decay: float, iterations: int):
    """One step of Muon with Nesterov's momentum and decoupled decay, for n matrices of the same shape.

    w, g, m (n, R, C): parameters, gradients, their running mean. scale, lr (1,): the factor that clips the
    gradients, Muon's learning rate. -> new w, m.
    """
    g = scale * g
    m = momentum * m + (1 - momentum) * g
    direction = orthogonalize(xp, momentum * m + (1 - momentum) * g, iterations)
    return w - lr * (step_size(*w.shape[1:]) * direction + weight_decay * w), m


def step_size(R: int, C: int) -> float:
    """The factor of a step for weights (R, C) of R inputs and C outputs: sqrt(max(1, C / R)), Jordan's too."""
    return math.sqrt(max(1.0, C / R))


def cost(R: int, C: int) -> int:
    """Multiplications of an iteration for a matrix (R, C)."""
    return min(R, C) ** 2 * (min(R, C) + 2 * max(R, C))


@replaceable
def orthogonalize(xp, x, iterations: int):
    """Replaces the singular values of n matrices (n, R, C) by others near 1, most of them in 0.7 to 1.2.

    With x = U S V^T the result is about U V^T. Each iteration applies a polynomial to the singular values:
    Newton-Schulz (Bernstein and Newhouse 2024) with the coefficients of Jordan et al. 2024.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = xp.matrix_transpose(x) if tall else x                      # (n, R, C), R <= C
    norm = xp.sqrt(xp.sum(x * x, axis=(1, 2), keepdims=True))      # (n, 1, 1)
    x = x / xp.maximum(norm, xp.full_like(norm, EPS))
    for _ in range(iterations):
        gram = x @ xp.matrix_transpose(x)                          # (n, R, R)
        x = a * x + (b * gram + c * (gram @ gram)) @ x             # (n, R, C)
    return xp.matrix_transpose(x) if tall else x
