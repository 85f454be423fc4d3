"""What was tried in PyTorch, before any of it was in baby_xp: additions to the model of the preset `shakespeare`.

See bench/README.md.
"""

import statistics
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from baby_xp import presets
from baby_xp.arrays import params
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.text import dataset
from baby_xp.text.batches import consecutive_windows
from bench import harness, variants
from bench.harness import say
from bench.peers import Curve
from bench.results import markdown

PRESET = "shakespeare"
WITHOUT = variants.EARLIER[PRESET]
"""What makes the preset what it was when the parts were tried: it had none of them."""
SKETCHES: dict[str, tuple[str, ...]] = {
    "the preset": (),
    "value embeddings": ("values",),
    "x0 shortcut": ("x0",),
    "smear": ("smear",),
    "all three": ("values", "x0", "smear"),
}
"""What each is called -> the parts of bench.peers.torch_sketches.Sketch that it has."""


def main() -> int:
    """Train what the file lacks, keep each loss, print the table."""
    try:
        parser = harness.parser("bench.sketches", __doc__)
        help_of_file = "file of the losses, which is continued"
        parser.add_argument("--file", type=Path, required=True, help=help_of_file)
        parser.add_argument("--seeds", type=harness.positive, default=3, help="seeds, from 0 (%(default)s)")
        parser.add_argument("--jobs", type=harness.positive, default=1, help="trainings at once (%(default)s)")
        asked = parser.parse_args()
        result = variants.started(asked.file, {"preset": presets.preset(PRESET).override(WITHOUT).to_dict()})
        requests = {
            f"{name}, seed {seed}": {"name": name, "seed": seed}
            for seed in range(asked.seeds)
            for name in SKETCHES
        }
        keep = lambda: variants.write(asked.file, result, document(result))  # noqa: E731
        variants.train_all("bench.sketches:trained", requests, result, asked.jobs, keep)
    except (BabyError, harness.Failed) as error:
        say(f"bench.sketches: {error}")
        return 2
    print("\n".join(document(result)))
    return 0


def trained(name: str, seed: int) -> dict:
    """The child's part: train a sketch on one thread -> its name, seed, and loss at the end of the training.

    The loss is over the whole validation part, in nats per token.
    """
    from bench.peers import torch_modern, torch_sketches

    config = presets.preset(PRESET).override({**WITHOUT, "seed": seed})
    with TemporaryDirectory() as folder:
        found = dataset.prepare(config.data, config.model, config.train, Path(folder))
        model = Model(config.model, found.tokenizer.vocab_size)
        windows = partial(
            consecutive_windows, found.corpus.validation, config.model.n_ctx, config.train.batch_size
        )
        curve = Curve(found.batches, found.num_steps, [windows])
        weights = params.draw(model.spec, seed, config.train.dtype)
        make = partial(torch_sketches.Sketch, parts=SKETCHES[name])
        torch_modern.fit(model, config.train, found, curve, weights, make, threads=1)
    return {"name": name, "seed": seed, "failed": None, "val_loss": curve.points[-1][2]}


def document(result: dict) -> list[str]:
    """The losses as Markdown."""
    rows = []
    for name in SKETCHES:
        runs = [run for run in result["trained"].values() if run["name"] == name]
        if losses := [run["val_loss"] for run in sorted(runs, key=lambda run: run["seed"])]:
            each = ", ".join(f"{loss:.3f}" for loss in losses)
            rows.append({"in PyTorch": name, "validation loss": f"{statistics.median(losses):.3f} ({each})"})
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return [f"{result['date']}; {machine}", "", *markdown(rows)]


if __name__ == "__main__":
    raise SystemExit(main())
