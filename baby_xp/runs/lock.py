"""A lock that the system gives back when its process ends, however it ends."""

import os
import time
from contextlib import suppress
from pathlib import Path

PATIENCE = 0.3
"""Seconds to wait for a lock: `is_held` takes it for a moment."""


class Lock:
    """An advisory lock on a file that is there only while the lock is held, or if its process was killed."""

    def __init__(self, path: Path):
        self.path, self._file = path, None

    def acquire(self, patience: float = PATIENCE) -> bool:
        """Take the lock -> whether it could be had. Raises OSError if the file cannot be written."""
        end = time.monotonic() + patience
        while True:
            file = open(self.path, "ab")  # noqa: SIM115  it stays open as long as the lock is held
            if _lock(file) and self._is_mine(file):
                self._file = file
                return True
            file.close()
            if time.monotonic() > end:
                return False
            time.sleep(0.01)

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if os.name == "nt":  # which removes no file that is open
            self._file.close()
            with suppress(OSError):
                self.path.unlink()
            return
        with suppress(OSError):  # removed while it is held: later it may be another process's already
            self.path.unlink()
        self._file.close()

    def is_held(self) -> bool:
        """Whether a process holds the lock."""
        if not self.path.exists():
            return False
        try:
            free = self.acquire(patience=0)
        except OSError:
            return False
        if free:
            self.release()
        return not free

    def _is_mine(self, file) -> bool:
        """Whether the locked file is still the one at the path, and not one that its last holder removed."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(file.fileno()))
        except OSError:
            return False


def _lock(file) -> bool:
    """Lock an open file for this process -> whether it could be had."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
