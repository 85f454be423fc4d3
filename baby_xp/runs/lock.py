"""A lock that the system releases when its process ends, however it ends."""

import os
import time
from pathlib import Path
from typing import BinaryIO

from baby_xp.files import open_in_folder, remove, try_to_lock

PATIENCE = 0.3
"""Seconds to wait for a lock: `is_held`, and a new run that removes abandoned files, hold it for an instant."""


class Lock:
    """An advisory lock on a file that exists only while the lock is held, or after its process was killed."""

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO | None = None

    def acquire(self, patience: float = PATIENCE) -> bool:
        """Take the lock -> whether it was free. Raises OSError if the file cannot be written, or the file system
        cannot lock."""
        end = time.monotonic() + patience
        while True:
            was_there = os.path.lexists(self.path)
            file = open_in_folder(self.path, "ab")
            try:
                free = try_to_lock(file)
                if free and self._is_mine(file):
                    self._file = file
                    return True
            except OSError:
                if not was_there:  # a file system without locks: leave no file behind
                    remove(self.path)
                raise
            finally:
                if self._file is None:
                    file.close()
            if not free:  # otherwise the last holder has just removed the file: try again with a new one
                if time.monotonic() > end:
                    return False
                time.sleep(0.01)

    def release(self) -> None:
        """Release the lock and remove its file."""
        file, self._file = self._file, None
        if file is None:
            return
        if os.name == "nt":  # Windows cannot remove an open file
            file.close()
            remove(self.path)
        elif self._is_mine(file):  # removed while held, because later it could belong to another process
            remove(self.path)
        file.close()

    def is_held(self) -> bool:
        """Whether a process holds the lock. Changes nothing, and needs no permission to write.

        A file that exists but may not be read counts as held.
        """
        try:
            with open(self.path, "rb") as file:
                return not try_to_lock(file, shared=True)
        except PermissionError:
            return True
        except OSError:
            return False

    def _is_mine(self, file: BinaryIO) -> bool:
        """Whether the locked file is still the one at the path, and not one that its last holder removed."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(file.fileno()))
        except OSError:
            return False
