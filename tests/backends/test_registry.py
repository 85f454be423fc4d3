"""Backends by name: what they have by default, and what a plain one leaves out."""

import copy
import inspect
import pickle
import re
import types

import fake_cupy
import numpy as np
import pytest
from baby_xp_backends import cupy_kernels, numpy_backend, numpy_kernels
from conftest import case_of

import baby_xp
from baby_xp.arrays import registry
from baby_xp.arrays.namespace import REPLACEABLE, Namespace, replaceable
from baby_xp.arrays.params import decay_mask, draw
from baby_xp.config import GPTConfig, TrainConfig
from baby_xp.errors import BabyError
from baby_xp.inference.generate import Sampling, generate
from baby_xp.models import Model
from baby_xp.text.batches import RandomWindows
from baby_xp.training import workers
from baby_xp.training.step import gradients_of_step, initial_state, make_step, on_device


class Foreign:
    """A backend of another package: what the program cannot do without, and nothing else."""

    name, version, device = "foreign", "foreign 1.0", "elsewhere"

    def __init__(self, device=None, dtype="float32"):
        self.dtype = dtype
        self.xp = Namespace(case_of("numpy").xp.library, "cpu")

    def asarray(self, host):
        return np.array(host)

    def to_numpy(self, array):
        return array


@pytest.fixture
def foreign(monkeypatch):
    """The class, registered under its name."""
    found = registry.importlib.metadata.entry_points

    def entry_points(**of):
        own = types.SimpleNamespace(name="foreign", load=lambda: Foreign)
        return [own] if of.get("name") == "foreign" else [*found(**of), *([] if "name" in of else [own])]

    monkeypatch.setattr(registry.importlib.metadata, "entry_points", entry_points)
    return Foreign


@pytest.mark.parametrize("kernels", ["fast", "plain"])
def test_a_backend_of_another_package_has_what_it_lacks_by_default(foreign, kernels):
    backend = registry.load("foreign", dtype="float64", kernels=kernels)
    assert isinstance(backend, foreign)
    assert (backend.memory(), backend.shortage(MemoryError()), backend.first_use()) == (None, None, None)
    assert (backend.details(), backend.compile(len), backend.synchronize()) == ("", len, None)
    assert copy.deepcopy([backend])[0] is backend
    other = pickle.loads(pickle.dumps(backend))
    assert isinstance(other, foreign)
    assert other.dtype == "float64"


def test_a_backend_that_cannot_leave_its_replacements_out_is_not_plain(foreign, monkeypatch):
    init = foreign.__init__

    def with_kernels(self, device=None, dtype="float32"):
        init(self, device, dtype)
        self.xp.kernels = {"softmax.forward": None}

    monkeypatch.setattr(foreign, "__init__", with_kernels)
    assert registry.load("foreign").kernels == "fast"
    with pytest.raises(BabyError, match="foreign has no plain form"):
        registry.load("foreign", kernels="plain")


def test_two_replaceable_functions_may_not_have_the_same_name():
    def forward(xp, p, x):
        return x

    forward.__module__ = "elsewhere.softmax"
    with pytest.raises(ValueError, match=r"softmax\.forward is replaceable in baby_xp\.layers\.softmax already"):
        replaceable(forward)
    assert REPLACEABLE["softmax.forward"].__module__ == "baby_xp.layers.softmax"


@pytest.mark.parametrize("kernels", [numpy_kernels.KERNELS, cupy_kernels.KERNELS], ids=["of numpy", "of cupy"])
def test_a_replacement_has_the_arguments_of_what_it_replaces(kernels):
    assert set(kernels) <= set(REPLACEABLE)
    for name, function in kernels.items():
        found, expected = (inspect.signature(one).parameters.values() for one in (function, REPLACEABLE[name]))
        described = [[(one.name, one.kind, one.default) for one in each] for each in (found, expected)]
        assert described[0] == described[1], name


# plain --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["slow", "", 1, None])
def test_kernels_are_fast_numpy_or_plain(kernels):
    with pytest.raises(BabyError, match=r"^kernels must be one of fast, numpy, plain, not [^\n]*$"):
        registry.load("numpy", kernels=kernels)


def test_a_backend_says_whether_it_is_plain_and_a_pickle_keeps_it():
    for kernels in ("fast", "numpy", "plain"):
        backend = pickle.loads(pickle.dumps(registry.load("numpy", kernels=kernels)))
        assert (backend.kernels, bool(backend.xp.kernels)) == (kernels, kernels != "plain")
        assert backend.xp.tokens_at_once == 1024
    assert registry.load("auto", "cpu", kernels="plain").kernels == "plain"


def test_the_kernels_of_numpy_are_those_of_its_backend_alone():
    assert registry.load("numpy", kernels="numpy").xp.kernels == numpy_kernels.KERNELS
    best = registry.load("auto", kernels="numpy")
    assert (best.name, best.chosen_because) == ("numpy", "its kernels were asked for")
    for name in ("cupy", "array-api-strict"):
        with pytest.raises(BabyError, match=rf"^{name} has no kernels of NumPy: [^\n]*$"):
            registry.load(name, kernels="numpy")


@pytest.fixture
def no_replacements(monkeypatch):
    """Every replacement raises, in this process and in workers."""

    def refuse(*arguments, **more):
        raise AssertionError("a plain run called a replacement")

    for kernels in (numpy_kernels.KERNELS, cupy_kernels.KERNELS):
        for name in list(kernels):
            monkeypatch.setitem(kernels, name, refuse)
    for_all = "from baby_xp_backends.numpy_kernels import KERNELS; KERNELS.update(dict.fromkeys(KERNELS));"
    monkeypatch.setattr(workers, "PROGRAM", for_all + workers.PROGRAM)


IDS = np.arange(300) ** 2 % 11
CONFIG = GPTConfig(n_ctx=8, n_emb=8, head_size=8, n_heads=2, n_layers=2, dropout=0.2)


def losses(dtype: str, kernels: str, number: int) -> tuple[np.ndarray, list[int]]:
    """Losses of 20 steps and of the evaluation after them, and a text by the model."""
    backend, model = registry.load("numpy", None, dtype, kernels), Model(CONFIG, 11)
    config = TrainConfig(num_steps=20, batch_size=6, accumulate=2, lr=3e-2, min_lr=1e-3, warmup_steps=3)
    windows = RandomWindows(IDS, 8, 12, 0)
    state = initial_state(backend, draw(model.spec, 0, dtype), decay_mask(model.spec), 7)
    with workers.Workers(backend, model, 6, number) as pool:
        gradients = gradients_of_step(config, pool.loss_and_gradients)
        step, found = make_step(backend.xp, model, config, gradients, pool.optimizer(config)), []
        for i in range(20):
            state, metrics = step(state, windows.batch(i))
            found.append(float(metrics["loss"][0]))
        found.append(float(pool.total_loss(state["params"], RandomWindows(IDS, 8, 6, 0).batch(0))[0]))
        text = list(generate(backend, model, state["params"], [1, 2], 12, Sampling(greedy=True)))
    return np.array(found), text


@pytest.mark.first_case
@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-10), ("float32", 2e-5)])
@pytest.mark.parametrize("number", [1, 2])
def test_a_plain_run_calls_no_replacement_and_learns_the_same(request, monkeypatch, dtype, rtol, number):
    monkeypatch.setattr(numpy_backend, "TOKENS_AT_ONCE", 16)  # several tiles in the shard of this process
    expected, text = losses(dtype, "fast", number)
    assert expected[19] < expected[0] - 0.1
    request.getfixturevalue("no_replacements")
    with pytest.raises((AssertionError, BabyError)):  # what this test stands on: a fast run does call them
        losses(dtype, "fast", number)
    found, plain_text = losses(dtype, "plain", number)
    np.testing.assert_allclose(found, expected, rtol=rtol)
    assert plain_text == text


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cupy_without_replacements_computes_the_same(dtype):
    """Run on the CPU: see fake_cupy.py."""
    case_of("cupy kernels")  # skips where there is no compiler
    machine = fake_cupy.Machine()
    backend = fake_cupy.backend(machine, dtype=dtype, kernels="plain")
    assert (backend.kernels, backend.xp.kernels) == ("plain", {})
    assert not hasattr(backend.xp, "launch")
    plain, results = case_of("numpy plain", dtype), []
    model = Model(CONFIG, 11)
    batch = RandomWindows(IDS, 8, 3, 0).batch(0)
    config = TrainConfig(num_steps=2, batch_size=3)
    for each in (backend, plain.backend):
        state = initial_state(each, draw(model.spec, 0, dtype), decay_mask(model.spec), 7)
        step = make_step(each.xp, model, config)
        for _ in range(2):
            state, metrics = step(state, on_device(each, batch))
        results.append([each.to_numpy(array) for array in (metrics["loss"], state["params"])])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol={"float64": 1e-10, "float32": 1e-4}[dtype], atol=1e-6)
    ours = set(re.findall(r"__global__ void (\w+)", cupy_kernels.source("float32")))
    assert ours
    assert not ours & {name for name, _ in machine.launched}


def test_a_run_that_is_resumed_keeps_its_kernels(tmp_path):
    """Unless others are asked for, or another backend is: the end is then that of the run as it began."""
    sizes = {"n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 2}
    tiny = {**sizes, "sample_tokens": 0, "backend": "numpy", "data": tmp_path / "text.txt"}
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    where = {"path": tmp_path / "runs", "workers": 1}
    baby_xp.train("baby", kernels="plain", num_steps=2, **tiny, **where)
    assert baby_xp.resume(num_steps=3, **where).backend.kernels == "plain"
    resumed = baby_xp.resume(num_steps=4, kernels="fast", **where)
    assert (resumed.backend.kernels, "kernels" in resumed.config["place"]) == ("fast", False)
    resumed = baby_xp.resume(num_steps=5, kernels="numpy", **where)
    assert (resumed.backend.kernels, resumed.config["place"]["kernels"]) == ("numpy", "numpy")
