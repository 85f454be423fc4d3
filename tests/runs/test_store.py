"""Runs on disk: a file is whole or as before, a name finds the run that is meant, a failed run leaves nothing but
what was to be kept, and what was changed by hand is noticed."""

import ast
import errno
import json
import os
import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import baby_xp.files
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
    baby_xp.files.write(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert all_of(tmp_path) == {"a"}


def test_a_second_write_replaces_the_first(tmp_path):
    baby_xp.files.write(tmp_path / "a", "first, and longer")
    baby_xp.files.write(tmp_path / "a", "second")
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

    def fileno(self):
        return self.file.fileno()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        no_space()


@pytest.fixture(params=["write", "fsync", "replace", "interrupt"])
def failure(request, monkeypatch):
    """A way in which writing fails, and the exception that the caller sees."""
    if request.param == "write":
        opened = open
        monkeypatch.setattr(baby_xp.files, "open", lambda *args: FullFile(opened(*args)), raising=False)
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
        baby_xp.files.write(path, b"new " * 1000)
    assert all_of(tmp_path) == (set() if before is None else {"a.json"})
    if before is not None:
        assert path.read_bytes() == before
    if failure is BabyError:
        assert "a.json cannot be written (No space left on device); make room" in str(caught.value)


@pytest.mark.parametrize("data", [b"12345", lambda path: path.write_bytes(b"12345")], ids=["ours", "theirs"])
def test_the_data_is_synced_before_the_rename(tmp_path, monkeypatch, data):
    """Also what others write, as safetensors writes arrays."""
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    baby_xp.files.write(tmp_path / "a", data)
    assert order == [5, "replace"]


def test_a_folder_that_is_gone_is_made_again(tmp_path):
    baby_xp.files.write(tmp_path / "gone" / "b" / "a", "b")
    baby_xp.files.append_line(tmp_path / "lines" / "a.jsonl", {})
    assert all_of(tmp_path) == {"gone", "gone/b", "gone/b/a", "lines", "lines/a.jsonl"}


def test_a_folder_that_others_take_away_again_and_again_is_made_as_often(tmp_path, monkeypatch):
    """As a run that fails does with a folder that it made and that is still empty."""
    opened, left = open, [3]

    def removed_before(path, mode):
        if left[0]:
            left[0] -= 1
            path.parent.rmdir()
        return opened(path, mode)

    monkeypatch.setattr(baby_xp.files, "open", removed_before, raising=False)
    (tmp_path / "a").mkdir()
    baby_xp.files.append_line(tmp_path / "a" / "b.jsonl", {})
    assert (tmp_path / "a" / "b.jsonl").read_text() == "{}\n"


def test_a_file_in_the_way_of_a_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "b" / "a"):
        with pytest.raises(BabyError, match=r"cannot be written .*; something that is no folder stands"):
            baby_xp.files.write(path, "b")
    assert all_of(tmp_path) == {"file"}


ADVICE = {
    errno.ENOSPC: "make room on that disk, or name another place with --path",
    errno.EROFS: "name another place with --path",
    errno.EACCES: "check the permissions of it and of its folders, or name another place with --path",
    errno.EMFILE: "too many files are open: raise the limit",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOLCK: "its file system may lack what is needed, or name another place with --path",
    errno.EIO: "check the disk, or name another place with --path",
}


@pytest.mark.parametrize("code", ADVICE, ids=errno.errorcode.get)
def test_what_the_system_refuses_comes_with_what_helps_against_it(tmp_path, monkeypatch, code):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(BabyError) as caught:
        baby_xp.files.write(tmp_path / "a", "b", other="--path")
    assert f"cannot be written ({os.strerror(code)}); {ADVICE[code]}" in str(caught.value)
    with pytest.raises(BabyError) as caught:
        baby_xp.files.write(tmp_path / "a", "b")
    assert "--path" not in str(caught.value)


def test_a_text_with_half_a_character_is_written(tmp_path):
    """A file name may have one, and a report names its text."""
    baby_xp.files.write(tmp_path / "a", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "a").read_text("utf-8") in ("caf\\udce9", "caf\u00e9")


def test_what_others_write_gets_the_mode_of_every_new_file(tmp_path):
    def private(path: Path) -> None:
        path.unlink()
        path.touch(0o600)
        path.write_text("x")

    baby_xp.files.write(tmp_path / "theirs", private)
    baby_xp.files.write(tmp_path / "ours", "x")
    assert (tmp_path / "theirs").stat().st_mode == (tmp_path / "ours").stat().st_mode


def test_json_goes_there_and_back_in_plain_ascii(tmp_path):
    value = {"a": [1, 2.5, None, "caf\u00e9"], "b": {"c": True}}
    baby_xp.files.write_json(tmp_path / "a.json", value)
    assert store.read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_bytes().isascii()


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b'{"a": 1} x', b"[" * 100_000, b"9" * 5000, b"\xff"])
def test_a_file_that_is_no_json_is_named(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(BabyError, match=r"a\.json is not JSON; the file is damaged"):
        store.read_json(tmp_path / "a.json")


def test_json_that_is_missing_or_cannot_be_read_is_named(tmp_path):
    with pytest.raises(BabyError, match=r"a\.json is missing: the run is incomplete; bring the file back"):
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


def test_a_sealed_file_comes_back_without_its_seal(sealed):
    assert store.read_sealed(sealed) == VALUE
    assert list(store.read_sealed(sealed)) == list(VALUE)  # people read it in this order
    assert json.loads(sealed.read_text()) == {**VALUE, "checksum": store.digest(VALUE)}


def test_the_digest_asks_neither_order_nor_space():
    assert store.digest({"a": 1, "b": [2]}) == store.digest(json.loads('{ "b":[2],\n"a":1}'))
    assert len({store.digest(value) for value in (None, {}, [], "", 0, False, "0", 0.0, {"a": None})}) == 9
    assert re.fullmatch("[0-9a-f]{64}", store.digest(VALUE))


def test_a_sealed_file_may_be_laid_out_anew(sealed):
    sealed.write_text(json.dumps(json.loads(sealed.read_text()), sort_keys=True))
    assert store.read_sealed(sealed) == VALUE


def test_each_change_of_a_byte_is_noticed_or_changes_nothing(sealed):
    data = sealed.read_bytes()
    for place in range(len(data)):
        for other in (data[place] ^ 1, ord(" "), ord("9")):
            sealed.write_bytes(data[:place] + bytes([other]) + data[place + 1 :])
            try:
                found, message = store.read_sealed(sealed), "a.json"
            except BabyError as error:
                found, message = VALUE, str(error)
            assert found == VALUE
            assert "a.json" in message


@pytest.mark.parametrize("length", [0, 1, 40, -3])
def test_a_sealed_file_that_was_cut_is_noticed(sealed, length):
    sealed.write_bytes(sealed.read_bytes()[:length])
    with pytest.raises(BabyError, match=r"a\.json is not JSON"):
        store.read_sealed(sealed)


@pytest.mark.parametrize("change", [{"n": 3}, {"new": None}, {"a": "cafe"}, {"b": {}}, {"checksum": "0" * 64},
                                    {"checksum": 5}, {"checksum": []}, {"checksum": ""}], ids=str)  # fmt: skip
def test_a_change_without_a_new_seal_is_an_error(sealed, change):
    sealed.write_text(json.dumps({**json.loads(sealed.read_text()), **change}))
    with pytest.raises(BabyError, match=r"a\.json is not as it was written \(its checksum differs\)"):
        store.read_sealed(sealed)


@pytest.mark.parametrize("data", ["{}", "[]", "null", "3", '"checksum"', json.dumps(VALUE), '{"checksum": null}'])
def test_a_file_without_a_seal_is_no_file_of_a_run(sealed, data):
    sealed.write_text(data)
    with pytest.raises(BabyError, match=r"a\.json is no file of a run \(it has no checksum\)"):
        store.read_sealed(sealed)


def test_a_sealed_file_that_is_missing_leaves_the_run_incomplete(tmp_path):
    with pytest.raises(BabyError, match=r"a\.json is missing: the run is incomplete"):
        store.read_sealed(tmp_path / "a.json")


def test_sealing_again_is_a_change_that_is_taken(sealed):
    store.write_sealed(sealed, {**store.read_sealed(sealed), "n": 3})
    assert store.read_sealed(sealed) == {**VALUE, "n": 3}


# lines --------------------------------------------------------------------------------------------------


def test_lines_are_appended(tmp_path):
    for i in range(3):
        baby_xp.files.append_line(tmp_path / "a.jsonl", {"step": i, "text": "a\nb"})
    lines = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["step"] for line in lines[:-1]] == [0, 1, 2]
    assert lines[-1] == b""


def test_a_line_that_cannot_be_appended_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(BabyError, match="cannot be written"):
        baby_xp.files.append_line(tmp_path / "a.jsonl", {})


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
    said = "runs/configs cannot be read" if kind == "file" else "there are no runs in .*; train one, or name their"
    with pytest.raises(BabyError, match=said):
        store.find(folder, "last")


def test_a_config_is_all_that_makes_a_run(runs):
    """What else of it is missing, reading it tells."""
    RunFiles(runs, GUIDS[2]).model.unlink()
    assert store.find(runs, "last").guid == GUIDS[2]
    assert store.guids(runs) == GUIDS[::-1]


def test_a_model_or_metrics_without_a_config_is_no_run(runs):
    files = RunFiles(runs, GUIDS[2])
    files.metrics.parent.mkdir()
    files.metrics.write_text("{}\n")
    files.config.unlink()
    assert store.guids(runs) == [GUIDS[1], GUIDS[0]]


@pytest.mark.parametrize("name", [
    "config_.json", "config_x.json", "config_..json", "config_aaaaaaaa-1111.json", "notes.txt",
    f"config_{GUIDS[0]}_finetune.json", f"config_{GUIDS[0]}_finetuned-0.json",
    f"config_{GUIDS[0]}_finetuned-.json", f"config_{GUIDS[0]}_finetuned_x.json", f"config_{GUIDS[0]}_.json",
    "config_aaaaaaaa_finetuned.json", f"config_{GUIDS[0].upper()}.json", f".config_{GUIDS[0]}.json.tmp",
    f".config_{GUIDS[0]}.lock",
])  # fmt: skip
def test_other_files_among_the_configs_are_passed_over(runs, name):
    (runs / "configs" / name).write_text("{}")
    assert store.guids(runs) == GUIDS[::-1]


SUFFIXES = [
    "", "_finetuned", "_finetuned-2", "_finetuned-11", "_finetuned_finetuned", "_finetuned-2_finetuned-3",
    "_finetuned" * 12,
]  # fmt: skip


@pytest.fixture
def tuned(runs) -> Path:
    """The last of the three runs was finetuned, again and again; the others were not."""
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
def test_a_beginning_and_what_finetuning_put_behind_find_their_run(tuned, beginning, suffix):
    assert store.find(tuned, beginning + suffix) == RunFiles(tuned, GUIDS[2] + suffix)


@pytest.mark.parametrize("name", ["c_finetuned-3", "c_finetuned-1", "a_finetuned", "aaaab_finetuned",
                                  "c_finetuned_finetuned_finetuned"])  # fmt: skip
def test_what_finetuning_put_behind_must_fit_wholly(tuned, name):
    with pytest.raises(BabyError, match=f"no run in .* begins with '{name}'"):
        store.find(tuned, name)


def test_finetuned_runs_of_two_bases_are_ambiguous_as_their_bases_are(tuned):
    for guid in GUIDS[:2]:
        RunFiles(tuned, f"{guid}_finetuned").config.write_text("{}")
    with pytest.raises(BabyError, match="2 runs begin with 'aaaa_finetuned'; give more of the GUID"):
        store.find(tuned, "aaaa_finetuned")
    assert store.find(tuned, "aaaab_finetuned").guid == f"{GUIDS[1]}_finetuned"


# files of a run -----------------------------------------------------------------------------------------


def test_the_names_are_those_of_the_layout():
    files = RunFiles(Path("runs"), GUIDS[0])
    for path in (*files.of_training, files.completion(datetime(2026, 1, 2, 3, 4, 5))):
        folder, name = path.parts[1:]
        pattern = name.replace(GUIDS[0], "<guid>").replace("20260102030405", "<yyyymmddhhmmss>")
        assert f"    {folder}/{pattern} " in store.__doc__
    assert len(set(files.of_training)) == 7


def test_the_config_is_the_first_of_the_files_to_go():
    """While it is there a run can be found, so that it goes first."""
    files = RunFiles(Path("runs"), GUIDS[0])
    assert files.of_training[0] == files.config
    assert files.state in files.of_training
    assert files.lock not in files.of_training


def lock_name(guid: str) -> str:
    return f"configs/.config_{guid}.lock"


def test_a_new_run_makes_all_folders_and_no_file_but_its_lock(tmp_path):
    folder = tmp_path / "a" / "b"
    with store.new_run(folder) as new:
        assert store.GUID.fullmatch(new.files.guid)
        assert not new.keep
        assert all_of(folder) == {*store.FOLDERS, lock_name(new.files.guid)}
        assert store.is_held(new.files)
    assert all_of(folder) == set(store.FOLDERS)
    assert not store.is_held(new.files)


def test_two_runs_have_different_guids(tmp_path):
    with store.new_run(tmp_path) as first, store.new_run(tmp_path) as second:
        assert first.files.guid != second.files.guid


def test_a_guid_that_is_asked_for_is_taken(tmp_path):
    with store.new_run(tmp_path, guid=GUIDS[0]) as new:
        assert new.files == RunFiles(tmp_path, GUIDS[0])


def test_a_guid_that_is_taken_already_is_refused(runs):
    before = all_of(runs)
    with pytest.raises(BabyError, match=f"there is a run {GUIDS[0]} in .* already"):
        store.new_run(runs, guid=GUIDS[0]).__enter__()
    assert all_of(runs) == before


def test_a_guid_whose_run_left_no_more_than_its_weights_is_refused(tmp_path):
    files = RunFiles(tmp_path, GUIDS[0])
    files.model.parent.mkdir()
    files.model.write_text("x")
    with pytest.raises(BabyError, match=f"there is a run {GUIDS[0]} in .* already"):
        store.new_run(tmp_path, guid=GUIDS[0]).__enter__()
    assert all_of(tmp_path) == {"models", f"models/{files.model.name}"}


def test_a_guid_that_another_process_makes_is_refused(tmp_path):
    with store.new_run(tmp_path, guid=GUIDS[0]) as new:
        before = all_of(tmp_path)
        with pytest.raises(BabyError, match=f"run {GUIDS[0]} is being trained by another process"):
            store.new_run(tmp_path, guid=GUIDS[0]).__enter__()
        assert all_of(tmp_path) == before
        assert store.is_held(new.files)


def test_a_finetuned_run_is_called_after_its_base_and_counted(runs):
    names = []
    for _ in range(3):
        with store.new_run(runs, base=GUIDS[1]) as new:
            names.append(new.files.guid)
            new.files.config.write_text("{}")
    with store.new_run(runs, base=names[1]) as new:
        names.append(new.files.guid)
    suffixes = ["_finetuned", "_finetuned-2", "_finetuned-3", "_finetuned-2_finetuned"]
    assert names == [GUIDS[1] + suffix for suffix in suffixes]
    assert all(store.GUID.fullmatch(name) for name in names)


def test_a_finetuning_that_failed_gives_its_name_back(runs):
    for _ in range(2):
        fail(runs, base=GUIDS[1])
    with store.new_run(runs, base=GUIDS[1]) as new:
        assert new.files.guid == f"{GUIDS[1]}_finetuned"


def test_a_name_whose_run_left_anything_is_not_taken_for_another(runs):
    RunFiles(runs, f"{GUIDS[1]}_finetuned").model.write_text("x")
    with store.new_run(runs, base=GUIDS[1]) as new:
        assert new.files.guid == f"{GUIDS[1]}_finetuned-2"


def test_two_finetunings_of_a_run_at_once_have_two_names(runs):
    """Whether the first has written a file yet or not."""
    with store.new_run(runs, base=GUIDS[1]) as first, store.new_run(runs, base=GUIDS[1]) as second:
        first.files.config.write_text("{}")
        with store.new_run(runs, base=GUIDS[1]) as third:
            names = [new.files.guid for new in (first, second, third)]
    assert names == [f"{GUIDS[1]}_finetuned{more}" for more in ("", "-2", "-3")]


def fail(
    folder: Path, error: BaseException | None = None, meanwhile=lambda: None, keep: bool = False, **how
) -> RunFiles:
    """A run that fails after all of its files were written."""
    error = error or BabyError("no")
    seen = []

    def run():
        with store.new_run(folder, **how) as new:
            seen.append(new.files)
            meanwhile()
            for path in new.files.of_training:
                path.write_text("x")
            (folder / "corpora" / "new.ids").write_bytes(b"x")
            new.undo.callback((folder / "corpora" / "new.ids").unlink)
            new.keep = keep
            raise error

    with pytest.raises(type(error)):
        run()
    return seen[0]


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


@pytest.mark.parametrize("error", [BabyError("no"), KeyboardInterrupt()])
def test_a_run_that_fails_after_something_worth_keeping_leaves_all_of_it_but_its_lock(tmp_path, error):
    folder = tmp_path / "a" / "runs"
    files = fail(folder, error, keep=True)
    expected = {str(path.relative_to(folder)) for path in files.of_training}
    assert all_of(folder) == {*store.FOLDERS, "corpora/new.ids", *expected}
    assert not store.is_held(files)
    assert store.guids(folder) == [files.guid]


def test_a_run_that_fails_leaves_the_corpora_that_were_there(tmp_path):
    fail(tmp_path / "runs", keep=True)
    (tmp_path / "runs" / "corpora" / "new.ids").rename(tmp_path / "runs" / "corpora" / "old.ids")
    before = all_of(tmp_path)
    fail(tmp_path / "runs")
    assert all_of(tmp_path) == before


def test_a_run_that_fails_before_it_wrote_anything_leaves_nothing(tmp_path):
    with pytest.raises(BabyError, match="no"), store.new_run(tmp_path / "runs"):
        raise BabyError("no")
    assert all_of(tmp_path) == set()


def test_a_run_that_fails_leaves_what_another_run_put_there_meanwhile(tmp_path):
    other = RunFiles(tmp_path / "runs", GUIDS[0])
    fail(tmp_path / "runs", meanwhile=lambda: other.config.write_text("{}"))
    assert all_of(tmp_path / "runs") == {"configs", f"configs/config_{GUIDS[0]}.json"}


def test_a_run_that_fails_leaves_the_folders_and_ids_of_one_that_has_just_begun(tmp_path):
    """Which has no file but its lock, and will write into folders that are still empty."""
    folder, begun = tmp_path / "runs", []

    def begin():
        begun.append(store.new_run(folder))
        begun.append(begun[0].__enter__())
        (folder / "corpora" / "other.ids").write_bytes(b"x")

    fail(folder, meanwhile=begin)
    made, other = begun
    lock = str(other.files.lock.relative_to(folder))
    assert all_of(folder) == {*store.FOLDERS, "corpora/other.ids", lock}
    made.__exit__(None, None, None)


def test_the_lock_of_a_run_that_was_killed_keeps_no_folder(tmp_path):
    RunFiles(tmp_path, GUIDS[0]).config.parent.mkdir()
    RunFiles(tmp_path, GUIDS[0]).config.write_text("{}")
    RunFiles(tmp_path, GUIDS[0]).lock.write_bytes(b"")
    before = all_of(tmp_path)
    with pytest.MonkeyPatch.context() as patch:  # or the stale lock would be swept
        patch.setattr(store, "_sweep_abandoned", lambda folder: None)
        fail(tmp_path)
    assert all_of(tmp_path) == before


def test_what_fails_while_another_holds_its_name_does_not_touch_it(runs):
    """A finetuning that fails gives its name back; whoever has it next must keep what it wrote."""
    removed = []

    class Watched(store.Lock):
        def release(self):
            removed.append(all_of(runs))
            super().release()

    before = all_of(runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "Lock", Watched)
        fail(runs, base=GUIDS[1])
    name = RunFiles(runs, f"{GUIDS[1]}_finetuned").lock.name
    assert {Path(path).name for path in removed[-1] - before} == {*store.FOLDERS, name} - {"configs", "models"}


def killed_at_the_start(folder: Path, guid: str, step: str | None = "0") -> RunFiles:
    """What a run leaves that is killed before its config is written; step: that of its checkpoint."""
    files = RunFiles(folder, guid)
    for name in store.FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    files.lock.write_bytes(b"")
    files.tokenizer.write_text("{}")
    if step is not None:
        save_file({"a": np.zeros(1)}, files.state, {"step": step})
    (folder / "models" / f".{files.model.name}.0a1b2c3d.tmp").write_text("x")
    return files


@pytest.mark.parametrize("step", [None, "0"])
def test_the_next_run_sweeps_what_one_left_that_was_killed_before_it_had_a_config(tmp_path, step):
    killed_at_the_start(tmp_path, GUIDS[0], step)
    with store.new_run(tmp_path) as new:
        new.files.config.write_text("{}")
    assert all_of(tmp_path) == {*store.FOLDERS, f"configs/{new.files.config.name}"}


def test_a_name_whose_process_was_killed_while_another_swept_is_free(tmp_path, monkeypatch):
    """Its lock was held when the sweep came by: without it, its files would be nobody's for ever."""
    killed = killed_at_the_start(tmp_path, f"{GUIDS[0]}_finetuned", "0")
    monkeypatch.setattr(store, "_sweep_abandoned", lambda folder: None)
    with store.new_run(tmp_path, base=GUIDS[0]) as new:
        assert new.files == killed
        new.files.config.write_text("{}")
    assert all_of(tmp_path) == {*store.FOLDERS, f"configs/{new.files.config.name}"}


def test_a_run_that_has_trained_and_lost_its_config_is_not_swept(tmp_path):
    killed_at_the_start(tmp_path, GUIDS[0], "7")
    killed_at_the_start(tmp_path, GUIDS[1]).metrics.write_text("{}")
    killed_at_the_start(tmp_path, GUIDS[2]).model.write_text("what is damaged may be mended")
    before = {path for path in all_of(tmp_path) if not path.endswith((".lock", ".tmp"))}
    with store.new_run(tmp_path) as new:
        new.files.config.write_text("{}")
    assert all_of(tmp_path) == before | {f"configs/{new.files.config.name}"}


def test_the_next_run_sweeps_what_was_left_half_written(runs):
    """Whatever happened to the run that it was for; and what a run is writing, or somebody else, stays."""
    for name in store.FOLDERS:
        (runs / name).mkdir(exist_ok=True)
    gone = RunFiles(runs, "dddddddd-4444-4444-8444-444444444444")
    later = RunFiles(runs, GUIDS[0]).completion(datetime(2026, 1, 2))
    for path in (gone.model, RunFiles(runs, GUIDS[0]).config, later, runs / ".trial", runs / "models" / ".trial"):
        path.with_name(f".{path.name.removeprefix('.')}.0a1b2c3d.tmp").write_text("x")
    held, growing = RunFiles(runs, GUIDS[1]), later.with_name(f".{later.name}.1a1b2c3d.tmp")
    stays = [held.model.with_name(f".{held.model.name}.0a1b2c3d.tmp"), growing, runs / "models" / "mine.tmp"]
    for path in stays:
        path.write_text("x")
    with store.hold(held), open(growing, "rb") as file:
        assert baby_xp.files.try_to_lock(file)
        with store.new_run(runs) as new:
            new.files.config.write_text("{}")
    assert set(runs.rglob("*.tmp")) == set(stays)


def test_the_next_run_sweeps_what_safetensors_left_half_written(runs):
    """Its names tell of no run: they stay as long as any run has somebody who may be writing it."""
    left = runs / "models" / ".tmpa1B2c3"
    left.parent.mkdir(exist_ok=True)
    left.write_text("x")
    with store.hold(RunFiles(runs, GUIDS[0])), store.new_run(runs):
        pass
    assert left.exists()
    with store.new_run(runs):
        pass
    assert not left.exists()


def test_a_run_that_is_held_is_not_swept(tmp_path):
    killed_at_the_start(tmp_path, GUIDS[0])
    with store.hold(RunFiles(tmp_path, GUIDS[0])):
        before = all_of(tmp_path)
        with store.new_run(tmp_path) as new:
            new.files.config.write_text("{}")
        assert all_of(tmp_path) == before | {f"configs/{new.files.config.name}"}


def test_a_run_that_ends_well_leaves_no_trial_file(tmp_path):
    with store.new_run(tmp_path / "runs") as new:
        new.files.config.write_text("{}")
    assert all_of(tmp_path / "runs") == {*store.FOLDERS, f"configs/{new.files.config.name}"}


@pytest.mark.parametrize("inside", ["", "/runs", "/a/b"])
def test_a_file_in_the_way_of_the_folder_is_named(tmp_path, inside):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BabyError, match=r"file.* cannot be written .*; something that is no folder stands"):
        store.new_run(f"{tmp_path}/file{inside}").__enter__()
    assert all_of(tmp_path) == {"file"}


def test_a_file_in_the_way_of_one_of_the_folders_takes_the_others_away_again(tmp_path):
    for name in store.FOLDERS:
        folder = tmp_path / f"no {name}"
        folder.mkdir()
        (folder / name).write_text("x")
        with pytest.raises(BabyError, match=rf"{name}\b.* cannot be written"):
            store.new_run(folder).__enter__()
        assert all_of(folder) == {name}


def test_a_name_too_long_for_the_file_system_is_an_error(tmp_path):
    with pytest.raises(BabyError, match="cannot be written"):
        store.new_run(tmp_path / ("a" * 5000)).__enter__()


def test_a_disk_without_room_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", no_space)
    with pytest.raises(BabyError, match=r"cannot be written \(No space left on device\)"):
        store.new_run(tmp_path / "runs").__enter__()
    assert all_of(tmp_path) == set()


# a run that is held -------------------------------------------------------------------------------------


def test_a_run_is_held_by_one_at_a_time(runs):
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
def test_a_run_is_let_go_whatever_happens(runs, error):
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


def test_asking_whether_a_run_is_held_leaves_nothing(runs):
    before = all_of(runs)
    assert not store.is_held(RunFiles(runs, GUIDS[0]))
    assert not store.is_held(RunFiles(runs / "gone", GUIDS[0]))
    assert all_of(runs) == before


def test_sweeping_takes_away_the_halves_of_this_run_alone(runs):
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


def test_what_a_write_that_was_killed_leaves_is_swept(runs, monkeypatch):
    files, before = RunFiles(runs, GUIDS[0]), all_of(runs)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: None)  # killed: neither the rename nor the tidying took place
        patch.setattr(Path, "unlink", lambda path: None)
        baby_xp.files.write(files.model, b"x" * 100)
    assert len(all_of(runs) - before) == 1
    store.sweep(files)
    assert all_of(runs) == before


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


# what a machine that looks for more found ---------------------------------------------------------------


def test_where_files_cannot_be_locked_nothing_is_left_of_a_run(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="Windows locks in another way")

    def refuse(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(BabyError, match=r"\.lock cannot be locked .*; its file system may lack .* --path"):
        store.new_run(tmp_path / "runs").__enter__()
    assert all_of(tmp_path) == set()


def test_folders_that_a_failing_run_takes_away_while_another_begins_are_made_again(tmp_path, monkeypatch):
    touch, left = Path.touch, [5]

    def removed_before(path, **how):
        if left[0]:
            left[0] -= 1
            for folder in (path.parent, *path.parent.parents):
                if folder == tmp_path:
                    break
                folder.rmdir()
        touch(path, **how)

    monkeypatch.setattr(Path, "touch", removed_before)
    with store.new_run(tmp_path / "a" / "runs") as new:
        assert store.is_held(new.files)


@pytest.mark.parametrize("sweep", [store.sweep, lambda files: store.sweep_ids(files.folder / "models")])
def test_a_folder_that_cannot_be_listed_is_not_swept(runs, monkeypatch, sweep):
    """A stale handle of a network file system, say: the first file to be written tells of it."""

    def refuse(*args):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "iterdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    sweep(RunFiles(runs, GUIDS[0]))


def test_another_interrupt_does_not_cut_the_clean_up_short(tmp_path, monkeypatch):
    unlink, left = Path.unlink, [1]

    def interrupted(path, **how):
        if path.name.startswith("tokenizer") and left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        unlink(path, **how)

    monkeypatch.setattr(Path, "unlink", interrupted)
    fail(tmp_path / "runs", KeyboardInterrupt())
    assert all_of(tmp_path) == set()
