"""The commands that train, and the one that estimates what training would take."""

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import baby_xp
from baby_xp import distributed
from baby_xp.cli import options
from baby_xp.cli.common import COMPUTE, Folder, path_flag, positional, short
from baby_xp.cli.progress import Screen
from baby_xp.cli.streams import printable
from baby_xp.compute import Compute, Distribution
from baby_xp.errors import BabyError
from baby_xp.training.signals import interruption

if TYPE_CHECKING:
    from baby_xp.config import RunConfig
    from baby_xp.run import Run


def train(arguments: list[str]) -> None:
    """python -m baby_xp train
    python -m baby_xp train baby --data my.txt --num-steps 500
    """
    preset, given = _parse_preset(train, arguments, ("where", Distribution()))
    from baby_xp import api

    _show_end(api.train(preset, listener=Screen(given.get("backend", "auto")), **given), given)


@dataclass(frozen=True)
class EstimateOptions:
    """What is measured."""

    measure: bool = True
    """Train for some seconds to measure time and memory; --no-measure: only count."""


def estimate(arguments: list[str]) -> None:
    """python -m baby_xp estimate 24-months
    python -m baby_xp estimate baby --n-layers 6 --no-measure
    """
    preset, given = _parse_preset(estimate, arguments, ("", EstimateOptions()))
    given.pop("path", None)  # estimate writes nothing there
    from baby_xp.estimation.estimate import lines

    print("\n".join(lines(baby_xp.estimate(preset, **given))))


def finetune(arguments: list[str]) -> None:
    """Continue training a run on another text, as a new run.

    python -m baby_xp finetune last --data my.txt
    python -m baby_xp finetune 1a2b --data my.txt --num-steps 1000 --lr 3e-4
    """
    from baby_xp import api
    from baby_xp.presets import preset

    name, rest = positional(arguments, "last")
    try:
        base = api.load(name, path=options.peek(rest, "--path")[0] or "runs", backend="numpy")
        name, config, what = base.guid, api.finetuning(base), f"run {base.guid}"
    except BabyError:
        if {"-h", "--help"}.isdisjoint(rest):
            raise
        config, what = preset("baby"), "a run"  # the help shows the settings of baby if there is no run yet
    parts = [
        ("data", options.Subset(config.data, ("data",), defaults=False)), ("train", config.train),
        ("model", options.Subset(config.model, ("dropout",))), ("where", Folder()),
        ("where", Compute()), ("where", Distribution()),
    ]  # fmt: skip
    about = inspect.cleandoc(finetune.__doc__ or "").replace("a run", what, 1)
    given = options.parse(parts, about, "baby_xp finetune RUN", rest)
    if not given.get("data"):
        raise BabyError("finetuning needs a text: name it with --data")
    run = api.finetune(name, listener=Screen(given.get("backend", "auto")), **given)
    _show_end(run, given)


def resume(arguments: list[str]) -> None:
    """Continue a run from its last checkpoint. Settings that are not given stay unchanged.

    python -m baby_xp resume
    python -m baby_xp resume 1a2b --num-steps 5000
    """
    from baby_xp import api
    from baby_xp.config import DataConfig, TrainConfig

    name, rest = positional(arguments, "last")
    parts = [
        ("", Folder()), ("", options.Subset(Compute(), COMPUTE, defaults=False)),
        ("", options.Subset(DataConfig(), ("data",), defaults=False)),
        ("", options.Subset(TrainConfig(num_steps=1), api.RESUMABLE, defaults=False)), ("", Distribution()),
    ]  # fmt: skip
    found = options.parse(parts, resume.__doc__ or "", "baby_xp resume [RUN]", rest)
    given = {option: value for option, value in found.items() if value is not None}
    _show_end(api.resume(name, listener=Screen(given.get("backend", "")), **given), given)


def _parse_preset(
    command: Any, arguments: list[str], *more: tuple[str, Any]
) -> tuple["RunConfig", dict[str, Any]]:
    """A preset, and the options that are given: settings that override its own, and where to compute."""
    from baby_xp.config import Combination, GPTConfig
    from baby_xp.presets import ABOUT, preset

    name, rest = positional(arguments, "baby")
    config, what = preset(name), command.__name__
    switches = [("model", Combination())] if isinstance(config.model, GPTConfig) else []
    parts = [
        *switches, ("model", config.model), ("train", config.train), ("data", config.data), ("where", Folder()),
        ("where", Compute()), *more,
    ]  # fmt: skip
    about = f"{what} {name}: {ABOUT[name]}.\n\n{inspect.cleandoc(command.__doc__)}"
    return config, options.parse(parts, about, f"baby_xp {what} {name}", rest)


def _show_end(run: "Run", given: dict[str, Any]) -> None:
    """Print how a training session ended, on rank 0. Raises KeyboardInterrupt if a signal ended it, for the exit
    code."""
    if distributed.current().rank:
        if run.config["result"]["reason"] == "interrupted":
            raise interruption()
        return
    result, path = run.config["result"], path_flag(given)
    resuming = f"python -m baby_xp resume {short(run.guid)}{path}"
    if result["reason"] == "interrupted":
        print(f"stopped after step {result['steps']}, with a checkpoint; to continue: {resuming}")
        raise interruption()
    print(f"\n{printable(_sample(run))}\n")
    if result["reason"] == "time":
        print(f"time limit reached: stopped after step {result['steps']}; to continue: {resuming}")
    if result["reason"] == "patience":
        print(f"ended after step {result['steps']}: the validation loss stopped improving")
    if result["best_step"] not in (None, result["steps"]):
        print(f"kept the weights of step {result['best_step']}, which had the lowest loss")
    print(f"validation loss {result['val_loss']:.4f} nats per token, over the whole validation part")
    print(f"run {run.guid}")
    print(f"report {run.files.report}")
    print(f"to generate text: python -m baby_xp generate {short(run.guid)}{path}")


def _sample(run: "Run") -> str:
    return run.files.completion().read_text(encoding="utf-8").rstrip("\n")
