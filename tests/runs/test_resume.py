"""A run that was stopped, killed or interrupted ends bit for bit like an uninterrupted one."""

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import case_of
from quick import quick
from safetensors.numpy import load_file
from small_runs import all_of, metrics_of

import baby_xp
from baby_xp import api
from baby_xp.errors import BabyError
from baby_xp.run import Run
from baby_xp.runs import store

pytestmark = pytest.mark.usefixtures("signals")
TEXT = "the cat sat on the mat.\nit sat and sat, and so did the hat. " * 30
TINY = {
    "n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 4, "num_steps": 24,
    "eval_every": 5, "checkpoint_every": 4, "dropout": 0.2, "sample_tokens": 5, "warmup_steps": 3, "lr": 1e-2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def slow_steps(at_step, monkeypatch):
    """Makes steps slow, so that the listeners below are called after every step."""
    time_of, steps = time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: time_of() + 2.0 * len(steps))
    at_step(lambda step, batch: steps.append(step))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8", newline="\n")
    return path


@pytest.fixture(scope="module")
def odd_end(tmp_path_factory) -> Path:
    """A text whose validation part is unlike the rest: the better a model knows the rest, the worse it does."""
    path = tmp_path_factory.mktemp("text") / "odd_end.txt"
    path.write_text("the cat sat on the mat. " * 90 + "tam eht no tas tac eht " * 10, encoding="utf-8")
    return path


class Stopper(baby_xp.Listener):
    """Stops a run from inside, in one of several ways, when it reaches a step or an evaluation."""

    def __init__(self, at: int, where: str = "progress", how: str = "signal"):
        self.at, self.where, self.how, self.done = at, where, how, False

    def progress(self, step, loss, tokens_per_second):
        self._stop("progress", step)

    def evaluated(self, record):
        self._stop("whole" if record["whole_validation"] else "evaluated", record["step"])

    def _stop(self, where, step):
        if where == self.where and step >= self.at and not self.done:
            self.done = True
            if self.how == "exception":
                raise KeyboardInterrupt
            os.kill(os.getpid(), {"signal": signal.SIGINT, "term": signal.SIGTERM}[self.how])


@dataclass(frozen=True)
class Ending:
    """Everything that must be equal bit for bit."""

    arrays: dict
    weights: np.ndarray
    metrics: list
    sample: str
    result: dict

    @classmethod
    def of(cls, run: Run) -> "Ending":
        metrics = [{**record, "seconds": 0} for record in metrics_of(run.files)]
        times = ("seconds", "tokens_per_second")
        result = {name: value for name, value in run.config["result"].items() if name not in times}
        arrays = {name: array.tobytes() for name, array in load_file(run.files.state).items()}
        sample = run.files.completion().read_text("utf-8")
        weights = api.load(run.guid, path=run.files.folder, backend="numpy").params
        return cls(arrays, weights.tobytes(), metrics, sample, result)


def train(text: Path, folder: Path, listener=None, **more) -> Run:
    settings = {**TINY, "backend": "numpy", "data": str(text), **more}
    return api.train("classic", path=folder, listener=listener, **settings)


_alone: dict[tuple, Ending] = {}


@pytest.fixture
def alone(text, tmp_path):
    """The end of an uninterrupted run."""

    def ending(**more) -> Ending:
        key = tuple(sorted(more.items()))
        if key not in _alone:
            _alone[key] = Ending.of(train(text, tmp_path / "alone", **more))
        return _alone[key]

    return ending


STOPS = [
    # workers, step, where, how
    (1, 7, "progress", "signal"), (1, 10, "evaluated", "exception"), (1, 24, "evaluated", "signal"),
    (1, 10, "progress", "signal"),  # an evaluation is due, and is skipped
    *(pytest.param(*stop, marks=pytest.mark.slow) for stop in (
        (2, 7, "progress", "signal"), (1, 1, "progress", "term"), (1, 10, "progress", "exception"),
        (1, 23, "progress", "signal"), (1, 20, "evaluated", "term"), (2, 23, "progress", "exception"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("workers", "at", "where", "how"), STOPS)
def test_a_stopped_run_ends_like_an_uninterrupted_one(text, tmp_path, alone, workers, at, where, how):
    stopped = train(text, tmp_path, Stopper(at, where, how), workers=workers)
    result = stopped.config["result"]
    assert (result["state"], result["reason"], result["steps"]) == ("stopped", "interrupted", at)
    assert Ending.of(api.resume(path=tmp_path)) == alone(workers=workers)


def test_a_run_may_be_stopped_many_times(text, tmp_path, alone):
    train(text, tmp_path, Stopper(3), workers=1)
    for at in (6, 11, 12, 19):
        assert api.resume(path=tmp_path, listener=Stopper(at)).config["result"]["state"] == "stopped"
    assert Ending.of(api.resume(path=tmp_path)) == alone(workers=1)


def test_a_killed_run_resumes_exactly(text, tmp_path, alone, at_step):
    """test_machine.py kills at random moments."""

    copies = {step: tmp_path / f"killed before {step}" for step in (0, 4, 6, 23)}

    def note(step, batch):
        if step in copies and not copies[step].exists():
            shutil.copytree(tmp_path / "runs", copies[step])

    at_step(note)
    train(text, tmp_path / "runs", workers=1)
    for folder in copies.values():
        assert [run.state for run in api.list_runs(folder)] == ["stopped"]
        assert Ending.of(api.resume(path=folder)) == alone(workers=1)


@pytest.mark.first_case
@pytest.mark.parametrize("more", [
    {"num_steps": None, "num_epochs": 1, "stride": 40},
    {"accumulate": 2, "batch_size": 2},
    {"dtype": "float64", "c_attention": "moh", "c_network": "moe", "c_sequence": "post"},
    {"tokenizer": "byte", "c_model": "modern", "logit_cap": 15, "smear": True},
    {"optimizer": "muon", "schedule": "linear", "accumulate": 2, "batch_size": 2},
    {"optimizer": "muon", "workers": 2},
], ids=["epochs", "accumulation", "float64 post moh moe", "bytes smear", "muon", "muon by two"])  # fmt: skip
def test_runs_with_other_settings_resume_exactly(text, tmp_path, alone, more):
    more = {"workers": 1, **more}
    train(text, tmp_path, Stopper(9), **more)
    assert Ending.of(api.resume(path=tmp_path)) == alone(**more)


@pytest.mark.parametrize("patience", [0, 3])
def test_the_best_weights_survive_a_later_checkpoint_that_is_worse(odd_end, tmp_path, patience):
    more = {"workers": 1, "lr": 0.1, "patience": patience, "num_steps": 40}
    whole = Ending.of(train(odd_end, tmp_path / "alone", **more))
    assert whole.result["reason"] == ("patience" if patience else "steps")
    train(odd_end, tmp_path / "runs", Stopper(whole.result["steps"] - 3), **more)
    resumed = api.resume(path=tmp_path / "runs")
    assert resumed.config["result"]["best_step"] < resumed.config["result"]["steps"] - 3
    assert not np.array_equal(resumed.params, api.load(path=tmp_path / "runs", weights="last").params)
    assert Ending.of(resumed) == whole


@pytest.mark.parametrize("name", ["torch", "array-api-strict", "jax", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_every_backend_resumes_exactly(text, tmp_path, name):
    case_of({"array-api-strict": "strict"}.get(name, name), "float32")  # skips the test if it is not available
    small = {"num_steps": 4, "eval_every": 3, "sample_tokens": 0, "seed": 7, "backend": name}
    with quick(sample_tokens=1):  # slow if every operation is compiled
        whole = Ending.of(train(text, tmp_path / "alone", **small))
        train(text, tmp_path / "runs", Stopper(2), **small)
        assert Ending.of(api.resume(path=tmp_path / "runs")) == whole


def test_the_time_limit_is_per_session_and_the_run_resumes_exactly(text, tmp_path, alone):
    stopped = train(text, tmp_path, workers=1, max_minutes=1e-9)
    assert (stopped.config["result"]["reason"], stopped.config["result"]["steps"]) == ("time", 0)
    done = api.resume(path=tmp_path, max_minutes=0)
    assert Ending.of(done) == alone(workers=1)


def test_a_resumed_run_interrupted_before_its_first_step_has_not_failed(text, tmp_path, alone):
    class Impatient(baby_xp.Listener):
        def started(self, session, step):
            os.kill(os.getpid(), signal.SIGINT)

    train(text, tmp_path, workers=1, max_minutes=1e-9)
    with pytest.raises(BabyError, match="before the first step"):
        api.resume(path=tmp_path, max_minutes=0, listener=Impatient())
    assert [run.state for run in api.list_runs(tmp_path)] == ["stopped"]
    assert Ending.of(api.resume(path=tmp_path, max_minutes=0)) == alone(workers=1)


# what can be changed, and what cannot -------------------------------------------------------------------


def test_a_finished_run_continues_with_more_steps(text, tmp_path, alone):
    train(text, tmp_path, workers=1, schedule="constant", num_steps=12)
    for more in ({}, {"num_steps": 1}, {"num_steps": 12}):
        with pytest.raises(BabyError, match="has finished all 12 steps; to continue, raise --num-steps"):
            api.resume(path=tmp_path, **more)
    longer, whole = api.resume(path=tmp_path, num_steps=24), alone(workers=1, schedule="constant")
    assert load_file(longer.files.state)["params"].tobytes() == whole.arrays["params"]


def test_a_run_that_ended_early_says_how_to_continue(odd_end, tmp_path):
    ended = train(odd_end, tmp_path, workers=1, patience=1, lr=0.1, num_steps=40)
    assert ended.config["result"]["reason"] == "patience"
    with pytest.raises(BabyError, match="change --patience"):
        api.resume(path=tmp_path)
    assert api.resume(path=tmp_path, patience=0).config["result"]["reason"] == "steps"


def test_a_run_of_epochs_continues_for_a_number_of_steps(text, tmp_path):
    done = train(text, tmp_path, workers=1, num_steps=None, num_epochs=1, stride=100)
    more = done.config["result"]["steps"] + 2
    assert api.resume(path=tmp_path, num_steps=more).config["result"]["steps"] == more


def test_a_resumed_run_keeps_its_start_time(text, tmp_path):
    files = train(text, tmp_path, Stopper(3), workers=1, num_steps=4).files
    then = "2001-02-03T04:05:06+00:00"
    store.write_sealed(files.config, {**store.read_sealed(files.config), "started": then, "written": then})
    done = api.resume(path=tmp_path)
    assert done.config["started"] == then < done.config["written"]


def test_a_run_resumed_on_another_backend_drops_its_workers(text, tmp_path):
    case_of("strict")  # skips the test if it is not available
    train(text, tmp_path, Stopper(3), workers=2, num_steps=4)
    done = api.resume(path=tmp_path, backend="array-api-strict")
    assert (done.config["result"]["state"], done.config["place"]["workers"]) == ("done", 1)


def test_a_run_resumes_on_its_device(text, tmp_path):
    case_of("strict device1")
    place = {"backend": "array-api-strict", "device": "device1"}
    stopped = train(text, tmp_path, Stopper(1), num_steps=2, **place)
    done = api.resume(path=tmp_path)
    for part in ("place", "machine"):
        assert done.config[part] == stopped.config[part]
        assert "device1" in str(done.config[part]["device"]).lower()


def test_a_line_of_the_metrics_is_written_before_the_listener_gets_it(text, tmp_path):
    """The listener that gets the evaluation may kill the run."""
    lines = []

    class Reader(baby_xp.Listener):
        def evaluated(self, record):
            (path,) = tmp_path.glob("outputs/metrics_*")
            lines.append((record, json.loads(path.read_text("ascii").splitlines()[-1])))

    train(text, tmp_path, Reader(), workers=1, num_steps=10)
    assert len(lines) == 3
    assert all(heard == written for heard, written in lines)


def test_bad_settings_are_refused_and_the_run_resumes_without_them(text, tmp_path, alone):
    train(text, tmp_path, Stopper(5), workers=1)
    for wrong in ({"num_steps": 2}, {"num_steps": "9"}, {"num_steps": None}, {"workers": 0}):
        with pytest.raises(BabyError, match=next(iter(wrong))):
            api.resume(path=tmp_path, **wrong)
    with pytest.raises(BabyError, match="n_emb cannot be changed"):
        api.resume(path=tmp_path, n_emb=16)
    assert Ending.of(api.resume(path=tmp_path)) == alone(workers=1)


def test_missing_metrics_are_restored(text, tmp_path, alone):
    train(text, tmp_path, Stopper(12), workers=1).files.metrics.unlink()
    assert Ending.of(api.resume(path=tmp_path)) == alone(workers=1)


def test_a_changed_text_is_refused(text, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text(TEXT, encoding="utf-8", newline="\n")
    train(own, tmp_path / "runs", Stopper(3), workers=1)
    before = all_of(tmp_path / "runs")
    own.write_text(TEXT.replace("cat", "dog", 1), encoding="utf-8", newline="\n")
    with pytest.raises(BabyError, match=r"no longer the text that the run was trained on.*--data"):
        api.resume(path=tmp_path / "runs")
    assert all_of(tmp_path / "runs") == before
    assert api.resume(path=tmp_path / "runs", data=str(text)).config["result"]["state"] == "done"
