"""How training ends: after its steps, by the time limit, by patience, by an interrupt, by a diverging loss."""

import os
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
from quick import SAMPLE_TOKENS
from safetensors.numpy import load_file
from small_runs import TINY, all_of, flags, metrics_of, needs_signals

import baby_xp
from baby_xp.arrays import registry
from baby_xp.errors import BabyError
from baby_xp.inference.generate import Logits
from baby_xp.run import Run
from baby_xp.runs import state_file
from baby_xp.training.signals import SIGNALS

STOPPING = "stopping after this step, with a checkpoint; interrupt again to stop at once\n"


def train(**more) -> Run:
    return baby_xp.train("classic", **{**TINY, "sample_tokens": 0, **more})


def listed() -> list[tuple[str, int]]:
    return [(run.state, run.steps) for run in baby_xp.list_runs()]


def suggestions(out: str) -> list[list[str]]:
    """The commands that the output suggests, as arguments."""
    return [shlex.split(line.partition("python -m baby_xp ")[2]) for line in out.splitlines() if " -m " in line]


# the end ------------------------------------------------------------------------------------------------


def test_training_prints_what_it_does_and_how_to_continue(work, call):
    code, out, err = call("train", "--path=my runs", *flags())
    assert (code, err) == (0, "")
    files = baby_xp.load(path="my runs").files
    expected = ["parameters on numpy", "text.txt: ", "step      2: train ", "step      3: train ", files.guid]
    assert [one for one in expected if one not in out] == []
    assert files.completion().read_text().strip() in out
    assert suggestions(out) == [["generate", files.guid[:8], "--path", "my runs"]]
    assert call(*suggestions(out)[0], "--num-tokens=2")[0] == 0


@pytest.mark.parametrize("eval_every", [2, 100], ids=["evaluated before", "never evaluated before"])
def test_a_run_stopped_by_the_time_limit_can_be_resumed(work, call, clock, at_step, eval_every):
    at_step(lambda step, batch: clock.tick(30.0))
    code, out, err = call("train", "--path=my runs", *flags(num_steps=6, eval_every=eval_every, max_minutes=1.5))
    assert (code, err) == (0, "")
    assert "time limit reached: stopped after step 3; to continue: " in out
    assert "None" not in out
    assert "over the whole validation part" in out
    resume, _ = suggestions(out)
    code, out, err = call(*resume)
    assert (code, err) == (0, "")
    run = baby_xp.load(path="my runs")
    assert f"continuing run {run.guid} after step 3" in out
    assert (run.config["result"]["state"], run.config["result"]["steps"]) == ("done", 6)


def test_the_best_weights_are_kept_and_patience_ends_the_run(work, call, rate_times):
    rate_times(3, 1e4)
    code, out, err = call("train", *flags(num_steps=50, eval_every=1, sample_tokens=0, patience=3))
    assert (code, err) == (0, "")
    best, last = (baby_xp.load(weights=weights) for weights in ("best", "last"))
    *records, final = metrics_of(best.files)
    losses, result = [record["val_loss"] for record in records], best.config["result"]
    at = result["best_step"]
    assert min(losses[3:]) > max(losses[:3]) + 0.1
    assert at == 1 + losses.index(min(losses)) == result["steps"] - 3 <= 3
    assert f"ended after step {at + 3}: the validation loss stopped improving\n" in out
    assert f"kept the weights of step {at}, which had the lowest loss\n" in out
    assert (final["step"], final["whole_validation"]) == (at, True)
    assert final["val_loss"] == result["val_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert f"validation loss {final['val_loss']:.4f} nats per token, over the whole validation part" in out
    assert state_file.read_metadata(best.files.model)["step"] == str(at)
    assert np.abs(best.params - last.params).max() > 1
    state = load_file(best.files.state)
    np.testing.assert_array_equal(state["best"], best.params)
    np.testing.assert_array_equal(state["params"], last.params)
    # the final loss and sample are from the best weights
    shown = best.files.completion().read_text().removesuffix("\n")
    assert shown == best.generate(num_tokens=SAMPLE_TOKENS, seed=0)
    texts = [call("generate", f"--weights={name}", "--num-tokens=60")[1] for name in ("best", "last")]
    assert texts[0] == best.generate(num_tokens=60, seed=0) + "\n" != texts[1]


# after an interrupt -------------------------------------------------------------------------------------


INTERRUPTS = [
    # the current step; the signals during it, or None: a KeyboardInterrupt; steps that are kept; evaluations
    (3, None, 3, [2]),
    *((step, [number], step + 1, [2] * (step >= 2)) for step, number in enumerate(SIGNALS)),
    (3, [signal.SIGINT, signal.SIGTERM], 3, [2]),
]


@needs_signals
@pytest.mark.parametrize(("step", "numbers", "steps", "evaluations"), INTERRUPTS)
def test_a_signal_ends_training_after_the_current_step_and_a_second_one_at_once(
    work, call, at_step, signals, step, numbers, steps, evaluations
):
    """An evaluation that is due then is skipped: it can be done later. The state equals that of a shorter run."""
    interrupts = [numbers]

    def interrupt(at, batch):
        if at == step and interrupts:
            if interrupts.pop() is None:
                raise KeyboardInterrupt
            for number in numbers:
                os.kill(os.getpid(), number)

    at_step(interrupt)
    settings = flags(num_steps=5, schedule="constant", warmup_steps=0)
    code, out, err = call("train", *settings)
    first = numbers[0] if numbers else signal.SIGINT
    by = "" if first == signal.SIGINT else f" by {first.name}"
    assert (code, err) == (128 + first, f"{STOPPING if numbers else ''}baby_xp: interrupted{by}\n")
    run, last = baby_xp.load(weights="last"), out.splitlines()[-1]
    assert last.startswith(f"stopped after step {steps}, with a checkpoint; to continue: ")
    assert suggestions(last) == [["resume", run.guid[:8]]]
    assert "whole validation part" not in out
    result = run.config["result"]
    assert (result["state"], result["reason"], result["steps"]) == ("stopped", "interrupted", steps)
    assert not run.files.completion().exists()
    assert not run.files.lock.exists()
    assert ([one["step"] for one in metrics_of(run.files)] if run.files.metrics.exists() else []) == evaluations
    assert call("train", "--path=whole", *settings, f"--num-steps={steps}")[0] == 0
    states = [load_file(one.files.state) for one in (run, baby_xp.load(path="whole"))]
    for name in ("params", "m", "v", "step"):
        np.testing.assert_array_equal(states[0][name], states[1][name], strict=True)


def test_an_interrupt_before_the_first_step_leaves_nothing(refused, at_step):
    def interrupt(step, batch):
        raise KeyboardInterrupt

    at_step(interrupt)
    refused("train", *flags(), words=("interrupted before the first step",), code=130)


def test_an_interrupt_outside_training_has_its_exit_code(work, call, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "load", interrupted)
    assert call("train", *flags()) == (130, "", "baby_xp: interrupted\n")
    assert not (work / "runs").exists()


@needs_signals
@pytest.mark.parametrize(("sample_tokens", "numbers", "steps"), [
    (10**9, [signal.SIGINT], 2), (0, [signal.SIGINT, signal.SIGTERM], 3),
], ids=["sample of an evaluation", "sample at the end"])  # fmt: skip
def test_a_sample_can_be_interrupted_and_no_step_is_lost(
    work, call, monkeypatch, signals, sample_tokens, numbers, steps
):
    """It may be of any length. The sample at the end is finished unless there is a second interrupt."""
    made, usual = [], Logits.next

    def interrupting(logits, texts):
        made.append(texts)
        for number in numbers if len(made) == 3 else ():
            os.kill(os.getpid(), number)
        return usual(logits, texts)

    with monkeypatch.context() as patch:
        patch.setattr(Logits, "next", interrupting)
        code, _, err = call("train", *flags(sample_tokens=sample_tokens))
    assert (code, err, len(made)) == (130, f"{STOPPING}baby_xp: interrupted\n", 3)
    assert listed() == [("stopped", steps)]
    assert call("resume", "--sample-tokens=0")[0] == 0
    assert listed() == [("done", 3)]
    assert len(baby_xp.load().files.completion().read_text()) == SAMPLE_TOKENS + len("\n")


# a diverging loss ---------------------------------------------------------------------------------------


@pytest.fixture
def diverging(call, work):
    """Run a command whose loss becomes NaN -> the line that reports it."""

    def run(*arguments: str) -> str:
        code, _, err = call(*arguments)
        assert code == 2
        note, line = err.splitlines()
        what = re.fullmatch(r"(the .*loss became nan at step \d+); searching for the cause from step \d+ on", note)
        assert line.startswith(f"baby_xp: {what[1]}; ")
        return line

    return run


@pytest.mark.parametrize(("num_steps", "workers", "existed"), [(1, 1, False), (30, 2, True)])
def test_a_run_that_diverges_ends_in_one_line_and_leaves_nothing(
    work, request, diverging, num_steps, workers, existed
):
    """At the first step the loss is still that of the initial weights, and only the validation loss shows it."""
    if existed:
        request.getfixturevalue("copied")
    before = all_of(work)
    line = diverging("train", "classic", *flags(lr=1e30, clip=0, num_steps=num_steps, workers=workers))
    what = "validation loss became nan at step 1" if num_steps == 1 else "loss became nan at step 2"
    assert line.startswith(f"baby_xp: the {what}; the largest gradient was that of ")
    parameter, norm = re.search(r"that of (\S+), norm ([\d.]+) in step 1; ", line).groups()
    assert re.fullmatch(r"(\w+\.)+\w+", parameter)
    assert 0.01 < float(norm) < 100
    assert all_of(work) == before


def test_only_possible_causes_are_named(work):
    quiet = {"clip": 1, "warmup_steps": 100, "lr": 1e30, "num_steps": 30}
    for settings, causes in (
        ({"clip": 0}, ["gradients that are not clipped (--clip 1)"]),
        ({"warmup_steps": 99}, ["too short a warm-up (raise --warmup-steps, 99)"]),
        ({}, []),
    ):
        with pytest.raises(BabyError) as caught:
            train(**{**quiet, **settings})
        expected = ["too high a learning rate (lower --lr, which was 1e+30)", *causes]
        assert str(caught.value).partition("usual causes: ")[2] == ", ".join(expected)


@pytest.mark.first_case
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_diverges_after_a_checkpoint_keeps_the_checkpoint(
    work, diverging, call, at_step, rate_times, workers
):
    kept = {}

    def note(step, batch):
        if step == 5:
            kept.update({path: path.read_bytes() for path in Path("runs/models").iterdir()})

    at_step(note)
    rate_times(4, 1e30)
    line = diverging("train", "classic", *flags(num_steps=30, eval_every=4, checkpoint_every=2, workers=workers))
    run = baby_xp.load(weights="last")
    assert line.startswith("baby_xp: the loss became nan at step 6; the largest gradient was that of ")
    kept_as = f"the last good checkpoint, of step 4, is kept: run {run.guid} can be resumed"
    assert f"in step 5; {kept_as}; usual causes: " in line
    assert {path: path.read_bytes() for path in (run.files.state, run.files.model)} == kept
    result = run.config["result"]
    assert (result["state"], result["steps"], result["best_step"]) == ("failed", 4, 4)
    assert f"baby_xp: {result['reason']}" == line
    assert [record["step"] for record in metrics_of(run.files)] == [4]
    assert result["reason"] in run.files.report.read_text(encoding="utf-8")
    assert not run.files.completion().exists()
    assert [(one.state, one.steps, one.num_steps) for one in baby_xp.list_runs()] == [("failed", 4, 30)]
    for weights in ("best", "last"):
        assert call("generate", "--num-tokens=3", f"--weights={weights}")[0] == 0
    rate_times(4, 1e-30)  # unchanged
    assert call("resume", "--num-steps=6")[0] == 0
    assert listed() == [("done", 6)]


def test_a_resumed_run_that_diverges_is_left_as_it_was(copied, diverging, call):
    before = {path: path.read_bytes() for path in copied.of_training}
    line = diverging("resume", "--num-steps=9", "--lr=1e30", "--clip=0")
    assert f"the last good checkpoint, of step 3, is kept: run {copied.guid} can be resumed" in line
    assert {path: path.read_bytes() for path in copied.of_training} == before
    assert call("resume", "--num-steps=9")[0] == 0  # with the previous rate
    assert listed() == [("done", 9)]


def test_a_resumed_run_without_a_step_is_left_as_it_was(work, diverging, call):
    """Its settings too: otherwise it could never be resumed."""
    run = train(max_minutes=1e-9)
    assert run.config["result"]["steps"] == 0
    before = {path: path.read_bytes() for path in run.files.of_training}
    diverging("resume", "--lr=1e30", "--clip=0", "--max-minutes=0")
    assert before == {path: path.read_bytes() for path in run.files.of_training}
    assert call("resume", "--max-minutes=0")[0] == 0
