"""Shared by several commands: where a run computes, how a command line is parsed, what is printed."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from baby_xp.cli import options
from baby_xp.compute import Compute

if TYPE_CHECKING:
    from baby_xp.run import Run

COMPUTE = options.names_of(Compute)
LOADING = tuple(name for name in COMPUTE if name != "workers")
"""The settings of where a trained model computes; it always uses one process."""


@dataclass(frozen=True)
class Folder:
    """The folder of the runs."""

    path: str = "runs"
    """Folder of the runs."""


@dataclass(frozen=True)
class Trained(Folder):
    """The folder of the runs, and which weights of a run to load."""

    weights: Literal["best", "last"] = "best"
    """The weights with the best validation loss, or those of the last checkpoint."""


def parsed(
    default: Any, command: Callable[..., Any], rest: str, arguments: list[str], *more: Any
) -> tuple[Any, dict[str, Any]]:
    """The options of a command, a dataclass whose values are the defaults, and all that was given by name.

    command: the function, whose docstring is the help and whose name the program's, with `rest` after it. more:
    dataclasses, or a Subset of one, whose fields are options too.
    """
    parts = [("", part) for part in (default, *more)]
    program = f"baby_xp {command.__name__.strip('_')} {rest}".strip()
    given = options.parse(parts, command.__doc__ or "", program, arguments)
    own = {name: given[name] for name in options.names_of(default) if name in given}
    return replace(default, **own), given


def positional(arguments: list[str], default: str) -> tuple[str, list[str]]:
    """The first argument if it is not a flag, and the rest."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return default, arguments


def load(name: str, given: dict[str, Any]) -> "Run":
    """The run, on the backend that was asked for."""
    from baby_xp import api

    where = {option: given[option] for option in ("path", "weights", *LOADING) if option in given}
    run = api.load(name, **where)
    if note := run.backend.first_use():
        print(note, file=sys.stderr, flush=True)
    return run


def short(guid: str) -> str:
    """The beginning of a GUID, which is usually enough to find its run."""
    return guid[:8] + guid[36:]


def path_flag(given: dict[str, Any]) -> str:
    """The flag for the folder of the runs in a command that a message suggests, if it was given."""
    path = given.get("path", "runs")
    return "" if path == "runs" else f" --path {shlex.quote(path)}"
