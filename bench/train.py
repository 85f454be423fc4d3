"""How long a training step takes, beside the same model in other libraries.

    python -m bench.train [--workloads W1,W2] [--backend numpy] [--precision float32,tf32,half] [--steps N]
                          [--rounds R] [--peers torch,jax] [--out FOLDER]

See bench/README.md for what is measured and how to read it.
"""

import argparse
import statistics
import sys
from pathlib import Path

from baby_xp import counts
from bench import arguments, ceiling, contenders, goals, processes, report
from bench.precision import TOLERANCES
from bench.report import US, Entry
from bench.tables import markdown
from bench.workloads import WORKLOADS, Workload, chosen, on_gpu, usual

MIB = 2**20


def main() -> int:
    """Measure what the command line asks for, print the tables and keep them under --out.

    Exit code 1 if a contender failed on the way: the others are measured all the same.
    """
    asked = parse()
    peers = contenders.present(asked.peers, asked.backend, "bench.train")
    lineup = {precision: able(peers, precision) for precision in asked.precision}
    for workload in asked.workloads:
        problem = disagreement(workload, lineup, asked.backend)
        if problem:
            print(f"bench.train: {problem}", file=sys.stderr)
            return 2
    result = measure(asked, lineup)
    text = "\n".join(document(result))
    print(text)
    if asked.out:
        report.keep(asked.out, result, text)
    return 1 if any(race["failed"] for race in result["races"]) else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.train", description=__doc__.splitlines()[0])
    names, peers = ",".join(WORKLOADS), {**contenders.PEERS, **contenders.MORE_PEERS}
    parser.add_argument("--workloads", type=chosen, help=f"of {names} (all; on a CPU all but W5)")
    parser.add_argument("--backend", type=arguments.backend, default="numpy", help="of baby_xp (%(default)s)")
    known = arguments.names_of(TOLERANCES, "precision")
    parser.add_argument("--precision", type=known, default="float32", help="of products (%(default)s)")
    parser.add_argument("--steps", type=arguments.positive, help="steps of a round (set for each workload)")
    parser.add_argument(
        "--rounds", type=arguments.positive, default=3, help="rounds of each contender (%(default)s)"
    )
    known = arguments.names_of(peers, "peer")
    usual_peers = ",".join(contenders.PEERS)
    parser.add_argument("--peers", type=known, default=usual_peers, help='such as torch, or "" (%(default)s)')
    parser.add_argument("--out", type=Path, help="folder for the results as JSON and Markdown")
    asked = parser.parse_args()
    if not asked.precision:
        parser.error("argument --precision: name at least one")
    if asked.precision != ["float32"] and not on_gpu(asked.backend):
        parser.error(f"argument --precision: {asked.precision[-1]} is for a GPU: --backend cupy")
    asked.workloads = asked.workloads or usual(asked.backend)
    return asked


def able(peers: list[str], precision: str) -> list[str]:
    """baby_xp and those peers that have this precision; of each other one a line says that it does not."""
    lacking = [name for name in (US, *peers) if precision in contenders.LACKING.get(name, ())]
    for name in lacking:
        print(f"bench.train: {name} has no {precision} precision yet: it is left out there", file=sys.stderr)
    return [name for name in (US, *peers) if name not in lacking]


# the check ----------------------------------------------------------------------------------------------


def disagreement(workload: Workload, lineup: dict[str, list[str]], backend: str) -> str | None:
    """Why contenders cannot be compared, or None. One that fails altogether is taken out of the lineup.

    Each gives the loss of the same batch at the same weights, without dropout, before and after a step of
    training: the first shows another model, the second other gradients or another optimizer. All are held
    against baby_xp in float32, a coarser precision within wider bounds.
    """
    ours = _losses(US, workload, backend, "float32")
    for precision, names in lineup.items():
        for name in list(names):
            if (name, precision) == (US, "float32"):
                continue
            try:
                theirs = _losses(name, workload, backend, precision)
            except processes.Failed as error:
                if name == US:
                    raise
                names.remove(name)
                told = f"{workload.name}: {name} {precision}: {error}: it is left out from here on"
                print(f"bench.train: {told}", file=sys.stderr)
                continue
            # so written that a loss which is no number differs too
            if not all(abs(b - a) <= TOLERANCES[precision] * abs(a) for a, b in zip(ours, theirs, strict=True)):
                pairs = {US: ours, name if precision == "float32" else f"{name} {precision}": theirs}
                shown = "; ".join(f"{who} {first:.6f}, {last:.6f}" for who, (first, last) in pairs.items())
                return f"{workload.name} is not compared: losses before and after a step differ: {shown}"
    return None


def _losses(name: str, workload: Workload, backend: str, precision: str) -> list[float]:
    request = {"name": name, "workload": workload.name, "backend": backend, "precision": precision}
    return processes.ask("losses", **request)["losses"]


# measuring ----------------------------------------------------------------------------------------------


def measure(asked: argparse.Namespace, lineup: dict[str, list[str]]) -> dict:
    """All measurements, as they go into the JSON file: a race for each workload and precision."""
    result = {**report.begin(), "backend": asked.backend, "ceilings": {}, "races": []}
    if on_gpu(asked.backend):
        result["ceilings"] = {precision: ceiling_of(asked.backend, precision) for precision in lineup}
    for workload in asked.workloads:
        warmup, steps = workload.pace(asked.backend)
        request = {
            "workload": workload.name, "steps": asked.steps or steps, "warmup": warmup,
            "dropout": workload.dropout, "backend": asked.backend,
        }  # fmt: skip
        races = {
            precision: [
                Entry(f"{workload.name} {precision}: {name}", {"name": name, "precision": precision, **request})
                for name in names
            ]
            for precision, names in lineup.items()
        }  # all precisions in turn too
        report.take_turns("train", [entry for entries in races.values() for entry in entries], asked.rounds)
        result["races"] += [
            race_of(workload, precision, entries, on_gpu(asked.backend)) for precision, entries in races.items()
        ]
    result["product_rate_after"] = report.product_rate()
    return result


def ceiling_of(backend: str, precision: str) -> dict | None:
    """The device's rates, see bench.ceiling; None where they cannot be measured."""
    try:
        return processes.ask("ceiling", backend=backend, precision=precision)
    except processes.Failed as error:
        print(f"bench.train: no ceiling for {precision}: {error}", file=sys.stderr)
        return None


def race_of(workload: Workload, precision: str, entries: list[Entry], gpu: bool) -> dict:
    """What the contenders of a workload gave, and what its shapes say."""
    config = workload.model(workload.dropout).config
    shape = config, workload.vocab_size, workload.batch_size
    return {
        "workload": workload.name,
        "precision": precision,
        "flops": ceiling.step_flops(*shape) if gpu else counts.step_flops(*shape),
        "bytes": ceiling.step_bytes(*shape, itemsize=2 if precision == "half" else 4),
        "runs": {entry.request["name"]: entry.runs for entry in entries if not entry.failed},
        "failed": {entry.request["name"]: entry.failed for entry in entries if entry.failed},
    }


# what it says -------------------------------------------------------------------------------------------


def products_ms(result: dict, race: dict) -> float | None:
    """Milliseconds that the matrix products of a step would take at full speed; None on a GPU.

    Full speed is the best product of this run, before or after, on every core. It is a speed of CPU cores.
    """
    if on_gpu(result["backend"]):
        return None
    best = max(result[f"product_rate_{when}"]["best"] for when in ("before", "after"))  # Gflop/s of a core
    return 1e-6 * race["flops"] / (result["machine"]["cores"] * best)


def floor_ms(result: dict, race: dict) -> float | None:
    """Milliseconds that a step cannot go below on this GPU; None on a CPU, or where it was not measured."""
    found = result["ceilings"].get(race["precision"])
    return ceiling.floor_ms(race["flops"], race["bytes"], found) if found else None


def document(result: dict) -> list[str]:
    """The results as Markdown."""
    races = result["races"]
    rows = [row for race in races for row in rows_of(result, race)]
    return [
        *report.heading(result, report.about_each(race["runs"] for race in races)),
        *(markdown(rows) if rows else ["nothing could be measured"]),
        "",
        *ceiling_lines(result),
        *(line for race in races for line in verdict(result, race)),
    ]


def rows_of(result: dict, race: dict) -> list[dict[str, str]]:
    """A row of the table for each contender."""
    gpu, workload = on_gpu(result["backend"]), race["workload"]
    products, floor = products_ms(result, race), floor_ms(result, race)
    ours = statistics.median(report.times(race["runs"][US])) if US in race["runs"] else None
    rows = []
    for name, runs in race["runs"].items():
        times, peak = report.times(runs), report.peak(runs)
        median = statistics.median(times)
        digits = 3 if gpu else 1
        rows.append({
            "workload": workload,
            **({"precision": race["precision"]} if gpu else {}),
            "contender": name,
            "ms a step": f"{median:.{digits}f}",
            "min": f"{min(times):.{digits}f}",
            "max": f"{max(times):.{digits}f}",
            "tokens/s": f"{1e3 * WORKLOADS[workload].tokens / median:,.0f}",
            "baby_xp / this": "" if name == US or ours is None else f"{ours / median:.2f}",
            **(
                {
                    "share of the ceiling": "" if floor is None else f"{floor / median:.0%}",
                    "peak GPU MiB used/held": _used_and_held(report.gpu_peak(runs)),
                }
                if gpu
                else {"products' share": f"{products / median:.0%}"}
            ),
            "peak MiB": "" if peak is None else f"{peak / MIB:.0f}",
        })  # fmt: skip
    return rows


def _used_and_held(memory: dict[str, int]) -> str:
    return f"{memory['used'] / MIB:,.0f} / {memory['held'] / MIB:,.0f}" if memory else ""


def ceiling_lines(result: dict) -> list[str]:
    """How fast the device was found to be at each precision."""
    return [
        f"- {precision}: {found['device']}: a product of {found['n']:,} rows at {1e-12 * found['flops']:.2f} "
        f"Tflop/s, a sum of {found['elements']:,} elements at {1e-9 * found['bytes']:,.0f} GB/s"
        for precision, found in result["ceilings"].items()
        if found
    ]


def verdict(result: dict, race: dict) -> list[str]:
    """The lines under the table: against the best peer in time and in memory, the floor, and the goals."""
    gpu, found = on_gpu(result["backend"]), race["runs"]
    label = f"{race['workload']} {race['precision']}" if gpu else race["workload"]
    lines = [report.versus(f"{label}: time a step", found, statistics.median)]
    of, what = (_gpu_used, "peak GPU memory in use") if gpu else (report.peak, "peak memory")
    memory = report.against_best({name: of(runs) for name, runs in found.items()})
    if memory:
        lines.append(f"- {label}: {what}: {memory[0]:.2f} of the smallest peer's ({memory[1]})")
    lines += [f"- {label}: {name} failed: {why}" for name, why in race["failed"].items()]
    lines.append(_floor_line(label, result, race))
    if gpu and US in (*found, *race["failed"]):
        lines += goals.step_lines(race["workload"], race["precision"], found)
    elif gpu:
        lines.append(f"- {label}: baby_xp has no {race['precision']} precision yet")
    return [line for line in lines if line]


def _gpu_used(runs: list[dict]) -> int | None:
    return report.gpu_peak(runs).get("used")


def _floor_line(label: str, result: dict, race: dict) -> str | None:
    """What the products, and on a GPU the bytes, would take at full speed."""
    gflop, products, found = 1e-9 * race["flops"], products_ms(result, race), floor_ms(result, race)
    if products is not None:
        return f"- {label}: {gflop:.1f} Gflop of matrix products a step: {products:.1f} ms at full speed"
    if found is None:
        return None
    rates = result["ceilings"][race["precision"]]
    computing, moving = (1e3 * race[what] / rates[what] for what in ("flops", "bytes"))
    return (
        f"- {label}: no step can take less than {found:.3f} ms: {gflop:.1f} Gflop take {computing:.3f} ms, "
        f"{1e-9 * race['bytes']:.2f} GB {moving:.3f} ms"
    )


if __name__ == "__main__":
    raise SystemExit(main())
