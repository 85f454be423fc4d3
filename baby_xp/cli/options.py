"""The flags of a command: the fields of some dataclasses, whose values are the defaults.

argparse parses them; errors become a BabyError with one sentence that names the flag.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import shlex
import shutil
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from baby_xp.errors import BabyError

MOST_QUOTED = 80
"""The most characters of an argument that a message quotes."""
DASHES = "\0--"
"""Replaces -- as the value of a flag, which argparse drops up to Python 3.12. No argument contains a NUL."""
METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some fields of a dataclass, as options. defaults: whether its values are the defaults of the options."""

    part: Any
    names: tuple[str, ...]
    defaults: bool = True


def names_of(part: Any) -> tuple[str, ...]:
    """The fields of a dataclass."""
    return tuple(field.name for field in dataclasses.fields(part))


def parse(parts: Sequence[tuple[str, Any]], about: str, program: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The fields that the arguments name, with their values, and no others.

    parts: what to call the flags in the help ("": nothing), and the dataclass, or Subset of one, that they stand
    for. about, program: for the help; about begins with what the command does, and ends with two examples.
    Raises BabyError for what cannot be used, and SystemExit after --help.
    """
    fields = [field for _, part in parts for field in fields_of(part)]
    kinds = {_flag(name): kind for name, kind, _ in fields}
    try:
        found, rest = _parser(parts, about, program, arguments).parse_known_args(_joined(arguments, kinds))
    except argparse.ArgumentError as error:
        problem = _problem(error, kinds, arguments)
    else:
        if not rest:
            return vars(found)
        problem = _too_much(rest[0], kinds)
    raise BabyError(f"{problem}; see {program.split(' [')[0]} --help")


def peek(arguments: Sequence[str], *flags: str) -> list[str | None]:
    """The values of some flags that are needed before the others are parsed; None for a missing one."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag)
    try:
        found, _ = parser.parse_known_args(_joined(arguments, dict.fromkeys(flags, str)))
    except argparse.ArgumentError:
        return [None] * len(flags)  # `parse` reports what is wrong
    return list(vars(found).values())


# the parser ---------------------------------------------------------------------------------------------


def _parser(
    parts: Sequence[tuple[str, Any]], about: str, program: str, arguments: Sequence[str]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program.split(" [")[0], f"{program} [options]", inspect.cleandoc(about), allow_abbrev=False,
        exit_on_error=False, argument_default=argparse.SUPPRESS, formatter_class=_Help,
    )  # fmt: skip
    helping = not {"-h", "--help"}.isdisjoint(arguments)
    groups = {title: parser.add_argument_group(title) if title else parser for title, _ in parts}
    for title, part in parts:
        group = groups[title]
        docstrings = _docstrings(part) if helping else {}
        for name, kind, default in fields_of(part):
            text = _help(docstrings.get(name, ""), default)
            group.add_argument(_flag(name), dest=name, help=text, **_reading(kind))
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal, so that most options take one line."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=min(shutil.get_terminal_size().columns, 120) - 2)


def fields_of(part: Any) -> list[tuple[str, Any, Any]]:
    """Name, type and default of each field."""
    if isinstance(part, Subset):
        found = [field for field in fields_of(part.part) if field[0] in part.names]
        if part.defaults:
            return found
        return [(name, kind if kind is bool else kind | None, None) for name, kind, _ in found]
    kinds = get_type_hints(type(part))
    return [(name, kinds[name], getattr(part, name)) for name in names_of(part)]


def _reading(kind: Any) -> dict[str, Any]:
    """How argparse is to read a value of this type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is tuple:
        return {"type": _value(get_args(kind)[0]), "metavar": METAVARS[get_args(kind)[0]], "nargs": "*"}
    names = [
        "{" + ",".join(get_args(one)) + "}" if get_origin(one) is Literal else METAVARS[one]
        for one in _choices(kind) if one is not type(None)
    ]  # fmt: skip
    return {"type": _value(kind), "metavar": "|".join(names)}


def _value(kind: Any) -> Callable[[str], Any]:
    """A function that converts an argument to a value of this type."""

    def value(text: str) -> Any:
        text = "--" if text == DASHES else text
        kinds, names = _choices(kind), []
        if type(None) in kinds and text == "None":
            return None
        for one in kinds:
            if one is type(None):
                continue
            if get_origin(one) is Literal:
                if text in get_args(one):
                    return text
                names.append(f"one of {', '.join(get_args(one))}")
            else:
                with contextlib.suppress(ValueError):
                    return one(text)
                names.append("a whole number" if one is int else "a number")
        raise argparse.ArgumentTypeError(f"must be {' or '.join(names)}, not {_quoted(text)}")

    return value


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _docstrings(part: Any) -> dict[str, str]:
    """The docstring of each field."""
    import docstring_parser

    kind = type(part.part if isinstance(part, Subset) else part)

    return {
        field.arg_name: field.description or ""
        for one in reversed(kind.__mro__[:-1])
        for field in docstring_parser.parse_from_object(one).params
    }


def _help(docstring: str, default: Any) -> str:
    suffix = f" (default: {default})" if default not in (None, False, "", ()) else ""
    return " ".join(f"{docstring}{suffix}".split()).replace("%", "%%")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# preparing the arguments --------------------------------------------------------------------------------


def _joined(arguments: Sequence[str], kinds: dict[str, Any]) -> list[str]:
    """The arguments, with - for _ in the names of flags, and values that begin with a dash joined to their flag:
    argparse would take -1e-3 for a flag."""
    joined, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        if name not in kinds and f"--{name[5:]}" not in kinds:
            joined.append(argument)
            continue
        if not equals and rest and kinds.get(name, bool) is not bool and _is_dashed_value(rest[0]):
            equals, value = "=", rest.pop(0)
        joined.append(f"{name}{equals}{DASHES if value == '--' else value}")
    return joined


def _is_dashed_value(argument: str) -> bool:
    """Whether it begins with a dash but is not a flag, such as a negative number."""
    body = argument.lstrip("-")
    looks_like_a_flag = body[:1].isalpha() and body.lower() not in ("inf", "infinity", "nan")
    return argument != "--" and body != argument and not looks_like_a_flag


# error messages -----------------------------------------------------------------------------------------


def _problem(error: argparse.ArgumentError, kinds: dict[str, Any], arguments: Sequence[str]) -> str:
    """What is wrong with the value of a flag, or that it is missing or superfluous."""
    flag = (error.argument_name or "").split("/")[0]
    if error.message.startswith("must be "):
        return f"{flag} {error.message}"
    if kinds.get(flag, bool) is not bool:
        return f"{flag} needs a value" + _one_with_a_dash(flag, kinds, arguments)
    if flag not in kinds:
        return f"{flag} takes no value"
    return f"{flag} takes no value: give {flag} or --no-{flag[2:]}"


def _one_with_a_dash(flag: str, kinds: dict[str, Any], arguments: Sequence[str]) -> str:
    """How to give a value that begins with a dash, if what follows the flag may be one."""
    places = [at for at, argument in enumerate(arguments) if argument.replace("_", "-") == flag]
    after = arguments[places[-1] + 1 :] if places else ()
    if not after or after[0].partition("=")[0].replace("_", "-") in kinds:
        return ""
    value = after[0] if after[0].isprintable() and len(after[0]) <= MOST_QUOTED else "-..."
    return f"; write a value that begins with - as {shlex.quote(f'{flag}={value}')}"


def _too_much(argument: str, kinds: dict[str, Any]) -> str:
    """What is wrong with an unexpected argument."""
    flag = argument.partition("=")[0]
    if not flag.startswith("-") or argument == "--":
        return f"unexpected argument {_quoted(argument)}"
    near = difflib.get_close_matches(flag.replace("_", "-"), kinds, 1, 0.75)
    return f"unknown option {_quoted(flag)}" + (f"; did you mean {near[0]}?" if near else "")


def _quoted(text: str) -> str:
    """The argument in quotes, on one line and not too long."""
    return repr(text if len(text) <= MOST_QUOTED else f"{text[:MOST_QUOTED]}...")
