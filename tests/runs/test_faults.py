"""What can go wrong with files: full disks, damage, sharing, permissions, mixed-up files. Nothing is lost, and
nothing is silently wrong."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from small_runs import all_of

import baby_xp
import baby_xp.files
from baby_xp import api
from baby_xp.arrays.tree import Layout
from baby_xp.cli import main
from baby_xp.errors import BabyError
from baby_xp.run import Run
from baby_xp.runs import state_file, store
from baby_xp.runs.store import RunFiles

TEXT = "the cat sat on the mat.\nit sat and sat, and so did the hat. " * 30
TINY = {
    "n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 4, "num_steps": 12,
    "eval_every": 5, "checkpoint_every": 2, "sample_tokens": 5, "warmup_steps": 3, "lr": 1e-2, "workers": 1,
    "backend": "numpy",
}  # fmt: skip
PARTS = ("config", "tokenizer", "model", "state")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8", newline="\n")
    return str(path)


class StopAt(baby_xp.Listener):
    def __init__(self, step: int):
        self.step = step

    def evaluated(self, record):
        if record["step"] == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory) -> Run:
    """A run that was stopped half-way, which no test changes."""
    return api.train("classic", path=tmp_path_factory.mktemp("stopped"), data=text, listener=StopAt(5), **TINY)


@pytest.fixture(scope="module")
def done(stopped, tmp_path_factory) -> np.ndarray:
    """The parameters (P,) at its end."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(stopped.files.folder, folder, dirs_exist_ok=True)
    return api.resume(path=folder).params


@pytest.fixture
def copy(stopped, tmp_path) -> RunFiles:
    shutil.copytree(stopped.files.folder, tmp_path / "runs")
    return RunFiles(tmp_path / "runs", stopped.guid)


# damage -------------------------------------------------------------------------------------------------

EDITS = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.tuples(st.just("set"), st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("drop"), st.floats(0, 1, exclude_max=True), st.integers(1, 40)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.just("double"), st.floats(0, 1, exclude_max=True), st.integers(1, 200)),
)
"""What to do, where (as a share of the file), and with what."""


def damaged(data: bytes, edit: tuple) -> bytes:
    what, share, value = edit
    at = int(share * len(data))
    return {
        "flip": lambda: data[:at] + bytes([data[at] ^ (1 << value)]) + data[at + 1 :],
        "set": lambda: data[:at] + bytes([value]) + data[at + 1 :],
        "cut": lambda: data[:at],
        "drop": lambda: data[:at] + data[at + value :],
        "insert": lambda: data[:at] + bytes([value]) + data[at:],
        "double": lambda: data[: at + value] + data[at:],
    }[what]()


def near_the_front(data: bytes) -> int:
    """Length of the part before the arrays, which a random position would seldom hit."""
    return 8 + int.from_bytes(data[:8], "little") if data[:1] != b"{" else len(data)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(edits=st.lists(EDITS, min_size=1, max_size=3), front=st.booleans())
def test_a_damaged_file_is_an_error_or_loads_unchanged(stopped, kept, part, edits, front):
    """Never another exception, and never a different model."""
    weights = "last" if part == "state" else "best"
    path = getattr(stopped.files, part)
    whole = path.read_bytes()
    length = near_the_front(whole) if front else len(whole)
    data = whole[:length]
    for edit in edits:
        data = damaged(data, edit) if data else data
    try:
        path.write_bytes(data + whole[length:])
        found = api.load(stopped.guid, path=stopped.files.folder, backend="numpy", weights=weights)
    except BabyError as error:
        refused = str(error)
    else:
        refused = ""
    finally:
        path.write_bytes(whole)
    if refused:
        assert refused.isprintable()
        return
    np.testing.assert_array_equal(found.params, kept[weights])
    assert (found.tokenizer, found.model, found.config["train"]) == (
        stopped.tokenizer, stopped.model, stopped.config["train"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def kept(stopped) -> dict[str, np.ndarray]:
    """The parameters (P,) that each file of arrays holds."""
    last = api.load(stopped.guid, path=stopped.files.folder, backend="numpy", weights="last")
    return {"best": stopped.params, "last": last.params}


@pytest.mark.parametrize("command", ["generate", "resume", "evaluate", "finetune", "export", "runs"])
def test_every_command_reports_damage_in_one_line(stopped, tmp_path, command, capsys, text):
    arguments = {
        "finetune": ["last", f"--data={text}", "--num-steps=1"], "evaluate": ["last", "--num-tokens=9"],
        "export": ["littlebaby", "last", f"--to={tmp_path / 'out'}"], "runs": [],
    }.get(command, ["last"])  # fmt: skip
    needed = {"config", "tokenizer", "state" if command == "resume" else "model"}
    for part in PARTS:
        copy = RunFiles(tmp_path / part, stopped.guid)
        shutil.copytree(stopped.files.folder, copy.folder)
        path = getattr(copy, part)
        path.write_bytes(path.read_bytes()[:-9])
        before = all_of(copy.folder)
        code = main([command, *arguments, f"--path={copy.folder}"])
        out, err = capsys.readouterr()
        if command == "runs":
            assert (code, "damaged" in out) == (0, part == "config")
        elif part not in needed:
            assert code == 0, part
        else:
            assert (code, err.count("\n"), path.name in err) == (2, 1, True), (part, err)
            assert all_of(copy.folder) == before


@pytest.mark.parametrize("part", PARTS)
def test_a_file_of_another_run_is_refused(copy, text, part):
    """Although both runs have the same settings and the same text."""
    other = api.train("classic", path=copy.folder, data=text, listener=StopAt(5), **TINY)
    shutil.copyfile(getattr(other.files, part), getattr(copy, part))
    if part == "tokenizer":  # the same characters make the same tokenizer
        swapped = json.loads(copy.tokenizer.read_text("utf-8"))
        swapped["vocab"][:2] = reversed(swapped["vocab"][:2])
        copy.tokenizer.write_text(json.dumps(swapped), "utf-8")
    with pytest.raises(BabyError, match=f"{copy.guid}"):
        api.resume(copy.guid, path=copy.folder) if part == "state" else api.load(copy.guid, path=copy.folder)


def edit(path: Path, change) -> None:
    """Change a JSON file, and its seal if it has one, to test the checks that follow the seal."""
    value = json.loads(path.read_text())
    seal = value.pop("checksum", None)
    change(value)
    (store.write_sealed if seal else baby_xp.files.write_json)(path, value)


def fill_with(path: Path, value: float) -> None:
    """Replace the weights in a file, with a matching seal."""
    arrays, metadata = load_file(path), state_file.read_metadata(path)
    layout = Layout(tuple(arrays), tuple(array.shape for array in arrays.values()))
    del metadata["checksum"]
    state_file.save_weights(path, layout, np.full(layout.size, value, np.float32), metadata)


def model_beside(state: Path) -> Path:
    return state.parent.parent / "models" / state.name.replace("state_", "model_")


DAMAGE = [
    ("config", lambda path: path.write_text("{}"), ("config_", "has no checksum")),
    ("config", lambda path: store.write_sealed(path, {}), ("config_", "is not the config of run")),
    ("config", lambda path: edit(path, lambda c: c.pop("train")), ("is not the config of run",)),
    ("config", lambda path: edit(path, lambda c: c.update(guid="a")), ("is not the config of run",)),
    ("config", lambda path: edit(path, lambda c: c.update(model=[])), ("config_", "kind of model")),
    ("config", lambda path: edit(path, lambda c: c["model"].update(kind=[])), ("config_", "kind of model")),
    ("config", lambda path: edit(path, lambda c: c["model"].update(n_emb=0)), ("config_", "n_emb")),
    ("config", lambda path: edit(path, lambda c: c["model"].update(n_emb=16)), ("does not belong", "wte")),
    ("config", lambda path: edit(path, lambda c: c["model"].update(n_layers=2)), ("does not belong",)),
    ("config", lambda path: edit(path, lambda c: c["model"].update(n_heads=4)), ("with another model",)),
    ("config", lambda path: edit(path, lambda c: c["train"].update(lr=10**400)), ("config_", "lr")),
    ("config", lambda path: edit(path, lambda c: c["train"].update(lr=-1)), ("lr must be a number above 0",)),
    ("config", lambda path: edit(path, lambda c: c["train"].update(dtype="int8")), ("config_", "dtype")),
    ("config", lambda path: edit(path, lambda c: c.update(train=3)), ("config_", "TrainConfig")),
    ("config", lambda path: edit(path, lambda c: c.update(vocab_size=5)), ("do not belong together",)),
    ("config", lambda path: path.write_text(path.read_text().replace('"lr": ', '"lr": 1')), ("checksum differs",)),
    ("tokenizer", Path.unlink, ("tokenizer_", "is missing", "incomplete")),
    ("tokenizer", lambda path: path.write_text("null"), ("tokenizer_",)),
    ("tokenizer", lambda path: edit(path, lambda t: t["vocab"].pop()), ("tokenizer_",)),
    ("tokenizer", lambda path: edit(path, lambda t: t["vocab"].reverse()), ("with another tokenizer",)),
    ("model", Path.unlink, ("model_", "is missing", "incomplete")),
    ("model", lambda path: path.write_bytes(path.read_bytes()[:-1]), ("model_", "is damaged")),
    ("model", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), ("model_", "checksum differs")),
    ("model", lambda path: save_file(load_file(path), path), ("model_", "has no checksum")),
    ("model", lambda path: (path.unlink(), path.mkdir()), ("model_", "cannot be read")),
    ("model", lambda path: fill_with(path, math.nan), ("not finite",)),
    ("model", lambda path: fill_with(path, 1e38), ("not finite",)),
    ("state", Path.unlink, ("state_", "is missing", "incomplete")),
    ("state", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), ("state_", "checksum differs")),
    ("state", lambda path: path.write_bytes(model_beside(path).read_bytes()), ("state_", "is not a checkpoint")),
]


def test_a_damaged_run_is_refused_with_the_reason(copy):
    """When it is loaded or, if its weights are not read, resumed; no file changes."""
    for number, (part, damage, words) in enumerate(DAMAGE):
        path = getattr(copy, part)
        whole = path.read_bytes()
        damage(path)
        before = all_of(copy.folder)
        asked = [lambda part=part: load_and_use(copy, "last" if part == "state" else "best")]
        asked += [lambda: api.resume(path=copy.folder)] if part != "model" else []
        for ask in asked:
            with pytest.raises(BabyError) as caught:
                ask()
            message = str(caught.value)
            assert "\n" not in message
            assert all(word in message for word in words) or ask is not asked[0], (number, part, message)
        if part == "state":
            load_and_use(copy, "best")
        assert all_of(copy.folder) == before
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole)


def load_and_use(files: RunFiles, weights: str) -> None:
    run = api.load(files.guid, path=files.folder, backend="numpy", weights=weights)
    run.generate(num_tokens=1)


# a full disk --------------------------------------------------------------------------------------------

@pytest.mark.skipif(os.name == "nt", reason="no file size limit on this system")
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(copy, done, capsys):
    """Under a limit on the size of a file that the first checkpoint fits and the next one, with the best weights
    beside the present ones, does not: a write then fails as on a full disk. The run
    stays as it was, bit for bit."""
    import resource

    before, usual = all_of(copy.folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (copy.state.stat().st_size - 100, usual[1]))
    try:
        code = main(["resume", f"--path={copy.folder}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err
    assert f"{copy.state.name} cannot be written (File too large)" in err
    assert all_of(copy.folder) == before
    assert [(run.state, run.steps) for run in api.list_runs(copy.folder)] == [("stopped", 5)]
    np.testing.assert_array_equal(api.resume(path=copy.folder).params, done)


def full_where(monkeypatch, is_full) -> None:
    """A disk without room for what is written to the paths that `is_full` says."""
    replace = os.replace

    def full(source, target):
        if is_full(str(target)):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)


def test_a_full_disk_at_the_start_leaves_nothing(text, tmp_path, monkeypatch):
    full_where(monkeypatch, lambda path: True)
    with pytest.raises(BabyError, match="No space left on device"):
        api.train("classic", path=tmp_path / "runs", data=text, **TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "state"), [("report_", "stopped"), ("completion_", "failed")])
def test_a_full_disk_while_the_last_files_are_written_loses_no_step(text, tmp_path, monkeypatch, name, state):
    with monkeypatch.context() as patch:
        full_where(patch, lambda path: name in path)
        with pytest.raises(BabyError, match=f"{name}.*No space left on device"):
            api.train("classic", path=tmp_path, data=text, **TINY)
    assert not list(tmp_path.rglob("*.tmp"))
    assert [(run.state, run.steps) for run in api.list_runs(tmp_path)] == [(state, 12)]
    run = api.resume(path=tmp_path)
    assert run.config["result"]["state"] == "done"
    assert all(path.exists() for path in run.files.of_training)


@pytest.mark.parametrize("name", ["state_", ""], ids=["a checkpoint", "everything"])
def test_a_full_disk_at_a_checkpoint_leaves_the_one_before(text, tmp_path, monkeypatch, name):
    """The error is the first one, not the one from writing the report."""
    full_where(monkeypatch, lambda path: name in path and bool(list(tmp_path.glob("outputs/metrics_*"))))
    with pytest.raises(BabyError, match=r"state_.* cannot be written \(No space left on device\)") as caught:
        api.train("classic", path=tmp_path, data=text, **TINY)
    run = api.load(path=tmp_path, backend="numpy", weights="last")
    assert len(run.generate(num_tokens=3)) == 3
    if name:
        result = run.config["result"]
        assert (result["state"], result["steps"], result["reason"]) == ("failed", 4, str(caught.value))


# shared and forbidden folders ---------------------------------------------------------------------------


def test_two_runs_in_one_folder_at_once_do_not_disturb_each_other(text, tmp_path):
    """In two processes: each ends as it does alone, and they share the ids of the text."""
    script = "import sys, json; from baby_xp import api; api.train('classic', **json.loads(sys.argv[1]))"
    both = [{**TINY, "data": text, "path": str(tmp_path / "both"), "seed": seed} for seed in (0, 1)]
    other = subprocess.Popen([sys.executable, "-c", script, json.dumps(both[0])])
    while other.poll() is None and not list(tmp_path.glob("both/configs/.config_*")):
        time.sleep(0.01)
    api.train("classic", **both[1])
    assert other.wait() == 0
    names = [run.guid for run in api.list_runs(tmp_path / "both")]
    runs = [api.load(name, path=tmp_path / "both", backend="numpy") for name in names]
    found = {run.config["train"]["seed"]: run.params for run in runs}
    for seed in (0, 1):
        alone = api.train("classic", **{**TINY, "data": text, "path": tmp_path / "alone", "seed": seed})
        np.testing.assert_array_equal(found[seed], alone.params)


def test_two_runs_in_two_threads(text, tmp_path):
    """Python delivers signals only to the main thread; training in other threads works too."""
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda seed: api.train("classic", path=tmp_path, data=text, seed=seed, **TINY), (0, 1)))
    assert [run.state for run in api.list_runs(tmp_path)] == ["done", "done"]


AS_NOBODY = """
import contextlib, io, os, sys
from baby_xp import api
from baby_xp.arrays import registry
from baby_xp.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    registry.load("numpy")
    main(["train", "--help"])  # all is imported while the files of Python can be read
if os.getuid() == 0:
    try:
        os.setgid(65534), os.setuid(65534)
    except OSError:
        sys.exit(77)
sys.exit(main(["train", *sys.argv[1:]]) + 10 * main(["resume", *sys.argv[1:]]))
"""


@pytest.mark.skipif(os.name == "nt", reason="permissions are others on this system")
def test_a_folder_without_permission_is_one_line(copy, text):
    """As another user if the tests run as root, to whom permissions do not apply.

    That user may be kept out of the folders above, and so the folder of the runs is the current one.
    """
    for path in [copy.folder, *copy.folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = all_of(copy.folder)
    program = [sys.executable, "-c", AS_NOBODY, "--path=.", "--backend=numpy"]
    refused = subprocess.run(program, cwd=copy.folder, capture_output=True, text=True)
    for path in [copy.folder, *copy.folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    if refused.returncode == 77:
        pytest.skip("the tests run as a root that may not become another user")
    assert refused.returncode == 22, refused.stderr
    assert refused.stderr.count("\n") == refused.stderr.count("Permission denied") == 2
    assert all_of(copy.folder) == before
