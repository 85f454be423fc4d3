"""The equations: the seed's ids, the windows, and that nothing gives a held-out case away."""

import numpy as np
import pytest
from baby_xp_data import equations as eq

from baby_xp.errors import BabyError

EVERY_CASE = [(max_sum, f"{a}+{b}") for max_sum in (9, 10, 18)
              for a in range(10) for b in range(10) if a + b <= max_sum]


def as_text(contexts_and_targets):
    contexts, targets = contexts_and_targets
    return [(eq.decode(c), eq.decode([t])) for c, t in zip(contexts, targets, strict=True)]


ALL_PAIRS = {n: set(as_text(eq.pairs(eq.equations(n, ())))) for n in (9, 10, 18)}


def test_the_ids_are_those_of_the_seed():
    assert eq.encode("1+1=2 ").tolist() == [3, 1, 3, 12, 4, 0]
    contexts, targets = eq.pairs(["1+1=2 "])
    assert contexts.tolist() == [[3, 1, 3, 12], [1, 3, 12, 4]]
    assert targets.tolist() == [4, 0]


def test_encode_and_decode():
    ids = eq.encode(eq.VOCABULARY)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(range(13))
    assert eq.decode(ids) == eq.VOCABULARY
    assert eq.encode("").shape == (0,)
    assert eq.encode("").dtype == np.int32


@pytest.mark.parametrize("text", ["1-1", "a", "1+1=2\n", "\u0663"])
def test_unknown_characters(text):
    with pytest.raises(BabyError, match="has no character"):
        eq.encode(text)


@pytest.mark.parametrize("ids", [[13], [-1], [0, 99]])
def test_unknown_ids(ids):
    with pytest.raises(BabyError, match="no character has the id"):
        eq.decode(ids)


def test_which_equations():
    assert len(eq.equations(9, ())) == 55
    assert len(eq.equations(18, ())) == 100
    assert len(eq.equations()) == 54
    assert set(eq.equations(9, ())) - set(eq.equations()) == {"4+4=8 "}
    assert set(eq.equations(9, ())) - set(eq.equations(9, ["3+5"])) == {"3+5=8 ", "5+3=8 "}
    assert {"3+5=8 ", "5+3=8 ", "8+0=8 ", "4+3=7 "} <= set(eq.equations())
    assert all(eval(e.split("=")[0]) == int(e.split("=")[1]) for e in eq.equations(18, ()))


def test_no_equation_and_no_window_comes_twice():
    for max_sum in range(9, 19):
        table = eq.equations(max_sum, ())
        assert len(set(table)) == len(table)
        windows = as_text(eq.pairs(table))
        assert len(set(windows)) == len(windows) == sum(len(e) - 4 for e in table)


def test_windows_of_two_digit_sums():
    assert as_text(eq.pairs(["8+9=17 "])) == [("8+9=", "1"), ("+9=1", "7"), ("9=17", " ")]


def test_shapes_and_types():
    for contexts, targets in (eq.training_pairs(), eq.held_out_pairs(), eq.pairs([])):
        assert contexts.dtype == targets.dtype == np.int32
        assert contexts.shape == (len(targets), 4)
    assert len(eq.training_pairs()[1]) == 54 * 2
    assert len(eq.pairs([])[1]) == 0


def test_held_out_pairs():
    assert as_text(eq.held_out_pairs()) == [("4+4=", "8"), ("+4=8", " ")]
    assert as_text(eq.held_out_pairs(9, ["3+5", "5+3"])) == [
        ("3+5=", "8"), ("+5=8", " "), ("5+3=", "8"), ("+3=8", " ")]
    assert as_text(eq.held_out_pairs(18, ["8+9"])) == [
        ("8+9=", "1"), ("9=17", " "), ("9+8=", "1"), ("8=17", " ")]
    assert len(as_text(eq.held_out_pairs(18, ["8+9"], ambiguous=True))) == 6


def test_nothing_gives_a_held_out_case_away():
    for max_sum, case in EVERY_CASE:
        where = f"{case} held out of sums up to {max_sum}"
        training, held = as_text(eq.training_pairs(max_sum, [case])), as_text(eq.held_out_pairs(max_sum, [case]))
        assert held, where
        assert not {context for context, _ in training} & {context for context, _ in held}, where
        # contexts determine their targets
        assert len({context for context, _ in training + held}) == len(training + held), where
        # with undetermined contexts, a context may return, but with no target that was held out
        training = as_text(eq.training_pairs(max_sum, [case], ambiguous=True))
        held = as_text(eq.held_out_pairs(max_sum, [case], ambiguous=True))
        assert not set(training) & set(held), where
        assert {*training, *held} == ALL_PAIRS[max_sum], where
        # neither the case nor its mirror begins, whole, in any window
        assert not any(context[:3] in (case, case[::-1]) for context, _ in training), where


def test_undetermined_contexts():
    assert eq.undetermined(eq.equations(9, ())) == set()
    assert eq.undetermined(eq.equations(10, ())) == {"+1=1"}
    assert eq.undetermined(eq.equations(18, ())) == {f"+{b}=1" for b in range(1, 10)}


def test_holding_out_does_not_make_a_context_look_certain():
    """With sums up to 10, "+1=1" goes on with " " in 0+1=1 and with "0" in 9+1=10, held out or not."""
    assert "+1=1" not in dict(as_text(eq.training_pairs(10, ["9+1"])))
    assert dict(as_text(eq.training_pairs(10, ["9+1"], ambiguous=True)))["+1=1"] == " "


@pytest.mark.parametrize("case", ["4", "44", "4+4=8", "4 + 4", "10+2", "4-4", "", "a+b", "4+4\n", "\u0664+4"])
def test_cases_of_another_form(case):
    with pytest.raises(BabyError, match=r"a held-out case is digit\+digit"):
        eq.equations(9, [case])


@pytest.mark.parametrize("function", [eq.equations, eq.training_pairs, eq.held_out_pairs])
def test_what_cannot_be_asked_for(function):
    with pytest.raises(BabyError, match="5\\+5 makes 10, above the largest sum 9"):
        function(9, ["5+5"])
    for max_sum in (8, 19, -1, 9.5):
        with pytest.raises(BabyError, match="from 9 to 18"):
            function(max_sum, [])


def test_one_case_may_be_given_as_a_text():
    assert eq.equations(9, "4+4") == eq.equations()
