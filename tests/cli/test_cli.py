"""The command line: bad input ends in one line and leaves no files; lists, help and presets.

test_commands.py and test_endings.py have what the commands do.
"""

import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from quick import quick
from small_runs import TEXT, flags, metrics_of

import baby_xp
from baby_xp.arrays import registry
from baby_xp.cli import COMMANDS
from baby_xp.config import EquationConfig, EquationData
from baby_xp.errors import BabyError, BackendUnavailable
from baby_xp.presets import PRESETS
from baby_xp.text import dataset

# bad input ----------------------------------------------------------------------------------------------

REFUSED = [
    # arguments, what must be named. test_config.py tests every setting, test_settings.py invalid flags
    (["fly"], ["'fly'", *COMMANDS]),
    ([""], ["''"]),
    (["fly" * 300], ["unknown command 'flyfly"]),
    (["presets", "all"], ["'all'"]),
    (["backends", "--numpy", "x"], ["'--numpy x'"]),
    (["train", "toddler"], ["'toddler'", *PRESETS]),
    (["train", "baby", "equations"], ["equations", "baby_xp train baby --help"]),
    (["train", "equations", "--held-out=4*4"], ["digit+digit", "4*4"]),
    (["train", "equations", "--data=text.txt"], ["equations", "--data"]),
    (["train", "equations", "--n-layers=2"], ["--n-layers"]),
    (["train", "baby", "--data=equations"], ["equations have their own presets"]),
    (["train", *flags(data="nosuchname")], ["nosuchname", "nursery, equations, shakespeare"]),
    (["train", *flags(data="latin1.txt")], ["latin1.txt", "0xe9 at offset 3"]),
    (["train", *flags(data="short.txt")], ["short.txt", "--n-ctx 8 needs 9", "at least 11 tokens"]),
    (["train", "--path=new", *flags(data="short.txt")], ["short.txt"]),
    (["train", *flags(num_steps=-3)], ["num_steps", "at least 1", "-3"]),
    (["train", *flags(lr="nan")], ["lr", "above 0", "nan"]),
    (["train", *flags(n_heads=3)], ["n_heads 3", "head_size 8", "multiple"]),
    (["train", *flags(n_emb=10**30)], ["n_emb", "at most"]),
    (["train", *flags(n_emb=2**31 - 1)], ["parameters are too many for any machine"]),
    (["train", *flags(workers=0)], ["workers", "at least 1", "not 0"]),
    (["train", *flags(device="mars")], ["numpy", "'mars'", "--device cpu"]),
    (["train", *flags(backend="tensorflow")], ["'tensorflow'", "auto, numpy, cupy"]),
    (["train", *flags(n_hidden=3)], ["--n-hidden"]),
    (["train", "--path=text.txt/runs", *flags()], ["text.txt/runs", "--path"]),
    (["train", f"--path={'a' * 300}", *flags()], ["aaaa", "a shorter name"]),
    # test_sampling.py and test_python_api.py have every setting
    (["generate", "--temperature=0"], ["temperature", "above 0", "--greedy"]),
    (["generate", "--num-tokens=0"], ["num_tokens", "at least 1", "not 0"]),
    (["generate", "--top-k=1.5"], ["--top-k", "1.5", "baby_xp generate --help"]),
    (["generate", "--prompt=the cat\nsat\u20ac"], ["prompt", "U+20AC", "line 2", "column 4"]),
    (["generate", "--prompt=\udcff"], ["prompt", "U+DCFF"]),
    (["generate", "--device=mars"], ["'mars'"]),
    (["generate", "--weights=first"], ["--weights", "best, last", "'first'"]),
    (["generate", "00000000-0000"], ["no run in", "the last is "]),
    (["generate", "--path=nowhere"], ["no runs in nowhere", "train one", "--path"]),
    (["generate", "--path=text.txt"], ["text.txt/configs", "--path"]),
    (["finetune", "--data=text.txt", "--path=nowhere"], ["no runs in nowhere"]),
    (["finetune"], ["--data"]),
    (["finetune", "--data"], ["--data"]),
    (["finetune", "nothing", "--data=x"], ["nothing"]),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=lambda value: ascii(value[:2])[:60])
def test_bad_input_is_named_and_changes_nothing(work, copied, refused, arguments, words):
    (work / "latin1.txt").write_bytes(b"caf\xe9 " * 99)
    (work / "short.txt").write_bytes(b"12345678")
    refused(*arguments, *["--backend=numpy"] * (arguments[0] == "generate"), words=tuple(words))


@pytest.mark.parametrize("said", ["Unable to allocate\n6 TiB", ""])
def test_too_little_memory_is_one_line(refused, at_step, said):
    def fail(step, batch):
        raise MemoryError(said)

    at_step(fail)
    reason = " ".join(said.split()) or "an array did not fit"
    refused("train", *flags(), words=(f"not enough memory ({reason})", "choose a smaller model or batch"))


def test_a_message_of_several_lines_becomes_one(call, monkeypatch):
    def fail(arguments):
        raise BabyError("one\n  two")

    monkeypatch.setitem(COMMANDS, "presets", fail)
    assert call("presets") == (2, "", "baby_xp: one two\n")


def test_the_program_returns_its_exit_code_and_replaces_unprintable_characters(work):
    done = subprocess.run(
        [sys.executable, "-m", "baby_xp", "train", "--data", "\u20ac.txt".encode()], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"baby_xp: there is no file ?.txt; check the path\n"


# missing libraries --------------------------------------------------------------------------------------

LIBRARIES = {
    "torch": ("torch", "pip install -e '.[torch]'"),
    "jax": ("jax", "pip install -e '.[jax]'"),
    "cupy": ("cupy", "pip install -e '.[cuda13]', or '.[cuda12]'"),
    "array-api-strict": ("array_api_strict", "pip install array-api-strict"),
}
NAMES = ["numpy", "cupy", "array-api-strict", "jax", "torch"]


def works(name: str) -> bool:
    try:
        registry.load(name)
    except BackendUnavailable:
        return False
    return True


def without_libraries(monkeypatch, *modules: str) -> None:
    for name in (*modules, *(f"array_api_compat.{module}" for module in modules)):
        monkeypatch.setitem(sys.modules, name, None)


def states(out: str) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()[:-1]}


def test_a_missing_library_is_named_with_the_remedy(refused, monkeypatch):
    for name, (module, remedy) in LIBRARIES.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(BackendUnavailable) as caught:
            registry.load(name)
        words = (f"'{name}'", "cannot be imported", remedy)
        assert all(word in str(caught.value) for word in words)
    refused("train", *flags(backend=name), words=words)


def test_workers_are_only_for_numpy(refused):
    pytest.importorskip("array_api_strict", exc_type=ImportError)
    words = ("workers are processes of the numpy backend", "leave out --workers")
    refused("train", *flags(backend="array-api-strict", workers=2), words=words)


def test_all_backends_are_listed_with_their_state(call):
    code, out, err = call("backends")
    assert (code, err) == (0, "")
    assert list(states(out)) == NAMES
    numpy = states(out)["numpy"]  # perhaps "with numba"
    assert numpy.startswith(f"works    numpy {np.__version__}")
    assert ", cpu" in numpy
    for state in states(out).values():
        assert state.startswith("works ") or (state.startswith("missing ") and "; remedy: " in state)
    expected = "cupy" if works("cupy") else "numpy"
    assert out.splitlines()[-1].startswith(f"auto selects {expected}: ")


def test_backends_works_with_numpy_as_the_only_library(call, monkeypatch):
    without_libraries(monkeypatch, *(module for module, _ in LIBRARIES.values()))
    code, out, err = call("backends")
    assert (code, err) == (0, "")
    assert {name: state.split()[0] for name, state in states(out).items()} == {
        name: "works" if name == "numpy" else "missing" for name in NAMES
    }
    assert "pip install -e '.[torch]'" in states(out)["torch"]
    assert out.splitlines()[-1].startswith("auto selects numpy: no GPU to use (CuPy cannot be imported")


def test_a_broken_library_does_not_prevent_the_use_of_others(work, call, monkeypatch):
    """A folder called cupy in the current folder can be imported as an empty module."""
    without_libraries(monkeypatch, "torch", "jax", "array_api_strict")
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    code, out, err = call("backends")
    assert (code, err) == (0, "")
    assert states(out)["cupy"].startswith("missing  AttributeError: ")
    assert "auto selects numpy: no GPU to use (AttributeError: " in out
    assert call("train", *flags(backend="auto"))[0] == 0


def test_a_device_that_auto_does_not_have_is_an_error(refused, monkeypatch):
    for module in (None, types.ModuleType("cupy")):
        monkeypatch.setitem(sys.modules, "cupy", module)
        refused("train", *flags(backend="auto", device="cuda:1"), words=("'cupy' cannot work here",))


# lists and help -----------------------------------------------------------------------------------------


def test_all_presets_are_listed(call):
    code, out, err = call("presets")
    assert (code, err) == (0, "")
    head, *rows, last = out.splitlines()
    assert [line.split()[0] for line in rows] == list(PRESETS)
    assert [line.split()[1] for line in rows[:2]] == ["104,704", "160,050"]
    assert (head.split()[1], "estimate" in last) == ("parameters", True)


HELP = [
    *([command] for command in COMMANDS if command != "finetune"), ["generate", "x"], ["resume", "x"],
    *(["train", name] for name in ("3-months", "equations", "equations-gpt")),
]  # fmt: skip


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_every_command_has_help(call, arguments):
    code, out, err = call(*arguments, "--help")
    assert (code, err) == (0, "")
    assert out.strip()
    named = {"train": ["--lr", "--n-ctx"], "generate": ["--prompt", "--no-cache"], "inference": ["--no-cache"]}
    assert all(flag in out for flag in named.get(arguments[0], ()))


def test_the_help_of_finetuning_shows_the_settings_of_the_run(call, trained, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # a narrow terminal breaks its lines
    code, out, err = call("finetune", "last", f"--path={trained.folder}", "--help")
    assert (code, err) == (0, "")
    assert trained.guid in out
    for flag in ("--data", "--lr", "--dropout", "--path", "--workers"):
        assert f"{flag} " in out
    assert "--n-ctx" not in out
    assert re.search(r"--batch-size\s+INT\s[^()]*\(default: 4\)", out)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_the_overview_names_every_command(call, arguments):
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    assert all(command in out for command in COMMANDS)


def test_the_version(call):
    assert call("--version") == (0, f"baby_xp {baby_xp.__version__}\n", "")


# presets ------------------------------------------------------------------------------------------------

AGES = [name for name in PRESETS if name.endswith("-months")]
DIFFERENT = [name for name in PRESETS if name not in AGES[1:]]
"""One age represents all: they differ only in the context, which is shortened here."""


def test_the_ages_differ_only_in_their_context():
    assert [PRESETS[name].model.n_ctx for name in AGES] == [8, 16, 32, 64, 128]
    assert len({(replace(PRESETS[name].model, n_ctx=1), PRESETS[name].train) for name in AGES}) == 1


def shortened(name: str, work: Path, **more) -> list[str]:
    """The preset's own switches, dropout and schedule, with little to compute."""
    settings = {"backend": "numpy", **more}
    if isinstance(PRESETS[name].data, EquationData):
        if name == "equations-2":
            settings |= {"digits": 1, "n-hidden": 8, "held-out": "4+4"}
        elif not isinstance(PRESETS[name].model, EquationConfig):  # a small table, because some backends are slow
            settings |= {"n-ctx": 6, "n-emb": 8, "head-size": 8, "digits": 1, "operators": "+", "held-out": "4+4"}
            settings |= {"batch-size": 8}
    else:
        settings |= {"n-ctx": 8, "n-emb": 8, "head-size": 48, "n-layers": 2, "batch-size": 4}
        settings |= {} if PRESETS[name].data.data == "nursery" else {"data": work / "text.txt"}
    return ["train", name, *(f"--{key}={value}" for key, value in settings.items())]


@pytest.fixture
def short_nursery(monkeypatch):
    monkeypatch.setattr(dataset, "NURSERY_CHARACTERS", 330)


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_preset_starts(work, call, short_nursery, name):
    code, out, err = call(*shortened(name, work, **{"num-steps": 2}))
    assert (code, err) == (0, "")
    assert "step      2: train " in out


@pytest.mark.parity
@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize(
    "other", ["torch", "array-api-strict", "jax", pytest.param("cupy", marks=pytest.mark.gpu)]
)
def test_a_preset_gives_the_same_losses_on_every_backend(work, call, short_nursery, request, name, other):
    if not works(other):
        pytest.skip(f"{other} does not work here")
    if other == "jax":
        request.getfixturevalue("quick_compilation")
    # 330 tokens, so that validation is one batch of one shape, which jit compiles once
    (work / "text.txt").write_text(TEXT[:330])
    found = []
    for backend in ("numpy", other):
        settings = {"backend": backend, "path": backend, "num-steps": 4, "eval-every": 1, "sample-tokens": 0}
        with quick(sample_tokens=1):  # slow without compilation
            assert call(*shortened(name, work, **settings))[0] == 0
        *records, final = metrics_of(baby_xp.load(path=backend, backend="numpy").files)
        losses = [[record["train_loss"], record["val_loss"]] for record in records]
        found.append(np.array([*losses, [final["val_loss"]] * 2]))
    assert found[0].shape == (5, 2)
    assert not np.isnan(found[0]).any()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


def test_the_equation_model_answers_a_held_out_sum(work, call):
    code, out, err = call("train", "equations", "--backend=numpy", "--num-steps=600")
    assert (code, err) == (0, "")
    assert "4+4=8" in out
    (completion,) = (work / "runs" / "outputs").glob("completion_*.txt")
    assert completion.read_text() == "4+4=8\n"
    assert call("generate", "--prompt=4+4=", "--num-tokens=1", "--greedy")[1] == "4+4=8\n"
    # a text longer than the context: the model sees its last four tokens, as in training
    assert call("generate", "--prompt=1+2=", "--num-tokens=2", "--greedy")[1] == "1+2=3 \n"
