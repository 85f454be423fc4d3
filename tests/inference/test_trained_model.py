"""A trained model without any files: what it generates, its logits and its answers."""

import numpy as np
import pytest
from baby_xp_data.equation_table import EquationTable

from baby_xp.arrays import params, registry
from baby_xp.config import EquationConfig, GPTConfig
from baby_xp.errors import BabyError
from baby_xp.inference.trained_model import TrainedModel
from baby_xp.models import Model
from baby_xp.text.tokenizer import CharTokenizer

CONFIG = GPTConfig(n_ctx=8, n_emb=8, head_size=8, n_heads=2, n_layers=2)


def trained(config, characters: str) -> TrainedModel:
    tokenizer = CharTokenizer(tuple(characters))
    model = Model(config, tokenizer.vocab_size)
    flat = params.draw(model.spec, 0, "float64")
    flat = flat + np.random.default_rng(0).normal(0, 0.3, flat.shape)
    return TrainedModel(model, tokenizer, flat, registry.load("numpy", None, "float64"))


@pytest.mark.parametrize("prompt", ["a", "abc", "abcabcabcabc"])
def test_logits_predict_the_next_token(prompt):
    model = trained(CONFIG, "abc\n")
    found = model.logits(prompt)
    assert (found.shape, found.dtype) == ((4,), np.float64)
    assert model.generate(prompt, 1, greedy=True) == prompt + "abc\n"[found.argmax()]


def test_logits_of_a_short_prompt_equal_those_of_the_forward_pass():
    model = trained(CONFIG, "abc\n")
    weights = model.model.layout.unpack(np, model.params)
    expected, _ = model.model.forward(model.backend.xp, weights, np.array([[1, 2, 0]], np.int32))
    np.testing.assert_allclose(model.logits("bca"), expected[-1], rtol=1e-12)
    np.testing.assert_array_equal(model.logits(), model.logits("\n"))


def test_a_prompt_that_cannot_be_encoded_is_named():
    with pytest.raises(BabyError, match="prompt"):
        trained(CONFIG, "abc").logits("x")


def test_an_answer_ends_at_the_end_of_the_equation():
    """The table determines the questions; the answer has at most its number of digits, and no space."""
    table = EquationTable(max_sum=0)
    model = trained(EquationConfig(n_ctx=table.longest, n_hidden=4), table.vocabulary)
    asked = "".join(model.stream("9+8=", table.digits + 2, greedy=True)).split(" ")[0]
    assert model.ask(" 9 + 8 ", table) == f"9+8={asked}"
    short = trained(EquationConfig(n_ctx=4, n_hidden=4), table.vocabulary)
    assert len(short.ask("9+8=", table)) == len("9+8=") + 1
    with pytest.raises(BabyError, match="9-8"):
        model.ask("9-8=", table)


def test_an_answer_has_no_text_after_it(monkeypatch):
    model = trained(EquationConfig(n_ctx=6, n_hidden=4), EquationTable().vocabulary)
    monkeypatch.setattr(TrainedModel, "stream", lambda *_, **__: iter(["8", " ", "7"]))
    assert model.ask("4+4", EquationTable()) == "4+4=8"
