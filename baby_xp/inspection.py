"""A look into a model: every array between a prompt and the next token, and every gradient on the way back.

    seen = run.inspect("Here comes", backward=True)
    seen.arrays["blocks.0.attention.heads.weights"]     # (1, H, T, T)
    seen.gradients["blocks.0.network.gelu.dx"]          # (T, F)
    seen.next_tokens()                                  # [(" ", 0.93), ("s", 0.02), ...]

    def off(weights):
        weights[:, 1] = 0                               # head 1 no longer looks anywhere
        return weights

    run.inspect("Here comes", change={"blocks.0.attention.heads.weights": off}).loss

The maths that runs is that of layers/ and models/, with the plain functions of every backend (no fast kernels), so
that all arrays exist; instrument.py tells how they come to be seen, and how their names are made.
"""

import itertools
import math
import textwrap
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from baby_xp.config import EquationConfig
from baby_xp.errors import BabyError
from baby_xp.instrument import Copies, Recorder
from baby_xp.layers import cross_entropy
from baby_xp.text.tokenizer import Tokenizer
from baby_xp.tree import from_leaves, leaves

if TYPE_CHECKING:
    from baby_xp.run import Run

Change = Mapping[str, Callable[[Any], Any]]
WIDTH = 100
SHADES = {False: "·░▒▓█", True: ".-+*#"}
"""Five levels of a weight, for a terminal with block characters and for one without."""
LEVELS = (0.03, 0.15, 0.35, 0.65)
"""The weights at which the next shade begins."""


@dataclass(frozen=True, repr=False)
class Inspection:
    """All that was seen while a model read a prompt of T tokens. Arrays are on the host, copies of their own.

    An equation model reads a window of n_ctx tokens and answers with the next one, from "=" on: where a GPT has T
    rows of logits, it has one for each window, for "4+4=8" those that end with "=" and with "8". (A prompt without
    "=" has one answer, at its end.) What a window lacks is filled up with id 0 on the left, as in generation.
    """

    tokens: list[str]
    """The prompt's tokens. A byte that is no ASCII character is shown as \\xe9."""
    ids: np.ndarray
    """Their ids (T,)."""
    arrays: dict[str, np.ndarray]
    """Every array of the forward pass by name, in the order of computation."""
    gradients: dict[str, np.ndarray]
    """Every array of the backward pass by name, then the gradient of every parameter; empty without backward."""
    logits: np.ndarray
    """(T, V), after each token."""
    probabilities: np.ndarray
    """(T, V) float64, the softmax of the logits: what the model expects after each token."""
    loss: float | None
    """Mean loss in nats a token of the prompt's own next tokens; None if it has none."""
    names: list[list[str]]
    """All names of each array, in the order of computation; the first is that of the layer that made it."""
    vocabulary: list[str]
    """All tokens that the model knows, in the order of the ids."""
    parameters: tuple[str, ...]
    """The paths of the parameters."""
    notes: tuple[str, ...] = ()
    """What the reader should know."""

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        return f"<Inspection of {''.join(self.tokens)!r}: {len(self.names)} arrays{loss}>"

    def attention(self, layer: int, head: int) -> np.ndarray:
        """How much each token (row) looks at each token (column): weights (T, T), each row adds up to 1.

        Raises BabyError if there is no such head, or the model has no attention.
        """
        layers, heads = self.attention_size
        for name, value, number in (("layer", layer, layers), ("head", head, heads)):
            if not 0 <= value < number:
                raise BabyError(f"there is no {name} {value}: the run has {name}s 0 to {number - 1}")
        return self.arrays[f"blocks.{layer}.{WEIGHTS}"][0, head]

    @property
    def attention_size(self) -> tuple[int, int]:
        """Number of layers, and of heads in each. Raises BabyError for a model without attention."""
        found = [name for name in self.arrays if name.endswith(f".{WEIGHTS}")]
        if not found:
            raise BabyError("the equation model has no attention; look at its arrays and neighbours")
        return len(found), self.arrays[found[0]].shape[1]

    def next_tokens(self, position: int = -1, k: int = 5) -> list[tuple[str, float]]:
        """The k tokens that the model thinks likeliest after the token at `position`, with their probabilities.

        position: from 0, or from -1 at the end. Raises BabyError if the model gives no answer there.
        """
        row = self.probabilities[self._row(position)]
        order = np.argsort(-row, kind="stable")[: max(k, 0)]
        return [(self.vocabulary[i], float(row[i])) for i in order]

    def own_next(self, position: int) -> tuple[str, float, int] | None:
        """The token that follows in the prompt: itself, its probability, its rank from 1; None at the end."""
        position = position + len(self.tokens) if position < 0 else position
        row = self.probabilities[self._row(position)]
        if position + 1 == len(self.tokens):
            return None
        token = int(self.ids[position + 1])
        return self.tokens[position + 1], float(row[token]), 1 + int(np.sum(row > row[token]))

    @property
    def positions(self) -> range:
        """The positions after which the model gives an answer: all, or for an equation model those from "=" on."""
        return range(len(self.tokens) - len(self.logits), len(self.tokens))

    def _row(self, position: int) -> int:
        at = position + len(self.tokens) if position < 0 else position
        if at not in self.positions:
            ends = f"{self.positions[0]} to {self.positions[-1]}"
            raise BabyError(f"no answer at position {position}: there are answers at {ends}")
        return at - self.positions[0]

    # in words ---------------------------------------------------------------------------------------------

    def table(self, layer: int | None = None, stream: bool = False) -> list[str]:
        """A line of text for each array: name, shape, mean, standard deviation, least and largest number.

        layer: only that block's. stream: only what the model and its blocks hand from layer to layer. "also"
        gives an array's other names, less what they have in common with the first one, and how many entries are
        not finite, and not in the figures (the masked scores are -inf).
        Raises BabyError if there is no such layer.
        """
        return self._table(self.arrays, layer, stream)

    def gradient_table(self, layer: int | None = None, stream: bool = False) -> list[str]:
        """The same of the gradients, the parameters' last. Raises BabyError if there are none."""
        if not self.gradients:
            raise BabyError("there are no gradients: inspect with backward=True, or --backward")
        return self._table(self.gradients, layer, stream)

    def _table(self, arrays: dict[str, np.ndarray], layer: int | None, stream: bool) -> list[str]:
        groups = [names for names in self.names if names[0] in arrays]
        if stream and any(name.startswith("blocks.") for name in arrays):
            groups = [shallow for names in groups if (shallow := _shallow(names))]
        groups += [[path] for path in self.parameters if path in arrays]
        if layer is not None:
            groups = [names for names in groups if names[0].startswith(f"blocks.{layer}.")]
            if not groups:
                raise BabyError(f"there is no layer {layer}; leave --layer out to see which blocks there are")
        rows, blocks = [], []
        for names in groups:
            also = [_less_common(names[0], name) for name in names[1:]]
            odd = int(np.sum(~np.isfinite(arrays[names[0]])))
            also += [f"({odd} not finite)"] if odd else []
            rows.append([names[0], *described(arrays[names[0]]), ", ".join(also)])
            block = names[0].split(".")[1] if names[0].startswith("blocks.") else None
            blocks.append((names[0] in self.parameters, block))
        return _laid_out(["name", "shape", "mean", "std", "min", "max", "also"], rows, blocks)

    def next_lines(self, k: int = 5, plain: bool = False) -> list[str]:
        """What the model expects at each position, with bars. plain: ASCII alone."""
        lines, at_end = [], self.positions[-1]
        if len(self.positions) > 1:
            lines.append("what comes next, as the prompt has it, and what the model thinks likeliest:")
            for position in self.positions[:-1]:
                token, share, rank = self.own_next(position)
                likeliest = "  ".join(f"{shown(t)} {p:.1%}" for t, p in self.next_tokens(position, min(k, 3)))
                place = f"{position:>4} {shown(self.tokens[position]):<5} then {shown(token):<5}{share:>7.1%}"
                lines.append(f"{place} {bar(share, 20, plain):<20} {ordinal(rank):>5}   {likeliest}".rstrip())
            lines.append("")
        lines.append(f"after {at_end} {shown(self.tokens[-1])}, the end of the prompt:")
        for token, share in self.next_tokens(-1, k):
            lines.append(f"     {shown(token):<8}{share:>7.1%} {bar(share, 50, plain)}".rstrip())
        return lines

    def attention_lines(self, layer: int, head: int, plain: bool = False) -> list[str]:
        """One head's attention, drawn with characters: a row a token, which looks at the tokens of the columns."""
        weights, shades = self.attention(layer, head), SHADES[plain]
        wide = 2 if len(self.tokens) <= 40 else 1
        header = "".join(f"{glyph(token, plain):<{wide}}" for token in self.tokens)
        scale = ", ".join(f"{shade} from {level:.0%}" for shade, level in zip(shades[1:], LEVELS, strict=True))
        lines = [
            f"attention of layer {layer}, head {head}: each token (row) looks back at those of the columns",
            f"({shades[0]} below {LEVELS[0]:.0%}, {scale}; at the right, where most of it goes)",
            f"{'':>11}{header}".rstrip(),
        ]
        for at, (token, row) in enumerate(zip(self.tokens, weights, strict=True)):
            cells = "".join(shades[sum(w >= level for level in LEVELS)] * wide for w in row[: at + 1])
            most = int(np.argmax(row))
            where = f"{row[most]:>5.0%} at {most} {shown(self.tokens[most])}"
            lines.append(f"{at:>4} {shown(token):<5} {cells:<{wide * len(self.tokens)}} {where}")
        return lines

    def heads(self) -> np.ndarray:
        """For each layer and head, how far back it looks in tokens and its largest weight, means over the tokens.

        (L, H, 2). The first token, which can look nowhere but at itself, does not count. Raises BabyError for a
        model without attention, or a prompt of one token.
        """
        layers, heads = self.attention_size
        if len(self.tokens) < 2:
            raise BabyError("a prompt of one token can look nowhere but at itself: give at least 2")
        weights = np.stack([[self.attention(i, h) for h in range(heads)] for i in range(layers)])
        weights = weights[:, :, 1:].astype(np.float64)  # (L, H, T - 1, T)
        at = np.arange(len(self.tokens))
        back = np.mean(np.sum(weights * (at[1:, None] - at), axis=-1), axis=-1)
        return np.stack([back, np.mean(np.max(weights, axis=-1), axis=-1)], axis=-1)

    def sharpest_head(self) -> tuple[int, int]:
        """Layer and head of the head whose largest weight is largest, on average over the tokens."""
        sharpness = self.heads()[..., 1]
        layer, head = np.unravel_index(int(np.argmax(sharpness)), sharpness.shape)
        return int(layer), int(head)

    def heads_lines(self) -> list[str]:
        """How far back each head looks, and how sharply, as a table."""
        found = self.heads()
        lines = ["how far back each head looks, in tokens, and its largest weight (means over the prompt):"]
        lines.append(f"{'':>9}" + "".join(f"{f'head {head}':>14}" for head in range(found.shape[1])))
        for layer, row in enumerate(found):
            lines.append(f"layer {layer:<3}" + "".join(f"{back:>8.1f} {most:>5.0%}" for back, most in row))
        return lines


WEIGHTS = "attention.heads.weights"


def inspect(run: "Run", prompt: str = "", backward: bool = False, change: Change | None = None) -> Inspection:
    """Let a run read a prompt and keep every array on the way; as Run.inspect, which tells more."""
    ids, windows, notes = _read(run, prompt)
    answers = len(windows) if _is_equation(run) else len(ids)
    targets = ids[len(ids) - answers + 1 :]
    if backward and not len(targets):
        least = "an answer, as in 4+4=8" if _is_equation(run) else "at least 2 tokens"
        raise BabyError(f"the prompt has no next token to learn from: gradients need {least}")
    changes = dict(change or {})
    xp = run.backend.xp
    p = run.model.layout.unpack(xp, run.backend.asarray(run.params))
    recorder = Recorder(xp, run.backend.to_numpy, p, changes)
    with np.errstate(all="ignore"):  # numbers that are not finite are told of below
        if changed := {path for path, _ in leaves(p) if path in changes}:
            p = from_leaves((path, recorder.changed(path, one)) for path, one in leaves(p))
            recorder = Recorder(xp, run.backend.to_numpy, p, changes)
        logits, loss, dp = _computed(run, recorder, p, windows, targets, backward)
        recorder.check_changes(changed)
        logits = run.backend.to_numpy(logits).copy()
    gradients = {**recorder.gradients, **{path: recorder.host(one) for path, one in leaves(dp)}}
    vocabulary = [token_text(run.tokenizer, i) for i in range(run.tokenizer.vocab_size)]
    return Inspection(
        tokens=[vocabulary[i] for i in ids],
        ids=ids,
        arrays=recorder.arrays,
        gradients=gradients,
        logits=logits,
        probabilities=_softmax(logits),
        loss=loss,
        names=recorder.names,
        vocabulary=vocabulary,
        parameters=run.model.layout.paths,
        notes=(*notes, *_broken({**recorder.arrays, **gradients})),
    )


def neighbours(run: "Run", token: str, k: int = 5) -> list[tuple[str, float]]:
    """The k tokens whose embeddings point in the most similar direction; as Run.neighbours, which tells more."""
    ids = run.tokenizer.encode(token, "the token whose neighbours to find")
    if len(ids) != 1:
        raise BabyError(f"{token!r} is {len(ids)} tokens; name one to find its neighbours")
    table = _embedding(run)
    lengths = np.linalg.norm(table, axis=1)
    cosines = table @ table[ids[0]] / np.maximum(lengths * lengths[ids[0]], np.finfo(np.float64).tiny)
    distances = np.linalg.norm(table - table[ids[0]], axis=1)
    # rows of one number point to one of two sides; among them, the nearer ones come first
    order = np.lexsort((distances, -cosines.round(12)))
    found = [int(i) for i in order if i != ids[0]][: max(k, 0)]
    return [(token_text(run.tokenizer, i), float(cosines[i])) for i in found]


def _embedding(run: "Run") -> np.ndarray:
    """The rows of the token embedding, (V, C)."""
    tree = run.model.layout.unpack(np, run.params)
    return tree["embedding" if _is_equation(run) else "wte"]["weight"].astype(np.float64)


def _read(run: "Run", prompt: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The prompt's ids (T,), the model's windows of them (B, n_ctx or T), and notes."""
    ids = run.tokenizer.encode(prompt, "prompt") if prompt else run.first_ids()
    n_ctx, notes = run.model.config.n_ctx, []
    if not prompt:
        token = shown(token_text(run.tokenizer, ids[0]))
        notes.append(f"there is no prompt: the model sees {token}, with which generation begins")
    if _is_equation(run):
        first = prompt.find("=") if "=" in prompt else len(ids) - 1
        filled = np.concatenate([np.zeros(n_ctx - 1, ids.dtype), ids])
        return ids, np.stack([filled[end : end + n_ctx] for end in range(first, len(ids))]), notes
    if len(ids) > n_ctx:
        notes.append(f"the prompt has {len(ids)} tokens; the model sees the last {n_ctx}, its n_ctx")
        ids = ids[-n_ctx:]
    return ids, ids[None, :], notes


def _computed(run: "Run", recorder: Recorder, p: Any, windows: np.ndarray, targets: np.ndarray, backward: bool):
    """Logits, loss and gradients, in copies of the maths that the recorder sees."""
    xp, model, copies = recorder.xp, run.model, Copies(recorder)
    maths, entropy = copies.of(model.module), copies.of(cross_entropy)
    logits, saved = maths.forward(xp, p, run.backend.asarray(windows), model.config)
    if not len(targets):
        return logits, None, {}
    # what follows the last token is not known: it has no loss, and no gradient comes from it
    losses, loss_saved = entropy.forward(xp, {}, logits[: len(targets), :], run.backend.asarray(targets))
    weight = xp.full_like(losses, 1 / len(targets))
    loss = float(run.backend.to_numpy(xp.reshape(xp.sum(losses * weight), (1,)))[0])
    if not backward:
        return logits, loss, {}
    recorder.turn()
    _, dlogits = entropy.backward(xp, {}, loss_saved, weight)
    dlogits = recorder.see("dlogits", xp.concat([dlogits, xp.zeros_like(logits[len(targets) :, :])]))
    return logits, loss, maths.backward(xp, p, saved, dlogits, model.config)


def _is_equation(run: "Run") -> bool:
    return isinstance(run.model.config, EquationConfig)


def _softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        e = np.exp(logits.astype(np.float64) - np.max(logits, axis=-1, keepdims=True))
        return e / np.sum(e, axis=-1, keepdims=True)


def _broken(arrays: dict[str, np.ndarray]) -> list[str]:
    """A note on the first array with a NaN, if there is one. (Minus infinity is what masked scores are.)"""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            return [f"not all numbers are numbers: the first NaN is in {name}"]
    return []


def off(run: "Run", heads: Sequence[tuple[int, int]]) -> dict[str, Callable[[Any], Any]]:
    """A change for `inspect` that switches heads off, (layer, head) each: they look nowhere and add nothing."""
    on = np.ones((run.model.config.n_layers, 1, run.model.config.n_heads, 1, 1)) if heads else np.ones(0)
    for layer, head in heads:
        on[layer, :, head] = 0
    masks = {layer: run.backend.asarray(on[layer]) for layer, _ in heads}
    return {f"blocks.{layer}.{WEIGHTS}": lambda w, mask=mask: w * mask for layer, mask in masks.items()}


# the command ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wish:
    """What `inspect` on the command line is asked to show."""

    prompt: str = ""
    backward: bool = False
    layer: str | None = None
    attention: str | None = None
    picture: str | None = None
    neighbours: str | None = None
    off: tuple[str, ...] = ()
    top: int = 5


def report(run: "Run", wish: Wish, plain: bool = False) -> list[str]:
    """What the command prints; a picture is written, if one is wished for. Raises BabyError as `inspect` does."""
    gpt = not _is_equation(run)
    if not gpt and (wish.attention or wish.picture or wish.off):
        raise BabyError("the equation model has no attention; leave out --attention, --picture and --off")
    size = (run.model.config.n_layers, run.model.config.n_heads) if gpt else (0, 0)
    layer = _layer(wish.layer, size[0])
    switched = [_head(text, "--off", size) for part in wish.off for text in part.split(",")]
    chosen = wish.attention if wish.attention in (None, "all") else _head(wish.attention, "--attention", size)
    if wish.top < 1:
        raise BabyError(f"top must be at least 1, not {wish.top}")
    if wish.picture:
        from baby_xp import pictures

        pictures.check(wish.picture)  # before the work, not after it
    near = neighbours(run, wish.neighbours, wish.top) if wish.neighbours is not None else []
    seen = inspect(run, wish.prompt, wish.backward, off(run, switched))
    lines = [*_head_lines(run, seen), ""]
    if switched:
        lines += [*_off_lines(seen, inspect(run, wish.prompt), switched), ""]
    lines += [*_table_lines(seen, wish, layer), "", *seen.next_lines(wish.top, plain)]
    if wish.picture:
        lines += ["", f"picture: {pictures.attention(seen, wish.picture, None if chosen == 'all' else chosen)}"]
    elif gpt and len(seen.tokens) > 1:
        lines += ["", *_attention_lines(seen, chosen, plain)]
    if near:
        lines += ["", *_neighbour_lines(run, wish.neighbours, near, plain)]
    return lines


def _head_lines(run: "Run", seen: Inspection) -> list[str]:
    number = f"{len(seen.tokens)} token{'s' if len(seen.tokens) > 1 else ''}, each with its id:"
    tokens = ", ".join(f"{shown(token)} {i}" for token, i in zip(seen.tokens, seen.ids, strict=True))
    lines = [f"run {run.guid}", *(f"note: {note}" for note in seen.notes), number]
    margin = " " * 5
    lines += textwrap.wrap(tokens, WIDTH, initial_indent=margin, subsequent_indent=margin, break_long_words=False)
    if seen.loss is not None:
        even = math.log(len(seen.vocabulary))
        lines.append(f"loss of the prompt: {seen.loss:.4f} nats a token (all tokens equally likely: {even:.4f})")
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
        f"     likeliest after the end  {shown(was[0])} {was[1]:.1%} with, {shown(now[0])} {now[1]:.1%} without",
    ]


def _table_lines(seen: Inspection, wish: Wish, layer: int | str | None) -> list[str]:
    one = layer if isinstance(layer, int) else None
    stream = layer is None and any(name.startswith("blocks.") for name in seen.arrays)
    where = "" if one is None else f" through block {one}"
    about = "what goes from layer to layer" if stream else f"every array on the way{where}"
    lines = [f"{about}, by its name in the source (y:2 is the second y there):", *seen.table(one, stream)]
    if stream:
        lines.append("(--layer 0 shows all arrays of block 0, --layer all those of all)")
    if wish.backward:
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
    table = _embedding(run)
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


# words and characters -------------------------------------------------------------------------------------


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as a string: its character; a byte that is none by itself as \\xe9."""
    if tokenizer.kind == "byte" and int(token) > 127:
        return f"\\x{int(token):02x}"
    return tokenizer.decode([int(token)])


def shown(token: str) -> str:
    """A token between quotes, on one line."""
    return f"'{token}'" if token.startswith("\\x") else repr(token)


def glyph(token: str, plain: bool = False) -> str:
    """A token as a single character, for the edge of a map."""
    marks = {" ": "_", "\n": "/", "\t": ">"} if plain else {" ": "␣", "\n": "↵", "\t": "⇥"}
    if token in marks:
        return marks[token]
    single = len(token) == 1 and token.isprintable() and unicodedata.east_asian_width(token) not in "WF"
    return token if single and not unicodedata.combining(token) else "?"


def bar(share: float, width: int, plain: bool = False) -> str:
    """A bar of up to `width` characters, in eighths where the terminal has block characters."""
    if not share > 0:  # NaN has no length either
        return ""
    eighths = round(min(share, 1.0) * width * 8)
    if plain:
        return "#" * round(eighths / 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def described(array: np.ndarray) -> list[str]:
    """Shape, mean, standard deviation, least and largest of the finite entries, in words."""
    shape = " x ".join(map(str, array.shape))
    finite = array[np.isfinite(array)].astype(np.float64)
    if not finite.size:
        return [shape, "", "", "", ""]
    return [shape, *map(figure, (np.mean(finite), np.std(finite), np.min(finite), np.max(finite)))]


def figure(number: float) -> str:
    """A number in few characters: with four decimals, or a power of ten where they would not do."""
    return f"{number:.4f}" if number == 0 or 1e-3 <= abs(number) < 1e5 else f"{number:.1e}"


def _shallow(names: list[str]) -> list[str]:
    """An array's names with that of the model or a block first; none if no such scope names it."""
    own = [name for name in names if "." not in name or (name.startswith("blocks.") and name.count(".") == 2)]
    return [own[0], *(name for name in names if name != own[0])] if own else []


def _less_common(first: str, name: str) -> str:
    """A name without the place that it shares with the first one."""
    ours, theirs = first.split(".")[:-1], name.split(".")
    pairs = zip(ours, theirs[:-1], strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return ".".join(theirs[common - theirs[common].isdecimal() :])  # a block's number alone says nothing


def _laid_out(header: list[str], rows: list[list[str]], groups: list[Any]) -> list[str]:
    """Rows of text under a header: words to the left, figures to the right, an empty line between groups."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines, before = [], groups[0] if groups else None
    for row, group in zip([header, *rows], [before, *groups], strict=True):
        if group != before:
            lines.append("")
        before, (name, shape, *figures, also) = group, row
        numbers = "  ".join(f"{figure:>{width}}" for figure, width in zip(figures, widths[2:-1], strict=True))
        lines.append(f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {numbers}  {also}".rstrip())
    return lines
