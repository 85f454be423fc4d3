"""The equation lab in several ranks of MPI: the results of one process, and no rank is left behind at any end."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mpi_runs
import pytest
from mpi_runs import mpiexec, needs_mpi
from small_runs import needs_signals, wait_until

from baby_xp.equations import leave_one_out
from baby_xp.errors import BabyError
from baby_xp.presets import preset

COMMAND = "-m", "baby_xp", "equations", "--distributed", "mpi"
PROGRAM = """if True:
    import sys
    from pathlib import Path
    from baby_xp import distributed, equations
    from baby_xp.equations import leave_one_out
    from baby_xp.presets import preset
    folder, seeds = Path(sys.argv[1]), int(sys.argv[2])
    rank, train, trained = distributed.join("mpi").rank, equations.train, []
    def counting(*arguments):  # a child process of rank 0 does not call it
        trained.append(1)
        return train(*arguments)
    equations.train = counting
    asked = preset("equations").override({"num_steps": 30, "held_out": "4+4,2+5"})
    progress = lambda done, of: print(rank, done, of, flush=True)
    found = leave_one_out.experiment(asked, seeds, None, progress, "mpi")
    figures = found.answers, found.losses, found.copied, found.processes
    (folder / str(rank)).write_text(f"{sum(trained)} {figures}")
"""
LONG = "--seeds", "5", "--held-out", "4+4", "--num-steps", "10000000"
"""Models whose training takes hours."""


def said(err: str) -> list[str]:
    """The lines of baby_xp, without those of the launcher."""
    return [line for line in err.splitlines() if line.startswith("baby_xp: ")]


@needs_mpi
@pytest.mark.parametrize("seeds", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_several_ranks_give_the_results_of_one_process(tmp_path, seeds):
    done = mpiexec(3, "-c", PROGRAM, str(tmp_path), str(seeds))
    assert done.returncode == 0, done.stderr
    asked = preset("equations").override({"num_steps": 30, "held_out": "4+4,2+5"})
    one = leave_one_out.experiment(asked, seeds, workers=1)
    trained = []
    for rank in range(3):
        number, found = (tmp_path / str(rank)).read_text().split(" ", 1)
        trained.append(int(number))
        assert found == str((one.answers, one.losses, one.copied, 3))
    assert trained[0] == 0
    if seeds == 3:  # a model for each rank
        assert trained[1:] == [1, 1]
    assert done.stdout.splitlines() == [f"0 {number + 1} {seeds}" for number in range(seeds)]


@needs_mpi
@pytest.mark.slow
def test_the_command_prints_once():
    arguments = "--held-out", "4+4", "--seeds", "5", "--num-steps", "400"
    ranks = mpiexec(4, *COMMAND, *arguments)
    assert (ranks.returncode, said(ranks.stderr)) == (0, [])
    assert re.search(r"^time +\d+ s in 4 processes$", ranks.stdout, re.MULTILINE)
    # without mpiexec it is one rank, with the usual processes
    alone = subprocess.run(
        [sys.executable, *COMMAND, *arguments, "--workers", "2"], capture_output=True, text=True, timeout=120
    )
    assert (alone.returncode, alone.stderr) == (0, "")
    assert "in 2 processes" in alone.stdout
    rows = [[line for line in out.splitlines() if line[:4] != "time"] for out in (ranks.stdout, alone.stdout)]
    assert rows[0] == rows[1]


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "line"), [
    (("--lr", "1e38", "--min-lr", "0", "--held-out", "4+4"), r"the loss became (nan|inf) with 4\+4 held out"),
    (("--workers", "2"), "workers has no effect here, as each of several ranks trains one model at a time"),
    (("--held-out", "4+4,17+3"), "17"),
])  # fmt: skip
def test_what_cannot_be_used_ends_all_ranks_in_one_line(arguments, line):
    done = mpiexec(3, *COMMAND, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(said(done.stderr)) == 1
    assert re.search(line, said(done.stderr)[0])
    assert "Traceback" not in done.stderr


def test_without_mpi4py_the_lab_says_what_to_install(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    code, out, err = call("equations", "--distributed", "mpi")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--distributed mpi needs mpi4py, which is not installed: install the extra mpi" in err


def test_other_ranks_than_those_of_mpi_are_refused(call):
    assert "must be one of none, mpi" in call("equations", "--distributed", "nccl")[2]
    with pytest.raises(BabyError, match="distributed must be one of none, mpi, not 'nccl'"):
        leave_one_out.experiment(preset("equations"), distributed="nccl")


@pytest.fixture
def experiment(tmp_path, request):
    """A long experiment in three ranks, once all of them train: its launcher, and the processes of the ranks."""
    program = f"""if True:
        import os, signal, sys
        from pathlib import Path
        from baby_xp import cli, distributed, equations
        signal.signal(signal.SIGINT, signal.default_int_handler)
        rank, train = distributed.join("mpi").rank, equations.train
        def counting(*arguments):
            (Path({str(tmp_path)!r}) / f"trains {{rank}}").touch()
            return train(*arguments)
        equations.train = counting
        (Path({str(tmp_path)!r}) / f"process {{rank}}").write_text(str(os.getpid()))
        sys.exit(cli.main(["equations", "--distributed", "mpi", *sys.argv[1:]]))
    """
    flags = getattr(request, "param", ())
    launcher = mpi_runs.started(3, "-c", program, *LONG, flags=flags)
    try:
        wait_until(lambda: launcher.poll() is not None or len([*tmp_path.glob("trains *")]) == 2)
        if flags and launcher.poll() is not None:
            pytest.skip(f"this mpiexec has no {flags[0]}")
        yield launcher, [int((tmp_path / f"process {rank}").read_text()) for rank in range(3)]
    finally:
        launcher.terminate()
        mpi_runs.ended(launcher)
        for file in tmp_path.glob("process *"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)


def descendants(process: int) -> list[int]:
    """A process, its children and theirs, on Linux."""
    found = [process]
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            found += descendants(int(child))
    return found


@needs_mpi
@needs_signals
@pytest.mark.slow
@pytest.mark.parametrize(("name", "whom"), [
    ("SIGINT", "launcher"), ("SIGTERM", "launcher"),
    ("SIGTERM", 0), ("SIGTERM", 1), ("SIGKILL", 0), ("SIGKILL", 2),
])  # fmt: skip
def test_a_signal_ends_all_ranks(experiment, name, whom):
    launcher, ranks = experiment
    processes = [one for rank in ranks for one in descendants(rank)]
    assert len(processes) >= (4 if sys.platform == "linux" else 3)
    os.kill(launcher.pid if whom == "launcher" else ranks[whom], getattr(signal, name))
    done = mpi_runs.ended(launcher)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert len(said(done.stderr)) <= 1
    if (name, whom) in [("SIGTERM", 0), ("SIGTERM", 1)]:
        assert said(done.stderr) == ["baby_xp: interrupted by SIGTERM"]
    wait_until(lambda: not any(map(runs, processes)))


@needs_mpi
@needs_signals
@pytest.mark.slow
@pytest.mark.parametrize("experiment", [("--with-ft", "ulfm")], indirect=True)
def test_a_lost_rank_ends_the_others_if_the_launcher_does_not(experiment):
    launcher, ranks = experiment
    os.kill(ranks[2], signal.SIGKILL)
    done = mpi_runs.ended(launcher)
    assert said(done.stderr) == ["baby_xp: rank 2 of 3 ended before its time"]


def runs(process: int) -> bool:
    """Whether it is still there, and not as a zombie that nobody has waited for."""
    try:
        os.kill(process, 0)
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # it has ended just now, or this is not Linux
        return sys.platform != "linux"
