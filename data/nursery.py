"""Nursery: an endless text of short stories, whose entropy per character is known exactly.

The stories are drawn from a probabilistic grammar, independently of one another, and each ends with a blank
line. The grammar is the two tables below, ROLES and RULES; writing a story and computing the entropy walk these
same tables, so editing the words cannot make the entropy wrong.

What a template may hold is in grammar.py, with the check that a text shows every choice that was made.

Why the entropy is exact: the probability of a text is the product of the probabilities of its choices. Entropies
of successive choices add up, so the expected -log p of a story is a sum over the rules; so is the expected
number of characters. Stories are independent and each shows where it ends, hence the entropy per character of
an endless text is the one divided by the other. No model can have a lower expected loss.
"""

import random
from bisect import bisect
from collections.abc import Callable, Iterator
from typing import Any

from baby_xp_data.grammar import Choice, Grammar, Part, innermost_first, make_grammar

from baby_xp.errors import BabyError

Memory = dict[str, tuple[str, ...]]
"""The row drawn last, by role."""

# Rows that two roles share, so that a story can have two of these things at once.
ANIMALS = (
    ("cat", "meow"), ("dog", "woof"), ("duck", "quack"), ("pig", "oink"), ("hen", "cluck"), ("cow", "moo"),
    ("bee", "buzz"), ("frog", "croak"), ("bear", "grr"), ("lion", "roar"), ("goose", "honk"),
    ("mouse", "squeak"), ("sheep", "baa"), ("dove", "coo"))
THINGS = (
    ("hat",), ("box",), ("bed",), ("bag",), ("tub",), ("pot",), ("cup",), ("bus",), ("log",), ("cart",),
    ("boat",), ("drum",), ("tent",), ("sock",))

# What a story remembers: a role is (fields, rows).
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

# How a story is written: rule -> alternatives.
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


NURSERY = make_grammar(RULES, ROLES)


# --- writing -------------------------------------------------------------------------------------------

def stories(seed: int, grammar: Grammar = NURSERY) -> Iterator[str]:
    """Stories without end, each with the blank line that ends it; the same for a seed on every machine.

    BabyError if seed is not a whole number from 0 on.
    """
    if not isinstance(seed, int) or seed < 0:
        raise BabyError(f"the seed of the stories must be a whole number of at least 0, not {seed!r}")
    # random.Random.random is the only generator in Python whose numbers are guaranteed to stay the same from
    # version to version (choice, shuffle and NumPy's Generator methods are not); the rest is whole numbers.
    uniform = random.Random(seed).random
    while True:
        words: list[str] = []
        _write(grammar, grammar.start, {}, uniform, words)
        yield "".join(words)


def generate(n_chars: int, seed: int) -> str:
    """Whole stories, until there are at least n_chars characters of them. BabyError if n_chars is below 1."""
    if n_chars < 1:
        raise BabyError(f"the number of characters to generate must be at least 1, not {n_chars}")
    whole, length = [], 0
    for story in stories(seed):
        whole.append(story)
        length += len(story)
        if length >= n_chars:
            break
    return "".join(whole)


def _write(
    grammar: Grammar, rule: str, memory: Memory, uniform: Callable[[], float], words: list[str]
) -> None:
    for part in _draw(grammar.rules[rule], uniform):
        if part.kind == "text":
            words.append(part.name)
        elif part.kind == "rule":
            _write(grammar, part.name, memory, uniform, words)
        else:
            if part.kind == "draw":
                memory[part.name] = _draw(grammar.roles[part.name], uniform)
            words.append(part.word(memory[part.name]))


def _draw(choice: Choice, uniform: Callable[[], float]) -> Any:
    return choice.options[bisect(choice.cumulative, uniform() * choice.cumulative[-1])]


# --- entropy -------------------------------------------------------------------------------------------

def entropy_per_character(grammar: Grammar = NURSERY) -> float:
    """The entropy of the text in nats per character: the least expected loss that a model can have."""
    nats, characters = story_expectations(grammar)
    return nats / characters


def story_expectations(grammar: Grammar = NURSERY) -> tuple[float, float]:
    """Of one story with its blank line: (entropy in nats, expected number of characters), both exact."""
    known: dict[str, tuple[float, float]] = {}
    for rule in innermost_first(grammar):
        choice, nats, characters = grammar.rules[rule], [], []
        for template in choice.options:
            of_parts = [_part_expectations(grammar, part, known) for part in template]
            nats.append(sum(part_nats for part_nats, _ in of_parts))
            characters.append(sum(part_characters for _, part_characters in of_parts))
        known[rule] = choice.entropy() + choice.mean(nats), choice.mean(characters)
    return known[grammar.start]


def _part_expectations(
    grammar: Grammar, part: Part, known: dict[str, tuple[float, float]]
) -> tuple[float, float]:
    if part.kind == "text":
        return 0.0, len(part.name)
    if part.kind == "rule":
        return known[part.name]
    rows = grammar.roles[part.name]
    # What follows never depends on which row was drawn, so a recalled word has the mean length of all rows.
    characters = rows.mean([len(part.word(row)) for row in rows.options])
    return (rows.entropy() if part.kind == "draw" else 0.0), characters
