"""The files of a run, by its GUID, under one folder; every file is whole or absent.

    configs/config_<guid>.json            what was asked for, and how it ended
    tokenizers/tokenizer_<guid>.json      characters in id order
    models/model_<guid>.safetensors       weights: the best so far by validation loss
    models/state_<guid>.safetensors       the last checkpoint: all that resuming needs
    outputs/report_<guid>.txt             what a person would want to read
    outputs/metrics_<guid>.jsonl          losses, one JSON object a line
    outputs/completion_<guid>.txt         the text generated at the end of training
    outputs/completion_<guid>_<yyyymmddhhmmss>.txt    a later generation
    corpora/<sha256>.ids                  token ids of a text, shared by the runs that read it

The layout is The Little Baby's. A run that was finetuned from another has that one's GUID with _finetuned after
it, a second one _finetuned-2, one that was finetuned from the first _finetuned_finetuned.
"""

import glob
import hashlib
import itertools
import json
import os
import re
import secrets
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from baby_xp.errors import BabyError
from baby_xp.runs.lock import Lock
from baby_xp.text.corpus import shown

FOLDERS = ("configs", "tokenizers", "models", "outputs", "corpora")
GUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(_finetuned(-[1-9][0-9]*)?)*")
"""A run's GUID, with what finetuning put after it."""


SEAL = "checksum"


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
        """What training writes, the config first: while it is there, the run can be found."""
        metrics = self.metrics
        return self.config, self.tokenizer, self.model, self.state, self.report, metrics, self.completion()

    def completion(self, when: datetime | None = None) -> Path:
        """The text from the end of training, or of the generation at `when`."""
        stamp = f"_{when:%Y%m%d%H%M%S}" if when else ""
        return self.folder / "outputs" / f"completion_{self.guid}{stamp}.txt"


@dataclass
class NewRun:
    """A run that is being made. Set `keep` as soon as there is something worth keeping."""

    files: RunFiles
    keep: bool = False


@contextmanager
def new_run(folder: str | Path, base: str | None = None, guid: str | None = None) -> Iterator[NewRun]:
    """A new run, its folders made and its lock held. If the block fails before `keep` is set, all that it left
    there goes again: no run, no file, no folder.

    base: the GUID of a run that this one is finetuned from. guid: one to use, instead of a new one.
    Raises BabyError if the folder cannot be written.
    """
    folder = Path(folder)
    made: list[Path] = []
    corpora = set(_corpora(folder))
    new = None
    try:
        for path in (folder, *(folder / name for name in FOLDERS)):
            _make(path, made)
            _try_to_write(path)
        names = [guid or str(uuid.uuid4())] if base is None else _finetuned_names(base)
        with ExitStack() as held:
            new = NewRun(_first_free(folder, names, held))
            yield new
    except BaseException:
        if new is None or not new.keep:
            files = new.files.of_training if new else ()
            for path in (*files, *(set(_corpora(folder)) - corpora)):
                with suppress(OSError):  # it was not written yet; or, on Windows, is still mapped
                    path.unlink()
            for path in reversed(made):
                with suppress(OSError):  # something of another run may have come to lie in it
                    path.rmdir()
        raise


def _first_free(folder: Path, names: Iterable[str], held: ExitStack) -> RunFiles:
    """The first of the names that no run has, held until `held` is left."""
    held_by_others = None
    for name in names:
        files = RunFiles(folder, name)
        with ExitStack() as attempt:
            try:
                attempt.enter_context(hold(files))
            except Held as error:
                held_by_others = error
                continue
            if not any(os.path.lexists(path) for path in files.of_training):
                held.push(attempt.pop_all())
                return files
    raise held_by_others or BabyError(f"there is a run {name} in {shown(folder)} already")


def _finetuned_names(base: str) -> Iterator[str]:
    yield f"{base}_finetuned"
    for number in itertools.count(2):
        yield f"{base}_finetuned-{number}"


class Held(BabyError):
    """Another process trains the run."""


@contextmanager
def hold(files: RunFiles) -> Iterator[None]:
    """Keep other processes from training this run. Raises Held if one does already."""
    lock = Lock(files.lock)
    try:
        held = lock.acquire()
    except OSError as error:
        raise _cannot_write(files.lock, error) from None
    if not held:
        raise Held(f"run {files.guid} is being trained by another process; wait for it, or stop it")
    try:
        yield
    finally:
        lock.release()


def is_held(files: RunFiles) -> bool:
    """Whether a process trains this run at present."""
    return Lock(files.lock).is_held()


def sweep(files: RunFiles) -> None:
    """Remove what a process that was killed while it wrote a file of this run left behind. Hold the run first."""
    for path in files.of_training:
        for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            with suppress(OSError):
                temporary.unlink()


def find(folder: str | Path, name: str) -> RunFiles:
    """The run called `name`: a GUID, an unambiguous beginning of one, or "last".

    What finetuning put after a GUID is given whole: 1a2b_finetuned. Raises BabyError if there is no such run, or
    several.
    """
    folder = Path(folder)
    found = guids(folder)
    if not found:
        raise BabyError(f"there are no runs in {shown(folder)}; train one, or name their folder with --path")
    if name == "last":
        return RunFiles(folder, found[0])
    beginning, mark, suffix = name.partition("_")
    if not re.fullmatch(r"[0-9a-f-]{1,36}(_finetuned(-[1-9][0-9]{0,8})?){0,9}", name):
        raise BabyError(f"{name!r} is not a run: give a GUID, the beginning of one, or last")
    fitting = [guid for guid in found if guid.startswith(beginning) and guid[36:] == mark + suffix]
    if len(fitting) != 1:
        known = f"{len(fitting)} runs begin with" if fitting else f"no run in {shown(folder)} begins with"
        raise BabyError(
            f"{known} {name!r}; give more of the GUID" if fitting else f"{known} {name!r}; the last is {found[0]}"
        )
    return RunFiles(folder, fitting[0])


def guids(folder: Path) -> list[str]:
    """GUIDs of all runs that have a config, the one last trained first."""
    with suppress(OSError):
        names = [
            (path.stat().st_mtime_ns, path.stem.removeprefix("config_"))
            for path in (folder / "configs").glob("config_*.json")
        ]
        return [guid for _, guid in sorted(names, reverse=True) if GUID.fullmatch(guid)]
    return []


def write(path: Path, data: bytes | str | Callable[[Path], None]) -> None:
    """Write a file so that it is whole or as before, whatever happens: temporary name, sync, rename.

    data: what the file holds, or what writes it to the temporary name.
    Raises BabyError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            if callable(data):
                data(temporary)
            with open(temporary, "ab" if callable(data) else "xb") as file:
                if not callable(data):
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


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as `write_json` does, with a checksum: a file that was damaged or changed is noticed."""
    write_json(path, {**value, SEAL: digest(value)})


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises BabyError if it is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise BabyError(f"{shown(path)} cannot be read ({error.strerror}); the run is incomplete") from None
    except (ValueError, RecursionError):
        raise BabyError(f"{shown(path)} is not JSON; the file is damaged or from elsewhere") from None


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises BabyError if it is missing, or not as it was written."""
    value = read_json(path)
    seal = value.pop(SEAL, None) if isinstance(value, dict) else None
    if seal is None:
        raise BabyError(f"{shown(path)} is no file of a run (it has no checksum); it is damaged or from elsewhere")
    if seal != digest(value):
        raise BabyError(f"{shown(path)} is not as it was written (its checksum differs); bring the old file back")
    return value


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
