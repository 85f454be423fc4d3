"""What each rank does in a measurement over a network: its link, what a step sends, and steps of workloads."""

import os
import threading
import time
from typing import Any

import numpy as np

from baby_xp.arrays import params
from baby_xp.arrays.registry import load
from baby_xp.arrays.tiles import samples
from baby_xp.distributed import Group, join
from baby_xp.distributed.mpi import PIECE, add, pause
from baby_xp.errors import BabyError
from baby_xp.training.alone import Alone
from baby_xp.training.step import initial_state
from bench import hosts, peers
from bench.harness import US
from bench.time_model import NUMBERS
from bench.workloads import WORKLOADS, Workload

ROUNDS, REPEATS = 15, 7
"""How often messages go around, and what a step sends is sent: medians count."""
MANY, SMALL, LARGE = 64, 1 << 10, 60_000
"""Messages at once, and bytes of small and large ones; no message is so large that it must be asked for first."""


def measure(interface: str | None, sizes: list[int], workloads: dict[str, tuple[int, int]]) -> dict:
    """The link, what steps with so many parameters send, and steps of workloads with and without it, on rank 0.

    interface: the one through which this rank alone sends, whose bytes are counted. workloads: for each, the steps
    of warm-up and the steps.
    """
    group = join("mpi")
    models = {name: WORKLOADS[name].model(0.0).n_parameters for name in workloads}
    found: dict[str, Any] = {"link": link(group)}
    found["exchanges"] = [exchanges(group, n, interface) for n in sorted({*sizes, *models.values()})]
    found["steps"] = []
    for name, (warmup, steps) in workloads.items():
        dropout = WORKLOADS[name].dropout
        request = {"workload": name, "steps": steps, "warmup": warmup, "dropout": dropout, "workers": 1}
        ms, alone = (peers.train(US, distributed="mpi", exchange=both, **request)["ms"] for both in (True, False))
        found["steps"].append({"workload": name, "elements": models[name], "ms": ms, "ms computing": alone})
    # with a core for each rank, to which it is bound: whether sums would be free beside the gradients
    several = group.size <= (os.cpu_count() or 1)
    found["overlaps"] = [overlap(group, WORKLOADS[name]) for name in workloads if several]
    return found


def overlap(group: Group, workload: Workload) -> dict:
    """The milliseconds of a rank's gradients, of a sum of gradients, of one after the other, and of both at once.

    The sum at once, in a thread, is that of other gradients: it need not wait for any. No way of sending parts of
    the gradients while the others are computed can hide more of it.
    """
    backend, model, batch = load("numpy"), workload.model(workload.dropout), workload.batches(1)[0]
    n, bounds = model.n_parameters, [model.n_parameters * rank // group.size for rank in range(group.size + 1)]
    ends = [len(batch.samples) * rank // group.size for rank in (group.rank, group.rank + 1)]
    share, others = samples(batch, *ends), np.empty(n, np.float32)
    state = initial_state(backend, params.draw(model.spec, 0, "float32"), params.decay_mask(model.spec), 0)
    found: dict[str, Any] = {"workload": workload.name, "gradients": [], "sum": [], "in turn": [], "at once": []}
    with Alone(backend, model, workload.batch_size, 1) as own:

        def gradients() -> None:
            own.loss_and_gradients(backend.xp, model, state, share, n_targets=batch.targets.size)

        def summed() -> None:
            group.sum_shares(others, bounds)

        def at_once() -> None:
            thread = threading.Thread(target=summed)
            thread.start()
            gradients()
            thread.join()

        ways = {"gradients": [gradients], "sum": [summed], "in turn": [gradients, summed], "at once": [at_once]}
        for _ in range(REPEATS + 1):
            for name, functions in ways.items():
                others[:] = 1
                group.sum_of_numbers(1.0)  # all begin together
                begin = time.perf_counter()
                for function in functions:
                    function()
                group.sum_of_numbers(1.0)
                found[name].append(1e3 * (time.perf_counter() - begin))
    return {name: times if name == "workload" else times[1:] for name, times in found.items()}


def link(group: Group) -> dict[str, float]:
    """The constants of time_model.Link. All ranks measure them at once, each between itself and its neighbours."""
    latency = around(group, 1, 8)
    message = max(0.0, around(group, MANY, SMALL) - latency) / MANY
    large = max(1e-9, around(group, MANY, LARGE) - latency)
    terms = np.ones((group.size, PIECE), np.float32)
    out = np.empty_like(terms[0])
    group.sum_of_numbers(1.0)
    marks = [time.perf_counter()]
    for _ in range(ROUNDS):
        add(terms, out)
        marks.append(time.perf_counter())
    found = {"latency": latency, "bandwidth": MANY * LARGE / large, "message": message}
    return {**found, "add": float(np.median(np.diff(marks))) / terms.size}


def around(group: Group, count: int, size: int) -> float:
    """Seconds from the sending of `count` messages of `size` bytes to the next rank until as many have arrived.

    They come from the rank before: all ranks do so at once, again and again. A rank that is ahead waits longer for
    the next message and shorter for one after that, so the mean over one round of all ranks counts. It is that of
    the fastest round, as ranks that share a core also wait for each other.
    """
    from mpi4py import MPI  # only ranks have it

    ranks, n = MPI.COMM_WORLD, group.size
    after, before = (group.rank + 1) % n, (group.rank - 1) % n
    messages, received = np.zeros((2, count, size), np.uint8)
    marks = [time.perf_counter()]
    for _ in range(ROUNDS * n):
        requests = [ranks.Irecv(received[i], before, i) for i in range(count)]
        requests += [ranks.Isend(messages[i], after, i) for i in range(count)]
        tests = 0
        while not MPI.Request.Testall(requests):  # as the group itself waits
            tests += 1
            pause(tests)
        marks.append(time.perf_counter())
    return float(np.diff(marks[::n]).min()) / n


def exchanges(group: Group, elements: int, interface: str | None) -> dict:
    """The milliseconds of what ranks exchange in a step with so many parameters, and bytes that this one sends."""
    bounds = [elements * rank // group.size for rank in range(group.size + 1)]
    array, numbers = np.empty(elements, np.float32), np.zeros(NUMBERS)
    seconds, sent = [], []
    for _ in range(REPEATS + 1):
        array[:] = 1
        group.sum_of_numbers(1.0)  # all begin together, when all has arrived that was sent before
        sent.append(interface and hosts.sent(interface))
        begin = time.perf_counter()
        group.sum_shares(array, bounds, numbers)
        group.sum_of_numbers(1.0)
        group.gather_shares(array, bounds)
        seconds.append(time.perf_counter() - begin)
        if not (array == group.size).all():
            raise BabyError(f"a sum of {elements} elements over {group.size} ranks is wrong")
    moved = interface and (sent[-1] - sent[1]) / (REPEATS - 1)
    return {"elements": elements, "ms": [1e3 * one for one in seconds[1:]], "bytes": moved}
