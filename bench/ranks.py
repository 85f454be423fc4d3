"""Ranks of MPI against worker processes; ranks over limited networks, compared with a model of their time.

`python -m bench.ranks` compares two ranks with two workers. With --network it measures ranks in network
namespaces, which needs Linux and root: what they send each other, and their steps. With --overlap it measures
there what is gained if gradients travel while others are computed. With --paper it computes, from what was kept,
the time of a step on more machines than there are. See bench/README.md.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from baby_xp import files
from baby_xp.errors import BabyError
from bench import harness, hosts, launch, rank, results, roofline, time_model, variants
from bench.harness import US, say
from bench.hosts import Line
from bench.launch import Place
from bench.time_model import Link, Work
from bench.workloads import TOLERANCES, WORKLOADS, Workload, named

GOAL = 1.05
"""The largest share of the time of two workers that two ranks may take."""
WORKERS, RANKS, QUARTER = "2 workers", "2 ranks", "2 workers, a quarter of the batch"
COMPARED = ("W1", "W2", "W3", "W4")
PLACES: dict[str, Line | Place] = {
    "shared memory": Place(),
    "TCP, not limited": Place(environment={**hosts.OVER_TCP, "OMPI_MCA_btl_tcp_if_include": "lo"}),
    "1 Gbit/s, 0.1 ms": Line(1e9, 1e-4),
    "1 Gbit/s, 1 ms": Line(1e9, 1e-3),
    "100 Mbit/s, 1 ms": Line(1e8, 1e-3),
}
"""Where ranks are measured: on one machine, or on hosts of their own with a network between them."""
OVERLAPPED: dict[str, Line | Place] = {
    "shared memory": Place(),
    "1 Gbit/s, no latency": Line(1e9, 0.0),
    "1 Gbit/s, 0.1 ms": Line(1e9, 1e-4),
    "100 Mbit/s, 1 ms": Line(1e8, 1e-3),
}
"""Where it is measured whether it pays to send gradients while others are computed."""
NUMBERS = (2, 4)
STEPPED = {"W1": (5, 15), "W2": (5, 15), "W3": (2, 5)}
"""The workloads whose steps are measured there: steps of warm-up, and steps."""
IN_TURN = {"W1": (6, 4), "W3": (6, 2)}
"""The workloads of --overlap: rounds, and steps of a round."""
SIZES = (10_000, 100_000, 1_000_000)
"""Numbers of parameters of which all is sent there that a step sends, besides those of the workloads."""
KEPT = {
    "ranks": variants.RESULTS / "ranks.json", "network": variants.RESULTS / "ranks-network.json",
    "overlap": variants.RESULTS / "ranks-overlap.json",
}  # fmt: skip

# what is computed on paper
PAPER_RANKS = (8, 64, 512)
PAPER_LINES = (Line(1e9, 1e-4), Line(1e10, 5e-5), Line(1e11, 1e-5))
GPT2_SAMPLES = 512
"""Sequences of 1,024 tokens in a step of GPT-2 small: about half a million tokens."""


def main() -> int:
    """Measure what the command line asks for, or print the tables of what was kept.

    Exit code 1 if a contender failed or its losses differ.
    """
    asked = parse()
    try:
        if asked.table or asked.paper:
            found = {name: lines for name, lines in tables(read()).items() if asked.table or name == "paper"}
            lines = [line for name, table in found.items() for line in (name, "", *table, "")]
            variants.show(lines, found, asked.page)
            return 0
        if asked.network:
            kind, states = "network", over_networks()
        elif asked.overlap:
            kind, states = "overlap", overlapped()
        else:
            kind, states = "ranks", against_workers(asked)
        suffix = "-ranks" if kind == "ranks" else f"-ranks-{kind}"
        result, _ = results.show(states, document, asked.out, suffix)
    except BabyError as error:
        say(f"bench.ranks: {error}")
        return 2
    if asked.keep:
        files.write(KEPT[kind], json.dumps(result, indent=1) + "\n")
        say(f"kept as the newest result: {KEPT[kind]}")
    return 1 if any(race["failed"] for race in result.get("races", ())) else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser("bench.ranks", __doc__, steps=None, rounds=3, out=None)
    parser.add_argument("--workloads", type=named, help=f"of {','.join(WORKLOADS)} ({','.join(COMPARED)})")
    parser.add_argument("--network", action="store_true", help="measure ranks over limited networks; needs root")
    parser.add_argument("--overlap", action="store_true", help="measure sending while computing; needs root")
    parser.add_argument("--keep", action="store_true", help="keep it as the newest result")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the tables of what was kept")
    parser.add_argument("--paper", action="store_true", help="measure nothing, print the times on more machines")
    parser.add_argument("--page", type=Path, help="with --table: also insert the tables into this page")
    asked = parser.parse_args()
    if asked.page and not asked.table:
        parser.error("argument --page: it needs --table")
    if asked.network and asked.overlap:
        parser.error("argument --overlap: give --network or --overlap, not both")
    if (asked.network or asked.overlap) and (asked.workloads or asked.steps):
        flag = "--network" if asked.network else "--overlap"
        parser.error(f"argument {flag}: it has its own workloads and steps")
    asked.workloads = asked.workloads or [WORKLOADS[name] for name in COMPARED]
    return asked


def read() -> dict[str, dict]:
    """The newest result of each kind. Raises BabyError if one is missing."""
    found = {}
    for kind, file in KEPT.items():
        try:
            found[kind] = json.loads(file.read_text("utf-8"))
        except OSError:
            flag = "" if kind == "ranks" else f" --{kind}"
            raise BabyError(f"there is no {file}: measure it with python -m bench.ranks{flag} --keep") from None
        except ValueError:
            raise BabyError(f"{file} is not a result of bench.ranks: restore it, or delete it") from None
    return found


# two ranks against two workers --------------------------------------------------------------------------


def against_workers(asked: argparse.Namespace) -> Iterator[dict]:
    """All measurements so far: a race for each workload, whose contenders take turns."""
    with results.measurement(races=[]) as result:
        for workload in asked.workloads:
            before = result["races"]
            turns = harness.take_turns(
                "bench.launch:answer", requests(workload, asked.steps), asked.rounds, workload.name
            )
            for runs, failed in turns:
                race = {"workload": workload.name, "runs": runs, "failed": {**failed, **unequal(runs)}}
                result["races"] = [*before, race]
                yield result
    yield result


def requests(workload: Workload, steps: int | None) -> dict[str, dict]:
    """What each contender is asked for. The model of the time also needs a step with a smaller batch."""
    smaller = asdict(workload) | {"batch_size": max(1, workload.batch_size // 4)}
    contenders = {
        WORKERS: (1, workload.name, {"workers": 2}),
        RANKS: (2, workload.name, {"workers": 1, "distributed": "mpi"}),
        QUARTER: (1, smaller, {"workers": 2}),
    }
    request = {"name": US, "steps": steps or workload.steps}
    request |= {"warmup": workload.warmup, "dropout": workload.dropout}
    return {
        name: {"ranks": ranks, "function": "bench.peers:train", "request": {**request, "workload": sizes, **more}}
        for name, (ranks, sizes, more) in contenders.items()
    }


def unequal(runs: dict[str, list[dict]]) -> dict[str, str]:
    """Why the ranks cannot be compared, if the losses of their steps differ from those of the workers."""
    pairs = list(zip(runs.get(WORKERS, ()), runs.get(RANKS, ()), strict=False))
    bound = TOLERANCES["float32"]
    for a, b in ((a, b) for ours, theirs in pairs for a, b in zip(ours["losses"], theirs["losses"], strict=True)):
        if not abs(b - a) <= bound * abs(a):  # written so that NaN counts as a difference
            return {RANKS: f"a loss differs: {b:.6f}, that of {WORKERS} {a:.6f}"}
    return {}


# over networks ------------------------------------------------------------------------------------------


def over_networks() -> Iterator[dict]:
    """All measurements so far: one for each number of ranks in each place."""
    with results.measurement(networks=[]) as result:
        for where, line in PLACES.items():
            for ranks in NUMBERS:
                with hosts.connected(ranks, line) if isinstance(line, Line) else nullcontext(line) as place:
                    request = {"interface": place.interface, "sizes": list(SIZES), "workloads": STEPPED}
                    found = launch.together(ranks, "bench.rank:measure", request, place)
                result["networks"] = [*result["networks"], {"place": where, "ranks": ranks, **found}]
                say(f"{where}, {ranks} ranks: measured")
                yield result
    yield result


def overlapped() -> Iterator[dict]:
    """All measurements so far: one for each number of ranks in each place."""
    with results.measurement(overlaps=[]) as result:
        for where, line in OVERLAPPED.items():
            for ranks in NUMBERS:
                with hosts.connected(ranks, line) if isinstance(line, Line) else nullcontext(line) as place:
                    found = launch.together(ranks, "bench.rank:overlap", {"workloads": IN_TURN}, place)
                result["overlaps"] = [*result["overlaps"], {"place": where, "ranks": ranks, "found": found}]
                say(f"{where}, {ranks} ranks: measured")
                yield result
    yield result


# tables -------------------------------------------------------------------------------------------------


def document(result: dict) -> list[str]:
    """A result as Markdown."""
    if "networks" in result:
        found = tables_of_networks(result)
    else:
        found = tables_of_overlaps(result) if "overlaps" in result else tables_of_races(result)
    (_, rows), *more = found.items()
    below = [line for _, table in more for line in (*results.markdown(table), "")]
    for race in result.get("races", ()):
        what = f"{race['workload']}, {RANKS} / {WORKERS}"
        below.append(results.goal(what, share(race), GOAL, "{:.3f}"))
        below += [f"- {race['workload']}: {name} failed: {why}" for name, why in race["failed"].items()]
    return [*results.page(result, {}, rows), *below]


def tables(kept: dict[str, dict]) -> dict[str, list[str]]:
    """The tables of the page by name, as lines of Markdown."""
    found = {"machine": about(kept), **tables_of_races(kept["ranks"]), **tables_of_networks(kept["network"])}
    found |= {**tables_of_overlaps(kept["overlap"]), "paper": paper(kept)}
    return {name: results.markdown(rows) for name, rows in found.items()}


def about(kept: dict[str, dict]) -> list[dict[str, str]]:
    """When and where each kind of results was measured."""
    names = {"ranks": "ranks and workers", "network": "networks", "overlap": "sending while computing"}
    return [
        {
            "figures": names[kind],
            "measured": result["date"][:10] + (", on a busy machine" if results.was_busy(result) else ""),
            "machine class": harness.class_of(result["machine"]),
        }
        for kind, result in kept.items()
    ]


def tables_of_races(result: dict) -> dict[str, list[dict[str, str]]]:
    """Two ranks beside two workers: a row for each workload."""
    rows = []
    for race in result["races"]:
        medians = {name: f"{statistics.median(results.times(runs)):.1f}" for name, runs in race["runs"].items()}
        pairs = zip(race["runs"].get(RANKS, ()), race["runs"].get(WORKERS, ()), strict=False)
        rounds = [statistics.median(ours["ms"]) / statistics.median(theirs["ms"]) for ours, theirs in pairs]
        rows.append({
            "workload": race["workload"],
            f"{WORKERS}, ms per step": medians.get(WORKERS, ""),
            f"{RANKS}, ms per step": medians.get(RANKS, ""),
            "ranks / workers": f"{share(race):.3f}" if rounds else "",
            "by round": f"{min(rounds):.3f} to {max(rounds):.3f}" if rounds else "",
        })  # fmt: skip
    return {"ranks": rows}


def share(race: dict) -> float | None:
    """The median step of two ranks, divided by that of two workers."""
    return results.ratio(race["runs"], WORKERS, us=RANKS)


def tables_of_networks(result: dict) -> dict[str, list[dict[str, str]]]:
    """What connects the ranks; the time of what they exchange; the time of steps: measured, and by the model."""
    links, exchanges, steps = [], [], []
    for network in result["networks"]:
        link, ranks = Link(**network["link"]), network["ranks"]
        at = {"network": network["place"], "ranks": str(ranks)}
        links.append({
            **at, "latency, ms": f"{1e3 * link.latency:.3f}", "Gbit/s": f"{8e-9 * link.bandwidth:.3g}",
            "µs per message": f"{1e6 * link.message:.1f}", "ns per element added": f"{1e9 * link.add:.2f}",
        })  # fmt: skip
        for one in network["exchanges"]:
            model = 1e3 * time_model.exchange_seconds(one["elements"], ranks, link)
            bytes_ = one["bytes"] and one["bytes"] / time_model.traffic(one["elements"], ranks).bytes
            exchanges.append({
                **at, "parameters": f"{one['elements']:,}", **compared(statistics.median(one["ms"]), model),
                "bytes sent / model": f"{bytes_:.3f}" if bytes_ else "",
            })  # fmt: skip
        for one in network["steps"]:
            model = 1e3 * time_model.exchange_seconds(one["elements"], ranks, link)
            measured, alone = (statistics.median(one[name]) for name in ("ms", "ms computing"))
            steps.append({
                **at, "workload": one["workload"], "computing": f"{alone:.1f}",
                "exchange by the model": f"{model:.1f}", **compared(measured, alone + model),
            })  # fmt: skip
    return {"links": links, "exchanges": exchanges, "steps": steps}


def tables_of_overlaps(result: dict) -> dict[str, list[dict[str, str]]]:
    """Steps that send their gradients at the end, beside those that send them meanwhile."""
    rows = []
    for network in result["overlaps"]:
        for one in network["found"]:
            before, after = (one[name] for name in rank.MACHINES)
            starts = range(0, len(before), one["steps"])
            rounds = [saved(before[at : at + one["steps"]], after[at : at + one["steps"]]) for at in starts]
            rows.append({
                "network": network["place"], "ranks": str(network["ranks"]), "workload": one["workload"],
                **{f"{name}, ms per step": f"{statistics.median(one[name]):.1f}" for name in rank.MACHINES},
                "saved": f"{saved(before, after):+.1%}", "by round": f"{min(rounds):+.1%} to {max(rounds):+.1%}",
            })  # fmt: skip
    return {"overlaps": rows}


def saved(before: list[float], after: list[float]) -> float:
    """The share of the median time before that is saved."""
    return 1 - statistics.median(after) / statistics.median(before)


def compared(measured: float, model: float) -> dict[str, str]:
    """Milliseconds that were measured, those of the model, and how much the model is off, for cells."""
    found = {"measured, ms": f"{measured:.2f}", "model, ms": f"{model:.2f}"}
    return {**found, "error": f"{model / measured - 1:+.0%}"}


# on paper -----------------------------------------------------------------------------------------------


def paper(kept: dict[str, dict]) -> list[dict[str, str]]:
    """The time of a step on many machines, each a rank and as fast as the one that was measured."""
    works, rows = measured_work(kept["ranks"]), []
    if not {"W3", "W4"} <= works.keys():
        raise BabyError(f"{KEPT['ranks']} lacks W3 or W4: measure them with python -m bench.ranks --keep")
    free, gpt2 = unlimited(kept["network"]), WORKLOADS["W5"]
    cases = [
        (name, WORKLOADS[name], works[name], WORKLOADS[name].batch_size, grows)
        for name in ("W3", "W4")
        for grows in (False, True)
    ]
    cases.append(("GPT-2 small", gpt2, extrapolated(works["W4"], WORKLOADS["W4"], gpt2), GPT2_SAMPLES, False))
    for name, workload, work, size, grows in cases:
        elements = workload.model(0.0).n_parameters
        for ranks in PAPER_RANKS:
            batch = size * ranks if grows else size
            row = {"model": name, "samples per step": f"{batch:,}", "ranks": str(ranks)}
            row["computing"] = seconds(work.seconds(math.ceil(batch / ranks), ranks))
            for line in PAPER_LINES:
                link = Link(line.delay, line.bits / 8, free.message, free.add)
                step = time_model.step_seconds(work, batch, ranks, elements, link)
                efficient = time_model.efficiency(work, batch, ranks, elements, link)
                row[f"{line.bits / 1e9:.0f} Gbit/s"] = f"{seconds(step)}, {efficient:.0%}"
            rows.append(row)
    return rows


def unlimited(result: dict) -> Link:
    """What messages cost the processors, between two ranks with a core each, over TCP."""
    wanted = "TCP, not limited", 2
    for one in result["networks"]:
        if (one["place"], one["ranks"]) == wanted:
            return Link(**one["link"])
    raise BabyError(f"{KEPT['network']} is not complete: measure it with python -m bench.ranks --network --keep")


def measured_work(result: dict) -> dict[str, Work]:
    """What two workers compute in a step, by workload, from the times of the batch and of a quarter of it."""
    found = {}
    for race in result["races"]:
        if {WORKERS, QUARTER} <= race["runs"].keys():
            runs, batch = race["runs"], WORKLOADS[race["workload"]].batch_size
            whole, quarter = (1e-3 * statistics.median(results.times(runs[name])) for name in (WORKERS, QUARTER))
            found[race["workload"]] = time_model.work(batch, whole, max(1, batch // 4), quarter)
    return found


def extrapolated(work: Work, measured: Workload, other: Workload) -> Work:
    """Of a workload that was not measured: as many operations per second, and parameters."""
    flops, sizes = (
        [function(one) for one in (measured, other)]
        for function in (
            lambda one: roofline.step_flops(one.model(0.0).config, one.vocab_size, 1),
            lambda one: one.model(0.0).n_parameters,
        )
    )
    return Work(work.sample * flops[1] / flops[0], work.update * sizes[1] / sizes[0])


def seconds(value: float) -> str:
    """A time in a cell."""
    return f"{value:,.1f} s" if value >= 1 else f"{1e3 * value:,.3g} ms"


if __name__ == "__main__":
    raise SystemExit(main())
