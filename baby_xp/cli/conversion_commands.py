"""The commands that import and export models of other programs."""

from dataclasses import dataclass
from typing import Literal

from baby_xp.cli.common import parsed, path_flag, positional, short
from baby_xp.errors import BabyError


@dataclass(frozen=True)
class Imported:
    """Import a model of the original Little Baby as a run: its model_<guid>.json, with config and tokenizer."""

    config: str | None = None
    """The config file; none: beside the model, or in ../configs."""
    tokenizer: str | None = None
    """The tokenizer file; none: beside the model, or in ../tokenizers."""
    path: str = "runs"
    """Folder of the runs."""
    dtype: Literal["float64", "float32"] = "float64"
    """Precision; the original computes in float64, float32 is faster."""


@dataclass(frozen=True)
class Exported:
    """Export a run as files of the original Little Baby."""

    to: str = "littlebaby"
    """Folder of the original's notebook; the files go to its folders configs, tokenizers and models."""
    path: str = "runs"
    """Folder of the runs."""
    weights: Literal["best", "last"] = "best"
    """The weights with the best validation loss, or those of the last checkpoint."""


def import_(arguments: list[str]) -> None:
    """import littlebaby MODEL.json: make a run of a model of the original Little Baby."""
    model, rest = positional(_of_littlebaby("import", arguments), "")
    asked, _ = parsed(Imported(), "baby_xp import littlebaby MODEL.json", rest)
    if not model:
        raise BabyError("name the model to import: import littlebaby models/model_<guid>.json")
    from baby_xp import api

    run = api.import_littlebaby(
        model, config=asked.config, tokenizer=asked.tokenizer, path=asked.path, dtype=asked.dtype
    )
    print(f"{run.model.n_parameters:,} parameters, {run.tokenizer.vocab_size} different tokens")
    print(f"run {run.guid}")
    print(f"more: python -m baby_xp generate {short(run.guid)}{path_flag(asked.path)}")


def export(arguments: list[str]) -> None:
    """export littlebaby [RUN] --to FOLDER: write a run as files of the original Little Baby."""
    name, rest = positional(_of_littlebaby("export", arguments), "last")
    asked, _ = parsed(Exported(), "baby_xp export littlebaby [RUN]", rest)
    from baby_xp import api

    run = api.load(name, path=asked.path, backend="numpy", weights=asked.weights)
    for file in api.export_littlebaby(run, asked.to):
        print(file)


def _of_littlebaby(command: str, arguments: list[str]) -> list[str]:
    """The arguments after the name of the other program; there is one so far."""
    program, rest = positional(arguments, "")
    if program != "littlebaby" and not {"-h", "--help"} & set(arguments):
        raise BabyError(f"say whose files to {command}: {command} littlebaby ...")
    return rest
