"""A state machine that searches for faults: random steps on one folder of small runs, with all kinds of failures.

After each step, other runs are as they were, bit for bit; every error is one BabyError of one line; every run in
the list loads or reports why not; no files are left over; and a run that was stopped and resumed ends with the
numbers of an undisturbed twin. machine_faults.py has the calls and the faults, machine_twins.py the twins,
machine_world.py the invariants, this file the rules.

BABY_XP_HOUR_MINUTES=60 python -m pytest tests/test_machine.py -k hour -s

tries new sequences for that many minutes and reports each kind of failure once, with the steps that led to it.
BABY_XP_HOUR_LOG names a file for the same to be followed.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import ClassVar
from unittest import mock

import pytest

pytest.importorskip("resource", reason="permissions, forks and limits are others on this system")

import hypothesis
import machine_faults
import machine_twins
import machine_world
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import engine
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from machine_faults import FAULTS, GPT, MORE, PARTS, SMALL, STEPS, TEXTS, TUNED, Fault
from machine_world import Op, World

import baby_xp
from baby_xp import processes
from baby_xp.runs import store
from baby_xp.runs.store import RunFiles

CHANCE = st.randoms(use_true_random=False)
MOST_RUNS = 5
DAMAGE_TO_IDS = (*["flip"] * 3, *["zero"] * 3, "cut", "longer", "empty", "gone")
HOUR = "BABY_XP_HOUR_MINUTES"


class Machine(RuleBasedStateMachine):
    """The rules. What each step does is drawn by `chance`, whose every draw hypothesis can shrink."""

    twins: machine_twins.Twins
    in_fork: Callable[..., dict]
    """Does a job in a fork: see machine_child.done."""
    real_time = False
    """Whether children are also killed by the clock: such a sequence may differ the next time."""
    counts: ClassVar[Counter] = Counter()
    failures: ClassVar[list] = []

    def __init__(self):
        super().__init__()
        self.world = World(self.twins, self.in_fork, self.failures)
        self.counts["sequences"] += 1

    def teardown(self):
        try:
            if not self.world.pending:
                self.finish()
        finally:
            self.world.close()

    def finish(self):
        """At the end, damaged files are restored, and every stopped run is resumed to the end of its twin."""
        self.world.note("at the end:")
        self.bring_texts_back()
        for known in list(self.world.known.values()):
            self.heal_run(known)
        for guid in list(self.world.known):
            self.world.do(self.resume_of(guid))

    # random choices --------------------------------------------------------------------------------------

    def has_runs(self) -> bool:
        return bool(self.world.known)

    def has_room(self) -> bool:
        return len(self.world.known) < MOST_RUNS

    def a_run(self, chance: Random) -> str:
        return chance.choice(list(self.world.known))

    def name_of(self, chance: Random, guid: str) -> str:
        """The run's GUID, or an unambiguous beginning of it, or "last" if it is the last one."""
        if chance.random() < 0.8:
            return guid
        listed = store.guids(self.world.folder)
        if listed and listed[0] == guid:
            return "last"
        others = [one for one in listed if one[:8] == guid[:8]]
        return guid[:8] + guid[36:] if others == [guid] else guid

    def stopping(self, chance: Random) -> dict:
        """Settings that may end training before its last step, and those of checkpoints."""
        often = {"checkpoint_every": chance.choice([0, 1, 2]), "checkpoint_minutes": chance.choice([0, 0.1])}
        how = chance.choice(["not", "not", "time", "interrupt"])
        if how == "time":
            often["max_minutes"] = chance.choice([0.001, 0.1, 0.2, 0.4])
        if how == "interrupt":
            often["interrupt"] = [chance.randrange(8), chance.choice([False, True])]
        return often

    def train_of(self, chance: Random, may_stop: bool = True) -> Op:
        stop = self.stopping(chance) if may_stop else {}
        stops = "max_minutes" in stop or "interrupt" in stop
        common = {**SMALL, **stop, "path": str(self.world.folder), "num_steps": STEPS, "eval_every": 3}
        must = None if "interrupt" in stop else True  # before the first step, an interrupt is an error
        if chance.random() < 0.15:
            arguments = {**common, "preset": "equations", "batch_size": 8, "n_hidden": 8}
            return Op("train", arguments, makes=True, must=must, may_stop=stops)
        name = chance.choice(sorted(TEXTS))
        place = self.world.places[name]
        if chance.random() < 0.3 and Path.cwd() == self.world.root:
            place = place.relative_to(self.world.root)
        arguments = {
            **common, **GPT, "preset": "classic", "data": str(place), "dropout": chance.choice([0.0, 0.3]),
            "tokenizer": chance.choice(["char", "byte"]),
        }  # fmt: skip
        if name in self.world.changed:
            return Op("train", {**arguments, "data": str(self.bad_text(chance))}, makes=True, must=False)
        return Op("train", arguments, makes=True, must=must, text=name, may_stop=stops)

    def bad_text(self, chance: Random) -> Path:
        return self.world.root / f"texts/{chance.choice(list(machine_faults.BAD_TEXTS))}.txt"

    def bad_train_of(self, chance: Random) -> Op:
        arguments = {**GPT, **self.train_of(chance, may_stop=False).arguments, "preset": "classic"}
        arguments.pop("n_hidden", None)
        return Op("train", {**arguments, "data": str(self.bad_text(chance))}, makes=True, must=False)

    def finetune_of(self, chance: Random, guid: str, may_stop: bool = True) -> Op:
        known, name = self.world.known[guid], chance.choice(sorted(TEXTS))
        stop = self.stopping(chance) if may_stop else {}
        arguments = {
            **SMALL, **stop, "run": self.name_of(chance, guid), "path": str(self.world.folder),
            "data": str(self.world.places[name]), "num_steps": TUNED, "eval_every": 2,
        }  # fmt: skip
        can = known.config["model"]["kind"] == "gpt"
        must = None if "interrupt" in stop or not known.is_sound or name in self.world.changed else can
        base = self.world.twins.keep_base(self.world.files(guid)) if known.is_sound and can else None
        if base is None or name in self.world.changed:  # it may succeed nevertheless, and then has no twin
            arguments["data"] = str(self.bad_text(chance))
            must = False
        return Op("finetune", arguments, makes=True, must=must, text=name, base=base, may_stop=bool(stop))

    def resume_of(self, guid: str, chance: Random | None = None) -> Op:
        known = self.world.known[guid]
        result, asked = known.config["result"], known.config["train"]["num_steps"]
        arguments = {"run": guid, "path": str(self.world.folder), "max_minutes": 0}
        there = self.world.text_is_there(known)
        if chance is None and not there:
            arguments["data"] = str(self.world.places[known.text])
            there = known.text not in self.world.changed
        if chance is not None:
            arguments |= {"run": self.name_of(chance, guid), **self.stopping(chance)}
            arguments.setdefault("max_minutes", 0)
            if known.text is not None and chance.random() < 0.3:
                arguments["data"] = str(self.world.places[known.text])
                there = known.text not in self.world.changed
            if known.base is None and asked == STEPS and chance.random() < 0.3:
                arguments["num_steps"] = MORE
        is_done = result["state"] == "done" and (arguments.get("num_steps") or 0) <= result["steps"]
        stops = bool(arguments["max_minutes"]) or "interrupt" in arguments
        may_write = self.has_files_to_write(known)
        must = None if not known.is_sound or "interrupt" in arguments or not may_write else True
        if is_done or known.imported or (must and not there):
            must = False
        return Op("resume", arguments, touches=guid, must=must, may_stop=stops, may_fail_late=not may_write)

    def has_files_to_write(self, known: machine_world.Known) -> bool:
        """Whether no folder or link blocks the path of a file that the run has to write."""
        paths = [self.world.path_of(known.guid, part) for part in (*PARTS, *machine_faults.OUTPUTS)]
        return not any(path.is_symlink() or path.is_dir() for path in paths)

    def use_of(self, chance: Random, guid: str) -> Op:
        known, name = self.world.known[guid], chance.choice(
            ["load", "generate", "stream", "evaluate", "evaluate", "evaluate", "check", "inspect"]
        )  # fmt: skip
        arguments = {"run": self.name_of(chance, guid), "path": str(self.world.folder)}
        must, text = True, known.text
        learns_text = known.text is not None or known.imported is not None
        if name in ("generate", "stream"):
            arguments |= {"prompt": "a" if learns_text else "4+", "num_tokens": chance.choice([1, 12])}
        if name == "inspect":
            arguments |= {"prompt": "as" if learns_text else "4+4=8", "backward": chance.choice([False, True])}
        if name == "check":
            arguments |= {"tokens": 4, "batch": 1, "elements": 1, "directions": 1}
        if name == "evaluate":
            arguments |= {"num_tokens": 9}
        if name in ("evaluate", "check"):
            if known.imported is not None or (known.text is not None and chance.random() < 0.3):
                text = chance.choice(sorted(TEXTS)) if chance.random() < 0.5 else known.text
                if text is not None:
                    arguments["data"] = str(self.world.places[text])
                must = None if text is not None and text == known.text else (False if text is None else None)
            elif not self.world.text_is_there(known):
                must = False
            if text in self.world.changed:
                must, text = None, f"changed {text}"
        must = must if known.is_sound or must is False else None
        op = Op(name, arguments, must=must)
        if name == "load":
            return op
        if name == "stream":  # an iterator does nothing until it is consumed
            op.name = "generate"
            op.arguments["use_cache"] = False
        op.check = lambda value: self.world.compare(op, value, text)
        return op

    def export_of(self, chance: Random, guid: str) -> Op:
        known = self.world.known[guid]
        self.world.exported += 1
        folder = self.world.root / f"out/{self.world.exported}"
        can = known.config["model"]["kind"] == "gpt" and known.config["data"]["tokenizer"] == "char"
        if known.imported:
            can = True
        must = (can if known.is_sound else None) if can else (False if known.is_sound else None)

        def check(value):
            run, paths = value
            params = machine_twins.digest(run.params.astype("float64"))
            self.world.exports.append(machine_world.Export(str(paths[2]), guid, params, known))

        arguments = {"run": self.name_of(chance, guid), "path": str(self.world.folder), "folder": str(folder)}
        return Op("export", arguments, must=must, check=check)

    def import_of(self, chance: Random) -> Op:
        export = chance.choice(self.world.exports)
        arguments = {"model": export.model, "path": str(self.world.folder), "dtype": "float64"}
        if chance.random() < 0.6:  # under a name that is not a GUID
            self.world.exported += 1
            folder = self.world.root / f"out/{self.world.exported}"
            folder.mkdir()
            for kind in ("model", "config", "tokenizer"):
                source = Path(export.model).parents[1] / f"{kind}s/{kind}_{export.guid}.json"
                shutil.copyfile(source, folder / f"{kind}_x.json")
            self.world.others = self.world.surroundings()
            return Op("import", {**arguments, "model": str(folder / "model_x.json")}, makes=True, must=True,
                      imported=export)  # fmt: skip
        taken = any(machine_twins.owner(name) == export.guid for name in self.world.tree().files)
        return Op("import", arguments, makes=True, must=not taken, imported=export)

    def an_op(self, chance: Random) -> Op:
        """Any call."""
        kinds = ["train", "train", "bad train", "runs"]
        if self.world.known:
            kinds += ["finetune", "resume", "resume", "use", "use", "export"]
        if self.world.exports:
            kinds += ["import"]
        kind = chance.choice(kinds)
        if kind in ("train", "bad train", "finetune", "import") and not self.has_room():
            kind = "resume"
        return self.op_of_kind(chance, kind)

    def op_on(self, chance: Random, guid: str) -> Op:
        """A call for this run."""
        kind = chance.choice(["resume", "resume", "use", "use", "finetune", "export"])
        return self.op_of_kind(chance, "use" if kind == "finetune" and not self.has_room() else kind, guid)

    def op_of_kind(self, chance: Random, kind: str, guid: str | None = None) -> Op:
        if kind in ("finetune", "resume", "use", "export"):
            guid = guid or self.a_run(chance)
        return {
            "runs": lambda: Op("runs", {"path": str(self.world.folder)}, must=True),
            "train": lambda: self.train_of(chance),
            "bad train": lambda: self.bad_train_of(chance),
            "import": lambda: self.import_of(chance),
            "finetune": lambda: self.finetune_of(chance, guid),
            "resume": lambda: self.resume_of(guid, chance),
            "use": lambda: self.use_of(chance, guid),
            "export": lambda: self.export_of(chance, guid),
        }[kind]()

    # calls -----------------------------------------------------------------------------------------------

    @invariant()
    def count(self):
        """After each step."""
        self.counts["steps"] += 1

    @rule(chance=CHANCE)
    def call(self, chance):
        self.world.do(self.an_op(chance))

    @precondition(has_room)
    @rule(chance=CHANCE)
    def train(self, chance):
        self.world.do(self.train_of(chance))

    @precondition(has_runs)
    @rule(chance=CHANCE)
    def go_on(self, chance):
        """With a run: resume, use, finetune or export it."""
        self.world.do(self.op_on(chance, self.a_run(chance)))

    # calls with faults -----------------------------------------------------------------------------------

    @rule(chance=CHANCE)
    def a_fault(self, chance):
        """During a step, the system refuses something: the disk is full, broken, read-only, without locks."""
        op, name = self.an_op(chance), chance.choice(sorted(FAULTS))
        whole = FAULTS[name][1] & {"remove", "lock"}
        fault = Fault(name, 0 if whole else chance.randrange(60), not whole and chance.choice([False, True]))
        how = f"{name} from operation {fault.at}{' once' * fault.once}"
        trouble = machine_faults.WATCH.doing(self.world.root, fault)
        self.world.do(op, trouble, how, harmless=lambda: not fault.fired)

    @rule(chance=CHANCE)
    def no_file_may_grow(self, chance):
        """Real writes fail, in Python or in compiled code."""
        op, limit = self.an_op(chance), chance.choice([0, 10, 300, 1500, 3000, 6000, 9000, 12000, 20000])
        self.world.do(op, machine_faults.file_size_limit(limit), f"files up to {limit} bytes")

    @rule(chance=CHANCE)
    def forbidden(self, chance):
        """A folder or file may not be read, or not be written."""
        op = self.an_op(chance)
        target = chance.choice(sorted([self.world.folder, self.world.root / "texts", *self.paths()]))
        mode = chance.choice([0o000, 0o444, 0o555])

        @contextlib.contextmanager
        def trouble():
            with machine_faults.plain_user(self.world.root):
                before = target.stat().st_mode & 0o777 if target.exists() else None
                if before is not None:
                    target.chmod(mode)
                try:
                    yield
                finally:
                    if before is not None:
                        with contextlib.suppress(FileNotFoundError):  # what a kill left was removed
                            target.chmod(before)

        self.world.do(op, trouble(), f"mode {mode:03o} of {target.relative_to(self.world.root)}")

    def paths(self) -> list[Path]:
        """Everything in the folder of runs, without following links."""
        return [path for path in self.world.folder.rglob("*") if not path.is_symlink()]

    @rule(chance=CHANCE)
    def killed(self, chance):
        """A step in a process that is killed."""
        op = self.an_op(chance)
        while op.name not in ("train", "finetune", "resume"):
            op = self.an_op(chance)
        op.arguments.pop("interrupt", None)
        if self.real_time and chance.random() < 0.5:
            job = {"seconds": chance.choice([0.01, 0.02, 0.05, 0.1, 0.15])}
        else:
            first = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            signals = [(chance.randrange(150), int(first))]
            if chance.random() < 0.3:
                second = chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
                signals.append((signals[0][0] + chance.choice([0, 1, 2, 5, 15]), int(second)))
            job = {"signals": signals}
        self.world.do(op, job, f"in a child, {job}")

    @rule(chance=CHANCE)
    def meanwhile(self, chance):
        """Another step happens during a step."""
        outer, at = self.an_op(chance), chance.randrange(120)
        inner = [None]

        def action(number, event, args):
            if number == at:
                inner[0] = self.inner_step(chance, outer)

        trouble = machine_faults.WATCH.doing(self.world.root, action)
        self.world.do(outer, trouble, f"at operation {at}:", harmless=lambda: inner[0] in (None, "harmless"))

    def inner_step(self, chance: Random, outer: Op) -> str:
        """A step during another one -> "harmless" if the other one must succeed nevertheless."""
        self.counts["steps"] += 1
        kinds = ["bad train", "bad train", "train", "runs", "outputs", "corpora", "ids"]
        others = [guid for guid in self.world.known if guid != outer.touches]
        kinds += ["resume the same"] if outer.touches else []
        kinds += ["use", "finetune", "export"] if others else []
        kind = chance.choice(kinds)
        if kind in ("outputs", "corpora"):
            outer.keeps_outputs = outer.keeps_outputs and kind != "outputs"
            self.delete_folder(kind)
            return "harmless" if outer.name in ("train", "finetune", "resume") and kind == "corpora" else kind
        if kind == "ids":
            self.damage_ids(chance)
            return kind
        if kind == "resume the same":
            op = self.resume_of(outer.touches)
            op.must, op.touches, op.may_stop = None, None, True
            self.world.do(op)
            return kind
        guid = chance.choice(others) if kind in ("use", "finetune", "export") else None
        op = self.op_of_kind(chance, kind, guid)
        if kind == "train" and op.must is None:
            op.arguments.pop("interrupt", None)
            op.must = True
        self.world.do(op)
        return "harmless"

    # damage ----------------------------------------------------------------------------------------------

    @precondition(has_runs)
    @rule(chance=CHANCE)
    def damage(self, chance):
        """A file of a run is damaged."""
        guid = self.a_run(chance)
        part = chance.choice([*PARTS, *PARTS, *machine_faults.OUTPUTS])
        # a file of another run is hardest to detect if the two runs are similar
        others = sorted(self.world.known, key=lambda other: not self.are_alike(guid, other))
        others.remove(guid)
        kinds = ["zero", "cut", "longer", "empty", "gone", "link", "circle", "folder"]
        kinds += [*["flip"] * 4, *["digit"] * 3]
        kind = chance.choice([*kinds, *["mixed up"] * 6] if others else kinds)
        source = self.world.path_of(others[0], part) if kind == "mixed up" else None
        path = self.world.path_of(guid, part)
        if path.is_file() and not path.is_symlink() and (source is None or source.is_file()):
            self.world.note(f"damage {part} of {guid[:4]}{guid[36:]}: {kind}")
            self.world.damage(guid, path, lambda: spoil(chance, path, kind, source))
            self.world.check_list(self.world.listed())
            if chance.random() < 0.6:
                self.world.do(self.op_on(chance, guid))

    def are_alike(self, one: str, other: str) -> bool:
        configs = [self.world.known[guid].config for guid in (one, other)]
        return configs[0]["model"] == configs[1]["model"] and configs[0]["vocab_size"] == configs[1]["vocab_size"]

    @precondition(lambda self: any(known.hurt for known in self.world.known.values()))
    @rule(chance=CHANCE)
    def heal(self, chance):
        """The original files of a run are restored."""
        hurt = [known for known in self.world.known.values() if known.hurt]
        self.heal_run(chance.choice(hurt))
        self.world.check_list(self.world.listed())

    def heal_run(self, known: machine_world.Known) -> None:
        if known.hurt:
            self.world.note(f"bring back the files of {known.guid[:4]}{known.guid[36:]}")
            self.world.heal(known)

    @precondition(has_runs)
    @rule(chance=CHANCE)
    def an_older_checkpoint(self, chance):
        """An older checkpoint is restored: the run continues from there."""
        known = self.world.known[self.a_run(chance)]
        path = self.world.files(known.guid).state
        if known.is_sound and path.is_file():
            if known.old is not None and known.config["result"]["state"] != "done":
                self.world.note(f"an older state of {known.guid[:4]}{known.guid[36:]}")
                path.write_bytes(known.old)
                known.step = int(machine_twins.read_arrays(path)[1]["step"])
            known.old = path.read_bytes()
            self.world.check_list(self.world.listed())

    @rule(chance=CHANCE)
    def damaged_ids(self, chance):
        """The ids of a text, which all runs share, are damaged or deleted."""
        self.damage_ids(chance)
        reading = [guid for guid, known in self.world.known.items() if known.text is not None]
        if reading and chance.random() < 0.8:
            guid = chance.choice(reading)
            op = self.resume_of(guid, chance) if chance.random() < 0.5 else self.use_of(chance, guid)
            self.world.do(op)

    def damage_ids(self, chance: Random, kinds: Sequence[str] = DAMAGE_TO_IDS) -> None:
        paths = sorted((self.world.folder / "corpora").glob("*.ids"))
        if paths:
            path = chance.choice(paths)
            kind = chance.choice(kinds)
            self.world.note(f"damage ids {path.name[:4]}: {kind}")
            spoil(chance, path, kind, None)
            if path.exists():
                self.world.damaged_ids[path.name] = machine_twins.digest(path.read_bytes())

    @rule(chance=CHANCE)
    def delete_a_folder(self, chance):
        self.delete_folder(chance.choice(["outputs", "outputs", "corpora", "corpora", "models", "tokenizers",
                                          "configs"]))  # fmt: skip
        self.world.check_list(self.world.listed())

    def delete_folder(self, name: str) -> None:
        folder = self.world.folder / name
        if folder.is_dir():
            self.world.note(f"delete the folder {name}")
            self.world.delete_folder(folder)
            if name == "configs":  # with the locks that mark the files that a kill has left
                self.world.unmarked |= self.world.orphans

    @precondition(has_runs)
    @rule(chance=CHANCE)
    def delete_a_run(self, chance):
        guid = self.a_run(chance)
        self.world.note(f"delete all files of {guid[:4]}{guid[36:]}")
        self.world.delete(guid)
        self.world.check_list(self.world.listed())

    # places ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.folder.exists())
    @rule(chance=CHANCE)
    def move_the_folder(self, chance):
        name = chance.choice(["runs", "moved", "mit Ümlaut und Leerzeichen"])
        if self.world.folder.name != name:
            self.world.note(f"move the folder to {name}")
            self.world.folder = self.world.folder.rename(self.world.root / name)
            self.world.check_list(self.world.listed())

    @rule(chance=CHANCE)
    def go_elsewhere(self, chance):
        """Changes to another current folder, which has another text of the same name."""
        folder = chance.choice(["", "elsewhere"])
        self.world.note(f"cd ./{folder}")
        os.chdir(self.world.root / folder)

    @rule(chance=CHANCE)
    def a_text_goes(self, chance):
        """A text is renamed, changed or restored."""
        name, how = chance.choice(sorted(TEXTS)), chance.choice(["rename", "alter", "back", "back"])
        home, place = self.world.root / f"texts/{name}.txt", self.world.places[name]
        if how == "rename" and place == home:
            self.world.places[name] = place.rename(self.world.root / f"texts/renamed_{name}.txt")
        elif how == "alter" and name not in self.world.changed:
            place.write_bytes(TEXTS[name].replace(b"s", b"t", 1))
            self.world.changed.add(name)
        elif how == "back":
            self.bring_text_back(name)
        self.world.note(f"text {name}: {how}")
        self.world.others = self.world.surroundings()

    def bring_text_back(self, name: str) -> None:
        self.world.places[name] = self.world.places[name].rename(self.world.root / f"texts/{name}.txt")
        if name in self.world.changed:
            self.world.changed.remove(name)
            self.world.places[name].write_bytes(TEXTS[name])

    def bring_texts_back(self) -> None:
        for name in TEXTS:
            self.bring_text_back(name)
        self.world.others = self.world.surroundings()


def spoil(chance: Random, path: Path, kind: str, source: Path | None) -> None:
    """Damage a file."""
    data = path.read_bytes()
    place = chance.randrange(len(data)) if data and kind in ("flip", "cut") else 0
    front = chance.choice([False, True])  # most of a file is arrays, so the part before them is hit seldom
    place = place % 400 if front else place
    written = {
        "flip": lambda: data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :],
        "zero": lambda: bytes(len(data)),
        "cut": lambda: data[:place],
        "longer": lambda: data + bytes([chance.choice([0, 10, 32, 65])]),
        "empty": lambda: b"",
        "digit": lambda: with_another_digit(chance, data),
        "mixed up": lambda: source.read_bytes(),
    }
    if kind in written and (data or kind != "flip"):
        path.write_bytes(written[kind]())
        return
    if kind == "flip":
        return
    path.unlink()
    if kind == "link":
        path.symlink_to("nowhere")
    elif kind == "circle":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()


def with_another_digit(chance: Random, data: bytes) -> bytes:
    """The data with one digit changed in its text part."""
    places = [place for place in range(min(len(data), 4000)) if data[place : place + 1].isdigit()]
    if not places:
        return data
    place = chance.choice(places)
    return data[:place] + b"%d" % ((data[place] - 48 + 1 + chance.randrange(8)) % 10) + data[place + 1 :]


# tests --------------------------------------------------------------------------------------------------

SEARCH = settings(
    phases=[Phase.generate, Phase.shrink], deadline=None, database=None, print_blob=False,
    suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """The class, with the data that all sequences share."""
    shrinking = mock.patch.object(engine, "MAX_SHRINKING_SECONDS", 30, create=True)
    quickly, twins_folder = machine_faults.small_and_quick(), tempfile.TemporaryDirectory(prefix="baby_xp_twins_")
    child = processes.started("machine_child:done", "the process that forks")
    with shrinking, quickly, twins_folder as folder, child as forking:
        in_fork = lambda **job: processes.ask(forking, {**job, "folder": os.getcwd()})  # noqa: E731
        machine_faults.load_all()
        parts = {"twins": machine_twins.Twins(Path(folder)), "in_fork": staticmethod(in_fork), "counts": Counter()}
        yield type("Machine", (Machine,), parts)


def test_a_folder_of_runs_survives_a_few_random_sequences(machine):
    quick = settings(SEARCH, max_examples=8, stateful_step_count=12, derandomize=True)
    run_state_machine_as_test(machine, settings=quick)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills", "seconds"), [(1, 15, (0.01, 0.08)), (2, 3, (0.8, 1.2))])
def test_a_run_killed_repeatedly_ends_like_an_uninterrupted_one(machine, tmp_path, workers, kills, seconds):
    """At random times; also with workers."""
    (tmp_path / "text.txt").write_bytes(TEXTS["a"])
    settings = {
        **SMALL, **GPT, "preset": "classic", "data": str(tmp_path / "text.txt"), "workers": workers,
        "num_steps": 400, "eval_every": 40, "checkpoint_every": 1, "dropout": 0.2,
    }  # fmt: skip
    folder, half_written, chance = tmp_path / "runs", 0, Random(0)
    for number in range(kills + 1):
        there = list(folder.glob("configs/config_*.json"))
        job = {"name": "resume", "arguments": {"run": "last", "path": str(folder)}}
        if not there:
            job = {"name": "train", "arguments": {**settings, "path": str(folder)}}
        if number < kills:
            job["seconds"] = chance.uniform(*seconds)
        ended = machine.in_fork(**job, root=str(tmp_path), guid=number)
        assert ended["kind"] == ("killed" if number < kills else "done")
        half_written += len(list(folder.glob("*/.*.tmp")))
    assert half_written or workers > 1
    whole = machine_faults.perform("train", {**settings, "path": str(tmp_path / "alone")})
    (run,) = baby_xp.list_runs(folder)
    files = RunFiles(folder, run.guid)
    assert machine_twins.metrics_of(files) == machine_twins.metrics_of(whole.files)
    for name in ("state", "model"):
        arrays, others = (machine_twins.read_arrays(getattr(one, name))[0] for one in (files, whole.files))
        assert {key: machine_twins.digest(one) for key, one in arrays.items()} == {
            key: machine_twins.digest(one) for key, one in others.items()
        }
    assert files.completion().read_text() == whole.files.completion().read_text()
    assert {path.name for path in folder.rglob(f"*{run.guid}*")} == {path.name for path in files.of_training}


# the hour -----------------------------------------------------------------------------------------------


@pytest.mark.hour
@pytest.mark.skipif(HOUR not in os.environ, reason=f"{HOUR} is not set: it says how many minutes to search")
def test_an_hour_of_random_sequences(machine, capsys):
    minutes = float(os.environ[HOUR] or 60)
    log = os.environ.get("BABY_XP_HOUR_LOG")
    hour = Hour(machine, time.monotonic() + 60 * minutes, log and Path(log))
    with capsys.disabled():
        hour.run()
    assert not hour.found, "\n\n".join(hour.found.values())


class Hour:
    """Runs the machine with one seed after the other, and continues after a failure."""

    def __init__(self, machine: type, end: float, log: Path | None):
        self.machine, self.end, self.log = machine, end, log
        self.found: dict[str, str] = {}

    def run(self) -> None:
        self.say(f"\nfrom seed {time.time_ns()} on")
        said = time.monotonic()
        while time.monotonic() < self.end:
            seed = time.time_ns()
            self.machine.real_time = seed % 3 == 0  # such a failure cannot be shortened: it may not happen again
            for kind, steps in self.tried(seed, [Phase.generate], 10, self.machine.counts)[:1]:
                self.failed(seed, kind, steps)
            if time.monotonic() > said + 60:
                said = time.monotonic()
                self.say(self.summary())
        self.say(self.summary())

    def tried(self, seed: int, phases: list[Phase], examples: int, counts: Counter) -> list[tuple[str, str]]:
        """Sequences of this seed -> the failures in the order in which they were found: kind and steps."""
        chosen = settings(SEARCH, max_examples=examples, stateful_step_count=25, phases=phases)
        failures: list[tuple[str, str]] = []
        parts = {"counts": counts, "failures": failures}
        try:
            with contextlib.redirect_stdout(None):
                run_state_machine_as_test(hypothesis.seed(seed)(type("Machine", (self.machine,), parts)),
                                          settings=chosen)  # fmt: skip
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if not failures:  # it is a fault of the state machine itself
                last = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} in {last.name}, line {last.lineno}"
                failures.append((kind, "".join(traceback.format_exception(error))))
        return failures

    def failed(self, seed: int, kind: str, steps: str) -> None:
        """Report a failure of a new kind, with as few steps as a short search finds."""
        if kind in self.found:
            return
        if not self.machine.real_time:
            again = self.tried(seed, [Phase.generate, Phase.shrink], 10, Counter())
            steps = min([steps, *(other for found, other in again if found == kind)], key=len)
        self.found[kind] = steps
        self.say(f"FAILURE {len(self.found)} (seed {seed}): {steps}\n")

    def summary(self) -> str:
        counts = self.machine.counts
        return f"{counts['sequences']} sequences, {counts['steps']} steps, {len(self.found)} failures"

    def say(self, text: str) -> None:
        print(text, flush=True)
        if self.log:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
