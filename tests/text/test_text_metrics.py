"""Shares of a generated text that occur in the training text match simple definitions, at every chunking."""

import tracemalloc
from itertools import repeat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baby_xp.text.corpus import read_text
from baby_xp.text.text_metrics import copied_ngrams, known_words

quick = settings(max_examples=100, deadline=None)
# Two letters in both cases, one that folds to two, marks and symbols inside and around words, whitespace.
WORDY = st.text("aAbß.-“€ \n", max_size=30)
BARE = st.text("ab ", max_size=30)
CHUNKS = st.lists(WORDY, max_size=8)


def plain_words(text: str) -> list[str]:
    return [word for piece in text.split() if (word := piece.strip(".-“€").casefold())]


def known_by_definition(generated: str, training: str) -> float | None:
    if generated.split() and generated.rstrip() == generated:
        generated = generated[: generated.rindex(generated.split()[-1])]
    words, known = plain_words(generated), plain_words(training)
    return sum(word in known for word in words) / len(words) if words else None


def copied_by_definition(generated: str, training: str, n: int) -> float | None:
    grams = [generated[i : i + n] for i in range(len(generated) - n + 1)]
    return sum(gram in training for gram in grams) / len(grams) if grams else None


def chunks_then_fail(*chunks: str):
    yield from chunks
    pytest.fail("the training text was read on when everything was found")


# Words


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("to be or not to be.\n", 1.0),
        ("to be or not to flee\n", 5 / 6),
        ("zounds zounds zounds to ", 1 / 4),  # repeats count
        ("TO Be, “or” (not)! ", 1.0),
        ("to -- ... & be ", 1.0),  # punctuation alone is not a word
        ("not-to be ", 1 / 2),  # punctuation inside a word belongs to it
        ("to be or no", 1.0),  # the last one may be cut off
        ("to be or no\n", 3 / 4),  # here it is not cut off
        ("o be ", 1 / 2),  # the first one counts
        ("to be --", 1.0),  # the last one is ignored in any case
        ("to", None),
        ("", None),
        (" \n ", None),
        ("-- ... ", None),
    ],
)
def test_known_words_by_hand(generated, expected):
    assert known_words(generated, ["To be, or not", " to be: that is the question"]) == expected


def test_case_folding_is_not_lower_case():
    assert known_words("STRASSE Straße ", ["die straße"]) == 1.0


@quick
@given(WORDY, CHUNKS)
def test_known_words_match_the_definition_at_every_chunking(generated, chunks):
    text = "".join(chunks)
    expected = known_by_definition(generated, text)
    assert known_words(generated, chunks) == known_words(generated, text) == expected
    assert expected is None or 0 <= expected <= 1


@pytest.mark.parametrize("filler", ["x", ".", "thou"])
def test_a_text_without_whitespace_is_not_kept(filler):
    """One very long word is neither kept nor searched again with every chunk."""
    chunk = filler * 1000
    tracemalloc.start()
    try:
        share = known_words("thou art ", (text for part in (["thou"], repeat(chunk, 100), [" "]) for text in part))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert share == (1 / 2 if filler == "." else 0)
    assert peak < 60_000


# Sequences of characters


@pytest.mark.parametrize(
    ("generated", "n", "expected"),
    [
        ("question", 8, 1.0),
        ("questing", 8, 0.0),
        ("a question", 8, 2 / 3),  # " questio" too
        ("to be or", 3, 5 / 6),  # all but "e o": the comma stands between
        ("ababab", 1, 1 / 2),  # b is there, a is not, and repeats count
        ("TO", 2, 0.0),  # literally
        ("question to", 8, 1 / 4),
        ("be\n", 3, 0.0),
        ("to", 3, None),
        ("", 1, None),
    ],
)
def test_copied_sequences_by_hand(generated, n, expected):
    assert copied_ngrams(generated, ["to be, or not", " to be the question"], n) == pytest.approx(expected)


@quick
@given(BARE, st.lists(BARE, max_size=8), st.integers(1, 9))
def test_copied_sequences_match_the_definition_at_every_chunking(generated, chunks, n):
    text = "".join(chunks)
    expected = copied_by_definition(generated, text, n)
    assert copied_ngrams(generated, chunks, n) == copied_ngrams(generated, text, n) == expected
    assert expected is None or 0 <= expected <= 1


# Reading


def test_reading_stops_when_all_is_found():
    assert known_words("to be, or not to be ", chunks_then_fail("not to be ", "or ")) == 1.0
    assert copied_ngrams("to be, or", chunks_then_fail("to be, o", "r")) == 1.0


def test_the_training_text_is_not_read_if_there_is_nothing_to_find():
    assert known_words("", chunks_then_fail()) is None
    assert copied_ngrams("seven..", chunks_then_fail()) is None


def test_memory_does_not_grow_with_the_training_text():
    line = "It was the best of times, it was the worst of times;\n"
    tracemalloc.start()
    try:
        assert known_words("it was not a season of light ", repeat(line * 20, 200)) == 3 / 7
        assert copied_ngrams("it was not", repeat(line * 20, 50)) == 0.0
        assert copied_ngrams("€", repeat(line * 20, 50), 1) == 0.0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50_000


def test_shakespeare(data_folder):
    def training():
        return read_text(data_folder / "shakespeare.txt")

    quoted = "First Citizen:\nBefore we proceed any further, hear me speak.\n"
    made_up = "O, the tokenizer doth forget his backend!\n"
    assert known_words(quoted, training()) == 1.0
    assert copied_ngrams(quoted, training()) == 1.0
    assert known_words(made_up, training()) == 5 / 7
    assert copied_ngrams(made_up, training()) < 0.5
