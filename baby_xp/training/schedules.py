"""Schedules of the learning rate."""

import math
from typing import Any

from baby_xp.arrays.namespace import Array
from baby_xp.config import TrainConfig


def learning_rate(xp: Any, step: Array, config: TrainConfig, dtype: Any) -> Array:
    """The rate at step (1,) int32, counted from 0 -> (1,).

    Linear warm-up over `warmup_steps`. Then constant; or a half cosine that ends at `min_lr` after `num_steps`
    (Loshchilov and Hutter 2017); or constant with a linear decay to `min_lr` over the last `decay_fraction` of
    the steps (Hägele et al. 2024).
    """
    t = xp.astype(step, dtype)
    peak, warmup = config.peak_lr, config.warmup_steps
    warm = peak * (t + 1) / (warmup + 1)
    if config.schedule == "constant":
        return xp.where(t < warmup, warm, xp.zeros_like(t) + peak)
    begin, span = decay(config)
    done = (t - begin) / span
    # not xp.clip: that of array-api-compat indexes with masks, and a GPU waits for each
    done = xp.minimum(xp.maximum(done, xp.zeros_like(t)), xp.ones_like(t))
    if config.schedule == "cosine":
        lr = config.min_lr + 0.5 * (peak - config.min_lr) * (1 + xp.cos(math.pi * done))
    else:
        lr = peak + (config.min_lr - peak) * done
    return xp.where(t < warmup, warm, lr)


def decay(config: TrainConfig) -> tuple[float, float]:
    """The step at which the rate begins to fall, and the number of steps over which it does."""
    assert config.num_steps is not None  # Setup computes it where the config has epochs
    span: float = config.num_steps - config.warmup_steps
    if config.schedule == "linear":
        span = min(span, config.num_steps * config.decay_fraction)
    span = max(1, span)
    return max(config.warmup_steps, config.num_steps - span), span
