"""Locks: one holder at a time, in this process and in others, and none after the holder has ended."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from baby_xp.files import try_to_lock
from baby_xp.runs.lock import Lock

HOLDER = """import sys, time
from pathlib import Path
from baby_xp.runs.lock import Lock
lock = Lock(Path(sys.argv[1]))
print(lock.acquire(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "a.lock"


@pytest.fixture
def holder(path, signals):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_lock_has_one_holder_and_its_file_exists_while_it_is_held(path):
    first, second, other = Lock(path), Lock(path), Lock(path.parent / "gone" / "b.lock")
    assert not first.is_held()
    assert first.acquire()
    for _ in range(3):  # asking does not release the lock
        assert second.is_held()
    assert path.exists()
    assert not second.acquire(patience=0)
    assert other.acquire(patience=0)  # its folder is created
    other.release()
    first.release()
    assert not path.exists()
    assert not second.is_held()
    assert second.acquire(patience=0)
    second.release()


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no file that is open")
def test_the_file_of_a_lock_is_removed_while_it_is_held(path, monkeypatch):
    """Otherwise another process might have locked it in between, and a third would then lock a new one."""
    held, unlink = Lock(path), Path.unlink
    assert held.acquire()
    taken = []

    def watched(removed):
        taken.append(Lock(removed).acquire(patience=0))
        unlink(removed)

    monkeypatch.setattr(Path, "unlink", watched)
    held.release()
    assert taken == [False]


def test_acquire_waits_as_long_as_its_patience(path):
    first = Lock(path)
    first.acquire()
    begin = time.monotonic()
    assert not Lock(path).acquire(patience=0.1)
    assert 0.1 <= time.monotonic() - begin < 5
    first.release()


def test_a_lock_that_is_released_while_waiting_is_acquired(path):
    """For example, while another process calls is_held, which holds the lock for an instant."""
    first, second = Lock(path), Lock(path)
    first.acquire()
    later = threading.Timer(0.05, first.release)
    later.start()
    assert second.acquire(patience=10)
    later.join()
    assert Lock(path).is_held()
    second.release()


def test_is_held_does_not_change_files(path):
    assert not Lock(path).is_held()
    assert not path.exists()
    path.write_bytes(b"")  # its holder was killed
    assert not Lock(path).is_held()
    assert path.exists()  # asking changes nothing
    assert not Lock(path.parent / "gone" / "a.lock").is_held()


def test_a_lock_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.lock", tmp_path / "folder"):
        with pytest.raises(OSError, match=r"folder|file"):
            Lock(path).acquire()
    assert not Lock(tmp_path / "folder").is_held()


@pytest.mark.skipif(os.name == "nt", reason="flock is of POSIX")
@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_an_error_and_not_a_held_lock(path, monkeypatch, name):
    import fcntl

    def refuse(*args):
        raise OSError(getattr(errno, name), name)

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=name):
        Lock(path).acquire()
    assert not path.exists()
    assert not Lock(path).is_held()


@pytest.mark.parametrize("allowed", ["rb", None])
def test_is_held_needs_no_permission(path, holder, monkeypatch, allowed):
    """For a user who may only read the runs, or not even that."""
    opened = open

    def refused(file, mode="r"):
        if mode != allowed:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(file, mode)

    monkeypatch.setattr("builtins.open", refused)
    assert Lock(path).is_held()


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no file that is open")
def test_a_lock_on_a_removed_file_does_not_count(path, monkeypatch):
    """The last holder removes it after the next one has opened it; a lock on it would not exclude others."""
    removed = []

    def removed_before(file):
        if not removed:
            removed.append(path.unlink())
        return try_to_lock(file)

    monkeypatch.setattr("baby_xp.runs.lock.try_to_lock", removed_before)
    first = Lock(path)
    assert first.acquire(patience=0)  # no process held it
    assert path.exists()
    assert not Lock(path).acquire(patience=0)
    first.release()


def test_many_threads_hold_the_lock_one_at_a_time(path):
    inside, most, turns = [], [], []

    def take_turns(number):
        for _ in range(10):
            lock = Lock(path)
            assert lock.acquire(patience=60)
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.0005)
            turns.append(inside.pop())
            lock.release()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(take_turns, range(4)))
    assert len(turns) == 40
    assert set(most) == {1}
    assert not path.exists()


# another process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_the_lock_of_an_ended_process_is_released(path, holder, how):
    assert Lock(path).is_held()
    assert not Lock(path).acquire(patience=0.05)
    getattr(holder, how)()
    holder.wait()
    if os.name != "nt":
        assert holder.returncode == -{"kill": signal.SIGKILL, "terminate": signal.SIGTERM}[how]
    assert path.exists()  # a killed process cannot remove it
    assert not Lock(path).is_held()
    lock = Lock(path)
    assert lock.acquire()
    lock.release()
    assert not path.exists()
