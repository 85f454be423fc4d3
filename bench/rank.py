"""What each rank does in a measurement over a network: what its link costs, sums, and steps of workloads."""

import time
from typing import Any

import numpy as np

from baby_xp.distributed import Group, join
from baby_xp.distributed.mpi import BUCKET, PAUSE, TESTS
from baby_xp.errors import BabyError
from bench import hosts, peers
from bench.harness import US
from bench.time_model import NUMBERS
from bench.workloads import WORKLOADS

HOPS, REPEATS = 30, 7
"""How often messages go around, and sums are repeated: medians count."""
MANY, SMALL, LARGE = 64, 1 << 10, 8
"""Small messages at once, and their bytes; large messages at once."""


def measure(interface: str | None, sizes: list[int], workloads: dict[str, tuple[int, int]]) -> dict:
    """The link, sums of arrays of these sizes, and steps of workloads with and without the sum, on rank 0.

    interface: the one through which this rank alone sends, whose bytes are counted. workloads: for each, the steps
    of warm-up and the steps.
    """
    group = join("mpi")
    models = {name: WORKLOADS[name].model(0.0).n_parameters for name in workloads}
    found: dict[str, Any] = {"link": link(group)}
    found["sums"] = [sums(group, n, interface) for n in sorted({*sizes, *models.values()})]
    found["steps"] = []
    for name, (warmup, steps) in workloads.items():
        dropout = WORKLOADS[name].dropout
        request = {"workload": name, "steps": steps, "warmup": warmup, "dropout": dropout, "workers": 1}
        ms = [
            peers.train(US, distributed="mpi", with_sums=with_sums, **request)["ms"] for with_sums in (True, False)
        ]
        found["steps"].append({"workload": name, "elements": models[name], "ms": ms[0], "ms without sums": ms[1]})
    return found


def link(group: Group) -> dict[str, float]:
    """The constants of time_model.Link. All ranks measure them at once, each between itself and its neighbours."""
    share = 4 * BUCKET // group.size
    latency = around(group, 1, 8)
    message = max(0.0, around(group, MANY, SMALL) - latency) / MANY
    large = around(group, LARGE, share) - 3 * latency - LARGE * message
    terms = np.ones((group.size, BUCKET // group.size), np.float32)
    out = np.empty_like(terms[0])
    group.broadcast(None)
    marks = [time.perf_counter()]
    for _ in range(HOPS):
        np.add(terms[0], terms[1], out=out)
        for term in terms[2:]:
            out += term
        marks.append(time.perf_counter())
    add = float(np.median(np.diff(marks))) / terms.size
    return {"latency": latency, "bandwidth": LARGE * share / large, "message": message, "add": add}


def around(group: Group, count: int, size: int) -> float:
    """Seconds from the sending of `count` messages of `size` bytes to the next rank until as many have arrived.

    They come from the rank before: all ranks do so at once, again and again.
    """
    from mpi4py import MPI  # only ranks have it

    ranks, n = MPI.COMM_WORLD, group.size
    after, before = (group.rank + 1) % n, (group.rank - 1) % n
    message, received = np.zeros(size, np.uint8), np.empty((count, size), np.uint8)
    marks = [time.perf_counter()]
    for _ in range(HOPS):
        requests = [ranks.Irecv(received[i], before, i) for i in range(count)]
        requests += [ranks.Isend(message, after, i) for i in range(count)]
        tests = 0
        while not MPI.Request.Testall(requests):  # as the sum itself waits
            tests += 1
            time.sleep(0 if tests < TESTS else PAUSE)
        marks.append(time.perf_counter())
    return float(np.median(np.diff(marks)))


def sums(group: Group, elements: int, interface: str | None) -> dict:
    """The milliseconds of sums as in a step, and the bytes that this rank sends in one of them."""
    array, numbers = np.ones(elements, np.float32), np.zeros(NUMBERS)
    group.sum(array, numbers)
    before, marks = interface and hosts.sent(interface), [time.perf_counter()]
    for _ in range(REPEATS):
        group.sum(array, numbers)
        marks.append(time.perf_counter())
    after = interface and hosts.sent(interface)
    if not (array == group.size ** (REPEATS + 1)).all():
        raise BabyError(f"a sum of {elements} elements over {group.size} ranks is wrong")
    moved = None if interface is None else (after - before) / REPEATS
    return {"elements": elements, "ms": (1e3 * np.diff(marks)).tolist(), "bytes": moved}
