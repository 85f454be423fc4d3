"""What several commands have in common: where a run computes, how a command line is read, what is printed."""

import dataclasses
import shlex
import sys
from dataclasses import dataclass, replace
from typing import Any

from baby_xp.cli import options


@dataclass(frozen=True)
class Place:
    """Where a run computes and where its files lie."""

    backend: str = "auto"
    """auto, numpy, cupy, torch, jax or array-api-strict; `baby_xp backends` lists which work."""
    device: str | None = None
    """Device of the backend, such as cuda:1; none: its default."""
    path: str = "runs"
    """Folder of the runs."""


@dataclass(frozen=True)
class GpuPlace(Place):
    """Where a run computes, how a GPU does it, and where its files lie."""

    tf32: bool = False
    """TF32 matrix products: faster, less precise (cupy backend)."""
    memory_gib: float | None = None
    """Limit of GPU memory, in GiB (cupy backend); none: no limit."""


def parsed(default: Any, program: str, arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """The options of a command, a dataclass whose values are the defaults, and those of them that were given."""
    about = " ".join((type(default).__doc__ or "").split())
    given = options.parse({"options": default}, about, program, arguments)
    return replace(default, **given), given


def parse_settings(
    parts: dict[str, Any], place: Any, about: str, program: str, arguments: list[str]
) -> tuple[dict[str, Any], Any]:
    """The settings that flags give in place of those of `parts`, which are configs, and the place that they name.

    Those that are not given are not among them: it matters what was asked for, not only what results.
    """
    given = options.parse({**parts, "place": place}, about, program, arguments)
    of_place = {field.name: given.pop(field.name) for field in dataclasses.fields(place) if field.name in given}
    return given, replace(place, **of_place)


def positional(arguments: list[str], default: str) -> tuple[str, list[str]]:
    """The first argument if it is no flag, and the rest."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return default, arguments


def load(name: str, asked: Any) -> Any:
    """A run where it is asked for, to generate or to be measured."""
    from baby_xp import api

    settings = ("path", "backend", "device", "weights", "tf32", "memory_gib")
    run = api.load(name, **{setting: getattr(asked, setting) for setting in settings})
    if note := run.backend.first_use():
        print(note, file=sys.stderr, flush=True)
    return run


def short(guid: str) -> str:
    """Enough of a GUID to find its run, as a rule."""
    return guid[:8] + guid[36:]


def path_flag(path: str) -> str:
    """What names the folder of the runs in a command that a message tells."""
    return "" if path == "runs" else f" --path {shlex.quote(path)}"
