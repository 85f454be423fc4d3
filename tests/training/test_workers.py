"""Workers: together they compute what one process computes, and they leave nothing behind, however they end."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import baby_xp
import baby_xp.api
from baby_xp.arrays import params, registry
from baby_xp.arrays.tiles import samples
from baby_xp.cli import main
from baby_xp.config import EquationConfig, GPTConfig, TrainConfig
from baby_xp.distributed import Group
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.text.batches import Batch, RandomWindows
from baby_xp.training import optimizers
from baby_xp.training.alone import suitable_number
from baby_xp.training.setup import number_of_workers
from baby_xp.training.step import accumulated, initial_state, loss_and_gradients_with_dropout, total_loss
from baby_xp.training.workers import Workers

TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
BATCH = 7
IDS = np.random.default_rng(0).integers(0, 11, 300)
TINY = {
    "n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 4, "num_steps": 6,
    "eval_every": 2, "dropout": 0.1, "sample_tokens": 0,
}  # fmt: skip
FLAGS = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


class Setting:
    """A model with dropout, its state at some step, and a batch."""

    def __init__(self, dtype: str, config=None):
        self.backend = registry.load("numpy", dtype=dtype)
        config = config or GPTConfig(n_ctx=8, n_emb=8, head_size=8, n_heads=2, n_layers=2, dropout=0.3)
        self.model = Model(config, 11)
        flat = params.draw(self.model.spec, 0, dtype) * 5
        self.state = initial_state(self.backend, flat, params.decay_mask(self.model.spec), 2**31 + 5)
        self.state["step"] = self.backend.integers([3])
        self.batch = RandomWindows(IDS, 8, BATCH, 0).batch(0)

    @property
    def xp(self):
        return self.backend.xp

    def alone(self, batch: Batch):
        return loss_and_gradients_with_dropout(self.xp, self.model, self.state, batch)

    def pool(self, number: int) -> Workers:
        return Workers(self.backend, self.model, BATCH, number)


@pytest.fixture(scope="module", params=[(1, "float32"), (2, "float64"), (3, "float32")], ids=str)
def together(request):
    """A setting and its running workers."""
    number, dtype = request.param
    setting = Setting(dtype)
    with setting.pool(number) as pool:
        yield setting, pool


@pytest.fixture(params=["memory", "file", "named file"])
def arenas(request, monkeypatch) -> list[Path]:
    """The arena files that were created, for each kind: in memory, without a name, and as on Windows."""
    made, mkstemp = [], tempfile.mkstemp
    if request.param == "memory" and not hasattr(os, "memfd_create"):
        pytest.skip("the system has no files in memory")
    if request.param != "memory":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr("baby_xp.training.workers.INHERITED", request.param != "named file")

    def recorded(*args, **kwargs):
        handle, path = mkstemp(*args, **kwargs)
        made.append(Path(path))
        return handle, path

    monkeypatch.setattr(tempfile, "mkstemp", recorded)
    return made


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. " * 40)
    return path


def agree(setting: Setting, found, expected, factor: int = 1):
    """Loss and gradients, up to some times the rounding of one sum."""
    (loss, gradients), (expected_loss, expected) = found, expected
    tolerance = factor * TOLERANCE[setting.backend.dtype]
    assert loss.dtype == gradients.dtype == expected.dtype
    np.testing.assert_allclose(loss, expected_loss, rtol=tolerance)
    np.testing.assert_allclose(gradients, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [BATCH, 3, 2, 1])
def test_loss_and_gradients_equal_those_of_one_process(together, size):
    """Also for a batch with fewer samples than there are workers."""
    setting, pool = together
    batch = samples(setting.batch, 0, size)
    found = pool.loss_and_gradients(setting.xp, setting.model, setting.state, batch)
    agree(setting, found, setting.alone(batch))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_accumulated_gradients_equal_those_of_one_process(together, size):
    """The gradients of a part survive the next part, and its samples have the dropout of the whole batch."""
    setting, pool = together
    found = accumulated(pool.loss_and_gradients, size)(setting.xp, setting.model, setting.state, setting.batch)
    agree(setting, found, setting.alone(setting.batch), 3)  # more sums, more roundings


def test_dropout_depends_on_the_sample_index_in_the_whole_batch(together):
    setting, pool = together
    numbered = Batch(*setting.batch[:2], setting.batch.samples[::-1] + 5)
    found = pool.loss_and_gradients(setting.xp, setting.model, setting.state, numbered)
    agree(setting, found, setting.alone(numbered))
    usual = setting.alone(setting.batch)[0]
    other = {**setting.state, "step": setting.backend.integers([4])}
    later = loss_and_gradients_with_dropout(setting.xp, setting.model, other, setting.batch)[0]
    assert setting.alone(numbered)[0] != usual != later  # dropout was on


@pytest.mark.parametrize("size", [BATCH, 2, 1])
def test_the_total_loss_equals_that_of_one_process(together, size):
    setting, pool = together
    batch = samples(setting.batch, 0, size)
    found = pool.total_loss(setting.state["params"], batch)
    expected = total_loss(setting.xp, setting.model, setting.state["params"], batch)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE[setting.backend.dtype])


def test_a_shorter_window_can_be_evaluated(together):
    setting, pool = together
    batch = Batch(setting.batch.inputs[:3, :5], setting.batch.targets[:3, :5], setting.batch.samples[:3])
    expected = total_loss(setting.xp, setting.model, setting.state["params"], batch)
    found = pool.total_loss(setting.state["params"], batch)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE[setting.backend.dtype])


def test_repeated_steps_are_equal_bit_for_bit(together):
    setting, pool = together
    compute = lambda workers: [  # noqa: E731
        array.tobytes()
        for array in workers.loss_and_gradients(setting.xp, setting.model, setting.state, setting.batch)
    ]
    runs = [compute(pool) for _ in range(2)]
    if pool.number == 2:
        with setting.pool(pool.number) as fresh:
            runs.append(compute(fresh))
    assert len(set(map(tuple, runs))) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_shared_update_equals_that_of_one_process_bit_for_bit(together, optimizer):
    """For a state outside the arena, for one from an update, and for gradients outside the arena."""
    setting, pool = together
    config = TrainConfig(num_steps=10, batch_size=BATCH, lr=0.1, optimizer=optimizer)
    alone = shared = setting.state
    for step in range(4):
        _, gradients = pool.loss_and_gradients(setting.xp, setting.model, shared, setting.batch)
        if step == 2:
            gradients = gradients.copy()
        if step == 3:
            shared = {name: array.copy() for name, array in shared.items()}
        by_one = optimizers.of(setting.model, config)
        alone, _ = optimizers.update(setting.xp, alone, gradients.copy(), config, by_one)
        before = {name: array.copy() for name, array in shared.items()}
        given, by_all = shared, pool.optimizer(config)
        shared, _ = optimizers.update(setting.xp, shared, gradients, config, by_all)
        for name in ("params", "m", "v"):
            assert shared[name].tobytes() == alone[name].tobytes()
            assert given[name].tobytes() == before[name].tobytes()  # an interrupted step needs it


def test_an_interrupted_command_does_not_affect_the_next(together, monkeypatch):
    """Ctrl-C may come between a command and its answers; the loss is then measured by the same workers."""
    setting, pool = together
    expected = total_loss(setting.xp, setting.model, setting.state["params"], setting.batch)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("baby_xp.training.workers.loss_and_gradients_with_dropout", interrupted)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            pool.loss_and_gradients(setting.xp, setting.model, setting.state, setting.batch)
        found = pool.total_loss(setting.state["params"], setting.batch)
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE[setting.backend.dtype])


def test_the_equation_model_with_one_target_per_context():
    setting = Setting("float64", EquationConfig(n_hidden=8))
    batch = Batch(setting.batch.inputs[:, :4], setting.batch.targets[:, 3], setting.batch.samples)
    with setting.pool(2) as pool:
        loss, gradients = pool.loss_and_gradients(setting.xp, setting.model, setting.state, batch)
    expected_loss, expected = setting.alone(batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    np.testing.assert_allclose(gradients, expected, atol=1e-12)


def train(tmp_path, text_file, workers: int):
    return baby_xp.api.train(
        "classic", path=tmp_path / "runs", backend="numpy", workers=workers, data=str(text_file), **TINY
    )


def test_a_training_is_reproduced_bit_for_bit_and_agrees_with_one_process(tmp_path, text_file):
    alone, *two = (train(tmp_path, text_file, workers) for workers in (1, 2, 2))
    assert two[0].params.tobytes() == two[1].params.tobytes()
    np.testing.assert_allclose(two[0].params, alone.params, atol=1e-5)
    # the result of a training does not keep the memory of its workers
    owner = two[0].params
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    assert owner.base is None
    assert two[0].config["machine"]["workers"] == 2
    assert two[0].config["result"]["val_loss"] == pytest.approx(alone.config["result"]["val_loss"], rel=1e-5)


def test_the_best_weights_survive_later_steps(tmp_path, text_file):
    """A rate that is too high makes the first steps the best; the last record evaluates the kept weights."""
    run = baby_xp.api.train(
        "classic", path=tmp_path / "runs", backend="numpy", workers=2, data=str(text_file),
        **{**TINY, "num_steps": 9, "eval_every": 1, "lr": 50.0, "warmup_steps": 0, "schedule": "constant"},
    )  # fmt: skip
    *records, last = [json.loads(line) for line in run.files.metrics.read_text().splitlines()]
    best = min(records, key=lambda record: record["val_loss"])
    assert last["whole_validation"]
    assert best["step"] == last["step"] < 8
    assert last["val_loss"] == pytest.approx(best["val_loss"], rel=1e-9)


# the number of workers ----------------------------------------------------------------------------------


def test_small_steps_are_not_split_and_large_ones_get_a_process_per_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    numpy_backend = registry.load("numpy")
    small, large = Model(GPTConfig(n_ctx=8, n_emb=8, head_size=8, n_layers=1), 11), Model(GPTConfig(), 65)
    assert suitable_number(numpy_backend, small, 16, Group()) == 1
    assert suitable_number(numpy_backend, large, 16, Group()) == 8
    assert suitable_number(numpy_backend, large, 5, Group()) == 5

    class Elsewhere:
        name = "cupy"

    assert suitable_number(Elsewhere(), large, 16, Group()) == 1


def test_there_are_no_more_workers_than_samples():
    setting = Setting("float32")
    for asked, given in ((1, 1), (4, 4), (30, BATCH)):
        assert number_of_workers(asked, setting.backend, setting.model, BATCH) == given


# nothing is left behind ---------------------------------------------------------------------------------


@pytest.mark.first_case
def test_leaving_ends_all_processes_and_removes_the_shared_file(arenas, request):
    setting = Setting("float32")
    with setting.pool(3) as pool:
        children = list(pool.children)
        assert len(children) == 2
        assert all(child.poll() is None for child in children)
        assert [path.exists() for path in arenas] == {
            "memory": [], "file": [False], "named file": [True]
        }[request.node.callspec.params["arenas"]]  # fmt: skip
    assert [child.returncode for child in children] == [0, 0]
    assert not any(path.exists() for path in arenas)


def test_threads_of_the_array_library_and_paths_of_modules(tmp_path, monkeypatch):
    """The number of threads is restored afterwards; workers find modules where this process finds them."""
    from threadpoolctl import threadpool_info

    (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'seen')!a}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    before = threadpool_info()
    with Setting("float32").pool(2):
        assert all(library["num_threads"] == 1 for library in threadpool_info())
        assert (tmp_path / "seen").exists()
    assert threadpool_info() == before


class Killer(baby_xp.Listener):
    """A listener that kills a worker after an evaluation."""

    def __init__(self, pools):
        self.pools = pools

    def evaluated(self, record):
        os.kill(self.pools[0].children[0].pid, signal.SIGKILL)


@pytest.fixture
def pools(monkeypatch) -> list[Workers]:
    """The workers that were started."""
    started, enter = [], Workers.__enter__
    monkeypatch.setattr(Workers, "__enter__", lambda self: started.append(self) or enter(self))
    return started


@pytest.fixture
def children(monkeypatch) -> list[subprocess.Popen]:
    """The processes that were started."""
    started, popen = [], subprocess.Popen

    def recorded(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", recorded)
    return started


KILLED = "worker 1 of 2 was killed by signal 9; train with fewer --workers, or --workers 1"


def main_with_killer(more: list[str], tmp_path, text_file, pools, monkeypatch) -> int:
    monkeypatch.setattr("baby_xp.cli.train_commands.Screen", lambda asked: Killer(pools))
    return main(["train", "--path", f"{tmp_path}/runs", "--data", str(text_file), *FLAGS, *more])


@pytest.mark.first_case
@needs_signals
def test_a_worker_that_is_killed_ends_training_in_one_line(
    tmp_path, text_file, arenas, pools, children, monkeypatch, capfd
):
    code = main_with_killer(["--workers", "2"], tmp_path, text_file, pools, monkeypatch)
    assert code == 2
    assert capfd.readouterr().err == f"baby_xp: {KILLED}\n"
    assert [child.returncode for child in children] == [-signal.SIGKILL]
    assert not any(path.exists() for path in arenas)
    assert not (tmp_path / "runs").exists()


@pytest.mark.first_case
@needs_signals
def test_a_worker_that_is_killed_leaves_the_last_checkpoint(
    tmp_path, text_file, arenas, pools, children, monkeypatch, capfd
):
    more, killed = ["--workers", "3", "--checkpoint-every", "1"], KILLED.replace("of 2", "of 3")
    assert main_with_killer(more, tmp_path, text_file, pools, monkeypatch) == 2
    assert capfd.readouterr().err == f"baby_xp: {killed}\n"
    assert [child.returncode for child in children] == [-signal.SIGKILL, 0]
    assert not any(path.exists() for path in arenas)
    (summary,) = baby_xp.api.list_runs(tmp_path / "runs")
    assert (summary.state, summary.steps) == ("failed", 2)  # the worker was killed after the evaluation of step 2
    run = baby_xp.api.load(path=tmp_path / "runs", weights="last")
    assert run.config["result"]["reason"] == killed
    assert len(run.generate(num_tokens=3)) == 3


def test_a_worker_that_cannot_start_ends_training_in_one_line(arenas, children, monkeypatch):
    monkeypatch.setattr("baby_xp.training.workers.PROGRAM", "raise SystemExit(3)")
    with pytest.raises(BabyError, match=r"worker 1 of 3 ended with exit code 3|workers cannot be started"):
        Setting("float32").pool(3).__enter__()
    assert all(child.returncode == 3 for child in children)
    assert not any(path.exists() for path in arenas)


def test_python_that_cannot_be_found_ends_training_in_one_line(arenas, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(BabyError, match=r"workers cannot be started .*; try --workers 1"):
        Setting("float32").pool(2).__enter__()
    assert not any(path.exists() for path in arenas)


def test_too_many_open_files_end_training_in_one_line_of_advice(arenas, monkeypatch):
    def popen(*arguments, **more):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(BabyError, match=r"workers cannot be started .*; try --workers 1, or .* \(ulimit -n\)"):
        Setting("float32").pool(2).__enter__()
    assert not any(path.exists() for path in arenas)


fallocate = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve room")


@fallocate
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system has no files in memory")
@pytest.mark.parametrize("arenas", ["memory"], indirect=True)
def test_full_shared_memory_falls_back_to_the_temporary_folder(arenas, monkeypatch):
    reserve, failed = os.posix_fallocate, []

    def full_once(*args):
        if not failed:
            failed.append(args)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return reserve(*args)

    monkeypatch.setattr(os, "posix_fallocate", full_once)
    setting = Setting("float64")
    with setting.pool(2) as pool:
        loss, _ = pool.loss_and_gradients(setting.xp, setting.model, setting.state, setting.batch)
    np.testing.assert_allclose(loss, setting.alone(setting.batch)[0], rtol=1e-12)
    assert [path.parent for path in arenas] == [Path(tempfile.gettempdir())]
    assert not any(path.exists() for path in arenas)


@fallocate
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OverflowError("too large")])
def test_without_space_anywhere_no_worker_starts(arenas, children, monkeypatch, error):
    def full(*args):
        raise error

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BabyError, match=r"workers cannot be started \(.*; try --workers 1"):
        Setting("float32").pool(2).__enter__()
    assert children == []
    assert not any(path.exists() for path in arenas)


# a process that is ended from outside -------------------------------------------------------------------


def wait_until(condition, seconds: float = 120.0):
    """The value of the condition once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return value


def parent_and_state(pid: str) -> tuple[int, str]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[1]), fields[0]
    except (OSError, IndexError):
        return 0, "gone"


def children_of(pid: int) -> list[str]:
    return [path.name for path in Path("/proc").glob("[0-9]*") if parent_and_state(path.name)[0] == pid]


@pytest.fixture
def training(tmp_path, text_file, signals):
    """A process that trains with one worker, past its first evaluation.

    The folder "temporary" is its own for temporary files.
    """
    (tmp_path / "temporary").mkdir()
    arguments = [*FLAGS, "--num-steps", "100000000", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "baby_xp", "train", "--path", "runs", "--data", str(text_file), *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
    )  # fmt: skip
    try:
        wait_until(lambda: any((tmp_path / "runs").glob("outputs/metrics_*")))
        yield process
    finally:
        process.kill()
        process.communicate()


@needs_proc
@needs_signals
def test_a_killed_main_process_leaves_no_worker_and_no_file(training, tmp_path):
    workers = children_of(training.pid)
    assert len(workers) == 1
    training.kill()
    training.wait()
    # where no process waits for orphans, they remain as zombies, which hold no resources
    wait_until(lambda: all(parent_and_state(pid)[1] in ("gone", "Z") for pid in workers))
    assert not list((tmp_path / "temporary").iterdir())
    assert training.stderr.read() == b""


@pytest.mark.first_case
@needs_signals
@pytest.mark.parametrize(("number", "group"), [
    ("SIGINT", True), ("SIGTERM", False), ("SIGTERM", True), ("SIGHUP", True), ("SIGUSR1", True),
])  # fmt: skip
def test_the_first_stop_request_keeps_the_run_and_prints_how_to_resume(training, tmp_path, number, group):
    """Ctrl-C in a terminal also reaches the workers, and so do the signals of a job scheduler."""
    (os.killpg if group else os.kill)(training.pid, getattr(signal, number))
    out, err = (text.decode() for text in training.communicate(timeout=120))
    assert training.returncode == 128 + getattr(signal, number)
    by = "" if number == "SIGINT" else f" by {number}"
    notice = "stopping after this step, with a checkpoint; interrupt again to stop at once"
    assert err == f"{notice}\nbaby_xp: interrupted{by}\n"
    (summary,) = baby_xp.api.list_runs(tmp_path / "runs")
    assert (summary.state, summary.num_steps) == ("stopped", 100_000_000)
    run = baby_xp.api.load(path=tmp_path / "runs", weights="last")
    result = run.config["result"]
    assert (result["state"], result["reason"], result["steps"]) == ("stopped", "interrupted", summary.steps)
    assert f"stopped after step {result['steps']}, with a checkpoint; to continue: python -m baby_xp resume" in out
    assert "whole validation part" not in out
    assert not run.files.completion().exists()
    assert not run.files.lock.exists()
    assert not list((tmp_path / "runs").rglob("*.tmp"))


@pytest.mark.parametrize(("n_emb", "threads"), [(8, 1), (256, None)])
def test_one_process_computes_small_steps_with_one_thread(tmp_path, n_emb, threads):
    """A product that waits for a second thread on a busy machine can take a hundred times as long."""
    from threadpoolctl import threadpool_info

    def of_blas():
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    seen, before = [], of_blas()

    class Watch(baby_xp.Listener):
        def progress(self, step, loss, tokens_per_second):
            seen.extend(of_blas())

    (tmp_path / "text.txt").write_text("to and fro, to and fro\n" * 200, encoding="utf-8")
    baby_xp.api.train(
        "classic", path=tmp_path, backend="numpy", workers=1, data=str(tmp_path / "text.txt"), n_emb=n_emb,
        head_size=8, n_ctx=32, num_steps=1, sample_tokens=0, listener=Watch(),
    )  # fmt: skip
    assert seen
    assert set(seen) == ({threads} if threads else set(before))
    assert of_blas() == before
