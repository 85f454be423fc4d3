"""The files of a run, by its GUID, under one folder; every file is whole or absent.

    configs/config_<guid>.json            what was asked for, and how it ended
    tokenizers/tokenizer_<guid>.json      characters in id order
    models/model_<guid>.safetensors       weights
    models/state_<guid>.safetensors       moments of the optimizer and the step: what resuming needs
    outputs/report_<guid>.txt             what a person would want to read
    outputs/metrics_<guid>.jsonl          losses, one JSON object a line
    outputs/completion_<guid>.txt         the text generated at the end of training
    outputs/completion_<guid>_<yyyymmddhhmmss>.txt    a later generation
    corpora/<sha256>.ids                  token ids of a text, shared by the runs that read it

The layout is The Little Baby's.
"""

import json
import os
import re
import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from baby_xp.errors import BabyError
from baby_xp.text.corpus import shown

FOLDERS = ("configs", "tokenizers", "models", "outputs", "corpora")
GUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class RunFiles:
    """Where the files of one run lie. `guid` is checked: it can hold no path."""

    folder: Path
    guid: str

    @property
    def config(self) -> Path:
        return self.folder / "configs" / f"config_{self.guid}.json"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizers" / f"tokenizer_{self.guid}.json"

    @property
    def model(self) -> Path:
        return self.folder / "models" / f"model_{self.guid}.safetensors"

    @property
    def state(self) -> Path:
        return self.folder / "models" / f"state_{self.guid}.safetensors"

    @property
    def report(self) -> Path:
        return self.folder / "outputs" / f"report_{self.guid}.txt"

    @property
    def metrics(self) -> Path:
        return self.folder / "outputs" / f"metrics_{self.guid}.jsonl"

    @property
    def of_training(self) -> tuple[Path, ...]:
        """What training writes, the config first: while it is there, the run can be found."""
        metrics = self.metrics
        return self.config, self.tokenizer, self.model, self.state, self.report, metrics, self.completion()

    def completion(self, when: datetime | None = None) -> Path:
        """The text from the end of training, or of the generation at `when`."""
        stamp = f"_{when:%Y%m%d%H%M%S}" if when else ""
        return self.folder / "outputs" / f"completion_{self.guid}{stamp}.txt"


@contextmanager
def new_run(folder: str | Path) -> Iterator[RunFiles]:
    """The files of a new run, its folders made. If the block fails, all that it left there goes again:
    no run, no file, no folder.

    Raises BabyError if the folder cannot be written.
    """
    files = RunFiles(Path(folder), str(uuid.uuid4()))
    folder = files.folder
    made: list[Path] = []
    corpora = set(_corpora(folder))
    try:
        for path in (folder, *(folder / name for name in FOLDERS)):
            _make(path, made)
            _try_to_write(path)
        yield files
    except BaseException:
        for path in (*files.of_training, *(set(_corpora(folder)) - corpora)):
            with suppress(OSError):  # it was not written yet; or, on Windows, is still mapped
                path.unlink()
        for path in reversed(made):
            with suppress(OSError):  # something of another run may have come to lie in it
                path.rmdir()
        raise


def find(folder: str | Path, name: str) -> RunFiles:
    """The run called `name`: a GUID, an unambiguous beginning of one, or "last".

    Raises BabyError if there is none, or several.
    """
    folder = Path(folder)
    found = guids(folder)
    if not found:
        raise BabyError(f"there are no runs in {shown(folder)}; train one, or name their folder with --path")
    if name == "last":
        return RunFiles(folder, found[0])
    if not re.fullmatch(r"[0-9a-f-]{1,36}", name):
        raise BabyError(f"{name!r} is not a run: give a GUID, the beginning of one, or last")
    fitting = [guid for guid in found if guid.startswith(name)]
    if len(fitting) != 1:
        known = f"{len(fitting)} runs begin with" if fitting else f"no run in {shown(folder)} begins with"
        raise BabyError(
            f"{known} {name!r}; give more of the GUID"
            if fitting
            else f"{known} {name!r}; the last is {found[0]}"
        )
    return RunFiles(folder, fitting[0])


def guids(folder: Path) -> list[str]:
    """GUIDs of all runs that have a config and a model, newest first."""
    with suppress(OSError):
        names = [
            (path.stat().st_mtime_ns, path.stem.removeprefix("config_"))
            for path in (folder / "configs").glob("config_*.json")
        ]
        return [
            guid
            for _, guid in sorted(names, reverse=True)
            if GUID.fullmatch(guid) and RunFiles(folder, guid).model.exists()
        ]
    return []


def write(path: Path, data: bytes | str) -> None:
    """Write a file so that it is whole or as before, whatever happens: temporary name, sync, rename.

    Raises BabyError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data.encode("utf-8") if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # it is gone after the rename
                temporary.unlink()
    except OSError as error:
        raise _cannot_write(path, error) from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, readable by people, as `write` does."""
    write(path, json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises BabyError if it is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise BabyError(f"{shown(path)} cannot be read ({error.strerror}); the run is incomplete") from None
    except (ValueError, RecursionError):
        raise BabyError(f"{shown(path)} is not JSON; the file is damaged or from elsewhere") from None


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON object as one line, in one write: a reader never sees half of it for long."""
    try:
        with open(path, "ab") as file:
            file.write(json.dumps(value).encode("ascii") + b"\n")
    except OSError as error:
        raise _cannot_write(path, error) from None


def _make(path: Path, made: list[Path]) -> None:
    """Make a folder with its parents, and note those that were made."""
    missing = [p for p in (path, *path.parents) if not os.path.exists(p)]  # Path.exists may raise
    for p in reversed(missing):
        try:
            p.mkdir()
        except FileExistsError:
            continue  # another run made it in the meantime
        except OSError as error:
            raise _cannot_write(p, error) from None
        made.append(p)


def _corpora(folder: Path) -> list[Path]:
    try:
        return [path for path in (folder / "corpora").iterdir() if path.suffix == ".ids"]
    except OSError:  # it is not there, or not to be read: then nothing comes to lie there either
        return []


def _try_to_write(folder: Path) -> None:
    # permission bits do not tell (file systems mounted read-only, root): only writing does
    trial = folder / f".trial.{secrets.token_hex(4)}.tmp"
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _cannot_write(path: Path, error: OSError) -> BabyError:
    return BabyError(
        f"{shown(path)} cannot be written ({error.strerror or error}); name another folder with --path"
    )
