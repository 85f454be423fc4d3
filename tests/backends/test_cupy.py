"""The CuPy backend around its kernels: devices, options, memory, reports. All on fake_cupy.py's machine."""

import re
import shutil
import threading
import types

import fake_cupy
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import TEXT, StopAt

import baby_xp
from baby_xp import api, cli
from baby_xp.arrays import params, registry
from baby_xp.arrays.backend import Memory, translate_out_of_memory
from baby_xp.config import MODERN, EquationConfig, GPTConfig, TrainConfig
from baby_xp.errors import BabyError, BackendUnavailable, OutOfMemory
from baby_xp.models import Model
from baby_xp.resources import counts
from baby_xp.text.batches import RandomWindows
from baby_xp.training.step import initial_state, make_step, on_device

pytestmark = pytest.mark.skipif(fake_cupy.compiler() is None, reason="no C++ compiler to run the kernels with")

TINY = {
    "n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 8, "num_steps": 8,
    "eval_every": 4, "checkpoint_every": 2, "dropout": 0.2, "sample_tokens": 3, "warmup_steps": 3, "lr": 1e-2,
}  # fmt: skip


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Two devices, in place of any real CuPy."""
    machine = fake_cupy.Machine(devices=2)
    put(machine, monkeypatch)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    return machine


def put(machine, monkeypatch) -> None:
    for name, module in fake_cupy.modules(machine).items():
        monkeypatch.setitem(fake_cupy.sys.modules, name, module)


@pytest.fixture
def text(work) -> str:
    """A text in the current folder."""
    return "text.txt"


def train(text, listener=None, **more):
    return api.train("classic", listener=listener, **{**TINY, "data": text, "backend": "cupy", **more})


@pytest.fixture
def call(text, capsys):
    """The command line with a tiny model -> exit code, output, errors."""

    def run(command: str, *flags: str):
        settings = [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, "data": text}.items()]
        code = cli.main([command, *(settings if command in ("train", "estimate") else []), *flags])
        out, err = capsys.readouterr()
        return code, out, err

    return run


# devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "index"), [(None, 0), ("", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_device_is_found_by_its_name(machine, asked, index):
    backend = registry.load("cupy", asked)
    assert backend.device == f"cuda:{index} (Pretended GPU {index})"
    assert backend.asarray(np.zeros(3)).where == index
    assert backend.integers([1, 2]).where == index


@pytest.mark.parametrize("asked", ["cuda:2", "cuda:-1", "cuda:x", "gpu", "cpu", "cuda:1:1"])
def test_a_device_that_is_not_there_is_named_beside_those_that_are(machine, asked):
    with pytest.raises(BackendUnavailable, match=f"no device '{asked}'; devices here: cuda:0, cuda:1"):
        registry.load("cupy", asked)


def test_all_of_a_run_is_on_its_device(machine, text):
    train(text, device="cuda:1")
    assert {device for _, device in machine.launched} == {1}
    assert (machine.held[0], machine.held[1] > 0) == (0, True)


@pytest.mark.slow
def test_a_backend_may_be_used_from_any_thread(machine, text):
    """CuPy's current device is that of a thread, and another thread begins on device 0."""
    run, texts, failures = train(text, device="cuda:1"), [], []
    expected = run.generate(num_tokens=12, seed=3)
    stream = run.stream(num_tokens=12, seed=3)  # begun here, drawn from there

    def work():
        try:
            texts.extend([run.generate(num_tokens=12, seed=3), "".join(stream), run.evaluate(num_tokens=5).loss])
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    assert texts[:2] == [expected] * 2
    assert texts[2] == run.evaluate(num_tokens=5).loss
    assert {device for _, device in machine.launched} == {1}


def test_two_devices_take_turns_in_one_thread(machine):
    two = [registry.load("cupy", f"cuda:{i}") for i in (0, 1)]
    doubled = [backend.compile(lambda x, xp=backend.xp: xp.add(x, x)) for backend in two]
    arrays = [backend.asarray(np.arange(3.0)) for backend in two]
    for i in (0, 1, 0, 1):
        found = doubled[i](arrays[i])
        assert found.where == i
        assert two[i].to_numpy(found).tolist() == [0, 2, 4]


# what CuPy lacks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "count", "words"),
    [(0, 0, "no NVIDIA driver was found"), (11080, 1, "the driver is for CUDA 11, this CuPy for CUDA 12"),
     (13000, None, "no GPU can be reached (no device)")],
)  # fmt: skip
def test_what_is_missing_is_named(machine, monkeypatch, driver, count, words):
    runtime = fake_cupy.sys.modules["cupy"].cuda.runtime
    runtime.driverGetVersion = lambda: driver
    if count is None:

        def unreachable():
            raise fake_cupy.CUDARuntimeError("no device")

        runtime.getDeviceCount = unreachable
    with pytest.raises(BackendUnavailable, match=re.escape(words)):
        registry.load("cupy")
    backend, why = registry.choose()
    assert (backend.name, why) == ("numpy", f"no GPU to use ({words})")


def test_a_gpu_whose_memory_others_took_is_no_broken_installation(monkeypatch):
    put(fake_cupy.Machine(memory=100), monkeypatch)
    with pytest.raises(BackendUnavailable, match=r"not even a small array fits .*nvidia-smi"):
        registry.load("cupy")


# options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"tf32": True}, {"memory_gib": 2.0}])
@pytest.mark.parametrize("name", ["numpy", "array-api-strict", "torch", "jax"])
def test_an_option_that_a_backend_does_not_have_is_refused(name, option):
    with pytest.raises(BabyError, match=f"^{name} has no option {next(iter(option))}: leave it out, or use"):
        registry.load(name, **option)


def test_an_option_that_is_not_given_is_no_option():
    assert registry.load("numpy", tf32=False, memory_gib=None).name == "numpy"


def test_auto_passes_options_on_and_refuses_them_where_it_takes_numpy(machine, monkeypatch):
    backend, _ = registry.choose(tf32=True)
    assert (backend.name, backend.tf32) == ("cupy", True)
    with pytest.raises(BabyError, match="memory_gib must be a number above 0"):
        registry.choose(memory_gib=-1)
    monkeypatch.setitem(fake_cupy.sys.modules, "cupy", None)
    with pytest.raises(BabyError, match="numpy has no option tf32"):
        registry.choose(tf32=True)
    monkeypatch.setitem(fake_cupy.sys.modules, "cupy", types.ModuleType("cupy"))
    with pytest.raises(BabyError, match="numpy has no option tf32"):
        registry.choose(tf32=True)


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_a_memory_limit_that_makes_no_sense_is_refused(machine, value):
    with pytest.raises(BabyError, match="memory_gib must be a number above 0"):
        registry.load("cupy", memory_gib=value)


@pytest.mark.first_case
@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "estimate", "resume"])
def test_commands_take_the_flags_and_refuse_them_for_numpy(machine, call, text, command):
    if command not in ("train", "estimate"):
        train(text, backend="numpy", workers=1, listener=StopAt(4))
    for flag in ("--tf32", "--memory-gib=1.5"):
        code, _, err = call(command, "--backend=numpy", flag)
        assert code == 2
        assert re.fullmatch(r"baby_xp: numpy has no option (tf32|memory_gib): leave it out, .*\n", err)


def test_the_precision_is_that_of_each_backend_and_not_the_last_one(machine):
    exact, fast = registry.load("cupy"), registry.load("cupy", tf32=True)
    seen = []
    for backend in (exact, fast, exact):
        backend.compile(lambda: seen.append(machine.compute_type))()
    assert seen == [1, 7, 1]  # CuPy's default, TF32


def test_tf32_reaches_products_and_changes_them_little(machine):
    x = np.random.default_rng(0).normal(size=(2, 3, 20, 20))
    exact, fast = (
        backend.to_numpy(backend.xp.product(*[backend.asarray(x)] * 2))
        for backend in (registry.load("cupy"), registry.load("cupy", tf32=True))
    )
    distance = np.max(np.abs(exact - fast)) / np.max(np.abs(exact))
    assert 1e-6 < distance < 1e-2
    double = registry.load("cupy", dtype="float64", tf32=True)
    found = double.to_numpy(double.xp.product(*[double.asarray(x)] * 2))
    np.testing.assert_allclose(found, x @ x, rtol=1e-12)


def test_tf32_needs_a_gpu_that_has_it(monkeypatch):
    put(fake_cupy.Machine(capability="75"), monkeypatch)
    with pytest.raises(BabyError, match=r"tf32 needs a GPU of compute capability 8.0 or later, this one has 7.5"):
        registry.load("cupy", tf32=True)
    assert not registry.load("cupy").tf32


# runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_resumes_with_its_device_and_tf32_and_without_them_elsewhere(machine, text):
    run = train(text, listener=StopAt(4), device="cuda:1", tf32=True)
    place = {"backend": "cupy", "device": "cuda:1", "workers": 1, "tf32": True}
    assert run.config["place"] == place
    elsewhere = shutil.copytree("runs", "numpy")
    assert api.resume().config["place"] == place
    on_numpy = api.resume(path=elsewhere, backend="numpy", workers=1)
    assert on_numpy.config["place"] == {"backend": "numpy", "device": None, "workers": 1}


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("before", "flags", "after"),
    [(True, [], True), (True, ["--no-tf32"], False), (False, ["--tf32"], True), (False, [], False)],
)
def test_tf32_stays_as_it_was_unless_given_again(machine, call, text, before, flags, after):
    run = train(text, listener=StopAt(4), tf32=before)
    assert call("resume", *flags)[0] == 0
    assert api.load().config["place"].get("tf32", False) == after
    assert run.config["place"].get("tf32", False) == before


def test_a_memory_limit_is_kept_nowhere(machine, text):
    train(text, listener=StopAt(4), memory_gib=1.0)
    assert machine.limits[0] == 2**30
    assert api.resume().config["result"]["state"] == "done"
    assert machine.limits[0] == 0  # as it was before


def test_a_limit_of_the_user_is_there_again_afterwards(machine):
    machine.limits[0] = 12345678
    registry.load("cupy", memory_gib=0.5)
    registry.load("cupy", memory_gib=0.25)
    assert machine.limits[0] == 2**28
    registry.load("cupy")
    assert machine.limits[0] == 12345678
    registry.load("cupy")
    assert machine.limits[0] == 12345678


@pytest.mark.first_case
@pytest.mark.parametrize(("first", "second"), [("cupy", "cupy"), ("numpy", "cupy"), ("cupy", "numpy")])
def test_a_run_that_moves_between_numpy_and_cupy_ends_as_one_that_stays(machine, text, first, second):
    whole = train(text, backend="numpy", workers=1, dtype="float64", path="whole")
    train(text, backend=first, workers=1, dtype="float64", listener=StopAt(4))
    moved = api.resume(backend=second, workers=1)
    expected, found = (load_file(run.files.state) for run in (whole, moved))
    for name in ("params", "m", "v"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-9)
    assert found["step"] == expected["step"]


@pytest.mark.slow
def test_a_run_of_cupy_is_finetuned_on_numpy_and_back(machine, text, tmp_path):
    (tmp_path / "other.txt").write_text(TEXT.replace("cat", "zög"), encoding="utf-8")
    train(text)
    settings = {"data": "other.txt", "num_steps": 4, "workers": 1}
    losses = [api.finetune(backend=name, path="runs", name=api.list_runs()[-1].guid, **settings).evaluate().loss
              for name in ("numpy", "cupy")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_text_as_on_numpy(machine, text):
    run = train(text, num_steps=40)
    for settings in ({"seed": 1}, {"seed": 2, "top_k": 3}, {"greedy": True}, {"temperature": 0.5, "top_p": 0.9}):
        texts = [api.load(backend=name).generate("the ", 60, **settings) for name in ("numpy", "cupy")]
        assert texts[0] == texts[1]
    assert run.generate_several(3, "the ", 20, seed=5) == api.load(backend="numpy").generate_several(
        3, "the ", 20, seed=5
    )


# memory -------------------------------------------------------------------------------------------------


def peak_of(machine, config, V: int, B: int, optimizer="adamw") -> int:
    """Bytes of all arrays at once at the most, over two steps as the loop makes them."""
    backend, model = fake_cupy.backend(machine), Model(config, V)
    ids = np.random.default_rng(0).integers(0, V, 2000)
    batch = RandomWindows(ids, config.n_ctx, B, 0).batch(0)
    state = initial_state(backend, params.draw(model.spec, 0), params.decay_mask(model.spec), 0)
    best = backend.xp.asarray(state["params"], copy=True)
    config = TrainConfig(num_steps=10, batch_size=B, optimizer=optimizer)
    step = backend.compile(make_step(backend.xp, model, config))
    for _ in range(2):
        state, _ = step(state, on_device(backend, batch))
    assert best.shape == state["params"].shape
    assert backend.memory().peak_used == backend.memory().peak_held == machine.held[0]
    return machine.held[0]


LARGER = {"n_ctx": 32, "n_emb": 32, "head_size": 32, "n_heads": 4, "n_layers": 2}


@pytest.mark.first_case
@pytest.mark.parametrize("more", [
    {"dropout": 0.1}, {"dropout": 0.0}, {"dropout": 0.1, "c_attention": "moh"}, {"c_network": "moe"},
    {"n_ctx": 48, "n_heads": 16, "dropout": 0.1}, {"n_ctx": 64, "n_heads": 2}, MODERN,
], ids=str)  # fmt: skip
def test_the_count_of_a_batch_is_near_what_it_takes(more):
    config = GPTConfig(**{**LARGER, **more})
    for B in (3, 8):
        flat = 4 * Model(config, 65).n_parameters
        counted = max(9 * flat, 6 * flat + counts.gpu_bytes(config, 65, B, scores_in_memory=False))
        assert 0.8 < counted / peak_of(fake_cupy.Machine(), config, 65, B) < 1.45


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("more", [
    {}, {"n_layers": 4, "activation": "swiglu", "linear_bias": False}, {"n_emb": 16, "head_size": 128},
], ids=str)  # fmt: skip
def test_the_count_of_an_update_is_near_what_it_takes(optimizer, more):
    """With batches so small that nothing else takes more."""
    config = GPTConfig(**{**LARGER, "n_ctx": 2, **more})
    counted = counts.update_bytes(config, 65, optimizer)
    assert 0.9 < counted / peak_of(fake_cupy.Machine(), config, 65, 1, optimizer) < 1.1
    assert counts.batch_that_fits(config, 65, 64, counted - 1, 0, optimizer=optimizer) == 0
    assert counts.batch_that_fits(config, 65, 64, counted, 0, optimizer=optimizer) > 0


@pytest.mark.slow
def test_whole_matrices_of_scores_are_counted():
    """NumPy's blocks leave out most of what the mask hides; a GPU does not, where heads are wide."""
    config = GPTConfig(n_ctx=96, n_emb=16, head_size=80, n_heads=2, n_layers=2, dropout=0.1)
    counted = 6 * 4 * Model(config, 65).n_parameters + counts.gpu_bytes(config, 65, 1)
    assert 0.9 < counted / peak_of(fake_cupy.Machine(), config, 65, 1) < 1.2


def test_the_room_ends_at_the_limit_or_at_the_end_of_the_device():
    sizes = {"used": 1, "peak_used": 1, "peak_held": 30, "total": 100}
    assert Memory(held=30, free=50, limit=None, **sizes).room == 80
    assert Memory(held=30, free=50, limit=40, **sizes).room == 40
    assert Memory(held=30, free=50, limit=90, **sizes).room == 80


def test_a_batch_that_fits_is_smaller_than_one_that_does_not_and_grows_with_the_room():
    config = GPTConfig(**LARGER, dropout=0.1)
    fits = [counts.batch_that_fits(config, 65, 64, room, room) for room in range(2**20, 2**26, 2**20)]
    assert fits == sorted(fits)
    assert fits[0] == 0
    assert 0 < fits[2] < 32
    assert max(fits) == 32
    equations = EquationConfig()
    assert 0 < counts.batch_that_fits(equations, 13, 10_000, 2**18, 2**18) < 5000


def test_known_bytes_replace_a_smaller_count():
    config = GPTConfig(**LARGER, dropout=0.1)
    room = 2**24
    by_count = counts.batch_that_fits(config, 65, 64, room, 0)
    assert counts.batch_that_fits(config, 65, 64, room, 16 * room) < by_count // 2
    # what remains beside the weights would be enough for half of them, but a fifth of it is left free
    fixed = 6 * 4 * Model(config, 65).n_parameters
    assert counts.batch_that_fits(config, 65, 64, fixed + room, fixed + 2 * room) == int(64 * 0.8 / 2)
    # all 64 would fit by the count, and yet they did not
    assert counts.batch_that_fits(config, 65, 64, 2**40, 0) == 32
    assert counts.batch_that_fits(config, 65, 1, 2**40, 0) == 0


@pytest.mark.slow
def test_out_of_memory_ends_in_one_line_with_a_batch_that_does_fit(monkeypatch, text, call):
    """The whole way: what is advised is done, on the same machine, and then it fits."""
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in {**LARGER, "n_layers": 1}.items()]
    flags = ["--backend=cupy", *sizes, "--batch-size=24", "--eval-every=100", "--sample-tokens=0", "--num-steps=2"]
    free = fake_cupy.Machine()
    put(free, monkeypatch)
    assert call("train", *flags)[0] == 0
    shutil.rmtree("runs")
    put(fake_cupy.Machine(memory=free.held[0] // 2), monkeypatch)
    code, _, err = call("train", *flags)
    assert code == 2
    pattern = (
        r"baby_xp: out of memory on cuda:0 \(Pretended GPU 0\): an array of [\d.]+ [KM]iB did not fit, "
        r"[\d.]+ [KM]iB are free, [\d.]+ [KM]iB are held by this process; by a rough estimate about (\d+) "
        r"sequences at once would fit, not 24: --batch-size (\d+) --accumulate (\d+) "
        r"computes the same steps in parts\n"
    )
    found = re.fullmatch(pattern, err)
    assert found, err
    about, part, accumulate = map(int, found.groups())
    assert 4 <= about <= 12
    assert (part <= about, part * accumulate) == (True, 24)
    assert not list(fake_cupy.Path("runs").rglob("*.safetensors"))
    assert not list(fake_cupy.Path("runs").rglob("config_*"))
    put(fake_cupy.Machine(memory=free.held[0] // 2), monkeypatch)
    code, _, err = call("train", *flags, f"--batch-size={part}", f"--accumulate={accumulate}")
    assert (code, err) == (0, "")


def test_an_error_says_that_not_one_sequence_fits(machine, text):
    with pytest.raises(OutOfMemory, match="not one sequence would fit: choose a smaller model") as caught:
        train(text, memory_gib=20_000 / 2**30)
    assert "which may hold 19.5 KiB" in str(caught.value)


@pytest.mark.slow
def test_the_last_checkpoint_survives_and_the_run_resumes(machine, text):
    whole = train(text, path="whole")
    peak = machine.held[0]

    class Shrinks(baby_xp.Listener):
        def evaluated(self, record):
            if record["step"] == 4:
                machine.limits[0] = peak * 8 // 10

    with pytest.raises(OutOfMemory, match=r"checkpoint of step 4 is kept: run .* can be resumed") as caught:
        train(text, listener=Shrinks())
    assert "a resumed run keeps its batch" in str(caught.value)
    (summary,) = api.list_runs()
    assert (summary.state, summary.steps) == ("failed", 4)
    machine.limits[0] = 0
    expected, found = (load_file(run.files.state)["params"] for run in (whole, api.resume()))
    assert found.tobytes() == expected.tobytes()


def test_no_array_of_a_step_that_failed_is_held(machine, text):
    """Else a second try in the same process would have less memory than the first."""
    before = machine.used[0]
    with pytest.raises(OutOfMemory) as caught:
        train(text, memory_gib=60_000 / 2**30)
    assert machine.used[0] - before <= 4096
    assert caught.value.shortage


@pytest.mark.first_case
@pytest.mark.parametrize("what", ["generate", "evaluate", "generate_several"])
def test_a_trained_model_that_does_not_fit_is_one_line_too(machine, text, what):
    run = train(text)
    machine.limits[0] = machine.used[0] + 2048
    given = {"generate_several": (3,)}.get(what, ())
    with pytest.raises(OutOfMemory, match=r"^out of memory on cuda:0 .*nvidia-smi shows it.*--backend numpy$"):
        getattr(run, what)(*given)


@pytest.mark.slow
def test_memory_that_ends_between_two_tokens_is_one_line_too(machine, text):
    run = train(text)
    machine.limits[0] = machine.used[0] + run.params.nbytes + 4096  # the parameters fit, a token's arrays do not
    stream = run.stream(num_tokens=5)
    with pytest.raises(OutOfMemory, match=r"^out of memory on cuda:0 "):
        list(stream)


def test_the_command_line_ends_with_two_when_generation_does_not_fit(machine, call, text):
    train(text)
    code, _, err = call("generate", "--backend=cupy", f"--memory-gib={3000 / 2**30}")
    assert code == 2
    assert "out of memory on cuda:0" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "message", "translated"),
    [("CUBLASError", "CUBLAS_STATUS_ALLOC_FAILED", True), ("CUBLASError", "CUBLAS_STATUS_NOT_SUPPORTED", False),
     ("CUDARuntimeError", "cudaErrorMemoryAllocation: out of memory", True),
     ("CUDADriverError", "CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),
     ("CUDARuntimeError", "cudaErrorIllegalAddress", False), ("ValueError", "CUBLAS_STATUS_ALLOC_FAILED", False)],
)  # fmt: skip
def test_errors_of_cuda_about_memory_are_distinguished_from_others(machine, name, message, translated):
    backend = registry.load("cupy")
    error = type(name, (RuntimeError,), {})(message)
    kind = OutOfMemory if translated else type(error)
    with pytest.raises(kind), translate_out_of_memory(backend):
        raise error


def test_backends_without_memory_of_their_own_are_left_alone():
    numpy = registry.load("numpy", kernels="plain")  # nothing that numba would compile
    with pytest.raises(MemoryError, match="too much"), translate_out_of_memory(numpy):
        raise MemoryError("too much")
    assert numpy.memory() is None
    assert numpy.first_use() is None


# reports -------------------------------------------------------------------------------------------------


def test_backends_lists_driver_card_memory_and_tf32(machine, call):
    code, out, _ = call("backends")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("cupy"))
    assert line.split(maxsplit=2)[2] == (
        "cupy 14.2.0 on the CPU, cuda:0 (Pretended GPU 0); driver for CUDA 13.0, CUDA runtime 12.9, "
        "compute capability 9.0, 16.0 GiB free of 16.0, TF32 off"
    )
    assert registry.load("cupy", tf32=True).details().endswith("TF32 on")


@pytest.mark.slow
def test_the_report_has_the_peaks_of_memory(machine, text):
    run = train(text)
    report = run.files.report.read_text("utf-8")
    found = re.search(r"GPU memory, peak used/held +([\d.]+) KiB / ([\d.]+) KiB", report)
    used, held = map(float, found.groups())
    assert 0 < used <= held
    assert held == pytest.approx(machine.held[0] / 1024, rel=0.05)
    on_numpy = train(text, backend="numpy", workers=1, path="numpy")
    assert "GPU memory" not in on_numpy.files.report.read_text("utf-8")


def test_peaks_are_watched_in_the_first_calls_alone(machine):
    backend = registry.load("cupy")
    grown = backend.compile(lambda n: backend.xp.zeros(n, dtype=np.float32))
    for size in (100, 1000, 100_000):
        grown(size)
    after = backend.memory()
    assert 4000 <= after.peak_used < 100_000
    assert after.peak_held >= 400_000
    assert not machine.hooks


@pytest.mark.slow
def test_the_first_use_on_a_machine_is_announced(machine, call, tmp_path):
    few = ("--backend=cupy", "--num-steps=2", "--sample-tokens=0")
    code, out, _ = call("train", *few)
    assert code == 0
    assert "compiling GPU kernels, once per machine" in out
    assert "compiling GPU kernels" in call("generate", "--backend=cupy", "--num-tokens=3")[2]
    (tmp_path / "cache").mkdir()
    assert registry.load("cupy").first_use() is not None  # it is empty
    (tmp_path / "cache" / "0123.cubin").write_bytes(b"")
    code, out, _ = call("train", *few)
    assert (code, "compiling" in out) == (0, False)
    assert "compiling" not in call("evaluate", "--backend=cupy", "--num-tokens=3")[2]


def test_the_settings_of_a_preset_stay_what_they_are(machine, text):
    run = train(text, memory_gib=1.0, tf32=True)
    assert not {"tf32", "memory_gib"} & {*run.config["train"], *run.config["model"], *run.config["data"]}
