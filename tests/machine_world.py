"""A folder of small runs, what happens to it, and what must hold after each step. See test_machine.py.

Nothing here is left to chance: GUIDs are counted, the clock of the loop ticks when it is read, and what goes wrong
goes wrong at a counted file operation. So a sequence that fails fails again.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
from quick import quick
from safetensors import SafetensorError, safe_open

import baby_xp
from baby_xp.presets import PRESETS
from baby_xp.runs import creation, lock, state_file
from baby_xp.runs.creation import OF_SAFETENSORS
from baby_xp.runs.store import GUID, RunFiles
from baby_xp.training import loop

SMALL = {"workers": 1, "backend": "numpy", "schedule": "constant", "warmup_steps": 0, "sample_tokens": 0}
GPT = {"n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 2, "lr": 1e-2}
STEPS, MORE, TUNED = 6, 9, 4
"""Steps of a run, of one that is prolonged, and of finetuning; evaluations fall on the last of each."""
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
"""Settings that change no number of a run."""
NOBODY = 65534


# what goes wrong ----------------------------------------------------------------------------------------

WRITES = {"os.mkdir", "os.rename", "os.fsync", "save"}
READS = {"os.listdir", "os.scandir"}
REMOVES = {"os.remove", "os.rmdir", "os.chmod"}
EVENTS = {"open", "fcntl.flock"} | WRITES | READS | REMOVES


class Watch:
    """Sees every file operation under one folder, before it is done: an audit hook, which cannot be removed."""

    def __init__(self):
        self.root, self.action, self.count, self.hooked = "", None, 0, False

    def event(self, event: str, args: tuple) -> None:
        """What Python calls for each event, of which there are many others."""
        if self.action is None or event not in EVENTS or not self._is_here(event, args):
            return
        action, self.action = self.action, None  # what it does itself is not watched
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
        if event == "save":  # as the library says it
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
    """In the place of os.fsync: a power cut is not what is tried here."""
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
    """Some seconds go by whenever it is read."""

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
    """Work as a user whom permissions hold back, and who owns all under `root`."""
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


# what can be done, here or in a child -------------------------------------------------------------------


class Interrupting:
    """A listener that ends training at the `at`-th call: as Ctrl-C does, or as a second one."""

    def __init__(self, at: int | None = None, at_once: bool = False):
        self.at, self.at_once, self.calls = at, at_once, 0

    def started(self, session, step):
        pass

    def note(self, text):
        pass

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
        run = perform("train", {**options, **GPT, "preset": "baby", "data": text, "dropout": 0.1})
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


# what is on disk ----------------------------------------------------------------------------------------


@dataclass
class Tree:
    """All below a folder: SHA-256 of each file by its relative path, and the folders."""

    files: dict[str, str] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, root: Path) -> "Tree":
        tree = cls()
        for folder, folders, files in os.walk(root):
            below = os.path.relpath(folder, root)
            tree.folders.add(below)
            for name in (*files, *folders):
                path = os.path.join(folder, name)
                link = os.readlink(path) if os.path.islink(path) else None
                if link is not None or name in files:
                    held = digest(Path(path).read_bytes()) if link is None else f"link to {link}"
                    tree.files[os.path.normpath(os.path.join(below, name))] = held
        return tree

    def differences(self, other: "Tree") -> set[str]:
        names = self.files.keys() | other.files.keys()
        return {name for name in names if self.files.get(name) != other.files.get(name)}


def digest(data: Any) -> str:
    """SHA-256 of bytes, or of an array or a JSON value."""
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).tobytes()
    elif not isinstance(data, bytes):
        data = json.dumps(data, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


_OWNED = re.compile(rf"(?:config|tokenizer|model|state|report|metrics|completion)_({GUID.pattern})")


def owner(name: str) -> str | None:
    """The GUID that a file's name holds."""
    found = _OWNED.search(os.path.basename(name))
    return found and found[1]


def is_leftover(name: str) -> bool:
    return name.endswith((".tmp", ".lock")) or OF_SAFETENSORS.fullmatch(os.path.basename(name)) is not None


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def without_times(progress: dict[str, Any]) -> dict[str, Any]:
    """The progress of a checkpoint except what depends on the clock."""
    kept = {name: value for name, value in progress.items() if name not in ("seconds", "training_seconds")}
    return {**kept, "records": [{**record, "seconds": 0} for record in progress["records"]]}


# twins --------------------------------------------------------------------------------------------------


@dataclass
class Twin:
    """How a run goes that nothing disturbs: digests by step."""

    params: dict[int, str] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    best_step: int = 0
    val_loss: float | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def note(self, path: Path) -> None:
        found, metadata = read_arrays(path)
        step = int(metadata["step"])
        self.params[step], self.states[step] = digest(found["params"]), state_digest(found)
        self.progress = json.loads(metadata["progress"])


def state_digest(found: dict[str, np.ndarray]) -> str:
    return digest([digest(found[name]) for name in ("params", "m", "v", "step")])


class Noting(Interrupting):
    """A listener that notes each checkpoint of a twin."""

    def __init__(self, twin: Twin, folder: Path):
        super().__init__()
        self.twin, self.folder = twin, folder

    def _called(self):
        for path in self.folder.glob("models/state_*.safetensors"):
            self.twin.note(path)


class Twins:
    """The twins of all runs of all sequences, each trained once."""

    def __init__(self, folder: Path):
        self.folder, self.known, self.bases, self.count = folder, {}, {}, itertools.count()
        for name, data in TEXTS.items():
            (folder / f"{name}.txt").write_bytes(data)

    def keep_base(self, files: RunFiles) -> str:
        """Remember the files of a run that is finetuned -> what to find them by."""
        found = {part: getattr(files, part).read_bytes() for part in ("config", "tokenizer", "model")}
        config = json.loads(found["config"])
        params, _ = read_arrays(files.model)
        learned = json.loads(found["tokenizer"])
        key = digest([settings_key(config), {name: digest(array) for name, array in params.items()}, learned])
        self.bases.setdefault(key, (files.guid, found))
        return key

    def of(self, config: dict[str, Any], base: str | None, text: str | None) -> Twin:
        """The twin of the run with this config, finetuned from a base if there is one."""
        key = digest([settings_key(config), base, text])
        if key not in self.known:
            with WATCH.doing(self.folder, None), guids_from(10**6):
                self.known[key] = self._trained(config, base, text)
        return self.known[key]

    def _trained(self, config: dict[str, Any], base: str | None, text: str | None) -> Twin:
        twin, folder = Twin(), self.folder / str(next(self.count))
        options = {"path": folder, "backend": "numpy", "workers": 1, "listener": Noting(twin, folder)}
        often = {"checkpoint_every": 1, "checkpoint_minutes": 0, "max_minutes": 0}
        train = {name: value for name, value in {**config["train"], **often}.items() if name != "min_lr"}
        if text is not None:
            options["data"] = str(self.folder / f"{text}.txt")
        if base is None:
            preset = PRESETS[config["preset"]]
            given = {**config["model"], **config["data"], **train}
            usual = {**vars(preset.model), **vars(preset.data), **vars(preset.train)}
            given = {name: value for name, value in given.items() if value != usual.get(name, value)}
            run = baby_xp.train(preset, **{**given, **options})
        else:
            guid, files = self.bases[base]
            for part, content in files.items():
                path = getattr(RunFiles(folder, guid), part)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            run = baby_xp.finetune(guid, **options, **train, dropout=config["model"]["dropout"])
        twin.note(run.files.state)
        twin.best_step = run.config["result"]["best_step"]
        twin.val_loss = run.config["result"]["val_loss"]
        twin.metrics = metrics_of(run.files)
        shutil.rmtree(folder)
        return twin


def settings_key(config: dict[str, Any]) -> str:
    """What the numbers of a run follow from, except text and weights."""
    train = {name: value for name, value in config["train"].items() if name not in OF_A_SESSION}
    data = {name: value for name, value in config["data"].items() if name not in ("data", "file")}
    return json.dumps([config["model"], train, data, config["vocab_size"]], sort_keys=True)


def metrics_of(files: RunFiles) -> list[dict[str, Any]]:
    """What the metrics hold except the times; nothing before the first evaluation."""
    if not files.metrics.is_file():
        return []
    return [{**json.loads(line), "seconds": 0} for line in files.metrics.read_text("ascii").splitlines()]


# the world ----------------------------------------------------------------------------------------------


class Broken(AssertionError):
    """Something does not hold. Each kind has a class of its own, so that hypothesis can tell them apart."""

    kinds: ClassVar[dict[str, type]] = {}

    @classmethod
    def of(cls, kind: str) -> type["Broken"]:
        name = "Broken: " + kind
        return cls.kinds.setdefault(kind, type(name, (cls,), {"kind": kind, "__module__": __name__}))


@dataclass
class Known:
    """A run as it should be."""

    guid: str
    config: dict[str, Any]
    text: str | None
    """Which text it learned from; None: equations, or imported."""
    base: str | None = None
    """What the base's weights are found by, of a finetuned run."""
    imported: str | None = None
    """Digest of the parameters of an imported run."""
    hurt: dict[str, tuple[bytes | None, str | None]] = field(default_factory=dict)
    """Of each damaged file: what it was, and the digest of what it is now."""
    step: int = 0
    old: bytes | None = None
    """An older checkpoint."""

    @property
    def is_sound(self) -> bool:
        """Whether all that loading and resuming need is as it was written."""
        return not any(name.startswith(("configs", "tokenizers", "models")) for name in self.hurt)


@dataclass
class Export:
    """What was exported, to be imported."""

    model: Path
    guid: str
    params: str
    """Digest of the parameters in float64."""
    known: Known


@dataclass
class Outcome:
    """How a call ended. crashed: its process was killed."""

    value: Any = None
    error: str | None = None
    crashed: bool = False

    def __str__(self) -> str:
        if self.crashed:
            return "killed"
        if self.error is not None:
            return self.error
        guid = getattr(self.value, "guid", None)
        return "done" if guid is None else f"{guid[:4]}{guid[36:]} {self.value.config['result']['state']}"


@dataclass
class Op:
    """One call.

    makes: whether it makes a run. touches: the run that it may change. must: whether it has to succeed where
    nothing goes wrong, None where both may be. check: called with the value of one that succeeded. text, base,
    imported: what the run that it makes is known by.
    """

    name: str
    arguments: dict[str, Any]
    makes: bool = False
    touches: str | None = None
    must: bool | None = None
    check: Callable[[Any], None] = lambda value: None
    text: str | None = None
    base: str | None = None
    imported: Export | None = None
    may_stop: bool = False
    """Whether something may end it early."""
    may_fail_late: bool = False
    """Whether something stands where it is to write a file."""
    keeps_outputs: bool = True
    """False where its outputs are deleted meanwhile."""

    def __str__(self) -> str:
        given = {name: value for name, value in self.arguments.items() if name not in {*SMALL, *GPT, "path"}}
        return f"{self.name} " + ", ".join(
            f"{name}={os.path.basename(str(value)) if name in ('data', 'model') else value}"
            for name, value in given.items()
        )


@dataclass
class Frame:
    """What was there before a step. `before` is brought up to date when a step inside of it ends."""

    op: Op
    before: Tree
    known: set[str]
    active: set[str] = field(default_factory=set)


SEEN: dict[str, str] = {}
"""What was computed, by what it was computed from: it must be the same each time."""


class World:
    """A folder of runs, the texts that they learn from, and a record of all that is known of them."""

    def __init__(self, twins: Twins, in_fork: Callable[..., dict], failures: list[tuple[str, str]]):
        self.twins, self.in_fork, self.failures = twins, in_fork, failures
        self.just_exported: list[str] = []
        self.root = Path(os.path.realpath(tempfile.mkdtemp(prefix="baby_xp_machine_")))
        self.before = os.getcwd()
        for name in ("texts", "elsewhere/texts", "out"):
            (self.root / name).mkdir(parents=True)
        for name, data in {**TEXTS, **BAD_TEXTS}.items():
            if data is not None:
                (self.root / f"texts/{name}.txt").write_bytes(data)
        (self.root / "texts/folder.txt").mkdir()
        (self.root / "elsewhere/texts/a.txt").write_bytes(b"this is another text of that name. " * 20)
        self.folder = self.root / "runs"
        self.places = {name: self.root / f"texts/{name}.txt" for name in TEXTS}
        self.changed: set[str] = set()
        self.known: dict[str, Known] = {}
        self.exports: list[Export] = []
        self.frames: list[Frame] = []
        self.leftovers: set[str] = set()
        self.orphans: set[str] = set()
        self.unmarked: set[str] = set()
        """Of these, those that nothing marks as such: they may be runs that have lost their configs."""
        self.damaged_ids: dict[str, str] = {}
        self.examined: dict[str, str] = {}
        self.count = itertools.count(1)
        self.journal: list[str] = []
        self.exported = 0
        self.pending: Broken | None = None
        os.chdir(self.root)
        GUIDS.source = Guids()
        self.others = self.surroundings()

    def close(self) -> None:
        """Remove all."""
        os.chdir(self.before)
        shutil.rmtree(self.root)

    def note(self, line: str) -> None:
        self.journal.append(line)

    def fail(self, kind: str, text: str = "") -> None:
        """Something does not hold: raises Broken with all steps."""
        self.note(f"BROKEN: {kind}")
        steps = "\n".join(f"{number:>3}  {line}" for number, line in enumerate(self.journal, 1))
        if self.pending is None:
            report = f"{kind}: {text}\n{steps}"
            self.failures.append((kind, report))
            self.pending = Broken.of(kind)(report)
        raise self.pending

    def surroundings(self) -> Tree:
        """Texts and exports: what no step changes unless it says so."""
        tree = Tree()
        for name in ("texts", "elsewhere", "out"):
            found = Tree.of(self.root / name)
            tree.files |= {f"{name}/{path}": value for path, value in found.files.items()}
            tree.folders |= {f"{name}/{path}" for path in found.folders}
        return tree

    # names -----------------------------------------------------------------------------------------------

    def files(self, guid: str) -> RunFiles:
        return RunFiles(self.folder, guid)

    def path_of(self, guid: str, part: str) -> Path:
        path = getattr(self.files(guid), part)
        return path() if callable(path) else path

    def relative(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def text_is_there(self, known: Known) -> bool:
        """Whether a run finds its text: where it read it, or where its name leads from the current folder."""
        if known.text is None:
            return True
        data = known.config["data"]
        places = [path for path in (Path(data["file"]), Path(data["data"])) if path.is_file()]
        return any(path.read_bytes() == TEXTS[known.text] for path in places)

    def tree(self) -> Tree:
        return Tree.of(self.folder)

    def listed(self, tree: Tree | None = None) -> set[str]:
        """GUIDs of all runs that have a config, whatever that is."""
        tree = tree or self.tree()
        found = (re.fullmatch(rf"configs/config_({GUID.pattern})\.json", n) for n in {*tree.files, *tree.folders})
        return {one[1] for one in found if one}

    # by hand ---------------------------------------------------------------------------------------------

    def damage(self, guid: str, path: Path, act: Callable[[], None]) -> None:
        """Let a file of a run be damaged by `act`, and remember what it was."""
        name, before = self.relative(path), path.read_bytes()
        act()
        original = self.known[guid].hurt.get(name, (before,))[0]
        now = self.tree().files.get(name)
        self.known[guid].hurt.pop(name, None)
        if now != digest(original):
            self.known[guid].hurt[name] = original, now

    def heal(self, known: Known) -> None:
        """Bring back the files of a run that were damaged."""
        for name, (original, _) in known.hurt.items():
            path = self.folder / name
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.is_dir():
                path.rmdir()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(original)
        known.hurt = {}

    def delete_folder(self, folder: Path) -> None:
        for path in folder.iterdir():
            known = self.known.get(owner(path.name))
            name = self.relative(path)
            if known is None or is_leftover(name):
                continue
            if name in known.hurt:
                known.hurt[name] = known.hurt[name][0], None
            elif path.is_file():
                known.hurt[name] = path.read_bytes(), None
        shutil.rmtree(folder)
        self._bring_up_to_date()

    def delete(self, guid: str) -> None:
        """Remove all files of a run."""
        tree = self.tree()
        for name in {*tree.files, *tree.folders}:
            if owner(name) == guid:
                path = self.folder / name
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        del self.known[guid]

    # a step ----------------------------------------------------------------------------------------------

    def do(
        self, op: Op, trouble: Any = None, how: str = "", harmless: Callable[[], bool] = lambda: False
    ) -> Outcome:
        """Do it, in trouble or without, and see that all holds.

        trouble: a context manager that the call runs in, or a job for a child, as keywords of machine_child.done.
        harmless: whether, afterwards, the trouble turns out to be none.
        """
        frame = Frame(op, Tree.of(self.folder), set(self.known))
        frame.active = set() if op.touches is None else {op.touches}
        self.frames.append(frame)
        indent = "    " * (len(self.frames) - 1)
        self.note(f"{indent}{op}{' | ' * bool(how)}{how} ...")
        line = len(self.journal) - 1
        try:
            if isinstance(trouble, dict):
                outcome = self._in_child(op, trouble)
            else:
                writing = Writing()
                with trouble or WATCH.doing(self.root, writing):
                    outcome = self._here(op)
                if writing.wrong:
                    self.fail("a file may be half-written", ", ".join(writing.wrong))
                if self.pending:  # what a step inside of this one found
                    raise self.pending
            self.journal[line] = self.journal[line].removesuffix("...") + f"-> {outcome}"
            self.verify(frame, outcome, trouble is not None and not harmless())
        finally:
            self.frames.remove(frame)
        self._bring_up_to_date()
        return outcome

    def _here(self, op: Op) -> Outcome:
        try:
            return Outcome(perform(op.name, op.arguments))
        except baby_xp.BabyError as error:
            if not str(error) or "\n" in str(error):
                self.fail("an error is not one line", repr(str(error)))
            return Outcome(error=str(error))
        except (Broken, KeyboardInterrupt):
            raise
        except Exception as error:
            self._escaped(error)
            return Outcome(error=str(error))

    def _escaped(self, error: Exception) -> None:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "machine_world" not in f.filename]
        own = [f for f in frames if re.search(r"(baby_xp|backends)/[^/]*/?[^/]*\.py$", f.filename)]
        where = f"{own[-1].name} ({Path(own[-1].filename).name})" if own else "outside"
        trace = "".join(traceback.format_exception(error)[-12:])
        self.fail(f"{type(error).__name__} escapes from {where}", trace)

    def _in_child(self, op: Op, job: dict[str, Any]) -> Outcome:
        number = GUIDS.source.number
        GUIDS.source.number += 1
        found = self.in_fork(name=op.name, arguments=op.arguments, root=str(self.root), guid=number, **job)
        if found["kind"] == "escaped":
            self.fail(f"{found['type']} escapes in a child", found["traceback"])
        if found["kind"] == "done":
            op.may_stop = True
            return Outcome(baby_xp.load(found["guid"], path=self.folder, backend="numpy"))
        return Outcome(error=found.get("error"), crashed=found["kind"] in ("killed", "interrupted"))

    def _bring_up_to_date(self) -> None:
        """What the step at hand has changed is no change to the steps around it."""
        if self.frames:
            now, active = Tree.of(self.folder), self.active()
            for frame in self.frames:
                kept = {n: v for n, v in frame.before.files.items() if self._is_of_active(n, active)}
                rest = {n: v for n, v in now.files.items() if not self._is_of_active(n, active)}
                frame.before = Tree({**rest, **kept}, now.folders | frame.before.folders)

    def active(self) -> set[str]:
        """Runs that a step around this one works on; of a new one, the GUID is not known."""
        return set().union(*(frame.active for frame in self.frames))

    def _is_of_active(self, name: str, active: set[str]) -> bool:
        who = owner(name)
        return who in active or (who is not None and who not in self.known) or name.startswith("corpora")

    # what must hold --------------------------------------------------------------------------------------

    def verify(self, frame: Frame, outcome: Outcome, in_trouble: bool) -> None:
        op, inner = frame.op, len(self.frames) > 1
        after = Tree.of(self.folder)
        around = set().union(*(one.active for one in self.frames[:-1]))
        if op.must is True and outcome.error is not None and not in_trouble:
            self.fail("what should work does not", f"{op}: {outcome.error}")
        if op.must is False and outcome.error is None and not outcome.crashed:
            self.fail("what cannot work does", str(op))
        listed = self.listed(after)
        fresh = listed - self.known.keys() - around
        if inner and any(one.op.makes for one in self.frames[:-1]):  # the run that is being made around this step
            value = getattr(outcome.value, "guid", None)
            fresh &= {value}
        self._check_fresh(op, outcome, fresh, in_trouble)
        may_touch = {op.touches} if outcome.error is None or in_trouble or op.may_fail_late else set()
        self._check_others(frame, after, fresh | may_touch, around, outcome, inner)
        self._check_ids(inner)
        self._check_leftovers(frame, after, outcome, inner, in_trouble)
        for guid in sorted(fresh):
            self._register(guid, op)
        for guid in sorted((fresh | may_touch) & listed & self.known.keys()):
            self._refresh(self.known[guid], after)
        if op.touches is not None and op.touches in self.listed(frame.before) - listed:
            self.fail("a run is gone", op.touches)
        if outcome.error is None and not outcome.crashed:
            if op.makes or op.name == "resume":
                self._check_trained(op, outcome.value)
            op.check(outcome.value)
        self.check_list(listed - self.active() if inner else listed, inner)
        if op.name == "export" and outcome.error is None:
            self.just_exported.append(str(Path(op.arguments["folder"]).relative_to(self.root)))
        if not inner:  # an outer step may be exporting
            self._check_surroundings()

    def _check_surroundings(self) -> None:
        """Texts and exports are as before, except what was exported just now."""
        now, places = self.surroundings(), tuple(f"{place}/" for place in self.just_exported)
        odd = now.differences(self.others) | (now.folders ^ self.others.folders)
        odd = {name for name in odd if not f"{name}/".startswith(places)}
        self.just_exported = []
        if odd:
            self.fail("a text or an export was changed", ", ".join(sorted(odd)))
        self.others = now

    def _check_fresh(self, op: Op, outcome: Outcome, fresh: set[str], in_trouble: bool) -> None:
        if not op.makes:
            expected = set()
        elif outcome.value is not None:
            expected = {outcome.value.guid}
        else:
            expected = fresh if len(fresh) <= 1 and (in_trouble or outcome.crashed) else set()
        if fresh != expected:
            self.fail("runs that should not be there, or are not", f"{sorted(fresh)}, not {sorted(expected)}")

    def _check_others(
        self, frame: Frame, after: Tree, touched: set[str], around: set[str], outcome: Outcome, inner: bool
    ) -> None:
        """All files of other runs are as before, and there are none without a run."""
        swept: set[str] = set()
        for name in sorted(frame.before.differences(after)):
            who = owner(name)
            if is_leftover(name) or name.startswith("corpora/") or who in touched | around:
                continue
            if who is not None and who not in self.known:
                if inner or self._is_orphan(who, outcome, name not in after.files):
                    continue
                self.fail("files without a run", name)
            if who is not None and self._was_never_trained(who, frame, name):
                swept.add(who)
                continue
            self.fail("a file of another run was changed", f"{name}, by {frame.op}")
        self.known = {guid: known for guid, known in self.known.items() if guid not in swept}
        for name in after.files:
            who = owner(name)
            if who is None or who in self.known or who in touched | self.orphans or inner or is_leftover(name):
                continue
            self.fail("files without a run", name)
        if outcome.error is not None and not inner:
            made = after.folders - frame.before.folders
            if made and not touched - {None}:
                self.fail("a step that failed left folders", ", ".join(sorted(made)))

    def _is_orphan(self, guid: str, outcome: Outcome, gone: bool) -> bool:
        """Whether a file without a run is left of a process that was killed, or of such a run and now removed."""
        if outcome.crashed:
            self.orphans.add(guid)
        return guid in self.orphans or gone

    def _was_never_trained(self, guid: str, frame: Frame, name: str) -> bool:
        """A run that was killed before its first step, and then lost its config, may be tidied up."""
        known = self.known[guid]
        config = self.relative(self.files(guid).config)
        return known.hurt.get(config, ("", ""))[1] is None and known.step == 0 and name in frame.before.files

    def _check_ids(self, inner: bool) -> None:
        for path in (self.folder / "corpora").glob("*.ids"):
            data = path.read_bytes()
            if self.damaged_ids.get(path.name) == digest(data):
                continue
            self.damaged_ids.pop(path.name, None)
            if SEEN.setdefault(path.name, digest(data)) != digest(data):
                self.fail("ids are others than before", path.name)
            if data[-32:] != hashlib.sha256(data[:-32]).digest():
                self.fail("ids are damaged", path.name)

    def _check_leftovers(
        self, frame: Frame, after: Tree, outcome: Outcome, inner: bool, in_trouble: bool
    ) -> None:
        left = {name for name in after.files if is_leftover(name)}
        if inner:
            return
        if outcome.crashed:
            self.leftovers |= left
        if new := left - self.leftovers:
            self.fail("something is left over", ", ".join(sorted(new)))
        self.leftovers &= left
        if frame.op.makes and outcome.value is not None and not in_trouble:
            if left:
                self.fail("what a kill left is not swept", ", ".join(sorted(left)))
            # a finetuning may have the name by now of one that was killed
            here = {owner(name) for name in after.files} - {outcome.value.guid}
            if left := here & self.orphans - self.unmarked:
                self.fail("files of a run that was killed are not swept", ", ".join(sorted(left)))
            self.orphans &= here

    # runs ------------------------------------------------------------------------------------------------

    def _register(self, guid: str, op: Op) -> None:
        config = json.loads(self.files(guid).config.read_bytes())
        imported = op.imported.params if op.imported else None
        self.known[guid] = Known(guid, config, op.text, op.base, imported)

    def _refresh(self, known: Known, after: Tree) -> None:
        """What a step may have changed of a run."""
        known.hurt = {name: hurt for name, hurt in known.hurt.items() if after.files.get(name) == hurt[1]}
        if self.relative(self.files(known.guid).config) not in known.hurt:
            known.config = json.loads(self.files(known.guid).config.read_bytes())
        state = self.files(known.guid).state
        if known.imported is None and self.relative(state) not in known.hurt:
            step = int(read_arrays(state)[1]["step"])
            if step < known.step:
                self.fail("a run has lost steps", f"{known.guid}: {known.step} to {step}")
            known.step = step

    def twin(self, known: Known) -> Twin:
        return self.twins.of(known.config, known.base, known.text)

    def _check_trained(self, op: Op, run: Any) -> None:
        known = self.known[run.guid]
        if digest(run.params) != self._expected_params(known, "model"):
            self.fail("the run that is given back is not the one on disk", run.guid)
        if known.imported is not None:
            return
        twin, result = self.twin(known), known.config["result"]
        if result["state"] not in ("done", "stopped") or result["steps"] != known.step:
            self.fail("the result does not say how it ended", f"{result}, the state is of step {known.step}")
        if not op.may_stop and result["state"] != "done":
            self.fail("a run that nothing stopped is not done", str(result))
        state, metadata = read_arrays(self.files(run.guid).state)
        progress = without_times(json.loads(metadata["progress"]))
        if state_digest(state) != twin.states.get(known.step):
            self.fail("the state is not the twin's", f"{run.guid} at step {known.step}")
        records = [record for record in without_times(twin.progress)["records"] if record["step"] <= known.step]
        if progress["records"] != records[: len(progress["records"])] or len(progress["records"]) < sum(
            record["step"] < known.step for record in records
        ):
            self.fail("the records are not the twin's", f"{progress['records']}, not {records}")
        if not op.keeps_outputs:
            return
        metrics = metrics_of(self.files(run.guid))
        if metrics[: len(progress["records"])] != progress["records"] or len(metrics) > len(
            progress["records"]
        ) + 1:
            self.fail("the metrics are not those of the run", f"{metrics}, not {progress['records']}")
        if result["state"] == "done":
            self._check_done(run.guid, twin, progress, metrics)

    def _check_done(self, guid: str, twin: Twin, progress: dict, metrics: list) -> None:
        known = self.known[guid]
        if known.step != max(twin.params) or known.step != known.config["train"]["num_steps"]:
            self.fail("a run is done too early", f"{guid} at step {known.step}")
        if progress != without_times(twin.progress):
            self.fail("the progress is not the twin's", f"{progress}, not {twin.progress}")
        if known.config["result"]["val_loss"] != twin.val_loss or metrics != twin.metrics:
            self.fail("losses are not the twin's", f"{metrics}, not {twin.metrics}")
        if read_arrays(self.files(guid).model)[1]["step"] != str(twin.best_step):
            self.fail("the weights kept are not the best", guid)
        for path in (self.files(guid).report, self.files(guid).completion()):
            if not path.is_file():
                self.fail("a run is done without its outputs", path.name)

    def _expected_params(self, known: Known, part: str) -> str:
        """Digest of the parameters that a file should hold, by the step that it is of."""
        if known.imported is not None:
            return known.imported
        step = int(read_arrays(getattr(self.files(known.guid), part))[1]["step"])
        return self.twin(known).params.get(step, f"no step {step}")

    def check_list(self, listed: set[str], inner: bool = False) -> None:
        """Every run is in the list, and loads or says why not."""
        found = self._here(Op("runs", {"path": str(self.folder)}))
        if found.error is not None:
            self.fail("runs cannot be listed", found.error)
        summaries = {one.guid: one for one in found.value}
        if summaries.keys() != listed and not (inner and listed <= summaries.keys()):
            self.fail("the list is not that of the runs", f"{sorted(summaries)}, not {sorted(listed)}")
        for guid in sorted(listed):
            if guid in self.known:
                self._examine(self.known[guid], summaries[guid])
        lost = {guid for guid, known in self.known.items() if guid not in summaries and not known.hurt}
        if lost - self.active():
            self.fail("a run is gone", ", ".join(sorted(lost)))

    def _examine(self, known: Known, summary: Any) -> None:
        files = self.files(known.guid)
        if self.relative(files.config) not in known.hurt:
            state = {"running": "stopped"}.get(*[known.config["result"]["state"]] * 2)
            if summary.state != state:
                self.fail("the list has another state", f"{summary}, not {state}")
        paths = [getattr(files, part) for part in PARTS]
        now = digest([str(p.readlink()) if p.is_symlink() else digest(p.read_bytes()) if p.is_file() else None
                      for p in paths])  # fmt: skip
        if self.examined.get(known.guid) == now:
            return
        for weights, part in (("best", "model"), ("last", "state")):
            if part == "state" and known.imported is not None:
                continue
            op = Op("load", {"run": known.guid, "path": str(self.folder), "weights": weights})
            outcome = self._here(op)
            if outcome.error is not None:
                if known.is_sound:
                    self.fail("a sound run does not load", f"{known.guid}, {weights} weights: {outcome.error}")
                continue
            if digest(outcome.value.params) != self._expected_params(known, part):
                self.fail("other weights are loaded", f"{known.guid}, {weights}")
        if known.is_sound:
            self._check_generates(known)
        self.examined[known.guid] = now

    def _check_generates(self, known: Known) -> None:
        prompt = "4+4=" if known.text is None and known.imported is None else "a"
        op = Op("generate", {"run": known.guid, "path": str(self.folder), "prompt": prompt, "num_tokens": 3})
        outcome = self._here(op)
        if outcome.error is not None:
            self.fail("a sound run does not generate", outcome.error)
        self.compare(op, outcome.value)

    def compare(self, op: Op, value: Any, text: str | None = None) -> None:
        """What was computed of the same weights before must be the same now."""
        run, result = value
        result = [asdict(one) for one in result] if isinstance(result, list) and op.name == "check" else result
        result = {**asdict(result), "data": None} if op.name == "evaluate" else result
        result = {n: digest(np.asarray(a)) for n, a in result.arrays.items()} if op.name == "inspect" else result
        rest = {name: v for name, v in op.arguments.items() if name not in ("run", "path", "data")}
        of = digest([op.name, rest, text, digest(run.params), run.tokenizer.to_dict(), str(run.model.config)])
        found = json.dumps(result, default=str, sort_keys=True)
        if SEEN.setdefault(of, found) != found:
            self.fail("another result than before", f"{op}: {found}, not {SEEN[of]}")
