"""Generation on NumPy: the GPT's forward pass for one new token, or a few, in as few calls as possible.

A step for one token takes hardly any arithmetic. A call of NumPy costs about a microsecond, and the plain pass
makes hundreds of them. So what can be done once, before the first token, is done to the weights:

- LayerNorm subtracts the mean, so the mean of the residual stream never matters: everything that writes into the
  stream is centred in advance, and no step computes a mean. Its gain, its bias and the root of C go into the
  weights that follow.
- Biases are one more row of their weights, which meets a constant 1.
- The weights before GELU are scaled by -k, k^3 = 2 sqrt(2 / pi) 0.044715, which brings the argument of its exp to
  g (g^2 + constant).

Weights lie in column order, in which a product with one row is fastest, and keys and values in arrays that were
made for the whole context. All this is for the classic switches, the config's defaults; `Modern` has what differs
with the modern ones, and with smear. A model with others takes the plain path.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
from baby_xp_backends import numpy_query_key
from threadpoolctl import ThreadpoolController

from baby_xp.config import CLASSIC, MODERN
from baby_xp.layers import Shape, gelu, layernorm, rmsnorm
from baby_xp.models import gpt

SMALLEST_TOTAL, LARGEST_TOTAL = 1e-30, 1e30
"""Bounds of a head's sum of exp(scores) within which scores need not be shifted, in float32."""

WORTH_WAKING = 256
"""Number of tokens from which a second thread of BLAS pays off."""

INNER = 2 * gelu.ROOT_2_OVER_PI
K = (INNER * gelu.CUBIC) ** (1 / 3)


def prepare(xp, p, config):
    """As gpt.prepare: the weights of a step, or the parameters as they are where the plain path is taken."""
    if _has(config, CLASSIC, "zero_init"):
        return Prepared(p, config)
    return Modern(p, config) if _has(config, MODERN, "zero_init", "tied_head", "logit_cap", "smear") else p


def _has(config, switches, *but: str) -> bool:
    """Whether the config has these switches, except for some."""
    return all(getattr(config, name) == value for name, value in switches.items() if name not in but)


def decode(xp, prepared, ids, config, cache=None):
    """As gpt.decode."""
    if not isinstance(prepared, Prepared):
        return gpt.decode.__wrapped__(xp, prepared, ids, config, cache)
    cache = cache or Cache(len(ids), config, prepared.tokens.dtype)
    with OneThread() if ids.size < WORTH_WAKING else nullcontext():
        logits = prepared.step(ids, cache)
    if logits is not None:
        return logits, cache
    past = gpt.Cache(list(cache), prepared.smeared(cache.last)) if cache.length else None
    logits, after = gpt.decode.__wrapped__(xp, prepared.p, ids, config, past)
    cache.append(after.blocks, ids)
    return logits, cache


class Cache:
    """Keys and values of all blocks, in arrays that hold a whole context: (L, 2, B, H, n_ctx, D).

    last (B,): the ids of the last tokens, None at the beginning.
    """

    def __init__(self, B: int, config, kind):
        H, D = config.n_heads, config.head_size // config.n_heads
        self.length, self.arrays = 0, np.zeros((config.n_layers, 2, B, H, config.n_ctx, D), kind)
        self.last = None
        self.blocks = list(self.arrays)
        self.keys = [block[0].swapaxes(-1, -2) for block in self.blocks]
        self.values = [block[1] for block in self.blocks]

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Keys and values (B, H, t, D) of each block, as in gpt.Cache."""
        for block in self.blocks:
            yield block[0, :, :, : self.length], block[1, :, :, : self.length]

    def append(self, pairs, ids) -> None:
        """Take over the last tokens, ids (B, T), of pairs that hold all tokens."""
        T = ids.shape[1]
        self.length, self.last = self.length + T, ids[:, -1]
        for own, pair in zip(self, pairs, strict=True):
            for array, whole in zip(own, pair, strict=True):
                array[:, :, -T:] = whole[:, :, -T:]


class Prepared:
    """The weights of a step, see above, and buffers for its arrays."""

    EPS = layernorm.EPS

    def __init__(self, p, config):
        self.p, self.config = p, config
        kind = p["wte"]["weight"].dtype
        blocks = [self.weights(block["attention"], block["network"], block) for block in p["blocks"].values()]
        self.blocks = [tuple(np.asfortranarray(weight, dtype=kind) for weight in block) for block in blocks]
        head = behind_norm(p.get("ln_f"), gpt.head_of(np, p, config), config.n_emb)
        self.head = np.asfortranarray(head, dtype=kind)
        self.ones = np.ones(config.n_ctx, kind)
        self.buffers = functools.lru_cache(maxsize=2)(lambda B, T: Buffers(B, T, config, kind, self.EPS))
        self.prepare_more(p, kind)

    def prepare_more(self, p, kind) -> None:
        """The tables of the embedding, and numbers as arrays: Python's floats would be converted at each call."""
        self.tokens, self.places = centred(p["wte"]["weight"]), centred(p["wpe"]["weight"])
        self.one, self.constant = np.array(1, kind), np.array(INNER / K, kind)

    def weights(self, attention, network, block) -> tuple[np.ndarray, ...]:
        """The weights of a block: for queries, keys and values, out, up and down, each with a bias."""
        C, S, H = self.config.n_emb, self.config.head_size, self.config.n_heads
        queries = np.ones(3 * S)
        queries[:S] = 1 / math.sqrt(S // H)
        return (
            behind_norm(block["norm1"], attention["qkv"], C) * queries,
            with_bias(centred(attention["out"]["weight"]), centred(attention["out"]["bias"])),
            behind_norm(block["norm2"], network["up"], C) * -K,
            with_bias(centred(network["down"]["weight"]) / -K, centred(network["down"]["bias"])),
        )

    def embed(self, ids, now: slice, last, b: "Buffers") -> None:
        """Write what goes into the first block into b.x. last (B,): the ids before these, or None."""
        np.add(self.tokens.take(ids, axis=0), self.places[now], b.x_of_texts)

    def smeared(self, ids):
        """What smear adds to the tokens after these, before the gate; None without it."""
        return None

    def turn(self, now: slice, b: "Buffers") -> None:
        """Change queries and keys in b.qkv."""

    def activate(self, b: "Buffers") -> None:
        """b.g, what `up` made, -> b.h."""
        g, s = b.g, b.s
        np.multiply(g, g, s)
        np.add(s, self.constant, s)
        np.multiply(s, g, s)
        np.exp(s, s)
        np.add(s, self.one, s)
        np.divide(g, s, b.h)

    def predict(self, b: "Buffers") -> np.ndarray:
        """The logits (B, V) from what is in b.last."""
        return np.dot(b.last, self.head)

    def step(self, ids, cache: Cache):
        """ids (B, T) -> logits (B, V) after them, or None where scores lie too far apart; appends to the cache."""
        (B, T), t = ids.shape, cache.length
        b, end = self.buffers(B, T), t + T
        now, ones = slice(t, end), self.ones[:end]
        visible = None if T == 1 else np.tri(T, end, t, dtype=ones.dtype)
        x, delta, normed = b.x, b.delta, b.normed
        self.embed(ids, now, cache.last, b)
        for i, (qkv, out, up, down) in enumerate(self.blocks):
            b.norm()
            np.dot(normed, qkv, b.qkv)
            self.turn(now, b)
            cache.blocks[i][:, :, :, now] = b.key_and_value
            e = np.matmul(b.query, cache.keys[i][..., :end])       # (B, H, T, t + T)
            np.exp(e, e)
            if visible is not None:
                np.multiply(e, visible, e)
            total = np.matmul(e, ones, b.totals[i])                # (B, H, T)
            np.matmul(e, cache.values[i][:, :, :end], b.heads)
            np.divide(b.heads, total[..., None], b.heads)
            np.dot(b.attended, out, delta)
            np.add(x, delta, x)
            b.norm()
            np.dot(normed, up, b.g)                                # (N, F)
            self.activate(b)
            np.dot(b.h_and_one, down, delta)
            np.add(x, delta, x)
        if not (b.totals.min() > SMALLEST_TOTAL and b.totals.max() < LARGEST_TOTAL):
            return None
        cache.length, cache.last = end, ids[:, -1]
        b.norm()
        return self.predict(b)


class Modern(Prepared):
    """The same with RMSNorm, rotary positions, QK-norm and ReLU squared: nothing is centred, and biases are zero.

    The norm after the embedding is done in advance; with smear its norm and its gate, as both depend on the token
    alone. A rotation does not change a length, so queries and keys are normalised first: the factors of the norm
    and of the scores then go into the cosines and sines.
    """

    EPS = rmsnorm.EPS

    def prepare_more(self, p, kind) -> None:
        H, D = self.config.n_heads, self.config.head_size // self.config.n_heads
        self.tokens, _ = rmsnorm.forward.__wrapped__(np, {}, p["wte"]["weight"])
        self.share = None                                          # of the token before, for each token
        if self.config.smear:
            logit = self.tokens @ p["smear"]["gate"]["weight"]     # (V, 1)
            self.share = (p["smear"]["scale"] * 0.5 * (1 + np.tanh(0.5 * logit))).astype(kind)
        factors = np.repeat([1, math.sqrt(D)], H)[:, None]         # of queries and keys
        tables = numpy_query_key.tables(0, Shape(1, self.config.n_ctx, H), D, np.float64)
        self.cos, self.sin = ((table * factors).astype(kind) for table in tables)
        self.zero, self.eps, self.cap = (np.array(one, kind) for one in (0, D * self.EPS, self.config.logit_cap))

    def weights(self, attention, network, block) -> tuple[np.ndarray, ...]:
        C = self.config.n_emb
        qkv, up = behind_norm(None, attention["qkv"], C), behind_norm(None, network["up"], C)
        return qkv, with_bias(attention["out"]["weight"], 0), up, with_bias(network["down"]["weight"], 0)

    def embed(self, ids, now: slice, last, b: "Buffers") -> None:
        x = b.x_of_texts                                           # (B, T, C)
        x[...] = tokens = self.tokens.take(ids, axis=0)
        if self.share is None:
            return
        share = self.share.take(ids, axis=0)                       # (B, T, 1)
        x[:, 1:] += share[:, 1:] * tokens[:, :-1]
        if last is not None:
            x[:, 0] += share[:, 0] * self.tokens.take(last, axis=0)
        x /= np.sqrt(np.vecdot(x, x)[..., None] / x.shape[-1] + rmsnorm.EPS)

    def smeared(self, ids):
        return None if self.share is None else self.tokens.take(ids, axis=0)

    def turn(self, now: slice, b: "Buffers") -> None:
        qk, turned = b.query_and_key, b.turned
        length = np.vecdot(qk, qk, b.lengths[..., 0])
        np.add(length, self.eps, length)
        np.sqrt(length, length)
        np.divide(qk, b.lengths, qk)
        b.halves_of_turned[...] = b.halves_swapped
        np.multiply(turned, self.sin[now], turned)
        np.multiply(qk, self.cos[now], qk)
        np.add(qk, turned, qk)

    def activate(self, b: "Buffers") -> None:
        np.maximum(b.g, self.zero, out=b.g)
        np.multiply(b.g, b.g, b.h)

    def predict(self, b: "Buffers") -> np.ndarray:
        logits = np.dot(b.last, self.head)
        return self.cap * np.tanh(logits / self.cap) if self.cap else logits


class Buffers:
    """What a step writes into, and the views of it that it needs; N = B * T rows, text by text."""

    def __init__(self, B: int, T: int, config, kind, eps: float):
        C, S, H, L = config.n_emb, config.head_size, config.n_heads, config.n_layers
        N, D, F = B * T, S // H, 4 * C
        # with the last channel, the sum of squares is C (variance + eps)
        self.stream = np.full((N, C + 1), math.sqrt(C * eps), kind)
        self.x, self.x_of_texts = self.stream[:, :C], self.stream.reshape(B, T, C + 1)[..., :C]
        self.delta = np.empty((N, C), kind)
        self.root = np.empty((N, 1), kind)
        self.squares = self.root[:, 0]
        self.normed, self.attended, self.h_and_one = (np.ones((N, width + 1), kind) for width in (C, S, F))
        self.normed_x, self.h = self.normed[:, :C], self.h_and_one[:, :F]
        self.last = self.normed.reshape(B, T, C + 1)[:, -1]
        self.heads = self.attended.reshape(B, T, S + 1)[..., :S].reshape(B, T, H, D).swapaxes(1, 2)
        self.qkv = np.empty((N, 3 * S), kind)
        qkv = self.qkv.reshape(B, T, 3, H, D).transpose(2, 0, 3, 1, 4)
        self.query, self.key_and_value = qkv[0], qkv[1:]           # (B, H, T, D), (2, B, H, T, D)
        self.query_and_key = self.qkv.reshape(B, T, 3 * H, D)[:, :, : 2 * H]
        self.turned, self.lengths = np.empty((B, T, 2 * H, D), kind), np.empty((B, T, 2 * H, 1), kind)
        if D % 2 == 0:  # otherwise positions are not rotary
            halves = B, T, 2 * H, 2, D // 2
            self.halves_of_turned = self.turned.reshape(halves)
            self.halves_swapped = self.query_and_key.reshape(halves)[..., ::-1, :]
        self.totals = np.empty((L, B, H, T), kind)
        self.g, self.s = np.empty((N, F), kind), np.empty((N, F), kind)

    def norm(self) -> None:
        """normed = stream / root(C (variance + eps)); for layer norm the stream has mean 0."""
        if len(self.stream) == 1:  # two calls instead of three
            row = self.stream[0]
            np.multiply(self.x, 1 / math.sqrt(np.dot(row, row)), self.normed_x)
            return
        np.vecdot(self.stream, self.stream, self.squares)
        np.sqrt(self.root, self.root)
        np.divide(self.x, self.root, self.normed_x)


def centred(weight):
    """What a weight or a bias adds to the residual stream (..., C), less the mean of its channels."""
    return weight - np.mean(weight, axis=-1, keepdims=True)


def behind_norm(norm, linear, C: int):
    """(C + 1, F): the norm's gain, the root of C, the norm's bias and the layer's in one weight."""
    weight, bias = linear["weight"], linear.get("bias", 0)
    if norm:
        weight, bias = norm["gain"][:, None] * weight, norm["bias"] @ weight + bias
    return with_bias(math.sqrt(C) * weight, bias)


def with_bias(weight, bias):
    """(C + 1, F): the bias as the last row."""
    return np.concatenate([weight, np.broadcast_to(bias, (1, weight.shape[1]))])


class OneThread:
    """BLAS on one thread: waking others costs more than such a product, and far more on a busy machine."""

    def __enter__(self):
        self.before = [(library, library.get_num_threads()) for library in blas()]
        for library, number in self.before:
            if number != 1:
                library.set_num_threads(1)

    def __exit__(self, *_):
        for library, number in self.before:
            if number != 1:
                library.set_num_threads(number)


@functools.cache
def blas() -> list:
    """The BLAS libraries that are loaded; searching for them takes milliseconds."""
    return ThreadpoolController().select(user_api="blas").lib_controllers
