"""Text for people: tables of aligned columns, and sizes and durations with units."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

UNITS = {2**60: "EiB", 2**50: "PiB", 2**40: "TiB", 2**30: "GiB", 2**20: "MiB", 2**10: "KiB"}


def pairs(rows: Iterable[tuple[str, str]], indent: int = 0) -> list[str]:
    """Names and their values, with the values aligned."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return [f"{' ' * indent}{name:<{width}}  {value}".rstrip() for name, value in rows]


def columns(form: str, rows: Iterable[Sequence[Any]]) -> list[str]:
    """Each row in a format string such as "{:<8}  {:>6.2f}"."""
    return [form.format(*row).rstrip() for row in rows]


def fitted(header: Sequence[str], rows: Sequence[Sequence[str]], align: str, groups: Sequence[Any]) -> list[str]:
    """Rows of cells under a header, each column as wide as its widest cell, an empty line between groups.

    align: "<" or ">" for each column. groups: what each row belongs to.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(align, widths, strict=True))
    lines = columns(form, [header])
    for row, group, before in zip(rows, groups, [*groups[:1], *groups], strict=False):
        lines += [""] * (group != before) + columns(form, [row])
    return lines


def wrapped(first: str, text: str, width: int) -> list[str]:
    """A long text after `first`, wrapped, with its other lines indented to the same column."""
    margin = " " * len(first)
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=margin, break_long_words=False)


def counted(number: int, noun: str) -> str:
    """ "1 token", "2,000 tokens". """
    return f"{number:,} {noun}{'s' * (number != 1)}"


def size(number: int) -> str:
    """Bytes in words: "1.25 GiB"."""
    unit = next((unit for unit in UNITS if number >= unit), 2**10)
    return f"{number / unit:.{2 if number < 10 * unit else 1}f} {UNITS[unit]}"


def duration(seconds: float) -> str:
    """Seconds in words: "4.2 s", "35 s", "12 min", "1.8 h"."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
