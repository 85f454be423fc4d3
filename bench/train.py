"""The time of a training step, compared with the same model in other libraries. See bench/README.md."""

import argparse
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

from baby_xp.errors import BabyError
from baby_xp.resources import counts
from bench import harness, machines, peers, results, roofline, variants
from bench.harness import US, say
from bench.results import mib
from bench.workloads import FOR_A_GPU, TOLERANCES, WORKLOADS, Workload, named, on_gpu


def main() -> int:
    """Measure what the command line asks for, print the tables and keep them; or print those of all classes.

    Exit code 1 if a library failed or was left out on the way: the others are measured all the same.
    """
    asked = parse()
    try:
        kept = machines.read() if asked.keep or asked.table else {}  # unreadable files show before a measurement
        if asked.table:
            variants.show(machines.document(kept), machines.tables(kept), asked.page)
            return 0
    except BabyError as error:
        say(f"bench.train: {error}")
        return 2
    found = peers.present(asked.peers, asked.backend, "bench.train")
    lineup = {precision: able(found, precision) for precision in asked.precision}
    result, _ = results.show(measure(asked, lineup), document, asked.out)
    if asked.keep:
        machines.keep(result)
    return 1 if any(race["failed"] for race in result["races"]) else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser("bench.train", __doc__, backend="numpy", device=None, steps=None, rounds=3, out=None)
    parser.add_argument("--workloads", type=named, help=f"of {','.join(WORKLOADS)} (all; on a CPU all but W5)")
    known = harness.names_of(TOLERANCES, "precision")
    parser.add_argument("--precision", type=known, default="float32", help="of matrix products (%(default)s)")
    others = [name for name in peers.TRAINERS if name != US]
    usual_peers = ",".join(name for name in others if name not in peers.BY_NAME)
    known = harness.names_of(others, "peer", none=True)
    parser.add_argument("--peers", type=known, default=usual_peers, help='libraries; "": none (%(default)s)')
    parser.add_argument("--keep", action="store_true", help="keep it as the newest result of this machine class")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the tables of all classes")
    parser.add_argument("--page", type=Path, help="with --table: also insert the tables into this page")
    asked = parser.parse_args()
    if asked.backend == "jax":
        asked.device = asked.device or "cpu"  # where its peers then are
    asked.backend = f"{asked.backend}:{asked.device}" if asked.device else asked.backend
    if asked.precision != ["float32"] and not on_gpu(asked.backend):
        parser.error(f"argument --precision: {asked.precision[-1]} is for a GPU: cupy, or jax with --device gpu")
    if asked.keep and asked.backend != "numpy":
        parser.error("argument --keep: it is for the backend numpy, as its results are compared by processor")
    if asked.page and not asked.table:
        parser.error("argument --page: it needs --table")
    usual = [one for one in WORKLOADS.values() if on_gpu(asked.backend) or one.name not in FOR_A_GPU]
    asked.workloads = asked.workloads or usual
    return asked


def able(others: list[str], precision: str) -> list[str]:
    """baby_xp and those peers that have this precision; a line for each other one says that it does not."""
    lacking = [name for name in (US, *others) if precision in peers.LACKING.get(name, ())]
    for name in lacking:
        say(f"bench.train: {name} has no {precision} precision yet: it is left out there")
    return [name for name in (US, *others) if name not in lacking]


def left_out(workload: Workload, lineup: dict[str, list[str]], backend: str) -> dict[tuple[str, str], str]:
    """Why some cannot be compared on a workload, by precision and name: their losses differ, or they fail.

    Each computes the loss of the same batch at the same weights, without dropout, before and after a step of
    training: the first would differ with another model, the second with other gradients or another optimizer.
    All are compared with baby_xp in float32, a coarser precision within wider bounds; nobody is without that.
    """
    request = {"workload": workload.name, "backend": backend}
    all_of_them, found = [(precision, name) for precision, names in lineup.items() for name in names], {}
    try:
        ours = harness.ask("bench.peers:losses", name=US, precision="float32", **request)
    except harness.Failed as error:
        all_of_them, found = [], dict.fromkeys(all_of_them, f"{error}: {US} float32 cannot be compared with")
    for precision, name in all_of_them:
        if (name, precision) == (US, "float32"):
            continue
        try:
            theirs = harness.ask("bench.peers:losses", name=name, precision=precision, **request)
        except harness.Failed as error:
            found[precision, name] = str(error)
            continue
        # written so that NaN counts as a difference
        if not all(abs(b - a) <= TOLERANCES[precision] * abs(a) for a, b in zip(ours, theirs, strict=True)):
            pairs = {name: theirs, f"those of {US}": ours}
            losses = ", ".join(f"{who} {first:.6f} {last:.6f}" for who, (first, last) in pairs.items())
            found[precision, name] = f"its losses before and after a step differ: {losses}"
    for (precision, name), why in found.items():
        say(f"bench.train: {workload.name}: {name} {precision} is left out: {why}")
    return found


def measure(asked: argparse.Namespace, lineup: dict[str, list[str]]) -> Iterator[dict]:
    """All measurements so far, as they go into the JSON file: a race for each workload and precision."""
    with results.measurement(backend=asked.backend, rooflines={}, races=[]) as result:
        for precision in lineup if on_gpu(asked.backend) else ():
            try:
                rates = harness.ask("bench.roofline:measure", backend=asked.backend, precision=precision)
            except harness.Failed as error:
                rates = None
                say(f"bench.train: no roofline for {precision}: {error}")
            result["rooflines"][precision] = rates
        for workload in asked.workloads:
            before = result["races"]
            for races in races_of(workload, asked, lineup):
                result["races"] = before + races
                yield result
    yield result


def races_of(workload: Workload, asked: argparse.Namespace, lineup: dict[str, list[str]]) -> Iterator[list[dict]]:
    """After each turn, the runs of a workload and counts of its shapes, for each precision. All take turns."""
    failed = left_out(workload, lineup, asked.backend)
    warmup, steps = workload.pace(asked.backend)
    request = {"workload": workload.name, "steps": asked.steps or steps, "warmup": warmup}
    request |= {"dropout": workload.dropout, "backend": asked.backend}
    requests = {
        (precision, name): {"name": name, "precision": precision, **request}
        for precision, names in lineup.items()
        for name in names
        if (precision, name) not in failed
    }
    shape = workload.model(workload.dropout).config, workload.vocab_size, workload.batch_size
    turns = harness.take_turns("bench.peers:train", requests, asked.rounds, workload.name)
    for runs, lost in itertools.chain([({}, {})], turns):
        yield [
            {
                "workload": workload.name,
                "precision": precision,
                "flops": (roofline if on_gpu(asked.backend) else counts).step_flops(*shape),
                "bytes": roofline.step_bytes(*shape, itemsize=2 if precision == "half" else 4),
                "runs": {name: found for (kind, name), found in runs.items() if kind == precision},
                "failed": {name: why for (kind, name), why in {**failed, **lost}.items() if kind == precision},
            }
            for precision in lineup
        ]


def document(result: dict) -> list[str]:
    """The results as Markdown."""
    races = result["races"]
    rows, below = ([line for race in races for line in of(result, race)] for of in (rows_of, verdict))
    rates = [
        f"- {precision}: {rates['device']}: a product of {rates['n']:,} rows at {1e-12 * rates['flops']:.2f} "
        f"Tflop/s, a sum of {rates['elements']:,} elements at {1e-9 * rates['bytes']:,.0f} GB/s"
        for precision, rates in result["rooflines"].items()
        if rates
    ]
    return results.page(result, results.about_each(races), rows, *rates, *below)


def rows_of(result: dict, race: dict) -> list[dict[str, str]]:
    """A row of the table for each library."""
    tokens = WORKLOADS[race["workload"]].batch_size * WORKLOADS[race["workload"]].n_ctx
    gpu, workload, rows, (least, _) = on_gpu(result["backend"]), race["workload"], [], roofline.floor(result, race)
    for name, runs in race["runs"].items():
        median, memory = statistics.median(results.times(runs)), results.gpu_peak(runs)
        more = {"share of the roofline" if gpu else "products' share": f"{least / median:.0%}" if least else ""}
        if gpu:
            used_and_held = f"{mib(memory['used'])} / {mib(memory['held'])}" if memory else ""
            more["peak GPU MiB used/held"] = used_and_held
        rows.append({
            "workload": workload, **({"precision": race["precision"]} if gpu else {}),
            **results.time_cells(name, race["runs"], 3 if gpu else 1),
            "tokens/s": f"{1e3 * tokens / median:,.0f}", **more,
            "peak MiB": mib(results.peak(runs)),
        })  # fmt: skip
    return rows


def verdict(result: dict, race: dict) -> list[str]:
    """The lines under the table: against the best peer in time and in memory, the floor, and the goals."""
    gpu, runs_of = on_gpu(result["backend"]), race["runs"]
    label = f"{race['workload']} {race['precision']}" if gpu else race["workload"]
    ours = [name for name in runs_of if results.is_ours(name)]
    lines = [results.versus(f"{label}: {name}'s time per step", runs_of, us=name) for name in ours]
    peak = (lambda runs: results.gpu_peak(runs).get("used")) if gpu else results.peak
    if memory := results.against_best({name: peak(runs) for name, runs in runs_of.items()}):
        what = "peak GPU memory in use" if gpu else "peak memory"
        lines.append(f"- {label}: {what}: {memory[0]:.2f} of the smallest peer's ({memory[1]})")
    lines += [f"- {label}: {name} is left out: {why}" for name, why in race["failed"].items()]
    lines += [f"- {label}: {line}" for line in roofline.floor(result, race)[1:] if line]
    if gpu and US in (*runs_of, *race["failed"]):
        lines += results.step_goals(race["workload"], race["precision"], runs_of)
    elif gpu:
        lines.append(f"- {label}: baby_xp has no {race['precision']} precision yet")
    return list(filter(None, lines))


if __name__ == "__main__":
    raise SystemExit(main())
