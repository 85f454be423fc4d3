"""As much of CuPy as the backend uses, on the CPU: to test without a GPU what does not need one.

Arrays are NumPy's, kernels are compiled by the machine's C++ compiler from the very source that a GPU gets (see
cuda_on_cpu.h), and cuBLAS's batched product is read off its pointers. It is stricter than CuPy where that finds
mistakes: new arrays hold no number, what lies beside an array is watched, arguments of a kernel must have its
types, and arrays must be on the current device. The memory is a pool that counts, with a limit and CuPy's error.
It counts launches, copies from the host, and what makes the host wait.

What only a GPU can show is not here: speed, CuPy's own functions, and what really runs at once.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import math
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import types
import weakref
from pathlib import Path
from unittest import mock

import array_api_compat.numpy
import fake_nccl
import numpy as np

from baby_xp.arrays import registry
from baby_xp.errors import BackendUnavailable

SHIM = Path(__file__).with_name("cuda_on_cpu.h")
PROBLEMS = {
    1: "arguments of other types than the kernel's",
    2: "a barrier that not all threads come to",
    3: "a shuffle with a thread that has ended",
}
GUARD = 64
"""Bytes before and after each array that nothing may write to."""


def compiler() -> str | None:
    """A C++ compiler, or None; the shim's coroutines were tried on Linux alone."""
    if sys.platform != "linux":
        return None
    return next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


# devices ------------------------------------------------------------------------------------------------


class Machine:
    """The devices: how many, their memory, and which one is current in each thread."""

    def __init__(self, devices: int = 1, memory: int = 2**34, capability: str = "90"):
        self.devices, self.size, self.capability = devices, memory, capability
        self.threads = threading.local()
        self.used, self.held = [0] * devices, [0] * devices
        self.limits = [0] * devices
        self.falling = False
        self.stream = 0  # the current one
        self.launched: list[tuple[str, int]] = []  # name and device, of our kernels and CuPy's functions
        self.synchronized, self.copied = 0, 0  # times that the host waited, copies from the host
        self.captured: list | None = None  # what a graph repeats, while one is captured

    @property
    def current(self) -> int:
        return getattr(self.threads, "device", 0)

    def launch(self, name: str, times: int = 1) -> None:
        """Count launches, but not those within a function that is one of CuPy's own."""
        if not getattr(self.threads, "within", False):
            self.launched += [(name, self.current)] * times

    def record(self, work) -> None:
        """Keep work that has been done for the graph that is captured, if one is."""
        if self.captured is not None and not getattr(self.threads, "within", False):
            self.captured.append(work)

    def refuse_capture(self, what: str) -> None:
        """As CUDA, or CuPy before it, does."""
        if self.captured is not None:
            raise CUDARuntimeError(f"{what} while a stream is captured")

    @contextlib.contextmanager
    def one_function(self):
        """All that is called within counts as one function."""
        before = getattr(self.threads, "within", False)
        self.threads.within = True
        try:
            yield
        finally:
            self.threads.within = before

    @property
    def hooks(self) -> dict:
        if not hasattr(self.threads, "hooks"):
            self.threads.hooks = {}
        return self.threads.hooks

    def take(self, array: "Array", size: int) -> None:
        """Count the memory of a new array, or raise as CuPy does."""
        device, size = self.current, -(-max(1, size) // 512) * 512
        used, limit = self.used[device] + size, self.limits[device] or self.size
        if used > min(limit, self.size):
            raise OutOfMemoryError(size, self.held[device], self.limits[device])
        self.used[device], self.held[device] = used, max(self.held[device], used)
        if self.captured is not None:
            self.captured.append(lambda: array)  # what a graph uses stays
        for hook in self.hooks.values():
            hook.malloc_postprocess(device_id=device, size=size, mem_size=size, mem_ptr=1, pmem_id=1)
        weakref.finalize(array, self.give_back, device, size)

    def give_back(self, device: int, size: int) -> None:
        self.used[device] -= size
        for hook in self.hooks.values():
            hook.free_postprocess(device_id=device, mem_size=size, mem_ptr=1, pmem_id=1)


class OutOfMemoryError(MemoryError):
    """With the text and the attributes of CuPy's."""

    def __init__(self, size, total, limit=0):
        self._size, self._total, self._limit = size, total, limit
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes).")


class CUDARuntimeError(RuntimeError):
    pass


# arrays -------------------------------------------------------------------------------------------------


class Array(np.ndarray):
    """An array that knows its device."""

    machine: Machine | None = None
    where: int | None = None
    memory = None

    def __array_finalize__(self, parent):
        self.machine, self.where = getattr(parent, "machine", None), getattr(parent, "where", None)
        if self.machine is not None and self.base is None:  # no view: what an operator gives
            self.machine.take(self, self.nbytes)

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **named):
        """An operator is a launch; its result is an array on the current device."""
        machine = self.machine or next(x.machine for x in inputs if getattr(x, "machine", None))
        check_devices(machine, inputs)
        machine.launch(ufunc.__name__)
        plain = [x.view(np.ndarray) if isinstance(x, Array) else x for x in inputs]
        if out is not None:
            named["out"] = tuple(x.view(np.ndarray) for x in out)
        result = getattr(ufunc, method)(*plain, **named)
        result = adopted(machine, result) if out is None else out[0]
        machine.record(lambda: overwrite(result, getattr(ufunc, method)(*plain, **named)))
        return result

    def __getitem__(self, key):
        self._selected(key)
        found = super().__getitem__(key)
        return adopted(self.machine, found) if isinstance(found, np.generic) else found

    def __setitem__(self, key, value):
        self._selected(key)
        if self.machine is not None:
            self.machine.launch("copy")
            self.machine.record(lambda: self.view(np.ndarray).__setitem__(key, value))
        if self.machine is None or self.machine.captured is None:  # else nothing that exists may change
            super().__setitem__(key, value)

    def set(self, host):
        """Overwrite with an array of the host."""
        self.machine.refuse_capture("a copy from the host")
        self.machine.copied += 1
        overwrite(self, host)

    def _selected(self, key) -> None:
        """The size of what booleans select is known to the device alone."""
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(one, np.ndarray) and one.dtype == bool for one in keys):
            self.machine.synchronized += 1


def waiting(name: str):
    """A method of arrays that reads a value, for which the host waits."""

    def method(self, *arguments):
        self.machine.synchronized += 1
        return getattr(np.ndarray, name)(self, *arguments)

    return method


for reading in ("__float__", "__int__", "__index__", "__bool__", "item", "tolist"):
    setattr(Array, reading, waiting(reading))


def new_array(machine: Machine, shape, dtype) -> Array:
    """An array that holds no number yet, with guards on both sides."""
    dtype = np.dtype(dtype)
    size = math.prod(np.atleast_1d(shape).tolist()) * dtype.itemsize
    memory = np.full(size + 2 * GUARD, 0xA5, np.uint8)
    array = memory[GUARD : GUARD + size].view(dtype).reshape(shape).view(Array)
    array[...] = {"f": np.nan, "i": -77, "u": 77, "b": True}[dtype.kind]
    array.machine, array.where, array.memory = machine, machine.current, memory
    machine.take(array, size)
    return array


def adopted(machine: Machine, value):
    """What a NumPy function gave, as CuPy would give it: arrays on the current device, no scalars."""
    if isinstance(value, tuple):
        return tuple(adopted(machine, one) for one in value)
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or (isinstance(value, Array) and value.where is not None):
        return value
    array = value.view(Array)
    array.machine, array.where = machine, machine.current
    if value.base is None:
        machine.take(array, value.nbytes)
    return array


def overwrite(array: Array, values) -> None:
    array.view(np.ndarray)[...] = values


def is_view(array: Array, of: list[Array]) -> bool:
    return any(np.may_share_memory(array, other) for other in of)


def check_devices(machine: Machine, values) -> None:
    for value in values:
        if isinstance(value, Array) and value.where not in (None, machine.current):
            raise RuntimeError(f"array of device {value.where} while {machine.current} is current")


def wrapped(machine: Machine, function, name: str):
    """A function of the namespace, as one launch, unless it only gives a view."""

    @functools.wraps(function)
    def call(*arguments, **named):
        named.pop("device", None)
        several = arguments[0] if arguments and isinstance(arguments[0], list | tuple) else ()
        check_devices(machine, [*arguments, *several])
        arrays = [given for given in (*arguments, *several) if isinstance(given, Array)]
        with machine.one_function():
            result = adopted(machine, function(*arguments, **named))
        if isinstance(result, np.ndarray) and not is_view(result, arrays):
            machine.record(lambda: overwrite(result, function(*arguments, **named)))
        if name == "clip":  # array-api-compat's own, which selects by booleans
            machine.launch(name, 12)
            machine.synchronized += 4
        elif name == "concat":
            # in one launch, with the addresses copied from the host, or one by one
            machine.launch(name, 1 if len(several) > 8 else len(several))
            machine.copied += 3 if len(several) > 8 else 0
        elif name in ("asarray", "array") and not arrays:
            machine.copied += 1
        elif isinstance(result, np.ndarray) and result.size and not is_view(result, arrays):
            machine.launch(name)
        return result

    return call


# kernels ------------------------------------------------------------------------------------------------


@functools.cache
def library(code: str):
    """The compiled source, with a function run_NAME for each kernel."""
    typed = "int count, void** values, const char* kinds, const int* sizes, const int* grid, const int* block"
    runs = []
    for name, text in re.findall(r"__global__ void (\w+)\((.*?)\n}\n", code, re.DOTALL):
        waits = int(bool(re.search(r"warp_|block_is|__sync|__shfl", text)))  # else its threads need no coroutines
        call = f"launch({name}, count, values, kinds, sizes, grid, block, falling, {waits})"
        runs.append(f'extern "C" int run_{name}({typed}, int falling) {{ return {call}; }}')
    folder = Path(tempfile.mkdtemp(prefix="baby_xp_kernels_"))
    weakref.finalize(library, shutil.rmtree, folder, ignore_errors=True)
    source, built = folder / "kernels.cpp", folder / f"{hashlib.sha1(code.encode()).hexdigest()}.so"
    source.write_text("\n".join([f'#include "{SHIM}"', code, *runs]), "utf-8")
    # no contraction to fused operations: a * b + c rounds twice, as in NumPy
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-w", "-U_FORTIFY_SOURCE"]
    subprocess.run([compiler(), *flags, str(source), "-o", str(built)], check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(built))


RUNNING = threading.Lock()
"""Held while a kernel runs: cuda_on_cpu.h runs one at a time."""


class RawModule:
    machine: Machine

    def __init__(self, *, code: str):
        self.code = code

    def get_function(self, name: str):
        run = getattr(library(self.code), f"run_{name}")
        machine = self.machine

        def kernel(grid, block, arguments):
            check_devices(machine, arguments)
            machine.launch(name)
            kinds, sizes, values = zip(*map(argument, arguments), strict=True)
            triple = lambda given: (ctypes.c_int * 3)(*(*given, 1, 1)[:3])  # noqa: E731
            assert min(*grid, *block) > 0
            assert math.prod(block) <= 1024
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            given = len(values), pointers, "".join(kinds).encode(), (ctypes.c_int * len(sizes))(*sizes)
            with RUNNING:
                problem = run(*given, triple(grid), triple(block), int(machine.falling))
            assert problem == 0, f"{name}: {PROBLEMS[problem]}"
            check_guards(name, arguments)
            machine.record(lambda: (values, arguments, run(*given, triple(grid), triple(block), 0)))

        return kernel


SCALARS = {
    "int32": ctypes.c_int32, "int64": ctypes.c_int64, "uint32": ctypes.c_uint32, "float32": ctypes.c_float,
    "float64": ctypes.c_double,
}  # fmt: skip


def argument(given):
    """Kind, size and value of an argument, as CuPy hands it over."""
    if given is None:
        return "p", 8, ctypes.c_void_p(0)
    if isinstance(given, np.ndarray):
        assert isinstance(given, Array), "a kernel was given an array of the host"
        beside = given.size == 0 or given.strides[-1] == given.itemsize
        assert given.flags.c_contiguous or beside, "a kernel was given a view, whose strides it does not know"
        return "p", 8, ctypes.c_void_p(given.ctypes.data)
    return given.dtype.kind, given.dtype.itemsize, SCALARS[given.dtype.name](given.item())


def check_guards(name: str, arguments) -> None:
    for given in arguments:
        memory = getattr(given, "memory", None)
        if memory is not None:
            assert (memory[:GUARD] == 0xA5).all(), f"{name} wrote before an array"
            assert (memory[-GUARD:] == 0xA5).all(), f"{name} wrote behind an array"


# cuBLAS -------------------------------------------------------------------------------------------------

CUBLAS = {
    "CUBLAS_OP_N": 0, "CUBLAS_OP_T": 1, "CUBLAS_GEMM_DEFAULT": -1, "CUBLAS_COMPUTE_32F": 68,
    "CUBLAS_COMPUTE_32F_FAST_TF32": 77, "CUBLAS_COMPUTE_64F": 70,
}  # fmt: skip


def to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 with 10 bits of its fraction."""
    return ((x.view(np.uint32) + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)


def gemm_strided_batched(
    machine, handle, trans_a, trans_b, m, n, k, alpha, a, type_a, lda, stride_a, b, type_b, ldb, stride_b, beta, c,
    type_c, ldc, stride_c, count, compute, algo,
):  # fmt: skip
    """cublasGemmStridedBatchedEx: column by column, C = alpha op(A) op(B) + beta C, for each of a batch."""
    kind = {0: np.float32, 1: np.float64}[type_a]
    assert type_a == type_b == type_c
    assert compute in {np.float32: (68, 77), np.float64: (70,)}[kind]
    scalar = lambda pointer: np.ctypeslib.as_array((ctypes.c_byte * 8).from_address(pointer))  # noqa: E731
    factor, keep = (scalar(pointer)[: np.dtype(kind).itemsize].view(kind)[0] for pointer in (alpha, beta))
    assert keep == 0

    def matrix(pointer, rows, columns, leading, stride, i):
        assert leading >= rows
        kind_c = ctypes.c_float if kind is np.float32 else ctypes.c_double
        size = leading * (columns - 1) + rows
        flat = np.ctypeslib.as_array((kind_c * size).from_address(pointer + i * stride * np.dtype(kind).itemsize))
        strides = (flat.itemsize, leading * flat.itemsize)
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), strides)

    machine.launch("gemm")
    given = trans_a, trans_b, m, n, k, alpha, a, type_a, lda, stride_a, b, type_b, ldb, stride_b
    given += beta, c, type_c, ldc, stride_c, count, compute, algo
    machine.record(lambda: gemm_strided_batched(machine, handle, *given))
    for i in range(count):
        of_a = matrix(a, *((k, m) if trans_a else (m, k)), lda, stride_a, i)
        of_b = matrix(b, *((n, k) if trans_b else (k, n)), ldb, stride_b, i)
        x, y = (of_a.T if trans_a else of_a), (of_b.T if trans_b else of_b)
        if compute == 77:
            x, y = to_tf32(np.ascontiguousarray(x)), to_tf32(np.ascontiguousarray(y))
        matrix(c, m, n, ldc, stride_c, i)[...] = factor * (x @ y)


def backend(machine: Machine | None = None, device: str | None = None, dtype: str = "float32", **options):
    """The CuPy backend on such a machine. Raises BackendUnavailable where there is no compiler."""
    if compiler() is None:
        raise BackendUnavailable("cupy kernels", "no C++ compiler on Linux to run them with", "install g++")
    with mock.patch.dict(sys.modules, modules(machine or Machine())):
        return registry.load("cupy", device, dtype, **options)


# the module ---------------------------------------------------------------------------------------------


def modules(machine: Machine) -> dict[str, types.ModuleType]:
    """What to put into sys.modules: cupy, and array_api_compat's form of it."""
    namespace = types.ModuleType("array_api_compat.cupy")
    for name in dir(array_api_compat.numpy):
        value = getattr(array_api_compat.numpy, name)
        is_type = isinstance(value, type)
        vars(namespace)[name] = wrapped(machine, value, name) if callable(value) and not is_type else value

    def empty(shape, dtype=None, device=None):
        return new_array(machine, shape, dtype or np.float64)

    def ascontiguousarray(x):
        if x.flags.c_contiguous:
            return x
        copy = new_array(machine, x.shape, x.dtype)
        copy[...] = x  # a launch
        return copy

    namespace.empty, namespace.ascontiguousarray = empty, ascontiguousarray
    namespace.empty_like = lambda x: new_array(machine, x.shape, x.dtype)
    cupy = types.ModuleType("cupy")
    taken = ("empty", "ascontiguousarray", "matmul", "sum", "ones", "zeros")
    vars(cupy).update({name: vars(namespace)[name] for name in taken})

    def array(host):
        copy = new_array(machine, host.shape, host.dtype)
        with machine.one_function():
            copy[...] = host
        machine.refuse_capture("a copy from the host")
        machine.copied += 1
        return copy

    def asnumpy(x):
        check_devices(machine, [x])
        machine.refuse_capture("a copy to the host")
        machine.synchronized += 1
        return np.array(x)

    cupy.array, cupy.asnumpy, cupy.float32, cupy.__version__ = array, asnumpy, np.float32, "14.2.0 on the CPU"
    cupy.RawModule = type("RawModule", (RawModule,), {"machine": machine})
    cupy.get_default_memory_pool = lambda: _pool(machine)
    cupy.cuda = _cuda(machine)
    compute_types = types.SimpleNamespace(COMPUTE_TYPE_DEFAULT=1, COMPUTE_TYPE_TF32=7)
    machine.compute_type = 0
    cupy._core = types.SimpleNamespace(
        _routines_linalg=compute_types, set_compute_type=lambda dtype, kind: setattr(machine, "compute_type", kind)
    )
    nvmath = types.ModuleType("nvmath.bindings")
    nvmath.cublas = types.SimpleNamespace(
        create=lambda: 7, set_stream=lambda handle, stream: None, set_workspace=lambda handle, at, size: None,
        gemm_strided_batched_ex=functools.partial(gemm_strided_batched, machine),
    )  # fmt: skip
    fakes = {"array_api_compat.cupy": namespace, "nvmath.bindings": nvmath}
    return {"cupy": cupy, "cupy.cuda": cupy.cuda, **fakes}


def _pool(machine: Machine):
    def set_limit(size=None):
        machine.limits[machine.current] = size

    return types.SimpleNamespace(
        used_bytes=lambda: machine.used[machine.current], total_bytes=lambda: machine.held[machine.current],
        get_limit=lambda: machine.limits[machine.current], set_limit=set_limit,
    )  # fmt: skip


def _cuda(machine: Machine):
    class Device(contextlib.AbstractContextManager):
        def __init__(self, index=None):
            self.id = machine.current if index is None else int(index)
            self.before = []

        def __int__(self):
            return self.id

        def use(self):
            machine.threads.device = self.id
            return self

        def __enter__(self):
            self.before.append(machine.current)
            return self.use()

        def __exit__(self, *error):
            machine.threads.device = self.before.pop()

        def synchronize(self):
            machine.synchronized += 1

        compute_capability = property(lambda self: machine.capability)
        pci_bus_id = property(lambda self: f"0000:{self.id:02X}:00.0")

    class MemoryHook:
        def __enter__(self):
            machine.hooks[self.name] = self
            return self

        def __exit__(self, *error):
            del machine.hooks[self.name]

    class Stream(contextlib.nullcontext):
        def __init__(self, non_blocking):
            super().__init__()
            self.ptr = 1

        def synchronize(self):
            machine.refuse_capture("a wait")
            machine.synchronized += 1

        def begin_capture(self):
            machine.captured = []

        def end_capture(self):
            works, machine.captured = machine.captured, None
            return types.SimpleNamespace(launch=lambda stream: [work() for work in works])

    count = itertools.count(1)
    handles = {}
    runtime = types.SimpleNamespace(
        CUDA_R_32F=0, CUDA_R_64F=1, CUDARuntimeError=CUDARuntimeError, driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 12090, getDeviceCount=lambda: machine.devices,
        getDeviceProperties=lambda index: {"name": f"Pretended GPU {index}".encode()},
        memGetInfo=lambda: (machine.size - machine.held[machine.current], machine.size),
    )  # fmt: skip
    def gemm(*given):
        machine.refuse_capture("a call of cuBLAS")
        gemm_strided_batched(machine, *given)

    return types.SimpleNamespace(
        Device=Device, MemoryHook=MemoryHook, Stream=Stream, runtime=runtime,
        MemoryPool=lambda: types.SimpleNamespace(malloc=None), using_allocator=contextlib.nullcontext,
        memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        cublas=types.SimpleNamespace(**CUBLAS, gemmStridedBatchedEx=gemm),
        get_cublas_handle=lambda: handles.setdefault(machine.current, next(count)),
        get_current_stream=lambda: types.SimpleNamespace(ptr=machine.stream), nccl=fake_nccl.module(machine),
    )  # fmt: skip
