"""The registered backends: by name, or the best one that works here.

A backend is found among the entry points of the group "baby_xp.backends", so that another package can add one.
"""

import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from baby_xp import checks
from baby_xp.arrays.backend import Backend, with_defaults
from baby_xp.errors import BabyError, BackendUnavailable

GROUP = "baby_xp.backends"


@dataclass(frozen=True)
class State:
    """The state of a backend for the command `backends`: whether it works, and if not, why and what to do."""

    name: str
    works: bool
    version: str
    device: str
    reason: str = ""
    remedy: str = ""
    details: str = ""


def names() -> list[str]:
    """Names of all registered backends, NumPy first."""
    found = {point.name for point in importlib.metadata.entry_points(group=GROUP)}
    return sorted(found, key=lambda name: (name != "numpy", name != "cupy", name))


def load(
    name: str = "auto",
    device: str | None = None,
    dtype: str = "float32",
    kernels: str = "fast",
    **options: Any,
) -> Backend:
    """The backend of that name. Raises BabyError for an unknown one, BackendUnavailable if it cannot work.

    dtype: "float32" or "float64". kernels: "fast", "plain" for a backend that replaces no function of ours, or
    "numpy" for the backend of that name without what numba compiles.
    options: those of one kind of backend, such as CuPy's tf32 and memory_gib; None and False stand for one that is
    not given. BabyError for one that the backend does not have.
    """
    name = checks.text("backend", name)
    device = None if device is None else checks.text("device", device)
    dtype = checks.choice("dtype", dtype, ("float32", "float64"))
    kernels = checks.choice("kernels", kernels, ("fast", "numpy", "plain"))
    if name == "auto":
        best, why = choose(device, dtype, kernels=kernels, **options)
        best.chosen_because = why
        return best
    points = importlib.metadata.entry_points(group=GROUP, name=name)
    if not points:
        raise BabyError(f"unknown backend {name!r}: choose one of auto, {', '.join(names())}")
    if kernels == "numpy" and name != "numpy":
        raise BabyError(f"{name} has no kernels of NumPy: choose kernels fast, or the backend numpy")
    kind: Callable[..., Backend] = with_defaults(next(iter(points)).load())
    left_out = lambda value: value is None or (isinstance(value, bool | np.bool_) and not value)  # noqa: E731
    given = {option: value for option, value in options.items() if not left_out(value)}
    known = inspect.signature(kind).parameters.keys()
    if "kernels" in known:
        given["kernels"] = kernels
    for option in given.keys() - known:
        raise BabyError(f"{name} has no option {option}: leave it out, or use a backend that has it, such as cupy")
    backend = kind(device=device, dtype=dtype, **given)
    if kernels == "plain" and backend.xp.kernels:
        raise BabyError(f"{name} has no plain form: leave out kernels, or use another backend, such as numpy")
    return backend


def choose(device: str | None = None, dtype: str = "float32", **options: Any) -> tuple[Backend, str]:
    """What `auto` chooses, and why: CuPy where a GPU works, else NumPy. Options as in `load`."""
    if options.get("kernels") == "numpy":
        return load("numpy", device, dtype, **options), "its kernels were asked for"
    try:
        backend = load("cupy", device, dtype, **options)
        return backend, f"a working GPU: {backend.device}"
    except BackendUnavailable as error:
        found = error
    except BabyError:  # an invalid option
        raise
    except Exception as error:  # a broken CuPy must not prevent the use of NumPy
        found = BackendUnavailable("cupy", _one_line(error), "reinstall CuPy, or use --backend numpy")
    if device not in (None, "cpu"):
        raise found
    return load("numpy", device, dtype, **options), f"no GPU to use ({found.reason})"


def states() -> list[State]:
    """The state of every registered backend; a backend that does not work raises no error."""
    return [_state(name) for name in names()]


def _state(name: str) -> State:
    try:
        backend = load(name)
        return State(name, True, backend.version, backend.device, details=backend.details())
    except BackendUnavailable as error:
        return State(name, False, "", "", error.reason, error.remedy)
    except Exception as error:  # a backend of another package or a broken library: report it and list the rest
        return State(name, False, "", "", _one_line(error), "reinstall the library it needs")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
