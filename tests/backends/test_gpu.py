"""What only a GPU can show. `python -m pytest -m gpu` runs this and all that other files have for one."""

import contextlib
import re
import warnings

import numpy as np
import pytest
from conftest import case_of
from layer_table import TABLE, numbers_for
from safetensors.numpy import load_file
from small_runs import TEXT, StopAt

from baby_xp import api, cli
from baby_xp.arrays import params, registry
from baby_xp.arrays.tree import leaves
from baby_xp.config import GPTConfig, TrainConfig
from baby_xp.errors import BackendUnavailable
from baby_xp.models import Model
from baby_xp.text.batches import RandomWindows
from baby_xp.training.step import initial_state, make_step, on_device

pytestmark = pytest.mark.gpu

TINY = {
    "n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 8, "num_steps": 10,
    "eval_every": 5, "checkpoint_every": 2, "dropout": 0.2, "sample_tokens": 3, "warmup_steps": 3, "lr": 1e-2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cupy():
    """The module, where a GPU works; skips with the reason elsewhere. Its memory limit is as before afterwards."""
    case_of("cupy", "float32")
    import cupy

    pool = cupy.get_default_memory_pool()
    limit = pool.get_limit()
    yield cupy
    pool.set_limit(size=limit)
    pool.free_all_blocks()


@pytest.fixture
def text(work) -> str:
    """A text in the current folder."""
    return "text.txt"


def train(text, listener=None, **more):
    return api.train("classic", listener=listener, **{**TINY, "data": text, **more})


# the same numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_every_layer_with_kernels_is_the_layer_without_on_the_device(entry):
    """Both on the GPU: what differs is the kernels alone."""
    case, numbers = case_of("cupy"), numbers_for(entry)
    plain, results = registry.load("cupy", None, case.dtype, "plain").xp, []
    for xp in (case.xp, plain):
        arrays = [case.asarray(array) for array in (numbers.flat, numbers.x, numbers.streams)]
        p = numbers.layout.unpack(xp, arrays[0])
        y, saved = entry.forward(xp, p, *arrays[1:])
        dp, dx = entry.backward(xp, p, saved, case.asarray(numbers.dy(y.shape)))
        found = [y, *(leaf for _, leaf in leaves(dp)), *([] if dx is None else [dx])]
        results.append([case.to_numpy(array) for array in found])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


SIZES = {
    "one block": GPTConfig(n_ctx=64, n_emb=128, head_size=128, n_heads=4, n_layers=2, dropout=0.1),
    "mixtures": GPTConfig(n_ctx=48, n_emb=72, head_size=60, n_heads=6, n_layers=2, dropout=0.2, c_attention="moh",
                          c_network="moe", c_sequence="post"),
    "many ids": GPTConfig(n_ctx=32, n_emb=64, head_size=64, n_heads=4, n_layers=1, dropout=0.1),
}  # fmt: skip
IDS = {"many ids": 5000}


def steps(case, name: str, number: int, **options):
    """Losses and last parameters of some steps of a model that fills more than one block of threads."""
    model = Model(SIZES[name], IDS.get(name, 65))
    ids = np.random.default_rng(0).integers(0, model.vocab_size, 9000)
    batches = RandomWindows(ids, model.config.n_ctx, 12, 0)
    config = TrainConfig(num_steps=number, batch_size=12, warmup_steps=3)
    state = initial_state(case, params.draw(model.spec, 0, case.dtype), params.decay_mask(model.spec), 3)
    step, losses = case.compile(make_step(case.xp, model, config)), []
    for i in range(number):
        state, metrics = step(state, on_device(case, batches.batch(i)))
        losses.append(metrics["loss"])
    return np.array([float(case.to_numpy(loss)[0]) for loss in losses]), case.to_numpy(state["params"])


@pytest.mark.parametrize("name", SIZES)
def test_ten_steps_with_dropout_are_those_of_numpy(name):
    for dtype, rtol in (("float64", 1e-9), ("float32", 1e-4)):
        found, expected = (registry.load(which, dtype=dtype) for which in ("cupy", "numpy"))
        (losses, weights), (losses0, weights0) = steps(found, name, 10), steps(expected, name, 10)
        np.testing.assert_allclose(losses, losses0, rtol=rtol)
        if dtype == "float64":
            np.testing.assert_allclose(weights, weights0, rtol=1e-5, atol=1e-7)


def test_the_same_steps_give_the_same_bits():
    backend = registry.load("cupy")
    for name in SIZES:
        (losses, weights), (losses1, weights1) = steps(backend, name, 5), steps(backend, name, 5)
        assert losses.tobytes() == losses1.tobytes()
        assert weights.tobytes() == weights1.tobytes()


def test_generation_gives_the_ids_of_numpy(text):
    train(text, num_steps=60, backend="cupy", dtype="float64")
    for settings in ({"seed": 1}, {"seed": 2, "top_k": 3}, {"greedy": True}, {"temperature": 0.5, "top_p": 0.9}):
        texts = [api.load(backend=name).generate("the ", 300, **settings) for name in ("numpy", "cupy")]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(("first", "second"), [("cupy", "cupy"), ("numpy", "cupy"), ("cupy", "numpy")])
def test_a_run_moves_between_numpy_and_the_gpu(text, first, second):
    whole = train(text, backend="numpy", workers=1, dtype="float64", path="whole")
    train(text, backend=first, workers=1, dtype="float64", listener=StopAt(5))
    moved = api.resume(backend=second, workers=1)
    expected, found = (load_file(run.files.state) for run in (whole, moved))
    for name in ("params", "m", "v"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-9)


def test_a_run_of_numpy_is_finetuned_on_the_gpu_and_back(text, tmp_path):
    (tmp_path / "other.txt").write_text(TEXT.replace("cat", "zög"), encoding="utf-8")
    base = train(text, backend="numpy", workers=1)
    settings = {"name": base.guid, "data": "other.txt", "num_steps": 4, "workers": 1}
    losses = [api.finetune(backend=name, **settings).evaluate().loss for name in ("numpy", "cupy")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# products -----------------------------------------------------------------------------------------------


def test_tf32_changes_products_and_not_by_much(cupy):
    if int(cupy.cuda.Device().compute_capability) < 80:
        pytest.skip("this GPU has no TF32")
    draw = np.random.default_rng(0).normal
    flat, batch = (draw(size=shape).astype(np.float32) for shape in ((256, 256), (4, 2, 128, 128)))
    for compute in (
        lambda backend: backend.asarray(flat) @ backend.asarray(flat),
        lambda backend: backend.xp.product(*[backend.asarray(batch)] * 2),
        lambda backend: backend.xp.matmul(*[backend.asarray(batch)] * 2),
    ):
        exact, fast, again = (
            backend.to_numpy(compute(backend))
            for backend in (registry.load("cupy", tf32=on) for on in (False, True, False))
        )
        distance = np.max(np.abs(exact - fast)) / np.max(np.abs(exact))
        assert 1e-6 < distance < 1e-2
        assert np.array_equal(exact, again)


def test_a_model_trains_in_tf32_nearly_as_without(cupy):
    if int(cupy.cuda.Device().compute_capability) < 80:
        pytest.skip("this GPU has no TF32")
    exact, fast = (steps(registry.load("cupy", tf32=on), "one block", 10)[0] for on in (False, True))
    np.testing.assert_allclose(fast, exact, rtol=1e-2)
    assert not np.array_equal(fast, exact)


# waiting ------------------------------------------------------------------------------------------------


def test_a_step_does_not_wait_for_the_device(cupy):
    """CuPy reports its own waits, not those of the driver."""
    import cupyx

    backend = registry.load("cupy")
    model = Model(SIZES["one block"], 65)
    batch = RandomWindows(np.random.default_rng(0).integers(0, 65, 9000), 64, 12, 0).batch(0)
    state = initial_state(backend, params.draw(model.spec, 0), params.decay_mask(model.spec), 3)
    step = backend.compile(make_step(backend.xp, model, TrainConfig(num_steps=10)))
    state, _ = step(state, on_device(backend, batch))
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")  # it says that it may go in a later CuPy
        if not hasattr(cupyx, "allow_synchronize"):
            pytest.skip("this CuPy no longer reports its waits")
        stack.enter_context(cupyx.allow_synchronize(False))
        for _ in range(2):
            state, _ = step(state, on_device(backend, batch))


# memory, devices ----------------------------------------------------------------------------------------


def test_a_memory_limit_ends_in_one_line(text, capsys):
    size = ["--n-ctx=128", "--n-emb=256", "--head-size=256", "--n-layers=4", "--batch-size=64"]
    flags = ["--data=text.txt", "--backend=cupy", "--num-steps=3", "--sample-tokens=0", *size]
    assert cli.main(["train", *flags, "--memory-gib=0.4"]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    found = re.search(
        r"out of memory on cuda:0 .*: an array of .* did not fit, .* are free, .* are held by this process, which "
        r"may hold 409\.6 MiB; by a rough count about (\d+) sequences .*--batch-size (\d+) --accumulate (\d+) ",
        line,
    )
    assert found, line
    fits = [f"--batch-size={found[2]}", f"--accumulate={found[3]}"]
    assert cli.main(["train", *flags, *fits, "--memory-gib=0.4"]) == 0


def test_the_peaks_are_those_of_the_pool(text, cupy):
    run = train(text, backend="cupy")
    memory = run.backend.memory()
    assert 0 < memory.used <= memory.peak_used <= memory.peak_held
    assert memory.peak_held >= cupy.get_default_memory_pool().total_bytes()
    assert "GPU memory, peak used/held" in run.files.report.read_text("utf-8")


def test_a_device_that_is_not_there_is_refused_in_one_line(text, capsys, cupy):
    beyond = cupy.cuda.runtime.getDeviceCount()
    assert cli.main(["train", "--data=text.txt", "--backend=cupy", f"--device=cuda:{beyond}"]) == 2
    assert re.fullmatch(
        rf"baby_xp: backend 'cupy' cannot work here: no device 'cuda:{beyond}'; devices here: cuda:0.*\n",
        capsys.readouterr().err,
    )


def test_a_second_device_does_all_of_a_run(text, cupy):
    try:
        backend = registry.load("cupy", "cuda:1")
    except BackendUnavailable:
        pytest.skip("there is one GPU here")
    assert backend.asarray(np.zeros(3)).device.id == 1
    run = train(text, backend="cupy", device="cuda:1")
    assert run.generate(num_tokens=20) == api.load(backend="cupy", device="cuda:0").generate(num_tokens=20)


def test_backends_describes_the_gpu(capsys):
    assert cli.main(["backends"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cupy "))
    assert re.search(r"driver for CUDA \d+\.\d, CUDA runtime \d+\.\d, compute capability \d+\.\d, ", line)
    assert line.endswith("TF32 off")
