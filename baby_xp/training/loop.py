"""The loop around the pure step: batches in, losses out, checkpoints in between, and the reason it ended."""

import functools
import math
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from baby_xp.arrays.backend import Backend
from baby_xp.arrays.namespace import Array
from baby_xp.distributed.group import Group
from baby_xp.models import Model
from baby_xp.text.batches import Batch
from baby_xp.text.dataset import Dataset
from baby_xp.training.alone import Alone
from baby_xp.training.checkpoint import Checkpoint, state_on_device, to_host
from baby_xp.training.listener import Listener
from baby_xp.training.plan import Plan, Position
from baby_xp.training.ranks import Ranks
from baby_xp.training.signals import Agreed, Stop
from baby_xp.training.step import on_device
from baby_xp.training.validation import mean_loss
from baby_xp.training.workers import Workers

READ_EVERY, READ_SECONDS = 10, 1.0
"""Steps, or seconds, between readings of the loss: each reading waits for the device."""
EVALUATION_TOKENS = 20_000
"""Validation tokens of an evaluation during training, about; the last evaluation uses all of them."""


class Diverged(Exception):
    """A loss or a parameter became NaN or infinite."""

    def __init__(self, what: str, step: int):
        super().__init__(what, step)
        self.what, self.step = what, step


@dataclass(frozen=True)
class Result:
    """How a training session ended, and its last checkpoint.

    reason: "steps", "patience", "time" or "interrupted". final: the record of the evaluation of the best model
    over the whole validation part, None after an interrupt.
    """

    checkpoint: Checkpoint
    reason: str
    final: dict[str, Any] | None


@dataclass
class Loop:
    """Steps, evaluations and checkpoints, each where the plan says, until the plan or the user ends them."""

    backend: Backend
    model: Model
    dataset: Dataset
    plan: Plan
    listener: Listener
    keep: Callable[[Checkpoint], None]
    """Receives a checkpoint whenever the plan says so, and at the end."""
    stop: Stop
    """May ask for an early end, after the current step. A KeyboardInterrupt abandons that step."""
    own: Alone | Workers
    """The processes of this rank."""
    sample: Callable[[Any], Iterator[str]] | None = None
    """Generates a text, piece by piece, with parameters (P,) on the device."""
    group: Group = field(default_factory=Group)

    def run(self, start: Checkpoint) -> Result:
        """Continue training from `start`, whose arrays are released.

        Raises Diverged if a loss or a parameter is no longer finite; the last checkpoint is then a good one.
        """
        self._begin(start)
        with np.errstate(all="ignore"):  # numbers that are not finite show up in the loss, which is checked
            try:
                reason = self._until_the_end()
            except KeyboardInterrupt as interrupt:
                reason = self._interrupted(interrupt)
            self._write_checkpoint()
            final = None
            if reason != "interrupted":
                try:
                    final = self._evaluate_best()
                except KeyboardInterrupt as interrupt:
                    reason = self._interrupted(interrupt)
        checkpoint = self._checkpoint()
        if isinstance(self.own, Workers):
            checkpoint.copy_arrays()
        return Result(checkpoint, reason, final)

    def _interrupted(self, interrupt: KeyboardInterrupt) -> str:
        """The reason for the end. Raises the interrupt again if the other ranks do not know of it: they wait for
        this one in the middle of a step or an evaluation, and only the last checkpoint is whole."""
        if self.group.size > 1 and not isinstance(interrupt, Agreed):
            raise interrupt
        return "interrupted"

    def _begin(self, start: Checkpoint) -> None:
        backend, model, config = self.backend, self.model, self.plan.train
        said = weakref.WeakMethod(self._said)  # a cycle would keep all arrays after the end, until it is collected
        self._ranks = Ranks(self.group, self.own, backend, model, config, lambda: said()())  # type: ignore[misc]
        self._step = backend.compile(self._ranks.step())
        self._total = backend.compile(self.own.total_loss)
        self.state = state_on_device(backend, model, config, start)
        self.step, self.progress = start.step, start.progress
        self._best = self._params() if start.best is None else backend.asarray(start.best)
        self._unread: list[tuple[int, Any, int]] = []  # step, metrics and number of tokens of each
        self._readings = 0
        self._seconds_before, self._began = self.progress["seconds"], time.perf_counter()
        self._read_at, self._tokens_at = self._began, self.progress["tokens"]
        self._kept_at, self._kept = self._began, self._version()
        self._heard, self._read_every = (0.0, 0.0, 0.0), 1
        start.drop_arrays()

    def _until_the_end(self) -> str:
        """Evaluate, write checkpoints and do steps when they are due -> the reason for the end."""
        while True:
            if self.plan.evaluates(self._position()):
                self._evaluate()
            if reason := self.plan.ends(self._position()):
                return reason
            if self.plan.writes_checkpoint(self._position()):
                self._write_checkpoint()
            self._advance()
            if self._reads():
                self._read()

    def _position(self) -> Position:
        """With several ranks, what differs between them is as of the last reading."""
        best = self.progress["best"]
        asked, seconds, kept = self._heard if self.group.size > 1 else self._clocks()
        where = self.step, self.progress["records"], best and best["step"]
        return Position(*where, seconds, kept, self._readings, bool(asked))

    def _clocks(self) -> tuple[float, float, float]:
        """Whether a stop was asked for, and the seconds since the session began and since its last checkpoint."""
        now = time.perf_counter()
        return float(self.stop.asked), now - self._began, now - self._kept_at

    def _said(self) -> tuple[float, ...]:
        """What this rank tells the others in each step: all go by the clocks of rank 0."""
        asked, *clocks = self._clocks()
        return (asked, *clocks) if self.group.rank == 0 else (asked, 0.0, 0.0)

    def _reads(self) -> bool:
        """Whether to read the losses now; with several ranks, after a number of steps that all know."""
        if self.group.size == 1:
            due = len(self._unread) >= READ_EVERY or time.perf_counter() - self._read_at > READ_SECONDS
        else:
            due = len(self._unread) >= self._read_every
        return due or self.step == self.plan.num_steps

    # steps ---------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        batch = self.dataset.batches.batch(self.step)
        state, metrics = self._step(self.state, on_device(self.backend, batch))
        unread = [*self._unread, (self.step, metrics, batch.inputs.size)]
        # in one statement without calls, so a KeyboardInterrupt comes before the step or after it
        self.state, self.step, self._unread = state, self.step + 1, unread

    def _read(self) -> None:
        """Read the losses of the steps since the last reading."""
        if not self._unread:
            return
        last = self._unread[-1][1]
        numbers = [*(metrics["loss"] for _, metrics, _ in self._unread), last["lr"], last["grad_norm"]]
        # together: a GPU makes the host wait for each reading
        *losses, lr, grad_norm = self.backend.to_numpy(self.backend.xp.concat(numbers)).tolist()
        for (step, *_), loss in zip(self._unread, losses, strict=True):
            if not math.isfinite(loss):
                raise Diverged(f"loss became {loss}", step + 1)
        if self.group.size > 1:
            self._hear(len(losses))
        now, progress = time.perf_counter(), dict(self.progress)
        progress |= {"lr": lr, "grad_norm": grad_norm}
        for loss in losses:  # one by one, because the sum must not depend on how many are read at once
            progress["total"] += loss
        progress["count"] += len(losses)
        progress["tokens"] += sum(tokens for _, _, tokens in self._unread)
        progress["training_seconds"] += now - self._read_at
        self.progress, self._unread = progress, []
        rate = (progress["tokens"] - self._tokens_at) / max(now - self._read_at, 1e-9)
        self._read_at, self._tokens_at = now, progress["tokens"]
        self._readings += 1
        self.listener.progress(self.step, sum(losses) / len(losses), rate)

    def _hear(self, steps: int) -> None:
        """Read what the ranks told each other in the last step; `steps`: those since the last reading."""
        asked, seconds, kept = np.asarray(self.backend.to_numpy(self._ranks.heard)).tolist()
        pace = (seconds - self._heard[1]) / steps  # seconds between steps, evaluations included
        self._read_every = max(1, min(READ_EVERY, int(READ_SECONDS / max(pace, 1e-9))))
        self._heard = asked, seconds, kept

    # evaluations ---------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Measure the validation loss on a sample of the validation part, and remember the best model."""
        self._read()
        every = max(1, self.dataset.n_validation // EVALUATION_TOKENS)
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
            record["sample"] = self.group.first(self._sampled)
            if record["sample"] is None:
                raise Agreed
        best = progress["best"]
        if best is None or loss < best["val_loss"]:
            best, self._best = {"step": self.step, "val_loss": loss}, self._params()
        records = [*progress["records"], record]
        self.progress = {**progress, "records": records, "best": best, "total": 0.0, "count": 0}
        self.listener.evaluated(record)
        self._read_at = time.perf_counter()

    def _sampled(self) -> str | None:
        """A sample; None if a stop was asked for in the meantime."""
        assert self.sample is not None
        try:
            return "".join(self.stop.over(self.sample(self.state["params"])))
        except KeyboardInterrupt:
            return None

    def _evaluate_best(self) -> dict[str, Any]:
        """The validation loss of the best model over the whole validation part: the last record."""
        best = self.progress["best"]
        at = best["step"] if best else self.step
        loss = self._validation_loss(self._best if best else self.state["params"], 1)
        record = {"step": at, "train_loss": None, "val_loss": loss, "whole_validation": True}
        record |= self._figures()
        self.listener.evaluated(record)
        return record

    def _figures(self) -> dict[str, float]:
        """What a record says about the last step, and the seconds of the run so far."""
        figures = {name: self.progress[name] for name in ("lr", "grad_norm")}
        return {**figures, "seconds": round(self._seconds(), 3)}

    def _params(self) -> Array:
        """A copy of the current parameters (P,): workers overwrite those of a state two steps later."""
        return self.backend.xp.asarray(self.state["params"], copy=True)

    def _validation_loss(self, params: Array, every: int) -> float:
        batches, total = self.dataset.validation(), functools.partial(self._sum, params)
        loss = mean_loss(total, batches, every, self.group, self.stop)
        if not math.isfinite(loss):
            raise Diverged(f"validation loss became {loss}", self.step)
        return loss

    def _sum(self, params: Array, batch: Batch) -> float:
        return float(self.backend.to_numpy(self._total(params, on_device(self.backend, batch)))[0])

    # checkpoints ---------------------------------------------------------------------------------------

    def _checkpoint(self) -> Checkpoint:
        """A snapshot, on the host."""
        self._ranks.gather(self.state["m"], self.state["v"])
        best = self.progress["best"]
        elsewhere = best is not None and best["step"] != self.step
        return Checkpoint(
            to_host(self.backend, self.state),
            self.backend.to_numpy(self._best) if elsewhere else None,
            {**self.progress, "seconds": self._seconds()},
        )

    def _write_checkpoint(self) -> None:
        """Hand a checkpoint to `keep`, unless it already has this one."""
        self._read()
        if self._version() == self._kept:
            return
        self.dataset.check()  # raises an error if the text has changed in the meantime
        checkpoint = self._checkpoint()
        if not all(np.isfinite(checkpoint.state[name]).all() for name in ("params", "m", "v")):
            raise Diverged("parameters became NaN or infinite", self.step)
        self.keep(checkpoint)
        self._kept, self._kept_at = self._version(), time.perf_counter()
        self._read_at = self._kept_at

    def _version(self) -> tuple[int, int]:
        """Distinguishes checkpoints: an evaluation comes after the step that it measures."""
        return self.step, len(self.progress["records"])

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._began
