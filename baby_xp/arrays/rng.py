"""Counter-based random bits: the same dropout masks on every backend, with nothing to store.

A mask bit is a hash of (seed, step, place in the model, index of the sample in the step's batch, element in
the sample). So a mask does not depend on how a batch is split among workers, and a resumed run continues
exactly. Everything is int32 arithmetic, which wraps alike in NumPy, CuPy, PyTorch, JAX and array-api-strict.

The hash is `lowbias32` of Chris Wellons, found by his search for 32-bit mixers with small bias
(https://nullprogram.com/blog/2018/07/31/), in signed arithmetic.
"""

from typing import Any, NamedTuple

from baby_xp.arrays.namespace import Array, replaceable

# 0x9e3779b9 (the golden ratio), 0x7feb352d and 0x846ca68b as signed 32-bit numbers
GOLDEN, FIRST, SECOND = -1640531527, 2146121005, -2073254261
HALVES = 65536  # a hash serves two elements with 16 bits each


class Noise(NamedTuple):
    """The randomness of one training step: a stream for every dropout place and sample, and the rate."""

    streams: Array  # (places, B) int32
    rate: float


def mix(xp: Any, x: Array) -> Array:
    """Hash int32 counters to int32 bits, one to one; any shape with at least one axis."""
    x = x + GOLDEN  # so that 0, a fixed point of the rest, is an ordinary counter
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST  # `>>` keeps the sign: masking makes it the logical shift
    x = (x ^ ((x >> 15) & 0x1FFFF)) * SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def fold(xp: Any, key: Array, data: Array) -> Array:
    """A new key (int32) from a key and a number, both int32 arrays that broadcast."""
    return mix(xp, mix(xp, key) ^ data)


@replaceable
def streams(xp: Any, seed: Array, step: Array, samples: Array, places: int) -> Array:
    """Keys of all dropout places of a step.

    seed (1,), step (1,), samples (B,), all int32 -> (places, B) int32.
    """
    key = fold(xp, seed, step)  # (1,)
    place = xp.arange(places, dtype=xp.int32, device=xp.device)
    return fold(xp, fold(xp, key, place)[:, None], samples[None, :])  # (places, B)


@replaceable
def keep_mask(xp: Any, stream: Array, size: int, rate: float) -> Array:
    """Which elements of each sample survive dropout: stream (B,) int32 -> (B, size) bool.

    One hash gives two elements, 16 bits each, low half first, so that a backend may read the hashes as
    16-bit numbers in memory. The rate is met to 1 / 65536.
    """
    pairs = xp.arange((size + 1) // 2, dtype=xp.int32, device=xp.device)
    # the inner mix does not depend on the sample; without it, samples could have shifted copies of one mask
    bits = mix(xp, stream[:, None] ^ mix(xp, pairs)[None, :])  # (B, pairs)
    halves = xp.stack([bits & 0xFFFF, (bits >> 16) & 0xFFFF], axis=-1)  # (B, pairs, 2)
    halves = xp.reshape(halves, (stream.shape[0], -1))[:, :size]
    return halves >= drop_threshold(rate)


def drop_threshold(rate: float) -> int:
    """The 16-bit number below which an element is dropped."""
    return round(rate * HALVES)


def survivor_scale(rate: float) -> float:
    """The factor that scales survivors so that the mean stays: the inverse of the share that is kept."""
    return HALVES / (HALVES - drop_threshold(rate))
