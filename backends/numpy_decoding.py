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
made for the whole context. All this is for the classic switches, the config's defaults; a model with another one
takes the plain path.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
from threadpoolctl import ThreadpoolController

from baby_xp.config import CLASSIC
from baby_xp.layers import gelu, layernorm
from baby_xp.models import gpt

SMALLEST_TOTAL, LARGEST_TOTAL = 1e-30, 1e30
"""Bounds of a head's sum of exp(scores) within which scores need not be shifted, in float32."""

WORTH_WAKING = 256
"""Number of tokens from which a second thread of BLAS pays off."""

INNER = 2 * gelu.ROOT_2_OVER_PI
K = (INNER * gelu.CUBIC) ** (1 / 3)


def prepare(xp, p, config):
    """As gpt.prepare: the weights of a step, or the parameters as they are where the plain path is taken."""
    classic = all(getattr(config, name) == value for name, value in CLASSIC.items())
    return Prepared(p, config) if classic else p


def decode(xp, prepared, ids, config, cache=None):
    """As gpt.decode."""
    if not isinstance(prepared, Prepared):
        return gpt.decode.__wrapped__(xp, prepared, ids, config, cache)
    cache = cache or Cache(len(ids), config, prepared.tokens.dtype)
    with OneThread() if ids.size < WORTH_WAKING else nullcontext():
        logits = prepared.step(ids, cache)
    if logits is not None:
        return logits, cache
    past = list(cache) if cache.length else None
    logits, pairs = gpt.decode.__wrapped__(xp, prepared.p, ids, config, past)
    cache.append(pairs, ids.shape[1])
    return logits, cache


class Cache:
    """Keys and values of all blocks, in arrays that hold a whole context: (L, 2, B, H, n_ctx, D)."""

    def __init__(self, B: int, config, kind):
        H, D = config.n_heads, config.head_size // config.n_heads
        self.length, self.arrays = 0, np.zeros((config.n_layers, 2, B, H, config.n_ctx, D), kind)
        self.blocks = list(self.arrays)
        self.keys = [block[0].swapaxes(-1, -2) for block in self.blocks]
        self.values = [block[1] for block in self.blocks]

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Keys and values (B, H, t, D) of each block, as gpt.cache_of gives them."""
        for block in self.blocks:
            yield block[0, :, :, : self.length], block[1, :, :, : self.length]

    def append(self, pairs, T: int) -> None:
        """Take over the last T tokens of pairs that hold all tokens."""
        self.length += T
        for own, pair in zip(self, pairs, strict=True):
            for array, whole in zip(own, pair, strict=True):
                array[:, :, -T:] = whole[:, :, -T:]


class Prepared:
    """The weights of a step, see above, and buffers for its arrays."""

    def __init__(self, p, config):
        self.p, self.config = p, config
        C, D = config.n_emb, config.head_size // config.n_heads
        self.tokens, self.places = centred(p["wte"]["weight"]), centred(p["wpe"]["weight"])
        queries = np.ones(3 * config.head_size, self.tokens.dtype)
        queries[: config.head_size] = 1 / math.sqrt(D)
        self.blocks: list[tuple[np.ndarray, ...]] = []
        for block in p["blocks"].values():
            attention, network = block["attention"], block["network"]
            self.blocks.append((
                behind_norm(block["norm1"], attention["qkv"], C) * queries,
                with_bias(centred(attention["out"]["weight"]), centred(attention["out"]["bias"])),
                behind_norm(block["norm2"], network["up"], C) * -K,
                with_bias(centred(network["down"]["weight"]) / -K, centred(network["down"]["bias"])),
            ))  # fmt: skip
        kind = self.tokens.dtype
        self.blocks = [tuple(np.asfortranarray(weight, dtype=kind) for weight in block) for block in self.blocks]
        self.head = np.asfortranarray(behind_norm(p["ln_f"], p["lm_head"], C), dtype=kind)
        self.ones = np.ones(config.n_ctx, kind)
        # Python's own numbers would be converted at each call
        self.one, self.constant = np.array(1, kind), np.array(INNER / K, kind)
        self.buffers = functools.lru_cache(maxsize=2)(lambda B, T: Buffers(B, T, config, kind))

    def step(self, ids, cache: Cache):
        """ids (B, T) -> logits (B, V) after them, or None where scores lie too far apart; appends to the cache."""
        (B, T), t = ids.shape, cache.length
        b, end = self.buffers(B, T), t + T
        now, ones, one, constant = slice(t, end), self.ones[:end], self.one, self.constant
        visible = None if T == 1 else np.tri(T, end, t, dtype=ones.dtype)
        x, delta, normed, g, s, h = b.x, b.delta, b.normed, b.g, b.s, b.h
        np.add(self.tokens.take(ids, axis=0), self.places[now], b.x_of_texts)
        for i, (qkv, out, up, down) in enumerate(self.blocks):
            b.norm()
            np.dot(normed, qkv, b.qkv)
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
            np.dot(normed, up, g)                                  # (N, F)
            np.multiply(g, g, s)
            np.add(s, constant, s)
            np.multiply(s, g, s)
            np.exp(s, s)
            np.add(s, one, s)
            np.divide(g, s, h)
            np.dot(b.h_and_one, down, delta)
            np.add(x, delta, x)
        if not (b.totals.min() > SMALLEST_TOTAL and b.totals.max() < LARGEST_TOTAL):
            return None
        cache.length = end
        b.norm()
        return np.dot(b.last, self.head)


class Buffers:
    """What a step writes into, and the views of it that it needs; N = B * T rows, text by text."""

    def __init__(self, B: int, T: int, config, kind):
        C, S, H, L = config.n_emb, config.head_size, config.n_heads, config.n_layers
        N, D, F = B * T, S // H, 4 * C
        # the last channel makes the sum of squares C (variance + EPS)
        self.stream = np.full((N, C + 1), math.sqrt(C * layernorm.EPS), kind)
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
        self.totals = np.empty((L, B, H, T), kind)
        self.g, self.s = np.empty((N, F), kind), np.empty((N, F), kind)

    def norm(self) -> None:
        """normed = stream / root(C (variance + EPS)); the stream has mean 0."""
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
    weight = linear["weight"]
    bias = norm["bias"] @ weight + linear.get("bias", 0)
    return with_bias(math.sqrt(C) * norm["gain"][:, None] * weight, bias)


def with_bias(weight, bias):
    """(C + 1, F): the bias as the last row."""
    return np.concatenate([weight, bias[None, :]])


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
