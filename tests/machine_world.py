"""A folder of small runs, what happens to it, and the invariants after each step. See test_machine.py."""

import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from machine_faults import BAD_TEXTS, GPT, GUIDS, PARTS, SMALL, TEXTS, WATCH, Guids, Writing, perform
from machine_twins import (
    Tree,
    Twin,
    Twins,
    digest,
    is_leftover,
    metrics_of,
    owner,
    read_arrays,
    state_digest,
    without_times,
)

import baby_xp
from baby_xp.runs.store import GUID, RunFiles


class Broken(AssertionError):
    """An invariant is violated. Each kind has its own class, so that hypothesis can distinguish them."""

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
    """The text that it was trained on; None: equations, or imported."""
    base: str | None = None
    """The key of the base's weights, for a finetuned run."""
    imported: str | None = None
    """Digest of the parameters of an imported run."""
    hurt: dict[str, tuple[bytes | None, str | None]] = field(default_factory=dict)
    """For each damaged file: its original content, and the digest of the current content."""
    step: int = 0
    old: bytes | None = None
    """An older checkpoint."""

    @property
    def is_sound(self) -> bool:
        """Whether the files that loading and resuming need are unchanged."""
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
    """Whether something blocks the path of a file that it has to write."""
    keeps_outputs: bool = True
    """False if its outputs are deleted in the meantime."""

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
"""Results by their inputs: they must be the same each time."""


class World:
    """A folder of runs, the texts that they are trained on, and a record of everything known about them."""

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
        """Raises Broken with all steps."""
        self.note(f"BROKEN: {kind}")
        steps = "\n".join(f"{number:>3}  {line}" for number, line in enumerate(self.journal, 1))
        if self.pending is None:
            report = f"{kind}: {text}\n{steps}"
            self.failures.append((kind, report))
            self.pending = Broken.of(kind)(report)
        raise self.pending

    def surroundings(self) -> Tree:
        """Texts and exports, which a step changes only if it declares so."""
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

    # manual changes --------------------------------------------------------------------------------------

    def damage(self, guid: str, path: Path, act: Callable[[], None]) -> None:
        """Damage a file of a run with `act`, and remember its content."""
        name, before = self.relative(path), path.read_bytes()
        act()
        original = self.known[guid].hurt.get(name, (before,))[0]
        now = self.tree().files.get(name)
        self.known[guid].hurt.pop(name, None)
        if now != digest(original):
            self.known[guid].hurt[name] = original, now

    def heal(self, known: Known) -> None:
        """Restore the damaged files of a run."""
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
        """Do it, with or without a fault, and check the invariants.

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
                if self.pending:  # what a nested step found
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
        frames = traceback.extract_tb(error.__traceback__)
        frames = [one for one in frames if not Path(one.filename).name.startswith("machine_")]
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
        """Tell the enclosing steps about the changes of the current step."""
        if self.frames:
            now, active = Tree.of(self.folder), self.active()
            for frame in self.frames:
                kept = {n: v for n, v in frame.before.files.items() if self._is_of_active(n, active)}
                rest = {n: v for n, v in now.files.items() if not self._is_of_active(n, active)}
                frame.before = Tree({**rest, **kept}, now.folders | frame.before.folders)

    def active(self) -> set[str]:
        """Runs that an enclosing step works on; the GUID of a new one is not known."""
        return set().union(*(frame.active for frame in self.frames))

    def _is_of_active(self, name: str, active: set[str]) -> bool:
        who = owner(name)
        return who in active or (who is not None and who not in self.known) or name.startswith("corpora")

    # invariants ------------------------------------------------------------------------------------------

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
        if inner and any(one.op.makes for one in self.frames[:-1]):  # the run that an enclosing step creates
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
        """Checks that texts and exports are unchanged, except what was exported just now."""
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
        """Checks that all files of other runs are unchanged, and that there are no files without a run."""
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
        """Whether a file without a run was left by a killed process, or was removed with the run of one."""
        if outcome.crashed:
            self.orphans.add(guid)
        return guid in self.orphans or gone

    def _was_never_trained(self, guid: str, frame: Frame, name: str) -> bool:
        """A run that was killed before its first step and then lost its config may be removed."""
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
            # a finetuned run may now have the name of one that was killed
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
        """Update what a step may have changed in a run."""
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
        """Digest of the parameters that a file should contain, given its step."""
        if known.imported is not None:
            return known.imported
        step = int(read_arrays(getattr(self.files(known.guid), part))[1]["step"])
        return self.twin(known).params.get(step, f"no step {step}")

    def check_list(self, listed: set[str], inner: bool = False) -> None:
        """Checks that every run is listed, and loads or reports why not."""
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
        """Checks that results from the same weights are the same as before."""
        run, result = value
        result = [asdict(one) for one in result] if isinstance(result, list) and op.name == "check" else result
        result = {**asdict(result), "data": None} if op.name == "evaluate" else result
        result = {n: digest(np.asarray(a)) for n, a in result.arrays.items()} if op.name == "inspect" else result
        rest = {name: v for name, v in op.arguments.items() if name not in ("run", "path", "data")}
        of = digest([op.name, rest, text, digest(run.params), run.tokenizer.to_dict(), str(run.model.config)])
        found = json.dumps(result, default=str, sort_keys=True)
        if SEEN.setdefault(of, found) != found:
            self.fail("another result than before", f"{op}: {found}, not {SEEN[of]}")
