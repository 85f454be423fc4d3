"""What can go wrong on a disk: full, damaged, shared, forbidden, mixed up. Nothing is lost, nothing is wrong in
silence."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import baby_xp.sitting
from baby_xp import api
from baby_xp.cli import main
from baby_xp.errors import BabyError
from baby_xp.run import Run
from baby_xp.runs import store
from baby_xp.runs.store import RunFiles

TEXT = "the cat sat on the mat.\nit sat and sat, and so did the hat. " * 30
TINY = {
    "n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 4, "num_steps": 12,
    "eval_every": 5, "checkpoint_every": 2, "sample_tokens": 5, "warmup_steps": 3, "lr": 1e-2, "workers": 1,
    "backend": "numpy",
}  # fmt: skip
PARTS = ("config", "tokenizer", "model", "state")


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baby_xp.sitting, "SAMPLE_TOKENS", 20)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8", newline="\n")
    return str(path)


class StopAt(api.Silent):
    def __init__(self, step: int):
        self.step = step

    def evaluated(self, record):
        if record["step"] == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory) -> Run:
    """A run that was stopped half-way, which no test changes."""
    return api.train("baby", path=tmp_path_factory.mktemp("stopped"), data=text, listener=StopAt(5), **TINY)


@pytest.fixture(scope="module")
def done(stopped, tmp_path_factory) -> np.ndarray:
    """How it ends: parameters (P,)."""
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
    """Length of what stands before the arrays: there a random place would seldom be."""
    return 8 + int.from_bytes(data[:8], "little") if data[:1] != b"{" else len(data)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(edits=st.lists(EDITS, min_size=1, max_size=3), front=st.booleans())
def test_a_damaged_file_is_an_error_or_loads_as_it_was(stopped, part, edits, front):
    """Four times a thousand mutations: never another exception, never another model."""
    path = getattr(stopped.files, part)
    whole = path.read_bytes()
    length = near_the_front(whole) if front else len(whole)
    data = whole[:length]
    for edit in edits:
        data = damaged(data, edit) if data else data
    try:
        path.write_bytes(data + whole[length:])
        _check_same_or_error(stopped, part)
    finally:
        path.write_bytes(whole)


def _check_same_or_error(run: Run, part: str) -> None:
    error = None
    try:
        weights = "last" if part == "state" else "best"
        found = api.load(run.guid, path=run.files.folder, backend="numpy", weights=weights)
    except BabyError as raised:
        error = str(raised)
    if error is not None:
        assert error
        assert "\n" not in error
        return
    np.testing.assert_array_equal(found.params, run.params if part != "state" else _state(run))
    assert found.tokenizer == run.tokenizer
    assert found.model == run.model
    assert found.config["train"] == run.config["train"]


_states: dict[str, np.ndarray] = {}


def _state(run: Run) -> np.ndarray:
    return _states[run.guid]


@pytest.fixture(autouse=True, scope="module")
def remembered(stopped):
    _states[stopped.guid] = api.load(
        stopped.guid, path=stopped.files.folder, backend="numpy", weights="last"
    ).params


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("command", ["generate", "resume", "evaluate", "finetune", "export", "runs"])
def test_every_command_says_in_one_line_what_is_damaged(copy, part, command, capsys, text):
    path = getattr(copy, part)
    path.write_bytes(path.read_bytes()[:-9])
    before = {file: file.read_bytes() for file in copy.folder.rglob("*") if file.is_file()}
    arguments = {"finetune": ["--data", text], "export": ["--to", str(copy.folder.parent / "out")]}.get(
        command, []
    )
    program = ["littlebaby"] if command == "export" else []
    code = main([command, *program, *(["last"] * (command != "runs")), *arguments, f"--path={copy.folder}"])
    out, err = capsys.readouterr()
    if command == "runs":
        assert code == 0
        assert ("damaged" in out) == (part == "config")
    elif part not in needed(command):
        assert code == 0
    else:
        assert (code, err.count("\n")) == (2, 1)
        assert path.name in err
        assert before == {file: file.read_bytes() for file in copy.folder.rglob("*") if file.is_file()}


def needed(command: str) -> set[str]:
    return {"config", "tokenizer", "state" if command == "resume" else "model"}


@pytest.mark.parametrize("part", PARTS)
def test_a_file_of_another_run_is_noticed(copy, text, part):
    other = api.train("baby", path=copy.folder, data=text, **{**TINY, "seed": 1})
    shutil.copyfile(getattr(other.files, part), getattr(copy, part))
    if part == "tokenizer":  # the same characters make the same tokenizer
        swapped = json.loads(copy.tokenizer.read_text("utf-8"))
        swapped["vocab"][:2] = reversed(swapped["vocab"][:2])
        copy.tokenizer.write_text(json.dumps(swapped), "utf-8")
    with pytest.raises(BabyError, match=f"{copy.guid}"):
        api.resume(copy.guid, path=copy.folder) if part == "state" else api.load(copy.guid, path=copy.folder)


@pytest.mark.parametrize("part", ["tokenizer", "model", "state"])
def test_a_file_that_is_gone_is_named(copy, part):
    getattr(copy, part).unlink()
    with pytest.raises(BabyError, match=rf"{getattr(copy, part).name}.*incomplete"):
        api.resume(path=copy.folder) if part == "state" else api.load(path=copy.folder)


def test_a_changed_setting_does_not_go_unnoticed(copy):
    copy.config.write_text(copy.config.read_text("ascii").replace('"lr": 0.01', '"lr": 0.02'), "ascii")
    with pytest.raises(BabyError, match="is not as it was written"):
        api.resume(path=copy.folder)


def test_settings_behind_a_valid_seal_are_checked_too(copy):
    config = store.read_sealed(copy.config)
    config["train"]["lr"] = -1
    store.write_sealed(copy.config, config)
    with pytest.raises(BabyError, match="lr must be a number above 0"):
        api.resume(path=copy.folder)


# a full disk --------------------------------------------------------------------------------------------

SMALL_DISK = """
import json, resource, sys
import baby_xp.sitting
from baby_xp.cli import main
baby_xp.sitting.SAMPLE_TOKENS = 20
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="no file size limit on this system")
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(copy, done):
    """Under a limit on the size of a file that the first checkpoint fits and the next one, with the best weights
    beside the present ones, does not: a write then fails as on a full disk. The run
    stays as it was, bit for bit."""
    before = {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file()}
    limit = copy.state.stat().st_size - 100
    command = [sys.executable, "-c", SMALL_DISK, str(limit), "resume", f"--path={copy.folder}"]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2, failed.stderr
    assert failed.stderr.count("\n") == 1
    assert f"{copy.state.name} cannot be written (File too large)" in failed.stderr
    assert {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file()} == before
    assert [(run.state, run.steps) for run in api.list_runs(copy.folder)] == [("stopped", 5)]
    np.testing.assert_array_equal(api.resume(path=copy.folder).params, done)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of its own with little room; skips where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_a_disk_that_fills_up_loses_nothing(stopped, done, tiny_disk):
    shutil.copytree(stopped.files.folder, tiny_disk, dirs_exist_ok=True)
    filler = tiny_disk / "filler"
    fill(filler)
    assert shutil.disk_usage(tiny_disk).free < 4096
    kept = RunFiles(tiny_disk, stopped.guid)
    before = kept.state.read_bytes(), kept.model.read_bytes(), kept.config.read_bytes()
    with pytest.raises(BabyError, match="No space left on device"):
        api.resume(path=tiny_disk)
    assert before == (kept.state.read_bytes(), kept.model.read_bytes(), kept.config.read_bytes())
    filler.unlink()
    assert [run.state for run in api.list_runs(tiny_disk)] == ["stopped"]
    np.testing.assert_array_equal(api.resume(path=tiny_disk).params, done)


# shared and forbidden folders ---------------------------------------------------------------------------


def test_two_runs_in_one_folder_at_once_do_not_disturb_each_other(text, tmp_path):
    """In two processes: each ends as it does alone, with the ids of the text shared."""
    script = "import sys, json; from baby_xp import api; api.train('baby', **json.loads(sys.argv[1]))"
    both = [{**TINY, "data": text, "path": str(tmp_path / "both"), "seed": seed} for seed in (0, 1)]
    running = [subprocess.Popen([sys.executable, "-c", script, json.dumps(one)]) for one in both]
    assert [process.wait() for process in running] == [0, 0]
    names = [run.guid for run in api.list_runs(tmp_path / "both")]
    runs = [api.load(name, path=tmp_path / "both", backend="numpy") for name in names]
    found = {run.config["train"]["seed"]: run.params for run in runs}
    for seed in (0, 1):
        alone = api.train("baby", **{**TINY, "data": text, "path": tmp_path / "alone", "seed": seed})
        np.testing.assert_array_equal(found[seed], alone.params)


def test_two_runs_in_two_threads(text, tmp_path):
    """Python delivers signals to the main thread alone; training in others works all the same."""
    threads = [
        threading.Thread(
            target=api.train, args=("baby",), kwargs={**TINY, "data": text, "path": tmp_path, "seed": i}
        )
        for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.state for run in api.list_runs(tmp_path)] == ["done", "done"]


AS_NOBODY = """
import contextlib, io, os, sys
from baby_xp import api, backend
from baby_xp.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    backend.load("numpy")
    main([sys.argv[1], "--help"])  # all is imported while the files of Python can be read
if os.getuid() == 0:
    try:
        os.setgid(65534), os.setuid(65534)
    except OSError:
        sys.exit(77)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="permissions are others on this system")
@pytest.mark.parametrize("command", ["train", "resume"])
def test_a_folder_without_permission_is_one_line(copy, text, command):
    """As another user where the tests run as root, whom no permission holds back.

    That user may be kept out of the folders above, and so the folder of the runs is the current one.
    """
    for path in [copy.folder, *copy.folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file()}
    program = [sys.executable, "-c", AS_NOBODY, command, "--path=.", "--backend=numpy"]
    refused = subprocess.run(program, cwd=copy.folder, capture_output=True, text=True)
    for path in [copy.folder, *copy.folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    if refused.returncode == 77:
        pytest.skip("the tests run as a root that may not become another user")
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.count("\n") == 1
    assert "Permission denied" in refused.stderr
    assert before == {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "..", "/etc/passwd", "a\\b", "*", "a\0b", "last/..", "_finetuned"]
)
@pytest.mark.parametrize("command", ["generate", "resume", "evaluate", "finetune"])
def test_a_guid_with_path_characters_is_no_guid(copy, capsys, command, name, text):
    before = {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file()}
    arguments = ["--data", text] if command == "finetune" else []
    assert main([command, name, f"--path={copy.folder}", *arguments]) == 2
    err = capsys.readouterr().err
    assert "is not a run: give a GUID" in err
    assert err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file()}


def test_the_damage_above_really_damages():
    data = b"0123456789"
    assert damaged(data, ("flip", 0.3, 0)) == b"0122456789"
    assert damaged(data, ("cut", 0.5, 0)) == b"01234"
    assert damaged(data, ("drop", 0.2, 3)) == b"0156789"
    assert damaged(data, ("insert", 0.1, 65)) == b"0A123456789"
    assert damaged(data, ("double", 0.2, 2)) == b"01232345" + b"6789"
    assert damaged(data, ("set", 0.0, 65)) == b"A123456789"


def test_paths_are_those_of_the_run(copy):
    assert {path.parent.parent for path in copy.of_training} == {Path(copy.folder)}
