"""CuPy's kernels: each gives what the plain function gives that it replaces, on the CPU and on a GPU.

On the CPU, the source that a GPU would get is compiled by the C++ compiler and run thread by thread: fake_cupy.py.
"""

import functools
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args, get_type_hints

import fake_cupy
import numpy as np
import pytest
from baby_xp_backends import cupy_kernels
from conftest import case_of
from layer_table import TABLE, noting, numbers_for

from baby_xp.arrays import params, rng
from baby_xp.arrays.tree import Parameters, fill, leaves
from baby_xp.config import MODERN, GPTConfig, TrainConfig
from baby_xp.layers import Shape, cross_entropy, dropout, embedding, gelu, heads, layernorm, linear, softmax
from baby_xp.models import Model
from baby_xp.resources import counts
from baby_xp.text.batches import RandomWindows
from baby_xp.training import optimizers
from baby_xp.training.step import initial_state, make_step, on_device

BOTH = ["cupy kernels", pytest.param("cupy", marks=pytest.mark.gpu)]
TOLERANCE = {"float64": 1e-12, "float32": 2e-5}
"""Largest difference from the plain form in float64, in units of the array's largest number."""


@pytest.fixture(params=BOTH)
def cupy(request):
    """The kernels in float64."""
    return case_of(request.param)


@pytest.fixture(params=BOTH)
def cupy32(request):
    """The kernels in float32."""
    return case_of(request.param, "float32")


@pytest.fixture
def fake():
    """A machine whose GPU the CPU plays, and the backend on it."""
    machine = fake_cupy.Machine()
    try:
        return machine, fake_cupy.backend(machine)
    except fake_cupy.BackendUnavailable as error:
        pytest.skip(error.reason)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1.5, shape)


def stream(B: int) -> np.ndarray:
    return np.random.default_rng(9).integers(-(2**31), 2**31, B).astype(np.int32)


# each function and what it is called with: more rows than a block has warps, more columns than a warp has threads,
# and neither a multiple of 32 --------------------------------------------------------------------------------

N, C, V = 75, 70, 101
RATE = 0.3


def weights(C: int, F: int) -> dict[str, np.ndarray]:
    return {"weight": draw(0, C, F), "bias": draw(1, F)}


def gains(C: int) -> dict[str, np.ndarray]:
    return {"gain": draw(0, C), "bias": draw(1, C)}


def both_ways(module, p, x, dy, *arguments):
    """Forward and backward of a layer, as one function of xp and a way to put arrays on the device."""

    def run(xp, put):
        put_p = {name: put(array) for name, array in p.items()}
        y, saved = module.forward(xp, put_p, put(x), *arguments)
        back = module.backward(xp, put_p, saved, put(dy))
        dp, dx = back if isinstance(back, tuple) else (back, None)
        return [y, dx, *dp.values()]

    return run


def attention(B, T, H, D, noise: bool, spread: float = 1.0):
    def run(xp, put):
        given = (put(stream(B)), RATE) if noise else None
        y, saved = heads.forward(xp, {}, put(spread * draw(0, B * T, 3 * H * D)), Shape(B, T, H), given)
        return [y, heads.backward(xp, {}, saved, put(draw(1, B * T, H * D)))[1], saved.k, saved.v]

    return run


def attention_after(t: int, T: int, D: int):
    """Attention of T tokens to themselves and to the t before them."""
    B, H = 2, 3

    def run(xp, put):
        past = tuple(put(draw(i, B, H, t, D)) for i in (2, 3))
        y, saved = heads.forward(xp, {}, put(draw(0, B * T, 3 * H * D)), Shape(B, T, H), None, past)
        return [y, saved.k, saved.v]

    return run


def attention_in_turns(t: int, T: int, D: int):
    """Attention of t tokens, then of T more, whose past is what the first call saved: views, not copies."""
    B, H = 2, 3

    def run(xp, put):
        _, saved = heads.forward(xp, {}, put(draw(1, B * t, 3 * H * D)), Shape(B, t, H))
        for seed in (2, 3):
            past, qkv = (saved.k, saved.v), put(draw(seed, B * T, 3 * H * D))
            y, saved = heads.forward(xp, {}, qkv, Shape(B, T, H), None, past)
        return [y, saved.k, saved.v]

    return run


def rates(step: int, **settings):
    config = TrainConfig(**{"num_steps": 50, "warmup_steps": 10, "min_lr": 1e-4, "clip": 1.0, **settings})
    given = np.array([step], dtype=np.int32)
    return lambda xp, put: optimizers.rates(xp, put(np.array([3.7])), put(given), config)


def many_logits(xp, put):
    """A head of many ids and its loss: rows of more elements than are ids."""
    x, targets = put(draw(0, 260, 3)), put(np.random.default_rng(1).integers(0, 1027, 260).astype(np.int32))
    p = {name: put(array) for name, array in weights(3, 1027).items()}
    logits, saved = linear.forward(xp, p, x)
    losses, loss_saved = cross_entropy.forward(xp, {}, logits, targets)
    _, dlogits = cross_entropy.backward(xp, {}, loss_saved, put(draw(2, 260)))
    dp, dx = linear.backward(xp, p, saved, dlogits)
    # once more, into places of its own
    views = {name: put(np.zeros_like(array)) for name, array in weights(3, 1027).items()}
    fill(views, linear.backward(xp, Parameters(p, views), saved, dlogits)[0])
    return [losses, dlogits, dx, *dp.values(), *views.values()]


def adamw(size: int):
    def run(xp, put):
        arrays = [put(draw(i, size)) for i in range(3)]
        arrays += [put(draw(3, size) ** 2), put(np.arange(size) % 2.0)]
        scalars = [put(np.array([x])) for x in (0.7, 1e-2, 0.3, 0.05)]
        return optimizers.adamw(xp, *arrays, *scalars, 0.9, 0.99, 0.1)

    return run


def loss(xp, put):
    logits, targets = draw(0, N, V), np.random.default_rng(1).integers(0, V, N).astype(np.int32)
    losses, saved = cross_entropy.forward(xp, {}, put(20 * logits), put(targets))
    return [losses, cross_entropy.backward(xp, {}, saved, put(draw(2, N)))[1]]


def rows_by_id(number: int, V: int):
    ids = np.random.default_rng(0).integers(0, V, number).astype(np.int32) // 3 * 3
    return lambda xp, put: [embedding.sum_by_id(xp, put(ids), put(draw(1, number, C)), V)]


def dropped(xp, put):
    y, keep = dropout.drop(xp, put(draw(0, 3, 7, 101)), put(stream(3)), RATE)
    return [y, keep, dropout.select(xp, keep, put(draw(1, 3, 7, 101)), RATE)]


CASES = {
    "linear": both_ways(linear, weights(C, V), draw(2, N, C), draw(3, N, V)),
    "linear without bias": both_ways(linear, {"weight": draw(0, C, V)}, draw(2, N, C), draw(3, N, V)),
    "linear with many rows": both_ways(linear, weights(2, 3), draw(2, 2111, 2), draw(3, 2111, 3)),
    "layer norm": both_ways(layernorm, gains(C), draw(2, N, C), draw(3, N, C)),
    "layer norm of one row": both_ways(layernorm, gains(5), draw(2, 1, 5), draw(3, 1, 5)),
    "gelu": both_ways(gelu, {}, draw(0, N, C), draw(1, N, C), "tanh"),
    "gelu of more than a grid": both_ways(gelu, {}, draw(0, 1_100_003), draw(1, 1_100_003), "tanh"),
    "gelu by erf": both_ways(gelu, {}, draw(0, N, C), draw(1, N, C), "erf"),
    "gelu far from zero": lambda xp, put: gelu.tanh_form(xp, put(np.array([-1e4, -40.0, -10, 0, 10, 1e4]))),
    "softmax": both_ways(softmax, {}, draw(0, N, C), draw(1, N, C)),
    "softmax of a short row": both_ways(softmax, {}, draw(0, 3, 5, 4), draw(1, 3, 5, 4)),
    "attention": attention(2, 37, 3, 5, noise=False),
    "attention with dropout": attention(3, 37, 2, 4, noise=True),
    "attention of wide heads": attention(2, 37, 2, 40, noise=False),
    "attention of wide heads with dropout": attention(2, 11, 2, 40, noise=True),
    "attention of many tokens": attention(1, 70, 1, 32, noise=True),
    "attention of one token": attention(2, 1, 2, 4, noise=True),
    "attention with scores far apart": attention(2, 9, 3, 4, noise=False, spread=30.0),
    "cross-entropy": loss,
    "attention of wide heads with scores far apart": attention(2, 9, 3, 34, noise=False, spread=30.0),
    **{f"attention after others, heads of {D}": attention_after(t, T, D)
       for t, T, D in ((33, 1, 4), (40, 9, 40), (3, 2, 70))},
    "attention in turns": attention_in_turns(4, 1, 4),
    "many logits": many_logits,
    "rates": rates(7, schedule="cosine"),
    "rates after the warm-up": rates(30, schedule="cosine"),
    "rates after the end": rates(60, schedule="cosine"),
    "linear rates": rates(40, schedule="linear", decay_fraction=0.5),
    "constant rates without clipping": rates(30, schedule="constant", clip=0.0),
    "rows of many ids": rows_by_id(700, cupy_kernels.ONE_HOT_IDS + 5),
    "rows of few ids": rows_by_id(100, 11),
    "dropout": dropped,
    "AdamW": adamw(1000),
    "AdamW of more than a grid": adamw(1_100_003),
    "global norm": lambda xp, put: [optimizers.global_norm(xp, put(draw(0, 300_007)))],
    "global norm of one": lambda xp, put: [optimizers.global_norm(xp, put(draw(0, 1)))],
}  # fmt: skip
NAMES = pytest.mark.parametrize("name", CASES)


def compare(case, plain, run) -> None:
    found, expected = run(case.xp, case.asarray), run(plain.xp, plain.asarray)
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
            continue
        one, other = case.to_numpy(one), np.asarray(other)
        assert (one.shape, one.dtype.kind) == (other.shape, other.dtype.kind)
        if one.dtype.kind == "f":
            assert one.dtype == case.dtype
        scale = max(1e-3, np.max(np.abs(other)))
        np.testing.assert_allclose(one / scale, other / scale, rtol=0, atol=TOLERANCE[case.dtype])


@NAMES
def test_a_kernel_is_the_plain_function(cupy, plain, name):
    compare(cupy, plain, CASES[name])


@NAMES
def test_a_kernel_is_the_plain_function_in_float32(cupy32, plain, name):
    compare(cupy32, plain, CASES[name])


def test_these_cases_reach_every_kernel_and_every_function(fake, monkeypatch):
    machine, backend = fake
    reached = set()
    monkeypatch.setattr(backend.xp, "kernels", noting(backend.xp.kernels, reached))
    for run in CASES.values():
        run(backend.xp, lambda array: backend.asarray(np.asarray(array)))
    rng.keep_mask(backend.xp, backend.asarray(stream(2)), 5, RATE)
    rng.streams(backend.xp, *(backend.integers([i]) for i in range(3)), 2)
    assert reached == set(cupy_kernels.KERNELS)
    in_source = {part.partition("(")[0] for part in cupy_kernels.source("float32").split("__global__ void ")[1:]}
    assert {name for name, _ in machine.launched} >= in_source


@NAMES
def test_the_order_of_threads_changes_nothing(fake, name):
    """A result that hangs on an order that CUDA does not promise shows here as two results."""
    machine, backend = fake
    results = []
    for machine.falling in (False, True):
        arrays = CASES[name](backend.xp, lambda array: backend.asarray(np.asarray(array)))
        results.append([None if array is None else array.tobytes() for array in arrays])
    assert results[0] == results[1]


def test_the_constants_of_the_source_are_those_of_the_maths():
    definition = r"#define (\w+) (?:\(\(real\))?([\w.-]+?)u?\)?(?: +//.*)?\n"
    found = dict(re.findall(definition, cupy_kernels.source("float64")))
    unsigned = {name: getattr(rng, name) % 2**32 for name in ("GOLDEN", "FIRST", "SECOND")}
    assert {name: int(found[name], 16) for name in unsigned} == unsigned
    others = {
        "ROOT_2_OVER_PI": gelu.ROOT_2_OVER_PI, "CUBIC": gelu.CUBIC, "ROOT_HALF": math.sqrt(0.5),
        "ONE_OVER_ROOT_2_PI": 1 / math.sqrt(2 * math.pi), "LAYERNORM_EPS": layernorm.EPS,
        "ADAMW_EPS": optimizers.EPS, "WIDEST": cupy_kernels.WIDEST, "WARPS": cupy_kernels.QUERIES,
        "WIDEST_BACKWARD": counts.NARROW_HEAD,
    }  # fmt: skip
    assert {name: float(found[name]) for name in others} == pytest.approx(others, rel=1e-15)


# bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 513, 70_001])
@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_masks_are_the_same_bit_for_bit(cupy32, plain, size, rate):
    keys = np.array([0, 1, -1, 2**31 - 1, -(2**31)], dtype=np.int32)
    found = cupy32.to_numpy(rng.keep_mask(cupy32.xp, cupy32.asarray(keys), size, rate))
    assert np.array_equal(found, rng.keep_mask(plain.xp, keys, size, rate), equal_nan=True)


def test_streams_are_the_same_bit_for_bit(cupy32, plain):
    samples = np.arange(300, dtype=np.int32)
    for seed, step in ((0, 0), (2**32 - 1, 7), (5, 2**31)):
        found = []
        for case in (cupy32, plain):
            given = case.integers([seed]), case.integers([step]), case.asarray(samples)
            found.append(case.to_numpy(rng.streams(case.xp, *given, 9)))
        assert np.array_equal(*found)


def test_attention_drops_what_the_mask_says(cupy, plain):
    """The softmax kernel hashes for itself; the weights that it drops are those that rng.keep_mask says."""
    B, T, H, D = 2, 6, 3, 34
    _, saved = heads.forward(cupy.xp, {}, cupy.asarray(draw(0, B * T, 3 * H * D)), Shape(B, T, H),
                             (cupy.asarray(stream(B)), 0.5))  # fmt: skip
    weights, dropped = cupy.to_numpy(saved.weights), cupy.to_numpy(saved.dropped)
    keep = rng.keep_mask(plain.xp, stream(B), H * T * T, 0.5).reshape(B, H, T, T)
    assert np.array_equal(dropped != 0, keep & (weights != 0))
    assert (weights[:, :, ~np.tri(T, dtype=bool)] == 0).all()


# numbers that are not finite, and views -------------------------------------------------------------------


def test_a_logit_of_minus_infinity_adds_nothing_and_nan_shows(cupy, plain):
    logits = draw(0, 4, 40)
    logits[0, 0] = logits[1, 39] = -np.inf
    logits[2, 5], logits[3, :] = np.nan, -np.inf
    targets = np.array([3, 0, 1, 2], dtype=np.int32)
    with np.errstate(invalid="ignore"):
        expected, _ = cross_entropy.forward(plain.xp, {}, logits, targets)
    found, _ = cross_entropy.forward(cupy.xp, {}, cupy.asarray(logits), cupy.asarray(targets))
    np.testing.assert_allclose(cupy.to_numpy(found), expected, rtol=1e-12)
    assert np.isnan(expected).tolist() == [False, False, True, True]


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_where_logits_lie_does_not_matter(cupy, plain, shift):
    logits, targets, dy = draw(0, 9, 40) + shift, np.arange(9, dtype=np.int32), draw(1, 9)
    results = []
    for case in (cupy, plain):
        losses, saved = cross_entropy.forward(case.xp, {}, case.asarray(logits), case.asarray(targets))
        dlogits = cross_entropy.backward(case.xp, {}, saved, case.asarray(dy))[1]
        softmaxed = softmax.forward(case.xp, {}, case.asarray(logits))[0]
        results.append([case.to_numpy(array) for array in (losses, dlogits, softmaxed)])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_kernels_take_views_as_they_are_meant(cupy, plain):
    x = draw(0, 60, 50)
    gain = {"gain": draw(1, 60), "bias": draw(2, 60)}
    found, _ = layernorm.forward(cupy.xp, {k: cupy.asarray(v) for k, v in gain.items()}, cupy.asarray(x).T)
    np.testing.assert_allclose(cupy.to_numpy(found), layernorm.forward(plain.xp, gain, x.T)[0], atol=1e-12)
    y, derivative = gelu.tanh_form(cupy.xp, cupy.asarray(x)[::2, 1:9])
    np.testing.assert_allclose(cupy.to_numpy(y), gelu.tanh_form(plain.xp, x[::2, 1:9])[0], atol=1e-12)
    np.testing.assert_allclose(cupy.to_numpy(derivative), gelu.tanh_form(plain.xp, x[::2, 1:9])[1], atol=1e-12)


# products -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_products_are_products(cupy, transpose_a, transpose_b):
    a, b = draw(0, 2, 3, 5, 7), draw(1, 2, 3, 7, 4)
    out = cupy.asarray(np.zeros((2, 3, 5, 4)))
    turned = ((a, transpose_a), (b, transpose_b))
    factors = [cupy.asarray(np.ascontiguousarray(x.swapaxes(-1, -2)) if turn else x) for x, turn in turned]
    found = cupy.xp.product(*factors, transpose_a, transpose_b, factor=0.25, out=out)
    np.testing.assert_allclose(cupy.to_numpy(found), 0.25 * (a @ b), atol=1e-13)
    assert found is out


@pytest.mark.parametrize(
    ("a", "b"),
    [((5, 7), (7, 4)), ((2, 5, 7), (7, 4)), ((2, 3, 5, 7), (7, 4)), ((3, 5, 7), (3, 7, 4)), ((5, 7), (3, 7, 4)),
     ((1, 5, 7), (3, 7, 4)), ((2, 0, 7), (2, 7, 4)), ((7,), (7, 4)), ((0, 5, 7), (7, 4))],
)  # fmt: skip
def test_matmul_is_matmul_for_all_shapes(cupy, a, b):
    a, b = draw(0, *a), draw(1, *b)
    found = cupy.to_numpy(cupy.xp.matmul(cupy.asarray(a), cupy.asarray(b)))
    assert found.shape == (a @ b).shape
    np.testing.assert_allclose(found, a @ b, atol=1e-13)


# a step ---------------------------------------------------------------------------------------------------


# What matters for the number of launches: layers, dropout, heads up to 32 wide or wider.
WORKLOADS = {
    "W1": (143, {"n_layers": 4, "n_heads": 4, "head_size": 16, "dropout": 0.0}),
    "W2": (160, {"n_layers": 4, "n_heads": 4, "head_size": 16, "dropout": 0.1}),
    "W3": (568, {"n_layers": 16, "n_heads": 4, "head_size": 16, "dropout": 0.1}),
    "W4": (288, {"n_layers": 6, "n_heads": 2, "head_size": 128, "dropout": 0.2}),
}
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
FIGURES = Path(__file__).parents[2] / "docs/gpu.md"


def prepared(backend, sizes, **training):
    """A compiled step of a narrow model, and a state and a batch for it."""
    model = Model(GPTConfig(n_ctx=8, n_emb=16, **sizes), 65)
    config = TrainConfig(num_steps=10, clip=1.0, warmup_steps=2, **training)
    state = initial_state(backend, params.draw(model.spec, 0), params.decay_mask(model.spec), 3)
    batch = RandomWindows(np.random.default_rng(0).integers(0, 65, 400), 8, 3, 0).batch(0)
    return backend.compile(make_step(backend.xp, model, config)), state, batch


@pytest.mark.parametrize("schedule", get_args(get_type_hints(TrainConfig)["schedule"]))
@pytest.mark.parametrize("workload", ["W1", SLOW("W2"), SLOW("W3"), "W4"])
def test_a_step_never_waits_for_the_device_and_copies_only_its_batch(fake, workload, schedule):
    launches, sizes = WORKLOADS[workload]
    assert counted(fake, sizes, schedule=schedule) == (launches, 0, 1)
    row = next(line for line in FIGURES.read_text("utf-8").splitlines() if line.startswith(f"| {workload} |"))
    assert row.split(" | ")[4] == str(launches)


@pytest.mark.slow
def test_a_modern_step_with_muon_never_waits_for_the_device_either(fake):
    sizes = {**MODERN, **WORKLOADS["W1"][1]}
    launches, waits, copies = counted(fake, sizes, schedule="linear", optimizer="muon")
    assert waits == 0
    assert f"take {launches}\nlaunches and {copies - 1} small copies more" in FIGURES.read_text("utf-8")


def counted(fake, sizes, **training) -> tuple[int, int, int]:
    """Launches, waits and copies from the host in a step after the first, which makes the counters."""
    machine, backend = fake
    step, state, batch = prepared(backend, sizes, **training)
    state, _ = step(state, on_device(backend, batch))
    machine.launched.clear()
    waits, copies = machine.synchronized, machine.copied
    state, metrics = step(state, on_device(backend, batch))
    found = len(machine.launched), machine.synchronized - waits, machine.copied - copies
    assert np.isfinite(float(backend.to_numpy(metrics["loss"])[0]))
    return found


def test_the_fake_counts_what_makes_the_host_wait(fake):
    machine, backend = fake
    x, xp = backend.asarray(np.arange(4.0)), backend.xp
    for reading in (
        lambda: float(x[0]), lambda: int(x[0]), lambda: x[0].item(), lambda: x.tolist(), lambda: bool(x[0] > 0),
        lambda: x[x > 1], lambda: xp.clip(x, 0.0, 1.0), lambda: backend.to_numpy(x),
    ):  # fmt: skip
        before = machine.synchronized
        reading()
        assert machine.synchronized > before
    for copying in (lambda: backend.asarray(np.ones(3)), lambda: xp.asarray([1.0]), lambda: xp.concat([x] * 9)):
        before = machine.copied
        copying()
        assert machine.copied > before


def test_gradients_are_computed_where_they_belong(fake):
    """No pass copies them into the flat gradient, except the small ones that are no products."""
    machine, backend = fake
    step, state, batch = prepared(backend, WORKLOADS["W1"][1])
    step(state, on_device(backend, batch))
    names = [name for name, _ in machine.launched]
    assert names.count("copy") == 2  # of the two embeddings
    assert "concat" not in names


def test_the_layer_table_gives_the_same_numbers_a_second_time(cupy32):
    """No sum is made in an order left to chance."""
    for entry in TABLE:
        numbers, results = numbers_for(entry), []
        for _ in range(2):
            arrays = [cupy32.asarray(array) for array in (numbers.flat, numbers.x, numbers.streams)]
            p = numbers.layout.unpack(cupy32.xp, arrays[0])
            y, saved = entry.forward(cupy32.xp, p, *arrays[1:])
            dp, _ = entry.backward(cupy32.xp, p, saved, cupy32.asarray(numbers.dy(y.shape)))
            results.append([cupy32.to_numpy(array).tobytes() for array in (y, *(leaf for _, leaf in leaves(dp)))])
        assert results[0] == results[1], entry.name


# the compilers that a GPU's code goes through ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="CUDA's compiler nvcc is not here")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_source_compiles_for_a_gpu_and_keeps_its_numbers_in_registers(tmp_path, dtype):
    (tmp_path / "kernels.cu").write_text(cupy_kernels.source(dtype), "utf-8")
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-cubin", "-Xptxas", "-v", "kernels.cu", "-o", "kernels.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert set(spilled) == {("0", "0")}
    assert len(spilled) >= cupy_kernels.source(dtype).count('extern "C" __global__')


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="CUDA's compiler nvcc is not here")
def test_each_file_compiles_alone(tmp_path):
    for file in sorted(cupy_kernels.FOLDER.glob("*.cu")):
        command = ["nvcc", "-std=c++17", "-arch=sm_90", "-cubin", str(file), "-o", str(tmp_path / "alone.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), file.name
