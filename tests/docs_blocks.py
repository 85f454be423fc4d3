"""Finds what a page tells its reader to run, and runs it as the reader would: in order, in one folder.

    python docs_blocks.py PAGE RESULTS      run a page; RESULTS becomes JSON, one outcome a block

It runs blocks of Python, as one script; blocks of commands; commands in code inside a sentence. SKIPPED has the
rules for what is not run; SHORTER and SHORTER_PYTHON have what is shortened, and why.

A block of text that the page marks with `<!-- output -->` is what the block before it prints, and is compared with
it. A block of Python marked with `<!-- code: baby_xp/layers/gelu.py -->` is a quotation from that file; it is not
run, but it must occur there word for word.
"""

import contextlib
import functools
import importlib.util
import io
import json
import linecache
import os
import re
import runpy
import shlex
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]

RUN, COMMANDS, SESSION, NOT_RUN = {"python"}, {"sh"}, {"console"}, {"text", "json"}
LANGUAGES = RUN | COMMANDS | SESSION | NOT_RUN
SECONDS_PER_COMMAND = 600

PLACEHOLDERS = {"RUN": "last", "PRESET": "baby", "FOLDER": "a-folder"}
"""Placeholders in a page for things of the reader."""

MADE = ("my.txt", "other.txt")
"""Files of the reader: a text is created for each one that a page names."""

SHORTER = (
    # beginning of the command, flags that it gets, why
    ("baby_xp train equations", {}, "takes a second unchanged"),
    ("baby_xp train --backend numpy", {"--num-steps": "60", "--eval-every": "30"}, "the main job takes a minute"),
    (
        "baby_xp train",
        {"--num-steps": "20", "--eval-every": "10", "--sample-tokens": "20"},
        "takes minutes to hours",
    ),
    ("baby_xp equations", {"--seeds": "1", "--num-steps": "10"}, "150 models take 20 seconds and more"),
    ("baby_xp finetune", {"--num-steps": "10", "--eval-every": "5"}, "500 steps take half a minute"),
    ("baby_xp resume", {"--num-steps": "30"}, "the run was not stopped, so it continues with more steps"),
    ("baby_xp check", {"--directions": "1", "--elements": "1"}, "every array takes a dozen losses"),
    ("baby_xp estimate", {"--no-measure": None}, "the trial that measures takes half a minute"),
)
SHORTER_PYTHON = (
    # text of a block, what takes its place, why
    ('"baby", num_steps=500', '"baby", num_steps=60', "500 steps take 10 seconds and more"),
    ('"my.txt", num_steps=200', '"my.txt", num_steps=20', "200 steps take 5 seconds"),
    ('"last", num_steps=400', '"last", num_steps=40', "200 more steps take 5 seconds"),
)
HELP = (
    ("bench.", "a measurement takes minutes: --help is run, and every flag that the page names must be in it"),
)


# finding ------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """One block of a page: `line` is the number of its first line of code, from 1."""

    line: int
    kind: str  # a language, "indented" or "inline"
    text: str
    mark: str = ""  # from a comment in the line before: "output", "code: path"
    commands: list["Command"] = field(default_factory=list)
    place: str = ""  # its line, with a letter where it is not the first of its line


@dataclass
class Command:
    """A shell command, with the output that the page shows: None if it shows none."""

    line: int
    text: str
    output: str | None = None


def blocks_of(text: str) -> list[Block]:
    """All blocks of a page, in order, commands inside sentences included."""
    found, mark, before = [], "", Counter()
    for token in MarkdownIt().parse(text):
        first = token.map[0] + 1 if token.map else 0
        if token.type == "fence":
            found.append(Block(first + 1, token.info.partition(" ")[0], token.content, mark))
        elif token.type == "code_block":
            found.append(Block(first, "indented", token.content.rstrip() + "\n", mark))
        elif token.type == "inline":
            for span in re.finditer(r"(?<!`)`((?:python|pip) [^`]+)`(?!`)", token.content):
                line = first + token.content[: span.start()].count("\n")
                found.append(Block(line, "inline", " ".join(span[1].split())))
        comment = re.fullmatch(r"<!-- *(.*?) *-->", token.content.strip()) if token.type == "html_block" else None
        mark = comment[1] if comment else ""
    for block in found:
        block.commands = _commands(block)
        block.place = f"{block.line}{'bcdefgh'[before[block.line] - 1] if before[block.line] else ''}"
        before[block.line] += 1
    return found


def _commands(block: Block) -> list[Command]:
    if block.mark.startswith(("output", "code:")) or block.kind in RUN | NOT_RUN:
        return []
    if block.kind == "inline":
        return [Command(block.line, block.text)]
    lines = list(enumerate(block.text.splitlines(), block.line))
    if block.kind in SESSION or (block.kind == "indented" and any(one.startswith("$ ") for _, one in lines)):
        return _session(lines, compared=block.kind in SESSION)
    if block.kind == "indented":  # the purpose of a command may be beside it
        return [Command(at, re.split(r" {2,}", one)[0]) for at, one in lines if re.match(r"(python|pip) ", one)]
    if block.kind in COMMANDS:
        return _script(lines)
    return []


def _session(lines: list[tuple[int, str]], compared: bool) -> list[Command]:
    commands, output = [], []
    for at, line in lines:
        if line.startswith("$ "):
            output = []
            commands.append((at, line[2:], output))
        else:
            output.append(line)
    return [
        Command(at, text, "\n".join(said).strip() or None if compared else None) for at, text, said in commands
    ]


def _script(lines: list[tuple[int, str]]) -> list[Command]:
    commands: list[Command] = []
    for at, line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        if commands and (commands[-1].text.endswith("\\") or line.startswith(" ")):
            commands[-1].text = f"{commands[-1].text.removesuffix(chr(92))} {line.strip()}"
        else:
            commands.append(Command(at, line))
    return commands


# what to do with a command ------------------------------------------------------------------------------


@dataclass
class Plan:
    """How a command is run: `skip` is the reason not to run it, `flags` are those that its help must list."""

    arguments: list[str]
    skip: str = ""
    flags: list[str] = field(default_factory=list)
    changed: bool = False


def plans(text: str) -> list[Plan]:
    """The plans for a shell line: several if it joins commands with &&."""
    return [_plan(part.strip()) for part in text.split("&&")]


def _plan(text: str) -> Plan:
    if reason := skipped(text):
        return Plan([], reason)
    words = shlex.split(re.sub(r"\[[^]]*\]", "", text), comments=True)
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if words[:1] not in (["python"], ["python3"]):
        raise ValueError(f"no rule for the program of {text!r}: give SKIPPED one, or write it another way")
    after = " ".join(words[2:]) if words[1:2] == ["-m"] else ""
    for beginning, _ in HELP:
        if after.startswith(beginning):
            command = [word for word in words[3:4] if not word.startswith("-")]  # as in bench.growth scaling
            return Plan([*words[1:3], *command, "--help"], flags=re.findall(r"--[a-z][a-z-]*", text), changed=True)
    for beginning, flags, _ in SHORTER:
        if words[2 : 2 + len(beginning.split())] == beginning.split() and "--help" not in words:
            return Plan(with_flags(words[1:], flags), changed=bool(flags))
    return Plan(words[1:])


def with_flags(words: list[str], flags: dict[str, str | None]) -> list[str]:
    """The arguments with these flags, which take the place of those of the same name."""
    words = list(words)
    for name, value in flags.items():
        words = [word for word in words if not word.startswith(f"{name}=")]
        if name in words:
            del words[words.index(name) : words.index(name) + (1 if value is None else 2)]
        words += [name] if value is None else [name, value]
    return words


def skipped(text: str) -> str:
    """The reason why a command or a block of Python cannot run here; empty if it can."""
    return next((reason for applies, reason in SKIPPED if applies(text)), "")


def _missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


@functools.cache
def no_gpu() -> bool:
    from baby_xp.arrays import registry
    from baby_xp.errors import BackendUnavailable

    try:
        registry.load("cupy")
    except BackendUnavailable:
        return True
    return False


def _needs_shakespeare(text: str) -> bool:
    from baby_xp.presets import PRESETS

    folder = os.environ.get("BABY_XP_DATA")
    if folder and (Path(folder).expanduser() / "shakespeare.txt").is_file():
        return False
    if re.search(r"shakespeare(?!\.txt)", text):
        return True
    named = re.search(r'(?:train|estimate)(?: |\(")([a-z0-9-]+)', text)
    reads = named and named[1] in PRESETS and PRESETS[named[1]].data.data == "shakespeare"
    return bool(reads) and not re.search(r"--data|\bdata=", text)


SKIPPED = (
    (lambda text: re.match(r"(python -m )?pip install|git clone|curl |wget ", text), "needs a network"),
    (lambda text: re.match(r"python -m pytest", text), "these are the tests"),
    (lambda text: re.match(r"nvidia-smi", text) and no_gpu(), "needs a GPU"),
    (lambda text: re.search(r'--backend[ =]cupy|backend="cupy"|import cupy', text) and no_gpu(), "needs a GPU"),
    (
        lambda text: re.search(r'--backend[ =]torch|"torch"|import torch', text) and _missing("torch"),
        "needs torch",
    ),
    (lambda text: re.search(r'--backend[ =]jax|"jax"|import jax', text) and _missing("jax"), "needs jax"),
    (lambda text: re.search(r"array-api-strict", text) and _missing("array_api_strict"), "needs array-api-strict"),
    (lambda text: re.search(r"matplotlib|--picture|--plot", text) and _missing("matplotlib"), "needs matplotlib"),
    (_needs_shakespeare, "needs shakespeare.txt: BABY_XP_DATA names no folder that holds it"),
)
"""Rules for blocks that cannot run everywhere, each with its reason."""


# comparing ----------------------------------------------------------------------------------------------

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
DUST = 1e-6


def difference(expected: str, found: str) -> str:
    """The difference between the output on a page and the printed one; empty if they agree.

    Line by line; a line `...` stands for any lines. Spaces do not count. Numbers with a fraction agree if they
    differ by no more than one in the last digit that the page shows, or if both are below DUST: errors of
    rounding, which differ from machine to machine.
    """
    wanted, given = _trimmed(expected), _trimmed(found)
    while wanted:
        line = wanted.pop(0)
        if line == "...":
            if not wanted:
                return ""
            given = given[next((i for i, one in enumerate(given) if _alike(wanted[0], one)), len(given)) :]
            continue
        if not given:
            return f"the page says {line!r}, and nothing more is printed"
        if not _alike(line, given[0]):
            return f"the page says {line!r}, what is printed is {given[0]!r}"
        given.pop(0)
    return f"the page ends, but the output continues: {given[0]!r}" if given else ""


def _trimmed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def _alike(expected: str, found: str) -> bool:
    if re.sub(r" ?(-?) ?#", "#", NUMBER.sub("#", expected)) != re.sub(r" ?(-?) ?#", "#", NUMBER.sub("#", found)):
        return False
    pairs = zip(NUMBER.findall(expected), NUMBER.findall(found), strict=True)
    return all(_close(*pair) for pair in pairs)


def _close(expected: str, found: str) -> bool:
    a, b = (float(number.replace(",", "")) for number in (expected, found))
    if not re.search(r"[.e]", expected):
        return a == b
    mantissa, _, exponent = expected.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(a - b) <= 1.001 * unit or max(abs(a), abs(b)) < DUST


# running ------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A block that does not do what its page shows."""


def run_page(page: Path, results: Path) -> None:
    """Run a page's blocks in the current folder and write their outcomes, those after a failure left out."""
    outcomes: dict[str, tuple[str, str]] = {}
    namespace = {"__name__": "__main__"}
    printed, before = None, ("", "")
    for block in blocks_of(page.read_text("utf-8")):
        try:
            if block.mark == "output" and before[0] == "skipped":
                outcomes[block.place] = before
            elif block.mark == "output":
                _compare(block.text, printed)
                outcomes[block.place] = ("passed", "")
            elif block.kind in RUN and not block.mark:
                printed = _run_python(page, block, namespace)
                outcomes[block.place] = ("passed", "")
            elif block.commands:
                ran = [_run_command(command, block.line) for command in block.commands]
                printed = ran[-1][1]
                reasons = sorted({reason for reason, _ in ran if reason})
                all_skipped = all(reason for reason, _ in ran)
                outcomes[block.place] = ("skipped", "; ".join(reasons)) if all_skipped else ("passed", "")
        except Skipped as reason:
            outcomes[block.place] = ("skipped", str(reason))
        except Failed as failure:
            outcomes[block.place] = ("failed", str(failure))
        results.write_text(json.dumps(outcomes), "utf-8")
        before = outcomes.get(block.place, before)
        if before[0] == "failed":
            return


class Skipped(Exception):
    """A block that cannot run here."""


def _compare(expected: str, printed: str | None) -> None:
    if printed is None:
        raise Failed("nothing was run that could print this")
    if problem := difference(expected, printed):
        raise Failed(f"{problem}\nall that is printed:\n{printed}")


def _run_python(page: Path, block: Block, namespace: dict) -> str:
    if reason := skipped(block.text):
        raise Skipped(reason)
    _make_files(block.text)
    source = block.text
    for text, instead, _ in SHORTER_PYTHON:
        source = source.replace(text, instead)
    # the lines before the block are empty, so that an error names the line of the page
    source = "\n" * (block.line - 1) + source
    linecache.cache[str(page)] = (len(source), None, source.splitlines(keepends=True), str(page))
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(source, str(page), "exec"), namespace)
    except BaseException:
        raise Failed(f"{traceback.format_exc()}\nprinted before:\n{out.getvalue()}") from None
    return out.getvalue()


def _run_command(command: Command, line: int) -> tuple[str, str]:
    """Run it -> the reason if it was skipped, and its output."""
    out, reasons, changed = "", [], False
    try:
        todo = plans(command.text)
    except ValueError as error:
        raise Failed(f"line {command.line}: {error}") from None
    for plan in todo:
        reasons.append(plan.skip)
        if not plan.skip:
            out, changed = _run_plan(plan, command), changed or plan.changed
    if command.output is not None and not changed and not all(reasons):
        _compare(command.output, out)
    return "; ".join(filter(None, reasons)) if all(reasons) else "", out


def _run_plan(plan: Plan, command: Command) -> str:
    _make_files(command.text)
    arguments = [_of_reader(word) for word in plan.arguments]
    where = f"line {command.line}: python {shlex.join(arguments)}"
    try:
        done = _ran(arguments)
    except subprocess.TimeoutExpired:
        raise Failed(f"{where}\ntook more than {SECONDS_PER_COMMAND} seconds") from None
    if done.returncode:
        raise Failed(
            f"{where}\nends with exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
    if lacking := [flag for flag in plan.flags if not re.search(rf"{flag}(?![a-z-])", done.stdout)]:
        raise Failed(f"{where}\ndoes not know {', '.join(lacking)}")
    return done.stdout


def _ran(arguments: list[str]) -> subprocess.CompletedProcess:
    """Run Python with these arguments: of the commands of a package, the first of a page in a process of its own.

    The others are run in this one: a process takes half a second and more to start, and all start alike.
    """
    package = arguments[1].partition(".")[0] if arguments[0] == "-m" else ""
    if package in _started:
        return _ran_here(arguments[1:])
    _started.update({package} & {"baby_xp", "bench"})
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, encoding="utf-8", errors="replace",
        timeout=SECONDS_PER_COMMAND, env=environment(), stdin=subprocess.DEVNULL,
    )  # fmt: skip


_started: set[str] = set()
"""Packages of which a command was run."""


def _ran_here(arguments: list[str]) -> subprocess.CompletedProcess:
    """Run it in this process, as `python -m` does."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(mock.patch.object(sys, "argv", arguments))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", RuntimeWarning)  # of a module that is run again
        try:
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            code = 1
            traceback.print_exc()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def environment() -> dict[str, str]:
    """The environment of the commands: plain UTF-8 output; `python -m bench...` works as in a checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONUTF8": "1", "NO_COLOR": "1", "COLUMNS": "115", "PYTHONPATH": path}


def _of_reader(word: str) -> str:
    """A word of a command, with the GUID of a file that was made in place of <guid>."""
    if "<guid>" not in word:
        return word
    return word.replace("<guid>", _exported())


def _exported() -> str:
    """The files of a model of the original Little Baby, in this folder -> their GUID."""
    import baby_xp

    baby_xp.export_littlebaby(_tiny_run("of-the-reader"), ".")
    return baby_xp.load("last", path="of-the-reader", backend="numpy").guid


def _make_files(text: str) -> None:
    """What the reader has and this folder lacks: texts by their names, a run where one is asked for."""
    from baby_xp_data import nursery

    for seed, name in enumerate(MADE, 1):
        if re.search(rf"\b{re.escape(name)}\b", text) and not Path(name).exists():
            Path(name).write_text(nursery.generate(60_000, seed), "utf-8")
    asks = r"\b(RUN|last)\b|baby_xp (resume|generate|inference|evaluate|finetune|export|inspect|check)\b"
    if re.search(asks, text) and not Path("runs").exists():
        _tiny_run("runs")


def _tiny_run(path: str):
    import baby_xp

    sizes = {"n_ctx": 16, "n_emb": 16, "head_size": 16, "n_heads": 2, "n_layers": 1, "batch_size": 4}
    return baby_xp.train("classic", path=path, backend="numpy", workers=1, num_steps=10, eval_every=10, **sizes)


if __name__ == "__main__":
    sys.path[0] = ""  # a page finds its imports where its reader does
    run_page(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
