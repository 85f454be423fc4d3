"""How near `estimate` comes to what a run then really takes: memory, and the time of a step.

    python -m bench.estimate [--presets baby,3-months] [--steps N]

Each preset is estimated, and then trained by the command `train` in a process of its own. `shakespeare` is the one
of the catalog (BABY_XP_DATA names the folder where it lies). The promise is memory within 15 %. Linux only.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from baby_xp import memory
from baby_xp.errors import BabyError
from baby_xp.estimating import Estimate, estimate
from bench import processes
from bench.tables import markdown

PROMISE = 0.15
MIB = 2**20
PROGRAM = "from bench.estimate import train; train()"


def main() -> int:
    """Compare for the presets that the command line names."""
    arguments = parse()
    if not Path("/proc/self/status").exists():
        print("bench.estimate: this system has no /proc/<pid>/status, where sizes are read", file=sys.stderr)
        return 2
    rows = []
    for name in arguments.presets.split(","):
        try:
            found = estimate(name)
        except BabyError as error:
            raise SystemExit(f"bench.estimate: {error}") from None
        rows.append(row(found, really(name, arguments.steps)))
    print("\n".join(markdown(rows)))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.estimate", description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default="baby,nanogpt-cpu,3-months,24-months", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each real run (%(default)s)")
    return parser.parse_args()


def really(name: str, steps: int) -> dict:
    """Train the preset for so many steps -> ms a step, and bytes taken.

    The short run has what a long one has: an evaluation on the way, and many checkpoints, some of which hold the
    best weights beside the present ones; at the end the whole validation part, a sample and the report.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = {"path": folder, "num-steps": steps, "eval-every": steps // 2, "checkpoint-every": 3}
        arguments = ["train", name, *(f"--{flag}={value}" for flag, value in flags.items())]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], input=json.dumps(arguments), stdout=subprocess.PIPE, text=True,
            cwd=processes.ROOT,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"bench.estimate: the run ended with exit code {done.returncode}")
    found = json.loads(done.stdout)
    return {"ms": found["ms"], "taken": memory.growth(found["sizes"], memory.of_interpreter())}


def row(found: Estimate, real: dict) -> dict[str, str]:
    """A line of the table."""
    ratio = found.memory / real["taken"]
    return {
        "preset": found.preset.name,
        "processes": str(found.facts.workers),
        "estimated, MiB": f"{found.memory / MIB:.1f}",
        "taken, MiB": f"{real['taken'] / MIB:.1f}",
        "ratio": f"{ratio:.3f}",
        f"within {PROMISE:.0%}": "yes" if abs(ratio - 1) <= PROMISE else "NO",
        "estimated, ms a step": f"{found.trial.ms_a_step:.1f}",
        "real, ms a step": f"{real['ms']:.1f}",
    }


def train() -> None:
    """The child's part: run the command on its input, and tell what it took."""
    from baby_xp import cli
    from baby_xp.cli import train_commands

    watched = []

    class Watched(train_commands.Screen):
        """What the command line shows, and beside it the speed and the workers' memory."""

        def started(self, sitting, step):
            self.tokens = sitting.learned.batches.batch_size * sitting.chosen.model.n_ctx
            self.ms, self.workers = [], []
            watched.append(self)
            super().started(sitting, step)

        def progress(self, step, loss, tokens_per_second):
            self.ms.append(1e3 * self.tokens / tokens_per_second)
            self.workers = memory.taken(memory.children())[1:]  # at the end they are no more
            super().progress(step, loss, tokens_per_second)

    train_commands.Screen = Watched
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = cli.main(json.load(sys.stdin))
    if code:
        raise SystemExit(code)
    ms = statistics.median(watched[0].ms[1:] or watched[0].ms)
    print(json.dumps({"ms": ms, "sizes": [*memory.taken(), *watched[0].workers]}))


if __name__ == "__main__":
    raise SystemExit(main())
