"""Every flag of every command with hostile values ends in one clear line, or does what was asked for.

The commands and flags are found from the program itself, so a new one is covered the day it is added. hostile.py
runs the command lines in processes with limits.

BABY_XP_HOUR_MINUTES=60 python -m pytest tests/cli/test_hostile.py -m hour tries new ones for an hour. It reports
each fault it finds, and appends its progress to the file that BABY_XP_HOUR_LOG names.
"""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from small_runs import LONGEST

from baby_xp.cli import COMMANDS, USAGE, main, options
from baby_xp.presets import PRESETS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

DIFFERENT = list({function: name for name, function in reversed(COMMANDS.items())}.values())[::-1]
"""Commands without second names."""
RUNS = [["@char"], ["@byte"], ["@equations"], ["@littlebaby"], ["last"], []]
"""The runs of hostile.py, as a command names them."""
FORMS = {
    "train": [[], *([name] for name in PRESETS)],
    "estimate": [[], *([name] for name in PRESETS)],
    "finetune": [["@char"], ["@byte"], ["@littlebaby"], ["last"]],
    "equations": [[], ["mlp"], ["gpt"]],
    "import": [["littlebaby", "@model"]],
    "export": [["littlebaby", *run] for run in RUNS],
    "runs": [[]],
    "presets": [[]],
    "backends": [[]],
}
"""What a command needs before its flags; where nothing is said, it is a run."""
BASE = {
    "n-layers": "1", "n-emb": "16", "head-size": "16", "n-heads": "2", "n-ctx": "16", "n-hidden": "8",
    "batch-size": "4", "num-steps": "8", "eval-every": "4", "sample-tokens": "5", "max-minutes": "0.01",
    "warmup-steps": "2", "workers": "1", "backend": "numpy", "data": "text.txt", "held-out": "4+4", "seeds": "1",
    "num-tokens": "20", "tokens": "8", "directions": "1", "elements": "1", "prompt": "the cat",
}  # fmt: skip
"""Small sizes, for every flag that is not tried."""
READING = {"estimate", "runs", "presets", "backends", "check", "evaluate", "equations"}
"""Commands that write nothing, unless a picture is asked for."""
TRAINING = {"train", "finetune", "resume", "generate", "inference"}
"""Commands that may take arbitrarily long, and print a line when they begin."""
NOTES = (
    "stopping after this step, with a checkpoint; once more: at once",
    r"the .* at step \d+; looking for its cause from step \d+ on",
)
"""What may stand on stderr before the message."""
KEPT = re.compile(r"is kept: run \S+ can be resumed|had diverged already")
"""Messages of a training that failed with a checkpoint: its run stays."""
GUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?:_finetuned(?:-[0-9]+)?)*")

# hostile values -----------------------------------------------------------------------------------------

INTEGERS = [
    "0", "-1", "1", "2", "3", str(2**31 - 1), str(2**31), str(2**32), str(2**53 + 1), str(2**63 - 1), str(2**63),
    str(2**64 - 1), str(2**64), str(10**400), "9" * 5000, "-" + str(10**400), "1e4", "0x10", "0b1", "１２", " 5",
    "5 ", "", "+3", "1_000", "nan", "inf", "--", "-0", "٣", "²", "½", "True", "None", "1.0", "1,000",
    "-2147483649", "5\n", "\0", "\udce9",
]  # fmt: skip
FLOATS = [
    "nan", "inf", "-inf", "1e-320", "1e308", "-1e308", "1e400", "1e-400", "0.999999", "0.9999999999999999",
    "-0.0", "0", "1", "-1", "0.5", "2", "1,5", "", " 0.5", "1_0.0", "٣.٥", "0x1p-3", "None", "1e-45", "1e38",
    "3.5e38", "1e16", "9" * 5000, str(10**400), "Infinity", "NaN", "1e", ".", "--", "\0",
]  # fmt: skip
STRINGS = [
    "", " ", ".", "..", "/dev/null", "/dev/full", "/dev/zero", "/proc", "/proc/self/mem", "fifo", "folder",
    "missing", "missing/also/missing", "text.txt", "text.txt/", "text.txt/x", "other.txt", "binary.bin",
    "empty.txt", "loop", "loop/x", "dangling", "runs", "runs/models", "littlebaby", "a" * 255, "a" * 300,
    "é" * 200, "a" * 5000, "a/" * 2500, "\0", "text.txt\0", "\udce9", os.fsdecode(b"caf\xe9.txt"), "text.txt\n",
    "\n", "\r\n", "\t", "\x1b[31mred\x1b[0m", "\x7f\x08", "👶", "👩‍👩‍👧", "\u202etxt.exe", "\u200f", "\ufeff",
    "\u2028", "e\u0301", "-", "--", "--help", "-1", "~", "~nouser/x", "last", "../..", "../../x", "*", "[a-z]*",
    "t?xt.txt", "{}", "%s", "%", "$HOME", "`id`", "'", '"', "\\", "C:\\x", "file:///text.txt",
    "http://localhost:1/x", "x.png", "x.pgf", "x.PNG", ".png", "x.raw", "x.svg", "folder/x.pdf", "missing/x.png",
    "None", "none", "True", "0", "0.0", "1.0", "0.1", "-1.0", "0.-1", "0.0.0", "0.0,0.1", "all", "All", "each",
    "1e400", "nan", "99999999999999999999", "99999999999999999999.0", "²", "².²", "٠.٠", "½", "9" * 5000, "4+4",
    "4+4,", ",", "4+4,4+4", "9+9", "99+99", "4-4", "4+-4", "+", "-0", "=", "4 + 4", "４+４", "10%", "0%", "100%",
    "101%", "nan%", "1e400%", "-5%", "%10", "0.001%", "1e-320%", "٣%", "the cat", "numpy", "NumPy", "auto",
    "cpu", "cuda:0", "cuda:99999999999999999999", "cuda:-1", "nursery", "equations", "cat\udce9", "@char",
    "@byte", "@equations", "@littlebaby", "@model",
]  # fmt: skip
FORBIDDEN = ["/", "/x", "/x/y.png", "locked", "locked/text.txt", "locked/x.png"]
"""What nobody but root can write, or read: a line with one of them is not run as root."""
STRINGS += FORBIDDEN
FEW = {bool: ["", "True", "False", "1", "no", "\0"], type(None): ["None", "none"]}
MILD = {
    int: ["1", "2", "4", "5", "7", "12"],
    float: ["0.1", "0.5", "1e-3", "1e-9", "3"],
    str: ["text.txt", "x", "1.0", "0.0"],
}
"""Values that are odd at most: with them, other faults are reached."""
UNKNOWN = [
    ["--no-such-flag"], ["--no-such-flag", "1"], ["--no-such-flag=1"], ["-x"], ["-n", "5"], ["---"], ["--=1"],
    ["--no"], ["--no-"], ["-"], ["--"], ["--", "--help"], ["--" + "a" * 5000], ["--\0"], ["--\udce9=1"], ["--é"],
    ["-h5"], ["--help=5"], ["-hx", "--help"], ["@/etc/passwd"],
    ["@missing"],
]  # fmt: skip


def values_of(kind: Any) -> list[list[str]]:
    """Hostile values of a type, each as the arguments that it takes."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        found = [value for part in typing.get_args(kind) for value in values_of(part)]
        return [value for i, value in enumerate(found) if value not in found[:i]]
    if typing.get_origin(kind) is Literal:
        names = [str(name) for name in typing.get_args(kind)]
        odd = [name.upper() for name in names] + [name[:-1] for name in names] + [name + " " for name in names]
        odd += [",".join(names), "", " ", "0", "None", "\0", "\udce9", "a" * 5000, "--"]
        return [[name] for name in (*names, *odd)]
    if typing.get_origin(kind) is tuple:
        one = values_of(typing.get_args(kind)[0])
        pairs = [first + second for first, second in zip(one, one[7:], strict=False)]
        return [[], *one, *pairs, *(value * 300 for value in one[:3])]
    values = {int: INTEGERS, float: FLOATS, str: STRINGS, **FEW}
    assert kind in values, f"no hostile values are known for a flag of type {kind}: add some"
    return [[value] for value in values[kind]]


def mild_values_of(kind: Any) -> list[list[str]]:
    """Values of a type that may well be good."""
    if kind in MILD:
        return [[value] for value in MILD[kind]]
    parts = [part for part in typing.get_args(kind) if part in MILD]
    if parts:
        return mild_values_of(parts[0])
    return [[str(name)] for name in typing.get_args(kind) if isinstance(name, str)] or [["True"], ["False"]]


# what the program has -----------------------------------------------------------------------------------


class Caught(BaseException):
    """What the program was about to parse."""


def flags_of(arguments: list[str]) -> dict[str, Any]:
    """The flags of a command line, with their types: those of the dataclasses that it stands for."""

    def catch(parts, *_):
        raise Caught(*(part for _, part in parts))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "parse", catch)
        try:
            main(arguments)
        except Caught as caught:
            fields = [field for part in caught.args for field in options.fields_of(part)]
            return {"--" + name.replace("_", "-"): kind for name, kind, _ in fields}
        except SystemExit:
            return {}
    return {}


def negative(flag: str) -> str:
    return f"--no-{flag[2:]}"


@dataclass(frozen=True)
class Form:
    """A command with what it needs before its flags, and the flags."""

    command: str
    needs: tuple[str, ...]
    flags: tuple[tuple[str, Any], ...] = field(repr=False)


class Watch:
    """hostile.py, which runs the command lines."""

    def __init__(self, folder: Path):
        variables = {
            "HOME": folder / "home", "XDG_CACHE_HOME": folder / "home", "MPLCONFIGDIR": folder / "home",
            "BABY_XP_DATA": folder / "home", "OPENBLAS_NUM_THREADS": 1,
            "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "COLUMNS": 100,
        }  # fmt: skip
        (folder / "home").mkdir()
        program = Path(__file__).parents[1] / "hostile.py"
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `close`)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "default", program, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True, env=os.environ | {name: str(value) for name, value in variables.items()},
        )  # fmt: skip
        about = self._answer()
        self.here, self.names = Path(about["here"]), about["names"]
        self.forms = [
            Form(command, tuple(needs), tuple(self._flags(command, needs).items()))
            for command in COMMANDS
            for needs in FORMS.get(command, RUNS)
        ]

    def _flags(self, command: str, needs: list[str]) -> dict[str, Any]:
        named = [self.names.get(need[1:], need) if need.startswith("@") else need for need in needs]
        path = [] if command in ("presets", "backends") else [f"--path={self.here}/runs"]
        return flags_of([command, *named, *path, "--help"])

    def ask(self, line: list[str], long: str = "never", stop: str = "SIGINT", **more) -> dict[str, Any]:
        """Run a command line, as `run` of hostile.py does."""
        nobody = any(re.search(f"(^|=)({'|'.join(FORBIDDEN)})$", argument) for argument in line)
        json.dump({"line": line, "long": long, "stop": stop, "nobody": nobody, **more}, self.process.stdin)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.log.seek(0)
        raise AssertionError(f"hostile.py has ended: {self.log.read()[-3000:].decode('utf-8', 'replace')}")

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            pipe.close()
        self.process.wait()


@pytest.fixture(scope="module")
def watch(tmp_path_factory) -> Iterator[Watch]:
    watch = Watch(tmp_path_factory.mktemp("hostile"))
    yield watch
    watch.close()


# command lines ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A command line in parts; the hostile ones apart, so that each can be left out."""

    start: tuple[str, ...]
    base: tuple[tuple[str, ...], ...]
    hostile: tuple[tuple[str, ...], ...]
    stop: str = "SIGINT"

    @property
    def arguments(self) -> list[str]:
        return [argument for part in ((self.start), *self.base, *self.hostile) for argument in part]

    @property
    def long(self) -> str:
        """When it may take long: see `run` of hostile.py."""
        if self.start[:1] and self.start[0] in TRAINING:
            return "begun"
        # thousands, or as many steps as the program chooses
        numbers = re.findall(r"[0-9]{4,}|[0-9]e[0-9]|epochs|None", " ".join(self.arguments).replace("_", ""))
        return "always" if numbers and self.start[0] != "estimate" else "never"

    def __str__(self) -> str:
        shorter = [a if len(a) <= 80 else f"{a[:20]}...({len(a)} characters)" for a in self.arguments]
        return " ".join(repr(a) if not re.fullmatch(r"[\w@%+=:,./-]+", a) else a for a in shorter)


@st.composite
def lines(draw, forms: list[Form]) -> Line:
    """A command line with one to three things that are wrong, or odd."""
    form = draw(st.sampled_from(forms))
    start, flags = (form.command, *form.needs), dict(form.flags)
    names = list(flags)
    hostile: list[tuple[str, ...]] = []
    tried: set[str] = set()
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 2, 3]))):
        what = draw(
            st.sampled_from(["value"] * 20 + ["twice", "no value", "unknown", "beginning", "junk", "run", "start"])
        )
        if not names and what in ("value", "twice", "no value", "beginning"):
            what = draw(st.sampled_from(["unknown", "junk", "run", "start"]))
        if what in ("value", "twice", "no value", "beginning"):
            flag = draw(st.sampled_from(names))
            tried.add(flag)
            values = values_of(flags[flag]) if draw(st.integers(0, 2)) else mild_values_of(flags[flag])
            value = draw(st.sampled_from(values))
        if what == "value":
            hostile.append(draw(st.sampled_from(_written(flag, value, flags[flag] is bool))))
        elif what == "twice":
            other = draw(st.sampled_from(values_of(flags[flag])))
            hostile.append((flag, *value, flag, *other))
        elif what == "no value":
            hostile.append((flag,))
        elif what == "beginning":
            hostile.append((flag[: draw(st.integers(2, len(flag)))], *value))
        elif what == "unknown":
            hostile.append(tuple(draw(st.sampled_from(UNKNOWN))))
        elif what == "junk":
            hostile.append((draw(st.sampled_from(STRINGS)),))
        elif what == "run":
            hostile.append((draw(st.sampled_from(["@char", "@byte", "last", "baby", "littlebaby"])),))
        else:
            start = (*start[:-1], draw(st.sampled_from(STRINGS))) if len(start) > 1 else start
    # as nobody, processes may not be able to read what they are to run
    assume("--workers" not in tried or not set(FORBIDDEN) & {argument for part in hostile for argument in part})
    return Line(
        start,
        _base(form, tried),
        tuple(draw(st.permutations(hostile))),
        draw(st.sampled_from(["SIGINT", "SIGTERM"])),
    )


def _base(form: Form, tried: set[str]) -> tuple[tuple[str, ...], ...]:
    """Small sizes for the flags that are not tried. Equations are made by the program, and have contexts of their
    own; a run has its own text and steps."""
    flags = dict(form.flags)
    own = {"--data", "--n-ctx", "--head-size", "--n-emb", "--n-heads"} if "--held-out" in flags else set()
    if form.command in ("check", "evaluate", "resume"):
        own = {"--num-steps"} if "@littlebaby" in form.needs else {"--num-steps", "--data"}
    if form.command == "equations":
        own |= {"--eval-every", "--sample-tokens", "--max-minutes"}
    if "--num-epochs" in tried:
        own |= {"--num-steps"}
    wanted = {f"--{name}": f"--{name}={value}" for name, value in BASE.items() if f"--{name}" not in own}
    if "@equations" in form.needs and "--prompt" in flags:
        wanted["--prompt"] = "--prompt=4+4="
    if "--measure" in flags:
        wanted["--measure"] = "--no-measure"
    return tuple((argument,) for flag, argument in wanted.items() if flag in flags.keys() - tried)


def _written(flag: str, value: list[str], switch: bool) -> list[tuple[str, ...]]:
    """The ways to write a flag with a value."""
    ways = [(flag, *value), (flag.replace("-", "_").replace("__", "--", 1), *value)]
    if value:
        ways += [(f"{flag}={value[0]}", *value[1:])] * 2
    return [*ways, (flag,), (negative(flag),), (negative(negative(flag)),)] if switch else ways


# what must hold -----------------------------------------------------------------------------------------


def faults(line: Line, ended: dict[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with how a command line ended: what kind of fault, and the details."""
    if ended["hang"]:
        where = _innermost(ended["where"])
        return [(f"{re.sub(r', [0-9.]+ s$', '', ended['hang'])} in {_own(where)}", where)]
    if ended["signal"]:
        return [(f"died of {signal.Signals(ended['signal']).name}", ended["err"][-300:])]
    if ended["error"]:
        *_, last = ended["error"].strip().splitlines()
        return [(f"exception {last.partition(':')[0]} in {_place(ended['error'])}", last[:300])]
    found = [*_about_output(line, ended), *_about_files(line, ended)]
    if ended["left"]:
        found.append(("processes go on after its end", f"{ended['left']}"))
    return found


def _about_output(line: Line, ended: dict[str, Any]) -> Iterator[tuple[str, str]]:
    code, err, command = ended["code"], ended["err"], line.start[0]
    stops = {"SIGINT": {130}, "SIGTERM": {130, 143}}.get(ended["stopped"], set())
    allowed = {0, 2, *stops, *({1} if command == "check" else ())}
    if ended["exit"]:
        allowed = {0}
        if not ended["out"]:
            yield "ends without a word", ""
    if code not in allowed or isinstance(code, bool):
        yield f"exit code {code}", err[-300:]
    for text in (ended["out"], err):
        if "Traceback (most recent" in text:
            yield f"traceback printed, {_place(text)}", text[-400:]
    if re.search(r"\w+Warning: ", err):
        yield f"warning printed, {_place(err)}", err[:400]
    if code in (2, 130, 143):
        rows = [row for row in err.split("\n") if not any(re.fullmatch(note, row) for note in NOTES)]
        yield from _about_message("\n".join(rows))


def _about_message(err: str) -> Iterator[tuple[str, str]]:
    if err.count("\n") != 1 or not err.endswith("\n"):
        yield f"{err.count(chr(10))} lines on stderr", err[:600]
    elif not err.startswith("baby_xp: ") or len(err) < 15:
        yield "a message that does not say whose it is", err[:300]
    else:
        if len(err) > LONGEST:
            yield f"a message of very many characters: {_shape(err)}", f"{len(err)}: {err[:80]}...{err[-80:]}"
        if not err[:-1].isprintable():
            yield f"a message that cannot be printed: {_shape(err)}", ascii(err[:300])


def _about_files(line: Line, ended: dict[str, Any]) -> Iterator[tuple[str, str]]:
    command, code, err = line.start[0], ended["code"], ended["err"]
    changed = ended["changed"] + ended["removed"]
    training = command in ("train", "finetune", "resume")
    fails_with_a_run = code == 2 and training and KEPT.search(err)
    going_on = command == "resume" and (code in (0, 130, 143) or fails_with_a_run)
    if changed and not (going_on and len({*_guids(changed)}) == 1 and all(GUID.search(name) for name in changed)):
        yield f"{command} with exit code {code} changed what was there", ", ".join(changed)[:300]
    odd = [name for name in ended["added"] if name.endswith((".tmp", ".lock")) or "/." in f"/{name}"]
    if odd:
        yield f"{command} with exit code {code} left temporary files", ", ".join(odd)[:300]
    elif ended["added"] and code == 2 and not fails_with_a_run:
        yield f"{command} with exit code 2 left something", f"{', '.join(ended['added'])[:300]}; {err[:200]}"
    elif ended["added"] and command in READING and not any("picture" in argument for argument in line.arguments):
        yield f"{command} wrote something", ", ".join(ended["added"])[:300]


def _guids(names: list[str]) -> Iterator[str]:
    for name in names:
        yield from GUID.findall(name)


def _place(trace: str) -> str:
    """The innermost line of the project's own in a traceback."""
    own = re.findall(r'([\w-]+/[\w.]+\.py)"?[:,] ?(?:line )?(\d+)', trace)
    own = [f"{file}:{row}" for file, row in own if not file.startswith("tests/")] or ["?"]
    return next((one for one in reversed(own) if one.startswith(("baby_xp/", "h4/"))), own[-1])


def _innermost(where: str) -> str:
    """The most recent lines of the main thread, of what faulthandler wrote."""
    frames = re.findall(r'File "([^"]*)", line (\d+) in (.+)', where)
    return " < ".join(f"{'/'.join(file.split('/')[-2:])}:{row} {name}" for file, row, name in frames[:9])


def _own(where: str) -> str:
    """The innermost function of the project's own among these, without its line."""
    return next((re.sub(r":\d+", "", row) for row in where.split(" < ") if row.startswith("baby_xp/")), "?")


def _shape(message: str) -> str:
    """The first words of a message that are the same each time."""
    words = re.sub(r"'[^']*'?|\S*[^\x20-\x7e]\S*|\S{30,}", "*", message.removeprefix("baby_xp: ")).split()
    return " ".join(words[:2] if words[0] != "*" else words[:4])


def try_line(watch: Watch, line: Line) -> list[tuple[str, str]]:
    return faults(line, watch.ask(line.arguments, line.long, line.stop))


def smallest(watch: Watch, line: Line, kind: str) -> Line:
    """The line without those of its hostile parts that the fault does not need."""
    for part in line.hostile:
        fewer = dataclasses.replace(line, hostile=tuple(other for other in line.hostile if other is not part))
        if fewer.hostile and kind in dict(try_line(watch, fewer)):
            line = fewer
    return line


# the tests ----------------------------------------------------------------------------------------------


def test_the_program_names_its_commands():
    """The tests below try what the usage lists; one command has a second name."""
    named = set(re.findall(r"^  ([a-z]+) ", USAGE, re.M))
    assert named == COMMANDS.keys() - {"inference"}
    assert FORMS.keys() <= COMMANDS.keys()


@pytest.mark.parametrize("command", DIFFERENT)
def test_help_names_the_flags_that_are_tried(watch, command):
    different = {form.flags: form for form in watch.forms if form.command == command}
    for form in different.values():
        ended = watch.ask([command, *form.needs, "--help"])
        assert (ended["code"], ended["err"]) == (0, "")
        named = set()
        for row in ended["out"].splitlines():
            if match := re.match(r" *(-h, )?(--[a-z][a-z0-9-]*(?:, --[a-z][a-z0-9-]*)*)", row):
                named |= set(match[2].split(", "))
        known = {
            name for flag, kind in form.flags for name in ([flag, negative(flag)] if kind is bool else [flag])
        }
        assert named - {"--help"} == known
        assert known or command in ("presets", "backends")


@pytest.mark.parametrize("command", DIFFERENT)
def test_the_sizes_that_are_not_tried_are_good(watch, command):
    """Otherwise nothing but messages about them would be seen."""
    different = {form.flags: form for form in watch.forms if form.command == command}
    for form in different.values():
        line = Line((form.command, *form.needs), _base(form, set()), ())
        ended = watch.ask(line.arguments)
        assert (ended["code"], faults(line, ended)) == (0, []), f"{line}: {ended['err']}"


@pytest.mark.parametrize("command", DIFFERENT)
def test_hostile_values(watch, command):
    """A few for each command: the hour below tries more."""

    @settings(
        max_examples=6, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(lines([form for form in watch.forms if form.command == command]))
    def holds(line):
        found = try_line(watch, line)
        assert not found, f"{line}: {found}"

    holds()


def test_hostile_commands(watch):
    for argument in ("", " ", "TRAIN", "trai", "\0", "\udce9", "--", "-", "--trace", "a" * 300, "\x1b[1m"):
        line = Line((argument,), (), ())
        ended = watch.ask(line.arguments)
        assert (ended["code"], faults(line, ended)) == (2, []), ascii(argument)


def _program(body: str) -> str:
    rows = "\n".join("    " + row for row in body.splitlines())
    return f"import os, signal, subprocess, sys, time\ndef main(arguments):\n{rows}\n"


SAYS = "print('baby_xp: it is so', file=sys.stderr)\n"
BAD_PROGRAMS = {
    "exception": ("raise KeyError('x')", "exception KeyError"),
    "exit by itself": ("sys.exit(3)", "exit code 3"),
    "silent exit": ("sys.exit(0)", "ends without a word"),
    "exit code": ("return 7", "exit code 7"),
    "no exit code": ("return None", "exit code None"),
    "death": ("os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
    "silence": ("return 2", "0 lines"),
    "two lines": (f"{SAYS * 2}return 2", "2 lines"),
    "long line": (f"{SAYS.replace('so', 'so' * 400)}return 2", "very many"),
    "control characters": ("print('baby_xp: \\x1b[1mit is so', file=sys.stderr)\nreturn 2", "cannot be printed"),
    "no name": ("print('it is so, and so on', file=sys.stderr)\nreturn 2", "whose it is"),
    "traceback": ("print('Traceback (most recent call last)')\nreturn 0", "traceback"),
    "warning": ("import warnings\nwarnings.warn('so', stacklevel=1)\nreturn 0", "warning printed"),
    "interrupt by nobody": (f"{SAYS}return 130", "exit code 130"),
    "file left": (f"{SAYS}open('x', 'w').close()\nreturn 2", "left something"),
    "folder left": (f"{SAYS}os.mkdir('../x')\nreturn 2", "left something"),
    "temporary file left": ("open('runs/outputs/.x.tmp', 'w').close()\nreturn 0", "left temporary files"),
    "damage": ("open('text.txt', 'a').write('x')\nreturn 0", "changed what was there"),
    "loss": (f"{SAYS}os.unlink('text.txt')\nreturn 2", "changed what was there"),
    "computes on": ("while True: pass", "hangs"),
    "process left": ("subprocess.Popen(['sleep', '60'])\nreturn 0", "processes go on"),
    "process left alone": (
        "subprocess.Popen(['sleep', '9'], start_new_session=True)\nreturn 0",
        "processes go on",
    ),
    "file in memory": ("os.posix_fallocate(os.memfd_create('x'), 0, 2 ** 30)\nreturn 0", "exception OSError"),
    "memory": ("b = bytearray(2 ** 30)\nreturn 0", "exception MemoryError"),
}


@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_bad_programs_are_found(watch, name):
    """What looks for faults finds each kind of them."""
    if name.startswith("process left") and not os.path.isdir("/proc/self"):
        pytest.skip("processes cannot be counted here")
    if name == "file in memory" and not hasattr(os, "memfd_create"):
        pytest.skip("the system has no files in memory")
    body, expected = BAD_PROGRAMS[name]
    line = Line(("train",), (), ())
    ended = watch.ask(["train"], instead=_program(body), patience=0.3, memory=2**30)
    assert [kind for kind, _ in faults(line, ended) if expected in kind], ended


def test_a_good_program_has_no_faults(watch):
    line = Line(("train",), (), ())
    for body in (f"{SAYS}return 2", "print('done')\nsys.exit(0)", "open('runs/x', 'w').close()\nreturn 0"):
        assert not faults(line, watch.ask(["train"], instead=_program(body)))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_what_takes_long_can_be_stopped(watch, name):
    line = ["generate", "@char", "--num-tokens", str(2**31 - 1), "--backend", "numpy"]
    ended = watch.ask(line, "begun", name, after=0.5)
    assert ended["stopped"]
    assert not faults(Line(tuple(line), (), ()), ended)


@pytest.mark.hour
@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@pytest.mark.skipif("BABY_XP_HOUR_MINUTES" not in os.environ, reason="BABY_XP_HOUR_MINUTES is not set")
def test_hostile_values_for_an_hour(watch, capsys):
    """New command lines all the time; each kind of fault is reported once, with the smallest line for it."""
    end = time.monotonic() + 60 * float(os.environ["BABY_XP_HOUR_MINUTES"])
    log = os.environ.get("BABY_XP_HOUR_LOG", os.devnull)
    found: dict[str, tuple[Line, str]] = {}
    codes: dict[str, int] = {}

    def say(text: str) -> None:
        with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {text}\n".replace("\0", "\\0"))

    def one(line: Line) -> None:
        if time.monotonic() > end:
            return
        ended = watch.ask(line.arguments, line.long, line.stop)
        code = ended["stopped"] or ("killed" if ended["hang"] else str(ended["code"]))
        codes[code] = codes.get(code, 0) + 1
        for kind, details in faults(line, ended):
            if kind not in found:
                shortest = smallest(watch, line, kind)
                found[kind] = shortest, details
                say(f"FAILURE {kind}\n    {shortest}\n    {shortest.arguments!a:.3000}\n    {details}")

    first = random.SystemRandom().randrange(2**32)
    for number in range(first, first + 2**32):
        if time.monotonic() > end:
            break
        strategy = lines(watch.forms)
        a_hundred = settings(
            max_examples=100, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        seed(number)(a_hundred(given(strategy)(one)))()
        say(f"seed {number}: {sum(codes.values())} command lines, {len(found)} failures; exit codes {codes}")
    summary = f"{sum(codes.values())} command lines, {len(found)} failures"
    report = "\n".join(f"{kind}\n    {line}\n    {details}" for kind, (line, details) in found.items())
    say(f"{report}\n{summary}")
    with capsys.disabled():
        print("", report.encode("ascii", "backslashreplace").decode("ascii"), summary, sep="\n")
    assert not found, summary
