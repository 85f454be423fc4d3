"""Equations: babyLLM's data, sums of two digits such as "1+1=2 ", some held out to test generalisation.

There are 13 tokens, one a character; an id is the place in VOCABULARY: "1+1=2 " is [3, 1, 3, 12, 4, 0].
The model sees CONTEXT = 4 tokens and predicts the next one. An equation gives every window of 4 tokens inside
it, with the token that follows; no window crosses from one equation to the next:

    "1+1=2 "    "1+1=" -> "2",   "+1=2" -> " "
    "8+9=17 "   "8+9=" -> "1",   "+9=1" -> "7",   "9=17" -> " "

What is left out of training for a held-out case a+b:
  - the equation a+b with all its windows, so also "+4=8" -> " ", which says that some digit plus 4 makes 8;
  - the equation b+a with all its windows, since addition commutes.
No other equation gives a window with the same context and the same target: in each of the three kinds of
window, the two together show the second digit and the sum, hence the first digit too.

What stays is what a model can generalise from: the other pairs with the same sum (for 4+4: 3+5=8, 8+0=8 and
so on) and the neighbours (4+3=7, 5+4=9). Two cases cannot be answered, since no other equation has an answer
that begins with their digit: 0+0, and with sums up to 9 also 0+1.

Contexts that do not determine the target: above a sum of 9, "+9=1" is followed by any digit from 0 to 8, as
the first digit lies outside the window. A context is undetermined if, in the full table of equations up to
max_sum, the held-out ones included, it is followed by more than one token. `training_pairs` and
`held_out_pairs` leave out the windows with such contexts unless `ambiguous` is true: no model can learn them,
and they would put a floor under its loss. The full table counts because otherwise, with sums up to 10 and 1+9
held out, "+1=1" -> " " (from 0+1=1) would look certain, and would teach a wrong answer to a held-out context.
With `ambiguous` true, a training window may have the context of a held-out one, but never with its target.
"""

import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from baby_xp.errors import BabyError

VOCABULARY = " +0123456789="
CONTEXT = 4
HELD_OUT = ("4+4",)


def encode(text: str) -> np.ndarray:
    """The ids of the characters of `text`: int32, shape (len(text),). BabyError for an unknown character."""
    unknown = sorted(set(text) - set(VOCABULARY))
    if unknown:
        raise BabyError(f"an equation has no character {unknown[0]!r}; it is written with {VOCABULARY!r}")
    return np.array([VOCABULARY.index(character) for character in text], dtype=np.int32)


def decode(ids: Iterable[int]) -> str:
    """The text of ids. BabyError for an id outside 0 to 12."""
    whole = [int(token) for token in ids]
    # checked, because Python takes an index below 0 as one from the end
    wrong = [token for token in whole if not 0 <= token < len(VOCABULARY)]
    if wrong:
        raise BabyError(f"no character has the id {wrong[0]}; ids go from 0 to {len(VOCABULARY) - 1}")
    return "".join(VOCABULARY[token] for token in whole)


def equations(max_sum: int = 9, held_out: Collection[str] = HELD_OUT) -> list[str]:
    """The equations "a+b=s " of two digits with s <= max_sum, without the held-out cases and their mirrors.

    BabyError if max_sum is not from 9 to 18, or a case is not digit+digit with a sum up to max_sum.
    """
    left_out = _cases(max_sum, held_out)
    return [_equation(a, b) for a, b in _digit_pairs(max_sum) if (a, b) not in left_out]


def held_out_equations(max_sum: int = 9, held_out: Collection[str] = HELD_OUT) -> list[str]:
    """The equations that `equations` leaves out: each case, followed by its mirror if that differs."""
    return [_equation(a, b) for a, b in _cases(max_sum, held_out)]


def undetermined(equations: Iterable[str]) -> set[str]:
    """The contexts (4 characters) that are followed by more than one token somewhere in these equations."""
    followers: dict[str, set[str]] = {}
    for context, target in _windows(equations):
        followers.setdefault(context, set()).add(target)
    return {context for context, targets in followers.items() if len(targets) > 1}


def pairs(equations: Iterable[str], leave_out: Collection[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(contexts (n, 4), targets (n,)), int32: each window of 4 tokens inside an equation, and the next token.

    Windows whose context (4 characters) is in `leave_out` are left out.
    """
    kept = [(context, target) for context, target in _windows(equations) if context not in leave_out]
    contexts = encode("".join(context for context, _ in kept)).reshape(-1, CONTEXT)
    return contexts, encode("".join(target for _, target in kept))


def training_pairs(
    max_sum: int = 9, held_out: Collection[str] = HELD_OUT, ambiguous: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """`pairs` of the equations to train on; undetermined contexts only if `ambiguous`."""
    return pairs(equations(max_sum, held_out), () if ambiguous else undetermined(equations(max_sum, ())))


def held_out_pairs(
    max_sum: int = 9, held_out: Collection[str] = HELD_OUT, ambiguous: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """`pairs` of the held-out equations, in the order of the cases: for "4+4", row 0 is "4+4=" -> "8"."""
    leave_out = () if ambiguous else undetermined(equations(max_sum, ()))
    return pairs(held_out_equations(max_sum, held_out), leave_out)


def _windows(equations: Iterable[str]) -> list[tuple[str, str]]:
    return [(equation[i:i + CONTEXT], equation[i + CONTEXT])
            for equation in equations for i in range(len(equation) - CONTEXT)]


def _equation(a: int, b: int) -> str:
    return f"{a}+{b}={a + b} "


def _digit_pairs(max_sum: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(10) for b in range(10) if a + b <= max_sum]


def _cases(max_sum: int, held_out: Collection[str]) -> Sequence[tuple[int, int]]:
    """The held-out (a, b), each with its mirror (b, a), without repeats, in the order given."""
    if max_sum not in range(9, 19):
        raise BabyError(f"the largest sum is a whole number from 9 to 18, not {max_sum!r}")
    cases: dict[tuple[int, int], None] = {}
    for case in [held_out] if isinstance(held_out, str) else held_out:
        digits = re.fullmatch(r"([0-9])\+([0-9])", case)
        if digits is None:
            raise BabyError(f"a held-out case is digit+digit, such as 4+4, not {case!r}")
        a, b = int(digits[1]), int(digits[2])
        if a + b > max_sum:
            raise BabyError(f"the held-out case {case} makes {a + b}, above the largest sum {max_sum}")
        cases |= {(a, b): None, (b, a): None}
    return list(cases)
