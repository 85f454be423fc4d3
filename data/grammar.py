"""Probabilistic grammars whose texts can be parsed unambiguously.

A grammar is two tables, such as ROLES and RULES in nursery.py. In a template,
    {event}         is written by the rule of that name;
    {pet!name}      draws a new pet from its role, and writes its name;
    {pet.sound}     recalls the pet drawn last: here its sound. {pet.Sound} starts with a capital letter.
Alternatives in a tuple are equally likely; in a dict each has a weight, a whole number.

`check_grammar` makes sure that, reading a text from the left, no text of one alternative of a rule begins a text
of another one, and that no word of a role, where it is drawn, begins another. A text then shows every choice that
was made, and its probability is the product of theirs.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, pairwise
from typing import Any

from baby_xp.errors import BabyError


@dataclass(frozen=True)
class Choice:
    """One draw among `options`. `cumulative`: the running sums of their weights; `log_p`: in nats."""

    options: tuple
    cumulative: tuple[int, ...]
    log_p: tuple[float, ...]

    def entropy(self) -> float:
        """The entropy of this draw, in nats."""
        return -self.mean(self.log_p)

    def mean(self, values: Iterable[float]) -> float:
        """The expected value, where option i is worth values[i]."""
        weights = (end - start for start, end in pairwise((0, *self.cumulative)))
        return sum(w * v for w, v in zip(weights, values, strict=True)) / self.cumulative[-1]


@dataclass(frozen=True)
class Part:
    """A piece of a template; `kind` is 'text' (`name` is written), 'rule', 'draw' or 'recall'.

    For the latter two, `name` is the role, `column` the field that is written, `capital` how.
    """

    kind: str
    name: str
    column: int = 0
    capital: bool = False

    def word(self, row: tuple[str, ...]) -> str:
        """What this part writes, given the row of its role."""
        word = row[self.column]
        return word[0].upper() + word[1:] if self.capital else word


@dataclass(frozen=True)
class Grammar:
    """The compiled tables: rule -> Choice of templates (tuples of Part), role -> Choice of rows."""

    rules: dict[str, Choice]
    roles: dict[str, Choice]
    start: str


def make_grammar(rules: dict, roles: dict, start: str = "story") -> Grammar:
    """The grammar of two tables, of rules and of roles, checked by `check_grammar`.

    BabyError if a name, a word or a weight is wrong, or if a text would not show how it was written.
    """
    if start not in rules:
        raise BabyError(f"the grammar has no rule {start!r} to start from")
    ready = Grammar({}, {}, start)
    for role, (fields, rows) in roles.items():
        if any(len(row) != len(fields) or not all(row) for row in rows):
            raise BabyError(f"role {role!r}: each row needs one word for each field: {', '.join(fields)}")
        ready.roles[role] = _choice(f"role {role!r}", rows)
    for rule, alternatives in rules.items():
        choice = _choice(f"rule {rule!r}", alternatives)
        templates = tuple(_template(text, rule, rules, roles) for text in choice.options)
        ready.rules[rule] = replace(choice, options=templates)
    check_grammar(ready)
    return ready


def _choice(where: str, alternatives: Any) -> Choice:
    weights = list(alternatives.values()) if isinstance(alternatives, dict) else [1] * len(alternatives)
    if isinstance(alternatives, str) or not weights or any(not isinstance(w, int) or w < 1 for w in weights):
        raise BabyError(f"{where}: give a tuple of alternatives, or a dict with whole numbers above 0")
    log_p = tuple(math.log(w / sum(weights)) for w in weights)
    return Choice(tuple(alternatives), tuple(accumulate(weights)), log_p)


def _template(text: str, rule: str, rules: dict, roles: dict) -> tuple[Part, ...]:
    # split puts the literal text at even indices and the contents of braces at odd ones
    pieces = re.split(r"\{([^{}]*)\}", text)
    parts = [Part("text", piece) if i % 2 == 0 else _reference(piece, rule, rules, roles)
             for i, piece in enumerate(pieces)]
    if any("{" in part.name or "}" in part.name for part in parts):
        raise BabyError(f"rule {rule!r}: a brace in {text!r} has no partner")
    return tuple(part for part in parts if part.name)


def _reference(inside: str, rule: str, rules: dict, roles: dict) -> Part:
    if inside in rules:
        return Part("rule", inside)
    kind = "draw" if "!" in inside else "recall"
    role, _, field = inside.partition("!" if kind == "draw" else ".")
    fields = roles[role][0] if role in roles else ()
    if field.lower() not in fields:
        raise BabyError(f"rule {rule!r}: {{{inside}}} is neither a rule nor a field of a role")
    return Part(kind, role, fields.index(field.lower()), field[0].isupper())


def innermost_first(grammar: Grammar) -> list[str]:
    """The rules that the start needs, each after the rules that it uses. BabyError if one uses itself."""
    order: list[str] = []

    def visit(rule: str, above: tuple[str, ...]) -> None:
        if rule in above:
            raise BabyError(f"rule {rule!r} uses itself, by way of {' > '.join((*above, rule))}")
        if rule in order:
            return
        for template in grammar.rules[rule].options:
            for part in template:
                if part.kind == "rule":
                    visit(part.name, (*above, rule))
        order.append(rule)

    visit(grammar.start, ())
    return order


# --- checking ------------------------------------------------------------------------------------------

def check_grammar(grammar: Grammar) -> None:
    """BabyError unless every text shows how it was written: see the top of this file for what that takes.

    The check is on the strict side: to compare two alternatives, it lets a recalled word be that of any row.
    """
    for rule in innermost_first(grammar):
        templates = grammar.rules[rule].options
        for left, right in combinations(templates, 2):
            _check_pair(grammar, rule, left, right)
        for part in (part for template in templates for part in template if part.kind == "draw"):
            _check_rows(rule, part, grammar.roles[part.name])
    _check_recalls(grammar, grammar.start, frozenset())
    if _letters(grammar, (Part("rule", grammar.start),))[0]:
        raise BabyError("a story of this grammar can be empty, and then no text tells how many there are")


def _check_pair(grammar: Grammar, rule: str, left: tuple[Part, ...], right: tuple[Part, ...]) -> None:
    shared = _shared_beginning(grammar, left, right)
    if shared is not None:
        raise BabyError(f"rule {rule!r} is ambiguous: one alternative can be {shared!r}, and so can another "
                        "one, or begin with it")


def _check_rows(rule: str, part: Part, rows: Choice) -> None:
    for left, right in combinations([part.word(row) for row in rows.options], 2):
        if left.startswith(right) or right.startswith(left):
            raise BabyError(f"rule {rule!r} draws a {part.name} by a word that does not tell which one: "
                            f"{left!r} or {right!r}")


def _check_recalls(grammar: Grammar, rule: str, drawn: frozenset[str]) -> frozenset[str]:
    """The roles that have surely been drawn after `rule`, given those drawn before it."""
    after = []
    for template in grammar.rules[rule].options:
        now = drawn
        for part in template:
            if part.kind == "rule":
                now = _check_recalls(grammar, part.name, now)
            elif part.kind == "draw":
                now = now | {part.name}
            elif part.kind == "recall" and part.name not in now:
                raise BabyError(f"rule {rule!r} recalls a {part.name} where none may have been drawn")
        after.append(now)
    return frozenset.intersection(*after)


def _shared_beginning(grammar: Grammar, left: tuple, right: tuple) -> str | None:
    """A text of one side that is, or begins, a text of the other one; None if there is none.

    Both sides are read at once, letter by letter. A side is the tuple of the parts still to be read.
    """
    waiting, seen = [(left, right, "")], set()
    while waiting:
        left, right, text = waiting.pop()
        left_ends, left_next = _letters(grammar, left)
        right_ends, right_next = _letters(grammar, right)
        if left_ends or right_ends:
            return text
        for letter in left_next.keys() & right_next.keys():
            for pair in ((a, b) for a in left_next[letter] for b in right_next[letter]):
                if pair not in seen:
                    seen.add(pair)
                    waiting.append((*pair, text + letter))
    return None


def _letters(grammar: Grammar, parts: tuple) -> tuple[bool, dict[str, set]]:
    """Whether `parts` can be empty, and letter -> the parts that can remain after reading it."""
    if not parts:
        return True, {}
    first, rest = parts[0], parts[1:]
    if first.kind == "text":
        after = (Part("text", first.name[1:]), *rest) if first.name[1:] else rest
        return False, {first.name[0]: {after}}
    options: Iterable[tuple[Part, ...]] = grammar.rules[first.name].options if first.kind == "rule" else [
        (Part("text", first.word(row)),) for row in grammar.roles[first.name].options
    ]
    ends, following = False, defaultdict[str, set](set)
    for option in options:
        option_ends, letters = _letters(grammar, (*option, *rest))
        ends = ends or option_ends
        for letter, left in letters.items():
            following[letter] |= left
    return ends, following
