"""Configs: every field is checked when a config is created, and a config survives a round trip through JSON."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baby_xp.arrays import rng
from baby_xp.config import (
    CLASSIC,
    LARGEST_DROPOUT,
    MODERN,
    MOST_LAYERS,
    DataConfig,
    EquationConfig,
    EquationData,
    GPTConfig,
    TrainConfig,
    data_from_dict,
    from_dict,
    model_from_dict,
    to_dict,
)
from baby_xp.errors import BabyError
from baby_xp.presets import PRESETS, preset

NAN, INFINITY = float("nan"), float("inf")
# More digits than a float has: math.isfinite would raise OverflowError.
HUGE = 10**400

FLAGS = ("smear", "embedding_norm", "qk_norm", "qkv_bias", "linear_bias", "head_bias", "tied_head", "zero_init")
BAD = [
    (GPTConfig, "n_ctx", [0, -1, 1.5, "8", True, None, 2**31, HUGE]),
    (GPTConfig, "n_emb", [0, -1, 2.0, None, [8]]),
    (GPTConfig, "head_size", [0, -4, "128", {}]),
    (GPTConfig, "n_heads", [0, 3, 5, 256]),
    (GPTConfig, "n_layers", [0, -1, False, 10_001, 2**31 - 1]),
    (GPTConfig, "dropout", [1, 1.0, -0.1, NAN, INFINITY, "0.1", None, HUGE, True, 0.999999]),
    (GPTConfig, "c_sequence", ["middle", "", None, [], 0]),
    (GPTConfig, "c_attention", ["mhb", "MHA", {}]),
    (GPTConfig, "c_network", ["mlp ", 1]),
    (GPTConfig, "positions", ["rope", None, True]),
    (GPTConfig, "norm", ["rms", "layernorm-gain", 1]),
    (GPTConfig, "activation", ["tanh", "relu", None]),
    (GPTConfig, "gelu", ["relu", True]),
    *((GPTConfig, name, [None, "yes", 2, NAN, []]) for name in FLAGS),
    (GPTConfig, "logit_cap", [-1, 0.5, NAN, INFINITY, "15", None, 1e7, HUGE, True]),
    (EquationConfig, "n_ctx", [0, 1.5, None]),
    (EquationConfig, "n_emb", [0, 1.5]),
    (EquationConfig, "n_hidden", [0, 1.0]),
    (EquationConfig, "activation", ["relu", None]),
    (EquationConfig, "std", [0, -1, NAN, INFINITY, "1", HUGE, 1e308]),
    (TrainConfig, "batch_size", [0, -1, 1.0, "16", 2**31]),
    (TrainConfig, "accumulate", [0, -1, 1.0, True, 2**31]),
    (TrainConfig, "num_steps", [0, -1, 2.5, HUGE]),
    (TrainConfig, "num_epochs", [0, -1, 0.5]),
    (TrainConfig, "stride", [0, -1]),
    (TrainConfig, "lr", [0, -1e-3, NAN, INFINITY, "1e-3", None, HUGE]),
    (TrainConfig, "base_batch_size", [0, -1, 8.0]),
    (TrainConfig, "schedule", ["step", None, ["cosine"]]),
    (TrainConfig, "min_lr", [-1e-9, NAN, 1.0]),
    (TrainConfig, "decay_fraction", [0, -0.5, 1.1, NAN, "0.5", None]),
    (TrainConfig, "optimizer", ["sgd", "Muon", None, 1]),
    (TrainConfig, "muon_lr", [0, -0.02, NAN, INFINITY, "0.02", None]),
    (TrainConfig, "muon_momentum", [-0.1, 1, 1.5, NAN, None]),
    (TrainConfig, "muon_iterations", [0, -1, 11, 2.5, None]),
    (TrainConfig, "warmup_steps", [-1, 1.5, INFINITY]),
    (TrainConfig, "beta1", [0, 1, -0.9, NAN, "0.9", None]),
    (TrainConfig, "beta2", [0, 1, 1.1, []]),
    (TrainConfig, "weight_decay", [-0.1, NAN, "0"]),
    (TrainConfig, "clip", [-1, INFINITY]),
    (TrainConfig, "eval_every", [0, -1]),
    (TrainConfig, "sample_tokens", [-1, 1.5, None, 2**31]),
    (TrainConfig, "patience", [-1, 0.5, True]),
    (TrainConfig, "max_minutes", [-1, NAN, INFINITY, "5", None, HUGE]),
    (TrainConfig, "checkpoint_every", [-1, 2.0, None]),
    (TrainConfig, "checkpoint_minutes", [-0.5, NAN, INFINITY, True]),
    (TrainConfig, "seed", [-1, 0.5, 2**64, NAN]),
    (TrainConfig, "dtype", ["float16", 32]),
    (DataConfig, "data", [1, None, ["a.txt"], b"a.txt", "a\0b"]),
    (DataConfig, "tokenizer", ["bpe", 1, None]),
    (EquationData, "data", [1, None]),
    (EquationData, "tokenizer", ["byte", "bpe"]),
    (EquationData, "digits", [0, 3, "2", None]),
    (EquationData, "operators", ["*", "", "-+", 1]),
    (EquationData, "max_sum", [-1, 1, 8, "9", None]),
    (EquationData, "held_out", [44, None, ["4+4"]]),
]  # fmt: skip

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**320), 10**320) | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3),
    max_leaves=6,
)


def made(kind, **values):
    return kind(**{"num_steps": 10, **values} if kind is TrainConfig else values)


@pytest.mark.parametrize(("kind", "name", "values"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_a_bad_value_is_named_in_one_line(kind, name, values):
    for value in values:
        with pytest.raises(BabyError, match=name) as caught:
            made(kind, **{name: value})
        assert "\n" not in str(caught.value)


def test_the_table_above_has_every_field():
    tested = {(kind, name) for kind, name, _ in BAD}
    for kind in (GPTConfig, EquationConfig, TrainConfig, DataConfig, EquationData):
        names = {(kind, field.name) for field in fields(kind)}
        assert names <= tested


@pytest.mark.parametrize(("kind", "values"), [
    (GPTConfig, {"dropout": 0}),
    (GPTConfig, {"dropout": LARGEST_DROPOUT}),
    (GPTConfig, {"n_layers": MOST_LAYERS}),
    (GPTConfig, {"n_ctx": 1, "n_emb": 1, "head_size": 1, "n_heads": 1, "n_layers": 1}),
    (TrainConfig, {"lr": 1, "min_lr": 1}),
    (TrainConfig, {"min_lr": 5.0, "schedule": "constant"}),
    (TrainConfig, {"warmup_steps": 0, "weight_decay": 0, "clip": 0, "seed": 2**64 - 1}),
    (TrainConfig, {"num_steps": None, "num_epochs": 1}),
    (TrainConfig, {"num_steps": 2**31 - 1}),
    (TrainConfig, {"sample_tokens": 0, "patience": 0, "checkpoint_every": 0}),
    (TrainConfig, {"max_minutes": 0, "checkpoint_minutes": 0}),
    (TrainConfig, {"max_minutes": 1e-3, "checkpoint_minutes": 0.5}),
    (TrainConfig, {"batch_size": 2**16, "accumulate": 2**15 - 1}),
])  # fmt: skip
def test_values_at_the_limits_are_accepted(kind, values):
    config = made(kind, **values)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(("values", "message"), [
    ({"positions": "rotary", "head_size": 12}, "head_size 12 with n_heads 4 makes heads of 3: choose"),
    ({"gelu": "erf", "activation": "relu2"}, "gelu erf has no effect on activation relu2"),
    ({"gelu": "erf", "activation": "swiglu"}, "gelu erf has no effect on activation swiglu"),
    ({"logit_cap": 0.99}, "choose 1 or more, or 0"),
])  # fmt: skip
def test_switches_that_do_not_go_together_are_refused_in_one_line(values, message):
    with pytest.raises(BabyError, match=message) as caught:
        GPTConfig(**values)
    assert "\n" not in str(caught.value)


def test_a_combination_stands_for_every_switch_that_is_not_given_itself():
    sizes = {"n_ctx", "n_emb", "head_size", "n_heads", "n_layers", "dropout"}
    assert {field.name for field in fields(GPTConfig)} == sizes | MODERN.keys()
    assert GPTConfig(**CLASSIC) == GPTConfig()
    baby = preset("classic")
    modern = baby.override({"c_model": "modern", "norm": "layernorm", "logit_cap": 15, "n_layers": 2})
    assert modern.model == replace(baby.model, **{**MODERN, "norm": "layernorm", "logit_cap": 15, "n_layers": 2})
    assert modern.override({"c_model": "classic"}).model == replace(baby.model, n_layers=2)
    assert baby.override({"c_model": None}) == baby
    for chosen, wrong in ((baby, "old"), (preset("equations"), "modern")):
        with pytest.raises(BabyError, match="c_model"):
            chosen.override({"c_model": wrong})


def test_a_dropout_that_drops_everything_names_one_that_does_not():
    for rate in (65535.5 / 65536, 0.999999, math.nextafter(1, 0)):
        with pytest.raises(BabyError, match=r"drops everything, as .* 1 / 65536: choose at most 0\.99999"):
            GPTConfig(dropout=rate)
    assert rng.drop_threshold(LARGEST_DROPOUT) == rng.HALVES - 1


@pytest.mark.parametrize(("kind", "values", "plain"), [
    (GPTConfig, {"n_ctx": np.int64(8), "dropout": np.float32(0.5)}, {"n_ctx": 8, "dropout": 0.5}),
    (GPTConfig, {"dropout": np.int8(0), "gelu": np.str_("erf")}, {"dropout": 0, "gelu": "erf"}),
    (EquationConfig, {"n_emb": np.uint8(2), "std": np.float16(0.5)}, {"n_emb": 2, "std": 0.5}),
    (TrainConfig, {"num_steps": np.array(7), "lr": np.float64(0.1)}, {"num_steps": 7, "lr": 0.1}),
    (TrainConfig, {"seed": np.uint64(2**64 - 1)}, {"seed": 2**64 - 1}),
    (DataConfig, {"data": Path("a") / "b.txt"}, {"data": str(Path("a") / "b.txt")}),
    (EquationData, {"digits": np.int64(2), "max_sum": np.int64(0)}, {"digits": 2, "max_sum": 0}),
])  # fmt: skip
def test_numbers_of_numpy_and_paths_are_kept_as_plain_values(kind, values, plain):
    config = made(kind, **values)
    assert config == made(kind, **plain)
    assert all(type(getattr(config, name)) is type(value) for name, value in plain.items())
    assert json.loads(json.dumps(to_dict(config))) == to_dict(made(kind, **plain))


def test_training_needs_an_end_and_min_lr_below_lr():
    with pytest.raises(BabyError, match="num_steps nor num_epochs"):
        TrainConfig()
    for schedule in ("cosine", "linear"):
        with pytest.raises(BabyError, match=r"min_lr 0\.1 is above lr 0\.01"):
            TrainConfig(num_steps=1, lr=0.01, min_lr=0.1, schedule=schedule)


# the rate and the batch size ----------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "accumulate", "base", "expected"), [
    (16, 1, None, 1e-3), (16, 1, 16, 1e-3), (64, 1, 16, 4e-3), (4, 1, 16, 2.5e-4),
    # the size of the step counts, not the number of parts in which it is computed
    (12, 1, 4, 3e-3), (3, 4, 4, 3e-3), (1, 12, 4, 3e-3),
])  # fmt: skip
def test_the_rate_scales_with_the_step_size_only_if_a_base_is_given(batch_size, accumulate, base, expected):
    config = TrainConfig(num_steps=1, batch_size=batch_size, accumulate=accumulate, base_batch_size=base)
    assert config.step_size == batch_size * accumulate
    assert config.peak_lr == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(2**16, 2**15), (2**31 - 1, 2), (2**30, 2**30)])
def test_a_step_beyond_int32_is_too_large(batch_size, accumulate):
    with pytest.raises(BabyError, match=f"a step of {batch_size} x {accumulate} sequences is too large"):
        TrainConfig(num_steps=1, batch_size=batch_size, accumulate=accumulate)


def test_min_lr_is_compared_with_the_scaled_rate():
    with pytest.raises(BabyError, match="min_lr"):
        TrainConfig(num_steps=1, lr=1e-3, min_lr=5e-4, batch_size=4, base_batch_size=16)
    TrainConfig(num_steps=1, lr=1e-3, min_lr=2e-3, batch_size=64, base_batch_size=16)


# to JSON and back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    chosen = preset(name)
    model, train, data = (
        json.loads(json.dumps(to_dict(part))) for part in (chosen.model, chosen.train, chosen.data)
    )
    assert model_from_dict(model, "here") == chosen.model
    assert type(model_from_dict(model, "here")) is type(chosen.model)
    assert from_dict(TrainConfig, train, "here") == chosen.train
    assert data_from_dict({**data, "file": None, "sha256": "1"}, "here") == chosen.data


def test_only_model_configs_have_a_kind():
    assert to_dict(GPTConfig())["kind"] == "gpt"
    assert to_dict(EquationConfig())["kind"] == "equations"
    assert "kind" not in to_dict(TrainConfig(num_steps=1))


@pytest.mark.parametrize("values", [{"kind": "gpt", "n_ctxx": 8}, {"kind": "gpt", "n_hidden": 8}])
def test_an_unknown_field_names_the_file_and_the_field(values):
    odd = next(name for name in values if name != "kind")
    with pytest.raises(BabyError, match=rf"some\.json: \['{odd}'\] is not part of a GPTConfig"):
        model_from_dict(values, "some.json")


@pytest.mark.parametrize("values", [None, [], "gpt", 3, {}, {"kind": "rnn"}, {"kind": ["gpt"]}, {"kind": {}}])
def test_an_unknown_kind_of_model_names_the_file(values):
    with pytest.raises(BabyError, match=r"some\.json: the kind of model must be one of gpt, equations"):
        model_from_dict(values, "some.json")


@pytest.mark.parametrize("kind", [GPTConfig, EquationConfig, TrainConfig, DataConfig, EquationData])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_json_raises_only_BabyError(kind, data):
    names = st.sampled_from([field.name for field in fields(kind)])
    values = {**({"num_steps": 9} if kind is TrainConfig else {}), data.draw(names): data.draw(JSON)}
    message = ""
    try:
        from_dict(kind, values, "some.json")
    except BabyError as error:
        message = str(error)
    assert not message or message.startswith("some.json: ")


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_json_that_is_not_a_config_raises_only_BabyError(value):
    for kind in (GPTConfig, TrainConfig):
        try:
            assert from_dict(kind, value, "some.json") == made(kind)
        except BabyError:
            continue
    with pytest.raises(BabyError):
        model_from_dict(value, "some.json")


# presets ------------------------------------------------------------------------------------------------


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(BabyError, match="unknown preset 'nope': choose one of baby, classic, equations, "):
        preset("nope")
