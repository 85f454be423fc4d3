"""What a run will take, before it is begun: counts that are exact, and a trial that is measured.

Sizes, floating-point operations and the bytes of arrays follow from shapes alone, see counts.py. Time and the
memory of whole processes do not: libraries, copies of arrays, what the allocator keeps. So a trial trains with the
very settings for a few seconds in a process of its own, evaluates, shows a sample and writes checkpoints, in a
folder that goes again.
"""

import shutil
import statistics
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from baby_xp import api, checks, processes
from baby_xp import config as configs
from baby_xp.arrays import registry
from baby_xp.config import LARGEST, EquationConfig, Preset, TrainConfig
from baby_xp.errors import BabyError, OutOfMemory
from baby_xp.files import refusal
from baby_xp.models import Model
from baby_xp.resources import counts, limits, process_memory
from baby_xp.session import SAMPLE_TOKENS
from baby_xp.text import dataset
from baby_xp.text.batches import EpochWindows
from baby_xp.text.dataset import Dataset
from baby_xp.training.loop import EVALUATION_TOKENS

SECONDS, MOST_SECONDS, READINGS = 4.0, 60.0, 2
"""How long the trial trains when it is warm, and in all at most; and how often it reads the loss at least."""
CHECKPOINT_SECONDS = 1.0
"""Between the checkpoints of the trial. Where freed memory is reused is partly chance: it takes several of them
to see what the many of a long run come to."""
GENERATED = 64
"""Tokens that the trial generates."""
TOKENS_A_PARAMETER = (20, 40)
"""The Little Baby's rule for the tokens to train on."""
MIB = 2**20
TASK = "baby_xp.estimation.estimate:serve"


# the estimate -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What is known of a run once its text was read."""

    backend: str
    workers: int
    vocab_size: int
    num_steps: int
    step_size: int
    """Sequences in a step; in the last one of an epoch there may be fewer."""
    sequences: int
    """Sequences in the whole run."""
    n_validation: int
    corpus_bytes: int
    """Length of the file of ids."""
    tokens_at_once: int | None
    """Tokens of a batch that the backend computes together; None: all."""


@dataclass(frozen=True)
class Trial:
    """What a short run with the same settings took."""

    ms_a_step: float
    """Median over the readings after the first."""
    tokens_per_second: float
    evaluation_seconds: float
    """Of one batch of the validation part."""
    token_seconds: float
    """Of a token that is generated."""
    checkpoint_seconds: float
    start_seconds: float
    memory: int | None
    """Bytes that all processes took at their peak, less those of a bare interpreter each; None without /proc."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take. Counts are exact; what comes of `trial`, None if nothing was measured, is about."""

    preset: Preset
    facts: Facts
    trial: Trial | None

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters by kind."""
        return counts.parameters(self.preset.model, self.facts.vocab_size)

    @property
    def n_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def tokens(self) -> int:
        """Tokens that the whole run trains on, each as often as it comes."""
        return self.facts.sequences * self.preset.model.n_ctx

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products of all training steps."""
        return counts.step_flops(self.preset.model, self.facts.vocab_size, self.facts.sequences)

    @property
    def arrays(self) -> dict[str, int]:
        """Bytes of the arrays of training by kind."""
        together = min(self.preset.train.batch_size, self.facts.step_size)
        sizes = self.facts.vocab_size, together, self.facts.workers, self._itemsize
        return counts.arrays(self.preset.model, *sizes, self.facts.tokens_at_once)

    @property
    def cache(self) -> int:
        """Bytes of the key-value cache of generation at full context."""
        return counts.cache_bytes(self.preset.model, self._itemsize)

    @property
    def memory(self) -> int | None:
        """Bytes that the run's processes take at their peak, less a bare interpreter's; None if not measured."""
        return self.trial and self.trial.memory

    @property
    def disk(self) -> int:
        """Bytes of the files: the text's ids, the best weights, and a checkpoint with weights, moments and the
        best weights once more."""
        return self.facts.corpus_bytes + 5 * self._itemsize * self.n_parameters

    @property
    def seconds(self) -> dict[str, float] | None:
        """Of the whole run, by what it does; None if nothing was measured."""
        return _seconds(self.preset, self.facts, self.trial) if self.trial else None

    @property
    def _itemsize(self) -> int:
        return {"float32": 4, "float64": 8}[self.preset.train.dtype]


def estimate(
    preset: str | Preset = "baby",
    *,
    backend: str = "auto",
    device: str | None = None,
    workers: int | None = None,
    tf32: bool = False,
    memory_gib: float | None = None,
    measure: bool = True,
    **overrides: Any,
) -> Estimate:
    """What `train` with the same arguments will take. measure: also try it, which takes some seconds.

    Nothing is left behind. Raises BabyError for what `train` would not take either, or if the trial fails. Without
    `measure`, a run that is too large for this machine is counted all the same.
    """
    chosen = api.override(api.preset_of(preset), overrides)
    options = {
        "tf32": checks.flag("tf32", tf32),
        "memory_gib": None if memory_gib is None else checks.number("memory_gib", memory_gib, above=0),
    }
    workers = None if workers is None else checks.whole("workers", workers, most=checks.most_processes())
    with _scratch_folder() as folder:
        if measure:
            facts, trial = _tried(chosen, backend, device, workers, options, folder)
        else:
            facts, trial = _looked_up(chosen, backend, device, workers, options, Path(folder)), None
    return Estimate(replace(chosen, train=replace(chosen.train, num_steps=facts.num_steps)), facts, trial)


def _scratch_folder() -> tempfile.TemporaryDirectory:
    try:
        return tempfile.TemporaryDirectory(prefix="baby_xp_", ignore_cleanup_errors=True)
    except OSError as error:
        raise refusal(error.filename or "the folder for temporary files", error, "written", "TMPDIR") from None


def _looked_up(
    chosen: Preset, backend: str, device: str | None, workers: int | None, options: dict[str, Any], folder: Path
) -> Facts:
    """The facts without a trial, in the same order of checks as `train`."""
    loaded = registry.load(backend, device, chosen.train.dtype, **options)
    limits.check_context(chosen)
    learned = dataset.prepare(chosen.data, chosen.model, chosen.train, folder / "corpora")
    model = Model(chosen.model, learned.tokenizer.vocab_size)
    limits.check_size(model)
    number = api.number_of_workers(workers, loaded, model, chosen.train.batch_size)
    return _facts(learned, loaded, number, folder)


def _facts(learned: Dataset, backend, workers: int, folder: Path) -> Facts:
    batches, n = learned.batches, learned.num_steps
    sequences = n * batches.batch_size
    if isinstance(batches, EpochWindows):  # the last batch of an epoch may be smaller
        epochs, rest = divmod(n, batches.steps_per_epoch)
        sequences = epochs * batches.n_windows + rest * batches.batch_size
    corpus_bytes = sum(path.stat().st_size for path in (folder / "corpora").glob("*.ids"))
    return Facts(
        backend.name, workers, learned.tokenizer.vocab_size, n, batches.batch_size, sequences,
        learned.n_validation, corpus_bytes, backend.xp.tokens_at_once,
    )  # fmt: skip


def _seconds(preset: Preset, facts: Facts, trial: Trial) -> dict[str, float]:
    train, context = preset.train, 1 if isinstance(preset.model, EquationConfig) else preset.model.n_ctx
    training = facts.num_steps * trial.ms_a_step / 1e3
    whole = trial.evaluation_seconds * max(1.0, facts.n_validation / (train.batch_size * context))
    evaluations = -(-facts.num_steps // train.eval_every)
    sample = SAMPLE_TOKENS + evaluations * train.sample_tokens
    checkpoints = facts.num_steps // train.checkpoint_every if train.checkpoint_every else 0
    if train.checkpoint_minutes:
        checkpoints += training / 60 / train.checkpoint_minutes
    every = max(1, facts.n_validation // EVALUATION_TOKENS)
    return {
        "training": training,
        "evaluations": whole + evaluations * max(trial.evaluation_seconds, whole / every),
        "samples": trial.token_seconds * (1 if isinstance(preset.model, EquationConfig) else sample),
        "start and checkpoints": trial.start_seconds + (1 + checkpoints) * trial.checkpoint_seconds,
    }


# the trial ----------------------------------------------------------------------------------------------


def _tried(
    chosen: Preset, backend: str, device: str | None, workers: int | None, options: dict[str, Any], folder: str
) -> tuple[Facts, Trial]:
    """Try the run in a process of its own: only there can a peak of memory be the run's alone."""
    parts = {part: configs.to_dict(getattr(chosen, part)) for part in ("model", "train", "data")}
    request = {
        "preset": {"name": chosen.name, **parts}, "backend": backend, "device": device, "workers": workers,
        **options, "path": folder, "seconds": SECONDS, "most_seconds": MOST_SECONDS,
    }  # fmt: skip
    # a session of its own: Ctrl-C is for this process, which ends it
    with processes.started(TASK, "the trial", "try --no-measure", start_new_session=True) as child:
        try:
            found = processes.ask(child, request)
        except processes.Ended as how:
            advice = "the memory may be too small for this run; try a smaller model or batch"
            raise BabyError(f"the trial {how}: {advice}") from None
    idle, sizes = process_memory.of_interpreter(processes.environment()), found["trial"].pop("sizes")
    taken = process_memory.growth(sizes, idle) if idle and sizes else None
    return Facts(**found["facts"]), Trial(**found["trial"], memory=taken)


def serve(path: str, **request: Any) -> dict[str, Any]:
    """What the process of a trial does -> facts and trial, as plain JSON values."""
    import tqdm  # noqa: F401  # the command line of the real run has it, and it takes room too

    try:
        return _try(path=path, **request)
    except OutOfMemory as error:  # the run that it names goes with the trial
        raise BabyError(f"{error.shortage}; {error.advice}") from None
    except BabyError as error:
        raise BabyError(" ".join(str(error).split())) from None
    except MemoryError as error:
        reason = " ".join(str(error).split()) or "an array did not fit"
        raise BabyError(f"not enough memory ({reason}); choose a smaller model or batch") from None
    finally:  # not only by the process that asks: it may be gone
        shutil.rmtree(path, ignore_errors=True)


def _try(preset: dict[str, Any], path: str, seconds: float, most_seconds: float, **place: Any) -> dict[str, Any]:
    """Train as the request says, until enough was seen -> facts and trial, as plain JSON values."""
    chosen = _preset_of(**preset)
    # neither limit may end the trial before its time
    often = {"checkpoint_every": 0, "checkpoint_minutes": CHECKPOINT_SECONDS / 60}
    chosen = replace(chosen, train=replace(chosen.train, max_minutes=0.0, patience=0, **often))
    watch, begin = _Watch(seconds, most_seconds), time.perf_counter()
    run = api.train(chosen, path=path, listener=watch, **place)
    written = time.perf_counter()
    run.generate(num_tokens=GENERATED)
    generated = time.perf_counter()
    facts = _facts(watch.learned, run.backend, watch.workers, Path(path))
    tokens, rate = facts.step_size * chosen.model.n_ctx, statistics.median(watch.rates)
    trial = {
        "ms_a_step": 1e3 * tokens / rate,
        "tokens_per_second": rate,
        "evaluation_seconds": statistics.median(watch.evaluations),
        "token_seconds": (generated - written) / GENERATED,
        "checkpoint_seconds": written - watch.ended,
        "start_seconds": watch.began - begin,
        "sizes": process_memory.taken() and [*process_memory.taken(), *watch.sizes],
    }
    return {"facts": asdict(facts), "trial": trial}


def _preset_of(name: str, model: Any, train: Any, data: Any) -> Preset:
    return Preset(
        name,
        "a trial",
        configs.model_from_dict(model, "trial"),
        configs.from_dict(TrainConfig, train, "trial"),
        configs.data_from_dict(data, "trial"),
    )


class _Watch(api.Silent):
    """Ends a run when enough was seen of it: a first reading, an evaluation with its sample, and then steps and
    checkpoints for a while. These hold the best weights beside the present ones, as most of a long run do.
    """

    def __init__(self, seconds: float, most_seconds: float):
        self.seconds, self.most_seconds = seconds, most_seconds
        self.rates: list[float] = []
        self.evaluations: list[float] = []
        self.warm: float | None = None

    def started(self, session, step: int) -> None:
        """Put a task in place of the run's whose end can be moved, and whose validation part is short."""
        self.learned, self.workers = session.learned, session.workers
        self.moving = SimpleNamespace(**vars(session.learned))
        self.moving.num_steps, self.moving.n_validation = LARGEST, 1
        self.moving.validation, self.moving.check = self._some_validation, session.learned.check
        self.moving.sample = session.learned.sample
        session.learned = self.moving
        self.began = time.perf_counter()

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Note a reading; the first one asks for an evaluation, and when there are enough the run ends."""
        if self.warm is None:
            # of the next step, an apparent end: whether this one is evaluated has been decided, perhaps
            self.moving.num_steps = min(self.moving.num_steps, step + 1)
            return
        self.rates.append(tokens_per_second)
        now = time.perf_counter()
        enough = len(self.rates) >= READINGS and now - self.warm >= self.seconds
        if enough or now - self.began >= self.most_seconds:
            self.sizes = process_memory.taken(process_memory.children())[1:]
            self.ended = now
            raise KeyboardInterrupt

    def evaluated(self, record: dict[str, Any]) -> None:
        """After the evaluation that was asked for, the run goes on."""
        if record["step"] == self.moving.num_steps:
            self.moving.num_steps, self.warm = LARGEST, time.perf_counter()

    def _some_validation(self) -> Iterator[Any]:
        for batch in islice(self.learned.validation(), 3):
            begin = time.perf_counter()
            yield batch
            self.evaluations.append(time.perf_counter() - begin)


# what the command line shows ----------------------------------------------------------------------------


def lines(found: Estimate) -> list[str]:
    """The estimate as a table to read."""
    facts, context = found.facts, found.preset.model.n_ctx
    rows = [
        ("parameters", f"{found.n_parameters:,} exactly: {_listed(found.parameters, '{:,}')}"),
        *_by_formula(found),
        ("tokens", f"{found.tokens:,} in {facts.num_steps:,} steps of {facts.step_size} x {context}"),
        *_by_rule(found),
        ("operations", f"{found.flops:.3g} exactly, in the matrix products of all training steps"),
        ("", f"{6 * found.tokens * found.n_parameters:.3g} by The Little Baby's 6 T P"),
        ("arrays, MiB", _listed({kind: size / MIB for kind, size in found.arrays.items()}, "{:.1f}")),
        ("", f"while it generates, keys and values {found.cache / MIB:.2f}"),
        *_measured(found),
        ("disk", f"about {found.disk / MIB:.1f} MiB"),
    ]
    processes = f", {facts.workers} processes" if facts.workers > 1 else ""
    head = f"{found.preset.name} on {facts.backend}{processes}; {facts.vocab_size} different tokens"
    return [head, *(line for name, text in rows for line in _wrapped(name, text))]


def _wrapped(name: str, text: str) -> list[str]:
    margin = " " * 15
    return textwrap.wrap(text, 110, initial_indent=f"  {name:<13}", subsequent_indent=margin)


def _by_formula(found: Estimate) -> list[tuple[str, str]]:
    count = counts.formula_parameters(found.preset.model, found.facts.vocab_size)
    if count is None:
        return []
    network = {"mlp": "counts the network twice", "moe": "counts half of the experts"}
    return [
        ("", f"{count:,} by The Little Baby's V H + L (4 H^2 + 4 H F), a rule of thumb"),
        ("", f"that leaves out positions, norms, biases and head, and {network[found.preset.model.c_network]}"),
    ]


def _by_rule(found: Estimate) -> list[tuple[str, str]]:
    low, high = (share * found.n_parameters for share in TOKENS_A_PARAMETER)
    share = found.tokens / found.n_parameters
    return [("", f"{share:.1f} a parameter; The Little Baby's rule is 20 to 40, {low:,} to {high:,}")]


def _measured(found: Estimate) -> list[tuple[str, str]]:
    trial, seconds = found.trial, found.seconds
    if trial is None:
        return [("memory, time", "not measured")]
    of_device = "" if found.facts.backend == "numpy" else "; a GPU's own memory is not in it"
    taken = "not known: this system does not tell it"
    if trial.memory is not None:
        taken = f"about {trial.memory / MIB:.0f} MiB at the peak, beside the interpreter's own{of_device}"
    parts = {name: _time(value) for name, value in seconds.items()}
    return [
        ("memory", taken),
        ("a step", f"{trial.ms_a_step:.3g} ms, {trial.tokens_per_second:,.0f} tokens/s"),
        ("time", f"about {_time(sum(seconds.values()))} for the whole run: {_listed(parts, '{}')}"),
    ]


def _listed(parts: dict[str, Any], form: str) -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in parts.items())


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
