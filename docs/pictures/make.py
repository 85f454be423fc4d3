"""The picture of the README: how the loss of `baby` falls, and samples of the model during training.

    python docs/pictures/make.py [FOLDER]

trains the preset `baby`, which takes a minute or two, and writes baby-light.svg and baby-dark.svg
into FOLDER, by default the folder of this file. It needs matplotlib: pip install -e '.[plots]'.
"""

import json
import math
import sys
import tempfile
import textwrap
from pathlib import Path

from baby_xp_data import nursery
from matplotlib import rc_context
from matplotlib.figure import Figure

import baby_xp

SAMPLES = {10: (13, 1), 40: (13, 6), 100: (13, 20), 1000: (0, 26)}
"""Steps at which the picture shows a sample -> its position, in points from the curve."""
CHARACTERS = 52
"""Length of each of these samples."""
COLOURS = {  # of the two themes of a page
    "light": {"text": "#1f2328", "faint": "#59636e", "curve": "#0969da", "limit": "#bc4c00"},
    "dark": {"text": "#f0f6fc", "faint": "#9198a1", "curve": "#58a6ff", "limit": "#f0883e"},
}
MONO, DASHES = "DejaVu Sans Mono", (0, (4, 2))
STYLE = {"svg.hashsalt": "baby_xp", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9.5}
"""Letters become outlines, so that the picture looks the same everywhere; the same run gives the same bytes."""


def learn(**settings) -> tuple[list[dict], int]:
    """Train `baby` with two processes -> a record every ten steps (step, val_loss, sample), vocabulary size."""
    with tempfile.TemporaryDirectory() as folder:
        run = baby_xp.train(
            "baby", path=folder, backend="numpy", workers=2, eval_every=10, sample_tokens=64, **settings
        )
        lines = (Path(folder) / f"outputs/metrics_{run.guid}.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if not record["whole_validation"]], run.model.vocab_size


def draw(records: list[dict], vocab_size: int, theme: str) -> Figure:
    """The validation loss over the steps, with samples at SAMPLES, on a transparent background."""
    colours, best, guess = COLOURS[theme], nursery.entropy_per_character(), math.log(vocab_size)
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(8, 4), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot(facecolor="none", xlim=(0, steps[-1]), ylim=(0, 4.1), yticks=range(5))
    axes.set_xlabel("training step", color=colours["faint"])
    axes.set_title("validation loss, in nats per character", loc="left", color=colours["faint"], fontsize="medium")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(length=0, colors=colours["faint"])
    axes.spines[:].set_visible(False)

    note = {"transform": axes.get_yaxis_transform(), "va": "center_baseline"}
    axes.axhline(guess, color=colours["faint"], linewidth=1.2, linestyle=DASHES)
    words = f"{guess:.2f}: guessing among {vocab_size} characters"
    axes.text(0.995, guess - 0.13, words, color=colours["faint"], ha="right", **note)
    axes.axhspan(0, best, color=colours["limit"], alpha=0.13, linewidth=0)
    axes.axhline(best, color=colours["limit"], linewidth=1.4, linestyle=DASHES)
    words = f"no model can get below {best:.4f}, the exact entropy of these stories"
    axes.text(0.5, best / 2, words, color=colours["limit"], ha="center", **note)

    axes.plot(steps, [record["val_loss"] for record in records], color=colours["curve"], linewidth=2.2)
    for record in records:
        if record["step"] in SAMPLES:
            show_sample(axes, record, colours)
    return figure


def show_sample(axes, record: dict, colours: dict[str, str]) -> None:
    """A dot on the curve, and what the model wrote at that step: to the right of the dot, or above it."""
    at, (x, y) = (record["step"], record["val_loss"]), SAMPLES[record["step"]]
    axes.plot(*at, "o", color=colours["curve"], markersize=6.5, clip_on=False, zorder=3)
    place = {"textcoords": "offset points", "ha": "left" if x else "right", "va": "center_baseline"}
    label = f"step {at[0]:,}, loss {at[1]:.2f}"
    text = textwrap.shorten(record["sample"], CHARACTERS, placeholder=" …")
    for words in (
        axes.annotate(label, at, (x, y + 7), color=colours["faint"], fontsize=8.5, **place),
        axes.annotate(text, at, (x, y - 6), color=colours["text"], family=MONO, parse_math=False, **place),
    ):
        words.set_in_layout(False)


def save(records: list[dict], vocab_size: int, folder: Path) -> None:
    """Draw the picture for both themes."""
    for theme in COLOURS:
        with rc_context(STYLE):
            draw(records, vocab_size, theme).savefig(folder / f"baby-{theme}.svg", metadata={"Date": None})


if __name__ == "__main__":
    save(*learn(), Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
