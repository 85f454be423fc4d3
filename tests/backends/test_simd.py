"""The vectors of simd.py: each operation gives what NumPy gives, at every width."""

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="numba is not installed")

from baby_xp_backends import numba_maths, simd, simd_lanes, simd_width  # noqa: E402

SPECIAL = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 1e-42, -1e-45, 3e38, -3e38, 1e-20, 5.0, 2.5, 88.0, -88.0]
A = np.array(SPECIAL, np.float32)
B = np.array(SPECIAL[3:] + SPECIAL[:3], np.float32)
INTEGERS = np.array([0, 1, -1, 2**31 - 1, -(2**31), 12345, -777, 65535, 65536, 3, 5, 7, 11, 13, 17, 2**30])
INTEGERS = INTEGERS.astype(np.int32)


@pytest.fixture(params=[4, 8, 16])
def wide(request):
    return request.param, simd.of_width(request.param)


def same(found, expected):
    np.testing.assert_array_equal(found, expected)
    floats = expected.dtype == np.float32
    assert not floats or np.array_equal(np.signbit(found), np.signbit(expected)) or np.isnan(expected).any()


def each(wide, function):
    """A kernel out(a, b) that applies a function of vectors, W elements at a time."""
    W, load, store = wide[0], wide[1].load, simd.store
    function = numba.njit(function)

    @numba.njit
    def kernel(a, b, out):
        for at in range(0, len(out), W):
            store(out, at, function(load(a, at), load(b, at)))

    return kernel


def applied(wide, function, a, b, dtype=None):
    out = np.empty(len(a), dtype or a.dtype)
    each(wide, function)(a, b, out)
    return out


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_arithmetic_of_floats(wide):
    for function in (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b):
        with np.errstate(all="ignore"):
            same(applied(wide, function, A, B), function(A, B))
    with np.errstate(all="ignore"):
        same(applied(wide, lambda a, b: 2.5 * a - 1, A, B), np.float32(2.5) * A - np.float32(1))
        same(applied(wide, lambda a, b: simd.sqrt(a), A, B), np.sqrt(A))


def test_arithmetic_of_integers_wraps(wide):
    a, b = INTEGERS, INTEGERS[::-1].copy()
    for function in (lambda a, b: a + b, lambda a, b: a * b, lambda a, b: a - b, lambda a, b: a ^ b,
                     lambda a, b: a & b, lambda a, b: a << 3):  # fmt: skip
        same(applied(wide, function, a, b), function(a, b))
    same(applied(wide, lambda a, b: a >> 5, a, b), (a.view(np.uint32) >> np.uint32(5)).view(np.int32))


def test_comparison_and_selection(wide):
    for found, expected in (
        (lambda a, b: simd.select(a < b, a, b), lambda a, b: np.where(a < b, a, b)),
        (lambda a, b: simd.select(a <= b, 1.0, b), lambda a, b: np.where(a <= b, np.float32(1), b)),
        (lambda a, b: simd.select(a > b, a, 0.0), lambda a, b: np.where(a > b, a, np.float32(0))),
        (lambda a, b: simd.select((a >= b) & (b > 0.0), a, b), lambda a, b: np.where((a >= b) & (b > 0), a, b)),
    ):
        same(applied(wide, found, A, B), expected(A, B))
    same(applied(wide, lambda a, b: simd.select(a < b, a, b), INTEGERS, INTEGERS[::-1].copy()),
         np.minimum(INTEGERS, INTEGERS[::-1]))  # fmt: skip


def test_bits_are_those_of_the_floats(wide):
    same(applied(wide, lambda a, b: simd.bits(a), A, B, np.int32), A.view(np.int32))
    same(applied(wide, lambda a, b: simd.floats(simd.bits(a)), A, B), A)


def test_lanes_and_spread(wide):
    W, of = wide
    lanes, spread, store = of.lanes, of.spread, simd.store

    @numba.njit
    def kernel(numbers, out):
        store(numbers, 0, lanes() + spread(3) * 2)
        store(out, 0, spread(0.5))

    out, numbers = np.empty(W, np.float32), np.empty(W, np.int32)
    kernel(numbers, out)
    same(out, np.full(W, 0.5, np.float32))
    same(numbers, np.arange(W, dtype=np.int32) + 6)


def test_sums_of_lanes(wide):
    W, of = wide
    load, total = of.load, simd.total
    a = np.random.default_rng(0).integers(-99, 99, W).astype(np.float32)  # sums without rounding
    assert numba.njit(lambda a: total(load(a, 0)))(a) == a.sum()


def test_the_largest_lane(wide):
    W, of = wide
    load, highest = of.load, simd_lanes.highest

    @numba.njit
    def kernel(a, at):
        return highest(load(a, at))

    a = np.array([*A[:4], 1e-42, -np.inf, *-np.arange(26)], np.float32)
    for at in range(16):
        assert kernel(a, at) == a[at : at + W].max()
    assert kernel(np.full(W, -np.inf, np.float32), 0) == -np.inf


def test_halves_of_integers(wide):
    W, of = wide
    load, store, halves = of.load, simd.store, simd_lanes.halves

    @numba.njit
    def kernel(a, out):
        for at in range(0, len(a), W):
            first, second = halves(load(a, at))
            store(out, 2 * at, first)
            store(out, 2 * at + W, second)

    out = np.empty(2 * len(INTEGERS), np.int32)
    kernel(INTEGERS, out)
    same(out, INTEGERS.view(np.uint16).astype(np.int32))


@pytest.mark.parametrize("n", [0, 1, 3, 4])
def test_the_first_lanes_alone_are_read_and_written(wide, n):
    W, of = wide
    first, put_first, put = of.load_first, simd.store_first, simd.store

    @numba.njit
    def kernel(a, out, rest, n):
        put_first(out, 1, first(a, 1, n), n)
        put(rest, 0, first(a, 1, n))

    out, rest = np.full(W + 1, 9, np.float32), np.empty(W, np.float32)
    kernel(np.arange(2 * W, dtype=np.float32), out, rest, n)
    same(out, np.array([9, *range(1, n + 1), *[9] * (W - n)], np.float32))
    same(rest, np.array([*range(1, n + 1), *[0] * (W - n)], np.float32))


def test_tuples_of_vectors(wide):
    W, of = wide
    load, rows, zeros, store_rows = of.load, of.load_rows, of.zero_rows, simd.store_rows
    axpy = simd.axpy
    draw = np.random.default_rng(0).integers(-9, 9, (4, W)).astype(np.float32)

    @numba.njit
    def kernel(a, numbers, out):
        store_rows(out, 0, W, axpy(load(a, 0), numbers, 1, rows(a, W, W, 3)))
        store_rows(out, 3 * W, W, axpy(load(a, 0), numbers, 0, zeros(2)))

    numbers = np.array([2, 3, 5, 7], np.float32)
    out = np.empty((5, W), np.float32)
    kernel(draw.reshape(-1), numbers, out.reshape(-1))
    same(out[:3], draw[1:4] + numbers[1:, None] * draw[0])
    same(out[3:], numbers[:2, None] * draw[0])


def test_rows_are_columns_after_transposition(wide):
    W, of = wide
    rows, put, turn = of.load_rows, simd.store_rows, simd.transposed
    a = np.arange(W * W, dtype=np.float32)

    @numba.njit
    def kernel(a, out):
        put(out, 0, W, turn(rows(a, 0, W, W)))

    out = np.empty((W, W), np.float32)
    kernel(a, out.reshape(-1))
    same(out, a.reshape(W, W).T)


def test_elements_that_are_fetched_in_advance_stay_as_they_are(wide):
    load, fetch, store = wide[1].load, simd.prefetch_rows, simd.store

    @numba.njit
    def kernel(a, out):
        fetch(a, 1, 2, 3)
        store(out, 0, load(a, 0))

    a, out = np.arange(16, dtype=np.float32), np.empty(wide[0], np.float32)
    kernel(a, out)
    same(out, a[: wide[0]])


def test_rows_of_a_product(wide):
    W, of = wide
    load, put, axpy_rows, repeat = of.load, simd.store_rows, simd.axpy_rows, simd.repeat
    a, numbers = np.arange(2 * W, dtype=np.float32), np.arange(9, dtype=np.float32)

    @numba.njit
    def kernel(a, numbers, out):
        put(out, 0, W, axpy_rows(load(a, 0), numbers, 1, 3, repeat(load(a, W), 3)))

    out = np.empty((3, W), np.float32)
    kernel(a, numbers, out.reshape(-1))
    same(out, a[W:] + numbers[1::3, None] * a[:W])


def test_exp_over_its_whole_range(wide):
    x = np.concatenate([np.linspace(-110, 88, 40_000), np.linspace(-1e-3, 1e-3, 1000), [0.0, -0.0, 1e-42]])
    x = np.concatenate([x, [-np.inf, np.nan, -3e38, -87.3, -103.97, -104.1]])
    x = np.concatenate([x.astype(np.float32), np.zeros(-len(x) % 16, np.float32)])
    of_negative = numba_maths.exp_of_negative
    with np.errstate(all="ignore"):
        expected = np.exp(x.astype(np.float64)).astype(np.float32)
    found = applied(wide, lambda a, b: of_negative(a), x, x)
    np.testing.assert_allclose(found, expected, rtol=2.5e-7, atol=1.7e-38)


def test_the_width_follows_from_the_features():
    assert simd_width.width_for("+avx,+avx2,+fma,+avx512f,-avx512vl") == 16
    assert simd_width.width_for("+avx,+avx2,+fma,-avx512f") == 8
    assert {simd_width.width_for(features) for features in ("+neon,-avx512f", "", "+avx2,-fma")} == {4}
    assert simd_width.width_for(simd_width.features()) == simd_width.W
