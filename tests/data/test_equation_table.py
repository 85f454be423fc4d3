"""The equations: babyLLM's ids, the windows, and that training reveals no held-out case."""

import numpy as np
import pytest
from baby_xp_data import equation_table
from baby_xp_data.equation_table import (
    BABYLLM,
    CONTEXT,
    VOCABULARY,
    EquationTable,
    decode,
    encode,
    pairs,
    rows,
    windows,
)

from baby_xp.errors import BabyError


def as_text(contexts_and_targets):
    contexts, targets = contexts_and_targets
    return [(decode(c), decode([t])) for c, t in zip(contexts, targets, strict=True)]


# ids and windows ------------------------------------------------------------------------------------------


def test_the_ids_are_those_of_the_seed():
    assert encode("1+1=2 ").tolist() == [3, 1, 3, 12, 4, 0]
    contexts, targets = pairs(["1+1=2 "])
    assert contexts.tolist() == [[3, 1, 3, 12], [1, 3, 12, 4]]
    assert targets.tolist() == [4, 0]
    assert encode(VOCABULARY).tolist() == list(range(13))
    assert decode(range(13)) == VOCABULARY
    assert BABYLLM.vocabulary == VOCABULARY
    assert EquationTable(operators="-").vocabulary == EquationTable(operators="+-").vocabulary == VOCABULARY + "-"


def test_shapes_and_types():
    for found in (encode("1+1"), encode(""), *pairs(BABYLLM.equations()), *pairs([]), *rows(["1+1=2 "], 6)):
        assert found.dtype == np.int32
    assert [part.shape for part in pairs(BABYLLM.equations())] == [(110, 4), (110,)]
    assert [part.shape for part in pairs([])] == [(0, 4), (0,)]


@pytest.mark.parametrize("text", ["1-1", "a", "1+1=2\n", "\u0663"])
def test_unknown_characters(text):
    with pytest.raises(BabyError, match="has no character"):
        encode(text)


@pytest.mark.parametrize("ids", [[13], [-1], [0, 99]])
def test_unknown_ids(ids):
    with pytest.raises(BabyError, match="no character has the id"):
        decode(ids)


def test_windows_of_two_digit_sums():
    assert as_text(pairs(["8+9=17 "])) == windows(["8+9=17 "]) == [("8+9=", "1"), ("+9=1", "7"), ("9=17", " ")]


def test_windows_of_a_longer_context_match_the_docstring():
    assert windows(["9+8=17 "], 6) == [("  9+8=", "1"), (" 9+8=1", "7"), ("9+8=17", " ")]
    contexts, targets = pairs(["9-8=1 "], n_ctx=6)
    assert [decode(row, "+-") for row in contexts] == ["  9-8=", " 9-8=1"]
    assert decode(targets, "+-") == "1 "


def test_rows_for_a_model_that_predicts_every_token():
    inputs, targets = rows(["1+2=3 ", "10-12=-2 "], 9)
    assert [decode(row, "+-") for row in inputs] == ["1+2=3    ", "10-12=-2 "]
    assert [decode(row, "+-") for row in targets] == ["+2=3     ", "0-12=-2  "]
    with pytest.raises(BabyError, match="n_ctx 7 does not hold an equation such as '10-12=-2 ': 8 do"):
        rows(["1+2=3 ", "10-12=-2 "], 7)


# tables ---------------------------------------------------------------------------------------------------


def test_the_equations_of_each_table():
    every = set(BABYLLM.equations())
    assert every - set(BABYLLM.equations(["4+4"])) == {"4+4=8 "}
    assert every - set(BABYLLM.equations(["3+5"])) == {"3+5=8 ", "5+3=8 "}
    assert BABYLLM.equations("4+4") == BABYLLM.equations(["4+4"])  # one case may be given as a text
    assert {"3+5=8 ", "5+3=8 ", "8+0=8 ", "4+3=7 "} <= set(BABYLLM.equations(["4+4"]))
    assert BABYLLM.held_out_equations(["3+5", "5+3", "1+1"]) == ["3+5=8 ", "5+3=8 ", "1+1=2 "]


@pytest.mark.parametrize(
    ("max_sum", "digits", "operators", "number"),
    [(9, 1, "+", 55), (18, 1, "+", 100), (0, 1, "+-", 200), (0, 2, "+", 10_000), (50, 2, "+-", 1326 + 10_000),
     (0, 2, "-", 10_000)],
)  # fmt: skip
def test_the_equations_of_a_table_are_true_and_written_without_leading_zeros(max_sum, digits, operators, number):
    table = EquationTable(max_sum, digits, operators)
    every = table.equations()
    assert len(set(every)) == len(every) == len(table.cases()) == number
    for equation in every:
        a, operator, b = case = equation_table.case_of(equation)
        result = a + b if operator == "+" else a - b
        assert equation == f"{a}{operator}{b}={result} "
        assert case in table
    assert max(len(equation) for equation in every) <= table.longest + 1
    assert {operator for _, operator, _ in table.cases()} == set(operators)
    named = table.distinct()
    assert len(set(named)) == len(named)
    assert sorted(table.held_out_equations(named)) == sorted(every)


def test_no_window_is_repeated():
    for max_sum in range(9, 19):
        every = EquationTable(max_sum).equations()
        found = windows(every)
        assert len(set(found)) == len(found) == sum(len(equation) - 4 for equation in every)


def test_undetermined_contexts():
    assert BABYLLM.undetermined() == set()
    assert EquationTable(10).undetermined() == {"+1=1"}
    assert EquationTable(18).undetermined() == {f"+{b}=1" for b in range(1, 10)}


# held-out cases -------------------------------------------------------------------------------------------


def test_no_training_window_reveals_a_held_out_case():
    for max_sum in (9, 10, 18):
        table = EquationTable(max_sum)
        every, leave_out = set(windows(table.equations())), table.undetermined()
        for a, _, b in table.cases():
            case, where = f"{a}+{b}", f"{a}+{b} held out of sums up to {max_sum}"
            trained, asked = windows(table.equations([case])), windows(table.held_out_equations([case]))
            # an undetermined context may occur, but not with a held-out target
            assert not set(trained) & set(asked), where
            assert {*trained, *asked} == every, where
            # no window contains the start of the case or its mirror
            assert not any(context[:3] in (case, case[::-1]) for context, _ in trained), where
            # without the undetermined ones, contexts determine their targets and none returns
            trained, asked = (as_text(pairs(table.equations([case]), leave_out)),
                              as_text(pairs(table.held_out_equations([case]), leave_out)))  # fmt: skip
            assert asked, where
            assert not {context for context, _ in trained} & {context for context, _ in asked}, where
            assert len({context for context, _ in trained + asked}) == len(trained + asked), where


def test_holding_out_does_not_make_a_context_appear_determined():
    """With sums up to 10, "+1=1" continues with " " in 0+1=1 and with "0" in 9+1=10, held out or not."""
    table = EquationTable(10)
    trained = table.equations(["9+1"])
    assert dict(windows(trained))["+1=1"] == " "
    assert "+1=1" not in dict(as_text(pairs(trained, table.undetermined())))


@pytest.mark.parametrize(("digits", "operators", "case", "longer"), [
    (1, "+", "9+8", 0), (1, "+", "9+8", 1), (2, "+-", "7-35", 1),
    pytest.param(2, "+-", "7-35", 0, marks=pytest.mark.slow),
    pytest.param(2, "+", "40+4", 0, marks=pytest.mark.slow),
    pytest.param(2, "+", "40+4", 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_whole_equation_context_reveals_no_held_out_case(digits, operators, case, longer):
    table = EquationTable(0, digits, operators)
    n_ctx = table.longest + longer
    assert not table.undetermined(n_ctx)
    every = windows(table.equations(), n_ctx)
    assert len({context for context, _ in every}) == len(set(every))  # each context has one target
    trained = {context for context, _ in windows(table.equations([case]), n_ctx)}
    asked = {context for context, _ in windows(table.held_out_equations([case]), n_ctx)}
    assert not trained & asked
    for equation in table.held_out_equations([case]):
        question = equation_table.question(equation).rjust(n_ctx)
        assert question in asked
        assert not [context for context in trained if context.lstrip().startswith(question.lstrip())]


@pytest.mark.parametrize(("max_sum", "expected"), [
    (9, {"0+0", "0+1", "1+0", "0+9", "9+0"}), (18, {"0+0"}),
])  # fmt: skip
def test_the_cases_that_no_model_could_answer(max_sum, expected):
    """In training no answer has that first character, or an operand does not occur: see docs/equations.md."""
    table, found = EquationTable(max_sum), set()
    for a, _, b in table.cases():
        trained = table.equations([f"{a}+{b}"])
        firsts = {equation_table.answer(equation)[0] for equation in trained}
        operands = {operand for equation in trained for operand in equation_table.case_of(equation)}
        if str(a + b)[0] not in firsts or not {a, b} <= operands:
            found.add(f"{a}+{b}")
    assert found == expected


def test_a_share_is_drawn_with_the_seed():
    table = EquationTable(0, 2, "+-")
    drawn = table.draw(0.1, 3)
    assert len(drawn) == len(set(drawn)) == 1010  # of 2 x 5050 pairs
    assert table.choose("10%", 3) == table.draw(0.1, 3) == drawn
    assert drawn != table.draw(0.1, 4)
    assert set(drawn) <= set(table.distinct())
    assert len(BABYLLM.draw(1e-9, 0)) == 1
    assert BABYLLM.choose("4+4, 3+5", 0) == ["4+4", "3+5"]


@pytest.mark.parametrize("held_out", ["0%", "100%", "-5%", "x%", "%", "nan%", "", "4+4,", "12+3", "4-4", "4+04"])
def test_a_bad_held_out_setting_is_refused(held_out):
    with pytest.raises(BabyError, match="held-out"):
        BABYLLM.choose(held_out, 0)


@pytest.mark.parametrize("case", [
    "4", "44", "4+4=8", "4 + 4", "10+2", "4-4", "", "a+b", "4+4\n", "\u0664+4", "9" * 5000 + "+4",
])  # fmt: skip
def test_cases_of_another_form(case):
    for refuse in (BABYLLM.equations, BABYLLM.held_out_equations):
        with pytest.raises(BabyError, match=r"a held-out case must be digit\+digit, such as 4\+4, not"):
            refuse([case])


def test_a_case_above_the_largest_sum():
    with pytest.raises(BabyError, match="5\\+5 is 10, above the largest sum 9"):
        BABYLLM.equations(["5+5"])


@pytest.mark.parametrize("max_sum", [8, 19, -1, 9.5])
def test_a_bad_largest_sum_is_refused(max_sum):
    with pytest.raises(BabyError, match="from 9 to 18"):
        EquationTable(max_sum)


def test_questions():
    assert BABYLLM.question("4 + 4") == BABYLLM.question("4+4=") == "4+4="
    for text, words in {
        "4-4": "ask 4+4=, with + and operands of at most 1 digit", "12+3": "is not a question", "": "ask 4+4=",
        "9+1": "9+1 is 10, and the table has sums up to 9: ask 4+4=",
    }.items():  # fmt: skip
        with pytest.raises(BabyError) as caught:
            BABYLLM.question(text)
        assert words in str(caught.value)


def test_the_context_of_babyllm():
    assert len(equation_table.question("4+4=8 ")) == CONTEXT
