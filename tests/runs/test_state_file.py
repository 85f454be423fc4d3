"""Weights and checkpoints as safetensors: saving and loading is exact, and a file that was changed or damaged in
any way is an error."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from baby_xp.arrays.tree import Layout
from baby_xp.errors import BabyError
from baby_xp.runs import state_file
from baby_xp.training.checkpoint import Checkpoint, nothing_yet

LAYOUT = Layout(("wte.weight", "blocks.0.norm1.gain", "blocks.0.norm1.bias", "scalar"), ((5, 3), (3,), (3,), (1,)))
FLAT = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
ARRAYS = {
    name: FLAT[sum(LAYOUT.sizes[:i]) :][:size].reshape(shape)
    for i, (name, shape, size) in enumerate(zip(LAYOUT.paths, LAYOUT.shapes, LAYOUT.sizes, strict=True))
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    state_file.save_weights(path, LAYOUT, FLAT, {"guid": "a-b"})
    return path


def checksum(arrays: dict, metadata: dict) -> str:
    """The checksum over arrays and metadata, which files of earlier commits have too."""
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode() + array.tobytes())
    return total.hexdigest()


def sealed(arrays: dict, metadata: dict | None = None) -> bytes:
    """A file with a matching checksum, to test the checks that follow it."""
    return save(arrays, {**(metadata or {}), "checksum": checksum(arrays, metadata or {})})


def header_of(path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def refused(load, path, *arguments) -> str:
    with pytest.raises(BabyError) as caught:
        load(path, *arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def failure(path) -> str:
    return refused(state_file.load_weights, path, LAYOUT)


def state_failure(path, size=LAYOUT.size, dtype="float32") -> str:
    return refused(state_file.load_state, path, size, dtype)


# round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_are_loaded_bit_for_bit(tmp_path, dtype):
    flat = np.random.default_rng(0).normal(size=LAYOUT.size).astype(dtype)
    flat[:3] = [-0.0, np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal]
    state_file.save_weights(tmp_path / "a", LAYOUT, flat, {"step": "3"})
    back, metadata = state_file.load_weights(tmp_path / "a", LAYOUT)
    assert metadata == {"step": "3"}
    assert back.dtype == flat.dtype
    assert back.tobytes() == flat.tobytes()


def test_every_array_is_in_the_file_with_name_and_shape_and_the_metadata_with_a_checksum(path):
    arrays = load_file(path)
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array, strict=True)
    metadata = header_of(path)["__metadata__"]
    assert metadata == {"guid": "a-b", "checksum": checksum(ARRAYS, {"guid": "a-b"})}
    assert state_file.load_weights(path, LAYOUT)[1] == {"guid": "a-b"}
    assert state_file.read_metadata(path) == metadata


def test_the_order_of_the_arrays_in_the_file_does_not_matter(path):
    path.write_bytes(sealed(dict(reversed(ARRAYS.items())), {"guid": "a-b"}))
    np.testing.assert_array_equal(state_file.load_weights(path, LAYOUT)[0], FLAT)


STATE = {"params": FLAT, "m": FLAT * 2, "v": FLAT * 3, "step": np.array([7], np.int32)}
RECORD = {"step": 6, "train_loss": 0.1 + 0.2, "val_loss": 1e-300, "sample": "\u20ac\n\ud800"}
PROGRESS = {
    **nothing_yet(),
    "records": [RECORD],
    "best": {"step": 6, "val_loss": 1e-300},
    "total": 1 / 3,
    "count": 1,
}


@pytest.mark.parametrize("best", [None, FLAT * 5], ids=["the last is the best", "an earlier one is the best"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_checkpoint_is_loaded_bit_for_bit(tmp_path, best, dtype):
    state = {name: array if name == "step" else array.astype(dtype) for name, array in STATE.items()}
    best = None if best is None else best.astype(dtype)
    state_file.save_state(tmp_path / "state", Checkpoint(state, best, PROGRESS), {"guid": "a-b", "step": "7"})
    assert [path.name for path in tmp_path.iterdir()] == ["state"]  # one file
    assert json.loads(header_of(tmp_path / "state")["__metadata__"]["progress"]) == PROGRESS
    back, metadata = state_file.load_state(tmp_path / "state", LAYOUT.size, dtype)
    assert metadata == {"guid": "a-b", "step": "7"}
    assert back.state.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back.state[name], array, strict=True)
    assert (back.best is None) == (best is None)
    np.testing.assert_array_equal(back.best_params, state["params"] if best is None else best, strict=True)
    assert back.progress == PROGRESS
    assert back.step == 7


def test_the_metadata_of_a_file_that_cannot_be_read_is_empty(tmp_path, path):
    path.write_bytes(path.read_bytes()[:50])
    for name in (path.name, "missing", "."):
        assert state_file.read_metadata(tmp_path / name) == {}


# invalid checkpoints ------------------------------------------------------------------------------------


@pytest.fixture
def state_path(tmp_path):
    path = tmp_path / "state.safetensors"
    state_file.save_state(path, Checkpoint(STATE, FLAT, PROGRESS), {"guid": "a-b"})
    return path


def test_a_checkpoint_of_another_size_or_precision_is_refused(state_path):
    n = LAYOUT.size
    message = "is not a checkpoint of this model ({} parameters in {})"
    assert message.format(n + 1, "float32") in state_failure(state_path, size=n + 1)
    assert message.format(n, "float64") in state_failure(state_path, dtype="float64")


@pytest.mark.parametrize("change", [
    {"m": None}, {"step": None}, {"params": None}, {"extra": FLAT}, {"v": FLAT[:-1]}, {"best": FLAT[:-1]},
    {"m": FLAT.astype("float64")}, {"best": FLAT.astype("float64")}, {"m": FLAT.astype("int32")},
    {"best": FLAT.reshape(1, -1)}, {"step": np.zeros(2, np.int32)}, {"step": np.array(7, np.int32)},
], ids=lambda change: " ".join(f"{name} {getattr(array, 'shape', None)}" for name, array in change.items())
)  # fmt: skip
def test_arrays_that_are_not_a_checkpoint_are_refused(state_path, change):
    arrays = {name: array for name, array in {**STATE, "best": FLAT, **change}.items() if array is not None}
    state_path.write_bytes(sealed(arrays, {"progress": json.dumps(PROGRESS)}))
    assert "is not a checkpoint of this model" in state_failure(state_path)


@pytest.mark.parametrize("metadata", [{}, {"progress": "{"}, {"progress": ""}])
def test_a_checkpoint_without_progress_is_refused(state_path, metadata):
    state_path.write_bytes(sealed(STATE, metadata))
    assert "is not a checkpoint of a run" in state_failure(state_path)


def test_weights_and_checkpoints_are_not_interchangeable(path, state_path):
    assert "is not a checkpoint of this model" in state_failure(path)
    assert "does not belong to this model" in failure(state_path)


def test_a_flipped_bit_is_detected_anywhere(path, state_path):
    """In the header, in the metadata, in the arrays. test_faults.py damages files of runs at random."""
    for damaged, error_of in ((path, failure), (state_path, state_failure)):
        data = damaged.read_bytes()
        for place in range(0, len(data), 5):
            damaged.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
            assert error_of(damaged)
            assert isinstance(state_file.read_metadata(damaged), dict)  # or an empty dict, but no error


# invalid files ------------------------------------------------------------------------------------------


def test_a_file_without_a_checksum_is_refused(path):
    header = {name: value for name, value in header_of(path).items() if name != "__metadata__"}
    null = with_header({"__metadata__": None, **header}, FLAT.tobytes())
    for data in (save(ARRAYS), save(ARRAYS, {}), save(ARRAYS, {"guid": "a-b"}), null):
        path.write_bytes(data)
        assert "has no checksum" in failure(path)


CHANGES = {
    "a number": ({**ARRAYS, "scalar": ARRAYS["scalar"] + 1e-7}, {"guid": "a-b"}),
    "a shape": ({**ARRAYS, "wte.weight": ARRAYS["wte.weight"].reshape(3, 5)}, {"guid": "a-b"}),
    "a type of as many bytes": ({**ARRAYS, "scalar": ARRAYS["scalar"].view(np.int32)}, {"guid": "a-b"}),
    "two names": (
        {**ARRAYS, **dict(zip(LAYOUT.paths[1:3], [ARRAYS[name] for name in LAYOUT.paths[2:0:-1]], strict=True))},
        {"guid": "a-b"},
    ),
    "the metadata": (ARRAYS, {"guid": "a-c"}),
    "more metadata": (ARRAYS, {"guid": "a-b", "step": "3"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_without_a_new_checksum_is_an_error(path, change):
    arrays, metadata = CHANGES[change]
    path.write_bytes(save(arrays, {**metadata, "checksum": checksum(ARRAYS, {"guid": "a-b"})}))
    assert "is damaged" in failure(path)


REST = {name: array for name, array in ARRAYS.items() if name != "scalar"}


@pytest.mark.parametrize(("arrays", "words"), [
    (REST, "1 arrays differ, first 'scalar'"),
    ({**ARRAYS, "zzz": FLAT}, "1 arrays differ, first 'zzz'"),
    ({**REST, "scalar2": ARRAYS["scalar"]}, "2 arrays differ, first 'scalar'"),
    ({}, "4 arrays differ"),
], ids=["missing", "extra", "renamed", "none"])  # fmt: skip
def test_other_arrays_belong_to_another_model(path, arrays, words):
    path.write_bytes(sealed(arrays))
    message = failure(path)
    assert "does not belong to this model" in message
    assert words in message


def test_another_shape_or_type_belongs_to_another_model(path):
    for shape in ((3, 5), (15,), (5, 3, 1), (1, 5, 3), (4, 3)):
        path.write_bytes(sealed({**ARRAYS, "wte.weight": np.zeros(shape, np.float32)}))
        assert f"wte.weight is float32 {shape}, not float (5, 3)" in failure(path)
    for dtype in ("int32", "int8", "uint64", "bool"):
        path.write_bytes(sealed({**ARRAYS, "blocks.0.norm1.gain": np.ones(3, dtype)}))
        assert f"blocks.0.norm1.gain is {dtype} (3,), not float (3,)" in failure(path)


def test_a_file_that_cannot_be_read_leaves_the_run_incomplete(tmp_path):
    assert "is missing: the run is incomplete" in failure(tmp_path / "model")
    (tmp_path / "folder").mkdir()
    assert "cannot be read" in failure(tmp_path / "folder")


OTHER_FILES = [b"\x00" * 8, b"\xff" * 8, b"PK\x03\x04 a zip", b"\x80\x04K\x01.", b"{}", b"GIF89a" * 40]


def test_a_file_of_another_kind_or_length_is_damaged(path):
    data = path.read_bytes()
    lengths = {*range(0, len(data), 7), *range(10), len(data) - 1}
    for found in (*OTHER_FILES, data + b"\x00", *(data[:length] for length in lengths)):
        path.write_bytes(found)
        assert "is damaged (" in failure(path)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2", "F4", "I16", "X", "", None, 3])
def test_a_type_that_does_not_fit_is_an_error(path, dtype):
    # a header written by a program, not damaged by a disk: sizes and offsets agree where they can
    width = {"BF16": 2, "F16": 2, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1}.get(dtype, 4)
    header, end = {}, 0
    for name, array in ARRAYS.items():
        begin, end = end, end + array.size * width
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    numpy_type = {"F16": np.float16, "I16": np.int16}.get(dtype)
    arrays = {name: np.zeros(array.shape, numpy_type or "float32") for name, array in ARRAYS.items()}
    header["__metadata__"] = {"checksum": checksum(arrays, {})}
    path.write_bytes(with_header(header, bytes(end)))
    if dtype == "F16":  # float16 numbers are floats too
        assert state_file.load_weights(path, LAYOUT)[0].shape == (LAYOUT.size,)
    elif dtype == "I16":
        assert "wte.weight is int16 (5, 3), not float (5, 3)" in failure(path)
    else:
        assert "is damaged" in failure(path)
