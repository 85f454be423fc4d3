"""Texts of any size become ids on disk: the same ids everywhere, in bounded memory, and no incomplete files."""

import errno
import hashlib
import os
import subprocess
import sys
import tracemalloc
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from baby_xp.errors import BabyError
from baby_xp.text.corpus import Corpus, check_length, read_text
from baby_xp.text.tokenizer import ByteTokenizer, CharTokenizer

NAMES = count()
quick = settings(max_examples=60, deadline=None)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all the examples that hypothesis makes; `write` gives each its own name."""
    return tmp_path_factory.mktemp("texts")


def write(folder: Path, data: bytes) -> Path:
    path = folder / f"text{next(NAMES)}.txt"
    path.write_bytes(data)
    return path


def message_of(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert "; " in message, f"no remedy in {message!r}"
    return message


def first_bad_byte(data: bytes) -> int | None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


# Reading


@quick
@given(st.text("ab\r\né€\U0001f600\ufeff", min_size=1), st.integers(1, 9))
def test_reading_equals_pythons_text_mode_at_every_chunk_size(folder, text, chunk_size):
    assume(text != "\ufeff")
    path = write(folder, text.encode())
    chunks = list(read_text(path, chunk_size))
    with open(path, encoding="utf-8-sig") as file:
        assert "".join(chunks) == file.read()
    assert all(chunks)


@quick
@given(st.text("aé€\U0001f600\n", max_size=20), st.binary(min_size=1, max_size=8), st.integers(1, 9))
def test_the_first_bad_byte_is_named_at_every_chunk_size(folder, text, tail, chunk_size):
    data = text.encode() + tail
    path = write(folder, data)
    bad = first_bad_byte(data)
    assume(bad is not None)
    with pytest.raises(BabyError) as error:
        list(read_text(path, chunk_size))
    assert f"byte 0x{data[bad]:02x} at offset {bad} " in message_of(error)
    assert str(path) in message_of(error)


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, data):
    path = write(tmp_path, data)
    with pytest.raises(BabyError, match="is empty") as error:
        list(read_text(path))
    assert str(path) in message_of(error)


def test_a_missing_file_a_folder_and_a_pipe_have_different_errors(tmp_path):
    for path, said in [
        (tmp_path / "none\n.txt", "there is no file"),
        (tmp_path, "is a folder"),
        (Path(os.devnull), "is not a regular file"),
        (write(tmp_path, b"a") / "below", "cannot be read" if os.name != "nt" else "there is no file"),
    ]:
        with pytest.raises(BabyError, match=said) as error:
            list(read_text(path))
        assert repr(path.name)[1:-1] in message_of(error)


# Corpora


@quick
@given(TEXT, st.sampled_from(["char", "byte"]))
def test_a_file_and_its_text_give_the_same_corpus(folder, text, kind):
    assume(not text.startswith("\ufeff"))
    path = write(folder, text.encode())
    from_file = Corpus.from_file(path, kind, folder / "cache")
    from_text = Corpus.from_text(text, "a name", kind)
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    for corpus in (from_file, from_text):
        assert corpus.tokenizer.decode(corpus.ids) == plain
        assert corpus.sha256 == hashlib.sha256(plain.encode()).hexdigest()
        assert corpus.n_characters == len(plain)
        assert corpus.ids.dtype == np.uint8
        assert not corpus.ids.flags.writeable
    assert from_file.tokenizer == from_text.tokenizer
    assert (from_file.name, from_text.name) == (str(path), "a name")


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "i4")]
)
def test_ids_have_the_smallest_type_that_holds_them(tmp_path, vocab_size, dtype):
    tokenizer = CharTokenizer([chr(0x20000 + i) for i in range(vocab_size)])
    text = tokenizer.vocab[-1] + tokenizer.vocab[0]
    for folder in (None, tmp_path):
        corpus = Corpus.from_text(text, "text", tokenizer, folder)
        assert corpus.ids.dtype == np.dtype(dtype)
        assert corpus.ids.tolist() == [vocab_size - 1, 0]


def test_the_split_equals_the_originals():
    text = "abcdefghijklm" * 7
    corpus = Corpus.from_text(text, "text", "char")
    n = int(0.9 * len(text))
    assert corpus.tokenizer.decode(corpus.train) == text[:n]
    assert corpus.tokenizer.decode(corpus.validation) == text[n:]


def test_many_chunks_are_one_text(tmp_path, monkeypatch):
    monkeypatch.setattr("baby_xp.text.corpus.CHUNK", 7)
    monkeypatch.setattr("baby_xp.text.corpus.read_text", lambda path: read_text(path, 7))
    text = "To be, or not to be:\r\nthat is the question \U0001f600\n" * 5
    path = write(tmp_path, text.encode())
    for corpus in (Corpus.from_file(path, "char", tmp_path), Corpus.from_text(text, "text", "char")):
        assert corpus.tokenizer.decode(corpus.ids) == text.replace("\r\n", "\n")


def test_ids_are_written_once_and_many_are_memory_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr("baby_xp.text.corpus.IN_MEMORY", 0)
    path, cache = write(tmp_path, b"to be or not to be"), tmp_path / "new" / "cache"
    first = Corpus.from_file(path, "char", cache)
    (file,) = cache.iterdir()
    assert isinstance(first.ids, np.memmap)
    assert file.suffix == ".ids"
    data = first.ids.tobytes()
    assert file.read_bytes() == data + hashlib.sha256(data).digest()
    written = file.stat().st_mtime_ns, file.stat().st_ino
    monkeypatch.setattr("baby_xp.text.corpus.IN_MEMORY", 1000)
    again = Corpus.from_text("to be or not to be", "the same text", first.tokenizer, cache)
    assert not isinstance(again.ids, np.memmap)
    assert not again.ids.flags.writeable
    assert again.ids.tolist() == first.ids.tolist()
    assert list(cache.iterdir()) == [file]
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == written


def test_another_tokenizer_has_another_file(tmp_path):
    path, cache = write(tmp_path, b"abab"), tmp_path / "cache"
    assert Corpus.from_file(path, CharTokenizer("ab"), cache).ids.tolist() == [0, 1, 0, 1]
    assert Corpus.from_file(path, CharTokenizer("ba"), cache).ids.tolist() == [1, 0, 1, 0]
    assert Corpus.from_file(path, ByteTokenizer(), cache).ids.tolist() == list(b"abab")
    assert len(list(cache.iterdir())) == 3


@pytest.mark.slow
def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("baby_xp.text.corpus.IN_MEMORY", 1_000_000)
    line = "It was the best of times, it was the worst of times, “it was” the age of wisdom;\n"
    path = write(tmp_path, line.encode() * (20_000_000 // len(line.encode())))
    tracemalloc.start()
    try:
        corpus = Corpus.from_file(path, "char", tmp_path / "cache")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert corpus.n_characters == len(corpus.ids) > 19_000_000
    assert peak < 8_000_000


# Failures leave nothing behind


def test_an_unknown_character_is_located_in_the_whole_file(tmp_path, monkeypatch):
    path, cache = write(tmp_path, b"aab\nabb\nba?b\n"), tmp_path / "new" / "cache"
    monkeypatch.setattr("baby_xp.text.corpus.read_text", lambda path: read_text(path, 4))
    with pytest.raises(BabyError) as error:
        Corpus.from_file(path, CharTokenizer("ab\n"), cache)
    assert message_of(error).startswith(f"{path}: '?' (U+003F) at index 10 (line 3, column 3) ")
    assert not cache.parent.exists()


def test_a_failure_keeps_earlier_files(tmp_path):
    path, cache = write(tmp_path, b"abc"), tmp_path / "cache"
    Corpus.from_file(path, "char", cache)
    before = list(cache.iterdir())
    with pytest.raises(BabyError):
        Corpus.from_file(path, CharTokenizer("ab"), cache)
    assert list(cache.iterdir()) == before


@pytest.mark.parametrize("call", ["builtins.open", "read again", "os.fsync", "os.replace", "pathlib.Path.mkdir"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_nothing(tmp_path, monkeypatch, call, error):
    path, cache, plain_open = write(tmp_path, b"abc"), tmp_path / "new" / "cache", open

    def fail(*arguments, **_):
        is_meant = {"builtins.open": ("xb",), "read again": ("rb",)}.get(call, arguments[1:2]) == arguments[1:2]
        if not is_meant or (call == "read again" and not os.path.exists(cache)) or arguments[0] == path:
            return plain_open(*arguments)
        raise error

    monkeypatch.setattr("builtins.open" if call == "read again" else call, fail)
    with pytest.raises((BabyError, KeyboardInterrupt)) as caught:
        Corpus.from_file(path, "char", cache)
    assert list(tmp_path.iterdir()) == [path]
    if isinstance(error, OSError):
        assert f"{cache}" in message_of(caught)
        assert "No space left on device" in message_of(caught)


def test_a_file_where_the_folder_should_be(tmp_path):
    path = write(tmp_path, b"abc")
    for cache in (path, path / "cache"):
        with pytest.raises(BabyError) as error:
            Corpus.from_file(path, "char", cache)
        assert str(cache) in message_of(error)
    assert path.read_bytes() == b"abc"


@pytest.mark.parametrize("later", ["ab", "bbb", "a?b", None])
def test_a_text_that_changes_between_the_passes(tmp_path, monkeypatch, later):
    path, cache = write(tmp_path, b"aab"), tmp_path / "cache"
    reads = count()

    def change_then_read(path):
        if next(reads) == 1:
            path.unlink() if later is None else path.write_text(later)
        yield from read_text(path)

    monkeypatch.setattr("baby_xp.text.corpus.read_text", change_then_read)
    with pytest.raises(BabyError) as error:
        Corpus.from_file(path, "char", cache)
    assert str(path) in message_of(error)
    assert not cache.exists()


@pytest.mark.parametrize("text", ["", "ab\udc9f"])
@pytest.mark.parametrize("tokenizer", ["char", "byte", CharTokenizer("ab")])
def test_a_text_that_cannot_be_a_corpus_is_refused(tmp_path, text, tokenizer):
    with pytest.raises(BabyError) as error:
        Corpus.from_text(text, "the story", tokenizer, tmp_path / "cache")
    assert message_of(error).startswith("the story")
    assert not (tmp_path / "cache").exists()


# Two processes at once


def test_another_process_may_write_the_ids_first(tmp_path, monkeypatch):
    """As on Windows, where a file that another process has mapped cannot be replaced."""
    path, cache = write(tmp_path, b"abcabc"), tmp_path / "cache"

    def late(source, target):
        Path(target).write_bytes(Path(source).read_bytes())
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr("os.replace", late)
    assert Corpus.from_file(path, "char", cache).ids.tolist() == [0, 1, 2] * 2
    assert [file.suffix for file in cache.iterdir()] == [".ids"]


def test_two_processes_build_the_same_corpus(tmp_path):
    path = write(tmp_path, b"to be or not to be\n" * 50_000)
    program = (
        "import sys; from baby_xp.text.corpus import Corpus; print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(int(Corpus.from_file(sys.argv[1], 'char', sys.argv[2]).ids.sum()))"
    )
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as two:
        for process in (one, two):
            assert process.stdout.readline() == "ready\n"
        for process in (one, two):
            process.stdin.write("go\n")
            process.stdin.flush()
        sums = [int(process.communicate(timeout=60)[0]) for process in (one, two)]
    assert sums == [int(Corpus.from_file(path, "char", tmp_path / "cache").ids.sum())] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


# Length


def fits(n: int, n_ctx: int) -> bool:
    try:
        check_length(Corpus.from_text("a" * n, "the story", "char"), n_ctx)
    except BabyError:
        return False
    return True


@quick
@given(st.integers(1, 300), st.integers(1, 300))
def test_a_corpus_is_long_enough_for_both_parts(n, n_ctx):
    assert fits(n, n_ctx) == (int(0.9 * n) >= n_ctx + 1 and n - int(0.9 * n) >= 2)


@quick
@given(st.integers(2, 400))
def test_the_error_for_a_short_text_names_the_length_it_needs(n_ctx):
    with pytest.raises(BabyError) as error:
        check_length(Corpus.from_text("a" * n_ctx, "the story", "char"), n_ctx)
    message = message_of(error)
    assert message.startswith(f"the story is too short: of its {n_ctx} tokens")
    needed = int(message.split("at least ")[1].split(" ")[0])
    assert fits(needed, n_ctx)
    assert not fits(needed - 1, n_ctx)
    if "at most" in message:
        largest = int(message.split("at most ")[1])
        assert fits(n_ctx, largest)
        assert not fits(n_ctx, largest + 1)
    else:
        assert not fits(n_ctx, 1)
