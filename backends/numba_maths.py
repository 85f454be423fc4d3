"""Functions of vectors that several kernels call: exp, sigmoid, the hash of dropout's bits. See simd.py."""

import math

from baby_xp_backends.numba_library import numba_function
from baby_xp_backends.simd import bits, floats, select

from baby_xp.arrays import rng


def inlined(function):
    """As numba_library.inlined, but also where nothing is compiled: this module always imports numba."""
    return numba_function(function, forceinline=True)


LOG2_E = math.log2(math.e)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
"""ln 2 in two parts; a product of the first one with an exponent is exact."""
MAGIC = 1.5 * 2**23
"""Numbers near this one have no fraction: adding and subtracting it rounds; its lowest bits are the integer."""
NORMAL = -87.0
"""exp is a normal number above."""


@inlined
def exp_of_negative(x):
    """exp of numbers that are not above 0, to 2e-7 of its value; below NORMAL it stays at exp(NORMAL), 1.6e-38.

    It holds up to 88; above, the result is meaningless. x = n ln 2 + r with |r| <= ln(2) / 2: exp(r) is the
    polynomial of expf in Cephes (Moshier 1989), and n is added to its exponent.
    """
    x = select(x < NORMAL, NORMAL, x)
    shifted = x * LOG2_E + MAGIC
    n = shifted - MAGIC
    r = x - n * LN2_HIGH - n * LN2_LOW
    series = 1.9875691500e-4 * r + 1.3981999507e-3
    series = series * r + 8.3334519073e-3
    series = series * r + 4.1665795894e-2
    series = series * r + 1.6666665459e-1
    series = series * r + 5.0000001201e-1
    return floats(bits(series * (r * r) + r + 1.0) + (bits(shifted) << 23))


@inlined
def sigmoid(x):
    """1 / (1 + exp(-x)) of each lane: 0 below -88."""
    return select(x < -88.0, 0.0, 1.0 / (1.0 + exp_of_negative(0.0 - x)))


@inlined
def mix(x):
    """As rng.mix."""
    x = x + rng.GOLDEN
    x = (x ^ (x >> 16)) * rng.FIRST
    x = (x ^ (x >> 15)) * rng.SECOND
    return x ^ (x >> 16)
