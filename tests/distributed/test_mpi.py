"""Ranks of MPI, started by mpiexec: what they train, and how they end. Most of it is slow: see test_ranks.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mpi_runs import PROGRAM, mpiexec, needs_mpi, started
from safetensors.numpy import load_file
from small_runs import TEXT, flags, metrics_of, needs_signals, wait_until

import baby_xp
from baby_xp import distributed, processes
from baby_xp.distributed import mpi
from baby_xp.errors import BabyError

CHILD = str(Path(__file__).with_name("rank_child.py"))
SETTINGS = {"distributed": "mpi", "dropout": 0.2, "num_steps": 8, "eval_every": 4, "sample_tokens": 3}
TOLERANT = ["--with-ft", "ulfm"]
"""mpiexec then leaves the other ranks alone when one ends."""
TRAVELLING = {"BABY_XP_PIECE": "64", "BABY_XP_MACHINES": "2"}
"""Ranks then send gradients while they compute others."""
pytestmark = needs_mpi


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The current folder, with a text."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")


def tolerant() -> bool:
    """Whether this MPI goes on without a rank that ends."""
    version = subprocess.run([str(PROGRAM), "--version"], capture_output=True, text=True, check=False).stdout
    return "Open MPI" in version


needs_tolerance = pytest.mark.skipif(bool(PROGRAM) and not tolerant(), reason="this mpiexec has no --with-ft")


def lines_of(err: str) -> list[str]:
    """What baby_xp itself wrote to stderr."""
    return [line for line in err.splitlines() if line.startswith("baby_xp: ")]


def lost(rank: int, text: str) -> bool:
    """Whether a text says that this rank of three was lost; one that is told by another may not know which."""
    return f"rank {rank} of 3 ended before" in text or "one of 3 ranks ended before" in text


def state_of(run: baby_xp.Run) -> dict[str, np.ndarray]:
    return load_file(run.files.state)


def alone(**more) -> baby_xp.Run:
    """The run of one process."""
    settings = {**SETTINGS, "distributed": "none", "path": "alone", **more}
    assert baby_xp.cli.main(["train", "classic", *flags(**settings)]) == 0
    return baby_xp.load(path="alone", weights="last")


def check_equal(run: baby_xp.Run, expected: baby_xp.Run) -> None:
    """Up to the rounding of float32."""
    assert run.config["result"]["steps"] == expected.config["result"]["steps"]
    found, other = (
        np.array([[record["train_loss"], record["val_loss"]] for record in metrics_of(one.files)], float)
        for one in (run, expected)
    )
    np.testing.assert_allclose(found, other, rtol=1e-6)
    np.testing.assert_allclose(run.params, expected.params, rtol=0, atol=1e-5)


def test_two_ranks_learn_what_one_process_learns():
    """And only one of them prints and writes."""
    ended = mpiexec(2, "-m", "baby_xp", "train", "classic", *flags(**SETTINGS))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("(whole validation part)") == 1
    assert len(list(Path("runs/configs").iterdir())) == 1
    check_equal(baby_xp.load(weights="last"), alone())


@pytest.mark.parametrize("number", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_gradients_that_travel_while_others_are_computed_have_the_same_bits(number):
    """As those that are sent at the end, as on one machine; of six ranks, two have no samples."""
    states = []
    for path, machines in (("meanwhile", "2"), ("at the end", "1")):
        env = {"BABY_XP_PIECE": "64", "BABY_XP_MACHINES": machines}
        settings = flags(**{**SETTINGS, "dtype": "float32", "n_layers": 3}, path=path)
        ended = mpiexec(number, CHILD, "train", "classic", *settings, env=env)
        assert ended.returncode == 0, ended.stderr
        states.append(state_of(baby_xp.load(path=path)))
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name])
    check_equal(baby_xp.load(path="meanwhile", weights="last"), alone(dtype="float32", n_layers=3))


@needs_tolerance
@pytest.mark.parametrize("place", ["compute", "travel"])
def test_the_others_go_on_from_the_last_checkpoint_when_a_rank_is_killed(place):
    settings, env = flags(**SETTINGS, checkpoint_every=2, restarts=1), {"BABY_XP_FAULT": f"1 {place} 5"}
    if place == "travel":
        env |= TRAVELLING
    ended = mpiexec(3, CHILD, "train", "classic", *settings, flags=TOLERANT, env=env)
    assert lost(1, ended.stderr)
    assert " ended before its time; the checkpoint of step 4 is kept: run " in ended.stderr
    assert "; going on with 2 ranks\n" in ended.stderr
    run = baby_xp.load(weights="last")
    assert f"continuing run {run.guid} after step 4\n" in ended.stdout
    assert run.config["result"]["state"] == "done"
    check_equal(run, alone())


def test_without_mpiexec_there_is_one_rank():
    command = [sys.executable, "-m", "baby_xp", "train", "classic", *flags(**SETTINGS)]
    env = {**processes.environment(), **dict.fromkeys(["OMPI_COMM_WORLD_RANK"], "")}
    env.pop("OMPI_COMM_WORLD_RANK")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert (ended.returncode, ended.stderr) == (0, "")
    run, expected = baby_xp.load(weights="last"), alone()
    np.testing.assert_array_equal(run.params, expected.params)


# what is missing ----------------------------------------------------------------------------------------


def test_a_missing_mpi4py_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setattr(distributed, "_joined", {})
    with pytest.raises(BabyError, match=r"needs mpi4py, which is not installed: install the extra mpi"):
        distributed.join("mpi")


def test_a_missing_library_is_one_line(monkeypatch):
    class Missing:
        def find_spec(self, name, *_):
            if name == "mpi4py.MPI":
                raise RuntimeError("cannot load MPI library\nlibmpi.so: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(BabyError, match="mpi4py finds no MPI library") as caught:
        mpi.join()
    assert "\n" not in str(caught.value)


# slow ones ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers", "optimizer"), [(2, 2, "adamw"), (3, 1, "muon"), (4, 2, "muon")])
def test_ranks_with_workers_repeat_their_bits(number, workers, optimizer):
    """Six samples for up to eight processes; a rank of four has none."""
    more = {"workers": workers, "optimizer": optimizer, "batch_size": 6, "dtype": "float32"}
    states = []
    for path in ("one", "other"):
        ended = mpiexec(number, "-m", "baby_xp", "train", "classic", *flags(**{**SETTINGS, **more}, path=path))
        assert ended.returncode == 0, ended.stderr
        states.append(state_of(baby_xp.load(path=path)))
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name])
    check_equal(baby_xp.load(path="one", weights="last"), alone(**{**more, "workers": 1}))


@pytest.mark.slow
def test_a_run_is_resumed_by_another_number_of_ranks():
    stopped = mpiexec(3, "-m", "baby_xp", "train", "classic", *flags(**SETTINGS, max_minutes=1e-9))
    assert "time limit reached" in stopped.stdout
    ended = mpiexec(2, "-m", "baby_xp", "resume", "--max-minutes=0", "--distributed=mpi")
    assert ended.returncode == 0, ended.stderr
    check_equal(baby_xp.load(weights="last"), alone())


FAULTS = [("1 compute 5", 4), ("2 sum 5", 4), ("0 compute 5", 4), ("0 write 6", 4), ("1 travel 5", 4)]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "kept"), FAULTS)
@pytest.mark.parametrize("tolerates", [False, pytest.param(True, marks=needs_tolerance)])
def test_a_rank_that_is_killed_ends_the_others_and_the_last_checkpoint_is_whole(fault, kept, tolerates):
    settings, begin = flags(**SETTINGS, checkpoint_every=2), time.monotonic()
    more = {"flags": TOLERANT if tolerates else [], "env": {"BABY_XP_FAULT": fault}}
    if "travel" in fault:
        more["env"] |= TRAVELLING
    ended = mpiexec(3, CHILD, "train", "classic", *settings, **more)
    assert ended.returncode != 0
    assert time.monotonic() - begin < 60
    if tolerates:
        (line,) = lines_of(ended.stderr)
        assert lost(int(fault[0]), line)
        assert "can be resumed" in line
    (summary,) = baby_xp.list_runs()
    assert (summary.steps, summary.state) in ((kept, "stopped"), (kept, "failed"))
    resumed = baby_xp.resume()
    assert resumed.config["result"]["state"] == "done"
    np.testing.assert_allclose(baby_xp.load(weights="last").params, alone().params, rtol=0, atol=1e-5)


@pytest.mark.slow
@needs_tolerance
def test_the_others_go_on_when_rank_0_is_killed_while_it_writes():
    settings = flags(**SETTINGS, checkpoint_every=2, restarts=2)
    mpiexec(3, CHILD, "train", "classic", *settings, flags=TOLERANT, env={"BABY_XP_FAULT": "0 write 4"})
    (summary,) = baby_xp.list_runs()
    assert (summary.steps, summary.state) == (8, "done")
    check_equal(baby_xp.load(weights="last"), alone())
    assert not list(Path("runs").rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 300])
def test_ranks_wait_for_one_that_starts_late_but_not_forever(seconds):
    late = "import runpy, sys, time; time.sleep(4); sys.argv.pop(0); runpy.run_path(sys.argv[0], {}, '__main__')"
    arguments = [CHILD, "train", "classic", *flags(**SETTINGS)]
    env = {"BABY_XP_START_SECONDS": str(seconds)}
    launcher = started(1, *arguments, ":", "-n", "1", sys.executable, "-c", late, *arguments, env=env)
    out, err = launcher.communicate(timeout=120)
    if seconds == 1:
        assert launcher.returncode == 2
        assert lines_of(err) == ["baby_xp: some ranks of MPI did not start within 1 s"]
        assert not Path("runs").exists()
    else:
        assert launcher.returncode == 0, err
        assert "validation loss" in out


@pytest.mark.slow
def test_another_text_on_another_rank_is_one_line():
    Path("other.txt").write_text(TEXT[::-1], encoding="utf-8")
    ours, theirs = (
        ["-m", "baby_xp", "train", "classic", *flags(**SETTINGS, data=data)] for data in ("text.txt", "other.txt")
    )
    launcher = started(1, *ours, ":", "-n", "1", sys.executable, *theirs)
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 2
    (line,) = lines_of(err)
    assert line.startswith("baby_xp: rank 1: the text differs from that of rank 0: ")
    assert not Path("runs").exists()


@pytest.mark.slow
@needs_signals
def test_sigusr1_ends_all_ranks_with_a_checkpoint():
    """mpiexec forwards it; a cluster can be told to send it some time before it ends a job."""
    launcher = started(2, "-m", "baby_xp", "train", "classic", *flags(**{**SETTINGS, "num_steps": 10**7}))
    wait_until(lambda: Path("runs/outputs").exists() and any(Path("runs/outputs").glob("metrics_*")))
    os.kill(launcher.pid, signal.SIGUSR1)
    out, err = launcher.communicate(timeout=60)
    assert "with a checkpoint; to continue: python -m baby_xp resume" in out
    assert lines_of(err)[0] == "baby_xp: interrupted by SIGUSR1"
    (summary,) = baby_xp.list_runs()
    assert summary.state == "stopped"
    assert summary.steps > 0
    longer = baby_xp.resume(num_steps=summary.steps + 1)
    assert longer.config["result"]["state"] == "done"
