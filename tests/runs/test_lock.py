"""Locks: one holder at a time, in this process and in others, and none once the holder is gone."""

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

from baby_xp.runs import lock as lock_module
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


def test_a_lock_is_there_while_it_is_held(path):
    lock = Lock(path)
    assert not lock.is_held()
    assert lock.acquire()
    assert path.exists()
    assert Lock(path).is_held()
    lock.release()
    assert not path.exists()
    assert not Lock(path).is_held()


def test_a_lock_has_one_holder(path):
    first, second = Lock(path), Lock(path)
    assert first.acquire()
    assert not second.acquire(patience=0)
    first.release()
    assert second.acquire(patience=0)
    second.release()


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no file that is open")
def test_the_file_of_a_lock_is_removed_while_it_is_held(path, monkeypatch):
    """Else another process may have locked it in between, and a third would then lock a new one."""
    held, unlink = Lock(path), Path.unlink
    assert held.acquire()
    taken = []

    def watched(removed):
        taken.append(Lock(removed).acquire(patience=0))
        unlink(removed)

    monkeypatch.setattr(Path, "unlink", watched)
    held.release()
    assert taken == [False]


def test_asking_for_a_lock_does_not_wait_for_it(path, monkeypatch):
    held, waits = Lock(path), []
    assert held.acquire()
    sleep = lock_module.time.sleep
    monkeypatch.setattr(lock_module.time, "sleep", lambda seconds: (waits.append(seconds), sleep(seconds)))
    assert Lock(path).is_held()
    held.release()
    assert sum(waits) < lock_module.PATIENCE / 4


def test_locks_of_two_files_do_not_meet(tmp_path):
    locks = [Lock(tmp_path / name) for name in "ab"]
    assert all(lock.acquire(patience=0) for lock in locks)
    for lock in locks:
        lock.release()


def test_who_cannot_have_it_waits_for_as_long_as_asked(path):
    first = Lock(path)
    first.acquire()
    begin = time.monotonic()
    assert not Lock(path).acquire(patience=0.1)
    assert 0.1 <= time.monotonic() - begin < 5
    first.release()


def test_a_lock_that_is_given_back_meanwhile_is_had(path):
    """As when somebody else asks whether it is held, and takes it for a moment."""
    first, second = Lock(path), Lock(path)
    first.acquire()
    later = threading.Timer(0.05, first.release)
    later.start()
    assert second.acquire(patience=10)
    later.join()
    assert Lock(path).is_held()
    second.release()


def test_asking_leaves_nothing(path):
    assert not Lock(path).is_held()
    assert not path.exists()
    path.write_bytes(b"")  # its holder was killed
    assert not Lock(path).is_held()
    assert path.exists()  # who asks changes nothing
    assert not Lock(path.parent / "gone" / "a.lock").is_held()


def test_asking_does_not_take_it_from_its_holder(path):
    lock = Lock(path)
    lock.acquire()
    for _ in range(3):
        assert Lock(path).is_held()
    assert path.exists()
    lock.release()


def test_a_lock_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.lock", tmp_path / "folder"):
        with pytest.raises(OSError, match=r"folder|file"):
            Lock(path).acquire()
    assert not Lock(tmp_path / "folder").is_held()


def test_a_lock_whose_folder_is_gone_makes_it(tmp_path):
    lock = Lock(tmp_path / "gone" / "a.lock")
    assert lock.acquire()
    lock.release()


@pytest.mark.skipif(os.name == "nt", reason="flock is of POSIX")
@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_that_cannot_lock_is_not_a_lock_that_is_taken(path, monkeypatch, name):
    import fcntl

    def refuse(*args):
        raise OSError(getattr(errno, name), name)

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=name):
        Lock(path).acquire()
    assert not path.exists()
    assert not Lock(path).is_held()


def test_asking_needs_no_permission_to_write(path, holder, monkeypatch):
    """As another user has who may read the runs alone."""
    opened = open

    def read_only(file, mode="r"):
        if mode != "rb":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(file, mode)

    monkeypatch.setattr("builtins.open", read_only)
    assert Lock(path).is_held()


def test_a_lock_that_may_not_be_looked_at_counts_as_held(path, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    path.touch()
    monkeypatch.setattr("builtins.open", refuse)
    assert Lock(path).is_held()


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no file that is open")
def test_a_lock_on_a_file_that_was_removed_is_none(path, monkeypatch):
    """Its last holder removes it after the next one has opened it: who then locked it would not be alone."""
    from baby_xp.runs import lock as module

    locking, removed = module.try_to_lock, []

    def removed_before(file):
        if not removed:
            removed.append(path.unlink())
        return locking(file)

    monkeypatch.setattr(module, "try_to_lock", removed_before)
    first = Lock(path)
    assert first.acquire(patience=0)  # nobody held it
    assert path.exists()
    assert not Lock(path).acquire(patience=0)
    first.release()


def test_of_many_that_want_it_one_has_it_at_a_time(path):
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


def test_what_another_process_holds_is_held(path, holder):
    assert Lock(path).is_held()
    assert not Lock(path).acquire(patience=0.05)
    assert path.exists()


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_a_process_that_is_ended_gives_its_lock_back(path, holder, how):
    assert Lock(path).is_held()
    getattr(holder, how)()
    holder.wait()
    if os.name != "nt":
        assert holder.returncode == -{"kill": signal.SIGKILL, "terminate": signal.SIGTERM}[how]
    assert path.exists()  # nobody was there to remove it
    assert not Lock(path).is_held()
    lock = Lock(path)
    assert lock.acquire()
    lock.release()
    assert not path.exists()
