"""Shared by all benchmarks: child processes, turn taking, command lines, and facts about the machine."""

import argparse
import platform
import re
import shutil
import statistics
import subprocess
import sys
import traceback
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from baby_xp import processes
from baby_xp.arrays.registry import names
from baby_xp.errors import BabyError

ROOT = Path(__file__).parents[1]
US = "baby_xp"
MIB = 2**20

# These pin a BLAS kernel, a number of threads, or the precision of a GPU's products. A setting that somebody made
# for another program would decide the comparison, so no child process inherits them.
REMOVED = (
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE", "CUPY_TF32", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUDA_LAUNCH_BLOCKING",
)  # fmt: skip


def say(text: str) -> None:
    """Print a progress line to stderr; stdout has only the results."""
    print(text, file=sys.stderr, flush=True)


class Failed(SystemExit):
    """A child process has no result. It ends the program with the reason, unless it is caught."""


def environment() -> dict[str, str]:
    """The environment of a child process: without what is REMOVED."""
    return {name: value for name, value in processes.environment().items() if name not in REMOVED}


def ask(task: str, **request: Any) -> Any:
    """What the function that a text like "bench.peers:train" names returns, called in a process of its own."""
    options = {"cwd": ROOT, "env": environment()}
    try:
        with processes.started("bench.harness:answer", "a child process", "try again", **options) as child:
            return processes.ask(child, {"task": task, "request": request})
    except processes.Ended as how:
        raise Failed(f"bench: a child process {how}") from None
    except BabyError as error:
        raise Failed(f"bench: {error}") from None


def answer(task: str, request: dict) -> Any:
    """What a child does. An error of a library becomes one line for the parent, below its traceback on stderr."""
    try:
        return resolve_name(task)(**request)
    except BabyError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise BabyError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


def take_turns(
    task: str, requests: dict[Any, dict], rounds: int, label: str, all_needed: bool = False
) -> Iterator[tuple[dict[Any, list[dict]], dict[Any, str]]]:
    """Do the task with each request once per round, so that a disturbance of some minutes affects all of them.

    Yields after each turn the runs so far, and why some failed: they get no further turns. all_needed: raise it.
    """
    runs, failed = {}, {}
    for number in range(rounds):
        for name in [one for one in requests if one not in failed]:
            who = f"{label} {name if isinstance(name, str) else ' '.join(name)}"
            try:
                found = ask(task, **requests[name])
            except Failed as error:
                if all_needed:
                    raise
                failed[name] = str(error)
                runs.pop(name, None)
                say(f"{who}: {error}: it is left out")
            else:
                runs.setdefault(name, []).append(found)
                say(f"{who} round {number + 1} of {rounds}: {statistics.median(found['ms']):.2f} ms")
            yield runs, failed


# command lines ------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if int(text) < 1:
        raise ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def positives(text: str) -> list[int]:
    """An argument that lists such numbers, like "1,16"."""
    return [positive(part) for part in text.split(",")]


def names_of(known: Iterable[str], what: str, none: bool = False) -> Callable[[str], list[str]]:
    """The type of an argument that lists known names, like "torch,jax". none: whether the list may be empty."""
    known = list(known)

    def names_in(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        if unknown := [name for name in found if name not in known]:
            raise ArgumentTypeError(f"unknown {what} {unknown[0]!r}: choose {', '.join(known)}")
        if not found and not none:
            raise ArgumentTypeError("name at least one")
        return found

    return names_in


# flags that several benchmarks have; of backends not `auto`, as a result must say which one was measured
OPTIONS: dict[str, dict] = {
    "backend": {"choices": names(), "help": "backend of baby_xp (%(default)s)"},
    "device": {"help": "device of that backend, such as gpu for jax"},
    "steps": {"type": positive, "help": "steps measured in each run"},
    "rounds": {"type": positive, "help": "rounds, in each of which every library runs once (%(default)s)"},
    "data": {"help": "path of the Shakespeare text (%(default)s: the text of the catalog)"},
    "out": {"type": Path, "help": "folder for the results, as JSON and Markdown"},
}


def parser(program: str, about: str, **defaults: Any) -> argparse.ArgumentParser:
    """A command line. about: the docstring of the module; defaults: those of the OPTIONS that it has."""
    return with_options(argparse.ArgumentParser(prog=program, description=about.partition("\n")[0]), **defaults)


def with_options(made: argparse.ArgumentParser, **defaults: Any) -> argparse.ArgumentParser:
    """The command line with these OPTIONS added."""
    for name, default in defaults.items():
        made.add_argument(f"--{name}", default=default, **OPTIONS[name])
    return made


def machine() -> dict[str, Any]:
    """The machine of a result; "gpu" only if there is one. Ask a child: REMOVED variables change the BLAS."""
    try:
        core = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        core = ""
    lines = (line.partition(":") for line in core.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    vendor = fields.get("vendor_id", platform.machine())
    about = {
        "vendor": {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}.get(vendor, vendor),
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": processes.cores(), "vectors": vectors(), "blas": blas(), "gpu": gpu(),
        "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip
    return {name: value for name, value in about.items() if value is not None}


def class_of(machine: dict[str, Any]) -> str:
    """The machine class in one line: vendor, vector width, BLAS kernel, cores. Times compare within one."""
    kernel = re.sub(r" \d\S*", "", machine["blas"])  # of any version
    return f"{machine['vendor']}, {machine['vectors']}, {kernel}, {machine['cores']} cores"


def vectors() -> str:
    """The widest vector instructions of this processor that NumPy uses. NumPy names them by level since 2.4."""
    groups = np.show_config(mode="dicts")["SIMD Extensions"]
    found = {*groups.get("baseline", ()), *groups.get("found", ())}
    known = {"AVX-512": ("X86_V4", "AVX512F"), "AVX2": ("X86_V3", "AVX2"), "NEON": ("NEON",)}
    return next((width for width, marks in known.items() if found.intersection(marks)), "no known vectors")


def gpu() -> str | None:
    """Name, memory, driver and power limit of the GPUs, as nvidia-smi reports them; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = "--query-gpu=name,memory.total,driver_version,power.limit"
    done = subprocess.run([program, query, "--format=csv,noheader"], stdout=subprocess.PIPE, text=True)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return "; ".join(lines) if done.returncode == 0 and lines else None


def blas() -> str:
    """BLAS libraries of this process, each with the kernel that it chose for this processor."""
    found = [info for info in threadpool_info() if info["user_api"] == "blas"]
    parts = {f"{i['internal_api']} {i['version']} {i.get('architecture', '')}".strip() for i in found}
    return ", ".join(sorted(parts)) or "unknown BLAS"
