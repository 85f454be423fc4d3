"""Inspecting a model: every array from the prompt to the next token, and every gradient of the backward pass.

    seen = run.inspect("Here comes", backward=True)
    seen.arrays["blocks.0.attention.heads.weights"]     # (1, H, T, T)
    seen.gradients["blocks.0.network.gelu.dx"]          # (T, F)
    seen.next_tokens()                                  # [(" ", 0.93), ("s", 0.02), ...]

    def without_head_1(weights):
        weights[:, 1] = 0                               # head 1 attends to nothing
        return weights

    run.inspect("Here comes", patch={"blocks.0.attention.heads.weights": without_head_1}).loss

It runs the maths of layers/ and models/ with the plain functions (no fast kernels), so that all arrays exist;
trace.py explains how they are recorded and named.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from baby_xp import layout
from baby_xp.arrays.namespace import Namespace
from baby_xp.arrays.tree import from_leaves, leaves
from baby_xp.config import EquationConfig, GPTConfig
from baby_xp.errors import BabyError
from baby_xp.inspection.render import (
    bar,
    described,
    glyph,
    less_common,
    ordinal,
    shallow,
    shown,
    token_text,
)
from baby_xp.inspection.trace import Copies, Recorder
from baby_xp.layers import cross_entropy, softmax
from baby_xp.text.tokenizer import first_ids

if TYPE_CHECKING:
    from baby_xp.inference.trained_model import TrainedModel

Patch = Mapping[str, Callable[[Any], Any]]
SHADES = {False: "·░▒▓█", True: ".-+*#"}
"""Five levels of a weight, for a terminal with block characters and for one without."""
LEVELS = (0.03, 0.15, 0.35, 0.65)
"""The weights from which the next shade is used."""


@dataclass(frozen=True, repr=False)
class Inspection:
    """Everything recorded while a model read a prompt of T tokens. Arrays are copies on the host.

    An equation model reads a window of n_ctx tokens and answers with the next one, from "=" on: where a GPT has T
    rows of logits, it has one for each window, for "4+4=8" those that end with "=" and with "8". (A prompt without
    "=" has one answer, at its end.) A window is padded with id 0 on the left, as in generation.
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
    """(T, V) float64, the softmax of the logits: the prediction after each token."""
    loss: float | None
    """Mean loss in nats per token of the prompt's own next tokens; None if it has none."""
    names: list[list[str]]
    """All names of each array, in the order of computation; the first is that of the layer that made it."""
    vocabulary: list[str]
    """All tokens that the model knows, in the order of the ids."""
    parameters: tuple[str, ...]
    """The paths of the parameters."""
    notes: tuple[str, ...] = ()
    """Notes for the reader."""

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        return f"<Inspection of {''.join(self.tokens)!r}: {len(self.names)} arrays{loss}>"

    def attention(self, layer: int, head: int) -> np.ndarray:
        """How much each token (row) attends to each token (column): weights (T, T), each row adds up to 1.

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
            raise BabyError("the equation model has no attention; inspect its arrays and neighbours")
        return len(found), self.arrays[found[0]].shape[1]

    def next_tokens(self, position: int = -1, k: int = 5) -> list[tuple[str, float]]:
        """The k tokens that the model finds most likely after the token at `position`, with their probabilities.

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
            raise BabyError(f"no prediction at position {position}: there are predictions at {ends}")
        return at - self.positions[0]

    # as text ----------------------------------------------------------------------------------------------

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
            groups = [first for names in groups if (first := shallow(names))]
        groups += [[path] for path in self.parameters if path in arrays]
        if layer is not None:
            groups = [names for names in groups if names[0].startswith(f"blocks.{layer}.")]
            if not groups:
                raise BabyError(f"there is no layer {layer}; leave out --layer to see the blocks")
        rows, blocks = [], []
        for names in groups:
            also = [less_common(names[0], name) for name in names[1:]]
            odd = int(np.sum(~np.isfinite(arrays[names[0]])))
            also += [f"({odd} not finite)"] if odd else []
            rows.append([names[0], *described(arrays[names[0]]), ", ".join(also)])
            block = names[0].split(".")[1] if names[0].startswith("blocks.") else None
            blocks.append((names[0] in self.parameters, block))
        return layout.fitted(["name", "shape", "mean", "std", "min", "max", "also"], rows, "<<>>>><", blocks)

    def next_lines(self, k: int = 5, plain: bool = False) -> list[str]:
        """The model's predictions at each position, with bars. plain: ASCII only."""
        lines, at_end = [], self.positions[-1]
        if len(self.positions) > 1:
            lines.append("each actual next token, its probability and rank, and the most likely tokens:")
            for position in self.positions:
                if (following := self.own_next(position)) is None:
                    break
                token, share, rank = following
                likeliest = "  ".join(f"{shown(t)} {p:.1%}" for t, p in self.next_tokens(position, min(k, 3)))
                place = f"{position:>4} {shown(self.tokens[position]):<5} then {shown(token):<5}{share:>7.1%}"
                lines.append(f"{place} {bar(share, 20, plain):<20} {ordinal(rank):>5}   {likeliest}".rstrip())
            lines.append("")
        lines.append(f"after {at_end} {shown(self.tokens[-1])}, the end of the prompt:")
        for token, share in self.next_tokens(-1, k):
            lines.append(f"     {shown(token):<8}{share:>7.1%} {bar(share, 50, plain)}".rstrip())
        return lines

    def attention_lines(self, layer: int, head: int, plain: bool = False) -> list[str]:
        """One head's attention, drawn with characters: each token (row) attends to those of the columns."""
        weights, shades = self.attention(layer, head), SHADES[plain]
        wide = 2 if len(self.tokens) <= 40 else 1
        header = "".join(f"{glyph(token, plain):<{wide}}" for token in self.tokens)
        scale = ", ".join(f"{shade} from {level:.0%}" for shade, level in zip(shades[1:], LEVELS, strict=True))
        lines = [
            f"attention of layer {layer}, head {head}: each token (row) attends to earlier ones (columns)",
            f"({shades[0]} below {LEVELS[0]:.0%}, {scale}; at the right, the largest weight)",
            f"{'':>11}{header}".rstrip(),
        ]
        for at, (token, row) in enumerate(zip(self.tokens, weights, strict=True)):
            cells = "".join(shades[sum(w >= level for level in LEVELS)] * wide for w in row[: at + 1])
            most = int(np.argmax(row))
            where = f"{row[most]:>5.0%} at {most} {shown(self.tokens[most])}"
            lines.append(f"{at:>4} {shown(token):<5} {cells:<{wide * len(self.tokens)}} {where}")
        return lines

    def heads(self) -> np.ndarray:
        """Per layer and head, how far back it attends in tokens and its largest weight, means over the tokens.

        (L, H, 2). The first token, which can attend only to itself, does not count. Raises BabyError for a
        model without attention, or a prompt of one token.
        """
        layers, heads = self.attention_size
        if len(self.tokens) < 2:
            raise BabyError("a single token can only attend to itself: give a prompt of at least 2 tokens")
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
        """How far back each head attends, and how sharply, as a table."""
        found = self.heads()
        lines = ["how far back each head attends, in tokens, and its largest weight (means over the prompt):"]
        lines.append(f"{'':>9}" + "".join(f"{f'head {head}':>14}" for head in range(found.shape[1])))
        for layer, row in enumerate(found):
            lines.append(f"layer {layer:<3}" + "".join(f"{back:>8.1f} {most:>5.0%}" for back, most in row))
        return lines


WEIGHTS = "attention.heads.weights"


def inspect(
    trained: "TrainedModel", prompt: str = "", backward: bool = False, patch: Patch | None = None
) -> Inspection:
    """Run a model on a prompt and record every array; Run.inspect has the details."""
    ids, windows, notes = _read(trained, prompt)
    answers = len(windows) if is_equation(trained) else len(ids)
    targets = ids[len(ids) - answers + 1 :]
    if backward and not len(targets):
        least = "an answer, as in 4+4=8" if is_equation(trained) else "at least 2 tokens"
        raise BabyError(f"the prompt has no next token, so there is no loss: gradients need {least}")
    backend, model, patches = trained.backend, trained.model, dict(patch or {})
    xp = backend.xp
    p = model.layout.unpack(xp, backend.asarray(trained.params))
    recorder = Recorder(xp, backend.to_numpy, p, patches)
    with np.errstate(all="ignore"):  # a note reports NaN
        if patched := {path for path, _ in leaves(p) if path in patches}:
            p = from_leaves((path, recorder.patched(path, one)) for path, one in leaves(p))
            recorder = Recorder(xp, backend.to_numpy, p, patches)
        logits, loss, dp = _computed(trained, recorder, p, windows, targets, backward)
        recorder.check_patches(patched)
        logits = recorder.host(logits)
    gradients = {**recorder.gradients, **{path: recorder.host(one) for path, one in leaves(dp)}}
    vocabulary = [token_text(trained.tokenizer, i) for i in range(trained.tokenizer.vocab_size)]
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
        parameters=model.layout.paths,
        notes=(*notes, *_broken({**recorder.arrays, **gradients})),
    )


def neighbours(trained: "TrainedModel", token: str, k: int = 5) -> list[tuple[str, float]]:
    """The k tokens whose embeddings point in the most similar direction; Run.neighbours has the details."""
    ids = trained.tokenizer.encode(token, "the token whose neighbours to find")
    if len(ids) != 1:
        raise BabyError(f"{token!r} is {len(ids)} tokens; give a single one to find its neighbours")
    table = embedding(trained)
    lengths = np.linalg.norm(table, axis=1)
    cosines = table @ table[ids[0]] / np.maximum(lengths * lengths[ids[0]], np.finfo(np.float64).tiny)
    distances = np.linalg.norm(table - table[ids[0]], axis=1)
    # embeddings of one number have a cosine of 1 or -1, so the nearer ones come first
    order = np.lexsort((distances, -cosines.round(12)))
    found = [int(i) for i in order if i != ids[0]][: max(k, 0)]
    return [(token_text(trained.tokenizer, i), float(cosines[i])) for i in found]


def embedding(trained: "TrainedModel") -> np.ndarray:
    """The rows of the token embedding, (V, C)."""
    tree = trained.model.layout.unpack(np, trained.params)
    return tree["embedding" if is_equation(trained) else "wte"]["weight"].astype(np.float64)


def _read(trained: "TrainedModel", prompt: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The prompt's ids (T,), the model's windows of them (B, n_ctx or T), and notes."""
    tokenizer = trained.tokenizer
    ids = tokenizer.encode(prompt, "prompt") if prompt else first_ids(tokenizer)
    n_ctx, notes = trained.model.config.n_ctx, []
    if not prompt:
        token = shown(token_text(tokenizer, ids[0]))
        notes.append(f"the prompt is empty: the model sees {token}, the token that generation starts from")
    if is_equation(trained):
        first = prompt.find("=") if "=" in prompt else len(ids) - 1
        filled = np.concatenate([np.zeros(n_ctx - 1, ids.dtype), ids])
        return ids, np.stack([filled[end : end + n_ctx] for end in range(first, len(ids))]), notes
    if len(ids) > n_ctx:
        notes.append(f"the prompt has {len(ids)} tokens; the model sees only the last {n_ctx} (n_ctx)")
        ids = ids[-n_ctx:]
    return ids, ids[None, :], notes


def _computed(
    trained: "TrainedModel", recorder: Recorder, p: Any, windows: np.ndarray, targets: np.ndarray, backward: bool
) -> tuple[Any, float | None, dict[str, Any]]:
    """Logits, loss and gradients, in copies of the maths that the recorder sees."""
    xp, model, backend, copies = recorder.xp, trained.model, trained.backend, Copies(recorder)
    maths, entropy = copies.of(model.module), copies.of(cross_entropy)
    logits, saved = maths.forward(xp, p, backend.asarray(windows), model.config)
    if not len(targets):
        return logits, None, {}
    # the last token has no target: no loss, and no gradient
    losses, loss_saved = entropy.forward(xp, {}, logits[: len(targets), :], backend.asarray(targets))
    weight = xp.full_like(losses, 1 / len(targets))
    loss = float(backend.to_numpy(xp.reshape(xp.sum(losses * weight), (1,)))[0])
    if not backward:
        return logits, loss, {}
    recorder.begin_backward()
    _, dlogits = entropy.backward(xp, {}, loss_saved, weight)
    dlogits = recorder.see("dlogits", xp.concat([dlogits, xp.zeros_like(logits[len(targets) :, :])]))
    return logits, loss, maths.backward(xp, p, saved, dlogits, model.config)


def is_equation(trained: "TrainedModel") -> bool:
    return isinstance(trained.model.config, EquationConfig)


def _softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return softmax.forward(Namespace(np), {}, logits.astype(np.float64))[0]


def _broken(arrays: dict[str, np.ndarray]) -> list[str]:
    """A note on the first array with a NaN, if there is one. (Masked scores are minus infinity.)"""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            return [f"NaN first appears in {name}"]
    return []


def ablate(trained: "TrainedModel", heads: Sequence[tuple[int, int]]) -> Patch:
    """A patch for `inspect` that ablates heads, given as (layer, head): they attend to nothing and add nothing."""
    config, on = trained.model.config, dict[int, np.ndarray]()
    if not isinstance(config, GPTConfig):  # it has no heads
        return {}
    for layer, head in heads:
        on.setdefault(layer, np.ones((1, config.n_heads, 1, 1)))[:, head] = 0

    def masked(mask: Any) -> Callable[[Any], Any]:
        return lambda weights: weights * mask

    return {f"blocks.{layer}.{WEIGHTS}": masked(trained.backend.asarray(mask)) for layer, mask in on.items()}
