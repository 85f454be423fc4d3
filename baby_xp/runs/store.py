"""The files of a run, by its GUID, under one folder; every file is complete or absent.

    configs/config_<guid>.json            settings, and how the run ended
    tokenizers/tokenizer_<guid>.json      characters in id order
    models/model_<guid>.safetensors       weights: the best so far by validation loss
    models/state_<guid>.safetensors       the last checkpoint: all that resuming needs
    outputs/report_<guid>.txt             a report for people
    outputs/metrics_<guid>.jsonl          losses, one JSON object a line
    outputs/completion_<guid>.txt         the text generated at the end of training
    outputs/completion_<guid>_<yyyymmddhhmmss>.txt    a later generation
    corpora/<hash>.ids                    token ids of a text, shared by the runs that read it

The layout is The Little Baby's. A finetuned run has the GUID of its base with _finetuned appended, a second
one _finetuned-2, and one that was finetuned from the first _finetuned_finetuned.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from baby_xp.errors import BabyError
from baby_xp.files import (
    NO_LOCKS,
    TEMPORARY,
    as_path,
    listed,
    make_writable_folder,
    refusal,
    remove,
    remove_folders,
    shown,
    write_json,
)  # fmt: skip
from baby_xp.runs.lock import PATIENCE, Lock

FOLDERS = ("configs", "tokenizers", "models", "outputs", "corpora")
FINETUNED = "(_finetuned(-[1-9][0-9]*)?)*"
GUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" + FINETUNED)
"""A run's GUID, with what finetuning added."""
NAME = re.compile("[0-9a-f-]{1,36}" + FINETUNED)
"""The beginning of a GUID, with everything that finetuning added."""

SEAL = "checksum"
RESTORE = "restore the original file"
"""The advice in messages about a damaged, changed or missing file of a run."""


@dataclass(frozen=True)
class RunFiles:
    """Where the files of one run lie. `guid` can hold no path: it was made here, or checked by `find`."""

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
    def lock(self) -> Path:
        return self.folder / "configs" / f".config_{self.guid}.lock"

    @property
    def of_training(self) -> tuple[Path, ...]:
        """The files that training writes; the config is first: while it exists, the run can be found."""
        metrics = self.metrics
        return self.config, self.tokenizer, self.model, self.state, self.report, metrics, self.completion()

    def completion(self, when: datetime | None = None) -> Path:
        """The text generated at the end of training, or at `when`."""
        stamp = f"_{when:%Y%m%d%H%M%S}" if when else ""
        return self.folder / "outputs" / f"completion_{self.guid}{stamp}.txt"


class Held(BabyError):
    """Another process is training the run."""


@contextmanager
def hold(files: RunFiles, patience: float = PATIENCE, other: str | None = None) -> Iterator[None]:
    """Keep other processes from training this run. Raises Held if one does already.

    patience: seconds to wait for a process that is about to release the lock. other: the flag that names another
    folder, for the message if this one cannot be locked.
    """
    lock = Lock(files.lock)
    try:
        held = lock.acquire(patience)
    except OSError as error:
        doing = "locked" if error.errno in NO_LOCKS else "written"
        raise refusal(files.lock, error, doing, other) from None
    if not held:
        raise Held(f"run {files.guid} is being trained by another process; wait for it, or stop it")
    try:
        yield
    finally:
        lock.release()


def is_held(files: RunFiles) -> bool:
    """Whether a process is training this run."""
    return Lock(files.lock).is_held()


def folder_for_ids(files: RunFiles) -> Path | None:
    """Where to keep the ids of a text that a run is evaluated on; None, in memory, if nothing can be written."""
    made: list[Path] = []
    try:
        make_writable_folder(files.folder / "corpora", made)
    except BabyError:
        return None
    finally:
        remove_folders(made)  # writing the ids creates the folder again, and removes it on failure
    return files.folder / "corpora"


def sweep(files: RunFiles) -> None:
    """Remove half-written files of this run that a killed process left behind. Hold the run first."""
    for path in files.of_training:
        for other in listed(path.parent):
            if other.name.startswith(f".{path.name}.") and other.suffix == TEMPORARY:
                remove(other)


def find(folder: str | Path, name: str) -> RunFiles:
    """The run called `name`: a GUID, an unambiguous beginning of one, or "last".

    The suffix that finetuning adds to a GUID is given whole: 1a2b_finetuned. Raises BabyError if there is no such
    run, or several.
    """
    folder = as_path(folder, "path")
    if not isinstance(name, str):
        raise BabyError(f"{name!r} is not a run: give a GUID, the beginning of one, or last, as a string")
    found = guids(folder)
    if not found:
        raise BabyError(f"there are no runs in {shown(folder)}; train one, or give another folder with --path")
    if name == "last":
        return RunFiles(folder, found[0])
    beginning, mark, suffix = name.partition("_")
    if not NAME.fullmatch(name):
        raise BabyError(f"{name!r} is not a run: give a GUID, the beginning of one, or last")
    fitting = [guid for guid in found if guid.startswith(beginning) and guid[36:] == mark + suffix]
    if not fitting:
        raise BabyError(f"no run in {shown(folder)} begins with {name!r}; the last is {found[0]}")
    if len(fitting) > 1:
        raise BabyError(f"{len(fitting)} runs begin with {name!r}; give more characters of the GUID")
    return RunFiles(folder, fitting[0])


def guids(folder: Path) -> list[str]:
    """GUIDs of all runs that have a config, the one last trained first. Raises BabyError if there are configs that
    cannot be listed."""
    try:
        paths = [path for path in (folder / "configs").iterdir() if path.match("config_*.json")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise refusal(folder / "configs", error, "read", "--path") from None
    names = [(_changed(path), path.stem.removeprefix("config_")) for path in paths]
    return [guid for _, guid in sorted(names, reverse=True) if GUID.fullmatch(guid)]


def _changed(path: Path) -> int:
    """When a config was last written, in ns; 0 for a broken link."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as `write_json` does, with a checksum that shows damage and changes."""
    write_json(path, {**value, SEAL: digest(value)})


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises BabyError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise incomplete(path) from None
    except OSError as error:
        raise refusal(path, error, "read") from None
    except (ValueError, RecursionError):
        raise BabyError(f"{shown(path)} is not JSON, so it is not as baby_xp wrote it; {RESTORE}") from None


def incomplete(path: Path) -> BabyError:
    """The error for a missing file of a run."""
    return BabyError(f"{shown(path)} is missing: the run is incomplete; {RESTORE}")


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises BabyError if it is missing or was changed."""
    value = read_json(path)
    seal = value.pop(SEAL, None) if isinstance(value, dict) else None
    if seal is None:
        raise BabyError(f"{shown(path)} has no checksum, so it is not as baby_xp wrote it; {RESTORE}")
    if seal != digest(value):
        raise BabyError(f"{shown(path)} was changed or damaged (its checksum differs); {RESTORE}")
    return value
