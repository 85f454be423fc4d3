"""The counter-based random bits: the same everywhere, and as random as dropout needs."""

import numpy as np
import pytest

from baby_xp.arrays import rng

SAMPLES = np.arange(6, dtype=np.int32)


def streams(case, seed, step, samples=SAMPLES, places=4):
    arguments = case.integers([seed]), case.integers([step]), case.asarray(samples)
    return rng.streams(case.xp, *arguments, places)


def mask(case, size=1001, rate=0.25, **place):
    row = streams(case, **{"seed": 1, "step": 2, **place})[3, :]
    return case.to_numpy(rng.keep_mask(case.xp, row, size, rate))


def lowbias32(x: int) -> int:
    """The hash in plain Python integers."""
    x = (x + 0x9E3779B9) % 2**32
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_the_hash_is_lowbias32_on_every_backend(backend):
    counters = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1]
    bits = backend.to_numpy(rng.mix(backend.xp, backend.integers(counters)))
    assert [int(b) % 2**32 for b in bits] == [lowbias32(c) for c in counters]


def test_int32_overflow_is_the_same_on_every_backend(backend, plain):
    counters = np.random.default_rng(0).integers(-(2**31), 2**31, 100_000).astype(np.int32)
    found = backend.to_numpy(rng.mix(backend.xp, backend.asarray(counters)))
    assert np.array_equal(found, plain.to_numpy(rng.mix(plain.xp, plain.asarray(counters))))


@pytest.mark.parity
def test_masks_are_identical_on_every_backend(backend, plain):
    assert np.array_equal(mask(backend), mask(plain))
    assert np.array_equal(mask(backend, size=70_001), mask(plain, size=70_001))


def test_a_mask_does_not_depend_on_how_the_batch_is_split(backend):
    whole = mask(backend)
    parts = [
        mask(backend, samples=SAMPLES[:1]),
        mask(backend, samples=SAMPLES[1:5]),
        mask(backend, samples=SAMPLES[5:]),
    ]
    assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 3}, {"samples": SAMPLES + 6}])
def test_seed_step_place_and_sample_each_change_the_mask(plain, change):
    agreement = np.mean(mask(plain, size=20_000) == mask(plain, size=20_000, **change))
    assert agreement == pytest.approx(0.75**2 + 0.25**2, abs=0.01)  # that of independent masks


def test_places_and_samples_have_different_masks(plain):
    table = plain.to_numpy(streams(plain, 0, 0, np.arange(1000, dtype=np.int32), 50))
    assert len(np.unique(table)) > 0.9999 * table.size


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_the_share_of_kept_elements_matches_the_rate(plain, rate):
    kept = mask(plain, size=200_000, rate=rate)
    assert np.mean(kept) == pytest.approx(1 - rate, abs=5 * np.sqrt(rate * (1 - rate) / kept.size) + 2**-16)
    assert rng.survivor_scale(rate) == pytest.approx(1 / (1 - rate), rel=1e-3)


def test_neighbouring_elements_are_independent(plain):
    """Elements, halves of one hash, and samples: their correlation is that of chance."""
    kept = mask(plain, size=200_000, rate=0.5).astype(float) - 0.5
    bound = 5 * 0.25 / np.sqrt(kept.size)
    for shift in (1, 2, 3, 64, 1024):
        assert abs(np.mean(kept[:, shift:] * kept[:, :-shift])) < bound
    for i in range(len(kept) - 1):
        assert abs(np.mean(kept[i] * kept[i + 1])) < bound * np.sqrt(len(kept))


def test_a_seed_may_be_any_integer(backend):
    for seed in (2**31, 2**32 - 1, 2**40, 0):
        assert streams(backend, seed, 0).shape == (4, 6)
    assert np.array_equal(
        backend.to_numpy(streams(backend, 2**32 + 5, 0)), backend.to_numpy(streams(backend, 5, 0))
    )
