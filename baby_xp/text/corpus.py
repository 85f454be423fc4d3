"""Corpora: a text of any size as an array of ids, on disk where it was read from a file."""

import codecs
import errno
import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from baby_xp.errors import BabyError
from baby_xp.files import ATTEMPTS, absolute, make_folder, refusal, remove, remove_folders, shown, write_pieces
from baby_xp.text.statistics import Counter, Statistics
from baby_xp.text.tokenizer import START, Tokenizer, create, utf8

Making = Callable[[Iterator[str]], Tokenizer]
"""Makes a tokenizer from the chunks of a text."""
CHUNK = 1 << 18  # small enough for the cache: faster than 1 MiB, in a quarter of the memory
TRAIN_SHARE = 0.9
HASH_SIZE = hashlib.sha256().digest_size
IN_MEMORY = 1 << 27
"""Ids of up to this many bytes are read into memory, longer ones are memory-mapped. A mapped file takes no memory
of its own, but changes to it show here, and reading behind its end, if it was cut, kills the process (SIGBUS)."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as ids.

    ids           (n,) read-only; uint8, uint16 or int32, the smallest that holds the vocabulary.
    sha256        hex digest of the text in UTF-8, with newlines as \\n and no byte order mark.
    name          what to call the text when talking to the user.
    n_characters  length of the text; the ids may be more, as with bytes.
    statistics    paragraphs, sentences, words, characters.
    file          the path that the text was read from, or None.
    kept          the file of the ids, None if they are only in memory.
    """

    ids: np.ndarray
    tokenizer: Tokenizer
    sha256: str
    name: str
    n_characters: int
    statistics: Statistics
    file: Path | None = None
    kept: "KeptIds | None" = None

    def check(self) -> None:
        """Raises BabyError if the ids on disk were changed since they were opened: see KeptIds.check."""
        if self.kept is not None:
            self.kept.check()

    def discard(self) -> None:
        """Remove the ids from the disk if they were not there before."""
        if self.kept is not None:
            self.kept.discard()

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
        cache_folder: str | Path | None,
        sha256: str | None = None,
    ) -> "Corpus":
        """The corpus of a UTF-8 file of any size, its ids kept in a file in `cache_folder` unless that is None.

        `tokenizer` is a kind to make from this text ("char", "byte"), a tokenizer to use, or a function that makes
        one from the text's chunks. The text is read twice, in chunks: for its characters, counts and hash, then
        for its ids. A later call reuses that file; a damaged one is rewritten.
        Raises BabyError if the file cannot be read, is not UTF-8, is empty, has another hash than `sha256`, holds
        a character that the tokenizer does not know, or if the folder cannot be written; then nothing is left.
        """
        corpus = _build(lambda: read_text(path), shown(path), tokenizer, cache_folder, sha256)
        return replace(corpus, file=Path(absolute(path)))

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

        def chunks() -> Iterator[str]:
            return _normalised((text[i : i + CHUNK] for i in range(0, len(text), CHUNK)), name)

        return _build(chunks, name, tokenizer, cache_folder, sha256)


def read_text(path: str | Path, chunk_size: int = CHUNK) -> Iterator[str]:
    """The chunks of a UTF-8 file, read `chunk_size` bytes at a time.

    As in Python's text mode, \\r\\n and \\r become \\n, so that one text gives the same ids everywhere; a
    byte order mark at the start is dropped. Raises BabyError, when the first chunk is asked for, if there is
    no such file or it cannot be read; while reading if it is not UTF-8; at the end if it held nothing.
    """
    return _normalised(_decoded(_read_bytes(path, chunk_size), shown(path)), shown(path))


def text_hash(path: str | Path) -> str:
    """The sha256 of the corpus of a file. Raises BabyError as `read_text` does."""
    tally = _Tally(shown(path))
    for _ in tally.over(read_text(path)):
        pass
    return tally.sha256


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
    for _ in chunks:  # the chunks that were not read to make the tokenizer: all of them, or none
        pass
    if sha256 not in (None, tally.sha256):
        raise BabyError(
            f"{name} is no longer the text that the run was trained on: its SHA-256 was {sha256[:12]}... and is "
            f"now {tally.sha256[:12]}...; restore the original text, give its path with --data, or finetune "
            f"on the new one"
        )

    def encoded() -> Iterator[np.ndarray]:
        return _encoded(open_chunks(), tokenizer, name, tally.sha256)

    if cache_folder is None:
        ids, kept = np.concatenate(list(encoded())), None
        ids.flags.writeable = False
    else:
        # Every character is one token, or every byte.
        n_tokens = tally.n_bytes if tokenizer.kind == "byte" else tally.place.index
        kept = KeptIds(Path(cache_folder) / _file_name(tally.sha256, tokenizer), n_tokens, _dtype(tokenizer))
        ids = kept.ids(encoded)
    return Corpus(ids, tokenizer, tally.sha256, name, tally.place.index, counter.statistics, kept=kept)


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


class KeptIds:
    """The ids (n,) of a text in a file, and after them the SHA-256 of their bytes.

    The hash is checked when the file is opened. The ids of a long text are mapped, and may be read for the first
    time hours later: the size and time of the file then show whether to check it again.
    """

    def __init__(self, path: Path, n: int, dtype: np.dtype):
        self.path, self.n, self.dtype = path, n, dtype
        self.size = n * dtype.itemsize
        self.made = False
        """Whether this object wrote the file."""
        self._seen: tuple[int, ...] = ()

    def ids(self, encoded: Callable[[], Iterator[np.ndarray]]) -> np.ndarray:
        """The ids (n,), read-only; `encoded` makes them first, unless they are there whole and undamaged.

        Raises BabyError if they cannot be kept.
        """
        made: list[Path] = []
        try:
            make_folder(self.path.parent, made)
            for _ in range(ATTEMPTS):
                with suppress(FileNotFoundError):  # another process may empty the folder at any time
                    if (ids := self._opened()) is not None:
                        return ids
                    self._write(encoded)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        except BaseException as error:
            self.discard()
            remove_folders(made)
            if isinstance(error, OSError):
                raise refusal(self.path, error) from error
            raise

    def _opened(self) -> np.ndarray | None:
        """The ids from the file; None if it does not hold them."""
        if self.size > IN_MEMORY:
            if not self._is_whole():
                return None
            self._seen = _identity(self.path)
            return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.n,))
        try:
            with open(self.path, "rb") as file:
                data = memoryview(file.read(self.size + HASH_SIZE + 1))  # no more: the file may have any size
        except FileNotFoundError:
            return None
        ids, end = data[: self.size], data[self.size :]
        return np.frombuffer(ids, self.dtype) if hashlib.sha256(ids).digest() == end else None

    def check(self) -> None:
        """Raises BabyError if the file is mapped and was changed since; one that only looks changed is read again.

        A removed file is harmless: the mapping stays.
        """
        if not self._seen:
            return
        try:
            seen = _identity(self.path)
            if seen != self._seen and not self._is_whole():
                change = f"{shown(self.path)} was changed while it was in use"
                raise BabyError(f"{change}; it will be rewritten from the text the next time")
            self._seen = seen
        except FileNotFoundError:
            return
        except OSError as error:
            raise refusal(self.path, error, "read") from None

    def discard(self) -> None:
        """Remove the file if this object wrote it."""
        if self.made:
            remove(self.path)

    def _is_whole(self) -> bool:
        with suppress(FileNotFoundError), open(self.path, "rb") as file:
            size, found = self.size, hashlib.sha256()
            if os.fstat(file.fileno()).st_size != size + HASH_SIZE:
                return False
            while size:
                if not (piece := file.read(min(size, 1 << 20))):  # it was truncated in the meantime
                    return False
                found.update(piece)
                size -= len(piece)
            return file.read() == found.digest()
        return False

    def _write(self, encoded: Callable[[], Iterator[np.ndarray]]) -> None:
        def pieces() -> Iterator[memoryview | bytes]:
            found = hashlib.sha256()
            for ids in encoded():
                found.update(ids.data)
                yield ids.data
            yield found.digest()

        try:
            write_pieces(self.path, pieces)
            self.made = True
        except PermissionError:  # Windows cannot replace a file that another process has mapped
            if not self._is_whole():
                raise


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_bytes(path: str | Path, chunk_size: int) -> Iterator[bytes]:
    name = shown(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise BabyError(f"{name} is a folder; name a UTF-8 text file in it")
        if not stat.S_ISREG(mode):  # a pipe can be read once, but a corpus reads its text twice
            raise BabyError(f"{name} is not a regular file; save the text to a file and name that")
        with open(path, "rb") as file:
            while chunk := file.read(chunk_size):
                yield chunk
    except FileNotFoundError:
        raise BabyError(f"there is no file {name}; check the path") from None
    except OSError as error:
        raise refusal(path, error, "read") from None


def _decoded(chunks: Iterator[bytes], name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    end = 0
    try:
        for chunk in chunks:
            end += len(chunk)
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # error.object also holds the bytes of a character that began in the chunk before.
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
        raise BabyError(f"{name} is empty; give a text with at least one character")
