"""Generation: which probabilities a token is drawn from, that draws follow them, and what the model sees."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from baby_xp.arrays import params, registry
from baby_xp.config import EquationConfig, GPTConfig
from baby_xp.errors import BabyError
from baby_xp.inference.generate import (
    Logits,
    Sampling,
    draw,
    generate,
    generate_several,
    weights,
    window_start,
)
from baby_xp.models import Model
from baby_xp.text.tokenizer import ByteTokenizer, CharTokenizer, decoded

# Multiples of 1/8: so far apart that math.exp and numpy.exp sort them equally, and with many ties.
LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=12)


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities with which a token is drawn, from logits (V,)."""
    found = weights(logits[None, :], sampling)[0]
    return found / np.sum(found)


def sample(logits: np.ndarray, sampling: Sampling, position: int) -> int:
    return int(draw(logits[None, :], sampling, position)[0])


def by_definition(logits, temperature, top_k, top_p) -> list[float]:
    """The distribution as a loop over sorted tokens."""
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    kept = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    if top_k:
        kept = kept[:top_k]
    if top_p < 1:
        total, taken, nucleus = sum(weights[token] for token in kept), 0.0, []
        for token in kept:
            nucleus.append(token)
            taken += weights[token]
            if taken >= top_p * total:
                break
        kept = nucleus
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


# the distribution ---------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    LOGITS,
    st.sampled_from([0.1, 0.5, 0.8, 1.0, 1.7, 10.0]),
    st.integers(0, 14),
    st.floats(0.01, 1.0).map(lambda p: round(p, 3)),
)
@example([0.0, 0.0, 0.0, 0.0], 1.0, 0, 0.5)
@example([0.0, 0.0, 0.0, 0.0], 1.0, 2, 0.5)
def test_the_distribution_matches_its_definition(logits, temperature, top_k, top_p):
    settings = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found = distribution(np.array(logits), settings)
    np.testing.assert_allclose(found, by_definition(logits, temperature, top_k, top_p), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-30])
def test_a_tiny_temperature_selects_the_most_likely_token(temperature):
    found = distribution(np.array([1.0, 3.0, -2.0]), Sampling(temperature=temperature))
    np.testing.assert_array_equal(found, [0, 1, 0])


def test_a_huge_temperature_makes_tokens_equally_likely():
    np.testing.assert_allclose(
        distribution(np.array([9.0, 0.0, -9.0]), Sampling(temperature=1e300)), [1 / 3] * 3
    )


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 3}, [0, 1, 3]),  # 0 and 2 are equally likely: the smaller id is kept
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.71}, [0, 1, 3]),
        ({"top_p": 0.86}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [1]),
        ({"top_k": 2, "top_p": 0.55}, [1]),  # of the two that top_k keeps, token 1 has 0.4 / 0.7
        ({"top_k": 2, "top_p": 0.6}, [1, 3]),
    ],
)
def test_top_k_and_top_p_keep_the_right_tokens(settings, kept):
    found = distribution(np.log([0.15, 0.4 + 1e-12, 0.15, 0.3]), Sampling(**settings))
    assert np.flatnonzero(found).tolist() == kept
    assert np.sum(found) == pytest.approx(1, rel=1e-15)


def test_the_logits_are_left_as_they_were():
    logits = np.array([1.0, 2.0, 3.0])
    distribution(logits, Sampling(temperature=0.5, top_k=1))
    np.testing.assert_array_equal(logits, [1, 2, 3])


def test_settings_are_kept_as_plain_values():
    settings = Sampling(np.float32(0.5), np.int64(3), np.float64(0.9), np.True_, np.int64(3))
    assert settings == Sampling(0.5, 3, 0.9, True, 3)
    kinds = [type(getattr(settings, name)) for name in ("temperature", "top_k", "top_p", "greedy", "seed")]
    assert kinds == [float, int, float, bool, int]


def test_a_misspelt_setting_is_named_with_the_known_ones():
    message = r"unknown setting 'temprature'; the sampling settings are temperature, top_k, top_p, greedy, seed"
    with pytest.raises(BabyError, match=message):
        Sampling.of({"seed": 1, "temprature": 1.0})


# draws --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vary", ["position", "seed"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}], ids=str)
def test_draws_follow_the_distribution(vary, settings):
    logits, n = np.log([0.3, 0.05, 0.25, 0.1, 0.1, 0.2]), 1000
    draws = Counter(
        sample(logits, Sampling(**settings, seed=7), i)
        if vary == "position"
        else sample(logits, Sampling(**settings, seed=i), 3)
        for i in range(n)
    )
    expected = n * distribution(logits, Sampling(**settings))
    assert all(expected[token] > 0 for token in draws)
    chi_square = sum((draws[i] - share) ** 2 / share for i, share in enumerate(expected) if share > 0)
    assert chi_square < 20.5  # with 5 degrees of freedom, 1 seed in 1000 would give more


def test_a_draw_depends_only_on_seed_and_position():
    logits = np.zeros(1000)
    draws = {(seed, at): sample(logits, Sampling(seed=seed), at) for seed in range(5) for at in range(5)}
    for (seed, at), token in reversed(draws.items()):
        assert sample(logits, Sampling(seed=seed), at) == token
    assert len(set(draws.values())) > 20


def test_draws_do_not_touch_the_global_generator():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    sample(np.zeros(5), Sampling(), 0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_any_whole_number_is_a_different_seed():
    seeds = [-2, -1, 0, 1, 2**63, 2**63 + 1, 2**64 - 3, 2**32]
    assert len({sample(np.zeros(10**6), Sampling(seed=seed), 0) for seed in seeds}) == len(seeds)
    assert sample(np.zeros(10**6), Sampling(seed=2**70 + 1), 0) == sample(np.zeros(10**6), Sampling(seed=1), 0)


def test_greedy_takes_the_most_likely_token_and_the_first_of_equal_ones():
    settings = Sampling(greedy=True, temperature=100.0)
    assert all(sample(np.array([1.0, 4.0, 4.0, 2.0]), settings, at) == 1 for at in range(50))


# the window ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx", range(1, 21))
def test_the_window_drops_the_older_half_when_the_context_is_full(n_ctx):
    start = 0
    for length in range(1, 5 * n_ctx + 5):
        if length - start > n_ctx:
            start += max(1, n_ctx // 2)
        assert window_start(length, n_ctx) == start
        assert 1 <= length - start <= n_ctx


# what the model sees ------------------------------------------------------------------------------------

SWITCHES = [(s, a, n) for s in ("pre", "post") for a in ("mha", "moh") for n in ("mlp", "moe")]
V = 9


@pytest.fixture(scope="module")
def numpy_backend():
    return registry.load("numpy", dtype="float64")


def random_model(config):
    """A model whose weights are so large that its logits differ much from token to token."""
    model = Model(config, V)
    return model, params.draw(model.spec, 0, "float64") + np.random.default_rng(1).normal(
        0, 0.4, model.n_parameters
    )


def gpt(n_ctx=6, **switches):
    return random_model(GPTConfig(n_ctx=n_ctx, n_emb=8, head_size=8, n_heads=2, n_layers=2, **switches))


@pytest.mark.parametrize("switches", SWITCHES, ids=" ".join)
def test_the_cache_does_not_change_the_ids(numpy_backend, switches):
    model, flat = gpt(**dict(zip(("c_sequence", "c_attention", "c_network"), switches, strict=True)))
    for prompt in ([1], [1, 2, 3, 4, 5, 6], list(range(V)) * 2):  # the last is longer than the context
        for greedy in (False, True) if switches == SWITCHES[0] else (False,):
            texts = [
                list(generate(numpy_backend, model, flat, prompt, 14, Sampling(greedy=greedy, seed=5), use_cache))
                for use_cache in (True, False)
            ]
            assert texts[0] == texts[1]
            assert len(texts[0]) == 14
            assert greedy or len(set(texts[0])) > 1


@pytest.mark.parametrize("n_ctx", [1, 2, 3])
def test_the_smallest_contexts_generate(numpy_backend, n_ctx):
    model, flat = gpt(n_ctx)
    texts = [list(generate(numpy_backend, model, flat, [1, 2], 9, Sampling(), cache)) for cache in (True, False)]
    assert texts[0] == texts[1]


def test_a_text_continues_the_same_from_any_position(numpy_backend):
    model, flat = gpt()
    whole = list(generate(numpy_backend, model, flat, [3], 20, Sampling(seed=2)))
    for cut in range(1, 20):
        rest = generate(numpy_backend, model, flat, [3, *whole[:cut]], 20 - cut, Sampling(seed=2))
        assert list(rest) == whole[cut:]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("settings", [{}, {"greedy": True}, {"top_k": 4, "top_p": 0.9}], ids=str)
def test_texts_computed_together_equal_those_computed_alone(numpy_backend, settings, use_cache):
    model, flat = gpt()
    prompts = [[1, 2, 3], [4, 5, 6], [1, 2, 3]]
    found = generate_several(numpy_backend, model, flat, prompts, 20, Sampling(**settings, seed=7), use_cache)
    alone = [
        list(generate(numpy_backend, model, flat, prompt, 20, Sampling(**settings, seed=7 + i)))
        for i, prompt in enumerate(prompts)
    ]
    assert np.array(list(found)).T.tolist() == alone


def test_prompts_of_different_lengths_are_refused(numpy_backend):
    model, flat = gpt()
    with pytest.raises(BabyError, match="same length"):
        list(generate_several(numpy_backend, model, flat, [[1], [1, 2]], 3, Sampling()))


def test_seeds_give_different_texts(numpy_backend):
    model, flat = gpt()
    texts = {tuple(generate(numpy_backend, model, flat, [3], 20, Sampling(seed=seed))) for seed in range(5)}
    assert len(texts) == 5


def test_tokens_are_yielded_one_by_one(numpy_backend, monkeypatch):
    model, flat = gpt()
    asked = []
    step = Logits.next
    monkeypatch.setattr(Logits, "next", lambda self, texts: asked.append(len(texts[0])) or step(self, texts))
    tokens = generate(numpy_backend, model, flat, [3], 10, Sampling())
    next(tokens)
    next(tokens)
    assert asked == [1, 2]


def test_a_model_of_a_fixed_context_sees_the_last_tokens(numpy_backend):
    model, flat = random_model(EquationConfig(n_hidden=8, n_emb=2))
    p = model.layout.unpack(numpy_backend.xp, flat)
    logits = Logits(numpy_backend, model, p)
    seen = {1: [0, 0, 0, 5], 3: [0, 5, 2, 7], 4: [5, 2, 7, 1], 5: [2, 7, 1, 8], 9: [6, 4, 3, 5]}
    text = [5, 2, 7, 1, 8, 6, 4, 3, 5]
    for length, context in seen.items():
        expected, _ = model.forward(numpy_backend.xp, p, np.array([context], np.int32))
        np.testing.assert_allclose(logits.next([text[:length]]), expected, rtol=1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308])
@pytest.mark.parametrize("greedy", [False, True])
def test_diverged_weights_are_an_error(numpy_backend, value, greedy):
    model, flat = gpt()
    flat[:] = value
    with pytest.raises(BabyError, match="not finite"):
        list(generate(numpy_backend, model, flat, [3], 5, Sampling(greedy=greedy)))


# from ids to text ---------------------------------------------------------------------------------------


def pieces(tokenizer, ids):
    return list(decoded(tokenizer, iter(ids)))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 255) | st.sampled_from(list("a\u00e9\u20ac\U0001f600".encode())), max_size=12)
    | st.text(max_size=8).map(lambda text: list(text.encode()))
)
@example([0xC3, 0xF0, 0x9F, 0x98, 0x80])
@example([0xF0, 0x9F, 0x98])
def test_bytes_decode_the_same_piece_by_piece_and_at_once(ids):
    assert "".join(pieces(ByteTokenizer(), ids)) == ByteTokenizer().decode(ids)


def test_a_character_of_several_bytes_is_one_piece():
    assert pieces(ByteTokenizer(), "a\u20acb\U0001f600".encode()) == ["a", "\u20ac", "b", "\U0001f600"]


def test_each_character_is_yielded_immediately():
    assert pieces(CharTokenizer(("\n", "a", "\ufffd")), [1, 2, 0, 2]) == ["a", "\ufffd", "\n", "\ufffd"]
