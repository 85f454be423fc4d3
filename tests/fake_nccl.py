"""As much of cupy.cuda.nccl as the ranks use, between the processes or threads of this machine: for fake_cupy.py.

Rank 0 adds up what the others send, in the order of their ranks. As with NCCL, a call waits forever for a rank
that has died.
"""

import contextlib
import ctypes
import socket
import threading
import types

import numpy as np

KINDS = {7: np.float32, 8: np.float64}
LISTENERS: dict[bytes, socket.socket] = {}
UNIQUE_ID_BYTES = 128


class NcclError(RuntimeError):
    pass


def get_unique_id() -> bytes:
    """The port where rank 0 waits for the others."""
    listener = socket.create_server(("127.0.0.1", 0))
    name = str(listener.getsockname()[1]).encode().ljust(UNIQUE_ID_BYTES, b"\0")
    LISTENERS[name] = listener
    return name


class Calls(threading.local):
    """The calls of a group, which begin at its end."""

    def __init__(self):
        self.depth, self.waiting = 0, []

    def start(self) -> None:
        self.depth += 1

    def end(self) -> None:
        assert self.depth > 0
        self.depth -= 1
        while self.depth == 0 and self.waiting:
            self.waiting.pop(0)()

    def add(self, call) -> None:
        with self:
            self.waiting.append(call)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *error) -> None:
        self.end()


def numbers_at(pointer: int, count: int, kind: int) -> np.ndarray:
    size = count * np.dtype(KINDS[kind]).itemsize
    return np.frombuffer((ctypes.c_byte * size).from_address(pointer), KINDS[kind])


def exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):  # which may end with what this rank has sent
        data = connection.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        threading.Event().wait()  # for a rank that is gone
    return data


def communicator(machine, calls: Calls) -> type:
    class NcclCommunicator:
        def __init__(self, size: int, name: bytes, rank: int):
            assert len(name) == UNIQUE_ID_BYTES
            self.rank, self.device, self.peers = rank, machine.current, []
            if rank == 0:
                with LISTENERS.pop(name) as listener:
                    peers = [listener.accept()[0] for _ in range(size - 1)]
                self.peers = [peer for _, peer in sorted((exactly(peer, 1)[0], peer) for peer in peers)]
            else:
                self.peers = [socket.create_connection(("127.0.0.1", int(name.rstrip(b"\0"))))]
                self.peers[0].sendall(bytes([rank]))

        def allReduce(self, source: int, target: int, count: int, kind: int, operation: int, stream: int):
            assert (operation, stream) == (0, machine.stream)
            assert machine.current == self.device
            machine.launch("allReduce")
            calls.add(lambda: self.sum(numbers_at(source, count, kind), numbers_at(target, count, kind)))

        def sum(self, source: np.ndarray, target: np.ndarray) -> None:
            if self.rank:
                with contextlib.suppress(OSError):
                    self.peers[0].sendall(source.tobytes())
                target[:] = np.frombuffer(exactly(self.peers[0], target.nbytes), target.dtype)
                return
            target[:] = source
            for peer in self.peers:
                target += np.frombuffer(exactly(peer, target.nbytes), target.dtype)
            for peer in self.peers:
                with contextlib.suppress(OSError):
                    peer.sendall(target.tobytes())

        def abort(self) -> None:
            for peer in self.peers:
                peer.close()

        __del__ = abort

    return NcclCommunicator


def module(machine) -> types.ModuleType:
    """What to put into the place of cupy.cuda.nccl."""
    nccl, calls = types.ModuleType("cupy.cuda.nccl"), Calls()
    nccl.available, nccl.NcclError, nccl.get_unique_id = True, NcclError, get_unique_id
    nccl.NCCL_FLOAT32, nccl.NCCL_FLOAT64, nccl.NCCL_SUM = 7, 8, 0
    nccl.groupStart, nccl.groupEnd = calls.start, calls.end
    nccl.NcclCommunicator = communicator(machine, calls)
    return nccl
