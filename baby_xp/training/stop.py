"""Ends a run at the next good moment when the user asks for it: Ctrl-C, or the system's request to end."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any


class Stop:
    """A request to stop: `asked` becomes true at the first Ctrl-C or SIGTERM, the second interrupts at once.

    A context manager: signals are listened to inside only, and in the main thread only, as Python has it.
    Elsewhere, Ctrl-C is a KeyboardInterrupt as ever. `told` is called when the request comes.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, told: Callable[[], None] = lambda: None):
        self.asked, self._told = False, told
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            with suppress(TypeError):  # a handler that was not set from Python cannot be put back
                signal.signal(number, handler)
        self._before = {}

    def over(self, items: Iterable) -> Iterator:
        """The items, until the request comes: then a KeyboardInterrupt. For work that can be done again."""
        for item in items:
            if self.asked:
                raise KeyboardInterrupt
            yield item

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._told()
