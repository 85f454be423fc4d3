"""Every flag of every command, given a hostile value, ends in one clear line or works as documented.

hostile_lines.py reads the commands and flags from the program itself, so new ones are covered automatically.
hostile.py runs the command lines in processes with limits.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_lines import DIFFERENT, FORBIDDEN, FORMS, RUNS, Form, Line, base_of, flags_of, lines, negative
from hypothesis import HealthCheck, Phase, given, seed, settings
from small_runs import LONGEST

from baby_xp.cli import COMMANDS, USAGE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

READING = {"estimate", "runs", "presets", "backends", "check", "evaluate", "equations"}
"""Commands that write nothing, unless a picture is asked for."""
NOTES = (
    "stopping after this step, with a checkpoint; interrupt again to stop at once",
    r"the .* at step \d+; searching for the cause from step \d+ on",
)
"""What stderr may contain before the message."""
KEPT = re.compile(r"is kept: run \S+ can be resumed|had diverged already")
"""Messages of a training that failed with a checkpoint: its run stays."""
GUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?:_finetuned(?:-[0-9]+)?)*")


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


# faults -------------------------------------------------------------------------------------------------


def faults(line: Line, ended: dict[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with the way a command line ended: the kind of fault, and the details."""
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
        found.append(("processes continue after its end", f"{ended['left']}"))
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
    """The innermost line of this project in a traceback."""
    own = re.findall(r'([\w-]+/[\w.]+\.py)"?[:,] ?(?:line )?(\d+)', trace)
    own = [f"{file}:{row}" for file, row in own if not file.startswith("tests/")] or ["?"]
    return next((one for one in reversed(own) if one.startswith(("baby_xp/", "h4/"))), own[-1])


def _innermost(where: str) -> str:
    """The innermost lines of the main thread in the output of faulthandler."""
    frames = re.findall(r'File "([^"]*)", line (\d+) in (.+)', where)
    return " < ".join(f"{'/'.join(file.split('/')[-2:])}:{row} {name}" for file, row, name in frames[:9])


def _own(where: str) -> str:
    """The innermost function of this project among these, without its line number."""
    return next((re.sub(r":\d+", "", row) for row in where.split(" < ") if row.startswith("baby_xp/")), "?")


def _shape(message: str) -> str:
    """The first words of a message that are the same each time."""
    words = re.sub(r"'[^']*'?|\S*[^\x20-\x7e]\S*|\S{30,}", "*", message.removeprefix("baby_xp: ")).split()
    return " ".join(words[:2] if words[0] != "*" else words[:4])


def try_line(watch: Watch, line: Line) -> list[tuple[str, str]]:
    return faults(line, watch.ask(line.arguments, line.long, line.stop))


def smallest(watch: Watch, line: Line, kind: str) -> Line:
    """The command line without the hostile parts that are not needed for the fault."""
    for part in line.hostile:
        fewer = dataclasses.replace(line, hostile=tuple(other for other in line.hostile if other is not part))
        if fewer.hostile and kind in dict(try_line(watch, fewer)):
            line = fewer
    return line


# the tests ----------------------------------------------------------------------------------------------


def test_the_overview_has_every_tried_command():
    """The tests below try the commands that the usage lists; one command has a second name."""
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


@pytest.mark.first_case
@pytest.mark.parametrize("command", DIFFERENT)
def test_the_default_sizes_are_valid(watch, command):
    """Otherwise all that is tested would be messages about the sizes."""
    different = {form.flags: form for form in watch.forms if form.command == command}
    for form in different.values():
        line = Line((form.command, *form.needs), base_of(form, set()), ())
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
    "process left": ("subprocess.Popen(['sleep', '60'])\nreturn 0", "processes continue"),
    "process left alone": (
        "subprocess.Popen(['sleep', '9'], start_new_session=True)\nreturn 0",
        "processes continue",
    ),
    "file in memory": ("os.posix_fallocate(os.memfd_create('x'), 0, 2 ** 30)\nreturn 0", "exception OSError"),
    "memory": ("b = bytearray(2 ** 30)\nreturn 0", "exception MemoryError"),
}


@pytest.mark.first_case
@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_faulty_programs_are_detected(watch, name):
    """`faults` detects each kind of fault."""
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
def test_long_commands_can_be_stopped(watch, name):
    line = ["generate", "@char", "--num-tokens", str(2**31 - 1), "--backend", "numpy"]
    ended = watch.ask(line, "begun", name, after=0.5)
    assert ended["stopped"]
    assert not faults(Line(tuple(line), (), ()), ended)


@pytest.mark.hour
@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@pytest.mark.skipif("BABY_XP_HOUR_MINUTES" not in os.environ, reason="BABY_XP_HOUR_MINUTES is not set")
def test_hostile_values_for_an_hour(watch, capsys):
    """Always new command lines; each kind of fault is reported once, with the smallest line that shows it."""
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
