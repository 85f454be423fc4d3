"""Everything that a run needs to continue as if it had never stopped."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from baby_xp.arrays import params
from baby_xp.arrays.backend import Backend
from baby_xp.config import TrainConfig
from baby_xp.models import Model
from baby_xp.training.step import initial_state

Progress = dict[str, Any]


def nothing_yet() -> Progress:
    """The progress of a run before its first step: plain JSON values.

    records     evaluations so far, see loop.py
    best        step and val_loss of the best of them, None before the first
    total, count    sum and number of the training losses since the last evaluation
    lr, grad_norm   of the last step
    tokens, seconds, training_seconds    over all sessions
    """
    return {
        "records": [], "best": None, "total": 0.0, "count": 0, "lr": 0.0, "grad_norm": 0.0, "tokens": 0,
        "seconds": 0.0, "training_seconds": 0.0,
    }  # fmt: skip


@dataclass
class Checkpoint:
    """A snapshot between two steps. Batches, dropout and schedule follow from the seed and the step only.

    state: params, m, v (P,) and step (1,), host arrays. best: the parameters (P,) of the best evaluation so
    far, None if that is the current state or there was none.
    """

    state: dict[str, np.ndarray]
    best: np.ndarray | None = None
    progress: Progress = field(default_factory=nothing_yet)

    @property
    def step(self) -> int:
        """Number of steps done."""
        return int(self.state["step"][0])

    @property
    def best_params(self) -> np.ndarray:
        """The parameters (P,) of the best evaluation so far; the current ones before the first."""
        return self.state["params"] if self.best is None else self.best

    def copy_arrays(self) -> None:
        """Copy the state's arrays, which may be in memory that is released with the workers."""
        self.state = {name: array.copy() for name, array in self.state.items()}

    def drop_arrays(self) -> None:
        """Keep only the step, once the arrays are on the device: callers may keep this object for long."""
        self.state, self.best = {"step": self.state["step"]}, None


def first(model: Model, config: TrainConfig, flat: np.ndarray | None = None) -> Checkpoint:
    """The snapshot before the first step: parameters `flat` (P,), or drawn from the seed of the config."""
    if flat is None:
        flat = params.draw(model.spec, config.seed, config.dtype)
    flat = flat.astype(config.dtype)
    zeros = np.zeros_like(flat)
    return Checkpoint({"params": flat, "m": zeros, "v": zeros, "step": np.zeros(1, np.int32)})


def state_on_device(backend: Backend, model: Model, config: TrainConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """The state to continue from, on the backend's device."""
    state = initial_state(backend, checkpoint.state["params"], params.decay_mask(model.spec), config.seed)
    if checkpoint.step == 0:
        return state  # both moments are zero
    moments = {name: backend.asarray(checkpoint.state[name]) for name in ("m", "v")}
    return {**state, **moments, "step": backend.integers([checkpoint.step])}


def to_host(backend: Backend, state: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a state that a checkpoint keeps."""
    return {name: backend.to_numpy(state[name]) for name in ("params", "m", "v", "step")}
