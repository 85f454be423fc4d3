"""Equations: babyLLM's data, sums of two one-digit numbers such as "1+1=2 ", some held out to test generalisation.

There are 13 tokens, one per character; an id is the index in VOCABULARY: "1+1=2 " is [3, 1, 3, 12, 4, 0]. Minus,
where a table has it, is the 14th. The equation model sees CONTEXT = 4 tokens and predicts the next one. An
equation gives every window of 4 tokens inside it, with the token that follows; no window spans two
equations:

    "1+1=2 "    "1+1=" -> "2",   "+1=2" -> " "
    "8+9=17 "   "8+9=" -> "1",   "+9=1" -> "7",   "9=17" -> " "

What is left out of training for a held-out case a+b:
  - the equation a+b with all its windows, so also "+4=8" -> " ", which says that some digit plus 4 makes 8;
  - the equation b+a with all its windows, since addition commutes.
No other equation gives a window with the same context and the same target: in each of the three kinds of
window, the two together show the second digit and the sum, hence the first digit too.

A model can generalise from what stays: the other pairs with the same sum (for 4+4: 3+5=8, 8+0=8 and so on) and
the neighbours (4+3=7, 5+4=9). No model can answer some cases: 0+0, since no other answer begins with its digit,
and with sums up to 9 also 0+1, for the same reason, and 0+9, since no other equation has the operand 9.

Contexts that do not determine the target: above a sum of 9, "+9=1" is followed by any digit from 0 to 8, as
the first digit lies outside the window. A context is undetermined if, in the whole table, held-out equations
included, it is followed by more than one token. Windows with such contexts are left out of training: no model can
learn them, and they would put a floor under its loss. The whole table counts because otherwise, with sums up to
10 and 1+9 held out, "+1=1" -> " " (from 0+1=1) would look certain, and would teach a wrong answer to a held-out
context.

Beyond the document: operands of up to three digits, minus, and a longer context. If n_ctx is not 4, the targets
are what follows "=", and a context is everything before, padded with spaces on the left:

    "9+8=17 "   "  9+8=" -> "1",   " 9+8=1" -> "7",   "9+8=17" -> " "     with n_ctx 6

A context of 3 digits + 3 tokens holds the longest equation of a table whole. Nothing is then undetermined. For a
held-out a-b, b-a is left out too: it has the same digits after its sign.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from baby_xp import checks
from baby_xp.errors import BabyError

VOCABULARY = " +0123456789="
MINUS = "-"
CONTEXT = 4
SHUFFLE = 0x6865_6C64
"""Separates the choice of held-out cases from other numbers that are drawn with the same seed."""

Case = tuple[int, str, int]
"""An operand, an operator, an operand."""


@dataclass(frozen=True)
class EquationTable:
    """All equations "a+b=s " and "a-b=d " whose operands have up to `digits` digits.

    max_sum: the largest sum, 0 for all of them; differences have no limit. operators: "+", "-" or "+-".
    Raises BabyError if max_sum is below 9 or above the largest sum of the digits.
    """

    max_sum: int = 9
    digits: int = 1
    operators: str = "+"

    def __post_init__(self) -> None:
        largest = 2 * (10**self.digits - 1)
        if self.max_sum != 0 and self.max_sum not in range(9, largest + 1):
            raise BabyError(
                f"the largest sum is a whole number from 9 to {largest} with operands of {self.digits} "
                f"digit{'s' * (self.digits > 1)}, or 0 for all, not {self.max_sum!r}"
            )

    @property
    def vocabulary(self) -> str:
        """The characters that the equations are written with, in the order of their ids."""
        return VOCABULARY + MINUS * (MINUS in self.operators)

    @property
    def longest(self) -> int:
        """Tokens of the longest equation without its last space: 6 for "9+9=18", the n_ctx that holds it whole."""
        return 3 * self.digits + 3

    @property
    def example(self) -> str:
        """A case of the table."""
        return "4+4" if "+" in self.operators else "8-4"

    def __contains__(self, case: Case | None) -> bool:
        return case is not None and self._has_form_of(case) and not self._is_above_max_sum(case)

    def _has_form_of(self, case: Case) -> bool:
        a, operator, b = case
        return operator in self.operators and max(a, b) < 10**self.digits

    def _is_above_max_sum(self, case: Case) -> bool:
        a, operator, b = case
        return operator == "+" and bool(self.max_sum) and a + b > self.max_sum

    def cases(self) -> list[Case]:
        """Every case, held-out ones included."""
        operands = range(10**self.digits)
        every = ((a, operator, b) for operator in self.operators for a in operands for b in operands)
        return [case for case in every if case in self]

    def distinct(self) -> list[str]:
        """Cases such as "4+4", one of each pair of mirrors: what can be held out, one after the other."""
        return [f"{a}{operator}{b}" for a, operator, b in self.cases() if a <= b]

    def equations(self, held_out: Collection[str] = ()) -> list[str]:
        """All equations except the held-out cases and their mirrors. Raises BabyError as `with_mirrors` does."""
        left_out = set(self.with_mirrors(held_out))
        return [written(case) for case in self.cases() if case not in left_out]

    def held_out_equations(self, held_out: Collection[str]) -> list[str]:
        """The equations that `equations` leaves out: each case, followed by its mirror if that differs."""
        return [written(case) for case in self.with_mirrors(held_out)]

    def with_mirrors(self, held_out: Collection[str]) -> list[Case]:
        """The held-out cases, each with its mirror, without repeats, in the given order; a str is a single case.

        Raises BabyError for a case that the table does not have.
        """
        found: dict[Case, None] = {}
        for text in [held_out] if isinstance(held_out, str) else held_out:
            case = parsed(text)
            if case is None or not self._has_form_of(case):
                operand = "digit" if self.digits == 1 else "number"
                form = " or ".join(operand + operator + operand for operator in self.operators)
                raise BabyError(f"a held-out case must be {form}, such as {self.example}, not {text!r}")
            a, operator, b = case
            if self._is_above_max_sum(case):
                raise BabyError(f"the held-out case {text} is {a + b}, above the largest sum {self.max_sum}")
            found |= {(a, operator, b): None, (b, operator, a): None}
        return list(found)

    def choose(self, held_out: str, seed: int) -> list[str]:
        """The cases that a text such as "4+4", "4+4,3+5" or "10%" names; a share is drawn with the seed.

        Raises BabyError if it names a case that the table does not have, or no share between 0% and 100%.
        """
        if held_out.endswith("%"):
            try:
                share = float(held_out[:-1]) / 100
            except ValueError:
                raise BabyError(f"a held-out share must be a number such as 10%, not {held_out!r}") from None
            return self.draw(share, seed)
        named = _split(held_out)
        self.with_mirrors(named)
        return named

    def draw(self, share: float, seed: int) -> list[str]:
        """A share of `distinct`, at least one of them, drawn with the seed. BabyError unless 0 < share < 1."""
        if not 0 < share < 1:
            raise BabyError(f"the held-out share must be between 0% and 100%, not {100 * share:g}%")
        known = self.distinct()
        key = np.array([seed % 2**64, SHUFFLE], dtype=np.uint64)
        order = np.argsort(np.random.Philox(key=key).random_raw(len(known)), kind="stable")
        return [known[i] for i in sorted(order[: max(1, round(share * len(known)))])]

    def suitable(self, held_out: str) -> str:
        """`held_out`, or a case of this table if it names cases of other tables only; a share suits every table.
        """
        named = [parsed(case) for case in _split(held_out)]
        return held_out if None in named or all(case in self for case in named) else self.example

    def undetermined(self, n_ctx: int = CONTEXT) -> set[str]:
        """The contexts of n_ctx characters that are followed by more than one token in the whole table."""
        if n_ctx >= self.longest:
            return set()
        followers: dict[str, set[str]] = {}
        for context, target in windows(self.equations(), n_ctx):
            followers.setdefault(context, set()).add(target)
        return {context for context, targets in followers.items() if len(targets) > 1}

    def question(self, text: str) -> str:
        """A question as it is in the equations: "4 + 4" -> "4+4=". Raises BabyError if it is not in the table."""
        asked = "".join(checks.text("question", text).split()).removesuffix("=")
        case = parsed(asked)
        if case is None or not self._has_form_of(case):
            operands = f"operands of at most {self.digits} digit{'s' * (self.digits > 1)}"
            form = f"ask {self.example}=, with {' or '.join(self.operators)} and {operands}"
            raise BabyError(f"{checks.shown_value(text)} is not a question of the table: {form}")
        if self._is_above_max_sum(case):
            known = f"the table has sums up to {self.max_sum}: ask {self.example}=, for example"
            raise BabyError(f"{asked} is {case[0] + case[2]}, and {known}")
        return f"{asked}="

    def begins_answer(self, text: str) -> bool:
        """Whether a text is a question of the table such as "4+4=", or continues one as its equation does."""
        case = parsed(text.partition("=")[0])
        return "=" in text and case is not None and case in self and written(case).startswith(text)


BABYLLM = EquationTable()
"""babyLLM's table: sums of two one-digit numbers up to 9."""


def encode(text: str, operators: str = "+") -> np.ndarray:
    """The ids of the characters of `text`: int32, shape (len(text),). BabyError for an unknown character."""
    known = EquationTable(operators=operators).vocabulary
    unknown = sorted(set(text) - set(known))
    if unknown:
        raise BabyError(f"an equation has no character {unknown[0]!r}; it is written with {known!r}")
    return np.array([known.index(character) for character in text], dtype=np.int32)


def decode(ids: Iterable[int], operators: str = "+") -> str:
    """The text of ids. BabyError for an id that the vocabulary does not have."""
    whole, known = [int(token) for token in ids], EquationTable(operators=operators).vocabulary
    # checked, because Python counts a negative index from the end
    wrong = [token for token in whole if not 0 <= token < len(known)]
    if wrong:
        raise BabyError(f"no character has the id {wrong[0]}; ids go from 0 to {len(known) - 1}")
    return "".join(known[token] for token in whole)


def pairs(
    equations: Iterable[str], leave_out: Collection[str] = (), n_ctx: int = CONTEXT
) -> tuple[np.ndarray, np.ndarray]:
    """(contexts (n, n_ctx), targets (n,)), int32: windows of the equations, and the token that follows each.

    Windows whose context is in `leave_out` are left out.
    """
    kept = [(context, target) for context, target in windows(equations, n_ctx) if context not in leave_out]
    contexts = encode("".join(context for context, _ in kept), "+-").reshape(-1, n_ctx)
    return contexts, encode("".join(target for _, target in kept), "+-")


def rows(equations: Sequence[str], n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs (n, n_ctx), targets (n, n_ctx)), int32: one equation per row, padded with spaces on the right, for a
    model that predicts every next token.

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
        # with babyLLM's context: every window inside the equation; the first one ends with "=", as always
        first = CONTEXT if n_ctx == CONTEXT else equation.index("=") + 1
        for end in range(first, len(equation)):
            found.append((equation[max(0, end - n_ctx) : end].rjust(n_ctx), equation[end]))
    return found


def question(equation: str) -> str:
    """An equation up to and including "="."""
    return equation[: equation.index("=") + 1]


def answer(equation: str) -> str:
    """The part of an equation after "=", with the space at the end."""
    return equation[equation.index("=") + 1 :]


def case_of(equation: str) -> Case:
    """The case of an equation: "1+2=3 " -> (1, "+", 2)."""
    a, operator, b = re.split("([+-])", question(equation)[:-1])
    return int(a), operator, int(b)


def written(case: Case) -> str:
    """The equation of a case: (1, "+", 2) -> "1+2=3 "."""
    a, operator, b = case
    return f"{a}{operator}{b}={a + b if operator == '+' else a - b} "


def parsed(text: str) -> Case | None:
    """The case that a text such as "4+4" or "12-34" names; None if it is not a case of any table."""
    number = "(0|[1-9][0-9]{0,9})"  # no table has longer ones
    parts = re.fullmatch(f"{number}([+-]){number}", text)
    return (int(parts[1]), parts[2], int(parts[3])) if parts else None


def _split(held_out: str) -> list[str]:
    return [case.strip() for case in held_out.split(",")]
