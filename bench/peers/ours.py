"""baby_xp itself, as its commands `train` and `generate` run it: whatever bench uses of its internals is here."""

import inspect
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import baby_xp
from baby_xp import presets
from baby_xp.arrays import params
from baby_xp.arrays.backend import Backend
from baby_xp.arrays.registry import load
from baby_xp.config import TrainConfig
from baby_xp.distributed import Group, Kind, join
from baby_xp.distributed.mpi import SMALL
from baby_xp.inference.generate import Sampling, generate_several
from baby_xp.layers import cross_entropy
from baby_xp.models import Model
from baby_xp.resources import process_memory
from baby_xp.text.dataset import Dataset, prepare
from baby_xp.training.alone import Alone
from baby_xp.training.checkpoint import Checkpoint, first
from baby_xp.training.listener import Listener
from baby_xp.training.loop import Loop, Result
from baby_xp.training.plan import Plan
from baby_xp.training.setup import number_of_workers
from baby_xp.training.signals import Stop
from baby_xp.training.step import initial_state, on_device, step_noise, total_loss
from baby_xp.training.workers import Workers
from bench import harness, peers, workloads
from bench.peers import SEED, Clock, Curve, Outcome
from bench.workloads import Workload, on_gpu


def train(
    workload: Workload,
    dropout: float,
    clock: Clock,
    backend: str = "numpy",
    precision: str = "float32",
    workers: int | None = None,
    library: str | None = None,
    kernels: str = "fast",
    distributed: Kind = "none",
    exchange: bool = True,
) -> Outcome:
    """Train on the batches of the clock. workers: None for the number that `train` would choose.

    library: a backend in the place of `backend`, on a GPU where that is on one. kernels: as in `load`.
    distributed: as in `train`; without exchange, each rank computes as always, and keeps what it computes.
    """
    if library:
        backend = f"{library}:{'gpu' if on_gpu(backend) else 'cpu'}"
    loaded = load_at(backend, precision, kernels)
    model, clock.wait = workload.model(dropout), loaded.synchronize
    start = clock.batches[0]  # what the loss is measured on; there is no text, so no tokenizer
    dataset = Dataset("bench", None, clock, len(clock), lambda: iter([start]), start.targets.size, {})
    config, group = workload.training(len(clock)), join(distributed)
    group = group if exchange else Unconnected(group)
    result, sizes, number = fit_as_train_does(loaded, model, config, dataset, workers, group=group)
    last, details, found = result.checkpoint.progress["records"][-1], loaded.details(), loaded.memory()
    about = {**_about(loaded), "workers": str(number), **({"details": details} if details else {})}
    gpu_memory = {} if found is None else {"used": found.peak_used, "held": found.peak_held}
    return Outcome([last["train_loss"], last["val_loss"]], about, sizes, gpu_memory)


def load_at(backend: str, precision: str, kernels: str = "fast") -> Backend:
    """The backend that a text such as "cupy" or "jax:gpu" names, with that precision of its products."""
    name, _, device = backend.partition(":")
    loaded = load(name, device or None, "float32", kernels, tf32=precision == "tf32" and name != "jax")
    if name == "jax":  # which the backend sets to full float32
        resolve_name("bench.peers.jax:set_precision")(precision)
        loaded.compile = compile_donating
    return loaded


def compile_donating(function: Callable) -> Callable:
    """Compile with JAX, so that a step (state, batch) reuses the memory of the state that it is given.

    `train` itself keeps that state: a step that Ctrl-C interrupts must leave it as it was.
    """
    import jax

    return jax.jit(function, donate_argnums=0 if "state" in inspect.signature(function).parameters else ())


def fit_as_train_does(
    backend,
    model: Model,
    config: TrainConfig,
    dataset: Dataset,
    workers: int | None = None,
    listener: Listener | None = None,
    keep: Callable[[Workers | None, Checkpoint], None] = lambda pool, kept: None,
    weights: np.ndarray | None = None,
    group: Group | None = None,
) -> tuple[Result, list[dict[str, int]], int]:
    """What `train` does between reading the text and writing the files; every measured step passes through here.

    listener: what the loop reports to; keep: receives its checkpoints, and the workers before them, None if there
    are none; by default nothing is done with either.
    weights (P,): the first ones; None: drawn from the seed of the config. group: the ranks that train together.
    Returns the result, the sizes of all processes of this rank, and their number, which `train` would choose too:
    a small step is computed by one process with one BLAS thread, any other one by a process on each core
    (baby_xp.session).
    """
    group = group or Group()
    number = number_of_workers(workers, backend, model, config.batch_size, group)
    of_step, threads = (backend, model, config.batch_size), group.cores() if group.size > 1 else None
    with Workers(*of_step, number) if number > 1 else Alone(*of_step, threads) as own:
        pool = own if isinstance(own, Workers) else None
        plan = Plan(config, dataset.num_steps)
        hears, kept = listener or Listener(), partial(keep, pool)
        loop = Loop(backend, model, dataset, plan, hears, kept, Stop(), own, group=group)
        result = loop.run(first(model, config, weights))
        return result, process_memory.taken([child.pid for child in pool.children] if pool else []), number


class Unconnected(Group):
    """The ranks of a group, which wait for each other in each step, but send neither gradients nor parameters."""

    def __init__(self, group: Group):
        self.kind, self.rank, self.size, self._group = group.kind, group.rank, group.size, group

    def sum(self, *arrays: Any) -> None:
        """Of the numbers that travel beside the gradients alone."""
        self._group.sum(*(array for array in arrays if array.size < SMALL))

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """As Group.broadcast."""
        return self._group.broadcast(value, root)


def train_preset(preset: str, settings: dict[str, Any], steps: int, warmup: int) -> dict:
    """Train a preset with these settings for some steps -> "ms" of each, "memory" of all processes, "workers"."""
    chosen = presets.preset(preset).override(settings)
    with TemporaryDirectory() as folder:
        dataset = prepare(chosen.data, chosen.model, chosen.train, Path(folder) / "corpora")
        clock = Clock([dataset.batches.batch(step) for step in range(warmup + steps + 1)])
        n, little = len(clock), {"n_validation": 1, "validation": lambda: iter(clock.batches[:1])}
        config = replace(chosen.train, num_steps=n, eval_every=n + 1, checkpoint_minutes=0.0)
        dataset = replace(dataset, batches=clock, num_steps=n, **little)
        backend, model = load("numpy", None, config.dtype), Model(chosen.model, dataset.tokenizer.vocab_size)
        _, sizes, number = fit_as_train_does(backend, model, config, dataset)
    return {"ms": clock.ms(warmup), "memory": sizes, "workers": number}


class Laps(Listener):
    """A listener that reads the clock of a curve whenever the loop has waited for its steps."""

    def __init__(self, curve: Curve):
        self.curve = curve

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """A reading, also just before each checkpoint."""
        self.curve.lap()


def fit(model: Model, config: TrainConfig, dataset: Dataset, curve: Curve, weights: np.ndarray) -> dict[str, str]:
    """Train on a text as `train` does, with the curve's evaluations -> what a reader must know about it.

    weights (P,): the first ones. The curve is evaluated where the loop hands out a checkpoint; the loop's own
    evaluations see a single batch.
    """
    backend = load("numpy", None, config.dtype)

    def evaluate(pool: Workers | None, kept: Checkpoint) -> None:
        total, flat = pool.total_loss if pool else partial(total_loss, backend.xp, model), kept.state["params"]
        curve.evaluate(kept.step, lambda batch: total(flat, on_device(backend, batch)).item())

    if curve.first:
        evaluate(None, first(model, config, weights))
    config = replace(config, eval_every=config.num_steps, checkpoint_every=curve.every, checkpoint_minutes=0.0)
    little = {"n_validation": 1, "validation": lambda: islice(dataset.validation(), 1)}
    timed = replace(dataset, batches=curve, **little)
    _, _, number = fit_as_train_does(backend, model, config, timed, None, Laps(curve), evaluate, weights)
    return {**_about(backend), "workers": str(number)}


class Watched(Listener):
    """A listener that remembers the speed, and what the worker processes took: at the end they no longer run."""

    def __init__(self):
        self.rates, self.workers = [], []

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Note a reading."""
        self.rates.append(tokens_per_second)
        self.workers = process_memory.taken(process_memory.children())[1:]


def train_run(preset: str, settings: dict[str, Any], place: dict[str, Any]) -> dict:
    """A whole run as the command `train` makes it -> "ms" per step, "taken": bytes beyond bare interpreters.

    place: backend and precision. The first reading, in which caches fill and kernels are compiled, does not count.
    """
    import baby_xp.cli  # imported, because a real run has loaded the command line

    watched = Watched()
    with TemporaryDirectory() as folder:
        run = baby_xp.train(preset, path=folder, listener=watched, **place, **settings)
    config = run.config["train"]
    tokens, sizes = config["batch_size"] * config["accumulate"] * run.model.config.n_ctx, process_memory.taken()
    grown = sizes and process_memory.growth([*sizes, *watched.workers], process_memory.of_interpreter())
    return {"ms": 1e3 * tokens / statistics.median(watched.rates[1:] or watched.rates), "taken": grown or None}


def idle() -> list[dict[str, int]]:
    """Sizes of a process that imports baby_xp, makes the backend and does nothing; [] where they are not known."""
    load("numpy")
    return process_memory.taken()


def arrays_of_step(workload: Workload) -> dict[str, Any]:
    """Arrays that a training step cannot do without, by kind, in tuples; "saved": for the backward pass."""
    backend, model, (batch,) = load("numpy"), workload.model(workload.dropout), workload.batches(1)
    xp, flat = backend.xp, params.draw(model.spec, SEED)
    state = initial_state(backend, flat, params.decay_mask(model.spec), SEED)
    noise = step_noise(xp, model, state["seed"], state["step"], batch)
    logits, saved = model.forward(xp, model.layout.unpack(xp, state["params"]), batch.inputs, noise)
    _, loss_saved = cross_entropy.forward(xp, {}, logits, batch.targets.reshape(-1))
    return {
        "parameters": state["params"], "moments": (state["m"], state["v"]), "decays": state["decays"],
        "gradients": flat, "batch": tuple(batch), "saved": (saved, loss_saved),
    }  # fmt: skip


def generate(workload: Workload, batch: int, num_tokens: int, backend: str) -> tuple[Outcome, list[float]]:
    """Draw tokens from the whole distribution."""
    loaded = load(backend)
    ms = peers.step_times(_texts(loaded, workload, batch, num_tokens, Sampling(seed=SEED)))
    return Outcome([], _about(loaded), process_memory.taken()), ms


def greedy(workload: str, batch: int, tokens: int, backend: str) -> list[list[int]]:
    """The most likely tokens, (tokens, B)."""
    texts = _texts(load(backend), workloads.of(workload), batch, tokens, Sampling(greedy=True))
    return np.array(list(texts)).tolist()


def _texts(loaded, workload: Workload, batch: int, num_tokens: int, sampling: Sampling) -> Iterator:
    model, prompts = workload.model(0.0), peers.prompts_of(workload, batch).tolist()
    weights = loaded.asarray(peers.generation_weights(model))
    return generate_several(loaded, model, weights, prompts, num_tokens, sampling)


def _about(loaded) -> dict[str, str]:
    where = {"backend": loaded.version, "device": loaded.device, "blas": harness.blas()}
    return {"baby_xp": baby_xp.__version__, **where}
