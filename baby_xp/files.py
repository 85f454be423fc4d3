"""Files and folders: atomic writes, folders created on demand, and one-line messages for system errors.

Every OSError about a file that a user named, or that a run consists of, becomes a BabyError in `refusal`, the one
place that decides what to advise.
"""

import errno
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from baby_xp.errors import BabyError

TEMPORARY = ".tmp"
"""The end of a file's temporary name while it is being written."""
ATTEMPTS = 100
"""How often to try to create a folder again if another process removes it in the meantime."""
TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, getattr(errno, "EDEADLOCK", errno.EDEADLK)}
"""The error codes if another process has locked a file; Windows uses EDEADLOCK."""

FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}
NOT_ALLOWED = {errno.EACCES, errno.EPERM}
NO_LOCKS = {
    getattr(errno, name, errno.ENOLCK) for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL")
}
"""The error codes of a file system that cannot lock files at all."""


def shown(path: str | Path) -> str:
    """A path as messages show it: on one line, and in characters that any terminal can print."""
    name = os.fspath(path)
    return name if name.isprintable() else repr(name)


def as_path(value: Any, what: str) -> Path:
    """The Path of a text or a path-like object. Raises BabyError for anything else.

    what: what to call it when talking to the user, such as "path".
    """
    try:
        name = os.fspath(value)
    except TypeError:
        name = None
    if not isinstance(name, str):
        raise BabyError(f"{what} must be a path, a string or a pathlib.Path, not {value!r}")
    if "\0" in name:
        raise BabyError(f"{what} {name!r} is not a path: it contains a NUL character")
    return Path(name)


def absolute(path: str | Path) -> str:
    """The absolute path with links resolved; unchanged if the current folder no longer exists."""
    try:
        return os.path.realpath(path)
    except OSError:
        return os.fspath(path)


def refusal(path: str | Path, error: OSError, doing: str = "written", other: str | None = None) -> BabyError:
    """The one-line error for a file or folder that could not be read or written, with advice.

    doing: "written" or "read". other: the flag for another location, such as "--path", if there is one.
    """
    return BabyError(f"{shown(path)} cannot be {doing} ({reason(error)}); {_advice(error, doing, other)}")


def reason(error: Exception) -> str:
    """The system's error message, in a few words."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


def _advice(error: OSError, doing: str, other: str | None) -> str:
    code = error.errno
    elsewhere = f", or name another place with {other}" if other else ""
    if code in FULL:
        return f"free some space on that disk{elsewhere}"
    if code in NOT_ALLOWED:
        return f"check its permissions and those of its folders{elsewhere}"
    if code == errno.EROFS:
        return f"name another place with {other}" if other else "it is on a file system that is read-only"
    if code in (errno.EMFILE, errno.ENFILE):
        return "too many files are open: raise the limit (ulimit -n)"
    if code == errno.ELOOP:
        return "its symbolic links lead in a circle: remove one of them"
    if code == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if code in NO_LOCKS:
        return f"its file system may not support this{elsewhere}"
    if code in (errno.ENOTDIR, errno.EEXIST):
        return f"a file exists where a folder is needed{elsewhere}"
    if code == errno.EISDIR:
        return "it is a folder; give the name of a file"
    if code == errno.ENOENT:
        return "check the path" if doing == "read" else f"its folder cannot be created{elsewhere}"
    return f"check the disk{elsewhere}"


# folders ------------------------------------------------------------------------------------------------


def make_folder(folder: Path, made: list[Path] | None = None) -> None:
    """Make a folder with its parents, and note in `made` those that were missing. Raises OSError."""
    missing = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
    for one in reversed(missing):
        with suppress(FileExistsError):  # another process created it in the meantime
            one.mkdir()
            if made is not None:
                made.append(one)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(folder))


def make_writable_folder(folder: Path, made: list[Path], other: str | None = None) -> None:
    """Make a folder as `make_folder` does. Raises BabyError if it cannot be made, or no file in it."""
    # permission bits are not decisive (root, file systems mounted read-only), so try to write a file
    trial = folder / f".trial.{secrets.token_hex(4)}.tmp"
    try:
        for attempt in range(ATTEMPTS):
            try:
                make_folder(folder, made)
                trial.touch(exist_ok=False)
                return trial.unlink()
            except FileNotFoundError:  # another process removed it: see open_in_folder
                if attempt == ATTEMPTS - 1:
                    raise
    except OSError as error:
        raise refusal(folder, error, "written", other) from None


def remove_folders(made: list[Path]) -> None:
    """Remove the empty ones of these folders, the last one first."""
    for folder in reversed(made):
        with suppress(OSError):  # it is not empty
            folder.rmdir()


def listed(folder: Path) -> list[Path]:
    """The paths in a folder, sorted; none if it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def open_in_folder(path: Path, mode: str) -> Any:
    """Open a binary file to write; make its folder first if it is missing. Raises OSError.

    Another process that ends may remove the empty folder before the file is opened: then it is made again.
    """
    for _ in range(ATTEMPTS):
        with suppress(FileNotFoundError):
            return open(path, mode)
        make_folder(path.parent)
    return open(path, mode)


def try_to_lock(file: Any, shared: bool = False) -> bool:
    """Lock an open file until it is closed -> False if another process has locked it. Raises OSError if the file
    system cannot lock files.

    shared: together with other shared locks, to find out whether a process is writing the file.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        raise
    return True


# whole files --------------------------------------------------------------------------------------------


def write(path: Path, data: bytes | str | Callable[[Path], None], other: str | None = None) -> None:
    """Write a file atomically: it is complete or unchanged, whatever happens. Its folder is made if it is missing.

    data: the content, or a function that writes it to a path. A lone surrogate in a text, which UTF-8 does not
    have (a file name may), is written as an escape. other: the flag that names another place, for the advice.
    Raises BabyError if the file cannot be written.
    """
    try:
        if callable(data):
            _replace(path, lambda temporary: _save(temporary, data))
        else:
            whole = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
            write_pieces(path, lambda: [whole])
    except OSError as error:
        raise refusal(path, error, "written", other) from None


def write_pieces(path: Path, pieces: Callable[[], Iterable[bytes | memoryview]]) -> None:
    """Write a file in pieces, as `write` does; they are made again if its folder vanishes. Raises OSError."""

    def save(temporary: Path) -> None:
        with open_in_folder(temporary, "xb") as file:
            with suppress(OSError):  # locked while it is written: see remove_unless_locked
                try_to_lock(file)
            for piece in pieces():
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    _replace(path, save)


def _save(temporary: Path, save: Callable[[Path], None]) -> None:
    with open_in_folder(temporary, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode  # the default mode; some libraries choose another
    save(temporary)
    os.chmod(temporary, mode & 0o777)
    with open(temporary, "ab") as file:
        os.fsync(file.fileno())


def _replace(path: Path, save: Callable[[Path], None]) -> None:
    """Save under a temporary name, and rename. If another process removes the folder, it is made again."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    for attempt in range(ATTEMPTS):
        try:
            save(temporary)
            return os.replace(temporary, path)
        except FileNotFoundError:  # another process removed the folder: see open_in_folder, and creation.py
            if attempt == ATTEMPTS - 1:
                raise
        finally:
            remove(temporary)  # it is gone after the rename


def remove(path: Path) -> None:
    """Remove a file if possible."""
    with suppress(OSError):
        path.unlink()


def remove_unless_locked(path: Path) -> None:
    """Remove a half-written file, unless a process is writing it or the file system cannot lock files."""
    with suppress(OSError), open(path, "rb") as file:
        if try_to_lock(file, shared=True):
            path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, readable by people, as `write` does."""
    write(path, json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON object as one line, in one write: a reader never sees half of it for long."""
    try:
        with open_in_folder(path, "ab") as file:
            file.write(json.dumps(value).encode("ascii") + b"\n")
    except OSError as error:
        raise refusal(path, error) from None
