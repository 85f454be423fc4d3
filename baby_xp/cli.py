"""The command line: parse, call, print. What a command does is in api.py and the modules it calls.

Input that cannot be used ends in one line on stderr and exit code 2.
"""

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

from baby_xp import __version__
from baby_xp.errors import BabyError

if TYPE_CHECKING:
    from baby_xp.config import Preset

USAGE = f"""baby_xp {__version__}: train baby language models from scratch

usage: python -m baby_xp COMMAND [options]

  train [PRESET]      train a model; without a preset, the baby
  generate [RUN]      let a trained model go on from a prompt (also called inference)
  presets             what can be trained, and how big it is
  backends            which array libraries work here, and what the others lack

RUN is a GUID, the beginning of one, or last. COMMAND --help tells its options.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command -> exit code."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows another, and goes on
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
    except BabyError as error:
        print(f"baby_xp: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except MemoryError as error:
        reason = " ".join(str(error).split()) or "an array did not fit"
        print(f"baby_xp: not enough memory ({reason}); choose a smaller model or batch", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("baby_xp: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `baby_xp ... | head`: nobody reads on
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"baby_xp {__version__}")
        return 0
    if command not in COMMANDS:
        raise BabyError(f"unknown command {command!r}: choose one of {', '.join(COMMANDS)}")
    COMMANDS[command](rest)
    return 0


# train --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a run computes and where its files lie."""

    backend: str = "auto"
    """auto, numpy, cupy, torch, jax or array-api-strict; `baby_xp backends` lists what works."""
    device: str | None = None
    """Device of the backend, such as cuda:1; none: its default."""
    path: str = "runs"
    """Folder of the runs."""


@dataclass(frozen=True)
class TrainPlace(Place):
    """Where a run computes and where its files lie."""

    workers: int | None = None
    """Processes that share each step (numpy backend); none: as many as suit."""


def train(arguments: list[str]) -> None:
    """Train a preset, with flags for every field of its configs."""
    from baby_xp.presets import preset

    name, rest = _positional(arguments, "baby")
    chosen = preset(name)
    settings, place = _parse_preset(chosen, rest)
    from baby_xp import api

    run = api.train(
        settings,
        path=place.path, backend=place.backend, device=place.device, workers=place.workers,
        listener=_Screen(place.backend),
    )  # fmt: skip
    print(f"\n{_sample(run)}\n")
    result = run.config["result"]
    if result["state"] == "stopped":
        print(f"interrupted: the run was stopped after step {result['steps']} and kept as it was then")
    print(f"validation loss {result['val_loss']:.4f} nats a token, over the whole validation part")
    print(f"run {run.guid}")
    print(f"report {run.files.report}")
    print(f"more: python -m baby_xp generate{_path_flag(place.path)} {run.guid[:8]}")


def _parse_preset(chosen: "Preset", arguments: list[str]) -> tuple["Preset", TrainPlace]:
    """The preset with its fields replaced by flags, and the place."""
    import tyro

    default = {"model": chosen.model, "train": chosen.train, "data": chosen.data, "place": TrainPlace()}
    # one flat set of flags; which there are depends on the kind of model
    fields = [(name, Annotated[type(value), tyro.conf.OmitArgPrefixes]) for name, value in default.items()]
    settings = make_dataclass("Settings", fields, frozen=True)
    settings.__doc__ = f"{chosen.name}: {chosen.about}."
    asked = _tyro(settings, f"baby_xp train {chosen.name}", arguments, settings(**default))
    return replace(chosen, model=asked.model, train=asked.train, data=asked.data), asked.place


class _Screen:
    """Shows how training goes: a bar on a terminal, a line an evaluation elsewhere."""

    def __init__(self, asked_backend: str):
        self.asked = asked_backend
        self.bar = None

    def started(self, model, backend, workers, task, files) -> None:
        from tqdm import tqdm

        why = ""
        if self.asked == "auto":
            why = " (auto: a GPU works)" if backend.name == "cupy" else " (auto: no GPU to use)"
        processes = f", {workers} processes" if workers > 1 else ""
        print(f"{model.n_parameters:,} parameters on {backend.version}, {backend.device}{processes}{why}")
        facts = {
            "training tokens": "training",
            "validation tokens": "validation",
            "training contexts": "contexts",
        }
        shown = [f"{task.facts[name]:,} {short}" for name, short in facts.items() if name in task.facts]
        print(f"{task.name}: {task.tokenizer.vocab_size} different tokens, {' and '.join(shown)}", flush=True)
        self.entropy = task.facts.get("entropy, nats per character")
        self.bar = tqdm(
            total=task.num_steps, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self.bar.update(step - self.bar.n)

    def evaluated(self, record: dict[str, Any]) -> None:
        line = f"step {record['step']:>6}: "
        if record["train_loss"] is not None:
            line += f"train {record['train_loss']:.4f}, "
        line += f"validation {record['val_loss']:.4f}, {record['seconds']:.0f} s"
        if record["whole_validation"]:
            self.bar.close()
            if self.entropy is not None:
                line += f" (no model can go below {self.entropy:.4f})"
        self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()


def _sample(run: Any) -> str:
    return run.files.completion().read_text(encoding="utf-8").rstrip("\n")


# generate -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generation(Place):
    """Let a trained model go on from a prompt."""

    prompt: str = ""
    """Text to go on from."""
    num_tokens: int = 500
    """Tokens to generate."""
    temperature: float = 1.0
    """Below 1: bolder; above 1: wilder."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together hold this share; 1: from all."""
    greedy: bool = False
    """Take the likeliest token always."""
    seed: int = 0
    """Seed of the draws."""
    cache: bool = True
    """Keep keys and values of earlier tokens; the text is the same without, only slower."""


def generate(arguments: list[str]) -> None:
    """Generate from a run and keep the completion."""
    name, rest = _positional(arguments, "last")
    asked = _tyro(Generation, "baby_xp generate [RUN]", rest, Generation())
    from baby_xp import api
    from baby_xp.runs import store

    run = api.load(name, path=asked.path, backend=asked.backend, device=asked.device)
    pieces = run.stream(
        asked.prompt, asked.num_tokens, asked.cache,
        temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, greedy=asked.greedy, seed=asked.seed,
    )  # fmt: skip
    text = asked.prompt
    print(text, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    when = datetime.now()
    while (completion := run.files.completion(when)).exists():  # two in one second: the first one stays
        when += timedelta(seconds=1)
    store.write(completion, text + "\n")
    print(f"kept in {completion}", file=sys.stderr)


# lists --------------------------------------------------------------------------------------------------


def presets(arguments: list[str]) -> None:
    """List the presets."""
    _nothing("presets", arguments)
    from baby_xp.presets import PRESETS

    for preset in PRESETS.values():
        print(f"{preset.name:<13} {preset.about}; data: {preset.data.data}")


def backends(arguments: list[str]) -> None:
    """List the backends: what works, and for the others the reason and the remedy."""
    _nothing("backends", arguments)
    from baby_xp import backend

    for state in backend.states():
        if state.works:
            print(f"{state.name:<17} works    {state.version}, {state.device}")
        else:
            print(f"{state.name:<17} missing  {state.reason}; remedy: {state.remedy}")
    chosen, why = backend.choose()
    print(f"auto takes {chosen.name}: {why}")


# helpers ------------------------------------------------------------------------------------------------


def _positional(arguments: list[str], default: str) -> tuple[str, list[str]]:
    """The first argument if it is no flag, and the rest."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return default, arguments


def _nothing(command: str, arguments: list[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print(COMMANDS[command].__doc__)
        raise SystemExit(0)
    if arguments:
        raise BabyError(f"{command} takes no arguments, not {' '.join(arguments)!r}")


def _tyro(kind: type, program: str, arguments: list[str], default: Any) -> Any:
    """Parse flags. tyro reports what is wrong in a box of several lines and exits; this makes it one line."""
    import tyro

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(kind, prog=program, args=arguments, default=default)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise BabyError(f"{_first_message(stderr.getvalue())}; see {program.split(' [')[0]} --help") from None


def _first_message(box: str) -> str:
    """The first message in tyro's box: what stands before its first rule, on one line."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    message = []
    for line in lines[1:]:
        if line.startswith("──"):
            break
        message.append(line)
    text = " ".join(" ".join(message).split()) or " ".join(box.split())
    # our own checks name the field; tyro puts the part of the config before it
    return re.sub(r"^Error parsing (model|train|data|place): ", "", text)


def _path_flag(path: str) -> str:
    return "" if path == "runs" else f" --path {shlex.quote(path)}"


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "generate": generate,
    "inference": generate,
    "presets": presets,
    "backends": backends,
}
