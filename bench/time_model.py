"""A model of the time of a step that several ranks share, from constants that are measured directly.

A step takes as long as a rank computes, plus what the ranks send each other (`exchange_seconds`):

    bytes / bandwidth + messages * message + elements * add + trips * latency

The counts follow from `baby_xp/training/ranks.py` and `baby_xp/distributed/mpi.py`. Each rank sends every other
one that rank's share of the gradients, piece by piece, and adds up its own share; tells the others the norm of it;
and sends every other rank its share of the new parameters.
"""

import math
from dataclasses import dataclass

from baby_xp.distributed.group import PIECE

EAGER = 1 << 16
"""Bytes up to which Open MPI sends a message over TCP at once; a longer one is announced and asked for first."""
NUMBERS = 4
"""How many float64 travel beside the gradients in each step: the loss, and what rank 0 tells the others."""


@dataclass(frozen=True)
class Link:
    """What connects the ranks, and what a rank needs for the messages, in seconds and bytes per second."""

    latency: float
    """From the call that sends a small message to its arrival."""
    bandwidth: float
    """Bytes per second that each rank sends while all do."""
    message: float
    """Of a processor, for each message."""
    add: float
    """Of a processor, for each element that arrives: it is added to the others."""


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in one step: bytes and messages. trips: messages that must wait for the one before."""

    bytes: float
    messages: int
    trips: int


@dataclass(frozen=True)
class Work:
    """Seconds of computing in a step: for each sample, and for the update, which the ranks divide."""

    sample: float
    update: float

    def seconds(self, samples: int, ranks: int) -> float:
        """Of a rank with so many samples."""
        return self.sample * samples + self.update / ranks


def traffic(elements: int, ranks: int, itemsize: int = 4) -> Traffic:
    """What each of the ranks sends in a step with so many parameters (P,)."""
    others, share = ranks - 1, math.ceil(elements / ranks)
    if not others:
        return Traffic(0.0, 0, 0)
    pieces = math.ceil(share / PIECE)
    sent = 2 * others / ranks * elements * itemsize + 8 * (NUMBERS + 1) * others
    # pieces of the gradients, and shares of the parameters; the numbers; the norm
    messages = (pieces + 3) * others
    # the first piece, as the others follow meanwhile; the norm; the parameters
    trips = 1 + sum(1 if itemsize * size <= EAGER else 3 for size in (min(share, PIECE), share))
    return Traffic(sent, messages, trips)


def exchange_parts(elements: int, ranks: int, link: Link) -> dict[str, float]:
    """Seconds of what the ranks exchange in a step, by what takes them. A rank alone exchanges nothing."""
    sends = traffic(elements, ranks)
    return {
        "bytes": sends.bytes / link.bandwidth,
        "messages": sends.messages * link.message,
        "adding": elements * link.add if ranks > 1 else 0.0,
        "latency": sends.trips * link.latency,
    }


def exchange_seconds(elements: int, ranks: int, link: Link) -> float:
    """Seconds of what the ranks exchange in a step with so many parameters (P,)."""
    return sum(exchange_parts(elements, ranks, link).values())


def work(batch: int, seconds: float, smaller: int, seconds_of_smaller: float) -> Work:
    """What follows from the time of a step with two batch sizes."""
    sample = (seconds - seconds_of_smaller) / (batch - smaller)
    return Work(sample, max(0.0, seconds_of_smaller - sample * smaller))


def step_seconds(work: Work, batch: int, ranks: int, elements: int, link: Link) -> float:
    """Seconds of a step of a batch, which the ranks share as evenly as whole samples allow."""
    return work.seconds(math.ceil(batch / ranks), ranks) + exchange_seconds(elements, ranks, link)


def efficiency(work: Work, batch: int, ranks: int, elements: int, link: Link) -> float:
    """The time of one rank alone for the whole batch, as a share of the time that all ranks spend together."""
    alone, together = (step_seconds(work, batch, number, elements, link) for number in (1, ranks))
    return alone / (ranks * together)
