"""Compiled kernels on disk: compiled once for each machine and version, and loaded in later processes.

A folder holds what numba compiled from one state of the sources, for one processor, numba and Python; its name is
a hash of these. It is made aside, with a list of its files and their hashes, and then renamed: another process
sees all of it or nothing, and a file that was damaged since is noticed. Without a folder that can be written,
kernels are compiled into a temporary one, which the worker processes of this process use too.
"""

import atexit
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = "BABY_XP_KERNELS"
"""The environment variable by which worker processes find a temporary folder."""
SOURCES = "simd*.py", "numba_*.py"
LIST = "files.json"
LOCK = threading.Lock()


def compiled(signature: str) -> Callable[..., Any]:
    """Decorate a kernel: compile it for arguments of these types, or load it."""
    import numba

    return numba.njit(signature, cache=True, error_model="numpy")


def version() -> str:
    """The installed numba's version; "" where there is none."""
    try:
        return importlib.metadata.version("numba") if importlib.util.find_spec("numba") else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def key() -> str:
    """What compiled kernels depend on, as a hash: sources, versions, the processor, numba's settings."""
    found = hashlib.sha256()
    settings = {k: v for k, v in os.environ.items() if k.startswith("NUMBA_") and k != "NUMBA_CACHE_DIR"}
    found.update(repr([version(), sys.version, sorted(settings.items()), _processor()]).encode())
    for path in sorted(path for pattern in SOURCES for path in Path(__file__).parent.glob(pattern)):
        found.update(repr([str(path), path.stat().st_mtime_ns]).encode() + path.read_bytes())
    return found.hexdigest()[:24]


@functools.cache
def _processor() -> str:
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        names = "vendor", "model", "flags", "Features", "CPU"
        return "\n".join(line for line in first if line.startswith(names))
    return f"{platform.machine()} {platform.processor()}"


def parents() -> list[Path]:
    """Where folders of compiled kernels may lie, the preferred one first."""
    given = [os.environ[name] for name in (FOLDER, "NUMBA_CACHE_DIR") if os.environ.get(name)]
    home = {"win32": "LOCALAPPDATA"}.get(sys.platform, "XDG_CACHE_HOME")
    usual = os.environ.get(home) or Path("~/.cache").expanduser()
    return [*map(Path, given), Path(usual) / "baby_xp"]


def ready() -> Path | None:
    """The folder with these kernels, if there is one and it is whole."""
    name = key()
    return next((parent / name for parent in parents() if is_whole(parent / name)), None)


def is_whole(folder: Path) -> bool:
    """Whether the files of a folder are those that it had when it was made."""
    try:
        return bool(json.loads((folder / LIST).read_text()) == _hashes(folder))
    except (OSError, ValueError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*.nb?") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(module: str) -> Any:
    """Import the module of the kernels, with all that it decorates, from the disk; else compile it."""
    with LOCK:
        if (found := ready()) is not None:
            return _imported(module, found)
        for parent in parents():
            try:
                parent.mkdir(parents=True, exist_ok=True)
                aside = Path(tempfile.mkdtemp(prefix="new-", dir=parent))
            except OSError:
                continue
            return _made(module, aside, parent / key())
        parent = Path(tempfile.mkdtemp(prefix="baby_xp_kernels_"))
        atexit.register(shutil.rmtree, parent, ignore_errors=True)
        os.environ[FOLDER] = str(parent)
        return _made(module, Path(tempfile.mkdtemp(dir=parent)), parent / key())


def _made(module: str, aside: Path, folder: Path) -> Any:
    """Compile into `aside`, which then becomes `folder`. If the disk is full, nothing is kept."""
    found = _imported(module, aside)
    try:
        (aside / LIST).write_text(json.dumps(_hashes(aside)))
        if folder.exists() and not is_whole(folder):
            damaged = Path(tempfile.mkdtemp(prefix="old-", dir=folder.parent))
            folder.rename(damaged / "damaged")
            shutil.rmtree(damaged, ignore_errors=True)
        aside.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(aside, ignore_errors=True)
    return found


def _imported(module: str, folder: Path) -> Any:
    import numba

    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        return importlib.import_module(module)
    finally:
        numba.config.CACHE_DIR = before
