"""`evaluate` reports what it measured, over the whole validation part."""

import math
from dataclasses import asdict

import numpy as np
import pytest
from baby_xp_data import nursery

from baby_xp import api
from baby_xp.arrays.tiles import number_of_tiles
from baby_xp.cli import main
from baby_xp.errors import BabyError
from baby_xp.layers import cross_entropy
from baby_xp.run import Run
from baby_xp.text import dataset, text_metrics
from baby_xp.text.batches import Batch
from baby_xp.training.step import loss_and_predictions, total_loss

TEXT = "the cat sat on the mat.\nit sat and sat, and só did the hät. " * 40
TINY = {
    "n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 4, "num_steps": 60,
    "eval_every": 30, "sample_tokens": 0, "lr": 1e-2, "backend": "numpy", "warmup_steps": 5,
}  # fmt: skip


def trained(folder, **more) -> Run:
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8", newline="\n")
    return api.train("classic", path=folder / "runs", **{"data": str(text), **TINY, **more})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run that no test changes."""
    return trained(tmp_path_factory.mktemp("run"))


def by_hand(run: Run, text: str) -> tuple[float, float, int]:
    """Mean loss, accuracy and number of targets of a validation part, window by window."""
    ids = run.tokenizer.encode(text)
    ids = ids[int(0.9 * len(ids)) :]
    p, n_ctx = run.model.layout.unpack(np, run.params), run.model.config.n_ctx
    losses, right = [], []
    for start in range(0, len(ids) - 1, n_ctx):
        window = ids[start : start + n_ctx + 1]
        logits, _ = run.model.forward(run.backend.xp, p, window[None, :-1])
        losses += list(cross_entropy.forward(run.backend.xp, {}, logits, window[1:])[0])
        right += list(np.argmax(logits, axis=-1) == window[1:])
    return float(np.mean(losses)), float(np.mean(right)), len(losses)


@pytest.mark.parametrize("tokens_at_once", [None, 8, 20])
def test_a_batch_is_measured_in_tiles(run, monkeypatch, tokens_at_once):
    xp, inputs = run.backend.xp, np.arange(7 * 8, dtype=np.int32).reshape(7, 8) % run.tokenizer.vocab_size
    batch = Batch(inputs, inputs[::-1].copy(), np.arange(7, dtype=np.int32))
    logits, _ = run.model.forward(xp, run.model.layout.unpack(np, run.params), inputs)
    monkeypatch.setattr(xp, "tokens_at_once", tokens_at_once)
    sizes, forward = [], type(run.model).forward
    seen = lambda model, xp, p, ids, *rest: sizes.append(ids.size) or forward(model, xp, p, ids, *rest)  # noqa: E731
    monkeypatch.setattr(type(run.model), "forward", seen)
    loss, predictions = loss_and_predictions(xp, run.model, run.params, batch)
    assert sum(sizes) == inputs.size  # each token once
    assert len(sizes) == number_of_tiles(7, 8, tokens_at_once)
    assert np.array_equal(loss, total_loss(xp, run.model, run.params, batch))
    assert np.array_equal(predictions, np.argmax(logits, axis=-1))


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_loss_perplexity_bits_and_accuracy_match_values_computed_by_hand(tmp_path, tokenizer):
    run = trained(tmp_path, tokenizer=tokenizer)
    found, (loss, accuracy, n_targets) = run.evaluate(num_tokens=50), by_hand(run, TEXT)
    assert found.tokens == n_targets
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.accuracy == accuracy
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    length = len(TEXT.encode() if tokenizer == "byte" else TEXT)
    validation = TEXT.encode()[int(0.9 * length) :] if tokenizer == "byte" else TEXT[int(0.9 * length) :]
    characters = len(validation.decode(errors="replace")) if tokenizer == "byte" else len(validation)
    per_character = (length - int(0.9 * length)) / characters
    assert found.bits_per_character == pytest.approx(loss * per_character / math.log(2), rel=1e-5)


def test_the_reported_loss_equals_the_evaluated_one(run):
    assert run.evaluate(num_tokens=50).loss == pytest.approx(run.config["result"]["val_loss"], rel=1e-6)


def test_the_shares_compare_generated_text_with_the_training_part(run):
    found, text = run.evaluate(num_tokens=300, seed=3), run.generate(num_tokens=300, seed=3)
    training = [TEXT[: int(0.9 * len(TEXT))]]
    assert found.known_words == text_metrics.known_words(text, training)
    assert found.copied_ngrams == text_metrics.copied_ngrams(text, training, 8)
    assert 0 < found.known_words < 1


def test_generated_text_is_compared_only_with_the_training_part(tmp_path, monkeypatch):
    """Also with bytes, where a character may be split between two of the pieces that are read."""
    written = "the cät sat on the 😀 mat " * 36 + "no tam eht no tas täc eht " * 4
    (tmp_path / "other.txt").write_text(written, encoding="utf-8")
    run = trained(tmp_path, data=str(tmp_path / "other.txt"), num_steps=1, tokenizer="byte")
    monkeypatch.setattr(dataset, "CHUNK", 3)
    seen = []
    for name in ("known_words", "copied_ngrams"):
        monkeypatch.setattr(text_metrics, name, lambda text, known, *more: seen.append("".join(known)))
    run.evaluate(num_tokens=1)
    data = written.encode()
    assert seen == [data[: int(0.9 * len(data))].decode(errors="ignore")] * 2


def test_the_distance_to_the_entropy_of_the_nursery(tmp_path, monkeypatch):
    monkeypatch.setattr("baby_xp.text.dataset.NURSERY_CHARACTERS", 4000)
    run = trained(tmp_path, data="nursery")
    found = run.evaluate(num_tokens=50)
    assert found.entropy == nursery.entropy_per_character()
    assert any(f"{found.loss - found.entropy:.4f} nats above" in line for line in found.lines())


def test_another_text_is_measured_with_the_same_ids(run, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("mat the on sat cat. " * 40, encoding="utf-8")
    found = run.evaluate(data=str(other), num_tokens=50)
    assert found.loss == pytest.approx(by_hand(run, "mat the on sat cat. " * 40)[0], rel=1e-5)
    assert found.data == str(other)


def test_a_character_that_the_run_does_not_know_is_named(run, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("the cat! " * 40, encoding="utf-8")
    with pytest.raises(BabyError, match=r"'!' \(U\+0021\) at index 7"):
        run.evaluate(data=str(other))


def test_the_equation_model_is_measured_on_held_out_equations(tmp_path):
    run = api.train("equations", path=tmp_path, num_steps=400, backend="numpy")
    found = run.evaluate()
    assert found.loss == pytest.approx(run.config["result"]["val_loss"], rel=1e-6)
    assert found.known_words is None
    assert "words" not in "\n".join(found.lines())


def test_evaluation_is_reproducible(run):
    assert asdict(run.evaluate(num_tokens=50)) == asdict(run.evaluate(num_tokens=50))


def test_the_command_line_names_what_it_measures(run, capsys):
    assert (
        main(["evaluate", run.guid[:8], f"--path={run.files.folder}", "--num-tokens=50", "--backend=numpy"]) == 0
    )
    out = capsys.readouterr().out
    names = "perplexity", "nats per token", "bits per character", "words that occur", "8-character sequences"
    for name in names:
        assert name in out
    assert "/100" not in out


@pytest.mark.parametrize("arguments", [["--data=nothing.txt"], ["--num-tokens=0"], ["--weights=worst"]])
def test_bad_arguments_of_evaluate_are_one_line(run, arguments, capsys):
    assert main(["evaluate", f"--path={run.files.folder}", "--backend=numpy", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_texts_generated_together_equal_those_generated_one_by_one(run):
    settings = {"temperature": 0.9, "top_k": 9}
    found = run.generate_several(3, "the ", 30, seed=5, **settings)
    assert found == [run.generate("the ", 30, seed=5 + i, **settings) for i in range(3)]
    assert len(set(found)) == 3
    assert run.generate_several(1, num_tokens=5) == [run.generate(num_tokens=5)]
