"""Ranks that are threads of this process: quick, and without MPI. They pass arrays through a list."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from baby_xp.distributed.group import Group
from baby_xp.distributed.messages import packed, unpacked

SECONDS = 20.0


class Ended(Exception):
    """Another rank has raised an error."""


class ThreadGroup(Group):
    """One of several threads. `shared` is the same for all."""

    kind = "mpi"

    def __init__(self, rank: int, shared: "Shared"):
        self.rank, self.size, self._shared = rank, shared.size, shared
        self.sums = 0
        """Messages with gradients."""

    def sum(self, *arrays):
        for array in arrays:
            terms = self._shared.exchange(self.rank, array)
            array[...] = _added(terms)

    def sum_shares(self, array, bounds, *small):
        own = slice(*bounds[self.rank : self.rank + 2])
        terms = self._shared.exchange(self.rank, array)
        array[own] = _added([term[own] for term in terms])
        self.sums += 1
        self.sum(*small)

    def gather_shares(self, array, *pieces):
        for rank, others in enumerate(self._shared.exchange(self.rank, array)):
            for bounds in pieces:
                own = slice(*bounds[rank : rank + 2])
                array[own] = others[own]

    def broadcast(self, value, root=0):
        sent = self._shared.exchange(self.rank, packed(value) if self.rank == root else b"")[root]
        return value if self.rank == root else unpacked(sent)


class Shared:
    """Where threads meet. Whatever a rank has sent arrives, even if it ends right afterwards."""

    def __init__(self, size: int):
        self.size, self.changed = size, threading.Condition()
        self.sent: list[list[Any]] = [[] for _ in range(size)]
        self.ended: set[int] = set()

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Copies of the values of all ranks."""
        with self.changed:
            number = len(self.sent[rank])
            self.sent[rank].append(copy.deepcopy(value))
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self._missing(number) or self._missing(number) & self.ended, SECONDS)
            if self._missing(number):
                raise Ended
            return [copy.deepcopy(values[number]) for values in self.sent]

    def _missing(self, number: int) -> set[int]:
        """The ranks that have not sent so many values."""
        return {rank for rank in range(self.size) if len(self.sent[rank]) <= number}

    def end(self, rank: int) -> None:
        """This rank sends nothing any more."""
        with self.changed:
            self.ended.add(rank)
            self.changed.notify_all()


def _added(terms: list[np.ndarray]) -> np.ndarray:
    total = terms[0].copy()
    for term in terms[1:]:
        total += term
    return total


def together(size: int, function: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What the function returns on each of `size` ranks. If some raise an error, the first one's is raised."""
    shared, found, errors = Shared(size), [None] * size, [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = function(ThreadGroup(rank, shared))
        except BaseException as error:
            errors[rank] = error
        finally:
            shared.end(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = [error for error in errors if error is not None and not isinstance(error, Ended)]
    if own:
        raise own[0]
    assert not any(errors)
    return found


