"""How time and memory of a training step grow with the sizes of the model. See bench/README.md."""

import argparse
import importlib.util
import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace

from baby_xp.arrays.registry import load
from baby_xp.resources import counts
from bench import harness, results
from bench.harness import US, say
from bench.results import mib
from bench.workloads import GPU_WARMUP, WORKLOADS, Workload, on_gpu

BASE, CPU, GPU_STEPS = WORKLOADS["W1"], "numpy", 200
HEAD = BASE.n_emb // BASE.n_heads
"""Channels of a head. A wider model gets more heads, as models do, so products inside a head keep their shape."""
AXES = {
    "n_ctx": (16, 32, 64, 128, 256, 512), "n_emb": (32, 64, 128, 256, 512), "n_layers": (1, 2, 4, 8, 16),
    "batch": (1, 2, 4, 8, 16, 32, 64),
}  # fmt: skip
JUMP, AGAIN = 1.5, 2
"""How much the time per counted operation may grow from one size to the next, and the memory per counted byte; and
further runs of a size that seems to jump, as a busy machine looks alike. The fastest and the smallest count."""
SECONDS, OVERHEAD_MS, GFLOPS, FEWEST, MOST, WARMUP = 2.0, 2.0, 40.0, 5, 200, 3
"""Steps of a size: as many as fit into SECONDS at a guessed speed, within bounds, and WARMUP steps before."""
BATCHES = {16: 1, 32: 2, 64: 4, 128: 8, 256: 16, 512: 32}
"""Sequences of a batch by n_emb. From one size to the next a step has about 8 times the work."""


def main() -> int:
    """Measure what the command line asks for, print the table and keep it under --out."""
    asked = parse()
    parts = {"scaling": (measure_scaling, scaling_document), "crossover": (measure_crossover, crossover_document)}
    measure, document = parts[asked.what]
    result, stem = results.show(measure(asked), document, asked.out, f"-{asked.what}")
    if stem and asked.what == "scaling" and importlib.util.find_spec("matplotlib"):
        plot(result, f"{stem}.svg")
    elif stem and asked.what == "scaling":
        say("bench.growth: matplotlib is not installed: no plot (pip install -e '.[plots]')")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser("bench.growth", __doc__)
    kinds = parser.add_subparsers(dest="what", required=True)
    scaling = harness.with_options(kinds.add_parser("scaling"), steps=None, out=None)
    known = harness.names_of(AXES, "axis")
    scaling.add_argument("--axes", type=known, default=",".join(AXES), help="sizes to increase (%(default)s)")
    crossover = kinds.add_parser("crossover")
    harness.with_options(crossover, backend="cupy", steps=None, rounds=2, out=None)
    usual, known = ",".join(map(str, BATCHES)), harness.names_of(map(str, BATCHES), "size")
    crossover.add_argument("--widths", type=known, default=usual, help="n_emb of each model (%(default)s)")
    asked = parser.parse_args()
    if asked.what == "crossover":
        asked.widths = sorted(map(int, asked.widths))
        if asked.backend == CPU:
            crossover.error("argument --backend: the backend is compared with numpy: choose another one")
    return asked


def at(axis: str, value: int) -> Workload:
    """W1 with one size changed, or with the width and the batch of the family."""
    if axis in ("n_emb", "family"):
        batch = BATCHES[value] if axis == "family" else BASE.batch_size
        return replace(BASE, n_emb=value, n_heads=max(1, value // HEAD), batch_size=batch)
    return replace(BASE, **{"batch_size" if axis == "batch" else axis: value})


def flops_of(workload: Workload) -> int:
    """Counted operations of a step."""
    config = workload.model(workload.dropout).config
    return counts.step_flops(config, workload.vocab_size, workload.batch_size)


def request_of(workload: Workload, backend: str, steps: int | None) -> dict:
    """What a child process is asked for, with as many steps as suit the size."""
    guess = OVERHEAD_MS + 1e-6 * flops_of(workload) / GFLOPS
    usual = WARMUP, min(MOST, max(FEWEST, round(1e3 * SECONDS / guess)))
    warmup, suitable = (GPU_WARMUP, GPU_STEPS) if on_gpu(backend) else usual
    pace = {"steps": steps or suitable, "warmup": warmup}
    return {"name": US, "workload": asdict(workload), **pace, "dropout": workload.dropout, "backend": backend}


def measure_scaling(asked: argparse.Namespace) -> Iterator[dict]:
    """All measurements so far along the axes, as they go into the JSON file."""
    with results.measurement(idle=harness.ask("bench.peers.ours:idle"), axes={}) as result:
        for axis in asked.axes:
            points = result["axes"][axis] = []
            for value in AXES[axis]:
                points.append(measured(axis, value, asked.steps, result["idle"], points[-1] if points else None))
                say(f"{axis} {value}: {points[-1]['ms']:.1f} ms")
                yield result
    yield result


def measured(axis: str, value: int, steps: int | None, idle: list[dict], previous: dict | None) -> dict:
    """A point of an axis: what its shapes say and what its runs gave; measured again where it seems to jump."""
    workload, runs = at(axis, value), []
    shape = workload.model(workload.dropout).config, workload.vocab_size, workload.batch_size
    while len(runs) <= AGAIN:
        runs.append(harness.ask("bench.peers:train", **request_of(workload, CPU, steps)))
        workers = int(runs[0]["about"]["workers"])
        point = {
            "axis": axis, "value": value, "flops": flops_of(workload), "workers": workers,
            "arrays": counts.arrays(*shape, workers, tokens_at_once=load(CPU).xp.tokens_at_once),
            "ms": min(statistics.median(run["ms"]) for run in runs), "peak": results.least_growth(runs, idle),
            "runs": runs,
        }  # fmt: skip
        if previous is None or not jumps(previous, point):
            break
    return point


def growth(previous: dict, point: dict) -> dict[str, float]:
    """Time per counted operation, and memory per counted byte, as multiples of the previous point's."""
    found = {"time": (point["ms"] / point["flops"]) / (previous["ms"] / previous["flops"])}
    if point["peak"] is not None and previous["peak"]:
        now, before = (one["peak"] / sum(one["arrays"].values()) for one in (point, previous))
        found["memory"] = now / before
    return found


def jumps(previous: dict, point: dict) -> list[str]:
    """Which of time and memory grew by more than the counts explain. A fall is no jump: calls cost less."""
    return [name for name, ratio in growth(previous, point).items() if ratio > JUMP]


def scaling_document(result: dict) -> list[str]:
    """The results as Markdown."""
    rows = [
        scaling_row(previous, point)
        for points in result["axes"].values()
        for previous, point in itertools.pairwise([None, *points])
    ]
    about = {**next(iter(result["axes"].values()))[0]["runs"][0]["about"], "workers": "see the table"}
    jumped = [f"{one['axis']} {one['value']} ({one['note']})" for one in rows if "JUMP" in one["note"]]
    found = "- jumps: " + ("; ".join(jumped) or f"none above {JUMP:g}")
    return results.page(result, {US: about}, rows, found)


def scaling_row(previous: dict | None, point: dict) -> dict[str, str]:
    """A line of the table. Its note says what a reader must not miss: another number of workers, and jumps."""
    grown, notes = {}, []
    if previous:
        grown, before, now = growth(previous, point), previous["workers"], point["workers"]
        notes = [f"workers {before} -> {now}"] if before != now else []
        notes += [f"JUMP in {name}" for name in jumps(previous, point)]
    return {
        "axis": point["axis"], "value": str(point["value"]), "workers": str(point["workers"]),
        "Gflop": f"{1e-9 * point['flops']:.2f}", "ms per step": f"{point['ms']:.2f}",
        "Gflop/s": f"{1e-6 * point['flops'] / point['ms']:.1f}",
        "ms/Gflop to previous": f"{grown['time']:.2f}" if "time" in grown else "",
        "counted MiB": mib(sum(point["arrays"].values()), 1), "peak MiB": mib(point["peak"], 1),
        "peak/counted to previous": f"{grown['memory']:.2f}" if "memory" in grown else "",
        "note": ", ".join(notes),
    }  # fmt: skip


def plot(result: dict, path: str) -> None:
    """Draw the time of a step over each size, and what it would be if it grew as the operations do."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(result["axes"]), 3.5), layout="constrained")
    panels = figure.subplots(1, len(result["axes"]), squeeze=False)[0]
    for panel, (axis, points) in zip(panels, result["axes"].items(), strict=True):
        values, ms = [one["value"] for one in points], [one["ms"] for one in points]
        per_flop = ms[-1] / points[-1]["flops"]
        panel.loglog(values, ms, "o-", label="measured")
        panel.loglog(values, [per_flop * one["flops"] for one in points], "--", label="as counted operations")
        panel.set_xticks(values, [str(value) for value in values])
        panel.xaxis.minorticks_off()
        panel.set_xlabel(axis)
        panel.set_ylabel("ms per step")
    panels[0].legend()
    figure.savefig(path)


# crossover ----------------------------------------------------------------------------------------------


def measure_crossover(asked: argparse.Namespace) -> Iterator[dict]:
    """All measurements so far on both, as they go into the JSON file. harness.Failed if a size fails on either."""
    with results.measurement(backend=asked.backend, points=[]) as result:
        for width in asked.widths:
            workload = at("family", width)
            requests = {name: request_of(workload, name, asked.steps) for name in (CPU, asked.backend)}
            *_, (runs, _) = harness.take_turns("bench.peers:train", requests, asked.rounds, f"n_emb {width}", True)
            cpu, gpu = (statistics.median(results.times(runs[name])) for name in requests)
            result["points"].append({
                "n_emb": width, "batch": workload.batch_size, "flops": flops_of(workload), "cpu": cpu, "gpu": gpu,
                "runs": runs,
            })  # fmt: skip
            yield result
    yield result


def crossover_document(result: dict) -> list[str]:
    """The results as Markdown."""
    points, backend = result["points"], result["backend"]
    rows = [
        {
            "n_emb": str(point["n_emb"]), "batch": str(point["batch"]),
            "Gflop per step": f"{1e-9 * point['flops']:.3f}", "numpy ms": f"{point['cpu']:.2f}",
            f"{backend} ms": f"{point['gpu']:.2f}", f"numpy / {backend}": f"{point['cpu'] / point['gpu']:.2f}",
        }
        for point in points
    ]  # fmt: skip
    return results.page(result, results.about_each(points), rows, f"- {crossing(points, backend)}")


def crossing(points: list[dict], backend: str) -> str:
    """From where on the GPU stays faster, in one line; between two sizes, along straight lines in logarithms."""
    gains = [point["cpu"] / point["gpu"] for point in points]
    behind = [number for number, gain in enumerate(gains) if gain <= 1]
    if not behind:
        return f"{backend} is faster at every size measured, {min(gains):.1f} to {max(gains):.1f} times"
    last = behind[-1]
    if last == len(points) - 1:
        return f"{backend} never overtakes numpy: at the largest size it takes {1 / gains[-1]:.1f} times as long"
    before, after = points[last : last + 2]
    share = math.log(gains[last]) / math.log(gains[last] / gains[last + 1])
    flops = before["flops"] * (after["flops"] / before["flops"]) ** share
    return (
        f"{backend} overtakes numpy at about {1e-9 * flops:.2g} Gflop per step, between n_emb {before['n_emb']} "
        f"with batch {before['batch']} and n_emb {after['n_emb']} with batch {after['batch']}; "
        f"at the largest size it is {gains[-1]:.1f} times as fast"
    )


if __name__ == "__main__":
    raise SystemExit(main())
