"""Pictures: what they show, and that nothing but asking for one needs matplotlib."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_inspect import LETTERS, a_run, gpt_config

from baby_xp.errors import BabyError
from baby_xp.inspection import plots, printing
from baby_xp.text.tokenizer import CharTokenizer


@pytest.fixture(scope="module")
def drawing():
    return pytest.importorskip("matplotlib", reason="the extra plots is not installed")


@pytest.fixture(scope="module")
def seen():
    return a_run(gpt_config()).inspect("the cat")


@pytest.fixture
def figures(drawing, monkeypatch) -> list:
    """The figures that are written, in place of their files."""
    written: list = []
    monkeypatch.setattr(plots, "save", lambda figure, path: written.append(figure) or path)
    return written


def panels(figure) -> list:
    return [axes for axes in figure.axes if axes.get_title()]


def test_one_head_is_drawn_with_the_tokens_at_its_axes(figures, seen):
    assert plots.attention(seen, "a.png", (1, 2)) == Path("a.png")
    (axes,) = panels(figures[0])
    assert axes.get_title() == "layer 1, head 2"
    drawn = axes.images[0].get_array()
    np.testing.assert_array_equal(drawn.filled(0), seen.attention(1, 2))
    np.testing.assert_array_equal(drawn.mask, np.triu(np.ones((7, 7), bool), 1))  # the future is left out
    assert axes.images[0].get_clim() == (0, 1)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["t", "h", "e", "␣", "c", "a", "t"]


def test_all_heads_make_a_grid(figures, seen):
    plots.attention(seen, "a.png")
    found = {axes.get_title(): axes.images[0].get_array().filled(0) for axes in panels(figures[0])}
    assert list(found) == [f"layer {layer}, head {head}" for layer in range(2) for head in range(3)]
    for layer in range(2):
        for head in range(3):
            np.testing.assert_array_equal(found[f"layer {layer}, head {head}"], seen.attention(layer, head))


@pytest.mark.first_case
@pytest.mark.parametrize(("kind", "begins"), [("PNG", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_name_decides_the_kind_of_file(drawing, seen, tmp_path, kind, begins):
    path = tmp_path / f"a.{kind}"
    assert plots.attention(seen, path, (0, 0)) == path
    assert path.read_bytes().startswith(begins)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_characters_that_mean_something_to_matplotlib_or_that_it_lacks(drawing, tmp_path):
    run = a_run(gpt_config(), CharTokenizer(("$", "_", "漢", "\u0e01", "\n")))
    plots.attention(run.inspect("$_$漢\u0e01\n$"), tmp_path / "a.png", (0, 0))
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_command_draws(drawing, tmp_path):
    run = a_run(gpt_config())
    for attention in (None, "all", "1.0"):
        file = tmp_path / f"{attention}.png"
        lines = printing.report(run, printing.InspectOptions("the cat", attention=attention, picture=str(file)))
        assert f"picture: {file}" in lines
        assert not any("attention of layer" in line for line in lines)
        assert file.exists()
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes["None.png"] == sizes["all.png"] != sizes["1.0.png"]


@pytest.mark.parametrize(("name", "word"), [("a.gif2", "ends in one"), ("a", ".png"), ("no/a.png", "no folder")])
def test_a_picture_that_cannot_be_written(drawing, tmp_path, monkeypatch, name, word):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BabyError, match=word) as caught:
        printing.report(a_run(gpt_config()), printing.InspectOptions("the cat", picture=name))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_kind_that_is_offered_can_be_written(drawing, seen, tmp_path):
    with pytest.raises(BabyError, match="ends in one of") as caught:
        plots.check(tmp_path / "a.pgf")  # for which another program is needed
    kinds = [kind.strip(" .") for kind in str(caught.value).split("one of")[1].split(",")]
    assert {"png", "svg", "pdf"} <= set(kinds)
    assert "pgf" not in kinds
    for kind in kinds:
        assert plots.attention(seen, tmp_path / f"a.{kind}", (0, 0)).stat().st_size


def test_whatever_fails_while_a_picture_is_drawn_is_one_line(drawing, seen, tmp_path, monkeypatch):
    for error in (RuntimeError("xelatex\nnot found"), OSError(28, "full"), KeyError("x"), ValueError()):

        def savefig(*_, error=error, **__):
            raise error

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
        with pytest.raises(BabyError, match=r"a\.png cannot be drawn \(.+\); try a name that ends in") as caught:
            plots.attention(seen, tmp_path / "a.png", (0, 0))
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", [5, None, b"a.png", "a\0.png"])
def test_a_picture_goes_to_a_path(drawing, seen, file):
    with pytest.raises(BabyError, match="picture"):
        plots.attention(seen, file)


def test_without_matplotlib_the_error_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BabyError, match=r"pip install -e '\.\[plots\]'") as caught:
        printing.report(a_run(gpt_config()), printing.InspectOptions("the cat", picture=str(tmp_path / "a.png")))
    assert "\n" not in str(caught.value)
    assert printing.report(a_run(gpt_config()), printing.InspectOptions("the cat"))


def test_inspecting_a_run_imports_no_matplotlib():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:];"
        "from test_inspect import *; from baby_xp.evaluation import gradient_check;"
        "printing.report(a_run(gpt_config()), printing.InspectOptions('the cat', attention='all'));"
        "print([m for m in ('matplotlib', 'torch', 'jax') if m in sys.modules])"
    )
    folders = map(str, Path(__file__).parents[:2])
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_long_prompts_are_labelled_in_steps(figures):
    seen = a_run(gpt_config(n_ctx=170), LETTERS).inspect("the cat sat on " * 11)
    plots.attention(seen, "a.png", (0, 0))
    assert len(panels(figures[0])[0].get_xticks()) == 55
