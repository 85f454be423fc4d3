"""The guide of the parameters, its tables against what was measured, and the benchmark that measures it."""

import json
import re
from concurrent.futures import Future
from dataclasses import fields

import pytest
from baby_xp_data import nursery
from bench_cases import ROOT

from baby_xp import api, presets
from baby_xp.config import DataConfig, GPTConfig, TrainConfig
from baby_xp.errors import BabyError
from bench import harness, parameters
from bench.parameters import Variant
from bench.peers import ours

PAGE = ROOT / "docs/parameters.md"
TINY = {"n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def kept() -> dict:
    """The newest results in the repository."""
    return parameters.read(parameters.newest())


@pytest.fixture
def tiny(monkeypatch):
    """A base that trains in a moment, on a text that needs no download."""
    base = {"data": "nursery", "num_steps": 4, "eval_every": 2, "sample_tokens": 0, **TINY}
    monkeypatch.setattr(parameters, "BASE", base)
    monkeypatch.setattr(parameters.dataset, "NURSERY_CHARACTERS", 3000)


# the page


def test_the_tables_of_the_page_are_those_of_the_results(kept):
    text = PAGE.read_text("utf-8")
    assert parameters.filled(text, parameters.tables(kept)) == text
    assert sorted(re.findall(parameters.MARK.format("(.*)"), text)) == sorted(parameters.groups())


def test_the_results_are_of_these_variants(kept):
    assert kept["base"] == parameters.base()
    assert {key: found["overrides"] for key, found in kept["trained"].items()} == {
        one.key: one.overrides for one in parameters.ALL
    }
    assert kept["timed"].keys() == {one.key for one in parameters.to_time()}


@pytest.mark.parametrize("config", [GPTConfig, TrainConfig, DataConfig])
def test_every_parameter_has_its_section(config):
    headings = " ".join(re.findall(r"^### (.*)$", PAGE.read_text("utf-8"), re.MULTILINE))
    assert [field.name for field in fields(config) if f"`{field.name}`" not in headings] == []


# the variants


def test_each_variant_is_a_run_that_can_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(parameters.catalog, "find", lambda name: tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text("x" * parameters.SHORT + "y", "utf-8")
    for one in parameters.ALL:
        settings = parameters.settings_of(one, tmp_path)
        api.override(presets.preset(parameters.PRESET), settings)
        assert settings["data"] == (str(tmp_path / "short.txt") if one.short else parameters.BASE["data"])
    assert (tmp_path / "short.txt").read_text("utf-8") == "x" * parameters.SHORT


def test_a_variant_is_not_the_base_in_disguise():
    long = api.override(presets.preset(parameters.PRESET), parameters.BASE)
    short = api.override(long, {"num_steps": parameters.SHORT_STEPS})
    for one in parameters.ALL:
        chosen = short if one.short else long
        others = {name for name, value in one.overrides.items() if getattr_of(chosen, name) != value}
        assert others == one.overrides.keys(), one.key


def test_the_base_has_the_value_of_its_row():
    chosen = api.override(presets.preset(parameters.PRESET), parameters.BASE)
    for one in parameters.ALL:
        if not one.overrides and one.group in {field.name for field in fields(GPTConfig) + fields(TrainConfig)}:
            value = one.value.partition(",")[0].partition(":")[0]
            assert value in (f"{getattr_of(chosen, one.group)}", "none", f"batch_size {chosen.train.batch_size}")


def test_each_group_has_its_base_and_is_trained_once():
    for group in parameters.groups():
        assert sum(not one.overrides for one in parameters.ALL if one.group == group) == 1, group
    trained = [one.key for one in parameters.to_train()]
    assert len(trained) == len(set(trained))
    assert set(trained) == {one.key for one in parameters.ALL}
    assert trained[0] == "base"


def getattr_of(chosen, name):
    return next(getattr(part, name) for part in (chosen.model, chosen.train, chosen.data) if hasattr(part, name))


# training


def test_a_variant_is_trained(tiny):
    found = parameters.trained(Variant("n_emb", "16", {"n_emb": 16, "accumulate": 2}))
    assert (found["steps"], found["tokens"], found["failed"]) == (4, 4 * 4 * 2 * 8, None)
    assert [point[0] for point in found["curve"][:2]] == [2, 4]
    assert found["val_loss"] == found["curve"][-1][2]
    assert found["parameters"] > parameters.trained(Variant("seed", "0"))["parameters"]
    assert "does not divide" in parameters.trained(Variant("n_heads", "3", {"n_heads": 3}))["failed"]


def test_one_that_was_stopped_is_not_kept(tiny):
    with pytest.raises(KeyboardInterrupt):
        parameters.trained(Variant("seed", "0", {"max_minutes": 1e-9}))
    ended = parameters.trained(Variant("patience", "1", {"patience": 1, "lr": 1e-9, "min_lr": 1e-9}))
    assert ended["failed"] is None


def test_the_short_text_is_what_it_learns(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(parameters.catalog, "find", lambda name: tmp_path / "whole.txt")
    (tmp_path / "whole.txt").write_text(nursery.generate(4000, 1), "utf-8")
    monkeypatch.setattr(parameters, "SHORT", 800)
    monkeypatch.setattr(parameters, "SHORT_STEPS", 2)
    whole, short = (parameters.trained(Variant("short text", "x", short=short)) for short in (False, True))
    assert whole["val_loss"] != short["val_loss"]
    assert (whole["steps"], short["steps"]) == (4, 2)


def test_what_is_kept_is_not_trained_again(tmp_path, monkeypatch):
    asked = []

    class Pool:
        """A pool whose trainings are done at once."""

        __init__ = lambda self, *options: None  # noqa: E731
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

        def submit(self, function, one):
            asked.append(one.key)
            done = Future()
            done.set_result(found_of(1.0))
            return done

    monkeypatch.setattr(parameters, "ProcessPoolExecutor", Pool)
    file = tmp_path / "new" / "of-parameters.json"
    parameters.train_all(file, 1, ["seed"])
    assert asked == ["base", "seed 1", "seed 2"]
    parameters.train_all(file, 1, ["seed", "n_ctx"])
    assert asked[3:] == ["n_ctx 16", "n_ctx 32", "n_ctx 128"]
    assert json.loads(file.read_text())["trained"].keys() == set(asked)
    assert "n_ctx" in file.with_suffix(".md").read_text()


def test_results_of_another_base_are_not_mixed_in(tmp_path, monkeypatch):
    file = tmp_path / "of-parameters.json"
    parameters.write(file, parameters.beginning())
    monkeypatch.setattr(parameters, "BASE", {**parameters.BASE, "lr": 0.5})
    with pytest.raises(BabyError, match="another base"):
        parameters.train_all(file, 1, ["seed"])


# time


def test_a_step_is_timed_in_the_setting_that_train_runs_it_in(tiny, monkeypatch):
    fits, fit = [], ours.fit_as_train_does
    monkeypatch.setattr(ours, "fit_as_train_does", lambda *arguments: fits.append(1) or fit(*arguments))
    found = parameters.timed("base", steps=3)
    assert (len(found["ms"]), found["workers"], fits) == (3, 1, [1])
    assert min(found["ms"]) > 0


def test_times_of_all_rounds_make_the_median():
    idle = [{"peak": 10 << 20, "shared": 0}]
    runs = [
        {"ms": [1.0, 2.0, 9.0], "memory": [{"peak": 30 << 20, "shared": 0}], "workers": 1},
        {"ms": [3.0, 4.0], "memory": [{"peak": 25 << 20, "shared": 0}], "workers": 1},
    ]
    found = parameters.speed_of(harness.Entry("base", {}, runs), idle)
    assert (found["ms"], found["by_round"], found["memory"]) == (2.75, [2.0, 3.5], 15 << 20)
    assert parameters.speed_of(harness.Entry("base", {}, runs), [])["memory"] is None
    with pytest.raises(BabyError, match="out of memory"):
        parameters.speed_of(harness.Entry("base", {}, [], "out of memory"), idle)


# the tables


def found_of(loss: float, **more) -> dict:
    """What `trained` returns."""
    curve = [[100, loss + 0.5, loss + 0.4, 1.0], [200, loss - 0.1, loss + 0.2, 1.0], [100, None, loss, 1.0]]
    facts = {"parameters": 1234, "tokens": 5678, "curve": curve, "best_step": 100, "val_loss": loss}
    return {"overrides": {}, "failed": None, "steps": 200, **facts, **more}


@pytest.fixture
def result() -> dict:
    trained = {"base": found_of(2.0), "n_ctx 16": found_of(2.25), "short text": found_of(3.0)}
    trained["lr 0.1, min_lr 0.01"] = {
        "overrides": {},
        "failed": "the loss became nan at step 3; the largest was x",
    }
    timed = {"n_ctx 16": {"ms": 12.345, "by_round": [12.345], "memory": 3 << 20, "workers": 1}}
    return {"date": "2026-01-02", "machine": {"cores": 2}, "trained": trained, "timed": timed,
            "timed_on": "2026-01-03", "product_rate_before": {"alone": 50.0, "two at once": 50.0, "best": 50.0},
            "product_rate_after": {"alone": 20.0, "two at once": 20.0, "best": 50.0}}  # fmt: skip


def row_of(key: str, result: dict, group: str | None = None) -> dict[str, str]:
    variant = next(one for one in parameters.ALL if one.key == key and group in (None, one.group))
    return parameters.row(variant, result)


def test_rows(result):
    assert row_of("n_ctx 16", result) == {
        "n_ctx": "16", "parameters": "1,234", "ms a step": "12.3", "memory, MiB": "3",
        "training loss": "2.150", "validation loss": "2.250", "against the base": "+0.250",
    }  # fmt: skip
    base = row_of("base", result, "n_ctx")
    assert (base["n_ctx"], base["ms a step"], base["against the base"]) == ("64 (base)", "", "")
    diverged = row_of("lr 0.1, min_lr 0.01", result)  # the reason stands in the place of the loss
    assert diverged["validation loss"] == "the loss became nan at step 3"
    assert [*row_of("short text", result).values()][1:] == ["2.900", "3.200", "3.000", "100"]


def test_a_table_lists_what_was_trained_alone(result):
    found = parameters.tables(result)
    assert (len(found["n_ctx"]), len(found["lr"])) == (2 + 2, 2 + 2)  # the base is a row of both
    assert any("BUSY" in line for line in parameters.document(result))


def test_a_page_is_filled_in_its_places_alone(result):
    page = "text\n\n<!-- table: n_ctx -->\n| old |\n| - |\n\nmore | text\n<!-- table: seed -->\nend\n"
    found = {"n_ctx": ["| a |", "| b |"], "seed": ["| c |"], "lr": ["| d |"]}
    filled = "text\n\n<!-- table: n_ctx -->\n| a |\n| b |\n\nmore | text\n<!-- table: seed -->\n| c |\nend\n"
    assert parameters.filled(page, found) == filled == parameters.filled(filled, found)
    with pytest.raises(BabyError, match="'n_ctx'"):
        parameters.filled(page, {"seed": ["| c |"]})


def test_the_newest_results_count(tmp_path, monkeypatch):
    monkeypatch.setattr(parameters, "RESULTS", tmp_path)
    for name in ("2026-01-02-a-parameters.json", "2026-02-01-a-parameters.json", "2026-03-01-a-generate.json"):
        (tmp_path / name).write_text("{}", "utf-8")
    assert parameters.newest().name == "2026-02-01-a-parameters.json"
