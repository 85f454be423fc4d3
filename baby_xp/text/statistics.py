"""Counts of a text, chunk by chunk: paragraphs, sentences, words, characters."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PARAGRAPH = re.compile(r"\S.*")  # a line from its first character that is not whitespace; "." matches no newline
END = re.compile(r"[.!?]+")


@dataclass(frozen=True)
class Statistics:
    """The counts of a text. A line ends only at \\n; whitespace is what `str.isspace` says.

    paragraphs  lines that hold something other than whitespace.
    sentences   ends of sentences: runs of the marks . ! ? with nothing between them, so that "What?!" and
                "Well..." end one each, and so do "Mr." and the point of "3.14"; a sentence without a mark at
                its end does not count.
    words       longest runs of characters that are not whitespace, as `str.split` finds them.
    characters  all characters but newlines.
    newlines    how many \\n there are; with the characters, the length of the text.

    The first four are what the original Little Baby states for its Shakespeare: 32777, 12519, 202651, 1075394. It
    does not say how it counted; in that text no two marks are adjacent, so counting single marks gives the same.
    """

    paragraphs: int
    sentences: int
    words: int
    characters: int
    newlines: int


class Counter:
    """Counts a text chunk by chunk, in the memory of one chunk; how it is cut changes nothing."""

    def __init__(self) -> None:
        self.paragraphs = self.sentences = self.words = self.length = self.newlines = 0
        # The end of the text so far. It is already counted, although the next chunk may continue it.
        self.in_paragraph = self.in_end = self.in_word = False

    def over(self, chunks: Iterable[str]) -> Iterator[str]:
        """The chunks, counted as they pass."""
        for chunk in chunks:
            if chunk:
                self._add(chunk)
            yield chunk

    def _add(self, chunk: str) -> None:
        line, newline, _ = chunk.partition("\n")
        self.paragraphs += len(PARAGRAPH.findall(chunk)) - (self.in_paragraph and _holds_text(line))
        self.sentences += len(END.findall(chunk)) - (self.in_end and chunk[0] in ".!?")
        self.words += len(chunk.split()) - (self.in_word and not chunk[0].isspace())
        self.length += len(chunk)
        self.newlines += chunk.count("\n")
        self.in_paragraph = _holds_text(chunk[chunk.rfind("\n") + 1 :]) or (self.in_paragraph and not newline)
        self.in_end = chunk[-1] in ".!?"
        self.in_word = not chunk[-1].isspace()

    @property
    def statistics(self) -> Statistics:
        """The counts so far."""
        characters = self.length - self.newlines
        return Statistics(self.paragraphs, self.sentences, self.words, characters, self.newlines)


def _holds_text(piece: str) -> bool:
    return piece != "" and not piece.isspace()
