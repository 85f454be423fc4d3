"""What ranks send each other comes back as it was, and nothing else can be sent."""

import math

import numpy as np
import pytest

from baby_xp.distributed.messages import packed, unpacked


def test_json_values_come_back():
    value = {"a": [1, -2.5, 1e300, True, None, "ä\n"], "b": {"c": {}}, "": []}
    assert unpacked(packed(value)) == value
    assert unpacked(packed(0.1 + 0.2)) == 0.1 + 0.2
    assert math.isnan(unpacked(packed(math.nan)))
    assert unpacked(packed((1, (2,)))) == [1, [2]]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint8", "bool", ">i4"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_arrays_come_back_bit_for_bit(dtype, shape):
    draw = np.random.default_rng(0)
    arrays = [draw.integers(0, 100, shape).astype(dtype) for _ in range(3)]
    arrays[1] = arrays[1].T  # not contiguous
    found = unpacked(np.frombuffer(packed({"x": arrays, "n": 7}), np.uint8))
    assert found["n"] == 7
    for one, other in zip(found["x"], arrays, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
        assert one.flags.writeable
        assert one.flags.aligned


def test_infinities_and_nan_of_arrays_come_back():
    array = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324])
    assert unpacked(packed([array]))[0].tobytes() == array.tobytes()


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), print, np.array([print])])
def test_nothing_else_can_be_sent(value):
    with pytest.raises(TypeError, match="ranks cannot send each other a"):
        packed({"value": value})
