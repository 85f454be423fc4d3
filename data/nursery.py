"""Nursery: an endless text of little stories, whose entropy per character is known exactly.

The stories are drawn from a probabilistic grammar, independently of one another, and each ends with a blank
line. The grammar is the two tables below, ROLES and RULES; writing a story, scoring a text and computing the
entropy all walk these same tables, so editing the words cannot make the entropy wrong.

In a template,
    {event}         is written by the rule of that name;
    {pet!name}      draws a new pet from its role, and writes its name;
    {pet.sound}     recalls the pet drawn last: here its sound. {pet.Sound} starts with a capital letter.
Alternatives in a tuple are equally likely; in a dict each has a weight, a whole number.

Why the entropy is exact: `check_grammar` makes sure that, reading a story from the left, no text of one
alternative of a rule begins a text of another one, and that no word of a role, where it is drawn, begins
another. A text then shows every choice that was made, and its probability is the product of theirs. Entropies
of successive choices add up, so the expected -log p of a story is a sum over the rules; so is the expected
number of characters. Stories are independent and each shows where it ends, hence the entropy per character of
an endless text is the one divided by the other. No model can have a lower expected loss.
"""

import math
import random
import re
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, pairwise

from baby_xp.errors import BabyError

ANIMALS = (
    ("cat", "meow"), ("dog", "woof"), ("duck", "quack"), ("pig", "oink"), ("hen", "cluck"), ("cow", "moo"),
    ("bee", "buzz"), ("frog", "croak"), ("bear", "grr"), ("lion", "roar"), ("goose", "honk"),
    ("mouse", "squeak"), ("sheep", "baa"), ("dove", "coo"))

# Rows that two roles share, so that a story can tell of two such things at once.
ANIMALS = (
    ("cat", "meow"), ("dog", "woof"), ("duck", "quack"), ("pig", "oink"), ("hen", "cluck"), ("cow", "moo"),
    ("bee", "buzz"), ("frog", "croak"), ("bear", "grr"), ("lion", "roar"), ("goose", "honk"),
    ("mouse", "squeak"), ("sheep", "baa"), ("dove", "coo"))
THINGS = (
    ("hat",), ("box",), ("bed",), ("bag",), ("tub",), ("pot",), ("cup",), ("bus",), ("log",), ("cart",),
    ("boat",), ("drum",), ("tent",), ("sock",))

# What a story remembers: a role is (its fields, its rows).
ROLES = {
    "child": (("name", "she"), (
        ("Mia", "she"), ("Zoe", "she"), ("Lily", "she"), ("Anna", "she"), ("Nora", "she"),
        ("Tom", "he"), ("Ben", "he"), ("Max", "he"), ("Leo", "he"), ("Finn", "he"))),
    "pet": (("name", "sound"), ANIMALS),
    "guest": (("name", "sound"), ANIMALS),
    "toy": (("name",), THINGS),
    "seat": (("name",), THINGS),
    "place": (("name",), (
        ("farm",), ("park",), ("pond",), ("wood",), ("hill",), ("zoo",), ("sea",), ("shop",), ("barn",),
        ("beach",))),
    "song": (("words",), (
        ("la la la",), ("hop hop hop",), ("clap clap clap",), ("tip tap tip",), ("one two three",),
        ("hey ho",))),
}

# How a story is told: rule -> alternatives.
RULES = {
    "story": ("{opening}\n{outing}\n{event}\n{more}\n\n",),
    "more": {"{event}\n{last}": 3, "{ending}": 1},
    "last": {"{event}\n{ending}": 1, "{ending}": 2},

    "opening": {
        "{child!name} has a {look}, {look}, {colour} {pet!name}. {says}": 2,
        "This is {child!name} with a {look}, {look}, {colour} {pet!name}. {says}": 1,
        "Look, {child!name} has a {pet!name}! It is {look}, {look} and {colour}. {says}": 1,
        "Here comes {child!name} on a {look}, {look}, {colour} {pet!name}. {says}": 1,
    },
    "says": {"{pet.Sound}!": 2, "{pet.Sound}, says the {pet.name}.": 1},

    "outing": (
        "They {go} to the {look} {colour} {place!name}, {song!words}!",
        "They {go} and {go} to a {look} {colour} {place!name}, {song!words}!",
        "It is a {look}, {look} day. They {go} to a {look} {place!name}, {song!words}!",
    ),

    "event": {
        "{child.name} {finds} a {look} {colour} {toy!name} {spot}. {play}": 5,
        "A {look} {colour} {guest!name} {moves} {spot}. {guest.Sound}!": 4,
        "{guest!Sound}! Who {moves} {spot}? It is a {look} {colour} {guest.name}!": 3,
        "The {pet.name} {moves} {spot}. {child.She} {moves} {spot}. {song.Words}!": 2,
        "Where is the {pet.name}? Is it {spot}? No, {spot}!": 2,
        "They eat {number} {look} {colour} {food} and {number} {look} {colour} {food}. Yum!": 2,
        "See the {toy!name}s! A {look} {toy.name}, a {look} {toy.name}, a {look} {colour} {toy.name}!": 2,
    },
    "play": (
        "The {pet.name} {wants} it.",
        "{child.She} puts it {spot}.",
        "Now the {toy.name} is {spot}.",
        "{song.Words}!",
    ),

    "ending": {
        "Good night, {look} {place.name}. Good night, {look} {colour} {seat!name}. "
        "Good night, {child.name}!": 1,
        "They {go} home. The {pet.name} naps {spot}. Good night, {child.name}!": 1,
        "{child.name} naps {spot}. The {pet.name} naps {spot}. Good night!": 2,
    },

    "spot": ("{where} the {look} {seat!name}", "{where} the {colour} {seat!name}"),
    "where": ("under", "behind", "by", "near", "on", "in"),
    "go": ("walk", "run", "hop", "skip", "ride", "march", "fly", "swim"),
    "moves": (
        "jumps", "rolls", "sits", "spins", "hides", "digs", "waves", "sings", "hums", "swims", "hops"),
    "finds": ("finds", "sees", "gets", "drops", "makes", "wants"),
    "wants": ("wants", "likes", "bites", "kicks", "hugs"),
    "look": (
        "big", "soft", "hot", "happy", "funny", "shy", "wet", "warm", "new", "fat", "tiny", "slow", "good",
        "cold", "loud", "nice"),
    "colour": ("red", "blue", "green", "pink", "brown", "white", "black", "gold", "tan", "grey"),
    "number": ("two", "three", "four", "five", "six", "ten"),
    "food": ("plums", "buns", "cakes", "nuts", "pears", "figs", "eggs", "pies"),
}


@dataclass(frozen=True)
class Choice:
    """One draw among `options`. `cumulative`: the running sums of their weights; `log_p`: in nats."""

    options: tuple
    cumulative: tuple[int, ...]
    log_p: tuple[float, ...]

    def entropy(self) -> float:
        """The entropy of this draw alone, in nats."""
        return -self.mean(self.log_p)

    def mean(self, values) -> float:
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
    """The tables made ready: rule -> Choice of templates (tuples of Part), role -> Choice of rows."""

    rules: dict[str, Choice]
    roles: dict[str, Choice]
    start: str


def make_grammar(rules: dict, roles: dict, start: str = "story") -> Grammar:
    """The grammar of two tables such as RULES and ROLES, checked by `check_grammar`.

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


def _choice(where: str, alternatives) -> Choice:
    weights = list(alternatives.values()) if isinstance(alternatives, dict) else [1] * len(alternatives)
    if isinstance(alternatives, str) or not weights or any(not isinstance(w, int) or w < 1 for w in weights):
        raise BabyError(f"{where}: give a tuple of alternatives, or a dict with whole numbers above 0")
    log_p = tuple(math.log(w / sum(weights)) for w in weights)
    return Choice(tuple(alternatives), tuple(accumulate(weights)), log_p)


def _template(text: str, rule: str, rules: dict, roles: dict) -> tuple[Part, ...]:
    # split leaves the literal text at even places and what stood in braces at odd ones
    pieces = re.split(r"\{([^{}]*)\}", text)
    parts = [Part("text", piece) if i % 2 == 0 else _reference(piece, rule, rules, roles)
             for i, piece in enumerate(pieces)]
    if any("{" in part.name or "}" in part.name for part in parts):
        raise BabyError(f"rule {rule!r}: a brace in {text!r} has no partner")
    return tuple(part for part in parts if part.name)


def _reference(inside: str, rule: str, rules: dict, roles: dict) -> Part:
    if inside in rules:
        return Part("rule", inside)
    role, mark, field = re.fullmatch(r"(\w*)([!.]?)(.*)", inside, re.DOTALL).groups()
    fields = roles[role][0] if role in roles else ()
    if not mark or field.lower() not in fields:
        raise BabyError(f"rule {rule!r}: {{{inside}}} is neither a rule nor a field of a role")
    return Part("draw" if mark == "!" else "recall", role, fields.index(field.lower()), field[0].isupper())


# --- writing -------------------------------------------------------------------------------------------

def stories(seed: int, grammar: Grammar | None = None) -> Iterator[str]:
    """Stories without end, each with the blank line that ends it; the same for a seed on every machine.

    BabyError if seed is not a whole number from 0 on.
    """
    if not isinstance(seed, int) or seed < 0:
        raise BabyError(f"the seed of the stories is a whole number from 0 on, not {seed!r}")
    return _stories(seed, grammar or NURSERY)


def _stories(seed: int, grammar: Grammar) -> Iterator[str]:
    # random.Random.random is the one generator of Python whose numbers are promised to stay the same from
    # version to version (choice, shuffle and NumPy's Generator methods are not); the rest is whole numbers.
    uniform = random.Random(seed).random
    while True:
        words: list[str] = []
        _write(grammar, grammar.start, {}, uniform, words)
        yield "".join(words)


def generate(n_chars: int, seed: int, grammar: Grammar | None = None) -> str:
    """Whole stories, until there are at least n_chars characters of them. BabyError if n_chars is below 1."""
    if n_chars < 1:
        raise BabyError(f"the number of characters to generate is at least 1, not {n_chars}")
    told, length = [], 0
    for story in stories(seed, grammar):
        told.append(story)
        length += len(story)
        if length >= n_chars:
            break
    return "".join(told)


def _write(grammar: Grammar, rule: str, memory: dict, uniform, words: list[str]) -> None:
    for part in _draw(grammar.rules[rule], uniform):
        if part.kind == "text":
            words.append(part.name)
        elif part.kind == "rule":
            _write(grammar, part.name, memory, uniform, words)
        else:
            if part.kind == "draw":
                memory[part.name] = _draw(grammar.roles[part.name], uniform)
            words.append(part.word(memory[part.name]))


def _draw(choice: Choice, uniform):
    return choice.options[bisect(choice.cumulative, uniform() * choice.cumulative[-1])]


# --- entropy -------------------------------------------------------------------------------------------

def entropy_per_character(grammar: Grammar | None = None) -> float:
    """The entropy of the text in nats per character: the least expected loss that a model can have."""
    nats, characters = story_expectations(grammar)
    return nats / characters


def story_expectations(grammar: Grammar | None = None) -> tuple[float, float]:
    """Of one story with its blank line: (entropy in nats, expected number of characters), both exact."""
    grammar = grammar or NURSERY
    known: dict[str, tuple[float, float]] = {}
    for rule in _innermost_first(grammar):
        choice, nats, characters = grammar.rules[rule], [], []
        for template in choice.options:
            of_parts = [_part_expectations(grammar, part, known) for part in template]
            nats.append(sum(part_nats for part_nats, _ in of_parts))
            characters.append(sum(part_characters for _, part_characters in of_parts))
        known[rule] = choice.entropy() + choice.mean(nats), choice.mean(characters)
    return known[grammar.start]


def _part_expectations(grammar: Grammar, part: Part, known: dict) -> tuple[float, float]:
    if part.kind == "text":
        return 0.0, len(part.name)
    if part.kind == "rule":
        return known[part.name]
    rows = grammar.roles[part.name]
    # What is told never depends on which row was drawn, so a recalled word has the mean length of all rows'.
    characters = rows.mean([len(part.word(row)) for row in rows.options])
    return (rows.entropy() if part.kind == "draw" else 0.0), characters


def _innermost_first(grammar: Grammar) -> list[str]:
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


# --- reading -------------------------------------------------------------------------------------------

def log_probability(text: str, grammar: Grammar | None = None) -> float:
    """The log-probability, in nats, that the first stories told are exactly `text`, which is whole stories.

    The empty text is no story at all: 0. BabyError if the text is not of the grammar.
    """
    grammar = grammar or NURSERY
    place, total, count = 0, 0.0, 0
    while place < len(text):
        count += 1
        read = _read_rule(grammar, grammar.start, text, place, {})
        if read is None:
            beginning = text[place:place + 40]
            raise BabyError(f"story {count} is not of the grammar, or not whole; it begins {beginning!r}")
        log_p, place, _ = read
        total += log_p
    return total


def _read_rule(grammar: Grammar, rule: str, text: str, place: int, memory: dict):
    """(log-probability in nats, the place reached, what is remembered) of `rule` at `place`, or None."""
    choice = grammar.rules[rule]
    for template, log_p in zip(choice.options, choice.log_p, strict=True):
        read = _read_template(grammar, template, text, place, memory)
        if read is not None:
            # The first alternative that fits is the one: in a checked grammar no other fits.
            return read[0] + log_p, *read[1:]
    return None


def _read_template(grammar: Grammar, template: tuple[Part, ...], text: str, place: int, memory: dict):
    total = 0.0
    for part in template:
        if part.kind == "rule":
            read = _read_rule(grammar, part.name, text, place, memory)
        elif part.kind == "draw":
            read = _read_draw(grammar.roles[part.name], part, text, place, memory)
        else:
            word = part.name if part.kind == "text" else part.word(memory[part.name])
            read = (0.0, place + len(word), memory) if text.startswith(word, place) else None
        if read is None:
            return None
        log_p, place, memory = read
        total += log_p
    return total, place, memory


def _read_draw(rows: Choice, part: Part, text: str, place: int, memory: dict):
    for row, log_p in zip(rows.options, rows.log_p, strict=True):
        word = part.word(row)
        if text.startswith(word, place):
            # a new dict, because the alternative that is being tried may yet turn out wrong
            return log_p, place + len(word), {**memory, part.name: row}
    return None


# --- checking ------------------------------------------------------------------------------------------

def check_grammar(grammar: Grammar | None = None) -> None:
    """BabyError unless every text shows how it was written: see the top of this file for what that takes.

    The check is on the strict side: to compare two alternatives, it lets a recalled word be that of any row.
    """
    grammar = grammar or NURSERY
    for rule in _innermost_first(grammar):
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
    """Whether `parts` can be over already, and letter -> the parts that can be left after reading it."""
    if not parts:
        return True, {}
    first, rest = parts[0], parts[1:]
    if first.kind == "text":
        left = (Part("text", first.name[1:]), *rest) if first.name[1:] else rest
        return False, {first.name[0]: {left}}
    if first.kind == "rule":
        options = grammar.rules[first.name].options
    else:
        options = [(Part("text", first.word(row)),) for row in grammar.roles[first.name].options]
    ends, following = False, {}
    for option in options:
        option_ends, letters = _letters(grammar, (*option, *rest))
        ends = ends or option_ends
        for letter, left in letters.items():
            following.setdefault(letter, set()).update(left)
    return ends, following


NURSERY = make_grammar(RULES, ROLES)
