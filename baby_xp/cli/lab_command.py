"""The command of the equation lab."""

from dataclasses import dataclass

from baby_xp.cli import options
from baby_xp.cli.common import parse_settings, positional
from baby_xp.cli.progress import counting
from baby_xp.errors import BabyError


@dataclass(frozen=True)
class Experiment:
    """How many models, and what to show. Nothing is kept except the picture."""

    seeds: int = 5
    """Models for each held-out case or share, with consecutive seeds from --seed on."""
    workers: int | None = None
    """Models that train at the same time, one process each; none: one per core."""
    picture: str | None = None
    """Draw the map of correct answers to this file (.png, .svg, ...); needs the extra `plots`."""


def equations(arguments: list[str]) -> None:
    """Measure what equation models, or GPTs (equations gpt), say to equations that they never saw."""
    kind, rest = positional(arguments, "mlp")
    if kind not in ("mlp", "gpt"):
        raise BabyError(f"the lab trains the equation model (mlp) or a gpt, not {kind!r}")
    from baby_xp import api
    from baby_xp.equations import leave_one_out

    chosen = leave_one_out.suitable(kind, *options.peek(rest, "--digits", "--max-sum", "--operators"))
    parts = {"model": chosen.model, "train": chosen.train, "data": chosen.data}
    about = f"Train {chosen.name} with equations held out ({leave_one_out.EACH}: each in turn), and ask for them."
    asked, experiment = parse_settings(parts, Experiment(), about, f"baby_xp equations {kind}", rest)
    leave_one_out.refuse_ignored(asked)
    chosen = api.override(chosen, asked)
    if experiment.picture:
        from baby_xp.inspection import plots

        plots.check(experiment.picture)
    with counting("models") as told:
        results = leave_one_out.experiment(chosen, experiment.seeds, experiment.workers, told)
    print("\n".join(results.lines()))
    if experiment.picture:
        print(f"\npicture {plots.answers(results, experiment.picture)}")
