"""Tokenizers: a text becomes an array of ids and comes back. Ids are int32 arrays of shape (T,)."""

import codecs
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from baby_xp.errors import BabyError

N_CODE_POINTS = 0x110000
KINDS = ("char", "byte")


@dataclass(frozen=True)
class Place:
    """A place in a text: `index` in characters from 0, `line` and `column` from 1."""

    index: int = 0
    line: int = 1
    column: int = 1

    def after(self, text: str) -> "Place":
        """The place that follows `text`, if `text` begins here."""
        last_newline = text.rfind("\n")
        column = self.column + len(text) if last_newline < 0 else len(text) - last_newline
        return Place(self.index + len(text), self.line + text.count("\n"), column)


START = Place()


class Tokenizer(Protocol):
    """The interface of a tokenizer.

    `encode` maps each character on its own, so a text may be encoded piece by piece; `start` is where the
    piece begins in the whole text, and only error messages use it.
    """

    @property
    def kind(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, where: str = "text", start: Place = START) -> np.ndarray: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class CharTokenizer:
    """One id for each character of `vocab`, in that order.

    Raises BabyError if `vocab` is empty, or an entry is not one character or occurs twice.
    """

    vocab: Sequence[str]
    kind: ClassVar[str] = "char"

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab", _checked_vocab(self.vocab, "the vocabulary"))

    @classmethod
    def from_text(cls, text: str | Iterable[str]) -> "CharTokenizer":
        """The tokenizer of a text, or of its chunks: its characters, sorted by code point."""
        return cls(_characters_in(text))

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def encode(self, text: str, where: str = "text", start: Place = START) -> np.ndarray:
        """The ids of a text's characters, int32 (T,). `where` names the text in errors: "prompt", a path.

        Raises BabyError for a character that is not in the vocabulary, with its place.
        """
        ids = np.take(self._id_of, _code_points(text), mode="clip")       # (T,)
        if ids.size and ids.min() < 0:
            described = _character_at(text, int(np.argmax(ids < 0)), start)
            raise BabyError(
                f"{where}: {described} is not among the {self.vocab_size} characters that the tokenizer "
                "knows; remove or replace it, or use a tokenizer made from a text that holds it"
            )
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids (T,). Raises BabyError for an id out of range."""
        return self._code_point_of[_checked_ids(ids, self.vocab_size)].tobytes().decode("utf-32-le")

    def extended(self, characters: Iterable[str]) -> "CharTokenizer":
        """A tokenizer that knows these characters too. New ones come last, sorted: old ids stay valid."""
        return CharTokenizer((*self.vocab, *sorted(set(characters).difference(self.vocab))))

    def to_dict(self) -> dict[str, Any]:
        """What a tokenizer file holds; `tokenizer_from_dict` reads it back."""
        return {"kind": self.kind, "vocab": list(self.vocab), "vocab_size": self.vocab_size}

    @cached_property
    def _code_point_of(self) -> np.ndarray:
        return _code_points("".join(self.vocab))                          # (vocab_size,)

    @cached_property
    def _id_of(self) -> np.ndarray:
        # The entry after the highest code point stands for all higher ones: `take` clips to it.
        table = np.full(int(self._code_point_of.max()) + 2, -1, dtype=np.int32)
        table[self._code_point_of] = np.arange(self.vocab_size, dtype=np.int32)
        return table


@dataclass(frozen=True)
class ByteTokenizer:
    """One id for each byte of the text in UTF-8: 256 ids, and no character is unknown."""

    kind: ClassVar[str] = "byte"
    vocab_size: ClassVar[int] = 256

    def encode(self, text: str, where: str = "text", start: Place = START) -> np.ndarray:
        """The bytes of a text, int32 (T,). Raises BabyError for a lone surrogate, which has no bytes."""
        return np.frombuffer(utf8(text, where, start), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids (T,). Raises BabyError for an id out of range.

        Bytes that are not UTF-8 become U+FFFD: a generated text may stop inside a character.
        """
        return _checked_ids(ids, self.vocab_size).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """What a tokenizer file holds; `tokenizer_from_dict` reads it back."""
        return {"kind": self.kind, "vocab_size": self.vocab_size}


def create(kind: str, chunks: str | Iterable[str]) -> Tokenizer:
    """The tokenizer of a kind, "char" or "byte", for a text or its chunks ("byte" does not read them).

    Raises BabyError if the kind is unknown or a "char" tokenizer finds no character.
    """
    _check_kind(kind, "the tokenizer")
    return ByteTokenizer() if kind == "byte" else CharTokenizer.from_text(chunks)


def tokenizer_from_dict(d: Any, where: str) -> Tokenizer:
    """The tokenizer that `to_dict` described, or the original Little Baby's {"vocab", "vocab_size"}.

    `where` names the source in errors, a path as a rule. Raises BabyError for anything but a whole tokenizer.
    """
    if not isinstance(d, dict):
        raise BabyError(f"{where}: a tokenizer is a JSON object, not {reprlib.repr(d)}; {_REMEDY}")
    kind = d.get("kind", "char")
    _check_kind(kind, where)
    tokenizer: Tokenizer = ByteTokenizer()
    if kind == "char":
        if not isinstance(d.get("vocab"), list):
            entry = reprlib.repr(d.get("vocab"))
            raise BabyError(f'{where}: "vocab" is {entry}, not a list of characters; {_REMEDY}')
        tokenizer = CharTokenizer(_checked_vocab(d["vocab"], where))
    size, n_ids = d.get("vocab_size", tokenizer.vocab_size), tokenizer.vocab_size
    if type(size) is not int or size != n_ids:
        raise BabyError(f'{where}: "vocab_size" is {reprlib.repr(size)} but there are {n_ids} ids; {_REMEDY}')
    return tokenizer


def first_ids(tokenizer: Tokenizer) -> np.ndarray:
    """The ids that generation starts from without a prompt: a newline, or id 0 if the tokenizer has none."""
    try:
        return tokenizer.encode("\n", "prompt")
    except BabyError:
        return np.zeros(1, np.int32)


def utf8(text: str, where: str = "text", start: Place = START) -> bytes:
    """The text in UTF-8. Raises BabyError for a lone surrogate, with its place."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BabyError(
            f"{where}: {_character_at(text, error.start, start)} is one half of a surrogate pair, "
            "not a character; remove it, or see that the text is given as UTF-8"
        ) from None


_REMEDY = "give the tokenizer that was saved with the model"


def _code_points(text: str) -> np.ndarray:
    # "surrogatepass": a lone surrogate (from a command line that is not UTF-8) is reported like any other
    # unknown character. Signed, because NumPy's indices are.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<i4")  # (T,)


def _characters_in(text: str | Iterable[str]) -> list[str]:
    seen = np.zeros(N_CODE_POINTS, dtype=bool)
    for chunk in [text] if isinstance(text, str) else text:
        seen[_code_points(chunk)] = True
    return [chr(code_point) for code_point in np.flatnonzero(seen)]


def _character_at(text: str, index: int, start: Place) -> str:
    place = start.after(text[:index])
    line = f" (line {place.line}, column {place.column})" if start.line > 1 or "\n" in text else ""
    return f"{text[index]!r} (U+{ord(text[index]):04X}) at index {place.index}{line}"


def _checked_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size == 0:
        return np.zeros(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise BabyError(
            f"ids of shape {ids.shape} and type {ids.dtype} cannot be decoded; give a 1-D integer array"
        )
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        index = int(np.argmax(outside))
        raise BabyError(
            f"id {ids[index]} at index {index} is outside the tokenizer's 0 to {vocab_size - 1}; "
            "use the tokenizer that was saved with the model"
        )
    return ids


def _checked_vocab(vocab: Sequence[Any], where: str) -> tuple[str, ...]:
    if len(vocab) == 0:
        raise BabyError(f"{where}: no characters at all; a tokenizer needs a text that is not empty")
    seen: set[str] = set()
    for index, entry in enumerate(vocab):
        if not isinstance(entry, str) or len(entry) != 1:
            raise BabyError(f"{where}: vocab[{index}] is {reprlib.repr(entry)}, not one character; {_REMEDY}")
        if "\ud800" <= entry <= "\udfff":
            raise BabyError(f"{where}: vocab[{index}] is {entry!r}, one half of a surrogate pair; {_REMEDY}")
        if entry in seen:
            raise BabyError(f"{where}: vocab[{index}], {entry!r} (U+{ord(entry):04X}) is a repeat; {_REMEDY}")
        seen.add(entry)
    return tuple(vocab)


def _check_kind(kind: Any, where: str) -> None:
    if not isinstance(kind, str) or kind not in KINDS:
        choices = ", ".join(KINDS)
        raise BabyError(f"{where}: {reprlib.repr(kind)} is not a kind of tokenizer; choose one of: {choices}")


def decoded(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Decode ids one by one as they come; bytes wait until their character is whole."""
    if tokenizer.kind != "byte":
        yield from (tokenizer.decode([token]) for token in ids)
        return
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        if piece := decoder.decode(bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
