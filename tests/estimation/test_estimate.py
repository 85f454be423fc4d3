"""The estimate: what is counted is what happens, and a trial tells and leaves nothing behind."""

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import array_api_compat.numpy as library
import numpy as np
import pytest
import small_runs
from layer_table import LATER
from small_runs import needs_signals, wait_until

from baby_xp import api, processes
from baby_xp.arrays import params, registry
from baby_xp.arrays.namespace import Namespace
from baby_xp.arrays.tiles import tile_sizes
from baby_xp.config import MODERN, EquationConfig, GPTConfig, TrainConfig
from baby_xp.errors import BabyError
from baby_xp.estimation import estimate, trial
from baby_xp.inference.generate import Logits
from baby_xp.layers import cross_entropy
from baby_xp.models import Model
from baby_xp.presets import PRESETS
from baby_xp.resources import counts, process_memory
from baby_xp.text.batches import Batch, EpochWindows, RandomWindows
from baby_xp.training import optimizers
from baby_xp.training.step import initial_state, make_step, step_noise
from bench.memory import owners

V, BATCH = 11, 3
SWITCHES = [
    {"c_sequence": sequence, "c_attention": attention, "c_network": network}
    for sequence, attention, network in itertools.product(("pre", "post"), ("mha", "moh"), ("mlp", "moe"))
]
AGAIN = {**MODERN, "c_sequence": "post", "embedding_norm": False, "activation": "swiglu"}
# odd sizes: masks are made two elements at a time
SIZES = {"n_ctx": 5, "n_emb": 7, "head_size": 9, "n_heads": 3, "n_layers": 2, "dropout": 0.3}
GPTS = [GPTConfig(**SIZES, **one) for one in SWITCHES]
GPTS += [GPTConfig(**{**SIZES, "head_size": 18}, **one) for one in (*LATER.values(), AGAIN)]
EQUATIONS = [EquationConfig(n_emb=3, n_hidden=6, activation=activation) for activation in ("tanh", "gelu")]
MODELS = [*GPTS, *EQUATIONS]
TINY = {**small_runs.TINY, "num_steps": 6, "checkpoint_every": 3}
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")


def name_of(config) -> str:
    parts = [getattr(config, name, "") for name in ("c_sequence", "c_attention", "c_network", "activation")]
    return "-".join(filter(None, parts))


def batch_of(config, size: int = BATCH) -> Batch:
    draw = np.random.default_rng(0).integers
    inputs = draw(0, V, (size, config.n_ctx), dtype=np.int32)
    targets = draw(0, V, inputs.shape if isinstance(config, GPTConfig) else size, dtype=np.int32)
    return Batch(inputs, targets, np.arange(size, dtype=np.int32))


def state_of(model: Model, backend):
    flat = params.draw(model.spec, 0, backend.dtype)
    return initial_state(backend, flat, params.decay_mask(model.spec), 0)


# exact counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*MODELS, *(one.model for one in PRESETS.values())], ids=repr)
def test_parameters_by_kind_add_up(config):
    kinds = counts.parameters(config, V)
    assert sum(kinds.values()) == Model(config, V).n_parameters
    assert kinds["token embeddings"] == V * config.n_emb


def test_parameters_of_a_kind_match_a_count_by_hand():
    config = GPTConfig(n_ctx=64, n_emb=128, head_size=128, n_heads=4, n_layers=4)
    assert counts.parameters(config, 65) == {
        "token embeddings": 65 * 128,
        "positions": 64 * 128,
        "norms": (2 * 4 + 1) * 2 * 128,
        "attention": 4 * (4 * 128 * 128 + 128),
        "network": 4 * (8 * 128 * 128 + 5 * 128),
        "head": 128 * 65 + 65,
    }


def test_the_formula_of_the_little_baby_matches_a_count_by_hand():
    config = GPTConfig(n_ctx=64, n_emb=128, head_size=128, n_heads=16, n_layers=4)
    assert counts.formula_parameters(config, 65) == 8_320 + 4 * (65_536 + 262_144)
    assert counts.formula_parameters(EQUATIONS[0], 13) is None


class Counted(np.ndarray):
    """An array that counts the operations of the matrix products that it takes part in."""

    flops = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if "out" in kwargs:
            kwargs["out"] = tuple(map(Counted.plain, kwargs["out"]))
        result = getattr(ufunc, method)(*map(Counted.plain, inputs), **kwargs)
        if ufunc is np.matmul:
            Counted.flops += 2 * result.size * inputs[0].shape[-1]
        return result.view(Counted) if isinstance(result, np.ndarray) else result

    @staticmethod
    def plain(value):
        return value.view(np.ndarray) if isinstance(value, Counted) else value


def counting_namespace() -> Namespace:
    """NumPy as the maths is written, without faster functions; some of its own would lose the class."""

    def keeping(function):
        return lambda *arguments, **named: function(*arguments, **named).view(Counted)

    names = ("where", "concat", "stack")
    return Namespace(library, device="cpu", **{name: keeping(getattr(library, name)) for name in names})


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("config", MODELS, ids=name_of)
def test_step_flops_count_all_products(config, accumulate, monkeypatch):
    monkeypatch.setattr(Counted, "flops", 0)
    model, xp = Model(config, V), counting_namespace()
    state = state_of(model, registry.load("numpy"))
    state["params"] = state["params"].view(Counted)
    train = TrainConfig(num_steps=10, batch_size=BATCH, accumulate=accumulate)
    make_step(xp, model, train)(state, batch_of(config, BATCH * accumulate))
    assert counts.step_flops(config, V, BATCH * accumulate) == Counted.flops


@pytest.mark.parametrize("config", GPTS[::7], ids=name_of)
def test_flops_of_muon_are_those_of_its_products(config, monkeypatch):
    monkeypatch.setattr(Counted, "flops", 0)
    model, xp = Model(config, V), counting_namespace()
    state = state_of(model, registry.load("numpy"))
    train = TrainConfig(num_steps=10, optimizer="muon", muon_iterations=4)
    gradients = state["params"].view(Counted)
    optimizers.update(xp, state, gradients, train, optimizers.of(model, train))
    assert counts.muon_flops(config, V, 4) == Counted.flops


@pytest.mark.parametrize("config", MODELS, ids=name_of)
def test_forward_flops_count_its_products(config, monkeypatch):
    monkeypatch.setattr(Counted, "flops", 0)
    model, xp = Model(config, V), counting_namespace()
    flat = state_of(model, registry.load("numpy"))["params"].view(Counted)
    model.forward(xp, model.layout.unpack(xp, flat), batch_of(config).inputs)
    assert counts.forward_flops(config, V, BATCH) == Counted.flops


@pytest.mark.parametrize(("n_ctx", "head_size", "dropout", "dtype"), [
    # one block of rows of scores; two; three, with a smaller last one; blocks as long as large heads have them
    (5, 9, 0.0, "float32"), (5, 9, 0.3, "float64"), (64, 9, 0.0, "float32"), (70, 9, 0.0, "float64"),
    (70, 9, 0.3, "float32"), (100, 129, 0.0, "float32"),
])  # fmt: skip
@pytest.mark.parametrize("config", MODELS, ids=name_of)
def test_saved_bytes_count_the_arrays_that_forward_keeps(config, n_ctx, head_size, dropout, dtype):
    if isinstance(config, GPTConfig):
        head_size *= 1 + (config.positions == "rotary")
        config = dataclasses.replace(config, dropout=dropout, n_ctx=n_ctx, head_size=head_size)
    expected = counts.saved_bytes(config, V, BATCH, np.dtype(dtype).itemsize)
    assert kept_bytes(registry.load("numpy", dtype=dtype, kernels="numpy"), config) == expected
    assert kept_bytes(registry.load("numpy", dtype=dtype), config) <= expected  # by numba, where it is installed


def kept_bytes(backend, config) -> int:
    """Bytes of all arrays that the forward pass saves."""
    xp, model, batch = backend.xp, Model(config, V), batch_of(config)
    state = state_of(model, backend)
    noise = step_noise(xp, model, state["seed"], state["step"], batch)
    logits, saved = model.forward(xp, model.layout.unpack(xp, state["params"]), batch.inputs, noise)
    if isinstance(config, GPTConfig):
        saved = saved._replace(blocks=list(saved.blocks))
    _, loss_saved = cross_entropy.forward(xp, {}, logits, batch.targets.reshape(-1))
    elsewhere = owners((state["params"], *batch))
    return sum(size for key, size in owners((saved, loss_saved)).items() if key not in elsewhere)


@pytest.mark.parametrize("config", GPTS, ids=name_of)
def test_cache_bytes_count_a_full_context(config):
    backend, model = registry.load("numpy", kernels="plain"), Model(config, V)
    logits = Logits(backend, model, model.layout.unpack(backend.xp, state_of(model, backend)["params"]))
    logits.next([[1] * (config.n_ctx - 1)])
    logits.next([[1] * config.n_ctx])
    cache = logits.cache
    arrays = [*itertools.chain(*cache.blocks), *([cache.smear] if config.smear else [])]
    assert counts.cache_bytes(config) == sum(array.nbytes for array in arrays)


def test_arrays_of_workers_count_their_shares():
    config = GPTS[0]
    alone, three = counts.arrays(config, V, 7), counts.arrays(config, V, 7, workers=3)
    assert three["activations"] == sum(counts.saved_bytes(config, V, share) for share in (3, 2, 2))
    assert three["activations"] == alone["activations"]
    in_tiles = counts.arrays(config, V, 7, workers=3, tokens_at_once=config.n_ctx)
    assert in_tiles["activations"] == 3 * counts.saved_bytes(config, V, 1)
    assert three["buffers shared by workers"] == 6 * alone["weights"] == 6 * 4 * Model(config, V).n_parameters


@pytest.mark.parametrize("config", GPTS, ids=name_of)
@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_parameters_are_counted_without_a_tree_of_all_blocks(config, n_layers):
    model = Model(dataclasses.replace(config, n_layers=n_layers), V)
    assert model.n_parameters == model.layout.size == params.count(model.spec)
    another = Model(model.config, V)
    assert another.n_parameters == model.n_parameters
    assert "spec" not in vars(another)


@pytest.mark.parametrize(("B", "at_once"), [(1, None), (7, None), (7, 100), (50, 1024), (3, 8)])
def test_activations_count_the_largest_tile(B, at_once):
    config = GPTS[0]
    largest = max(tile_sizes(B, config.n_ctx, at_once))
    found = counts.arrays(config, V, B, tokens_at_once=at_once)
    assert found["activations"] == counts.saved_bytes(config, V, largest)


@pytest.mark.parametrize("settings", [{"num_steps": 7}, {"num_epochs": 2, "num_steps": None, "stride": 20}])
def test_tokens_count_all_batches(work, monkeypatch, settings):
    sizes, windows = [], EpochWindows if "num_epochs" in settings else RandomWindows
    draw = windows.batch
    monkeypatch.setattr(windows, "batch", lambda *args: sizes.append(draw(*args).inputs.size) or draw(*args))
    run = api.train("classic", path=work, **{**TINY, **settings})
    found = estimate.estimate("classic", measure=False, **{**TINY, **settings})
    assert (found.tokens, found.facts.num_steps) == (sum(sizes), run.config["result"]["steps"])
    assert found.flops == counts.step_flops(run.model.config, run.model.vocab_size, sum(sizes) // 8)


# the trial ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder for temporary files of this process and its children, with a text; trials are short."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    monkeypatch.setattr(trial, "SECONDS", 0.05)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    yield path
    assert list(path.iterdir()) == []


@pytest.mark.first_case
@pytest.mark.parametrize("workers", [1, 2])
def test_a_trial_measures_and_leaves_nothing_behind(folder, workers):
    settings = {**TINY, "workers": workers}
    found = estimate.estimate("classic", **settings)
    assert found.facts == estimate.estimate("classic", **settings, measure=False).facts
    assert found.facts.workers == workers
    assert 0 < found.trial.ms_a_step < 5000
    assert all(seconds > 0 for seconds in found.seconds.values())
    json.dumps(vars(found.trial), allow_nan=False)  # JSON cannot pass infinite numbers to another program
    if process_memory.taken():
        assert 15 * workers < found.memory / 2**20 < 200 * workers
    shown = "\n".join(estimate.lines(found))
    assert f"{found.n_parameters:,} exactly" in shown
    assert "MiB at the peak" in shown or not process_memory.taken()
    assert max(map(len, shown.splitlines())) <= 110


@pytest.mark.slow
def test_a_trial_of_the_equation_model(folder):
    found = estimate.estimate("equations", backend="numpy")
    assert found.trial.token_seconds > 0
    assert found.facts.step_size == 108  # there are no more pairs, whatever the batch size
    assert found.cache == 0
    assert "The Little Baby's V H" not in "\n".join(estimate.lines(found))


def test_a_trial_ignores_time_limits_and_patience(folder, monkeypatch):
    """If the system does not report sizes, memory is None."""
    monkeypatch.setattr(process_memory, "PROC", folder / "absent")
    often = {"num_steps": 1, "eval_every": 1, "checkpoint_every": 1, "patience": 1, "sample_tokens": 0}
    found = estimate.estimate("classic", **{**TINY, **often, "max_minutes": 1e-9})
    assert found.trial.ms_a_step > 0
    assert (process_memory.taken(), process_memory.children(), process_memory.of_interpreter()) == ([], [], None)
    assert found.memory is None
    assert "unknown" in "\n".join(estimate.lines(found))


def test_without_a_trial_the_counts_remain(folder):
    found = estimate.estimate("classic", measure=False, **TINY)
    assert (found.trial, found.memory, found.seconds) == (None, None, None)
    assert "not measured" in "\n".join(estimate.lines(found))
    assert found.arrays["weights"] == 4 * found.n_parameters


@pytest.mark.parametrize("measure", [True, False])
def test_a_bad_setting_is_an_error_of_one_line(folder, measure):
    """Also if the trial process detects it, as in the first case."""
    for wrong in (
        {"data": "there-is-no-such-file.txt"}, {"n_heads": 3}, {"no_such_setting": 1}, {"workers": 0},
        *([] if measure else [{"backend": "abacus"}, {"n_emb": 2**21, "n_heads": 1}]),
    ):  # fmt: skip
        with pytest.raises(BabyError) as caught:
            estimate.estimate("classic", measure=measure, **{**TINY, **wrong})
        assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_an_error():
    with pytest.raises(BabyError, match="unknown preset"):
        estimate.estimate("teenager")


def test_a_trial_that_diverges_is_reported(folder):
    diverging = {"lr": 1e30, "clip": 0.0, "warmup_steps": 0, "schedule": "constant"}
    with pytest.raises(BabyError, match="learning rate"):
        estimate.estimate("classic", **{**TINY, **diverging})


@needs_signals
def test_a_killed_trial_is_reported(folder, monkeypatch):
    monkeypatch.setattr(processes, "PROGRAM", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(BabyError, match="killed by signal 9"):
        estimate.estimate("classic", **TINY)


@pytest.mark.slow
@needs_signals
def test_an_orphaned_trial_cleans_up(folder, signals):
    """SIGTERM ends a Python process immediately, without running `finally`."""
    settings = {**TINY, "workers": 2}
    call = f"trial.SECONDS = 1.0; estimate.estimate('classic', **{settings!r})"
    program = f"from baby_xp.estimation import estimate, trial; {call}"
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    wait_until(lambda: list(folder.glob("baby_xp_*/models/*.safetensors")))
    child.send_signal(signal.SIGTERM)
    child.wait()
    wait_until(lambda: not list(folder.iterdir()))


# memory -------------------------------------------------------------------------------------------------


@needs_proc
def test_the_memory_of_a_child_process_is_measured():
    program = "block = b'x' * (64 << 20); print(len(block), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        child.stdout.readline()
        assert child.pid in process_memory.children()
        main, other = process_memory.taken([child.pid])
        child.communicate("\n")
    idle = process_memory.of_interpreter()
    assert other["peak"] - idle["peak"] == pytest.approx(64 << 20, rel=0.1)
    grown = process_memory.growth([main, other], idle) - process_memory.growth([main], idle)
    assert grown == pytest.approx(64 << 20, rel=0.1)
    assert process_memory.taken([child.pid]) == []  # the process has ended
