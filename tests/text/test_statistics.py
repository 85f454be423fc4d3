"""The counts of a text match simple definitions, wherever the text is cut into chunks."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baby_xp.text.corpus import read_text
from baby_xp.text.statistics import Counter, Statistics

quick = settings(max_examples=100, deadline=None)
# Letters, marks, and whitespace that ends a line elsewhere (\r, \x0b, U+2028) or looks like none (U+00A0).
TEXT = st.text("aé.!?' \n\t\r\x0b\u2028\u00a0", max_size=40)


def count(chunks) -> Statistics:
    counter = Counter()
    for _ in counter.over(chunks):
        pass
    return counter.statistics


def by_definition(text: str) -> Statistics:
    single = re.sub(r"[.!?]+", ".", text)
    return Statistics(
        paragraphs=sum(1 for line in text.split("\n") if line.strip()),
        sentences=single.count("."),
        words=len(text.split()),
        characters=len([character for character in text if character != "\n"]),
        newlines=text.count("\n"),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Statistics(0, 0, 0, 0, 0)),
        ("\n", Statistics(0, 0, 0, 0, 1)),
        (" \n\t\n", Statistics(0, 0, 0, 2, 2)),
        ("First Citizen:\nSpeak, speak.\n", Statistics(2, 1, 4, 27, 2)),
        ("First Citizen:\nSpeak, speak.", Statistics(2, 1, 4, 27, 1)),
        ("one\n\n\ntwo", Statistics(2, 0, 2, 6, 3)),
        ("What?! Well... Yes. No", Statistics(1, 3, 4, 22, 0)),
        (". . .", Statistics(1, 3, 3, 5, 0)),
        (".\n.", Statistics(2, 2, 2, 2, 1)),
        ("Mr. Pi is 3.14 -- he", Statistics(1, 2, 6, 20, 0)),
        ("a\r\nb\u2028c\u00a0d", Statistics(2, 0, 4, 7, 1)),
    ],
)
def test_cases_worked_out_by_hand(text, expected):
    assert count([text]) == expected


@quick
@given(st.lists(TEXT, max_size=8))
def test_the_counts_match_the_definitions_at_every_chunking(chunks):
    text = "".join(chunks)
    counts = count(iter(chunks))
    assert counts == count([text]) == count(text) == by_definition(text)  # a string is its characters
    assert counts.characters + counts.newlines == len(text)


@pytest.mark.parametrize("chunk_size", [1 << 18, 997, 64])
def test_shakespeare_has_the_originals_counts(data_folder, chunk_size):
    counts = count(read_text(data_folder / "shakespeare.txt", chunk_size))
    # The original's file lacks the last of the newlines, and none of its four counts depends on it.
    assert counts == Statistics(32777, 12519, 202651, 1075394, newlines=40000)
