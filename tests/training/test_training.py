"""The model as a whole: training agrees between backends, it learns, and it computes what the original did."""

import functools
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import case_of
from layer_table import LATER, SWITCHES

from baby_xp.arrays import params
from baby_xp.arrays.tiles import samples
from baby_xp.arrays.tree import leaves
from baby_xp.config import EquationConfig, GPTConfig, TrainConfig
from baby_xp.convert import littlebaby
from baby_xp.models import Model
from baby_xp.text.batches import Batch, EpochWindows, PairBatches, RandomWindows
from baby_xp.training import optimizers, schedules
from baby_xp.training.step import (
    accumulated,
    gradients_of_step,
    initial_state,
    loss_and_gradients,
    loss_and_gradients_with_dropout,
    make_step,
    on_device,
    total_loss,
)
from baby_xp.training.workers import Workers

TEXT = np.random.default_rng(0).integers(0, 17, 400)
SMALL = {"n_ctx": 8, "n_emb": 12, "head_size": 8, "n_heads": 2, "n_layers": 2}


def train(case, model, config, batches, steps):
    """Losses of some training steps, and the parameters after them."""
    state = initial_state(case, params.draw(model.spec, 0, case.dtype), params.decay_mask(model.spec), 3)
    step, losses = case.compile(make_step(case.xp, model, config)), []
    for i in range(steps):
        state, metrics = step(state, on_device(case, batches.batch(i)))
        losses.append(float(case.to_numpy(metrics["loss"])[0]))
    return np.array(losses), case.to_numpy(state["params"])


@functools.cache
def on_plain_numpy(compute, *how):
    return compute(case_of("numpy plain"), *how)


def six_steps(case, kind):
    switches = {"pre mha mlp": SWITCHES[0], "post moh moe": SWITCHES[7], "muon": SWITCHES[0], **LATER}[kind]
    model = Model(GPTConfig(**SMALL, dropout=0.2, **switches), 17)
    more = {"optimizer": "muon", "schedule": "linear"} if kind == "muon" else {}
    config = TrainConfig(num_steps=6, batch_size=3, warmup_steps=2, lr=1e-2, min_lr=1e-3, **more)
    return train(case, model, config, RandomWindows(TEXT, 8, 3, 0), 6)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["pre mha mlp", "post moh moe", "modern", "muon"])
def test_steps_of_training_agree_with_dropout_on(quick_backend, kind):
    losses, weights = six_steps(quick_backend, kind)
    expected, expected_weights = on_plain_numpy(six_steps, kind)
    np.testing.assert_allclose(losses, expected, rtol=1e-10)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-6, atol=1e-8)


@pytest.mark.parity
def test_steps_of_training_agree_in_float32(quick_backend32):
    losses, _ = six_steps(quick_backend32, "pre mha mlp")
    np.testing.assert_allclose(losses, on_plain_numpy(six_steps, "pre mha mlp")[0], rtol=1e-4)


@pytest.mark.parity
def test_steps_of_the_equation_model_agree(quick_backend, plain):
    model = Model(EquationConfig(), 13)
    config = TrainConfig(num_steps=10, batch_size=8, warmup_steps=0, schedule="constant")
    draw = np.random.default_rng(0).integers
    batches = PairBatches(draw(0, 13, (40, 4)), draw(0, 13, 40), 8, 0)
    losses, _ = train(quick_backend, model, config, batches, 10)
    np.testing.assert_allclose(losses, train(plain, model, config, batches, 10)[0], rtol=1e-10)


@pytest.mark.first_case
@pytest.mark.parametrize("switches", [*SWITCHES, *LATER.values()], ids=lambda s: " ".join(map(str, s.values())))
def test_one_batch_is_overfitted(switches):
    model = Model(GPTConfig(**SMALL, **switches), 17)
    config = TrainConfig(num_steps=300, batch_size=3, lr=2e-2, min_lr=1e-3, warmup_steps=10, weight_decay=0.0)
    batch = RandomWindows(TEXT, 8, 3, 0).batch(0)
    losses, _ = train(case_of("numpy"), model, config, SimpleNamespace(batch=lambda step: batch), 300)
    assert losses[0] > 2.5
    assert losses[-1] < 0.05


@pytest.mark.parametrize("switches", [*SWITCHES, *LATER.values()], ids=lambda s: " ".join(map(str, s.values())))
def test_initial_weights_predict_almost_uniformly(switches):
    """The loss of a fresh model is near log V: neither confident nor broken."""
    model = Model(GPTConfig(n_ctx=16, n_emb=32, head_size=32, n_heads=4, n_layers=4, **switches), 65)
    case, flat = case_of("numpy"), params.draw(model.spec, 0, "float64")
    ids = np.random.default_rng(0).integers(0, 65, (8, 17)).astype(np.int32)
    batch = Batch(ids[:, :-1], ids[:, 1:], np.arange(8, dtype=np.int32))
    assert float(total_loss(case.xp, model, flat, batch)[0]) / 128 == pytest.approx(np.log(65), abs=0.15)


def test_gradients_of_shards_add_up_to_those_of_the_batch(plain):
    model, batch = Model(GPTConfig(**SMALL), 17), RandomWindows(TEXT, 8, 5, 0).batch(0)
    flat = params.draw(model.spec, 0, "float64")

    def compute(first, last):
        loss, dp = loss_and_gradients(plain.xp, model, flat, samples(batch, first, last), n_targets=40)
        return np.append(loss, model.layout.pack(np, dp))

    np.testing.assert_allclose(compute(0, 2) + compute(2, 5), compute(0, 5), rtol=1e-10, atol=1e-14)


# accumulated gradients ----------------------------------------------------------------------------------


ONE_BLOCK = {**SMALL, "n_layers": 1}


def steps_in_parts(
    case, batch_size, accumulate, dropout=0.2, epochs=False, workers=None, steps=4, optimizer="adamw"
):
    """Losses, gradient norms and last parameters of steps of 12 samples, `batch_size` of them at a time."""
    model = Model(GPTConfig(**ONE_BLOCK, dropout=dropout), 17)
    config = TrainConfig(
        num_steps=steps, batch_size=batch_size, accumulate=accumulate, warmup_steps=1, lr=1e-2, min_lr=1e-3,
        optimizer=optimizer,
    )  # fmt: skip
    assert config.step_size == 12
    # 19 windows: a step of 12, and one of 7, whose last part is smaller than the others
    batches = EpochWindows(TEXT[:155], 8, 12, 8, 0) if epochs else RandomWindows(TEXT, 8, 12, 0)
    state = initial_state(case, params.draw(model.spec, 0, case.dtype), params.decay_mask(model.spec), 3)
    more = ()
    if workers is not None:
        more = gradients_of_step(config, workers.loss_and_gradients), workers.optimizer(config)
    step = case.compile(make_step(case.xp, model, config, *more))
    figures, sizes = [], []
    for i in range(steps):
        batch = batches.batch(i)
        state, metrics = step(state, on_device(case, batch))
        sizes.append(len(batch.samples))
        figures.append([float(case.to_numpy(metrics[name])[0]) for name in ("loss", "grad_norm")])
    assert sizes == ([12, 7, 12, 7] if epochs else [12] * 4)[:steps]
    return np.array(figures), case.to_numpy(state["params"])


def check_parts(case, expected, **how):
    figures, weights = steps_in_parts(case, **how)
    np.testing.assert_allclose(figures, expected[0], rtol=1e-12)
    np.testing.assert_allclose(weights, expected[1], rtol=0, atol=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize("epochs", [False, True], ids=["random", "epochs"])
def test_a_step_in_four_parts_equals_the_step(quick_backend, request, epochs):
    """With dropout on, and where an epoch ends in a smaller step."""
    if quick_backend.variant == "jax jit":
        if epochs:
            pytest.skip("JAX compiles every part of every shape: too slow here")
        request.getfixturevalue("quick_compilation")
    expected = steps_in_parts(quick_backend, 12, 1, epochs=epochs, steps=2)
    check_parts(quick_backend, expected, batch_size=3, accumulate=4, epochs=epochs, steps=2)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("epochs", [False, True], ids=["random", "epochs"])
def test_a_step_in_any_number_of_parts_equals_the_step(dropout, epochs):
    case = case_of("numpy")
    expected = steps_in_parts(case, 12, 1, dropout, epochs)
    for size in (1, 2, 4, 6):
        check_parts(case, expected, batch_size=size, accumulate=12 // size, dropout=dropout, epochs=epochs)


@pytest.mark.first_case
@pytest.mark.parametrize("epochs", [False, True], ids=["random", "epochs"])
@pytest.mark.parametrize(("dropout", "optimizer"), [(0.2, "muon"), (0.0, "adamw"), (0.2, "adamw")])
def test_two_workers_in_four_parts_compute_the_step(epochs, dropout, optimizer):
    case = case_of("numpy")
    expected = steps_in_parts(case, 12, 1, dropout, epochs, optimizer=optimizer)
    with Workers(case.backend, Model(GPTConfig(**ONE_BLOCK, dropout=dropout), 17), 3, 2) as pool:
        how = {"dropout": dropout, "epochs": epochs, "workers": pool, "optimizer": optimizer}
        check_parts(case, expected, batch_size=3, accumulate=4, **how)
    with Workers(case.backend, Model(GPTConfig(**ONE_BLOCK, dropout=dropout), 17), 12, 2) as pool:
        check_parts(case, expected, batch_size=12, accumulate=1, **how | {"workers": pool})


def test_the_equation_model_in_parts_equals_the_whole():
    case, model, draw = case_of("numpy"), Model(EquationConfig(n_hidden=8), 13), np.random.default_rng(0).integers
    batch = PairBatches(draw(0, 13, (40, 4)), draw(0, 13, 40), 12, 0).batch(0)
    state = initial_state(case, params.draw(model.spec, 0, "float64") * 3, params.decay_mask(model.spec), 0)
    whole = loss_and_gradients_with_dropout(case.xp, model, state, batch)
    parts = accumulated(loss_and_gradients_with_dropout, 5)(case.xp, model, state, batch)
    for one, other in zip(parts, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)


def test_only_one_part_is_computed_at_a_time():
    """The purpose of accumulating: a step needs only the memory of one part."""
    case, model, sizes = case_of("numpy"), Model(GPTConfig(**SMALL), 17), []

    def noted(xp, model, state, batch, n_targets=None):
        sizes.append((batch.inputs.shape, batch.targets.shape, batch.samples.tolist(), n_targets))
        return loss_and_gradients_with_dropout(xp, model, state, batch, n_targets)

    config = TrainConfig(num_steps=1, batch_size=3, accumulate=3)
    state = initial_state(case, params.draw(model.spec, 0, "float64"), params.decay_mask(model.spec), 0)
    step = make_step(case.xp, model, config, gradients_of_step(config, noted))
    step(state, RandomWindows(TEXT, 8, 7, 0).batch(0))
    parts = [[0, 1, 2], [3, 4, 5], [6]]
    assert sizes == [((len(part), 8), (len(part), 8), part, 56) for part in parts]


# optimizer ----------------------------------------------------------------------------------------------


def test_adamw_matches_the_paper(plain):
    """Three steps compared with the formulas in plain Python floats, one number at a time."""
    config = TrainConfig(num_steps=3, lr=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5, clip=0.0)
    w0, gradients = [1.0, -2.0], [[0.3, -0.1], [0.2, 0.4], [-0.5, 0.1]]
    state = {"params": np.array(w0), "m": np.zeros(2), "v": np.zeros(2), "decays": np.array([1.0, 0.0])}
    state["step"] = np.array([0], dtype=np.int32)
    for gradient in gradients:
        state, _ = optimizers.update(plain.xp, state, np.array(gradient), config)
    for i, decays in enumerate((1.0, 0.0)):
        w, m, v = w0[i], 0.0, 0.0
        for t, gradient in enumerate(gradients, start=1):
            m, v = 0.9 * m + 0.1 * gradient[i], 0.99 * v + 0.01 * gradient[i] ** 2
            w -= 0.1 * (m / (1 - 0.9**t) / ((v / (1 - 0.99**t)) ** 0.5 + 1e-8) + 0.5 * decays * w)
        assert state["params"][i] == pytest.approx(w, rel=1e-12)


def test_clipping_reduces_the_global_norm_to_the_limit(plain):
    norm = np.array([5.0])
    assert optimizers.clip_scale(plain.xp, norm, 1.0)[0] * 5 == pytest.approx(1.0, rel=1e-6)
    assert optimizers.clip_scale(plain.xp, norm, 10.0)[0] == 1
    assert optimizers.clip_scale(plain.xp, norm, 0.0)[0] == 1


def rates(plain, **settings):
    config = TrainConfig(**{"num_steps": 100, "warmup_steps": 10, "lr": 1.0, "min_lr": 0.1, **settings})
    steps = (np.array([step], dtype=np.int32) for step in range(120))
    return [float(schedules.learning_rate(plain.xp, step, config, np.float64)[0]) for step in steps]


def test_the_cosine_rises_falls_and_stays(plain):
    lr = rates(plain)
    assert lr[0] == pytest.approx(1 / 11)
    assert lr[9] == pytest.approx(10 / 11)
    assert lr[10] == pytest.approx(1.0)
    assert lr[55] == pytest.approx(0.55)
    assert lr[100:] == pytest.approx([0.1] * 20)
    assert all(a > b for a, b in itertools.pairwise(lr[10:101]))


def test_the_constant_rate_is_constant_after_the_warm_up(plain):
    lr = rates(plain, schedule="constant")
    assert lr[10:] == pytest.approx([1.0] * 110)


@pytest.mark.parametrize(("settings", "begin"), [
    ({}, 50), ({"decay_fraction": 0.25}, 75), ({"decay_fraction": 1.0}, 10), ({"decay_fraction": 1e-9}, 99),
])  # fmt: skip
def test_the_linear_decay_begins_late_and_ends_at_the_least_rate(plain, settings, begin):
    lr = rates(plain, schedule="linear", **settings)
    assert lr[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert lr[10 : begin + 1] == pytest.approx([1.0] * (begin - 9))
    assert lr[begin:101] == pytest.approx([1 - 0.9 * (step - begin) / (100 - begin) for step in range(begin, 101)])
    assert lr[100:] == pytest.approx([0.1] * 20)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_more_warm_up_than_steps_is_a_warm_up(plain, schedule):
    lr = rates(plain, schedule=schedule, warmup_steps=150)
    assert lr == pytest.approx([(step + 1) / 151 for step in range(120)])


def test_only_weights_decay_and_residual_projections_start_smaller():
    model = Model(GPTConfig(n_ctx=16, n_emb=32, head_size=32, n_heads=2, n_layers=8, c_network="moe"), 20)
    specs = dict(leaves(model.spec))
    decaying = {path for path, spec in specs.items() if spec.decays}
    assert decaying == {path for path in specs if path.endswith("weight")}
    assert specs["blocks.0.attention.qkv.weight"].std == 0.02
    assert specs["blocks.0.attention.out.weight"].std == pytest.approx(0.02 / 4)
    assert specs["blocks.0.network.down.weight"].std == pytest.approx(0.02 / 4)
    flat = params.draw(model.spec, 0)
    assert params.decay_mask(model.spec).shape == flat.shape == (model.n_parameters,)


# the original -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pre-mha-mlp", "post-mha-mlp", "pre-moh-mlp", "pre-mha-moe"])
def test_the_original_little_baby_is_reproduced(quick_backend, reference_folder, name):
    """Logits, loss and every gradient of its reference models, in float64."""
    read = lambda kind: json.loads((reference_folder / f"{kind}_{name}.json").read_text("utf-8"))  # noqa: E731
    config, expected = read("config"), read("expected")
    names = (*SMALL, "dropout", "c_sequence", "c_attention", "c_network")
    model = Model(GPTConfig(**{name: config[name] for name in names}), 65)
    flat = case_of("numpy plain").asarray(ours(model, read("model")))
    ids = np.array(expected["inputs"]), np.array(expected["targets"])
    batch = on_device(quick_backend, Batch(*ids, np.arange(3)))

    def compute(flat, batch):
        logits, _ = model.forward(quick_backend.xp, model.layout.unpack(quick_backend.xp, flat), batch.inputs)
        loss, dp = loss_and_gradients(quick_backend.xp, model, flat, batch)
        return logits, loss, model.layout.pack(quick_backend.xp, dp)

    logits, loss, gradients = quick_backend.compile(compute)(quick_backend.asarray(flat), batch)
    np.testing.assert_allclose(
        quick_backend.to_numpy(logits), np.reshape(expected["logits"], (-1, 65)), atol=1e-10, rtol=0
    )
    assert float(quick_backend.to_numpy(loss)[0]) == pytest.approx(expected["loss"], abs=1e-10)
    np.testing.assert_allclose(
        quick_backend.to_numpy(gradients), ours(model, expected["gradients"]), atol=1e-10, rtol=0
    )


def ours(model: Model, weights: dict) -> np.ndarray:
    """The original's named weights (or gradients) in the order of the flat array."""
    flat = np.full(model.n_parameters, np.nan)
    for name, view in littlebaby.named(model.config, model.layout, flat).items():
        if isinstance(view, np.ndarray):  # not one of the original's constants
            view[...] = weights[name]
    return flat
