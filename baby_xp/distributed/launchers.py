"""The place of this process among the ranks, as the variables of the program that started it say.

torchrun is asked first, because srun or mpiexec may have started it; then mpiexec, which uses srun inside a Slurm
job; then srun. A process that none of them started is alone.
"""

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from baby_xp.errors import BabyError

Variables = Mapping[str, str]

LOOPBACK = "127.0.0.1"
FIRST_PORT, SPREAD = 20_000, 10_000
"""Where ports are chosen by the name of the job: below those that systems give to outgoing connections."""
MOST_PORT = 65_535


class Launcher(NamedTuple):
    """The names of a launcher's variables."""

    name: str
    mark: str
    """The one that no other launcher sets."""
    rank: str
    size: str
    local_rank: str
    local_size: str = ""
    launch: tuple[str, ...] = ("SLURM_JOB_ID",)
    """What tells its ranks from those of another call on the same machines."""


LAUNCHERS = (
    Launcher("torchrun", "WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", launch=("TORCHELASTIC_RUN_ID",)),
    Launcher(  # Open MPI
        "mpiexec", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", ("SLURM_JOB_ID", "PMIX_NAMESPACE"),
    ),
    # MPICH; Slurm sets PMI_RANK and PMI_SIZE too
    Launcher("mpiexec", "MPI_LOCALRANKID", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # without srun, in a batch script, SLURM_PROCID and SLURM_NTASKS are there too
    Launcher(
        "srun", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
        launch=("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A process among `size` ranks; local_rank: among those of its machine. Rank 0 can be reached at address and
    port, see connections.py. launch: a text that ranks have in common if they were started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = LOOPBACK
    port: int = FIRST_PORT
    launch: str = ""


def place(variables: Variables = os.environ) -> Place:
    """The place of this process. Raises BabyError if the variables lack something or contradict each other."""
    launcher = next((one for one in LAUNCHERS if one.mark in variables), None)
    if launcher is None:
        return Place()
    names = launcher.rank, launcher.size, launcher.local_rank
    rank, size, local_rank = (_whole(variables, name, launcher) for name in names)
    for name, value in ((launcher.rank, rank), (launcher.local_rank, local_rank)):
        if value >= size:
            given = f"{name} is {value}, {launcher.size} {size}"
            raise BabyError(f"the variables of {launcher.name} contradict each other: {given}")
    if size == 1:
        return Place()
    launch = " ".join([str(size), *(variables.get(name, "") for name in launcher.launch)])
    address, port = _address(variables, launcher, size), _port(variables, launcher, launch)
    return Place(rank, size, local_rank, address, port, launch)


def _whole(variables: Variables, name: str, launcher: Launcher) -> int:
    value = variables.get(name)
    if value is None and name == "SLURM_STEP_NUM_TASKS":  # older versions of Slurm
        name, value = "SLURM_NTASKS", variables.get("SLURM_NTASKS")
    if value is None:
        raise BabyError(f"{launcher.mark} is set, but {name} is not: start all ranks with {launcher.name}")
    if not re.fullmatch("[0-9]{1,9}", value):
        raise BabyError(f"{name}, which {launcher.name} sets, must be a whole number, not {value[:20]!r}")
    return int(value)


def _address(variables: Variables, launcher: Launcher, size: int) -> str:
    """The machine of rank 0.

    srun puts rank 0 on the first machine of a step. SLURM_LAUNCH_NODE_IPADDR is not that: it is where srun was
    called, which may be a login node.
    """
    if address := variables.get("MASTER_ADDR"):
        return address
    if variables.get(launcher.local_size) == str(size):
        return LOOPBACK
    steps = ("SLURM_STEP_NODELIST",) if launcher.name == "srun" else ()  # mpiexec has a step of its own
    for name in (*steps, "SLURM_JOB_NODELIST"):
        if hosts := variables.get(name):
            return first_host(hosts)
    raise BabyError("MASTER_ADDR is not set: set it to the name of the machine of rank 0, for all ranks")


def first_host(hosts: str) -> str:
    """The first host in a list of Slurm's: gpu03 in "gpu[03-05,9],cpu1"."""
    first = re.match(r"([^,\[]|\[[^\]]*\])*", hosts)
    assert first is not None  # it may be empty
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0])


def _port(variables: Variables, launcher: Launcher, launch: str) -> int:
    if "MASTER_PORT" not in variables:
        return FIRST_PORT + zlib.crc32(launch.encode()) % SPREAD
    port = _whole(variables, "MASTER_PORT", launcher)
    if not 0 < port < MOST_PORT:
        raise BabyError(f"MASTER_PORT must be a port between 1 and {MOST_PORT - 1}, not {port}")
    # torchrun itself may listen there
    return port + (variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


# jobs that are started again ----------------------------------------------------------------------------


def job(variables: Variables = os.environ) -> str | None:
    """The name of the job of this process, which all attempts at it have in common; None: there is none."""
    if "SLURM_JOB_ID" in variables:
        names = "SLURM_JOB_ID", "SLURM_STEP_ID"
        return f"Slurm {'.'.join(variables[name] for name in names if name in variables)}"
    name = variables.get("TORCHELASTIC_RUN_ID", "none")  # none: torchrun over several machines without --rdzv-id
    return None if name == "none" else f"torchrun {name}"


def started_again(variables: Variables = os.environ) -> bool:
    """Whether this is a later attempt, as far as is known here: torchrun counts on the machine that failed."""
    counts = "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"
    return any(variables.get(name, "") not in ("", "0") for name in counts)
