"""Small runs, and fixtures that run commands; conftest.py imports them from here."""

import contextlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from quick import quick

import baby_xp
from baby_xp.cli import main
from baby_xp.runs.store import RunFiles

needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
LONGEST = 600
"""The most characters of a message, which may contain the longest possible file name."""
TEXT = "the cat sat on the mat.\nit sat and sat. " * 25
TINY = {
    "n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 4, "num_steps": 3,
    "eval_every": 2, "sample_tokens": 5, "workers": 1, "backend": "numpy", "data": "text.txt",
}  # fmt: skip


def flags(**values) -> list[str]:
    """The tiny settings with some of them replaced, as arguments."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, **values}.items()]


class StopAt(baby_xp.Listener):
    """Interrupts a run after the evaluation of a step."""

    def __init__(self, step: int):
        self.step = step

    def evaluated(self, record):
        if record["step"] == self.step:
            raise KeyboardInterrupt


def metrics_of(files: RunFiles) -> list[dict]:
    """The records of a run, each of them valid JSON."""

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    data = files.metrics.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line, parse_constant=no_constant) for line in data.splitlines()]


def wait_until(true: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def all_of(folder: Path) -> dict[str, bytes | None]:
    """All files with their contents, and all folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


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
        code = main(list(arguments))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(call, work):
    """Run a command that must fail: one line with these words, and the folder stays as it was -> the line."""

    def run(*arguments: str, words: tuple[str, ...] = (), code: int = 2) -> str:
        before = all_of(work)
        found, _, err = call(*arguments)
        assert (found, err[:9], err.count("\n"), err[-1:]) == (code, "baby_xp: ", 1, "\n"), err
        assert len(err) <= LONGEST
        assert [word for word in words if word not in err] == [], err
        assert all_of(work) == before
        return err

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> RunFiles:
    """A run with the tiny settings, made by a command; no test changes it."""
    folder, out = tmp_path_factory.mktemp("trained"), io.StringIO()
    (folder / "text.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    with quick(), contextlib.chdir(folder), contextlib.redirect_stdout(out):
        assert main(["train", "classic", *flags()]) == 0
    guid = next(line for line in out.getvalue().splitlines() if line.startswith("run ")).split()[1]
    return RunFiles(folder / "runs", guid)


@pytest.fixture
def copied(work, trained) -> RunFiles:
    """A copy of the trained run, in `runs` of the current folder."""
    shutil.copytree(trained.folder, work / "runs")
    return RunFiles(Path("runs"), trained.guid)
