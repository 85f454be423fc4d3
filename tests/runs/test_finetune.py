"""Finetuning keeps the existing rows of the model and adds rows for new characters."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_runs import all_of, metrics_of

import baby_xp
from baby_xp import api
from baby_xp.arrays import params
from baby_xp.cli import main
from baby_xp.config import GPTConfig, TrainConfig
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.run import Run

FIRST = "the cat sat on the mat.\nit sat and sat, and so did the hat. " * 30
OTHER = "Übermut tut selten gut; it sat and sat and did. " * 40
TINY = {
    "n_ctx": 8, "n_emb": 16, "head_size": 16, "n_heads": 2, "n_layers": 1, "batch_size": 8, "num_steps": 60,
    "eval_every": 30, "sample_tokens": 5, "lr": 1e-2, "backend": "numpy", "warmup_steps": 5,
}  # fmt: skip
AT_ONCE = {"max_minutes": 1e-9}
"""Ends before the first step."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    paths = {"first": folder / "first.txt", "other": folder / "other.txt"}
    for path, text in zip(paths.values(), (FIRST, OTHER), strict=True):
        path.write_text(text, encoding="utf-8", newline="\n")
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, texts) -> Run:
    """A run that no test changes."""
    return api.train("classic", path=tmp_path_factory.mktemp("runs"), data=texts["first"], **TINY)


@pytest.fixture
def base(tmp_path, trained) -> Run:
    """A copy of it in a separate folder."""
    shutil.copytree(trained.files.folder, tmp_path / "runs")
    return api.load(trained.guid, path=tmp_path / "runs", backend="numpy")


def finetune(base: Run, text: str, **more) -> Run:
    settings = {"num_steps": 40, "warmup_steps": 2, "eval_every": 20, "backend": "numpy", **more}
    return api.finetune(base.guid, path=base.files.folder, data=text, **settings)


def tree(run: Run) -> dict:
    return run.model.layout.unpack(np, run.params)


def test_new_characters_get_new_rows_and_old_rows_are_kept(base, texts):
    tuned = finetune(base, texts["other"], **AT_ONCE)
    old, new = base.tokenizer.vocab, tuned.tokenizer.vocab
    V = len(old)
    assert new[:V] == old
    assert new[V:] == tuple(sorted(set(OTHER) - set(FIRST)))
    before, now = tree(base), tree(tuned)
    drawn = tuned.model.layout.unpack(np, params.draw(tuned.model.spec, seed=0))
    for part, rows in (("wte", np.asarray), ("lm_head", np.transpose)):
        same, of_base, at_start = (rows(one[part]["weight"]) for one in (now, before, drawn))
        np.testing.assert_array_equal(same[:V], of_base)
        np.testing.assert_array_equal(same[V:], at_start[V:])
    assert 0.01 < np.std(now["wte"]["weight"][V:]) < 0.03
    np.testing.assert_array_equal(now["lm_head"]["bias"][:V], before["lm_head"]["bias"])
    assert not now["lm_head"]["bias"][V:].any()
    np.testing.assert_array_equal(now["wpe"]["weight"], before["wpe"]["weight"])
    of_block = [one["blocks"]["0"]["attention"]["qkv"]["weight"] for one in (now, before)]
    np.testing.assert_array_equal(*of_block)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_grown_model_keeps_every_bit_and_draws_the_rest_from_its_seed(dtype):
    config = GPTConfig(n_ctx=4, n_emb=4, head_size=4, n_heads=2, n_layers=1)
    model, larger = Model(config, 11), Model(config, 13)
    old = params.draw(model.spec, 0, "float64").astype(dtype)
    found = [params.grown(larger.spec, 7, model.layout, old), params.draw(larger.spec, 7, dtype)]
    now, drawn = (larger.layout.unpack(np, flat)["wte"]["weight"] for flat in found)
    np.testing.assert_array_equal(now[:11], model.layout.unpack(np, old)["wte"]["weight"], strict=True)
    np.testing.assert_array_equal(now[11:], drawn[11:], strict=True)


@pytest.mark.parametrize(("dtype", "other"), [("float32", "float64"), ("float64", "float32")])
def test_finetuning_in_another_precision_uses_it_from_the_start(tmp_path, texts, dtype, other):
    more = {"num_steps": 1, "dtype": dtype}
    base = api.train("classic", path=tmp_path / "runs", data=texts["first"], **{**TINY, **more})
    kept = []

    class Onlooker(baby_xp.Listener):
        def started(self, session, step):
            for weights in ("best", "last"):
                kept.append(api.load(path=tmp_path / "runs", backend="numpy", weights=weights).params.dtype)

    finetune(base, texts["first"], num_steps=1, dtype=other, listener=Onlooker())
    assert kept == [np.dtype(other)] * 2


def test_finetuning_starts_at_the_bases_peak_rate_with_its_own_limits(tmp_path, texts, at_step):
    more = {"num_steps": None, "num_epochs": 1, "stride": 400, "max_minutes": 9.0, "base_batch_size": 16}
    base = api.train("classic", path=tmp_path / "runs", data=texts["first"], **{**TINY, **more})
    peak = TrainConfig(**base.config["train"]).peak_lr

    def interrupt(step, batch):
        if step == 1:
            raise KeyboardInterrupt

    at_step(interrupt)
    tuned = api.finetune(base.guid, path=base.files.folder, data=texts["other"], backend="numpy")
    chosen = TrainConfig(**tuned.config["train"])
    assert peak != TINY["lr"]
    assert (chosen.lr, chosen.peak_lr, chosen.min_lr) == (peak, peak, peak / 10)
    assert (chosen.num_steps, chosen.num_epochs, chosen.max_minutes) == (api.FINETUNE_STEPS, None, 0.0)


def test_a_given_rate_falls_to_a_tenth_of_itself(base, texts):
    """However low it is: a tenth of the run's own rate could be above it."""
    chosen = TrainConfig(**finetune(base, texts["other"], lr=1e-4, num_steps=2).config["train"])
    assert (chosen.lr, chosen.min_lr) == (1e-4, 1e-5)


def test_a_text_of_known_characters_keeps_the_size_and_is_evaluated_first(base, texts):
    tuned = finetune(base, texts["first"], **AT_ONCE)
    assert tuned.tokenizer == base.tokenizer
    np.testing.assert_array_equal(tuned.params, base.params)
    assert tuned.config["result"]["val_loss"] == pytest.approx(base.evaluate(num_tokens=50).loss, rel=1e-6)


def test_finetuning_reduces_the_loss_more_than_training_from_scratch(base, texts):
    tuned = finetune(base, texts["other"])
    before = records_of(tuned)[0]
    assert (before["step"], before["train_loss"]) == (0, None)
    scratch = api.train(
        "classic", path=base.files.folder, data=texts["other"], **{**TINY, "num_steps": 40, "warmup_steps": 2}
    )
    assert tuned.config["result"]["val_loss"] < scratch.config["result"]["val_loss"]
    assert tuned.config["result"]["val_loss"] < before["val_loss"] - 0.5


def records_of(run: Run) -> list[dict]:
    """The records without the times."""
    return [{**record, "seconds": 0} for record in metrics_of(run.files)]


def test_finetuned_files_have_the_originals_names_and_none_is_overwritten(base, texts):
    runs = [finetune(base, texts["other"], num_steps=2) for _ in range(3)]
    suffixes = "_finetuned", "_finetuned-2", "_finetuned-3"
    assert [run.guid for run in runs] == [base.guid + suffix for suffix in suffixes]
    folder = base.files.folder
    assert all(path.exists() and run.guid in path.name for run in runs for path in run.files.of_training)
    for suffix in ("", *suffixes):
        assert api.load(base.guid[:8] + suffix, path=folder).guid == base.guid + suffix


def test_a_finetuned_run_can_be_finetuned_again(base, texts, tmp_path):
    third = tmp_path / "third.txt"
    third.write_text("ÄÖ and the cat: " * 60, encoding="utf-8")
    twice = finetune(finetune(base, texts["other"], num_steps=5), str(third), num_steps=5)
    assert twice.guid == f"{base.guid}_finetuned_finetuned"
    assert twice.config["base"] == f"{base.guid}_finetuned"
    vocab = twice.tokenizer.vocab
    assert vocab[: base.tokenizer.vocab_size] == base.tokenizer.vocab
    assert vocab[-3:] == (":", "Ä", "Ö")
    assert "Ü" in vocab


def test_a_finetuned_run_resumes_exactly(base, texts):
    class Stopper(baby_xp.Listener):
        def evaluated(self, record):
            if record["step"] == 20:
                raise KeyboardInterrupt

    whole = finetune(base, texts["other"])
    stopped = finetune(base, texts["other"], listener=Stopper())
    assert stopped.config["result"]["state"] == "stopped"
    resumed = api.resume(stopped.guid, path=base.files.folder)
    assert resumed.config["base"] == base.guid
    np.testing.assert_array_equal(resumed.params, whole.params)
    assert records_of(resumed) == records_of(whole)


def test_the_byte_tokenizer_needs_no_new_ids(tmp_path, texts):
    base = api.train("classic", path=tmp_path / "runs", data=texts["first"], tokenizer="byte", **TINY)
    tuned = finetune(base, texts["other"], num_steps=3)
    assert (tuned.tokenizer.kind, tuned.model.vocab_size) == ("byte", 256)


def test_dropout_may_change_and_sizes_may_not(base, texts):
    assert finetune(base, texts["other"], num_steps=2, dropout=0.3).model.config.dropout == 0.3
    with pytest.raises(BabyError, match="keeps the sizes"):
        finetune(base, texts["other"], n_emb=32)


def test_failed_finetuning_leaves_the_folder_as_it_was(base, texts, tmp_path):
    before = all_of(base.files.folder)
    for text, lr in ((str(tmp_path / "nothing.txt"), 1e-3), (texts["other"], 1e30)):
        with pytest.raises(BabyError):
            finetune(base, text, lr=lr, clip=0.0)
    assert all_of(base.files.folder) == before


def test_the_equation_model_is_not_finetuned(tmp_path, texts):
    base = api.train("equations", path=tmp_path / "runs", num_steps=3, backend="numpy")
    with pytest.raises(BabyError, match="equation model cannot be finetuned"):
        finetune(base, texts["other"])


def test_the_command_line_finetunes_with_the_settings_of_the_run(base, texts, capsys):
    folder = f"--path={base.files.folder}"
    assert main(["finetune", base.guid[:8], "--data", texts["other"], folder, "--num-steps=3"]) == 0
    out = capsys.readouterr().out
    assert f"finetuned from run {base.guid}" in out
    assert f"generate {base.guid[:8]}_finetuned --path {shlex.quote(str(base.files.folder))}" in out
    tuned = api.load(path=base.files.folder)
    assert (tuned.config["train"]["lr"], tuned.config["train"]["num_steps"]) == (TINY["lr"], 3)


def test_a_text_is_named_by_its_path(base, texts, monkeypatch):
    monkeypatch.chdir(Path(texts["other"]).parent)
    tuned = finetune(base, "other.txt", num_steps=1)
    assert tuned.config["data"]["data"] == "other.txt"
    assert tuned.config["data"]["file"] == texts["other"]
