"""Hosts on one machine: network namespaces, joined by a network of limited bandwidth and latency. Linux, root.

The bandwidth of what a host sends is limited by the kernel (`tc`, token bucket). Latency is made by a process: all
hosts are connected to it by TAP devices, and it keeps each frame for a while before it passes it on. (The kernel's
own way, netem, is often not compiled in.) A frame is large, up to MTU bytes, so that there are few of them.
Without latency, the kernel alone passes the frames on, by a bridge: no process takes time from those that compute.

mpiexec starts ranks on other hosts with ssh, or with the program that it is given instead: here, a script that
enters the namespace of a host, which also gets a name of its own.
"""

import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from baby_xp import processes
from baby_xp.errors import BabyError
from bench import harness
from bench.launch import Place

NAME, SUBNET = "baby-xp", "198.18.0"  # the block of addresses for benchmarks of networks (RFC 2544)
INTERFACE, MTU, HEADER = "eth0", 60_000, 14
QUEUE = 64 * 2**20
"""Bytes that may wait for the limited bandwidth, more than any rank sends at once."""
TUNSETIFF, TAP, NO_PACKET_INFORMATION = 0x400454CA, 0x0002, 0x1000
# HOST COMMAND...: what mpiexec calls in the place of ssh; ranks are bound to the cores in turn
AGENT = """#!/bin/sh
host=${{1##*.}}; shift
name={name}-$host core=$({core})
exec ip netns exec $name unshare --uts sh -c 'hostname $0; exec taskset -c $1 sh -c "$2"' $name $core "$*"
"""


@dataclass(frozen=True)
class Line:
    """What connects a host with all others: bits per second that it sends, seconds until they arrive."""

    bits: float
    delay: float


@contextmanager
def connected(number: int, line: Line) -> Iterator[Place]:
    """So many hosts, each for one rank; mpiexec runs on another one. All are removed at the end.

    Raises BabyError if this machine has no such namespaces.
    """
    if not sys.platform.startswith("linux") or os.geteuid():
        raise BabyError("network namespaces need Linux and root: run it as root, or leave out --network")
    if missing := [program for program in ("ip", "tc", "unshare", "taskset") if shutil.which(program) is None]:
        raise BabyError(f"--network needs the program {missing[0]}: install iproute2 and util-linux")
    hosts = range(number + 1)
    with ExitStack() as undo:
        _remove()
        undo.callback(_remove)
        if line.delay:
            taps = [_tap(host, line, undo) for host in hosts]
            switch = subprocess.Popen(
                [sys.executable, "-m", "bench.hosts", repr(line.delay), *map(str, taps)],
                stdin=subprocess.PIPE, pass_fds=taps, cwd=harness.ROOT, env=harness.environment(),
            )  # fmt: skip
            undo.enter_context(switch)  # waits for its end
            undo.callback(switch.kill)
        else:
            _bridge(hosts, line)
        folder = undo.enter_context(TemporaryDirectory())
        agent = Path(folder) / "agent"
        agent.write_text(AGENT.format(name=NAME, core=_core()), "utf-8")
        agent.chmod(0o700)
        yield Place(
            before=("ip", "netns", "exec", f"{NAME}-0"),
            flags=("--host", ",".join(f"{SUBNET}.{host}:1" for host in hosts[1:])),
            environment={
                "PRTE_MCA_plm_ssh_agent": str(agent), "PRTE_MCA_rmaps_default_mapping_policy": "node",
                "PRTE_MCA_hwloc_default_binding_policy": "none",
                **OVER_TCP, "OMPI_MCA_btl_tcp_if_include": f"{SUBNET}.0/24",
            },
            interface=INTERFACE,
        )  # fmt: skip


OVER_TCP = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "tcp,self"}
"""Variables for Open MPI: messages go over TCP, and not through memory that ranks of one machine share."""


def sent(interface: str) -> int:
    """Bytes that left this host through the interface."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    raise BabyError(f"this host has no interface {interface}")


def _core() -> str:
    """Shell code that prints the core of $host."""
    cores = sorted(processes.cores_used())
    return f"echo {' '.join(map(str, cores))} | cut -d ' ' -f $((($host - 1) % {len(cores)} + 1))"


def _tap(host: int, line: Line, undo: ExitStack) -> int:
    """Make a namespace with one interface -> the file in which its frames arrive."""
    import fcntl  # not everywhere

    name = f"{NAME}-{host}"
    try:
        tap = os.open("/dev/net/tun", os.O_RDWR)
        undo.callback(os.close, tap)
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH", name.encode(), TAP | NO_PACKET_INFORMATION))
    except OSError as error:
        raise BabyError(f"--network needs TAP devices ({error.strerror}): allow /dev/net/tun") from None
    _run("ip", "netns", "add", name)
    _run("ip", "link", "set", name, "netns", name)
    _run("ip", "-n", name, "link", "set", name, "name", INTERFACE, "address", f"02:00:00:00:00:{host:02x}")
    _connect(host, line)
    return tap


def _bridge(hosts: Iterable[int], line: Line) -> None:
    """Make the namespaces; that of host 0 has a bridge, to which the interfaces of the others are connected."""
    for host in hosts:
        _run("ip", "netns", "add", f"{NAME}-{host}")
    _run("ip", "-n", f"{NAME}-0", "link", "add", INTERFACE, "type", "bridge")
    for host in hosts:
        if host:
            ends = "type", "veth", "peer", "name", INTERFACE, "netns", f"{NAME}-{host}"
            _run("ip", "link", "add", f"port{host}", "netns", f"{NAME}-0", *ends)
            _run("ip", "-n", f"{NAME}-0", "link", "set", f"port{host}", "mtu", str(MTU), "master", INTERFACE, "up")
        _connect(host, line)


def _connect(host: int, line: Line) -> None:
    """Give the host its address, and its interface the limit of its bandwidth."""
    name, address = f"{NAME}-{host}", f"{SUBNET}.{host or 254}"
    _run("ip", "-n", name, "link", "set", INTERFACE, "mtu", str(MTU), "up")
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
    limits = "rate", f"{line.bits:.0f}bit", "burst", str(MTU + HEADER), "limit", str(QUEUE)
    _run("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limits)


def _remove() -> None:
    """Remove the namespaces and the processes in them; also those of a measurement that was killed."""
    for line in _run("ip", "netns", "list").splitlines():
        name = line.partition(" ")[0]
        if name.startswith(f"{NAME}-"):
            for process in _run("ip", "netns", "pids", name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            _run("ip", "netns", "delete", name)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BabyError(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}")
    return done.stdout


def pass_on(delay: float, taps: list[int]) -> None:
    """Pass each frame on, some time after it came, until the standard input ends. taps: by number of the host."""
    waiting: deque[tuple[float, list[int], bytes]] = deque()
    while True:
        left = max(0.0, waiting[0][0] - time.perf_counter()) if waiting else None
        ready, _, _ = select.select([0, *taps], [], [], left)
        if 0 in ready:
            return
        now = time.perf_counter()
        for tap in ready:
            frame = os.read(tap, MTU + HEADER)
            to = frame[5]  # the last byte of the receiver's address
            one = frame[0] == 2 and to < len(taps)
            waiting.append((now + delay, [taps[to]] if one else [other for other in taps if other != tap], frame))
        while waiting and waiting[0][0] <= time.perf_counter():
            _, receivers, frame = waiting.popleft()
            for receiver in receivers:
                with suppress(OSError):  # the interface may not be up yet
                    os.write(receiver, frame)


if __name__ == "__main__":
    with suppress(PermissionError):  # whatever computes should not delay it further
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    pass_on(float(sys.argv[1]), list(map(int, sys.argv[2:])))
