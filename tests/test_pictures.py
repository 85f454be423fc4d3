"""The picture of the README: the script that makes it works, and its files exist."""

import importlib.util
import re
from pathlib import Path

import pytest
from baby_xp_data import nursery

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/pictures"


@pytest.fixture(scope="module")
def make():
    """The module docs/pictures/make.py, which is not in a package."""
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    spec = importlib.util.spec_from_file_location("make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tiny_run_is_drawn_with_its_losses_and_samples(make, monkeypatch):
    sizes = {"n_ctx": 64, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 64}
    records, vocab_size = make.learn(num_steps=20, **sizes)
    assert [record["step"] for record in records] == [10, 20]
    assert all(len(record["sample"]) >= 40 for record in records)
    monkeypatch.setattr(make, "SAMPLES", {10: (13, 0), 20: (0, 30)})
    samples = [{**record, "sample": "A cat\nin a $hat$."} for record in records]
    for theme in make.COLOURS:
        (axes,) = make.draw(samples, vocab_size, theme).axes
        losses = [record["val_loss"] for record in records]
        assert any(list(line.get_ydata()) == losses for line in axes.lines)
        shown = [text.get_text() for text in axes.texts]
        assert shown.count("A cat in a $hat$.") == 2
        assert {f"step {step}, loss {loss:.2f}" for step, loss in zip((10, 20), losses, strict=True)} < {*shown}
        assert any(f"{nursery.entropy_per_character():.4f}" in text for text in shown)


def test_the_same_records_give_the_same_files_for_both_themes(make, tmp_path):
    records = [{"step": step, "val_loss": 4 / step, "sample": "a $b$ c"} for step in (1, 10, 20)]
    for again in ("first", "second"):
        (tmp_path / again).mkdir()
        make.save(records, 50, tmp_path / again)
    for theme in ("light", "dark"):
        first, second = (tmp_path / again / f"baby-{theme}.svg" for again in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != (tmp_path / "first/baby-light.svg").read_bytes()


def test_the_pictures_of_the_readme_are_there():
    named = re.findall(r'(?:src|srcset)="([^"]+)"', (ROOT / "README.md").read_text("utf-8"))
    assert named == ["docs/pictures/baby-dark.svg", "docs/pictures/baby-light.svg"]
    for name in named:
        assert (ROOT / name).read_text("utf-8").startswith("<?xml")
