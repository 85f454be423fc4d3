"""The loop around the steps: when it evaluates, why it ends, and which checkpoints it writes.

test_resume.py tests what an interrupt leaves, test_endings.py what is printed about it.
"""

import json
import os
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import baby_xp
from baby_xp.arrays import params, registry
from baby_xp.config import TrainConfig
from baby_xp.errors import BabyError
from baby_xp.run import Run
from baby_xp.runs import state_file
from baby_xp.training import loop, optimizers
from baby_xp.training.listener import Listener
from baby_xp.training.step import initial_state, make_step

SETTINGS = {
    "n_ctx": 4, "n_emb": 4, "head_size": 4, "n_heads": 2, "n_layers": 1, "dropout": 0.1, "batch_size": 3,
    "num_steps": 6, "eval_every": 2, "lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2, "sample_tokens": 0,
    "checkpoint_minutes": 0.0, "dtype": "float64", "backend": "numpy", "workers": 1, "data": "text.txt",
}  # fmt: skip
FIGURES = ["step", "train_loss", "val_loss", "whole_validation", "lr", "grad_norm", "seconds"]
NEVER = 10**6


class Noting(Listener):
    """A listener that keeps what training reports."""

    def __init__(self):
        self.records, self.reports = [], []

    def progress(self, step, loss, tokens_per_second):
        self.reports.append((step, loss, tokens_per_second))

    def evaluated(self, record):
        self.records.append(record)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The current folder, with a text whose end differs from the rest, so that training increases its loss."""
    monkeypatch.chdir(tmp_path)
    text = "the cat sat on the mat. " * 30 + "tam eht no tas tac eht " * 4
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")


def train(listener=None, **more) -> Run:
    return baby_xp.train("classic", listener=listener, **{**SETTINGS, **more})


def measured(run: Run) -> list[dict]:
    """The records of a run without the times; the last is that of the best model."""
    lines = map(json.loads, run.files.metrics.read_text("ascii").splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def progress_of(run: Run) -> dict:
    """The progress in the last checkpoint."""
    return json.loads(state_file.read_metadata(run.files.state)["progress"])


# records ------------------------------------------------------------------------------------------------


def test_the_records_contain_what_the_steps_computed(at_step):
    batches, noting = [], Noting()
    at_step(lambda step, batch: batches.append(batch))
    run = train(noting, num_steps=5)
    backend, config = registry.load("numpy", dtype="float64"), TrainConfig(**run.config["train"])
    flat = params.draw(run.model.spec, config.seed, config.dtype)
    state = initial_state(backend, flat, params.decay_mask(run.model.spec), config.seed)
    step, metrics = make_step(backend.xp, run.model, config), []
    for batch in batches:
        state, more = step(state, batch)
        metrics.append({name: float(value[0]) for name, value in more.items()})
    np.testing.assert_array_equal(load_file(run.files.state)["params"], state["params"], strict=True)
    *records, final = noting.records
    assert [record["step"] for record in records] == [2, 4, 5]
    for record, (begin, end) in zip(records, ((0, 2), (2, 4), (4, 5)), strict=True):
        assert list(record) == FIGURES
        assert record["train_loss"] == pytest.approx(np.mean([m["loss"] for m in metrics[begin:end]]), rel=1e-15)
        assert (record["lr"], record["grad_norm"]) == (metrics[end - 1]["lr"], metrics[end - 1]["grad_norm"])
    assert list(final) == FIGURES
    best = min(records, key=lambda record: record["val_loss"])
    assert (final["step"], final["train_loss"], final["whole_validation"]) == (best["step"], None, True)
    assert final["val_loss"] == best["val_loss"] == pytest.approx(run.evaluate(num_tokens=1).loss, rel=1e-12)
    seconds = [record["seconds"] for record in noting.records]
    assert seconds == sorted(seconds)
    assert progress_of(run)["records"] == records  # without the last one, which can be measured again


def test_evaluations_use_a_part_of_a_large_validation_text_and_the_last_one_all_of_it(tmp_path):
    letters = np.random.default_rng(0).choice(list("abc "), 10 * 2 * loop.EVALUATION_TOKENS + 5000)
    (tmp_path / "text.txt").write_text("".join(letters), encoding="utf-8")
    record, final = measured(train(num_steps=1, batch_size=100, n_ctx=20))
    assert record["val_loss"] != final["val_loss"] == pytest.approx(record["val_loss"], rel=0.01)


@pytest.mark.parametrize(("seconds", "steps"), [(0.01, [10, 20, 25]), (1.5, [*range(1, 26)])])
def test_progress_is_reported_every_few_steps_or_after_each_slow_one(clock, at_step, seconds, steps):
    """With mean loss and speed. The frequency does not change the run. A later session measures its own speed."""
    each = measured(train(num_steps=25, eval_every=1))
    expected = measured(train(num_steps=25, eval_every=25))
    losses, noting = [record["train_loss"] for record in each], Noting()
    at_step(lambda step, batch: clock.tick(seconds))
    run = train(noting, num_steps=25, eval_every=25)
    assert measured(run) == expected
    assert [step for step, _, _ in noting.reports] == steps
    means = [np.mean(losses[begin:end]) for begin, end in zip([0, *steps], steps, strict=False)]
    np.testing.assert_allclose([loss for _, loss, _ in noting.reports], means, rtol=1e-14)
    again = Noting()
    clock.tick(1000.0)
    resumed = baby_xp.resume(run.guid, num_steps=30, listener=again)
    speeds = [rate for *_, rate in noting.reports + again.reports]
    np.testing.assert_allclose(speeds, 12 / seconds, rtol=1e-6)
    for one in (run, resumed):
        assert one.config["result"]["tokens_per_second"] == round(12 / seconds)


def test_the_speed_counts_only_the_steps(clock, at_step, monkeypatch):
    class Slow(Noting):
        def evaluated(self, record):
            clock.tick(100.0)

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), clock.tick(10.0)))
    at_step(lambda step, batch: clock.tick(0.25))
    listener = Slow()
    run = train(listener, checkpoint_every=3)
    np.testing.assert_allclose([rate for *_, rate in listener.reports], 12 / 0.25)
    assert run.config["result"]["tokens_per_second"] == 48


# the best model -----------------------------------------------------------------------------------------


def test_the_first_of_equally_good_models_is_the_best():
    run = train(lr=1e-30, min_lr=0)
    assert run.config["result"]["best_step"] == 2
    assert progress_of(run)["best"]["step"] == 2


def test_a_current_model_that_is_the_best_is_stored_once():
    run = train(eval_every=6)
    assert progress_of(run)["best"]["step"] == 6
    assert "best" not in load_file(run.files.state)
    np.testing.assert_array_equal(run.params, load_file(run.files.state)["params"])


# reasons to end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_ends_after_that_many_evaluations_without_a_new_best(patience, rate_times):
    rate_times(3, 1e3)
    run = train(num_steps=20, eval_every=1, patience=patience)
    losses = [record["val_loss"] for record in measured(run)[:-1]]
    waited = [end - 1 - int(np.argmin(losses[:end])) for end in range(1, len(losses) + 1)]
    assert waited[-1] == patience == max(waited)
    result = run.config["result"]
    assert (result["state"], result["reason"], result["steps"]) == ("done", "patience", len(losses))
    assert result["best_step"] == len(losses) - patience
    whole = train(num_steps=len(losses), eval_every=1, patience=patience)
    assert whole.config["result"]["reason"] == "steps"  # the last step comes first
    whole = train(num_steps=len(losses), eval_every=1)
    assert whole.config["result"]["best_step"] == result["best_step"]


@pytest.mark.parametrize("eval_every", [2, NEVER])
def test_the_time_limit_ends_a_session_after_the_current_step(clock, at_step, eval_every):
    """The next session has its own limit, and the seconds add up."""
    at_step(lambda step, batch: clock.tick(25.0))
    run = train(num_steps=1000, max_minutes=2.0, eval_every=eval_every)
    again = baby_xp.resume()
    for one, steps in ((run, 5), (again, 10)):
        result = one.config["result"]
        assert (result["state"], result["reason"], result["steps"]) == ("stopped", "time", steps)
        assert result["seconds"] == 25 * steps
        assert one.files.completion().exists()
    steps = [record["step"] for record in measured(again)[:-1]]
    assert steps == ([2, 4, 6, 8, 10] if eval_every == 2 else [])
    assert measured(again)[-1]["whole_validation"] is True


# checkpoints --------------------------------------------------------------------------------------------

EVERY = [
    # settings, and the steps with a checkpoint; a step takes 25 seconds
    ({}, []),
    ({"checkpoint_every": 1}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ({"checkpoint_every": 4}, [4, 8]),
    ({"checkpoint_minutes": 1.0}, [3, 6, 9]),
    ({"checkpoint_minutes": 1.0, "checkpoint_every": 4}, [3, 4, 7, 8]),
]


@pytest.mark.parametrize(("settings", "steps"), EVERY, ids=[str(settings) for settings, _ in EVERY])
def test_checkpoints_are_written_every_few_steps_or_minutes(tmp_path, clock, at_step, settings, steps):
    found = []

    def note(step, batch):
        clock.tick(25.0)
        (path,) = tmp_path.glob("runs/models/state_*.safetensors")
        metadata = state_file.read_metadata(path)
        found.append((int(metadata["step"]), [one["step"] for one in json.loads(metadata["progress"])["records"]]))

    at_step(note)
    run = train(num_steps=10, **settings)
    assert sorted({step for step, _ in found}) == [0, *steps]
    for step, records in found:  # a checkpoint contains the evaluation of its step
        assert records == [*range(2, step + 1, 2)]
    assert state_file.read_metadata(run.files.state)["step"] == "10"


@pytest.mark.first_case
@pytest.mark.parametrize("seconds", [0.0, 2.0], ids=["losses wait", "losses are read each step"])
def test_an_interrupt_at_any_line_of_the_loop_is_between_steps(
    tmp_path, clock, at_step, monkeypatch, seconds
):
    """The checkpoint is a consistent state of the run, with the losses of as many steps."""
    steps, lines, whole = [], [], {}

    def note(step, batch):
        clock.tick(seconds)
        steps.append(step)
        if step not in whole:
            (path,) = tmp_path.glob("runs/models/state_*.safetensors")
            whole[step] = load_file(path)["params"]

    def trained(interrupted_at: int = 0, **more) -> Run:
        steps.clear(), lines.clear()

        def traced(frame, event, _):
            if event == "line" and len(steps) == 3:  # from the third step on, to the fourth
                lines.append(frame.f_lineno)
                if len(lines) == interrupted_at:
                    raise KeyboardInterrupt
            return traced

        before = sys.gettrace()
        sys.settrace(lambda frame, *_: traced if frame.f_code.co_filename == loop.__file__ else None)
        try:
            return train(num_steps=4, eval_every=NEVER, **more)
        finally:
            sys.settrace(before)

    monkeypatch.setattr(os, "fsync", lambda file: None)
    at_step(note)
    trained(checkpoint_every=1)
    trained()
    seen = set()
    for number in range(1, len(lines) + 1):
        run = trained(number)
        kept, result = load_file(run.files.state), run.config["result"]
        assert (result["reason"], progress_of(run)["count"]) == ("interrupted", result["steps"])
        np.testing.assert_array_equal(kept["params"], whole[result["steps"]], strict=True)
        seen.add(result["steps"])
    assert seen == {2, 3}


# numbers that are not finite ----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_reported_with_its_step_even_if_losses_are_read_in_tens(rate_times, clock):
    rate_times(11, 1e200)
    with pytest.raises(BabyError, match="loss became nan at step 13"):
        train(num_steps=30, eval_every=NEVER)


@pytest.mark.parametrize("name", ["params", "m", "v"])
def test_parameters_that_are_not_finite_are_not_kept(monkeypatch, name):
    """A loss shows them only one step later, or never if they belong to a token that does not occur."""
    usual = optimizers.update

    def spoilt(xp, state, *arguments):
        new, metrics = usual(xp, state, *arguments)
        if state["step"][0] == 2:
            new[name] = new[name].copy()
            new[name][0] = np.inf
        return new, metrics

    monkeypatch.setattr(optimizers, "update", spoilt)
    with pytest.raises(BabyError, match="parameters became NaN or infinite at step 3"):
        train(checkpoint_every=1, eval_every=NEVER)
    assert baby_xp.load(weights="last").config["result"]["steps"] == 2
