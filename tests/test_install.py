"""An installation that is a copy works from anywhere, the checkout's own folder included."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import TEXT, flags

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[1]
BACKENDS = {"numpy", "cupy", "torch", "jax", "array-api-strict"}
WHERE = """import json, baby_xp, baby_xp_backends, baby_xp_data
print(json.dumps([baby_xp.__file__, *baby_xp_backends.__path__]))
"""
# Libraries that take long to import are made missing: test_cli.py shows them.
LIST_BACKENDS = """import sys
sys.modules["torch"] = sys.modules["jax"] = None
from baby_xp.cli import main
sys.exit(main(["backends"]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds an installation, built without a network from a copy of the sources."""
    versions = {one.name: one.version for one in importlib.metadata.distributions() if one.name}
    if "pip" not in versions or int(versions.get("setuptools", "0").split(".")[0]) < 77:
        pytest.skip(f"building needs pip and setuptools 77; setuptools here: {versions.get('setuptools')}")
    folder = tmp_path_factory.mktemp("install")
    sources, target = folder / "sources", folder / "target"
    sources.mkdir()
    # a build writes into the folder of the sources; links keep it out of the checkout
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "baby_xp", "backends", "data"):
        if (CHECKOUT / name).exists():
            (sources / name).symlink_to(CHECKOUT / name)
    command = ["pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    built = subprocess.run(
        [sys.executable, "-m", *command, "--quiet", "--target", target, sources],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return target


@pytest.fixture
def distribution(installed):
    """What the installation says of itself."""
    (found,) = importlib.metadata.distributions(name="baby_xp", path=[str(installed)])
    return found


def environment(installed: Path) -> dict[str, str]:
    """That of who runs the tests, with the installation before all else but the folder that Python begins with."""
    return {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": ""}


@pytest.fixture(params=["elsewhere", "checkout"])
def python(request, installed, tmp_path):
    """Run Python with that installation, from some folder."""
    cwd = tmp_path if request.param == "elsewhere" else CHECKOUT

    def run(*arguments) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300,
            env=environment(installed),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.cwd = cwd
    return run


def test_the_copy_is_what_is_imported_unless_the_checkout_is_the_current_folder(python, installed):
    package, backends = json.loads(python("-c", WHERE))
    expected = installed if python.cwd != CHECKOUT else CHECKOUT  # `python -c` looks here first
    assert Path(package) == expected / "baby_xp" / "__init__.py"
    assert Path(backends) == installed / "baby_xp_backends"  # the checkout has no folder of that name


def test_the_backends_are_found(python):
    lines = python("-c", LIST_BACKENDS).splitlines()
    states = {line.split()[0]: line.split()[1] for line in lines[:-1]}
    assert states.keys() == BACKENDS
    assert states["numpy"] == "works"
    assert lines[-1].startswith("auto takes ")


def test_it_trains_and_generates(python, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    place = [f"--path={tmp_path / 'runs'}", "--backend=numpy"]
    out = python("-m", "baby_xp", "train", *place, *flags(data=text, workers=2))
    assert "step      2" in out
    out = python("-m", "baby_xp", "generate", "last", *place, "--prompt=the cat", "--num-tokens=5")
    assert out.startswith("the cat")
    assert len(out) == len("the cat") + 5 + 1


def test_every_module_and_every_cuda_source_is_in_the_installation(installed):
    for name, source in (("baby_xp", "baby_xp"), ("baby_xp_backends", "backends"), ("baby_xp_data", "data")):
        for pattern in ("*.py", "*.cu", "*.cuh", "py.typed"):
            here = {path.relative_to(CHECKOUT / source) for path in (CHECKOUT / source).rglob(pattern)}
            assert here == {path.relative_to(installed / name) for path in (installed / name).rglob(pattern)}


def test_the_entry_points_lead_somewhere(installed, distribution):
    points = {(point.group, point.name): point.value for point in distribution.entry_points}
    assert points.pop(("console_scripts", "baby_xp")) == "baby_xp.cli:main"
    assert points.keys() == {("baby_xp.backends", name) for name in BACKENDS}
    for value in points.values():
        module, name = value.split(":")
        source = installed / (module.replace(".", "/") + ".py")
        assert f"class {name}" in source.read_text(encoding="utf-8")


def test_the_licence_and_the_notice_are_in_the_installation(distribution):
    assert "Apache-2.0" in (distribution.metadata["License-Expression"], distribution.metadata["License"])
    assert set(distribution.metadata.get_all("License-File")) == {"LICENSE", "NOTICE"}


def test_the_script_runs(installed, distribution):
    script = installed / "bin" / "baby_xp"
    if not script.exists():
        pytest.skip("pip makes no script in bin here")
    done = subprocess.run(
        [sys.executable, script, "--version"], capture_output=True, text=True, timeout=300,
        env=environment(installed),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"baby_xp {distribution.version}\n")
