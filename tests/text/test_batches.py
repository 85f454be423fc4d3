"""Batches are functions of (seed, step): the windows are right, and all orders are about equally likely."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baby_xp.errors import BabyError
from baby_xp.text.batches import EpochWindows, PairBatches, RandomWindows, consecutive_windows, permuted

SEEDS = st.integers(0, 2**64 - 1)
quick = settings(max_examples=60, deadline=None)
# Drawn once and recorded here.
PINNED_SHUFFLE = [497, 249, 760, 359, 222]
PINNED_STARTS = [180, 463, 684, 114, 159]


def check_shapes(batch, rows, n_ctx):
    assert batch.inputs.shape == batch.targets.shape == (rows, n_ctx)
    assert batch.samples.tolist() == list(range(rows))
    for array in batch:
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
        assert type(array) is np.ndarray


def check_windows(batch, ids, n_ctx):
    """Every row is a window of `ids` = 0, 1, 2, ...; returns where the windows start."""
    starts = batch.inputs[:, 0]
    assert (batch.inputs == starts[:, None] + np.arange(n_ctx)).all()
    assert (batch.targets == batch.inputs + 1).all()
    assert starts.min() >= 0
    assert batch.targets.max() < len(ids)
    return starts.tolist()


def same(a, b) -> bool:
    return all((x == y).all() for x, y in zip(a, b, strict=True))


def chi_square(observed: np.ndarray) -> float:
    """The statistic over its degrees of freedom: about 1 if all cells are equally likely."""
    expected = observed.sum() / observed.size
    return float(((observed - expected) ** 2 / expected).sum() / (observed.size - 1))


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    return permuted(np.arange(n, dtype=np.uint64), n, seed, epoch).astype(np.int64)


# The shuffle


@quick
@given(st.integers(1, 3000) | st.sampled_from([2**i + j for i in range(2, 13) for j in (-1, 0, 1)]), SEEDS, SEEDS)
def test_a_shuffle_is_a_permutation(n, seed, epoch):
    assert np.array_equal(np.sort(shuffled(n, seed, epoch)), np.arange(n))


@quick
@given(st.integers(2**33, 2**62), SEEDS, st.integers(0, 1000))
def test_a_huge_shuffle_needs_no_table(n, seed, epoch):
    positions = np.array([0, 1, 2**32, n - 2, n - 1], dtype=np.uint64)
    places = permuted(positions, n, seed, epoch)
    assert len(set(places.tolist())) == 5
    assert places.max() < n


@quick
@given(st.integers(1, 500), SEEDS, st.data())
def test_shuffling_some_positions_equals_the_whole_shuffle(n, seed, data):
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    part = permuted(np.array(positions, dtype=np.uint64), n, seed, 0)
    assert part.tolist() == shuffled(n, seed, 0)[positions].tolist()


def test_orders_differ_between_epochs_and_seeds():
    orders = {tuple(shuffled(100, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_order_of_a_few_is_about_equally_likely(n):
    orders = Counter(tuple(shuffled(n, 1, epoch)) for epoch in range(600))
    assert len(orders) == [1, 1, 2, 6, 24][n]
    assert chi_square(np.array(list(orders.values()))) < 2.5


@pytest.mark.parametrize("n", [5, 9, 16, 23])
def test_positions_and_pairs_are_about_equally_likely(n):
    n_keys = 500
    orders = np.array([shuffled(n, seed, seed % 7) for seed in range(n_keys)])
    for position in (0, n // 2, n - 1):
        assert chi_square(np.bincount(orders[:, position], minlength=n)) < 2.5
    neighbours = np.bincount((orders[:, :-1] * n + orders[:, 1:]).ravel(), minlength=n * n).reshape(n, n)
    assert np.trace(neighbours) == 0
    assert 0.5 < chi_square(neighbours[~np.eye(n, dtype=bool)]) < 1.5


def test_a_large_order_has_no_trend():
    n = 10_007
    order = shuffled(n, 3, 0)
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.04
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    steps = np.bincount((np.diff(order) % n) * 20 // n, minlength=20)
    assert chi_square(steps) < 2.5


def test_the_random_numbers_never_change():
    """A run that was saved by an older version resumes exactly."""
    ids = np.arange(1000, dtype=np.uint16)
    assert EpochWindows(ids, 4, 5, stride=1, seed=1).batch(402).inputs[:, 0].tolist() == PINNED_SHUFFLE
    assert RandomWindows(ids, 4, 5, seed=1).batch(402).inputs[:, 0].tolist() == PINNED_STARTS


# Random windows


@quick
@given(st.integers(2, 60), st.integers(1, 8), st.integers(1, 59), SEEDS, st.integers(0, 2**40))
def test_random_windows_are_windows_of_the_text(n, batch_size, n_ctx, seed, step):
    n_ctx = min(n_ctx, n - 1)
    ids = np.arange(n, dtype=np.uint8)
    batch = RandomWindows(ids, n_ctx, batch_size, seed).batch(step)
    check_shapes(batch, batch_size, n_ctx)
    check_windows(batch, ids, n_ctx)


def test_every_offset_is_about_equally_likely():
    windows = RandomWindows(np.arange(30, dtype=np.uint8), 10, 50, seed=4)
    starts = np.concatenate([windows.batch(step).inputs[:, 0] for step in range(100)])
    counts = np.bincount(starts)
    assert len(counts) == 20
    assert counts.min() > 0
    assert chi_square(counts) < 2.5


def test_a_batch_depends_only_on_seed_and_step():
    ids = np.arange(10_000, dtype=np.int32)
    for make in (lambda seed: RandomWindows(ids, 8, 4, seed), lambda seed: EpochWindows(ids, 8, 4, 1, seed)):
        windows, fresh = make(1), make(1)
        in_order = [windows.batch(step) for step in range(5)]
        assert same(fresh.batch(3), in_order[3])
        assert same(windows.batch(3), in_order[3])
        of_another_seed = [make(2).batch(step) for step in range(5)]
        assert len({tuple(batch.inputs[:, 0]) for batch in in_order + of_another_seed}) == 10


def test_windows_of_a_memory_map(tmp_path):
    ids = np.arange(200, dtype=np.uint8)
    ids.tofile(tmp_path / "ids")
    mapped = np.memmap(tmp_path / "ids", dtype=np.uint8, mode="r")
    for batch in (RandomWindows(mapped, 9, 4, 0).batch(0), EpochWindows(mapped, 9, 4, 2, 0).batch(0)):
        check_shapes(batch, 4, 9)
        check_windows(batch, ids, 9)
    for batch in consecutive_windows(mapped, 9, 4):
        check_shapes(batch, *batch.inputs.shape)


# Epochs


@quick
@given(st.integers(2, 60), st.integers(1, 59), st.integers(1, 70), st.integers(1, 9), SEEDS)
def test_an_epoch_visits_every_window_once(n, n_ctx, batch_size, stride, seed):
    n_ctx = min(n_ctx, n - 1)
    ids = np.arange(n, dtype=np.uint8)
    windows = EpochWindows(ids, n_ctx, batch_size, stride, seed)
    expected = list(range(0, n - n_ctx, stride))
    assert windows.n_windows == len(expected)
    assert windows.steps_per_epoch == -(-len(expected) // batch_size)
    for epoch in (0, 3):
        starts = []
        for step in range(windows.steps_per_epoch):
            batch = windows.batch(epoch * windows.steps_per_epoch + step)
            check_shapes(batch, min(batch_size, len(expected) - step * batch_size), n_ctx)
            starts += check_windows(batch, ids, n_ctx)
        assert sorted(starts) == expected


def test_stride_1_gives_the_originals_windows():
    windows = EpochWindows(np.zeros(1_003_854, dtype=np.uint8), 64, 16, 1, 0)
    assert windows.n_windows == 1_003_854 - 64
    assert windows.steps_per_epoch == 62_737
    assert windows.batch(62_736).inputs.shape == (14, 64)


# Evaluation


@quick
@given(st.integers(2, 200), st.integers(1, 60), st.integers(1, 9))
def test_consecutive_windows_predict_each_token_once(n, n_ctx, batch_size):
    ids = (np.arange(n) * 7 % 251).astype(np.uint8)
    batches = list(consecutive_windows(ids, n_ctx, batch_size))
    assert np.concatenate([batch.targets.ravel() for batch in batches]).tolist() == ids[1:].tolist()
    assert np.concatenate([batch.inputs.ravel() for batch in batches]).tolist() == ids[:-1].tolist()
    for batch in batches:
        check_shapes(batch, *batch.inputs.shape)
    n_windows, left = divmod(n - 1, n_ctx)
    shapes = [(batch_size, n_ctx)] * (n_windows // batch_size)
    shapes += [(n_windows % batch_size, n_ctx)] * (n_windows % batch_size > 0) + [(1, left)] * (left > 0)
    assert [batch.inputs.shape for batch in batches] == shapes


# Pairs


def pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(n)[:, None] + np.array([0, 100, 200]), np.arange(n) + 300


@pytest.mark.parametrize("batch_size", [None, 5, 6])
def test_a_full_batch_is_the_whole_dataset(batch_size):
    contexts, targets = pairs(5)
    batch = PairBatches(contexts, targets, batch_size, seed=1).batch(9)
    assert same(batch, (contexts, targets, np.arange(5)))
    assert {array.dtype for array in batch} == {np.dtype(np.int32)}


def test_pairs_are_shuffled_each_epoch_and_stay_together():
    contexts, targets = pairs(50)
    batches = PairBatches(contexts, targets, 8, seed=1)
    drawn = [batches.batch(step) for step in range(200)]
    for batch in drawn:
        assert batch.inputs.shape == (8, 3)
        assert (batch.inputs[:, 0] + 300 == batch.targets).all()
        assert len(set(batch.targets.tolist())) == 8
        assert {array.dtype for array in batch} == {np.dtype(np.int32)}
    assert same(PairBatches(contexts, targets, 8, seed=1).batch(7), drawn[7])
    assert not same(PairBatches(contexts, targets, 8, seed=2).batch(7), drawn[7])
    rows = np.concatenate([batch.inputs[:, 0] for batch in drawn])
    assert chi_square(np.bincount(rows, minlength=50)) < 2.5


# Refused input


@pytest.mark.parametrize("n", [0, 1, 8])
def test_too_few_tokens_for_a_window(n):
    ids = np.zeros(n, dtype=np.uint8)
    for make in (lambda: RandomWindows(ids, 8, 2, 0), lambda: EpochWindows(ids, 8, 2, 1, 0)):
        with pytest.raises(BabyError, match=f"^{n} tokens are too few for a window of 9"):
            make()
    if n < 2:
        with pytest.raises(BabyError, match=f"^{n} tokens are too few for a window of 2"):
            list(consecutive_windows(ids, 8, 2))
