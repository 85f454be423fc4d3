"""Pictures, for the extra `plots`. matplotlib is imported only when a picture is requested."""

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from baby_xp.errors import BabyError
from baby_xp.files import as_path, reason, shown, write

if TYPE_CHECKING:
    from baby_xp.equations.leave_one_out import Results
    from baby_xp.inspection.inspect import Inspection

COLOURS, FUTURE = "magma_r", "0.9"
"""Pale for no weight, dark for all of it, readable without colours too; grey for the masked future."""
MOST_LABELS = 80
OF_OTHERS = {"pgf"}
"""Kinds of pictures for which matplotlib needs other programs."""


def check(file: str | Path) -> Path:
    """The path of a picture. Raises BabyError if it cannot be written there; call this before the computation."""
    path = as_path(file, "picture")
    known = _figure(1, 1).canvas.get_supported_filetypes().keys() - OF_OTHERS
    kind = path.suffix.lower().removeprefix(".")
    if kind not in known:
        raise BabyError(f"{shown(path)}: a picture's name ends in one of .{', .'.join(sorted(known))}")
    if not os.path.isdir(path.parent):
        raise BabyError(f"{shown(path)} cannot be written: there is no folder {shown(path.parent)}")
    return path


def attention(seen: "Inspection", file: str | Path, head: tuple[int, int] | None = None) -> Path:
    """Draw the attention of one head (layer, head), or of all heads as a grid -> the picture's path.

    Each row is a token, which attends to the tokens of the columns. Raises BabyError if matplotlib is
    missing, the model has no attention, or the file cannot be written.
    """
    path = check(file)
    layers, heads = seen.attention_size
    maps = [head] if head else [(layer, head) for layer in range(layers) for head in range(heads)]
    rows, columns = (1, 1) if head else (layers, heads)
    # large enough to read the tokens of a single map; a grid of maps needs less
    side = max(3.5, 1.2 + 0.2 * len(seen.tokens)) if head else max(1.8, 0.6 + 0.09 * len(seen.tokens))
    figure = _figure(columns * side, rows * side)
    figure.suptitle("Attention: each token (row) attends to earlier ones (columns)", fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for one, (layer, number) in zip(axes, maps, strict=True):
        image = _map(one, seen, layer, number, 8 if head else 5)
    figure.colorbar(image, ax=list(axes), shrink=0.8, label="weight")
    return save(figure, path)


def _map(axes: Any, seen: "Inspection", layer: int, head: int, size: float) -> Any:
    """One head's weights, with the tokens at its axes."""
    from baby_xp.inspection.render import glyph

    axes.set_title(f"layer {layer}, head {head}", fontsize=size + 2)
    every = -(-len(seen.tokens) // MOST_LABELS)
    at = range(0, len(seen.tokens), every)
    labels = [token if token.startswith("\\x") else glyph(token) for token in seen.tokens[::every]]
    axes.set_xticks(at, labels, fontsize=size)
    axes.set_yticks(at, labels, fontsize=size)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_facecolor(FUTURE)
    weights = seen.attention(layer, head)
    past = np.ma.masked_array(weights, np.triu(np.ones(weights.shape, bool), 1))
    return axes.imshow(past, cmap=COLOURS, vmin=0, vmax=1)


def answers(results: "Results", file: str | Path) -> Path:
    """Draw the share of held-out equations answered correctly, a map per operator -> the picture's path.

    Raises BabyError if matplotlib is missing or the file cannot be written.
    """
    path, operators = check(file), results.table.operators
    figure = _figure(0.8 + 4.6 * len(operators), 4.6)
    figure.suptitle(f"Held-out equations answered correctly: {results.share:.1%}", fontsize=11)
    all_axes = figure.subplots(1, len(operators), squeeze=False).reshape(-1)
    what = "operand" if results.table.digits == 1 else "operand's tens"
    for axes, operator in zip(all_axes, operators, strict=True):
        shares = results.map(operator)
        axes.set_facecolor(FUTURE)
        image = axes.imshow(np.ma.masked_invalid(shares), cmap="cividis", vmin=0, vmax=1)
        axes.set_title(f"a {operator} b", fontsize=10)
        axes.set_ylabel(f"a, the first {what}")
        axes.set_xlabel(f"b, the second {what}")
        axes.set_xticks(range(10))
        axes.set_yticks(range(10))
        for (a, b), share in np.ndenumerate(shares):
            if not np.isnan(share):
                colour = "black" if share > 0.6 else "white"
                axes.text(b, a, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=list(all_axes), shrink=0.8, label="share correct")
    return save(figure, path)


def _figure(width: float, height: float) -> Any:
    """A figure of this size in inches, without a window and without state shared with other figures."""
    try:
        from matplotlib.figure import Figure
    except (ImportError, ValueError) as error:  # ValueError: MPLBACKEND names an unknown backend
        raise BabyError(f"pictures need matplotlib ({error}): pip install -e '.[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> Path:
    """Write the picture, completely or not at all."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box is drawn in place of the glyph
        try:
            figure.savefig(buffer, format=path.suffix.lower().removeprefix("."), dpi=150)
        except MemoryError:
            raise
        except Exception as error:  # from matplotlib or the library that writes this format
            advice = "try a name that ends in .png or .svg, or fewer tokens and heads"
            raise BabyError(f"{shown(path)} cannot be drawn ({reason(error)}); {advice}") from None
    write(path, buffer.getvalue(), other="--picture")
    return path
