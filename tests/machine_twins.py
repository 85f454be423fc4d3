"""The state on disk, and undisturbed runs to compare with, for test_machine.py."""

import hashlib
import itertools
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from machine_faults import OF_A_SESSION, TEXTS, WATCH, Interrupting, guids_from
from safetensors import safe_open

import baby_xp
from baby_xp.presets import PRESETS
from baby_xp.runs.creation import OF_SAFETENSORS
from baby_xp.runs.store import GUID, RunFiles


@dataclass
class Tree:
    """Everything below a folder: SHA-256 of each file by its relative path, and the folders."""

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
    """The GUID in a file's name."""
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
    """The course of an undisturbed run: digests by step."""

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
        # all runs have a constant rate and AdamW, where these have no effect
        without = {"min_lr", "decay_fraction", "muon_lr", "muon_momentum", "muon_iterations"}
        train = {name: value for name, value in {**config["train"], **often}.items() if name not in without}
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
    """What determines the numbers of a run, except text and weights."""
    train = {name: value for name, value in config["train"].items() if name not in OF_A_SESSION}
    data = {name: value for name, value in config["data"].items() if name not in ("data", "file")}
    return json.dumps([config["model"], train, data, config["vocab_size"]], sort_keys=True)


def metrics_of(files: RunFiles) -> list[dict[str, Any]]:
    """The metrics without the times; empty before the first evaluation."""
    if not files.metrics.is_file():
        return []
    return [{**json.loads(line), "seconds": 0} for line in files.metrics.read_text("ascii").splitlines()]
