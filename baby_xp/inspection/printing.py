"""What the command `inspect` prints of an inspection."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baby_xp import layout
from baby_xp.errors import BabyError
from baby_xp.inspection.inspect import Inspection, embedding, inspect, is_equation, neighbours, off
from baby_xp.inspection.render import bar, shown

if TYPE_CHECKING:
    from baby_xp.run import Run

WIDTH = 100
"""Characters of a line of tokens."""


@dataclass(frozen=True)
class InspectOptions:
    """What `inspect` on the command line is asked to show."""

    prompt: str = ""
    backward: bool = False
    layer: str | None = None
    attention: str | None = None
    picture: str | None = None
    neighbours: str | None = None
    off: tuple[str, ...] = ()
    top: int = 5


def report(run: "Run", options: InspectOptions, plain: bool = False) -> list[str]:
    """What the command prints; a picture is written, if one is asked for. Raises BabyError as `inspect` does."""
    gpt = not is_equation(run)
    if not gpt and (options.attention or options.picture or options.off):
        raise BabyError("the equation model has no attention; leave out --attention, --picture and --off")
    size = (run.model.config.n_layers, run.model.config.n_heads) if gpt else (0, 0)
    layer = _layer(options.layer, size[0])
    switched = [_head(text, "--off", size) for part in options.off for text in part.split(",")]
    chosen = options.attention
    if chosen not in (None, "all"):
        chosen = _head(chosen, "--attention", size)
    if options.top < 1:
        raise BabyError(f"top must be at least 1, not {options.top}")
    if options.picture:
        from baby_xp.inspection import plots

        plots.check(options.picture)  # before the work, not after it
    near = neighbours(run, options.neighbours, options.top) if options.neighbours is not None else []
    seen = inspect(run, options.prompt, options.backward, off(run, switched))
    lines = [*_head_lines(run, seen), ""]
    if switched:
        lines += [*_off_lines(seen, inspect(run, options.prompt), switched), ""]
    lines += [*_table_lines(seen, options, layer), "", *seen.next_lines(options.top, plain)]
    if options.picture:
        lines += ["", f"picture: {plots.attention(seen, options.picture, None if chosen == 'all' else chosen)}"]
    elif gpt and len(seen.tokens) > 1:
        lines += ["", *_attention_lines(seen, chosen, plain)]
    if near:
        lines += ["", *_neighbour_lines(run, options.neighbours, near, plain)]
    return lines


def _head_lines(run: "Run", seen: Inspection) -> list[str]:
    number = f"{layout.counted(len(seen.tokens), 'token')}, each with its id:"
    tokens = ", ".join(f"{shown(token)} {i}" for token, i in zip(seen.tokens, seen.ids, strict=True))
    lines = [f"run {run.guid}", *(f"note: {note}" for note in seen.notes), number]
    lines += layout.wrapped(" " * 5, tokens, WIDTH)
    if seen.loss is not None:
        even = math.log(len(seen.vocabulary))
        lines.append(f"loss of the prompt: {seen.loss:.4f} nats per token (all tokens equally likely: {even:.4f})")
    return lines


def _off_lines(seen: Inspection, before: Inspection, switched: list[tuple[int, int]]) -> list[str]:
    names = ", ".join(f"{layer}.{head}" for layer, head in switched)
    plural = "s" if len(switched) > 1 else ""
    if seen.loss is None or before.loss is None:
        return [f"head{plural} {names} switched off; a prompt of one token has no loss to compare"]
    gone = seen.loss - before.loss
    verdict = f"{abs(gone):.4f} {'worse' if gone > 0 else 'better'}" if gone else "no difference"
    was, now = before.next_tokens(-1, 1)[0], seen.next_tokens(-1, 1)[0]
    return [
        f"head{plural} {names} switched off (all that follows is without):",
        f"     loss of the prompt       {before.loss:.4f} with, {seen.loss:.4f} without: {verdict}",
        f"     most likely after the end  {shown(was[0])} {was[1]:.1%} with, {shown(now[0])} {now[1]:.1%} without",
    ]


def _table_lines(seen: Inspection, options: InspectOptions, layer: int | str | None) -> list[str]:
    one = layer if isinstance(layer, int) else None
    stream = layer is None and any(name.startswith("blocks.") for name in seen.arrays)
    where = "" if one is None else f" through block {one}"
    about = "what goes from layer to layer" if stream else f"every array on the way{where}"
    lines = [f"{about}, by its name in the source (y:2 is the second y there):", *seen.table(one, stream)]
    if stream:
        lines.append("(--layer 0 shows all arrays of block 0, --layer all those of all)")
    if options.backward:
        back = f"the gradients on the way back{where}, then those of the parameters:"
        lines += ["", back, *seen.gradient_table(one, stream)]
    return lines


def _attention_lines(seen: Inspection, chosen: Any, plain: bool) -> list[str]:
    if chosen == "all":
        return [*seen.heads_lines(), "(--picture FILE.png draws them all, --attention LAYER.HEAD one of them)"]
    lines = seen.attention_lines(*(chosen or seen.sharpest_head()), plain)
    if not chosen:
        lines.append("(the sharpest head; --attention LAYER.HEAD shows another, --attention all compares them)")
    return lines


def _neighbour_lines(run: "Run", token: str, near: list[tuple[str, float]], plain: bool) -> list[str]:
    if run.model.config.n_emb > 1:
        about = f"nearest to the embedding of {shown(token)}, by the cosine of the angle between them:"
        return [about, *(f"     {shown(t):<8}{c:>7.3f} {bar(c, 50, plain)}".rstrip() for t, c in near)]
    table = embedding(run)
    at = {t: float(table[run.tokenizer.encode(t)[0], 0]) for t in (token, *(t for t, _ in near))}
    about = f"nearest to {shown(token)}, whose embedding is one number, {at[token]:.3f}"
    return [
        f"{about} (first those on the same side of 0):",
        *(f"     {shown(t):<8}{at[t]:>7.3f}" for t, _ in near),
    ]


def _head(text: str, flag: str, size: tuple[int, int]) -> tuple[int, int]:
    """The layer and head that "1.2" names. Raises BabyError if there is none such."""
    layer, _, head = text.partition(".")
    if not (_is_number(layer) and _is_number(head)):
        alternative = ", or all" if flag == "--attention" else ""
        raise BabyError(f"{flag} wants LAYER.HEAD, such as 0.1{alternative}, not {text!r}")
    for name, value, number in (("layer", int(layer), size[0]), ("head", int(head), size[1])):
        if value >= number:
            raise BabyError(f"{flag} {text}: there is no {name} {value}, the run has {name}s 0 to {number - 1}")
    return int(layer), int(head)


def _is_number(text: str) -> bool:
    """Whether it is a whole number of a few digits: Python reads none of more than some thousand."""
    return text.isdecimal() and len(text) < 10


def _layer(text: str | None, number: int) -> int | str | None:
    if text in (None, "all"):
        return text
    if not number:
        raise BabyError("the equation model has no blocks: leave out --layer, and all is shown")
    if not (_is_number(text) and int(text) < number):
        raise BabyError(f"there is no layer {text!r}: give 0 to {number - 1}, or all")
    return int(text)
