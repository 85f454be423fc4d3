"""What type checkers see of the package, and that its own types are consistent."""

import os
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path

import pytest

from baby_xp import config, presets
from baby_xp.inference.generate import Sampling
from baby_xp.inference.trained_model import SamplingSettings

ROOT = Path(__file__).parents[1]
PACKAGES = {"baby_xp": "baby_xp", "baby_xp_backends": "backends", "baby_xp_data": "data"}


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Run mypy where the packages have their installed names -> its lines."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    folder = tmp_path_factory.mktemp("types")
    for name, source in PACKAGES.items():
        try:
            (folder / name).symlink_to(ROOT / source, target_is_directory=True)
        except OSError:
            pytest.skip("no links can be made here")

    def run(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *arguments]
        environment = {**os.environ, "MYPYPATH": str(folder), "NO_COLOR": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.slow
def test_the_packages_are_typed(mypy):
    found = mypy(*(part for name in PACKAGES for part in ("-p", name)))
    assert found[-1].startswith("Success"), "\n".join(found)


PROGRAM = """
import baby_xp
run = baby_xp.load("last")
reveal_type(run)
reveal_type(run.generate("Once ", temperature=0.7))
reveal_type(run.evaluate())
reveal_type(baby_xp.list_runs()[0].val_loss)
run.generate("Once ", temprature=0.7)
baby_xp.train("baby", n_layer=3)
baby_xp.train("baby", n_layers=3, data="my.txt", lr=1e-3)
"""


@pytest.mark.slow
def test_a_type_checker_knows_the_public_names(mypy, tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    lines = [line for line in mypy(str(file)) if "program.py:" in line and "defined in" not in line]
    found = [line.partition(": ")[2] for line in lines]
    kinds = [line.partition("Revealed type is ")[2].strip('"') for line in found if "Revealed" in line]
    assert kinds == ["baby_xp.run.Run", "str", "baby_xp.evaluation.evaluate.Evaluation", "float | None"]
    wrong = [line for line in found if line.startswith("error")]
    assert len(wrong) == 2
    assert '"temprature"' in wrong[0]
    assert '"n_layer"' in wrong[1]


def test_keyword_arguments_are_the_fields_of_the_configs():
    parts = (
        config.GPTConfig, config.Combination, config.EquationConfig, config.TrainConfig, config.DataConfig,
        config.EquationData,
    )  # fmt: skip
    kinds = {field.name: typing.get_type_hints(part)[field.name] for part in parts for field in fields(part)}
    both = (typing.get_type_hints(part)["activation"] for part in (config.GPTConfig, config.EquationConfig))
    kinds["activation"] = typing.Literal[tuple(word for words in both for word in typing.get_args(words))]
    settings = typing.get_type_hints(presets.Settings)
    assert settings.keys() == kinds.keys()
    assert {name for name in kinds if settings[name] != kinds[name]} == {"data"}  # a path may be path-like
    assert typing.get_type_hints(SamplingSettings) == typing.get_type_hints(Sampling)
