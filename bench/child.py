"""What a child process of the benchmarks does: one task, told as JSON on its input, answered on its output."""

import itertools
import json
import sys
import time
from dataclasses import asdict

from baby_xp.errors import BabyError
from bench import workloads

RATE_SECONDS = 1.5
"""How long the matrix product is repeated."""


def train(name: str, workload: str | dict, steps: int, warmup: int, dropout: float, **options) -> dict:
    """Train a contender -> its Outcome, and `ms`: milliseconds a step, of each step after the warm-up.

    One more step is done than is asked for, as a step's time ends where the next begins. Where Python runs
    ahead of the device, both numbers are rounded up and `ms` are means of the steps between two readings.
    """
    from bench.contenders import CONTENDERS, Clock, steps_to_a_reading

    every = steps_to_a_reading(options.get("backend", "numpy"))
    warmup, steps = (-(-number // every) * every for number in (warmup, steps))
    chosen = workloads.of(workload)
    clock = Clock(chosen.batches(warmup + steps + 1), every)
    outcome = CONTENDERS[name](chosen, dropout, clock, **options)
    pairs = itertools.pairwise(clock.marks[warmup::every])
    return {**asdict(outcome), "ms": [1e3 * (end - begin) / every for begin, end in pairs]}


def losses(name: str, workload: str, **options) -> dict:
    """The loss before and after one step without dropout, both of the first batch: nats a token."""
    from bench.contenders import CONTENDERS, Clock

    chosen = workloads.of(workload)
    outcome = CONTENDERS[name](chosen, 0.0, Clock(chosen.batches(1)), **options)
    return {"losses": outcome.losses}


def sees_gpu(library: str) -> dict:
    """Whether a peer's library sees a GPU."""
    from bench import contenders

    return {"works": contenders.sees_gpu(library)}


def ceiling(backend: str, precision: str) -> dict:
    """The rates of a device, see bench.ceiling."""
    from bench import ceiling

    return ceiling.measure(backend, precision)


def generate(name: str, workload: str, batch: int, tokens: int, warmup: int, backend: str) -> dict:
    """Let a contender generate -> its Outcome, and `ms`: milliseconds a step, of each step after the warm-up."""
    from bench.generators import GENERATORS

    outcome, ms = GENERATORS[name](workloads.of(workload), batch, warmup + tokens, backend)
    return {**asdict(outcome), "ms": ms[-tokens:]}


def greedy(workload: str, batch: int, tokens: int, backend: str) -> dict:
    """The likeliest tokens by baby_xp, (tokens, batch)."""
    from bench import generators

    return {"ids": generators.greedy(workloads.of(workload), batch, tokens, backend).tolist()}


def read_along(workload: str, ids: list[list[int]], backend: str) -> dict:
    """How far below PyTorch's largest logit each of these tokens lies, (tokens, batch)."""
    import numpy as np

    from bench import generators

    found = generators.torch_shortfalls(workloads.of(workload), np.array(ids), backend)
    return {"shortfalls": found.tolist()}


def rate(M: int = 768, C: int = 128, F: int = 512) -> dict:
    """Speed of a float32 product (M, C) @ (C, F) on one thread, in Gflop/s: over a while, and of the best one.

    The best tells what kernel and processor can do; the mean also tells what other programs took.
    """
    import numpy as np
    from threadpoolctl import threadpool_limits

    draw = np.random.default_rng(0).standard_normal
    x, weight = draw((M, C), np.float32), draw((C, F), np.float32)
    marks = [time.perf_counter()]
    with threadpool_limits(1):
        while marks[-1] < marks[0] + RATE_SECONDS:
            x @ weight
            marks.append(time.perf_counter())
    work, seconds = 2e-9 * M * C * F, np.diff(marks)
    return {"mean": work / float(np.mean(seconds)), "best": work / float(np.min(seconds))}


def footprint(**request) -> dict:
    """Memory tasks, see bench.footprint."""
    from bench import footprint

    return footprint.TASKS[request.pop("what")](**request)


def parameters(**request) -> dict:
    """A variant of bench.parameters, timed."""
    from bench.parameters import timed

    return timed(**request)


TASKS = {
    "train": train, "losses": losses, "generate": generate, "greedy": greedy, "read_along": read_along,
    "rate": rate, "footprint": footprint, "sees_gpu": sees_gpu, "ceiling": ceiling,
    "parameters": parameters,
}  # fmt: skip


def main() -> None:
    """Read a request, do it, write the answer."""
    request = json.load(sys.stdin)
    try:
        result = TASKS[request.pop("task")](**request)
    except BabyError as error:
        raise SystemExit(f"bench: {error}") from None
    print(json.dumps(result))


if __name__ == "__main__":
    main()
