"""The standard streams of a command: they always exist, and errors of writing them are handled here."""

import contextlib
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

from baby_xp.errors import BabyError
from baby_xp.files import reason, refusal

LONGEST = 480
"""The most characters of a message; only one that quotes what a user gave can be longer."""
BROKEN_PIPE = 141
"""The exit code if the reader of a pipe closes it, as in `baby_xp ... | head`: as if ended by SIGPIPE."""


class OutputLost(BabyError):
    """Standard output cannot be written. `problem`: the same without advice; `code`: the command's exit code."""

    def __init__(self, error: OSError):
        super().__init__(str(refusal("standard output", error, "written", None)))
        self.error = error
        self.problem = f"standard output cannot be written ({reason(error)})"
        self.code = BROKEN_PIPE if isinstance(error, BrokenPipeError) else 2

    def __reduce__(self) -> tuple[Any, ...]:  # its arguments differ from those of BabyError
        return type(self), (self.error,)


class Output:
    """Standard output. The first failure to write it raises OutputLost; later output is discarded.

    So code that does not need it, such as training, can continue; `lost` keeps the error until the end.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.lost: OutputLost | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write to the stream. Raises OutputLost."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream. Raises OutputLost."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Any, *arguments: Any) -> None:
        if self.lost:
            return
        try:
            action(*arguments)
        except OSError as error:
            self.lost = OutputLost(error)
            _discard(self._stream)
            raise self.lost from None


class Errors:
    """Standard error. Errors of writing it are ignored, because they cannot be reported."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write to the stream, where that is possible."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, where that is possible."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError:
            _discard(self._stream)
        except RuntimeError:  # a signal came in the middle of a write, and its handler writes too
            pass


@contextlib.contextmanager
def guarded() -> Iterator[Output]:
    """Standard output and standard error that can always be used inside -> standard output."""
    _occupy()
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        # a stream is None if its descriptor was closed when Python started
        streams = [stack.enter_context(_nowhere()) if stream is None else stream for stream in before]
        for stream in streams:  # a character that the terminal's encoding lacks is replaced
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        output = sys.stdout = Output(streams[0])
        sys.stderr = Errors(streams[1])
        try:
            yield output
        finally:
            sys.stdout, sys.stderr = before


def one_line(message: str) -> str:
    """A message as one line of characters that any terminal can show, without the middle of a long one."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


def printable(text: str) -> str:
    """A text as it is printed on a terminal: control characters, which could control it, become escapes.

    If standard output is not a terminal, the text is unchanged.
    """
    if not sys.stdout.isatty():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) == "Cc" and character not in "\n\t" else character
        for character in text
    )  # fmt: skip


def _occupy() -> None:
    """Open the closed ones of the descriptors 0, 1 and 2: otherwise the next file would be standard output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)  # worker processes inherit it, as they do the standard streams


def _nowhere() -> Any:
    return open(os.devnull, "w", encoding="utf-8", errors="replace")


def _discard(stream: Any) -> None:
    """Redirect a stream to the null device, so that its buffer causes no error when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, number)
        finally:
            os.close(nowhere)
