"""The program from Python: NumPy numbers and path objects are accepted, bad arguments are named in one sentence,
and runs can be copied and pickled.
"""

import copy
import errno
import importlib
import json
import math
import os
import pickle
import pkgutil
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import small_runs

import baby_xp
from baby_xp import checks, models
from baby_xp.arrays import registry
from baby_xp.arrays.backend import Backend
from baby_xp.cli import streams
from baby_xp.config import GPTConfig
from baby_xp.equations import leave_one_out
from baby_xp.errors import BabyError, BackendUnavailable, OutOfMemory
from baby_xp.estimation import estimate, trial
from baby_xp.presets import preset
from baby_xp.resources import limits, process_memory

TINY = {**small_runs.TINY, "n_emb": 16, "head_size": 16, "n_ctx": 16, "num_steps": 4, "sample_tokens": 0}
del TINY["data"]
EQUATIONS = {"num_steps": 5, "eval_every": 5, "n_hidden": 4, "workers": 1, "backend": "numpy"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    (folder / "text.txt").write_text(small_runs.TEXT, encoding="utf-8", newline="\n")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return baby_xp.train("classic", data=folder / "text.txt", path=folder / "runs", **TINY)


# accepted arguments -------------------------------------------------------------------------------------


def test_train_accepts_numpy_numbers_and_path_objects(run, folder):
    numbers = {
        "num_steps": np.int64(4), "batch_size": np.uint8(4), "n_emb": np.int32(16), "seed": np.uint64(0),
        "lr": np.float64(run.config["train"]["lr"]), "dropout": np.float32(0), "clip": np.int16(1),
        "workers": np.int64(1),
    }  # fmt: skip
    again = baby_xp.train(
        "classic", data=folder / "text.txt", path=folder / "again", tf32=np.False_, **{**TINY, **numbers},
    )  # fmt: skip
    np.testing.assert_array_equal(again.params, run.params)
    same = ("model", "train", "data", "place")
    assert [again.config[part] for part in same] == [run.config[part] for part in same]
    assert json.loads(again.files.config.read_text("utf-8"))["train"] == again.config["train"]
    where = {"path": folder / "again", "data": folder / "text.txt", "backend": "numpy"}
    more = baby_xp.resume(**where, num_steps=np.int16(6), lr=np.float32(1e-3))
    assert more.config["result"]["steps"] == 6
    tuned = baby_xp.finetune(**where, num_steps=np.int8(2))
    assert tuned.config["data"]["data"] == str(folder / "text.txt")


def test_generate_accepts_numpy_numbers(run):
    settings = {"temperature": np.float32(0.5), "top_k": np.int64(3), "top_p": np.float64(0.9), "seed": np.int8(3)}
    plain = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 3}
    assert run.generate("the", np.int64(9), np.True_, **settings) == run.generate("the", 9, **plain)
    assert run.generate("the", 5, greedy=np.True_) == run.generate("the", 5, greedy=True)
    texts = run.generate_several(np.int64(2), "the", np.int32(5), seed=np.uint64(2**64 - 1))
    assert texts == run.generate_several(2, "the", 5, seed=2**64 - 1)
    assert run.generate("the", 5, seed=-1) == run.generate("the", 5, seed=2**64 - 1)


def test_evaluate_and_check_accept_numpy_numbers(run, folder):
    assert run.evaluate(Path(folder / "text.txt"), np.int64(20), np.int8(1)) == run.evaluate(None, 20, 1)
    numbers = {"tokens": 4, "batch": 1, "seed": 1, "elements": 0, "directions": 1}
    checked = run.check(**{name: np.int64(number) for name, number in numbers.items()}, data=folder / "text.txt")
    assert checked == run.check(**numbers)
    assert run.neighbours("t", np.int64(2)) == run.neighbours("t", 2)
    assert run.inspect("the", np.True_).gradients
    found = baby_xp.estimate(
        "classic", data=folder / "text.txt", measure=np.False_, memory_gib=None, **{**TINY, "workers": np.int64(1)}
    )
    assert found.facts.workers == 1


def test_a_trial_accepts_numpy_numbers(folder, monkeypatch):
    monkeypatch.setattr(trial, "SECONDS", 0.0)
    numbers = {**TINY, "workers": np.int64(1), "lr": np.float32(0.5), "data": folder / "text.txt"}
    found = baby_xp.estimate("classic", **numbers)
    assert (found.facts.workers, found.trial.ms_a_step > 0) == (1, True)


def test_the_lab_accepts_numpy_numbers():
    chosen = preset("equations").override({"num_steps": np.int64(3), "held_out": "4+4"})
    results = leave_one_out.experiment(chosen, seeds=np.int64(2), workers=np.int8(1))
    assert results.models == 2


# refused arguments --------------------------------------------------------------------------------------

LINE = {
    "preset": (5, None, b"classic", ["classic"]),
    "path": (5, None, b"runs", "ru\0ns", ["runs"]),
    "backend": (5, None, b"numpy", "nump"),
    "device": (5, b"cpu", "cpu:7"),
    "workers": ("2", 2.5, 0, True, np.float64(1), np.array([1, 2]), 10**9),
    "tf32": ("no", 2, np.array([True, False])),
    "memory_gib": ("4", 0, -1, math.nan, True, 10**400),
    "listener": (5, print, object()),
    "data": (5, b"text.txt", "te\0xt", ["text.txt"], None),
    "num_steps": ("20", 2.5, np.float32(20), np.array([20, 30]), 10**5000, Decimal(20)),
    "lr": ("1e-3", 1j, np.complex64(1), np.float32(math.inf), np.array([1.0, 2.0]), b"1"),
    "dtype": ("float16", np.float32, 32, None),
    "schedule": (np.array(["cosine"]), 5),
    "n_layers": (2**31 - 1, 10_001),
    "n_layer": (1,),
}


def each(table: dict) -> list:
    pairs = [(name, i, one) for name, values in table.items() for i, one in enumerate(values)]
    return [pytest.param(name, one, id=f"{name}-{i}") for name, i, one in pairs]


def refused(call, *words: str) -> None:
    """The call raises a BabyError of one line that is not too long, with these words."""
    with pytest.raises(BabyError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    for word in words:
        assert word in message


@pytest.mark.parametrize(("name", "value"), each(LINE))
def test_train_names_a_bad_argument(folder, tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    asked = {"preset": "classic", "data": folder / "text.txt", "path": tmp_path / "runs", **TINY, name: value}
    refused(lambda: baby_xp.train(**asked), name)
    assert not list(tmp_path.iterdir())
    if name not in ("path", "listener"):
        del asked["path"]
        refused(lambda: baby_xp.estimate(measure=False, **asked), name)


GENERATE = {
    "prompt": (b"x", 5),
    "num_tokens": (2.5, "5", 0),
    "use_cache": ("no",),
    "temperature": ("1", math.nan, np.float32(0)),
    "top_k": (2.0, -1),
    "top_p": ("all", 1.5),
    "greedy": ("no",),
    "seed": (0.5, None),
    "temprature": (0.5,),
    "topk": (5,),
}


@pytest.mark.parametrize(("name", "value"), each(GENERATE))
def test_generate_names_a_bad_argument(run, name, value):
    arguments = {"num_tokens": 3, name: value}
    refused(lambda: run.generate(**arguments), name)
    refused(lambda: run.stream(**arguments), name)  # at the call, not at the first piece
    if name != "use_cache":
        refused(lambda: run.generate_several(2, **arguments), name)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda run: run.generate_several("2"), "number"),
        (lambda run: run.generate_several(0), "number"),
        (lambda run: run.evaluate(5), "data"),
        (lambda run: run.evaluate("te\0xt"), "data"),
        (lambda run: run.evaluate(num_tokens="5"), "num_tokens"),
        (lambda run: run.evaluate(seed="5"), "seed"),
        (lambda run: run.check(tokens="5"), "tokens"),
        (lambda run: run.check(batch=1.5), "batch"),
        (lambda run: run.check(seed=-1), "seed"),
        (lambda run: run.check(data=b"text"), "data"),
        (lambda run: run.inspect(b"x"), "prompt"),
        (lambda run: run.inspect("the", "no"), "backward"),
        (lambda run: run.inspect("the", patch=["lm_head"]), "patch"),
        (lambda run: run.inspect("the", patch={"lm_head": 5}), "lm_head"),
        (lambda run: run.neighbours(5), "token"),
        (lambda run: run.neighbours("t", "2"), "k must"),
        (lambda run: run.answer("4+4="), "did not learn equations"),
        (lambda run: baby_xp.load(5, path=run.files.folder), "5"),
        (lambda run: baby_xp.load(path=run.files.folder, weights=["best"]), "weights"),
        (lambda run: baby_xp.load(path=run.files.folder, backend="numpy", device=5), "device"),
        (lambda run: baby_xp.load(path="ru\0ns"), "path"),
        (lambda run: baby_xp.list_runs("ru\0ns"), "path"),
        (lambda run: baby_xp.list_runs(5), "path"),
        (lambda run: baby_xp.finetune(path=run.files.folder, data=5, backend="numpy"), "data"),
        (lambda run: baby_xp.finetune(path=run.files.folder, data="te\0xt", backend="numpy"), "data"),
        (lambda run: baby_xp.resume(path=run.files.folder, num_steps="9"), "num_steps"),
        (lambda run: baby_xp.resume(path=run.files.folder, num_steps=9, data="te\0xt"), "data"),
        (lambda run: baby_xp.resume(path=run.files.folder, num_steps=9, workers="2"), "workers"),
        (lambda run: baby_xp.resume(path=run.files.folder, num_steps=9, listener=5), "listener"),
        (lambda run: baby_xp.import_littlebaby(5), "model"),
        (lambda run: baby_xp.import_littlebaby("mo\0del"), "model"),
        (lambda run: baby_xp.import_littlebaby("model.json", config=5), "config"),
        (lambda run: baby_xp.export_littlebaby(run, 5), "folder"),
        (lambda run: leave_one_out.experiment("equations"), "the equation lab cannot use"),
        (lambda run: leave_one_out.experiment(preset("equations"), "2"), "seeds"),
        (lambda run: leave_one_out.experiment(preset("equations"), 10**12), "seeds"),
        (lambda run: leave_one_out.experiment(preset("equations"), 1, 2.5), "workers"),
        (lambda run: leave_one_out.experiment(preset("equations"), 1, 1, progress=5), "progress"),
        (lambda run: registry.load("numpy", dtype="float16"), "dtype"),
        (lambda run: registry.load(5), "backend"),
    ],
)
def test_other_functions_name_a_bad_argument(run, call, word):
    refused(lambda: call(run), word)


def test_a_value_in_a_message_is_short_and_on_one_line():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert checks.shown_value("a\nb") == "'a\\nb'"
    assert checks.shown_value(np.zeros((3, 3))).count("\n") == 0
    assert len(checks.shown_value("x" * 1000)) < 70
    assert checks.shown_value(10**5000) == "a value of type int"
    assert checks.shown_value(Broken()) == "a value of type Broken"


# answers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sums(folder):
    return baby_xp.train("equations", path=folder / "sums", **{**EQUATIONS, "num_steps": 400, "n_hidden": 64})


def test_a_question_may_have_spaces_and_no_equals_sign(sums):
    expected = sums.answer("3+2=")
    assert expected == "3+2=5"
    for question in ("3+2", "3 + 2 =", " 3+2 ", "3 +2=\n", np.str_("3+2=")):
        assert sums.answer(question) == expected


@pytest.mark.parametrize(
    "question",
    ["", "=", "a", "4", "4+", "+4=", "4+4=8", "4+4==", "4++4=", "04+4=", "12+3=", "4-4=", "4*4=", "٤+4=", "9+9=",
     44, None, b"4+4="],
)  # fmt: skip
def test_a_text_that_is_not_a_question_is_refused_with_an_example(sums, question):
    refused(lambda: sums.answer(question), "question" if not isinstance(question, str) else "4+4=")


def test_the_table_of_a_run_determines_the_questions(folder):
    both = baby_xp.train("equations-2", path=folder / "both", **EQUATIONS)
    assert both.answer("12 - 34").startswith("12-34=")
    assert both.answer("99+99").startswith("99+99=")
    refused(lambda: both.answer("100+1="), "2 digits", "4+4=")
    minus = {"operators": "-", "held_out": "4-4"}
    differences = baby_xp.train("equations-2", path=folder / "minus", **EQUATIONS, **minus)
    refused(lambda: differences.answer("4+4="), "8-4=")


# copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["numpy", "array-api-strict"])
def test_a_copy_of_a_run_generates_the_same_text(run, folder, name):
    try:
        loaded = baby_xp.load(run.guid, path=folder / "runs", backend=name)
    except BackendUnavailable as error:
        pytest.skip(error.reason)
    expected = loaded.generate("the", 6)
    for other in (copy.copy(loaded), copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert other.generate("the", 6) == expected
        assert (other.guid, other.backend.name, other.backend.dtype) == (run.guid, name, "float32")


def test_a_backend_is_restored_with_its_device_and_options():
    made = []

    class Kind(Backend):
        def __init__(self, device=None, dtype="float32", tf32=False):
            made.append((device, dtype, tf32))

    first = Kind(device="cuda:1", dtype="float64", tf32=True)
    make, arguments = first.__reduce__()
    assert isinstance(make(*arguments), Kind)
    assert made == [("cuda:1", "float64", True)] * 2
    assert copy.deepcopy([first])[0] is first
    strict = pickle.loads(pickle.dumps(registry.load("numpy", "cpu", "float64")))
    assert (strict.device, strict.dtype, strict.xp.tokens_at_once) == ("cpu", "float64", 1024)


def every_error() -> list[type]:
    """Of all modules, whichever other tests have imported."""
    for module in pkgutil.walk_packages(baby_xp.__path__, "baby_xp."):
        if module.name != "baby_xp.__main__":
            importlib.import_module(module.name)
    kinds, found = [BabyError], []
    while kinds:
        found.append(kinds.pop())
        kinds += found[-1].__subclasses__()
    return [kind for kind in found if kind.__module__.startswith("baby_xp")]


def test_every_error_survives_pickling():
    errors = [BackendUnavailable("cupy", "none", "buy one"), OutOfMemory("full", "less", "step 3")]
    errors.append(streams.OutputLost(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))))
    of_kind = {type(error): error for error in errors}
    for kind in every_error():
        error = of_kind[kind] if kind in of_kind else kind("no")
        for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(other) is kind
            assert str(other) == str(error)
            assert repr(vars(other)) == repr(vars(error))


# runs that do not fit the machine -----------------------------------------------------------------------


@pytest.fixture
def small_machine(monkeypatch):
    """A machine with 64 MiB."""
    monkeypatch.setattr(process_memory, "free", lambda: 64 * 2**20)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_emb": 1024, "head_size": 1024}, ("--n-emb", "at least 24")),
        ({"batch_size": 10**6}, ("--batch-size", "64.0 MiB")),
        ({"batch_size": 2**31 - 1}, ("--batch-size", "64.0 MiB")),
        ({"accumulate": 10**6}, ("--accumulate", "64.0 MiB")),
        ({"n_ctx": 2**31 - 1}, ("too short",)),  # no text is that long
        ({"n_layers": 10_000, "n_emb": 2048, "head_size": 2048}, ("--n-layers",)),
        ({"n_emb": 2**31 - 1}, ("parameters are too many for any machine",)),
        ({"head_size": 2**31 - 1, "n_heads": 1}, ("--head-size",)),
        ({"head_size": 2**31 - 1, "n_heads": 2**31 - 1}, ("--head-size",)),
        ({"workers": 8, "batch_size": 8}, ("--workers",)),
        ({"workers": 100_000, "batch_size": 100_000}, ("workers",)),
    ],
)
def test_a_run_that_cannot_fit_is_refused_at_once(small_machine, folder, tmp_path, monkeypatch, settings, words):
    monkeypatch.setattr(models.gpt, "spec", only_small(models.gpt.spec))
    monkeypatch.chdir(folder)  # the message contains the path of the text, which should be short
    asked = {"data": "text.txt", **TINY, **settings}
    refused(lambda: baby_xp.train("classic", path=tmp_path / "runs", **asked), *words)
    assert not list(tmp_path.rglob("*_*"))  # no file of a run was created


def only_small(spec):
    """The spec of a model, only for few blocks, because a tree of many blocks takes long."""

    def small(config, V):
        assert config.n_layers < 100
        return spec(config, V)

    return small


@pytest.mark.parametrize(
    "settings",
    [
        {"n_layers": 10_000, "n_emb": 512, "head_size": 512},
        {"batch_size": 2**31 - 1},
        {"accumulate": 2**29 - 1},
        {"head_size": 2**31 - 1, "n_heads": 2**31 - 1},
        {"batch_size": 2**31 - 1, "num_epochs": 2**31 - 1, "num_steps": None},
    ],
)
def test_an_estimate_counts_a_run_that_does_not_fit(small_machine, folder, monkeypatch, settings):
    monkeypatch.setattr(models.gpt, "spec", only_small(models.gpt.spec))
    asked = {"data": folder / "text.txt", **TINY, **settings}
    lines = estimate.lines(baby_xp.estimate("classic", measure=False, **asked))
    assert any("parameters" in line for line in lines)


@pytest.mark.parametrize("name", ["equations", "equations-gpt"])
def test_equations_with_a_huge_context_are_refused(tmp_path, name):
    asked = {"n_ctx": 2**31 - 1, "num_steps": 1, "backend": "numpy"}
    refused(lambda: baby_xp.train(name, path=tmp_path / "runs", **asked), "n_ctx", "hold every equation")
    refused(lambda: baby_xp.estimate(name, measure=False, **asked), "n_ctx")
    refused(lambda: leave_one_out.experiment(preset(name).override({"n_ctx": 2**31 - 1})), "n_ctx")
    assert not list(tmp_path.iterdir())


def test_memory_limits_apply_to_finetuning_but_not_to_resuming(run, folder, monkeypatch):
    monkeypatch.setattr(process_memory, "free", lambda: 2**10)
    where = {"path": folder / "runs", "data": folder / "text.txt", "backend": "numpy"}
    refused(lambda: baby_xp.finetune(run.guid, **where), "KiB")
    assert baby_xp.resume(run.guid, path=folder / "runs", num_steps=5).config["result"]["steps"] == 5


def test_a_batch_larger_than_the_data_counts_only_the_data(folder, tmp_path, monkeypatch):
    """In one process: an epoch, or a table of equations, is the largest possible batch."""
    monkeypatch.setattr(process_memory, "free", lambda: 2**30)
    more = {"batch_size": 2**31 - 1, "path": tmp_path}
    asked = {**TINY, "num_epochs": 1, "num_steps": None, "data": folder / "text.txt", **more}
    assert baby_xp.train("classic", **asked).config["result"]["steps"] == 1
    assert baby_xp.train("equations", **{**EQUATIONS, "num_steps": 2, **more}).config["result"]["steps"] == 2
    monkeypatch.setattr(process_memory, "free", lambda: 2**28)
    more["batch_size"] = 10**7  # the buffers shared by two processes have room for all of it
    refused(lambda: baby_xp.train("equations", **{**EQUATIONS, **more, "workers": 2}), "--batch-size")


def test_other_backends_and_systems_without_sizes_have_no_limit(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(process_memory, "free", lambda: None)
    assert baby_xp.train("classic", data=folder / "text.txt", path=tmp_path, **TINY)
    model, strict = models.Model(GPTConfig(), 50), registry.load("numpy")
    monkeypatch.setattr(process_memory, "free", lambda: 1)
    monkeypatch.setattr(strict, "name", "another")
    limits.check_training(preset("classic"), model, strict, None, 1)
    limits.check_texts(model, strict, 10**9)


def test_the_memory_of_the_machine_is_in_bytes(monkeypatch, tmp_path):
    known = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(process_memory.os, "sysconf", known.get, raising=False)
    monkeypatch.setattr(process_memory, "PROC", tmp_path)
    assert process_memory.free() == 4096 * 1000
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 300 kB\nSwapFree: 7 kB\n")
    assert process_memory.free() == 307 * 1024
    (tmp_path / "meminfo").unlink()
    monkeypatch.delattr(process_memory.os, "sysconf")
    assert process_memory.free() is None


def test_too_many_texts_are_refused_with_the_number_that_fits(run, small_machine):
    with pytest.raises(BabyError, match=r"1,000,000,000 texts at once need .* ask for at most ([\d,]+)") as caught:
        run.generate_several(10**9, num_tokens=1)
    most = int(str(caught.value).split("ask for at most ")[1].split()[0].replace(",", ""))
    limits.check_texts(run.model, run.backend, most)
    with pytest.raises(BabyError):
        limits.check_texts(run.model, run.backend, most + 1)
