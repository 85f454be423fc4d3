"""Weights as safetensors: the way there and back is exact, and no file, however damaged, raises anything else."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from baby_xp.errors import BabyError
from baby_xp.runs import checkpoint
from baby_xp.tree import Layout

LAYOUT = Layout(("wte.weight", "blocks.0.norm1.gain", "blocks.0.norm1.bias", "scalar"), ((5, 3), (3,), (3,), (1,)))
FLAT = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
ARRAYS = {
    name: FLAT[sum(LAYOUT.sizes[:i]) :][:size].reshape(shape)
    for i, (name, shape, size) in enumerate(zip(LAYOUT.paths, LAYOUT.shapes, LAYOUT.sizes, strict=True))
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save_weights(path, LAYOUT, FLAT, {"guid": "a-b"})
    return path


def failure(path) -> str:
    with pytest.raises(BabyError) as caught:
        checkpoint.load_weights(path, LAYOUT)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


# there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_come_back_bit_for_bit(tmp_path, dtype):
    flat = np.random.default_rng(0).normal(size=LAYOUT.size).astype(dtype)
    flat[:3] = [-0.0, np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal]
    checkpoint.save_weights(tmp_path / "a", LAYOUT, flat, {})
    back = checkpoint.load_weights(tmp_path / "a", LAYOUT)
    assert back.dtype == flat.dtype
    assert back.tobytes() == flat.tobytes()


def test_every_array_has_its_name_and_shape_in_the_file(path):
    arrays = load_file(path)
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array, strict=True)


def test_the_metadata_is_in_the_file(path):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"guid": "a-b"}


def test_the_order_of_the_arrays_in_the_file_does_not_matter(path):
    path.write_bytes(save(dict(reversed(ARRAYS.items()))))
    np.testing.assert_array_equal(checkpoint.load_weights(path, LAYOUT), FLAT)


def test_the_training_state_has_what_resuming_needs_and_no_weights(tmp_path):
    state = {"params": FLAT, "m": FLAT * 2, "v": FLAT * 3, "step": np.array([7], np.int32), "seed": FLAT[:1]}
    checkpoint.save_state(tmp_path / "state", state)
    arrays = load_file(tmp_path / "state")
    assert arrays.keys() == {"m", "v", "step"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, state[name], strict=True)


# files that do not serve --------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["missing", "extra", "renamed", "none"])
def test_other_arrays_belong_to_another_model(path, change):
    arrays = dict(ARRAYS)
    if change == "extra":
        arrays["zzz"] = FLAT
    elif change == "none":
        arrays = {}
    else:
        array = arrays.pop("scalar")
        arrays |= {"scalar2": array} if change == "renamed" else {}
    path.write_bytes(save(arrays))
    message = failure(path)
    assert "does not belong to this model" in message
    expected = {
        "missing": "1 arrays differ, first 'scalar'",
        "extra": "1 arrays differ, first 'zzz'",
        "renamed": "2 arrays differ, first 'scalar'",
        "none": "4 arrays differ",
    }
    assert expected[change] in message


@pytest.mark.parametrize("shape", [(3, 5), (15,), (5, 3, 1), (1, 5, 3), (4, 3)])
def test_another_shape_belongs_to_another_model(path, shape):
    path.write_bytes(save({**ARRAYS, "wte.weight": np.zeros(shape, np.float32)}))
    assert f"wte.weight is float32 {shape}, not float (5, 3)" in failure(path)


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint64", "bool"])
def test_integers_are_no_weights(path, dtype):
    path.write_bytes(save({**ARRAYS, "blocks.0.norm1.gain": np.ones(3, dtype)}))
    assert f"blocks.0.norm1.gain is {dtype} (3,), not float (3,)" in failure(path)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_file_that_cannot_be_read_leaves_the_run_incomplete(tmp_path, kind):
    if kind == "folder":
        (tmp_path / "model").mkdir()
    assert "cannot be read" in failure(tmp_path / "model")


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 7, b"\x00" * 8, b"\xff" * 8, b"PK\x03\x04 a zip", b"\x80\x04K\x01.", b"{}", b"GIF89a" * 40],
)
def test_a_file_of_another_kind_is_damaged(path, data):
    path.write_bytes(data)
    assert "is damaged (" in failure(path)


def test_a_truncation_is_noticed_wherever_it_is(path):
    data = path.read_bytes()
    for length in {*range(0, len(data), 7), *range(10), len(data) - 1}:
        path.write_bytes(data[:length])
        assert "is damaged (" in failure(path)


def test_bytes_at_the_end_are_noticed(path):
    path.write_bytes(path.read_bytes() + b"\x00")
    assert "is damaged (" in failure(path)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2", "F4", "I16", "X", "", None, 3])
def test_a_type_that_does_not_fit_is_an_error(path, dtype):
    # the header of a file that a program wrote, not what a disk spoilt: sizes and offsets agree where they can
    width = {"BF16": 2, "F16": 2, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1}.get(dtype, 4)
    header, end = {}, 0
    for name, array in ARRAYS.items():
        begin, end = end, end + array.size * width
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    if dtype == "F16":  # halves are numbers too
        assert checkpoint.load_weights(path, LAYOUT).shape == (LAYOUT.size,)
    else:
        assert "does not belong" in (message := failure(path)) or "is damaged" in message


ORIGINAL = save(ARRAYS, {"guid": "a-b"})
HEADER_END = 8 + int.from_bytes(ORIGINAL[:8], "little")
# Most of the mutations go where they can do harm: to the header.
PLACES = st.integers(0, HEADER_END - 1) | st.integers(0, len(ORIGINAL) - 1)
MUTATION = st.tuples(st.sampled_from(["set", "flip", "delete", "insert"]), PLACES, st.integers(0, 255))


@pytest.fixture(scope="module")
def mutant_path(tmp_path_factory):
    return tmp_path_factory.mktemp("mutants") / "model.safetensors"


@settings(max_examples=300, deadline=None)
@given(st.lists(MUTATION, min_size=1, max_size=3))
def test_a_damaged_file_gives_an_error_or_weights_of_the_right_shape(mutant_path, mutations):
    data = bytearray(ORIGINAL)
    for how, place, value in mutations:
        place = min(place, len(data) - 1)
        if how == "set":
            data[place] = value
        elif how == "flip":
            data[place] ^= 1 << value % 8
        elif how == "delete":
            del data[place]
        else:
            data.insert(place, value)
    mutant_path.write_bytes(data)
    try:
        flat, message = checkpoint.load_weights(mutant_path, LAYOUT), ""
    except BabyError as error:
        flat, message = FLAT, str(error)
    assert "\n" not in message
    assert flat.shape == (LAYOUT.size,)
    assert flat.dtype.kind == "f"
