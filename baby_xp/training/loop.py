"""The loop around the pure step: batches in, losses out, checkpoints on the way, and the reason of the end."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from baby_xp.training.checkpoint import Checkpoint, on_device, to_host
from baby_xp.training.signals import Stop
from baby_xp.training.step import make_step, total_loss
from baby_xp.training.validation import mean_loss

READ_EVERY, READ_SECONDS = 10, 1.0
"""Steps, or seconds, between readings of the loss: each reading waits for the device."""
EVALUATION_TOKENS = 20_000
"""Validation tokens of a measurement on the way, about; the last one takes them all."""


class Listener(Protocol):
    """Who wants to know how training goes."""

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Called every few steps with the mean loss since the last call."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """Called with the record of each evaluation: step, train_loss, val_loss, lr, grad_norm, seconds."""


class Diverged(Exception):
    """A number that should be finite is not."""

    def __init__(self, what: str, step: int):
        super().__init__(what, step)
        self.what, self.step = what, step


@dataclass
class Result:
    """How a training session ended. `checkpoint` is its last moment.

    reason: "steps", "patience", "time" or "interrupted". final: the record of the evaluation of the best model
    over the whole validation part, None after an interrupt.
    """

    checkpoint: Checkpoint
    reason: str
    final: dict[str, Any] | None
    tokens_per_second: float


def fit(
    backend,
    model,
    config,
    task,
    start: Checkpoint,
    listener: Listener,
    keep: Callable[[Checkpoint], None],
    stop: Stop,
    workers=None,
    sample: Callable[[Any], Iterator[str]] | None = None,
    evaluate_first: bool = False,
) -> Result:
    """Train on from `start`, which gives up its arrays.

    `config` is a TrainConfig, `task` a Task, `workers` a Workers or None. `keep` gets a checkpoint now and then,
    and at the end. `sample` makes a text, piece by piece, of parameters (P,) on the device. `stop` may ask for an
    early end: the step at hand is finished. A KeyboardInterrupt gives that step up.
    Raises Diverged if a loss or a parameter is no longer finite; the last checkpoint is then a good one.
    """
    run = _Run(backend, model, config, task, start, listener, keep, stop, workers, sample, evaluate_first)
    start.give_up_arrays()  # they are on the device now
    with np.errstate(all="ignore"):  # numbers that are not finite show in the loss, which is checked
        try:
            reason = run.until_the_end()
        except KeyboardInterrupt:
            reason = "interrupted"
        run.keep_checkpoint()
        final = None
        if reason != "interrupted":
            try:
                final = run.measure_the_best()
            except KeyboardInterrupt:
                reason = "interrupted"
    rate = run.progress["tokens"] / max(run.progress["training_seconds"], 1e-9)
    checkpoint = run.checkpoint()
    if workers is not None:
        checkpoint.copy_arrays()  # they lie in memory that goes with the workers
    return Result(checkpoint, reason, final, rate)


class _Run:
    """What the loop remembers between steps: the state on the device, and the progress of a checkpoint."""

    def __init__(self, backend, model, config, task, start, listener, keep, stop, workers, sample, evaluate_first):
        self.backend, self.config, self.task = backend, config, task
        self.listener, self._keep, self.stop, self.sample = listener, keep, stop, sample
        self.evaluate_first = evaluate_first
        if workers is None:
            step, total = make_step(backend.xp, model, config), functools.partial(total_loss, backend.xp, model)
        else:
            step = make_step(backend.xp, model, config, workers.loss_and_gradients, workers.adamw)
            total = workers.total_loss
        self._step = backend.compile(step)
        self._total = backend.compile(total)
        self.state = on_device(backend, model, config, start)
        self.step, self.progress = start.step, start.progress
        self._best = self._params() if start.best is None else backend.asarray(start.best)
        self._unread = []  # step, metrics and number of tokens of each
        self._seconds_before, self.begin = self.progress["seconds"], time.perf_counter()
        self._read_at, self._tokens_at = self.begin, self.progress["tokens"]
        self._kept_at, self._kept = self.begin, self._moment()

    # the end -------------------------------------------------------------------------------------------

    def until_the_end(self) -> str:
        """Steps, evaluations and checkpoints, each where it is due -> the reason of the end.

        What is due follows from the step and the progress alone, so that a run that is resumed between any two
        of them goes on as it would have.
        """
        while True:
            if self._evaluation_is_due():
                self._evaluate()
            if reason := self._reason_to_end():
                return reason
            if self._checkpoint_is_due():
                self.keep_checkpoint()
            self._advance()
            waited = time.perf_counter() - self._read_at
            if len(self._unread) >= READ_EVERY or waited > READ_SECONDS or self.step == self.task.num_steps:
                self._read()

    def _reason_to_end(self) -> str | None:
        if self.step >= self.task.num_steps:
            return "steps"
        if self.config.patience and evaluations_since_best(self.progress) >= self.config.patience:
            return "patience"
        if self.stop.asked:
            return "interrupted"
        minutes = (time.perf_counter() - self.begin) / 60
        return "time" if self.config.max_minutes and minutes >= self.config.max_minutes else None

    # steps ---------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        batch = self.task.batches.batch(self.step)
        on_device = type(batch)(*(self.backend.asarray(part) for part in batch))
        state, metrics = self._step(self.state, on_device)
        unread = [*self._unread, (self.step, metrics, batch.inputs.size)]
        # at once, and with no call between: a KeyboardInterrupt falls before the step or after it
        self.state, self.step, self._unread = state, self.step + 1, unread

    def _read(self) -> None:
        """Read the losses of the steps since the last reading."""
        if not self._unread:
            return
        number = lambda metrics, name: float(self.backend.to_numpy(metrics[name])[0])  # noqa: E731
        losses = [number(metrics, "loss") for _, metrics, _ in self._unread]
        for (step, *_), loss in zip(self._unread, losses, strict=True):
            if not math.isfinite(loss):
                raise Diverged(f"loss became {loss}", step + 1)
        now, progress = time.perf_counter(), dict(self.progress)
        progress |= {name: number(self._unread[-1][1], name) for name in ("lr", "grad_norm")}
        for loss in losses:  # one by one: the sum must not depend on how many are read at once
            progress["total"] += loss
        progress["count"] += len(losses)
        progress["tokens"] += sum(tokens for _, _, tokens in self._unread)
        progress["training_seconds"] += now - self._read_at
        self.progress, self._unread = progress, []
        rate = (progress["tokens"] - self._tokens_at) / max(now - self._read_at, 1e-9)
        self._read_at, self._tokens_at = now, progress["tokens"]
        self.listener.progress(self.step, sum(losses) / len(losses), rate)

    # evaluations ---------------------------------------------------------------------------------------

    def _evaluation_is_due(self) -> bool:
        records = self.progress["records"]
        if records and records[-1]["step"] == self.step:
            return False
        if self.step == 0:
            return self.evaluate_first
        return self.step % self.config.eval_every == 0 or self.step == self.task.num_steps

    def _evaluate(self) -> None:
        """Measure the validation loss on a sample of the validation part, and remember the best model."""
        self._read()
        every = max(1, self.task.n_validation // EVALUATION_TOKENS)
        loss = self._validation_loss(self.state["params"], every)
        progress = self.progress
        record = {
            "step": self.step,
            "train_loss": progress["total"] / progress["count"] if progress["count"] else None,
            "val_loss": loss,
            "whole_validation": False,
            **self._figures(),
        }
        if self.sample:
            record["sample"] = "".join(self.stop.over(self.sample(self.state["params"])))
        best = progress["best"]
        if best is None or loss < best["val_loss"]:
            best, self._best = {"step": self.step, "val_loss": loss}, self._params()
        records = [*progress["records"], record]
        self.progress = {**progress, "records": records, "best": best, "total": 0.0, "count": 0}
        self.listener.evaluated(record)
        self._read_at = time.perf_counter()

    def measure_the_best(self) -> dict[str, Any]:
        """The validation loss of the best model over the whole validation part: the last record."""
        best = self.progress["best"]
        at = best["step"] if best else self.step
        loss = self._validation_loss(self._best if best else self.state["params"], 1)
        record = {"step": at, "train_loss": None, "val_loss": loss, "whole_validation": True}
        record |= self._figures()
        self.listener.evaluated(record)
        return record

    def _figures(self) -> dict[str, float]:
        """What a record tells of the last step, and how long the run has taken."""
        figures = {name: self.progress[name] for name in ("lr", "grad_norm")}
        return {**figures, "seconds": round(self._seconds(), 3)}

    def _params(self):
        """A copy of the present parameters (P,): workers overwrite those of a state after the next."""
        return self.backend.xp.asarray(self.state["params"], copy=True)

    def _validation_loss(self, params, every: int) -> float:
        loss = mean_loss(lambda batch: self._sum(params, batch), self.stop.over(self.task.validation()), every)
        if not math.isfinite(loss):
            raise Diverged(f"validation loss became {loss}", self.step)
        return loss

    def _sum(self, params, batch) -> float:
        device_batch = type(batch)(*(self.backend.asarray(part) for part in batch))
        return float(self.backend.to_numpy(self._total(params, device_batch))[0])

    # checkpoints ---------------------------------------------------------------------------------------

    def _checkpoint_is_due(self) -> bool:
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        if self._moment() == self._kept:
            return False
        if every and self.step % every == 0:
            return True
        return bool(minutes) and time.perf_counter() - self._kept_at > 60 * minutes

    def checkpoint(self) -> Checkpoint:
        """The present moment, on the host."""
        best = self.progress["best"]
        elsewhere = best is not None and best["step"] != self.step
        return Checkpoint(
            to_host(self.backend, self.state),
            self.backend.to_numpy(self._best) if elsewhere else None,
            {**self.progress, "seconds": self._seconds()},
        )

    def keep_checkpoint(self) -> None:
        """Hand the present moment to `keep`, unless that has it already."""
        self._read()
        if self._moment() == self._kept:
            return
        self.task.check()  # what the steps learned from must have been the text
        checkpoint = self.checkpoint()
        if not all(np.isfinite(checkpoint.state[name]).all() for name in ("params", "m", "v")):
            raise Diverged("parameters became numbers that are not finite", self.step)
        self._keep(checkpoint)
        self._kept, self._kept_at = self._moment(), time.perf_counter()
        self._read_at = self._kept_at

    def _moment(self) -> tuple[int, int]:
        """Tells two moments apart: an evaluation comes after the step that it measures."""
        return self.step, len(self.progress["records"])

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self.begin


def evaluations_since_best(progress: dict[str, Any]) -> int:
    """Evaluations after the best one."""
    best = progress["best"]
    return sum(best is not None and record["step"] > best["step"] for record in progress["records"])
