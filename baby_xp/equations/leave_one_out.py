"""The equation lab: hold out each sum in turn, train a model for it, ask it. Over several seeds.

That a model fits what it was shown says nothing of what it was not. Here each case of the table is left out of the
training data, with its mirror, and a model that never saw it is asked for its answer.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from baby_xp_data import equations as data
from threadpoolctl import threadpool_limits

from baby_xp import checks, equations, layout, processes
from baby_xp.arrays import registry
from baby_xp.config import EquationConfig, EquationData, RunConfig, TrainConfig
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.presets import preset
from baby_xp.resources import limits
from baby_xp.text import dataset
from baby_xp.training.signals import SIGNALS

MOST_SEEDS = 1_000_000
EACH = "each"
"""As held_out: every case in turn."""
IGNORED = (
    "eval_every", "sample_tokens", "patience", "max_minutes", "checkpoint_every", "checkpoint_minutes",
)  # fmt: skip
"""Settings of training that mean nothing here: a model is asked when it is trained, and not kept."""
PROGRAM = "from baby_xp.equations.leave_one_out import _child; _child()"


@dataclass(frozen=True)
class Answer:
    """What the model of a seed said to an equation that it never saw: whether right, and with what probability."""

    equation: str
    seed: int
    right: bool
    probability: float


@dataclass(frozen=True)
class Results:
    """What all models said, and what it took.

    copied: the share answered correctly by copying the answer of the nearest question that was trained.
    losses: the last training loss of each model, nats per target.
    """

    chosen: RunConfig
    answers: tuple[Answer, ...]
    copied: float
    models: int
    seconds: float
    processes: int
    losses: tuple[float, ...]

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
        """Mean probability of the right answer."""
        return float(np.mean([answer.probability for answer in self.answers]))

    def of_seeds(self) -> dict[int, float]:
        """Share answered correctly, seed by seed."""
        return {
            seed: float(np.mean([answer.right for answer in self.answers if answer.seed == seed]))
            for seed in sorted({answer.seed for answer in self.answers})
        }

    def of_operators(self) -> dict[str, float]:
        """Share answered correctly, operator by operator."""
        asked = {operator: [] for operator in self.chosen.data.operators}
        for answer in self.answers:
            a_and_b = data.question(answer.equation)
            asked["+" if "+" in a_and_b else "-"].append(answer.right)
        return {operator: float(np.mean(right)) for operator, right in asked.items() if right}

    def map(self, operator: str = "+") -> np.ndarray:
        """Share answered correctly (10, 10), by first and second operand, or by their tens; NaN where nothing was
        asked."""
        unit = 10 ** (self.chosen.data.digits - 1)
        right, asked = np.zeros((10, 10)), np.zeros((10, 10))
        for answer in self.answers:
            question = data.question(answer.equation)[:-1]
            if operator in question:
                a, b = (int(operand) // unit for operand in question.split(operator))
                right[a, b] += answer.right
                asked[a, b] += 1
        with np.errstate(invalid="ignore"):
            return right / asked

    def lines(self) -> list[str]:
        """The results for people."""
        seeds, n = self.of_seeds(), len({answer.equation for answer in self.answers})
        answers = f"{len(self.answers):,} answers of {layout.counted(self.models, 'model')}"
        rows = [
            ("held out", f"{layout.counted(n, 'equation')}, {answers}, {layout.counted(len(seeds), 'seed')}"),
            ("answered correctly", f"{self.share:.1%}"),
        ]
        if self.share_without_zeros is not None:
            rows.append(("  without 0+0", f"{self.share_without_zeros:.1%}"))
        if len(seeds) > 1:
            rows.append(("  seed by seed", f"{min(seeds.values()):.1%} to {max(seeds.values()):.1%}"))
        if len(self.chosen.data.operators) > 1:
            rows.append(("  by operator", ", ".join(f"{o} {s:.1%}" for o, s in self.of_operators().items())))
        rows += [
            ("mean probability of the right answer", f"{self.probability:.3f}"),
            ("copying the nearest trained equation", f"{self.copied:.1%} right"),
            ("last training loss", f"{np.mean(self.losses):.4f} nats per target, mean of the models"),
            ("time", f"{self.seconds:.0f} s in {layout.counted(self.processes, 'process', 'es')}"),
        ]
        lines = layout.pairs(rows)
        if n > 1:
            for operator in self.chosen.data.operators:
                lines += ["", *self._map_lines(operator)]
        return lines

    def _map_lines(self, operator: str) -> list[str]:
        what = "operand" if self.chosen.data.digits == 1 else "operand's tens"
        lines = [
            f"percent of {operator} answered correctly; down: the first {what}, across: the second",
            "    " + "".join(f"{b:4d}" for b in range(10)),
        ]
        for a, row in enumerate(self.map(operator)):
            shares = "".join("   ." if np.isnan(share) else f"{100 * share:4.0f}" for share in row)
            lines.append(f"{a:4d}{shares}")
        return lines


def suitable(kind: str, digits: Any = None, max_sum: Any = None, operators: Any = None) -> RunConfig:
    """The preset that an experiment begins with: kind is "mlp", the equation model, or "gpt".

    digits, max_sum, operators: what is asked for, as numbers or words; None: nothing.
    """
    if kind == "gpt":
        return preset("equations-gpt")
    if str(digits) == "2":
        return preset("equations-2")
    chosen = preset("equations" if max_sum in (None, 9, "9") and operators in (None, "+") else "equations-table")
    return replace(chosen, data=replace(chosen.data, held_out=EACH))


def refuse_ignored(names: Collection[str]) -> None:
    """Raises BabyError if one of these settings has no effect here."""
    for name in IGNORED:
        if name in names:
            raise BabyError(
                f"{name} has no effect on equations, which trains each model to its end and keeps none: "
                f"leave out --{name.replace('_', '-')}"
            )


def experiment(
    chosen: RunConfig, seeds: int = 5, workers: int | None = None, told: Callable[[int, int], None] | None = None
) -> Results:
    """Train the models of an experiment and ask them.

    chosen: a preset of equations; where its data's held_out is "each", there is a model for every case of the
    table (one for a+b and b+a), else one for what it names, and of each as many as `seeds`. workers: processes,
    None for one a core. `told(done, of)` is called after each model. Raises BabyError for a setting that makes no
    sense.
    """
    if not isinstance(chosen, RunConfig) or not isinstance(chosen.data, EquationData):
        given = chosen.name if isinstance(chosen, RunConfig) else checks.shown_value(chosen)
        raise BabyError(f"the lab is for equations, not for {given}: choose a preset such as equations")
    usual = TrainConfig(num_steps=1)
    # eval_every apart: it is never nothing, and each preset has its own
    refuse_ignored([name for name in IGNORED[1:] if getattr(chosen.train, name) != getattr(usual, name)])
    seeds = checks.whole("seeds", seeds, most=MOST_SEEDS)
    workers = _cores() if workers is None else checks.whole("workers", workers, most=checks.most_processes())
    if told is not None:
        checks.function("told", told)
    jobs = _jobs(chosen, seeds)
    number = min(len(jobs), workers)
    _check_first(jobs[0])
    begin, answers, losses, copied = time.perf_counter(), [], [], []
    for done, (answered, loss, share) in enumerate(_all(jobs, number), 1):
        answers += answered
        losses.append(loss)
        copied += share
        if told is not None:
            told(done, len(jobs))
    answers.sort(key=lambda answer: answer.seed)
    seconds = time.perf_counter() - begin
    return Results(chosen, tuple(answers), float(np.mean(copied)), len(jobs), seconds, number, tuple(losses))


def _check_first(job: RunConfig) -> None:
    """Raises BabyError for what is wrong with a model, or its data, before the first one is trained."""
    limits.check_context(job)
    learned = dataset.prepare(job.data, job.model, job.train, None)
    model, backend = Model(job.model, learned.tokenizer.vocab_size), registry.load("numpy", dtype=job.train.dtype)
    limits.check_training(job, model, backend, learned.batches, 1)


def run_job(chosen: RunConfig) -> tuple[list[Answer], float, list[float]]:
    """Train one model of a preset of equations -> its answers to what was held out, its last loss, and for each
    answer the share of the nearest trained equations that have the same."""
    settings, seed = chosen.data, chosen.train.seed
    of_table = {"digits": settings.digits, "operators": settings.operators}
    held_out = data.chosen(settings.held_out, seed, settings.max_sum, **of_table)
    pairs = dataset.prepare(settings, chosen.model, chosen.train, None)
    backend = registry.load("numpy", dtype=chosen.train.dtype)
    weights = equations.initial_weights(chosen.model, pairs.tokenizer.vocab_size, seed)
    training = replace(chosen.train, num_steps=pairs.num_steps)
    batches = pairs.batches
    with threadpool_limits(1):
        weights, losses = equations.train(
            weights, batches.contexts, batches.targets, chosen.model, training, backend
        )
        asked = data.held_out_equations(settings.max_sum, held_out, **of_table)
        right, probability = equations.answers(weights, asked, chosen.model, settings.digits)
    if not np.isfinite(losses[-1]):
        raise BabyError(f"the loss became {losses[-1]} with {settings.held_out} held out, seed {seed}: lower --lr")
    told = zip(asked, right.tolist(), probability.tolist(), strict=True)
    answers = [Answer(equation, seed, *row) for equation, *row in told]
    whole = not isinstance(chosen.model, EquationConfig) or chosen.model.n_ctx >= data.longest(settings.digits)
    known = data.equations(settings.max_sum, held_out, **of_table)
    return answers, losses[-1], nearest_copies(asked, known, whole).tolist()


def nearest_copies(asked: Sequence[str], known: Sequence[str], whole: bool = True) -> np.ndarray:
    """For each equation, how many of the nearest known ones have its answer, as a share: (n,).

    Nearest: whose questions differ in the fewest characters, operands and operator each at their place. That is
    what a model would score that looks the answer up. whole: the whole answer, or its first character.
    """
    width = max(len(equation) for equation in [*asked, *known])
    places = lambda rows: np.array([list(_in_places(row, width)) for row in rows])  # noqa: E731
    questions, trained = places(asked), places(known)
    end = None if whole else 1
    said = np.array([data.answer(equation)[:end] for equation in known])
    shares = []
    for question, equation in zip(questions, asked, strict=True):
        distance = np.sum(trained != question, axis=1)
        shares.append(float(np.mean(said[distance == distance.min()] == data.answer(equation)[:end])))
    return np.array(shares)


def _in_places(equation: str, width: int) -> str:
    """The question with its operands aligned: "1+23=" -> " 1+23", each as wide as the widest could be."""
    question = data.question(equation)[:-1]
    at = max(question.find("+"), question.find("-"))
    return question[:at].rjust(width) + question[at] + question[at + 1 :].rjust(width)


def _jobs(chosen: RunConfig, seeds: int) -> list[RunConfig]:
    """A preset for each model: what it holds out, and its seed."""
    table = chosen.data.max_sum, chosen.data.digits, chosen.data.operators
    if chosen.data.held_out == EACH:
        named = data.distinct(*table)
    else:
        named = [chosen.data.held_out]
        data.chosen(named[0], 0, *table)
    trainings = [replace(chosen.train, seed=chosen.train.seed + i) for i in range(seeds)]
    return [
        replace(chosen, data=replace(chosen.data, held_out=case), train=training)
        for training in trainings for case in named
    ]  # fmt: skip


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# processes ----------------------------------------------------------------------------------------------


def _all(jobs: list[RunConfig], number: int) -> Iterator[tuple[list[Answer], float, list[float]]]:
    """The results of all jobs as they come. A model is small: a process trains it alone, and then the next one."""
    if number == 1:
        yield from map(run_job, jobs)
        return
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    found: queue.SimpleQueue = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    children: list[subprocess.Popen] = []
    try:
        for _ in range(number):
            children.append(_start())
        for child in children:
            threading.Thread(target=_feed, args=(child, waiting, found), daemon=True).start()
        for _ in jobs:
            answer = found.get()
            if "error" in answer:
                raise BabyError(answer["error"])
            yield [Answer(**row) for row in answer["answers"]], answer["loss"], answer["copied"]
    finally:
        for child in children:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with suppress(OSError):
                    pipe.close()


def _start() -> subprocess.Popen:
    """A process that trains models. Raises BabyError if the system refuses it."""
    try:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=processes.environment(),
        )  # fmt: skip
    except OSError as error:
        raise processes.refusal("processes of the lab", error) from None


def _feed(child: subprocess.Popen, waiting: queue.SimpleQueue, found: queue.SimpleQueue) -> None:
    """Give a child job after job, and pass its results on, until there is nothing more to do."""
    with suppress(queue.Empty):
        while True:
            job = waiting.get_nowait()
            try:
                child.stdin.write(json.dumps(job.to_dict()) + "\n")
                child.stdin.flush()
                found.put(json.loads(child.stdout.readline()))
            except (OSError, ValueError):  # nothing but a line of JSON comes from one that lives
                found.put({"error": "a process ended before its model was done: was it killed, or out of memory?"})
                return


def _child() -> None:
    """What a process of the lab does: jobs as lines of JSON in, results as lines of JSON out."""
    for number in SIGNALS[1:]:  # these are for the parent, which then ends this process
        signal.signal(number, signal.SIG_IGN)
    with suppress(KeyboardInterrupt):  # the parent tells of it
        for line in sys.stdin:
            print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    chosen = RunConfig.from_dict(job, "lab")
    try:
        answers, loss, copied = run_job(chosen)
    except BabyError as error:
        return {"error": str(error)}
    return {"answers": [vars(answer) for answer in answers], "loss": loss, "copied": copied}
