"""Starts mpiexec for tests of several ranks on this machine."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from baby_xp import processes

SECONDS = 120.0
"""How long the ranks of a test may run."""
PROGRAM = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
"""The mpiexec of this environment, else the first one of the path."""
LAUNCHER = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # more ranks than cores: variables instead of --oversubscribe, which only Open MPI has
    "OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}  # fmt: skip


def _missing() -> str:
    """What is missing for several ranks; nothing if they can be started."""
    if importlib.util.find_spec("mpi4py") is None:
        return "ranks need mpi4py, which is not installed"
    return "" if PROGRAM else "ranks need mpiexec, which is not installed"


needs_mpi = pytest.mark.skipif(bool(_missing()), reason=_missing() or "ranks can be started")


def started(number: int, *arguments: str, flags: Sequence[str] = (), **options: Any) -> subprocess.Popen:
    """`mpiexec FLAGS -n NUMBER python ARGUMENTS`, with pipes for its output. options: those of Popen.

    env: variables besides those of this process.
    """
    env = {**processes.environment(), **LAUNCHER, **options.pop("env", {})}
    command = [str(PROGRAM), *flags, "-n", str(number), sys.executable, *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=env, **{**pipes, **options})


def ended(launcher: subprocess.Popen, seconds: float = SECONDS) -> subprocess.CompletedProcess:
    """The end of what `started` returned. Ends the ranks and raises TimeoutExpired if they run too long."""
    try:
        out, err = launcher.communicate(timeout=seconds)
    except BaseException:
        launcher.terminate()  # it ends the ranks
        with suppress(subprocess.TimeoutExpired):
            launcher.communicate(timeout=10)
        launcher.kill()
        launcher.communicate()
        raise
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, out, err)


def mpiexec(number: int, *arguments: str, seconds: float = SECONDS, **options: Any) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` in so many ranks -> exit code, stdout and stderr. options: as of `started`."""
    return ended(started(number, *arguments, **options), seconds)
