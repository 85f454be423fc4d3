"""CuPy on an NVIDIA GPU."""

import functools
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from baby_xp_backends import cupy_kernels

from baby_xp import checks
from baby_xp.arrays.backend import Backend, Memory, Shortage
from baby_xp.arrays.namespace import Array, Namespace
from baby_xp.errors import BabyError, BackendUnavailable

NO_DRIVER = "install NVIDIA's driver for the card (nvidia-smi shows whether it works), or use --backend numpy"
GIB = 2**30
WATCHED_CALLS = 2
"""Calls of each compiled function whose allocations are counted. Later ones allocate the same, and counting takes
microseconds for each of the hundreds of allocations of a step."""


class CupyBackend(Backend):
    """Arrays of CuPy, on "cuda" or "cuda:1".

    tf32: products of float32 matrices in TensorFloat-32, which rounds the factors' fractions from 23 bits to
    10. memory_gib: most GPU memory that CuPy's pool may hold, in GiB; none: all there is.

    CuPy has a current device for each thread: every method makes this backend's device the current one of the
    calling thread, so that any thread may use it.
    """

    name = "cupy"

    def __init__(
        self,
        device: str | None = None,
        dtype: str = "float32",
        tf32: bool = False,
        memory_gib: float | None = None,
        kernels: str = "fast",
    ):
        tf32 = checks.flag("tf32", tf32)
        if memory_gib is not None:
            memory_gib = checks.number("memory_gib", memory_gib, above=0, hint="it is in GiB")
        cold = not kernels_are_cached()
        self._cupy = cupy = import_cupy()
        self.dtype, self.tf32, self.kernels = dtype, tf32, kernels
        self._device = cupy.cuda.Device(device_index(cupy, device))
        self._device.use()
        capability = self._device.compute_capability
        if tf32 and int(capability) < 80:
            has = f"{capability[:-1]}.{capability[-1]}"
            needs = "tf32 needs a GPU of compute capability 8.0 or later"
            raise BabyError(f"{needs}, this one has {has}: say --no-tf32")
        self._pool = cupy.get_default_memory_pool()
        limit_pool(self._pool, self._device.id, memory_gib)
        self._here()
        prove(cupy)
        import array_api_compat.cupy as library

        self.xp = Namespace(library, device=self._device, **(self._faster() if kernels == "fast" else {}))
        self.version = f"cupy {cupy.__version__}"
        self._card = cupy.cuda.runtime.getDeviceProperties(self._device.id)["name"].decode()
        self.device = f"cuda:{self._device.id} ({self._card})"
        self._cold, self._watch = cold, make_watch(cupy, self._pool, self._device.id)

    def _faster(self) -> dict[str, Any]:
        """What replaces functions of the library and of ours, and what these replacements need."""
        self.products, launch = Products(self._cupy, self.tf32), Launcher(self._cupy)
        ours = {"launch": launch, "counters": launch.counters, "product": self.products.product}
        ours |= {"kernels": cupy_kernels.KERNELS, "gradients_in_place": True}
        return {"matmul": self.products.matmul, **ours}

    def _here(self) -> None:
        """Make the device current in this thread, and set the precision of products, which all backends share."""
        self._device.use()
        core = self._cupy._core
        kind = core._routines_linalg.COMPUTE_TYPE_TF32 if self.tf32 else core._routines_linalg.COMPUTE_TYPE_DEFAULT
        core.set_compute_type(np.float32, kind)

    def to_device(self, host: np.ndarray) -> Array:
        """Through pinned memory of CuPy's own: the host does not wait for the copy."""
        self._here()
        return self._cupy.array(host)

    def asarrays(self, hosts: Iterable[np.ndarray]) -> list[Array]:
        """One copy for all, where they are of one type."""
        hosts = [self.host_array(host) for host in hosts]
        if len({host.dtype for host in hosts}) > 1:
            return super().asarrays(hosts)
        flat = self.to_device(np.concatenate([host.reshape(-1) for host in hosts]))
        ends = np.cumsum([host.size for host in hosts]).tolist()
        return [flat[end - host.size : end].reshape(host.shape) for host, end in zip(hosts, ends, strict=True)]

    def to_numpy(self, array: Array) -> np.ndarray:
        self._here()
        host: np.ndarray = self._cupy.asnumpy(array)
        return host

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as it is, on this device; its first calls are watched for the memory they take."""
        calls = 0

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            nonlocal calls
            self._here()
            if calls >= WATCHED_CALLS or self._watch.on:
                return function(*arguments)
            calls += 1
            with self._watch:
                return function(*arguments)

        return call

    def synchronize(self) -> None:
        self._device.synchronize()

    def first_use(self) -> str | None:
        """A note before the kernels are compiled, once per machine."""
        return "compiling GPU kernels, once per machine: the first steps take longer" if self._cold else None

    def details(self) -> str:
        """What `backends` adds: driver, CUDA, card, memory, TF32."""
        runtime, capability = self._cupy.cuda.runtime, self._device.compute_capability
        memory = self.memory()
        return (
            f"driver for CUDA {cuda_version(runtime.driverGetVersion())}, "
            f"CUDA runtime {cuda_version(runtime.runtimeGetVersion())}, "
            f"compute capability {capability[:-1]}.{capability[-1]}, "
            f"{memory.free / GIB:.1f} GiB free of {memory.total / GIB:.1f}, TF32 {'on' if self.tf32 else 'off'}"
        )

    def memory(self) -> Memory:
        """Of the device, and of this process's pool. Peaks: see WATCHED_CALLS; what the pool holds only grows."""
        with self._device:
            free, total = self._cupy.cuda.runtime.memGetInfo()
            used, held, limit = self._pool.used_bytes(), self._pool.total_bytes(), self._pool.get_limit()
        self._watch.note(used, held)
        return Memory(used, held, self._watch.used, self._watch.held, free, total, limit or None)

    def shortage(self, error: BaseException) -> Shortage | None:
        """What was missing, if this error of CuPy, cuBLAS or CUDA is about memory of the device; else None."""
        if isinstance(error, self._cupy.cuda.memory.OutOfMemoryError):
            return Shortage(self.device, getattr(error, "_size", None), self.memory())
        if type(error).__name__ in ("CUBLASError", "CUDARuntimeError", "CUDADriverError") and any(
            word in str(error) for word in ("ALLOC_FAILED", "cudaErrorMemoryAllocation", "OUT_OF_MEMORY")
        ):
            return Shortage(self.device, None, self.memory())
        return None


class Launcher:
    """Our kernels: compiled when one is first asked for, for each precision; CuPy does so for each device."""

    def __init__(self, cupy: Any):
        self._cupy = cupy
        self._functions: dict[tuple[str, str], Callable[..., None]] = {}
        self._counters: Array = None

    def __call__(self, name: str, dtype: np.dtype[Any], grid_and_block: Any, *arguments: Any) -> None:
        """Run a kernel. Arrays are contiguous, or their strides are among the arguments; numbers are NumPy scalars
        of the type that the source says.
        """
        key = name, dtype.char
        if key not in self._functions:
            module = self._cupy.RawModule(code=cupy_kernels.source(dtype.name))
            self._functions[key] = module.get_function(name)
        self._functions[key](*grid_and_block, arguments)

    def counters(self, number: int) -> Array:
        """At least that many zeros (int32), for kernels whose blocks count each other: they leave zeros behind."""
        if self._counters is None or self._counters.size < number:
            self._counters = self._cupy.zeros((max(number, 4096),), dtype=np.int32)
        return self._counters


class Products:
    """Matrix products where CuPy's own are slow or ignore TF32.

    One of 3-D by 2-D takes a detour, and a batched one copies a transposed factor and ignores TF32.
    """

    gemm: Callable[..., None]
    """cuBLAS's gemmStridedBatchedEx without its handle. Another may be put in its place, see bench/graph.py."""

    def __init__(self, cupy: Any, tf32: bool):
        self._cupy, self._tf32, cuda = cupy, tf32, cupy.cuda
        self.gemm = lambda *given: cuda.cublas.gemmStridedBatchedEx(cuda.get_cublas_handle(), *given)
        self._factors: dict[tuple[float, str], tuple[np.ndarray, int]] = {}

    def matmul(self, a: Array, b: Array) -> Array:
        """As matmul of the Array API."""
        if b.ndim == 2 and a.ndim > 2:
            flat = self._cupy.matmul(a.reshape(-1, a.shape[-1]), b)
            return flat.reshape(*a.shape[:-1], b.shape[-1])
        alike = a.ndim == b.ndim > 2 and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]
        if alike and a.dtype == b.dtype and a.dtype.name in ("float32", "float64") and a.size and b.size:
            return self.product(a, b)
        return self._cupy.matmul(a, b)

    def product(
        self, a: Array, b: Array, transpose_a: bool = False, transpose_b: bool = False, factor: float = 1.0,
        out: Array = None,
    ) -> Array:  # fmt: skip
        """factor * a @ b for (..., M, K) and (..., K, N) of the same leading axes -> (..., M, N): `out` if given.

        transpose_a, transpose_b: the last two axes of that factor lie the other way round. The rows of matrices
        may lie apart; an array of more axes that is not contiguous is copied.
        """
        a, b = self._readable(a), self._readable(b)
        M, K = a.shape[-2:][::-1] if transpose_a else a.shape[-2:]
        N = b.shape[-2] if transpose_b else b.shape[-1]
        if out is None:
            out = self._cupy.empty((*a.shape[:-2], M, N), dtype=a.dtype)
        cublas, kind = self._cupy.cuda.cublas, a.dtype.name
        of_array, of_sum = self._types(cublas, kind)
        # cuBLAS counts by columns: what it takes for (K, M) is a, and out^T = b^T a^T
        self.gemm(
            cublas.CUBLAS_OP_T if transpose_b else cublas.CUBLAS_OP_N,
            cublas.CUBLAS_OP_T if transpose_a else cublas.CUBLAS_OP_N,
            N, M, K, self._pointer(factor, kind),
            address(b), of_array, distance(b), K * N,
            address(a), of_array, distance(a), M * K, self._pointer(0.0, kind),
            address(out), of_array, distance(out), M * N,
            math.prod(a.shape[:-2]), of_sum, cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip
        return out

    def _readable(self, a: Array) -> Array:
        by_rows = a.ndim == 2 and a.strides[1] == a.itemsize and distance(a) >= a.shape[1]
        return a if by_rows else self._cupy.ascontiguousarray(a)

    def _types(self, cublas: Any, kind: str) -> tuple[int, int]:
        """Of the arrays, and of the arithmetic."""
        runtime = self._cupy.cuda.runtime
        if kind == "float64":
            return runtime.CUDA_R_64F, cublas.CUBLAS_COMPUTE_64F
        return runtime.CUDA_R_32F, cublas.CUBLAS_COMPUTE_32F_FAST_TF32 if self._tf32 else cublas.CUBLAS_COMPUTE_32F

    def _pointer(self, number: float, kind: str) -> int:
        """Where a number lies on the host, from which cuBLAS reads it during the call."""
        if (number, kind) not in self._factors:
            array = np.array(number, dtype=kind)
            self._factors[number, kind] = array, array.ctypes.data
        return self._factors[number, kind][1]


def distance(array: Array) -> int:
    """Of two rows of matrices (..., N, C), in elements."""
    return array.strides[-2] // array.itemsize if array.shape[-2] > 1 else array.shape[-1]


def address(array: Array) -> int:
    """Where an array begins on the device."""
    return int(array.data.ptr)


def make_watch(cupy: Any, pool: Any, device: int) -> Any:
    """A hook that follows the pool's memory on one device while it is on, and knows the peaks."""

    class Watch(cupy.cuda.MemoryHook):
        name = "baby_xp"
        on, used, held, _now = False, 0, 0, 0

        def __enter__(self) -> Any:
            self.on, self._now = True, pool.used_bytes()
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            self.on = False
            self.note(self._now, pool.total_bytes())

        def malloc_postprocess(self, **of: Any) -> None:
            if of["device_id"] == device and of["mem_ptr"]:
                self._now += of["mem_size"]
                self.used = max(self.used, self._now)

        def free_postprocess(self, **of: Any) -> None:
            if of["device_id"] == device:
                self._now -= of["mem_size"]

        def note(self, used: int, held: int) -> None:
            self.used, self.held = max(self.used, used), max(self.held, held)

    return Watch()


_limits_before: dict[int, int] = {}


def limit_pool(pool: Any, device: int, memory_gib: float | None) -> None:
    """Limit the pool on the current device; None: as it was before anyone limited it here."""
    if memory_gib is not None:
        _limits_before.setdefault(device, pool.get_limit())
        pool.set_limit(size=round(memory_gib * GIB))
    elif device in _limits_before:
        pool.set_limit(size=_limits_before.pop(device))


def kernels_are_cached() -> bool:
    """Whether CuPy has compiled anything on this machine before."""
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache").expanduser()
    return folder.is_dir() and any(folder.iterdir())


def cuda_version(number: int) -> str:
    """CUDA's number of a version in words: 12090 -> "12.9"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def import_cupy() -> Any:
    """The module, once a driver and a device are known to be there: CuPy imports without either."""
    try:
        import cupy
    except Exception as error:  # a broken installation fails with more than ImportError
        reason = f"CuPy cannot be imported ({_one_line(error)})"
        remedy = "pip install -e '.[cuda13]', or '.[cuda12]' for a driver of CUDA 12; never both"
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


def device_index(cupy: Any, device: str | None) -> int:
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


def prove(cupy: Any) -> None:
    """Compile a small kernel and multiply two small matrices: both need libraries that may be missing."""
    try:
        ones = cupy.ones((4, 4), dtype=cupy.float32)
        total = float(cupy.sum((ones + 1) @ ones))
    except cupy.cuda.memory.OutOfMemoryError as error:
        remedy = "nvidia-smi shows what holds the GPU's memory; a memory limit may also be too low"
        raise BackendUnavailable("cupy", f"not even a small array fits ({_one_line(error)})", remedy) from None
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
