"""The equation lab: hold out each sum in turn, train a model without it and test it on the sum, for several seeds.

A good fit to the training data says nothing about unseen cases. Here each case of the table is left out of the
training data, together with its mirror, and a model that never saw it is tested on it.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np
from baby_xp_data import equation_table
from baby_xp_data.equation_table import EquationTable
from threadpoolctl import threadpool_limits

from baby_xp import checks, equations, layout, processes
from baby_xp.arrays import registry
from baby_xp.config import EquationConfig, EquationData, RunConfig, TrainConfig
from baby_xp.distributed import join
from baby_xp.distributed.group import Others
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.presets import preset
from baby_xp.resources import limits
from baby_xp.text import dataset
from baby_xp.text.answers import answers
from baby_xp.training.signals import SIGNALS

MOST_SEEDS = 1_000_000
EACH = "each"
"""As held_out: every case in turn."""
IGNORED = (
    "eval_every", "sample_tokens", "patience", "max_minutes", "checkpoint_every", "checkpoint_minutes",
)  # fmt: skip
"""Training settings without effect here: each model is trained to its end, tested, and discarded."""
TASK = "baby_xp.equations.leave_one_out:answer_job"


@dataclass(frozen=True)
class Answer:
    """A model's answer to a held-out equation: whether it is correct, and the correct answer's probability."""

    equation: str
    seed: int
    right: bool
    probability: float


Outcome = tuple[list[Answer], float, list[float]]
"""What a job returns, see `run_job`."""


@dataclass(frozen=True)
class Results:
    """The answers of all models, and the time of training.

    copied: the share answered correctly by copying the answer of the nearest training equation.
    losses: the last training loss of each model, in nats per target.
    """

    run_config: RunConfig
    answers: tuple[Answer, ...]
    copied: float
    models: int
    seconds: float
    processes: int
    losses: tuple[float, ...]

    @property
    def table(self) -> EquationTable:
        """The table of equations."""
        return data_of(self.run_config).table

    @property
    def share(self) -> float:
        """Share answered correctly, of all answers."""
        return float(np.mean([answer.right for answer in self.answers]))

    @property
    def share_without_zeros(self) -> float | None:
        """The same without 0+0, whose answer begins no other equation of sums; None if it was not asked."""
        others = [answer.right for answer in self.answers if not answer.equation.startswith("0+0=")]
        return float(np.mean(others)) if len(others) < len(self.answers) and others else None

    @property
    def probability(self) -> float:
        """Mean probability of the correct answer."""
        return float(np.mean([answer.probability for answer in self.answers]))

    def of_seeds(self) -> dict[int, float]:
        """Share answered correctly, seed by seed."""
        return _shares((answer.seed, answer.right) for answer in self.answers)

    def of_operators(self) -> dict[str, float]:
        """Share answered correctly, operator by operator."""
        return _shares((equation_table.case_of(answer.equation)[1], answer.right) for answer in self.answers)

    def map(self, operator: str = "+") -> np.ndarray:
        """Share answered correctly (10, 10), by first and second operand, or by their tens; NaN without a
        test."""
        unit = 10 ** (self.table.digits - 1)
        right, asked = np.zeros((10, 10)), np.zeros((10, 10))
        for answer in self.answers:
            a, its_operator, b = equation_table.case_of(answer.equation)
            if its_operator == operator:
                right[a // unit, b // unit] += answer.right
                asked[a // unit, b // unit] += 1
        with np.errstate(invalid="ignore"):
            return right / asked

    def lines(self) -> list[str]:
        """The results as a table for people."""
        seeds, n = self.of_seeds(), len({answer.equation for answer in self.answers})
        answers = f"{len(self.answers):,} answers of {self.models} model{'s' * (self.models > 1)}"
        rows = [
            ("held out", f"{layout.counted(n, 'equation')}, {answers}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"),
            ("answered correctly", f"{self.share:.1%}"),
        ]
        if self.share_without_zeros is not None:
            rows.append(("  without 0+0", f"{self.share_without_zeros:.1%}"))
        if len(seeds) > 1:
            rows.append(("  seed by seed", f"{min(seeds.values()):.1%} to {max(seeds.values()):.1%}"))
        if len(self.table.operators) > 1:
            rows.append(("  by operator", ", ".join(f"{o} {s:.1%}" for o, s in self.of_operators().items())))
        rows += [
            ("mean probability of the correct answer", f"{self.probability:.3f}"),
            ("copying the nearest trained equation", f"{self.copied:.1%} correct"),
            ("last training loss", f"{np.mean(self.losses):.4f} nats per target, mean of the models"),
            ("time", f"{self.seconds:.0f} s in {self.processes} process{'es' * (self.processes > 1)}"),
        ]
        lines = layout.pairs(rows)
        if n > 1:
            for operator in self.table.operators:
                lines += ["", *self._map_lines(operator)]
        return lines

    def _map_lines(self, operator: str) -> list[str]:
        what = "operand" if self.table.digits == 1 else "operand's tens"
        lines = [
            f"percent of {operator} answered correctly; down: the first {what}, across: the second",
            "    " + "".join(f"{b:4d}" for b in range(10)),
        ]
        for a, row in enumerate(self.map(operator)):
            shares = "".join("   ." if np.isnan(share) else f"{100 * share:4.0f}" for share in row)
            lines.append(f"{a:4d}{shares}")
        return lines


def _shares(answers: Iterable[tuple[Any, bool]]) -> dict[Any, float]:
    """The share of correct answers for each key, sorted by key."""
    groups: dict[Any, list[bool]] = {}
    for key, right in answers:
        groups.setdefault(key, []).append(right)
    return {key: float(np.mean(groups[key])) for key in sorted(groups)}


def suitable(kind: str, digits: Any = None, max_sum: Any = None, operators: Any = None) -> RunConfig:
    """The preset that an experiment starts from: kind is "mlp", the equation model, or "gpt".

    digits, max_sum, operators: the requested table, as numbers or text; None: not requested.
    """
    if kind == "gpt":
        return preset("equations-gpt")
    if str(digits) == "2":
        return preset("equations-2")
    found = preset("equations" if max_sum in (None, 9, "9") and operators in (None, "+") else "equations-table")
    return replace(found, data=replace(data_of(found), held_out=EACH))


def data_of(run_config: Any) -> EquationData:
    """The equations of a preset. Raises BabyError for anything but a preset of equations."""
    if not isinstance(run_config, RunConfig) or not isinstance(run_config.data, EquationData):
        given = run_config.name if isinstance(run_config, RunConfig) else checks.shown_value(run_config)
        raise BabyError(f"the equation lab cannot use {given}: choose a preset of equations, such as equations")
    return run_config.data


def refuse_ignored(names: Collection[str]) -> None:
    """Raises BabyError if one of these settings has no effect here."""
    for name in IGNORED:
        if name in names:
            raise BabyError(
                f"{name} has no effect in the equation lab, which trains each model to its end and keeps none: "
                f"leave out --{name.replace('_', '-')}"
            )


def experiment(
    run_config: RunConfig,
    seeds: int = 5,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    distributed: Literal["none", "mpi"] = "none",
) -> Results:
    """Train the models of an experiment and test them on the held-out cases.

    run_config: a preset of equations; if its data's held_out is "each", there is a model for every case of the
    table (one for a+b and b+a), else one for what it names, with `seeds` seeds each. workers: processes, None
    for one per core. `progress(done, of)` is called after each model. distributed: "mpi" trains a model at a time
    in each rank that mpiexec or srun started. The first rank starts them and calls progress; all return the
    results. Raises BabyError for a setting that makes no sense.
    """
    checks.choice("distributed", distributed, ("none", "mpi"))
    group = join(distributed)
    with group.others() as others:
        results = None if others is None else _results(run_config, seeds, workers, progress, others)
    found: Any = group.broadcast(results and asdict(results))
    if results is None:
        answers, losses = tuple(Answer(**one) for one in found["answers"]), tuple(found["losses"])
        results = Results(**{**found, "run_config": run_config, "answers": answers, "losses": losses})
    return results


def _results(
    run_config: RunConfig, seeds: int, workers: int | None, progress: Callable[[int, int], None] | None,
    others: Others,
) -> Results:  # fmt: skip
    """As experiment, on rank 0."""
    data_of(run_config)
    usual = TrainConfig(num_steps=1)
    # except eval_every, which is never 0 and differs between presets
    refuse_ignored([name for name in IGNORED[1:] if getattr(run_config.train, name) != getattr(usual, name)])
    seeds = checks.whole("seeds", seeds, most=MOST_SEEDS)
    if others:
        if workers is not None:
            only = "each of several ranks trains one model at a time"
            raise BabyError(f"workers has no effect here, as {only}: leave out --workers")
        workers = 1 + len(others)
    elif workers is None:
        workers = processes.cores()
    else:
        workers = checks.whole("workers", workers, most=checks.most_processes())
    if progress is not None:
        checks.function("progress", progress)
    jobs = jobs_of(run_config, seeds)
    number = min(len(jobs), workers)
    _check_first(jobs[0])
    begin, outcomes = time.perf_counter(), {}
    for job, outcome in _all(jobs, number, others):
        outcomes[job] = outcome
        if progress is not None:
            progress(len(outcomes), len(jobs))
    seconds = time.perf_counter() - begin
    # by job, not as they arrived: the same figures in any number of processes
    found, losses, copied = zip(*(outcomes[job] for job in range(len(jobs))), strict=True)
    mean = float(np.mean([*chain(*copied)]))
    return Results(run_config, tuple(chain(*found)), mean, len(jobs), seconds, number, losses)


def jobs_of(run_config: RunConfig, seeds: int) -> list[RunConfig]:
    """A preset for each model, with the case that it holds out and its seed."""
    data, train = data_of(run_config), run_config.train
    if data.held_out == EACH:
        named = data.table.distinct()
    else:
        named = [data.held_out]
        data.table.choose(data.held_out, seed=0)
    trainings = [replace(train, seed=train.seed + i) for i in range(seeds)]
    return [
        replace(run_config, data=replace(data, held_out=case), train=training)
        for training in trainings for case in named
    ]  # fmt: skip


def _check_first(job: RunConfig) -> None:
    """Raises BabyError if a model or its data cannot be used, before the first one is trained."""
    limits.check_context(job)
    pairs = dataset.prepare_equations(data_of(job), job.model, job.train)
    model, backend = Model(job.model, pairs.tokenizer.vocab_size), registry.load("numpy", dtype=job.train.dtype)
    limits.check_training(job, model, backend, pairs.batches, 1)


def run_job(job: RunConfig) -> Outcome:
    """Train one model of a preset of equations -> its answers to what was held out, its last loss, and for each
    answer the share of the nearest training equations that have the same."""
    data, seed = data_of(job), job.train.seed
    pairs = dataset.prepare_equations(data, job.model, job.train)
    backend = registry.load("numpy", dtype=job.train.dtype)
    weights = equations.initial_weights(job.model, pairs.tokenizer.vocab_size, seed)
    with threadpool_limits(1):
        weights, losses = equations.train(
            weights, pairs.batches.contexts, pairs.batches.targets, job.model, job.train, backend
        )
        asked = pairs.table.held_out_equations(pairs.held_out)
        right, probability = answers(weights, asked, job.model, pairs.table)
    if not np.isfinite(losses[-1]):
        raise BabyError(f"the loss became {losses[-1]} with {data.held_out} held out, seed {seed}: lower --lr")
    rows = zip(asked, right.tolist(), probability.tolist(), strict=True)
    found = [Answer(equation, seed, *row) for equation, *row in rows]
    whole = not isinstance(job.model, EquationConfig) or job.model.n_ctx >= pairs.table.longest
    return found, losses[-1], nearest_copies(asked, pairs.table.equations(pairs.held_out), whole).tolist()


def nearest_copies(asked: Sequence[str], known: Sequence[str], whole: bool = True) -> np.ndarray:
    """For each equation, the share of the nearest known ones that have its answer: (n,).

    Nearest: whose questions differ in the fewest characters, with operands and operators aligned. That is the
    score of a model that looks the answer up. whole: compares whole answers, else their first characters.
    """
    width = max(len(equation) for equation in [*asked, *known])
    questions = np.array([list(_aligned(equation, width)) for equation in asked])
    trained = np.array([list(_aligned(equation, width)) for equation in known])
    end = None if whole else 1
    copies = np.array([equation_table.answer(equation)[:end] for equation in known])
    shares = []
    for question, equation in zip(questions, asked, strict=True):
        distance = np.sum(trained != question, axis=1)
        nearest = copies[distance == distance.min()]
        shares.append(float(np.mean(nearest == equation_table.answer(equation)[:end])))
    return np.array(shares)


def _aligned(equation: str, width: int) -> str:
    """The question with its operands aligned: "1+23=" -> " 1+23", each padded to `width`."""
    a, operator, b = equation_table.case_of(equation)
    return f"{a:>{width}}{operator}{b:>{width}}"


# processes ----------------------------------------------------------------------------------------------


def _all(jobs: list[RunConfig], number: int, others: Others) -> Iterator[tuple[int, Outcome]]:
    """The outcomes of all jobs as they arrive. Models are small: each process trains one after the other.

    number: how many processes train, the other ranks included.
    """
    if number == 1:
        yield from enumerate(map(run_job, jobs))
        return
    with ExitStack() as stack:
        others = others[: number - 1]
        own = number - len(others)
        pool = stack.enter_context(ThreadPoolExecutor(own))  # closed last: its threads wait for the processes
        started = partial(processes.started, TASK, "processes of the equation lab")
        children = [stack.enter_context(started()) for _ in range(own)]
        start: Callable[..., Any] = pool.submit
        slots = [partial(start, _ask, child) for child in children]
        slots += [partial(other, run_job) for other in others]
        yield from processes.results(jobs, slots)


def _ask(child: subprocess.Popen, job: RunConfig) -> Outcome:
    """Run a job in a process."""
    try:
        found = processes.ask(child, job.to_dict())
    except processes.Ended as ended:
        raise BabyError(f"a process {ended} before its model was trained; try fewer --workers or ranks") from None
    return [Answer(**row) for row in found["answers"]], found["loss"], found["copied"]


def answer_job(**job: Any) -> dict[str, Any]:
    """The task of a process of the equation lab: run a job, a preset as JSON values."""
    for number in SIGNALS[1:]:  # the parent process handles these signals and ends this process
        signal.signal(number, signal.SIG_IGN)
    found, loss, copied = run_job(RunConfig.from_dict(job, "lab"))
    return {"answers": [vars(answer) for answer in found], "loss": loss, "copied": copied}
