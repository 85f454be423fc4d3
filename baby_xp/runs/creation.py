"""Creating a run with its folders, name and lock, and removing the files that killed runs left behind."""

import itertools
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from baby_xp.errors import BabyError
from baby_xp.files import (
    TEMPORARY,
    as_path,
    listed,
    make_writable_folder,
    remove,
    remove_folders,
    remove_unless_locked,
    shown,
)  # fmt: skip
from baby_xp.runs.lock import Lock
from baby_xp.runs.state_file import read_metadata
from baby_xp.runs.store import FOLDERS, GUID, Held, RunFiles, hold, sweep

OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""The name under which safetensors writes a file before it renames it."""


@dataclass
class NewRun:
    """A run that is being created. Set `keep` as soon as there is something worth keeping.

    undo: what else to undo if the run is given up.
    """

    files: RunFiles
    keep: bool = False
    undo: ExitStack = field(default_factory=ExitStack)


@contextmanager
def new_run(folder: str | Path, base: str | None = None, guid: str | None = None) -> Iterator[NewRun]:
    """Make the folders of a new run and hold its lock. If the block fails before `keep` is set, the run's files
    are removed again, and the folders that it made, unless another run trains there by then.

    base: the GUID of the run that this one is finetuned from. guid: the GUID to use; None: a new one.
    Raises BabyError if the folder cannot be written.
    """
    folder = as_path(folder, "path")
    made: list[Path] = []
    new = None
    try:
        for path in (folder, *(folder / name for name in FOLDERS)):
            make_writable_folder(path, made, "--path")
        sweep_abandoned(folder)
        names = [guid or str(uuid.uuid4())] if base is None else _finetuned_names(base)
        with ExitStack() as held:
            new = NewRun(_first_free(folder, names, held))
            try:
                yield new
            except BaseException:
                if not new.keep:  # while the lock is held, because later another run may have its name
                    try:
                        _remove(new.files)
                    except KeyboardInterrupt:  # a second Ctrl-C must not interrupt the cleanup
                        _remove(new.files)
                    new.undo.close()
                raise
    except BaseException:
        if not (new and new.keep) and not _any_run_trains(folder):  # the other run will write into these folders
            remove_folders(made)
        raise


def _finetuned_names(base: str) -> Iterator[str]:
    yield f"{base}_finetuned"
    for number in itertools.count(2):
        yield f"{base}_finetuned-{number}"


def _first_free(folder: Path, names: Iterable[str], held: ExitStack) -> RunFiles:
    """Hold the first of these names that no run has, until `held` is closed."""
    held_by_others = None
    for name in names:
        files = RunFiles(folder, name)
        with ExitStack() as attempt:
            try:
                attempt.enter_context(hold(files, other="--path"))
            except Held as error:
                held_by_others = error
                continue
            if _is_there(files):  # perhaps its process has just ended; `attempt` removes its lock
                _remove_abandoned(files)
            if not _is_there(files):
                held.push(attempt.pop_all())
                return files
    raise held_by_others or BabyError(f"there is already a run {name} in {shown(folder)}")


def _is_there(files: RunFiles) -> bool:
    """Whether a run has this name, or left files under it."""
    return any(os.path.lexists(path) for path in files.of_training)


def _remove(files: RunFiles) -> None:
    """Remove the files that training writes, the config first. Hold the run first."""
    for path in files.of_training:
        remove(path)


def _any_run_trains(folder: Path) -> bool:
    return any(path.suffix == ".lock" and Lock(path).is_held() for path in listed(folder / "configs"))


# abandoned files ----------------------------------------------------------------------------------------


def sweep_abandoned(folder: Path) -> None:
    """Remove what killed processes left in a folder of runs: runs that never started, and half-written files.

    A run that never started has a lock that no process holds, no config, and only its initial weights.
    """
    for path in listed(folder / "configs"):
        named = re.fullmatch(r"\.config_(.*)\.lock", path.name)
        if named and GUID.fullmatch(named[1]):
            files = RunFiles(folder, named[1])
            with suppress(BabyError), hold(files, patience=0):  # this removes a killed run's lock
                _remove_abandoned(files)
    folders = folder, *(folder / name for name in FOLDERS)
    left = [path for one in folders for path in listed(one) if path.name.startswith(".")]
    any_trains = _any_run_trains(folder)  # checked after listing: the writer of a listed file holds a lock
    for path in left:
        if path.suffix == TEMPORARY:
            _remove_half_written(folder, path)
        elif OF_SAFETENSORS.fullmatch(path.name) and not any_trains:
            remove(path)
    for path in listed(folder / "corpora"):  # earlier versions wrote ids under names without a dot
        if path.suffix == TEMPORARY:
            remove_unless_locked(path)


def _remove_abandoned(files: RunFiles) -> None:
    """Remove the files of a run that was killed before it started. Hold the run first."""
    if not os.path.lexists(files.config) and not _has_trained(files):
        sweep(files)
        _remove(files)


def _has_trained(files: RunFiles) -> bool:
    """Whether a run without a config may have trained; also if that cannot be found out."""
    arrays = [path for path in (files.model, files.state) if os.path.lexists(path)]
    return os.path.lexists(files.metrics) or any(read_metadata(path).get("step") != "0" for path in arrays)


def _remove_half_written(folder: Path, path: Path) -> None:
    """Remove a half-written file, unless its run is being trained or another process is writing it."""
    written = re.fullmatch(r"\.(.*)\.[0-9a-f]{8}\.tmp", path.name)
    of_run = written and GUID.search(written[1])
    files = RunFiles(folder, of_run[0]) if of_run else None
    if written and files and written[1] in {one.name for one in files.of_training}:
        with suppress(BabyError), hold(files, patience=0):
            remove(path)
    elif written:
        remove_unless_locked(path)
