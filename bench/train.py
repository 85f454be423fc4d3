"""How long a training step takes, beside the same model in other libraries.

    python -m bench.train [--workloads W1,W2] [--backend numpy] [--steps N] [--rounds R] [--peers torch,jax]
                          [--out FOLDER]

See bench/README.md for what is measured and how to read it.
"""

import argparse
import datetime
import json
import os
import re
import statistics
import sys
from pathlib import Path

from bench import contenders, processes
from bench.tables import markdown
from bench.workloads import WORKLOADS, Workload, chosen

US = "baby_xp"
QUIET = 0.75
"""Share of its best speed that a process keeps over a while on a machine that does nothing else."""
TOLERANCE = 1e-4
"""Largest relative difference of losses between contenders that do the same work."""


def main() -> int:
    """Measure what the command line asks for, print the tables and keep them under --out."""
    arguments = parse()
    peers = []
    for peer in arguments.peers:
        reason = contenders.missing(peer, arguments.backend)
        if reason:
            print(f"bench.train: {reason}", file=sys.stderr)
        else:
            peers.append(peer)
    for workload in arguments.workloads:
        problem = disagreement(workload, peers, arguments.backend)
        if problem:
            print(f"bench.train: {problem}", file=sys.stderr)
            return 2
    result = measure(arguments, peers)
    text = "\n".join(document(result))
    print(text)
    if arguments.out:
        keep(arguments.out, result, text)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.train", description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", type=chosen, default="W1,W2,W3", help="such as W1,W2 (%(default)s)")
    parser.add_argument("--backend", default="numpy", help="of baby_xp (%(default)s)")
    parser.add_argument("--steps", type=positive, help="steps of a round (set for each workload)")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds of each contender (%(default)s)")
    all_peers = ",".join(contenders.PEERS)
    parser.add_argument("--peers", type=known, default=all_peers, help='such as torch, or "" (%(default)s)')
    parser.add_argument("--out", type=Path, help="folder for the results as JSON and Markdown")
    return parser.parse_args()


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def known(names: str) -> list[str]:
    """The peers of a list such as "torch"."""
    peers = [name for name in names.split(",") if name]
    if unknown := [name for name in peers if name not in contenders.PEERS]:
        raise argparse.ArgumentTypeError(f"unknown peer {unknown[0]!r}: choose {', '.join(contenders.PEERS)}")
    return peers


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
        if any(abs(b - a) > TOLERANCE * abs(a) for a, b in zip(losses[US], losses[peer], strict=True)):
            shown = "; ".join(f"{n} {losses[n][0]:.6f}, {losses[n][1]:.6f}" for n in (US, peer))
            return f"{workload.name} is not compared: losses before and after a step differ: {shown}"
    return None


def measure(arguments: argparse.Namespace, peers: list[str]) -> dict:
    """All measurements, as they go into the JSON file."""
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": processes.processor(), "cores": processes.cores(), **contenders.versions()},
        "removed_variables": [name for name in processes.REMOVED if name in os.environ],
        "product_rate_before": product_rate(),
        "workloads": {},
    }
    for workload in arguments.workloads:
        steps = arguments.steps or workload.steps
        result["workloads"][workload.name] = race(workload, peers, steps, arguments.rounds, arguments.backend)
    result["product_rate_after"] = product_rate()
    return result


def race(workload: Workload, peers: list[str], steps: int, rounds: int, backend: str) -> dict[str, list]:
    """What each contender gave in each round, in turn: what disturbs the machine for long disturbs all."""
    found = {name: [] for name in (US, *peers)}
    for number in range(rounds):
        for name, runs in found.items():
            runs.append(
                processes.ask(
                    "train", name=name, workload=workload.name, steps=steps, warmup=workload.warmup,
                    dropout=workload.dropout, backend=backend,
                )
            )  # fmt: skip
            median = statistics.median(runs[-1]["ms"])
            print(f"{workload.name} round {number + 1} of {rounds}: {name} {median:.1f} ms", file=sys.stderr)
    return found


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


def document(result: dict) -> list[str]:
    """The results as Markdown."""
    machine = result["machine"]
    rows = [row for name in result["workloads"] for row in rows_of(name, result["workloads"][name])]
    about = {name: runs[0]["about"] for found in result["workloads"].values() for name, runs in found.items()}
    rates = [(when, result[f"product_rate_{when}"]) for when in ("before", "after")]
    warning = [f"- THE MACHINE WAS BUSY: a rate is below {QUIET:.0%} of the best; the times say little"]
    return [
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}; "
        f"{result['date']}",
        "",
        *(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in facts.items()) for name, facts in about.items()),
        *(
            f"- matrix product rate {when}: {rate['alone']:.0f} Gflop/s alone, {rate['two at once']:.0f} each "
            f"with two at once, {rate['best']:.0f} at best"
            for when, rate in rates
        ),
        *(warning if busy(result) else []),
        "- removed from the environment: " + (", ".join(result["removed_variables"]) or "nothing was set"),
        "",
        *markdown(rows),
    ]


def rows_of(workload: str, found: dict[str, list]) -> list[dict[str, str]]:
    """A row of the table for each contender."""
    ours = statistics.median(ms for run in found[US] for ms in run["ms"])
    rows = []
    for name, runs in found.items():
        times = [ms for run in runs for ms in run["ms"]]
        median, peaks = statistics.median(times), [processes.together(run["memory"]) for run in runs]
        rows.append({
            "workload": workload,
            "contender": name,
            "ms a step": f"{median:.1f}",
            "min": f"{min(times):.1f}",
            "max": f"{max(times):.1f}",
            "tokens/s": f"{1e3 * WORKLOADS[workload].tokens / median:,.0f}",
            "baby_xp / this": "" if name == US else f"{ours / median:.2f}",
            "peak MiB": "" if None in peaks else f"{max(peaks) / 2**20:.0f}",
        })  # fmt: skip
    return rows


def keep(folder: Path, result: dict, text: str) -> None:
    """Write <date>-<machine>.json and .md, beside those of earlier measurements of the day."""
    machine = f"{result['machine']['processor']} {result['machine']['cores']} cores".lower()
    stem = f"{result['date'][:10]}-{re.sub('[^a-z0-9]+', '-', machine).strip('-')}"
    number, name = 1, stem
    while (folder / f"{name}.json").exists():
        number += 1
        name = f"{stem}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(f"\nkept as {folder / name}.json and .md", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
