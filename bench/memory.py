"""How much memory a training run takes, and how good an estimate of a run is. See bench/README.md."""

import argparse
import importlib.util
import linecache
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from baby_xp.errors import BabyError
from baby_xp.estimation.estimate import estimate
from baby_xp.layout import duration
from baby_xp.presets import PRESETS
from baby_xp.resources import process_memory
from bench import harness, results, workloads
from bench.harness import MIB, US, say
from bench.peers import Clock, ours
from bench.results import mib, verdict
from bench.workloads import Workload, on_gpu

FACTOR, PRECISION = 2.0, 0.15  # promised: memory as a multiple of what is needed, relative error of an estimate
LINES = 10  # of code that are listed, those that hold most memory
GPTS = [name for name, preset in PRESETS.items() if preset.model.kind == "gpt"]


def main() -> int:
    """Measure what the command line names, and print the table."""
    asked = parse()
    try:
        if asked.what == "needed":
            print("\n".join(needed_lines(asked)))
        else:
            results.show(compare(asked), document, asked.out, "-estimate")
    except BabyError as error:
        say(f"bench.memory: {error}")
        return 2
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser("bench.memory", __doc__)
    kinds = parser.add_subparsers(dest="what", required=True)
    needed = harness.with_options(kinds.add_parser("needed"), steps=4)
    known = workloads.named
    needed.add_argument("--workloads", type=known, default="W1,W2,W3", help="such as W1,W2 (%(default)s)")
    estimated = kinds.add_parser("estimate")
    harness.with_options(estimated, backend="numpy", data="shakespeare", out=None)
    usual, known = "baby,nanogpt-cpu,3-months,24-months", harness.names_of(GPTS, "preset")
    estimated.add_argument("--presets", type=known, default=usual, help="names, joined by commas (%(default)s)")
    estimated.add_argument("--steps", type=int, default=60, help="of the real run; 0: none (%(default)s)")
    estimated.add_argument("--tf32", action="store_true", help="products in TF32, on a GPU")
    asked = parser.parse_args()
    if asked.steps < 0:
        estimated.error(f"argument --steps: {asked.steps} is negative")
    return asked


def needed_lines(asked: argparse.Namespace) -> list[str]:
    """The table, and below it for each workload what holds the memory. Raises BabyError where that is unknown."""
    if not process_memory.taken():
        raise BabyError("this system has no /proc/<pid>/status, where sizes are read")
    if importlib.util.find_spec("memray") is None:
        raise BabyError("memray is not installed (pip install -e '.[bench]')")
    rows, details, baseline = [], [], harness.ask("bench.peers.ours:idle")
    for workload in asked.workloads:
        needed = harness.ask("bench.memory:needed", workload=workload.name)
        rows += [needed_row(workload, asked.steps, workers, needed, baseline) for workers in (1, None)]
        found = harness.ask("bench.memory:traced", workload=workload.name, steps=asked.steps)
        parts = ", ".join(f"{name} {mib(size, 1)}" for name, size in needed.items())
        details += ["", f"{workload.name}: {workload.about}", f"  needed, MiB: {parts}", *found]
    return [*results.markdown(rows), *details]


def needed_row(workload: Workload, steps: int, workers: int | None, needed: dict, idle: list) -> dict[str, str]:
    """Train in a child process and compare. workers: None for the number that `train` would choose."""
    found = harness.ask(
        "bench.peers:train", name=US, workload=workload.name, steps=steps, warmup=0, dropout=workload.dropout,
        workers=workers,
    )  # fmt: skip
    taken, need = results.least_growth([found], idle), sum(needed.values())
    return {
        "workload": workload.name, "workers": found["about"]["workers"] + ("" if workers else " (automatic)"),
        "needed, MiB": mib(need, 1), "taken, MiB": mib(taken, 1), "ratio": f"{taken / need:.2f}",
        f"at most {FACTOR:g}": verdict(taken <= FACTOR * need),
    }  # fmt: skip


def needed(workload: str) -> dict[str, int]:
    """Bytes of the arrays that a training step cannot do without, by kind.

    saved: what `forward` keeps for `backward`; parameters and the batch do not count again.
    """
    arrays = ours.arrays_of_step(workloads.of(workload))
    elsewhere = owners((arrays["parameters"], arrays.pop("batch")))
    saved = {key: size for key, size in owners(arrays.pop("saved")).items() if key not in elsewhere}
    return {**{kind: sum(owners(of).values()) for kind, of in arrays.items()}, "saved": sum(saved.values())}


def owners(value) -> dict[int, int]:
    """Bytes of each distinct array in nested tuples, lists and dicts, by the identity of what owns it."""
    if isinstance(value, np.ndarray):
        while isinstance(value.base, np.ndarray):
            value = value.base
        return {id(value): value.nbytes}
    found: dict[int, int] = {}
    if isinstance(value, tuple | list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            found.update(owners(one))
    return found


def traced(workload: str, steps: int) -> list[str]:
    """What is allocated at the peak of a run in one process, and the lines of code that hold most then."""
    import memray

    chosen = workloads.of(workload)
    clock, sizes, blocks = Clock(chosen.batches(steps)), Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "allocations.bin"
        with memray.Tracker(records):
            ours.train(chosen, chosen.dropout, clock, workers=1)
        with memray.FileReader(records) as reader:
            for record in reader.get_high_watermark_allocation_records(merge_threads=True):
                line = innermost(record.stack_trace())
                sizes[line] += record.size
                blocks[line] += record.n_allocations
    lines = [f"  allocated at the peak, MiB: {mib(sizes.total(), 1)}; of these:"]
    for (file, number), size in sizes.most_common(LINES):
        code, name = linecache.getline(file, number).strip(), os.path.relpath(file, harness.ROOT)
        lines.append(f"  {size / MIB:8.1f} in {blocks[file, number]:4d}  {name}:{number}  {code}")
    return lines


def innermost(frames: list[tuple[str, str, int]]) -> tuple[str, int]:
    """The innermost frame in this checkout, or the innermost at all; frames: function, file, line."""
    for _, file, line in frames:
        # a virtual environment may lie in the checkout
        if os.path.realpath(file).startswith(str(harness.ROOT)) and "site-packages" not in file:
            return os.path.realpath(file), line
    return frames[0][1:] if frames else ("unknown", 0)


def compare(asked: argparse.Namespace) -> Iterator[dict]:
    """The estimates so far, and beside each a short run with all that a long one has, for the JSON file."""
    precision, place = "tf32" if asked.tf32 else "float32", {"backend": asked.backend, "tf32": asked.tf32}
    short = {"num_steps": asked.steps, "eval_every": max(1, asked.steps // 2), "checkpoint_every": 3}
    with results.measurement(backend=asked.backend, precision=precision, presets=[]) as result:
        for name in asked.presets:
            data = {"data": asked.data} if PRESETS[name].data.data == "shakespeare" else {}
            request = {"preset": name, "settings": {**short, **data}, "place": place}
            found = estimate(name, **place, **data)  # first: it says in one line what is wrong with the text
            real = harness.ask("bench.peers.ours:train_run", **request) if asked.steps else {}
            facts = {"steps": found.facts.num_steps, "workers": found.facts.workers, "trial": asdict(found.trial)}
            more = {"parameters": found.n_parameters, "seconds": found.seconds, "real": real}
            result["presets"].append({"preset": name, **facts, **more})
            say(f"{name}: {duration(sum(found.seconds.values()))}")
            yield result
    yield result


def document(result: dict) -> list[str]:
    """The results as Markdown."""
    gpu, rows = on_gpu(result["backend"]), [row_of(one) for one in result["presets"]]
    epochs = [one["seconds"] for one in result["presets"] if gpu and one["preset"] == results.EPOCH_PRESET]
    goals = [results.epoch_goal(sum(seconds.values())) for seconds in epochs]
    return results.page(result, {"backend": {result["backend"]: result["precision"]}}, rows, *goals)


def row_of(one: dict) -> dict[str, str]:
    """A line of the table: the projection of a whole run, then what was estimated beside what was measured."""
    real, memory, cells = one["real"], one["trial"]["memory"], {}
    if real:
        ratio = memory / real["taken"] if memory and real["taken"] else None
        cells = {
            "real, ms per step": f"{real['ms']:.3f}", "taken, MiB": mib(real["taken"], 1),
            "ratio": "" if ratio is None else f"{ratio:.3f}",
            f"within {PRECISION:.0%}": "" if ratio is None else verdict(abs(ratio - 1) <= PRECISION),
        }  # fmt: skip
    return {
        "preset": one["preset"], "parameters": f"{one['parameters']:,}", "steps": f"{one['steps']:,}",
        "processes": str(one["workers"]),
        **{f"{part}, s": f"{seconds:,.1f}" for part, seconds in one["seconds"].items()},
        "whole run": duration(sum(one["seconds"].values())),
        "ms per step": f"{1e3 * one['seconds']['training'] / one['steps']:.3f}", "memory, MiB": mib(memory, 1),
        **cells,
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
