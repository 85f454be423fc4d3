"""What goes wrong while a step of test_machine.py is done, what can be done, and what stands in for chance.

Nothing here is left to chance: GUIDs are counted, the clock of the loop ticks when it is read, and what goes wrong
goes wrong at a counted file operation. So a sequence that fails fails again.
"""

import contextlib
import errno
import hashlib
import os
import resource
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from quick import quick
from safetensors import SafetensorError

import baby_xp
from baby_xp.runs import creation, lock, state_file
from baby_xp.training import loop
from baby_xp.training.listener import Listener

SMALL = {"workers": 1, "backend": "numpy", "schedule": "constant", "warmup_steps": 0, "sample_tokens": 0}
GPT = {"n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 2, "lr": 1e-2}
STEPS, MORE, TUNED = 6, 9, 4
"""Steps of a run, of an extended one, and of finetuning; the last step of each has an evaluation."""
SENTENCES = "the cat sat on the mat.\nit sat and sat, and so did the hat. "
TEXTS = {
    "a": (SENTENCES * 9).encode(),
    "b": ("die Mäuse saßen auf dem Öl.\nund süß war's. " * 12).encode(),
    "c": (SENTENCES.replace("\n", "\r\n") * 7).encode(),
}
BAD_TEXTS = {"bad_end": TEXTS["a"] + b"\xff", "short": b"the cat", "empty": b"", "missing": None, "folder": None}
PARTS = ("config", "tokenizer", "model", "state")
OUTPUTS = ("report", "metrics", "completion")
FOLDERS = ("configs", "tokenizers", "models", "outputs", "corpora")
OF_A_SESSION = {"max_minutes", "checkpoint_every", "checkpoint_minutes", "sample_tokens"}
"""Settings that do not change the numbers of a run."""
NOBODY = 65534


# faults -------------------------------------------------------------------------------------------------

WRITES = {"os.mkdir", "os.rename", "os.fsync", "save"}
READS = {"os.listdir", "os.scandir"}
REMOVES = {"os.remove", "os.rmdir", "os.chmod"}
EVENTS = {"open", "fcntl.flock"} | WRITES | READS | REMOVES


class Watch:
    """Sees every file operation under one folder, before it is done: an audit hook, which cannot be removed."""

    def __init__(self):
        self.root, self.action, self.count, self.hooked = "", None, 0, False

    def event(self, event: str, args: tuple) -> None:
        """The audit hook, which Python also calls for many other events."""
        if self.action is None or event not in EVENTS or not self._is_here(event, args):
            return
        action, self.action = self.action, None  # its own file operations are not watched
        try:
            self.count += 1
            action(self.count - 1, event, args)
        finally:
            self.action = action

    def _is_here(self, event: str, args: tuple) -> bool:
        if event in ("fcntl.flock", "os.fsync"):
            return True
        try:
            name = os.fsdecode(args[0])
        except TypeError:  # a descriptor
            return False
        return (name if os.path.isabs(name) else os.path.join(os.getcwd(), name)).startswith(self.root)

    @contextlib.contextmanager
    def doing(self, root: Path, action: Callable[[int, str, tuple], None] | None) -> Iterator[None]:
        """Call `action` with the number of each operation under `root`, its name and its arguments."""
        if not self.hooked:
            sys.addaudithook(self.event)
            self.hooked = True
        before = self.root, self.action, self.count
        self.root, self.action, self.count = str(root), action, 0
        try:
            yield
        finally:
            self.root, self.action, self.count = before


WATCH = Watch()


def group(event: str, args: tuple) -> str:
    """write, read, remove or lock: what an operation does."""
    if event == "open":
        changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        return "write" if isinstance(args[2], int) and args[2] & changes else "read"
    groups = {"write": WRITES, "read": READS, "remove": REMOVES, "lock": {"fcntl.flock"}}
    return next(name for name, events in groups.items() if event in events)


FAULTS = {
    "full disk": (errno.ENOSPC, {"write"}),
    "quota": (errno.EDQUOT, {"write"}),
    "broken disk": (errno.EIO, {"write"}),
    "unreadable": (errno.EIO, {"read"}),
    "stale": (errno.ESTALE, {"read"}),
    "too many files": (errno.EMFILE, {"read", "write"}),
    "read-only": (errno.EROFS, {"write", "remove"}),
    "no locks": (errno.ENOSYS, {"lock"}),
    "locks refused": (errno.ENOLCK, {"lock"}),
}


class Fault:
    """The system refuses: the `at`-th operation of a kind, and all later ones unless `once`."""

    def __init__(self, name: str, at: int = 0, once: bool = False):
        self.code, self.groups = FAULTS[name]
        self.at, self.once, self.seen, self.fired = at, once, 0, 0

    def __call__(self, number: int, event: str, args: tuple) -> None:
        if group(event, args) not in self.groups or (event == "os.fsync" and self.code == errno.EMFILE):
            return
        self.seen += 1
        if self.seen <= self.at or (self.once and self.fired):
            return
        self.fired += 1
        if event == "save":  # as the library reports it
            what = f"Error while serializing: I/O error: {os.strerror(self.code)} (os error {self.code})"
            raise SafetensorError(what)
        raise OSError(self.code, os.strerror(self.code), *(arg for arg in args[:1] if isinstance(arg, str)))


class Writing:
    """Sees whether each file is written under another name, synced and renamed; except metrics, which grow."""

    def __init__(self):
        self.wrong: list[str] = []
        self.dirty: set[str] = set()

    def __call__(self, number: int, event: str, args: tuple) -> None:
        if event == "os.fsync":
            self.dirty.discard(os.path.realpath(f"/proc/self/fd/{args[0]}"))
        if event == "open" and group(event, args) == "write":
            name = os.fsdecode(args[0])
            if name.endswith(".tmp"):
                self.dirty.add(name)
            elif not name.endswith(".lock") and not (name.endswith(".jsonl") and args[2] & os.O_APPEND):
                self.wrong.append(f"{name} is written in place")
        if event == "os.rename" and os.fsdecode(args[0]) in self.dirty:
            self.wrong.append(f"{os.fsdecode(args[1])} is renamed before it is on disk")


def fsync(file: Any) -> None:
    """Replaces os.fsync, because no power cut is simulated here."""
    WATCH.event("os.fsync", (file,))


def _save(arrays, path, metadata=None):
    WATCH.event("save", (str(path),))
    return _save_file(arrays, path, metadata)


_save_file = state_file.save_file


class Guids:
    """The next GUIDs, known beforehand."""

    def __init__(self, number: int = 0):
        self.number = number

    def uuid4(self) -> uuid.UUID:
        self.number += 1
        return uuid.UUID(bytes=hashlib.md5(b"%d" % self.number).digest(), version=4)


class Clock:
    """A clock that advances by some seconds whenever it is read."""

    def __init__(self, seconds: float = 1.0):
        self.now, self.seconds = 0.0, seconds

    def perf_counter(self) -> float:
        self.now += self.seconds
        return self.now


GUIDS = SimpleNamespace(source=Guids(), uuid4=lambda: GUIDS.source.uuid4())


@contextlib.contextmanager
def small_and_quick() -> Iterator[None]:
    """baby_xp with short samples, a clock of its own, GUIDs that are known, and no waiting for the disk."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(quick(sample_tokens=5))
        for target, name, value in (
            (loop, "time", Clock()),
            (creation, "uuid", GUIDS),
            (lock, "time", SimpleNamespace(monotonic=Clock(0.1).perf_counter, sleep=lambda seconds: None)),
            (state_file, "save_file", _save),
            (os, "fsync", fsync),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


@contextlib.contextmanager
def guids_from(number: int) -> Iterator[None]:
    """GUIDs of another series inside."""
    before, GUIDS.source = GUIDS.source, Guids(number)
    try:
        yield
    finally:
        GUIDS.source = before


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Inside, writes beyond this size of a file fail, those of compiled code too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def plain_user(root: Path) -> Iterator[None]:
    """Work as a user who is subject to permissions and owns everything under `root`."""
    if os.geteuid() != 0:
        yield
        return

    def give_to(user: int) -> None:
        for path in (root, *root.rglob("*")):
            os.chown(path, user, -1, follow_symlinks=False)

    give_to(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        give_to(0)


# calls, here or in a child ------------------------------------------------------------------------------


class Interrupting(Listener):
    """A listener that ends training at the `at`-th call: as Ctrl-C does, or as a second one."""

    def __init__(self, at: int | None = None, at_once: bool = False):
        self.at, self.at_once, self.calls = at, at_once, 0

    def progress(self, step, loss, tokens_per_second):
        self._called()

    def evaluated(self, record):
        self._called()

    def _called(self):
        self.calls += 1
        if self.at is not None and self.calls == self.at + 1:
            if self.at_once:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)


def perform(name: str, arguments: dict[str, Any]) -> Any:
    """Call one of the public functions. arguments: JSON values."""
    given = dict(arguments)
    if name in ("train", "finetune", "resume") and "interrupt" in given:
        given["listener"] = Interrupting(*given.pop("interrupt"))
    if name == "train":
        return baby_xp.train(given.pop("preset"), **given)
    if name in ("finetune", "resume"):
        return getattr(baby_xp, name)(given.pop("run"), **given)
    if name == "import":
        return baby_xp.import_littlebaby(given.pop("model"), **given)
    if name == "runs":
        return baby_xp.list_runs(**given)
    run = baby_xp.load(
        given.pop("run"), path=given.pop("path"), backend="numpy", weights=given.pop("weights", "best")
    )
    if name == "load":
        return run
    if name == "export":
        return run, baby_xp.export_littlebaby(run, **given)
    return run, getattr(run, name)(**given)


def load_all() -> None:
    """Call everything once, while every file of Python can be read and before a fork."""
    with tempfile.TemporaryDirectory() as folder:
        text, path = os.path.join(folder, "text.txt"), os.path.join(folder, "runs")
        Path(text).write_bytes(TEXTS["a"])
        options = {**SMALL, "path": path, "num_steps": 2}
        run = perform("train", {**options, **GPT, "preset": "classic", "data": text, "dropout": 0.1})
        perform("train", {**options, "preset": "equations", "batch_size": 8})
        perform("finetune", {**options, "run": run.guid, "data": text})
        perform("resume", {"path": path, "num_steps": 4, "run": run.guid})
        where = {"path": path, "run": run.guid}
        perform("evaluate", {**where, "num_tokens": 3})
        perform("check", {**where, "tokens": 4, "batch": 1, "elements": 1, "directions": 1})
        perform("inspect", {**where, "prompt": "as", "backward": True})
        _, paths = perform("export", {**where, "folder": os.path.join(folder, "out")})
        perform("import", {"model": str(paths[2]), "path": os.path.join(folder, "others")})
        perform("runs", {"path": path})
