"""How long a training step takes, beside the same model in other libraries.

    python -m bench.train [--workloads W1,W2] [--backend numpy] [--steps N] [--rounds R] [--peers torch,jax]
                          [--out FOLDER]

See bench/README.md for what is measured and how to read it.
"""

import argparse
import statistics
import sys
from pathlib import Path

from baby_xp import counts
from bench import arguments, contenders, processes, report
from bench.report import US
from bench.tables import markdown
from bench.workloads import WORKLOADS, Workload, chosen

TOLERANCE = 1e-4
"""Largest relative difference of losses between contenders that do the same work."""


def main() -> int:
    """Measure what the command line asks for, print the tables and keep them under --out."""
    asked = parse()
    peers = contenders.present(asked.peers, asked.backend, "bench.train")
    for workload in asked.workloads:
        problem = disagreement(workload, peers, asked.backend)
        if problem:
            print(f"bench.train: {problem}", file=sys.stderr)
            return 2
    result = measure(asked, peers)
    text = "\n".join(document(result))
    print(text)
    if asked.out:
        report.keep(asked.out, result, text)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.train", description=__doc__.splitlines()[0])
    all_workloads, all_peers = ",".join(WORKLOADS), ",".join(contenders.PEERS)
    parser.add_argument("--workloads", type=chosen, default=all_workloads, help="such as W1,W2 (%(default)s)")
    parser.add_argument("--backend", type=arguments.backend, default="numpy", help="of baby_xp (%(default)s)")
    parser.add_argument("--steps", type=arguments.positive, help="steps of a round (set for each workload)")
    parser.add_argument(
        "--rounds", type=arguments.positive, default=3, help="rounds of each contender (%(default)s)"
    )
    known = arguments.names_of(contenders.PEERS, "peer")
    parser.add_argument("--peers", type=known, default=all_peers, help='such as torch, or "" (%(default)s)')
    parser.add_argument("--out", type=Path, help="folder for the results as JSON and Markdown")
    return parser.parse_args()


def disagreement(workload: Workload, peers: list[str], backend: str) -> str | None:
    """Why contenders cannot be compared, or None.

    Each gives the loss of the same batch at the same weights, without dropout, before and after a step of
    training: the first shows another model, the second other gradients or another optimizer.
    """
    losses = {
        name: processes.ask("losses", name=name, workload=workload.name, backend=backend)["losses"]
        for name in (US, *peers)
    }
    for peer in peers:
        # so written that a loss which is no number differs too
        if not all(abs(b - a) <= TOLERANCE * abs(a) for a, b in zip(losses[US], losses[peer], strict=True)):
            shown = "; ".join(f"{n} {losses[n][0]:.6f}, {losses[n][1]:.6f}" for n in (US, peer))
            return f"{workload.name} is not compared: losses before and after a step differ: {shown}"
    return None


def measure(asked: argparse.Namespace, peers: list[str]) -> dict:
    """All measurements, as they go into the JSON file."""
    result = {**report.begin(), "backend": asked.backend, "step_flops": {}, "workloads": {}}
    for workload in asked.workloads:
        config = workload.model(workload.dropout).config
        flops = counts.step_flops(config, workload.vocab_size, workload.batch_size)
        result["step_flops"][workload.name] = flops
        result["workloads"][workload.name] = report.in_turn(
            "train", (US, *peers), asked.rounds, workload.name, workload=workload.name,
            steps=asked.steps or workload.steps, warmup=workload.warmup, dropout=workload.dropout,
            backend=asked.backend,
        )  # fmt: skip
    result["product_rate_after"] = report.product_rate()
    return result


def products_ms(result: dict, workload: str) -> float | None:
    """Milliseconds that the matrix products of a step would take at full speed; None on a GPU.

    Full speed is the best product of this run, before or after, on every core. It is a speed of CPU cores.
    """
    if result["backend"] == "cupy":
        return None
    best = max(result[f"product_rate_{when}"]["best"] for when in ("before", "after"))  # Gflop/s of a core
    return 1e-6 * result["step_flops"][workload] / (result["machine"]["cores"] * best)


def document(result: dict) -> list[str]:
    """The results as Markdown."""
    races = result["workloads"]
    return [
        *report.heading(result, report.about_each(races.values())),
        *markdown([row for name in races for row in rows_of(result, name)]),
        "",
        *(line for name in races for line in verdict(result, name)),
    ]


def rows_of(result: dict, workload: str) -> list[dict[str, str]]:
    """A row of the table for each contender."""
    found, products = result["workloads"][workload], products_ms(result, workload)
    ours = statistics.median(report.times(found[US]))
    rows = []
    for name, runs in found.items():
        times, peak = report.times(runs), report.peak(runs)
        median = statistics.median(times)
        rows.append({
            "workload": workload,
            "contender": name,
            "ms a step": f"{median:.1f}",
            "min": f"{min(times):.1f}",
            "max": f"{max(times):.1f}",
            "tokens/s": f"{1e3 * WORKLOADS[workload].tokens / median:,.0f}",
            "baby_xp / this": "" if name == US else f"{ours / median:.2f}",
            "products' share": "" if products is None else f"{products / median:.0%}",
            "peak MiB": "" if peak is None else f"{peak / 2**20:.0f}",
        })  # fmt: skip
    return rows


def verdict(result: dict, workload: str) -> list[str]:
    """The lines under the table: against the best peer in time and in memory, and the floor of the products."""
    found, products = result["workloads"][workload], products_ms(result, workload)
    lines = [report.versus(f"{workload}: time a step", found, statistics.median)]
    memory = report.against_best({name: report.peak(runs) for name, runs in found.items()})
    if memory:
        lines.append(f"- {workload}: peak memory: {memory[0]:.2f} of the smallest peer's ({memory[1]})")
    if products is not None:
        gflop = 1e-9 * result["step_flops"][workload]
        lines.append(f"- {workload}: {gflop:.1f} Gflop of matrix products a step: {products:.1f} ms at full speed")
    return [line for line in lines if line]


if __name__ == "__main__":
    raise SystemExit(main())
