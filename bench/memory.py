"""How much memory a training run takes, against what its arrays need, and against what `estimate` says.

    python -m bench.memory needed   [--workloads W1,W2] [--steps N] [--top N]
    python -m bench.memory estimate [--presets baby,3-months] [--steps N]

needed: the promise is at most twice the bytes of the arrays. Needs memray (pip install -e '.[bench]').
estimate: each preset is estimated, then trained by the command `train`; the promise is memory within 15 %.
Linux only: sizes come from /proc. See bench/README.md for how to read the tables.
"""

import argparse
import contextlib
import importlib.util
import linecache
import os
import statistics
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from baby_xp.arrays import params
from baby_xp.arrays.registry import load
from baby_xp.errors import BabyError
from baby_xp.estimation.estimate import Estimate, estimate
from baby_xp.layers import cross_entropy
from baby_xp.presets import PRESETS
from baby_xp.resources import process_memory
from baby_xp.training.step import initial_state, step_noise
from bench import harness, results, workloads
from bench.harness import MIB, US, say
from bench.peers import SEED, Clock
from bench.results import mib
from bench.workloads import Workload

FACTOR, PRECISION = 2.0, 0.15
"""The promises: memory taken as a multiple of what is needed, and the relative error of an estimate."""


def main() -> int:
    """Measure what the command line names, and print the table."""
    asked = parse()
    if not process_memory.taken():
        say("bench.memory: this system has no /proc/<pid>/status, where sizes are read")
        return 2
    if asked.what == "needed" and importlib.util.find_spec("memray") is None:
        say("bench.memory: memray is not installed (pip install -e '.[bench]')")
        return 2
    try:
        print("\n".join(needed_lines(asked) if asked.what == "needed" else estimate_lines(asked)))
    except BabyError as error:
        say(f"bench.memory: {error}")
        return 2
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser("bench.memory", __doc__)
    kinds = parser.add_subparsers(dest="what", required=True)
    needed = harness.with_options(kinds.add_parser("needed"), steps=4)
    known = workloads.chosen
    needed.add_argument("--workloads", type=known, default="W1,W2,W3", help="such as W1,W2 (%(default)s)")
    needed.add_argument("--top", type=harness.positive, default=10, help="lines of each workload (%(default)s)")
    estimated = harness.with_options(kinds.add_parser("estimate"), steps=60)
    usual, known = "baby,nanogpt-cpu,3-months,24-months", harness.names_of(PRESETS, "preset")
    estimated.add_argument("--presets", type=known, default=usual, help="(%(default)s)")
    return parser.parse_args()


def idle() -> list[dict[str, int]]:
    """Sizes of a process that imports baby_xp, makes the backend and does nothing; [] where they are not known."""
    load("numpy")
    return process_memory.taken()


# against what is needed ---------------------------------------------------------------------------------


def needed_lines(asked: argparse.Namespace) -> list[str]:
    """The table, and below it for each workload what holds the memory."""
    rows, details, baseline = [], [], harness.ask("bench.memory:idle")
    for workload in asked.workloads:
        needed = harness.ask("bench.memory:needed", workload=workload.name)
        rows += [needed_row(workload, asked.steps, workers, needed, baseline) for workers in (1, None)]
        found = harness.ask("bench.memory:traced", workload=workload.name, steps=asked.steps, top=asked.top)
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
        "workload": workload.name,
        "workers": found["about"]["workers"] + ("" if workers else " (automatic)"),
        "needed, MiB": mib(need, 1),
        "taken, MiB": mib(taken, 1),
        "ratio": f"{taken / need:.2f}",
        f"at most {FACTOR:g}": "yes" if taken <= FACTOR * need else "NO",
    }


def needed(workload: str) -> dict[str, int]:
    """Bytes of the arrays that a training step cannot do without, by kind.

    saved: the distinct arrays that `forward` keeps for `backward`. A view counts as the array it belongs to,
    since it keeps the whole of that alive; parameters and the batch do not count again.
    """
    chosen = workloads.of(workload)
    backend, model, (batch,) = load("numpy"), chosen.model(chosen.dropout), chosen.batches(1)
    xp, flat = backend.xp, params.draw(model.spec, SEED)
    state = initial_state(backend, flat, params.decay_mask(model.spec), SEED)
    noise = step_noise(xp, model, state["seed"], state["step"], batch)
    logits, saved = model.forward(xp, model.layout.unpack(xp, state["params"]), batch.inputs, noise)
    _, loss_saved = cross_entropy.forward(xp, {}, logits, batch.targets.reshape(-1))
    elsewhere = owners((state["params"], *batch))
    kept = {key: size for key, size in owners((saved, loss_saved)).items() if key not in elsewhere}
    return {
        "parameters": state["params"].nbytes,
        "moments": state["m"].nbytes + state["v"].nbytes,
        "decays": state["decays"].nbytes,
        "gradients": flat.nbytes,
        "saved": sum(kept.values()),
    }


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


def traced(workload: str, steps: int, top: int) -> list[str]:
    """What is allocated at the peak of a run in one process, and the lines of code that hold most then."""
    import memray

    from bench.peers import ours

    chosen = workloads.of(workload)
    clock, sizes, blocks = Clock(chosen.batches(steps)), Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "allocations.bin"
        with memray.Tracker(records):
            ours.train(chosen, chosen.dropout, clock, workers=1)
        with memray.FileReader(records) as reader:
            for record in reader.get_high_watermark_allocation_records(merge_threads=True):
                line = _our_line(record.stack_trace())
                sizes[line] += record.size
                blocks[line] += record.n_allocations
    lines = [f"  allocated at the peak, MiB: {mib(sizes.total(), 1)}; of these:"]
    for (file, number), size in sizes.most_common(top):
        code, name = linecache.getline(file, number).strip(), os.path.relpath(file, harness.ROOT)
        lines.append(f"  {size / MIB:8.1f} in {blocks[file, number]:4d}  {name}:{number}  {code}")
    return lines


def _our_line(frames: list[tuple[str, str, int]]) -> tuple[str, int]:
    """The innermost frame in this checkout, or the innermost at all; frames: function, file, line."""
    for _, file, line in frames:
        # a virtual environment may lie in the checkout
        if os.path.realpath(file).startswith(str(harness.ROOT)) and "site-packages" not in file:
            return os.path.realpath(file), line
    return frames[0][1:] if frames else ("unknown", 0)


# against the estimate -----------------------------------------------------------------------------------


def estimate_lines(asked: argparse.Namespace) -> list[str]:
    """The table: memory and the time of a step, as estimated and as measured."""
    return results.markdown([estimate_row(estimate(name), measured(name, asked.steps)) for name in asked.presets])


def measured(preset: str, steps: int) -> dict:
    """Train the preset for a few steps -> "ms": milliseconds per step, "taken": bytes.

    The short run has what a long one has: an evaluation on the way, and many checkpoints, some of which hold the
    best weights beside the present ones; at the end the whole validation part, a sample and the report.
    """
    flags = {"num-steps": steps, "eval-every": max(1, steps // 2), "checkpoint-every": 3}
    words = ["train", preset, *(f"--{flag}={value}" for flag, value in flags.items())]
    with tempfile.TemporaryDirectory() as folder:
        found = harness.ask("bench.memory:run_command", words=[*words, f"--path={folder}"])
    return {"ms": found["ms"], "taken": process_memory.growth(found["sizes"], process_memory.of_interpreter())}


def estimate_row(found: Estimate, real: dict) -> dict[str, str]:
    """A line of the table."""
    ratio = found.memory / real["taken"]
    return {
        "preset": found.preset.name,
        "processes": str(found.facts.workers),
        "estimated, MiB": mib(found.memory, 1),
        "taken, MiB": mib(real["taken"], 1),
        "ratio": f"{ratio:.3f}",
        f"within {PRECISION:.0%}": "yes" if abs(ratio - 1) <= PRECISION else "NO",
        "estimated, ms a step": f"{found.trial.ms_a_step:.1f}",
        "real, ms a step": f"{real['ms']:.1f}",
    }


def run_command(words: list[str]) -> dict:
    """The child's part: run a command of baby_xp that trains -> its milliseconds per step, and all sizes."""
    from baby_xp import cli
    from baby_xp.cli import train_commands

    watched = []

    class Watched(train_commands.Screen):
        """What the command line shows, with a record of the speed and of the workers' memory."""

        def started(self, session, step):
            self.tokens = session.learned.batches.batch_size * session.chosen.model.n_ctx
            self.ms, self.workers = [], []
            watched.append(self)
            super().started(session, step)

        def progress(self, step, loss, tokens_per_second):
            self.ms.append(1e3 * self.tokens / tokens_per_second)
            self.workers = process_memory.taken(process_memory.children())[1:]  # at the end they no longer run
            super().progress(step, loss, tokens_per_second)

    train_commands.Screen = Watched
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = cli.main(words)
    if code:
        raise SystemExit(code)
    ms = statistics.median(watched[0].ms[1:] or watched[0].ms)
    return {"ms": ms, "sizes": [*process_memory.taken(), *watched[0].workers]}


if __name__ == "__main__":
    raise SystemExit(main())
