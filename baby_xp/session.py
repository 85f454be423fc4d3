"""One training session of a run: from a checkpoint through the loop to the files. Training, finetuning and
resuming all use it.

The order of writing makes a run safe: the checkpoint, a single file, is replaced as a whole; the weights
follow it; the config file says last how it ended. A run whose config file says "running" while no process holds
its lock was killed, and can be resumed from its checkpoint.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from baby_xp.arrays.backend import Shortage, translate_out_of_memory
from baby_xp.distributed.group import Lost
from baby_xp.errors import BabyError, NothingTrained, OutOfMemory
from baby_xp.files import append_line, write, write_json
from baby_xp.inference.trained_model import TrainedModel
from baby_xp.resources import counts
from baby_xp.run import Run
from baby_xp.runs import config_file, report, state_file, store
from baby_xp.runs.creation import NewRun
from baby_xp.runs.store import RunFiles
from baby_xp.training.alone import Alone
from baby_xp.training.checkpoint import Checkpoint
from baby_xp.training.divergence import largest_gradient
from baby_xp.training.listener import Listener
from baby_xp.training.loop import Diverged, Loop, Result
from baby_xp.training.plan import Plan
from baby_xp.training.setup import Setup
from baby_xp.training.signals import Stop
from baby_xp.training.workers import Workers

SAMPLE_TOKENS = 500
"""Tokens of the text generated at the end of training."""


@dataclass
class TrainingSession(Listener):
    """One training session. It listens to the loop, writes the files, and informs the listener of the user."""

    new: NewRun
    setup: Setup
    plan: Plan
    listener: Listener
    base: str | None = None
    """GUID of the run that this one is finetuned from."""
    began: str = ""
    """When the run began, if that was in an earlier session."""
    _last: Checkpoint = field(init=False)
    """The one on disk, without its arrays."""
    _model_step: int | None = field(init=False, default=None)
    """The step whose weights this session has written."""
    _before: dict[Path, bytes] = field(init=False, default_factory=dict)
    """The files to restore if a resumed run fails before its first checkpoint."""

    def run(self, start: Checkpoint) -> Run:
        """Train from `start` to an end. Raises BabyError if the run diverges or a file cannot be written: what
        the last checkpoint holds is then kept."""
        self.began = self.began or config_file.now()
        self._begin(start)
        setup, sample = self.setup, self._sample if self.plan.train.sample_tokens else None
        try:
            memory_errors = translate_out_of_memory(setup.backend, self._memory_advice)
            with Stop(self._stop_asked) as stop, setup.processes() as own, memory_errors:
                self.listener.started(self, start.step)
                parts = setup.backend, setup.model, setup.dataset
                try:
                    # no name for the loop, which has all arrays: this frame is kept with an error
                    result = Loop(*parts, self.plan, self, self.keep, stop, own, sample, setup.group).run(start)
                except Diverged as diverged:
                    raise self._divergence(diverged, own) from None
                return self._finish(result)
        except OutOfMemory as error:
            error = OutOfMemory(error.shortage, error.advice, self._kept())
            self._failed(error)
            raise error from None
        except Lost as lost:
            lost = Lost("; ".join(filter(None, (str(lost), self._kept()))))
            lost.guid = self.files.guid if self._last.step else None
            self._failed(lost)
            raise lost from None
        except Exception as error:
            self._failed(error)
            raise

    @property
    def files(self) -> RunFiles:
        """The files of the run."""
        return self.new.files

    # called by the loop --------------------------------------------------------------------------------

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Inform the listener."""
        self.listener.progress(step, loss, tokens_per_second)

    def evaluated(self, record: dict[str, Any]) -> None:
        """Append a line to the metrics, and inform the listener."""
        append_line(self.files.metrics, record)
        self.listener.evaluated(record)

    def keep(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and the best weights so far if they have changed."""
        steps = {"step": str(checkpoint.step), "num_steps": str(self.setup.dataset.num_steps)}
        state_file.save_state(self.files.state, checkpoint, {**self._belonging(), **steps})
        self._last, self._before = _without_arrays(checkpoint), {}
        self._write_model(checkpoint)
        if checkpoint.step:
            self.new.keep = True

    def _sample(self, params: Any) -> Iterator[str]:
        trained = self._trained(self.setup.backend.to_numpy(params))
        return self.setup.dataset.sample(trained, self.plan.train.seed, self.plan.train.sample_tokens)

    def _trained(self, params: np.ndarray) -> TrainedModel:
        return TrainedModel(self.setup.model, self.setup.dataset.tokenizer, params, self.setup.backend)

    # files ---------------------------------------------------------------------------------------------

    def _belonging(self) -> dict[str, str]:
        return state_file.belonging(self.files.guid, self.setup.config.model, self.setup.dataset.tokenizer)

    def _write_model(self, checkpoint: Checkpoint) -> None:
        """Write the best weights, unless this session has written them."""
        best = checkpoint.progress["best"]
        step = best["step"] if best else checkpoint.step
        if step != self._model_step:
            metadata = {**self._belonging(), "step": str(step)}
            layout = self.setup.model.layout
            state_file.save_weights(self.files.model, layout, checkpoint.best_params, metadata)
            self._model_step = step

    def _begin(self, start: Checkpoint) -> None:
        """Write the files as of the start: from now on the run can be found and resumed."""
        store.sweep(self.files)
        self._last = _without_arrays(start)
        for path in (self.files.metrics, self.files.config):
            with suppress(OSError):
                self._before[path] = path.read_bytes()
        self._write_metrics()  # the file may be missing, or have lines from after the checkpoint
        if not os.path.lexists(self.files.state):
            write_json(self.files.tokenizer, self.setup.dataset.tokenizer.to_dict())
            self.keep(start)
        store.write_sealed(self.files.config, self._content(self._result("running")))

    def _write_metrics(self) -> None:
        """The records of the last checkpoint, and no others."""
        records = self._last.progress["records"]
        if records or os.path.lexists(self.files.metrics):
            write(self.files.metrics, "".join(json.dumps(record) + "\n" for record in records))

    def _result(self, state: str, **more: Any) -> dict[str, Any]:
        """The result so far, as of the last checkpoint."""
        progress = self._last.progress
        records, best = progress["records"], progress["best"]
        trained = [record["train_loss"] for record in records if record["train_loss"] is not None]
        return {
            "state": state,
            "steps": self._last.step,
            "best_step": best["step"] if best else None,
            "train_loss": trained[-1] if trained else None,
            "val_loss": records[-1]["val_loss"] if records else None,
            "seconds": round(progress["seconds"], 1),
            "tokens_per_second": round(progress["tokens"] / max(progress["training_seconds"], 1e-9)),
            **more,
        }

    def _content(self, result: dict[str, Any]) -> dict[str, Any]:
        """The content of the config file."""
        setup = self.setup
        return config_file.content(
            self.files, setup.config, setup.model, setup.backend, self.began, result,
            setup.compute.device, setup.workers, setup.dataset, self.base, setup.group.size,
        )  # fmt: skip

    def _finish(self, result: Result) -> Run:
        """The run, as its training session ends; its files are written."""
        checkpoint = result.checkpoint
        if result.reason == "interrupted" and checkpoint.step == 0:
            raise NothingTrained("interrupted before the first step was done; nothing was trained")
        trained = self._trained(checkpoint.best_params)
        content = self.setup.group.first(lambda: self._write_end(result, trained))
        return Run(**vars(trained), files=self.files, config=content, settings=self.setup.config)

    def _write_end(self, result: Result, trained: TrainedModel) -> dict[str, Any]:
        """Write the files at the end -> the content of the config file."""
        checkpoint, final, sample = result.checkpoint, result.final, ""
        self._last = _without_arrays(checkpoint)
        self._write_model(checkpoint)  # a process may be killed between a checkpoint and its weights
        if result.reason == "interrupted":  # perhaps between an evaluation and writing its line of the metrics
            self._write_metrics()
        state = "done" if result.reason in ("steps", "patience") else "stopped"
        outcome = self._result(state, reason=result.reason)
        if final:
            outcome["val_loss"] = final["val_loss"]
            sample = "".join(self.setup.dataset.sample(trained, self.plan.train.seed, SAMPLE_TOKENS))
            write(self.files.completion(), sample + "\n")
        content = self._content(outcome)
        self._write_report(content, [final] if final else [], sample)
        return content

    def _write_report(self, content: dict[str, Any], more: list[dict[str, Any]], sample: str) -> None:
        """Write the report and, last of all, the config file."""
        records = [*self._last.progress["records"], *more]
        write(self.files.report, report.text(content, records, self.setup.dataset, sample))
        store.write_sealed(self.files.config, content)

    # errors --------------------------------------------------------------------------------------------

    def _memory_advice(self, shortage: Shortage) -> str:
        """A batch size that would fit, estimated from counts and from the memory in use, or that none would."""
        train, model, memory = self.plan.train, self.setup.model, shortage.memory
        known, itemsize = memory.used + (shortage.needed or 0), np.dtype(train.dtype).itemsize
        fits = counts.batch_that_fits(
            model.config, model.vocab_size, train.batch_size, memory.room, known, itemsize, train.optimizer
        )
        if not fits:
            return "by a rough estimate not one sequence would fit: choose a smaller model or a shorter --n-ctx"
        found = f"by a rough estimate about {fits:,} sequences at once would fit, not {train.batch_size:,}"
        if self._last.step:
            return f"{found}, but a resumed run keeps its batch size: use --backend numpy or a larger GPU"
        part = max(size for size in range(1, fits + 1) if train.batch_size % size == 0)
        parts = train.step_size // part
        return f"{found}: --batch-size {part} --accumulate {parts} computes the same steps in parts"

    def _kept(self) -> str:
        """What can be resumed, for a message."""
        step = self._last.step
        return f"the checkpoint of step {step} is kept: run {self.files.guid} can be resumed" if step else ""

    def _kept_state(self) -> dict[str, Any]:
        """The fields of the checkpoint on disk."""
        size, dtype = self.setup.model.n_parameters, self.plan.train.dtype
        return vars(state_file.load_state(self.files.state, size, dtype)[0])

    def _stop_asked(self) -> None:
        text = "stopping after this step, with a checkpoint; interrupt again to stop at once"
        if self.setup.group.size > 1:  # a launcher also sends SIGTERM to the others when a rank has ended
            text = "; ".join(filter(None, ("stopping all ranks after this step, if none is lost", self._kept())))
        self.listener.note(text)

    def _divergence(self, diverged: Diverged, own: Alone | Workers) -> BabyError:
        """The message for a loss that is NaN or infinite."""
        setup, train, what = self.setup, self.plan.train, f"the {diverged.what} at step {diverged.step}"
        self.listener.note(f"{what}; searching for the cause from step {self._last.step} on")
        good = Checkpoint(**setup.group.first(self._kept_state))
        start = setup.backend, setup.model, train, setup.dataset, good
        found = largest_gradient(*start, diverged.step, own, setup.group)
        parts = [what]
        if found:
            norm = f"norm {found.norm:.3g} in step {found.step}"
            parts.append(f"the largest gradient was that of {found.parameter}, {norm}")
        if good.step and not found:
            parts.append(f"the checkpoint of step {good.step} had diverged already: start a new run")
        elif good.step:
            kept = f"run {self.files.guid} can be resumed"
            parts.append(f"the last good checkpoint, of step {good.step}, is kept: {kept}")
        causes = [f"too high a learning rate (lower --lr, which was {train.lr:g})"]
        if train.warmup_steps < 100:
            causes.append(f"too short a warm-up (raise --warmup-steps, {train.warmup_steps})")
        if train.clip == 0:
            causes.append("gradients that are not clipped (--clip 1)")
        return BabyError("; ".join([*parts, f"usual causes: {', '.join(causes)}"]))

    def _failed(self, error: Exception) -> None:
        """Write to the files that the run failed, if they can still be written.

        A resumed run that has not written a checkpoint is left as it was, with its old settings.
        """
        with suppress(BabyError, OSError):
            if self._before:
                for path, data in self._before.items():
                    write(path, data)
            elif self._last.step:
                reason = " ".join(str(error).split()) or type(error).__name__
                self._write_report(self._content(self._result("failed", reason=reason)), [], "")


class Follower(TrainingSession):
    """The session of a rank other than the first: it computes the same and writes nothing."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """Rank 0 notes it."""

    def keep(self, checkpoint: Checkpoint) -> None:
        """Rank 0 writes it."""
        self._last = _without_arrays(checkpoint)

    def _begin(self, start: Checkpoint) -> None:
        self._last = _without_arrays(start)

    def _kept(self) -> str:
        """Without the step, as rank 0 may have been lost while it wrote."""
        return f"its last checkpoint is kept: run {self.files.guid} can be resumed" if self._last.step else ""

    def _failed(self, error: Exception) -> None:
        """Rank 0 writes that."""


def session_of(
    new: NewRun, setup: Setup, plan: Plan, listener: Listener, base: str | None = None, began: str = ""
) -> TrainingSession:
    """The training session of this rank."""
    if setup.group.rank:
        return Follower(new, setup, plan, Listener(), base, began)
    return TrainingSession(new, setup, plan, listener, base, began)


def _without_arrays(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, state={"step": checkpoint.state["step"]}, best=None)
