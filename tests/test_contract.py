"""The project's own rules: which module may import which, and that the code is tidy."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MATHS = [*(ROOT / "baby_xp/layers").glob("*.py"), *(ROOT / "baby_xp/models").glob("*.py")]
MATHS += [ROOT / "baby_xp/training" / f"{name}.py" for name in ("muon", "optimizers", "schedules", "step")]
MATHS += [ROOT / "baby_xp/arrays/rng.py"]
ARRAYS = {"numpy", "cupy", "cupyx", "torch", "jax", "jaxlib", "scipy", "array_api_compat", "array_api_strict"}


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("path", MATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_maths_imports_no_array_library(path):
    assert not imported(path) & ARRAYS


def test_only_backends_import_an_array_library_other_than_numpy():
    for path in (ROOT / "baby_xp").rglob("*.py"):
        assert not imported(path) & (ARRAYS - {"numpy"}), path


def test_each_backend_file_imports_only_its_own_library():
    known = {"numpy": {"numpy"}, "cupy": {"numpy", "cupy"}, "torch": {"torch"}}
    known |= {"jax": {"numpy", "jax"}, "strict": {"numpy", "array_api_strict"}}
    for name, libraries in known.items():
        found = imported(ROOT / f"backends/{name}_backend.py") & ARRAYS
        assert found <= libraries | {"array_api_compat"}, name


def test_imports_run_one_way():
    """The contracts of pyproject.toml: every module has a rank, and there are no cycles."""
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


PRODUCT = [path for folder in ("baby_xp", "backends", "data") for path in (ROOT / folder).rglob("*.py")]
BENCH = [*(ROOT / "bench").rglob("*.py")]
OURS = [*PRODUCT, *BENCH, *(ROOT / "tests").rglob("*.py")]
PACKAGES = ("baby_xp", "baby_xp_backends", "baby_xp_data", "bench")


def modules_used(tree: ast.AST) -> dict[str, str]:
    """The modules and names of this project that a file imports, by their names in the file."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def misnamed(path: Path) -> list[str]:
    """Names that a file imports under an alias, or that are private in another module."""
    tree = ast.parse(path.read_text("utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            found += [alias.asname for alias in node.names if alias.asname not in (None, alias.name)]
            found += [alias.name for alias in node.names if alias.name.startswith("_") and alias.name[:2] != "__"]
    known = modules_used(tree)
    for node in ast.walk(tree):
        of_ours = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known
        if of_ours and node.attr.startswith("_") and not node.attr.startswith("__"):
            found.append(f"{node.value.id}.{node.attr}")
    return found


def test_one_name_one_thing():
    """No module or name of this project is imported under an alias, and no private name is used elsewhere."""
    assert {str(path.relative_to(ROOT)): found for path in OURS if (found := misnamed(path))} == {}


def test_no_two_modules_share_a_name():
    names = [path.stem for path in PRODUCT if not path.stem.startswith("__")]
    names += [path.parent.name for path in PRODUCT if path.stem == "__init__"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_no_module_is_too_long_and_the_root_not_too_full():
    lengths = {path.name: len(path.read_text("utf-8").splitlines()) for path in [*PRODUCT, *BENCH]}
    assert [name for name, number in lengths.items() if number > 450] == []
    assert len(list((ROOT / "baby_xp").glob("*.py"))) <= 13


def test_import_needs_only_the_standard_library():
    code = "import sys, baby_xp; print([m for m in ('numpy', 'torch', 'argparse', 'tqdm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_training_imports_no_library_of_another_backend():
    code = (
        "import sys; from baby_xp import api; from baby_xp.arrays import registry; registry.load('numpy');"
        "print([m for m in ('torch', 'jax', 'cupy', 'array_api_strict', 'docstring_parser', 'pooch')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_ruff_is_clean():
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    done = subprocess.run([ruff, "check", "--no-cache", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
