"""AdamW on the flat buffer, and clipping by the global norm."""

import math
from collections.abc import Callable
from typing import Any

from baby_xp.arrays.namespace import Array, replaceable
from baby_xp.config import TrainConfig
from baby_xp.training import schedules

EPS = 1e-8


@replaceable
def adamw(xp, w, g, m, v, decays, scale, lr, bias1, bias2, beta1: float, beta2: float, weight_decay: float):
    """One step of AdamW with decoupled decay (Loshchilov and Hutter 2019), element by element.

    w, g, m, v (P,): parameters, gradients, first and second moments. decays (P,): 1 where weight decay
    applies, else 0. scale, lr, bias1, bias2 (1,): the factor that clips the gradients, the learning rate,
    1 - beta1^t, 1 - beta2^t. -> new w, m, v.
    """
    g = scale * g
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    step = (m / bias1) / (xp.sqrt(v / bias2) + EPS)
    return w - lr * (step + weight_decay * decays * w), m, v


def update(
    xp: Any, state: dict[str, Array], gradients: Array, config: TrainConfig, optimizer: Callable[..., Any] = adamw
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The state after one step, and its metrics; the gradient norm is that before clipping.

    state: params, m, v (P,), decays (P,), step (1,) int32. `optimizer` has the signature of adamw.
    """
    norm = global_norm(xp, gradients)
    scale, lr, bias1, bias2 = rates(xp, norm, state["step"], config)
    w, m, v = optimizer(
        xp, state["params"], gradients, state["m"], state["v"], state["decays"], scale, lr, bias1, bias2,
        config.beta1, config.beta2, config.weight_decay,
    )  # fmt: skip
    state = {**state, "params": w, "m": m, "v": v, "step": state["step"] + 1}
    return state, {"grad_norm": norm, "lr": lr}


@replaceable
def rates(xp, norm, step, config):
    """What differs from step to step, (1,) each: the factor that clips gradients of this global norm (1,), the
    learning rate, and AdamW's bias corrections. step (1,) int32, counted from 0.
    """
    t = xp.astype(step + 1, norm.dtype)
    # -expm1(t log(beta)) is 1 - beta^t without the cancellation that costs float32 its digits at small t
    bias1, bias2 = (-xp.expm1(t * math.log(beta)) for beta in (config.beta1, config.beta2))
    lr = schedules.learning_rate(xp, step, config, norm.dtype)
    return clip_scale(xp, norm, config.clip), lr, bias1, bias2


def clip_scale(xp: Any, norm: Array, limit: float) -> Array:
    """The factor that brings gradients of this global norm (1,) down to at most `limit` (0: no limit) -> (1,).

    Pascanu et al. 2013.
    """
    if limit == 0:
        return xp.ones_like(norm)
    return xp.minimum(limit / (norm + 1e-6), xp.ones_like(norm))


@replaceable
def global_norm(xp, gradients):
    """Root of the sum of squares: (P,) -> (1,)."""
    return xp.reshape(xp.sqrt(xp.sum(gradients * gradients)), (1,))
