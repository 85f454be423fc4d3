"""From which size of model on a GPU trains faster than the CPU: baby_xp on both, in turn.

    python -m bench.crossover [--backend cupy] [--widths 16,64,256] [--steps N] [--rounds R] [--out FOLDER]

One family of models grows in width and batch. See bench/README.md for how to read it.
"""

import argparse
import importlib.util
import math
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

from baby_xp import counts
from bench import arguments, processes, report, scaling
from bench.report import US, Entry
from bench.tables import markdown
from bench.workloads import GPU_WARMUP, WORKLOADS, Workload, on_gpu

CPU = "numpy"
BATCHES = {16: 1, 32: 2, 64: 4, 128: 8, 256: 16, 512: 32}
"""Sequences of a batch by n_emb; all else is W1's. From one size to the next a step has about 8 times the work."""
GPU_STEPS = 200


def main() -> int:
    """Measure the family on both, print the table and where they cross, and keep them under --out."""
    asked = parse()
    result = measure(asked)
    text = "\n".join(document(result))
    print(text)
    if asked.out:
        stem = report.keep(asked.out, result, text, "-crossover")
        if importlib.util.find_spec("matplotlib") is None:
            missing = "matplotlib is not installed: no plot (pip install -e '.[plots]')"
            print(f"bench.crossover: {missing}", file=sys.stderr)
        else:
            from bench import plots

            plots.crossover(result["points"], result["backend"], f"{stem}.svg")
            print(f"plot: {stem}.svg", file=sys.stderr)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.crossover", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", type=arguments.backend, default="cupy", help="beside numpy (%(default)s)")
    usual = ",".join(map(str, BATCHES))
    parser.add_argument("--widths", type=arguments.positives, default=usual, help="n_emb of each (%(default)s)")
    parser.add_argument("--steps", type=arguments.positive, help="steps of a round (by size)")
    parser.add_argument("--rounds", type=arguments.positive, default=2, help="rounds of each (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the results as JSON and Markdown, and the plot")
    asked = parser.parse_args()
    if unknown := [width for width in asked.widths if width not in BATCHES]:
        parser.error(f"argument --widths: no size {unknown[0]}: choose from {usual}")
    if asked.backend == CPU:
        parser.error("argument --backend: numpy is what it is measured against")
    asked.widths.sort()
    return asked


def at(width: int) -> Workload:
    """The model of the family with that n_emb."""
    base = WORKLOADS["W1"]
    return replace(base, n_emb=width, n_heads=max(1, width // scaling.HEAD), batch_size=BATCHES[width])


def measure(asked: argparse.Namespace) -> dict:
    """All measurements, as they go into the JSON file. Raises processes.Failed if a size fails on either side."""
    result = {**report.begin(), "backend": asked.backend, "points": []}
    for width in asked.widths:
        workload = at(width)
        config = workload.model(workload.dropout).config
        flops = counts.step_flops(config, workload.vocab_size, workload.batch_size)
        entries = {
            backend: Entry(f"n_emb {width}: {backend}", request(workload, backend, flops, asked.steps))
            for backend in (CPU, asked.backend)
        }
        report.take_turns("train", list(entries.values()), asked.rounds)
        for entry in entries.values():
            if entry.failed:
                raise processes.Failed(entry.failed)
        runs = {backend: entry.runs for backend, entry in entries.items()}
        result["points"].append(point_of(width, workload, flops, runs, asked.backend))
    result["product_rate_after"] = report.product_rate()
    return result


def request(workload: Workload, backend: str, flops: int, steps: int | None) -> dict:
    """What a child process is asked for."""
    warmup, usual = (GPU_WARMUP, GPU_STEPS) if on_gpu(backend) else (scaling.WARMUP, scaling.steps_for(flops))
    return {
        "name": US, "workload": asdict(workload), "steps": steps or usual, "warmup": warmup,
        "dropout": workload.dropout, "backend": backend,
    }  # fmt: skip


def point_of(width: int, workload: Workload, flops: int, runs: dict[str, list], backend: str) -> dict:
    """A size: what its shapes say, medians of a step on both sides in ms, and all runs."""
    cpu, gpu = (statistics.median(report.times(runs[name])) for name in (CPU, backend))
    return {
        "n_emb": width, "batch": workload.batch_size, "flops": flops, "cpu": cpu, "gpu": gpu, "runs": runs,
    }  # fmt: skip


def document(result: dict) -> list[str]:
    """The results as Markdown."""
    points, backend = result["points"], result["backend"]
    rows = [
        {
            "n_emb": str(point["n_emb"]),
            "batch": str(point["batch"]),
            "Gflop a step": f"{1e-9 * point['flops']:.3f}",
            "numpy ms": f"{point['cpu']:.2f}",
            f"{backend} ms": f"{point['gpu']:.2f}",
            f"numpy / {backend}": f"{point['cpu'] / point['gpu']:.2f}",
        }
        for point in points
    ]
    about = report.about_each(point["runs"] for point in points)
    return [*report.heading(result, about), *markdown(rows), "", f"- {crossing(points, backend)}"]


def crossing(points: list[dict], backend: str) -> str:
    """Where the GPU overtakes the CPU, in one line; between two sizes, along straight lines in logarithms.

    It counts from where on it stays faster: at a small size it may be so by chance.
    """
    gains = [point["cpu"] / point["gpu"] for point in points]
    behind = [number for number, gain in enumerate(gains) if gain <= 1]
    if not behind:
        return f"{backend} is faster at every size measured, {min(gains):.1f} to {max(gains):.1f} times"
    last = behind[-1]
    if last == len(points) - 1:
        return f"{backend} never overtakes numpy: at the largest size it takes {1 / gains[-1]:.1f} times as long"
    before, after = points[last], points[last + 1]
    share = -math.log(gains[last]) / (math.log(gains[last + 1]) - math.log(gains[last]))
    flops = before["flops"] * (after["flops"] / before["flops"]) ** share
    return (
        f"{backend} overtakes numpy at about {1e-9 * flops:.2g} Gflop a step, between n_emb {before['n_emb']} "
        f"with batch {before['batch']} and n_emb {after['n_emb']} with batch {after['batch']}; "
        f"at the largest size it is {gains[-1]:.1f} times as fast"
    )


if __name__ == "__main__":
    raise SystemExit(main())
