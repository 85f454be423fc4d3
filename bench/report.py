"""What every kept result has: the machine, how fast it was at the time, which peer was best, and its files."""

import datetime
import json
import os
import re
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench import contenders, processes
from bench.workloads import on_gpu

US = "baby_xp"
QUIET = 0.75
"""Share of its best speed that a process keeps over a while on a machine that does nothing else."""


def begin() -> dict:
    """The head of a result: when, where, and how fast matrix products are before anything is measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processes.processor(),
            "cores": processes.cores(),
            "gpu": processes.gpu(),
            **contenders.versions(),
        },
        "removed_variables": [name for name in processes.REMOVED if name in os.environ],
        "product_rate_before": product_rate(),
    }


def product_rate() -> dict[str, float]:
    """Gflop/s of a small matrix product: one process alone, the slower of two at once, and the best product."""
    alone = processes.ask("rate")
    pair = [processes.start("rate") for _ in range(2)]
    slower = min(processes.answer(child)["mean"] for child in pair)
    return {"alone": alone["mean"], "two at once": slower, "best": alone["best"]}


def busy(result: dict) -> bool:
    """Whether the product rates say that the contenders did not have the machine to themselves."""
    rates = [result["product_rate_before"], result["product_rate_after"]]
    return any(min(rate["alone"], rate["two at once"]) < QUIET * rate["best"] for rate in rates)


def heading(result: dict, about: Mapping[str, dict]) -> list[str]:
    """The lines before the table; about: what to know of each contender."""
    machine = result["machine"]
    rates = [(when, result[f"product_rate_{when}"]) for when in ("before", "after")]
    warning = [f"- THE MACHINE WAS BUSY: a rate is below {QUIET:.0%} of the best; the times say little"]
    return [
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}; "
        f"{result['date']}",
        "",
        *([f"- GPU (name, memory, driver, power limit): {machine['gpu']}"] if machine.get("gpu") else []),
        *(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in facts.items()) for name, facts in about.items()),
        *(
            f"- matrix product rate {when}: {rate['alone']:.0f} Gflop/s alone, {rate['two at once']:.0f} each "
            f"with two at once, {rate['best']:.0f} at best"
            for when, rate in rates
        ),
        *(warning if busy(result) else []),
        "- removed from the environment: " + (", ".join(result["removed_variables"]) or "nothing was set"),
        "",
    ]


def about_each(races: Iterable[dict[str, list]]) -> dict[str, dict]:
    """What each contender told of itself in its first run."""
    return {name: runs[0]["about"] for found in races for name, runs in found.items()}


def against_best(value_of: Mapping[str, float | None]) -> tuple[float, str] | None:
    """Our value divided by the smallest of the peers, and whose that is; None if one side has none."""
    peers = {name: value for name, value in value_of.items() if name != US and value is not None}
    if not peers or value_of.get(US) is None:
        return None
    best = min(peers, key=peers.get)
    return value_of[US] / peers[best], best


def versus(what: str, found: dict[str, list], of_a_round) -> str | None:
    """A line: our time as a share of that of the best peer, and from where to where it went by round.

    of_a_round: a function of the milliseconds of one round, or of all rounds together, such as the median.
    """
    ratio = against_best({name: of_a_round(times(runs)) for name, runs in found.items()})
    if ratio is None:
        return None
    rounds = [
        of_a_round(ours["ms"]) / of_a_round(peer["ms"])
        for ours, peer in zip(found[US], found[ratio[1]], strict=True)
    ]
    return (
        f"- {what}: {ratio[0]:.2f} of the best peer's ({ratio[1]}); "
        f"by round {min(rounds):.2f} to {max(rounds):.2f}"
    )


def times(runs: list[dict]) -> list[float]:
    """Milliseconds of every step of all rounds."""
    return [ms for run in runs for ms in run["ms"]]


def peak(runs: list[dict]) -> int | None:
    """The most bytes that a contender took in any round; None where nothing is known."""
    peaks = [processes.together(run["memory"]) for run in runs]
    return None if None in peaks else max(peaks)


@dataclass
class Entry:
    """A contender that takes its turn: what it is asked for, what it gave, and why it no longer takes part."""

    label: str
    request: dict
    runs: list[dict] = field(default_factory=list)
    failed: str | None = None


def in_turn(task: str, names: Iterable[str], rounds: int, label: str, **request) -> dict[str, list]:
    """What each contender gave in each round, in turn. Raises processes.Failed if one fails."""
    entries = {name: Entry(f"{label} {name}", {"name": name, **request}) for name in names}
    take_turns(task, list(entries.values()), rounds)
    for entry in entries.values():
        if entry.failed:
            raise processes.Failed(entry.failed)
    return {name: entry.runs for name, entry in entries.items()}


def take_turns(task: str, entries: list[Entry], rounds: int) -> None:
    """Let all do the task once a round, in turn: what disturbs the machine for long disturbs all.

    One that fails takes no further turn, and the others go on.
    """
    for number in range(rounds):
        for entry in entries:
            if entry.failed:
                continue
            try:
                entry.runs.append(processes.ask(task, **entry.request))
            except processes.Failed as error:
                entry.failed = str(error)
                print(f"{entry.label}: {error}: it is left out", file=sys.stderr, flush=True)
                continue
            median = statistics.median(entry.runs[-1]["ms"])
            told = f"{entry.label} round {number + 1} of {rounds}: {median:.2f} ms"
            print(told, file=sys.stderr, flush=True)


def gpu_peak(runs: list[dict]) -> dict[str, int]:
    """The most bytes of the GPU's memory, used and held, in any round; {} where nothing is known."""
    known = [run["gpu_memory"] for run in runs if run.get("gpu_memory")]
    return {name: max(one[name] for one in known) for name in known[0]} if known else {}


def keep(folder: Path, result: dict, text: str, suffix: str = "") -> Path:
    """Write <date>-<machine><suffix>.json and .md, beside those of earlier measurements of the day.

    Returns the path without its ending, for what else belongs there.
    """
    told = result["machine"]
    gpu = told.get("gpu") if on_gpu(result.get("backend", "numpy")) else None
    machine = (gpu.partition(",")[0] if gpu else f"{told['processor']} {told['cores']} cores").lower()
    stem = f"{result['date'][:10]}-{re.sub('[^a-z0-9]+', '-', machine).strip('-')}{suffix}"
    number, name = 1, stem
    while (folder / f"{name}.json").exists():
        number += 1
        name = f"{stem}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(f"\nkept as {folder / name}.json and .md", file=sys.stderr)
    return folder / name
