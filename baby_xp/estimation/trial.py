"""A trial: train with the settings of a run for a few seconds, in a separate process and a temporary folder. It
evaluates, generates samples and writes checkpoints, as the run would.
"""

import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from baby_xp import processes
from baby_xp.compute import Compute
from baby_xp.config import LARGEST, RunConfig
from baby_xp.errors import BabyError, OutOfMemory
from baby_xp.resources import process_memory
from baby_xp.runs.creation import new_run
from baby_xp.session import TrainingSession
from baby_xp.text.batches import Batch, EpochWindows
from baby_xp.text.dataset import EquationDataset, TextDataset
from baby_xp.training import checkpoint
from baby_xp.training.listener import Listener
from baby_xp.training.plan import Plan, Position
from baby_xp.training.setup import Setup, prepare

SECONDS, MOST_SECONDS, READINGS = 4.0, 60.0, 2
"""Seconds of training after the warm-up, at most in all, and the minimum number of readings of the loss."""
CHECKPOINT_SECONDS = 1.0
"""Between the checkpoints of the trial. Whether freed memory is reused is partly chance, so several checkpoints
are needed to see the peak of a long run."""
GENERATED = 64
"""Tokens that the trial generates."""
VALIDATION_BATCHES = 3
TASK = "baby_xp.estimation.trial:serve"


@dataclass(frozen=True)
class Facts:
    """What is known about a run after its text has been read."""

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
    cache_multiple: int
    """The cache of generation has room for a multiple of this many tokens."""


@dataclass(frozen=True)
class Trial:
    """Measurements of a short run with the same settings."""

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


def facts_of(setup: Setup, folder: Path) -> Facts:
    """What is known of a run before its trial; folder: where its ids were written."""
    batches, n = setup.dataset.batches, setup.dataset.num_steps
    sequences = n * batches.batch_size
    if isinstance(batches, EpochWindows):  # the last batch of an epoch may be smaller
        epochs, rest = divmod(n, batches.steps_per_epoch)
        sequences = epochs * batches.n_windows + rest * batches.batch_size
    corpus_bytes = sum(path.stat().st_size for path in folder.glob("*.ids"))
    return Facts(
        setup.backend.name, setup.workers, setup.model.vocab_size, n, batches.batch_size, sequences,
        setup.dataset.n_validation, corpus_bytes, setup.backend.xp.tokens_at_once, setup.backend.xp.cache_multiple,
    )  # fmt: skip


def run_apart(config: RunConfig, compute: Compute, folder: str) -> tuple[Facts, Trial]:
    """Run a trial in a separate process, so that the peak of its memory is that of the run.

    Raises BabyError for what `train` would refuse, and if the process ends early.
    """
    request = {"config": config.to_dict(), "compute": asdict(compute), "path": folder, "seconds": SECONDS}
    # in its own session, because Ctrl-C is meant for this process, which then ends the child
    with processes.started(TASK, "the trial", "try --no-measure", start_new_session=True) as child:
        try:
            found = processes.ask(child, request)
        except processes.Ended as how:
            advice = "the memory may be too small for this run; try a smaller model or batch"
            raise BabyError(f"the trial {how}: {advice}") from None
    idle, sizes = process_memory.of_interpreter(processes.environment()), found["trial"].pop("sizes")
    taken = process_memory.growth(sizes, idle) if idle and sizes else None
    return Facts(**found["facts"]), Trial(**found["trial"], memory=taken)


def serve(config: dict[str, Any], compute: dict[str, Any], path: str, seconds: float) -> dict[str, Any]:
    """The task of a trial's process -> facts and trial, as plain JSON values."""
    import tqdm  # noqa: F401  # the command line imports it for a real run, so it counts towards the memory

    try:
        return try_run(RunConfig.from_dict(config, "trial"), Compute(**compute), Path(path), seconds)
    except OutOfMemory as error:  # without the rest, which names a run that exists only in the trial
        raise BabyError(f"{error.shortage}; {error.advice}") from None
    except BabyError as error:
        raise BabyError(" ".join(str(error).split())) from None
    except MemoryError as error:
        reason = " ".join(str(error).split()) or "an array did not fit"
        raise BabyError(f"not enough memory ({reason}); choose a smaller model or batch") from None
    finally:  # here too, because the process that asked may have ended
        shutil.rmtree(path, ignore_errors=True)


def try_run(config: RunConfig, compute: Compute, folder: Path, seconds: float) -> dict[str, Any]:
    """Train until enough is measured -> facts and trial, as plain JSON values."""
    began = time.perf_counter()
    with new_run(folder) as new:
        setup = prepare(config, compute, folder / "corpora")
        watch = Watch(seconds)
        plan = TrialPlan(setup.config.train, LARGEST, watch=watch)
        short = replace(setup, dataset=watch.timed(setup.dataset))
        run = TrainingSession(new, short, plan, watch).run(checkpoint.first(setup.model, setup.config.train))
    written = time.perf_counter()
    run.generate(num_tokens=GENERATED)
    generated = time.perf_counter()
    facts = facts_of(setup, folder / "corpora")
    tokens, rate = facts.step_size * config.model.n_ctx, statistics.median(watch.rates)
    trial = {
        "ms_a_step": 1e3 * tokens / rate,
        "tokens_per_second": rate,
        "evaluation_seconds": statistics.median(watch.evaluations),
        "token_seconds": (generated - written) / GENERATED,
        "checkpoint_seconds": written - watch.ended,
        "start_seconds": watch.began - began,
        "sizes": process_memory.taken() and [*process_memory.taken(), *watch.sizes],
    }
    return {"facts": asdict(facts), "trial": trial}


class Watch(Listener):
    """Times a trial."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.rates: list[float] = []
        """Tokens per second, of the readings after the evaluation."""
        self.evaluations: list[float] = []
        """Seconds of each validation batch."""
        self.began = self.ended = 0.0
        self.warm: float | None = None
        self.sizes: list[dict[str, int]] = []
        """Of the worker processes; at the end of training they are gone."""

    def started(self, session: TrainingSession, step: int) -> None:
        """Note when."""
        self.began = time.perf_counter()

    def evaluated(self, record: dict[str, Any]) -> None:
        """Readings count from the evaluation on."""
        self.warm = time.perf_counter()

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Note a reading."""
        if self.warm is None:
            return
        self.rates.append(tokens_per_second)
        now = time.perf_counter()
        enough = len(self.rates) >= READINGS and now - self.warm >= self.seconds
        if enough or now - self.began >= MOST_SECONDS:
            self.sizes = process_memory.taken(process_memory.children())[1:]
            self.ended = now

    def timed(self, dataset: TextDataset | EquationDataset) -> TextDataset | EquationDataset:
        """The dataset with a validation part of a few batches, each of which is timed."""

        def validation() -> Iterator[Batch]:
            for batch in islice(dataset.validation(), VALIDATION_BATCHES):
                begin = time.perf_counter()
                yield batch
                self.evaluations.append(time.perf_counter() - begin)

        return replace(dataset, validation=validation, n_validation=1)


@dataclass(frozen=True)
class TrialPlan(Plan):
    """A first reading, an evaluation with its sample, then steps and checkpoints until enough is measured. These
    contain the best weights beside the current ones, as most checkpoints of a long run do."""

    watch: Watch = field(kw_only=True)

    def evaluates(self, at: Position) -> bool:
        """Once, when the loss has been read for the first time."""
        return at.readings > 0 and not at.records

    def writes_checkpoint(self, at: Position) -> bool:
        """Often enough to measure their memory."""
        return at.checkpoint_seconds > CHECKPOINT_SECONDS

    def ends(self, at: Position) -> str | None:
        """When enough is measured, as if the user ended the run."""
        return "interrupted" if self.watch.ended else None
