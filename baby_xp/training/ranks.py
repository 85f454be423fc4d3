"""Ranks that share a step: each computes the gradients of its samples, which are then summed.

All ranks hold all parameters and do the same steps, evaluations and decisions. What only one of them knows, such
as the time or that the user pressed Ctrl-C, travels with the sum of the gradients: all act on it after the same
step.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from baby_xp.arrays.backend import Backend
from baby_xp.arrays.tiles import samples
from baby_xp.config import TrainConfig
from baby_xp.distributed.group import Group
from baby_xp.models import Model
from baby_xp.text.batches import Batch
from baby_xp.training import optimizers
from baby_xp.training.alone import Alone
from baby_xp.training.step import gradients_of_step, loss_and_gradients_with_dropout, make_step
from baby_xp.training.workers import Workers


class Ranks:
    """What a rank computes with the others, over what it computes alone or with its own workers: `own`.

    Each rank computes the gradients of its samples, receives the sum of its share of the gradients, updates that
    share of the parameters, and receives the other shares. On a GPU it receives and updates everything.

    say: the numbers that this rank tells the others in each step; their sums over the ranks are in `heard`
    afterwards, as many as there are.
    """

    def __init__(
        self, group: Group, own: Alone | Workers, backend: Backend, model: Model, config: TrainConfig,
        say: Callable[[], tuple[float, ...]] = lambda: (),
    ):  # fmt: skip
        self.group, self.own, self.backend, self.model, self.config = group, own, backend, model, config
        self.say = say
        self.heard: Any = None
        """An array of NumPy, or of the backend if the group sums on the device."""
        self.processes = group.all_gather(own.number)
        self.divides = group.size > 1 and not group.on_device
        """Whether each rank updates its share alone."""
        self.pieces = [optimizers.shares(model, config.optimizer, self.processes)]
        if config.optimizer == "adamw" and set(self.processes) == {1}:  # Muon's matrices stay whole
            self.pieces = optimizers.pieces(model.n_parameters, group.size)
        self.shares = [(bounds[group.rank], bounds[group.rank + 1]) for bounds in reversed(self.pieces)]
        """The elements that this rank updates: a share of every piece of the gradients."""
        self.overlaps = self.divides and len(self.pieces) > 1 and config.accumulate == 1 and self._gains()
        """Whether gradients travel while others are computed."""

    def _gains(self) -> bool:
        """Whether overlapping is possible and saves time; within one machine it does not. All decide alike."""
        several = self.group.machines() > 1
        return several and all(self.group.all_gather(bool(self.backend.xp.gradients_in_place)))

    def step(self) -> Callable[..., Any]:
        """As step.make_step, by all ranks together."""
        parts = self.gradients(), self.optimizer(), self.norm
        return make_step(self.backend.xp, self.model, self.config, *parts)

    def gradients(self) -> Callable[..., Any]:
        """As step.gradients_of_step; where ranks divide the update, only this one's share of them is the sum."""
        compute = gradients_of_step(self.config, self.own.loss_and_gradients)
        if self.group.size == 1:
            return compute

        def of_step(xp, model: Model, state: dict[str, Any], batch: Batch):
            own = self._own_samples(batch)
            if self.overlaps:
                return self._while_they_travel(model, state, own, batch.targets.size)
            if len(own.samples):
                loss, gradients = compute(xp, model, state, own, n_targets=batch.targets.size)
            else:
                gradients = xp.zeros_like(state["params"])
                loss = gradients[:1]
            return self._sum(loss, gradients)

        return of_step

    def optimizer(self) -> Callable[..., Any]:
        """As optimizers.of."""
        if not self.divides:
            return self.own.optimizer(self.config)
        update = self.own.optimizer(self.config, *self.shares)

        def of_share(*arguments):
            w, m, v = update(*arguments)
            self.group.gather_shares(w, *self.pieces)
            return w, m, v

        return of_share

    def norm(self, xp, gradients):
        """As optimizers.global_norm, of the shares of all ranks."""
        if not self.divides:
            return optimizers.global_norm(xp, gradients)
        own = sum(float(optimizers.global_norm(xp, gradients[slice(*share)])[0]) ** 2 for share in self.shares)
        (square,) = self.group.sum_of_numbers(own)
        return xp.asarray([math.sqrt(square)], dtype=gradients.dtype)

    def gather(self, *arrays: Any) -> None:
        """Complete gradients or moments (P,), of which each rank has only its share. All ranks call it."""
        if self.divides:
            for array in arrays:
                self.group.gather_shares(array, *self.pieces)

    def _own_samples(self, batch: Batch) -> Batch:
        """As many for each process of this rank as for those of others."""
        B, ends = len(batch.samples), [0, *itertools.accumulate(self.processes)]
        first, last = (-(-B * end // ends[-1]) for end in ends[self.group.rank : self.group.rank + 2])
        return samples(batch, first, last)

    def _while_they_travel(self, model: Model, state: dict[str, Any], own: Batch, n_targets: int) -> Any:
        """Loss and gradients as those of `gradients`, whose sum begins during the backward pass."""
        xp = self.backend.xp
        gradients = xp.empty_like(state["params"])
        with self.group.begin_sum(gradients, self.pieces) as sum_:
            if len(own.samples):
                loss, _ = loss_and_gradients_with_dropout(xp, model, state, own, n_targets, gradients, sum_)
            else:
                loss = gradients[:] = 0.0
            spoken = self._spoken(loss)
            sum_.finish(spoken)
        return self._heard(spoken, gradients)

    def _sum(self, loss: Any, gradients: Any) -> tuple[Any, Any]:
        """Loss (1,) and gradients (P,) of the whole batch; the gradients are changed in place."""
        spoken = self._spoken(loss)
        if self.divides:
            with self.group.begin_sum(gradients, self.pieces) as sum_:
                sum_.finish(spoken)
        else:
            self.group.sum(gradients, spoken)
        return self._heard(spoken, gradients)

    def _spoken(self, loss: Any) -> Any:
        """The numbers that travel beside the gradients: the loss (1,), and what this rank tells the others."""
        spoken = np.array([0.0, *self.say()])
        if self.group.on_device:
            spoken = self.backend.to_device(spoken)
        spoken[:1] = loss
        return spoken

    def _heard(self, spoken: Any, gradients: Any) -> tuple[Any, Any]:
        """The loss (1,) from the sums of these numbers, and the gradients."""
        self.heard = spoken[1:]
        return self.backend.xp.astype(spoken[:1], gradients.dtype), gradients
