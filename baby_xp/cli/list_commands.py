"""The commands that list runs, presets and backends."""

from collections.abc import Callable

from baby_xp import layout
from baby_xp.cli.common import Folder, parsed, short
from baby_xp.errors import BabyError


def runs(arguments: list[str]) -> None:
    """List all runs, the one last trained first.

    python -m baby_xp runs
    python -m baby_xp runs --path other_runs
    """
    asked, _ = parsed(Folder(), runs, "", arguments)
    from baby_xp import api

    found = api.list_runs(asked.path)
    if not found:
        print(f"no runs in {asked.path} yet")
        return
    rows = [("run", "state", "preset", "steps", "val loss", "started (UTC)", "data")]
    for run in found:
        steps = f"{run.steps:,} of {run.num_steps:,}" if run.num_steps else ""
        loss = "" if run.val_loss is None else f"{run.val_loss:.4f}"
        started = run.started[:16].replace("T", " ")
        rows.append((short(run.guid), run.state, run.preset, steps, loss, started, run.data))
    width = max(len(short(run.guid)) for run in found)
    form = f"{{:<{width}}}  {{:<8}} {{:<12}} {{:>15}}  {{:>8}}  {{:<16}}  {{}}"
    print("\n".join(layout.columns(form, rows)))


def presets(arguments: list[str]) -> None:
    """List the presets: how large each model is, how long its training takes, and what it learns."""
    _no_arguments(presets, arguments)
    from baby_xp.presets import ABOUT, MEASURED_ON, PRESETS, TIMES, VOCABULARIES
    from baby_xp.resources import counts

    rows = [("preset", "parameters", "time", "what it learns")]
    for name, config in PRESETS.items():
        size = sum(counts.parameters(config.model, VOCABULARIES[name]).values())
        rows.append((name, f"{size:,}", TIMES.get(name, "for a GPU"), f"{ABOUT[name]}; data: {config.data.data}"))
    print("\n".join(layout.columns("{:<16} {:>10}  {:>9}  {}", rows)))
    print(f"times: {MEASURED_ON}; `estimate PRESET` measures them on your machine")


def backends(arguments: list[str]) -> None:
    """List the backends: what works, and for the others the reason and the remedy."""
    _no_arguments(backends, arguments)
    from baby_xp.arrays import registry

    for state in registry.states():
        if state.works:
            details = f"; {state.details}" if state.details else ""
            print(f"{state.name:<17} works    {state.version}, {state.device}{details}")
        else:
            print(f"{state.name:<17} missing  {state.reason}; remedy: {state.remedy}")
    chosen, why = registry.choose()
    print(f"auto selects {chosen.name}: {why}")


def _no_arguments(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print(command.__doc__)
        raise SystemExit(0)
    if arguments:
        raise BabyError(f"{command.__name__} takes no arguments, not {' '.join(arguments)!r}")
