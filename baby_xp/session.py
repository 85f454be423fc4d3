"""One training session of a run: from a checkpoint through the loop to the files. Training, finetuning and
resuming all come down to it.

The order of writing is what makes a run safe: the checkpoint, a single file, is replaced as a whole; the weights
follow it; the config says last how it ended. A run whose config says "running" while no process holds its lock
was killed, and goes on from its checkpoint.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from baby_xp_data import equations

from baby_xp import __version__
from baby_xp import config as configs
from baby_xp.arrays import registry
from baby_xp.arrays.backend import Backend, Shortage, in_words, translate_out_of_memory
from baby_xp.config import ModelConfig, Preset
from baby_xp.errors import BabyError, NothingTrained, OutOfMemory
from baby_xp.files import append_line, write, write_json
from baby_xp.models import Model
from baby_xp.resources import counts
from baby_xp.run import Run
from baby_xp.runs import report, store
from baby_xp.runs import state_file as arrays
from baby_xp.runs.store import RunFiles
from baby_xp.text.dataset import Task
from baby_xp.text.tokenizer import Tokenizer
from baby_xp.training.checkpoint import Checkpoint
from baby_xp.training.divergence import largest_gradient
from baby_xp.training.loop import Diverged, Result, fit
from baby_xp.training.signals import Stop
from baby_xp.training.workers import Workers, alone

SAMPLE_TOKENS = 500
"""Tokens of the text at the end of training."""
SAMPLE_ANSWERS = 6
"""Answers to held-out equations that are shown in its place."""


@dataclass
class TrainingSession:
    """What one training session needs. `on_kept` is called when a checkpoint of a step is on disk."""

    files: RunFiles
    chosen: Preset
    model: Model
    learned: Task
    backend: Backend
    device: str | None
    """As it was asked for; None: the backend's default."""
    workers: int
    listener: Any
    base: str | None = None
    """GUID of the run that this one is finetuned from."""
    started: str = ""
    """When the run began, if that was in an earlier session."""
    on_kept: Callable[[], None] = lambda: None

    def run(self, start: Checkpoint) -> Run:
        """Train from `start` to an end. Raises BabyError if the run diverges or a file cannot be written: what
        the last checkpoint holds is then kept."""
        self.started = self.started or _now()
        self._begin(start)
        try:
            of_step = self.backend, self.model, self.chosen.train.batch_size
            pool = Workers(*of_step, self.workers) if self.workers > 1 else alone(*of_step)
            told = translate_out_of_memory(self.backend, self._memory_advice)
            with Stop(self._told_to_stop) as stop, pool as workers, told:
                self.listener.started(self, start.step)
                try:
                    result = self._fit(start, stop, workers)
                except Diverged as diverged:
                    raise self._divergence(diverged, workers) from None
                return self._finish(result)
        except OutOfMemory as error:
            error = OutOfMemory(error.shortage, error.advice, self._kept())
            self._failed(error)
            raise error from None
        except Exception as error:
            self._failed(error)
            raise

    def _fit(self, start: Checkpoint, stop: Stop, workers: Workers | None) -> Result:
        train = self.chosen.train
        return fit(
            self.backend, self.model, train, self.learned, start, self, self.keep, stop, workers,
            sample=self._sample if train.sample_tokens else None, evaluate_first=self.base is not None,
        )  # fmt: skip

    # what the loop calls -------------------------------------------------------------------------------

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Pass it on."""
        self.listener.progress(step, loss, tokens_per_second)

    def evaluated(self, record: dict[str, Any]) -> None:
        """Keep a line in the metrics, and pass it on."""
        append_line(self.files.metrics, record)
        self.listener.evaluated(record)

    def keep(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and the best weights so far where they are others than before."""
        belongs = belonging(self.files.guid, self.chosen.model, self.learned.tokenizer)
        steps = {"step": str(checkpoint.step), "num_steps": str(self.learned.num_steps)}
        arrays.save_state(self.files.state, checkpoint, {**belongs, **steps})
        self._last, self._before = _without_arrays(checkpoint), {}
        self._write_model(checkpoint)
        if checkpoint.step:
            self.on_kept()

    # files ---------------------------------------------------------------------------------------------

    def _write_model(self, checkpoint: Checkpoint) -> None:
        """Write the best weights, unless this session has written them."""
        best = checkpoint.progress["best"]
        step = best["step"] if best else checkpoint.step
        if step != self._model_step:
            belongs = belonging(self.files.guid, self.chosen.model, self.learned.tokenizer)
            metadata = {**belongs, "step": str(step)}
            arrays.save_weights(self.files.model, self.model.layout, checkpoint.best_params, metadata)
            self._model_step = step

    def _begin(self, start: Checkpoint) -> None:
        """The files as of the start: from now on the run can be found, and goes on from there."""
        store.sweep(self.files)
        self._last, self._model_step = _without_arrays(start), None
        self._before = {}  # what the files are to be again if the run goes on to nothing
        for path in (self.files.metrics, self.files.config):
            with suppress(OSError):
                self._before[path] = path.read_bytes()
        self._write_metrics()  # it may be gone, or have lines of after the checkpoint
        if not os.path.lexists(self.files.state):
            write_json(self.files.tokenizer, self.learned.tokenizer.to_dict())
            self.keep(start)
        store.write_sealed(self.files.config, self.config(self._result("running")))

    def _write_metrics(self) -> None:
        """The records of the last checkpoint, and no others."""
        records = self._last.progress["records"]
        if records or os.path.lexists(self.files.metrics):
            write(self.files.metrics, "".join(json.dumps(record) + "\n" for record in records))

    def _result(self, state: str, **more: Any) -> dict[str, Any]:
        """How the run stands, as of its last checkpoint."""
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

    def config(self, result: dict[str, Any]) -> dict[str, Any]:
        """What the config file holds."""
        chosen, sha256 = self.chosen, self.learned.facts.get("sha256")
        return {
            "guid": self.files.guid,
            "baby_xp": __version__,
            "preset": chosen.name,
            "base": self.base,
            "started": self.started,
            "written": _now(),
            "model": configs.to_dict(chosen.model),
            "vocab_size": self.model.vocab_size,
            "parameters": self.model.n_parameters,
            "train": configs.to_dict(chosen.train),
            "data": {**configs.to_dict(chosen.data), "file": self.learned.file, "sha256": sha256},
            "place": self._place(),
            "machine": {
                "machine": report.machine(), "backend": self.backend.version, "device": self.backend.device,
                "workers": self.workers, **_memory_of(self.backend),
            },
            "result": result,
        }  # fmt: skip

    def _place(self) -> dict[str, Any]:
        """Where the run computes, as it was asked for, and what changes its numbers: `resume` goes on with it."""
        place = {"backend": self.backend.name, "device": self.device, "workers": self.workers}
        return {**place, "tf32": True} if getattr(self.backend, "tf32", False) else place

    def _finish(self, result: Result) -> Run:
        """Write the files of a training session that ended well."""
        checkpoint, final = result.checkpoint, result.final
        if result.reason == "interrupted" and checkpoint.step == 0:
            raise NothingTrained("interrupted before the first step was done; nothing was trained")
        self._last = _without_arrays(checkpoint)
        self._write_model(checkpoint)  # a kill may have come between the last checkpoint and its weights
        if result.reason == "interrupted":  # at once, perhaps, and between an evaluation and its line
            self._write_metrics()
        told = self._result("done" if result.reason in ("steps", "patience") else "stopped", reason=result.reason)
        run, sample = self._as_run(checkpoint.best_params), ""
        if final:
            told["val_loss"] = final["val_loss"]
            sample = "".join(sample_of(run, self.chosen.train.seed))
            write(self.files.completion(), sample + "\n")
        return replace(run, config=self._tell(self.config(told), [final] if final else [], sample))

    def _tell(self, config: dict[str, Any], more: list[dict[str, Any]], sample: str) -> dict[str, Any]:
        """Write the report and, last of all, the config -> the config."""
        records = [*self._last.progress["records"], *more]
        write(self.files.report, report.text(config, records, self.learned.facts, sample))
        store.write_sealed(self.files.config, config)
        return config

    def _as_run(self, params: Any) -> Run:
        config = self.config(self._result("running"))
        return Run(self.files, self.model, self.learned.tokenizer, params, config, self.backend)

    def _sample(self, params: Any) -> Iterator[str]:
        train = self.chosen.train
        return sample_of(self._as_run(self.backend.to_numpy(params)), train.seed, train.sample_tokens)

    # trouble -------------------------------------------------------------------------------------------

    def _memory_advice(self, shortage: Shortage) -> str:
        """A batch that would fit, by what is counted and by what was held; or that none would."""
        train, memory = self.chosen.train, shortage.memory
        known, itemsize = memory.used + (shortage.needed or 0), np.dtype(train.dtype).itemsize
        sizes = self.chosen.model, self.model.vocab_size, train.batch_size
        fits = counts.batch_that_fits(*sizes, memory.room, known, itemsize)
        if not fits:
            return "by a rough count not even one sequence would fit: choose a smaller model or a shorter --n-ctx"
        found = f"by a rough count about {fits:,} sequences at once would fit, not {train.batch_size:,}"
        if self._last.step:
            return f"{found}, but a run that goes on keeps its batch: take --backend numpy or a larger GPU"
        part = max(size for size in range(1, fits + 1) if train.batch_size % size == 0)
        return f"{found}: --batch-size {part} --accumulate {train.step_size // part} takes the same steps in parts"

    def _kept(self) -> str:
        """What there is to go on with."""
        step = self._last.step
        return f"the checkpoint of step {step} is kept: run {self.files.guid} can be resumed" if step else ""

    def _told_to_stop(self) -> None:
        self.listener.note("stopping after this step, with a checkpoint; once more: at once")

    def _divergence(self, diverged: Diverged, workers: Workers | None) -> BabyError:
        """What the user is told of a loss that is NaN or infinite."""
        train, what = self.chosen.train, f"the {diverged.what} at step {diverged.step}"
        self.listener.note(f"{what}; looking for its cause from step {self._last.step} on")
        good, _ = arrays.load_state(self.files.state, self.model.n_parameters, train.dtype)
        found = largest_gradient(self.backend, self.model, train, self.learned, good, diverged.step, workers)
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
        return BabyError("; ".join([*parts, f"what usually causes it: {', '.join(causes)}"]))

    def _failed(self, error: Exception) -> None:
        """Say in the files that the run failed, where that can still be written.

        A run that went on to nothing, not even one checkpoint, is left as it was: with the settings of before.
        """
        with suppress(BabyError, OSError):
            if self._before:
                for path, data in self._before.items():
                    write(path, data)
            elif self._last.step:
                reason = " ".join(str(error).split()) or type(error).__name__
                self._tell(self.config(self._result("failed", reason=reason)), [], "")


def keep_imported(files: RunFiles, chosen: Preset, model: Model, tokenizer: Tokenizer, params: np.ndarray) -> Run:
    """Write the files of a run that was trained elsewhere: no state, as there is nothing to resume."""
    backend = registry.load("numpy", dtype=chosen.train.dtype)
    learned = Task(chosen.data.data, tokenizer, None, 0, lambda: iter(()), 0, {})
    session = TrainingSession(files, chosen, model, learned, backend, None, 1, None, started=_now())
    write_json(files.tokenizer, tokenizer.to_dict())
    belongs = belonging(files.guid, chosen.model, tokenizer)
    arrays.save_weights(files.model, model.layout, params, {**belongs, "step": "0"})
    result = {"state": "imported", "reason": "", "steps": 0, "val_loss": None}
    config = session.config(result)
    store.write_sealed(files.config, config)
    return Run(files, model, tokenizer, params, config, backend)


def sample_of(run: Run, seed: int, num_tokens: int | None = None) -> Iterator[str]:
    """What a run shows of itself, piece by piece: a text, or some of the answers that it was never told."""
    data = run.config["data"]
    if "held_out" not in data:
        return run.stream(num_tokens=num_tokens or SAMPLE_TOKENS, seed=seed)
    of_table = data["max_sum"], data["digits"], data["operators"]
    named = equations.chosen(data["held_out"], run.config["train"]["seed"], *of_table)
    some = named[:: -(-len(named) // SAMPLE_ANSWERS)]
    return iter([", ".join(run.answer(f"{case}=") for case in some)])


def belonging(guid: str, model_config: ModelConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """What binds a file of arrays to its run, model and tokenizer: metadata of the file."""
    return {
        "guid": guid,
        "model": json.dumps(configs.to_dict(model_config), sort_keys=True),
        "tokenizer": store.digest(tokenizer.to_dict()),
    }


def _memory_of(backend: Backend) -> dict[str, str]:
    """What the report tells of a device with memory of its own."""
    if (memory := backend.memory()) is None:
        return {}
    peaks = f"{in_words(memory.peak_used)} / {in_words(memory.peak_held)}"
    return {"GPU memory, peak used/held": peaks}


def _without_arrays(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, state={"step": checkpoint.state["step"]}, best=None)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
