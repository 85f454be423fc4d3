"""The newest results of bench.train on each machine class, and tables with a column for each class.

A class has one file. For each workload it has one whole run on one machine; a newer run replaces it.
"""

import itertools
import json
import statistics

from baby_xp import files
from baby_xp.errors import BabyError
from bench import harness, results, roofline
from bench.harness import US, say
from bench.peers import WITHOUT_NUMBA
from bench.variants import RESULTS
from bench.workloads import WORKLOADS

Kept = dict[str, dict[str, dict]]
"""Results of bench.train with a single race each, by machine class and workload."""
FAST, PLAIN, PEER, SMALLEST, WHEN, ALONE = (
    "with numba", "NumPy alone", "best peer", "smallest peer", "measured", "products alone",
)  # fmt: skip
TABLES = {
    "time": (FAST, PLAIN, PEER, WHEN), "memory": (FAST, PLAIN, SMALLEST), "products": (FAST, PLAIN, ALONE),
}  # fmt: skip
"""The rows of a workload in each table."""
LACKING = "not measured"


def read() -> Kept:
    """All that is kept. Raises BabyError for a file that is no such result."""
    kept = {}
    for file in sorted(RESULTS.glob("train-*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            kept[content["class"]] = content["workloads"]
        except (ValueError, KeyError, TypeError):
            raise BabyError(f"{file} is not a result of bench.train: restore it, or delete it") from None
    return kept


def keep(result: dict) -> None:
    """Replace what is kept of this machine class by the races of a result; those without baby_xp do not count."""
    name = harness.class_of(result["machine"])
    races = {race["workload"]: race for race in result["races"] if US in race["runs"]}
    found = {**read().get(name, {}), **{workload: {**result, "races": [race]} for workload, race in races.items()}}
    file = RESULTS / f"train-{results.words_of(name)}.json"
    files.write(file, json.dumps({"class": name, "workloads": dict(sorted(found.items()))}, indent=1) + "\n")
    say(f"kept as the newest of this machine class, {', '.join(races) or 'nothing'}: {file}")


def document(kept: Kept) -> list[str]:
    """The tables as Markdown."""
    return [line for name, lines in tables(kept).items() for line in (name, "", *lines, "")]


def tables(kept: Kept) -> dict[str, list[str]]:
    """The tables by name, as lines of Markdown: rows for each measured workload, a column for each class."""
    cells = {name: {of: cells_of(result) for of, result in found.items()} for name, found in kept.items()}
    measured = [workload for workload in WORKLOADS if any(workload in found for found in kept.values())]
    lines = {}
    for table, labels in TABLES.items():
        rows = []
        for workload, label in itertools.product(measured, labels):
            at = (table, label)
            of_class = {name: found.get(workload, {}).get(at, LACKING) for name, found in cells.items()}
            rows.append({"": f"{workload}, {label}", **of_class})
        lines[table] = results.markdown(rows)
    return lines


def cells_of(result: dict) -> dict[tuple[str, str], str]:
    """What a class has in the rows of a workload, by table and label."""
    (race,) = result["races"]
    medians = {name: statistics.median(results.times(runs)) for name, runs in race["runs"].items()}
    peaks = {name: results.peak(runs) for name, runs in race["runs"].items()}
    least, best = roofline.floor(result, race)[0], max(rate["best"] for rate in results.rates(result).values())
    cells = {
        ("time", WHEN): result["date"][:10] + (", on a busy machine" if results.was_busy(result) else ""),
        ("products", ALONE): f"{ms_of(least)} at {best:.0f} Gflop/s per core",
    }
    for name in (WITHOUT_NUMBA, US):
        if name not in race["runs"]:
            continue
        label = FAST if "numba" in race["runs"][name][0]["about"]["backend"] else PLAIN
        cells["time", label] = ms_of(medians[name]) + share(medians, name)
        cells["products", label] = f"{least / medians[name]:.0%}"
        if peaks[name] is not None:
            cells["memory", label] = f"{results.mib(peaks[name])} MiB" + share(peaks, name)
    if fastest := results.best_peer(medians):
        cells["time", PEER] = f"{ms_of(medians[fastest])} ({fastest})"
    if smallest := results.best_peer(peaks):
        cells["memory", SMALLEST] = f"{results.mib(peaks[smallest])} MiB ({smallest})"
    return cells


def ms_of(ms: float) -> str:
    """Milliseconds in a cell."""
    return f"{ms:,.1f} ms" if ms < 100 else f"{ms:,.0f} ms"


def share(value_of: dict, name: str) -> str:
    """The value of ours as a share of the best peer's, for a cell behind the value; "" without a peer."""
    found = results.against_best(value_of, name)
    return "" if found is None else f", ratio {found[0]:.2f}"
