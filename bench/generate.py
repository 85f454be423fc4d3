"""How long generating a token takes with the key-value cache, beside the same model in PyTorch.

    python -m bench.generate [--workloads W1] [--batches 1,16] [--tokens N] [--rounds R] [--backend numpy]
                             [--peers torch,torch-1-thread] [--out FOLDER]

See bench/README.md for what is measured and how to read it.
"""

import argparse
import statistics
import sys
from pathlib import Path

from bench import arguments, contenders, generators, processes, report
from bench.report import US
from bench.tables import markdown
from bench.workloads import Workload, chosen

TOLERANCE = 1e-4
"""Largest distance of a logit from the largest one at which the two count as equally likely."""


def main() -> int:
    """Measure what the command line asks for, print the table and keep it under --out."""
    asked = parse()
    peers = contenders.present(asked.peers, asked.backend, "bench.generate")
    for workload in asked.workloads:
        for batch in asked.batches:
            problem = disagreement(workload, batch, peers, asked.backend)
            if problem:
                print(f"bench.generate: {problem}", file=sys.stderr)
                return 2
    result = measure(asked, peers)
    text = "\n".join(document(result))
    print(text)
    if asked.out:
        report.keep(asked.out, result, text, "-generate")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", type=chosen, default="W1", help="such as W1,W2 (%(default)s)")
    parser.add_argument("--batches", type=arguments.positives, default="1,16", help="texts at once (%(default)s)")
    parser.add_argument("--backend", type=arguments.backend, default="numpy", help="of baby_xp (%(default)s)")
    parser.add_argument(
        "--tokens", type=arguments.positive, default=1024, help="measured steps of a round (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=arguments.positive, default=3, help="rounds of each contender (%(default)s)"
    )
    known, all_peers = arguments.names_of(generators.PEERS, "peer"), ",".join(generators.PEERS)
    parser.add_argument("--peers", type=known, default=all_peers, help='such as torch, or "" (%(default)s)')
    parser.add_argument("--out", type=Path, help="folder for the results as JSON and Markdown")
    return parser.parse_args()


def disagreement(workload: Workload, batch: int, peers: list[str], backend: str) -> str | None:
    """Why the models cannot be compared, or None.

    baby_xp writes the likeliest tokens until its window has moved twice. A peer reads that text along, and each
    token must be the likeliest for it too. Two logits that differ by no more than rounding are a tie that each
    may break in its own way; as the peer reads and does not write, that does not lead the texts apart.
    """
    if not peers:
        return None
    tokens = 2 * workload.n_ctx
    ids = processes.ask("greedy", workload=workload.name, batch=batch, tokens=tokens, backend=backend)["ids"]
    for library in dict.fromkeys(map(contenders.library_of, peers)):
        found = processes.ask("read_along", workload=workload.name, ids=ids, backend=backend)["shortfalls"]
        for step, row in enumerate(found):
            wrong = [
                below for below in row if not below <= TOLERANCE
            ]  # so written that what is no number is wrong
            if wrong:
                return (
                    f"{workload.name} with {batch} at once is not compared: token {step + 1} of baby_xp is not "
                    f"the likeliest for {library}, its logit is {wrong[0]:.6f} below"
                )
    return None


def measure(asked: argparse.Namespace, peers: list[str]) -> dict:
    """All measurements, as they go into the JSON file."""
    result = {**report.begin(), "backend": asked.backend, "races": []}
    for workload in asked.workloads:
        for batch in asked.batches:
            runs = report.in_turn(
                "generate", (US, *peers), asked.rounds, f"{workload.name}, {batch} at once,",
                workload=workload.name, batch=batch, tokens=asked.tokens, warmup=2 * workload.n_ctx,
                backend=asked.backend,
            )  # fmt: skip
            result["races"].append({"workload": workload.name, "batch": batch, "runs": runs})
    result["product_rate_after"] = report.product_rate()
    return result


def document(result: dict) -> list[str]:
    """The results as Markdown."""
    races = result["races"]
    return [
        *report.heading(result, report.about_each(race["runs"] for race in races)),
        *markdown([row for race in races for row in rows_of(race)]),
        "",
        *(line for race in races for line in verdict(race)),
    ]


def rows_of(race: dict) -> list[dict[str, str]]:
    """A row of the table for each contender."""
    ours = report.times(race["runs"][US])
    rows = []
    for name, runs in race["runs"].items():
        times, peak = report.times(runs), report.peak(runs)
        median, mean = statistics.median(times), statistics.mean(times)
        rows.append({
            "workload": race["workload"],
            "at once": str(race["batch"]),
            "contender": name,
            "ms a step": f"{median:.3f}",
            "min": f"{min(times):.3f}",
            "max": f"{max(times):.3f}",
            "mean": f"{mean:.3f}",
            "tokens/s": f"{1e3 * race['batch'] / mean:,.0f}",
            "baby_xp / this": "" if name == US else f"{statistics.median(ours) / median:.2f}",
            "by mean": "" if name == US else f"{statistics.mean(ours) / mean:.2f}",
            "peak MiB": "" if peak is None else f"{peak / 2**20:.0f}",
        })  # fmt: skip
    return rows


def verdict(race: dict) -> list[str]:
    """The lines under the table: against the peer with the best median, and against that with the best mean."""
    label = f"{race['workload']}, {race['batch']} at once"
    lines = [
        report.versus(f"{label}: median step", race["runs"], statistics.median),
        report.versus(f"{label}: mean step", race["runs"], statistics.mean),
    ]
    return [line for line in lines if line]


if __name__ == "__main__":
    raise SystemExit(main())
