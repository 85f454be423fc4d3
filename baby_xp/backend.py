"""Backends: an array library, where its arrays live, and what it does to be fast.

A backend is found by name among the entry points of the group "baby_xp.backends", so that a package of its
own can add one. `auto` takes a GPU that works, else NumPy.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from baby_xp.errors import BabyError, BackendUnavailable
from baby_xp.namespace import Namespace

GROUP = "baby_xp.backends"


class Backend(Protocol):
    """What the rest of the program asks of a backend. Made by `load(name, device, dtype)`.

    The constructor, `Backend(device, dtype)`, raises BackendUnavailable with reason and remedy where the
    backend cannot work; it proves that it can by computing something small.
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


@dataclass(frozen=True)
class State:
    """What `backends` shows of one: whether it works, and if not, why and what to do."""

    name: str
    works: bool
    version: str
    device: str
    reason: str = ""
    remedy: str = ""


def names() -> list[str]:
    """Names of all registered backends, NumPy first."""
    found = {point.name for point in importlib.metadata.entry_points(group=GROUP)}
    return sorted(found, key=lambda name: (name != "numpy", name != "cupy", name))


def load(name: str = "auto", device: str | None = None, dtype: str = "float32") -> Backend:
    """The backend of that name. Raises BabyError for an unknown one, BackendUnavailable if it cannot work."""
    if name == "auto":
        return choose(device, dtype)[0]
    points = importlib.metadata.entry_points(group=GROUP, name=name)
    if not points:
        raise BabyError(f"unknown backend {name!r}: choose one of auto, {', '.join(names())}")
    return next(iter(points)).load()(device=device, dtype=dtype)


def choose(device: str | None = None, dtype: str = "float32") -> tuple[Backend, str]:
    """What `auto` takes, and why: CuPy where a GPU works, else NumPy."""
    try:
        backend = load("cupy", device, dtype)
        return backend, f"a working GPU: {backend.device}"
    except BackendUnavailable as error:
        if device not in (None, "cpu"):
            raise
        return load("numpy", device, dtype), f"no GPU to use ({error.reason})"
    except Exception as error:  # what is broken must not stand in the way of what works
        if device not in (None, "cpu"):
            raise BackendUnavailable("cupy", _told(error), "reinstall CuPy, or use --backend numpy") from None
        return load("numpy", device, dtype), f"no GPU to use ({_told(error)})"


def states() -> list[State]:
    """The state of every registered backend; never raises because one cannot work."""
    return [_state(name) for name in names()]


def _state(name: str) -> State:
    try:
        backend = load(name)
        return State(name, True, backend.version, backend.device)
    except BackendUnavailable as error:
        return State(name, False, "", "", error.reason, error.remedy)
    except Exception as error:  # a backend of another package, or a broken library: say so, and list the rest
        return State(name, False, "", "", _told(error), "reinstall the library it needs")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
