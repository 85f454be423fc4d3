"""baby_xp itself, as its commands `train` and `generate` run it."""

from collections.abc import Iterator

import numpy as np

import baby_xp
from baby_xp.api import Silent
from baby_xp.arrays.registry import load
from baby_xp.config import TrainConfig
from baby_xp.inference.generate import Sampling, generate_several
from baby_xp.models import Model
from baby_xp.resources import process_memory
from baby_xp.text.dataset import Task
from baby_xp.training.checkpoint import first
from baby_xp.training.loop import Result, fit
from baby_xp.training.signals import Stop
from baby_xp.training.workers import Workers, alone, suitable_number
from bench import harness, peers, workloads
from bench.peers import SEED, Clock, Outcome
from bench.workloads import Workload


def train(
    workload: Workload,
    dropout: float,
    clock: Clock,
    backend: str = "numpy",
    precision: str = "float32",
    workers: int | None = None,
) -> Outcome:
    """Train on the batches of the clock. workers: None for the number that `train` would choose."""
    loaded = load(backend, None, "float32", **({"tf32": True} if precision == "tf32" else {}))
    model, clock.wait = workload.model(dropout), loaded.synchronize
    number = workers or suitable_number(loaded, model, workload.batch_size)
    start = clock.batches[0]  # what the loss is measured on; there is no text, so no tokenizer
    dataset = Task("bench", None, clock, len(clock), lambda: iter([start]), start.targets.size, {})
    result, taken = fit_as_train_does(loaded, model, workload.training(len(clock)), dataset, number)
    last = result.checkpoint.progress["records"][-1]
    about = {**_about(loaded), "workers": str(number)}
    if details := loaded.details():
        about["details"] = details
    found = loaded.memory()
    gpu_memory = {} if found is None else {"used": found.peak_used, "held": found.peak_held}
    return Outcome([last["train_loss"], last["val_loss"]], about, taken, gpu_memory)


def fit_as_train_does(
    backend, model: Model, config: TrainConfig, dataset: Task, number: int
) -> tuple[Result, list[dict[str, int]]]:
    """What `train` does between reading the text and writing the files -> its result, the sizes of all processes.

    number: worker processes. A small step has one BLAS thread, as in baby_xp.session.
    """
    of_step = backend, model, config.batch_size
    with Workers(*of_step, number) if number > 1 else alone(*of_step) as workers:
        start = first(model, config)
        result = fit(backend, model, config, dataset, start, Silent(), lambda kept: None, Stop(), workers)
        return result, process_memory.taken([child.pid for child in workers.children] if workers else [])


def generate(
    workload: Workload, batch: int, num_tokens: int, backend: str = "numpy"
) -> tuple[Outcome, list[float]]:
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
    return {
        "baby_xp": baby_xp.__version__, "backend": loaded.version, "device": loaded.device, "blas": harness.blas(),
    }  # fmt: skip
