"""Errors that a user can fix: the command line prints them as one line and ends with exit code 2."""

from typing import Any


class BabyError(ValueError):
    """The user's input cannot be used. The message is one line: what is wrong, and what to do."""


class NothingTrained(BabyError):
    """An interrupt came before the first step of a training was done."""


class BackendUnavailable(BabyError):
    """A backend cannot work on this machine. `reason` says why, `remedy` how to fix it."""

    def __init__(self, name: str, reason: str, remedy: str):
        super().__init__(f"backend {name!r} cannot work here: {reason}; {remedy}")
        self.name, self.reason, self.remedy = name, reason, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.reason, self.remedy)


class OutOfMemory(BabyError):
    """An array did not fit the memory of a device. `shortage`: what was needed and what was free; `advice`: what
    to do; `kept`: what of a run is still there."""

    def __init__(self, shortage: str, advice: str = "", kept: str = ""):
        super().__init__("; ".join(filter(None, (shortage, advice, kept))))
        self.shortage, self.advice, self.kept = shortage, advice, kept

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.shortage, self.advice, self.kept)
