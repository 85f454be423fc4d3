"""Tables and numbers for people, character for character."""

import pytest

from baby_xp import layout


def test_pairs_align_their_values():
    rows = [("text", "nursery"), ("of 9 generated tokens:", ""), ("loss", "1.5 nats per token")]
    assert layout.pairs(rows) == [
        "text                    nursery",
        "of 9 generated tokens:",
        "loss                    1.5 nats per token",
    ]
    assert layout.pairs([("a", "1"), ("bc", "2")], 4) == ["    a   1", "    bc  2"]


def test_columns_follow_a_form():
    rows = [("step", "a", ""), (12, "b", "c")]
    assert layout.columns("{:>5}  {:<4}|{}", rows) == [" step  a   |", "   12  b   |c"]


def test_fitted_columns_are_as_wide_as_their_widest_cell_and_groups_are_apart():
    rows = [["wte", "1 x 2", "0.5", ""], ["blocks.0.y", "3", "-10.25", "also"], ["x", "", "1", ""]]
    assert layout.fitted(["name", "shape", "mean", "also"], rows, "<<><", [None, 0, 0]) == [
        "name        shape    mean  also",
        "wte         1 x 2     0.5",
        "",
        "blocks.0.y  3      -10.25  also",
        "x                       1",
    ]
    assert layout.fitted(["a", "b"], [], "<>", []) == ["a  b"]


def test_a_long_text_is_wrapped_with_its_indent():
    assert layout.wrapped("  memory  ", "about 3 MiB at the peak", 22) == [
        "  memory  about 3 MiB",
        "          at the peak",
    ]
    assert layout.wrapped(" ", "'averylongtoken' 12, 'b'", 8) == [" 'averylongtoken'", " 12, 'b'"]


def test_counted_uses_singular_and_plural():
    words = [layout.counted(1, "token"), layout.counted(2000, "token"), layout.counted(0, "seed")]
    assert words == ["1 token", "2,000 tokens", "0 seeds"]


@pytest.mark.parametrize(("number", "words"), [
    (0, "0.00 KiB"), (512, "0.50 KiB"), (2**10, "1.00 KiB"), (12 * 2**20, "12.0 MiB"), (3 * 2**29, "1.50 GiB"),
    (2**45, "32.0 TiB"), (2**70, "1024.0 EiB"),
])  # fmt: skip
def test_sizes_have_a_unit(number, words):
    assert layout.size(number) == words


@pytest.mark.parametrize(("seconds", "words"), [
    (0.04, "0.0 s"), (9.96, "10.0 s"), (42.4, "42 s"), (100, "2 min"), (5990, "100 min"), (6480, "1.8 h"),
])  # fmt: skip
def test_durations_have_a_unit(seconds, words):
    assert layout.duration(seconds) == words
