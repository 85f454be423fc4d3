"""PyTorch, as an array library alone: no autograd, no modules. It checks the maths, and its GPU can run it."""

from baby_xp.arrays.backend import Backend
from baby_xp.arrays.namespace import Array, Namespace
from baby_xp.errors import BackendUnavailable


class TorchBackend(Backend):
    """Arrays of PyTorch, on "cpu", "cuda" or any device that it knows."""

    name = "torch"

    def __init__(self, device: str | None = None, dtype: str = "float32", kernels: str = "fast"):
        try:
            import array_api_compat.torch as library
            import torch
        except ImportError as error:
            raise BackendUnavailable(
                "torch", f"PyTorch cannot be imported ({error})", "pip install -e '.[torch]'"
            ) from None
        self._torch, self.dtype, self.kernels = torch, dtype, kernels
        try:
            self._device = torch.zeros(1, device=device or "cpu").device
        except (RuntimeError, AssertionError) as error:
            reason = f"no device {device!r} ({' '.join(str(error).split('.')[0].split())})"
            raise BackendUnavailable(
                "torch", reason, "leave out --device, or install a PyTorch built for it"
            ) from None
        self.xp = Namespace(library, device=self._device, take_along_axis=self._take_along_axis)
        self.version, self.device = f"torch {torch.__version__}", str(self._device)

    def _take_along_axis(self, x: Array, indices: Array, *, axis: int = -1) -> Array:
        # PyTorch gathers only with int64 indices
        return self._torch.take_along_dim(x, indices.long(), dim=axis)

    def to_device(self, host: Array) -> Array:
        return self._torch.tensor(host, device=self._device)

    def to_numpy(self, array: Array) -> Array:
        return array.cpu().numpy()

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize(self._device)
