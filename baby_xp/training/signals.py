"""Stops a run between two steps when the user or the system asks for it: Ctrl-C, SIGTERM, SIGHUP, SIGUSR1.

SIGTERM is the system's request to end; SIGHUP comes when the terminal or the connection is closed; a cluster can
be told to send SIGUSR1 some time before it ends a job. A signal that is ignored when the program starts stays so:
that is how `nohup` keeps a program alive.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# Windows has only the first two
NAMES = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
ONCE_SECONDS = 1.0
"""The same request often comes twice, from the system and from a shell: within this time it counts once."""

_asked_by: int = signal.SIGINT
"""What last asked a training to stop. Signals concern the whole process, and so does this."""


class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl-C asks the program to end. What handles Ctrl-C handles it too."""

    def __init__(self, number: int):
        super().__init__(number)  # with these arguments a copy is made, when it goes to another process
        self.number = number

    def __str__(self) -> str:
        return f"by {signal.Signals(self.number).name}"


class Agreed(KeyboardInterrupt):
    """All ranks end the work at the same place, as one of them was asked to stop."""


def interruption() -> KeyboardInterrupt:
    """The exception to raise after a training that was stopped by a signal."""
    return KeyboardInterrupt() if _asked_by == signal.SIGINT else Interrupted(_asked_by)


@contextmanager
def interruptible() -> Iterator[None]:
    """The signals but Ctrl-C raise Interrupted inside, as that raises KeyboardInterrupt: clean-up code runs."""
    last = -ONCE_SECONDS

    def interrupt(number: int, frame: Any) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= ONCE_SECONDS:
            raise Interrupted(number)

    handlers = _handle(SIGNALS[1:], interrupt)
    try:
        yield
    finally:
        _restore(handlers)


class Stop:
    """A request to stop: `asked` becomes true at the first signal, another Ctrl-C or SIGTERM interrupts at once.

    Another SIGHUP does not: when a terminal is closed, the system and the shell may both send one.
    A context manager: it handles signals only inside it, and only in the main thread, as Python requires.
    Elsewhere, Ctrl-C raises KeyboardInterrupt as usual. `on_request` is called at the first signal.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None):
        self.asked, self._on_request = False, on_request
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        global _asked_by
        _asked_by = signal.SIGINT
        self._before = _handle(SIGNALS, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._before)
        self._before = {}

    def over(self, items: Iterable) -> Iterator:
        """The items, until the request comes: then a KeyboardInterrupt. For work that can be done again."""
        for item in items:
            if self.asked:
                raise interruption()
            yield item

    def _ask(self, number: int, frame: Any) -> None:
        global _asked_by
        if self.asked:
            if number == getattr(signal, "SIGHUP", None):
                return
            raise interruption()
        self.asked, _asked_by = True, number
        self._on_request()


def _handle(numbers: Iterable[int], handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Handle these signals, where they are not ignored -> the handlers before. Nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {
        number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) != signal.SIG_IGN
    }


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        with suppress(TypeError):  # a handler that was not set from Python cannot be restored
            signal.signal(number, handler)
