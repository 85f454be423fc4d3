"""The commands that import and export models of other programs."""

from dataclasses import dataclass
from typing import Literal

from baby_xp.cli.common import Folder, Trained, load, parsed, path_flag, positional, short
from baby_xp.errors import BabyError


@dataclass(frozen=True)
class ImportOptions:
    """Where the other files are, and how the run computes."""

    config: str | None = None
    """The config file; by default beside the model, or in ../configs."""
    tokenizer: str | None = None
    """The tokenizer file; by default beside the model, or in ../tokenizers."""
    dtype: Literal["float64", "float32"] = "float64"
    """Precision; the original computes in float64, float32 is faster."""


@dataclass(frozen=True)
class ExportOptions:
    """What is written, and where."""

    to: str = "littlebaby"
    """Folder of the original's notebook; the files go to its folders configs, tokenizers and models."""


def import_(arguments: list[str]) -> None:
    """Import a model of the original Little Baby as a run: its model_<guid>.json, with config and tokenizer.

    python -m baby_xp import littlebaby models/model_<guid>.json
    python -m baby_xp import littlebaby model.json --config config.json --tokenizer tokenizer.json
    """
    model, rest = positional(_of_littlebaby("import", arguments), "")
    _, given = parsed(ImportOptions(), import_, "littlebaby MODEL.json", rest, Folder())
    if not model:
        raise BabyError("name the model to import: import littlebaby models/model_<guid>.json")
    from baby_xp import api

    run = api.import_littlebaby(model, **given)
    print(f"{run.model.n_parameters:,} parameters, {run.tokenizer.vocab_size} different tokens")
    print(f"run {run.guid}")
    print(f"to generate text: python -m baby_xp generate {short(run.guid)}{path_flag(given)}")


def export(arguments: list[str]) -> None:
    """Export a run as files of the original Little Baby.

    python -m baby_xp export littlebaby last --to littlebaby
    python -m baby_xp export littlebaby 1a2b --weights last
    """
    name, rest = positional(_of_littlebaby("export", arguments), "last")
    asked, given = parsed(ExportOptions(), export, "littlebaby [RUN]", rest, Trained())
    from baby_xp import api

    run = load(name, {**given, "backend": "numpy"})
    for file in api.export_littlebaby(run, asked.to):
        print(file)


def _of_littlebaby(command: str, arguments: list[str]) -> list[str]:
    """The arguments after the name of the other program; there is one so far."""
    program, rest = positional(arguments, "")
    if program != "littlebaby" and not {"-h", "--help"} & set(arguments):
        raise BabyError(f"name the format to {command}: {command} littlebaby ...")
    return rest
