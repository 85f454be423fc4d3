"""Ranks that share a step: each computes the gradients of its samples, and all get the sum.

All ranks hold the whole state and do the same steps, evaluations and decisions. What only one of them knows, such
as the time or that the user pressed Ctrl-C, travels with the sum of the gradients: all act on it after the same
step.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from baby_xp.arrays.backend import Backend
from baby_xp.arrays.tiles import samples
from baby_xp.config import TrainConfig
from baby_xp.distributed.group import Group
from baby_xp.models import Model
from baby_xp.text.batches import Batch
from baby_xp.training.alone import Alone
from baby_xp.training.step import gradients_of_step
from baby_xp.training.workers import Workers

Numbers = tuple[float, ...]


class Ranks:
    """What a rank computes with the others, over what it computes alone or with its own workers: `own`.

    say: the numbers that this rank tells the others in each step; their sums over the ranks are in `heard`
    afterwards, as many as there are.
    """

    def __init__(self, group: Group, own: Alone | Workers, backend: Backend, say: Callable[[], Numbers]):
        self.group, self.own, self.backend, self.say = group, own, backend, say
        self.heard: Any = None
        """An array of NumPy, or of the backend if the group sums on the device."""
        numbers = group.all_gather(own.number)
        self.processes = sum(numbers)
        self.before = sum(numbers[: group.rank])
        """Processes of lower ranks."""

    def gradients(self, config: TrainConfig) -> Callable[..., Any]:
        """As step.gradients_of_step, by all ranks together: one sum a step."""
        compute = gradients_of_step(config, self.own.loss_and_gradients)
        if self.group.size == 1:
            return compute

        def of_step(xp, model: Model, state: dict[str, Any], batch: Batch):
            share = self._share(batch)
            if len(share.samples):
                loss, gradients = compute(xp, model, state, share, n_targets=batch.targets.size)
            else:
                gradients = xp.zeros_like(state["params"])
                loss = gradients[:1]
            return self._sum(loss, gradients)

        return of_step

    def _share(self, batch: Batch) -> Batch:
        """The samples of this rank, as many for each of its processes as for those of others."""
        B, total = len(batch.samples), self.processes
        first, last = (-(-B * at // total) for at in (self.before, self.before + self.own.number))
        return samples(batch, first, last)

    def _sum(self, loss: Any, gradients: Any) -> tuple[Any, Any]:
        """Loss (1,) and gradients (P,) of the whole batch; the gradients are changed in place."""
        spoken = np.array([0.0, *self.say()])
        if self.group.on_device:
            spoken = self.backend.to_device(spoken)
        spoken[:1] = loss
        self.group.sum(gradients, spoken)
        self.heard = spoken[1:]
        return self.backend.xp.astype(spoken[:1], gradients.dtype), gradients
