"""Child processes, what memory they take, and what machine they run on."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from threadpoolctl import threadpool_info

ROOT = Path(__file__).parents[1]

# These pin a BLAS kernel, a number of threads, or the precision of a GPU's products. Somebody's setting for
# another program would decide the race, so no contender gets them.
REMOVED = (
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE", "CUPY_TF32", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUDA_LAUNCH_BLOCKING",
)  # fmt: skip


class Failed(SystemExit):
    """A child process ended without an answer; its traceback is on the screen by then."""


def start(task: str, **request) -> subprocess.Popen:
    """Begin a task of bench.child in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in REMOVED}
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.child"], cwd=ROOT, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    child.stdin.write(json.dumps({"task": task, **request}))
    child.stdin.close()
    return child


def answer(child: subprocess.Popen) -> dict:
    """What the task found. Raises Failed, which ends the program unless it is caught."""
    with child:
        text = child.stdout.read()
    if child.returncode:
        raise Failed(f"bench: a child process ended with exit code {child.returncode}")
    return json.loads(text)


def ask(task: str, **request) -> dict:
    """Do a task of bench.child in a process of its own and wait for what it found."""
    return answer(start(task, **request))


def together(memory: list[dict[str, int]]) -> int | None:
    """Bytes that the processes take together, shared pages counted once: an upper bound of the peak.

    An upper bound, as the peaks of the processes need not fall together. None where nothing is known.
    """
    if not memory:
        return None
    return memory[0]["peak"] + sum(one["peak"] - one["shared"] for one in memory[1:])


def blas() -> str:
    """BLAS libraries of this process and the kernel that each has chosen for this processor."""
    found = [info for info in threadpool_info() if info["user_api"] == "blas"]
    parts = {f"{i['internal_api']} {i['version']} {i.get('architecture', '')}".strip() for i in found}
    return ", ".join(sorted(parts)) or "unknown"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu() -> str | None:
    """Name, memory and driver of the GPUs, as nvidia-smi tells them; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = "--query-gpu=name,memory.total,driver_version,power.limit"
    done = subprocess.run([program, query, "--format=csv,noheader"], stdout=subprocess.PIPE, text=True)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return "; ".join(lines) if done.returncode == 0 and lines else None


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
