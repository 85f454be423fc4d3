"""How long one epoch of a preset takes, by a part of it: steps, evaluations and the end, each measured.

    python -m bench.epoch [--preset 48-months] [--backend cupy] [--tf32] [--data shakespeare.txt] [--steps N]
                          [--out FOLDER]

See bench/README.md for how to read it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import baby_xp
from baby_xp import task
from baby_xp.api import Silent
from baby_xp.errors import BabyError
from baby_xp.presets import PRESETS
from bench import arguments, goals, processes
from bench.workloads import on_gpu

GOAL = "48-months"


class Watch(Silent):
    """Notes when training began, how fast it went, and how long each evaluation took, in seconds."""

    def __init__(self):
        self.begin = self.last = time.perf_counter()
        self.first: tuple[int, float] | None = None
        """Steps until the first reading, and the seconds that they took."""
        self.rates, self.evaluations, self.end = [], [], 0.0
        self._warm = False

    def started(self, sitting: Any, step: int) -> None:
        """The clock begins with training, not with the import of libraries or the reading of the text."""
        self.begin = self.last = time.perf_counter()

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """A reading; those before the first evaluation warm up."""
        self.last = time.perf_counter()
        if self.first is None:
            self.first = step, self.last - self.begin
        if self._warm:
            self.rates.append(tokens_per_second)

    def evaluated(self, record: dict[str, Any]) -> None:
        """An evaluation on the way, or that of the whole validation part."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        if record["whole_validation"]:
            self.end = seconds
        elif self._warm:
            self.evaluations.append(seconds)
        self._warm = True


def main() -> int:
    """Train a part of an epoch in a folder of its own, and tell what the whole takes."""
    asked = parse()
    try:
        found = measure(asked)
    except BabyError as error:
        print(f"bench.epoch: {error}", file=sys.stderr)
        return 2
    text = "\n".join(lines(found))
    print(text)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "epoch.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (asked.out / "epoch.md").write_text(text + "\n", encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.epoch", description=__doc__.splitlines()[0])
    epochs = [name for name, preset in PRESETS.items() if preset.train.num_epochs is not None]
    parser.add_argument("--preset", choices=epochs, default=GOAL, help="(%(default)s)")
    parser.add_argument("--backend", type=arguments.backend, default="cupy", help="(%(default)s)")
    parser.add_argument("--tf32", action="store_true", help="products in TF32")
    parser.add_argument("--data", default="shakespeare", help="path to tiny Shakespeare (that of the catalog)")
    parser.add_argument(
        "--steps", type=arguments.positive, default=2000, help="a quarter of them to warm up (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder for epoch.json and epoch.md")
    asked = parser.parse_args()
    if asked.steps < 4:
        parser.error("argument --steps: 4 at the least, as a quarter of them warms up")
    return asked


def measure(asked: argparse.Namespace) -> dict:
    """Train so many steps, with an evaluation after each quarter of them -> the parts of an epoch."""
    preset, watch = PRESETS[asked.preset], Watch()
    options = {"tf32": True} if asked.tf32 else {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        data = replace(preset.data, data=asked.data)
        steps = task.prepare(data, preset.model, preset.train, Path(folder) / "corpora").num_steps
        run = baby_xp.train(
            asked.preset, path=folder, backend=asked.backend, listener=watch, data=asked.data,
            num_steps=asked.steps, eval_every=max(1, asked.steps // 4), **options,
        )  # fmt: skip
        machine = run.config.get("machine", {})
    tokens = preset.train.batch_size * preset.model.n_ctx
    return {
        "preset": asked.preset, "backend": asked.backend, "precision": "tf32" if asked.tf32 else "float32",
        "machine": machine, "gpu": processes.gpu(), "measured_steps": asked.steps,
        **projection(watch, steps, tokens, preset.train.eval_every),
    }  # fmt: skip


def projection(watch: Watch, steps: int, tokens: int, eval_every: int) -> dict:
    """Seconds of an epoch of so many steps of `tokens` tokens: first readings, steps, evaluations, the end."""
    step = tokens / statistics.median(watch.rates)
    evaluation = statistics.median(watch.evaluations)
    parts = {
        # how much longer than later steps the first ones took: kernels are compiled or loaded
        "beginning": max(0.0, watch.first[1] - watch.first[0] * step),
        "steps": steps * step,
        "evaluations": evaluation * -(-steps // eval_every),
        "end": watch.end,
    }
    return {
        "ms_a_step": 1e3 * step, "steps": steps, "seconds_an_evaluation": evaluation, "seconds": parts,
        "total_seconds": sum(parts.values()),
    }  # fmt: skip


def lines(found: dict) -> list[str]:
    """The results as Markdown."""
    parts = ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in found["seconds"].items())
    measured = found["measured_steps"]
    told = [
        f"{found['preset']} on {found['backend']}, {found['precision']}; {found['gpu'] or 'no GPU here'}",
        "",
        *(f"- {name}: {value}" for name, value in found["machine"].items()),
        f"- {found['ms_a_step']:.3f} ms a step, median over the last three quarters of {measured:,} steps",
        f"- one epoch: {found['steps']:,} steps, {found['total_seconds']:,.1f} s by projection: {parts}; "
        "checkpoints are left out",
    ]
    if found["preset"] == GOAL and on_gpu(found["backend"]):
        told.append(goals.epoch_line(found["total_seconds"]))
    return told


if __name__ == "__main__":
    raise SystemExit(main())
