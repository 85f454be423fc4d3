"""The program from Python: train a preset, load a run, finetune it, go on with it, measure it, generate.

import baby_xp

run = baby_xp.train("baby", num_steps=500)
print(run.generate("This is ", num_tokens=200))
print(baby_xp.load("last").generate("Here comes "))
tuned = baby_xp.finetune("last", data="my.txt")
print(tuned.evaluate())
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from baby_xp import checks
from baby_xp.arrays import params, registry
from baby_xp.arrays.backend import Backend
from baby_xp.config import DataConfig, EquationConfig, EquationData, Preset, TrainConfig, settings_of
from baby_xp.convert import littlebaby
from baby_xp.errors import BabyError
from baby_xp.files import as_path
from baby_xp.models import Model
from baby_xp.presets import preset as find_preset
from baby_xp.resources import limits
from baby_xp.run import Run
from baby_xp.runs import state_file as arrays
from baby_xp.runs import store, table
from baby_xp.runs.store import NewRun, RunFiles
from baby_xp.runs.table import Summary
from baby_xp.session import TrainingSession, belonging, keep_imported
from baby_xp.text import dataset
from baby_xp.text.tokenizer import CharTokenizer, Tokenizer, tokenizer_from_dict
from baby_xp.training import checkpoint
from baby_xp.training.workers import suitable_number

FINETUNE_STEPS = 500
RESUMABLE = (
    "num_steps", "lr", "min_lr", "clip", "eval_every", "sample_tokens", "patience", "max_minutes",
    "checkpoint_every", "checkpoint_minutes",
)  # fmt: skip
"""Settings that may be changed when a run is resumed."""


class Silent:
    """A listener that keeps quiet. Others are made like it."""

    def started(self, session: TrainingSession, step: int) -> None:
        """Called before the first step of a training session; `step`: steps that were done before."""

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Called every few steps with the mean loss since the last call."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """Called with the record of each evaluation, a line of the metrics file."""

    def note(self, text: str) -> None:
        """Called with what the user should know meanwhile."""


def train(
    preset: str | Preset = "baby",
    *,
    path: str | Path = "runs",
    backend: str = "auto",
    device: str | None = None,
    workers: int | None = None,
    tf32: bool = False,
    memory_gib: float | None = None,
    listener: Any = None,
    **overrides: Any,
) -> Run:
    """Train a preset and keep the run under `path`. `overrides`: fields of its configs (n_ctx=32, data="a.txt").

    workers: processes that share each step, None for a number that suits. tf32: products of matrices with fewer
    digits, memory_gib: most memory to take, both of the cupy backend alone. Ctrl-C, SIGTERM and SIGHUP end it
    after the step at hand; the run's config["result"]["state"] is then "stopped", and `resume` goes on with it.
    Raises BabyError for input that cannot be used, and if the loss stops being a number: the last checkpoint
    is then kept, if there was one after the start, and otherwise nothing.
    """
    chosen = override(preset_of(preset), overrides)
    _check_place(workers, listener)
    limits.check_context(chosen)
    with store.new_run(path) as new:
        loaded = registry.load(backend, device, chosen.train.dtype, tf32=tf32, memory_gib=memory_gib)
        learned = dataset.prepare(chosen.data, chosen.model, chosen.train, new.files.folder / "corpora")
        new.undo.callback(learned.discard)
        model = Model(chosen.model, learned.tokenizer.vocab_size)
        check_size(chosen, model, loaded, learned, workers)
        start = checkpoint.first(model, chosen.train)
        return _sit(new, chosen, model, learned, loaded, device, workers, listener, start)


def finetune(
    name: str = "last",
    *,
    data: str | Path,
    path: str | Path = "runs",
    backend: str = "auto",
    device: str | None = None,
    workers: int | None = None,
    tf32: bool = False,
    memory_gib: float | None = None,
    listener: Any = None,
    **overrides: Any,
) -> Run:
    """Train the best weights of a run on another text, as a new run: <guid>_finetuned.

    Characters that the run did not know get new ids after the old ones, with embeddings drawn as at the start.
    The text is measured before the first step too. overrides: fields of TrainConfig, and dropout; the others
    are `finetuning` of the run's. Raises BabyError as `train` does, and for a run of the equation model.
    """
    _check_place(workers, listener)
    base = load(name, path=path, backend="numpy")
    chosen = override(finetuning(base), {**overrides, "data": data})
    if _sizes(chosen.model) != _sizes(base.model.config):
        raise BabyError("finetuning keeps the sizes of the model; only dropout can be changed")
    if chosen.data.tokenizer != base.tokenizer.kind:
        raise BabyError(f"finetuning keeps the tokenizer, which is {base.tokenizer.kind}: leave out tokenizer")
    with store.new_run(path, base=base.guid) as new:
        loaded = registry.load(backend, device, chosen.train.dtype, tf32=tf32, memory_gib=memory_gib)
        learned = dataset.prepare(
            chosen.data, chosen.model, chosen.train, new.files.folder / "corpora", _extending(base.tokenizer)
        )
        new.undo.callback(learned.discard)
        model = Model(chosen.model, learned.tokenizer.vocab_size)
        check_size(chosen, model, loaded, learned, workers)
        flat = params.grown(model.spec, chosen.train.seed, base.model.layout, base.params)
        start = checkpoint.first(model, chosen.train, flat)
        return _sit(new, chosen, model, learned, loaded, device, workers, listener, start, base.guid)


def resume(
    name: str = "last",
    *,
    path: str | Path = "runs",
    backend: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    tf32: bool | None = None,
    memory_gib: float | None = None,
    data: str | Path | None = None,
    listener: Any = None,
    **overrides: Any,
) -> Run:
    """Go on with a run from its last checkpoint, as if it had never stopped.

    On the same backend, with the same tf32 and number of workers, as it does unless others are given, the end is
    the same bit for bit. data: where the text lies now; it must be the same text. overrides: those of RESUMABLE.
    Raises BabyError if there is nothing to go on with, or the text is another one.
    """
    files = store.find(path, name)
    with store.hold(files):
        config, tokenizer, chosen = _read(files)
        place = config["place"]
        chosen = override(chosen, overrides)
        _check_resumable(files, config, overrides)
        model = Model(chosen.model, tokenizer.vocab_size)
        start, metadata = arrays.load_state(files.state, model.n_parameters, chosen.train.dtype)
        _check_belongs(files.state, metadata, files, chosen, tokenizer)
        known = config["data"]
        text = dataset.of_run(chosen.data, known["file"], known["sha256"]) if data is None else None
        chosen = replace(chosen, data=text or replace(chosen.data, data=data))
        if backend in (None, place["backend"]):
            device = place["device"] if device is None else device
            tf32 = place.get("tf32") if tf32 is None else tf32
        options = {"tf32": tf32, "memory_gib": memory_gib}
        loaded = registry.load(backend or place["backend"], device, chosen.train.dtype, **options)
        learned = dataset.prepare(
            chosen.data, chosen.model, chosen.train, files.folder / "corpora", tokenizer, known["sha256"]
        )
        if workers is None and loaded.name == place["backend"]:
            workers = place["workers"]
        return _sit(
            NewRun(files), chosen, model, learned, loaded, device, workers, listener, start,
            config["base"], config["started"],
        )  # fmt: skip


def load(
    name: str = "last",
    *,
    path: str | Path = "runs",
    backend: str = "auto",
    device: str | None = None,
    weights: Literal["best", "last"] = "best",
    tf32: bool = False,
    memory_gib: float | None = None,
) -> Run:
    """A run by its GUID, an unambiguous beginning of it, or "last".

    weights: those with the best validation loss, or those of the last checkpoint. tf32, memory_gib: as in `train`.
    Raises BabyError if the run cannot be loaded, or its files do not belong together.
    """
    weights = checks.choice("weights", weights, ("best", "last"))
    files = store.find(path, name)
    config, tokenizer, chosen = _read(files)
    if weights == "last" and config["result"]["state"] == "imported":
        raise BabyError(f"run {files.guid} was imported: it has the weights that it came with, and no last ones")
    model = Model(chosen.model, tokenizer.vocab_size)
    if weights == "best":
        flat, metadata = arrays.load_weights(files.model, model.layout)
        _check_belongs(files.model, metadata, files, chosen, tokenizer)
    else:
        last, metadata = arrays.load_state(files.state, model.n_parameters, chosen.train.dtype)
        _check_belongs(files.state, metadata, files, chosen, tokenizer)
        flat = last.state["params"]
    loaded = registry.load(backend, device, chosen.train.dtype, tf32=tf32, memory_gib=memory_gib)
    return Run(files, model, tokenizer, flat, config, loaded)


def import_littlebaby(
    model: str | Path,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    path: str | Path = "runs",
    dtype: Literal["float64", "float32"] = "float64",
) -> Run:
    """Make a run of a model of the original Little Baby: its model_<guid>.json, config and tokenizer.

    config, tokenizer: where they are, if not beside the model or in the original's folders. The run keeps the
    original's GUID, where its files are named by one. It generates and can be finetuned; there is nothing to
    resume. dtype: the original computes in float64. Raises BabyError if the files do not hold one whole model.
    """
    beside = [one and as_path(one, what) for one, what in ((config, "config"), (tokenizer, "tokenizer"))]
    found = littlebaby.read(as_path(model, "model"), *beside)
    # the original's rate is constant and without warm-up; decay and moments are those of its optimizer
    settings = {"num_epochs": 1, "schedule": "constant", "warmup_steps": 0, "beta2": 0.999, "weight_decay": 0.01}
    train_config = TrainConfig(**{**settings, **found.train, "dtype": dtype})
    chosen = Preset("littlebaby", "a model of the original", found.config, train_config, DataConfig(str(model)))
    own = Model(found.config, found.tokenizer.vocab_size)
    with store.new_run(path, guid=found.guid) as new:
        return keep_imported(new.files, chosen, own, found.tokenizer, found.params.astype(dtype))


def export_littlebaby(run: Run, folder: str | Path) -> list[Path]:
    """Write a run as files of the original Little Baby, in the folders where its notebook looks -> the files.

    Raises BabyError for a model that the original cannot hold, and if such a file is there already.
    """
    chosen = settings_of(run.config, str(run.files.config))
    folder = as_path(folder, "folder")
    return littlebaby.write(folder, run.guid, chosen.model, run.tokenizer, run.params, chosen.train)


def list_runs(path: str | Path = "runs") -> list[Summary]:
    """All runs under `path`, the one last trained first."""
    return table.summaries(path)


def preset_of(preset: str | Preset) -> Preset:
    """A preset by its name, or as it was given. Raises BabyError for what is neither."""
    return preset if isinstance(preset, Preset) else find_preset(checks.text("preset", preset))


def override(chosen: Preset, overrides: dict[str, Any]) -> Preset:
    """The preset with some fields of its model, train or data config replaced.

    Who names num_epochs and no num_steps means epochs: num_steps of the preset no longer holds. Where the table
    of equations is another one, it is given a held-out case of its own. Raises BabyError for an unknown setting,
    and for one that would change nothing.
    """
    known = {part: {f.name for f in fields(getattr(chosen, part))} for part in ("model", "train", "data")}
    unknown = [name for name in overrides if not any(name in names for names in known.values())]
    if unknown:
        raise BabyError(f"preset {chosen.name} has no setting {unknown[0]!r}")
    if overrides.get("num_epochs") is not None and "num_steps" not in overrides:
        overrides = {**overrides, "num_steps": None}
    parts = {
        part: replace(getattr(chosen, part), **{name: overrides[name] for name in names & overrides.keys()})
        for part, names in known.items()
    }
    found = replace(chosen, **parts)
    _refuse_what_changes_nothing(found, overrides)
    data, of_table = found.data, {"max_sum", "digits", "operators"}
    if isinstance(data, EquationData) and of_table & overrides.keys() and "held_out" not in overrides:
        found = replace(found, data=replace(data, held_out=data.table.suitable(data.held_out)))
    return found


def _refuse_what_changes_nothing(chosen: Preset, overrides: dict[str, Any]) -> None:
    """Raises BabyError for a setting that was asked for and has no effect beside the others."""
    train, data = chosen.train, chosen.data
    of_equations = isinstance(data, EquationData)
    if "stride" in overrides and train.stride != 1:
        what = f"stride {train.stride} has no effect"
        if of_equations:
            raise BabyError(f"{what} on equations, which are not cut out of a text: leave out --stride")
        if train.num_epochs is None:
            raise BabyError(f"{what} on windows from random places: give --num-epochs too, or leave out --stride")
    if "min_lr" in overrides and train.schedule == "constant":
        raise BabyError(
            "min_lr has no effect on a constant learning rate: choose --schedule cosine, or leave out --min-lr"
        )
    if "max_sum" in overrides and of_equations and data.max_sum and "+" not in data.operators:
        raise BabyError("max_sum has no effect without sums: add + to --operators, or leave out --max-sum")


def finetuning(base: Run) -> Preset:
    """The settings with which a run is finetuned where nothing else is said: its own, for fewer steps."""
    chosen = settings_of(base.config, str(base.files.config))
    if isinstance(chosen.model, EquationConfig):
        raise BabyError("the equation model cannot be finetuned: its vocabulary and data are fixed")
    peak = chosen.train.peak_lr
    train = replace(
        chosen.train, num_steps=FINETUNE_STEPS, num_epochs=None, lr=peak, base_batch_size=None, min_lr=peak / 10,
        schedule="cosine", warmup_steps=50, eval_every=100, max_minutes=0.0,
    )  # fmt: skip
    return replace(chosen, train=train, data=DataConfig(tokenizer=base.tokenizer.kind))


def _read(files: RunFiles) -> tuple[dict[str, Any], Tokenizer, Preset]:
    """Config, tokenizer and settings of a run, if they belong together."""
    config = store.read_sealed(files.config)
    expected = {"guid", "preset", "base", "started", "model", "train", "data", "place", "result", "vocab_size"}
    if not expected <= config.keys() or config["guid"] != files.guid:
        raise BabyError(f"{files.config} is not the config of run {files.guid}; the file is from elsewhere")
    tokenizer = tokenizer_from_dict(store.read_json(files.tokenizer), str(files.tokenizer))
    if tokenizer.vocab_size != config["vocab_size"]:
        raise BabyError(
            f"{files.tokenizer} has {tokenizer.vocab_size} ids, the model {config['vocab_size']!r}: "
            "they do not belong together"
        )
    return config, tokenizer, settings_of(config, str(files.config))


def _check_belongs(path: Path, metadata: dict[str, str], files: RunFiles, chosen: Preset, tokenizer) -> None:
    """Raises BabyError unless the arrays at `path` were written for this run, model and tokenizer."""
    for name, value in belonging(files.guid, chosen.model, tokenizer).items():
        if metadata.get(name) != value:
            raise BabyError(f"{path} was written with another {name}: the files of run {files.guid} were mixed up")


def _check_resumable(files: RunFiles, config: dict[str, Any], overrides: dict[str, Any]) -> None:
    for name in overrides:
        if name not in RESUMABLE:
            raise BabyError(f"{name} cannot be changed in a run that is resumed; {', '.join(RESUMABLE)} can")
    result, asked = config["result"], overrides.get("num_steps") or 0
    if result["state"] == "imported":
        raise BabyError(f"run {files.guid} was imported, there is nothing to go on with; finetune it on a text")
    if result["state"] == "done" and result["reason"] == "patience" and "patience" not in overrides:
        raise BabyError(
            f"run {files.guid} ended as its validation loss no longer fell; to go on give another --patience"
        )
    if result["state"] == "done" and result["reason"] == "steps" and asked <= result["steps"]:
        raise BabyError(
            f"run {files.guid} is done with all its {result['steps']} steps; to go on give more --num-steps"
        )
    if 0 < asked < result["steps"]:
        raise BabyError(f"run {files.guid} has done {result['steps']} steps already; num_steps {asked} is too few")


def _sit(
    new: NewRun,
    chosen: Preset,
    model: Model,
    learned: dataset.Dataset,
    backend: Backend,
    device: str | None,
    workers: int | None,
    listener: Any,
    start: checkpoint.Checkpoint,
    base: str | None = None,
    started: str = "",
) -> Run:
    """One training session of a run: a new one's first, or one that goes on."""

    def keep() -> None:
        new.keep = True

    number = number_of_workers(workers, backend, model, chosen.train.batch_size)
    chosen = replace(chosen, train=replace(chosen.train, num_steps=learned.num_steps))
    session = TrainingSession(
        new.files, chosen, model, learned, backend, device, number, _listening(listener), base, started, keep
    )
    return session.run(start)


def _check_place(workers: Any, listener: Any) -> None:
    """Raises BabyError, before anything is read or written, for what could be no number of workers or listener."""
    if workers is not None:
        checks.whole("workers", workers, most=checks.most_processes())
    _listening(listener)


def _listening(listener: Any) -> Any:
    """The listener, or a silent one. Raises BabyError for an object that cannot be told of training."""
    if listener is None:
        return Silent()
    for name in ("started", "progress", "evaluated", "note"):
        if not callable(getattr(listener, name, None)):
            kind = checks.shown_value(listener)
            raise BabyError(f"listener must have the methods of baby_xp.api.Silent; {kind} has no {name}")
    return listener


def _extending(tokenizer: Tokenizer) -> Any:
    """Makes of a text's chunks the tokenizer that knows its characters too."""
    if not isinstance(tokenizer, CharTokenizer):
        return tokenizer
    return lambda chunks: tokenizer.extended(CharTokenizer.from_text(chunks).vocab)


def _sizes(config: Any) -> Any:
    return replace(config, dropout=0.0)


def check_size(
    chosen: Preset, model: Model, backend: Backend, learned: dataset.Dataset, workers: int | None
) -> None:
    """Raises BabyError for a run that does not fit this machine, before anything of it is made."""
    limits.check_size(model)
    number = number_of_workers(workers, backend, model, chosen.train.batch_size)
    limits.check_training(chosen, model, backend, learned.batches, number)


def number_of_workers(asked: int | None, backend: Backend, model: Model, batch_size: int) -> int:
    """Processes that share a step: as many as were asked for, or as suit. Raises BabyError if that cannot be."""
    if asked is None:
        return suitable_number(backend, model, batch_size)
    asked = checks.whole("workers", asked, most=checks.most_processes())
    if asked > 1 and backend.name != "numpy":
        raise BabyError(f"workers are processes of the numpy backend; with {backend.name} leave out --workers")
    return min(asked, batch_size)
