"""Generation: prefill with the prompt, decode token by token, sampling on the host.

The window policy, for a text longer than the context: while it fits, the model sees all of it. When the
context is full, the older half is dropped and the rest is recomputed at positions from 0 on. So the window
depends only on the length of the text, and generation with the key-value cache and without it sees the same
tokens at the same positions: the logits are equal. A model of a fixed context sees the last n_ctx tokens.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from baby_xp import checks
from baby_xp.arrays.backend import Backend
from baby_xp.arrays.namespace import Array
from baby_xp.arrays.tree import Tree
from baby_xp.errors import BabyError
from baby_xp.models import Model


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    temperature divides the logits (below 1: more predictable, above 1: more random); top_k keeps the k most likely
    tokens (0: all); top_p keeps the most likely tokens whose probabilities add up to p (1: all); greedy takes the
    most likely token.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        plain = {
            "temperature": checks.number(
                "temperature", self.temperature, above=0, hint="use --greedy to always take the most likely token"
            ),
            "top_k": checks.whole("top_k", self.top_k, least=0, most=None, hint="0 stands for all tokens"),
            "top_p": checks.number("top_p", self.top_p, above=0, most=1),
            "greedy": checks.flag("greedy", self.greedy),
            "seed": checks.whole("seed", self.seed, least=None, most=None),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Sampling":
        """From keyword arguments. Raises BabyError for a name that is not a field."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise BabyError(f"unknown setting {unknown[0]!r}; the sampling settings are {', '.join(known)}")
        return cls(**settings)


def window_start(length: int, n_ctx: int) -> int:
    """Where the window of the last tokens begins in a text of `length` tokens: 0 while it fits the context."""
    hop = max(1, n_ctx // 2)
    return -(-max(0, length - n_ctx) // hop) * hop


def generate(
    backend: Backend,
    model: Model,
    params: Array,
    prompt: Iterable[int],
    num_tokens: int,
    sampling: Sampling,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield `num_tokens` ids, one by one. params (P,) on the backend; prompt: ids, at least one."""
    for ids in generate_several(backend, model, params, [prompt], num_tokens, sampling, use_cache):
        yield int(ids[0])


def generate_several(
    backend: Backend,
    model: Model,
    params: Array,
    prompts: Iterable[Iterable[int]],
    num_tokens: int,
    sampling: Sampling,
    use_cache: bool = True,
) -> Iterator[np.ndarray]:
    """Yield the next id of every text, (B,), `num_tokens` times; the texts are computed together.

    prompts: B lists of ids, all of one length. Text i is that of `generate` with the seed sampling.seed + i.
    """
    texts = [[int(token) for token in prompt] for prompt in prompts]
    if len({len(text) for text in texts}) != 1:
        raise BabyError("prompts that are continued together must have the same length")
    p = model.layout.unpack(backend.xp, params)
    logits_of = Logits(backend, model, p, use_cache)
    for _ in range(num_tokens):
        ids = draw(logits_of.next(texts), sampling, len(texts[0]))
        for text, token in zip(texts, ids.tolist(), strict=True):
            text.append(token)
        yield ids


class Logits:
    """The logits of the tokens that follow growing texts of ids, with or without a key-value cache.

    The cache holds keys and values of the tokens of the window that were computed so far.
    """

    def __init__(self, backend: Backend, model: Model, p: Tree, use_cache: bool = True):
        self.backend, self.model, self.p = backend, model, p
        self.fixed_context = not hasattr(model.module, "decode")
        self.use_cache = use_cache and not self.fixed_context
        if self.use_cache:
            with np.errstate(all="ignore"):  # numbers that are not finite show up in the logits
                self.prepared = model.module.prepare(backend.xp, p, model.config)
        self.start, self.cache, self.cached = 0, None, 0

    def next(self, texts: list[list[int]]) -> np.ndarray:
        """texts: B lists of ids of one length, all so far -> logits (B, V) in float64 on the host."""
        n_ctx, length = self.model.config.n_ctx, len(texts[0])
        start = max(0, length - n_ctx) if self.fixed_context else window_start(length, n_ctx)
        if start != self.start or not self.use_cache:
            self.start, self.cache, self.cached = start, None, 0
        new = [text[start + self.cached :] for text in texts]
        with np.errstate(all="ignore"):  # the check below reports them
            logits: np.ndarray = self.backend.to_numpy(self._forward(new)).astype(np.float64)
        if not np.isfinite(logits).all():
            raise BabyError("the logits are not finite: the weights have diverged; train again with a lower --lr")
        return logits

    def _forward(self, new: list[list[int]]) -> Array:
        xp, config, length = self.backend.xp, self.model.config, len(new[0])
        if self.fixed_context:  # padded on the left
            new = [[0] * (config.n_ctx - length) + ids for ids in new]
        ids = self.backend.asarray(np.array(new, dtype=np.int32))
        if self.use_cache:
            logits, self.cache = self.model.module.decode(xp, self.prepared, ids, config, self.cache)
            self.cached += length
            return logits
        logits = self.model.forward(xp, self.p, ids)[0]
        return xp.reshape(logits, (len(new), -1, logits.shape[-1]))[:, -1, :]


def draw(logits: np.ndarray, sampling: Sampling, position: int) -> np.ndarray:
    """Draw an id for each row of logits (B, V), row i with the seed + i -> (B,).

    The random numbers depend only on seed and position.
    """
    if sampling.greedy:
        return np.asarray(np.argmax(logits, axis=-1))
    u = [uniform(sampling.seed + row, position) for row in range(len(logits))]
    rows = zip(weights(logits, sampling).cumsum(axis=-1), u, strict=True)
    return np.array([row.searchsorted(u * row[-1], side="right") for row, u in rows])


TOGETHER = 64


def uniform(seed: int, position: int) -> float:
    """A random number in [0, 1) that depends only on seed and position."""
    return _uniforms(seed % 2**64, position // TOGETHER)[position % TOGETHER]


@functools.lru_cache(maxsize=1024)
def _uniforms(seed: int, block: int) -> list[float]:
    """Drawn together, because it takes longer to set up a generator than to draw them all."""
    key = np.array([seed, block], dtype=np.uint64)  # a list would be converted to float64 first
    drawn: list[float] = np.random.Generator(np.random.Philox(key=key)).random(TOGETHER).tolist()
    return drawn


def weights(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Unnormalised probabilities of logits (B, V): softmax(logits / temperature), cut to top_k, then to top_p.

    The most likely token has weight 1. top_p is nucleus sampling (Holtzman et al. 2020): the most likely token is
    always kept. Of equally likely tokens at the cut, those with the smaller ids are kept.
    """
    found: np.ndarray = logits - logits.max(axis=-1, keepdims=True)
    if sampling.temperature != 1:
        with np.errstate(over="ignore"):  # a tiny temperature turns all but the largest into -inf: weight 0
            found /= sampling.temperature
    np.exp(found, out=found)
    if sampling.top_k or sampling.top_p < 1:
        for row in found:
            _cut(row, sampling)
    return found


def _cut(weights: np.ndarray, sampling: Sampling) -> None:
    """Set to zero, in place, the entries of (V,) that top_k and top_p exclude."""
    order = np.argsort(-weights, kind="stable")
    kept = len(order) if sampling.top_k == 0 else min(sampling.top_k, len(order))
    if sampling.top_p < 1:
        shares = np.cumsum(weights[order[:kept]])
        kept = int(np.searchsorted(shares, sampling.top_p * shares[-1], side="left")) + 1
    weights[order[kept:]] = 0
