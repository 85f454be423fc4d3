"""Backends: an array library, where its arrays live, and what it does to be fast.

A backend is found by name among the entry points of the group "baby_xp.backends", so that a package of its
own can add one. `auto` takes a GPU that works, else NumPy.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from baby_xp import layout
from baby_xp.arrays.namespace import Namespace
from baby_xp.errors import OutOfMemory


@dataclass(frozen=True)
class Memory:
    """Memory of a device of its own, in bytes.

    used: by arrays of this process; held: by it in all, with what it keeps for arrays to come. peak_used and
    peak_held: the most of each so far. free and total: of the device. limit: of `held`, None if there is none.
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
        """What arrays of this process can take in all."""
        most = self.held + self.free
        return most if self.limit is None else min(most, self.limit)


@dataclass(frozen=True)
class Shortage:
    """An array did not fit: on which device, how many bytes it has (None: not told), and the memory then."""

    device: str
    needed: int | None
    memory: Memory


class Backend(Protocol):
    """What the rest of the program asks of a backend. Made by `load(name, device, dtype, **options)`.

    The constructor, `Backend(device, dtype)`, raises BackendUnavailable with reason and remedy where the
    backend cannot work; it proves that it can by computing something small. Whatever else it takes by name is an
    option that `load` passes on.

    Four more methods are there where they have something to tell: `memory() -> Memory` and
    `shortage(error) -> Shortage | None`, of a device with memory of its own and of an error about it;
    `first_use() -> str | None`, of a wait that comes once a machine; `details() -> str`, for the command
    `backends`.
    """

    name: str
    xp: Namespace
    """The namespace for all maths, see namespace.py."""
    dtype: str
    """"float32" or "float64": what asarray makes of floating-point arrays."""
    version: str
    """Name and version of the array library."""
    device: str
    """Where arrays live, in words."""

    def asarray(self, host: np.ndarray) -> Any:
        """Copy a host array to the device: floats in `dtype`, integers as int32, bools as they are."""

    def integers(self, values: list[int]) -> Any:
        """A 1-D int32 array on the device; values are taken modulo 2**32."""

    def to_numpy(self, array: Any) -> np.ndarray:
        """Copy an array to the host. Waits for the device."""

    def compile(self, function: Callable) -> Callable:
        """The pure function, compiled where that helps. Its arguments and results are trees of arrays."""

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""


class Restorable:
    """Base of a backend that is pickled as the arguments that made it, and made anew from them: arrays of a device
    and modules cannot be. A deep copy of what holds a backend shares it."""

    def __new__(cls, *arguments: Any, **options: Any):
        backend = super().__new__(cls)
        backend._made_by = arguments, options
        return backend

    def __reduce__(self):
        return _made_again, (type(self), *self._made_by)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo: Any):
        return self


def _made_again(kind: type, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return kind(*arguments, **options)


def device_memory(backend: Backend) -> Memory | None:
    """Memory of the backend's device, where that is its own."""
    return backend.memory() if hasattr(backend, "memory") else None


def first_use(backend: Backend) -> str | None:
    """What the user should know before the first steps on this machine."""
    return backend.first_use() if hasattr(backend, "first_use") else None


@contextmanager
def translate_out_of_memory(
    backend: Backend, advice: Callable[[Shortage], str] = lambda shortage: ""
) -> Iterator[None]:
    """Turn the array library's own error about memory of its device into OutOfMemory, one line with `advice`."""
    found = None
    try:
        yield
    except Exception as error:
        found = backend.shortage(error) if hasattr(backend, "shortage") else None
        if found is None:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold arrays, and someone may want to try again
    if found is not None:
        raise OutOfMemory(_shortage_told(found), advice(found))


def _shortage_told(found: Shortage) -> str:
    memory = found.memory
    needed = "an array" if found.needed is None else f"an array of {layout.size(found.needed)}"
    limit = "" if memory.limit is None else f", which may hold {layout.size(memory.limit)}"
    pool = f"{layout.size(memory.held)} are held by this process{limit}"
    return f"out of memory on {found.device}: {needed} did not fit, {layout.size(memory.free)} are free, {pool}"
