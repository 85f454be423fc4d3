"""Schedules of the learning rate."""

import math
from typing import Any

from baby_xp.arrays.namespace import Array
from baby_xp.config import TrainConfig


def learning_rate(xp: Any, step: Array, config: TrainConfig, dtype: Any) -> Array:
    """The rate at step (1,) int32, counted from 0 -> (1,).

    Linear warm-up over `warmup_steps`, then constant, or a half cosine that ends at `min_lr` after
    `num_steps` (Loshchilov and Hutter 2017).
    """
    t = xp.astype(step, dtype)
    peak = config.peak_lr
    if config.schedule == "cosine":
        assert config.num_steps is not None  # Setup computes it where the config has epochs
        span = max(1, config.num_steps - config.warmup_steps)
        # not clip: array-api-compat's indexes with booleans, for which a GPU makes the host wait
        done = xp.minimum(xp.maximum((t - config.warmup_steps) / span, xp.zeros_like(t)), xp.ones_like(t))
        lr = config.min_lr + 0.5 * (peak - config.min_lr) * (1 + xp.cos(math.pi * done))
    else:
        lr = xp.zeros_like(t) + peak
    warm = peak * (t + 1) / (config.warmup_steps + 1)
    return xp.where(t < config.warmup_steps, warm, lr)
