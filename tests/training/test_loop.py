"""The loop around the steps: what is measured when, which model is kept, why it ends, and what is left of it."""

import itertools
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import case_of

from baby_xp.arrays.tree import leaves
from baby_xp.config import GPTConfig, TrainConfig
from baby_xp.models import Model
from baby_xp.text.batches import RandomWindows, consecutive_windows
from baby_xp.text.dataset import Task
from baby_xp.training import checkpoint, divergence, loop, optimizers, schedules
from baby_xp.training import signals as training_stop
from baby_xp.training.checkpoint import Checkpoint
from baby_xp.training.loop import Diverged, fit
from baby_xp.training.signals import Stop, interruptible, interruption
from baby_xp.training.step import loss_and_gradients_with_dropout, make_step, total_loss
from baby_xp.training.validation import mean_loss

MODEL = Model(GPTConfig(n_ctx=4, n_emb=4, head_size=4, n_heads=2, n_layers=1, dropout=0.1), 11)
IDS = np.random.default_rng(0).integers(0, 11, 300)
BACKEND = case_of("numpy").backend
FIGURES = ["lr", "grad_norm", "seconds"]


def settings(**values) -> TrainConfig:
    default = {
        "batch_size": 3, "num_steps": 6, "eval_every": 2, "lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2,
        "sample_tokens": 0, "checkpoint_minutes": 0.0, "dtype": "float64",
    }  # fmt: skip
    return TrainConfig(**{**default, **values})


class Trial:
    """A training session: what it is given, and what it told and kept. `before_step` and `told` may interfere."""

    def __init__(self, config: TrainConfig, start: Checkpoint | None = None):
        self.config, self.start = config, start or checkpoint.first(MODEL, config)
        self.windows = RandomWindows(IDS[:250], 4, config.step_size, 0)
        self.before_step = self.told = self.during_validation = lambda step: None
        self.stop, self.more = Stop(), {}
        self.kept, self.records, self.progress_made, self.sampled = [], [], [], []
        self.n_validation = 49
        self.batches = self  # as a Task has them

    # what fit calls

    def batch(self, step: int):
        self.before_step(step)
        return self.windows.batch(step)

    def validation(self):
        self.during_validation(len(self.records))
        return consecutive_windows(IDS[250:], 4, 3)

    def progress(self, step, loss, tokens_per_second):
        self.progress_made.append((step, loss, tokens_per_second))
        self.told(step)

    def evaluated(self, record):
        self.records.append(record)

    def sample(self, params):
        self.sampled.append(params.copy())
        return f"sample {len(self.sampled)}"

    def fit(self):
        task = Task("text", None, self, self.config.num_steps, self.validation, self.n_validation, {})
        return fit(
            BACKEND, MODEL, self.config, task, self.start, self, self.kept.append, self.stop, **self.more
        )  # fmt: skip

    @property
    def kept_steps(self) -> list[int]:
        return [one.step for one in self.kept]


def by_hand(config: TrainConfig, num_steps: int | None = None) -> tuple[list[dict], list[np.ndarray]]:
    """Metrics of each step, and the parameters before the first and after each, without the loop."""
    state = checkpoint.on_device(BACKEND, MODEL, config, checkpoint.first(MODEL, config))
    step, windows = make_step(BACKEND.xp, MODEL, config), RandomWindows(IDS[:250], 4, config.step_size, 0)
    metrics, params = [], [state["params"]]
    for i in range(num_steps or config.num_steps):
        state, more = step(state, windows.batch(i))
        metrics.append({name: float(value[0]) for name, value in more.items()})
        params.append(state["params"])
    return metrics, params


def loss_of(params) -> float:
    """Over the whole validation part."""
    return mean_loss(
        lambda batch: total_loss(BACKEND.xp, MODEL, params, batch)[0], consecutive_windows(IDS[250:], 4, 3)
    )


def timeless(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.fixture
def scripted(monkeypatch):
    """Give the validation losses of a trial instead of measuring them -> list of (params, every) as asked."""

    def script(*losses: float) -> list:
        coming, asked = iter(losses), []

        def validation_loss(run, params, every):
            asked.append((params, every))
            return next(coming)

        monkeypatch.setattr(loop._Run, "_validation_loss", validation_loss)
        return asked

    return script


@pytest.fixture
def clock(monkeypatch):
    """The loop's time, in seconds, which goes on only when it is told to."""

    class Clock:
        now = 1000.0

        def perf_counter(self):
            return self.now

        def tick(self, seconds: float):
            def go_on(step):
                self.now += seconds

            return go_on

    monkeypatch.setattr(loop, "time", clock := Clock())
    return clock


# records ------------------------------------------------------------------------------------------------


def test_the_records_tell_what_the_steps_computed():
    trial = Trial(config := settings(num_steps=5))
    result = trial.fit()
    metrics, params = by_hand(config)
    assert [record["step"] for record in trial.records] == [2, 4, 5, result.final["step"]]
    assert result.reason == "steps"
    for record, (begin, end) in zip(trial.records, ((0, 2), (2, 4), (4, 5)), strict=False):
        assert list(record) == ["step", "train_loss", "val_loss", "whole_validation", *FIGURES]
        assert record["train_loss"] == pytest.approx(np.mean([m["loss"] for m in metrics[begin:end]]), rel=1e-15)
        assert record["val_loss"] == loss_of(params[end])
        assert record["whole_validation"] is False
        assert (record["lr"], record["grad_norm"]) == (metrics[end - 1]["lr"], metrics[end - 1]["grad_norm"])
    assert list(trial.records[-1]) == ["step", "train_loss", "val_loss", "whole_validation", *FIGURES]
    np.testing.assert_array_equal(result.checkpoint.state["params"], params[-1], strict=True)
    assert sorted(record["seconds"] for record in trial.records) == [r["seconds"] for r in trial.records]


def test_the_last_record_is_the_best_model_over_the_whole_validation_part():
    trial = Trial(config := settings(num_steps=8, eval_every=1))
    result = trial.fit()
    *measured, final = trial.records
    best = min(measured, key=lambda record: record["val_loss"])
    assert final is result.final
    assert final["step"] == best["step"]
    assert final["train_loss"] is None
    assert final["whole_validation"] is True
    assert final["val_loss"] == loss_of(by_hand(config)[1][best["step"]])
    assert result.checkpoint.progress["records"] == measured  # without the last one: it can be measured again


def test_on_the_way_a_part_of_a_large_validation_text_is_measured_and_at_the_end_all_of_it(scripted):
    asked = scripted(3.0, 2.0, 1.0, 0.5)
    trial = Trial(settings())
    trial.n_validation = 7 * loop.EVALUATION_TOKENS + 5
    trial.fit()
    assert [every for _, every in asked] == [7, 7, 7, 1]


def test_a_sample_is_told_with_each_measurement_but_the_last():
    trial = Trial(config := settings(num_steps=4))
    trial.more["sample"] = trial.sample
    trial.fit()
    assert [record.get("sample") for record in trial.records] == ["sample 1", "sample 2", None]
    params = by_hand(config)[1]
    np.testing.assert_array_equal(trial.sampled, [params[2], params[4]])


@pytest.mark.parametrize("first", [False, True])
def test_the_start_is_measured_where_it_is_asked_for(first):
    trial = Trial(config := settings(num_steps=2))
    trial.more["evaluate_first"] = first
    trial.fit()
    assert [record["step"] for record in trial.records[:-1]] == ([0, 2] if first else [2])
    if first:
        assert trial.records[0]["train_loss"] is None
        assert trial.records[0]["val_loss"] == loss_of(by_hand(config)[1][0])


def test_progress_is_told_every_few_steps_with_the_mean_loss(clock):
    trial = Trial(config := settings(num_steps=25, eval_every=100))
    trial.before_step = clock.tick(0.01)
    trial.fit()
    losses = [metrics["loss"] for metrics in by_hand(config)[0]]
    assert [step for step, _, _ in trial.progress_made] == [10, 20, 25]
    means = [np.mean(losses[begin:end]) for begin, end in ((0, 10), (10, 20), (20, 25))]
    np.testing.assert_allclose([loss for _, loss, _ in trial.progress_made], means, rtol=1e-14)
    np.testing.assert_allclose([rate for *_, rate in trial.progress_made], [12 / 0.01] * 3, rtol=1e-6)


def test_slow_steps_are_told_one_by_one(clock):
    trial = Trial(settings(num_steps=3, eval_every=100))
    trial.before_step = clock.tick(1.5)
    result = trial.fit()
    assert [step for step, _, _ in trial.progress_made] == [1, 2, 3]
    assert result.tokens_per_second == pytest.approx(12 / 1.5)


@pytest.mark.parametrize("part", ["validation", "keeping"])
def test_the_speed_is_that_of_the_steps_alone(clock, part):
    class Slow(list):
        def append(self, one):
            clock.tick(100.0)(0)
            super().append(one)

    trial = Trial(settings(checkpoint_every=3))
    trial.before_step = clock.tick(0.25)
    if part == "validation":
        trial.during_validation = clock.tick(100.0)
    else:
        trial.kept = Slow()
    result = trial.fit()
    rates = [rate for *_, rate in trial.progress_made]
    np.testing.assert_allclose([*rates, result.tokens_per_second], 12 / 0.25)


def test_the_first_speed_of_a_later_session_is_its_own(clock):
    first = Trial(settings(checkpoint_every=4))
    first.fit()
    again = Trial(settings(), first.kept[0])
    again.before_step = clock.tick(0.25)
    again.fit()
    np.testing.assert_allclose([rate for *_, rate in again.progress_made], 12 / 0.25)


def test_how_often_losses_are_read_changes_no_number(monkeypatch):
    records = []
    for every in (1, 3, 10):
        monkeypatch.setattr(loop, "READ_EVERY", every)
        trial = Trial(settings(num_steps=12, eval_every=6))
        trial.fit()
        records.append(timeless(trial.records))
    assert records[0] == records[1] == records[2]


# the best model -----------------------------------------------------------------------------------------


def test_the_best_is_kept_when_a_later_measurement_is_worse(scripted):
    asked = scripted(3.0, 2.0, 2.5, 9.0)
    trial = Trial(config := settings())
    result = trial.fit()
    params = by_hand(config)[1]
    np.testing.assert_array_equal(result.checkpoint.best_params, params[4])
    np.testing.assert_array_equal(result.checkpoint.state["params"], params[6])
    np.testing.assert_array_equal(asked[-1][0], params[4])  # it is what the end measures
    assert result.checkpoint.progress["best"] == {"step": 4, "val_loss": 2.0}
    assert (result.final["step"], result.final["val_loss"]) == (4, 9.0)


def test_a_rate_that_spoils_the_model_does_not_spoil_the_best(monkeypatch):
    """Nothing is scripted here: the third step throws the parameters far away."""
    rate = schedules.learning_rate
    thrown = lambda xp, step, *more: rate(xp, step, *more) * (1e3 if step[0] == 3 else 1)  # noqa: E731
    monkeypatch.setattr(schedules, "learning_rate", thrown)
    trial = Trial(config := settings(eval_every=1))
    result = trial.fit()
    losses = [record["val_loss"] for record in trial.records[:-1]]
    assert min(losses[3:]) > max(losses[:3]) + 0.1
    assert result.final["step"] <= 3
    assert result.final["val_loss"] == min(losses) == loss_of(result.checkpoint.best_params)
    np.testing.assert_array_equal(result.checkpoint.best_params, by_hand(config)[1][result.final["step"]])


def test_where_the_present_is_the_best_it_is_not_kept_twice(scripted):
    scripted(3.0, 2.0, 1.0, 1.0)
    result = Trial(settings()).fit()
    assert result.checkpoint.best is None
    assert result.checkpoint.best_params is result.checkpoint.state["params"]


def test_the_first_of_two_that_are_equal_is_the_best(scripted):
    scripted(3.0, 2.0, 2.0, 2.0)
    assert Trial(settings()).fit().checkpoint.progress["best"]["step"] == 4


def test_before_the_first_measurement_the_present_is_the_best():
    trial = Trial(settings(eval_every=100, checkpoint_every=2))
    trial.fit()
    assert [one.progress["best"] for one in trial.kept[:2]] == [None, None]
    for one in trial.kept[:2]:
        assert one.best_params is one.state["params"]


# why it ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patience", "losses", "step", "best"),
    [
        (1, [3, 2, 2.5], 3, 2),
        (2, [3, 2, 2.5, 2.6], 4, 2),
        (2, [3, 2, 2.5, 1.9, 2.6, 1.95], 6, 4),
        (2, [3, 3, 3], 3, 1),
        (3, [1, 2, 3, 4], 4, 1),
    ],
)
def test_patience_ends_with_so_many_measurements_after_the_best(scripted, patience, losses, step, best):
    scripted(*losses, 0.5)
    trial = Trial(settings(num_steps=20, eval_every=1, patience=patience))
    result = trial.fit()
    assert result.reason == "patience"
    assert result.checkpoint.step == trial.kept_steps[-1] == step
    assert (result.final["step"], result.final["val_loss"]) == (best, 0.5)


@pytest.mark.parametrize("patience", [0, 6])
def test_where_patience_is_not_at_its_end_all_steps_are_done(scripted, patience):
    scripted(1, 2, 3, 4, 5, 6, 1)
    result = Trial(settings(eval_every=1, patience=patience)).fit()
    assert (result.reason, result.checkpoint.step, result.final["step"]) == ("steps", 6, 1)


def test_the_last_step_is_the_reason_even_where_patience_ends_too(scripted):
    scripted(1, 2, 3, 1)
    assert Trial(settings(num_steps=3, eval_every=1, patience=2)).fit().reason == "steps"


def test_the_time_ends_it_after_the_step_at_hand(clock):
    trial = Trial(config := settings(num_steps=1000, max_minutes=2.0))
    trial.before_step = clock.tick(25.0)
    result = trial.fit()
    assert (result.reason, result.checkpoint.step, trial.kept_steps) == ("time", 5, [5])
    assert [record["step"] for record in trial.records[:-1]] == [2, 4]
    assert result.final["whole_validation"] is True
    assert result.checkpoint.progress["seconds"] == pytest.approx(125.0)
    # the next session has its own minutes, and the seconds go on
    again = Trial(config, result.checkpoint)
    again.before_step = clock.tick(25.0)
    result = again.fit()
    assert (result.reason, result.checkpoint.step) == ("time", 10)
    assert result.checkpoint.progress["seconds"] == pytest.approx(250.0)
    assert [record["step"] for record in again.records[:-1]] == [6, 8, 10]


def test_a_request_to_stop_ends_it_after_the_step_at_hand():
    trial = Trial(config := settings(num_steps=1000, eval_every=100))
    trial.before_step = lambda step: setattr(trial.stop, "asked", step == 3)
    result = trial.fit()
    assert (result.reason, result.final, trial.kept_steps, trial.records) == ("interrupted", None, [4], [])
    np.testing.assert_array_equal(result.checkpoint.state["params"], by_hand(config, 4)[1][4])
    assert result.checkpoint.progress["count"] == 4


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_an_interrupt_gives_the_step_at_hand_up(step):
    def interrupt(at):
        if at == step:
            raise KeyboardInterrupt

    trial = Trial(config := settings())
    trial.before_step = interrupt
    result = trial.fit()
    assert (result.reason, result.final) == ("interrupted", None)
    assert result.checkpoint.step == step
    assert trial.kept_steps == ([step] if step else [])  # the start is there already
    np.testing.assert_array_equal(result.checkpoint.state["params"], by_hand(config)[1][step])
    assert [record["step"] for record in trial.records] == [at for at in (2, 4) if at <= step]


def test_an_interrupt_after_the_step_was_computed_gives_it_up_too(monkeypatch):
    """It may come before the new state is kept; the loss of that step then does not count."""
    trial, step = Trial(settings(eval_every=100)), loop.make_step

    def cut_short(*args, **more):
        compute = step(*args, **more)

        def computed_in_vain(state, batch):
            new = compute(state, batch)
            if state["step"][0] == 3:
                raise KeyboardInterrupt
            return new

        return computed_in_vain

    monkeypatch.setattr(loop, "make_step", cut_short)
    result = trial.fit()
    assert (result.checkpoint.step, trial.kept_steps) == (3, [3])
    assert result.checkpoint.progress["count"] == 3


def test_an_interrupt_before_the_new_state_is_kept_gives_the_step_up(monkeypatch):
    """Its loss then does not wait to be read."""

    def keep(run, state):
        if state["step"][0] == 4:
            raise KeyboardInterrupt
        run.kept_state = state

    monkeypatch.setattr(loop._Run, "state", property(lambda run: run.kept_state, keep), raising=False)
    result = Trial(settings(eval_every=100)).fit()
    assert (result.reason, result.checkpoint.step, result.checkpoint.progress["count"]) == ("interrupted", 3, 3)


def test_an_interrupt_while_progress_is_shown_keeps_that_step():
    def impatient(step):
        raise KeyboardInterrupt

    trial = Trial(settings(num_steps=30, eval_every=100))
    trial.told = impatient
    result = trial.fit()
    assert (result.reason, result.checkpoint.step, trial.kept_steps) == ("interrupted", 10, [10])
    assert result.checkpoint.progress["count"] == 10


def test_a_measurement_that_is_cut_short_is_none():
    trial = Trial(settings())
    trial.during_validation = lambda done: setattr(trial.stop, "asked", done == 1)
    result = trial.fit()
    assert (result.reason, result.final, trial.kept_steps) == ("interrupted", None, [4])
    assert [record["step"] for record in trial.records] == [2]
    assert result.checkpoint.progress["records"] == trial.records
    assert result.checkpoint.progress["count"] == 2  # the losses since then wait for the measurement


def test_the_last_measurement_can_be_cut_short_and_done_again():
    trial = Trial(config := settings())
    trial.during_validation = lambda done: setattr(trial.stop, "asked", done == 3)
    result = trial.fit()
    assert (result.reason, result.final, trial.kept_steps) == ("interrupted", None, [6])
    again = Trial(config, result.checkpoint)
    whole = Trial(config)
    ended = again.fit()
    assert (ended.reason, again.kept, again.progress_made) == ("steps", [], [])
    assert timeless([ended.final]) == timeless([whole.fit().final])
    assert again.records == [ended.final]


# checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "steps"), [(0, [6]), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6]), (6, [6]), (100, [6])]
)
def test_checkpoints_are_kept_every_so_many_steps_and_at_the_end(every, steps):
    trial = Trial(settings(checkpoint_every=every))
    trial.fit()
    assert trial.kept_steps == steps


def test_checkpoints_are_kept_every_so_many_minutes(clock):
    trial = Trial(settings(num_steps=10, checkpoint_minutes=1.0))
    trial.before_step = clock.tick(25.0)
    trial.fit()
    assert trial.kept_steps == [3, 6, 9, 10]


def test_minutes_and_steps_share_their_clock(clock):
    trial = Trial(settings(num_steps=10, checkpoint_minutes=1.0, checkpoint_every=4))
    trial.before_step = clock.tick(25.0)
    trial.fit()
    assert trial.kept_steps == [3, 4, 7, 8, 10]


def test_a_checkpoint_holds_the_measurement_of_its_step():
    trial = Trial(settings(checkpoint_every=2))
    trial.fit()
    assert [one.progress["records"][-1]["step"] for one in trial.kept] == [2, 4, 6]


def test_from_every_checkpoint_it_goes_on_as_if_nothing_had_happened():
    config = settings(num_steps=7, eval_every=3, checkpoint_every=1, lr=0.3)
    whole = Trial(config)
    ended = whole.fit()
    assert len(whole.kept) == 7
    for start in whole.kept:
        again = Trial(config, start)
        result = again.fit()
        assert timeless(again.records) == timeless(whole.records[len(start.progress["records"]) :])
        assert timeless(result.checkpoint.progress["records"]) == timeless(ended.checkpoint.progress["records"])
        for name, array in ended.checkpoint.state.items():
            np.testing.assert_array_equal(result.checkpoint.state[name], array, strict=True)
        np.testing.assert_array_equal(result.checkpoint.best_params, ended.checkpoint.best_params, strict=True)
        assert again.kept_steps == list(range(start.step + 1, 8))


def test_a_checkpoint_survives_the_way_to_the_device_and_back(quick_backend32):
    config, case = settings(dtype="float32", seed=7), quick_backend32
    start = checkpoint.first(MODEL, config)
    start.state |= {
        "m": start.state["params"] * 2,
        "v": start.state["params"] ** 2,
        "step": np.array([9], np.int32),
    }
    state = checkpoint.on_device(case.backend, MODEL, config, start)
    back = checkpoint.to_host(case.backend, state)
    assert back.keys() == start.state.keys()
    for name, array in start.state.items():
        np.testing.assert_array_equal(back[name], array, strict=True)
    assert case.to_numpy(state["seed"]).tolist() == [7]  # dropout follows from it


# numbers that are not finite ----------------------------------------------------------------------------


def bursting(monkeypatch, at: int, rate: float = 1e200) -> None:
    """Make the step counted from 0 a far too large one: the loss of the next is not finite."""
    usual = schedules.learning_rate
    raised = lambda xp, step, *more: usual(xp, step, *more) * (rate if step[0] == at else 1)  # noqa: E731
    monkeypatch.setattr(schedules, "learning_rate", raised)


@pytest.mark.parametrize("at", [0, 3, 11])
def test_a_loss_that_is_not_finite_is_told_with_its_step(monkeypatch, at):
    """Though losses are read ten at a time. Steps are counted from 1."""
    bursting(monkeypatch, at)
    trial = Trial(settings(num_steps=30, eval_every=100))
    with pytest.raises(Diverged) as caught:
        trial.fit()
    assert (caught.value.what, caught.value.step) == ("loss became nan", at + 2)
    assert trial.kept == []


def test_nothing_is_kept_of_what_came_after_the_last_good_step(monkeypatch):
    bursting(monkeypatch, 3)
    trial = Trial(config := settings(num_steps=30, eval_every=100, checkpoint_every=3))
    with pytest.raises(Diverged):
        trial.fit()
    assert trial.kept_steps == [3]
    np.testing.assert_array_equal(trial.kept[0].state["params"], by_hand(config, 4)[1][3])


def test_a_validation_loss_that_is_not_finite_is_told(monkeypatch):
    bursting(monkeypatch, 3)
    trial = Trial(settings())
    with pytest.raises(Diverged) as caught:
        trial.fit()
    assert (caught.value.what, caught.value.step) == ("validation loss became nan", 4)
    assert [record["step"] for record in trial.records] == [2]


@pytest.mark.parametrize("name", ["params", "m", "v"])
def test_parameters_that_are_not_finite_are_not_kept(monkeypatch, name):
    """A loss tells of them one step later only, or never, where they are of a token that does not occur."""
    usual = optimizers.update

    def spoilt(xp, state, *arguments):
        new, metrics = usual(xp, state, *arguments)
        if state["step"][0] == 2:
            new[name] = new[name].copy()
            new[name][0] = np.inf
        return new, metrics

    monkeypatch.setattr(optimizers, "update", spoilt)
    trial = Trial(settings(checkpoint_every=1, eval_every=100))
    with pytest.raises(Diverged) as caught:
        trial.fit()
    assert (caught.value.what, caught.value.step) == ("parameters became numbers that are not finite", 3)
    assert trial.kept_steps == [1, 2]


# the cause ----------------------------------------------------------------------------------------------


def found(trial: Trial, last: int, start: Checkpoint | None = None, workers=None):
    start = start or checkpoint.first(MODEL, trial.config)
    return divergence.largest_gradient(BACKEND, MODEL, trial.config, trial, start, last, workers)


def norms_by_hand(config: TrainConfig, step: int) -> dict[str, float]:
    """The norm of each parameter's gradient in a step counted from 0."""
    state = checkpoint.on_device(BACKEND, MODEL, config, checkpoint.first(MODEL, config))
    windows = RandomWindows(IDS[:250], 4, config.step_size, 0)
    for i in range(step + 1):
        _, gradients = loss_and_gradients_with_dropout(BACKEND.xp, MODEL, state, windows.batch(i))
        state, _ = optimizers.update(BACKEND.xp, state, gradients, config)
    tree = MODEL.layout.unpack(BACKEND.xp, gradients)
    return {path: float(np.sqrt((array**2).sum())) for path, array in leaves(tree)}


def test_the_largest_gradient_of_the_last_good_step_is_named(monkeypatch):
    bursting(monkeypatch, 3)
    finding = found(Trial(config := settings(num_steps=30)), 5)
    norms = norms_by_hand(config, 3)
    assert finding.step == 4  # counted from 1: its loss was finite, that of the next was not
    assert finding.parameter == max(norms, key=norms.get)
    assert finding.norm == pytest.approx(max(norms.values()), rel=1e-12)


def test_the_cause_is_found_from_a_later_checkpoint_too(monkeypatch):
    trial = Trial(config := settings(num_steps=6, checkpoint_every=2, eval_every=100))
    trial.fit()
    bursting(monkeypatch, 3)
    for start in (None, trial.kept[0]):
        assert found(Trial(config), 5, start) == found(Trial(config), 30, start)
    assert found(Trial(config), 5, trial.kept[0]) == found(Trial(config), 5)


def test_the_cause_is_found_where_gradients_are_accumulated():
    config = settings(batch_size=12, num_steps=30)
    whole = found(Trial(config), 2)
    parts = found(Trial(replace(config, batch_size=3, accumulate=4)), 2)
    assert (parts.parameter, parts.step) == (whole.parameter, whole.step) == (whole.parameter, 2)
    assert parts.norm == pytest.approx(whole.norm, rel=1e-10)


class Scripted:
    """Workers that give losses and gradients as they are told, and note the sizes of the batches."""

    def __init__(self, *steps):
        self.steps, self.sizes = iter(steps), []

    def loss_and_gradients(self, xp, model, state, batch, n_targets=None):
        loss, at, value = next(self.steps)
        self.sizes.append(len(batch.inputs))
        if at == "all":
            return np.array([loss]), np.full(model.n_parameters, value)
        gradients = np.full(model.n_parameters, 1e-3)
        begin = sum(model.layout.sizes[: model.layout.paths.index(at)])
        gradients[begin] = value
        return np.array([loss]), gradients


@pytest.mark.parametrize("value", [np.inf, np.nan, -np.inf])
def test_gradients_that_burst_first_are_the_cause(value):
    workers = Scripted((3.0, "wte.weight", 5.0), (3.0, "ln_f.gain", value), (3.0, "wte.weight", 7.0))
    finding = found(Trial(settings()), 6, workers=workers)
    assert (finding.parameter, finding.step) == ("ln_f.gain", 2)
    assert not np.isfinite(finding.norm)


def test_where_all_gradients_burst_at_once_the_step_before_tells_more():
    finding = found(Trial(settings()), 2, workers=Scripted((3.0, "wte.weight", 5.0), (3.0, "all", np.nan)))
    assert (finding.parameter, finding.step) == ("wte.weight", 1)
    assert np.isfinite(finding.norm)
    assert found(Trial(settings()), 2, workers=Scripted((3.0, "all", np.nan))).step == 1


def test_the_cause_is_looked_for_in_parts_as_small_as_those_of_training():
    workers = Scripted(*[(3.0, "all", 1e-3)] * 8)
    found(Trial(settings(accumulate=4)), 2, workers=workers)
    assert workers.sizes == [3] * 8


def test_a_gradient_whose_square_no_float32_holds_has_a_norm():
    case = case_of("numpy", "float32")

    class Large(Scripted):
        def loss_and_gradients(self, *args):
            return tuple(array.astype("float32") for array in super().loss_and_gradients(*args))

    config = settings(dtype="float32")
    workers, start = Large((3.0, "ln_f.gain", 1e30)), checkpoint.first(MODEL, config)
    finding = divergence.largest_gradient(case.backend, MODEL, config, Trial(config), start, 1, workers)
    assert finding.parameter == "ln_f.gain"
    assert finding.norm == pytest.approx(1e30, rel=1e-6)


def test_where_the_first_loss_is_no_number_there_is_nothing_to_find():
    assert found(Trial(settings()), 3, workers=Scripted((np.nan, "ln_f.gain", 1.0))) is None
    assert found(Trial(settings()), 0) is None


# the request to stop ------------------------------------------------------------------------------------

needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


def send(number: int, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # until Python calls the handler


@needs_signals
@pytest.mark.parametrize("number", Stop.SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_the_first_signal_asks_and_the_second_interrupts(signals, number, second):
    told = []
    with Stop(lambda: told.append("once")) as stop:
        assert not stop.asked
        send(number)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt) as caught:
            send(second)
    assert told == ["once"]
    assert [getattr(one, "number", signal.SIGINT) for one in (caught.value, interruption())] == [number, number]


@needs_signals
def test_the_terminal_that_is_closed_interrupts_nothing(signals):
    """The system and the shell may both say so, and what is asked for is asked for by then."""
    with Stop() as stop:
        send(signal.SIGHUP, times=3)
        assert stop.asked


@needs_signals
@pytest.mark.parametrize("number", Stop.SIGNALS, ids=lambda number: number.name)
def test_a_signal_that_is_ignored_stays_so(signals, number):
    """As nohup has it."""
    usual = signal.signal(number, signal.SIG_IGN)
    with interruptible(), Stop() as stop:
        send(number)
        assert not stop.asked
    assert signal.signal(number, usual) == signal.SIG_IGN


@needs_signals
@pytest.mark.parametrize("number", Stop.SIGNALS[1:], ids=lambda number: number.name)
def test_outside_a_training_a_signal_interrupts_and_lets_what_follows_clean_up(signals, monkeypatch, number):
    cleaned = []

    def command():
        try:
            send(number)
        finally:
            send(number, times=2)
            cleaned.append(True)

    with interruptible(), pytest.raises(KeyboardInterrupt, match=f"by {number.name}") as caught:
        command()
    assert (caught.value.number, cleaned) == (number, [True])
    monkeypatch.setattr(training_stop, "ONCE_SECONDS", 0.0)
    with interruptible():  # who asks again, later, is heard
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                send(number)


@needs_signals
def test_after_a_stop_the_handlers_are_as_before_even_where_it_raised(signals):
    with pytest.raises(KeyboardInterrupt), Stop():
        send(signal.SIGTERM, times=2)


def test_in_another_thread_signals_are_left_alone(signals):
    seen = []

    def elsewhere():
        with interruptible(), Stop() as stop:
            seen.append({number: signal.getsignal(number) for number in Stop.SIGNALS})
            seen.append(stop.asked)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signals, False]


def test_work_over_items_is_cut_short_by_the_request():
    stop, done = Stop(), []
    assert list(stop.over("abc")) == ["a", "b", "c"]

    def work(item):
        done.append(item)
        stop.asked = item == 3

    with pytest.raises(KeyboardInterrupt):
        list(map(work, stop.over(itertools.count())))
    assert done == [0, 1, 2, 3]
