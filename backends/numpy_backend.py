"""NumPy on the CPU: the reference that every other backend is compared with."""

import ctypes
import functools
import importlib
import mmap
from contextlib import suppress
from pathlib import Path
from typing import Any

import array_api_compat.numpy as library
import numpy as np
from baby_xp_backends import numba_library
from baby_xp_backends.numpy_kernels import KERNELS

from baby_xp.arrays.backend import Backend
from baby_xp.arrays.namespace import Array, Namespace
from baby_xp.errors import BackendUnavailable

TOKENS_AT_ONCE = 1024
"""This many rows keep matrix products at full speed; arrays of more rows only outgrow the cache."""


def compiled_kernels() -> dict[str, Any]:
    """What replaces functions by compiled ones, for Namespace.

    Imported where numba works: its modules need llvmlite as long as nothing is compiled.
    """
    compiled = importlib.import_module("baby_xp_backends.numba_kernels")
    return {"kernels": {**KERNELS, **compiled.KERNELS}, "cache_multiple": compiled.CACHE_MULTIPLE}


class NumpyBackend(Backend):
    """Arrays of NumPy."""

    name = "numpy"

    def __init__(self, device: str | None = None, dtype: str = "float32", kernels: str = "fast"):
        if device not in (None, "cpu"):
            raise BackendUnavailable(
                "numpy", f"it has no device {device!r}", "leave out --device or say --device cpu"
            )
        keep_freed_memory()
        self.dtype, self.kernels = dtype, kernels
        self._compiles, self._why_not = False, ""
        self._by_numba = kernels == "fast" and dtype == "float32" and self._numba_works()
        fast: dict[str, Any] = {"kernels": KERNELS, "gradients_in_place": True} if kernels != "plain" else {}
        if self._by_numba:
            fast |= compiled_kernels()
        self.xp = Namespace(library, device="cpu", tokens_at_once=TOKENS_AT_ONCE, **fast)
        self.version, self.device = f"numpy {np.__version__}", "cpu"
        if self._by_numba:
            self.version += f" with numba {numba_library.version()}"

    def _numba_works(self) -> bool:
        """Whether numba is there and runs with this NumPy: compiled kernels on the disk show that it does."""
        if not numba_library.version():
            return False
        try:
            if numba_library.is_loaded():
                return True
            if numba_library.ready():
                numba_library.library()
            else:
                importlib.import_module("numba")
                self._compiles = True
        except Exception as error:  # numba refuses a NumPy that is too new for it
            self._why_not = f"numba {numba_library.version()} cannot be used: {' '.join(str(error).split())}"
            return False
        return True

    def before_workers(self) -> None:
        if self._by_numba:
            numba_library.library()

    def first_use(self) -> str | None:
        return "compiling kernels by numba, once per machine and version: 10 to 20 s" if self._compiles else None

    def details(self) -> str:
        return self._why_not

    def to_device(self, host: np.ndarray) -> Array:
        return np.array(host)

    def to_numpy(self, array: Array) -> np.ndarray:
        return np.asarray(array)


@functools.cache
def keep_freed_memory() -> None:
    """Ask glibc to keep what a step frees for the next step instead of returning it to the system.

    With its default thresholds every large array is mapped anew, and a small model's step spends a third of
    its time on page faults. Other C libraries are left as they are.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the maximum that glibc accepts
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 16 << 20)
    with suppress(AttributeError, OSError):
        ask_for_huge_pages(libc)


HEAP = 512 << 20
"""Bytes of address space, not of memory, that the heap gets in advance."""


def ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Let Linux back the heap with pages of 2 MiB where it does so on request.

    What a step saves for its backward pass is spread over more small pages than a processor's TLB holds, and in a
    virtual machine each miss costs two page walks. NumPy itself asks only for single arrays of 4 MiB and more.
    """
    MADV_HUGEPAGE, PIECE = 14, 16 << 20
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        return
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pieces = [piece for _ in range(HEAP // PIECE) if (piece := libc.malloc(PIECE))]
    end = libc.sbrk(0)
    begin = -(-min(pieces, default=end) // mmap.PAGESIZE) * mmap.PAGESIZE
    if begin + len(pieces) * PIECE <= end:  # otherwise the system placed some of it elsewhere
        libc.madvise(begin, end // mmap.PAGESIZE * mmap.PAGESIZE - begin, MADV_HUGEPAGE)
    for piece in pieces:
        libc.free(piece)
