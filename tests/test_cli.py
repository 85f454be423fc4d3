"""The command line: what cannot be used ends in one line and leaves nothing; what can, does what it says."""

import contextlib
import functools
import hashlib
import inspect
import io
import json
import math
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import baby_xp.sitting
from baby_xp import backend as backends
from baby_xp import params, task
from baby_xp.cli import COMMANDS, main
from baby_xp.config import EquationConfig
from baby_xp.errors import BabyError, BackendUnavailable
from baby_xp.generate import Logits
from baby_xp.presets import PRESETS
from baby_xp.runs.store import FOLDERS, RunFiles
from baby_xp.text.batches import RandomWindows
from baby_xp.text.tokenizer import tokenizer_from_dict

TINY = {
    "n-ctx": 8, "n-emb": 8, "head-size": 8, "n-heads": 2, "n-layers": 1, "batch-size": 4, "num-steps": 3,
    "eval-every": 2, "backend": "numpy",
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


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        # what a run shows of itself at its end takes longer than the training here
        patch.setattr(baby_xp.sitting, "SAMPLE_TOKENS", 60)
        # tyro reads the docstrings of fields from the sources, anew for each command
        patch.setattr(inspect, "findsource", functools.cache(inspect.findsource))
        yield


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
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(call, work):
    """Run a command that must fail: one line, exit code 2, and the folder is as it was. -> the line."""

    def run(*arguments: str, words: tuple[str, ...] = ()) -> str:
        before = all_of(work)
        code, _, err = call(*arguments)
        assert code == 2
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


@pytest.mark.parametrize("existed", [False, True], ids=["new folder", "folder with a run"])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, ("there is no file missing.txt",)),
        ("nosuchname", None, ("there is no file nosuchname", "nursery, equations, shakespeare")),
        ("a" * 300, None, ("a" * 300, "File name too long")),
        ("empty.txt", b"", ("empty.txt is empty",)),
        ("bom.txt", b"\xef\xbb\xbf", ("bom.txt is empty",)),
        ("folder", "folder", ("folder is a folder", "name a UTF-8 text file")),
        ("latin1.txt", b"caf\xe9 " * 99, ("latin1.txt is not UTF-8", "0xe9 at offset 3", "save it as UTF-8")),
        ("utf16.txt", "abc".encode("utf-16") * 99, ("utf16.txt is not UTF-8", "offset 0")),
        ("short.txt", b"12345678", ("short.txt is too short", "--n-ctx 8 needs 9", "at least 11 tokens")),
        ("one.txt", b"x", ("one.txt is too short",)),
        ("nine.txt", b"0123456789", ("nine.txt is too short", "validation", "at least 11 tokens")),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_text_that_cannot_be_used(work, refused, trained, existed, name, content, words):
    if existed:
        shutil.copytree(trained.folder, work / "runs")
    if content == "folder":
        (work / name).mkdir()
    elif content is not None:
        (work / name).write_bytes(content)
    refused("train", "--path=runs", *flags(data=name), words=words)
    assert (work / "runs").exists() == existed


BAD_SETTINGS = [
    *((name, value, (name.replace("-", "_"), "at least 1", value))
      for name in ("batch-size", "n-ctx", "n-emb", "head-size", "n-heads", "n-layers", "num-steps", "num-epochs",
                   "stride", "eval-every", "base-batch-size")
      for value in ("0", "-3")),
    *((name, value, (name, "above 0", value)) for name in ("lr",) for value in ("0.0", "-0.1", "nan", "inf")),
    *((name, value, (name.replace("-", "_"), "at least 0", value))
      for name in ("min-lr", "weight-decay", "clip") for value in ("-0.1", "nan")),
    ("warmup-steps", "-1", ("warmup_steps", "at least 0", "-1")),
    ("seed", "-1", ("seed", "at least 0", "-1")),
    ("seed", str(2**64), ("seed", f"at most {2**64 - 1}")),
    ("dropout", "1.0", ("dropout", "below 1", "1.0")),
    ("dropout", "nan", ("dropout", "nan")),
    ("beta1", "1.0", ("beta1", "between 0 and 1")),
    ("beta2", "nan", ("beta2", "between 0 and 1")),
    ("n-heads", "3", ("n_heads 3 does not divide head_size 8", "multiple")),
    ("n-emb", str(10**30), ("n_emb", "at most")),
    ("n-emb", str(2**31 - 1), ("parameters fits no memory",)),
    ("min-lr", "1.0", ("min_lr 1.0 is above lr 0.003",)),
    ("batch-size", "many", ("--batch-size", "many")),
    ("batch-size", "2.5", ("--batch-size", "2.5")),
    ("lr", "fast", ("--lr", "fast")),
    ("c-attention", "mhb", ("--c-attention", "mhb")),
    ("dtype", "float16", ("--dtype", "float16")),
    ("tokenizer", "bpe", ("--tokenizer", "bpe")),
    ("workers", "0", ("workers must be at least 1, not 0",)),
    ("workers", "-2", ("workers must be at least 1, not -2",)),
    ("workers", "two", ("--workers", "two")),
    ("device", "mars", ("numpy", "no device 'mars'", "leave out --device or say --device cpu")),
    ("backend", "tensorflow", ("unknown backend 'tensorflow'", "choose one of auto, numpy, cupy")),
    ("bogus", "3", ("--bogus",)),
    ("n-hidden", "3", ("--n-hidden",)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "words"), BAD_SETTINGS)
def test_a_setting_that_cannot_be_used(refused, name, value, words):
    refused("train", "--path=runs", *flags(data="text.txt", **{name: value}), words=words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "toddler"], ("unknown preset 'toddler'", *PRESETS)),
        (["train", "baby", "equations"], ("equations", "baby_xp train baby --help")),
        (["train", "--lr"], ("--lr",)),
        (["fly"], ("unknown command 'fly'", *COMMANDS)),
        ([""], ("unknown command ''",)),
        (["--bogus"], ("unknown command '--bogus'",)),
        (["presets", "all"], ("presets takes no arguments, not 'all'",)),
        (["backends", "--numpy", "x"], ("backends takes no arguments, not '--numpy x'",)),
        (["train", "equations", "--held-out=4*4"], ("digit+digit", "4*4")),
        (["train", "equations", "--held-out=9+9"], ("9+9 makes 18, above the largest sum 9",)),
        (["train", "equations", "--max-sum=19"], ("largest sum", "19")),
        (["train", "equations", "--n-ctx=5"], ("n_ctx", "4")),
        (["train", "equations", "--std=0"], ("std", "above 0")),
        (["train", "equations", "--data=text.txt"], ("equation model learns equations", "leave out --data")),
        (["train", "baby", "--data=equations"], ("equations are for the equation model",)),
        (["train", "equations", "--n-layers=2"], ("--n-layers",)),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used(refused, arguments, words):
    refused(*arguments, words=words)


def works(name: str) -> bool:
    try:
        backends.load(name)
    except BackendUnavailable:
        return False
    return True


@pytest.mark.skipif(works("cupy"), reason="CuPy works here")
def test_a_backend_that_cannot_work_is_named_with_reason_and_remedy(refused):
    line = refused("train", "--path=runs", *flags(data="text.txt", backend="cupy"))
    assert line.startswith("baby_xp: backend 'cupy' cannot work here: ")
    reason, remedy = line.removeprefix("baby_xp: backend 'cupy' cannot work here: ").split("; ", 1)
    assert len(reason) > 10
    assert "install" in remedy


@pytest.mark.parametrize(("name", "module", "remedy"), [
    ("torch", "torch", "pip install 'baby_xp[torch]'"),
    ("jax", "jax", "pip install 'baby_xp[jax]'"),
    ("array-api-strict", "array_api_strict", "pip install array-api-strict"),
    ("cupy", "cupy", "pip install 'baby_xp[cuda13]', or 'baby_xp[cuda12]'"),
])  # fmt: skip
def test_a_library_that_is_missing_is_named_with_the_remedy(refused, monkeypatch, name, module, remedy):
    monkeypatch.setitem(sys.modules, module, None)
    words = (f"backend '{name}' cannot work here", "cannot be imported", remedy)
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


@pytest.mark.parametrize("path", ["text.txt", "text.txt/runs", "text.txt/a/b", "a" * 300], ids=lambda p: p[:14])
def test_a_folder_that_cannot_be_written(refused, path):
    words = (f"{path[:8]}", "cannot be written", "name another folder with --path")
    refused("train", f"--path={path}", *flags(data="text.txt"), words=words)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_file_in_the_way_of_one_of_the_folders(work, refused, folder):
    (work / "runs").mkdir()
    (work / "runs" / folder).write_text("in the way")
    refused("train", "--path=runs", *flags(data="text.txt"), words=(folder, "cannot be written"))


@pytest.mark.parametrize("where", ["draw", "evaluate"])
def test_too_little_memory_is_one_line(refused, monkeypatch, where):
    def fail(*args, **kwargs):
        raise MemoryError("Unable to allocate\n6 TiB" if where == "draw" else "")

    target = (params, "draw") if where == "draw" else (baby_xp.training.loop, "mean_loss")
    monkeypatch.setattr(*target, fail)
    reason = {"draw": "Unable to allocate 6 TiB", "evaluate": "an array did not fit"}[where]
    words = (f"not enough memory ({reason})", "choose a smaller model or batch")
    refused("train", "--path=runs", *flags(data="text.txt"), words=words)


@pytest.mark.parametrize("num_steps", [1, 3, 30])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_that_is_not_finite_ends_in_one_line_and_leaves_nothing(refused, num_steps, workers):
    """At its first step the loss is still that of the first weights, and only the validation shows it."""
    settings = flags(data="text.txt", lr=1e30, clip=0, num_steps=num_steps, workers=workers)
    line = refused("train", "--path=runs", *settings, words=("loss became nan", "lower --lr"))
    assert ("validation loss" in line) == (num_steps == 1)


def test_a_loss_that_is_not_finite_leaves_earlier_runs_findable(work, refused, call):
    guid = a_run(work / "runs")
    refused("train", "--path=runs", *flags(data="text.txt", lr=1e30, clip=0, num_steps=30))
    assert call("generate", "last", "--path=runs", "--num-tokens=1")[0] == 0
    assert baby_xp.api.load("last", path="runs").guid == guid


def test_a_full_disk_at_the_end_leaves_no_half_of_a_run(refused, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    # the corpus is renamed too; from a folder that does not exist yet, nothing may stay
    refused("train", "--path=runs", *flags(data="text.txt"), words=("No space left on device",))


def test_a_full_disk_while_the_report_is_written(work, refused, monkeypatch):
    a_run(work / "runs")  # so the corpus is there
    replace = os.replace

    def full(source, target):
        if "report_" in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    refused("train", "--path=runs", *flags(data="text.txt"), words=("report_", "No space left on device"))


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
        (["--temperature=0"], ("temperature must be above 0, not 0", "--greedy")),
        (["--temperature=-1"], ("temperature", "-1")),
        (["--temperature=nan"], ("temperature", "nan")),
        (["--temperature=inf"], ("temperature", "inf")),
        (["--temperature=hot"], ("--temperature", "hot")),
        (["--top-k=-1"], ("top_k", "-1")),
        (["--top-k=1.5"], ("--top-k", "1.5")),
        (["--top-p=0"], ("top_p must be above 0 and at most 1, not 0",)),
        (["--top-p=1.1"], ("top_p", "1.1")),
        (["--top-p=nan"], ("top_p", "nan")),
        (["--num-tokens=0"], ("num_tokens must be at least 1, not 0",)),
        (["--num-tokens=-5"], ("num_tokens", "-5")),
        (["--num-tokens=x"], ("--num-tokens",)),
        (["--seed=x"], ("--seed",)),
        (["--bogus"], ("--bogus", "baby_xp generate --help")),
        (["--prompt=the c\u00e1t"], ("prompt", "'\u00e1' (U+00E1)", "index 5")),
        (["--prompt=the cat\nsat\u20ac"], ("prompt", "U+20AC", "line 2", "column 4")),
        (["--prompt=\udcff"], ("prompt", "U+DCFF")),
        (["--device=mars"], ("no device 'mars'",)),
    ],
    ids=ascii,
)
def test_a_generation_that_cannot_be(on_trained, arguments, words):
    on_trained("last", *arguments, words=words)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "/etc/passwd", "a\\b", "*", "LAST", "a" * 99])
def test_a_name_that_is_no_guid(on_trained, name):
    on_trained(name, words=("is not a run: give a GUID, the beginning of one, or last",))


def test_a_guid_that_does_not_exist(on_trained, trained):
    words = ("no run in", "begins with '00000000-0000'", f"the last is {trained.guid}")
    on_trained("00000000-0000", words=words)


def test_an_ambiguous_beginning_of_a_guid(work, refused, monkeypatch):
    monkeypatch.setattr("uuid.uuid4", iter([f"abcdef0{i}-1111-4111-8111-111111111111" for i in range(2)]).__next__)
    for _ in range(2):
        a_run(work / "runs")
    refused("generate", "abcdef", "--path=runs", words=("2 runs begin with 'abcdef'",))


@pytest.mark.parametrize("path", ["nowhere", "text.txt", "."])
def test_a_folder_without_runs(refused, path):
    refused("generate", f"--path={path}", words=("there are no runs in", "train one", "--path"))


@pytest.fixture
def copy(work, trained) -> RunFiles:
    """A copy of the trained run, to be damaged."""
    shutil.copytree(trained.folder, work / "runs")
    return RunFiles(work / "runs", trained.guid)


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("part", "damage", "words"),
    [
        ("config", lambda path: path.write_text("{"), ("config_", "is not JSON")),
        ("config", lambda path: path.write_text("[]"), ("config_", "is not the config of a run")),
        ("config", lambda path: path.write_text("{}"), ("config_", "is not the config of a run")),
        ("config", lambda path: edit(path, lambda c: c.pop("train")), ("is not the config of a run",)),
        ("config", lambda path: edit(path, lambda c: c.update(model=[])), ("config_", "kind of model")),
        ("config", lambda path: edit(path, lambda c: c["model"].update(kind=[])), ("config_", "kind of model")),
        ("config", lambda path: edit(path, lambda c: c["model"].update(n_emb=0)), ("config_", "n_emb")),
        ("config", lambda path: edit(path, lambda c: c["model"].update(n_emb=16)), ("does not belong", "wte")),
        ("config", lambda path: edit(path, lambda c: c["model"].update(n_layers=2)), ("does not belong",)),
        ("config", lambda path: edit(path, lambda c: c["train"].update(lr=10**400)), ("config_", "lr")),
        ("config", lambda path: edit(path, lambda c: c["train"].update(dtype="int8")), ("config_", "dtype")),
        ("config", lambda path: edit(path, lambda c: c.update(train=3)), ("config_", "TrainConfig")),
        ("config", lambda path: edit(path, lambda c: c.update(vocab_size=5)), ("do not belong together",)),
        ("tokenizer", Path.unlink, ("tokenizer_", "cannot be read", "incomplete")),
        ("tokenizer", lambda path: path.write_text("null"), ("tokenizer_",)),
        ("tokenizer", lambda path: edit(path, lambda t: t["vocab"].pop()), ("tokenizer_",)),
        ("model", Path.unlink, ("there are no runs in",)),
        ("model", lambda path: path.write_bytes(b""), ("model_", "is damaged")),
        ("model", lambda path: path.write_bytes(path.read_bytes()[:-1]), ("model_", "is damaged")),
        ("model", lambda path: (path.unlink(), path.mkdir()), ("model_", "cannot be read")),
        ("model", lambda path: _fill(path, math.nan), ("not finite",)),
        ("model", lambda path: _fill(path, 1e38), ("not finite",)),
    ],
)  # fmt: skip
def test_a_damaged_run(refused, copy, part, damage, words):
    damage(getattr(copy, part))
    refused("generate", "last", "--path=runs", "--backend=numpy", words=words)


def _fill(path: Path, value: float) -> None:
    save_file({name: np.full_like(array, value) for name, array in load_file(path).items()}, path)


# what an interrupt leaves -------------------------------------------------------------------------------


def interrupt_at(monkeypatch, step: int) -> None:
    draw = RandomWindows.batch

    def batch(self, at):
        if at == step:
            raise KeyboardInterrupt
        return draw(self, at)

    monkeypatch.setattr(RandomWindows, "batch", batch)


@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupt_before_the_first_step_leaves_nothing(work, refused, monkeypatch, existed):
    if existed:
        a_run(work / "runs")
    interrupt_at(monkeypatch, 0)
    refused("train", "--path=runs", *flags(data="text.txt"), words=("interrupted before the first step",))
    assert (work / "runs").exists() == existed


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_an_interrupt_keeps_the_run_as_it_was_after_the_last_whole_step(work, call, monkeypatch, step):
    settings = flags(data="text.txt", num_steps=5, schedule="constant", warmup_steps=0)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        code, out, err = call("train", "--path=stopped", *settings)
    assert (code, err) == (0, "")
    assert f"interrupted: the run was stopped after step {step}" in out
    stopped = baby_xp.api.load(path="stopped")
    assert stopped.config["result"]["state"] == "stopped"
    assert stopped.config["result"]["steps"] == step
    # a run of only so many steps has the same weights and losses
    assert call("train", "--path=whole", *settings, f"--num-steps={step}")[0] == 0
    whole = baby_xp.api.load(path="whole")
    assert whole.config["result"]["state"] == "done"
    assert stopped.params.tobytes() == whole.params.tobytes()
    assert stopped.config["result"]["val_loss"] == whole.config["result"]["val_loss"]
    assert metrics_of(stopped.files)[-1]["step"] == step
    assert int(load_file(stopped.files.state)["step"][0]) == step


def test_an_interrupt_while_progress_is_shown_keeps_that_step(work, monkeypatch):
    class Impatient(baby_xp.api.Silent):
        def progress(self, step, loss, tokens_per_second):
            raise KeyboardInterrupt

    run = baby_xp.api.train(
        "baby", path="runs", backend="numpy", listener=Impatient(),
        data="text.txt", n_ctx=8, n_emb=8, head_size=8, n_layers=1, batch_size=4, num_steps=30,
    )  # fmt: skip
    assert run.config["result"]["steps"] == 10
    assert metrics_of(run.files)[-1]["step"] == 10
    assert int(load_file(run.files.state)["step"][0]) == 10


def test_an_interrupt_inside_a_step_gives_up_that_step(work, monkeypatch):
    from baby_xp.training import loop

    advance = loop._Run.advance

    def cut_short(self, state):
        new = advance(self, state)
        if self.step == 3:
            raise KeyboardInterrupt  # after all was computed, before it was kept
        return new

    monkeypatch.setattr(loop._Run, "advance", cut_short)
    run = baby_xp.api.train(
        "baby", path="runs", backend="numpy",
        data="text.txt", n_ctx=8, n_emb=8, head_size=8, n_layers=1, batch_size=4, num_steps=30,
    )  # fmt: skip
    assert run.config["result"]["steps"] == 2
    assert metrics_of(run.files)[-1]["step"] == 2


def test_an_interrupt_elsewhere_ends_with_the_code_of_one(work, call, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(task, "prepare", interrupted)
    assert call("train", "--path=runs", *flags()) == (130, "", "baby_xp: interrupted\n")
    assert not (work / "runs").exists()


# good paths: training -----------------------------------------------------------------------------------


def metrics_of(files: RunFiles) -> list[dict]:
    data = files.metrics.read_bytes()
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
    assert f"more: python -m baby_xp generate --path 'my runs' {guid[:8]}" in out


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
    assert (config["result"]["state"], config["result"]["steps"]) == ("done", 3)
    assert 0 < config["result"]["val_loss"] < 2 * math.log(len(set(TEXT)))


def test_the_tokenizer_has_the_characters_of_the_text(trained):
    tokenizer = tokenizer_from_dict(json.loads(trained.tokenizer.read_text()), "here")
    assert list(tokenizer.vocab) == sorted(set(TEXT))


def test_the_weights_have_their_names_and_the_state_fits_them(trained):
    weights, state = load_file(trained.model), load_file(trained.state)
    assert {"wte.weight", "wpe.weight", "ln_f.gain", "lm_head.weight", "lm_head.bias"} <= weights.keys()
    assert any(name.startswith("blocks.0.") for name in weights)
    assert weights["wte.weight"].shape == (len(set(TEXT)), 8)
    count = sum(array.size for array in weights.values())
    assert state["m"].shape == state["v"].shape == (count,)
    assert state["step"].tolist() == [3]
    assert json.loads(trained.config.read_text())["parameters"] == count
    assert {array.dtype.name for array in weights.values()} == {"float32"}


def test_the_metrics_are_valid_line_by_line_and_the_report_has_them(trained):
    records = metrics_of(trained)
    assert [record["step"] for record in records] == [2, 3]
    assert [record["whole_validation"] for record in records] == [False, True]
    report = trained.report.read_text(encoding="utf-8")
    assert "Losses, in nats a token" in report
    for record in records:
        assert record.keys() == {"step", "train_loss", "val_loss", "whole_validation", "lr", "seconds"}
        line = next(line for line in report.splitlines() if line.split()[:1] == [str(record["step"])])
        assert line.split()[1:3] == [f"{record['train_loss']:.4f}", f"{record['val_loss']:.4f}"]
    config = json.loads(trained.config.read_text())
    assert config["result"]["val_loss"] == records[-1]["val_loss"]
    assert trained.guid in report
    assert trained.completion().read_text(encoding="utf-8").strip() in report


def test_a_seed_reproduces_a_run_and_another_seed_gives_another(work):
    runs = [baby_xp.api.load(a_run(work / "runs", seed=seed), path=work / "runs") for seed in (0, 0, 1)]
    assert runs[0].params.tobytes() == runs[1].params.tobytes()
    assert runs[0].params.tobytes() != runs[2].params.tobytes()
    assert runs[0].files.completion().read_text() == runs[1].files.completion().read_text()


def test_windows_newlines_and_a_byte_order_mark_give_the_same_run(work):
    guids = []
    for data in (TEXT.encode(), b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode()):
        (work / "text.txt").write_bytes(data)
        guids.append(a_run(work / "runs"))
    runs = [baby_xp.api.load(guid, path=work / "runs") for guid in guids]
    assert "\r" not in runs[1].tokenizer.vocab
    assert runs[0].params.tobytes() == runs[1].params.tobytes()
    assert len(list((work / "runs" / "corpora").iterdir())) == 1  # the same text, so the same ids


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


def test_double_precision_is_kept(work):
    guid = a_run(work / "runs", dtype="float64")
    weights = load_file(RunFiles(work / "runs", guid).model)
    assert {array.dtype.name for array in weights.values()} == {"float64"}


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


def test_a_seed_reproduces_a_text_and_another_gives_another(copy, call):
    texts = [generated(call, copy, "--num-tokens=40", f"--seed={seed}") for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("how", ["--seed=3", "--greedy", "--top-k=3", "--top-p=0.5", "--temperature=0.5"])
def test_without_the_cache_the_text_is_the_same(copy, call, how):
    texts = [generated(call, copy, "--num-tokens=40", "--prompt=it", how, *more) for more in ([], ["--no-cache"])]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("more", "expected"), [([], True), (["--cache"], True), (["--no-cache"], False)])
def test_the_cache_is_used_unless_it_is_refused(copy, call, monkeypatch, more, expected):
    asked, init = [], Logits.__init__
    monkeypatch.setattr(
        Logits, "__init__", lambda self, *args: asked.append(args[-1]) or init(self, *args)
    )
    generated(call, copy, "--num-tokens=1", *more)
    assert asked == [expected]


def test_greedy_does_not_ask_the_seed(copy, call):
    texts = {generated(call, copy, "--num-tokens=20", "--greedy", f"--seed={seed}") for seed in range(3)}
    texts |= {generated(call, copy, "--num-tokens=20", "--top-k=1", "--seed=9")}
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


@pytest.mark.parametrize("name", ["last", None, "beginning"])
def test_inference_is_another_word_for_generate(copy, call, name):
    names = {"last": ["last"], None: [], "beginning": [copy.guid[:8]]}[name]
    place = [f"--path={copy.folder}", "--backend=numpy", "--num-tokens=9"]
    assert call("inference", *names, *place)[:2] == call("generate", copy.guid, *place)[:2]


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
    assert "pip install 'baby_xp[torch]'" in states(out)["torch"]
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
    [*([command] for command in COMMANDS), *(["train", name] for name in PRESETS), ["generate", "x"]],
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


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_the_overview_names_every_command(call, arguments):
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    assert all(command in out for command in COMMANDS)


def test_the_version(call):
    assert call("--version") == (0, f"baby_xp {baby_xp.__version__}\n", "")


def test_nobody_who_reads_on_is_no_error(work):
    """As in `python -m baby_xp presets | head -0`."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "baby_xp", "presets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 141)  # 0: all was written before the pipe was closed
    process.stderr.close()


def test_the_program_ends_with_its_exit_code(work):
    done = subprocess.run(
        [sys.executable, "-m", "baby_xp", "train", "--data", "missing.txt"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "baby_xp: there is no file missing.txt; check the path\n"


def test_a_terminal_that_lacks_a_character_shows_another(work, trained):
    done = subprocess.run(
        [sys.executable, "-m", "baby_xp", "generate", f"--path={trained.folder}", "--prompt=\u20ac"],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 2
    assert b"'?' (U+20AC)" in done.stderr
    assert done.stderr.count(b"\n") == 1


# presets ------------------------------------------------------------------------------------------------


def shortened(name: str, work: Path, **more) -> list[str]:
    """The preset's own switches, dropout and schedule, with little to compute."""
    settings = {"backend": "numpy", **more}
    if not isinstance(PRESETS[name].model, EquationConfig):
        settings |= {"n-ctx": 8, "n-emb": 8, "head-size": 48, "n-layers": 2, "batch-size": 4}
        settings |= {} if PRESETS[name].data.data == "nursery" else {"data": work / "text.txt"}
    return ["train", name, *(f"--{key}={value}" for key, value in settings.items())]


@pytest.fixture
def short_nursery(monkeypatch):
    monkeypatch.setattr(task, "NURSERY_CHARACTERS", 330)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_starts(work, call, short_nursery, name):
    code, out, err = call(*shortened(name, work, **{"num-steps": 2}))
    assert (code, err) == (0, "")
    assert "step      2: train " in out


def test_the_equation_model_answers_what_it_never_saw(work, call):
    code, out, err = call("train", "equations", "--backend=numpy")
    assert (code, err) == (0, "")
    assert "4+4=8" in out
    (completion,) = (work / "runs" / "outputs").glob("completion_*.txt")
    assert completion.read_text() == "4+4=8\n"
    assert call("generate", "--prompt=4+4=", "--num-tokens=1", "--greedy")[1] == "4+4=8\n"
    # a text longer than the context: the model sees its last four tokens, as in training
    assert call("generate", "--prompt=1+2=", "--num-tokens=2", "--greedy")[1] == "1+2=3 \n"


def losses(files: RunFiles) -> np.ndarray:
    return np.array([[record["train_loss"], record["val_loss"]] for record in metrics_of(files)])


@pytest.fixture
def quick_compilation():
    """XLA without its optimizations: it compiles in a third of the time."""
    import jax

    with contextlib.suppress(AttributeError):  # a version that does not know it
        jax.config.update("jax_disable_most_optimizations", True)
    yield
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_disable_most_optimizations", False)


AGES = [name for name in PRESETS if name.endswith("-months")]


def test_the_ages_differ_in_their_context_alone():
    contexts = [PRESETS[name].model.n_ctx for name in AGES]
    assert contexts == [8, 16, 32, 64, 128]
    assert len({replace(PRESETS[name].model, n_ctx=1) for name in AGES}) == 1
    assert len({PRESETS[name].train for name in AGES}) == 1


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in PRESETS if name not in AGES[1:]])
@pytest.mark.parametrize("other", ["torch", "array-api-strict", "jax"])
def test_a_preset_gives_the_same_losses_on_every_backend(
    work, call, short_nursery, monkeypatch, request, name, other
):
    """One age stands for all: they differ in the context alone, which is shortened here."""
    try:
        backends.load(other)
    except BackendUnavailable as error:
        pytest.skip(error.reason)
    monkeypatch.setattr(baby_xp.api, "sample_of", lambda *args: "")  # slow where nothing is compiled
    if other == "jax":
        request.getfixturevalue("quick_compilation")
    # 330 tokens, so that validation is one batch of one shape: what jit compiles, it compiles once
    (work / "text.txt").write_text(TEXT[:330])
    found = []
    for backend in ("numpy", other):
        path = f"--path={backend}"
        assert call(*shortened(name, work, backend=backend, **{"num-steps": 4, "eval-every": 1}), path)[0] == 0
        found.append(losses(baby_xp.api.load(path=backend, backend="numpy").files))
    assert found[0].shape == (4, 2)
    assert not np.isnan(found[0]).any()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


# from Python --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [
    {"n_ctxx": 8}, {"n_hidden": 8}, {"tokenizer": "bpe"}, {"data": 5}, {"dropout": "much"}, {"seed": 1.5},
])  # fmt: skip
def test_overrides_are_checked(work, values):
    with pytest.raises(BabyError, match=next(iter(values))):
        baby_xp.api.train("baby", path="runs", **values)
    assert not (work / "runs").exists()
