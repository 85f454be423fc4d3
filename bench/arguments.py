"""Types of arguments that several benchmarks take. For argparse: an error is one line, and exit code 2."""

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable

from baby_xp import backend as backends


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if int(text) < 1:
        raise ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def positives(text: str) -> list[int]:
    """The numbers of a list such as "1,16"."""
    return [positive(part) for part in text.split(",")]


def names_of(known: Iterable[str], what: str) -> Callable[[str], list[str]]:
    """A type for lists such as "torch,jax" of known names; an empty text is an empty list."""

    def names(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        if unknown := [name for name in found if name not in known]:
            raise ArgumentTypeError(f"unknown {what} {unknown[0]!r}: choose {', '.join(known)}")
        return found

    return names


def backend(text: str) -> str:
    """The name of a backend; not `auto`, as a result must say what it is of."""
    if text not in backends.names():
        raise ArgumentTypeError(f"unknown backend {text!r}: choose one of {', '.join(backends.names())}")
    return text
