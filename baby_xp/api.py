"""The program from Python: train a preset, load a run, finetune it, resume it, measure it, generate.

import baby_xp

run = baby_xp.train("baby", num_steps=500)
print(run.generate("This is ", num_tokens=200))
print(baby_xp.load("last").generate("Here comes "))
tuned = baby_xp.finetune("last", data="my.txt")
print(tuned.evaluate())
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack

from baby_xp import checks, layout, presets
from baby_xp.arrays import params
from baby_xp.compute import Compute, Distribution
from baby_xp.config import DataConfig, EquationConfig, GPTConfig, RunConfig, TrainConfig
from baby_xp.convert import littlebaby
from baby_xp.distributed import Group, Kind, launchers
from baby_xp.distributed.group import Lost
from baby_xp.errors import BabyError
from baby_xp.files import as_path, write_json
from baby_xp.models import Model
from baby_xp.presets import FinetuneSettings, ResumeSettings, Settings
from baby_xp.run import Run
from baby_xp.runs import config_file, sharing, state_file, store, table
from baby_xp.runs.config_file import StoredRun
from baby_xp.runs.creation import NewRun, new_run
from baby_xp.runs.table import Summary
from baby_xp.session import session_of
from baby_xp.text import dataset
from baby_xp.text.tokenizer import CharTokenizer, Tokenizer
from baby_xp.training import checkpoint
from baby_xp.training.checkpoint import Checkpoint
from baby_xp.training.listener import listening
from baby_xp.training.plan import Plan
from baby_xp.training.setup import Setup, prepare

FINETUNE_STEPS = 500
RESUMABLE = tuple(ResumeSettings.__annotations__)
"""Settings that may be changed when a run is resumed."""


def train(
    preset: str | RunConfig = "baby",
    *,
    path: str | Path = "runs",
    backend: str = "auto",
    device: str | None = None,
    workers: int | None = None,
    tf32: bool = False,
    memory_gib: float | None = None,
    kernels: Literal["fast", "numpy", "plain"] = "fast",
    distributed: Kind = "none",
    restarts: int = 0,
    listener: Any = None,
    **overrides: Unpack[Settings],
) -> Run:
    """Train a preset and keep the run under `path`. `overrides`: fields of its configs (n_ctx=32, data="a.txt").

    backend, device, workers, tf32, memory_gib, kernels: see Compute; distributed, restarts: see Distribution. Of
    several ranks, the first alone writes files and informs the listener. listener: see Listener. Ctrl-C, SIGTERM,
    SIGHUP and SIGUSR1 end it after the current step; the run's config["result"]["state"] is then "stopped", and
    `resume` continues it.
    Raises BabyError for input that cannot be used, and if the loss becomes NaN or infinite: the last checkpoint
    is then kept, if there was one after the start, and otherwise nothing.
    """
    config = presets.preset(preset).override(overrides)
    compute, listener = Compute(backend, device, tf32, memory_gib, kernels, workers), listening(listener)
    ranks = Distribution(distributed, restarts)

    def begin(group: Group) -> Run:
        with sharing.new_run(group, path) as new:
            setup = _prepared(new, config, compute, group)
            start = sharing.start(group, lambda: checkpoint.first(setup.model, setup.config.train))
            return session_of(new, setup, Plan.of(setup), listener).run(start)

    return _together(ranks, begin, path, vars(compute), listener, config)


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
    kernels: Literal["fast", "numpy", "plain"] = "fast",
    distributed: Kind = "none",
    restarts: int = 0,
    listener: Any = None,
    **overrides: Unpack[FinetuneSettings],
) -> Run:
    """Train the best weights of a run on another text, as a new run: <guid>_finetuned.

    Characters that the run does not know get new ids after the old ones, with newly initialised embeddings. The
    loss on the text is also measured before the first step. overrides: fields of TrainConfig, and dropout; the
    defaults are those of `finetuning`. Raises BabyError as `train` does, and for a run of the equation model.
    """
    compute, listener = Compute(backend, device, tf32, memory_gib, kernels, workers), listening(listener)
    ranks = Distribution(distributed, restarts)
    base = _base(ranks.join(), name, path)
    config = finetuning(base, overrides.get("lr")).override({**overrides, "data": data})
    models = config.model, base.settings.model
    sizes = {replace(gpt, dropout=0.0) for gpt in models if isinstance(gpt, GPTConfig)}
    if len(sizes) > 1:
        raise BabyError("finetuning keeps the sizes of the model; only dropout can be changed")
    if config.data.tokenizer != base.tokenizer.kind:
        raise BabyError(f"finetuning keeps the tokenizer, which is {base.tokenizer.kind}: leave out tokenizer")

    def begin(group: Group) -> Run:
        with sharing.new_run(group, path, base.guid) as new:
            setup = _prepared(new, config, compute, group, _extending(base.tokenizer))
            flat = params.grown(setup.model.spec, config.train.seed, base.model.layout, base.params)
            start = sharing.start(group, lambda: checkpoint.first(setup.model, setup.config.train, flat))
            plan = Plan.of(setup, evaluate_first=True)
            return session_of(new, setup, plan, listener, base.guid).run(start)

    return _together(ranks, begin, path, vars(compute), listener, config, base.guid)


def resume(
    name: str = "last",
    *,
    path: str | Path = "runs",
    backend: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    tf32: bool | None = None,
    memory_gib: float | None = None,
    kernels: Literal["fast", "numpy", "plain"] | None = None,
    data: str | Path | None = None,
    distributed: Kind = "none",
    restarts: int = 0,
    listener: Any = None,
    **overrides: Unpack[ResumeSettings],
) -> Run:
    """Continue a run from its last checkpoint, as if it had never stopped.

    The backend, tf32, kernels and number of workers are those of the run unless others are given; with the same
    ones, and the same number of ranks, the end is the same bit for bit. data: the current path of the same text.
    distributed, restarts: see Distribution. overrides: see RESUMABLE.
    Raises BabyError if there is nothing to resume, or the text has changed.
    """
    listener, ranks = listening(listener), Distribution(distributed, restarts)
    where = {
        "backend": backend, "device": device, "workers": workers, "tf32": tf32, "memory_gib": memory_gib,
        "kernels": kernels,
    }  # fmt: skip

    def begin(group: Group) -> Run:
        return _resumed(group, name, path, where, data, listener, overrides)

    return _together(ranks, begin, path, where, listener)


def load(
    name: str = "last",
    *,
    path: str | Path = "runs",
    backend: str = "auto",
    device: str | None = None,
    weights: Literal["best", "last"] = "best",
    tf32: bool = False,
    memory_gib: float | None = None,
    kernels: Literal["fast", "numpy", "plain"] = "fast",
) -> Run:
    """A run by its GUID, an unambiguous beginning of it, or "last".

    weights: those with the best validation loss, or those of the last checkpoint. The rest: as in `train`.
    Raises BabyError if the run cannot be loaded, or its files do not belong together.
    """
    compute = Compute(backend, device, tf32, memory_gib, kernels)
    checks.choice("weights", weights, ("best", "last"))
    stored = config_file.read(store.find(path, name))
    files, config = stored.files, stored.config
    model = Model(config.model, stored.tokenizer.vocab_size)
    if weights == "best":
        flat, metadata = state_file.load_weights(files.model, model.layout)
        state_file.check_belonging(files.model, metadata, stored.belonging)
    elif stored.content["result"]["state"] == "imported":
        raise BabyError(f"run {files.guid} was imported and has no last checkpoint: load its best weights")
    else:
        flat = _read_state(stored).state["params"]
    return Run(model, stored.tokenizer, flat, compute.load(config.train.dtype), files, stored.content, config)


def import_littlebaby(
    model: str | Path,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    path: str | Path = "runs",
    dtype: Literal["float64", "float32"] = "float64",
) -> Run:
    """Make a run of a model of the original Little Baby: its model_<guid>.json, config and tokenizer.

    config, tokenizer: their paths, if not beside the model or in the original's folders. The run keeps the
    original's GUID if the files are named by one. It can generate and be finetuned, but not resumed. dtype: the
    original computes in float64. Raises BabyError if the files do not contain one complete model.
    """
    beside = [as_path(one, what) if one else None for one, what in ((config, "config"), (tokenizer, "tokenizer"))]
    found = littlebaby.read(as_path(model, "model"), *beside)
    # the original has a constant rate without warm-up; beta2 and weight decay are those of its optimizer
    settings = {"num_epochs": 1, "schedule": "constant", "warmup_steps": 0, "beta2": 0.999, "weight_decay": 0.01}
    train_config = TrainConfig(**{**settings, **found.train, "dtype": dtype})
    run_config = RunConfig("littlebaby", found.config, train_config, DataConfig(str(model)))
    own, flat = Model(found.config, found.tokenizer.vocab_size), found.params.astype(dtype)
    backend = Compute("numpy").load(dtype)
    result = {"state": "imported", "reason": "", "steps": 0, "val_loss": None}
    with new_run(path, guid=found.guid) as new:
        files = new.files
        write_json(files.tokenizer, found.tokenizer.to_dict())
        belongs = state_file.belonging(files.guid, found.config, found.tokenizer)
        state_file.save_weights(files.model, own.layout, flat, {**belongs, "step": "0"})
        content = config_file.content(files, run_config, own, backend, config_file.now(), result)
        store.write_sealed(files.config, content)
        return Run(own, found.tokenizer, flat, backend, files, content, run_config)


def export_littlebaby(run: Run, folder: str | Path) -> list[Path]:
    """Write a run as files of the original Little Baby, in the folders that its notebook reads -> the files.

    Raises BabyError for a model that the original does not support, and if such a file already exists.
    """
    folder, settings = as_path(folder, "folder"), run.settings
    return littlebaby.write(folder, run.guid, settings.model, run.tokenizer, run.params, settings.train)


def list_runs(path: str | Path = "runs") -> list[Summary]:
    """All runs under `path`, the one last trained first."""
    return table.summaries(path)


def finetuning(base: Run, lr: float | None = None) -> RunConfig:
    """The default settings for finetuning a run: its own, for fewer steps. lr: the rate, by default the run's."""
    config = base.settings
    if isinstance(config.model, EquationConfig):
        raise BabyError("the equation model cannot be finetuned, as its vocabulary is fixed: train a new one")
    peak = config.train.peak_lr
    train = replace(
        config.train, num_steps=FINETUNE_STEPS, num_epochs=None, lr=peak if lr is None else lr,
        base_batch_size=None, min_lr=0.0, muon_lr=config.train.muon_lr * (peak / config.train.lr),
        schedule="cosine", warmup_steps=50, eval_every=100, max_minutes=0.0,
    )  # fmt: skip
    train = replace(train, min_lr=train.lr / 10)
    return replace(config, train=train, data=DataConfig(tokenizer=config.data.tokenizer))


def _prepared(
    new: NewRun, config: RunConfig, compute: Compute, group: Group, tokenizer: Any = None
) -> Setup:
    """The setup of a new run, whose ids are removed if the run fails before its first checkpoint."""
    folder = sharing.folder_for_ids(group, new.files)
    setup = sharing.alike_on_all(group, lambda: prepare(config, compute, folder, tokenizer, group=group))
    new.undo.callback(setup.dataset.discard)
    return setup


Where = dict[str, Any]
"""Fields of Compute by name, None where a resumed run is to compute as before."""


def _resumed(
    group: Group, name: str, path: str | Path, where: Where, data: str | Path | None, listener: Any,
    overrides: ResumeSettings,
) -> Run:  # fmt: skip
    """As resume, on one of the ranks."""
    with ExitStack() as held:

        def find() -> StoredRun:
            files = store.find(path, name)
            held.enter_context(store.hold(files))
            stored = config_file.read(files)
            stored.config.override(overrides)
            _check_resumable(stored, overrides)
            return stored

        stored = sharing.stored(group, path, find)
        start = sharing.start(group, lambda: _read_state(stored))
        files, config = stored.files, stored.config.override(overrides)
        base, text = stored.content["base"], stored.content["data"]
        place = stored.content["place"]
        compute = _as_before(place, group.size, **where)

        def make() -> Setup:
            if data is None:
                found = dataset.of_run(config.data, text["file"], text["sha256"])
            else:
                found = replace(config.data, data=checks.path("data", data))
            more = sharing.folder_for_ids(group, files), stored.tokenizer, text["sha256"]
            return prepare(replace(config, data=found), compute, *more, check_memory=False, group=group)

        setup = sharing.alike_on_all(group, make)
        if group.rank == 0 and group.size != place.get("ranks", 1):
            before, now = (layout.counted(number, "rank") for number in (place.get("ranks", 1), group.size))
            changed = f"{before} before, {now} now"
            listener.note(f"{changed}: sums are rounded otherwise, and the last digits may differ")
        plan = Plan.of(setup, evaluate_first=base is not None)
        session = session_of(NewRun(files), setup, plan, listener, base, stored.content["started"])
        return session.run(start)


def _base(group: Group, name: str, path: str | Path) -> Run:
    """The best weights of a run to finetune, which rank 0 loads."""
    if group.size == 1:
        return load(name, path=path, backend="numpy")
    stored = sharing.stored(group, path, lambda: config_file.read(store.find(path, name)))
    flat = group.first(lambda: load(stored.files.guid, path=path, backend="numpy").params)
    config, tokenizer = stored.config, stored.tokenizer
    backend = Compute("numpy").load(config.train.dtype)
    return Run(
        Model(config.model, tokenizer.vocab_size), tokenizer, flat, backend, stored.files, stored.content, config
    )


def _together(
    ranks: Distribution, begin: Callable[[Group], Run], path: str | Path, where: Where, listener: Any,
    config: RunConfig | None = None, base: str | None = None,
) -> Run:  # fmt: skip
    """The run that `begin` trains; after each lost rank, what the others go on with from its last checkpoint.

    config, base: of a new run, which an earlier attempt of a job that was started again may have begun.
    """
    group = ranks.join()
    try:
        if group.device and where["device"]:
            given = f"--distributed {group.kind} gives each rank a GPU of its own"
            raise BabyError(f"{given}: leave out --device, here {where['device']}")
        if config and ranks.distributed != "none" and any(group.all_gather(launchers.started_again())):
            found = group.first(lambda: config_file.of_this_job(as_path(path, "path"), config, base))
            if found and group.rank == 0:
                listener.note(f"started again: going on with run {found} from its last checkpoint")
            begin = _after(found, begin, path, where, listener)
        for _ in range(ranks.restarts):
            try:
                return begin(group)
            except Lost as lost:
                if not group.mend():
                    raise
                if group.rank == 0:
                    listener.note(f"{lost}; going on with {layout.counted(group.size, 'rank')}")
                begin = _after(group.broadcast(lost.guid), begin, path, where, listener)
        return begin(group)
    except BaseException:
        group.fail()
        raise


def _after(
    guid: str | None, begin: Callable[[Group], Run], path: str | Path, where: Where, listener: Any
) -> Callable[[Group], Run]:
    """How to go on with a run: from its last checkpoint, or once more from the start if there is none."""
    return begin if guid is None else lambda group: _resumed(group, guid, path, where, None, listener, {})


def _read_state(stored: StoredRun) -> Checkpoint:
    """The last checkpoint of a run. Raises BabyError if it cannot be read, or is another run's."""
    path, config = stored.files.state, stored.config
    size = Model(config.model, stored.tokenizer.vocab_size).n_parameters
    found, metadata = state_file.load_state(path, size, config.train.dtype)
    state_file.check_belonging(path, metadata, stored.belonging)
    return found


def _as_before(
    place: dict[str, Any],
    ranks: int,
    backend: str | None,
    device: str | None,
    workers: int | None,
    tf32: bool | None,
    memory_gib: float | None,
    kernels: Literal["fast", "numpy", "plain"] | None,
) -> Compute:
    """Where a resumed run computes: as before, except for the options that are given. Another number of ranks may
    suit another number of workers."""
    if backend in (None, place["backend"]):
        device = place["device"] if device is None else device
        tf32 = place.get("tf32") if tf32 is None else tf32
        if workers is None and ranks == place.get("ranks", 1):
            workers = place["workers"]
    kernels = kernels or place.get("kernels", "fast")
    return Compute(backend or place["backend"], device, bool(tf32), memory_gib, kernels, workers)


def _check_resumable(stored: StoredRun, overrides: ResumeSettings) -> None:
    for name in overrides:
        if name not in RESUMABLE:
            raise BabyError(f"{name} cannot be changed in a run that is resumed; {', '.join(RESUMABLE)} can")
    run, result, asked = f"run {stored.files.guid}", stored.content["result"], overrides.get("num_steps") or 0
    if result["state"] == "imported":
        raise BabyError(f"{run} was imported and has no training to resume; finetune it on a text")
    if result["state"] == "done" and result["reason"] == "patience" and "patience" not in overrides:
        cause = "its validation loss stopped improving"
        raise BabyError(f"{run} ended because {cause}; to continue, change --patience")
    if result["state"] == "done" and result["reason"] == "steps" and asked <= result["steps"]:
        raise BabyError(f"{run} has finished all {result['steps']} steps; to continue, raise --num-steps")
    if 0 < asked < result["steps"]:
        done = result["steps"]
        raise BabyError(f"{run} has already done {done} steps: num_steps must be at least {done}, not {asked}")


def _extending(tokenizer: Tokenizer) -> Any:
    """What makes a tokenizer from the chunks of a text: this one, with the text's new characters appended."""
    if not isinstance(tokenizer, CharTokenizer):
        return tokenizer
    return lambda chunks: tokenizer.extended(CharTokenizer.from_text(chunks).vocab)
