"""Command lines with hostile values for test_hostile.py, from the commands and flags that the program has."""

import os
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import assume
from hypothesis import strategies as st

from baby_xp.cli import COMMANDS, main, options
from baby_xp.presets import PRESETS

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
"""The arguments that a command needs before its flags; by default, a run."""
BASE = {
    "n-layers": "1", "n-emb": "16", "head-size": "16", "n-heads": "2", "n-ctx": "16", "n-hidden": "8",
    "batch-size": "4", "num-steps": "8", "eval-every": "4", "sample-tokens": "5", "max-minutes": "0.01",
    "warmup-steps": "2", "workers": "1", "backend": "numpy", "data": "text.txt", "held-out": "4+4", "seeds": "1",
    "num-tokens": "20", "tokens": "8", "directions": "1", "elements": "1", "prompt": "the cat",
}  # fmt: skip
"""Small sizes, for every flag that is not tried."""
TRAINING = {"train", "finetune", "resume", "generate", "inference"}
"""Commands that may take arbitrarily long, and print a line when they begin."""

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
"""Files that only root can write, or read: a line with one of them is not run as root."""
STRINGS += FORBIDDEN
FEW = {bool: ["", "True", "False", "1", "no", "\0"], type(None): ["None", "none"]}
MILD = {
    int: ["1", "2", "4", "5", "7", "12"],
    float: ["0.1", "0.5", "1e-3", "1e-9", "3"],
    str: ["text.txt", "x", "1.0", "0.0"],
}
"""Values that are probably valid, so that the command gets far enough to show other faults."""
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
    """Values of a type that are probably valid."""
    if kind in MILD:
        return [[value] for value in MILD[kind]]
    parts = [part for part in typing.get_args(kind) if part in MILD]
    if parts:
        return mild_values_of(parts[0])
    return [[str(name)] for name in typing.get_args(kind) if isinstance(name, str)] or [["True"], ["False"]]


# commands and flags of the program ----------------------------------------------------------------------


class Caught(BaseException):
    """Raised in place of parsing, with what would be parsed."""


def flags_of(arguments: list[str]) -> dict[str, Any]:
    """The flags of a command line, with their types, from the dataclasses that it is parsed into."""

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
    """A command with the arguments that it needs before its flags, and the flags."""

    command: str
    needs: tuple[str, ...]
    flags: tuple[tuple[str, Any], ...] = field(repr=False)


# command lines ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A command line in parts; the hostile parts are separate, so that each can be left out."""

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
    """A command line with one to three wrong or unusual parts."""
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
            hostile.append(draw(st.sampled_from(written(flag, value, flags[flag] is bool))))
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
    # as the user nobody, processes may not be able to read the files that they run
    assume("--workers" not in tried or not set(FORBIDDEN) & {argument for part in hostile for argument in part})
    return Line(
        start,
        base_of(form, tried),
        tuple(draw(st.permutations(hostile))),
        draw(st.sampled_from(["SIGINT", "SIGTERM"])),
    )


def base_of(form: Form, tried: set[str]) -> tuple[tuple[str, ...], ...]:
    """Small sizes for the flags that are not tried. Equations are generated and have their own contexts; a run
    has its own text and steps."""
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


def written(flag: str, value: list[str], switch: bool) -> list[tuple[str, ...]]:
    """The ways to write a flag with a value."""
    ways = [(flag, *value), (flag.replace("-", "_").replace("__", "--", 1), *value)]
    if value:
        ways += [(f"{flag}={value[0]}", *value[1:])] * 2
    return [*ways, (flag,), (negative(flag),), (negative(negative(flag)),)] if switch else ways
