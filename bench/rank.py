"""What each rank does in a measurement over a network: its link, what a step sends, and steps of workloads."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from baby_xp.arrays import params
from baby_xp.arrays.registry import load
from baby_xp.distributed import Group, join
from baby_xp.distributed.group import PIECE
from baby_xp.distributed.mpi import add, pause
from baby_xp.errors import BabyError
from baby_xp.training.alone import Alone
from baby_xp.training.ranks import Ranks
from baby_xp.training.step import initial_state
from bench import hosts, peers
from bench.harness import US
from bench.time_model import NUMBERS
from bench.workloads import WORKLOADS, Workload

MACHINES = {"at the end": 1, "meanwhile": 2}
"""When gradients are sent, and the number of machines on which ranks do so."""
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
        with on_machines(group, 1):  # the model is that of steps which compute, and then send
            ms, alone = (
                peers.train(US, distributed="mpi", exchange=both, **request)["ms"] for both in (True, False)
            )
        found["steps"].append({"workload": name, "elements": models[name], "ms": ms, "ms computing": alone})
    return found


def overlap(workloads: dict[str, tuple[int, int]]) -> list[dict]:
    """The milliseconds of steps that send their gradients at the end, and of those that send them meanwhile.

    Both in turn, with one process in each rank. workloads: for each, the rounds, and the steps of a round.
    Raises BabyError if the losses differ.
    """
    group = join("mpi")
    return [in_turn(group, WORKLOADS[name], *numbers) for name, numbers in workloads.items()]


def in_turn(group: Group, workload: Workload, rounds: int, steps: int) -> dict:
    """As overlap, of one workload. The first round, in which memory settles, does not count."""
    backend, model = load("numpy"), workload.model(workload.dropout)
    batches, config = workload.batches((rounds + 1) * steps), workload.training((rounds + 1) * steps)
    decays, weights = params.decay_mask(model.spec), params.draw(model.spec, 0, "float32")
    found, losses, runs = {name: [] for name in MACHINES}, {name: [] for name in MACHINES}, {}
    with Alone(backend, model, workload.batch_size, 1) as own:
        for name, machines in MACHINES.items():
            with on_machines(group, machines):
                runs[name] = Ranks(group, own, backend, model, config).step()
        states = {name: initial_state(backend, weights, decays, 0) for name in MACHINES}
        for first in range(0, len(batches), steps):
            for name, step in runs.items():
                for batch in batches[first : first + steps]:
                    group.sum_of_numbers(1.0)  # all begin together
                    begin = time.perf_counter()
                    states[name], metrics = step(states[name], batch)
                    found[name].append(1e3 * (time.perf_counter() - begin))
                    losses[name].append(float(metrics["loss"][0]))
    one, other = losses.values()
    if one != other:
        raise BabyError(f"losses of {workload.name} differ: {one} and {other}")
    return {"workload": workload.name, "steps": steps, **{name: times[steps:] for name, times in found.items()}}


@contextmanager
def on_machines(group: Group, number: int) -> Iterator[None]:
    """Let the group say that its ranks are on so many machines: on one, gradients do not travel meanwhile."""
    group.machines = lambda: number
    try:
        yield
    finally:
        del group.machines


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
