"""A model of the time of a step that several ranks share, from constants that are measured directly.

A step takes as long as a rank computes, plus the sum of the gradients (`sum_seconds`):

    bytes / bandwidth + messages * message + elements * add + trips * latency

The counts follow from what `baby_xp/distributed/mpi.py` sends. The gradients travel in buckets. Of each bucket, a
rank sends every other rank that rank's share, adds up its own share, and sends the sum to every other rank.
"""

import math
from dataclasses import dataclass

from baby_xp.distributed.mpi import BUCKET

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
    """What a rank sends in one sum: bytes and messages. trips: messages that must wait for the one before."""

    bytes: float
    messages: int
    trips: int


@dataclass(frozen=True)
class Work:
    """Seconds that a rank computes in a step: for each sample, and whatever the number of samples is."""

    sample: float
    fixed: float

    def seconds(self, samples: int) -> float:
        """Of a step with so many samples."""
        return self.sample * samples + self.fixed


def traffic(elements: int, ranks: int, itemsize: int = 4) -> Traffic:
    """What each of the ranks sends in the sum of a step's gradients (P,), with the numbers beside them."""
    others = ranks - 1
    if not others:
        return Traffic(0.0, 0, 0)
    buckets = math.ceil(elements / BUCKET)
    share = itemsize * min(elements, BUCKET) / ranks
    sent = 2 * others / ranks * elements * itemsize + 8 * NUMBERS * others
    # the first bucket's shares, then the last one's sums; the others travel meanwhile
    trips = 2 * (1 if share <= EAGER else 3)
    return Traffic(sent, (2 * buckets + 1) * others, trips)


def sum_parts(elements: int, ranks: int, link: Link) -> dict[str, float]:
    """Seconds of the sum of the gradients (P,), by what takes them. A rank alone sums nothing."""
    sends = traffic(elements, ranks)
    return {
        "bytes": sends.bytes / link.bandwidth,
        "messages": sends.messages * link.message,
        "adding": elements * link.add if ranks > 1 else 0.0,
        "latency": sends.trips * link.latency,
    }


def sum_seconds(elements: int, ranks: int, link: Link) -> float:
    """Seconds of the sum of the gradients (P,)."""
    return sum(sum_parts(elements, ranks, link).values())


def work(batch: int, seconds: float, smaller: int, seconds_of_smaller: float) -> Work:
    """What follows from the time of a step with two batch sizes."""
    sample = (seconds - seconds_of_smaller) / (batch - smaller)
    return Work(sample, max(0.0, seconds_of_smaller - sample * smaller))


def step_seconds(work: Work, batch: int, ranks: int, elements: int, link: Link) -> float:
    """Seconds of a step of a batch, which the ranks share as evenly as whole samples allow."""
    return work.seconds(math.ceil(batch / ranks)) + sum_seconds(elements, ranks, link)


def efficiency(work: Work, batch: int, ranks: int, elements: int, link: Link) -> float:
    """The time of one rank alone for the whole batch, as a share of the time that all ranks spend together."""
    alone, together = (step_seconds(work, batch, number, elements, link) for number in (1, ranks))
    return alone / (ranks * together)
