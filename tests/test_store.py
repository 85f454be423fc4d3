"""Runs on disk: a file is whole or as before, a name finds the run that is meant, a failed run leaves nothing."""

import ast
import errno
import json
import os
from datetime import datetime
from pathlib import Path

import pytest

import baby_xp
from baby_xp.errors import BabyError
from baby_xp.runs import store
from baby_xp.runs.store import RunFiles

GUIDS = [
    "aaaaaaaa-1111-4111-8111-111111111111",
    "aaaabbbb-2222-4222-8222-222222222222",
    "cccccccc-3333-4333-8333-333333333333",
]


def all_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def runs(tmp_path) -> Path:
    """Three runs that can be found, each newer than the one before."""
    for age, guid in enumerate(GUIDS):
        files = RunFiles(tmp_path, guid)
        for path in (files.config, files.model):
            path.parent.mkdir(exist_ok=True)
            path.write_text("{}")
        os.utime(files.config, ns=(0, 10**18 + age))  # nanoseconds apart: the newest is still the newest
    return tmp_path


# writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"\x00\xff", "caf\u00e9 \U0001f600\n", "", b""])
def test_what_was_written_is_there_byte_for_byte(tmp_path, data):
    store.write(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert all_of(tmp_path) == {"a"}


def test_a_second_write_replaces_the_first(tmp_path):
    store.write(tmp_path / "a", "first, and longer")
    store.write(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "second"
    assert all_of(tmp_path) == {"a"}


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullFile:
    """A file on a disk that fills up in the middle of a write."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        no_space()


@pytest.fixture(params=["write", "fsync", "replace", "interrupt"])
def failure(request, monkeypatch):
    """A way in which writing fails, and the exception that the caller sees."""
    if request.param == "write":
        opened = open
        monkeypatch.setattr(store, "open", lambda *args: FullFile(opened(*args)), raising=False)
    elif request.param == "interrupt":

        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupt)
        return KeyboardInterrupt
    else:
        monkeypatch.setattr(os, request.param, no_space)
    return BabyError


@pytest.mark.parametrize("before", [None, b"as before"])
def test_a_failure_in_the_middle_leaves_the_old_file_and_no_other(tmp_path, failure, before):
    path = tmp_path / "a.json"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(failure) as caught:
        store.write(path, b"new " * 1000)
    assert all_of(tmp_path) == (set() if before is None else {"a.json"})
    if before is not None:
        assert path.read_bytes() == before
    if failure is BabyError:
        assert "a.json cannot be written (No space left on device)" in str(caught.value)
        assert "--path" in str(caught.value)


def test_the_data_is_synced_before_the_rename(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    store.write(tmp_path / "a", "b")
    assert order == ["fsync", "replace"]


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(BabyError, match="cannot be written"):
        store.write(tmp_path / "gone" / "a", "b")
    assert all_of(tmp_path) == set()


def test_json_goes_there_and_back_in_plain_ascii(tmp_path):
    value = {"a": [1, 2.5, None, "caf\u00e9"], "b": {"c": True}}
    store.write_json(tmp_path / "a.json", value)
    assert store.read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_bytes().isascii()


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe\x00", b'{"a": 1} x', b"[" * 100_000, b"9" * 5000, b"\xff"]
)
def test_a_file_that_is_no_json_is_named(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(BabyError, match=r"a\.json is not JSON; the file is damaged"):
        store.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_json_that_cannot_be_read_is_named(tmp_path, make):
    make(tmp_path / "a.json")
    with pytest.raises(BabyError, match=r"a\.json cannot be read .*; the run is incomplete"):
        store.read_json(tmp_path / "a.json")


def test_lines_are_appended(tmp_path):
    for i in range(3):
        store.append_line(tmp_path / "a.jsonl", {"step": i, "text": "a\nb"})
    lines = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["step"] for line in lines[:-1]] == [0, 1, 2]
    assert lines[-1] == b""


def test_a_line_that_cannot_be_appended_is_an_error(tmp_path):
    with pytest.raises(BabyError, match="cannot be written"):
        store.append_line(tmp_path / "gone" / "a.jsonl", {})


# finding ------------------------------------------------------------------------------------------------


def test_last_is_the_newest(runs):
    assert store.find(runs, "last").guid == GUIDS[2]
    os.utime(RunFiles(runs, GUIDS[0]).config, ns=(0, 2 * 10**18))
    assert store.find(runs, "last").guid == GUIDS[0]
    assert store.guids(runs) == [GUIDS[0], GUIDS[2], GUIDS[1]]


@pytest.mark.parametrize(("name", "found"), [
    (GUIDS[0], 0), (GUIDS[1], 1), ("aaaaa", 0), ("aaaab", 1), ("c", 2), ("cccccccc-", 2),
])  # fmt: skip
def test_an_unambiguous_beginning_finds_its_run(runs, name, found):
    assert store.find(runs, name) == RunFiles(runs, GUIDS[found])


def test_an_ambiguous_beginning_says_how_many_runs_fit(runs):
    with pytest.raises(BabyError, match="2 runs begin with 'aaaa'; give more of the GUID"):
        store.find(runs, "aaaa")


def test_a_beginning_that_fits_none_names_the_last(runs):
    with pytest.raises(BabyError, match=f"no run in .* begins with 'abc'; the last is {GUIDS[2]}"):
        store.find(runs, "abc")


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a\\b", ".", "..", "/etc", "*", "A" * 8, "aaaa\n", "a" * 37, "Last", "\x00", "g"]
)
def test_a_name_that_could_be_a_path_or_a_pattern_is_refused(runs, name):
    with pytest.raises(BabyError, match="is not a run: give a GUID, the beginning of one, or last"):
        store.find(runs, name)


@pytest.mark.parametrize("kind", ["nothing", "empty", "file"])
def test_a_folder_without_runs_says_so(tmp_path, kind):
    folder = tmp_path / "runs"
    {"nothing": lambda: None, "empty": folder.mkdir, "file": lambda: folder.write_text("x")}[kind]()
    with pytest.raises(BabyError, match=r"there are no runs in .*runs; train one, or name their folder"):
        store.find(folder, "last")


def test_a_config_without_a_model_is_no_run(runs):
    RunFiles(runs, GUIDS[2]).model.unlink()
    assert store.find(runs, "last").guid == GUIDS[1]


def test_a_model_or_metrics_without_a_config_is_no_run(runs):
    files = RunFiles(runs, GUIDS[2])
    files.metrics.parent.mkdir()
    files.metrics.write_text("{}\n")
    files.config.unlink()
    assert store.guids(runs) == [GUIDS[1], GUIDS[0]]


@pytest.mark.parametrize("name", [
    "config_.json", "config_x.json", "config_..json", "config_aaaaaaaa-1111.json",
    f"config_{GUIDS[0]}_finetuned.json", f"config_{GUIDS[0].upper()}.json", f".config_{GUIDS[0]}.json.tmp",
    "notes.txt",
])  # fmt: skip
def test_other_files_among_the_configs_are_passed_over(runs, name):
    (runs / "configs" / name).write_text("{}")
    assert store.guids(runs) == GUIDS[::-1]


# files of a run -----------------------------------------------------------------------------------------


def test_the_names_are_those_of_the_layout():
    files = RunFiles(Path("runs"), GUIDS[0])
    for path in (*files.of_training, files.completion(datetime(2026, 1, 2, 3, 4, 5))):
        folder, name = path.parts[1:]
        pattern = name.replace(GUIDS[0], "<guid>").replace("20260102030405", "<yyyymmddhhmmss>")
        assert f"    {folder}/{pattern} " in store.__doc__
    assert len(set(files.of_training)) == 7


def test_a_new_run_makes_all_folders_and_no_file(tmp_path):
    with store.new_run(tmp_path / "a" / "b") as files:
        assert store.GUID.fullmatch(files.guid)
    assert all_of(tmp_path / "a" / "b") == set(store.FOLDERS)


def test_two_runs_have_different_guids(tmp_path):
    with store.new_run(tmp_path) as first, store.new_run(tmp_path) as second:
        assert first.guid != second.guid


def fail(folder: Path, error: BaseException | None = None, meanwhile=lambda: None) -> None:
    """A run that fails after all of its files were written."""
    error = error or BabyError("no")

    def run():
        with store.new_run(folder) as files:
            meanwhile()
            for path in files.of_training:
                path.write_text("x")
            (folder / "corpora" / "new.ids").write_bytes(b"x")
            raise error

    with pytest.raises(type(error)):
        run()


@pytest.mark.parametrize("error", [BabyError("no"), RuntimeError("no"), KeyboardInterrupt(), MemoryError()])
def test_a_run_that_fails_leaves_no_folder_that_was_not_there(tmp_path, error):
    fail(tmp_path / "a" / "b" / "runs", error)
    assert all_of(tmp_path) == set()


def test_a_run_that_fails_leaves_what_was_there(runs):
    (runs / "corpora").mkdir()
    (runs / "corpora" / "old.ids").write_bytes(b"x")
    (runs / "notes.txt").write_text("mine")
    before = all_of(runs)
    fail(runs)
    assert all_of(runs) == before


def test_a_run_that_fails_leaves_what_another_run_put_there_meanwhile(tmp_path):
    other = RunFiles(tmp_path / "runs", GUIDS[0])
    fail(tmp_path / "runs", meanwhile=lambda: other.config.write_text("{}"))
    assert all_of(tmp_path / "runs") == {"configs", f"configs/config_{GUIDS[0]}.json"}


def test_a_run_that_ends_well_leaves_no_trial_file(tmp_path):
    with store.new_run(tmp_path / "runs") as files:
        files.config.write_text("{}")
    assert all_of(tmp_path / "runs") == {*store.FOLDERS, f"configs/{files.config.name}"}


@pytest.mark.parametrize("inside", ["", "/runs", "/a/b"])
def test_a_file_in_the_way_of_the_folder_is_named(tmp_path, inside):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BabyError, match=r"file.* cannot be written .*; name another folder with --path"):
        store.new_run(f"{tmp_path}/file{inside}").__enter__()
    assert all_of(tmp_path) == {"file"}


def test_a_file_in_the_way_of_one_of_the_folders_takes_the_others_away_again(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "outputs").write_text("x")
    with pytest.raises(BabyError, match="outputs cannot be written"):
        store.new_run(tmp_path / "runs").__enter__()
    assert all_of(tmp_path) == {"runs", "runs/outputs"}


def test_a_name_too_long_for_the_file_system_is_an_error(tmp_path):
    with pytest.raises(BabyError, match="cannot be written"):
        store.new_run(tmp_path / ("a" * 5000)).__enter__()


def test_a_disk_without_room_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", no_space)
    with pytest.raises(BabyError, match=r"cannot be written \(No space left on device\)"):
        store.new_run(tmp_path / "runs").__enter__()
    assert all_of(tmp_path) == set()


# no code in files ---------------------------------------------------------------------------------------


def test_nothing_in_the_package_can_load_code_from_a_file():
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    folder = Path(baby_xp.__file__).parent
    sources = sorted(folder.rglob("*.py"))
    assert len(sources) > 20
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {name.split(".")[0] for name in names}, path
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), path
            # numpy.load would read pickles if it were asked to
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                assert (called.value.id, called.attr) not in {("np", "load"), ("np", "save")}, path
