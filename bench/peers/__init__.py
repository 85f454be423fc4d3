"""The libraries that are measured: baby_xp and its peers, a module for each.

A trainer is a function (workload, dropout, clock, backend, precision, **options) -> Outcome. It asks the Clock for
the batch of each step, which records the time. All train on the same batches, from the same first weights and by
the same rule, then compute the loss of the first batch once more.

A generator is a function (workload, batch, num_tokens, backend, **options) -> Outcome, milliseconds of each step
but the first. All continue the same prompts with the same weights.
"""

import importlib.util
import itertools
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pkgutil import resolve_name

import numpy as np

from baby_xp.arrays import params
from baby_xp.models import Model
from baby_xp.text.batches import Batch
from baby_xp.text.dataset import Batches
from baby_xp.training.loop import READ_EVERY
from baby_xp.training.validation import mean_loss
from bench import harness, workloads
from bench.harness import say
from bench.workloads import Workload, on_gpu

SEED = 0
WITHOUT_NUMBA = "baby_xp-numpy"
TRAINERS: dict[str, tuple[str, dict]] = {
    "baby_xp": ("bench.peers.ours:train", {}),
    WITHOUT_NUMBA: ("bench.peers.ours:train", {"kernels": "numpy"}),
    "torch": ("bench.peers.torch:train", {}),
    "torch.compile": ("bench.peers.torch:train", {"compiled": "default"}),
    "jax": ("bench.peers.jax:train", {}),
    "torch.compile-graphs": ("bench.peers.torch:train", {"compiled": "reduce-overhead"}),
    "baby_xp-jax": ("bench.peers.ours:train", {"library": "jax"}),
}
GENERATORS: dict[str, tuple[str, dict]] = {
    "baby_xp": ("bench.peers.ours:generate", {}),
    "torch": ("bench.peers.torch:generate", {}),
    "torch-1-thread": ("bench.peers.torch:generate", {"threads": 1}),  # a single token is little work to share
}
BY_NAME = ("torch.compile-graphs", "baby_xp-jax")  # measured only if they are named
LACKING = {"baby_xp": ("half",), "jax": ("half",), "baby_xp-jax": ("half",)}  # precisions that a library has not
SPREAD = 5.0
"""Factor on the first weights that all generate with: as they are drawn, attention hardly changes the logits."""


class Clock:
    """Batches that were drawn before, and the time in seconds at which each was asked for.

    Every `every` steps it waits for the device first, as the trainer says: these are times of whole steps.
    """

    def __init__(self, batches: list[Batch], every: int = 1):
        self.batches, self.every, self.marks = batches, every, []
        self.wait: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, step: int) -> Batch:
        """The batch of a step; called once per step, at its beginning."""
        if step % self.every == 0:
            self.wait()
        self.marks.append(time.perf_counter())
        return self.batches[step]

    def ms(self, warmup: int) -> list[float]:
        """Milliseconds of each step after the warm-up; of several between two readings, their mean."""
        pairs = itertools.pairwise(self.marks[warmup :: self.every])
        return [1e3 * (end - begin) / self.every for begin, end in pairs]


class Curve:
    """Batches of a training on a text, and its validation losses over the seconds of training.

    A trainer evaluates after every `every` steps and the last one, and if `first` before the first one. Seconds
    begin where it asks for its first batch, and evaluations do not count: it calls `lap` whenever steps are
    complete, and `evaluate` after that; what it does in between does not count either.
    """

    def __init__(
        self,
        batches: Batches,
        every: int,
        windows: list[Callable[[], Iterable[Batch]] | None],
        first: bool = False,
    ):
        """windows: kinds of validation windows, each a function that gives its batches; None: has no loss."""
        self.batches, self.every, self.windows, self.first = batches, every, windows, first
        self.batch_size = batches.batch_size
        self.points: list[tuple] = []
        """Step, seconds, and the mean loss in nats per token for each kind of windows."""
        self.seconds, self._since = 0.0, 0.0

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        if step == 0:
            self._since = time.perf_counter()
        return self.batches.batch(step)

    def lap(self) -> None:
        """Count the time since the last lap or evaluation as training."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def evaluate(self, step: int, total_loss: Callable[[Batch], float]) -> None:
        """Add a point after `step` steps; total_loss: the sum of the losses of all targets of a batch."""
        losses = [windows and mean_loss(total_loss, windows()) for windows in self.windows]
        self.points.append((step, self.seconds, *losses))
        self._since = time.perf_counter()


@dataclass
class Outcome:
    """What a trainer or a generator did.

    losses: nats per token, the last mean during training, and that of the first batch after the last step. about:
    what a reader must know to interpret the time. memory: as process_memory.taken reports it. gpu_memory: peak
    bytes of the GPU's memory in use ("used"), and held by the library ("held"); {} on a CPU.
    """

    losses: list[float]
    about: dict[str, str]
    memory: list[dict[str, int]] = field(default_factory=list)
    gpu_memory: dict[str, int] = field(default_factory=dict)


def train(name: str, workload: str | dict, steps: int, warmup: int, dropout: float, **options) -> dict:
    """Train a library's model -> its Outcome, and `ms`: milliseconds of each step after the warm-up.

    One more step is done, as the time of a step ends where the next begins. Where Python runs ahead of the device,
    both numbers are rounded up and `ms` are means of the steps between two readings.
    """
    backend = options.get("backend", "numpy")
    every = READ_EVERY if on_gpu(backend) or backend.startswith("jax") else 1
    warmup, steps = (-(-number // every) * every for number in (warmup, steps))
    chosen, (task, own) = workloads.of(workload), TRAINERS[name]
    clock = Clock(chosen.batches(warmup + steps + 1), every)
    outcome = resolve_name(task)(chosen, dropout, clock, **own, **options)
    return {**asdict(outcome), "ms": clock.ms(warmup)}


def losses(name: str, workload: str, **options) -> list[float]:
    """The loss before and after one step without dropout, both of the first batch: nats per token."""
    chosen, (task, own) = workloads.of(workload), TRAINERS[name]
    return resolve_name(task)(chosen, 0.0, Clock(chosen.batches(1)), **own, **options).losses


def generate(name: str, workload: str, batch: int, tokens: int, warmup: int, backend: str) -> dict:
    """Let a library's model generate -> its Outcome, and `ms`: milliseconds of each step after the warm-up."""
    task, own = GENERATORS[name]
    outcome, ms = resolve_name(task)(workloads.of(workload), batch, warmup + tokens, backend, **own)
    return {**asdict(outcome), "ms": ms[-tokens:]}


def first_weights(model: Model) -> dict:
    """The tree of first weights that baby_xp's training draws, host arrays."""
    return model.layout.unpack(np, params.draw(model.spec, SEED))


def generation_weights(model: Model) -> np.ndarray:
    """The weights that all generate with, (P,) on the host."""
    return params.draw(model.spec, SEED) * np.where(params.decay_mask(model.spec) > 0, SPREAD, 1).astype("float32")


def prompts_of(workload: Workload, batch: int) -> np.ndarray:
    """One id per text, (B, 1): all the rest is generated."""
    return np.random.default_rng(SEED).integers(0, workload.vocab_size, (batch, 1))


def step_times(texts: Iterable) -> list[float]:
    """Milliseconds from each step of a generator to the next."""
    marks = [time.perf_counter() for _ in texts]
    return [1e3 * (end - begin) for begin, end in itertools.pairwise(marks)]


def present(peers: list[str], backend: str, program: str) -> list[str]:
    """Those of the peers that can be measured here; a line for each other one says why not."""
    reasons = {peer: missing(peer, backend) for peer in peers}
    for reason in filter(None, reasons.values()):
        say(f"{program}: {reason}")
    return [peer for peer in peers if not reasons[peer]]


def missing(peer: str, backend: str) -> str | None:
    """Why a peer cannot be measured here, or None."""
    if peer == WITHOUT_NUMBA and backend != "numpy":
        return f"{peer} is for the backend numpy: it is left out"
    library = library_of(peer)
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed: {peer} is left out (pip install {library})"
    if not on_gpu(backend):
        if peer == "torch.compile-graphs":
            return f"{peer} is for a GPU: it is left out"
        if peer == "torch.compile" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return f"no C++ compiler is installed, which {peer} needs: it is left out"
        return None
    # asked in a process of its own: JAX would take most of the GPU's memory, and keep it until this one ends
    task, works = {"torch": ("torch.cuda:is_available", True), "jax": ("jax:default_backend", "gpu")}[library]
    try:
        return None if harness.ask(task) == works else f"this {library} sees no GPU: {peer} is left out"
    except harness.Failed as error:
        return f"{peer} is left out: {error}"


def library_of(peer: str) -> str:
    """The library that a peer needs: a word of its name, as in "torch.compile" and "baby_xp-jax".

    Leaving numba out makes a difference only where it is installed.
    """
    if peer == WITHOUT_NUMBA:
        return "numba"
    return next((name for name in ("torch", "jax") if name in re.split("[.-]", peer)), peer)
