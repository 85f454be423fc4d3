"""docs/parameters.md, its tables compared with the results, and the benchmark that measures them."""

import json
import re
from dataclasses import fields

import pytest
from baby_xp_data import nursery
from bench_cases import FAILURE, ROOT, answering

from baby_xp import presets
from baby_xp.config import DataConfig, GPTConfig, TrainConfig
from baby_xp.errors import BabyError
from baby_xp.text import dataset
from bench import harness, parameters, variants
from bench.parameters import Variant
from bench.peers import ours

PAGE = ROOT / "docs/parameters.md"
TINY = {"n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 4}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A base that trains in no time, on a text that needs no download; the text of the catalog is short."""
    base = {"data": "nursery", "num_steps": 4, "eval_every": 2, "sample_tokens": 0, **TINY}
    monkeypatch.setattr(parameters, "BASE", base)
    monkeypatch.setattr(dataset, "NURSERY_CHARACTERS", 3000)
    monkeypatch.setattr(parameters.catalog, "find", lambda name: tmp_path / "whole.txt")
    (tmp_path / "whole.txt").write_text(nursery.generate(4000, 1), "utf-8")


def restrict(monkeypatch, *some: Variant) -> list[str]:
    """Restricts the benchmark to a few variants -> their keys."""
    monkeypatch.setattr(parameters, "ALL", list(some))
    return [one.key for one in some]


def test_the_tables_of_the_page_match_the_newest_results():
    kept, text = variants.read(variants.newest("parameters")), PAGE.read_text("utf-8")
    assert variants.filled(text, parameters.tables(kept)) == text
    assert sorted(re.findall(variants.MARK.format("(.*)"), text)) == sorted(parameters.groups())
    assert kept["base"] == parameters.base()
    assert {key: found["overrides"] for key, found in kept["trained"].items()} == {
        one.key: one.overrides for one in parameters.ALL
    }
    assert kept["timed"].keys() == {one.key for one in parameters.to_time()}


@pytest.mark.parametrize("config", [GPTConfig, TrainConfig, DataConfig])
def test_every_parameter_has_its_section(config):
    headings = " ".join(re.findall(r"^### (.*)$", PAGE.read_text("utf-8"), re.MULTILINE))
    assert [field.name for field in fields(config) if f"`{field.name}`" not in headings] == []


def test_each_variant_differs_from_the_base_only_as_named(tmp_path, monkeypatch):
    monkeypatch.setattr(parameters.catalog, "find", lambda name: tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text("x" * parameters.SHORT + "y", "utf-8")
    value_of = lambda chosen, name: next(  # noqa: E731
        getattr(part, name) for part in (chosen.model, chosen.train, chosen.data) if hasattr(part, name)
    )
    long = presets.preset(parameters.PRESET).override(parameters.BASE)
    short = long.override({"num_steps": parameters.SHORT_STEPS})
    for one in parameters.ALL:
        settings = parameters.settings_of(one, tmp_path)
        presets.preset(parameters.PRESET).override(settings)
        assert settings["data"] == (str(tmp_path / "short.txt") if one.short else parameters.BASE["data"])
        base = short if one.short else long
        assert all(value_of(base, name) != value for name, value in one.overrides.items()), one.key
        if not one.overrides and one.group in {field.name for field in fields(GPTConfig) + fields(TrainConfig)}:
            value = one.value.partition(",")[0].partition(":")[0]
            assert value in (f"{value_of(long, one.group)}", "none", f"batch_size {long.train.batch_size}")
    assert (tmp_path / "short.txt").read_text("utf-8") == "x" * parameters.SHORT
    for group in parameters.groups():
        assert sum(not one.overrides for one in parameters.ALL if one.group == group) == 1, group
    trained = [one.key for one in parameters.to_train()]
    assert sorted(trained) == sorted({one.key for one in parameters.ALL})
    assert trained[0] == "base"


# training and timing ------------------------------------------------------------------------------------


def test_a_variant_is_trained(tiny, monkeypatch):
    wide, base, bad = restrict(
        monkeypatch, Variant("n_emb", "16", {"n_emb": 16, "accumulate": 2}), Variant("seed", "0"),
        Variant("n_heads", "3", {"n_heads": 3}),
    )  # fmt: skip
    found = parameters.trained(wide)
    assert (found["steps"], found["tokens"], found["failed"]) == (4, 4 * 4 * 2 * 8, None)
    assert [point[0] for point in found["curve"][:2]] == [2, 4]
    assert found["val_loss"] == found["curve"][-1][2]
    assert found["parameters"] > parameters.trained(base)["parameters"]
    assert "n_heads" in parameters.trained(bad)["failed"]


def test_a_stopped_training_is_not_kept(tiny, monkeypatch):
    stopped, ended = restrict(
        monkeypatch, Variant("seed", "0", {"max_minutes": 1e-9}),
        Variant("patience", "1", {"patience": 1, "lr": 1e-9, "min_lr": 1e-9}),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        parameters.trained(stopped)
    assert parameters.trained(ended)["failed"] is None


def test_the_short_text_is_used_for_training(tiny, monkeypatch):
    monkeypatch.setattr(parameters, "SHORT", 800)
    monkeypatch.setattr(parameters, "SHORT_STEPS", 2)
    keys = restrict(monkeypatch, *(Variant("short text", "x", short=short) for short in (False, True)))
    whole, short = (parameters.trained(key) for key in keys)
    assert whole["val_loss"] != short["val_loss"]
    assert (whole["steps"], short["steps"]) == (4, 2)


def test_kept_results_are_not_trained_again_nor_mixed_with_another_base(tmp_path, monkeypatch):
    asked = []
    answering(monkeypatch, lambda task, key: asked.append(key) or found_of(1.0))
    file = tmp_path / "new" / "of-parameters.json"
    parameters.train_all(file, 1, ["seed"])
    assert asked == ["base", "seed 1", "seed 2"]
    parameters.train_all(file, 2, ["seed", "n_ctx"])
    assert sorted(asked[3:]) == ["n_ctx 128", "n_ctx 16", "n_ctx 32"]
    assert json.loads(file.read_text())["trained"].keys() == set(asked)
    assert "n_ctx" in file.with_suffix(".md").read_text()
    monkeypatch.setattr(parameters, "BASE", {**parameters.BASE, "lr": 0.5})
    with pytest.raises(BabyError, match="base"):
        parameters.train_all(file, 1, ["seed"])


def test_a_training_that_dies_ends_the_others(tmp_path, monkeypatch):
    asked = []

    def fail(task, key):
        asked.append(key)
        raise harness.Failed(FAILURE)

    answering(monkeypatch, fail)
    with pytest.raises(harness.Failed):
        parameters.train_all(tmp_path / "x-parameters.json", 1, parameters.groups())
    assert len(asked) < len(parameters.to_train())


def test_a_step_is_timed_with_the_workers_and_threads_of_train(tiny, monkeypatch):
    fits, fit = [], ours.fit_as_train_does
    monkeypatch.setattr(ours, "fit_as_train_does", lambda *arguments: fits.append(1) or fit(*arguments))
    found = parameters.timed("base", steps=3)
    assert (len(found["ms"]), found["workers"], fits) == (3, 1, [1])
    assert min(found["ms"]) > 0


def test_the_median_is_over_the_times_of_all_rounds():
    idle, sizes = [{"peak": 10 << 20, "shared": 0}], [([1.0, 2.0, 9.0], 30), ([3.0, 4.0], 25)]
    runs = [{"ms": ms, "memory": [{"peak": mib << 20, "shared": 0}], "workers": 1} for ms, mib in sizes]
    found = variants.speed_of(runs, idle)
    assert (found["ms"], found["by_round"], found["memory"]) == (2.75, [2.0, 3.5], 15 << 20)
    assert variants.speed_of(runs, [])["memory"] is None


# the tables ---------------------------------------------------------------------------------------------


def found_of(loss: float, **more) -> dict:
    """What `trained` returns."""
    curve = [[100, loss + 0.5, loss + 0.4, 1.0], [200, loss - 0.1, loss + 0.2, 1.0], [100, None, loss, 1.0]]
    facts = {"parameters": 1234, "tokens": 5678, "curve": curve, "best_step": 100, "val_loss": loss}
    return {"overrides": {}, "failed": None, "steps": 200, **facts, **more}


def test_rows_and_tables():
    trained = {"base": found_of(2.0), "n_ctx 16": found_of(2.25), "short text": found_of(3.0)}
    trained["lr 0.1, min_lr 0.01"] = {"overrides": {}, "failed": "the loss became nan at step 3; largest: x"}
    timed = {"n_ctx 16": {"ms": 12.345, "by_round": [12.345], "memory": 3 << 20, "workers": 1}}
    rate = {"alone": 50.0, "two at once": 50.0, "best": 50.0}
    rates = {"product_rate_before": rate, "product_rate_after": {**rate, "alone": 20.0}}
    result = {"date": "2026-01-02", "machine": {}, "trained": trained, "timed": timed, "timed_on": "x", **rates}

    def row_of(key: str, group: str) -> list[str]:
        variant = next(one for one in parameters.ALL if (one.key, one.group) == (key, group))
        return [*parameters.row(variant, result).values()]

    assert row_of("n_ctx 16", "n_ctx") == ["16", "1,234", "12.3", "3", "2.150", "2.250", "+0.250"]
    assert row_of("base", "n_ctx") == ["64 (base)", "1,234", "", "", "1.900", "2.000", ""]
    diverged = row_of("lr 0.1, min_lr 0.01", "lr")  # the reason is shown in place of the loss
    assert ("nan" in diverged[2], "largest" in diverged[2], diverged[3]) == (True, False, "")
    assert row_of("short text", "short text")[1:] == ["2.900", "3.200", "3.000", "100"]
    found = parameters.tables(result)
    assert (len(found["n_ctx"]), len(found["lr"])) == (2 + 2, 2 + 2)  # the base is a row of both
    assert any("BUSY" in line for line in parameters.document(result))


def test_only_the_marked_tables_of_a_page_are_replaced():
    page = "text\n\n<!-- table: n_ctx -->\n| old |\n| - |\n\nmore | text\n<!-- table: seed -->\nend\n"
    found = {"n_ctx": ["| a |", "| b |"], "seed": ["| c |"], "lr": ["| d |"]}
    filled = "text\n\n<!-- table: n_ctx -->\n| a |\n| b |\n\nmore | text\n<!-- table: seed -->\n| c |\nend\n"
    assert variants.filled(page, found) == filled == variants.filled(filled, found)
    with pytest.raises(BabyError, match="'n_ctx'"):
        variants.filled(page, {"seed": ["| c |"]})


def test_the_newest_results_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "RESULTS", tmp_path)
    assert variants.newest("parameters") is None
    for name in ("2026-01-02-a-parameters.json", "2026-02-01-a-parameters.json", "2026-03-01-a-generate.json"):
        (tmp_path / name).write_text("{}", "utf-8")
    assert variants.newest("parameters").name == "2026-02-01-a-parameters.json"
