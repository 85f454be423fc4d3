"""Connections of rank 0 with each other rank, over TCP: they carry values, and tell when a rank ends.

A library such as NCCL waits forever for a rank that has died. Here, a thread reads each connection, which the
system closes when the process at its other end dies. A rank that ends well says so first.

Rank 0 speaks first, so that nothing is sent to a stranger's port. Whoever can open a connection to rank 0 while
the ranks start can join them: the network must be as trustworthy as for NCCL itself.
"""

import atexit
import hashlib
import os
import queue
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from baby_xp.distributed.group import Lost
from baby_xp.distributed.launchers import LOOPBACK, Place
from baby_xp.errors import BabyError

START_SECONDS = 300.0
"""How long ranks wait for those that start later."""
GREETING_SECONDS = 5.0
"""How long a connection may take until both sides know each other."""
PORTS = 10
"""Ports that rank 0 tries: a run that just ended, or another one, may have the first."""
NOTICE_SECONDS, REPORT_SECONDS = 1.0, 5.0
"""After the loss of a rank: how long the main thread has until it notices, and then until it has reported it."""
PARTING_SECONDS = 1.0
"""How long a rank that ends well waits for the others to do so: what it has sent then arrives."""
HEADER = struct.Struct("!cQ")
"""What a message is, and its length in bytes."""
VALUE, FAREWELL, FAILURE = b"v", b"g", b"f"
RANK = struct.Struct("!I")
# a machine that is gone closes nothing: ask after 2 s, give up after three more
ALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 5000}


class Connections:
    """Of this rank: rank 0 has one to each other rank, and they have one to rank 0."""

    def __init__(self, place: Place):
        """Waits for all ranks. Raises BabyError if some do not come in time."""
        self._rank, self._size = place.rank, place.size
        # of the ranks that rank 0 leaves behind, one on each machine reports it
        self._reports = place.rank <= 1 or place.local_rank == 0
        self._sockets = _accepted(place) if place.rank == 0 else {0: _connected(place)}
        self._arrived: dict[int, queue.SimpleQueue[bytes | None]] = {}
        """Of each rank, what it sent; None at its end."""
        self._sending = {peer: threading.Lock() for peer in self._sockets}
        self._ending, self._noticed = threading.Lock(), threading.Event()
        self._last_words = threading.RLock()
        self._lost, self._failed, self._over = "", False, False
        self._readers = []
        for peer, connection in self._sockets.items():
            connection.settimeout(None)
            self._arrived[peer] = queue.SimpleQueue()
            self._readers.append(threading.Thread(target=self._read, args=(peer,), daemon=True))
        for reader in self._readers:
            reader.start()

    def broadcast(self, data: bytes, root: int) -> bytes:
        """What rank `root` has, on all. Raises Lost if a rank has ended."""
        self.check()
        if self._rank:
            if self._rank == root:
                self._send(0, VALUE, data)
                return data
            return self._receive(0)
        if root:
            data = self._receive(root)
        for peer in self._sockets:
            if peer != root:
                self._send(peer, VALUE, data)
        return data

    def check(self) -> None:
        """Raise Lost if a rank has ended before its time."""
        if self._lost:
            self._noticed.set()
            raise Lost(self._lost)

    def fail(self) -> None:
        """Note that this rank has failed: `end` then ends the others."""
        self._failed = True

    def take_last_words(self) -> None:
        """The calling thread reports the end of this process, no other one: call it before that is printed.

        Does not return if another thread has begun to do so: it ends the process.
        """
        self._last_words.acquire()

    def end(self) -> None:
        """Part from the other ranks, when the program ends."""
        self._over = True
        for peer, connection in self._sockets.items():
            with suppress(OSError, Lost):
                self._send(peer, FAILURE if self._failed else FAREWELL)
                connection.shutdown(socket.SHUT_WR)
        until = time.monotonic() + PARTING_SECONDS
        for reader in self._readers:
            reader.join(max(0.0, until - time.monotonic()))
        for connection in self._sockets.values():
            connection.close()

    def _send(self, peer: int, kind: bytes, data: bytes = b"") -> None:
        try:
            with self._sending[peer]:
                self._sockets[peer].sendall(HEADER.pack(kind, len(data)))
                self._sockets[peer].sendall(data)
        except OSError:
            raise self._gone(peer) from None

    def _receive(self, peer: int) -> bytes:
        data = self._arrived[peer].get()
        if data is None:
            self._arrived[peer].put(None)  # for the next call
            raise self._gone(peer)
        return data

    def _gone(self, peer: int) -> Lost:
        self._noticed.set()
        return Lost(self._lost or f"rank {peer} of {self._size} has ended: start all ranks again")

    # threads -------------------------------------------------------------------------------------------

    def _read(self, peer: int) -> None:
        """Take in what a rank sends, until it ends."""
        connection, said = self._sockets[peer], False
        try:
            while not said:
                kind, length = HEADER.unpack(_exactly(connection, HEADER.size))
                data = _exactly(connection, length)
                if kind == FAREWELL:
                    self._arrived[peer].put(None)
                    return
                if kind == VALUE:
                    self._arrived[peer].put(data)
                said = kind == FAILURE
        except OSError:
            pass
        with self._ending:  # the first thread ends the process
            self._end_process(peer, said)

    def _end_process(self, peer: int, said: bool) -> None:
        """End this process, whose main thread may wait for a rank that is gone. said: the failure was reported."""
        if self._over:
            return
        if not said and self._reports:
            self._lost = f"rank {peer} of {self._size} ended before its time"
            for arrived in self._arrived.values():
                arrived.put(None)
            if self._noticed.wait(NOTICE_SECONDS):  # it knows more: what has been kept
                time.sleep(REPORT_SECONDS)
            if self._over:
                return
            if self._last_words.acquire(blocking=False):  # and never released
                kept = "its last checkpoint, if there is one, can be resumed"
                print(f"baby_xp: {self._lost}; {kept}", file=sys.stderr, flush=True)
            else:  # the main thread has them, and ends this process next
                time.sleep(REPORT_SECONDS)
        # only now: a launcher may end this process as soon as another one has ended
        for other, sending in self._sending.items():
            if other != peer and sending.acquire(timeout=1.0):
                _tell_failure(self._sockets[other])
        os._exit(2)


# how they begin -----------------------------------------------------------------------------------------


def _greeting(place: Place) -> bytes:
    """What rank 0 says first: ranks that were not started together do not join each other."""
    return b"baby_xp " + hashlib.sha256(f"{place.launch} {place.size}".encode()).digest()


def _exactly(connection: socket.socket, length: int) -> bytes:
    """So many bytes. Raises OSError if the connection ends first."""
    data, at = memoryview(bytearray(length)), 0
    while at < length:
        received = connection.recv_into(data[at:])
        if not received:
            raise ConnectionError("the connection has ended")
        at += received
    return bytes(data)


def _configure(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _accepted(place: Place) -> dict[int, socket.socket]:
    """The connections of rank 0."""
    found: dict[int, socket.socket] = {}
    until = time.monotonic() + START_SECONDS
    try:
        with _listener(place) as listener:
            while len(found) < place.size - 1:
                listener.settimeout(max(0.01, until - time.monotonic()))
                connection, _ = listener.accept()
                rank = _greeted(connection, place)
                if rank in found:
                    raise BabyError(f"two processes are rank {rank}: does another run use the same port?")
                if rank is not None:
                    found[rank] = connection
            return found
    except TimeoutError:
        missing = ", ".join(str(rank) for rank in range(1, place.size) if rank not in found)
        late = f"rank {missing} of {place.size} did not start within {START_SECONDS:.0f} s"
        raise BabyError(late) from None
    finally:
        if len(found) < place.size - 1:
            for connection in found.values():  # as with `end`, once this rank has reported why
                atexit.register(_tell_failure, connection)


def _tell_failure(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.sendall(HEADER.pack(FAILURE, 0))


def _greeted(connection: socket.socket, place: Place) -> int | None:
    """The rank at the other end of a connection; None for a stranger."""
    try:
        _configure(connection)
        connection.settimeout(GREETING_SECONDS)
        connection.sendall(_greeting(place))
        (rank,) = RANK.unpack(_exactly(connection, RANK.size))
        if 0 < rank < place.size:
            return rank
    except OSError:
        pass
    connection.close()
    return None


def _listener(place: Place) -> socket.socket:
    """A port of this machine. It is open to others unless all ranks are here."""
    here, both = place.address in (LOOPBACK, "localhost"), socket.has_dualstack_ipv6()
    of_all: Any = {"family": socket.AF_INET6, "dualstack_ipv6": True} if both else {}
    for port in range(place.port, place.port + PORTS):
        with suppress(OSError):
            if here:
                return socket.create_server((LOOPBACK, port), backlog=place.size)
            return socket.create_server(("", port), backlog=place.size, **of_all)
    last = place.port + PORTS - 1
    raise BabyError(f"the ports {place.port} to {last} cannot be used on this machine: set MASTER_PORT")


def _connected(place: Place) -> socket.socket:
    """The connection of another rank with rank 0."""
    until, expected = time.monotonic() + START_SECONDS, _greeting(place)
    while time.monotonic() < until:
        for port in range(place.port, place.port + PORTS):
            with suppress(OSError):
                connection = socket.create_connection((place.address, port), GREETING_SECONDS)
                if _greets(connection, expected):
                    _configure(connection)
                    connection.sendall(RANK.pack(place.rank))
                    return connection
                connection.close()
        time.sleep(0.05)
    where = f"{place.address}, port {place.port} and the next {PORTS - 1}"
    raise BabyError(f"rank 0 was not found within {START_SECONDS:.0f} s at {where}")


def _greets(connection: socket.socket, expected: bytes) -> bool:
    try:
        return _exactly(connection, len(expected)) == expected
    except OSError:
        return False
