"""The command of the equation lab."""

from dataclasses import dataclass
from typing import Literal

from baby_xp import distributed
from baby_xp.cli import options
from baby_xp.cli.common import parsed, positional
from baby_xp.cli.progress import counting
from baby_xp.errors import BabyError


@dataclass(frozen=True)
class EquationsOptions:
    """How many models, and what to show. Nothing is kept except the picture."""

    seeds: int = 5
    """Models for each held-out case or share, with consecutive seeds from --seed on."""
    workers: int | None = None
    """Models that train at the same time, one process each; by default one per core."""
    distributed: Literal["none", "mpi"] = "none"
    """mpi: train one model at a time in each process that mpiexec or srun started, in place of --workers."""
    picture: str | None = None
    """Draw the map of correct answers to this file (.png, .svg, ...); needs the extra `plots`."""


def equations(arguments: list[str]) -> None:
    """Hold out each equation in turn, train a model without it (the equation model or a GPT), and test it.

    python -m baby_xp equations
    python -m baby_xp equations gpt --held-out 10% --seeds 1
    mpiexec -n 4 python -m baby_xp equations --distributed mpi
    """
    kind, rest = positional(arguments, "mlp")
    if kind not in ("mlp", "gpt"):
        raise BabyError(f"the equation lab trains the equation model (mlp) or a gpt, not {kind!r}")
    from baby_xp.equations import leave_one_out

    preset = leave_one_out.suitable(kind, *options.peek(rest, "--digits", "--max-sum", "--operators"))
    parts = preset.model, preset.train, preset.data
    experiment, given = parsed(EquationsOptions(), equations, kind, rest, *parts)
    asked = {name: given[name] for name in given if name not in options.names_of(experiment)}
    leave_one_out.refuse_ignored(asked)
    config = preset.override(asked)
    if experiment.picture:
        from baby_xp.inspection import plots

        plots.check(experiment.picture)
    group = distributed.join(experiment.distributed)
    with counting("models", shown=group.rank == 0) as progress:
        results = leave_one_out.experiment(
            config, experiment.seeds, experiment.workers, progress, experiment.distributed
        )
    if group.rank:
        return
    print("\n".join(results.lines()))
    if experiment.picture:
        print(f"\npicture {plots.answers(results, experiment.picture)}")
