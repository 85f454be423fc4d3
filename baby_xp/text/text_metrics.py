"""Measures of a generated text against the text that the model was trained on.

Few known words: the model does not spell yet. Many copied sequences: it recites. A good baby model knows its
words and copies little.

The training text comes in chunks of any size, as `read_text` gives them, and is never held as a whole. Reading
stops when everything that the generated text holds was found. A measure uses up an iterator of chunks; give the
next one a new iterator.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

NGRAM = 8


def known_words(generated: str, training: Iterable[str]) -> float | None:
    """The share of the generated text's words that occur in the training text; None if it has no word.

    A word is the text between whitespace, without the punctuation and symbols at its two ends, case-folded:
    "Thou!" is "thou", and "--" is no word. Every repeat counts. Generation may have stopped inside the last
    word, so that one is left out, unless whitespace follows it. The first one counts: to judge a continuation
    whose prompt ended inside a word, give the prompt with it.
    """
    words = generated.split()
    if words and not generated[-1].isspace():
        words.pop()
    counts = Counter(folded for word in words if (folded := _folded(word)))
    longest = max(map(len, counts), default=0)
    return _share_seen(counts, _words(training, longest))


def copied_ngrams(generated: str, training: Iterable[str], n: int = NGRAM) -> float | None:
    """The share of the generated text's sequences of n characters that the training text holds literally.

    There is one sequence for each place where n characters follow, so repeats count; None if there is none
    because the text is shorter than n.
    """
    return _share_seen(Counter(_ngrams_in(generated, n)), _ngrams(training, n))


def _share_seen(counts: Counter[str], groups: Iterable[Iterable[str]]) -> float | None:
    """The share of the counted items that is in any of the groups. Stops reading groups when all are found."""
    if not counts:
        return None
    unseen = set(counts)
    for group in groups:
        unseen.difference_update(group)
        if not unseen:
            break
    total = counts.total()
    return (total - sum(counts[item] for item in unseen)) / total


def _ngrams_in(text: str, n: int) -> Iterator[str]:
    return (text[i : i + n] for i in range(len(text) - n + 1))


def _ngrams(chunks: Iterable[str], n: int) -> Iterator[Iterator[str]]:
    """The sequences of n characters that end in each chunk."""
    tail = ""
    for chunk in chunks:
        text = tail + chunk
        yield _ngrams_in(text, n)
        tail = text[max(0, len(text) - n + 1) :]


def _words(chunks: Iterable[str], longest: int) -> Iterator[set[str]]:
    """The folded words that end in each chunk; those of more than `longest` characters may come distorted."""
    begun = ""
    for chunk in chunks:
        text = begun + chunk
        words = text.split()
        begun = _shortened(words.pop(), longest) if words and not text[-1].isspace() else ""
        yield {_folded(word) for word in set(words)}  # most words are repeated, and case folding is slow
    yield {_folded(begun)}


def _shortened(begun: str, longest: int) -> str:
    """A beginning of a word that represents it, in at most longest + 1 characters.

    A text without whitespace is one word. Without this, every chunk would be added to the ones before it.
    """
    core = _core(begun)
    if len(core) > longest:  # the word is too long, however it continues
        return "x" * (longest + 1)
    # Past `longest` characters there is only punctuation: if a letter follows, the word is too long anyway.
    return begun[begun.find(core) :][:longest]


def _folded(word: str) -> str:
    return _core(word).casefold()


def _core(word: str) -> str:
    """The word without the punctuation at its ends."""
    start, end = 0, len(word)
    while start < end and _is_punctuation(word[start]):
        start += 1
    while start < end and _is_punctuation(word[end - 1]):
        end -= 1
    return word[start:end]


def _is_punctuation(character: str) -> bool:
    # Symbols too: Unicode counts some of the marks on a keyboard, as $ + < = > ^ ` | ~, among them.
    return not character.isalnum() and unicodedata.category(character)[0] in "PS"
