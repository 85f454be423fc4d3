"""Where a run computes: a backend, its device, its options and the processes that share a step."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from baby_xp import checks
from baby_xp.distributed import Group, Kind, join

if TYPE_CHECKING:
    from baby_xp.arrays.backend import Backend


@dataclass(frozen=True)
class Compute:
    """Where to compute. Raises BabyError for values of a wrong type; `load` says what this machine lacks."""

    backend: str = "auto"
    """auto, numpy, cupy, torch, jax or array-api-strict; `baby_xp backends` lists those that work."""
    device: str | None = None
    """Device of the backend, such as cuda:1; by default the backend's own choice."""
    tf32: bool = False
    """TF32 matrix products: faster, less precise (cupy backend)."""
    memory_gib: float | None = None
    """Limit of GPU memory, in GiB (cupy backend); by default no limit."""
    kernels: Literal["fast", "numpy", "plain"] = "fast"
    """plain: run the code of layers/ itself, without the backend's faster functions; numpy: those of NumPy alone,
    without the ones that numba compiles (numpy backend)."""
    workers: int | None = None
    """Processes that share each step (numpy backend); by default chosen automatically."""

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {
            "backend": checks.text("backend", self.backend),
            "device": None if self.device is None else checks.text("device", self.device),
            "tf32": checks.flag("tf32", self.tf32),
            "kernels": checks.choice("kernels", self.kernels, ("fast", "numpy", "plain")),
        }
        if self.memory_gib is not None:
            plain["memory_gib"] = checks.number("memory_gib", self.memory_gib, above=0)
        if self.workers is not None:
            plain["workers"] = checks.whole("workers", self.workers, most=checks.most_processes())
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def load(self, dtype: str) -> "Backend":
        """The backend. Raises BabyError if it cannot work here."""
        from baby_xp.arrays import registry  # it imports NumPy, which --help does not need

        options = {"tf32": self.tf32, "memory_gib": self.memory_gib}
        return registry.load(self.backend, self.device, dtype, kernels=self.kernels, **options)


@dataclass(frozen=True)
class Distribution:
    """Ranks, which a launcher such as mpiexec starts. Raises BabyError for values of a wrong type."""

    distributed: Kind = "none"
    """mpi, nccl: train together with the other processes that mpiexec, srun or torchrun started (numpy backend;
    cupy backend, one GPU each)."""
    restarts: int = 0
    """How often to go on from the last checkpoint when a rank is lost."""

    def __post_init__(self) -> None:
        checks.choice("distributed", self.distributed, get_args(Kind))
        object.__setattr__(self, "restarts", checks.whole("restarts", self.restarts, least=0))

    def join(self) -> Group:
        """The group of ranks. Raises BabyError if there is none."""
        return join(self.distributed)
