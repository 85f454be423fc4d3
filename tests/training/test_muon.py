"""Muon against singular values and against PyTorch's, and what it updates: each parameter once, by one process."""

import math

import numpy as np
import pytest
from conftest import case_of
from layer_table import SWITCHES

from baby_xp.arrays import params
from baby_xp.arrays.tree import leaves
from baby_xp.config import EquationConfig, GPTConfig, TrainConfig
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.training import muon, optimizers
from baby_xp.training.step import initial_state

SHAPES = [(4, 4), (6, 4), (4, 7), (3, 12), (12, 3), (1, 5), (5, 1)]
MODEL = Model(GPTConfig(n_ctx=4, n_emb=8, head_size=4, n_heads=2, n_layers=3), 11)


def with_singular_values(rng, shape, values):
    """A matrix of this shape with these singular values, and its factors U and V^T."""
    U, _, V = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    return (U * values) @ V, U, V


def spread(rng, shape):
    """Singular values over three powers of ten."""
    return rng.uniform(0.5, 20) * np.geomspace(1, 1e-3, min(shape))


def polynomial(values, iterations):
    """What Newton-Schulz makes of singular values, one by one."""
    s = values / math.sqrt(sum(values**2))
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parity
@pytest.mark.parametrize("iterations", [1, 5, 7])
def test_each_singular_value_is_mapped_by_the_polynomial(quick_backend, iterations):
    """The oracle is the singular value decomposition, in which the matrix is diagonal."""
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        made = [with_singular_values(rng, shape, spread(rng, shape)) for _ in range(2)]
        x = quick_backend.asarray(np.stack([matrix for matrix, _, _ in made]))
        found = quick_backend.to_numpy(muon.orthogonalize(quick_backend.xp, x, iterations))
        for one, (matrix, U, V) in zip(found, made, strict=True):
            values = np.linalg.svd(matrix, compute_uv=False)
            np.testing.assert_allclose(one, (U * polynomial(values, iterations)) @ V, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernels", ["fast", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("iterations", [5, 10])
def test_singular_values_come_near_one(kernels, dtype, iterations):
    case = case_of({"fast": "numpy", "plain": "numpy plain"}[kernels], dtype)
    x = np.random.default_rng(1).normal(size=(2, 32, 96)).astype(dtype)
    values = np.linalg.svd(muon.orthogonalize(case.xp, x, iterations), compute_uv=False)
    assert 0.67 < values.min() < values.max() < 1.21


@pytest.mark.parametrize("kernels", ["fast", "plain"])
def test_matrices_without_a_direction_stay_finite(kernels):
    """Zero, and of rank one: in float32 the other singular values are rounding errors."""
    case = case_of({"fast": "numpy", "plain": "numpy plain"}[kernels], "float32")
    rank_one = np.outer(np.arange(1, 9), np.ones(24))
    x = np.stack([np.zeros((8, 24)), rank_one, 1e-20 * rank_one, 1e15 * rank_one]).astype("float32")
    found = muon.orthogonalize(case.xp, x, 10)
    assert np.isfinite(found).all()
    assert not found[0].any()
    for one in (found[1], found[3]):
        np.testing.assert_allclose(np.linalg.norm(one, 2), polynomial(np.array([1.0]), 10)[0], rtol=1e-3)


def test_a_step_is_the_formula(quick_backend):
    rng, xp = np.random.default_rng(0), quick_backend.xp
    for R, C in SHAPES:
        w, g, m = rng.normal(size=(3, 2, R, C))
        arrays = [quick_backend.asarray(array) for array in (w, g, m, np.array([0.7]), np.array([0.03]))]
        new_w, new_m = (quick_backend.to_numpy(one) for one in muon.muon(xp, *arrays, 0.9, 0.2, 5))
        mean = 0.9 * m + 0.1 * 0.7 * g
        np.testing.assert_allclose(new_m, mean, rtol=1e-12, atol=1e-14)
        for i in range(2):
            U, s, V = np.linalg.svd(0.9 * mean[i] + 0.1 * 0.7 * g[i], full_matrices=False)
            direction = max(1, C / R) ** 0.5 * (U * polynomial(s, 5)) @ V
            np.testing.assert_allclose(new_w[i], w[i] - 0.03 * (direction + 0.2 * w[i]), rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["fast", "plain"])
def test_it_is_the_muon_of_pytorch(monkeypatch, kernels):
    """Twenty steps of torch.optim.Muon, which we keep from rounding to bfloat16. Its weights are (out, in)."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    case, rng = case_of({"fast": "numpy", "plain": "numpy plain"}[kernels]), np.random.default_rng(0)
    for R, C in SHAPES:
        w, m = rng.normal(size=(1, R, C)), np.zeros((1, R, C))
        theirs = torch.nn.Parameter(torch.tensor(w[0].T.copy()))
        optimizer = torch.optim.Muon([theirs], lr=0.03, weight_decay=0.2, momentum=0.9, adjust_lr_fn="original")
        for _ in range(20):
            g = rng.normal(size=(1, R, C))
            w, m = muon.muon(case.xp, w, g, m, np.ones(1), np.full(1, 0.03), 0.9, 0.2, 5)
            theirs.grad = torch.tensor(g[0].T.copy())
            optimizer.step()
        np.testing.assert_allclose(w[0].T, theirs.detach().numpy(), rtol=0, atol=1e-8)


# which parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: " ".join(s.values()))
def test_matrices_are_the_weights_of_blocks(switches):
    model = Model(GPTConfig(n_ctx=4, n_emb=8, head_size=4, n_heads=2, n_layers=2, **switches), 11)
    specs, slices = dict(leaves(model.spec)), model.layout.slices
    weights = [path for path in specs if path.startswith("blocks.") and path.endswith(".weight")]
    assert params.matrices(model.spec) == [(slices[path], specs[path].shape) for path in weights]
    assert len(weights) == 2 * (4 + (switches["c_attention"] == "moh") + (switches["c_network"] == "moe"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("number", [1, 2, 3, 50])
def test_each_parameter_is_updated_once(optimizer, number):
    times, matrices = np.zeros((2, MODEL.n_parameters), int), []
    for rank in range(number):
        own = optimizers.parts(MODEL, optimizer, rank, number)
        matrices += own.matrices
        for i, slices in enumerate((own.slices, [at for at, _ in own.matrices])):
            for at in slices:
                times[i, at] += 1
    assert sorted(matrices, key=lambda one: one[0].start) == (
        params.matrices(MODEL.spec) if optimizer == "muon" else []
    )
    assert set(times.sum(axis=0)) == {1}


@pytest.mark.parametrize("number", [2, 3])
def test_processes_have_about_the_same_to_compute(number):
    costs = [
        sum(muon.cost(*shape) for _, shape in optimizers.parts(MODEL, "muon", rank, number).matrices)
        for rank in range(number)
    ]
    assert max(costs) < 1.2 * sum(costs) / number


def test_stacks_hold_matrices_of_one_shape():
    matrices = params.matrices(MODEL.spec)
    assert [len(stack) for stack in muon.stacks(matrices)] == [3, 3, 3, 3]
    assert [len(stack) for stack in muon.stacks(matrices, 512)] == [3, 3, 2, 1, 2, 1]
    assert [len(stack) for stack in muon.stacks(matrices, 1)] == [1] * 12
    for most in (None, 512, 1):
        stacks = list(muon.stacks(matrices, most))
        assert sorted((one for stack in stacks for one in stack), key=lambda one: one[0].start) == matrices
        assert all(len({shape for _, shape in stack}) == 1 for stack in stacks)


def test_the_others_are_updated_by_adamw():
    """Also with clipping; and the matrices have no second moment."""
    case, rng = case_of("numpy"), np.random.default_rng(0)
    by_muon = TrainConfig(num_steps=9, warmup_steps=0, optimizer="muon")
    states = [initial_state(case, params.draw(MODEL.spec, 0, "float64"), params.decay_mask(MODEL.spec), 0)] * 2
    for _ in range(3):
        g = rng.normal(size=MODEL.n_parameters)
        states = [
            optimizers.update(case.xp, state, g, by_muon, optimizer)[0]
            for state, optimizer in zip(states, (optimizers.of(MODEL, by_muon), optimizers.adamw), strict=True)
        ]
    own = optimizers.parts(MODEL, "muon")
    for name in ("params", "m", "v"):
        for at in own.slices:
            assert np.array_equal(states[0][name][at], states[1][name][at])
    for at, _ in own.matrices:
        assert not states[0]["v"][at].any()
        assert not np.isclose(states[0]["params"][at], states[1]["params"][at]).any()


def test_both_rates_follow_the_schedule():
    """Warm-up, decay, and the batch that the rates were chosen for."""
    case, g = case_of("numpy"), np.random.default_rng(0).normal(size=MODEL.n_parameters)
    for more, factor in [({}, 1.0), ({"base_batch_size": 8}, 2.0)]:
        config = TrainConfig(
            num_steps=10, batch_size=16, lr=1e-3, min_lr=5e-4, schedule="linear", warmup_steps=3, weight_decay=0.0,
            clip=0.0, optimizer="muon", muon_lr=0.04, **more,
        )  # fmt: skip
        for step, share in [(0, 0.25), (4, 1.0), (10, 0.5 / factor)]:
            zeros = np.zeros(MODEL.n_parameters)
            state = dict.fromkeys(("params", "m", "v", "decays"), zeros) | {"step": np.array([step], np.int32)}
            state, metrics = optimizers.update(case.xp, state, g, config, optimizers.of(MODEL, config))
            assert metrics["lr"][0] == pytest.approx(1e-3 * factor * share)
            at, shape = params.matrices(MODEL.spec)[0]
            direction = muon.orthogonalize(case.xp, g[at].reshape(1, *shape), 5)
            expected = -0.04 * factor * share * muon.step_size(*shape) * direction.reshape(-1)
            np.testing.assert_allclose(state["params"][at], expected, rtol=1e-4)


def test_a_model_without_matrices_is_refused(refused):
    config, words = TrainConfig(num_steps=1, optimizer="muon"), "this model has none: choose --optimizer adamw"
    with pytest.raises(BabyError, match=words):
        optimizers.of(Model(EquationConfig(), 13), config)
    for command in (["train", "equations"], ["estimate", "equations", "--no-measure"], ["equations", "mlp"]):
        refused(*command, "--optimizer=muon", words=(words,))
