"""What the ranks of a group can do together; here for a process that is alone."""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from baby_xp import processes
from baby_xp.errors import BabyError

T = TypeVar("T")
Others = Sequence[Callable[..., Any]]
"""A function for each other rank: start(function, *arguments) calls the function there -> a Future."""

PIECE = 1 << 17
"""Elements of its share that a rank adds up at a time: few enough for a processor's cache."""
GRACE_SECONDS, MOST_GRACE = 1.0, 8
"""How long a rank leaves it to the one before it to say what went wrong and to end the others; the most times."""


class Lost(BabyError):
    """A rank has ended before its time. The group computes nothing more until it has been mended."""

    guid: str | None = None
    """The run that was being trained, if its last checkpoint can be resumed."""


class Group:
    """A process alone, or one of the ranks that compute together: all of them call the same methods in turn."""

    kind = "none"
    rank = 0
    size = 1
    backend = "numpy"
    """The backend that all compute with, if there are several."""
    device: str | None = None
    """The device that this rank computes on, if the group says which."""
    on_device = False
    """Whether `sum` takes arrays of the backend; otherwise those of NumPy."""
    _cores: int | None = None

    def sum(self, *arrays: Any) -> None:
        """Replace each array by its sum over all ranks, in place.

        The terms are added in an order that does not depend on timing, and all ranks get the same bits.
        """

    def sum_shares(self, array: Any, bounds: list[int], *small: Any) -> None:
        """As sum, but of `array` (P,) each rank gets only its share, from bounds[rank] to bounds[rank + 1].

        For arrays of NumPy. The rest of `array` stays as it is. `small`: arrays that become their whole sums.
        """
        self.sum(*small)

    def begin_sum(self, array: Any, pieces: list[list[int]]) -> "GradualSum":
        """A sum of `array` (P,), whose parts are sent as soon as the caller says that they are ready.

        pieces: of each piece of the array, the bounds of the ranks' shares, as of sum_shares; from the end of the
        array to its beginning. The same on all ranks.
        """
        return GradualSum(self, array, pieces)

    def gather_shares(self, array: Any, *pieces: list[int]) -> None:
        """Replace the shares of the other ranks in `array` (P,) by theirs. pieces: the bounds of the shares, or of
        those in each piece of the array."""

    def sum_of_numbers(self, *numbers: float) -> list[float]:
        """The sum over all ranks of each number, as float64."""
        import numpy as np  # --help does not need it

        found = np.array(numbers, np.float64)
        self.sum(found)
        return found.tolist()

    def broadcast(self, value: T, root: int = 0) -> T:
        """The value that the rank `root` has: JSON values and arrays of NumPy, of which the others get copies."""
        return value

    def mend(self) -> bool:
        """After Lost: go on with the ranks that are left, renumbered -> whether that is possible."""
        return False

    def fail(self) -> None:
        """Note that this rank has failed: when its process ends, it ends the others, which may wait for it."""

    def before_last_words(self) -> None:
        """Leave it to the first rank that is left to say what went wrong on all, and to end the others."""
        time.sleep(GRACE_SECONDS * min(self.rank, MOST_GRACE))

    def after_last_words(self) -> None:
        """If this rank has failed, end the others now, even while they compute."""

    def cores(self) -> int:
        """The processor cores that this rank may use: those of its machine are divided among the ranks there.

        All ranks ask for it together the first time.
        """
        if self._cores is None:
            own = [socket.gethostname(), sorted(processes.cores_used())]
            self._cores = max(1, len(own[1]) // self.all_gather(own).count(own))
        return self._cores

    def each(self, function: Callable[[], T]) -> T:
        """What the function returns on this rank; all call it. A BabyError of one of them is raised by all."""
        if self.size == 1:
            return function()
        result, problem = None, None
        try:
            result = function()
        except BabyError as error:
            problem = error
        for rank, found in enumerate(self.all_gather(problem and str(problem))):
            if found is not None:
                if problem is not None and rank == self.rank:
                    raise problem
                raise BabyError(f"rank {rank}: {found}" if rank else found)
        return result  # type: ignore[return-value]

    @contextmanager
    def others(self) -> Iterator[Others | None]:
        """On rank 0, the other ranks: each computes one call at a time, until rank 0 leaves the context.

        Then they enter it, with None. After an error on rank 0 they end with its process.
        """
        yield []

    def machines(self) -> int:
        """The number of machines that the ranks are on. All ranks ask for it together."""
        return len(set(self.all_gather(socket.gethostname())))

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        return [self.broadcast(value, root) for root in range(self.size)]

    def first(self, function: Callable[[], T]) -> T:
        """What the function returns on rank 0, which alone calls it; what `broadcast` can send. If it raises a
        BabyError there, all raise one."""
        if self.size == 1:
            return function()
        result, problem = None, None
        if self.rank == 0:
            try:
                result = function()
            except BabyError as error:
                problem = error
        result, said = self.broadcast((result, problem and str(problem)))
        if said is not None:
            raise problem or BabyError(said)
        return result  # type: ignore[return-value]


class GradualSum:
    """A sum that begins before all of its array is there; see Group.begin_sum. This one begins at the end.

    A context manager: the group breaks up if an error leaves it, as the other ranks may wait for the rest.
    """

    def __init__(self, group: Group, array: Any, pieces: list[list[int]]):
        self.group, self.array, self.pieces = group, array, pieces

    def __enter__(self) -> "GradualSum":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.group.fail()

    def ready(self, first: int) -> None:
        """The elements of the array from `first` on no longer change."""

    def progress(self) -> None:
        """Receive and send what is there; to be called often."""

    def finish(self, *small: Any) -> None:
        """Sum the rest. Each rank then has the sums of its shares; the rest of the array is undefined.

        small: arrays that become their whole sums.
        """
        for bounds in self.pieces:
            first = bounds[0]
            self.group.sum_shares(self.array[first : bounds[-1]], [one - first for one in bounds])
        self.group.sum(*small)
