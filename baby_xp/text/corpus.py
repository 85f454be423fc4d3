"""Corpora: a text of any size as an array of ids, on disk where it was read from a file."""

import codecs
import hashlib
import io
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from baby_xp.errors import BabyError
from baby_xp.text.statistics import Counter, Statistics
from baby_xp.text.tokenizer import START, Tokenizer, create, utf8

Making = Callable[[Iterator[str]], Tokenizer]
"""Makes a tokenizer of the chunks of a text."""
CHUNK = 1 << 18  # a chunk and what is made of it stay in cache: faster than 1 MiB, in a quarter of the memory
TRAIN_SHARE = 0.9


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as ids.

    ids           (n,) read-only; uint8, uint16 or int32, the smallest that holds the vocabulary.
    sha256        hex digest of the text in UTF-8, after newlines became \\n and a byte order mark went.
    name          what to call the text when talking to the user.
    n_characters  length of the text; the ids may be more, as with bytes.
    statistics    paragraphs, sentences, words, characters.
    """

    ids: np.ndarray
    tokenizer: Tokenizer
    sha256: str
    name: str
    n_characters: int
    statistics: Statistics

    @property
    def train(self) -> np.ndarray:
        """The first 90 % of the ids."""
        return self.ids[: int(TRAIN_SHARE * len(self.ids))]

    @property
    def validation(self) -> np.ndarray:
        """The ids that are not trained on: the last 10 %."""
        return self.ids[int(TRAIN_SHARE * len(self.ids)) :]

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        tokenizer: str | Tokenizer | Making,
        cache_folder: str | Path,
        sha256: str | None = None,
    ) -> "Corpus":
        """The corpus of a UTF-8 file of any size, its ids memory-mapped from a file in `cache_folder`.

        `tokenizer` is a kind to make from this text ("char", "byte"), a tokenizer to use, or a function that
        makes one of the text's chunks. The text is read in chunks, twice: for its characters, counts and
        hash, then for its ids. A later call finds the ids there.
        Raises BabyError if the file cannot be read, is not UTF-8, is empty, has another hash than `sha256`,
        holds a character that the tokenizer does not know, or if the folder cannot be written; nothing is
        then left behind.
        """
        return _build(lambda: read_text(path), shown(path), tokenizer, cache_folder, sha256)

    @classmethod
    def from_text(
        cls,
        text: str,
        name: str,
        tokenizer: str | Tokenizer | Making,
        cache_folder: str | Path | None = None,
        sha256: str | None = None,
    ) -> "Corpus":
        """The corpus of a text; its ids stay in memory unless there is a folder. Otherwise as `from_file`."""

        def chunks():
            return _normalised((text[i : i + CHUNK] for i in range(0, len(text), CHUNK)), name)

        return _build(chunks, name, tokenizer, cache_folder, sha256)


def read_text(path: str | Path, chunk_size: int = CHUNK) -> Iterator[str]:
    """The chunks of a UTF-8 file, read `chunk_size` bytes at a time.

    As in Python's text mode, \\r\\n and \\r become \\n, so that one text gives the same ids everywhere; a
    byte order mark at the start is dropped. Raises BabyError, when the first chunk is asked for, if there is
    no such file or it cannot be read; on the way if it is not UTF-8; at the end if it held nothing.
    """
    return _normalised(_decoded(_read_bytes(path, chunk_size), shown(path)), shown(path))


def check_length(corpus: Corpus, n_ctx: int) -> None:
    """Raises BabyError unless training has a window of n_ctx with its target, and validation 2 tokens."""
    n, n_train, n_validation = len(corpus.ids), len(corpus.train), len(corpus.validation)
    if n_train >= n_ctx + 1 and n_validation >= 2:
        return
    needed = max(11, -(-10 * (n_ctx + 1) // 9))  # the least n whose two parts are long enough
    fitting = f", or a smaller --n-ctx, at most {n_train - 1}" if n_train >= 2 and n_validation >= 2 else ""
    raise BabyError(
        f"{corpus.name} is too short: of its {n} tokens {n_train} are for training, where --n-ctx {n_ctx} "
        f"needs {n_ctx + 1}, and {n_validation} for validation, which needs 2; "
        f"use a longer text, at least {needed} tokens{fitting}"
    )


def shown(path: str | Path) -> str:
    """A path as messages show it: on one line, and in characters that any terminal can print."""
    name = os.fspath(path)
    return name if name.isprintable() else repr(name)


class _Tally:
    """Counts and hashes the chunks that pass through it."""

    def __init__(self, name: str):
        self.name, self.hash, self.place, self.n_bytes = name, hashlib.sha256(), START, 0

    def over(self, chunks: Iterator[str]) -> Iterator[str]:
        for chunk in chunks:
            data = utf8(chunk, self.name, self.place)
            self.hash.update(data)
            self.n_bytes += len(data)
            yield chunk
            self.place = self.place.after(chunk)

    @property
    def sha256(self) -> str:
        return self.hash.hexdigest()


def _build(
    open_chunks: Callable[[], Iterator[str]],
    name: str,
    tokenizer: str | Tokenizer | Making,
    cache_folder: str | Path | None,
    sha256: str | None,
) -> Corpus:
    tally, counter = _Tally(name), Counter()
    chunks = counter.over(tally.over(open_chunks()))
    if isinstance(tokenizer, str):
        tokenizer = create(tokenizer, chunks)
    elif callable(tokenizer):
        tokenizer = tokenizer(chunks)
    for _ in chunks:  # those that making the tokenizer left: all of them, or none
        pass
    if sha256 not in (None, tally.sha256):
        raise BabyError(
            f"{name} is no longer the text that the run was trained on: its SHA-256 was {sha256[:12]}... and is "
            f"now {tally.sha256[:12]}...; bring the old text back, name it with --data, or finetune on the new one"
        )
    encoded = _encoded(open_chunks(), tokenizer, name, tally.sha256)
    if cache_folder is None:
        ids = np.concatenate(list(encoded))
        ids.flags.writeable = False
    else:
        # Every character is one token, or every byte.
        n_tokens = tally.n_bytes if tokenizer.kind == "byte" else tally.place.index
        path = Path(cache_folder) / _file_name(tally.sha256, tokenizer)
        ids = _cached(encoded, n_tokens, _dtype(tokenizer), path)
    return Corpus(ids, tokenizer, tally.sha256, name, tally.place.index, counter.statistics)


def _encoded(chunks: Iterator[str], tokenizer: Tokenizer, name: str, sha256: str) -> Iterator[np.ndarray]:
    """The ids of each chunk. Raises BabyError at the end if the text is no longer the one that was hashed."""
    tally, dtype = _Tally(name), _dtype(tokenizer)
    for chunk in tally.over(chunks):
        yield tokenizer.encode(chunk, name, tally.place).astype(dtype)
    if tally.sha256 != sha256:
        raise BabyError(f"{name} changed while it was being read; start again when it is complete")


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    size = tokenizer.vocab_size
    # Little-endian, so that a cache folder may be shared between machines.
    return np.dtype("u1" if size <= 2**8 else "<u2" if size <= 2**16 else "<i4")


def _file_name(sha256: str, tokenizer: Tokenizer) -> str:
    key = sha256 + json.dumps(tokenizer.to_dict(), sort_keys=True)
    return hashlib.sha256(key.encode("ascii")).hexdigest() + ".ids"


def _cached(encoded: Iterator[np.ndarray], n_tokens: int, dtype: np.dtype, path: Path) -> np.ndarray:
    """The ids (n_tokens,) mapped from `path`, which is written first unless it is there in full."""
    try:
        if not _has_size(path, n_tokens * dtype.itemsize):
            with _folder(path.parent):
                _write(encoded, path, n_tokens * dtype.itemsize)
        return np.memmap(path, dtype=dtype, mode="r", shape=(n_tokens,))
    except OSError as error:
        raise BabyError(
            f"the ids of the text cannot be kept in {shown(path.parent)} ({_reason(error)}); "
            "name a folder that can be written, or make room there"
        ) from error


def _write(encoded: Iterator[np.ndarray], path: Path, size: int) -> None:
    # A name of its own for each writer: two that build the same cache at once both succeed.
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            for ids in encoded:
                file.write(ids.data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
        except PermissionError:  # Windows does not replace a file that another process has mapped
            if not _has_size(path, size):
                raise
    finally:
        with suppress(OSError):  # it is gone after the rename
            temporary.unlink()


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Makes the folder; on failure removes again what was made, unless somebody put something there."""
    missing = [ancestor for ancestor in (folder, *folder.parents) if not ancestor.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for ancestor in missing:
            with suppress(OSError):
                ancestor.rmdir()
        raise


def _read_bytes(path: str | Path, chunk_size: int) -> Iterator[bytes]:
    name = shown(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise BabyError(f"{name} is a folder; name a UTF-8 text file in it")
        if not stat.S_ISREG(mode):  # a pipe gives its text once, and a corpus reads it twice
            raise BabyError(f"{name} is not a regular file; save the text to a file and name that")
        with open(path, "rb") as file:
            while chunk := file.read(chunk_size):
                yield chunk
    except FileNotFoundError:
        raise BabyError(f"there is no file {name}; check the path") from None
    except OSError as error:
        raise BabyError(f"{name} cannot be read ({_reason(error)}); check its permissions") from error


def _decoded(chunks: Iterator[bytes], name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    end = 0
    try:
        for chunk in chunks:
            end += len(chunk)
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # The decoder saw the chunk with the bytes of a character that the chunk before had begun.
        offset = end - len(error.object) + error.start
        raise BabyError(
            f"{name} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset} "
            f"({error.reason}); save it as UTF-8"
        ) from None


def _normalised(chunks: Iterator[str], name: str) -> Iterator[str]:
    """The chunks without byte order mark, \\r and empty chunks. Raises BabyError if none is left."""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    at_start = empty = True
    for chunk in chunks:
        if at_start and chunk:
            chunk, at_start = chunk.removeprefix("\ufeff"), False
        if chunk := newlines.decode(chunk):
            empty = False
            yield chunk
    if last := newlines.decode("", final=True):  # a \r at the very end
        yield last
    elif empty:
        raise BabyError(f"{name} is empty; give a text to learn from")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
