"""How much memory a training run takes, against what its arrays need.

    python -m bench.memory [--workloads W1,W2] [--steps N] [--top N]

The promise is a ratio of at most 2. Linux only: sizes come from /proc.
"""

import argparse
import sys
from pathlib import Path

from baby_xp import memory
from bench import processes
from bench.tables import markdown
from bench.workloads import Workload, chosen

PROMISE = 2.0
MIB = 2**20


def main() -> int:
    """Measure the workloads that the command line names."""
    arguments = parse()
    if not Path("/proc/self/status").exists():
        print("bench.memory: this system has no /proc/<pid>/status, where sizes are read", file=sys.stderr)
        return 2
    rows, details = [], []
    idle = processes.ask("footprint", what="baseline")["memory"][0]
    for workload in arguments.workloads:
        needed = processes.ask("footprint", what="needed", workload=workload.name)
        rows += [row(workload, arguments.steps, workers, needed, idle) for workers in (1, None)]
        found = processes.ask(
            "footprint", what="traced", workload=workload.name, steps=arguments.steps, top=arguments.top
        )
        details += ["", *detail(workload, needed, found)]
    print("\n".join([*markdown(rows), *details]))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", type=chosen, default="W1,W2,W3", help="such as W1,W2 (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps of each run (%(default)s)")
    parser.add_argument("--top", type=int, default=10, help="lines listed for each workload (%(default)s)")
    return parser.parse_args()


def row(workload: Workload, steps: int, workers: int | None, needed: dict, idle: dict) -> dict[str, str]:
    """Train in a child process and compare. workers: None for the number that `train` would choose."""
    found = processes.ask(
        "train", name="baby_xp", workload=workload.name, steps=steps, warmup=0, dropout=workload.dropout,
        workers=workers,
    )  # fmt: skip
    taken, need = memory.growth(found["memory"], idle), sum(needed.values())
    return {
        "workload": workload.name,
        "workers": found["about"]["workers"] + ("" if workers else " (automatic)"),
        "needed, MiB": f"{need / MIB:.1f}",
        "taken, MiB": f"{taken / MIB:.1f}",
        "ratio": f"{taken / need:.2f}",
        f"at most {PROMISE:g}": "yes" if taken <= PROMISE * need else "NO",
    }


def detail(workload: Workload, needed: dict, found: dict) -> list[str]:
    """What is needed by kind, and the lines that hold most at the peak of a run in one process."""
    parts = ", ".join(f"{name} {size / MIB:.1f}" for name, size in needed.items())
    return [
        f"{workload.name}: {workload.about}",
        f"  needed, MiB: {parts}",
        f"  allocated in Python, MiB: {found['peak'] / MIB:.1f} at the peak, "
        f"{found['between_lines'] / MIB:.1f} between two lines; of the latter:",
        *(
            f"  {one['bytes'] / MIB:8.1f} in {one['blocks']:4d}  {one['file']}:{one['line']}  {one['code']}"
            for one in found["lines"]
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
