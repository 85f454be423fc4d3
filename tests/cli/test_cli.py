"""The command line: what cannot be used ends in one line and leaves nothing; what can, does what it says."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLE_TOKENS
from safetensors.numpy import load_file

import baby_xp.files
import baby_xp.session
from baby_xp.arrays import params, registry
from baby_xp.cli import COMMANDS, main
from baby_xp.config import EquationConfig, EquationData
from baby_xp.errors import BabyError, BackendUnavailable
from baby_xp.inference.generate import Logits
from baby_xp.presets import PRESETS
from baby_xp.runs import state_file, store
from baby_xp.runs.store import RunFiles
from baby_xp.text import dataset
from baby_xp.text.batches import RandomWindows
from baby_xp.text.tokenizer import tokenizer_from_dict
from baby_xp.training import loop, schedules
from baby_xp.training.signals import Stop

TINY = {
    "n-ctx": 8, "n-emb": 8, "head-size": 8, "n-heads": 2, "n-layers": 1, "batch-size": 4, "num-steps": 3,
    "eval-every": 2, "sample-tokens": 5, "backend": "numpy",
}  # fmt: skip
TEXT = "the cat sat on the mat.\nit sat and sat. " * 25


def flags(**values) -> list[str]:
    """The tiny sizes with some of them replaced, as arguments."""
    both = {**TINY, **{name.replace("_", "-"): value for name, value in values.items()}}
    return [f"--{name}={value}" for name, value in both.items()]


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """The current folder, with a text in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    return tmp_path


@pytest.fixture
def call(capsys):
    """Run a command -> exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def all_of(folder: Path) -> dict[str, bytes | None]:
    """All files with what they hold, and all folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


@pytest.fixture
def refused(call, work):
    """Run a command that must fail: one line, exit code 2, and the folder is as it was. -> the line."""

    def run(*arguments: str, words: tuple[str, ...] = (), code: int = 2) -> str:
        before = all_of(work)
        found, _, err = call(*arguments)
        assert found == code
        assert err.startswith("baby_xp: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        for word in words:
            assert word in err
        assert all_of(work) == before
        return err

    return run


def a_run(folder: Path, **more) -> str:
    """Train something tiny on text.txt -> its GUID."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["train", "baby", f"--path={folder}", *flags(data=folder.parent / "text.txt", **more)]) == 0
    return next(line for line in out.getvalue().splitlines() if line.startswith("run ")).split()[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> RunFiles:
    """One run, which no test changes."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    guid = a_run(folder / "runs")
    return RunFiles(folder / "runs", guid)


# input that cannot be used: training --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nosuchname", None, ("there is no file nosuchname", "nursery, equations, shakespeare")),
        ("latin1.txt", b"caf\xe9 " * 99, ("latin1.txt is not UTF-8", "0xe9 at offset 3")),
        ("short.txt", b"12345678", ("short.txt is too short", "--n-ctx 8 needs 9", "at least 11 tokens")),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_text_that_cannot_be_used(work, refused, trained, name, content, words):
    """Into a new folder, and into one with a run. test_corpus.py has the other texts."""
    if content is not None:
        (work / name).write_bytes(content)
    refused("train", "--path=new", *flags(data=name), words=words)
    assert not (work / "new").exists()
    shutil.copytree(trained.folder, work / "runs")
    refused("train", "--path=runs", *flags(data=name), words=words)


BAD_SETTINGS = [
    # test_config.py has every setting, test_settings.py what no flag can be
    ("num-steps", "-3", ("num_steps", "at least 1", "-3")),
    ("lr", "nan", ("lr", "above 0", "nan")),
    ("n-heads", "3", ("n_heads 3 does not divide head_size 8", "multiple")),
    ("n-emb", str(10**30), ("n_emb", "at most")),
    ("n-emb", str(2**31 - 1), ("parameters fits no memory",)),
    ("workers", "0", ("workers must be a whole number of at least 1, not 0",)),
    ("device", "mars", ("numpy", "no device 'mars'", "leave out --device or say --device cpu")),
    ("backend", "tensorflow", ("unknown backend 'tensorflow'", "choose one of auto, numpy, cupy")),
    ("n-hidden", "3", ("--n-hidden",)),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD_SETTINGS)
def test_a_setting_that_cannot_be_used(refused, name, value, words):
    refused("train", "--path=runs", *flags(data="text.txt", **{name: value}), words=words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "toddler"], ("unknown preset 'toddler'", *PRESETS)),
        (["train", "baby", "equations"], ("equations", "baby_xp train baby --help")),
        (["fly"], ("unknown command 'fly'", *COMMANDS)),
        ([""], ("unknown command ''",)),
        (["presets", "all"], ("presets takes no arguments, not 'all'",)),
        (["backends", "--numpy", "x"], ("backends takes no arguments, not '--numpy x'",)),
        (["train", "equations", "--held-out=4*4"], ("digit+digit", "4*4")),
        (["train", "equations", "--data=text.txt"], ("data of this preset is equations", "leave out --data")),
        (["train", "baby", "--data=equations"], ("equations have presets of their own",)),
        (["train", "equations", "--n-layers=2"], ("--n-layers",)),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used(refused, arguments, words):
    refused(*arguments, words=words)


def works(name: str) -> bool:
    try:
        registry.load(name)
    except BackendUnavailable:
        return False
    return True


def test_a_library_that_is_missing_is_named_with_the_remedy(refused, monkeypatch):
    libraries = {
        "torch": ("torch", "pip install -e '.[torch]'"),
        "jax": ("jax", "pip install -e '.[jax]'"),
        "cupy": ("cupy", "pip install -e '.[cuda13]', or '.[cuda12]'"),
        "array-api-strict": ("array_api_strict", "pip install array-api-strict"),
    }
    for name, (module, remedy) in libraries.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(BackendUnavailable) as caught:
            registry.load(name)
        words = (f"backend '{name}' cannot work here", "cannot be imported", remedy)
        assert all(word in str(caught.value) for word in words)
    refused("train", "--path=runs", *flags(data="text.txt", backend=name), words=words)


def test_a_message_of_several_lines_becomes_one(call, monkeypatch):
    def fail(arguments):
        raise BabyError("one\n  two")

    monkeypatch.setitem(COMMANDS, "presets", fail)
    assert call("presets") == (2, "", "baby_xp: one two\n")


def test_workers_are_for_numpy(refused):
    pytest.importorskip("array_api_strict", exc_type=ImportError)
    refused(
        "train", "--path=runs", *flags(data="text.txt", backend="array-api-strict", workers=2),
        words=("workers are processes of the numpy backend", "leave out --workers"),
    )  # fmt: skip


@pytest.mark.parametrize(("path", "advice"), [
    ("text.txt/runs", "name another place with --path"), ("a" * 300, "choose a shorter name"),
], ids=lambda p: p[:14])  # fmt: skip
def test_a_folder_that_cannot_be_written(refused, path, advice):
    words = (f"{path[:8]}", "cannot be written", advice)
    refused("train", f"--path={path}", *flags(data="text.txt"), words=words)


@pytest.mark.parametrize("where", ["draw", "evaluate"])
def test_too_little_memory_is_one_line(refused, monkeypatch, where):
    def fail(*args, **kwargs):
        raise MemoryError("Unable to allocate\n6 TiB" if where == "draw" else "")

    target = (params, "draw") if where == "draw" else (baby_xp.training.loop, "mean_loss")
    monkeypatch.setattr(*target, fail)
    reason = {"draw": "Unable to allocate 6 TiB", "evaluate": "an array did not fit"}[where]
    words = (f"not enough memory ({reason})", "choose a smaller model or batch")
    refused("train", "--path=runs", *flags(data="text.txt"), words=words)


@pytest.fixture
def burst(call, work):
    """Run a command whose loss stops being a number -> the line that says so."""

    def run(*arguments: str) -> str:
        code, _, err = call(*arguments)
        assert code == 2
        note, line = err.splitlines()
        what = re.fullmatch(r"(the .*loss became nan at step \d+); looking for its cause from step \d+ on", note)
        assert line.startswith(f"baby_xp: {what[1]}; ")
        return line

    return run


@pytest.mark.parametrize(("num_steps", "workers", "existed"), [(1, 1, False), (30, 2, True)])
def test_a_loss_that_is_not_finite_ends_in_one_line_and_leaves_nothing(
    work, trained, burst, num_steps, workers, existed
):
    """At its first step the loss is still that of the first weights, and only the validation shows it."""
    if existed:
        shutil.copytree(trained.folder, work / "runs")
    before = all_of(work)
    settings = flags(data="text.txt", lr=1e30, clip=0, num_steps=num_steps, workers=workers)
    line = burst("train", "--path=runs", *settings)
    what = "validation loss became nan at step 1" if num_steps == 1 else "loss became nan at step 2"
    assert line.startswith(f"baby_xp: the {what}; the largest gradient was that of ")
    parameter, norm = re.search(r"that of (\S+), norm ([\d.]+) in step 1; ", line).groups()
    assert parameter in baby_xp.api.Model(PRESETS["baby"].model, 14).layout.paths
    assert 0.01 < float(norm) < 100
    causes = "too high a learning rate (lower --lr, which was 1e+30), gradients that are not clipped (--clip 1)"
    assert line.endswith(f"what usually causes it: {causes}")
    assert all_of(work) == before


def test_only_what_may_be_the_cause_is_told(work):
    quiet = {"clip": 1, "warmup_steps": 100, "lr": 1e30, "num_steps": 30}
    for settings, told in (
        ({"clip": 0}, "gradients that are not clipped (--clip 1)"),
        ({"warmup_steps": 99}, "too short a warm-up (raise --warmup-steps, 99)"),
        ({}, ""),
    ):
        with pytest.raises(BabyError) as caught:
            baby_xp.api.train("baby", **text_settings(**{**quiet, **settings}))
        expected = ["too high a learning rate (lower --lr, which was 1e+30)", *filter(None, [told])]
        assert str(caught.value).partition("what usually causes it: ")[2] == ", ".join(expected)


@pytest.mark.first_case
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_bursts_after_a_checkpoint_is_kept_as_of_that(work, burst, call, monkeypatch, workers):
    usual, kept = schedules.learning_rate, {}
    rate = lambda xp, step, *more: usual(xp, step, *more) * (1e30 if step[0] == 4 else 1)  # noqa: E731
    monkeypatch.setattr(schedules, "learning_rate", rate)
    keep = baby_xp.session.TrainingSession.keep

    def noted(session, moment):
        keep(session, moment)
        for path in (session.files.state, session.files.model):
            kept[moment.step, path] = path.read_bytes()

    monkeypatch.setattr(baby_xp.session.TrainingSession, "keep", noted)
    settings = flags(data="text.txt", num_steps=30, eval_every=4, checkpoint_every=2, workers=workers)
    line = burst("train", "--path=runs", *settings)
    run = baby_xp.api.load(path="runs", weights="last")
    assert line.startswith("baby_xp: the loss became nan at step 6; the largest gradient was that of ")
    kept_as = f"the last good checkpoint, of step 4, is kept: run {run.guid} can be resumed"
    assert f"in step 5; {kept_as}; what usually" in line
    assert sorted({step for step, _ in kept}) == [0, 2, 4]
    for path in (run.files.state, run.files.model):
        assert path.read_bytes() == kept[4, path]
    result = run.config["result"]
    assert (result["state"], result["steps"], result["best_step"]) == ("failed", 4, 4)
    assert f"baby_xp: {result['reason']}" == line
    assert [record["step"] for record in metrics_of(run.files)] == [4]
    assert result["reason"] in run.files.report.read_text(encoding="utf-8")
    assert not run.files.completion().exists()
    assert [(one.state, one.steps, one.num_steps) for one in baby_xp.api.list_runs("runs")] == [("failed", 4, 30)]
    for weights in ("best", "last"):
        assert call("generate", "--path=runs", "--num-tokens=3", f"--weights={weights}")[0] == 0
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert call("resume", "--path=runs", "--num-steps=6")[0] == 0
    assert [(one.state, one.steps) for one in baby_xp.api.list_runs("runs")] == [("done", 6)]


def test_a_rate_that_bursts_a_run_that_goes_on_leaves_it_as_it_was(work, burst, call):
    guid = a_run(work / "runs")
    files = RunFiles(work / "runs", guid)
    before = {path: path.read_bytes() for path in files.of_training}
    line = burst("resume", "--path=runs", "--num-steps=9", "--lr=1e30", "--clip=0")
    assert f"the last good checkpoint, of step 3, is kept: run {guid} can be resumed" in line
    assert {path: path.read_bytes() for path in files.of_training} == before
    assert call("resume", "--path=runs", "--num-steps=9")[0] == 0  # with the rate of before
    assert baby_xp.api.load(guid, path="runs").config["result"]["state"] == "done"


# input that cannot be used: generation ------------------------------------------------------------------


@pytest.fixture
def on_trained(refused, trained):
    """Generation from the trained run that must fail; the run stays as it is."""

    def run(*arguments: str, words: tuple[str, ...] = ()) -> str:
        before = all_of(trained.folder)
        line = refused("generate", *arguments, f"--path={trained.folder}", "--backend=numpy", words=words)
        assert all_of(trained.folder) == before
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # test_sampling.py and test_python_api.py have every setting
        (["--temperature=0"], ("temperature must be a number above 0, not 0", "--greedy")),
        (["--num-tokens=0"], ("num_tokens must be a whole number of at least 1, not 0",)),
        (["--top-k=1.5"], ("--top-k", "1.5", "baby_xp generate --help")),
        (["--prompt=the cat\nsat\u20ac"], ("prompt", "U+20AC", "line 2", "column 4")),
        (["--prompt=\udcff"], ("prompt", "U+DCFF")),
        (["--device=mars"], ("no device 'mars'",)),
        (["--weights=first"], ("--weights must be one of best, last, not 'first'",)),
    ],
    ids=ascii,
)
def test_a_generation_that_cannot_be(on_trained, arguments, words):
    on_trained("last", *arguments, words=words)


def test_a_run_that_cannot_be_found(on_trained, refused, trained):
    on_trained("00000000-0000", words=("no run in", f"the last is {trained.guid}"))
    refused("generate", "--path=nowhere", words=("there are no runs in", "train one", "--path"))
    refused("generate", "--path=text.txt", words=("text.txt/configs cannot be read", "--path"))


@pytest.fixture
def copy(work, trained) -> RunFiles:
    """A copy of the trained run, to be damaged."""
    shutil.copytree(trained.folder, work / "runs")
    return RunFiles(work / "runs", trained.guid)


# what an interrupt leaves -------------------------------------------------------------------------------


def interrupt_at(monkeypatch, step: int) -> None:
    draw = RandomWindows.batch

    def batch(self, at):
        if at == step:
            raise KeyboardInterrupt
        return draw(self, at)

    monkeypatch.setattr(RandomWindows, "batch", batch)


def test_an_interrupt_before_the_first_step_leaves_nothing(refused, monkeypatch):
    interrupt_at(monkeypatch, 0)
    words = ("interrupted before the first step",)
    refused("train", "--path=runs", *flags(data="text.txt"), words=words, code=130)


def check_stopped(out: str, steps: int, settings: list[str], call) -> None:
    """A run under "stopped" ended early with so many steps, and is that of a run of only so many steps."""
    run = baby_xp.api.load(path="stopped", weights="last")
    last = out.splitlines()[-1]
    assert last.startswith(f"stopped after step {steps}, with a checkpoint; to go on: python -m baby_xp resume ")
    assert "--path stopped" in last
    assert run.guid[:8] in last
    assert "whole validation part" not in out
    result = run.config["result"]
    assert (result["state"], result["reason"], result["steps"]) == ("stopped", "interrupted", steps)
    assert not run.files.completion().exists()
    assert not run.files.lock.exists()
    assert call("train", "--path=whole", *settings, f"--num-steps={steps}")[0] == 0
    whole = baby_xp.api.load(path="whole", weights="last")
    assert whole.config["result"]["state"] == "done"
    states = [load_file(one.files.state) for one in (run, whole)]
    for name in ("params", "m", "v", "step"):
        np.testing.assert_array_equal(states[0][name], states[1][name], strict=True)
    measured = [record for record in metrics_of(whole.files) if record["step"] % 2 == 0 and record["train_loss"]]
    kept = metrics_of(run.files) if measured else []
    assert [record["val_loss"] for record in kept] == [record["val_loss"] for record in measured]


CONSTANT = {"schedule": "constant", "warmup_steps": 0}


def test_an_interrupt_gives_the_step_at_hand_up_and_keeps_those_before(work, call, monkeypatch):
    settings = flags(data="text.txt", num_steps=5, **CONSTANT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        code, out, err = call("train", "--path=stopped", *settings)
    assert (code, err) == (130, "baby_xp: interrupted\n")
    check_stopped(out, 3, settings, call)


needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


def signals_at(monkeypatch, step: int, *numbers: int) -> None:
    draw = RandomWindows.batch

    def batch(self, at):
        if at == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return draw(self, at)

    monkeypatch.setattr(RandomWindows, "batch", batch)


STOPPING = "stopping after this step, with a checkpoint; once more: at once\n"


@needs_signals
@pytest.mark.parametrize(("step", "number"), [*enumerate(Stop.SIGNALS)])
def test_a_signal_ends_it_after_the_step_at_hand(work, call, monkeypatch, signals, number, step):
    settings = flags(data="text.txt", num_steps=5, **CONSTANT)
    with monkeypatch.context() as patch:
        signals_at(patch, step, number)
        code, out, err = call("train", "--path=stopped", *settings)
    by = "" if number == signal.SIGINT else f" by {number.name}"
    assert (code, err) == (128 + number, f"{STOPPING}baby_xp: interrupted{by}\n")
    # the measurement that is due after the second step is left out: it can be done later
    assert [record["step"] for path in work.glob("stopped/outputs/metrics*") for record in lines_of(path)] == (
        [2] if step == 2 else []
    )
    if step != 1:
        check_stopped(out, step + 1, settings, call)


@needs_signals
def test_a_signal_ends_a_sample_too(work, call, monkeypatch, signals):
    """It may be as long as the user likes."""
    made, generate = [], baby_xp.run.generate

    def slow(*args):
        for token in generate(*args):
            made.append(token)
            if len(made) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield token

    settings = flags(data="text.txt", num_steps=5, **CONSTANT)
    with monkeypatch.context() as patch:
        patch.setattr(baby_xp.run, "generate", slow)
        code, _, err = call("train", "--path=stopped", *settings, "--sample-tokens=1000000000")
    assert (code, err, len(made)) == (130, f"{STOPPING}baby_xp: interrupted\n", 3)
    assert [(run.state, run.steps) for run in baby_xp.api.list_runs("stopped")] == [("stopped", 2)]
    assert call("resume", "--path=stopped", "--sample-tokens=0")[0] == 0


@needs_signals
def test_a_second_signal_gives_the_step_at_hand_up(work, call, monkeypatch, signals):
    settings = flags(data="text.txt", num_steps=5, **CONSTANT)
    with monkeypatch.context() as patch:
        signals_at(patch, 3, signal.SIGINT, signal.SIGTERM)
        code, out, err = call("train", "--path=stopped", *settings)
    assert (code, err) == (130, f"{STOPPING}baby_xp: interrupted\n")
    check_stopped(out, 3, settings, call)


def suggestions(out: str) -> list[list[str]]:
    """The commands that the output tells, as arguments."""
    return [shlex.split(line.partition("python -m baby_xp ")[2]) for line in out.splitlines() if " -m " in line]


def test_the_commands_that_are_told_can_be_given_as_they_are(work, call, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        _, out, _ = call("train", "--path=a/my runs", *flags(data="text.txt"))
    (resume,) = suggestions(out)
    assert resume[0] == "resume"
    code, out, err = call(*resume)
    assert (code, err) == (0, "")
    (generate,) = suggestions(out)
    assert generate[0] == "generate"
    assert call(*generate, "--num-tokens=2")[0] == 0


def test_an_interrupt_elsewhere_ends_with_the_code_of_one(work, call, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "prepare", interrupted)
    assert call("train", "--path=runs", *flags()) == (130, "", "baby_xp: interrupted\n")
    assert not (work / "runs").exists()


# good paths: training -----------------------------------------------------------------------------------


def metrics_of(files: RunFiles) -> list[dict]:
    return lines_of(files.metrics)


def lines_of(path: Path) -> list[dict]:
    data = path.read_bytes()
    assert data.endswith(b"\n")

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=no_constant) for line in data.splitlines()]


def test_training_tells_what_it_does(work, call):
    code, out, err = call("train", "--path=my runs", *flags(data="text.txt"))
    assert (code, err) == (0, "")
    guid = next(line for line in out.splitlines() if line.startswith("run ")).split()[1]
    assert "parameters on numpy" in out
    assert "text.txt: " in out
    assert "step      2: train " in out
    assert "step      3: train " in out
    assert RunFiles(Path("my runs"), guid).completion().read_text().strip() in out
    assert f"more: python -m baby_xp generate {guid[:8]} --path 'my runs'" in out


def test_every_file_of_the_layout_is_there_and_nothing_else(trained):
    (ids,) = (trained.folder / "corpora").iterdir()
    files = {path for path in trained.folder.rglob("*") if path.is_file()}
    assert files == {*trained.of_training, ids}


def test_the_config_says_what_was_asked_and_how_it_ended(trained):
    config = json.loads(trained.config.read_text(encoding="ascii"))
    assert config["guid"] == trained.guid
    assert config["preset"] == "baby"
    assert config["model"]["kind"] == "gpt"
    assert (config["model"]["n_ctx"], config["train"]["batch_size"], config["train"]["num_steps"]) == (8, 4, 3)
    assert config["vocab_size"] == len(set(TEXT))
    assert config["data"]["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert config["machine"]["backend"].startswith("numpy ")
    assert config["place"] == {"backend": "numpy", "device": None, "workers": 1}
    assert config["base"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", config["started"])
    assert config["started"] <= config["written"]
    result = config["result"]
    assert (result["state"], result["reason"], result["steps"]) == ("done", "steps", 3)
    assert result["best_step"] in (2, 3)
    assert 0 < result["val_loss"] < 2 * math.log(len(set(TEXT)))
    assert store.read_sealed(trained.config) == {k: v for k, v in config.items() if k != "checksum"}


def test_the_files_of_arrays_say_whose_they_are(trained):
    config = store.read_sealed(trained.config)
    for path, step in ((trained.model, config["result"]["best_step"]), (trained.state, 3)):
        metadata = state_file.read_metadata(path)
        assert metadata["guid"] == trained.guid
        assert json.loads(metadata["model"]) == config["model"]
        assert metadata["tokenizer"] == store.digest(json.loads(trained.tokenizer.read_text()))
        assert metadata["step"] == str(step)
        assert re.fullmatch("[0-9a-f]{64}", metadata["checksum"])


def test_the_tokenizer_has_the_characters_of_the_text(trained):
    tokenizer = tokenizer_from_dict(json.loads(trained.tokenizer.read_text()), "here")
    assert list(tokenizer.vocab) == sorted(set(TEXT))


def test_the_weights_have_their_names_and_the_state_fits_them(trained):
    weights, state = load_file(trained.model), load_file(trained.state)
    assert {"wte.weight", "wpe.weight", "ln_f.gain", "lm_head.weight", "lm_head.bias"} <= weights.keys()
    assert any(name.startswith("blocks.0.") for name in weights)
    assert weights["wte.weight"].shape == (len(set(TEXT)), 8)
    count = sum(array.size for array in weights.values())
    assert state["params"].shape == state["m"].shape == state["v"].shape == (count,)
    assert state["step"].tolist() == [3]
    assert json.loads(trained.config.read_text())["parameters"] == count
    assert {array.dtype.name for array in weights.values()} == {"float32"}


def test_the_metrics_are_valid_line_by_line_and_the_report_has_them(trained):
    *records, final = metrics_of(trained)
    assert [record["step"] for record in records] == [2, 3]
    best = min(records, key=lambda record: record["val_loss"])
    # the text is short: a part of the validation part is all of it
    assert final.keys() == {"step", "train_loss", "val_loss", "whole_validation", "lr", "grad_norm", "seconds"}
    assert (final["step"], final["train_loss"], final["whole_validation"]) == (best["step"], None, True)
    assert final["val_loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    report = trained.report.read_text(encoding="utf-8")
    assert "Losses, in nats per token" in report
    for record in records:
        assert record.keys() == {*final, "sample"}
        assert record["whole_validation"] is False
        assert len(record["sample"]) == 5
        line = next(line for line in report.splitlines() if line.split()[:1] == [str(record["step"])])
        assert line.split()[1:3] == [f"{record['train_loss']:.4f}", f"{record['val_loss']:.4f}"]
    config = json.loads(trained.config.read_text())
    assert config["result"]["val_loss"] == final["val_loss"]
    assert config["result"]["train_loss"] == records[-1]["train_loss"]
    assert trained.guid in report
    assert trained.completion().read_text(encoding="utf-8").strip() in report


def test_a_seed_reproduces_a_run_and_another_seed_gives_another(work):
    runs = [baby_xp.api.load(a_run(work / "runs", seed=seed), path=work / "runs") for seed in (0, 0, 1)]
    assert runs[0].params.tobytes() == runs[1].params.tobytes()
    assert runs[0].params.tobytes() != runs[2].params.tobytes()
    assert runs[0].files.completion().read_text() == runs[1].files.completion().read_text()


def test_epochs_decide_the_number_of_steps(work):
    guid = a_run(work / "runs", num_epochs=1, stride=50, num_steps=None, schedule="constant")
    config = json.loads(RunFiles(work / "runs", guid).config.read_text())
    n_train = int(0.9 * len(TEXT))
    windows = (n_train - 9) // 50 + 1
    assert config["result"]["steps"] == -(-windows // 4)
    assert config["train"]["num_steps"] == config["result"]["steps"]


def test_bytes_are_a_tokenizer_too(work, call):
    (work / "text.txt").write_text("\u20ac and \u00e9. " * 60, encoding="utf-8")
    a_run(work / "runs", tokenizer="byte")
    code, out, _ = call("generate", "--path=runs", "--prompt=\u00e9", "--num-tokens=40")
    assert code == 0
    assert out.startswith("\u00e9")
    (kept,) = (work / "runs" / "outputs").glob("completion_*_*.txt")
    assert kept.read_bytes().decode() == out


# good paths: how training goes --------------------------------------------------------------------------


def text_settings(**more) -> dict:
    """The tiny sizes as Python has them."""
    sizes = {name.replace("-", "_"): value for name, value in TINY.items()}
    return {**sizes, "data": "text.txt", "path": "runs", "sample_tokens": 0, **more}


def test_a_run_is_there_from_its_start(work, call):
    """Whatever happens later: it can be found, loaded, and gone on with."""
    seen = []

    class Onlooker(baby_xp.api.Silent):
        def started(self, session, step):
            files = session.files
            seen.append({path for path in files.of_training if path.exists()})
            run = baby_xp.api.load(files.guid, path="runs")
            seen.append((run.config["result"]["state"], run.config["result"]["steps"], run.generate(num_tokens=2)))
            seen.append(state_file.read_metadata(files.model)["step"])
            seen.append(baby_xp.api.load(path="runs", weights="last").params.tobytes() == run.params.tobytes())
            seen.append([summary.state for summary in baby_xp.api.list_runs("runs")])

    run = baby_xp.api.train("baby", listener=Onlooker(), **text_settings())
    files = run.files
    assert seen[0] == {files.config, files.tokenizer, files.model, files.state}
    assert seen[1][:2] == ("running", 0)
    assert len(seen[1][2]) == 2
    assert seen[2:] == ["0", True, ["running"]]


def test_the_order_of_writing_makes_a_run_safe(work, monkeypatch):
    """The config comes last at the start and at the end; a checkpoint before the weights that follow from it."""
    order, rename, append = [], os.replace, baby_xp.session.append_line
    note = lambda path: order.append(Path(path).name.partition("_")[0])  # noqa: E731
    monkeypatch.setattr(os, "replace", lambda old, new: (note(new), rename(old, new)))
    monkeypatch.setattr(baby_xp.session, "append_line", lambda path, data: (note(path), append(path, data)))
    losses = iter([3.0, 4.0, 2.0, 2.0])  # the best of the third step is another than that of the second
    monkeypatch.setattr(loop._Run, "_validation_loss", lambda *args: next(losses))
    baby_xp.api.train("baby", **text_settings(eval_every=1, checkpoint_every=1))
    assert order[0].endswith(".ids")
    assert order[1:] == [
        "tokenizer", "state", "model", "config",
        "metrics", "state", "model", "metrics", "state", "metrics", "state", "model", "metrics",
        "completion", "report", "config",
    ]  # fmt: skip


def test_a_kill_between_a_checkpoint_and_its_weights_is_made_good_by_going_on(work, monkeypatch):
    """The checkpoint has the best weights already; their own file has those of before."""

    class Killed(BaseException):
        pass

    save = state_file.save_weights

    def killed(path, layout, flat, metadata):
        if metadata["step"] == "3":
            raise Killed
        save(path, layout, flat, metadata)

    losses = iter([3.0, 2.0, 1.0, 1.0])
    monkeypatch.setattr(loop._Run, "_validation_loss", lambda *args: next(losses))
    monkeypatch.setattr(state_file, "save_weights", killed)
    with pytest.raises(Killed):
        baby_xp.api.train("baby", **text_settings(eval_every=1, checkpoint_every=1))
    monkeypatch.setattr(state_file, "save_weights", save)
    assert [(run.state, run.steps) for run in baby_xp.api.list_runs("runs")] == [("stopped", 3)]
    run = baby_xp.api.resume(path="runs")
    assert (run.config["result"]["state"], run.config["result"]["best_step"]) == ("done", 3)
    best, last = (baby_xp.api.load(path="runs", weights=weights) for weights in ("best", "last"))
    np.testing.assert_array_equal(run.params, last.params)
    np.testing.assert_array_equal(best.params, last.params)


def test_an_interrupt_while_the_last_text_is_made_loses_no_step(work, call, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(baby_xp.session, "sample_of", interrupted)
        code, _, err = call("train", "--path=runs", *flags(data="text.txt", sample_tokens=0))
    assert (code, err) == (130, "baby_xp: interrupted\n")
    assert [(run.state, run.steps) for run in baby_xp.api.list_runs("runs")] == [("stopped", 3)]
    assert call("resume", "--path=runs")[0] == 0
    run = baby_xp.api.load(path="runs")
    assert run.config["result"]["state"] == "done"
    assert len(run.files.completion().read_text()) == SAMPLE_TOKENS + len("\n")


def test_no_two_processes_train_a_run(work):
    seen = []

    class Meddler(baby_xp.api.Silent):
        def evaluated(self, record):
            with pytest.raises(BabyError, match="is being trained by another process") as caught:
                baby_xp.api.resume(path="runs")
            seen.append(str(caught.value))

    run = baby_xp.api.train("baby", listener=Meddler(), **text_settings(eval_every=3))
    assert len(seen) == 2
    assert run.guid in seen[0]
    assert run.config["result"]["state"] == "done"


@pytest.fixture
def worse_from(monkeypatch):
    """Make training throw the parameters away in a step, counted from 1: all later measurements are worse."""

    def throw(at: int) -> None:
        usual = schedules.learning_rate
        rate = lambda xp, step, *more: usual(xp, step, *more) * (1e4 if step[0] == at - 1 else 1)  # noqa: E731
        monkeypatch.setattr(schedules, "learning_rate", rate)

    return throw


def test_the_best_weights_are_kept_where_later_ones_are_worse(work, call, worse_from):
    worse_from(4)
    settings = flags(data="text.txt", num_steps=6, eval_every=1, sample_tokens=0)
    code, out, err = call("train", "--path=runs", *settings)
    assert (code, err) == (0, "")
    best, last = (baby_xp.api.load(path="runs", weights=weights) for weights in ("best", "last"))
    *records, final = metrics_of(best.files)
    losses = [record["val_loss"] for record in records]
    assert min(losses[3:]) > max(losses[:3]) + 0.1
    at = best.config["result"]["best_step"]
    assert at == 1 + losses.index(min(losses)) <= 3
    assert f"kept the weights of step {at}, the best\n" in out
    assert (final["step"], final["whole_validation"]) == (at, True)
    assert final["val_loss"] == best.config["result"]["val_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert f"validation loss {final['val_loss']:.4f} nats per token, over the whole validation part" in out
    assert state_file.read_metadata(best.files.model)["step"] == str(at)
    assert np.abs(best.params - last.params).max() > 1
    state = load_file(best.files.state)
    np.testing.assert_array_equal(state["best"], best.params)
    np.testing.assert_array_equal(state["params"], last.params)
    # what the end shows, and what is generated, is of the best
    shown = best.files.completion().read_text().removesuffix("\n")
    assert shown == best.generate(num_tokens=SAMPLE_TOKENS, seed=0)
    texts = {
        name: generated(call, best.files, f"--weights={name}", "--num-tokens=60") for name in ("best", "last")
    }
    assert texts["best"] == best.generate(num_tokens=60, seed=0) != texts["last"]


def test_patience_ends_a_run_whose_loss_no_longer_falls(work, call, worse_from):
    worse_from(4)
    settings = flags(data="text.txt", num_steps=50, eval_every=1, patience=3)
    code, out, err = call("train", "--path=runs", *settings)
    assert (code, err) == (0, "")
    result = baby_xp.api.load(path="runs").config["result"]
    assert (result["state"], result["reason"]) == ("done", "patience")
    assert result["steps"] == result["best_step"] + 3 <= 6
    assert f"ended after step {result['steps']}: the validation loss no longer falls" in out
    assert f"kept the weights of step {result['best_step']}, the best" in out


@pytest.fixture
def slow(monkeypatch):
    """Make each step seem to take half a minute."""

    class Clock:
        now = 1000.0

        def perf_counter(self):
            return self.now

    clock, draw = Clock(), RandomWindows.batch

    def batch(self, step):
        clock.now += 30
        return draw(self, step)

    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(RandomWindows, "batch", batch)


@pytest.mark.parametrize("eval_every", [2, 100], ids=["measured before", "never measured before"])
def test_the_time_is_up_and_the_run_can_go_on(work, call, slow, eval_every):
    settings = flags(data="text.txt", num_steps=6, eval_every=eval_every, max_minutes=1.5)
    code, out, err = call("train", "--path=runs", *settings)
    assert (code, err) == (0, "")
    assert "the time is up: stopped after step 3; to go on: python -m baby_xp resume" in out
    assert "None" not in out
    assert "over the whole validation part" in out
    run = baby_xp.api.load(path="runs")
    result = run.config["result"]
    assert (result["state"], result["reason"], result["steps"]) == ("stopped", "time", 3)
    assert metrics_of(run.files)[-1]["whole_validation"] is True
    assert run.files.completion().exists()
    code, out, err = call("resume", "last", "--path=runs")
    assert (code, err) == (0, "")
    assert f"going on with run {run.guid} after step 3" in out
    result = baby_xp.api.load(path="runs").config["result"]
    assert (result["state"], result["reason"], result["steps"]) == ("done", "steps", 6)
    steps = [(record["step"], record["whole_validation"]) for record in metrics_of(run.files)]
    measured = [2, 4, 6] if eval_every == 2 else [6]
    assert steps == [*((step, False) for step in measured), (result["best_step"], True)]


@pytest.mark.parametrize("number", [0, 7, 80])
def test_a_sample_of_so_many_tokens_is_shown_with_each_measurement(work, call, number):
    code, out, _ = call("train", "--path=runs", *flags(data="text.txt", sample_tokens=number))
    assert code == 0
    run = baby_xp.api.load(path="runs")
    *records, final = metrics_of(run.files)
    assert "sample" not in final
    if not number:
        assert all("sample" not in record for record in records)
        return
    for record in records:
        assert len(record["sample"]) == number
        (line,) = (line for line in out.splitlines() if line.startswith(f"step {record['step']:>6}: train"))
        assert " ".join(record["sample"].split()) in line
    last = baby_xp.api.load(path="runs", weights="last")
    assert records[-1]["sample"] == last.generate(num_tokens=number, seed=0)


@pytest.mark.first_case
@pytest.mark.parametrize("epochs", [True, False], ids=["an epoch with a smaller last step", "random windows"])
@pytest.mark.parametrize("workers", [2, 1])
def test_gradients_that_are_accumulated_train_as_a_large_batch_does(work, workers, epochs):
    how = {"num_steps": 4, "eval_every": 1, "dropout": 0.2, "dtype": "float64", "base_batch_size": 4}
    if epochs:  # 19 windows: a step of 12 and one of 7, of which a part of 3 and one of 1 are the last
        how |= {"num_epochs": 2, "num_steps": None, "stride": 49}
    found = []
    for batch_size, accumulate, processes in ((12, 1, 1), (3, 4, workers)):
        settings = {"batch_size": batch_size, "accumulate": accumulate, "workers": processes}
        run = baby_xp.api.train("baby", **text_settings(**how, **settings))
        assert run.config["result"]["steps"] == 4
        *records, _ = metrics_of(run.files)
        found.append(
            [[record[name] for name in ("train_loss", "val_loss", "lr", "grad_norm")] for record in records]
        )
    assert len(found[0]) == 4
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)


# good paths: generation ---------------------------------------------------------------------------------


def generated(call, files, *arguments: str) -> str:
    code, out, err = call("generate", files.guid, f"--path={files.folder}", "--backend=numpy", *arguments)
    assert code == 0
    path = Path(err.removeprefix("kept in ").rstrip("\n"))
    assert path.read_text(encoding="utf-8") == out
    return out.removesuffix("\n")


def test_a_prompt_goes_on_for_so_many_tokens(copy, call):
    text = generated(call, copy, "--prompt=the cat ", "--num-tokens=30")
    assert text.startswith("the cat ")
    assert len(text) == len("the cat ") + 30


def test_without_a_prompt_it_begins_by_itself(copy, call):
    assert len(generated(call, copy, "--num-tokens=7")) == 7


def test_the_cache_is_used_unless_it_is_refused(copy, call, monkeypatch):
    asked, init = [], Logits.__init__
    monkeypatch.setattr(Logits, "__init__", lambda self, *args: asked.append(args[-1]) or init(self, *args))
    for more in ([], ["--cache"], ["--no-cache"]):
        generated(call, copy, "--num-tokens=1", *more)
    assert asked == [True, True, False]


def test_greedy_does_not_ask_the_seed(copy, call):
    texts = {generated(call, copy, "--num-tokens=20", *how) for how in (["--greedy"], ["--top-k=1", "--seed=9"])}
    run = baby_xp.api.load(path=copy.folder, backend="numpy")
    assert texts == {run.generate(num_tokens=20, greedy=True, seed=seed) for seed in range(3)}
    assert len(texts) == 1


def test_each_generation_is_kept_under_a_name_of_its_own(copy, call):
    """Also those that end in the same second."""
    texts = [generated(call, copy, "--num-tokens=20", f"--seed={seed}") for seed in range(3)]
    kept = sorted((copy.folder / "outputs").glob(f"completion_{copy.guid}_*.txt"))
    assert sorted(path.read_text().removesuffix("\n") for path in kept) == sorted(texts)
    for path in kept:
        stamp = path.stem.rpartition("_")[2]
        assert len(stamp) == 14
        assert stamp.isdigit()


def test_inference_is_another_word_for_generate(copy, call):
    place = [f"--path={copy.folder}", "--backend=numpy", "--num-tokens=9"]
    expected = call("generate", copy.guid, *place)[:2]
    for names in (["last"], [], [copy.guid[:8]]):
        assert call("inference", *names, *place)[:2] == expected


def test_from_python_the_text_is_that_of_the_command_line(copy, call):
    run = baby_xp.api.load("last", path=copy.folder, backend="numpy")
    text = generated(call, copy, "--prompt=the", "--num-tokens=12", "--seed=4", "--top-k=5")
    assert run.generate("the", 12, seed=4, top_k=5) == text
    assert "".join(run.stream("the", 12, seed=4, top_k=5)) == text.removeprefix("the")


# lists and help -----------------------------------------------------------------------------------------


def test_all_presets_are_listed(call):
    code, out, err = call("presets")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == list(PRESETS)


def states(out: str) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()[:-1]}


NAMES = ["numpy", "cupy", "array-api-strict", "jax", "torch"]


def test_all_backends_are_listed_with_their_state(call):
    code, out, err = call("backends")
    assert (code, err) == (0, "")
    assert list(states(out)) == NAMES
    assert states(out)["numpy"].startswith(f"works    numpy {np.__version__}, cpu")
    for state in states(out).values():
        assert state.startswith("works ") or (state.startswith("missing ") and "; remedy: " in state)
    expected = "cupy" if works("cupy") else "numpy"
    assert out.splitlines()[-1].startswith(f"auto takes {expected}: ")


def without_libraries(monkeypatch, *modules: str) -> None:
    for name in (*modules, *(f"array_api_compat.{module}" for module in modules)):
        monkeypatch.setitem(sys.modules, name, None)


def test_backends_without_any_library_but_numpy(call, monkeypatch):
    without_libraries(monkeypatch, "torch", "jax", "cupy", "array_api_strict")
    code, out, err = call("backends")
    assert (code, err) == (0, "")
    assert {name: state.split()[0] for name, state in states(out).items()} == {
        name: "works" if name == "numpy" else "missing" for name in NAMES
    }
    assert "pip install -e '.[torch]'" in states(out)["torch"]
    assert out.splitlines()[-1].startswith("auto takes numpy: no GPU to use (CuPy cannot be imported")


def test_a_library_that_is_broken_does_not_stand_in_the_way(work, call, monkeypatch):
    """A folder called cupy in the current one is enough to import as an empty module."""
    without_libraries(monkeypatch, "torch", "jax", "array_api_strict")
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    code, out, err = call("backends")
    assert (code, err) == (0, "")
    assert states(out)["cupy"].startswith("missing  AttributeError: ")
    assert "auto takes numpy: no GPU to use (AttributeError: " in out
    assert call("train", "--path=runs", *flags(data="text.txt", backend="auto"))[0] == 0


def test_a_device_that_auto_cannot_give_is_an_error(refused, monkeypatch):
    for module in (None, types.ModuleType("cupy")):
        monkeypatch.setitem(sys.modules, "cupy", module)
        settings = flags(data="text.txt", backend="auto", device="cuda:1")
        refused("train", "--path=runs", *settings, words=("backend 'cupy' cannot work here",))


@pytest.mark.parametrize(
    "arguments",
    [
        *([command] for command in COMMANDS if command != "finetune"),
        *(["train", name] for name in ("3-months", "equations", "equations-gpt")),
        ["generate", "x"],
        ["resume", "x"],
    ],
    ids=" ".join,
)
def test_every_command_has_help(call, arguments):
    code, out, err = call(*arguments, "--help")
    assert (code, err) == (0, "")
    assert out.strip()
    if arguments[0] == "train":
        assert "--lr" in out
        assert "--n-ctx" in out
    if arguments[0] in ("generate", "inference"):
        assert "--prompt" in out
        assert "--no-cache" in out


def test_the_help_of_finetuning_shows_the_settings_of_the_run(call, trained, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # a narrow terminal breaks its lines
    code, out, err = call("finetune", "last", f"--path={trained.folder}", "--help")
    assert (code, err) == (0, "")
    assert trained.guid in out
    for flag in ("--data", "--lr", "--dropout", "--path", "--workers"):
        assert f"{flag} " in out
    assert "--n-ctx" not in out
    assert re.search(r"--batch-size\s+INT\s[^()]*\(default: 4\)", out)


def test_without_a_run_there_is_nothing_to_finetune(refused):
    for arguments in (["--help"], ["--data=text.txt"]):
        refused("finetune", *arguments, words=("there are no runs in runs; train one",))


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_the_overview_names_every_command(call, arguments):
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    assert all(command in out for command in COMMANDS)


def test_the_version(call):
    assert call("--version") == (0, f"baby_xp {baby_xp.__version__}\n", "")


def test_the_program_ends_with_its_exit_code_and_shows_another_character_where_one_is_lacking(work):
    done = subprocess.run(
        [sys.executable, "-m", "baby_xp", "train", "--data", "\u20ac.txt".encode()], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"baby_xp: there is no file ?.txt; check the path\n"


# presets ------------------------------------------------------------------------------------------------


AGES = [name for name in PRESETS if name.endswith("-months")]
DIFFERENT = [name for name in PRESETS if name not in AGES[1:]]
"""One age stands for all: they differ in the context alone, which is shortened here."""


def shortened(name: str, work: Path, **more) -> list[str]:
    """The preset's own switches, dropout and schedule, with little to compute."""
    settings = {"backend": "numpy", **more}
    if isinstance(PRESETS[name].data, EquationData):
        if name == "equations-2":
            settings |= {"digits": 1, "n-hidden": 8, "held-out": "4+4"}
        elif not isinstance(PRESETS[name].model, EquationConfig):  # a small table: some backends are slow
            settings |= {"n-ctx": 6, "n-emb": 8, "head-size": 8, "digits": 1, "operators": "+", "held-out": "4+4"}
            settings |= {"batch-size": 8}
    else:
        settings |= {"n-ctx": 8, "n-emb": 8, "head-size": 48, "n-layers": 2, "batch-size": 4}
        settings |= {} if PRESETS[name].data.data == "nursery" else {"data": work / "text.txt"}
    return ["train", name, *(f"--{key}={value}" for key, value in settings.items())]


@pytest.fixture
def short_nursery(monkeypatch):
    monkeypatch.setattr(dataset, "NURSERY_CHARACTERS", 330)


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_preset_starts(work, call, short_nursery, name):
    code, out, err = call(*shortened(name, work, **{"num-steps": 2}))
    assert (code, err) == (0, "")
    assert "step      2: train " in out


def test_the_equation_model_answers_what_it_never_saw(work, call):
    code, out, err = call("train", "equations", "--backend=numpy", "--num-steps=600")
    assert (code, err) == (0, "")
    assert "4+4=8" in out
    (completion,) = (work / "runs" / "outputs").glob("completion_*.txt")
    assert completion.read_text() == "4+4=8\n"
    assert call("generate", "--prompt=4+4=", "--num-tokens=1", "--greedy")[1] == "4+4=8\n"
    # a text longer than the context: the model sees its last four tokens, as in training
    assert call("generate", "--prompt=1+2=", "--num-tokens=2", "--greedy")[1] == "1+2=3 \n"


def losses(files: RunFiles) -> np.ndarray:
    """Of each measurement; the loss of the last one, over the whole validation part, in the place of both."""
    *records, final = metrics_of(files)
    return np.array([[record["train_loss"], record["val_loss"]] for record in records] + [[final["val_loss"]] * 2])


def test_the_ages_differ_in_their_context_alone():
    contexts = [PRESETS[name].model.n_ctx for name in AGES]
    assert contexts == [8, 16, 32, 64, 128]
    assert len({replace(PRESETS[name].model, n_ctx=1) for name in AGES}) == 1
    assert len({PRESETS[name].train for name in AGES}) == 1


@pytest.mark.parity
@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize(
    "other", ["torch", "array-api-strict", "jax", pytest.param("cupy", marks=pytest.mark.gpu)]
)
def test_a_preset_gives_the_same_losses_on_every_backend(
    work, call, short_nursery, monkeypatch, request, name, other
):
    try:
        registry.load(other)
    except BackendUnavailable as error:
        pytest.skip(error.reason)
    monkeypatch.setattr(baby_xp.session, "sample_of", lambda *args: "")  # slow where nothing is compiled
    if other == "jax":
        request.getfixturevalue("quick_compilation")
    # 330 tokens, so that validation is one batch of one shape: what jit compiles, it compiles once
    (work / "text.txt").write_text(TEXT[:330])
    found = []
    for backend in ("numpy", other):
        path = f"--path={backend}"
        assert call(*shortened(name, work, backend=backend, **{"num-steps": 4, "eval-every": 1}), path)[0] == 0
        found.append(losses(baby_xp.api.load(path=backend, backend="numpy").files))
    assert found[0].shape == (5, 2)
    assert not np.isnan(found[0]).any()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


# from Python --------------------------------------------------------------------------------------------


def test_weights_are_the_best_or_the_last(trained):
    for weights in ("Best", "", None):
        with pytest.raises(BabyError, match=f"weights must be one of best, last, not {weights!r}"):
            baby_xp.api.load(path=trained.folder, weights=weights)


def test_the_weights_that_are_asked_for_are_loaded(trained):
    best, last = (baby_xp.api.load(path=trained.folder, weights=weights) for weights in ("best", "last"))
    assert best.params.tobytes() == baby_xp.api.load(path=trained.folder).params.tobytes()
    np.testing.assert_array_equal(last.params, load_file(trained.state)["params"], strict=True)
    assert best.config == last.config


def test_a_run_without_a_step_that_goes_on_to_nothing_is_as_it_was(work, burst, call):
    """Its settings too: or it could never go on."""
    run = baby_xp.api.train("baby", **text_settings(max_minutes=1e-9, path=work / "runs"))
    assert run.config["result"]["steps"] == 0
    before = {path: path.read_bytes() for path in run.files.of_training}
    burst("resume", "--path=runs", "--lr=1e30", "--clip=0", "--max-minutes=0")
    assert before == {path: path.read_bytes() for path in run.files.of_training}
    assert call("resume", "--path=runs", "--max-minutes=0")[0] == 0
