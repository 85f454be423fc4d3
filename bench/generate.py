"""The time of generating a token with the key-value cache, compared with PyTorch. See bench/README.md."""

import argparse
import statistics
from collections.abc import Iterator

from bench import harness, peers, results
from bench.harness import US, say
from bench.results import mib
from bench.workloads import Workload, named

TOLERANCE = 1e-4
"""Largest distance of a logit from the largest one at which the two count as equally likely."""


def main() -> int:
    """Measure what the command line asks for, print the table and keep it under --out."""
    asked = parse()
    found = peers.present(asked.peers, asked.backend, "bench.generate")
    for workload in asked.workloads:
        for batch in asked.batches:
            if problem := disagreement(workload, batch, found, asked.backend):
                say(f"bench.generate: {problem}")
                return 2
    results.show(measure(asked, found), document, asked.out, "-generate")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser("bench.generate", __doc__, backend="numpy", rounds=3, out=None)
    parser.add_argument("--workloads", type=named, default="W1", help="of W1 to W5 (%(default)s)")
    parser.add_argument("--batches", type=harness.positives, default="1,16", help="texts at once (%(default)s)")
    parser.add_argument("--tokens", type=harness.positive, default=1024, help="measured steps (%(default)s)")
    others = [name for name in peers.GENERATORS if name != US]
    known = harness.names_of(others, "peer", none=True)
    parser.add_argument("--peers", type=known, default=",".join(others), help='libraries; "": none (%(default)s)')
    return parser.parse_args()


def disagreement(workload: Workload, batch: int, others: list[str], backend: str) -> str | None:
    """Why the models cannot be compared, or None: a token that baby_xp writes is not the peer's most likely one.

    Two logits that differ by no more than rounding are a tie, which each may break in its own way.
    """
    if not others:
        return None
    request = {"workload": workload.name, "backend": backend}
    ids = harness.ask("bench.peers.ours:greedy", batch=batch, tokens=2 * workload.n_ctx, **request)
    for step, row in enumerate(harness.ask("bench.peers.torch:shortfalls", ids=ids, **request)):
        wrong = [below for below in row if not below <= TOLERANCE]  # written so that NaN counts as wrong
        if wrong:
            why = f"token {step + 1} of baby_xp is not torch's most likely one, its logit is {wrong[0]:.6f} below"
            return f"{workload.name} with {batch} at once is not compared: {why}"
    return None


def measure(asked: argparse.Namespace, others: list[str]) -> Iterator[dict]:
    """All measurements so far, as they go into the JSON file."""
    with results.measurement(backend=asked.backend, races=[]) as result:
        for workload in asked.workloads:
            for batch in asked.batches:
                request = {"workload": workload.name, "batch": batch, "tokens": asked.tokens}
                request |= {"warmup": 2 * workload.n_ctx, "backend": asked.backend}
                requests = {name: {"name": name, **request} for name in (US, *others)}
                label = f"{workload.name}, {batch} at once,"
                *_, (runs, _) = harness.take_turns("bench.peers:generate", requests, asked.rounds, label, True)
                result["races"].append({"workload": workload.name, "batch": batch, "runs": runs})
                yield result
    yield result


def document(result: dict) -> list[str]:
    """The results as Markdown."""
    rows, below = ([line for race in result["races"] for line in of(race)] for of in (rows_of, verdict))
    return results.page(result, results.about_each(result["races"]), rows, *below)


def rows_of(race: dict) -> list[dict[str, str]]:
    """A row of the table for each library."""
    means = {name: statistics.mean(results.times(runs)) for name, runs in race["runs"].items()}
    return [
        {
            "workload": race["workload"], "at once": str(race["batch"]),
            **results.time_cells(name, race["runs"], 3), "mean": f"{mean:.3f}",
            "tokens/s": f"{1e3 * race['batch'] / mean:,.0f}",
            "by mean": results.ratio_cell(name, race["runs"], statistics.mean),
            "peak MiB": mib(results.peak(race["runs"][name])),
        }
        for name, mean in means.items()
    ]  # fmt: skip


def verdict(race: dict) -> list[str | None]:
    """The lines under the table: against the peer with the best median, and against that with the best mean."""
    label, averages = f"{race['workload']}, {race['batch']} at once", (statistics.median, statistics.mean)
    return [results.versus(f"{label}: {one.__name__} step", race["runs"], one) for one in averages]


if __name__ == "__main__":
    raise SystemExit(main())
