"""Listeners: objects that training reports its progress to."""

from typing import TYPE_CHECKING, Any

from baby_xp import checks
from baby_xp.errors import BabyError

if TYPE_CHECKING:
    from baby_xp.session import TrainingSession


class Listener:
    """A listener that does nothing. Subclass it, or write an object with the same methods."""

    def started(self, session: "TrainingSession", step: int) -> None:
        """Called before the first step of a training session; `step`: the number of steps done before."""

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Called every few steps with the mean loss since the last call, in nats per token."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """Called with the record of each evaluation, a line of the metrics file: step, train_loss, val_loss, lr,
        grad_norm, seconds, whole_validation, and the sample if there is one."""

    def note(self, text: str) -> None:
        """Called with a message for the user."""


def listening(listener: Any) -> Any:
    """The listener, or one that does nothing. Raises BabyError for an object that lacks one of the methods."""
    if listener is None:
        return Listener()
    for name in ("started", "progress", "evaluated", "note"):
        if not callable(getattr(listener, name, None)):
            kind = checks.shown_value(listener)
            raise BabyError(f"listener must have the methods of baby_xp.Listener; {kind} has no {name}")
    return listener
