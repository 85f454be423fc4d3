"""NumPy on the CPU: the reference that every other backend is compared with."""

import ctypes
import functools

import array_api_compat.numpy as library
import numpy as np
from baby_xp_backends.numpy_kernels import KERNELS

from baby_xp.errors import BackendUnavailable
from baby_xp.namespace import Namespace

TOKENS_AT_ONCE = 1024
"""So many rows keep matrix products at full speed; the arrays of more only outgrow the cache and the memory."""


class NumpyBackend:
    """Arrays of NumPy."""

    name = "numpy"

    def __init__(self, device: str | None = None, dtype: str = "float32"):
        if device not in (None, "cpu"):
            raise BackendUnavailable(
                "numpy", f"it has no device {device!r}", "leave out --device or say --device cpu"
            )
        keep_freed_memory()
        self.dtype = dtype
        self.xp = Namespace(library, device="cpu", kernels=KERNELS, tokens_at_once=TOKENS_AT_ONCE)
        self.version, self.device = f"numpy {np.__version__}", "cpu"

    def asarray(self, host):
        host = np.asarray(host)
        return np.array(host, dtype={"f": self.dtype, "b": "bool"}.get(host.dtype.kind, "int32"))

    def integers(self, values):
        return np.array([value % 2**32 for value in values], dtype=np.uint32).view(np.int32)

    def to_numpy(self, array):
        return np.asarray(array)

    def compile(self, function):
        return function

    def synchronize(self):
        pass


@functools.cache
def keep_freed_memory() -> None:
    """Ask glibc to keep what a step frees for the next step, in place of returning it to the system.

    With its default thresholds every large array is mapped anew, and a small model's step spends a third of
    its time on page faults. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 16 << 20)
