"""bench.recipes: its variants, tiny trainings of them, tuning without the validation part, and its tables."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name

import pytest
from baby_xp_data import nursery
from bench_cases import ROOT, answering, nothing, says

from baby_xp import presets
from baby_xp.config import CLASSIC, DataConfig
from baby_xp.text import dataset
from bench import recipes, variants
from bench.recipes import CHANGES, PLAIN, TEXTS, Variant, variants_of

PAGE = ROOT / "docs/recipes.md"
SIZES = {"n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 8}
TINY = {**SIZES, "num_steps": 4, "eval_every": 2, "sample_tokens": 0}
TUNED = " ".join(f"{name}={value}" for name, value in TINY.items())


@pytest.fixture
def tiny(monkeypatch):
    """Everything trains in no time, in this process; answers with the names of the trainings."""
    asked = []

    def answer(task, **request):
        asked.append(recipes.of_seed(request.get("key") or request["label"], request["seed"]))
        return resolve_name(task)(**request)

    monkeypatch.setattr(recipes, "SETTINGS", {**TINY, "data": "nursery"})
    monkeypatch.setattr(recipes, "SHORTER", {text: {} for text in TEXTS})
    monkeypatch.setattr(recipes, "WINDOW", 4)
    monkeypatch.setattr(dataset, "NURSERY_CHARACTERS", 3000)
    answering(monkeypatch, answer)
    return asked


def settings(config) -> dict:
    """All settings of a config in one dict."""
    return {**asdict(config.model), **asdict(config.train), **asdict(config.data)}


def differing(one: Variant, base: str) -> dict:
    """The settings of a variant that differ from a recipe's on the same text."""
    of_base = settings(Variant(one.text, base).config)
    return {name: value for name, value in settings(one.config).items() if value != of_base[name]}


# the variants -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_plain_and_full_are_as_described_and_all_changes_lead_from_one_to_the_other(text):
    full = presets.preset(TEXTS[text]).override(recipes.earlier(text))
    assert full.data.data == text
    assert differing(Variant(text, "full"), "full") == {}
    plain = settings(Variant(text, "plain").config)
    assert plain == {**settings(full), **CLASSIC, **{name: PLAIN[name] for name in PLAIN if name != "c_model"},
                     **recipes.SETTINGS, **recipes.SHORTER[text]}  # fmt: skip
    changes = [one for one in variants_of(text) if one.name in CHANGES]
    added = {name: value for one in changes if one.sign == "+" for name, value in one.changed}
    left_out = {name: value for one in changes if one.sign == "-" for name, value in one.changed}
    assert Variant(text, "plain", "+", "all", tuple(added.items())).config == Variant(text, "full").config
    assert Variant(text, "full", "-", "all", tuple(left_out.items())).config == Variant(text, "plain").config
    # each setting belongs to one change, which is added to plain and left out of full
    assert sorted(added) == sorted(name for one in changes if one.sign == "+" for name, _ in one.changed)
    assert [one.name for one in changes if one.sign == "+"] == [one.name for one in changes if one.sign == "-"]


@pytest.mark.parametrize("text", TEXTS)
def test_each_variant_differs_from_its_base_only_as_named(text):
    found = variants_of(text)
    assert len({one.key for one in found}) == len(found)
    full = Variant(text, "full").config
    for one in found:
        changed = dict(one.changed)
        assert differing(one, one.base) == changed, one.key
        if one.sign == "+" and one.name in CHANGES:
            assert one.base == "plain"
            assert changed == {name: recipes.value_of(full, name) for name in changed}
        if one.sign == "-":
            assert one.base == "full"
        if one.name == "context of 64":
            size = one.config.train.batch_size * one.config.model.n_ctx
            assert size == full.train.batch_size * full.model.n_ctx


# training -----------------------------------------------------------------------------------------------


def test_a_measurement_is_continued_by_the_same_command(tiny, monkeypatch, capsys, tmp_path):
    file = tmp_path / "x-recipes.json"
    words = ["--train", "--table", "--texts", "nursery", "--only", "Muon,QK-norm", "--file", str(file)]
    assert says(monkeypatch, recipes, *words, "--seeds", "1") == 0
    names = ["plain", "full", "plain + QK-norm", "full - QK-norm", "plain + Muon", "full - Muon"]
    assert tiny == [f"nursery, {name}, seed 0" for name in names]
    found = json.loads(file.read_text("utf-8"))["trained"]
    assert [*found] == tiny
    one = found["nursery, full - Muon, seed 0"]
    assert (one["overrides"], one["seed"], one["failed"], one["steps"]) == ({"optimizer": "adamw"}, 0, None, 4)
    assert [point[0] for point in one["curve"][:2]] == [2, 4]
    assert one["val_loss"] == one["curve"][-1][2]
    assert 0 < abs(one["loss_64"] - one["val_loss"]) < 0.1  # in windows of 4
    assert "left out of full" in capsys.readouterr().out
    assert "left out of full" in file.with_suffix(".md").read_text("utf-8")
    assert says(monkeypatch, recipes, *words, "--seeds", "2", "--jobs", "2") == 0
    assert sorted(tiny[6:]) == sorted(f"nursery, {name}, seed 1" for name in names)
    answering(monkeypatch, nothing)
    assert says(monkeypatch, recipes, *words, "--seeds", "2") == 0
    assert str(tmp_path) not in file.read_text("utf-8")
    # what is called the same must be the same
    monkeypatch.setitem(CHANGES, "QK-norm", ("qk_norm", "embedding_norm"))
    assert says(monkeypatch, recipes, *words) == 2
    assert "has another 'nursery, plain + QK-norm'" in capsys.readouterr().err
    monkeypatch.setitem(recipes.SETTINGS, "num_steps", 5)
    assert says(monkeypatch, recipes, *words) == 2
    assert "is of another base" in capsys.readouterr().err


def test_recipes_are_tuned_without_the_validation_part(tiny, monkeypatch, capsys, tmp_path):
    seen, train, file = [], variants.trained, tmp_path / "tune.json"

    def spy(preset, changed, folder):
        seen.append(Path(changed["data"]).read_text("utf-8"))
        return train(preset, changed, folder)

    monkeypatch.setattr(variants, "trained", spy)
    words = ["--tune", f"fast: baby {TUNED} muon_lr=0.1", f"slow: baby {TUNED}", "--file", str(file)]
    assert says(monkeypatch, recipes, *words, "--seeds", "2") == 0
    assert tiny == [f"{name}, seed {seed}" for seed in (0, 1) for name in ("fast", "slow")]
    corpus = dataset.read_corpus(DataConfig("nursery"), None)
    assert seen == [corpus.tokenizer.decode(corpus.train)] * 4
    kept = json.loads(file.read_text("utf-8"))["trained"]
    assert kept["fast, seed 0"]["val_loss"] != kept["slow, seed 0"]["val_loss"]
    assert kept["fast, seed 0"]["config"]["train"]["muon_lr"] == 0.1
    assert str(tmp_path) not in file.read_text("utf-8")
    assert "data" not in kept["fast, seed 0"]
    out = capsys.readouterr().out
    assert out.rstrip("\n") == file.with_suffix(".md").read_text("utf-8").rstrip("\n")
    assert f"{kept['fast, seed 1']['val_loss']:.4f})" in out
    answering(monkeypatch, nothing)
    assert says(monkeypatch, recipes, *words, "--seeds", "2") == 0
    assert says(monkeypatch, recipes, "--tune", f"slow: baby {TUNED} lr=1", *words[3:]) == 2
    assert "another recipe that is called 'slow'" in capsys.readouterr().err
    assert says(monkeypatch, recipes, "--table", "--train", "--file", str(file)) == 2
    assert "is of another base" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "reason"), [
    ([], "nothing to do"),
    (["--train", "--only", "Moun"], "unknown change 'Moun'"),
    (["--train", "--texts", "bible"], "unknown text 'bible'"),
    (["--table", "--file", "no-such.json"], "there is no no-such.json"),
    (["--tune", "shakespeare"], "name it with --file"),
    (["--tune", "shakespeare", "--train", "--file", "x.json"], "leave out"),
    (["--tune", "shakespeare lr", "--file", "x.json"], "'lr' is not a setting"),
    (["--tune", "shakespeare data=my.txt", "--file", "x.json"], "is about my.txt: choose shakespeare or nursery"),
    (["--tune", "shakespeare", "shakespeare ", "--file", "x.json"], "two of them are called 'shakespeare'"),
])  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, capsys, words, reason):
    answering(monkeypatch, nothing)
    assert says(monkeypatch, recipes, *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert reason in lines[-1]
    assert lines[-1].startswith("bench.recipes: ")


# the tables ---------------------------------------------------------------------------------------------


def found_of(*losses: float, shift: float = 0.1) -> list[dict]:
    """What `trained` returns for these seeds."""
    return [
        {"seed": seed, "failed": None, "val_loss": loss, "loss_64": loss + shift}
        for seed, loss in enumerate(losses)
    ]


def test_rows_and_tables():
    trained, least = {}, nursery.entropy_per_character()
    for key, runs in {
        "shakespeare, plain": found_of(2.1, 2.0, 2.3), "shakespeare, full": found_of(1.8, 1.9, 1.7),
        "shakespeare, plain + Muon": found_of(2.0, 1.7, 2.25), "shakespeare, full - Muon": found_of(1.9, 1.95),
        "shakespeare, full + 3 iterations": found_of(1.9),
        "shakespeare, plain + context of 64": found_of(2.2, shift=0.05),
        "shakespeare, full + tied head": [{"seed": 0, "failed": "the loss became nan at step 3; largest: x"}],
        "nursery, plain": found_of(least + 0.2), "nursery, full": found_of(least + 0.125),
    }.items():  # fmt: skip
        trained |= {recipes.of_seed(key, run["seed"]): run for run in reversed(runs)}
    rounds = {"shakespeare, full": [20.0, 21.0], "shakespeare, full - Muon": [35.0, 15.0]}
    timed = {key: {"by_round": ms} for key, ms in rounds.items()}
    result = {"date": "2026-01-02", "machine": {}, "trained": trained, "timed": timed, "timed_on": "x"}
    cells = {
        name: [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        for name, lines in recipes.tables(result).items()
    }
    assert [*cells] == ["shakespeare", "shakespeare, additions", "nursery"]
    assert cells["shakespeare"][0] == [
        "change", "settings", "added to plain", "step, plain", "left out of full", "step, full",
    ]  # fmt: skip
    assert cells["shakespeare"][2:] == [
        [
            "the recipe itself: loss", "", "2.100 (2.100, 2.000, 2.300)", "", "1.800 (1.800, 1.900, 1.700)",
            "20.0 ms",
        ],
        ["Muon", "optimizer adamw to muon", "-0.100 (-0.300 to -0.050)", "", "+0.075 (+0.050 to +0.100)", "0.75"],
    ]  # fmt: skip
    assert {row[0]: row[2:] for row in cells["shakespeare, additions"][2:]} == {
        "tied head": ["", "", "the loss became nan at step 3", ""],
        "context of 64": ["+0.100 (+0.100 to +0.100)", "", "", ""],
        "context of 64, both losses in windows of 64": ["+0.050 (+0.050 to +0.050)", "", "", ""],
        "3 iterations": ["", "", "+0.100 (+0.100 to +0.100)", ""],
    }
    assert cells["nursery"][2][:3] == ["the recipe itself: loss above the entropy", "", "0.200 (0.200)"]
    assert cells["nursery"][2][4] == "0.125 (0.125)"


def test_steps_are_timed_of_what_may_take_another_time(monkeypatch, tmp_path):
    asked, file = [], tmp_path / "x-recipes.json"
    variants.write(file, {"base": recipes.base(), "trained": {}, "timed": {"nursery, full": {"ms": 1.0}}}, [])

    def answer(task, key, steps):
        asked.append(key)
        return {"ms": [2.0] * steps, "memory": [], "workers": 1}

    answering(monkeypatch, answer)
    monkeypatch.setattr(recipes, "write", lambda file, result: variants.write(file, result, []))
    recipes.time_all(file, ["shakespeare"], ["Muon", "higher rate"], 3, 2)
    names = ["plain", "full", "plain + Muon", "full - Muon"]
    assert asked == [f"shakespeare, {name}" for name in names] * 2
    found = variants.read(file)["timed"]
    assert found["shakespeare, full - Muon"]["by_round"] == [2.0, 2.0]
    assert found["nursery, full"] == {"ms": 1.0}  # that of another text is kept


def test_the_tables_of_the_page_match_the_newest_results():
    file, text = variants.newest("recipes"), PAGE.read_text("utf-8")
    marks = re.findall(variants.MARK.format("(.*)"), text)
    assert sorted(marks) == sorted(name for one in TEXTS for name in (one, f"{one}, additions"))
    if file is None:
        assert not re.search(variants.MARK.format(".*") + r"\n\|", text)
        return
    kept = variants.read(file)
    assert variants.filled(text, recipes.tables(kept)) == text
    assert variants.completed(kept["base"]) == recipes.base()
    newer = {"smear"}  # changes that came after these results
    assert {key: found["overrides"] for key, found in kept["trained"].items()} == {
        recipes.of_seed(one.key, seed): one.overrides
        for one in recipes.all_variants() if one.name not in newer for seed in range(3)
    }  # fmt: skip
    assert not any(math.isnan(found["val_loss"]) for found in kept["trained"].values() if not found["failed"])
