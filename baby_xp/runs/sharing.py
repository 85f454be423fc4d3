"""A run of several ranks: rank 0 alone reads and makes its files, and tells the others what is in them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from baby_xp.distributed import Group
from baby_xp.files import as_path
from baby_xp.runs import creation
from baby_xp.runs.config_file import StoredRun
from baby_xp.runs.creation import NewRun
from baby_xp.runs.store import RunFiles
from baby_xp.text.tokenizer import tokenizer_from_dict
from baby_xp.training import alike
from baby_xp.training.checkpoint import Checkpoint
from baby_xp.training.setup import Setup


@contextmanager
def new_run(group: Group, path: str | Path, base: str | None = None) -> Iterator[NewRun]:
    """A new run, whose files only rank 0 makes."""
    if group.rank:
        yield NewRun(RunFiles(as_path(path, "path"), group.broadcast("")))
        return
    with creation.new_run(path, base) as new:
        group.broadcast(new.files.guid)
        yield new


def folder_for_ids(group: Group, files: RunFiles) -> Path | None:
    """Where the ids of a text are kept; None, in memory, for ranks that write nothing."""
    return None if group.rank else files.folder / "corpora"


def alike_on_all(group: Group, make: Callable[[], Setup]) -> Setup:
    """The setup of each rank, which must be alike. Raises BabyError on all ranks if one of them has none."""
    if group.size == 1:
        return make()
    group.cores()  # now, as no rank may wait there for one that fails
    made: list[Setup] = []
    try:
        group.each(lambda: made.append(make()))
        expected = group.broadcast(alike.figures(made[0]))
        group.each(lambda: alike.check(made[0], expected))
    except BaseException:
        for setup in made:
            setup.dataset.discard()
        raise
    return made[0]


def start(group: Group, make: Callable[[], Checkpoint]) -> Checkpoint:
    """The checkpoint that rank 0 makes."""
    return Checkpoint(**group.first(lambda: vars(make())))


def stored(group: Group, path: str | Path, find: Callable[[], StoredRun]) -> StoredRun:
    """The run that rank 0 finds; its folder need not exist elsewhere."""
    if group.size == 1:
        return find()

    def sent() -> tuple[dict[str, Any], dict[str, Any]]:
        run = find()
        return run.content, run.tokenizer.to_dict()

    content, tokenizer = group.first(sent)
    files = RunFiles(as_path(path, "path"), content["guid"])
    return StoredRun.of(files, content, tokenizer_from_dict(tokenizer, str(files.tokenizer)))
