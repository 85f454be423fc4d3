"""The process that computes a step alone, in place of workers; and how many processes suit a step."""

from collections.abc import Callable
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from baby_xp.arrays.backend import Backend
from baby_xp.config import TrainConfig
from baby_xp.distributed.group import Group
from baby_xp.models import Model
from baby_xp.text.batches import Batch
from baby_xp.training import muon, optimizers
from baby_xp.training.step import loss_and_gradients_with_dropout, total_loss

WORTH_SPLITTING = 3e8
"""Floating-point operations of a step below which passing arrays around costs more than it gains."""


def suitable_number(backend: Backend, model: Model, batch_size: int, group: Group) -> int:
    """How many processes suit a rank: one per core that it has on NumPy, but one in all for small steps."""
    if backend.name != "numpy" or is_small(model, batch_size):
        return 1
    return min(group.cores(), batch_size)


def is_small(model: Model, batch_size: int) -> bool:
    """Whether a step computes so little that one core alone is best."""
    return 6 * model.n_parameters * batch_size * model.config.n_ctx < WORTH_SPLITTING


class Alone:
    """A single process, in place of Workers. A context manager: inside it, a small step has one BLAS thread.

    Two gain nothing there, and on a busy machine each product waits for the slower one: a step of 2 ms can
    take 400. threads: the most that this process may use; None: all.
    """

    number = 1
    loss_and_gradients = staticmethod(loss_and_gradients_with_dropout)

    def __init__(self, backend: Backend, model: Model, batch_size: int, threads: int | None = None):
        self.backend, self.model = backend, model
        self._threads = 1 if backend.name == "numpy" and is_small(model, batch_size) else threads

    def __enter__(self) -> "Alone":
        self._limits = threadpool_limits(self._threads)
        return self

    def __exit__(self, *_: object) -> None:
        self._limits.restore_original_limits()

    def total_loss(self, params, batch: Batch):
        """As step.total_loss."""
        return total_loss(self.backend.xp, self.model, params, batch)

    def optimizer(self, config: TrainConfig, *shares: tuple[int, int]) -> Callable[..., Any]:
        """As optimizers.of. shares: the elements of the flat buffer that this rank updates, on NumPy; the others
        are undefined afterwards, and the state before is valid until the step after the next one. None: all."""
        if not shares:
            return optimizers.of(self.model, config)
        own = [optimizers.parts(self.model, config.optimizer, share=share) for share in shares]
        slices, matrices = ([one for part in parts for one in part] for parts in zip(*own, strict=True))
        return _Share(optimizers.Parts(slices, matrices), muon.settings(config))


class _Share:
    """An optimizer as a function like optimizers.adamw, for a share; the states lie in two buffers in turn."""

    def __init__(self, own: optimizers.Parts, settings: muon.Settings):
        self.own, self.settings = own, settings
        self.states: np.ndarray | None = None

    def __call__(self, xp, w, g, m, v, *more):
        if self.states is None:
            self.states = np.zeros((2, 3, w.size), w.dtype)
            self.states[:, 2] = v  # where Muon leaves it as it is
        self.states = self.states[::-1]
        optimizers.update_into(xp, self.own, self.settings, self.states[0], (w, m, v), g, *more)
        return tuple(self.states[0])
