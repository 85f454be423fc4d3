"""Characters and bytes to ids and back, and the message about an unknown character."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baby_xp.errors import BabyError
from baby_xp.text.tokenizer import START, ByteTokenizer, CharTokenizer, Place, create, tokenizer_from_dict

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
quick = settings(max_examples=60, deadline=None)
SURROGATE = "\udc9f"


def message_of(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert re.search(r"; \w+", message), f"no remedy in {message!r}"
    return message


def same(a: np.ndarray, b) -> bool:
    return a.dtype == np.int32 and a.flags.c_contiguous and a.tolist() == list(b)


@quick
@given(TEXT.filter(len))
def test_characters_survive_a_round_trip(text):
    tokenizer = CharTokenizer.from_text(text)
    assert same(tokenizer.encode(text), [tokenizer.vocab.index(character) for character in text])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert list(tokenizer.vocab) == sorted(set(text))
    assert tokenizer.vocab_size == len(set(text))


@quick
@given(TEXT)
def test_bytes_survive_a_round_trip(text):
    tokenizer = ByteTokenizer()
    assert same(tokenizer.encode(text), text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@quick
@given(st.lists(TEXT, min_size=1).filter(any))
def test_chunks_give_the_tokenizer_of_the_whole(chunks):
    whole = CharTokenizer.from_text("".join(chunks))
    assert CharTokenizer.from_text(iter(chunks)) == whole
    assert create("char", chunks) == create("char", "".join(chunks)) == whole


@quick
@given(TEXT.filter(len), TEXT)
def test_an_extension_keeps_old_ids(text, more):
    old = CharTokenizer.from_text(text)
    new = old.extended(more)
    assert new.vocab[: old.vocab_size] == old.vocab
    assert list(new.vocab[old.vocab_size :]) == sorted(set(more) - set(text))
    assert new.encode(text).tolist() == old.encode(text).tolist()
    assert new.decode(new.encode(more)) == more


@quick
@given(TEXT.filter(len))
def test_a_dict_survives_json(text):
    for tokenizer in (CharTokenizer.from_text(text), ByteTokenizer()):
        assert tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())), "file") == tokenizer


def test_the_order_is_that_of_code_points_or_the_given_one():
    tokenizer = CharTokenizer.from_text("b\U0001f600Aé\nb")
    assert tokenizer.vocab == ("\n", "A", "b", "é", "\U0001f600")
    assert tokenizer.to_dict() == {"kind": "char", "vocab": list(tokenizer.vocab), "vocab_size": 5}
    given = CharTokenizer(["b", "a"])
    assert given.encode("abb").tolist() == [1, 0, 0]
    assert given.decode(np.array([0, 1], dtype=np.uint8)) == "ba"
    assert same(given.encode(""), [])
    assert given.decode([]) == ""


def test_the_original_projects_file_loads():
    vocab = sorted({"\n", " ", "3", *map(chr, range(65, 91))})
    tokenizer = tokenizer_from_dict({"vocab": vocab, "vocab_size": len(vocab)}, "tokenizer.json")
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.vocab == tuple(vocab)


@pytest.mark.parametrize(
    ("unknown", "code"),
    [("c", "U+0063"), ("A", "U+0041"), ("\U0001f600", "U+1F600"), (SURROGATE, "U+DC9F"), ("\r", "U+000D")],
)
def test_an_unknown_character_is_named_with_its_position(unknown, code):
    tokenizer = CharTokenizer("ab\U00010000\n")
    with pytest.raises(BabyError) as error:
        tokenizer.encode("a\U00010000b" + unknown + "?", "prompt")
    message = message_of(error)
    assert message.startswith(f"prompt: {unknown!r} ({code}) at index 3 ")
    assert "line" not in message


def test_an_unknown_character_in_several_lines():
    tokenizer = CharTokenizer("ab\n")
    with pytest.raises(BabyError) as error:
        tokenizer.encode("a\nbb\nab?b?", "story.txt")
    assert message_of(error).startswith("story.txt: '?' (U+003F) at index 7 (line 3, column 3) ")
    with pytest.raises(BabyError) as error:  # positions in a piece are those in the whole text
        tokenizer.encode("ab?", "story.txt", Place(100, 7, 5))
    assert "at index 102 (line 7, column 7)" in message_of(error)
    with pytest.raises(BabyError) as error:
        ByteTokenizer().encode("ab" + SURROGATE, "prompt")
    assert message_of(error).startswith("prompt: '\\udc9f' (U+DC9F) at index 2 ")


@quick
@given(st.lists(st.text("ab\n")))
def test_positions_add_up(pieces):
    place = START
    for piece in pieces:
        place = place.after(piece)
    text = "".join(pieces)
    lines = text.split("\n")
    assert place == START.after(text) == Place(len(text), len(lines), len(lines[-1]) + 1)


@pytest.mark.parametrize("text", [SURROGATE, "", []])
def test_an_empty_text_makes_no_tokenizer(text):
    with pytest.raises(BabyError) as error:
        CharTokenizer.from_text(text)
    message_of(error)


@pytest.mark.parametrize("tokenizer", [CharTokenizer("ab"), ByteTokenizer()])
@pytest.mark.parametrize("wrong", [-1, 256, 2**40])
def test_an_id_out_of_range_is_named(tokenizer, wrong):
    with pytest.raises(BabyError, match=f"id {wrong} at index 1 ") as error:
        tokenizer.decode([0, wrong, 1])
    message_of(error)


@pytest.mark.parametrize("ids", [3, [[0, 1]], [0.0], ["a"]])
def test_only_rows_of_integers_are_decoded(ids):
    for tokenizer in (CharTokenizer("ab"), ByteTokenizer()):
        with pytest.raises(BabyError) as error:
            tokenizer.decode(ids)
        message_of(error)


def test_incomplete_characters_decode():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("aé")[:-1]) == "a\ufffd"
    assert tokenizer.decode([0xFF, 65]) == "\ufffdA"


@pytest.mark.parametrize(
    ("d", "named"),
    [
        (None, "None"),
        (["a"], "['a']"),
        ({}, "None"),
        ({"kind": "bpe"}, "'bpe'"),
        ({"kind": ["char"], "vocab": ["a"]}, "['char']"),
        ({"kind": "char"}, "vocab"),
        ({"vocab": "abc"}, "'abc'"),
        ({"vocab": []}, "no characters"),
        ({"vocab": ["a", "bc"]}, "vocab[1] is 'bc'"),
        ({"vocab": ["a", ""]}, "vocab[1] is ''"),
        ({"vocab": ["a", 3]}, "vocab[1] is 3"),
        ({"vocab": ["a", "x\ny" * 1000]}, "vocab[1]"),
        ({"vocab": ["a", "\ud800"]}, "vocab[1] is '\\ud800'"),
        ({"vocab": ["a", "b", "\n", "b"]}, "vocab[3], 'b' (U+0062)"),
        ({"vocab": ["a", "b"], "vocab_size": 3}, "3 but there are 2"),
        ({"vocab": ["a"], "vocab_size": True}, "True but there are 1"),
        ({"vocab": ["a"], "vocab_size": "1"}, "'1' but there are 1"),
        ({"kind": "byte", "vocab_size": 65}, "65 but there are 256"),
    ],
)
def test_a_damaged_file_is_refused(d, named):
    with pytest.raises(BabyError) as error:
        tokenizer_from_dict(d, "runs/tokenizer.json")
    message = message_of(error)
    assert message.startswith("runs/tokenizer.json: ")
    assert named in message
    assert len(message) < 300


def test_an_unknown_kind_of_tokenizer_is_refused():
    chunks = iter(["a", "b"])
    assert create("byte", chunks).vocab_size == 256
    assert list(chunks) == ["a", "b"]  # the message does not read them
    with pytest.raises(BabyError, match=r"'word'.*char, byte") as error:
        create("word", "text")
    message_of(error)
