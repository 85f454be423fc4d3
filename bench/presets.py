"""How long each GPT preset takes on this machine: a few steps of each, and what that makes for the whole.

    python -m bench.presets --data shakespeare.txt [--steps 12] [--presets baby,nanogpt-cpu]

`--data` is the text of the presets that read `shakespeare`. Prints milliseconds a step (the training alone, by the
tokens a second that a run reports) and the projected hours of a whole run; evaluations are not in it.
"""

import argparse
import tempfile
from pathlib import Path

import baby_xp
from baby_xp.presets import PRESETS
from baby_xp.text.batches import EpochWindows
from baby_xp.text.corpus import Corpus

GPTS = [name for name, preset in PRESETS.items() if preset.model.kind == "gpt"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.presets", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="path to tiny Shakespeare")
    parser.add_argument("--steps", type=int, default=12, help="steps to time, after as many to warm up")
    parser.add_argument("--presets", default=",".join(GPTS), help="names, joined by commas")
    asked = parser.parse_args()
    print(f"{'preset':<12} {'parameters':>10} {'steps':>7} {'ms a step':>9} {'whole run':>10}")
    for name in asked.presets.split(","):
        measure(name, asked.data, asked.steps)


def measure(name: str, data: str, steps: int) -> None:
    """Train a preset for a few steps in a folder of its own, and print its line."""
    preset = PRESETS[name]
    overrides = {"data": data} if preset.data.data == "shakespeare" else {}
    with tempfile.TemporaryDirectory() as folder:
        run = baby_xp.train(name, path=folder, num_steps=2 * steps, eval_every=steps, **overrides)
        total = preset.train.num_steps or steps_of_an_epoch(preset, Path(data), Path(folder))
    tokens = preset.train.batch_size * preset.model.n_ctx
    milliseconds = 1e3 * tokens / run.config["result"]["tokens_per_second"]
    hours = milliseconds * total / 3.6e6
    length = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
    print(f"{name:<12} {run.model.n_parameters:>10,} {total:>7,} {milliseconds:>9.1f} {length:>10}", flush=True)


def steps_of_an_epoch(preset, data: Path, folder: Path) -> int:
    """Steps of the preset's epochs over this text."""
    corpus = Corpus.from_file(data, preset.data.tokenizer, folder / "corpora")
    batch_size, stride = preset.train.batch_size, preset.train.stride
    windows = EpochWindows(corpus.train, preset.model.n_ctx, batch_size, stride, 0)
    return preset.train.num_epochs * windows.steps_per_epoch


if __name__ == "__main__":
    main()
