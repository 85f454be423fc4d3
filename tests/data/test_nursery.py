"""The nursery: its entropy is exact, its texts can be parsed unambiguously, and a seed gives one text."""

import hashlib
import math
import re
from itertools import islice

import numpy as np
import pytest
from baby_xp_data import grammar, nursery
from baby_xp_data.grammar import Part

from baby_xp.errors import BabyError

# A small grammar with all features of the large one: weights, nested rules, draws by two fields, recalls.
ROLES = {
    "child": (("name", "she"), {("Mia", "she"): 2, ("Tom", "he"): 1}),
    "pet": (("name", "sound"), (("cat", "meow"), ("dog", "woof"), ("cow", "moo"))),
}
RULES = {
    "story": ("{child!name} has a {pet!name}. {event}\n\n",),
    "event": {
        "The {pet.name} {does}.": 3,
        "{child.She} says {pet.sound}, {pet.sound}.": 1,
        "{pet!Sound}! A {pet.name} {does}. {event2}": 2,
    },
    "event2": ("{child.She} {does}.", "Good night, {child.name}!"),
    "does": {"hops": 1, "naps": 4},
}


def enumerate_stories(roles=ROLES, rules=RULES):
    """(text, probability) of every derivation; written independently of the code under test."""
    def weighed(choices):
        items = list(choices.items()) if isinstance(choices, dict) else [(c, 1) for c in choices]
        total = sum(w for _, w in items)
        return [(c, w / total) for c, w in items]

    def expand(template, memory):
        head, brace, tail = template.partition("{")
        if not brace:
            return [(head, 1.0, memory)]
        inside, _, tail = tail.partition("}")
        if inside in rules:
            middle = [(text, p * q, after) for option, p in weighed(rules[inside])
                      for text, q, after in expand(option, memory)]
        else:
            role, mark, field = re.match(r"(\w+)([!.])(\w+)", inside).groups()
            fields, rows = roles[role]
            rows = weighed(rows) if mark == "!" else [(memory[role], 1.0)]
            middle = []
            for row, p in rows:
                word = row[fields.index(field.lower())]
                word = word.capitalize() if field[0].isupper() else word
                middle.append((word, p, {**memory, role: row}))
        return [(head + text + rest, p * q, last) for text, p, after in middle
                for rest, q, last in expand(tail, after)]

    return [(text, p) for text, p, _ in expand("{story}", {})]


def readings(grammar, parts, text, index, memory):
    """(log-probability, index reached, what is remembered) of each way to read `parts` in a text from an index."""
    if not parts:
        yield 0.0, index, memory
        return
    part, *rest = parts
    if part.kind == "rule":
        rule = grammar.rules[part.name]
        firsts = [(p + q, end, after) for template, p in zip(rule.options, rule.log_p, strict=True)
                  for q, end, after in readings(grammar, template, text, index, memory)]
    else:
        if part.kind == "draw":
            rows = grammar.roles[part.name]
            words = [(part.word(row), p, {**memory, part.name: row})
                     for row, p in zip(rows.options, rows.log_p, strict=True)]
        else:
            words = [(part.name if part.kind == "text" else part.word(memory[part.name]), 0.0, memory)]
        firsts = [(p, index + len(word), after) for word, p, after in words if text.startswith(word, index)]
    for p, middle, after in firsts:
        for q, end, last in readings(grammar, rest, text, middle, after):
            yield p + q, end, last


def log_probability(text, grammar=nursery.NURSERY):
    """The log-probability, in nats, that the first stories are exactly `text`; -inf if it is not whole stories."""
    index, total = 0, 0.0
    while index < len(text):
        found = list(readings(grammar, [Part("rule", grammar.start)], text, index, {}))
        assert len(found) <= 1, "the text does not show how it was written"
        p, index, _ = found[0] if found else (-math.inf, len(text), {})
        total += p
    return total


@pytest.fixture(scope="module")
def small():
    return grammar.make_grammar(RULES, ROLES)


@pytest.fixture(scope="module")
def sample():
    stories = list(islice(nursery.stories(7), 2000))
    nats = np.array([-log_probability(story) for story in stories])
    return stories, nats, np.array([len(story) for story in stories])


def test_a_small_grammar_matches_enumeration(small):
    stories = enumerate_stories()
    assert len({text for text, _ in stories}) == len(stories)
    assert math.isclose(sum(p for _, p in stories), 1.0)
    assert math.isclose(sum(math.exp(log_probability(text, small)) for text, _ in stories), 1.0)
    for text, p in stories:
        assert math.isclose(log_probability(text, small), math.log(p))
    (one, p), (two, q) = stories[:2]
    assert math.isclose(log_probability(one + two, small), math.log(p * q))
    assert log_probability("") == 0
    entropy = -sum(p * math.log(p) for _, p in stories)
    length = sum(p * len(text) for text, p in stories)
    assert np.allclose(nursery.story_expectations(small), (entropy, length), rtol=1e-12)
    assert math.isclose(nursery.entropy_per_character(small), entropy / length)


def test_a_small_grammar_is_sampled_with_its_probabilities(small):
    n = 20_000
    drawn = list(islice(nursery.stories(1, small), n))
    for text, p in enumerate_stories():
        assert abs(drawn.count(text) - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_entropy_is_the_mean_of_minus_log_probability(sample):
    stories, nats, lengths = sample
    expected_nats, expected_length = nursery.story_expectations()
    # the deviation of a ratio of means: nats - entropy * length has mean 0
    rate = nursery.entropy_per_character()
    for values, mean in ((nats, expected_nats), (lengths, expected_length), (nats - rate * lengths, 0.0)):
        standard_error = values.std(ddof=1) / math.sqrt(len(stories))
        assert abs(values.mean() - mean) < 5 * standard_error
    # so the test detects a forgotten choice of one nat per story, of the 85 that a story has
    assert 5 * standard_error < 1


def test_entropy_per_character_is_as_documented():
    assert nursery.entropy_per_character() == pytest.approx(0.285425, abs=1e-6)
    assert nursery.story_expectations() == pytest.approx((84.5796, 296.3290), abs=1e-4)


@pytest.mark.parametrize("rule", nursery.RULES)
def test_every_rule_counts(rule):
    """Split an alternative into two equally likely ones, the second with one more character: a use of it has
    ln 2 nats more and half a character more, so the two expectations rise in that proportion."""
    alternatives = nursery.RULES[rule]
    weights = dict(alternatives) if isinstance(alternatives, dict) else dict.fromkeys(alternatives, 1)
    first = next(iter(weights))
    split = {text: 2 * weight for text, weight in weights.items()}
    split |= {first: weights[first], "~" + first: weights[first]}
    nats, length = nursery.story_expectations()
    more_nats, more_length = nursery.story_expectations(
        grammar.make_grammar({**nursery.RULES, rule: split}, nursery.ROLES))
    assert more_length > length
    assert more_nats - nats == pytest.approx(2 * math.log(2) * (more_length - length))


def test_one_changed_character_is_detected(sample):
    stories, nats, _ = sample
    rng = np.random.default_rng(0)
    for story, before in zip(stories[:100], nats[:100], strict=True):
        place = rng.integers(len(story))
        changed = story[:place] + "#" + story[place + 1:]
        assert log_probability(changed) == -math.inf
        # a letter may make another word of the grammar: then the text is a story too, nearly as likely
        letter = "aeiou"[rng.integers(5)]
        changed = story[:place] + letter + story[place + 1:]
        after = -log_probability(changed)
        assert after == math.inf or changed == story or math.isclose(after, before, rel_tol=0.5)


@pytest.mark.parametrize("broken", [
    lambda text: text[:-1], lambda text: text[1:], lambda text: text + "x", lambda text: " " + text,
    lambda text: text.replace("Good night", "Good day"),
])
def test_anything_but_whole_stories_has_no_probability(broken):
    assert log_probability(broken(nursery.generate(1000, 3))) == -math.inf


def test_a_story_remembers_its_rows():
    """The grammar does not generate a story that changes the name of the child or the sound of the animal."""
    story = next(story for story in nursery.stories(0) if story.count("Max") > 1 and "She" not in story)
    sounds = "Woof|Meow|Quack|Oink|Cluck|Moo|Buzz|Croak|Grr|Roar|Honk|Squeak|Baa|Coo"
    assert -math.inf < log_probability(story) < 0
    assert log_probability("Leo".join(story.rsplit("Max", 1))) == -math.inf
    assert log_probability(re.sub(sounds, "Ding", story, count=1)) == -math.inf


def test_the_same_seed_gives_the_same_text():
    text = nursery.generate(10_000, 0)
    digest = hashlib.sha256(text[:10_000].encode()).hexdigest()
    assert digest == "8b2fa6b4939f3fe8c9d2ebd63467b6d1b26fa2acadbe395a169e19e4cfa3b779"
    assert nursery.generate(10_000, 0) == text
    assert nursery.generate(10_000, 1) != text
    assert nursery.generate(20_000, 0).startswith(text)
    assert text == "".join(islice(nursery.stories(0), text.count("\n\n")))


@pytest.mark.parametrize("n_chars", [1, 300, 5000])
def test_generate_stops_after_enough_characters(n_chars):
    text = nursery.generate(n_chars, 5)
    last = text[:-2].rpartition("\n\n")
    assert len(text) >= n_chars > len(last[0] + last[1])
    assert text.endswith("\n\n")


def test_the_vocabulary_is_small():
    text = nursery.generate(300_000, 0)
    assert set(text) <= set("\n .,!?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'")
    assert len(set(text)) <= 60
    assert len({word.lower() for word in re.findall(r"[A-Za-z']+", text)}) <= 200
    assert all(len(line) <= 100 for line in text.split("\n"))
    assert text.count("\n\n\n") == 0


@pytest.mark.parametrize(("n_chars", "seed"), [(0, 0), (-1, 0), (10, -1), (10, 1.5)])
def test_bad_arguments(n_chars, seed):
    with pytest.raises(BabyError):
        nursery.generate(n_chars, seed)


def story(template, **rules):
    return {"story": (template,), **rules}


@pytest.mark.parametrize(("rules", "message"), [
    (story("{a}.\n\n", a=("cat", "cat")), "rule 'a' is ambiguous.*'cat'"),
    (story("{a}.\n\n", a=("a cat", "a cat naps")), "rule 'a' is ambiguous.*'a cat'"),
    (story("{a}.\n\n", a=("", "cat")), "rule 'a' is ambiguous.*''"),
    (story("{a}.\n\n", a=("The {b} naps", "The fat {b}"), b=("cat", "fat cat")), "'The fat cat'"),
    (story("{a}.\n\n", a=("{b}{b}", "{b}xx"), b=("x", "yx")), "'xx"),
    (story("{pet!name} {a}.\n\n", a=("{pet.sound}", "woof")), "rule 'a' is ambiguous.*'woof'"),
    (story("{a}.\n\n", a=("{pet!sound}", "{pet!name}")), None),
    (story("{twin!name}.\n\n"), "draws a twin by a word .*'Ann' or 'Anna'"),
    (story("{twin!age} {twin.name}.\n\n"), "draws a twin by a word .*'two' or 'two'"),
    (story("{pet.name}.\n\n"), "recalls a pet where none"),
    (story("{a} says {pet.sound}.\n\n", a=("A {pet!name}", "It")), "recalls a pet where none"),
    (story("{a}.\n\n", a=("x {b}",), b=("y {a}", "z")), "uses itself, by way of story > a > b > a"),
    (story("{a}", a=("",)), "can be empty"),
    (story("{nobody}.\n\n"), "{nobody} is neither"),
    (story("{pet}.\n\n"), "{pet} is neither"),
    (story("{pet!}.\n\n"), "neither"),
    (story("{pet.age}.\n\n"), "neither"),
    (story("{a.\n\n", a=("x",)), "has no partner"),
    (story("a}.\n\n"), "has no partner"),
    (story("{a}.\n\n", a=()), "rule 'a': give a tuple"),
    (story("{a}.\n\n", a="cat"), "rule 'a': give a tuple"),
    (story("{a}.\n\n", a={"x": 1, "y": 0}), "rule 'a': give a tuple"),
    (story("{a}.\n\n", a={"x": 0.5, "y": 0.5}), "rule 'a': give a tuple"),
    ({"tale": ("x",)}, "no rule 'story'"),
])
def test_mistakes_in_the_tables_are_named(rules, message):
    roles = {**ROLES, "twin": (("name", "age"), (("Ann", "two"), ("Anna", "two")))}
    if message is None:
        grammar.make_grammar(rules, roles)
        return
    with pytest.raises(BabyError, match=message) as caught:
        grammar.make_grammar(rules, roles)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [(("cat",),), (("cat", ""),), (("cat", "meow", "x"),), ()])
def test_rows_that_do_not_fit_their_fields(rows):
    with pytest.raises(BabyError, match="role 'pet'"):
        grammar.make_grammar(story("{pet!name}.\n\n"), {"pet": (("name", "sound"), rows)})
