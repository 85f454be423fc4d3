"""The loop around the pure step: batches in, losses out, the weights at the end."""

import functools
import math
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from baby_xp import params
from baby_xp.errors import BabyError
from baby_xp.training.evaluate import mean_loss
from baby_xp.training.step import initial_state, make_step, total_loss

READ_EVERY = 10
"""Steps between readings of the loss: each reading waits for the device."""
EVALUATION_TOKENS = 20_000
"""Validation tokens of a measurement on the way, about; the last one takes them all."""


class Listener(Protocol):
    """Who wants to know how training goes."""

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Called every few steps with the mean loss since the last call."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """Called with the record of each evaluation: step, train_loss, val_loss, lr, seconds."""


@dataclass
class Result:
    """How training ended. `params`, `m`, `v` (P,) and `step` (1,) are host arrays."""

    state: dict[str, np.ndarray]
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    interrupted: bool = False

    @property
    def step(self) -> int:
        """Steps that were done."""
        return int(self.state["step"][0])


def fit(backend, model, config, task, listener: Listener, workers=None) -> Result:
    """Train from first weights. `config` is a TrainConfig, `task` a Task, `workers` a Workers or None.

    Raises BabyError if the loss stops being a number. Ctrl-C ends it after the last whole step.
    """
    weights = params.draw(model.spec, config.seed, config.dtype), params.decay_mask(model.spec)
    state = initial_state(backend, *weights, config.seed)
    del weights  # the state has copies
    run = _Run(backend, model, config, task, listener, workers)
    with np.errstate(all="ignore"):  # numbers that are not finite show in the loss, which is checked
        try:
            while run.step < task.num_steps:
                state = run.advance(state)
                run.read_now_and_then()
                if run.step % config.eval_every == 0 and run.step < task.num_steps:
                    run.evaluate(state, whole=False)
        except KeyboardInterrupt:
            run.interrupted = True
            run.go_back_to(int(backend.to_numpy(state["step"])[0]))
        if run.step:
            run.evaluate(state, whole=True)
    host = {name: backend.to_numpy(state[name]) for name in ("params", "m", "v", "step")}
    return Result(
        host, run.records, run.seconds, run.tokens / max(run.training_seconds, 1e-9), run.interrupted
    )


class _Run:
    """What the loop remembers between steps, beside the state."""

    def __init__(self, backend, model, config, task, listener, workers):
        self.backend, self.task, self.listener, self.config = backend, task, listener, config
        xp = backend.xp
        gradients = {} if workers is None else {"loss_and_gradients": workers.loss_and_gradients}
        self._step = backend.compile(make_step(xp, model, config, **gradients))
        total = functools.partial(total_loss, xp, model) if workers is None else workers.total_loss
        self._total = backend.compile(total)
        self.step, self.tokens, self.records, self.interrupted = 0, 0, [], False
        self.begin = time.perf_counter()
        self.training_seconds = 0.0
        self._unread, self._since_evaluation, self._lr = [], [], 0.0
        self._mark = self.begin, 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    def advance(self, state):
        """One step."""
        batch = self.task.batches.batch(self.step)
        state, metrics = self._step(state, type(batch)(*(self.backend.asarray(part) for part in batch)))
        self.step += 1
        self.tokens += batch.inputs.size
        self._unread.append(metrics)
        return state

    def read_now_and_then(self):
        """Read the losses every few steps."""
        if len(self._unread) == READ_EVERY or self.step == self.task.num_steps:
            self._read()

    def go_back_to(self, step: int):
        """Forget a step that Ctrl-C cut short: its state was not kept."""
        if step < self.step:
            self.step, self._unread = step, self._unread[:-1]

    def _read(self):
        losses = [float(self.backend.to_numpy(metrics["loss"])[0]) for metrics in self._unread]
        self._lr = float(self.backend.to_numpy(self._unread[-1]["lr"])[0])
        first = self.step - len(losses) + 1
        self._unread = []
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise _burst(f"loss became {loss} at step {first + i}")
        self._since_evaluation += losses
        now, (then, tokens) = time.perf_counter(), self._mark
        self.training_seconds += now - then
        rate = (self.tokens - tokens) / max(now - then, 1e-9)
        self._mark = now, self.tokens
        self.listener.progress(self.step, sum(losses) / len(losses), rate)

    def evaluate(self, state, whole: bool):
        """Measure the validation loss and tell the listener."""
        if self._unread:
            self._read()
        every = 1 if whole else max(1, self.task.n_validation // EVALUATION_TOKENS)
        loss = mean_loss(lambda batch: self._sum(state, batch), self.task.validation(), every)
        if not math.isfinite(loss):
            raise _burst(f"validation loss became {loss} after step {self.step}")
        trained = self._since_evaluation
        record = {
            "step": self.step,
            "train_loss": sum(trained) / len(trained) if trained else None,
            "val_loss": loss,
            "whole_validation": whole,
            "lr": self._lr,
            "seconds": round(self.seconds, 3),
        }
        self._since_evaluation = []
        self.records.append(record)
        self._mark = time.perf_counter(), self.tokens
        self.listener.evaluated(record)

    def _sum(self, state, batch) -> float:
        device_batch = type(batch)(*(self.backend.asarray(part) for part in batch))
        return float(self.backend.to_numpy(self._total(state["params"], device_batch))[0])


def _burst(what: str) -> BabyError:
    return BabyError(f"the {what}: lower --lr, or raise --warmup-steps")
