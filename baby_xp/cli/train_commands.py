"""The commands that train, and the one that estimates what training would take."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baby_xp.cli import options
from baby_xp.cli.common import GpuPlace, parse_settings, parsed, path_flag, positional, short
from baby_xp.cli.progress import Screen
from baby_xp.cli.streams import printable
from baby_xp.errors import BabyError
from baby_xp.training.signals import interruption

if TYPE_CHECKING:
    from baby_xp.config import Preset


@dataclass(frozen=True)
class TrainPlace(GpuPlace):
    """Where a run computes and where its files lie."""

    workers: int | None = None
    """Processes that share each step (numpy backend); none: chosen automatically."""


def train(arguments: list[str]) -> None:
    """Train a preset, with flags for every field of its configs."""
    chosen, asked, place = parse_preset("train", arguments, TrainPlace())
    from baby_xp import api

    run = api.train(chosen, listener=Screen(place.backend), **dataclasses.asdict(place), **asked)
    _show_end(run, place.path)


@dataclass(frozen=True)
class EstimatePlace(TrainPlace):
    """Where a run would compute. Nothing is written."""

    measure: bool = True
    """Train for some seconds to measure time and memory; --no-measure: only what can be counted."""


def estimate(arguments: list[str]) -> None:
    """Estimate what a run would take, with the flags of train."""
    chosen, asked, place = parse_preset("estimate", arguments, EstimatePlace())
    from baby_xp.estimation import estimate

    where = {name: value for name, value in dataclasses.asdict(place).items() if name != "path"}
    print("\n".join(estimate.lines(estimate.estimate(chosen, **where, **asked))))


@dataclass(frozen=True)
class Changes:
    """What finetuning may change of the model."""

    dropout: float
    """Share of activations that training sets to zero, from 0 to below 1."""


@dataclass(frozen=True)
class Text:
    """What finetuning reads."""

    data: str
    """A path to a UTF-8 text, or a name: nursery or shakespeare."""


def finetune(arguments: list[str]) -> None:
    """Train a run on, on another text: finetune [RUN] --data TEXT, and the flags of train."""
    from baby_xp import api

    name, rest = positional(arguments, "last")
    base = api.load(name, path=options.peek(rest, "--path")[0] or "runs", backend="numpy")
    chosen = api.finetuning(base)
    default = {"model": Changes(chosen.model.dropout), "train": chosen.train, "data": Text("")}
    about = f"Continue training run {base.guid} on another text."
    asked, place = parse_settings(default, TrainPlace(), about, "baby_xp finetune RUN", rest)
    if not asked.get("data"):
        raise BabyError("finetuning needs a text: name it with --data")
    run = api.finetune(base.guid, listener=Screen(place.backend), **dataclasses.asdict(place), **asked)
    _show_end(run, place.path)


@dataclass(frozen=True)
class Resumption:
    """Continue a run from its last checkpoint. Settings that are not given stay as they were."""

    backend: str | None = None
    """numpy, cupy, torch, jax or array-api-strict."""
    device: str | None = None
    """Device of the backend, such as cuda:1."""
    path: str = "runs"
    """Folder of the runs."""
    workers: int | None = None
    """Processes that share each step; another number changes results by rounding only."""
    tf32: bool = False
    """TF32 matrix products: faster, less precise (cupy backend)."""
    memory_gib: float | None = None
    """Limit of GPU memory, in GiB (cupy backend); not kept from the last session."""
    data: str | None = None
    """Where the text is now; it must be the same text."""
    num_steps: int | None = None
    """Total number of steps; a larger one continues a run that is done."""
    lr: float | None = None
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine."""
    clip: float | None = None
    """Clip gradients to this global norm; 0: no clipping."""
    eval_every: int | None = None
    """Steps between evaluations of the validation loss."""
    sample_tokens: int | None = None
    """Tokens of the sample printed with each evaluation; 0: none."""
    patience: int | None = None
    """Stop after this many evaluations without a better validation loss; 0: never."""
    max_minutes: float | None = None
    """Minutes after which this training session stops; 0: no limit."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; 0: by time alone."""
    checkpoint_minutes: float | None = None
    """Minutes between checkpoints; 0: by steps alone."""


def resume(arguments: list[str]) -> None:
    """Go on with a run from its last checkpoint."""
    name, rest = positional(arguments, "last")
    asked, given = parsed(Resumption(), "baby_xp resume [RUN]", rest)
    from baby_xp import api

    given = {name: value for name, value in given.items() if value is not None}
    run = api.resume(name, listener=Screen(asked.backend or ""), **given)
    _show_end(run, asked.path)


def parse_preset(command: str, arguments: list[str], place: TrainPlace) -> tuple["Preset", dict[str, Any], Any]:
    """A preset, the settings that flags give in place of its own, and the place."""
    from baby_xp.presets import preset

    name, rest = positional(arguments, "baby")
    chosen = preset(name)
    parts = {"model": chosen.model, "train": chosen.train, "data": chosen.data}
    program, about = f"baby_xp {command} {chosen.name}", f"{command} {chosen.name}: {chosen.about}."
    asked, place = parse_settings(parts, place, about, program, rest)
    return chosen, asked, place



def _show_end(run: Any, path: str) -> None:
    """Tell how a training session ended. Raises KeyboardInterrupt if a signal ended it: it has an exit code."""
    result = run.config["result"]
    resuming = f"python -m baby_xp resume {short(run.guid)}{path_flag(path)}"
    if result["reason"] == "interrupted":
        print(f"stopped after step {result['steps']}, with a checkpoint; to go on: {resuming}")
        raise interruption()
    print(f"\n{printable(_sample(run))}\n")
    if result["reason"] == "time":
        print(f"the time is up: stopped after step {result['steps']}; to go on: {resuming}")
    if result["reason"] == "patience":
        print(f"ended after step {result['steps']}: the validation loss no longer falls")
    if result["best_step"] not in (None, result["steps"]):
        print(f"kept the weights of step {result['best_step']}, the best")
    print(f"validation loss {result['val_loss']:.4f} nats per token, over the whole validation part")
    print(f"run {run.guid}")
    print(f"report {run.files.report}")
    print(f"more: python -m baby_xp generate {short(run.guid)}{path_flag(path)}")


def _sample(run: Any) -> str:
    return run.files.completion().read_text(encoding="utf-8").rstrip("\n")
