"""Ranks of NCCL, one GPU each: `torchrun --nproc-per-node 4 -m baby_xp train --distributed nccl`.

Sums are NCCL's allReduce. Its documentation promises no order of addition. Its maintainers say that all ranks
always get the same values (issue 855 of NVIDIA/nccl), and that sums in switches (NVLS) may differ from call to
call (issue 1497): these are off here unless the user turns them on. The other algorithms, rings and trees, add in
an order that follows from the size of the array and the connections of the GPUs.

NCCL waits forever for a rank that has died, inside kernels. `Connections` notices it and ends the process.
"""

import atexit
import os
import socket
import threading
from typing import Any

import numpy as np
from baby_xp_backends.cupy_backend import device_index, import_cupy

from baby_xp.distributed import launchers
from baby_xp.distributed.connections import Connections
from baby_xp.distributed.group import Group
from baby_xp.distributed.messages import packed, unpacked
from baby_xp.errors import BabyError

ABORT_SECONDS = 5.0
"""How long NCCL may take to end its kernels when this process ends because of a failure."""


def join() -> Group:
    """The group of all ranks. Raises BabyError if some do not come in time, or have no GPU of their own."""
    place = launchers.place()
    if place.size == 1:
        return Group()
    group = NcclGroup(place)
    atexit.register(group.end)
    try:
        group.begin()
    except BaseException:
        group.fail()
        group.before_last_words()  # all ranks raise the same
        raise
    return group


class NcclGroup(Group):
    """The ranks that one launcher started. Values go over TCP, sums over NCCL."""

    kind, backend, on_device = "nccl", "cupy", True

    def __init__(self, place: launchers.Place):
        self.rank, self.size, self._local_rank = place.rank, place.size, place.local_rank
        self._connections = Connections(place)
        self._communicator: Any = None
        self._failed = False

    def begin(self) -> None:
        """Choose this rank's GPU and meet the others in NCCL. If one cannot, all raise BabyError."""
        own = self.each(lambda: _Own(self._local_rank))
        cards = self.all_gather(own.card)
        for rank, card in enumerate(cards):
            if (first := cards.index(card)) != rank:
                shared = f"ranks {first} and {rank} would share GPU {card}"
                raise BabyError(f"{shared}: start one process for each GPU")
        self._own, self.device = own, f"cuda:{own.device.id}"
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        own.device.use()
        try:
            name = self.broadcast([*own.nccl.get_unique_id()] if self.rank == 0 else [])
            self._communicator = own.nccl.NcclCommunicator(self.size, bytes(name), self.rank)
        except own.nccl.NcclError as error:
            raise _failure(error) from None

    def sum(self, *arrays: Any) -> None:
        """As Group.sum; contiguous arrays on this rank's GPU. The host does not wait for them."""
        self._connections.check()
        self._own.device.use()
        nccl, stream = self._own.nccl, self._own.cupy.cuda.get_current_stream().ptr
        try:
            nccl.groupStart()
            for array in arrays:
                at, kind = array.data.ptr, self._own.kinds[array.dtype.name]
                self._communicator.allReduce(at, at, array.size, kind, nccl.NCCL_SUM, stream)
            nccl.groupEnd()
        except nccl.NcclError as error:
            raise _failure(error) from None

    def sum_of_numbers(self, *numbers: float) -> list[float]:
        """As Group.sum_of_numbers; waits for the device."""
        self._own.device.use()
        found = self._own.cupy.array(np.array(numbers, np.float64))
        self.sum(found)
        return self._own.cupy.asnumpy(found).tolist()

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """As Group.broadcast."""
        data = self._connections.broadcast(packed(value) if self.rank == root else b"", root)
        return value if self.rank == root else unpacked(data)

    def fail(self) -> None:
        """As Group.fail."""
        self._failed = True
        self._connections.fail()

    def before_last_words(self) -> None:
        """As Group.before_last_words."""
        super().before_last_words()
        self._connections.take_last_words()

    def end(self) -> None:
        """Leave the group when the program ends; after a failure, end the other ranks."""
        self._connections.end()
        if self._failed and self._communicator is not None:
            # its kernels may wait for ranks that are gone. Not earlier: what they summed would be taken for sums
            timer = threading.Timer(ABORT_SECONDS, os._exit, (2,))
            timer.daemon = True
            timer.start()
            self._communicator.abort()
            timer.cancel()


class _Own:
    """What a rank computes with: CuPy, its NCCL, and a GPU. Raises BabyError if one of them is missing."""

    def __init__(self, local_rank: int):
        self.cupy = import_cupy()
        device_index(self.cupy, None)  # raises if there is none
        from cupy.cuda import nccl

        runtime = self.cupy.cuda.runtime
        if not nccl.available:
            wheel = f"nvidia-nccl-cu{runtime.runtimeGetVersion() // 1000}"
            raise BabyError(f"--distributed nccl needs NCCL, which CuPy does not find: pip install {wheel}")
        self.nccl, self.kinds = nccl, {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}
        # a launcher may let each rank see its own GPU alone, which is then its cuda:0
        self.device = self.cupy.cuda.Device(local_rank % runtime.getDeviceCount())
        self.card = f"{self.device.pci_bus_id} of {socket.gethostname()}"


def _failure(error: Exception) -> BabyError:
    """The message for an error of NCCL."""
    return BabyError(f"NCCL failed ({' '.join(str(error).split())}); NCCL_DEBUG=INFO shows the cause")
