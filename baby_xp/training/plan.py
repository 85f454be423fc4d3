"""When a training session evaluates, writes a checkpoint and ends."""

from dataclasses import dataclass
from typing import Any

from baby_xp.config import TrainConfig
from baby_xp.training.setup import Setup


@dataclass(frozen=True)
class Position:
    """The position of training between two steps."""

    step: int
    """Number of steps done."""
    records: list[dict[str, Any]]
    """The evaluations so far."""
    best_step: int | None
    """The step of the evaluation with the lowest validation loss."""
    seconds: float
    """Since this session began."""
    checkpoint_seconds: float
    """Since its last checkpoint."""
    readings: int
    """How often this session has read the loss."""
    stop_asked: bool
    """Whether the user or the system asked for an end."""

    @property
    def evaluated(self) -> bool:
        """Whether the parameters as they are have been evaluated."""
        return bool(self.records) and self.records[-1]["step"] == self.step


@dataclass(frozen=True)
class Plan:
    """The plan of a TrainConfig. Apart from the time limit and timed checkpoints, it depends on the step and the
    records alone, so a resumed run continues as it would have."""

    train: TrainConfig
    num_steps: int
    """Of the whole run; the learning rate's schedule ends there too."""
    evaluate_first: bool = False
    """Evaluate before the first step: finetuning starts from weights worth measuring."""

    @classmethod
    def of(cls, setup: Setup, evaluate_first: bool = False) -> "Plan":
        """The plan that the config of a setup describes."""
        return cls(setup.config.train, setup.dataset.num_steps, evaluate_first)

    def evaluates(self, at: Position) -> bool:
        """Whether to measure the validation loss now."""
        if at.evaluated:
            return False
        if at.step == 0:
            return self.evaluate_first
        return at.step % self.train.eval_every == 0 or at.step == self.num_steps

    def writes_checkpoint(self, at: Position) -> bool:
        """Whether to write a checkpoint now, if anything has changed since the last one."""
        every, minutes = self.train.checkpoint_every, self.train.checkpoint_minutes
        if every and at.step % every == 0:
            return True
        return bool(minutes) and at.checkpoint_seconds > 60 * minutes

    def ends(self, at: Position) -> str | None:
        """The reason to end now: "steps", "patience", "interrupted" or "time"; None: continue."""
        if at.step >= self.num_steps:
            return "steps"
        if self.train.patience and _evaluations_since_best(at) >= self.train.patience:
            return "patience"
        if at.stop_asked:
            return "interrupted"
        minutes = self.train.max_minutes
        return "time" if minutes and at.seconds / 60 >= minutes else None


def _evaluations_since_best(at: Position) -> int:
    best = at.best_step
    return 0 if best is None else sum(record["step"] > best for record in at.records)
