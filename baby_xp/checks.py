"""Checks of arguments. Each takes NumPy's numbers and flags, and path-like objects, and returns a plain value.

A value that cannot be used raises a BabyError that names the argument and says what it must be.
"""

import contextlib
import dataclasses
import numbers
import operator
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from baby_xp.errors import BabyError
from baby_xp.files import as_path

LARGEST = 2**31 - 1
"""The largest whole number in a config: sizes and steps are counted in int32."""
MOST_PROCESSES = 32
"""The most processes on a machine with fewer cores: more would compete, take memory and start slowly."""
LONGEST = 60
"""The most characters of a value in a message."""


@dataclass(frozen=True)
class Range:
    """The limits of a number; None: no limit."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def in_words(self) -> str:
        """ "of at least 0 and below 1". """
        words = {"of at least": self.least, "above": self.above, "below": self.below, "at most": self.most}
        return " and ".join(f"{word} {limit}" for word, limit in words.items() if limit is not None)

    def __contains__(self, number: float) -> bool:
        at_ends = (operator.ge, self.least), (operator.le, self.most)
        between = (operator.gt, self.above), (operator.lt, self.below)
        return all(limit is None or holds(number, limit) for holds, limit in (*at_ends, *between))


def check_fields(config: Any) -> None:
    """Check each field of a frozen dataclass against its type, and keep plain Python values: JSON has no others.

    A Literal lists the words to choose from; a number declares its limits, as in Annotated[int, Range(1, 9)]; a
    text names the function that checks it, as in Annotated[str, path]. With | None, None is taken too. Raises
    BabyError for the first field that fails.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        choices = get_args(field.type) if get_origin(field.type) in (Union, UnionType) else (field.type,)
        if value is not None or type(None) not in choices:
            object.__setattr__(config, field.name, _checked(field.name, choices[0], value))


def _checked(name: str, kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        return choice(name, value, get_args(kind))
    kind, rule = get_args(kind)
    if not isinstance(rule, Range):
        return rule(name, value)
    return number(name, value, **vars(rule)) if kind is float else whole(name, value, rule.least, rule.most)


def most_processes() -> int:
    """How many processes may share the work."""
    return max(MOST_PROCESSES, os.cpu_count() or 1)


def whole(name: str, value: Any, least: float | None = 1, most: float | None = LARGEST, hint: str = "") -> int:
    """A whole number from `least` to `most` (None: no limit). hint: what to add to the message."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        limit = "" if least is None else f" of at least {least}"
        raise BabyError(f"{name} must be a whole number{limit}, not {shown_value(value)}{_and(hint)}")
    if most is not None and number > most:
        raise BabyError(f"{name} must be a whole number of at most {most}, not {shown_value(value)}{_and(hint)}")
    return number


def number(name: str, value: Any, hint: str = "", **limits: float | None) -> int | float:
    """A finite number within the limits of a Range; a whole one stays one."""
    found, limit = _finite(value), Range(**limits)
    if found is None or found not in limit:
        raise BabyError(f"{name} must be a number {limit.in_words()}, not {shown_value(value)}{_and(hint)}")
    return found


def _finite(value: Any) -> int | float | None:
    """A finite number as Python's int or float; None for anything else, and for ints too large for a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    found = int(value) if isinstance(value, numbers.Integral) else float(value)
    return found if abs(found) <= sys.float_info.max else None


def text(name: str, value: Any, hint: str = "") -> str:
    """A text."""
    if not isinstance(value, str):
        raise BabyError(f"{name} must be a string, not {shown_value(value)}{_and(hint)}")
    return str(value)


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """One of some words."""
    if not isinstance(value, str) or value not in allowed:
        raise BabyError(f"{name} must be one of {', '.join(allowed)}, not {shown_value(value)}")
    return str(value)


def flag(name: str, value: Any) -> bool:
    """True or False, NumPy's too; 1 and 0 stand for them."""
    with contextlib.suppress(Exception):  # an object whose comparison fails is not a flag
        if value in (True, False):
            return bool(value)
    raise BabyError(f"{name} must be True or False, not {shown_value(value)}")


def path(name: str, value: Any) -> str:
    """A path, or the name of a text, as it was written."""
    as_path(value, name)
    return os.fspath(value)


def function(name: str, value: Any) -> Any:
    """Something that can be called."""
    if not callable(value):
        raise BabyError(f"{name} must be a function, not {shown_value(value)}")
    return value


def shown_value(value: Any) -> str:
    """A value in a message: on one line, and not too long."""
    try:
        written = " ".join(repr(value).split())
    except Exception:  # an int with more digits than Python converts to text, or an object whose repr fails
        written = f"a value of type {type(value).__name__}"
    return written if len(written) <= LONGEST else f"{written[:LONGEST]}..."


def _and(hint: str) -> str:
    return f"; {hint}" if hint else ""
