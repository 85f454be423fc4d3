"""Gradients that leave during the backward pass: they are complete, and the same bits as all at the end."""

import numpy as np
import pytest

from baby_xp.arrays import params, registry, tree
from baby_xp.config import EquationConfig, GPTConfig
from baby_xp.distributed.group import GradualSum, Group
from baby_xp.models import Model
from baby_xp.text.batches import Batch
from baby_xp.training.sender import Sender
from baby_xp.training.step import initial_state, loss_and_gradients_with_dropout

SIZES = {"n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 3}
MODELS = {
    "classic": {},
    "dropout, post-norm": {"dropout": 0.2, "c_sequence": "post"},
    "modern": {
        "positions": "rotary", "norm": "rmsnorm", "embedding_norm": True, "qk_norm": True, "activation": "relu2",
        "qkv_bias": False, "linear_bias": False, "head_bias": False, "logit_cap": 15.0,
    },
    "tied head": {"tied_head": True},
    "tied head without a bias": {"tied_head": True, "head_bias": False},
    "mixtures": {"c_attention": "moh", "c_network": "moe"},
}  # fmt: skip


class Recording(GradualSum):
    """Copies of all that is ready, at the time when it is."""

    def __init__(self, array):
        super().__init__(Group(), array, [])
        self.found, self.calls = [], 0

    def ready(self, first):
        self.found.append((first, self.array[first:].copy()))

    def progress(self):
        self.calls += 1


def of_step(config, tokens_at_once: int, monkeypatch, recorded: bool, without: str = ""):
    """Loss and gradients of a step of six samples, and what was recorded. without: a function that stays plain."""
    backend, model = registry.load("numpy"), Model(config, 17)
    backend.xp.kernels.pop(without, None)
    monkeypatch.setattr(backend.xp, "tokens_at_once", tokens_at_once)
    weights = params.draw(model.spec, 0) * 2 + np.float32(0.01)
    state = initial_state(backend, weights, params.decay_mask(model.spec), 5)
    draw, rows = np.random.default_rng(0), (6, config.n_ctx)
    targets = (6, 1) if isinstance(config, EquationConfig) else rows
    ids = [draw.integers(0, 17, shape, np.int32) for shape in (rows, targets)]
    batch = Batch(*ids, np.arange(6, dtype=np.int32))
    out = np.full(model.n_parameters, np.nan, np.float32)
    recording = Recording(out) if recorded else None
    loss, found = loss_and_gradients_with_dropout(backend.xp, model, state, batch, 60, out, recording)
    assert found is out or (without and not recorded)
    return loss, found, recording


@pytest.mark.parametrize("tokens_at_once", [1000, 20, 8])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_ready_is_complete_and_has_the_same_bits(monkeypatch, name, tokens_at_once):
    """In one tile, and in the last of two and more."""
    config = GPTConfig(**{**SIZES, **MODELS[name]})
    loss, expected, _ = of_step(config, tokens_at_once, monkeypatch, recorded=False)
    found_loss, found, recording = of_step(config, tokens_at_once, monkeypatch, recorded=True)
    np.testing.assert_array_equal(found_loss, loss)
    np.testing.assert_array_equal(found, expected)
    for first, array in recording.found:
        np.testing.assert_array_equal(array, expected[first:])
    firsts = [first for first, _ in recording.found]
    assert firsts == sorted(firsts, reverse=True)
    assert firsts[-1] == 0
    # what follows the blocks, each block, and the rest
    blocks = Model(config, 17).layout.slices
    begins = {min(at.start for path, at in blocks.items() if path.startswith(f"blocks.{i}.")) for i in range(3)}
    assert begins < set(firsts)
    assert recording.calls >= 4 * config.n_layers


def test_tiles_need_not_be_added_up_in_place(monkeypatch):
    config = GPTConfig(**SIZES)
    loss, expected, _ = of_step(config, 8, monkeypatch, recorded=False, without="step.add_tree")
    found_loss, found, _ = of_step(config, 8, monkeypatch, recorded=True, without="step.add_tree")
    np.testing.assert_array_equal(found_loss, loss)
    np.testing.assert_array_equal(found, expected)


def test_a_model_that_reports_nothing_is_ready_at_the_end(monkeypatch):
    config = EquationConfig(n_ctx=4)
    _, expected, _ = of_step(config, 1000, monkeypatch, recorded=False)
    _, found, recording = of_step(config, 1000, monkeypatch, recorded=True)
    np.testing.assert_array_equal(found, expected)
    assert [first for first, _ in recording.found] == [0]


def test_gradients_that_are_missing_are_noticed():
    model = Model(GPTConfig(**SIZES), 17)
    gradients = model.layout.unpack(np, np.zeros(model.n_parameters, np.float32))
    sender = Sender(model.layout, np.empty(model.n_parameters, np.float32), False, Recording(np.empty(0)))
    sender.completed({"lm_head": gradients["lm_head"]})
    with pytest.raises(ValueError, match=r"are missing: .*blocks"):
        sender.completed({"blocks": {"2": gradients["blocks"]["2"]}})


def test_without_a_sender_nothing_is_reported():
    tree.completed({}, {})
    tree.completed(tree.Parameters({}, {}), {})
    assert tree.gradient_of({"weight": 1}, "weight") is None
    assert tree.gradient_of(tree.Parameters({"weight": 1}, None), "weight") is None
