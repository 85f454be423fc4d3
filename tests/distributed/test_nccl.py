"""Ranks of NCCL on pretended GPUs: as threads of the tests, and as processes that end before their time."""

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
from baby_xp_backends.cupy_nccl import NcclGroup
from small_runs import StopAt, metrics_of

import baby_xp
from baby_xp import api, compute
from baby_xp.arrays import params, registry
from baby_xp.config import GPTConfig, TrainConfig
from baby_xp.distributed import connections, launchers
from baby_xp.distributed.connections import Connections
from baby_xp.distributed.launchers import Place
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.text.batches import RandomWindows
from baby_xp.training.alone import Alone
from baby_xp.training.ranks import Ranks
from baby_xp.training.step import initial_state, make_step, on_device

TINY = {
    "n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 7, "num_steps": 6,
    "eval_every": 2, "checkpoint_every": 3, "dropout": 0.2, "sample_tokens": 0, "warmup_steps": 3, "lr": 1e-2,
    "kernels": "plain", "data": "text.txt",
}  # fmt: skip
ENDS_WITHIN = 10.0
"""Seconds from the loss of a rank to the end of the others, without those that Python needs to start."""


@pytest.fixture
def machine(monkeypatch):
    """Three devices, in place of any real CuPy."""
    machine = fake_cupy.Machine(devices=3)
    for name, module in fake_cupy.modules(machine).items():
        monkeypatch.setitem(sys.modules, name, module)
    return machine


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def together(size: int, work):
    """What work(rank, place) returns or raises in a thread for each rank."""
    found, port = [None] * size, free_port()

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank, Place(rank, size, rank, "127.0.0.1", port))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def joined(place: Place) -> NcclGroup:
    group = NcclGroup(place)
    try:
        group.begin()
    except BabyError:
        group.end()
        raise
    return group


def results(found):
    """What all ranks returned, if none raised."""
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


# sums and values ----------------------------------------------------------------------------------------


def test_ranks_sum_arrays_and_tell_each_other_values(machine):
    def work(rank, place):
        group = joined(place)
        single, double = (group_array(machine, kind, rank) for kind in ("float32", "float64"))
        group.sum(single, double)
        value = group.broadcast({"from": rank}, root=2), group.broadcast("x" * 100_000 * (rank == 0))
        found = group.device, single.tolist(), double.tolist(), value, group.sum_of_numbers(rank, 0.5)
        everything = found, group.all_gather(rank), single.where
        group.end()
        return everything

    for rank, (found, ranks, where) in enumerate(results(together(3, work))):
        sums = [0.0 + 1 + 2, 3.0, 3.0]
        assert found == (f"cuda:{rank}", sums, sums, ({"from": 2}, "x" * 100_000), [3.0, 1.5])
        assert (ranks, where) == ([0, 1, 2], rank)


def group_array(machine, kind: str, rank: int):
    """(rank, 1, 1) on the current device."""
    array = fake_cupy.new_array(machine, 3, kind)
    array[...] = np.array([rank, 1, 1], kind)
    return array


# training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),
    [(2, "float32", 1e-6), (3, "float64", 1e-12), pytest.param(2, "float64", 1e-12, marks=pytest.mark.slow),
     pytest.param(3, "float32", 1e-6, marks=pytest.mark.slow)],
)  # fmt: skip
def test_ranks_train_as_one_process_does(machine, work, monkeypatch, size, dtype, tolerance):
    """With dropout, and a batch that the number of ranks does not divide."""
    alone = api.train("classic", **TINY, dtype=dtype, backend="cupy", path="alone")
    own = threading.local()
    monkeypatch.setattr(compute, "join", lambda kind: own.group)

    def train(rank, place):
        own.group = joined(place)
        run = api.train("classic", **TINY, dtype=dtype, distributed="nccl", path=f"by {rank}")
        own.group.end()
        return run

    runs = results(together(size, train))
    expected, found = metrics_of(alone.files), metrics_of(runs[0].files)
    for name in ("train_loss", "val_loss", "grad_norm"):
        np.testing.assert_allclose(
            [record[name] for record in found if record[name] is not None],
            [record[name] for record in expected if record[name] is not None], rtol=tolerance,
        )  # fmt: skip
    for run in runs:
        np.testing.assert_array_equal(run.params, runs[0].params)
    assert {device for _, device in machine.launched} == set(range(size))
    assert not Path("by 1").exists()


@pytest.mark.parametrize("kernels", ["plain", pytest.param("fast", marks=pytest.mark.slow)])
def test_a_rank_waits_for_its_device_as_little_as_one_process_does(machine, kernels):
    """The losses, and what ranks tell each other, stay on the devices until they are read."""
    model = Model(GPTConfig(n_ctx=8, n_emb=8, head_size=8, n_heads=2, n_layers=1, dropout=0.2), 20)
    config = TrainConfig(num_steps=9, batch_size=5)
    ids = np.random.default_rng(0).integers(0, 20, 500)
    ready = threading.Barrier(2, timeout=60)

    def work(rank, place):
        group = joined(place)
        backend = registry.load("cupy", group.device, "float32", kernels=kernels)
        ranks = Ranks(group, Alone(backend, model, 5), backend, model, config, lambda: (1.0, float(rank)))
        step = backend.compile(ranks.step())
        state = initial_state(backend, params.draw(model.spec, 0), params.decay_mask(model.spec), 0)
        windows, counts = RandomWindows(ids, 8, 5, 0), []
        for number in range(4):
            ready.wait()
            counts.append((machine.synchronized, machine.copied))
            ready.wait()
            state, metrics = step(state, on_device(backend, windows.batch(number)))
        ready.wait()
        counts.append((machine.synchronized, machine.copied))
        ready.wait()
        heard = ranks.heard
        assert heard.where == metrics["loss"].where == rank
        group.end()
        return counts, backend.to_numpy(heard).tolist(), float(backend.to_numpy(metrics["loss"])[0])

    (counts, heard, loss), (_, heard_too, loss_too) = results(together(2, work))
    assert (heard, loss) == (heard_too, loss_too)
    assert heard == [2.0, 1.0]
    waits, copies = of_a_step_alone(machine, model, config, ids, kernels)
    assert waits == 0
    for before, after in itertools.pairwise(counts):
        assert after[0] == before[0]
        assert after[1] - before[1] == 2 * (copies + 1)  # one more: what each rank tells the others


def of_a_step_alone(machine, model, config, ids, kernels: str) -> tuple[int, int]:
    """Waits for the device, and copies from the host, in one process."""
    backend = registry.load("cupy", None, "float32", kernels=kernels)
    state = initial_state(backend, params.draw(model.spec, 0), params.decay_mask(model.spec), 0)
    step = backend.compile(make_step(backend.xp, model, config))
    before = machine.synchronized, machine.copied
    step(state, on_device(backend, RandomWindows(ids, 8, 5, 0).batch(0)))
    return machine.synchronized - before[0], machine.copied - before[1]


def test_one_rank_needs_no_gpu(work):
    run = api.train("classic", **TINY, distributed="nccl", backend="numpy", workers=1)
    assert run.config["result"]["state"] == "done"


# what is missing or contradictory -----------------------------------------------------------------------


def test_ranks_that_would_share_a_gpu_are_refused(machine):
    found = together(4, lambda rank, place: joined(place))
    words = "ranks 0 and 3 would share GPU 0000:00:00.0 of .*: start one process for each GPU"
    for error in found:
        assert isinstance(error, BabyError)
        with pytest.raises(BabyError, match=words):
            raise error


def test_without_nccl_its_wheel_is_named(machine, monkeypatch):
    monkeypatch.setattr(sys.modules["cupy.cuda"].nccl, "available", False)
    for error in together(2, lambda rank, place: joined(place)):
        assert isinstance(error, BabyError)
        assert str(error).endswith("needs NCCL, which CuPy does not find: pip install nvidia-nccl-cu12")


def test_the_device_of_a_rank_is_not_the_users_choice(machine, work, monkeypatch):
    own = threading.local()
    monkeypatch.setattr(compute, "join", lambda kind: own.group)
    monkeypatch.setattr(NcclGroup, "fail", lambda group: None)  # it would end the others, which are this process

    def train(rank, place):
        own.group = joined(place)
        try:
            api.train("classic", **TINY, distributed="nccl", device="cuda:1")
        finally:
            own.group.end()

    for error in together(2, train):
        assert str(error) == "--distributed nccl gives each rank a GPU of its own: leave out --device, here cuda:1"


@pytest.mark.parametrize(
    ("rank", "words"),
    [(0, "rank 1, 2 of 3 did not start within 0 s"), (1, "rank 0 was not found within 0 s at 127.0.0.1, port")],
)
def test_a_rank_that_does_not_start_is_named(monkeypatch, rank, words):
    monkeypatch.setattr(connections, "START_SECONDS", 0.2)
    with pytest.raises(BabyError, match=words):
        Connections(Place(rank, 3, rank, "127.0.0.1", free_port()))


def test_a_port_that_is_taken_is_left_alone(monkeypatch):
    """By a program that says something else, and by ranks of another launch."""
    monkeypatch.setattr(connections, "GREETING_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        found = []

        def work(rank, place):
            place = Place(rank % 2, 2, rank % 2, "127.0.0.1", port, f"launch {rank // 2}")
            ends = Connections(place)
            found.append((rank, ends.broadcast(str(rank).encode(), 0)))
            ends.end()

        results(together(4, work))
    assert sorted(found) == [(0, b"0"), (1, b"0"), (2, b"2"), (3, b"2")]


def test_a_rank_that_has_left_is_named(machine):
    def work(rank, place):
        ends = Connections(place)
        if rank == 0:
            ends.end()
            return None
        time.sleep(0.1)
        try:
            ends.broadcast(b"", 0)
        finally:
            ends.end()

    assert str(together(2, work)[1]) == "rank 0 of 2 has ended: start all ranks again"


# processes ----------------------------------------------------------------------------------------------

RANK = Path(__file__).parents[1] / "nccl_rank.py"
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, "num_steps": 12}.items()]


def run_ranks(size: int, **more: str) -> tuple[list[int], list[str], float]:
    """Exit codes and errors of ranks that train, and how many seconds it took."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **more}
    began = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, "4", "train", "classic", *FLAGS, "--distributed=nccl"],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    return [rank.returncode for rank in ranks], errors, time.monotonic() - began


def test_a_rank_that_is_killed_ends_the_others_in_one_line(work):
    codes, errors, _ = run_ranks(2, KILL="1:5")
    assert codes == [2, -9]
    assert errors[0].startswith("baby_xp: rank 1 of 2 ended before its time; ")
    assert (errors[0].count("\n"), errors[1]) == (1, "")
    assert "can be resumed" in errors[0]
    (summary,) = baby_xp.list_runs()
    assert summary.steps == 3
    assert api.resume(backend="numpy", workers=1, kernels="plain").config["result"]["steps"] == 12


@pytest.mark.slow
def test_ranks_that_end_well_are_not_taken_for_lost(work):
    codes, errors, _ = run_ranks(3)
    assert (codes, errors) == ([0, 0, 0], [""] * 3)


@pytest.mark.slow
def test_without_rank_0_another_one_reports_it(work):
    codes, errors, seconds = run_ranks(3, KILL="0:5")
    assert codes == [-9, 2, 2]
    (line,) = errors[1].splitlines()
    assert "rank 0 of 3 ended before its time; " in line
    assert (errors[0], errors[2]) == ("", "")
    assert seconds < 120


@pytest.mark.slow
@pytest.mark.parametrize("noticed_after", [0.1, 0.7])
def test_a_lost_rank_is_reported_once(noticed_after):
    """By the main thread, or by the one that reads, which waits half a second for it. Both take long to end."""
    program = f"""if True:
        import os, sys, time
        from baby_xp.distributed import connections
        from baby_xp.distributed.group import Lost
        from baby_xp.distributed.launchers import Place
        end_now = os._exit
        os._exit = lambda code: [time.sleep(1), end_now(code)]
        connections.NOTICE_SECONDS, connections.REPORT_SECONDS = 0.5, 1.0
        rank = int(sys.argv[1])
        ends = connections.Connections(Place(rank, 2, rank, "127.0.0.1", {free_port()}))
        if rank == 0:
            end_now(3)
        time.sleep({noticed_after})
        try:
            while True:
                ends.check()
        except Lost as lost:
            ends.take_last_words()
            print(lost, file=sys.stderr, flush=True)
            time.sleep(2.5)
            ends.end()
    """
    ranks = [
        subprocess.Popen([sys.executable, "-c", program, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    lines = [rank.communicate(timeout=60)[1].splitlines() for rank in ranks]
    assert lines[0] == []
    (line,) = lines[1]
    assert "rank 0 of 2 ended before its time" in line


@pytest.mark.slow
def test_the_error_of_a_rank_ends_the_others(work):
    codes, errors, _ = run_ranks(3, RAISE="2:5")
    assert codes == [2, 2, 2]
    assert errors == ["", "", "baby_xp: rank 2: this rank cannot go on\n"]


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_and_they_go_on(work):
    pytest.importorskip("torch", reason="torchrun is part of PyTorch")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*launch, RANK, "2", "train", "classic", *FLAGS, "--distributed=nccl"],
        env={**os.environ, "KILL": "1:5"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (summary,) = baby_xp.list_runs()
    assert f"started again: going on with run {summary.guid} from its last checkpoint" in done.stderr
    assert (summary.state, summary.steps) == ("done", 12)


# jobs that are started again ----------------------------------------------------------------------------


def attempt(monkeypatch, number: int, listener=None, **more):
    """Train as torchrun's n-th attempt at a job would."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1a2b")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
    settings = {**TINY, "backend": "numpy", "workers": 1, "distributed": "nccl", **more}
    return api.train("classic", listener=listener, **settings)


class Notes(baby_xp.Listener):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


def test_a_job_that_is_started_again_goes_on_with_its_run(work, monkeypatch):
    whole = attempt(monkeypatch, 0, path="whole")
    first = attempt(monkeypatch, 0, StopAt(4))
    assert first.config["job"] == "torchrun 1a2b"
    notes = Notes()
    second = attempt(monkeypatch, 1, notes)
    assert second.guid == first.guid
    assert notes.texts == [f"started again: going on with run {first.guid} from its last checkpoint"]
    np.testing.assert_array_equal(second.params, whole.params)
    assert second.config["result"]["state"] == "done"
    assert attempt(monkeypatch, 2).guid != first.guid  # a run that is done stays as it is


@pytest.mark.parametrize(
    "change",
    [{"lr": 5e-3}, {"n_emb": 16}, {"distributed": "none"}, {"number": 0}, {"job": "9z"}],
    ids=lambda change: next(iter(change)),
)
def test_another_training_is_a_new_run(work, monkeypatch, change):
    first = attempt(monkeypatch, 0, StopAt(2))
    job = change.pop("job", None)
    if job:
        monkeypatch.setattr(launchers, "job", lambda: f"torchrun {job}")
    assert attempt(monkeypatch, change.pop("number", 1), **change).guid != first.guid
    assert len(baby_xp.list_runs()) == 2


def test_an_attempt_without_a_checkpoint_is_begun_again(work, monkeypatch):
    class Fails(baby_xp.Listener):
        def started(self, session, step):
            raise BabyError("no")

    with pytest.raises(BabyError, match="no"):
        attempt(monkeypatch, 0, Fails())
    assert attempt(monkeypatch, 1).config["result"]["state"] == "done"
