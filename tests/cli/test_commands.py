"""The commands: training and its files, settings, generation. test_endings.py tests how training ends."""

import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import TEXT, TINY, flags, metrics_of

import baby_xp
from baby_xp.errors import BabyError
from baby_xp.inference.generate import Logits
from baby_xp.run import Run
from baby_xp.runs import state_file, store
from baby_xp.text.tokenizer import tokenizer_from_dict
from baby_xp.training.listener import Listener


def train(**more) -> Run:
    return baby_xp.train("classic", **{**TINY, "sample_tokens": 0, **more})


# files --------------------------------------------------------------------------------------------------


def test_every_file_of_the_layout_is_there_and_nothing_else(trained):
    (ids,) = (trained.folder / "corpora").iterdir()
    files = {path for path in trained.folder.rglob("*") if path.is_file()}
    assert files == {*trained.of_training, ids}


def test_the_config_says_what_was_asked_and_how_it_ended(trained):
    config = json.loads(trained.config.read_text(encoding="ascii"))
    assert (config["guid"], config["preset"], config["base"]) == (trained.guid, "classic", None)
    assert config["model"]["kind"] == "gpt"
    assert (config["model"]["n_ctx"], config["train"]["batch_size"], config["train"]["num_steps"]) == (8, 4, 3)
    assert config["vocab_size"] == len(set(TEXT))
    assert config["data"]["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert config["machine"]["backend"].startswith("numpy ")
    assert config["place"] == {"backend": "numpy", "device": None, "workers": 1}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", config["started"])
    assert config["started"] <= config["written"]
    result = config["result"]
    assert (result["state"], result["reason"], result["steps"]) == ("done", "steps", 3)
    assert result["best_step"] in (2, 3)
    assert 0 < result["val_loss"] < 2 * math.log(len(set(TEXT)))
    assert store.read_sealed(trained.config) == {k: v for k, v in config.items() if k != "checksum"}
    tokenizer = json.loads(trained.tokenizer.read_text())
    assert list(tokenizer_from_dict(tokenizer, "here").vocab) == sorted(set(TEXT))
    for path, step in ((trained.model, result["best_step"]), (trained.state, 3)):
        metadata = state_file.read_metadata(path)
        assert (metadata["guid"], metadata["step"]) == (trained.guid, str(step))
        assert json.loads(metadata["model"]) == config["model"]
        assert metadata["tokenizer"] == store.digest(tokenizer)
        assert re.fullmatch("[0-9a-f]{64}", metadata["checksum"])


def test_the_weights_have_their_names_and_the_state_fits_them(trained):
    weights, state = load_file(trained.model), load_file(trained.state)
    assert {"wte.weight", "wpe.weight", "ln_f.gain", "lm_head.weight", "lm_head.bias"} <= weights.keys()
    assert any(name.startswith("blocks.0.") for name in weights)
    assert weights["wte.weight"].shape == (len(set(TEXT)), 8)
    count = sum(array.size for array in weights.values())
    assert state["params"].shape == state["m"].shape == state["v"].shape == (count,)
    assert state["step"].tolist() == [3]
    assert json.loads(trained.config.read_text())["parameters"] == count
    assert {array.dtype.name for array in weights.values()} == {"float32"}


def test_the_metrics_are_valid_line_by_line_and_the_report_has_them(trained):
    *records, final = metrics_of(trained)
    assert [record["step"] for record in records] == [2, 3]
    best = min(records, key=lambda record: record["val_loss"])
    # the text is short, so the sample of the validation part is all of it
    assert final.keys() == {"step", "train_loss", "val_loss", "whole_validation", "lr", "grad_norm", "seconds"}
    assert (final["step"], final["train_loss"], final["whole_validation"]) == (best["step"], None, True)
    assert final["val_loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    report = trained.report.read_text(encoding="utf-8")
    for record in records:
        assert record.keys() == {*final, "sample"}
        assert record["whole_validation"] is False
        line = next(line for line in report.splitlines() if line.split()[:1] == [str(record["step"])])
        assert line.split()[1:3] == [f"{record['train_loss']:.4f}", f"{record['val_loss']:.4f}"]
    result = json.loads(trained.config.read_text())["result"]
    assert (result["val_loss"], result["train_loss"]) == (final["val_loss"], records[-1]["train_loss"])
    assert trained.guid in report
    assert trained.completion().read_text(encoding="utf-8").strip() in report


def test_the_order_of_writing_makes_a_run_safe(work, rate_times, monkeypatch):
    """The config is written last at the start and at the end; a checkpoint before the weights that follow from it,
    and these only if they are better than before."""
    order, rename = [], os.replace
    note = lambda path: order.append(Path(path).name.partition("_")[0])  # noqa: E731
    monkeypatch.setattr(os, "replace", lambda old, new: (note(new), rename(old, new)))
    rate_times(1, 1e4)
    train(eval_every=1, checkpoint_every=1)
    assert order[0].endswith(".ids")
    assert order[1:] == [
        "tokenizer", "state", "model", "config",
        "state", "model", "state", "state", "completion", "report", "config",
    ]  # fmt: skip


def test_resuming_repairs_a_kill_between_a_checkpoint_and_its_weights(work, monkeypatch):
    """The checkpoint already has the new best weights; their own file has the previous ones."""

    class Killed(BaseException):
        pass

    rename = os.replace

    def replace(old, new):
        steps = [state_file.read_metadata(path)["step"] for path in Path("runs/models").glob("state_*")]
        if "model_" in str(new) and steps == ["3"]:
            raise Killed
        rename(old, new)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        train(eval_every=3, checkpoint_every=1)
    monkeypatch.setattr(os, "replace", rename)
    assert [(run.state, run.steps) for run in baby_xp.list_runs()] == [("stopped", 3)]
    run = baby_xp.resume()
    assert (run.config["result"]["state"], run.config["result"]["best_step"]) == ("done", 3)
    best, last = (baby_xp.load(weights=weights) for weights in ("best", "last"))
    np.testing.assert_array_equal(run.params, last.params)
    np.testing.assert_array_equal(best.params, last.params)


def test_a_run_exists_from_its_start(work):
    """Whatever happens later, it can be found, loaded and resumed, but not while it trains."""
    seen = []

    class Onlooker(Listener):
        def started(self, session, step):
            run = baby_xp.load(weights="last")
            files = run.files
            assert {path for path in files.of_training if path.exists()} == {
                files.config, files.tokenizer, files.model, files.state,
            }  # fmt: skip
            assert (run.config["result"]["state"], run.config["result"]["steps"]) == ("running", 0)
            assert len(run.generate(num_tokens=2)) == 2
            assert state_file.read_metadata(files.model)["step"] == "0"
            assert baby_xp.load(weights="best").params.tobytes() == run.params.tobytes()
            assert [summary.state for summary in baby_xp.list_runs()] == ["running"]
            self.evaluated(None)

        def evaluated(self, record):
            with pytest.raises(BabyError, match="is being trained by another process") as caught:
                baby_xp.resume()
            seen.append(str(caught.value))

    run = train(listener=Onlooker(), eval_every=3)
    assert len(seen) == 3
    assert all(run.guid in message for message in seen)
    assert run.config["result"]["state"] == "done"


# settings -----------------------------------------------------------------------------------------------


def test_a_seed_reproduces_a_run_and_another_seed_gives_another(work):
    runs = [train(seed=seed) for seed in (0, 0, 1)]
    assert runs[0].params.tobytes() == runs[1].params.tobytes() != runs[2].params.tobytes()
    assert runs[0].files.completion().read_text() == runs[1].files.completion().read_text()


def test_epochs_decide_the_number_of_steps(work):
    config = train(num_epochs=1, stride=50, num_steps=None, schedule="constant").config
    windows = (int(0.9 * len(TEXT)) - 9) // 50 + 1
    assert config["result"]["steps"] == config["train"]["num_steps"] == -(-windows // 4)


def test_the_byte_tokenizer_can_be_chosen(work, call):
    (work / "text.txt").write_text("\u20ac and \u00e9. " * 60, encoding="utf-8")
    assert call("train", *flags(tokenizer="byte"))[0] == 0
    code, out, _ = call("generate", "--prompt=\u00e9", "--num-tokens=40")
    assert code == 0
    assert out.startswith("\u00e9")
    (kept,) = (work / "runs" / "outputs").glob("completion_*_*.txt")
    assert kept.read_bytes().decode() == out


@pytest.mark.parametrize("number", [0, 7, 80])
def test_each_evaluation_prints_a_sample_of_the_given_length(work, call, number):
    code, out, _ = call("train", *flags(sample_tokens=number))
    assert code == 0
    last = baby_xp.load(weights="last")
    *records, final = metrics_of(last.files)
    assert "sample" not in final
    assert [len(record.get("sample", "")) for record in records] == [number] * 2
    for record in records:
        (line,) = (line for line in out.splitlines() if line.startswith(f"step {record['step']:>6}: train"))
        assert line.endswith("  " + " ".join(record["sample"].split()) if number else " s")
    if number:
        assert records[-1]["sample"] == last.generate(num_tokens=number, seed=0)


@pytest.mark.first_case
@pytest.mark.parametrize("epochs", [True, False], ids=["an epoch with a smaller last step", "random windows"])
@pytest.mark.parametrize("workers", [2, 1])
def test_accumulated_gradients_train_like_a_large_batch(work, workers, epochs):
    how = {"num_steps": 4, "eval_every": 1, "dropout": 0.2, "dtype": "float64", "base_batch_size": 4}
    if epochs:  # 19 windows: a step of 12 and one of 7, of which a part of 3 and one of 1 are the last
        how |= {"num_epochs": 2, "num_steps": None, "stride": 49}
    found = []
    for batch_size, accumulate, processes in ((12, 1, 1), (3, 4, workers)):
        run = train(**how, batch_size=batch_size, accumulate=accumulate, workers=processes)
        assert run.config["result"]["steps"] == 4
        *records, _ = metrics_of(run.files)
        names = ("train_loss", "val_loss", "lr", "grad_norm")
        found.append([[record[name] for name in names] for record in records])
    assert len(found[0]) == 4
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)


# generation ---------------------------------------------------------------------------------------------


def generated(call, *arguments: str) -> str:
    code, out, err = call("generate", "--backend=numpy", *arguments)
    assert code == 0
    assert Path(err.removeprefix("saved to ").rstrip("\n")).read_text(encoding="utf-8") == out
    return out.removesuffix("\n")


def test_generate_prints_the_same_text_as_from_python(copied, call):
    text = generated(call, "--prompt=the cat ", "--num-tokens=30", "--seed=4", "--top-k=5")
    assert text.startswith("the cat ")
    assert len(text) == len("the cat ") + 30
    run = baby_xp.load(backend="numpy")
    assert run.generate("the cat ", 30, seed=4, top_k=5) == text
    assert "".join(run.stream("the cat ", 30, seed=4, top_k=5)) == text.removeprefix("the cat ")
    assert len(generated(call, "--num-tokens=7")) == 7  # without a prompt, generation starts by itself


def test_the_cache_is_used_unless_switched_off(copied, call, monkeypatch):
    asked, init = [], Logits.__init__
    monkeypatch.setattr(Logits, "__init__", lambda self, *args: asked.append(args[-1]) or init(self, *args))
    for more in ([], ["--cache"], ["--no-cache"]):
        generated(call, "--num-tokens=1", *more)
    assert asked == [True, True, False]


def test_greedy_ignores_the_seed(copied, call):
    texts = {generated(call, "--num-tokens=20", *how) for how in (["--greedy"], ["--top-k=1", "--seed=9"])}
    run = baby_xp.load(backend="numpy")
    assert texts == {run.generate(num_tokens=20, greedy=True, seed=seed) for seed in range(3)}
    assert len(texts) == 1


def test_each_generation_is_saved_under_a_new_name(copied, call):
    """Also those that end in the same second."""
    texts = [generated(call, "--num-tokens=20", f"--seed={seed}") for seed in range(3)]
    kept = sorted((copied.folder / "outputs").glob(f"completion_{copied.guid}_*.txt"))
    assert sorted(path.read_text().removesuffix("\n") for path in kept) == sorted(texts)
    assert all(re.fullmatch("[0-9]{14}", path.stem.rpartition("_")[2]) for path in kept)


def test_inference_is_an_alias_of_generate(copied, call):
    place = ["--backend=numpy", "--num-tokens=9"]
    expected = call("generate", copied.guid, *place)[:2]
    for names in (["last"], [], [copied.guid[:8]]):
        assert call("inference", *names, *place)[:2] == expected


def test_the_requested_weights_are_loaded(trained):
    best, last = (baby_xp.load(path=trained.folder, weights=weights) for weights in ("best", "last"))
    assert best.params.tobytes() == baby_xp.load(path=trained.folder).params.tobytes()
    np.testing.assert_array_equal(last.params, load_file(trained.state)["params"], strict=True)
    assert best.config == last.config
    for weights in ("Best", "", None):
        with pytest.raises(BabyError, match=f"best, last, not {weights!r}"):
            baby_xp.load(path=trained.folder, weights=weights)
