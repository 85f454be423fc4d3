"""Shared by all results: the machine and its speed at the time, medians and ratios, tables, goals, files."""

import itertools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from baby_xp import files
from baby_xp.resources import process_memory
from baby_xp.runs import config_file
from bench import harness
from bench.harness import MIB, US, say
from bench.workloads import on_gpu

QUIET, RATE_SECONDS = 0.75, 1.5
"""Share of its best speed that a process keeps on a machine that does nothing else; how long that is measured."""


@contextmanager
def measurement(**facts: Any) -> Iterator[dict]:
    """A result to be filled: the facts, when and where, and how fast matrix products are before and after."""
    removed = [name for name in harness.REMOVED if name in os.environ]
    result = {"date": config_file.now(), "machine": harness.ask("bench.harness:machine")}
    result |= {"removed_variables": removed, "product_rate_before": product_rate(), **facts}
    yield result
    result["product_rate_after"] = product_rate()


def product_rate() -> dict[str, float]:
    """Gflop/s of a small matrix product: one process alone, the slower of two at once, and the best product."""
    alone = harness.ask("bench.results:rate")
    with ThreadPoolExecutor(2) as pool:
        pair = [pool.submit(harness.ask, "bench.results:rate") for _ in range(2)]
    slower = min(one.result()["mean"] for one in pair)
    return {"alone": alone["mean"], "two at once": slower, "best": alone["best"]}


def rate(M: int = 768, C: int = 128, F: int = 512) -> dict[str, float]:
    """Gflop/s of a float32 product (M, C) @ (C, F) on one thread: the mean over RATE_SECONDS, and the best."""
    x, weight = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((M, C), (C, F)))
    marks = [time.perf_counter()]
    with threadpool_limits(1):
        while marks[-1] < marks[0] + RATE_SECONDS:
            x @ weight
            marks.append(time.perf_counter())
    work, seconds = 2e-9 * M * C * F, np.diff(marks)
    return {"mean": work / float(np.mean(seconds)), "best": work / float(np.min(seconds))}


def rates(result: dict) -> dict[str, dict]:
    """The product rates before and, once it is done, after."""
    names = {when: f"product_rate_{when}" for when in ("before", "after")}
    return {when: result[name] for when, name in names.items() if name in result}


Average = Callable[[list[float]], float]  # of the milliseconds of steps: their median, or their mean


def times(runs: list[dict]) -> list[float]:
    """Milliseconds of every step of all rounds."""
    return [ms for run in runs for ms in run["ms"]]


def peak(runs: list[dict]) -> int | None:
    """The most bytes that all processes of a run took, an upper bound; None where memory is not known."""
    known = all(run["memory"] for run in runs)
    return max(process_memory.growth(run["memory"], {"peak": 0, "shared": 0}) for run in runs) if known else None


def gpu_peak(runs: list[dict]) -> dict[str, int]:
    """The most bytes of the GPU's memory, used and held, in any round; {} where they are not known."""
    known = [run["gpu_memory"] for run in runs if run.get("gpu_memory")]
    return {name: max(one[name] for one in known) for name in known[0]} if known else {}


def least_growth(runs: list[dict], idle: list[dict]) -> int | None:
    """The fewest bytes that a run took beyond as many processes of the size `idle`; None where it is not known."""
    known = idle and all(run["memory"] for run in runs)
    return min(process_memory.growth(run["memory"], idle[0]) for run in runs) if known else None


def ratio(runs_of: dict[str, list], peer: str, average: Average = statistics.median, us=US) -> float | None:
    """Our average step divided by that of a peer; None where one of the two was not measured."""
    if us not in runs_of or peer not in runs_of:
        return None
    return average(times(runs_of[us])) / average(times(runs_of[peer]))


def against_best(value_of: Mapping[str, float | None], us: str = US) -> tuple[float, str] | None:
    """Our value divided by the smallest one of the peers, and that peer's name; None if one side has none."""
    best = best_peer(value_of)
    if best is None or value_of.get(us) is None:
        return None
    return value_of[us] / value_of[best], best


def best_peer(value_of: Mapping[str, float | None]) -> str | None:
    """The peer with the smallest value; None if none has one."""
    peers = {name: value for name, value in value_of.items() if not is_ours(name) and value is not None}
    return min(peers, key=peers.get, default=None)


def is_ours(name: str) -> bool:
    """Whether that is baby_xp, on whatever backend, and not a peer."""
    return name.startswith(US)


def versus(what: str, runs_of: dict[str, list], average: Average = statistics.median, us: str = US) -> str | None:
    """A line: our time as a share of the best peer's, and the range of that share over the rounds."""
    found = against_best({name: average(times(runs)) for name, runs in runs_of.items()}, us)
    if found is None:
        return None
    share, best = found
    pairs = zip(runs_of[us], runs_of[best], strict=False)  # one may be a turn ahead
    rounds = [average(ours["ms"]) / average(peer["ms"]) for ours, peer in pairs]
    return f"- {what}: {share:.2f} of the best peer's ({best}); by round {min(rounds):.2f} to {max(rounds):.2f}"


def markdown(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a Markdown table, aligned so that it reads well as plain text; all rows have the same keys."""
    names = list(rows[0]) if rows else ["nothing was measured"]
    widths = [max(len(name), *(len(row[name]) for row in rows), 0) for name in names]
    lines = [names, ["-" * width for width in widths], *([row[name] for name in names] for row in rows)]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]


def time_cells(name: str, runs_of: dict[str, list], digits: int) -> dict[str, str]:
    """What the tables of training and of generation say about a library's steps, and ours beside them."""
    ms = times(runs_of[name])
    found = zip(("ms per step", "min", "max"), (statistics.median(ms), min(ms), max(ms)), strict=True)
    cells = {what: f"{value:.{digits}f}" for what, value in found}
    return {"library": name, **cells, "baby_xp / this": ratio_cell(name, runs_of)}


def ratio_cell(name: str, runs_of: dict[str, list], average: Average = statistics.median) -> str:
    """Our time divided by that of this row, for a cell; "" in our own."""
    found = None if name == US else ratio(runs_of, name, average)
    return "" if found is None else f"{found:.2f}"


def mib(size: int | None, digits: int = 0) -> str:
    """Bytes in MiB, for a cell of a table; "" for None."""
    return "" if size is None else f"{size / MIB:,.{digits}f}"


def page(result: dict, about: Mapping[str, dict], rows: list[dict[str, str]], *below: str | None) -> list[str]:
    """A result as Markdown. about: facts of each library; below: the lines under the table."""
    machine = result["machine"]
    return [
        f"{machine['processor']}, {machine['system']}, Python {machine['python']}; {result['date']}",
        "",
        f"- machine class: {harness.class_of(machine)}",
        *([f"- GPU (name, memory, driver, power limit): {machine['gpu']}"] if machine.get("gpu") else []),
        *(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in facts.items()) for name, facts in about.items()),
        *rate_lines(result),
        "- removed from the environment: " + (", ".join(result["removed_variables"]) or "nothing was set"),
        "",
        *markdown(rows),
        "",
        *filter(None, below),
    ]


def rate_lines(result: dict) -> list[str]:
    """How fast matrix products were before and after, and a warning if the machine was busy."""
    lines = [
        f"- matrix product rate {when}: {rate['alone']:.0f} Gflop/s alone, {rate['two at once']:.0f} each "
        f"with two at once, {rate['best']:.0f} at best"
        for when, rate in rates(result).items()
    ]
    if was_busy(result):
        lines.append(f"- THE MACHINE WAS BUSY: a rate is below {QUIET:.0%} of the best; the times say little")
    return lines


def was_busy(result: dict) -> bool:
    """Whether matrix products were much slower on average than at best, before or after."""
    slowest = lambda rate: min(rate["alone"], rate["two at once"])  # noqa: E731
    return any(slowest(rate) < QUIET * rate["best"] for rate in rates(result).values())


def about_each(races: Iterable[dict]) -> dict[str, dict]:
    """What each library reported about itself in its first run."""
    return {name: runs[0]["about"] for race in races for name, runs in race["runs"].items()}


def show(
    states: Iterable[dict], document: Callable[[dict], list[str]], out: Path | None, suffix: str = ""
) -> tuple[dict, Path | None]:
    """Write each state of a growing result as `stem`.json and .md, and print what `document` makes of the last.

    Returns the last state and the stem, <date>-<machine><suffix>; None where no folder is named.
    """
    stem = None
    for result in states:
        text = "\n".join(document(result)) + "\n"
        if out is not None:
            stem = stem or stem_of(result, out, suffix)
            files.write(Path(f"{stem}.json"), json.dumps(result, indent=1) + "\n")
            files.write(Path(f"{stem}.md"), text)
    print(text, end="")
    if stem:
        say(f"\nkept as {stem}.json and .md")
    return result, stem


def stem_of(result: dict, out: Path, suffix: str) -> Path:
    """A path in the folder `out`, without an ending, that no result has yet: earlier ones of the day stay."""
    machine = result["machine"]
    gpu = machine.get("gpu") if on_gpu(result.get("backend", "numpy")) else None
    cpu = f"{machine['processor']} {machine['cores']} cores {machine['vectors']}"
    name = words_of(gpu.partition(",")[0] if gpu else cpu)
    stem = first = out / f"{result['date'][:10]}-{name}{suffix}"
    numbers = itertools.count(2)
    while Path(f"{stem}.json").exists():
        stem = first.with_name(f"{first.name}-{next(numbers)}")
    return stem


def words_of(text: str) -> str:
    """A text as part of a file name: its letters and digits, with - between them."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


# the goals on one H200 ----------------------------------------------------------------------------------

# the largest share of a peer's median step, at the same precision, that baby_xp's may take
STEP = {name: {"torch.compile": 1.0, "torch": 0.5} for name in ("W1", "W2", "W3")} | {"W4": {"torch.compile": 1.2}}
EPOCH_PRESET, EPOCH_MINUTES = "48-months", 5.0  # one epoch of W3's model, evaluations included
TRAIN_LOSS, TRAIN_SECONDS, TRAIN_STEPS = 1.47, 90.0, 5000  # `train nanogpt-gpu`, the whole command


def step_goals(workload: str, precision: str, runs_of: dict[str, list]) -> list[str]:
    """A line for each goal of a workload, and for each backend of ours; runs_of: the rounds of each library."""
    return [
        goal(f"{workload} {precision}, {us}'s share of {peer}'s time", ratio(runs_of, peer, us=us), most, "{:.2f}")
        for us in [US, *(name for name in runs_of if is_ours(name) and name != US)]
        for peer, most in STEP.get(workload, {}).items()
    ]


def epoch_goal(seconds: float) -> str:
    """Whether an epoch takes less than EPOCH_MINUTES."""
    return goal("one epoch", seconds / 60, EPOCH_MINUTES, "{:.2f} minutes", below=True)


def train_goals(val_loss: float | None, seconds: float, steps: int) -> list[str]:
    """Whether the run of nanogpt-gpu is good enough and fast enough. val_loss: None where it has none."""
    if steps < TRAIN_STEPS or val_loss is None:
        return [f"- goal, nanogpt-gpu: not measured, as only {steps:,} of {TRAIN_STEPS:,} steps were done"]
    return [
        goal("validation loss", val_loss, TRAIN_LOSS, "{:.4f}"),
        goal("the whole command", seconds, TRAIN_SECONDS, "{:.1f} s", below=True),
    ]


def goal(what: str, value: float | None, limit: float, form: str, below: bool = False) -> str:
    """A line: the goal, the value that was reached, None if none was, and whether that meets it.

    form: of value and limit. below: whether the value must be less than the limit, and not just at most that.
    """
    wanted = f"- goal, {what}: {'under' if below else 'at most'} {form.format(limit)}"
    if value is None:
        return f"{wanted}: not measured"
    return f"{wanted}: {form.format(value)}, {verdict(value < limit if below else value <= limit)}"


def verdict(met: bool) -> str:
    """Whether a goal is met, in one word."""
    return "met" if met else "MISSED"
