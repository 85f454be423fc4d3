"""Faults that no other test noticed when they were put into the program by hand: one test for each."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import case_of

import baby_xp.files
import baby_xp.sitting
from baby_xp import api, evaluation, params, quality
from baby_xp.config import GPTConfig, TrainConfig
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.runs import lock
from baby_xp.runs.lock import Lock
from baby_xp.task import Task
from baby_xp.text.batches import RandomWindows, consecutive_windows
from baby_xp.text.corpus import Corpus
from baby_xp.text.tokenizer import create
from baby_xp.training import checkpoint, diagnosis, loop
from baby_xp.training.stop import Stop

TEXT = "the cat sat on the mat.\nit sat and sat, and so did the hat. " * 30
TINY = {
    "n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 4, "num_steps": 6,
    "eval_every": 2, "checkpoint_every": 1, "sample_tokens": 0, "warmup_steps": 3, "lr": 1e-2,
    "backend": "numpy", "workers": 1,
}  # fmt: skip
MODEL = Model(GPTConfig(n_ctx=4, n_emb=4, head_size=4, n_heads=2, n_layers=1, dropout=0.1), 11)
IDS = np.random.default_rng(0).integers(0, 11, 300)
BACKEND = case_of("numpy").backend


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(baby_xp.sitting, "SAMPLE_TOKENS", 5)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8", newline="\n")
    return path


class StopAt(api.Silent):
    def __init__(self, step: int):
        self.step = step

    def evaluated(self, record):
        if record["step"] == self.step:
            raise KeyboardInterrupt


def train(text: Path, folder: Path, **more):
    return api.train("baby", path=folder, **{**TINY, "data": str(text), **more})


def settings(**values) -> TrainConfig:
    default = {
        "batch_size": 3, "num_steps": 6, "eval_every": 2, "warmup_steps": 2, "sample_tokens": 0,
        "checkpoint_minutes": 0.0, "dtype": "float64",
    }  # fmt: skip
    return TrainConfig(**{**default, **values})


class Trial:
    """A sitting of the loop alone, where every part of the work can be made to take its time."""

    def __init__(self, config: TrainConfig, start=None):
        self.config, self.start = config, start or checkpoint.first(MODEL, config)
        self.windows = RandomWindows(IDS[:250], 4, config.step_size, 0)
        self.before_step = self.before_validation = self.before_keeping = lambda: None
        self.kept, self.rates = [], []

    def batch(self, step):
        self.before_step()
        return self.windows.batch(step)

    def validation(self):
        self.before_validation()
        return consecutive_windows(IDS[250:], 4, 3)

    def keep(self, moment):
        self.before_keeping()
        self.kept.append(moment)

    def progress(self, step, loss, tokens_per_second):
        self.rates.append(tokens_per_second)

    def evaluated(self, record):
        pass

    def fit(self):
        task = Task("text", None, self, self.config.num_steps, self.validation, 49, {})
        return loop.fit(BACKEND, MODEL, self.config, task, self.start, self, self.keep, Stop())


@pytest.fixture
def after(monkeypatch):
    """The loop's time, which goes on only where it is told to: after(seconds) is what tells it."""

    class Clock:
        now = 1000.0

        def perf_counter(self):
            return self.now

        def after(self, seconds: float):
            def go_on():
                self.now += seconds

            return go_on

    monkeypatch.setattr(loop, "time", clock := Clock())
    return clock.after


# the loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["before_validation", "before_keeping"])
def test_the_speed_is_that_of_the_steps_alone(after, part):
    trial = Trial(settings(checkpoint_every=3))
    trial.before_step = after(0.25)
    setattr(trial, part, after(100.0))
    result = trial.fit()
    np.testing.assert_allclose([*trial.rates, result.tokens_per_second], 12 / 0.25)


def test_the_first_speed_of_a_later_sitting_is_its_own(after):
    first = Trial(settings(checkpoint_every=4))
    first.fit()
    again = Trial(settings(), first.kept[0])
    again.before_step = after(0.25)
    again.fit()
    np.testing.assert_allclose(again.rates, 12 / 0.25)


def test_an_interrupt_before_the_new_state_is_kept_gives_the_step_up(monkeypatch):
    """The step does not count then, nor does its loss wait to be read."""

    def keep(run, state):
        if state["step"][0] == 4:
            raise KeyboardInterrupt
        run.kept_state = state

    monkeypatch.setattr(loop._Run, "state", property(lambda run: run.kept_state, keep), raising=False)
    result = Trial(settings(eval_every=100)).fit()
    assert (result.reason, result.checkpoint.step, result.checkpoint.progress["count"]) == ("interrupted", 3, 3)


@pytest.mark.parametrize("step", [0, 5])
def test_the_state_on_the_device_has_the_seed_of_the_run(step):
    """Dropout follows from it."""
    start = checkpoint.first(MODEL, config := settings(seed=7))
    start.state["step"][0] = step
    assert checkpoint.on_device(BACKEND, MODEL, config, start)["seed"].tolist() == [7]


# the cause of a burst -----------------------------------------------------------------------------------


class Computing:
    """In the place of workers: gives gradients as it is told, and notes the sizes of the batches."""

    def __init__(self, *values: float):
        self.values, self.sizes = iter(values), []

    def loss_and_gradients(self, xp, model, state, batch, n_targets=None):
        self.sizes.append(len(batch.inputs))
        return np.array([3.0]), np.full(model.n_parameters, next(self.values))


def found(config: TrainConfig, computing: Computing, last: int):
    start = checkpoint.first(MODEL, config)
    task = Task("text", None, Trial(config), config.num_steps, None, 49, {})
    return diagnosis.largest_gradient(BACKEND, MODEL, config, task, start, last, computing)


def test_where_all_gradients_burst_at_once_the_step_before_tells_more():
    finding = found(settings(), Computing(1e-3, np.nan), 2)
    assert finding.step == 1
    assert np.isfinite(finding.norm)


def test_where_all_gradients_burst_in_the_first_step_that_is_told():
    assert found(settings(), Computing(np.nan), 2).step == 1


def test_the_cause_is_looked_for_in_parts_as_small_as_those_of_training():
    computing = Computing(*[1e-3] * 8)
    found(settings(accumulate=4), computing, 2)
    assert computing.sizes == [3] * 8


# growing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_grown_model_keeps_every_bit_and_draws_the_rest_from_its_seed(dtype):
    larger = Model(MODEL.config, 13)
    old = params.draw(MODEL.spec, 0, "float64").astype(dtype)
    grown = params.grown(larger.spec, 7, MODEL.layout, old)
    before, now = MODEL.layout.unpack(np, old), larger.layout.unpack(np, grown)
    drawn = larger.layout.unpack(np, params.draw(larger.spec, 7, dtype))
    np.testing.assert_array_equal(now["wte"]["weight"][:11], before["wte"]["weight"], strict=True)
    np.testing.assert_array_equal(now["wte"]["weight"][11:], drawn["wte"]["weight"][11:], strict=True)


@pytest.mark.parametrize(("dtype", "other"), [("float32", "float64"), ("float64", "float32")])
def test_a_run_finetuned_in_another_precision_is_in_that_from_its_start(text, tmp_path, dtype, other):
    train(text, tmp_path / "runs", num_steps=1, dtype=dtype)
    kept = []

    class Onlooker(api.Silent):
        def started(self, sitting, step):
            for weights in ("best", "last"):
                kept.append(api.load(path=tmp_path / "runs", backend="numpy", weights=weights).params.dtype)

    more = {"path": tmp_path / "runs", "data": str(text), "backend": "numpy", "num_steps": 1}
    api.finetune(**more, dtype=other, listener=Onlooker())
    assert kept == [np.dtype(other)] * 2


def test_finetuning_begins_at_the_base_runs_peak_rate_with_limits_of_its_own(text, tmp_path):
    base = train(
        text, tmp_path / "runs", num_steps=None, num_epochs=1, stride=400, max_minutes=9.0, base_batch_size=16
    )
    chosen = api.finetuning(base).train
    peak = api.settings_of(base.config, "config").train.peak_lr
    assert peak != TINY["lr"]
    assert (chosen.lr, chosen.peak_lr, chosen.min_lr) == (peak, peak, peak / 10)
    assert (chosen.num_steps, chosen.num_epochs, chosen.max_minutes) == (api.FINETUNE_STEPS, None, 0.0)


# going on -----------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_keeps_the_time_of_its_beginning(text, tmp_path, monkeypatch):
    monkeypatch.setattr(baby_xp.sitting, "_now", lambda: "then")
    train(text, tmp_path / "runs", listener=StopAt(4))
    monkeypatch.setattr(baby_xp.sitting, "_now", lambda: "now")
    done = api.resume(path=tmp_path / "runs")
    assert (done.config["started"], done.config["written"]) == ("then", "now")


@pytest.mark.parametrize("num_steps", [1, 6])
def test_a_run_that_is_done_does_not_go_on_without_more_steps(text, tmp_path, num_steps):
    train(text, tmp_path / "runs")
    with pytest.raises(BabyError, match="is done with all its 6 steps; to go on give more --num-steps"):
        api.resume(path=tmp_path / "runs", num_steps=num_steps)


def test_a_run_of_epochs_goes_on_for_as_many_steps_as_are_asked_for(text, tmp_path):
    done = train(text, tmp_path / "runs", num_steps=None, num_epochs=1, stride=100)
    more = done.config["result"]["steps"] + 2
    assert api.resume(path=tmp_path / "runs", num_steps=more).config["result"]["steps"] == more


def test_on_another_backend_a_run_goes_on_without_the_workers_of_the_first(text, tmp_path):
    case_of("strict")  # skips where it is absent
    train(text, tmp_path / "runs", listener=StopAt(4), workers=2)
    done = api.resume(path=tmp_path / "runs", backend="array-api-strict")
    assert (done.config["result"]["state"], done.config["place"]["workers"]) == ("done", 1)


def test_a_run_goes_on_on_its_device(text, tmp_path):
    case_of("strict device1")
    place = {"backend": "array-api-strict", "device": "device1", "workers": None}
    stopped = train(text, tmp_path / "runs", listener=StopAt(4), **place)
    done = api.resume(path=tmp_path / "runs")
    for part in ("place", "machine"):
        assert done.config[part] == stopped.config[part]
        assert "device1" in str(done.config[part]["device"]).lower()


def test_a_line_of_the_metrics_is_written_before_it_is_told(text, tmp_path):
    """Whoever hears of a measurement may stop the run."""
    stopped = train(text, tmp_path / "runs", listener=StopAt(4))
    lines = stopped.files.metrics.read_text("ascii").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_where_nothing_can_be_written_any_more_the_first_failure_is_told(text, tmp_path, monkeypatch):
    """Not that the report of it could not be written either."""
    replace = os.replace

    def full(source, target):
        if list(tmp_path.glob("runs/outputs/metrics_*")):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BabyError, match=r"state_.* cannot be written \(No space left on device\)"):
        train(text, tmp_path / "runs")


# files --------------------------------------------------------------------------------------------------


def test_what_others_write_is_synced_before_the_rename_too(tmp_path, monkeypatch):
    """As arrays are: safetensors writes them."""
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    baby_xp.files.write(tmp_path / "a", lambda path: path.write_bytes(b"12345"))
    assert order == [5, "replace"]


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no file that is open")
def test_the_file_of_a_lock_is_removed_while_it_is_held(tmp_path, monkeypatch):
    """Else another process may have locked it in between, and a third would then lock a new one."""
    held, unlink = Lock(tmp_path / "lock"), Path.unlink
    assert held.acquire()
    taken = []

    def watched(path):
        taken.append(Lock(path).acquire(patience=0))
        unlink(path)

    monkeypatch.setattr(Path, "unlink", watched)
    held.release()
    assert taken == [False]


def test_asking_for_a_lock_does_not_wait_for_it(tmp_path, monkeypatch):
    held, waits = Lock(tmp_path / "lock"), []
    assert held.acquire()
    sleep = lock.time.sleep
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: (waits.append(seconds), sleep(seconds)))
    assert Lock(tmp_path / "lock").is_held()
    held.release()
    assert sum(waits) < lock.PATIENCE / 4


@pytest.mark.parametrize("size", [0, 1, len(TEXT) + 1])
def test_ids_of_another_length_are_written_anew(text, tmp_path, size):
    ids = Corpus.from_file(text, "char", tmp_path / "corpora").ids.copy()
    (path,) = (tmp_path / "corpora").iterdir()
    path.unlink()
    path.write_bytes(bytes(size))
    np.testing.assert_array_equal(Corpus.from_file(text, "char", tmp_path / "corpora").ids, ids)
    assert path.stat().st_size == ids.nbytes + 32  # the hash after them


# measuring ----------------------------------------------------------------------------------------------


def test_a_character_that_lies_in_two_chunks_of_bytes_is_one(monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 3)
    tokenizer = create("byte", iter([]))
    written = "Übermut 😀 tut"
    assert "".join(evaluation._text(tokenizer, tokenizer.encode(written))) == written


def test_what_was_generated_is_compared_with_the_training_part_alone(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat " * 36 + "no tam eht tas tac eht " * 4, encoding="utf-8")
    run = train(path, tmp_path / "runs", num_steps=1)
    seen = []
    for name in ("known_words", "copied_ngrams"):
        monkeypatch.setattr(quality, name, lambda text, known, *more: seen.append("".join(known)))
    run.evaluate(num_tokens=1)
    written = path.read_text("utf-8")
    assert seen == [written[: int(0.9 * len(written))]] * 2


def test_a_run_measures_its_text_from_another_folder(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(Path("text.txt"), tmp_path / "runs", num_steps=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run.evaluate(num_tokens=1).loss == pytest.approx(run.config["result"]["val_loss"], rel=1e-6)
