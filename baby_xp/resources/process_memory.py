"""The memory that the machine has and that processes take, from Linux's /proc. Other systems report nothing
about processes: [] and None.

Two sizes describe a process, in bytes:

    peak    its highest resident memory so far. VmHWM and not getrusage's ru_maxrss, which may begin with the
            peak of the parent: Linux carries that over into the child
    shared  what of it others may share, libraries and mapped files, at present
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

Sizes = dict[str, int]
PROC = Path("/proc")
STATUS = "print(open('/proc/self/status').read())"


def free() -> int | None:
    """Bytes of memory that are free now, swap included; all memory if the system does not report what others use,
    None if it reports nothing."""
    with suppress(OSError, KeyError, ValueError):
        fields = _fields((PROC / "meminfo").read_text())
        return 1024 * (int(fields["MemAvailable"][0]) + int(fields["SwapFree"][0]))
    with suppress(AttributeError, ValueError, OSError):
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return size if size > 0 else None
    return None


def taken(children: Sequence[int] = ()) -> list[Sizes]:
    """Sizes of this process and of these others, in this order; [] where they are unknown."""
    try:
        return [_sizes((PROC / name / "status").read_text()) for name in ("self", *map(str, children))]
    except (OSError, KeyError):
        return []


def children() -> list[int]:
    """The processes that this one has started and that still run, the oldest first; [] without /proc."""
    found = []
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError, KeyError):  # the process has ended in the meantime
            if _fields((folder / "status").read_text())["PPid"][0] == str(os.getpid()):
                found.append(int(folder.name))
    return sorted(found)


def of_interpreter(environment: Mapping[str, str] | None = None) -> Sizes | None:
    """Sizes of a bare Python process that does nothing; None where they are unknown."""
    if not taken():
        return None
    done = subprocess.run([sys.executable, "-c", STATUS], stdout=subprocess.PIPE, text=True, env=environment)
    return _sizes(done.stdout) if done.returncode == 0 else None


def growth(memory: Sequence[Sizes], idle: Sizes) -> int:
    """Bytes that the processes take together beyond as many idle ones, shared pages counted once.

    For the first process its whole peak counts; each other one adds what is its own, as the arena and the
    libraries are already in the first one's. Peaks need not fall together, so this is an upper bound.
    """
    main, *others = memory
    idle_own = idle["peak"] - idle["shared"]
    return main["peak"] - idle["peak"] + sum(one["peak"] - one["shared"] - idle_own for one in others)


def _sizes(status: str) -> Sizes:
    fields = _fields(status)
    size = {name: 1024 * int(fields[name][0]) for name in ("VmHWM", "RssFile", "RssShmem")}
    return {"peak": size["VmHWM"], "shared": size["RssFile"] + size["RssShmem"]}


def _fields(status: str) -> dict[str, list[str]]:
    lines = (line.partition(":") for line in status.splitlines())
    return {name: value.split() for name, _, value in lines}
