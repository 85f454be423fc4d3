"""What is taken to a machine without a network: which wheels are asked for, what stays, and how large it is."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_cases import ROOT, says

from bench import carry


@pytest.fixture
def pip(monkeypatch, tmp_path) -> list[list[str]]:
    """The commands that are run. pip is replaced by what writes wheels of one MiB for what is asked for."""
    commands, text = [], tmp_path / "cache" / "shakespeare.txt"
    text.parent.mkdir()
    text.write_bytes(bytes(2**20))

    def run(command):
        commands.append(command)
        names = [re.match(r"[\w.-]+", word)[0] for word in command if ">=" in word]
        for name in (*names, "NumPy_Extra", "platformdirs"):
            (folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl").write_bytes(bytes(2**20))
        return SimpleNamespace(returncode=0)

    folder = tmp_path / "carried"
    monkeypatch.setattr(carry.subprocess, "run", run)
    monkeypatch.setattr(carry.catalog, "find", lambda name: text)
    return commands


def left(folder: Path) -> list[str]:
    return sorted(file.name.partition("-")[0] for file in folder.iterdir())


def test_what_is_there_is_left_out_also_where_something_else_needs_it(monkeypatch, capsys, pip, tmp_path):
    out = tmp_path / "carried"
    out.mkdir()
    (out / "tqdm-0.1-py3-none-any.whl").touch()  # of an earlier call
    have = "numpy,tqdm,pytest,numpy.extra,threadpoolctl,safetensors"
    assert says(monkeypatch, carry, "--out", str(out), "--have", have, "--cuda", "13", "--python", "3.13") == 0
    (command,) = pip
    asked = [re.match(r"[\w.-]+", word)[0] for word in command if ">=" in word]
    assert asked == [
        "array-api-compat", "docstring-parser", "pooch", "pytest-xdist", "hypothesis", "array-api-strict",
        "setuptools", "cupy-cuda13x", "nvmath-python",
    ]  # fmt: skip
    assert command[command.index("--python-version") + 1] == "3.13"
    assert "--only-binary=:all:" in command
    assert left(out) == sorted([*(name.replace("-", "_") for name in asked), "platformdirs", "shakespeare.txt"])
    said = capsys.readouterr().out.splitlines()
    assert "   11.00 MiB in all" in said
    assert said[-2].startswith(f"python -m pip install --no-index --find-links {out} -e '.[cuda13,graphs]' ")
    assert said[-1] == f"export BABY_XP_DATA={out}"


def test_too_much_and_what_pip_cannot_find_end_with_1_and_a_line(monkeypatch, capsys, pip, tmp_path):
    words = ["--out", str(tmp_path / "carried"), "--limit", "5"]
    assert says(monkeypatch, carry, *words) == 1
    assert "more than 5 MiB" in capsys.readouterr().err
    monkeypatch.setattr(carry.subprocess, "run", lambda command: SimpleNamespace(returncode=3))
    assert says(monkeypatch, carry, *words) == 1
    assert "exit code 3" in capsys.readouterr().err


def test_what_is_asked_for_is_what_setup_requires():
    text = (ROOT / "setup.cfg").read_text("utf-8")
    of_gpu = ["cupy-cuda12x>=14.0", "nvmath-python>=1.0"]
    for cuda, last in (None, ["setuptools>=77"]), ("12", of_gpu):
        found = carry.requirements(cuda)
        assert found[-len(last) :] == last
        assert all(f"    {line}\n" in text for line in found)
        assert found[0] == "numpy>=2.0"
