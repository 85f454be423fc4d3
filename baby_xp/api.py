"""The program from Python: train a preset, load a run, generate.

import baby_xp

run = baby_xp.train("baby", num_steps=500)
print(run.generate("This is ", num_tokens=200))
print(baby_xp.load("last").generate("Here comes "))
"""

import codecs
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from baby_xp import __version__, task
from baby_xp import backend as backends
from baby_xp import config as configs
from baby_xp.backend import Backend
from baby_xp.config import EquationConfig, ModelConfig, Preset, TrainConfig
from baby_xp.errors import BabyError
from baby_xp.generate import Sampling, generate
from baby_xp.models import Model
from baby_xp.presets import preset as find_preset
from baby_xp.runs import checkpoint, report, store
from baby_xp.runs.store import RunFiles
from baby_xp.text.tokenizer import Tokenizer, tokenizer_from_dict
from baby_xp.training.loop import Result, fit
from baby_xp.training.workers import Workers, suitable_number

SAMPLE_TOKENS = 500
MOST_PARAMETERS = 2**40
"""More than any machine holds, and few enough that all sizes in bytes can be computed with."""


class Silent:
    """A listener that keeps quiet."""

    def started(
        self, model: Model, backend: Backend, workers: int, task: task.Task, files: RunFiles
    ) -> None: ...

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None: ...

    def evaluated(self, record: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Run:
    """A trained model with its tokenizer and its files."""

    files: RunFiles
    model: Model
    tokenizer: Tokenizer
    params: np.ndarray
    """The parameters (P,), on the host."""
    config: dict[str, Any]
    """The run's config file."""
    backend: Backend

    @property
    def guid(self) -> str:
        """The run's GUID."""
        return self.files.guid

    def generate(
        self, prompt: str = "", num_tokens: int = SAMPLE_TOKENS, use_cache: bool = True, **sampling: Any
    ) -> str:
        """The prompt and its continuation. `sampling`: temperature, top_k, top_p, greedy, seed.

        Raises BabyError for a prompt that the tokenizer cannot encode, or a setting that makes no sense.
        """
        return prompt + "".join(self.stream(prompt, num_tokens, use_cache, **sampling))

    def stream(
        self, prompt: str = "", num_tokens: int = SAMPLE_TOKENS, use_cache: bool = True, **sampling: Any
    ) -> Iterator[str]:
        """The continuation, piece by piece as it is generated."""
        if num_tokens < 1:
            raise BabyError(f"num_tokens must be at least 1, not {num_tokens}")
        settings = Sampling(**sampling)
        ids = self.tokenizer.encode(prompt, "prompt") if prompt else self.first_ids()
        params = self.backend.asarray(self.params)
        return self._pieces(generate(self.backend, self.model, params, ids, num_tokens, settings, use_cache))

    def _pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        """Decode ids as they come; bytes wait until their character is whole."""
        if self.tokenizer.kind != "byte":
            yield from (self.tokenizer.decode([token]) for token in tokens)
            return
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            if piece := decoder.decode(bytes([token])):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def first_ids(self) -> np.ndarray:
        """What generation starts from without a prompt: an end of line, as a text has it before a beginning."""
        try:
            return self.tokenizer.encode("\n", "prompt")
        except BabyError:
            return np.zeros(1, np.int32)


def train(
    preset: str | Preset = "baby",
    *,
    path: str | Path = "runs",
    backend: str = "auto",
    device: str | None = None,
    workers: int | None = None,
    listener: Any = None,
    **overrides: Any,
) -> Run:
    """Train a preset and keep the run under `path`. `overrides`: fields of its configs (n_ctx=32, data="a.txt").

    workers: processes that share each step, None for a number that suits. Raises BabyError for input that
    cannot be used, and if the loss stops being a number; nothing is then left under `path`.
    """
    chosen = override(find_preset(preset) if isinstance(preset, str) else preset, overrides)
    listener = listener or Silent()
    with store.new_run(path) as files:
        loaded = backends.load(backend, device, chosen.train.dtype)
        learned = task.prepare(chosen.data, chosen.model, chosen.train, files.folder / "corpora")
        model = Model(chosen.model, learned.tokenizer.vocab_size)
        _check_size(model)
        number = _number_of_workers(workers, loaded, model, chosen.train.batch_size)
        pool = Workers(loaded, model, chosen.train.batch_size, number) if number > 1 else nullcontext()
        config = replace(chosen.train, num_steps=learned.num_steps)
        listener.started(model, loaded, number, learned, files)
        recorder = _Recorder(listener, files)
        with pool as running:
            result = fit(loaded, model, config, learned, recorder, running)
        if result.step == 0:
            raise BabyError("interrupted before the first step was done; nothing was trained")
        return _keep(files, replace(chosen, train=config), model, learned, loaded, number, result)


def override(chosen: Preset, overrides: dict[str, Any]) -> Preset:
    """The preset with some fields of its model, train or data config replaced. BabyError for unknown ones."""
    known = {part: {f.name for f in fields(getattr(chosen, part))} for part in ("model", "train", "data")}
    unknown = [name for name in overrides if not any(name in names for names in known.values())]
    if unknown:
        raise BabyError(f"preset {chosen.name} has no setting {unknown[0]!r}")
    parts = {
        part: replace(getattr(chosen, part), **{name: overrides[name] for name in names & overrides.keys()})
        for part, names in known.items()
    }
    return replace(chosen, **parts)


def load(
    name: str = "last", *, path: str | Path = "runs", backend: str = "auto", device: str | None = None,
) -> Run:  # fmt: skip
    """A run by its GUID, an unambiguous beginning of it, or "last". Raises BabyError if it cannot be loaded."""
    files = store.find(path, name)
    config = store.read_json(files.config)
    where = str(files.config)
    if not isinstance(config, dict) or not {"model", "train", "data", "vocab_size"} <= config.keys():
        raise BabyError(f"{where} is not the config of a run; the file is damaged or from elsewhere")
    tokenizer = tokenizer_from_dict(store.read_json(files.tokenizer), str(files.tokenizer))
    if tokenizer.vocab_size != config["vocab_size"]:
        raise BabyError(
            f"{files.tokenizer} has {tokenizer.vocab_size} ids, the model {config['vocab_size']!r}: "
            "they do not belong together"
        )
    model = Model(configs.model_from_dict(config["model"], where), tokenizer.vocab_size)
    train_config = configs.from_dict(TrainConfig, config["train"], where)
    flat = checkpoint.load_weights(files.model, model.layout)
    return Run(files, model, tokenizer, flat, config, backends.load(backend, device, train_config.dtype))


class _Recorder:
    """Passes what happens on to a listener, and keeps the evaluations in the metrics file."""

    def __init__(self, listener: Any, files: RunFiles):
        self.progress, self.listener, self.files = listener.progress, listener, files

    def evaluated(self, record: dict[str, Any]) -> None:
        store.append_line(self.files.metrics, record)
        self.listener.evaluated(record)


def _check_size(model: Model) -> None:
    if model.n_parameters > MOST_PARAMETERS:
        raise BabyError(f"a model of {model.n_parameters:,} parameters fits no memory; choose a smaller one")


def _number_of_workers(asked: int | None, backend: Backend, model: Model, batch_size: int) -> int:
    if asked is None:
        return suitable_number(backend, model, batch_size)
    if asked < 1:
        raise BabyError(f"workers must be at least 1, not {asked}")
    if asked > 1 and backend.name != "numpy":
        raise BabyError(
            f"workers are processes of the numpy backend; with {backend.name} leave out --workers"
        )
    return min(asked, batch_size)


def _keep(
    files: RunFiles,
    chosen: Preset,
    model: Model,
    learned: task.Task,
    backend: Backend,
    workers: int,
    result: Result,
) -> Run:
    """Write the files of a finished run."""
    last = result.records[-1]
    config = {
        "guid": files.guid,
        "baby_xp": __version__,
        "preset": chosen.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": configs.to_dict(chosen.model),
        "vocab_size": model.vocab_size,
        "parameters": model.n_parameters,
        "train": configs.to_dict(chosen.train),
        "data": {**configs.to_dict(chosen.data), "sha256": learned.facts.get("sha256")},
        "machine": {
            "machine": report.machine(), "backend": backend.version, "device": backend.device, "workers": workers,
        },
        "result": {
            "state": "stopped" if result.interrupted else "done",
            "steps": result.step,
            "train_loss": last["train_loss"],
            "val_loss": last["val_loss"],
            "seconds": round(result.seconds, 1),
            "tokens_per_second": round(result.tokens_per_second),
        },
    }  # fmt: skip
    run = Run(files, model, learned.tokenizer, result.state["params"], config, backend)
    sample = sample_of(run, chosen.model, chosen.train.seed)
    store.write_json(files.tokenizer, learned.tokenizer.to_dict())
    checkpoint.save_state(files.state, result.state)
    checkpoint.save_weights(files.model, model.layout, run.params, {"guid": files.guid})
    store.write(files.completion(), sample + "\n")
    store.write(files.report, report.text(config, result.records, learned.facts, sample))
    store.write_json(files.config, config)  # last: a run that can be found is whole
    return run


def sample_of(run: Run, model: ModelConfig, seed: int) -> str:
    """What a run shows of itself at its end: a text, or the answer that it was never told."""
    if isinstance(model, EquationConfig):
        return run.generate(f"{model.held_out}=", num_tokens=1, greedy=True)
    return run.generate(num_tokens=SAMPLE_TOKENS, seed=seed)
