"""The commands for a trained model: generate, evaluate, inspect, check."""

import os
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from baby_xp.cli.common import LOADING, Trained, load, parsed, positional
from baby_xp.cli.options import Subset
from baby_xp.cli.streams import printable
from baby_xp.compute import Compute
from baby_xp.errors import BabyError
from baby_xp.files import write

if TYPE_CHECKING:
    from baby_xp.config import DataConfig


@dataclass(frozen=True)
class GenerateOptions:
    """How text is generated."""

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
    """Cache keys and values of earlier tokens; --no-cache generates the same text, more slowly."""


WHERE = Trained(), Subset(Compute(), LOADING)
OF_SAMPLING = ("temperature", "top_k", "top_p")
"""Settings that have no effect with greedy decoding."""


def generate(arguments: list[str]) -> None:
    """Generate text from a prompt, print it, and save it.

    python -m baby_xp generate last --prompt "Once "
    python -m baby_xp generate 1a2b --temperature 0.7 --num-tokens 200
    """
    name, rest = positional(arguments, "last")
    asked, given = parsed(GenerateOptions(), generate, "[RUN]", rest, *WHERE)
    if asked.greedy and (ways := [name for name in OF_SAMPLING if name in given]):
        flags = " and ".join("--" + name.replace("_", "-") for name in ways)
        raise BabyError(f"--greedy always takes the most likely token: leave out {flags} or --greedy")
    run = load(name, given)
    pieces = run.stream(
        asked.prompt, asked.num_tokens, asked.cache,
        temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, greedy=asked.greedy, seed=asked.seed,
    )  # fmt: skip
    _note_on_equations(run.settings.data, asked.prompt)
    text = asked.prompt
    print(printable(text), end="", flush=True)
    for piece in pieces:
        print(printable(piece), end="", flush=True)
        text += piece
    print()
    when = datetime.now()
    while os.path.lexists(completion := run.files.completion(when)):  # two in the same second: keep both
        when += timedelta(seconds=1)
    write(completion, text + "\n", other=None)
    print(f"saved to {completion}", file=sys.stderr)


def _note_on_equations(data: "DataConfig", prompt: str) -> None:
    """Print a note if a run that learned equations gets another kind of prompt."""
    from baby_xp.config import EquationData

    if prompt and isinstance(data, EquationData) and not data.table.begins_answer(prompt):
        known = f"the run learned equations, such as {data.table.example}="
        print(f"note: {known}; the continuation of {prompt!r} is meaningless", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured."""

    data: str | None = None
    """Another text to measure on; by default the run's own."""
    num_tokens: int = 2000
    """Tokens to generate for the shares of known words and of copied sequences."""
    seed: int = 0
    """Seed of the generated text."""


def evaluate(arguments: list[str]) -> None:
    """Measure a run over the whole validation part of its text.

    python -m baby_xp evaluate
    python -m baby_xp evaluate 1a2b --data other.txt
    """
    name, rest = positional(arguments, "last")
    asked, given = parsed(EvaluateOptions(), evaluate, "[RUN]", rest, *WHERE)
    run = load(name, given)
    found = run.evaluate(asked.data, asked.num_tokens, asked.seed)
    print(f"run {run.guid}, the {given.get('weights', 'best')} weights")
    print("\n".join(found.lines()))


def inspect(arguments: list[str]) -> None:
    """Show every array between a prompt and the next token, the predictions, and what the heads attend to.

    python -m baby_xp inspect last --prompt "the cat"
    python -m baby_xp inspect 1a2b --prompt "the cat" --attention all --picture heads.png
    """
    from baby_xp.inspection.printing import InspectOptions, report

    name, rest = positional(arguments, "last")
    where = Trained(), Subset(Compute("numpy"), ("backend", "device"))
    asked, given = parsed(InspectOptions(), inspect, "[RUN]", rest, *where)
    run = load(name, {"backend": "numpy", **given})
    lines = report(run, asked, plain=not _can_show("░█▏␣↵"))
    print("\n".join([f"run {run.guid}", *lines]))


@dataclass(frozen=True)
class CheckOptions:
    """What is compared."""

    data: str | None = None
    """Another text to take the batch from; by default the run's own."""
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


def check(arguments: list[str]) -> int:
    """Compare the gradient of every parameter with finite differences, in float64, on the run's own text.

    The exit code is 0 if all agree and 1 if one does not.

    python -m baby_xp check
    python -m baby_xp check 1a2b --tokens 32 --elements 10
    """
    name, rest = positional(arguments, "last")
    asked, given = parsed(CheckOptions(), check, "[RUN]", rest, Trained())
    from baby_xp.evaluation import gradient_check

    run = load(name, {**given, "backend": "numpy"})
    rows = run.check(asked.tokens, asked.batch, asked.seed, asked.elements, asked.directions, asked.data)
    print(f"run {run.guid}, the {given.get('weights', 'best')} weights")
    print("\n".join([*gradient_check.about(run.model), "", *gradient_check.lines(rows)]))
    return 0 if all(row.agrees for row in rows) else 1


def _can_show(characters: str) -> bool:
    """Whether the terminal's encoding has these characters."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
