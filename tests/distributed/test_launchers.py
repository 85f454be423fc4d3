"""The place of a process among the ranks, from the variables of torchrun, srun and mpiexec."""

import pytest

from baby_xp.distributed.launchers import FIRST_PORT, SPREAD, Place, first_host, job, place, started_again
from baby_xp.errors import BabyError

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "1a2b", "TORCHELASTIC_USE_AGENT_STORE": "False",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-here-1234@1",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "9",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[01-04]",
    "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "PMI_RANK": "3", "PMI_SIZE": "4",
}  # fmt: skip


def where(variables):
    found = place(variables)
    return found.rank, found.size, found.local_rank, found.address


def test_without_a_launcher_there_is_one_rank():
    assert place({}) == Place(0, 1, 0)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TORCHRUN, (5, 8, 1, "gpu1")),
        (OPEN_MPI, (1, 2, 1, "127.0.0.1")),
        (MPICH, (1, 2, 1, "127.0.0.1")),
        (SRUN, (3, 4, 1, "gpu03")),
        ({**SRUN, **TORCHRUN}, (5, 8, 1, "gpu1")),  # srun started torchrun
        # mpiexec in a job of Slurm: the step is that of its own processes, one on each machine but the first
        ({**SRUN, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"}, (1, 4, 1, "gpu01")),
        ({**SRUN, **MPICH}, (1, 2, 1, "127.0.0.1")),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "there"}, (1, 4, 1, "there")),
        ({**SRUN, "MASTER_ADDR": "there"}, (3, 4, 1, "there")),
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}, (3, 4, 1, "gpu01")),
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_NUM_TASKS"}, (3, 9, 1, "gpu03")),
    ],
)
def test_each_launcher_says_it_in_its_own_variables(variables, expected):
    assert where(variables) == expected


@pytest.mark.parametrize(
    "variables",
    [
        {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"},  # a shell in a step
        {name: value for name, value in SRUN.items() if "STEP" not in name},  # a batch script, without srun
    ],
)
def test_a_process_that_is_the_only_one_needs_no_address(variables):
    assert place(variables) == Place(0, 1, 0)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu1", "gpu1"), ("gpu1,cpu2", "gpu1"), ("gpu[03-05,9],cpu1", "gpu03"), ("gpu[7,9]", "gpu7"),
     ("a-b-ia[810,817-819]", "a-b-ia810"), ("rack[1-2]n[01-04]", "rack1n01"), ("gpu[2-3]-ib,x", "gpu2-ib")],
)  # fmt: skip
def test_the_first_host_of_a_list_of_slurm(hosts, first):
    assert first_host(hosts) == first


def test_the_port_is_given_or_follows_from_the_job():
    assert place(TORCHRUN).port == 29400
    assert place({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}).port == 29401  # torchrun has the other one
    assert place({**SRUN, "MASTER_PORT": "4000"}).port == 4000
    ports = {place({**SRUN, "SLURM_STEP_ID": str(step)}).port for step in range(5)}
    assert len(ports) == 5
    assert all(FIRST_PORT <= port < FIRST_PORT + SPREAD for port in ports)
    assert place(SRUN).port == place({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).port


def test_ranks_of_one_launch_know_each_other():
    same = [place({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": rank}).launch for rank in "01"]
    assert same[0] == same[1] != place({**OPEN_MPI, "PMIX_NAMESPACE": "prterun-here-1235@1"}).launch


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({**TORCHRUN, "RANK": "8"}, "torchrun contradict each other: RANK is 8, WORLD_SIZE 8"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "3"}, "LOCAL_RANK is 3, OMPI_COMM_WORLD_SIZE 2"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK, which torchrun sets, must be a whole number, not '-1'"),
        ({**SRUN, "SLURM_PROCID": ""}, "SLURM_PROCID, which srun sets, must be a whole number, not ''"),
        ({**MPICH, "PMI_SIZE": "٣"}, "PMI_SIZE, which mpiexec sets, must be a whole number"),
        ({**MPICH, "PMI_SIZE": "9" * 5000}, "PMI_SIZE, which mpiexec sets, must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "but LOCAL_RANK is not: start all ranks with torchrun"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "SLURM_STEP_ID is set, but SLURM_NTASKS is not"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR is not set: set it to the name of the machine of rank 0"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"}, "MASTER_ADDR is not set"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT must be a port between 1 and 65534, not 70000"),
        ({**TORCHRUN, "MASTER_PORT": "x"}, "MASTER_PORT, which torchrun sets, must be a whole number, not 'x'"),
    ],
)
def test_what_is_broken_is_named(variables, words):
    with pytest.raises(BabyError) as raised:
        place(variables)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("variables", "name", "again"),
    [
        ({}, None, False),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}, None, True),
        ({"TORCHELASTIC_RUN_ID": "1a", "TORCHELASTIC_RESTART_COUNT": "0"}, "torchrun 1a", False),
        ({"TORCHELASTIC_RUN_ID": "1a", "TORCHELASTIC_RESTART_COUNT": "2"}, "torchrun 1a", True),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_RESTART_COUNT": "1"}, "Slurm 7.1", True),
        # Slurm starts torchrun again, which then has another name
        ({"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "1a", "SLURM_RESTART_COUNT": "1"}, "Slurm 7", True),
    ],
)
def test_a_job_keeps_its_name_when_it_is_started_again(variables, name, again):
    assert (job(variables), started_again(variables)) == (name, again)
