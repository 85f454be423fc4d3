"""What is done to queries and keys before attention compares them: rotation by position, then QK-norm, or neither.

QK-norm gives each query and key of a head a root mean square of 1, so that no score can exceed sqrt(D) (Henry et
al. 2020, here without their learned factor). Values stay as they are.
"""

from typing import Any, NamedTuple

from baby_xp.arrays.namespace import replaceable
from baby_xp.layers import Shape, rmsnorm, rotary


class Steps(NamedTuple):
    """Which of the two steps are taken."""

    rotary: bool = False
    norm: bool = False


NO_STEPS = Steps()


class Saved(NamedTuple):
    """What backward needs; None for a step that was not taken."""

    shape: Shape
    rotary: Any
    norm: Any


@replaceable
def forward(xp, p, qkv, shape, steps: Steps, past=None):
    """qkv (N, 3 S) -> qkv (N, 3 S), with other queries and keys. `past` as in heads.forward."""
    if not any(steps):
        return qkv, None
    t = 0 if past is None else past[0].shape[2]                    # tokens before these ones
    qk, v = split(xp, qkv, shape)                                  # (B, T, 2 H, D), (N, S)
    rotary_saved = norm_saved = None
    if steps.rotary:
        qk, rotary_saved = rotary.forward(xp, {}, qk, t)
    if steps.norm:
        qk, norm_saved = rmsnorm.forward(xp, {}, qk)
    return join(xp, qk, v), Saved(shape, rotary_saved, norm_saved)


@replaceable
def backward(xp, p, saved, dqkv):
    """dqkv (N, 3 S) -> dp, dqkv (N, 3 S)."""
    if saved is None:
        return {}, dqkv
    dqk, dv = split(xp, dqkv, saved.shape)                         # (B, T, 2 H, D), (N, S)
    if saved.norm is not None:
        _, dqk = rmsnorm.backward(xp, {}, saved.norm, dqk)
    if saved.rotary is not None:
        _, dqk = rotary.backward(xp, {}, saved.rotary, dqk)
    return {}, join(xp, dqk, dv)


def split(xp, qkv, shape):
    """(N, 3 S) -> queries and keys (B, T, 2 H, D), values (N, S)."""
    S = qkv.shape[1] // 3
    return xp.reshape(qkv[:, : 2 * S], (shape.B, shape.T, 2 * shape.H, -1)), qkv[:, 2 * S :]


def join(xp, qk, v):
    """Queries and keys (B, T, 2 H, D), values (N, S) -> (N, 3 S)."""
    return xp.concat([xp.reshape(qk, (v.shape[0], -1)), v], axis=1)
