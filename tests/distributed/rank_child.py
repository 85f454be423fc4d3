"""A rank of a test: the command line of baby_xp, with a fault at some place of some rank.

BABY_XP_FAULT is "rank place step": at that step, the rank kills itself while it computes, sums or writes.
"""

import os
import signal
import sys
import time

from baby_xp.cli import main
from baby_xp.distributed import mpi
from baby_xp.training.loop import Loop


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def prepare(rank: int, place: str, step: int) -> None:
    """Let the fault happen."""
    loops: list[Loop] = []
    advance, exchange, replace = Loop._advance, mpi.MpiGroup._exchange, os.replace

    def due() -> bool:
        whole = bool(loops) and loops[-1].group.size == int(os.environ["OMPI_COMM_WORLD_SIZE"])
        return whole and loops[-1].group.rank == rank and loops[-1].step == step

    def advanced(self):
        loops.append(self)
        if place == "compute" and due():
            die()
        advance(self)

    def exchanged(self, *arguments):
        found = exchange(self, *arguments)
        if place == "sum" and due():
            die()
        return found

    def replaced(source, target):
        if place == "write" and due() and "state_" in str(target):
            die()
        replace(source, target)

    Loop._advance, mpi.MpiGroup._exchange, os.replace = advanced, exchanged, replaced


if __name__ == "__main__":
    if fault := os.environ.get("BABY_XP_FAULT"):
        at, where, when = fault.split()
        prepare(int(at), where, int(when))
    if seconds := os.environ.get("BABY_XP_START_SECONDS"):
        mpi.START_SECONDS = float(seconds)
    sys.exit(main())
