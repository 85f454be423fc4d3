"""A rank of a test: the command line of baby_xp, with a fault at some place of some rank.

BABY_XP_FAULT is "rank place step": at that step, the rank kills itself while it computes, sums or writes, or while
gradients travel. The ranks that are left cannot leave MPI as usual, which Open MPI sometimes cannot either.
BABY_XP_PIECE: the gradients are sent in pieces of this many elements for each rank.
BABY_XP_MACHINES: the number of machines that all ranks say they are on.
"""

import os
import signal
import sys
import time

import numpy as np

from baby_xp.cli import main
from baby_xp.distributed import Group, current, mpi
from baby_xp.text.batches import RandomWindows
from baby_xp.training import optimizers


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def prepare(rank: int, place: str, step: int) -> None:
    """Let the fault happen."""
    batch, replace, ready, steps = RandomWindows.batch, os.replace, mpi.MpiSum.ready, [-1]

    def due() -> bool:
        group = current()
        return steps[0] == step and group.rank == rank and group.size == int(os.environ["OMPI_COMM_WORLD_SIZE"])

    def batched(self, at):
        steps[0] = at
        if place == "compute" and due():
            die()
        return batch(self, at)

    def added(terms, out):
        if place == "sum" and due():
            die()
        np.sum(terms, axis=0, out=out)

    def sent(self, first):
        ready(self, first)
        if place == "travel" and due() and 0 < first < self.array.size:
            die()

    def replaced(source, target):
        steps[0] += 1  # of the steps that are done
        if place == "write" and due() and "state_" in str(target):
            die()
        steps[0] -= 1
        replace(source, target)

    def mended(group):
        done = mend(group)
        from mpi4py import MPI

        MPI.Finalize = lambda: time.sleep(3600)
        return done

    mend, mpi.MpiGroup.mend = mpi.MpiGroup.mend, mended
    RandomWindows.batch, mpi.add, os.replace, mpi.MpiSum.ready = batched, added, replaced, sent


if __name__ == "__main__":
    if fault := os.environ.get("BABY_XP_FAULT"):
        at, where, when = fault.split()
        prepare(int(at), where, int(when))
    if piece := os.environ.get("BABY_XP_PIECE"):
        optimizers.PIECE = int(piece)
    if machines := os.environ.get("BABY_XP_MACHINES"):
        Group.machines = lambda self: int(machines)
    if seconds := os.environ.get("BABY_XP_START_SECONDS"):
        mpi.START_SECONDS = float(seconds)
    sys.exit(main())
