"""Backends: an array library, the device of its arrays, and its faster functions.

A backend is found by name among the entry points of the group "baby_xp.backends", so that another
package can add one. `auto` selects a working GPU, otherwise NumPy.
"""

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from baby_xp import layout
from baby_xp.arrays.namespace import Array, Namespace
from baby_xp.errors import OutOfMemory


@dataclass(frozen=True)
class Memory:
    """Memory of a device that has its own, in bytes.

    used: by arrays of this process; held: by the process in all, including what it keeps for later arrays.
    peak_used, peak_held: the largest value of each so far. free, total: of the device. limit: of `held`, None if
    there is none.
    """

    used: int
    held: int
    peak_used: int
    peak_held: int
    free: int
    total: int
    limit: int | None = None

    @property
    def room(self) -> int:
        """The most that arrays of this process can take."""
        most = self.held + self.free
        return most if self.limit is None else min(most, self.limit)


@dataclass(frozen=True)
class Shortage:
    """An array did not fit: the device, the array's bytes (None: unknown), and the state of the memory."""

    device: str
    needed: int | None
    memory: Memory


class Backend:
    """What the rest of the program asks of a backend, with defaults for what many do not need.

    The constructor of a subclass takes device and dtype. It checks by a small computation that the backend works,
    and raises BackendUnavailable with reason and remedy if it does not. Its other arguments are options that
    `load` passes on; a backend that has replacements takes kernels, "fast" or "plain", NumPy's "numpy" too.

    A backend is pickled as its constructor's arguments and created again from them, because device arrays and
    modules cannot be pickled. A deep copy of what holds a backend shares it.
    """

    name: str
    xp: Namespace
    """The namespace for all maths, see namespace.py."""
    dtype: str
    """"float32" or "float64": what asarray makes of floating-point arrays."""
    version: str
    """Name and version of the array library."""
    device: str
    """The device that holds the arrays, as text."""
    kernels: str = "fast"
    """Which functions of ours it replaces: as `load` was asked, see there."""
    chosen_because: str = ""
    """Why `auto` selected this backend, if it did."""

    def to_device(self, host: np.ndarray) -> Array:
        """Copy a host array to the device as it is."""
        raise NotImplementedError

    def to_numpy(self, array: Array) -> np.ndarray:
        """A host array of the same values, which may share memory with `array`. Waits for the device."""
        raise NotImplementedError

    def asarray(self, host: np.ndarray) -> Array:
        """Copy a host array to the device: floats in `dtype`, integers as int32, bools as they are."""
        return self.to_device(self.host_array(host))

    def asarrays(self, hosts: Iterable[np.ndarray]) -> list[Array]:
        """Copy several host arrays to the device, as asarray does; the results may share memory."""
        return [self.asarray(host) for host in hosts]

    def host_array(self, host: np.ndarray) -> np.ndarray:
        """The array in the type that it will have on the device."""
        host = np.asarray(host)
        return np.asarray(host, dtype={"f": self.dtype, "b": "bool"}.get(host.dtype.kind, "int32"))

    def integers(self, values: list[int]) -> Array:
        """A 1-D int32 array on the device; values are taken modulo 2**32."""
        return self.to_device(np.array([value % 2**32 for value in values], dtype=np.uint32).view(np.int32))

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The pure function, compiled where that helps. Its arguments and results are trees of arrays."""
        return function

    def synchronize(self) -> None:
        """Wait until the device has finished all work."""

    def memory(self) -> Memory | None:
        """Memory of the device, where that is its own."""
        return None

    def shortage(self, error: BaseException) -> Shortage | None:
        """What was missing, if this error is about memory of the device."""
        return None

    def before_workers(self) -> None:
        """Compile kernels that are not compiled yet: worker processes, which start next, then only load them."""

    def first_use(self) -> str | None:
        """A note for the user before the first steps on this machine."""
        return None

    def details(self) -> str:
        """Details for the command `backends`."""
        return ""

    def __new__(cls, *arguments: Any, **options: Any) -> "Backend":
        backend = super().__new__(cls)
        backend._made_by = arguments, options
        return backend

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (getattr(self, "_kind", type(self)), *self._made_by)

    def __copy__(self) -> "Backend":
        return self

    def __deepcopy__(self, memo: Any) -> "Backend":
        return self

    _made_by: tuple[tuple[Any, ...], dict[str, Any]]


def _made_again(kind: type, arguments: tuple[Any, ...], options: dict[str, Any]) -> Backend:
    return with_defaults(kind)(*arguments, **options)


def with_defaults(kind: type) -> type[Backend]:
    """A class of backends of another package, with Backend's defaults for the methods that it lacks."""
    return kind if issubclass(kind, Backend) else type(kind.__name__, (kind, Backend), {"_kind": kind})


@contextmanager
def translate_out_of_memory(
    backend: Backend, advice: Callable[[Shortage], str] = lambda shortage: ""
) -> Iterator[None]:
    """Turn the array library's own error about memory of its device into OutOfMemory, one line with `advice`."""
    found = None
    try:
        yield
    except Exception as error:
        found = backend.shortage(error)
        if found is None:
            raise
        traceback.clear_frames(error.__traceback__)  # they keep arrays alive, and the caller may want to try again
    if found is not None:
        raise OutOfMemory(_describe(found), advice(found))


def _describe(found: Shortage) -> str:
    memory = found.memory
    needed = "an array" if found.needed is None else f"an array of {layout.size(found.needed)}"
    limit = "" if memory.limit is None else f", which may hold {layout.size(memory.limit)}"
    pool = f"{layout.size(memory.held)} are held by this process{limit}"
    return f"out of memory on {found.device}: {needed} did not fit, {layout.size(memory.free)} are free, {pool}"
