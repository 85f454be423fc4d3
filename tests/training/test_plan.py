"""When a training session evaluates, writes a checkpoint and ends."""

import pytest

from baby_xp.config import TrainConfig
from baby_xp.training.plan import Plan, Position


def at(step: int = 0, records=(), best=None, **more) -> Position:
    records = [{"step": one} for one in records]
    usual = {"seconds": 0.0, "checkpoint_seconds": 0.0, "readings": 0, "stop_asked": False}
    return Position(step, records, best, **{**usual, **more})


def plan(evaluate_first: bool = False, **settings) -> Plan:
    return Plan(TrainConfig(**{"num_steps": 10, "eval_every": 4, **settings}), 10, evaluate_first)


def test_it_evaluates_every_few_steps_and_at_the_end():
    assert [step for step in range(11) if plan().evaluates(at(step))] == [4, 8, 10]
    assert [step for step in range(11) if plan(evaluate_first=True).evaluates(at(step))] == [0, 4, 8, 10]


def test_no_step_is_evaluated_twice():
    assert not plan().evaluates(at(4, records=[4]))
    assert plan().evaluates(at(8, records=[4]))


def test_it_writes_checkpoints_by_steps_and_by_time():
    by_steps = plan(checkpoint_every=3, checkpoint_minutes=0.0)
    assert [step for step in range(1, 11) if by_steps.writes_checkpoint(at(step))] == [3, 6, 9]
    assert not by_steps.writes_checkpoint(at(4, checkpoint_seconds=1e9))
    by_time = plan(checkpoint_minutes=0.5)
    found = [by_time.writes_checkpoint(at(1, checkpoint_seconds=seconds)) for seconds in (0, 29, 31)]
    assert found == [False, False, True]


@pytest.mark.parametrize(
    ("settings", "position", "reason"),
    [
        ({}, at(9), None),
        ({}, at(10), "steps"),
        ({}, at(11), "steps"),
        ({"patience": 2}, at(6, records=[2, 4, 6], best=2), "patience"),
        ({"patience": 2}, at(6, records=[2, 4, 6], best=4), None),
        ({"patience": 2}, at(3), None),
        ({"max_minutes": 1.0}, at(3, seconds=59.9), None),
        ({"max_minutes": 1.0}, at(3, seconds=60.0), "time"),
        ({}, at(3, seconds=1e9), None),
        ({}, at(3, stop_asked=True), "interrupted"),
        ({}, at(10, stop_asked=True), "steps"),
        ({"max_minutes": 1.0}, at(3, seconds=60.0, stop_asked=True), "interrupted"),
    ],
)
def test_the_reason_to_end(settings, position, reason):
    assert plan(**settings).ends(position) == reason
