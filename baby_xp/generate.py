"""Generation: prefill with the prompt, decode token by token, sampling on the host.

The window policy, for a text longer than the context: while it fits, the model sees all of it. When the
context is full, the older half is dropped and the rest is computed anew at positions from 0 on. So the window
depends on the length of the text alone, and generation with the key-value cache and without it sees the same
tokens at the same positions: the logits are equal. A model of a fixed context sees the last n_ctx tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from baby_xp.errors import BabyError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    temperature divides the logits (below 1: bolder); top_k keeps the k likeliest tokens (0: all); top_p keeps
    the likeliest tokens that together hold a share p (1: all); greedy takes the likeliest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.temperature < np.inf:
            raise BabyError(
                f"temperature must be above 0, not {self.temperature}; for the likeliest token say --greedy"
            )
        if self.top_k < 0:
            raise BabyError(f"top_k must be at least 1, or 0 for all tokens, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise BabyError(f"top_p must be above 0 and at most 1, not {self.top_p}")


def window_start(length: int, n_ctx: int) -> int:
    """Where the window of the last tokens begins in a text of `length` tokens: 0 while it fits the context."""
    hop = max(1, n_ctx // 2)
    return -(-max(0, length - n_ctx) // hop) * hop


def generate(
    backend, model, params, prompt, num_tokens: int, sampling: Sampling, use_cache: bool = True
) -> Iterator[int]:
    """Yield `num_tokens` ids, one by one. params (P,) on the backend; prompt: ids, at least one."""
    p = model.layout.unpack(backend.xp, params)
    ids = [int(token) for token in prompt]
    logits_of = Logits(backend, model, p, use_cache)
    for _ in range(num_tokens):
        ids.append(sample(logits_of.next(ids), sampling, len(ids)))
        yield ids[-1]


class Logits:
    """The logits of the token that follows a growing list of ids, with or without a key-value cache.

    The cache holds keys and values of the tokens of the window that were computed so far.
    """

    def __init__(self, backend, model, p, use_cache: bool = True):
        self.backend, self.model, self.p = backend, model, p
        self.fixed_context = not hasattr(model.module, "cache_of")
        self.use_cache = use_cache and not self.fixed_context
        self.start, self.cache, self.cached = 0, None, 0

    def next(self, ids: list[int]) -> np.ndarray:
        """ids: the whole text so far -> logits (V,) in float64 on the host."""
        n_ctx = self.model.config.n_ctx
        start = max(0, len(ids) - n_ctx) if self.fixed_context else window_start(len(ids), n_ctx)
        if start != self.start or not self.use_cache:
            self.start, self.cache, self.cached = start, None, 0
        new = ids[start + self.cached :]
        with np.errstate(over="ignore", invalid="ignore"):  # the check below speaks for it
            last = self.backend.to_numpy(self._forward(new))[-1].astype(np.float64)
        if not np.isfinite(last).all():
            raise BabyError("the model computes numbers that are not finite: its weights are damaged or burst")
        return last

    def _forward(self, new: list[int]):
        xp, config = self.backend.xp, self.model.config
        if self.fixed_context:  # filled up on the left
            new = [0] * (config.n_ctx - len(new)) + new
        ids = self.backend.asarray(np.array([new], dtype=np.int32))
        if not self.use_cache:
            return self.model.forward(xp, self.p, ids)[0]
        logits, saved = self.model.module.forward(xp, self.p, ids, config, cache=self.cache)
        self.cache, self.cached = self.model.module.cache_of(saved, config), self.cached + len(new)
        return logits


def sample(logits: np.ndarray, sampling: Sampling, position: int) -> int:
    """Draw an id from logits (V,). The random number depends on seed and position alone."""
    if sampling.greedy:
        return int(np.argmax(logits))
    probabilities = distribution(logits, sampling)
    key = np.array([sampling.seed % 2**64, position], dtype=np.uint64)  # a list would go by way of float64
    u = np.random.Generator(np.random.Philox(key=key)).random()
    cumulative = np.cumsum(probabilities)
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities (V,) to draw from: softmax(logits / temperature), cut to top_k, then to top_p.

    top_p is nucleus sampling (Holtzman et al. 2020): the likeliest token is always kept. Of equally likely
    tokens at the cut, those with the smaller ids are kept.
    """
    with np.errstate(over="ignore"):  # a tiny temperature makes -inf of all but the largest: share 0
        probabilities = np.exp((logits - np.max(logits)) / sampling.temperature)
    order = np.argsort(-probabilities, kind="stable")
    kept = len(order) if sampling.top_k == 0 else min(sampling.top_k, len(order))
    if sampling.top_p < 1:
        shares = np.cumsum(probabilities[order[:kept]])
        kept = int(np.searchsorted(shares, sampling.top_p * shares[-1], side="left")) + 1
    probabilities[order[kept:]] = 0
    return probabilities / np.sum(probabilities)
