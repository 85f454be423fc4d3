"""Batches of ids on the host, each a function of (seed, step) only: a run resumes exactly.

Axes: B samples in a batch, T = n_ctx tokens in a window. All arrays of a batch are int32 and contiguous.
Random bits come straight from Philox, keyed by (seed, step): NumPy promises that a bit generator's stream
never changes, and does not promise it for what `Generator` draws from that stream.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from baby_xp.errors import BabyError

# Separates these random streams from others with the same seed, such as that of the weights.
STREAM = 0x6261746368  # "batch"
# Sizes of 3 or 4 need this many rounds to make every order about equally likely; large ones need half as many.
ROUNDS = 10


class Batch(NamedTuple):
    """The data of one training step or of one step of an evaluation.

    inputs   (B, T) ids.
    targets  (B, T) the id that follows each input; (B,) for the equation model, which predicts one token.
    samples  (B,) each sample's index within the whole batch of the step: it keys the sample's dropout, so
             that a part of a batch, cut out for a worker, drops what the whole would have dropped there.
    """

    inputs: np.ndarray
    targets: np.ndarray
    samples: np.ndarray


class RandomWindows:
    """Windows that start anywhere in `ids` (n,), drawn again for each step, every offset equally likely.

    Raises BabyError if `ids` is shorter than n_ctx + 1.
    """

    def __init__(self, ids: np.ndarray, n_ctx: int, batch_size: int, seed: int):
        self.ids, self.n_ctx, self.batch_size, self.seed = _plain(ids, n_ctx + 1), n_ctx, batch_size, seed
        self.n_windows = len(self.ids) - n_ctx

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        bits = _random_bits(self.seed, step, self.batch_size)
        # The remainder favours small offsets by n_windows / 2**64, which is negligible.
        return _gather(self.ids, (bits % np.uint64(self.n_windows)).astype(np.int64), self.n_ctx)


class EpochWindows:
    """Each window that starts at a multiple of `stride` in `ids` (n,), once an epoch, in a fresh order.

    The last batch of an epoch is smaller where batch_size does not divide the number of windows. The order
    is computed, not stored, so an epoch may hold billions of windows.
    Raises BabyError if `ids` is shorter than n_ctx + 1.
    """

    def __init__(self, ids: np.ndarray, n_ctx: int, batch_size: int, stride: int, seed: int):
        self.ids, self.n_ctx, self.batch_size, self.seed = _plain(ids, n_ctx + 1), n_ctx, batch_size, seed
        self.stride = stride
        self.n_windows = (len(self.ids) - n_ctx - 1) // stride + 1

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n_windows // self.batch_size)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self.batch_size
        positions = np.arange(first, min(first + self.batch_size, self.n_windows), dtype=np.uint64)
        windows = permuted(positions, self.n_windows, self.seed, epoch)
        return _gather(self.ids, windows.astype(np.int64) * self.stride, self.n_ctx)


class PairBatches:
    """Pairs of a context and the one token that follows it, for the equation model.

    contexts (n, T) and targets (n,), or (n, T) for a model that predicts every next token. Without `batch_size`,
    or with one of n or more, every batch is the whole set in its own order; otherwise batch_size different
    rows, drawn again for each step.
    """

    def __init__(
        self, contexts: np.ndarray, targets: np.ndarray, batch_size: int | None = None, seed: int = 0
    ):
        self.contexts = np.ascontiguousarray(contexts, dtype=np.int32)
        self.targets = np.ascontiguousarray(targets, dtype=np.int32)
        n = len(targets)
        self.batch_size, self.seed = n if batch_size is None else min(batch_size, n), seed

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        n, samples = len(self.targets), np.arange(self.batch_size, dtype=np.int32)
        if self.batch_size == n:
            return Batch(self.contexts, self.targets, samples)
        rows = permuted(samples.astype(np.uint64), n, self.seed, step).astype(np.int64)
        return Batch(self.contexts[rows], self.targets[rows], samples)


def consecutive_windows(ids: np.ndarray, n_ctx: int, batch_size: int) -> Iterator[Batch]:
    """All of `ids` (n,) in order, in windows that do not overlap: each token but the first is a target once.

    Yields batches of batch_size windows of n_ctx, one batch of the windows that remain, and one window that
    is shorter than n_ctx for the tokens that remain. Raises BabyError if there are fewer than 2 tokens.
    """
    ids = _plain(ids, 2)
    n_windows, n_left = divmod(len(ids) - 1, n_ctx)
    sizes = [(min(batch_size, n_windows - first), n_ctx) for first in range(0, n_windows, batch_size)]
    start = 0
    for shape in sizes + [(1, n_left)] * (n_left > 0):
        stop = start + math.prod(shape)
        tokens = ids[start : stop + 1].astype(np.int32)                   # (B * T + 1,)
        yield _shifted(tokens[:-1].reshape(shape), tokens[1:].reshape(shape))
        start = stop


def permuted(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The positions after a shuffle of 0 .. n-1, keyed by (seed, epoch); uint64 (B,) to uint64 (B,).

    A Feistel network: a number below side * side is a pair of digits, and each round adds a hash of one digit
    to the other, which can be undone, so the whole is one-to-one. As side * side is just above n, hardly any
    number lands at n or above; one that does walks on along its cycle until it is back below n.
    """
    # Even: if it were odd, each round would be an even permutation up to a fixed swap, and half of the orders
    # of a small set could not occur.
    side = np.uint64((math.isqrt(n - 1) + 2) // 2 * 2)
    keys = _random_bits(seed, epoch, ROUNDS)
    values = _feistel(positions, side, keys)
    while True:
        outside = values >= n
        if not outside.any():
            return values
        values[outside] = _feistel(values[outside], side, keys)


def _feistel(values: np.ndarray, side: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(values, side)                                 # (B,) each
    for key in keys:
        left, right = right, (left + _hash32(right, key)) % side
    return left * side + right


def _hash32(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """32 well mixed bits of each x + key (two steps of MurmurHash3's 64-bit finaliser), uint64 (B,)."""
    x = (x + key) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x >> np.uint64(32)


def _random_bits(seed: int, index: int, count: int) -> np.ndarray:
    """Random uint64 (count,) for a seed and a step or epoch."""
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Philox(key=key, counter=STREAM << 192).random_raw(count)


def _gather(ids: np.ndarray, starts: np.ndarray, n_ctx: int) -> Batch:
    windows = ids[starts[:, None] + np.arange(n_ctx + 1)].astype(np.int32)  # (B, T + 1)
    return _shifted(windows[:, :-1], windows[:, 1:])


def _shifted(inputs: np.ndarray, targets: np.ndarray) -> Batch:
    samples = np.arange(len(inputs), dtype=np.int32)
    return Batch(np.ascontiguousarray(inputs), np.ascontiguousarray(targets), samples)


def _plain(ids: np.ndarray, least: int) -> np.ndarray:
    """Ids as a plain array. Raises BabyError for fewer than `least`."""
    # a view of a memmap as a plain array reads the same pages without the subclass's cost at each indexing
    ids = np.asarray(ids)
    if len(ids) < least:
        few = f"{len(ids)} tokens are too few for a window of {least}"
        raise BabyError(f"{few}: use a longer text or a smaller n_ctx")
    return ids
