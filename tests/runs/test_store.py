"""Runs on disk: a name finds its run, one process trains it, and manual changes are detected."""

import ast
import errno
import json
import os
import re
from datetime import datetime
from pathlib import Path

import pytest
from small_runs import all_of

import baby_xp
from baby_xp.errors import BabyError
from baby_xp.files import write
from baby_xp.runs import store
from baby_xp.runs.store import RunFiles

GUIDS = [
    "aaaaaaaa-1111-4111-8111-111111111111",
    "aaaabbbb-2222-4222-8222-222222222222",
    "cccccccc-3333-4333-8333-333333333333",
]


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


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b'{"a": 1} x', b"[" * 100_000, b"9" * 5000, b"\xff"])
def test_a_file_that_is_not_json_is_named(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(BabyError, match=r"a\.json is not JSON, so it is not as baby_xp wrote it"):
        store.read_json(tmp_path / "a.json")


def test_a_missing_or_unreadable_json_file_is_named(tmp_path):
    with pytest.raises(BabyError, match=r"a\.json is missing: the run is incomplete; restore the original file"):
        store.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(BabyError, match=r"a\.json cannot be read \(.*\); it is a folder"):
        store.read_json(tmp_path / "a.json")


# sealed files -------------------------------------------------------------------------------------------

VALUE = {"b": {"d": 1.5e-7, "c": [True, None]}, "a": "caf\u00e9", "n": 2**60}


@pytest.fixture
def sealed(tmp_path) -> Path:
    store.write_sealed(tmp_path / "a.json", VALUE)
    return tmp_path / "a.json"


def test_a_sealed_file_is_read_without_its_seal(sealed):
    assert store.read_sealed(sealed) == VALUE
    assert list(store.read_sealed(sealed)) == list(VALUE)  # in this order for human readers
    assert json.loads(sealed.read_text()) == {**VALUE, "checksum": store.digest(VALUE)}
    sealed.write_text(json.dumps(json.loads(sealed.read_text()), sort_keys=True))  # whitespace does not matter
    assert store.read_sealed(sealed) == VALUE


def test_the_digest_ignores_order_and_whitespace():
    assert store.digest({"a": 1, "b": [2]}) == store.digest(json.loads('{ "b":[2],\n"a":1}'))
    assert len({store.digest(value) for value in (None, {}, [], "", 0, False, "0", 0.0, {"a": None})}) == 9
    assert re.fullmatch("[0-9a-f]{64}", store.digest(VALUE))


def test_each_changed_byte_is_detected_or_harmless(sealed):
    data = sealed.read_bytes()
    changed = [data[:at] + bytes([other]) + data[at + 1 :]
               for at in range(len(data)) for other in (data[at] ^ 1, ord(" "), ord("9"))]  # fmt: skip
    for new in (*changed, *(data[:length] for length in (0, 1, 40, -3))):
        sealed.write_bytes(new)
        try:
            found, message = store.read_sealed(sealed), "a.json"
        except BabyError as error:
            found, message = VALUE, str(error)
        assert found == VALUE
        assert "a.json" in message
    with pytest.raises(BabyError, match=r"a\.json is not JSON"):
        store.read_sealed(sealed)


@pytest.mark.parametrize("change", [{"n": 3}, {"new": None}, {"a": "cafe"}, {"b": {}}, {"checksum": "0" * 64},
                                    {"checksum": 5}, {"checksum": []}, {"checksum": ""}], ids=str)  # fmt: skip
def test_a_change_without_a_new_seal_is_an_error(sealed, change):
    sealed.write_text(json.dumps({**json.loads(sealed.read_text()), **change}))
    with pytest.raises(BabyError, match=r"a\.json was changed or damaged \(its checksum differs\)"):
        store.read_sealed(sealed)


@pytest.mark.parametrize("data", ["{}", "[]", "null", "3", '"checksum"', json.dumps(VALUE), '{"checksum": null}'])
def test_a_file_without_a_seal_is_refused(sealed, data):
    sealed.write_text(data)
    with pytest.raises(BabyError, match=r"a\.json has no checksum"):
        store.read_sealed(sealed)


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
    with pytest.raises(BabyError, match="2 runs begin with 'aaaa'; give more characters of the GUID"):
        store.find(runs, "aaaa")


def test_an_unknown_beginning_names_the_last_run(runs):
    with pytest.raises(BabyError, match=f"no run in .* begins with 'abc'; the last is {GUIDS[2]}"):
        store.find(runs, "abc")


@pytest.mark.parametrize("name", [
    "", "../x", "a/b", "a\\b", ".", "..", "/etc", "*", "A" * 8, "aaaa\n", "a" * 37, "Last", "\x00", "g",
    "_finetuned", "c_", "c_fine", "c_tuned", "c_finetuned-", "c_finetuned-0", "c_finetuned-02", "c_finetuned--2",
    "c_finetuned-x", "c_finetuned2", "c_finetuned/..", "c_finetuned_", "c_Finetuned", "c_finetuned-\u0662",
    "c_finetuned\n",
])  # fmt: skip
def test_a_name_that_could_be_a_path_or_a_pattern_is_refused(runs, name):
    with pytest.raises(BabyError, match="is not a run: give a GUID, the beginning of one, or last"):
        store.find(runs, name)


@pytest.mark.parametrize("kind", ["nothing", "empty", "file"])
def test_a_folder_without_runs_says_so(tmp_path, kind):
    folder = tmp_path / "runs"
    {"nothing": lambda: None, "empty": folder.mkdir, "file": lambda: folder.write_text("x")}[kind]()
    said = "runs/configs cannot be read" if kind == "file" else "there are no runs in .*; train one, or give"
    with pytest.raises(BabyError, match=said):
        store.find(folder, "last")


def test_a_config_alone_makes_a_run(runs):
    """Reading a run reports other missing files."""
    files = RunFiles(runs, GUIDS[2])
    files.model.unlink()
    assert store.guids(runs) == GUIDS[::-1]
    files.metrics.parent.mkdir()
    files.metrics.write_text("{}\n")
    files.config.unlink()
    assert store.guids(runs) == GUIDS[1::-1]


@pytest.mark.parametrize("name", [
    "config_.json", "config_x.json", "config_..json", "config_aaaaaaaa-1111.json", "notes.txt",
    f"config_{GUIDS[0]}_finetune.json", f"config_{GUIDS[0]}_finetuned-0.json",
    f"config_{GUIDS[0]}_finetuned-.json", f"config_{GUIDS[0]}_finetuned_x.json", f"config_{GUIDS[0]}_.json",
    "config_aaaaaaaa_finetuned.json", f"config_{GUIDS[0].upper()}.json", f".config_{GUIDS[0]}.json.tmp",
    f".config_{GUIDS[0]}.lock",
])  # fmt: skip
def test_other_files_among_the_configs_are_ignored(runs, name):
    (runs / "configs" / name).write_text("{}")
    assert store.guids(runs) == GUIDS[::-1]


SUFFIXES = [
    "", "_finetuned", "_finetuned-2", "_finetuned-11", "_finetuned_finetuned", "_finetuned-2_finetuned-3",
    "_finetuned" * 12,
]  # fmt: skip


@pytest.fixture
def tuned(runs) -> Path:
    """The last of the three runs was finetuned repeatedly; the others were not."""
    for age, suffix in enumerate(SUFFIXES):
        files = RunFiles(runs, GUIDS[2] + suffix)
        files.config.write_text("{}")
        os.utime(files.config, ns=(0, 10**18 + 10 + age))
    return runs


def test_finetuned_runs_are_runs(tuned):
    assert store.guids(tuned) == [*(GUIDS[2] + suffix for suffix in SUFFIXES[::-1]), GUIDS[1], GUIDS[0]]
    assert store.find(tuned, "last").guid == GUIDS[2] + SUFFIXES[-1]


@pytest.mark.parametrize("beginning", ["c", "cccccccc", "cccccccc-33", GUIDS[2]])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_beginning_with_a_suffix_of_finetuning_finds_its_run(tuned, beginning, suffix):
    assert store.find(tuned, beginning + suffix) == RunFiles(tuned, GUIDS[2] + suffix)


@pytest.mark.parametrize("name", ["c_finetuned-3", "c_finetuned-1", "a_finetuned", "aaaab_finetuned",
                                  "c_finetuned_finetuned_finetuned"])  # fmt: skip
def test_a_suffix_of_finetuning_must_match_completely(tuned, name):
    with pytest.raises(BabyError, match=f"no run in .* begins with '{name}'"):
        store.find(tuned, name)


def test_finetuned_runs_of_two_bases_are_ambiguous(tuned):
    for guid in GUIDS[:2]:
        RunFiles(tuned, f"{guid}_finetuned").config.write_text("{}")
    with pytest.raises(BabyError, match="2 runs begin with 'aaaa_finetuned'; give more characters of the GUID"):
        store.find(tuned, "aaaa_finetuned")
    assert store.find(tuned, "aaaab_finetuned").guid == f"{GUIDS[1]}_finetuned"


# files of a run -----------------------------------------------------------------------------------------


def test_file_names_follow_the_layout():
    files = RunFiles(Path("runs"), GUIDS[0])
    for path in (*files.of_training, files.completion(datetime(2026, 1, 2, 3, 4, 5))):
        folder, name = path.parts[1:]
        pattern = name.replace(GUIDS[0], "<guid>").replace("20260102030405", "<yyyymmddhhmmss>")
        assert f"    {folder}/{pattern} " in store.__doc__
    assert len(set(files.of_training)) == 7
    assert files.of_training[0] == files.config  # removed first: while it is there, the run can be found
    assert files.lock not in files.of_training


# a run that is held -------------------------------------------------------------------------------------


def test_a_run_is_held_by_one_process_at_a_time(runs):
    files = RunFiles(runs, GUIDS[0])
    with store.hold(files):
        with pytest.raises(BabyError, match=f"run {GUIDS[0]} is being trained by another process; wait for it"):
            store.hold(files).__enter__()
        assert store.is_held(files)
        assert not store.is_held(RunFiles(runs, GUIDS[1]))
    assert not store.is_held(files)
    with store.hold(files):
        assert store.is_held(files)


@pytest.mark.parametrize("error", [BabyError, KeyboardInterrupt])
def test_a_run_is_released_after_any_error(runs, error):
    files, before = RunFiles(runs, GUIDS[0]), all_of(runs)
    with pytest.raises(error), store.hold(files):
        raise error
    assert all_of(runs) == before
    assert not store.is_held(files)


def test_a_lock_that_cannot_be_written_is_an_error(runs):
    files = RunFiles(runs, GUIDS[0])
    files.lock.mkdir()
    with pytest.raises(BabyError, match=r"\.lock cannot be written \(.*\); it is a folder"):
        store.hold(files).__enter__()


def test_sweeping_removes_only_half_written_files_of_this_run(runs):
    (runs / "outputs").mkdir()
    (runs / "tokenizers").mkdir()
    mine, other = RunFiles(runs, GUIDS[0]), RunFiles(runs, GUIDS[1])
    tuned = RunFiles(runs, f"{GUIDS[0]}_finetuned")
    half = lambda path: path.with_name(f".{path.name}.0a1b2c3d.tmp")  # noqa: E731
    for path in (*other.of_training, *tuned.of_training):
        half(path).write_text("x")
    (runs / "models" / "mine.tmp").write_text("x")
    before = all_of(runs)
    for path in mine.of_training:
        half(path).write_text("x")
    store.sweep(mine)
    assert all_of(runs) == before


def test_files_left_by_a_killed_write_are_swept(runs, monkeypatch):
    files, before = RunFiles(runs, GUIDS[0]), all_of(runs)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: None)  # killed: neither the rename nor the cleanup happened
        patch.setattr(Path, "unlink", lambda path: None)
        write(files.model, b"x" * 100)
    assert len(all_of(runs)) == len(before) + 1
    store.sweep(files)
    assert all_of(runs) == before


def test_a_folder_that_cannot_be_listed_is_not_swept(runs, monkeypatch):
    """For example, a stale handle of a network file system: writing the first file reports it."""

    def refuse(*args):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "iterdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    store.sweep(RunFiles(runs, GUIDS[0]))


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
            # numpy.load can read pickles if allowed to
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                assert (called.value.id, called.attr) not in {("np", "load"), ("np", "save")}, path
