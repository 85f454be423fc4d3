"""The `backend` fixture: its tests run on every installed array library, and a table shows which ran."""

import contextlib
import os
import signal
import time
from collections import Counter
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
from quick import quick
from small_runs import call, copied, refused, trained, work  # noqa: F401  (fixtures)

from baby_xp.arrays import registry
from baby_xp.errors import BackendUnavailable
from baby_xp.text.batches import RandomWindows
from baby_xp.training import schedules
from baby_xp.training.signals import SIGNALS

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a shell starts background jobs with SIGINT ignored, and processes of the tests would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def quickly():
    """Short samples, and no search for backends in each test."""
    with quick():
        yield


@pytest.fixture
def quick_compilation():
    """XLA without its optimizations: it compiles in a third of the time."""
    import jax

    with contextlib.suppress(AttributeError):  # a version without this option
        jax.config.update("jax_disable_most_optimizations", True)
    yield
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_disable_most_optimizations", False)


VARIANTS = {
    "numpy": ("numpy", None),
    "numpy readonly": ("numpy", None),  # writes in place then raise
    "numpy plain": ("numpy", None),  # the plain code, without the faster functions
    "strict": ("array-api-strict", None),
    "strict device1": ("array-api-strict", "device1"),
    "strict device2": ("array-api-strict", "device2"),
    "torch": ("torch", None),
    "jax": ("jax", None),
    "jax jit": ("jax", None),
    "cupy kernels": ("cupy", None),  # the source that a GPU gets, run on the CPU: see fake_cupy.py
    "cupy": ("cupy", None),
}


class Case:
    """A backend as a test uses it: in one precision, and with its variant's way to pass arrays."""

    def __init__(self, variant: str, dtype: str):
        name, device = VARIANTS[variant]
        self.variant, self.dtype = variant, dtype
        kernels = "plain" if variant == "numpy plain" else "fast"
        fake = variant == "cupy kernels"
        self.backend = fake_cupy.backend(dtype=dtype) if fake else registry.load(name, device, dtype, kernels)
        self.to_numpy, self.integers = self.backend.to_numpy, self.backend.integers
        self.xp = self.backend.xp

    def asarray(self, host: np.ndarray):
        array = self.backend.asarray(np.asarray(host))
        if self.variant == "numpy readonly":  # a write in place then raises
            array.flags.writeable = False
        return array

    def asarrays(self, hosts):
        return [self.asarray(host) for host in hosts]

    def compile(self, function):
        return self.backend.compile(function) if self.variant == "jax jit" else function


_cases: dict[tuple[str, str], Case | str] = {}
_outcomes: dict[str, Counter] = {}
_reasons: dict[str, str] = {}


def case_of(variant: str, dtype: str = "float64") -> Case:
    """The variant in this precision; skips the test with the reason if it is not available."""
    if (variant, dtype) not in _cases:
        try:
            _cases[variant, dtype] = Case(variant, dtype)
        except BackendUnavailable as error:
            _cases[variant, dtype] = f"{error.name}: {error.reason}"
    case = _cases[variant, dtype]
    if isinstance(case, str):
        pytest.skip(case)
    return case


def _parameters():
    return [pytest.param(v, marks=pytest.mark.gpu if v == "cupy" else ()) for v in VARIANTS]


@pytest.fixture(params=_parameters())
def backend(request) -> Case:
    """Every variant in float64."""
    return case_of(request.param)


@pytest.fixture(params=_parameters())
def backend32(request) -> Case:
    """Every variant in float32."""
    return case_of(request.param, "float32")


def _not_op_by_op(variant: str):
    if variant == "jax":
        pytest.skip("JAX compiles every operation for every shape: too slow here, and `jax jit` runs the same")
    return variant


@pytest.fixture(params=_parameters())
def quick_backend(request) -> Case:
    """Every variant in float64 except JAX without jit, for tests with many steps."""
    return case_of(_not_op_by_op(request.param))


@pytest.fixture(params=_parameters())
def quick_backend32(request) -> Case:
    """Every variant in float32 except JAX without jit."""
    return case_of(_not_op_by_op(request.param), "float32")


@pytest.fixture
def plain() -> Case:
    """NumPy in float64 without faster functions, with which the others are compared."""
    return case_of("numpy plain")


@pytest.fixture
def at_step(monkeypatch):
    """Call something with the number of each training step, from 0, and its batch, before the step is computed."""

    def calling(action) -> None:
        draw = RandomWindows.batch

        def batch(windows, step):
            drawn = draw(windows, step)
            action(step, drawn)
            return drawn

        monkeypatch.setattr(RandomWindows, "batch", batch)

    return calling


@pytest.fixture
def rate_times(monkeypatch):
    """Multiply the learning rate of one step, counted from 0: a large factor makes all later losses worse, a huge
    one makes them NaN."""

    def multiply(at: int, factor: float) -> None:
        usual = schedules.learning_rate
        rate = lambda xp, step, *more: usual(xp, step, *more) * (factor if step[0] == at else 1)  # noqa: E731
        monkeypatch.setattr(schedules, "learning_rate", rate)

    return multiply


@pytest.fixture
def clock(monkeypatch):
    """time.perf_counter, which advances only when `clock.tick(seconds)` is called."""

    class Clock:
        now = 1000.0

        def tick(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def _folder(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set: it names the folder with these files")
    return Path(folder)


@pytest.fixture
def signals():
    """Sets the signal handlers that a program starts with, whatever they are where the tests run."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    usual = dict.fromkeys(before, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    for number, handler in usual.items():
        signal.signal(number, handler)
    yield usual
    now = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert now == usual


@pytest.fixture
def data_folder() -> Path:
    """Texts that are not part of the project."""
    return _folder("BABY_XP_DATA")


@pytest.fixture
def reference_folder() -> Path:
    """Results of the original Little Baby."""
    return _folder("BABY_XP_REFERENCE") / "littlebaby"


def pytest_collection_modifyitems(items):
    """In a test marked `first_case`, all cases except the first are slow."""
    for item in items:
        if item.get_closest_marker("first_case") and any(item.callspec.indices.values()):
            item.add_marker("slow")


def pytest_runtest_logreport(report):
    if report.when != "call" and report.outcome == "passed":
        return
    named = set(report.nodeid.partition("[")[2].rstrip("]").split("-"))
    for variant in named & VARIANTS.keys():
        _outcomes.setdefault(variant, Counter())[report.outcome] += 1
        if report.when == "setup" and report.outcome == "skipped":
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if reason.startswith(f"{VARIANTS[variant][0]}: "):  # as case_of says it
                _reasons[variant] = reason


def pytest_terminal_summary(terminalreporter):
    if not _outcomes:
        return
    terminalreporter.section("backends")
    for variant in VARIANTS:
        counts = _outcomes.get(variant, Counter())
        reason = _reasons.get(variant, "")
        summary = ", ".join(
            f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if counts[outcome]
        )
        terminalreporter.line(f"{variant:<16} {summary or 'not run'}{'  ' + reason if reason else ''}")
