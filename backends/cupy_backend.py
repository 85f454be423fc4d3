"""CuPy on an NVIDIA GPU."""

import numpy as np

from baby_xp.errors import BackendUnavailable
from baby_xp.namespace import Namespace

NO_DRIVER = "install NVIDIA's driver for the card (nvidia-smi shows whether it works), or use --backend numpy"


class CupyBackend:
    """Arrays of CuPy, on "cuda" or "cuda:1". The device becomes the current one of the calling thread."""

    name = "cupy"

    def __init__(self, device: str | None = None, dtype: str = "float32"):
        self._cupy = cupy = import_cupy()
        self.dtype = dtype
        self._device = cupy.cuda.Device(device_index(cupy, device))
        self._device.use()
        prove(cupy)
        import array_api_compat.cupy as library

        self.xp = Namespace(library, device=self._device)
        self.version = f"cupy {cupy.__version__}"
        properties = cupy.cuda.runtime.getDeviceProperties(self._device.id)
        self.device = f"cuda:{self._device.id} ({properties['name'].decode()})"

    def asarray(self, host):
        dtype = {"f": self.dtype, "b": "bool"}.get(host.dtype.kind, "int32")
        return self._cupy.asarray(np.asarray(host, dtype=dtype))

    def integers(self, values):
        return self._cupy.asarray(
            np.array([value % 2**32 for value in values], dtype=np.uint32).view(np.int32)
        )

    def to_numpy(self, array):
        return self._cupy.asnumpy(array)

    def compile(self, function):
        return function

    def synchronize(self):
        self._device.synchronize()


def import_cupy():
    """The module, once a driver and a device are known to be there: CuPy imports without either."""
    try:
        import cupy
    except Exception as error:  # a broken installation fails with more than ImportError
        reason = f"CuPy cannot be imported ({_one_line(error)})"
        remedy = "pip install 'baby_xp[cuda13]', or 'baby_xp[cuda12]' for a driver of CUDA 12; never both"
        raise BackendUnavailable("cupy", reason, remedy) from None
    driver, wheel = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    if driver == 0:
        raise BackendUnavailable("cupy", "no NVIDIA driver was found", NO_DRIVER)
    if driver // 1000 < wheel // 1000:
        reason = f"the driver is for CUDA {driver // 1000}, this CuPy for CUDA {wheel // 1000}"
        raise BackendUnavailable(
            "cupy", reason, f"install cupy-cuda{driver // 1000}x in its place, or a newer driver"
        )
    return cupy


def device_index(cupy, device: str | None) -> int:
    """The number in "cuda:1"; 0 for "cuda" and None."""
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailable("cupy", f"no GPU can be reached ({_one_line(error)})", NO_DRIVER) from None
    kind, _, index = (device or "cuda").partition(":")
    if kind != "cuda" or not (index or "0").isdigit() or int(index or 0) >= count:
        known = ", ".join(f"cuda:{i}" for i in range(count)) or "none"
        raise BackendUnavailable("cupy", f"no device {device!r}", f"devices here: {known}")
    return int(index or 0)


def prove(cupy) -> None:
    """Compile a small kernel and multiply two small matrices: both need libraries that may be missing."""
    try:
        ones = cupy.ones((4, 4), dtype=cupy.float32)
        total = float(cupy.sum((ones + 1) @ ones))
    except Exception as error:
        wheel = f"cupy-cuda{cupy.cuda.runtime.runtimeGetVersion() // 1000}x"
        remedy = f"install CUDA's libraries beside CuPy: pip install '{wheel}[ctk]'"
        raise BackendUnavailable("cupy", f"the GPU cannot compute ({_one_line(error)})", remedy) from None
    if total != 128:
        raise BackendUnavailable(
            "cupy", f"the GPU adds up to {total}, not to 128", "check the card and its driver"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
