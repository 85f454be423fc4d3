"""The compiled kernels as a library of machine code: made once for each machine and version, then loaded.

numba compiles in a process of its own, numba_compile.py, to an image of machine code, see numba_image.py. All
other processes map its file and share its pages. Importing numba would take half a second and tens of megabytes in
each; so would LLVM in part, which loads an object file where there are no images. The modules of the kernels are
therefore written to be imported without them. There @compiled turns a kernel into an entry of this library, by its
name; names that only the body of a kernel uses are imported under `if COMPILING`.

A folder holds the machine code that belongs to one state of the sources, one processor, numba and Python; its name
is a hash of these. It is made aside, with a hash of the code, and then renamed: another process sees all of it or
nothing, and damage is noticed. Without a folder that can be written, a temporary one is made, which the worker
processes of this process use too.
"""

import atexit
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from baby_xp import processes
from baby_xp.errors import BabyError
from baby_xp.files import reason

COMPILING = False
"""Whether this process is the one that compiles."""
FOLDER = "BABY_XP_KERNELS"
"""The environment variable by which worker processes find a temporary folder."""
SOURCES = "simd*.py", "numba_*.py"
CODE, NAMES = "kernels.bin", "kernels.json"
FILES = {CODE, NAMES, "kernels.o"}
"""What a folder may contain; earlier versions wrote the last one."""
FOLDERS = re.compile(r"[0-9a-f]{24}|new-\w{8}")
"""Names of folders: of whole ones, and of what a compilation that was killed left."""
KEPT = 30 * 86400
"""Seconds after its last use until a folder is removed."""
CALLED = "memcpy", "memmove", "memset", "sqrt"
"""Functions of the C library that compiled kernels may call. One that is missing would end the process."""

FLOATS, INTEGERS, PLACES = "f4[::1]", "i4[::1]", "i8[::1]"
"""numba's names of the flat arrays that kernels take: float32, int32, int64."""
C_TYPES: dict[str, Any] = {
    "void": None, "f8": ctypes.c_double, "i8": ctypes.c_int64, "b1": ctypes.c_bool,
    **dict.fromkeys((FLOATS, INTEGERS, PLACES), ctypes.py_object),
}  # fmt: skip
"""A kernel is given arrays as Python objects, and takes data and length from where NumPy keeps them."""

kernels: dict[str, tuple[str, Callable[..., Any]]] = {}
"""While compiling: signature and function of each kernel, by its name."""


def compiled(signature: str) -> Callable[..., Any]:
    """Decorate a kernel: `signature` is numba's, as "void(f4[::1], i8)". Nobody checks that arguments fit it."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        if COMPILING:
            function = numba_function(function)
            kernels[name] = signature, function
            return function
        return Kernel(name)

    return decorate


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function of vectors, which is always part of the kernel that calls it."""
    return numba_function(function, forceinline=True) if COMPILING else function


def numba_function(function: Callable[..., Any], **more: Any) -> Any:
    """As numba's njit, without what only Python would need: wrappers, and counts of references to arrays."""
    import numba

    less = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
    return numba.njit(error_model="numpy", **less, **more)(function)


class Kernel:
    """A kernel of the library, which is loaded, or compiled, when the first one is called."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        return library().kernels[self.name](*arguments)


def flat(array) -> np.ndarray:
    """The elements one after the other, as the kernels take them: a copy of what has gaps or is read-only."""
    return (array if array.flags.carray else np.array(array, order="C")).reshape(-1)


def aligned(size: int, make: Callable[..., np.ndarray] = np.empty) -> np.ndarray:
    """Numbers (size,), the first of which begins a cache line: a vector then lies in one line, not in two."""
    LINE = 16  # numbers
    whole = make(size + LINE, np.float32)
    first = -(whole.ctypes.data // whole.itemsize) % LINE
    return whole[first : first + size]


@functools.cache
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
        found.update(path.name.encode() + path.read_bytes())
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
    """Whether the machine code of a folder is what it was when it was made."""
    try:
        return bool(json.loads((folder / NAMES).read_text())["sha256"] == hash_of(folder / CODE))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def hash_of(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Library(NamedTuple):
    """The loaded kernels."""

    kernels: dict[str, Any]
    """Functions, by their names."""
    width: int
    """How many numbers their vectors hold."""


@functools.cache
def library() -> Library:
    """All kernels. Raises BabyError if they are missing and cannot be compiled, or cannot be loaded."""
    folder = ready() or _made()
    with suppress(OSError):  # of a folder that is read-only
        os.utime(folder)
    try:
        with suppress(FileNotFoundError):  # another process may remove it now, see remove_unused
            return loaded(folder)
        return loaded(_made())
    except OSError as error:
        why = f"the compiled kernels cannot be loaded ({reason(error)})"
        raise BabyError(f"{why}; without them: --kernels numpy") from None


def is_loaded() -> bool:
    """Whether this process has the kernels already."""
    return library.cache_info().currsize > 0


def _made() -> Path:
    """A new folder of compiled kernels."""
    for parent in parents():
        try:
            parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix="new-", dir=parent))
        except OSError:
            continue
        break
    else:
        parent = Path(tempfile.mkdtemp(prefix="baby_xp_kernels_"))
        atexit.register(shutil.rmtree, parent, ignore_errors=True)
        os.environ[FOLDER] = str(parent)
        aside = Path(tempfile.mkdtemp(dir=parent))
    try:
        _compile_into(aside)
        remove_unused(parent)
        return _renamed(aside, parent / key())
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _compile_into(folder: Path) -> None:
    command = [sys.executable, "-m", "baby_xp_backends.numba_compile", str(folder)]
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        env=processes.environment(),
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise BabyError(f"numba could not compile the kernels: {last[0]}; without them: --kernels numpy")


def remove_unused(parent: Path) -> None:
    """Remove folders of compiled kernels that no process has used for a while.

    Nothing else: neither a folder of another name, nor one that contains other files, nor a link.
    """
    latest = time.time() - KEPT
    for folder in parent.glob("*"):
        with suppress(OSError):  # it belongs to somebody else, or another process has just removed it
            if FOLDERS.fullmatch(folder.name) and not folder.is_symlink() and folder.stat().st_mtime < latest:
                files = sorted(folder.iterdir(), key=lambda path: path.name != NAMES)  # without it, none is whole
                if files and {path.name for path in files} <= FILES:
                    for path in files:
                        path.unlink()
                    folder.rmdir()


def _renamed(aside: Path, folder: Path) -> Path:
    """`folder`, which `aside` becomes; or the one that another process has made in the meantime."""
    if folder.exists() and not is_whole(folder):
        with suppress(OSError):
            damaged = Path(tempfile.mkdtemp(prefix="old-", dir=folder.parent))
            folder.rename(damaged / "damaged")
            shutil.rmtree(damaged, ignore_errors=True)
    try:
        aside.rename(folder)
    except OSError:
        if is_whole(folder):
            shutil.rmtree(aside, ignore_errors=True)
            return folder
        return aside
    return folder


_owners: list[Any] = []
"""What owns the loaded machine code."""


def loaded(folder: Path) -> Library:
    """The kernels of a folder. Raises OSError if it is not there, or if the system does not let its code run."""
    content, found = json.loads((folder / NAMES).read_text()), {}
    is_image = all(isinstance(place, int) for place, *_ in content["kernels"].values())
    address_of = (_mapped if is_image else _linked)(folder / CODE)
    for name, (place, result, *kinds) in content["kernels"].items():
        function = ctypes.PYFUNCTYPE(C_TYPES[result], *(C_TYPES[kind] for kind in kinds))
        found[name] = function(address_of(place))
    return Library(found, content["width"])


def _mapped(path: Path) -> Callable[[int], int]:
    """The address of each place in an image. Processes share its pages, where files may be executed."""
    try:
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
    except OSError:  # the file system was mounted with noexec
        pages = _copied(path.read_bytes())
    _owners.append(pages)
    return np.frombuffer(pages, np.uint8).ctypes.data.__add__


def _copied(code: bytes) -> mmap.mmap:
    """The code in memory of this process that it may execute, and no longer write."""
    pages = mmap.mmap(-1, len(code), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE)
    pages.write(code)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    if protect(np.frombuffer(pages, np.uint8).ctypes.data, len(code), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return pages


def _linked(path: Path) -> Callable[[str], int]:
    """The address of each symbol in an object file, which LLVM loads."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    of_c = ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)
    for name in CALLED:
        llvm.add_symbol(name, ctypes.cast(getattr(of_c, name), ctypes.c_void_p).value)
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine()
    far = platform.machine().lower() in ("aarch64", "arm64")  # there, code must not lie too far from its data
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine, use_lmm=far)
    engine.add_object_file(llvm.ObjectFileRef.from_data(path.read_bytes()))
    engine.finalize_object()
    _owners.append(engine)
    address_of: Callable[[str], int] = engine.get_function_address
    return address_of
