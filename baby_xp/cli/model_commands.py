"""The commands for a trained model: generate, evaluate, inspect, check."""

import dataclasses
import os
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from baby_xp.cli.common import GpuPlace, Place, load, parsed, positional
from baby_xp.cli.streams import printable
from baby_xp.errors import BabyError
from baby_xp.files import write


@dataclass(frozen=True)
class Generation(GpuPlace):
    """Generate text from a prompt."""

    prompt: str = ""
    """Text to continue."""
    num_tokens: int = 500
    """Tokens to generate."""
    temperature: float = 1.0
    """Below 1: more predictable; above 1: more random."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities add up to this; 1: from all."""
    greedy: bool = False
    """Always take the most likely token."""
    seed: int = 0
    """Seed of the sampling."""
    cache: bool = True
    """Keep keys and values of earlier tokens; --no-cache gives the same text, more slowly."""
    weights: Literal["best", "last"] = "best"
    """The weights with the best validation loss, or those of the last checkpoint."""


WAYS_TO_DRAW = ("temperature", "top_k", "top_p")
"""Settings that have no effect where nothing is drawn."""


def generate(arguments: list[str]) -> None:
    """Generate from a run and keep the completion."""
    name, rest = positional(arguments, "last")
    asked, given = parsed(Generation(), "baby_xp generate [RUN]", rest)
    if asked.greedy and (ways := [name for name in WAYS_TO_DRAW if name in given]):
        flags = " and ".join("--" + name.replace("_", "-") for name in ways)
        raise BabyError(f"--greedy always takes the most likely token: leave out {flags}, or --greedy")
    run = load(name, asked)
    pieces = run.stream(
        asked.prompt, asked.num_tokens, asked.cache,
        temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, greedy=asked.greedy, seed=asked.seed,
    )  # fmt: skip
    _note_on_equations(run, asked.prompt)
    text = asked.prompt
    print(printable(text), end="", flush=True)
    for piece in pieces:
        print(printable(piece), end="", flush=True)
        text += piece
    print()
    when = datetime.now()
    while os.path.lexists(completion := run.files.completion(when)):  # two in one second: the first one stays
        when += timedelta(seconds=1)
    write(completion, text + "\n", other=None)
    print(f"kept in {completion}", file=sys.stderr)


def _note_on_equations(run: Any, prompt: str) -> None:
    """Say so if a run that learned equations is given something else to go on from."""
    from baby_xp.config import EquationData, data_from_dict

    data = data_from_dict(run.config["data"], str(run.files.config))
    if prompt and isinstance(data, EquationData) and not data.table.begins_answer(prompt):
        what = f"its equations were asked like {data.table.example}=, and {prompt!r} is none of them"
        print(f"note: {what}; what follows means nothing", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Measurement(GpuPlace):
    """Measure a run over the whole validation part of its text."""

    data: str | None = None
    """Another text to measure on; none: the run's own."""
    num_tokens: int = 2000
    """Tokens to generate for the shares of known words and of copied sequences."""
    seed: int = 0
    """Seed of the generated text."""
    weights: Literal["best", "last"] = "best"
    """The weights with the best validation loss, or those of the last checkpoint."""


def evaluate(arguments: list[str]) -> None:
    """Measure a run."""
    name, rest = positional(arguments, "last")
    asked, _ = parsed(Measurement(), "baby_xp evaluate [RUN]", rest)
    run = load(name, asked)
    found = run.evaluate(asked.data, asked.num_tokens, asked.seed)
    print(f"run {run.guid}, the {asked.weights} weights")
    print("\n".join(found.lines()))


@dataclass(frozen=True)
class Look(Place):
    """Show every array between a prompt and the next token, the predictions, and what the heads attend to."""

    backend: str = "numpy"
    """numpy, cupy, torch, jax or array-api-strict."""
    prompt: str = ""
    """Text for the model to read."""
    layer: str | None = None
    """Show all arrays of one block (0, 1, ...), or of all; none: what passes from layer to layer."""
    backward: bool = False
    """Also show the gradients of the prompt's loss."""
    attention: str | None = None
    """LAYER.HEAD, such as 0.1: show what this head attends to; all: compare the heads; none: the sharpest head."""
    picture: str | None = None
    """Draw that attention, or that of all heads, to this file (.png, .svg, ...); needs the extra `plots`."""
    neighbours: str | None = None
    """Show the tokens whose embeddings are nearest to that of this token."""
    off: tuple[str, ...] = ()
    """LAYER.HEAD [LAYER.HEAD ...]: ablate these heads and show the effect on the loss."""
    top: int = 5
    """How many predictions and neighbours to list."""
    weights: Literal["best", "last"] = "best"
    """The weights with the best validation loss, or those of the last checkpoint."""


def inspect(arguments: list[str]) -> None:
    """Look into a run."""
    name, rest = positional(arguments, "last")
    asked, _ = parsed(Look(), "baby_xp inspect [RUN]", rest)
    from baby_xp import api
    from baby_xp.inspection import printing

    run = api.load(name, path=asked.path, backend=asked.backend, device=asked.device, weights=asked.weights)
    shown = {field.name: getattr(asked, field.name) for field in dataclasses.fields(printing.InspectOptions)}
    lines = printing.report(run, printing.InspectOptions(**shown), plain=not _can_show("░█▏␣↵"))
    print("\n".join(lines))


@dataclass(frozen=True)
class GradientCheck:
    """Compare the gradient of every parameter with finite differences, in float64, on the run's own text."""

    path: str = "runs"
    """Folder of the runs."""
    data: str | None = None
    """Another text to take the batch from; none: the run's own."""
    batch: int = 2
    """Sequences in the batch."""
    tokens: int = 16
    """Tokens in each sequence, at most n_ctx."""
    directions: int = 3
    """Random directions for each parameter array."""
    elements: int = 4
    """Single elements for each array: half with the largest gradients, half random."""
    seed: int = 0
    """Seed of the batch, the dropout and the directions."""
    weights: Literal["best", "last"] = "best"
    """The weights with the best validation loss, or those of the last checkpoint."""


def check(arguments: list[str]) -> int:
    """Check the gradients of a run -> 0 if all agree with finite differences, 1 if one does not."""
    name, rest = positional(arguments, "last")
    asked, _ = parsed(GradientCheck(), "baby_xp check [RUN]", rest)
    from baby_xp import api
    from baby_xp.evaluation import gradient_check

    run = api.load(name, path=asked.path, backend="numpy", weights=asked.weights)
    rows = run.check(asked.tokens, asked.batch, asked.seed, asked.elements, asked.directions, asked.data)
    print(f"run {run.guid}, the {asked.weights} weights")
    print("\n".join([*gradient_check.about(run), "", *gradient_check.lines(rows)]))
    return 0 if all(row.agrees for row in rows) else 1


def _can_show(characters: str) -> bool:
    """Whether the terminal's encoding has these characters."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
