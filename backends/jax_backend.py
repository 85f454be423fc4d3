"""JAX: the same pure functions, traced and compiled by XLA."""

from collections.abc import Callable
from typing import Any

import numpy as np

from baby_xp.arrays.backend import Backend
from baby_xp.arrays.namespace import Array, Namespace
from baby_xp.errors import BackendUnavailable


class JaxBackend(Backend):
    """Arrays of JAX, on its default device or on "cpu", "gpu", "gpu:1"."""

    name = "jax"

    def __init__(self, device: str | None = None, dtype: str = "float32", kernels: str = "fast"):
        try:
            import jax
            import jax.numpy as library
        except ImportError as error:
            raise BackendUnavailable(
                "jax", f"JAX cannot be imported ({error})", "pip install -e '.[jax]'"
            ) from None
        if dtype == "float64":
            jax.config.update("jax_enable_x64", True)  # for the whole process: float32 arrays stay float32
        self._jax, self.dtype, self.kernels = jax, dtype, kernels
        kind, _, index = (device or "").partition(":")
        try:
            self._device = jax.devices(kind or None)[int(index or 0)]
        except (RuntimeError, IndexError, ValueError) as error:
            reason = f"no device {device!r} ({' '.join(str(error).split())})"
            raise BackendUnavailable(
                "jax", reason, "leave out --device, or install a JAX built for it"
            ) from None
        # for the whole process: JAX's own choice for float32 on a GPU is TF32
        jax.config.update("jax_default_matmul_precision", "highest")
        # under jit the device is where the arguments are; outside it, uncommitted arrays follow them
        self.xp = Namespace(library, device=None if device is None else self._device)
        self.version, self.device = f"jax {jax.__version__}", str(self._device)

    def to_device(self, host: np.ndarray) -> Array:
        return self._jax.device_put(host, self._device)

    def to_numpy(self, array: Array) -> np.ndarray:
        return np.asarray(array)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = self._jax.jit(function)
        return compiled

    def synchronize(self) -> None:
        self._jax.block_until_ready(self._jax.numpy.zeros(1, device=self._device) + 1)
