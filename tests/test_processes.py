"""Child processes: they return what the function returns, and the way they end is reported."""

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from baby_xp import processes
from baby_xp.errors import BabyError

PROGRAM = """
import os, sys
from baby_xp.errors import BabyError
def answer(how, **rest):
    print("not the answer", flush=True)
    os.system("echo nor this")
    if how == "refuse": raise BabyError("this cannot be")
    if how == "fail": raise ValueError("a fault")
    if how == "exit": os._exit(3)
    if how == "die": os.kill(os.getpid(), 9)
    return [how, rest, os.getpid()]
"""


@pytest.fixture
def child(tmp_path, monkeypatch, signals):
    """Its function is in a module that only this path leads to; it prints to the file `log`."""
    (tmp_path / "answering.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    with (tmp_path / "log").open("w") as log, processes.started("answering:answer", "one", stderr=log) as child:
        yield child
    assert child.returncode is not None
    assert child.stdin.closed
    assert child.stdout.closed


def test_a_child_answers_request_after_request(child):
    odd = {"how": "\udce9 \u4e2d", "more": [1, None, 0.1]}
    assert processes.ask(child, odd) == [odd["how"], {"more": odd["more"]}, child.pid]
    with pytest.raises(BabyError, match="this cannot be"):
        processes.ask(child, {"how": "refuse"})
    assert processes.ask(child, {"how": "more"})[2] == child.pid


@pytest.mark.parametrize(("how", "end"), [
    ("fail", "ended with exit code 1"), ("exit", "ended with exit code 3"),
    pytest.param("die", "was killed by signal 9",
                 marks=pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")),
])  # fmt: skip
def test_the_end_of_a_child_is_described(child, how, end, tmp_path):
    for _ in range(2):  # the second request comes after its end
        with pytest.raises(processes.Ended) as caught:
            processes.ask(child, {"how": how})
        assert str(caught.value) == end
    log = (tmp_path / "log").read_text()
    assert log.startswith("not the answer\nnor this\n")
    assert ("a fault" in log) == (how == "fail")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupted_child_prints_nothing(child, tmp_path):
    processes.ask(child, {"how": "begin"})  # it is running now
    child.send_signal(signal.SIGINT)
    assert processes.how_it_ended(child) == "ended with exit code 130"
    assert (tmp_path / "log").read_text() == "not the answer\nnor this\n"


def test_the_number_of_cores_and_the_environment(monkeypatch):
    assert 1 <= processes.cores() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processes.cores() == 1
    monkeypatch.setattr(sys, "path", ["", "one", "two"])
    assert processes.environment()["PYTHONPATH"] == os.pathsep.join(["one", "two"])


@pytest.mark.parametrize(("code", "hint"), [
    (errno.EMFILE, ", or raise the limit of open files (ulimit -n)"),
    (errno.EAGAIN, ", or raise the limit of processes (ulimit -u)"),
    (errno.ENOMEM, ", or stop other programs that use memory"),
    (errno.EIO, ""),
])  # fmt: skip
def test_a_refused_process_is_one_line_of_advice(monkeypatch, code, hint):
    def refuse(*args, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(processes.subprocess, "Popen", refuse)
    with pytest.raises(BabyError) as caught, processes.started("a:b", "the trial", "try less"):
        pass
    assert str(caught.value) == f"the trial cannot be started ({os.strerror(code)}); try less{hint}"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal.pause")
def test_a_working_child_is_killed():
    with processes.started("signal:pause", "a process") as child:
        child.stdin.write("{}\n")
        child.stdin.flush()
    assert child.returncode == -signal.SIGKILL


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_working_child_ends_with_its_parent():
    program = """if True:
        import os
        from baby_xp import processes
        with processes.started("signal:pause", "a process") as child:
            child.stdin.write("{}\\n")
            child.stdin.flush()
            os.kill(os.getpid(), 9)
    """
    # it waits until the child too has closed its stderr
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=processes.environment(), stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_jobs_are_shared_out_and_results_come_as_they_are_there():
    released = threading.Event()
    slow = lambda job: released.wait(60) and f"slowly {job}"  # noqa: E731
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        slots = [partial(one.submit, slow), partial(two.submit, str.upper)]
        found = processes.results("uvwx", slots)
        assert [next(found) for _ in range(3)] == [(1, "V"), (2, "W"), (3, "X")]
        released.set()
        assert list(found) == [(0, "slowly u")]
        assert list(processes.results("u", slots)) == [(0, "slowly u")]
        assert list(processes.results("", slots)) == []
        with pytest.raises(TypeError):
            list(processes.results([1, 2], slots[1:]))
