"""NumPy on the CPU: the reference that every other backend is compared with."""

import array_api_compat.numpy as library
import numpy as np

from baby_xp.errors import BackendUnavailable
from baby_xp.namespace import Namespace


class NumpyBackend:
    """Arrays of NumPy."""

    name = "numpy"

    def __init__(self, device: str | None = None, dtype: str = "float32"):
        if device not in (None, "cpu"):
            raise BackendUnavailable("numpy", f"it has no device {device!r}", "leave out --device or say --device cpu")
        self.dtype = dtype
        self.xp = Namespace(library, device="cpu")
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
