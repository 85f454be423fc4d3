"""The command of the equation lab."""

from dataclasses import dataclass

from baby_xp.cli import options
from baby_xp.cli.common import parse_settings, positional
from baby_xp.cli.progress import counting
from baby_xp.errors import BabyError


@dataclass(frozen=True)
class Experiment:
    """How many models, and what to show. Only the picture is kept."""

    seeds: int = 5
    """Models for each held-out case or share, with consecutive seeds from --seed on."""
    workers: int | None = None
    """Models that train at the same time, one process each; none: one per core."""
    picture: str | None = None
    """Draw the map of correct answers to this file (.png, .svg, ...); needs the extra `plots`."""


def equations(arguments: list[str]) -> None:
    """Measure which equations that they never saw the equation models, or GPTs (equations gpt), answer."""
    kind, rest = positional(arguments, "mlp")
    if kind not in ("mlp", "gpt"):
        raise BabyError(f"the lab trains the equation model (mlp) or a gpt, not {kind!r}")
    from baby_xp import api
    from baby_xp.equations import leave_one_out

    run_config = leave_one_out.suitable(kind, *options.peek(rest, "--digits", "--max-sum", "--operators"))
    parts = {"model": run_config.model, "train": run_config.train, "data": run_config.data}
    about = f"Train {run_config.name} with equations held out ({leave_one_out.EACH}: in turn), and ask for them."
    asked, experiment = parse_settings(parts, Experiment(), about, f"baby_xp equations {kind}", rest)
    leave_one_out.refuse_ignored(asked)
    run_config = api.override(run_config, asked)
    if experiment.picture:
        from baby_xp.inspection import plots

        plots.check(experiment.picture)
    with counting("models") as progress:
        results = leave_one_out.experiment(run_config, experiment.seeds, experiment.workers, progress)
    print("\n".join(results.lines()))
    if experiment.picture:
        print(f"\npicture {plots.answers(results, experiment.picture)}")
