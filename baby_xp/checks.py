"""What a caller gave, as plain Python values: NumPy's numbers and flags count as Python's, paths may be objects.

Each check returns the value to go on with. What cannot be used raises a BabyError that names the argument and says
what it must be.
"""

import contextlib
import numbers
import operator
import os
import sys
from collections.abc import Iterable
from typing import Any

from baby_xp.errors import BabyError
from baby_xp.files import as_path

LARGEST = 2**31 - 1
"""The largest whole number of a config: sizes and steps are counted in int32."""
MOST_PROCESSES = 32
"""On a machine with fewer cores: more are in each other's way, and take their memory and seconds to start."""
LONGEST = 60
"""Characters of a value in a message."""


def most_processes() -> int:
    """How many processes may share the work."""
    return max(MOST_PROCESSES, os.cpu_count() or 1)


def whole(name: str, value: Any, least: int | None = 1, most: int | None = LARGEST, hint: str = "") -> int:
    """A whole number from `least` to `most` (None: no limit). hint: what to add to the message."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        raise BabyError(f"{name} must be a whole number{_limit(least)}, not {shown_value(value)}{_and(hint)}")
    if most is not None and number > most:
        raise BabyError(f"{name} must be a whole number of at most {most}, not {shown_value(value)}{_and(hint)}")
    return number


def number(
    name: str,
    value: Any,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    hint: str = "",
) -> int | float:
    """A finite number within these limits; a whole one stays one."""
    limits = ((operator.ge, least), (operator.gt, above), (operator.lt, below), (operator.le, most))
    found = _finite(value)
    if found is None or not all(limit is None or holds(found, limit) for holds, limit in limits):
        words = {"of at least": least, "above": above, "below": below, "at most": most}
        told = " and ".join(f"{word} {limit}" for word, limit in words.items() if limit is not None)
        raise BabyError(f"{name} must be a number {told}, not {shown_value(value)}{_and(hint)}")
    return found


def _finite(value: Any) -> int | float | None:
    """A finite number as Python's own int or float; None if it is none, or one that no float can hold."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    found = int(value) if isinstance(value, numbers.Integral) else float(value)
    return found if abs(found) <= sys.float_info.max else None


def text(name: str, value: Any, hint: str = "") -> str:
    """A text."""
    if not isinstance(value, str):
        raise BabyError(f"{name} must be a text, not {shown_value(value)}{_and(hint)}")
    return str(value)


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """One of some words."""
    if not isinstance(value, str) or value not in allowed:
        raise BabyError(f"{name} must be one of {', '.join(allowed)}, not {shown_value(value)}")
    return str(value)


def flag(name: str, value: Any) -> bool:
    """True or False, NumPy's too; 1 and 0 stand for them."""
    with contextlib.suppress(Exception):  # whatever an object does when it is compared: it is no flag
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
    except Exception:  # a whole number of more digits than Python writes, or an object with a fault
        written = f"a value of type {type(value).__name__}"
    return written if len(written) <= LONGEST else f"{written[:LONGEST]}..."


def _limit(least: int | None) -> str:
    return "" if least is None else f" of at least {least}"


def _and(hint: str) -> str:
    return f"; {hint}" if hint else ""
