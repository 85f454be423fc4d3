"""What the command `inspect` prints of an inspection."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baby_xp import layout
from baby_xp.config import GPTConfig
from baby_xp.errors import BabyError
from baby_xp.inspection.inspect import Inspection, ablate, embedding, inspect, neighbours
from baby_xp.inspection.render import bar, shown

if TYPE_CHECKING:
    from baby_xp.inference.trained_model import TrainedModel

WIDTH = 100
"""Width of the lines that list the tokens, in characters."""


@dataclass(frozen=True)
class InspectOptions:
    """The options of `inspect` on the command line."""

    prompt: str = ""
    """Text for the model to read."""
    layer: str | None = None
    """Show all arrays of one block (0, 1, ...), or of all; by default, only the outputs of the layers."""
    backward: bool = False
    """Also show the gradients of the prompt's loss."""
    attention: str | None = None
    """LAYER.HEAD, such as 0.1: show what this head attends to (default: the sharpest); all: compare the heads."""
    picture: str | None = None
    """Draw the attention of that head, or of all, to this file (.png, .svg, ...); needs the extra `plots`."""
    neighbours: str | None = None
    """Show the tokens whose embeddings are nearest to that of this token."""
    off: tuple[str, ...] = ()
    """LAYER.HEAD [LAYER.HEAD ...]: ablate these heads and show the effect on the loss."""
    top: int = 5
    """How many predictions and neighbours to list."""


def report(trained: "TrainedModel", options: InspectOptions, plain: bool = False) -> list[str]:
    """What the command prints; a picture is written, if one is asked for. Raises BabyError as `inspect` does."""
    config = trained.model.config
    gpt = isinstance(config, GPTConfig)
    if not gpt and (options.attention or options.picture or options.off):
        raise BabyError("the equation model has no attention; leave out --attention, --picture and --off")
    size = (config.n_layers, config.n_heads) if isinstance(config, GPTConfig) else (0, 0)
    layer = _layer(options.layer, size[0])
    ablated = [_head(text, "--off", size) for part in options.off for text in part.split(",")]
    compare = options.attention == "all"
    chosen = _head(options.attention, "--attention", size) if options.attention and not compare else None
    if options.top < 1:
        raise BabyError(f"top must be at least 1, not {options.top}")
    if options.picture:
        from baby_xp.inspection import plots

        plots.check(options.picture)  # before the computation
    near = None if options.neighbours is None else neighbours(trained, options.neighbours, options.top)
    seen = inspect(trained, options.prompt, options.backward, ablate(trained, ablated))
    lines = [*_head_lines(seen), ""]
    if ablated:
        lines += [*_ablation_lines(seen, inspect(trained, options.prompt), ablated), ""]
    lines += [*_table_lines(seen, options, layer), "", *seen.next_lines(options.top, plain)]
    if options.picture:
        lines += ["", f"picture: {plots.attention(seen, options.picture, chosen)}"]
    elif gpt and len(seen.tokens) > 1:
        lines += ["", *_attention_lines(seen, chosen, compare, plain)]
    if near:
        lines += ["", *_neighbour_lines(trained, str(options.neighbours), near, plain)]
    return lines


def _head_lines(seen: Inspection) -> list[str]:
    tokens = ", ".join(f"{shown(token)} {i}" for token, i in zip(seen.tokens, seen.ids, strict=True))
    lines = [f"note: {note}" for note in seen.notes]
    lines += [f"{layout.counted(len(seen.tokens), 'token')}, each with its id:"]
    lines += layout.wrapped(" " * 5, tokens, WIDTH)
    if seen.loss is not None:
        even = math.log(len(seen.vocabulary))
        lines.append(f"loss of the prompt: {seen.loss:.4f} nats per token (all tokens equally likely: {even:.4f})")
    return lines


def _ablation_lines(seen: Inspection, before: Inspection, ablated: list[tuple[int, int]]) -> list[str]:
    heads = ", ".join(f"{layer}.{head}" for layer, head in ablated)
    names = f"head{'s' * (len(ablated) > 1)} {heads} ablated"
    if seen.loss is None or before.loss is None:
        return [f"{names}; a prompt of one token has no loss to compare"]
    rise = seen.loss - before.loss
    verdict = f"{abs(rise):.4f} {'worse' if rise > 0 else 'better'}" if rise else "no difference"
    was, now = before.next_tokens(-1, 1)[0], seen.next_tokens(-1, 1)[0]
    return [
        f"{names} (everything below is computed without):",
        f"     loss of the prompt       {before.loss:.4f} with, {seen.loss:.4f} without: {verdict}",
        f"     most likely after the end  {shown(was[0])} {was[1]:.1%} with, {shown(now[0])} {now[1]:.1%} without",
    ]


def _table_lines(seen: Inspection, options: InspectOptions, layer: int | str | None) -> list[str]:
    one = layer if isinstance(layer, int) else None
    stream = layer is None and any(name.startswith("blocks.") for name in seen.arrays)
    where = "" if one is None else f" through block {one}"
    about = "the outputs of the layers" if stream else f"every array of the forward pass{where}"
    lines = [f"{about}, by their names in the source (y:2 is the second y there):", *seen.table(one, stream)]
    if stream:
        lines.append("(--layer 0 shows all arrays of block 0, --layer all those of all blocks)")
    if options.backward:
        back = f"the gradients of the backward pass{where}, then those of the parameters:"
        lines += ["", back, *seen.gradient_table(one, stream)]
    return lines


def _attention_lines(
    seen: Inspection, chosen: tuple[int, int] | None, compare: bool, plain: bool
) -> list[str]:
    if compare:
        return [*seen.heads_lines(), "(--picture FILE.png draws them all, --attention LAYER.HEAD one of them)"]
    layer, head = chosen or seen.sharpest_head()
    lines = seen.attention_lines(layer, head, plain)
    if not chosen:
        lines.append("(the sharpest head; --attention LAYER.HEAD shows another, --attention all compares them)")
    return lines


def _neighbour_lines(
    trained: "TrainedModel", token: str, near: list[tuple[str, float]], plain: bool
) -> list[str]:
    if trained.model.config.n_emb > 1:
        about = f"nearest to the embedding of {shown(token)}, by the cosine of the angle between them:"
        return [about, *(f"     {shown(t):<8}{c:>7.3f} {bar(c, 50, plain)}".rstrip() for t, c in near)]
    table = embedding(trained)
    at = {t: float(table[trained.tokenizer.encode(t)[0], 0]) for t in (token, *(t for t, _ in near))}
    about = f"nearest to {shown(token)}, whose embedding is one number, {at[token]:.3f}"
    return [
        f"{about} (first those on the same side of 0):",
        *(f"     {shown(t):<8}{at[t]:>7.3f}" for t, _ in near),
    ]


def _head(text: str, flag: str, size: tuple[int, int]) -> tuple[int, int]:
    """The layer and head that "1.2" names. Raises BabyError if there is none."""
    layer, _, head = text.partition(".")
    if not (_is_number(layer) and _is_number(head)):
        alternative = ", or all" if flag == "--attention" else ""
        raise BabyError(f"{flag} must be LAYER.HEAD, such as 0.1{alternative}, not {text!r}")
    for name, value, number in (("layer", int(layer), size[0]), ("head", int(head), size[1])):
        if value >= number:
            raise BabyError(f"{flag} {text}: there is no {name} {value}, the run has {name}s 0 to {number - 1}")
    return int(layer), int(head)


def _is_number(text: str) -> bool:
    """Whether this is a whole number of a few digits: Python refuses to read thousands."""
    return text.isdecimal() and len(text) < 10


def _layer(text: str | None, number: int) -> int | str | None:
    if text in (None, "all"):
        return text
    if not number:
        raise BabyError("the equation model has no blocks: leave out --layer to see all arrays")
    if not (_is_number(text) and int(text) < number):
        raise BabyError(f"there is no layer {text!r}: give 0 to {number - 1}, or all")
    return int(text)
