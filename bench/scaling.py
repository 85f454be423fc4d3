"""How baby_xp's step time and memory grow with the sizes of the model, against what the shapes say.

    python -m bench.scaling [--axes n_ctx,n_emb,n_layers,batch] [--steps N] [--out FOLDER]

One size grows, the others stay those of W1. See bench/README.md for how to read it. NumPy only.
"""

import argparse
import importlib.util
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

from baby_xp import backend as backends
from baby_xp import counts, memory
from bench import arguments, processes, report
from bench.tables import markdown
from bench.workloads import WORKLOADS, Workload

BASE = WORKLOADS["W1"]
HEAD = BASE.n_emb // BASE.n_heads
"""Channels of a head. A wider model gets more heads, as models do, so products inside a head keep their shape."""
AXES = {
    "n_ctx": (16, 32, 64, 128, 256, 512),
    "n_emb": (32, 64, 128, 256, 512),
    "n_layers": (1, 2, 4, 8, 16),
    "batch": (1, 2, 4, 8, 16, 32, 64),
}
JUMP = 1.5
"""How much the time per counted operation may grow from one size to the next, and the memory per counted byte."""
AGAIN = 2
"""Further runs of a size that seems to jump: a busy moment looks alike. The fastest and the smallest count."""
SECONDS, OVERHEAD_MS, GFLOPS, FEWEST, MOST, WARMUP = 2.0, 2.0, 40.0, 5, 200, 3
"""Steps of a point: as many as fit into SECONDS at a guessed speed, within bounds, and WARMUP steps before."""
MIB = 2**20


def main() -> int:
    """Measure along the axes that the command line names, print the table and keep it under --out."""
    asked = parse()
    result = measure(asked)
    text = "\n".join(document(result))
    print(text)
    if asked.out:
        stem = report.keep(asked.out, result, text, "-scaling")
        if importlib.util.find_spec("matplotlib") is None:
            missing = "matplotlib is not installed: no plot (pip install -e '.[plots]')"
            print(f"bench.scaling: {missing}", file=sys.stderr)
        else:
            from bench import plots

            plots.scaling(result["axes"], f"{stem}.svg")
            print(f"plot: {stem}.svg", file=sys.stderr)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.scaling", description=__doc__.splitlines()[0])
    known = arguments.names_of(AXES, "axis")
    parser.add_argument("--axes", type=known, default=",".join(AXES), help="what grows (%(default)s)")
    parser.add_argument("--steps", type=arguments.positive, help="steps of each point (by its size)")
    parser.add_argument("--out", type=Path, help="folder for the results as JSON and Markdown, and the plot")
    asked = parser.parse_args()
    if not asked.axes:
        parser.error("argument --axes: name at least one")
    return asked


def measure(asked: argparse.Namespace) -> dict:
    """All measurements, as they go into the JSON file."""
    result = {**report.begin(), "axes": {}}
    found = processes.ask("footprint", what="baseline")["memory"]
    result["idle"] = found[0] if found else None
    for axis in asked.axes:
        points = result["axes"][axis] = []
        for value in AXES[axis]:
            points.append(measured(axis, value, asked.steps, result["idle"], points[-1] if points else None))
            print(f"{axis} {value}: {points[-1]['ms']:.1f} ms", file=sys.stderr)
    result["product_rate_after"] = report.product_rate()
    return result


def measured(axis: str, value: int, steps: int | None, idle: dict | None, previous: dict | None) -> dict:
    """A point of an axis; measured again where it seems to jump."""
    workload = at(axis, value)
    facts, runs = counted(axis, value, workload), []
    while len(runs) <= AGAIN:
        runs.append(
            processes.ask(
                "train", name=report.US, workload=asdict(workload), steps=steps or steps_for(facts["flops"]),
                warmup=WARMUP, dropout=workload.dropout,
            )
        )  # fmt: skip
        point = point_of(facts, runs, workload, idle)
        if previous is None or not jumps(previous, point):
            break
    return point


def at(axis: str, value: int) -> Workload:
    """W1 with one size changed."""
    if axis == "batch":
        return replace(BASE, batch_size=value)
    if axis == "n_emb":
        return replace(BASE, n_emb=value, n_heads=max(1, value // HEAD))
    return replace(BASE, **{axis: value})


def counted(axis: str, value: int, workload: Workload) -> dict:
    """What the shapes alone say of a point."""
    config = workload.model(workload.dropout).config
    flops = counts.step_flops(config, workload.vocab_size, workload.batch_size)
    return {"axis": axis, "value": value, "flops": flops}


def steps_for(flops: int) -> int:
    """Steps that make a point take about SECONDS."""
    guess = OVERHEAD_MS + 1e-6 * flops / GFLOPS
    return min(MOST, max(FEWEST, round(1e3 * SECONDS / guess)))


def point_of(facts: dict, runs: list[dict], workload: Workload, idle: dict | None) -> dict:
    """The facts with what the runs gave: ms, the least median of a run; peak, the least growth over an idle one.

    The arrays are counted for as many workers as there were.
    """
    workers = int(runs[0]["about"]["workers"])
    config = workload.model(workload.dropout).config
    at_once = backends.load("numpy").xp.tokens_at_once
    arrays = counts.arrays(config, workload.vocab_size, workload.batch_size, workers, tokens_at_once=at_once)
    known = idle is not None and all(run["memory"] for run in runs)
    return {
        **facts,
        "workers": workers,
        "arrays": arrays,
        "ms": min(statistics.median(run["ms"]) for run in runs),
        "peak": min(memory.growth(run["memory"], idle) for run in runs) if known else None,
        "runs": runs,
    }


def growth(previous: dict, point: dict) -> dict[str, float]:
    """Time per counted operation, and memory per counted byte, as multiples of the previous point's."""
    found = {"time": (point["ms"] / point["flops"]) / (previous["ms"] / previous["flops"])}
    if point["peak"] is not None and previous["peak"]:
        now, before = (one["peak"] / sum(one["arrays"].values()) for one in (point, previous))
        found["memory"] = now / before
    return found


def jumps(previous: dict, point: dict) -> list[str]:
    """Which of time and memory grew by more than the counts explain. What falls is no jump: calls cost less."""
    return [name for name, ratio in growth(previous, point).items() if ratio > JUMP]


def document(result: dict) -> list[str]:
    """The results as Markdown."""
    rows = [
        row(previous, point)
        for points in result["axes"].values()
        for previous, point in zip([None, *points], points, strict=False)
    ]
    about = {report.US: next(iter(result["axes"].values()))[0]["runs"][0]["about"]}
    about[report.US] = {name: told for name, told in about[report.US].items() if name != "workers"}
    jumped = [f"{one['axis']} {one['value']} ({one['note']})" for one in rows if "JUMP" in one["note"]]
    return [
        *report.heading(result, about),
        *markdown(rows),
        "",
        "- jumps: " + ("; ".join(jumped) or f"none above {JUMP:g}"),
    ]


def row(previous: dict | None, point: dict) -> dict[str, str]:
    """A line of the table."""
    grown = growth(previous, point) if previous else {}
    needed = sum(point["arrays"].values())
    return {
        "axis": point["axis"],
        "value": str(point["value"]),
        "workers": str(point["workers"]),
        "Gflop": f"{1e-9 * point['flops']:.2f}",
        "ms a step": f"{point['ms']:.2f}",
        "Gflop/s": f"{1e-6 * point['flops'] / point['ms']:.1f}",
        "ms/Gflop to previous": f"{grown['time']:.2f}" if "time" in grown else "",
        "counted MiB": f"{needed / MIB:.1f}",
        "peak MiB": "" if point["peak"] is None else f"{point['peak'] / MIB:.1f}",
        "peak/counted to previous": f"{grown['memory']:.2f}" if "memory" in grown else "",
        "note": note(previous, point),
    }


def note(previous: dict | None, point: dict) -> str:
    """What a reader must not miss: another number of workers, and jumps."""
    if previous is None:
        return ""
    before, now = previous["workers"], point["workers"]
    workers = [f"workers {before} -> {now}"] if before != now else []
    return ", ".join([*workers, *(f"JUMP in {name}" for name in jumps(previous, point))])


if __name__ == "__main__":
    raise SystemExit(main())
