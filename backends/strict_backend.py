"""array-api-strict: the Array API standard and nothing beyond it, with devices that only pretend to be apart.

Far too slow to train with. What runs here uses no function, no mixing of types and no hidden copy between
devices that some array library might lack: it stands in for a GPU in the tests.
"""

import numpy as np

from baby_xp.arrays.backend import Backend
from baby_xp.arrays.namespace import Array, Namespace
from baby_xp.errors import BackendUnavailable


class StrictBackend(Backend):
    """Arrays of array-api-strict, on "CPU_DEVICE" or one of its fake devices."""

    name = "array-api-strict"

    def __init__(self, device: str | None = None, dtype: str = "float32", kernels: str = "fast"):
        try:
            import array_api_strict as library
        except ImportError as error:
            raise BackendUnavailable(
                "array-api-strict",
                f"array-api-strict cannot be imported ({error})",
                "pip install array-api-strict",
            ) from None
        self._library, self.dtype, self.kernels = library, dtype, kernels
        known = {str(d).split("'")[1]: d for d in library.__array_namespace_info__().devices()}
        if device is not None and device not in known:
            raise BackendUnavailable(
                "array-api-strict", f"no device {device!r}", f"choose one of {', '.join(known)}"
            )
        self._device = known[device] if device else library.__array_namespace_info__().default_device()
        self.xp = Namespace(library, device=self._device)
        self.version, self.device = f"array-api-strict {library.__version__}", device or next(iter(known))

    def to_device(self, host: np.ndarray) -> Array:
        return self._library.asarray(np.array(host), device=self._device)

    def to_numpy(self, array: Array) -> np.ndarray:
        return np.asarray(array.to_device(self._library.Device("CPU_DEVICE")))
