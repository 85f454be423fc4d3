"""bench.quality: recipes, times to a target, the table, and PyTorch's models beside baby_xp's."""

import importlib
import json
import math

import numpy as np
import pytest
from baby_xp_data import nursery
from bench_cases import FAILURE, answering, nothing, says

from bench import harness, peers, quality
from bench.quality import goal, reached, seconds_to, share

SIZES = "n_ctx=8 n_emb=8 head_size=8 n_heads=2 n_layers=2 batch_size=4 num_steps=6 warmup_steps=2"
CLASSIC = f"nanogpt-cpu: nanogpt-cpu {SIZES}"
MODERN = f"modern: nanogpt-cpu {SIZES} c_model=modern optimizer=muon schedule=linear min_lr=0"
SMEAR = MODERN.replace("modern:", "smear:") + " smear=true"


@pytest.fixture
def text(tmp_path) -> str:
    """A text that needs no download."""
    (tmp_path / "text.txt").write_text(nursery.generate(3000, 1), "utf-8")
    return str(tmp_path / "text.txt")


def run(*points: tuple[float, float], recipe: str = "modern", library: str = "baby_xp", seed: int = 0) -> dict:
    """A run with an evaluation of these seconds and this loss after every 10 steps."""
    curve = [[10 * i, at, loss, loss + 0.5] for i, (at, loss) in enumerate(points)]
    return {"recipe": recipe, "library": library, "seed": seed, "curve": curve, "about": {}, "parameters": 1000}


FAST, SLOW, NEVER = run((0, 4), (2, 1.9), (3, 1.8)), run((0, 4), (5, 1.85), (9, 1.95)), run((0, 4), (8, 1.9))


def test_the_time_to_a_target_is_that_of_the_first_evaluation_at_most_there():
    assert reached(FAST, 1.9) == [10, 2, 1.9, 2.4]
    assert seconds_to([FAST, SLOW, NEVER], 1.88) == [3, 5, math.inf]


def test_a_peer_that_does_not_reach_the_target_bounds_the_share_by_its_whole_time():
    assert share([FAST], [SLOW], 1.88) == (3 / 5, False)
    assert share([FAST], [NEVER, NEVER, SLOW], 1.88) == (3 / 8, True)
    assert share([NEVER], [FAST], 1.88) is None
    assert goal("x", (0.04, True), 0.05).endswith("at most 0.05: below 0.040, met")
    assert goal("x", (0.06, True), 0.05).endswith("below 0.060, undecided")
    assert goal("x", (0.06, False), 0.05).endswith(": 0.060, MISSED")


def test_a_difference_of_losses_names_both_and_nan_counts():
    ours = [[0, 0.0, 4.0, None], [1, 1.0, 3.0, None]]
    assert quality.disagreement(ours, [[0, 0.0, 4.0001, None], [1, 1.0, 3.0, None]]) is None
    for wrong in (3.001, math.nan):
        found = quality.disagreement(ours, [[0, 0.0, 4.0, None], [1, 1.0, wrong, None]])
        assert found == f"its losses differ: {wrong:.6f} after 1 steps, that of baby_xp 3.000000"


def test_each_run_is_kept_at_once_and_an_interrupted_measurement_continues(monkeypatch, capsys, tmp_path, text):
    file, turns = tmp_path / "q.json", []

    def answer(task, library, config, evaluations, check=False):
        name = "modern" if config["model"]["positions"] == "rotary" else "nanogpt-cpu"
        found = run((0, 4), (6 if library == "torch" else 1.5, 1.8), recipe=name, library=library)
        if not check:
            if turns:
                assert len(json.loads(file.read_text())["runs"]) == len(turns)
            turns.append((name, library, config["train"]["seed"]))
            if len(turns) == 3 and not file.with_suffix(".stop").exists():
                file.with_suffix(".stop").touch()
                raise KeyboardInterrupt
        return {name: found[name] for name in ("curve", "about", "parameters")}

    answering(monkeypatch, answer)
    words = ["--recipes", CLASSIC, MODERN, "--data", text, "--seeds", "2", "--out", str(file)]
    with pytest.raises(KeyboardInterrupt):
        says(monkeypatch, quality, *words)
    stopped = turns.pop()
    assert says(monkeypatch, quality, *words) == 0
    assert turns == [
        (name, library, seed)
        for seed in (0, 1)
        for name in ("nanogpt-cpu", "modern")
        for library in ("baby_xp", "torch")
    ]
    assert stopped == turns[2]
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert [len(one) for one in rows] == [15] * 6
    assert rows[-1] == [
        "modern", "torch", "1,000", "8", "10", "6.00", "6.00", "6.00", "2 of 2", "1.8000", "2.3000", "6.00",
        "1.8000", "2.3000", "0.250",
    ]  # fmt: skip
    assert "modern, share of PyTorch's time with nanogpt-cpu: at most 0.05: 0.250, MISSED" in out
    assert "modern, share of PyTorch's time with the same recipe: at most 0.5: 0.250, met" in out
    assert file.with_suffix(".md").read_text() == out
    # another target needs no measurement; another recipe of that name needs another file
    answering(monkeypatch, nothing)
    assert says(monkeypatch, quality, *words, "--target", "1.7") == 0
    assert "not reached" in capsys.readouterr().out
    assert says(monkeypatch, quality, "--recipes", f"{CLASSIC} lr=1", *words[3:]) == 2
    assert "has another recipe that is called 'nanogpt-cpu'" in capsys.readouterr().err
    assert says(monkeypatch, quality, *words, "--evaluations", "5") == 2
    assert "was measured differently" in capsys.readouterr().err
    file.write_text("{}")
    assert says(monkeypatch, quality, *words) == 2
    assert "is not a result of bench.quality" in capsys.readouterr().err


def test_a_library_that_differs_or_is_missing_is_left_out_in_one_line(monkeypatch, capsys, text):
    def answer(task, library, config, evaluations, check=False):
        if library == "torch":
            raise harness.Failed(FAILURE)
        return {"curve": [[0, 0.0, 4.0, None], [6, 1.0, 1.8, None]], "about": {}, "parameters": 9}

    answering(monkeypatch, answer)
    words = ["--recipes", MODERN, "--data", text, "--seeds", "1"]
    assert says(monkeypatch, quality, *words) == 1
    assert f"- modern, torch is left out: {FAILURE}" in capsys.readouterr().out
    monkeypatch.setattr(peers, "missing", lambda peer, backend: "torch is not installed: it is left out")
    assert says(monkeypatch, quality, *words) == 0
    assert capsys.readouterr().err.count("torch is not installed") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--recipes", "no-such"], ["--recipes", "equations"], ["--recipes", "a: "], ["--recipes", "baby depth=3"],
        ["--recipes", "baby n_ctx"], ["--recipes", "baby", "baby"], ["--recipes", "baby lr=fast"],
        ["--seeds", "0"], ["--target", "nan"], ["--peers", "theano"], ["--out", "folder"],
        ["--data", "no-such.txt"],
    ],
)  # fmt: skip
def test_bad_arguments_end_with_2_and_one_line(monkeypatch, capsys, words):
    answering(monkeypatch, nothing)
    assert says(monkeypatch, quality, *words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("bench.quality: ")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [CLASSIC, MODERN, SMEAR])
def test_pytorch_trains_the_same_model_to_the_same_losses(text, recipe):
    pytest.importorskip("torch")
    wider = recipe.replace("n_ctx=8", "n_ctx=72") + " dtype=float64 zero_init=true accumulate=2"
    config = quality.recipe(wider, text).config.to_dict()
    ours, theirs = (quality.trained(library, config, evaluations=3)["curve"] for library in ("baby_xp", "torch"))
    steps, seconds, *losses = (np.array(column) for column in zip(*ours, strict=True))
    assert steps.tolist() == [2, 4, 6]
    assert seconds[0] > 0
    assert (np.diff(seconds) > 0).all()
    assert losses[0][-1] < losses[0][0]
    assert (losses[0] != losses[1]).all()
    others = [np.array(column) for column in zip(*theirs, strict=True)][2:]
    np.testing.assert_allclose(others, losses, rtol=1e-7)


@pytest.mark.slow
def test_the_check_notices_a_pytorch_model_without_rotation(monkeypatch, text):
    modern = pytest.importorskip("torch") and importlib.import_module("bench.peers.torch_modern")
    config = quality.recipe(f"{MODERN} zero_init=false", text).config.to_dict()
    curve_of = lambda library: quality.trained(library, config, 2, check=True)["curve"]  # noqa: E731
    ours = curve_of("baby_xp")
    assert quality.disagreement(ours, curve_of("torch")) is None
    monkeypatch.setattr(modern, "rotated", lambda x, cos, sin: x)
    assert "its losses differ" in quality.disagreement(ours, curve_of("torch"))


@pytest.mark.slow
def test_the_check_notices_a_pytorch_model_that_smears_nothing(monkeypatch, text):
    modern = pytest.importorskip("torch") and importlib.import_module("bench.peers.torch_modern")
    config = quality.recipe(f"{SMEAR} zero_init=false", text).config.to_dict()
    curve_of = lambda library: quality.trained(library, config, 2, check=True)["curve"]  # noqa: E731
    ours = curve_of("baby_xp")
    assert quality.disagreement(ours, curve_of("torch")) is None
    monkeypatch.setattr(modern.Smear, "forward", lambda self, x: x + 0 * self.scale * self.gate(x))
    assert "its losses differ" in quality.disagreement(ours, curve_of("torch"))


@pytest.mark.slow
def test_models_that_pytorch_has_are_told_apart_from_others(text):
    pytest.importorskip("torch")
    agree = quality.recipe(MODERN, text).config
    assert quality.difference(agree, "torch") is None
    assert quality.difference(agree.override({"smear": True}), "torch") is None
    assert "switches" in quality.difference(agree.override({"qk_norm": False}), "torch")
    assert "switches" in quality.difference(quality.recipe(f"{CLASSIC} smear=true", text).config, "torch")
    assert "switches" in quality.difference(agree.override({"head_size": 16}), "torch")
