"""Files are complete or unchanged, whatever fails, and system errors become one line with advice."""

import errno
import json
import os
from pathlib import Path

import pytest

from baby_xp import files
from baby_xp.errors import BabyError


def all_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refuse(code: int):
    def refused(*args, **how):
        raise OSError(code, os.strerror(code))

    return refused


WAYS = {
    "whole": lambda path, data: files.write(path, data),
    "in pieces": lambda path, data: files.write_pieces(path, lambda: [data[:3], data[3:]]),
    "by a function": lambda path, data: files.write(path, lambda temporary: temporary.write_bytes(data)),
}
each_way = pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)


@each_way
def test_a_second_write_replaces_the_first(tmp_path, write):
    for data in (b"\x00\xff first, and longer", b"second", b""):
        write(tmp_path / "a", data)
        assert (tmp_path / "a").read_bytes() == data
        assert all_of(tmp_path) == {"a"}


def test_a_text_is_written_in_utf_8_with_escapes_for_half_characters(tmp_path):
    """A file name may contain them, and a report names its text."""
    files.write(tmp_path / "a", "caf\u00e9 \U0001f600\n")
    assert (tmp_path / "a").read_bytes() == "caf\u00e9 \U0001f600\n".encode()
    files.write(tmp_path / "a", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "a").read_text("utf-8") in ("caf\\udce9", "caf\u00e9")


class FullFile:
    """A file on a disk that becomes full in the middle of a write."""

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
        refuse(errno.ENOSPC)()


@pytest.mark.parametrize("failure", ["write", "fsync", "replace", "interrupt"])
@pytest.mark.parametrize("before", [None, b"as before"])
@each_way
def test_a_failure_in_the_middle_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, write, failure, before):
    path, opened = tmp_path / "a.json", open
    if before is not None:
        path.write_bytes(before)

    def interrupt(*args):
        raise KeyboardInterrupt

    if failure == "write":
        monkeypatch.setattr(files, "open", lambda *args: FullFile(opened(*args)), raising=False)
        monkeypatch.setattr(Path, "write_bytes", refuse(errno.ENOSPC))
    else:
        name, fails = ("fsync", interrupt) if failure == "interrupt" else (failure, refuse(errno.ENOSPC))
        monkeypatch.setattr(os, name, fails)
    with pytest.raises(KeyboardInterrupt if failure == "interrupt" else (BabyError, OSError)) as caught:
        write(path, b"new " * 1000)
    assert all_of(tmp_path) == (set() if before is None else {"a.json"})
    assert before is None or path.read_bytes() == before
    if isinstance(caught.value, BabyError):
        assert "a.json cannot be written (No space left on device); free some space" in str(caught.value)


@each_way
def test_the_data_is_synced_before_the_rename(tmp_path, monkeypatch, write):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write(tmp_path / "a", b"12345")
    assert order == [5, "replace"]


def test_files_written_by_libraries_have_the_default_mode(tmp_path):
    def private(path: Path) -> None:
        path.unlink()
        path.touch(0o600)

    files.write(tmp_path / "theirs", private)
    files.write(tmp_path / "ours", "x")
    assert (tmp_path / "theirs").stat().st_mode == (tmp_path / "ours").stat().st_mode


@pytest.mark.parametrize("locked", [True, False])
def test_a_file_is_locked_while_written_and_only_abandoned_ones_are_removed(tmp_path, locked):
    def pieces():
        (growing,) = tmp_path.iterdir()
        files.remove_unless_locked(growing)
        assert growing.exists()
        return [b"x"]

    if locked:
        files.write_pieces(tmp_path / "a", pieces)
    else:
        (tmp_path / "a").write_bytes(b"half")
        files.remove_unless_locked(tmp_path / "a")
    assert all_of(tmp_path) == ({"a"} if locked else set())


def test_a_missing_folder_is_made(tmp_path):
    files.write(tmp_path / "gone" / "b" / "a", "b")
    files.append_line(tmp_path / "lines" / "a.jsonl", {})
    assert all_of(tmp_path) == {"gone", "gone/b", "gone/b/a", "lines", "lines/a.jsonl"}


def test_a_folder_that_is_removed_repeatedly_is_created_again(tmp_path, monkeypatch):
    """As a failed run does with a folder that it created and that is still empty."""
    opened, replace, left = open, os.replace, {"open": 3, "replace": 2}

    def removed_before_open(path, mode):
        if left["open"]:
            left["open"] -= 1
            path.parent.rmdir()
        return opened(path, mode)

    def removed_before_replace(source, target):
        if left["replace"]:
            left["replace"] -= 1
            source.unlink()
            source.parent.rmdir()
        replace(source, target)

    monkeypatch.setattr(files, "open", removed_before_open, raising=False)
    monkeypatch.setattr(os, "replace", removed_before_replace)
    (tmp_path / "a").mkdir()
    files.append_line(tmp_path / "a" / "b.jsonl", {})
    files.write(tmp_path / "b" / "c", "c")
    assert all_of(tmp_path) == {"a", "a/b.jsonl", "b", "b/c"}


def test_a_file_in_place_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "b" / "a"):
        with pytest.raises(BabyError, match=r"cannot be written .*; a file exists where a folder is needed"):
            files.write(path, "b")
    assert all_of(tmp_path) == {"file"}


ADVICE = {
    errno.ENOSPC: "free some space on that disk, or name another place with --path",
    errno.EROFS: "name another place with --path",
    errno.EACCES: "check its permissions and those of its folders, or name another place with --path",
    errno.EMFILE: "too many files are open: raise the limit",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOLCK: "its file system may not support this, or name another place with --path",
    errno.EIO: "check the disk, or name another place with --path",
}


@pytest.mark.parametrize("code", ADVICE, ids=errno.errorcode.get)
def test_an_error_of_the_system_comes_with_advice(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "replace", refuse(code))
    with pytest.raises(BabyError) as caught:
        files.write(tmp_path / "a", "b", other="--path")
    assert f"cannot be written ({os.strerror(code)}); {ADVICE[code]}" in str(caught.value)
    with pytest.raises(BabyError) as caught:
        files.write(tmp_path / "a", "b")
    assert "--path" not in str(caught.value)


def test_json_is_written_in_plain_ascii(tmp_path):
    value = {"a": [1, 2.5, None, "caf\u00e9"], "b": {"c": True}}
    files.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_bytes()) == value
    assert (tmp_path / "a.json").read_bytes().isascii()


def test_lines_are_appended(tmp_path):
    for i in range(3):
        files.append_line(tmp_path / "a.jsonl", {"step": i, "text": "a\nb"})
    *lines, last = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    assert ([json.loads(line)["step"] for line in lines], last) == ([0, 1, 2], b"")
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(BabyError, match="cannot be written"):
        files.append_line(tmp_path / "b.jsonl", {})
