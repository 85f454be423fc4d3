"""Equations: babyLLM's data, sums of two one-digit numbers such as "1+1=2 ", some held out to test generalisation.

There are 13 tokens, one a character; an id is the place in VOCABULARY: "1+1=2 " is [3, 1, 3, 12, 4, 0]. Minus,
where it is asked for, is the 14th. The equation model sees CONTEXT = 4 tokens and predicts the next one. An
equation gives every window of 4 tokens inside it, with the token that follows; no window crosses from one
equation to the next:

    "1+1=2 "    "1+1=" -> "2",   "+1=2" -> " "
    "8+9=17 "   "8+9=" -> "1",   "+9=1" -> "7",   "9=17" -> " "

What is left out of training for a held-out case a+b:
  - the equation a+b with all its windows, so also "+4=8" -> " ", which says that some digit plus 4 makes 8;
  - the equation b+a with all its windows, since addition commutes.
No other equation gives a window with the same context and the same target: in each of the three kinds of
window, the two together show the second digit and the sum, hence the first digit too.

What stays is what a model can generalise from: the other pairs with the same sum (for 4+4: 3+5=8, 8+0=8 and
so on) and the neighbours (4+3=7, 5+4=9). Some cases cannot be answered: 0+0, since no other answer begins with
its digit, and with sums up to 9 also 0+1, for the same reason, and 0+9, since no other equation has the operand 9.

Contexts that do not determine the target: above a sum of 9, "+9=1" is followed by any digit from 0 to 8, as
the first digit lies outside the window. A context is undetermined if, in the full table of equations up to
max_sum, the held-out ones included, it is followed by more than one token. `training_pairs` and
`held_out_pairs` leave out the windows with such contexts unless `ambiguous` is true: no model can learn them,
and they would put a floor under its loss. The full table counts because otherwise, with sums up to 10 and 1+9
held out, "+1=1" -> " " (from 0+1=1) would look certain, and would teach a wrong answer to a held-out context.
With `ambiguous` true, a training window may have the context of a held-out one, but never with its target.

Beyond the document: operands of up to three digits, minus, and a longer context. Where n_ctx is not 4, the
targets are what follows "=", and a context is all that stands before, filled up with spaces on the left:

    "9+8=17 "   "  9+8=" -> "1",   " 9+8=1" -> "7",   "9+8=17" -> " "     with n_ctx 6

`longest` is the context that holds the longest equation of a table whole: 3 digits + 3. Nothing is then
undetermined. For a held-out a-b, b-a is left out too: it has the same digits after its sign.
"""

import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from baby_xp.errors import BabyError

VOCABULARY = " +0123456789="
MINUS = "-"
CONTEXT = 4
HELD_OUT = ("4+4",)
SHUFFLE = 0x6865_6C64
"""Sets the choice of held-out cases apart from others that are drawn from the same seed."""

Case = tuple[int, str, int]
"""An operand, an operator, an operand."""


def vocabulary(operators: str = "+") -> str:
    """The characters that equations with these operators are written with, in the order of their ids."""
    return VOCABULARY + MINUS * (MINUS in operators)


def longest(digits: int = 1) -> int:
    """Tokens of the longest equation without its last space: 6 for "9+9=18", the n_ctx that holds it whole."""
    return 3 * digits + 3


def encode(text: str, operators: str = "+") -> np.ndarray:
    """The ids of the characters of `text`: int32, shape (len(text),). BabyError for an unknown character."""
    known = vocabulary(operators)
    unknown = sorted(set(text) - set(known))
    if unknown:
        raise BabyError(f"an equation has no character {unknown[0]!r}; it is written with {known!r}")
    return np.array([known.index(character) for character in text], dtype=np.int32)


def decode(ids: Iterable[int], operators: str = "+") -> str:
    """The text of ids. BabyError for an id that the vocabulary does not have."""
    whole, known = [int(token) for token in ids], vocabulary(operators)
    # checked, because Python takes an index below 0 as one from the end
    wrong = [token for token in whole if not 0 <= token < len(known)]
    if wrong:
        raise BabyError(f"no character has the id {wrong[0]}; ids go from 0 to {len(known) - 1}")
    return "".join(known[token] for token in whole)


def equations(
    max_sum: int = 9, held_out: Collection[str] = HELD_OUT, digits: int = 1, operators: str = "+"
) -> list[str]:
    """The equations "a+b=s " and "a-b=d " of a table, without the held-out cases and their mirrors.

    Operands have up to `digits` digits; sums go up to max_sum (0: all of them), differences have no limit.
    BabyError if max_sum is above the largest sum or below 9, or a case is not in the table.
    """
    left_out = set(cases(max_sum, held_out, digits, operators))
    return [written(case) for case in table(max_sum, digits, operators) if case not in left_out]


def held_out_equations(
    max_sum: int = 9, held_out: Collection[str] = HELD_OUT, digits: int = 1, operators: str = "+"
) -> list[str]:
    """The equations that `equations` leaves out: each case, followed by its mirror if that differs."""
    return [written(case) for case in cases(max_sum, held_out, digits, operators)]


def undetermined(equations: Iterable[str], n_ctx: int = CONTEXT) -> set[str]:
    """The contexts (n_ctx characters) that are followed by more than one token somewhere in these equations."""
    followers: dict[str, set[str]] = {}
    for context, target in windows(equations, n_ctx):
        followers.setdefault(context, set()).add(target)
    return {context for context, targets in followers.items() if len(targets) > 1}


def pairs(
    equations: Iterable[str], leave_out: Collection[str] = (), n_ctx: int = CONTEXT
) -> tuple[np.ndarray, np.ndarray]:
    """(contexts (n, n_ctx), targets (n,)), int32: windows of the equations, and the token that follows each.

    Windows whose context is in `leave_out` are left out.
    """
    kept = [(context, target) for context, target in windows(equations, n_ctx) if context not in leave_out]
    contexts = encode("".join(context for context, _ in kept), "+-").reshape(-1, n_ctx)
    return contexts, encode("".join(target for _, target in kept), "+-")


def training_pairs(
    max_sum: int = 9, held_out: Collection[str] = HELD_OUT, ambiguous: bool = False,
    digits: int = 1, operators: str = "+", n_ctx: int = CONTEXT,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """`pairs` of the equations to train on; undetermined contexts only if `ambiguous`."""
    trained = equations(max_sum, held_out, digits, operators)
    return pairs(trained, () if ambiguous else _undetermined(max_sum, digits, operators, n_ctx), n_ctx)


def held_out_pairs(
    max_sum: int = 9, held_out: Collection[str] = HELD_OUT, ambiguous: bool = False,
    digits: int = 1, operators: str = "+", n_ctx: int = CONTEXT,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """`pairs` of the held-out equations, in the order of the cases: for "4+4", row 0 is "4+4=" -> "8"."""
    left_out = held_out_equations(max_sum, held_out, digits, operators)
    return pairs(left_out, () if ambiguous else _undetermined(max_sum, digits, operators, n_ctx), n_ctx)


def rows(equations: Sequence[str], n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs (n, n_ctx), targets (n, n_ctx)), int32: an equation a row, for a model that predicts every next
    token; filled up with spaces on the right.

    BabyError if n_ctx does not hold the longest of them.
    """
    need = max(map(len, equations), default=1) - 1
    if n_ctx < need:
        raise BabyError(f"n_ctx {n_ctx} does not hold an equation such as {max(equations, key=len)!r}: {need} do")
    ids = encode("".join(equation.ljust(n_ctx + 1) for equation in equations), "+-").reshape(-1, n_ctx + 1)
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


def windows(equations: Iterable[str], n_ctx: int = CONTEXT) -> list[tuple[str, str]]:
    """(context, target) of every token of an equation that is a target, in the order of the equations."""
    found = []
    for equation in equations:
        # the document's: every window inside the equation. The first of them ends with "=", as the others' do
        first = CONTEXT if n_ctx == CONTEXT else equation.index("=") + 1
        for end in range(first, len(equation)):
            found.append((equation[max(0, end - n_ctx) : end].rjust(n_ctx), equation[end]))
    return found


def question(equation: str) -> str:
    """An equation up to and including "="."""
    return equation[: equation.index("=") + 1]


def answer(equation: str) -> str:
    """What stands after "=", with the space at the end."""
    return equation[equation.index("=") + 1 :]


def written(case: Case) -> str:
    """The equation of a case: (1, "+", 2) -> "1+2=3 "."""
    a, operator, b = case
    return f"{a}{operator}{b}={a + b if operator == '+' else a - b} "


def table(max_sum: int = 9, digits: int = 1, operators: str = "+") -> list[Case]:
    """Every case, held-out ones included. BabyError if max_sum does not fit the digits."""
    largest = 2 * (10**digits - 1)
    if max_sum != 0 and max_sum not in range(9, largest + 1):
        raise BabyError(
            f"the largest sum is a whole number from 9 to {largest} with operands of {digits} "
            f"digit{'s' * (digits > 1)}, or 0 for all, not {max_sum!r}"
        )
    operands = range(10**digits)
    return [
        (a, operator, b)
        for operator in operators for a in operands for b in operands
        if operator != "+" or max_sum == 0 or a + b <= max_sum
    ]  # fmt: skip


def distinct(max_sum: int = 9, digits: int = 1, operators: str = "+") -> list[str]:
    """Cases such as "4+4", one of each pair of mirrors: what can be held out, one after the other."""
    return [f"{a}{operator}{b}" for a, operator, b in table(max_sum, digits, operators) if a <= b]


def drawn(share: float, seed: int, max_sum: int = 9, digits: int = 1, operators: str = "+") -> list[str]:
    """A share of `distinct`, at least one of them, drawn by the seed. BabyError unless 0 < share < 1."""
    if not 0 < share < 1:
        raise BabyError(f"the held-out share lies between 0% and 100%, not {100 * share:g}%")
    known = distinct(max_sum, digits, operators)
    key = np.array([seed % 2**64, SHUFFLE], dtype=np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(len(known)), kind="stable")
    return [known[i] for i in sorted(order[: max(1, round(share * len(known)))])]


def chosen(held_out: str, seed: int, max_sum: int = 9, digits: int = 1, operators: str = "+") -> list[str]:
    """The cases that a text such as "4+4", "4+4,3+5" or "10%" names. BabyError if it names none of the table."""
    if held_out.endswith("%"):
        try:
            share = float(held_out[:-1]) / 100
        except ValueError:
            raise BabyError(f"a held-out share is a number such as 10%, not {held_out!r}") from None
        return drawn(share, seed, max_sum, digits, operators)
    named = [case.strip() for case in held_out.split(",")]
    cases(max_sum, named, digits, operators)
    return named


def suited(held_out: str, max_sum: int = 9, digits: int = 1, operators: str = "+") -> str:
    """`held_out`, or a case of this table where it names cases that only other tables have.

    For what was chosen with another table in mind: a share suits every table. BabyError as for `table`.
    """
    named = [case.strip() for case in held_out.split(",")]
    if not all(re.fullmatch(r"[0-9]+[+-][0-9]+", case, re.ASCII) for case in named):
        return held_out
    table(max_sum, digits, operators)
    try:
        cases(max_sum, named, digits, operators)
    except BabyError:
        return example(1, operators)
    return held_out


def example(digits: int = 1, operators: str = "+") -> str:
    """A case that a table has, such as "4+4"."""
    if "+" in operators:
        return "4+4" if digits == 1 else "12+34"
    return "8-4" if digits == 1 else "34-12"


def begins_answer(text: str, max_sum: int = 9, digits: int = 1, operators: str = "+") -> bool:
    """Whether a text is a question of the table such as "4+4=", or goes on from one as its equation does."""
    parts = re.match(r"([0-9]+)([+-])([0-9]+)=", text, re.ASCII)
    if parts is None or len(parts[1]) > digits or len(parts[3]) > digits or parts[2] not in operators:
        return False
    a, operator, b = int(parts[1]), parts[2], int(parts[3])
    known = operator == "-" or not max_sum or a + b <= max_sum
    return known and written((a, operator, b)).startswith(text)


def cases(max_sum: int, held_out: Collection[str], digits: int = 1, operators: str = "+") -> list[Case]:
    """The held-out cases, each with its mirror, without repeats, in the order given.

    BabyError for one that the table does not have.
    """
    table(max_sum, digits, operators)  # checks max_sum
    found: dict[Case, None] = {}
    for case in [held_out] if isinstance(held_out, str) else held_out:
        parts = re.fullmatch(r"(0|[1-9][0-9]*)([+-])(0|[1-9][0-9]*)", case, re.ASCII)
        if parts is None or parts[2] not in operators or max(len(parts[1]), len(parts[3])) > digits:
            operand, example = ("digit", "4{}4") if digits == 1 else ("number", "12{}34")
            form = " or ".join(operand + operator + operand for operator in operators)
            raise BabyError(
                f"a held-out case is {form}, such as {example.format(operators[0])}, not {case!r}"
            )
        a, operator, b = int(parts[1]), parts[2], int(parts[3])
        if operator == "+" and max_sum and a + b > max_sum:
            raise BabyError(f"the held-out case {case} makes {a + b}, above the largest sum {max_sum}")
        found |= {(a, operator, b): None, (b, operator, a): None}
    return list(found)


def _undetermined(max_sum: int, digits: int, operators: str, n_ctx: int) -> set[str]:
    """Undetermined contexts of the full table."""
    return undetermined(equations(max_sum, (), digits, operators), n_ctx)
