"""Weights and checkpoints as safetensors: named arrays, no code, readable everywhere.

Each file carries a checksum over all that it holds, so that a flipped bit is an error, not a wrong model.
"""

import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save_file

from baby_xp.arrays.tree import Layout, leaves
from baby_xp.config import ModelConfig, model_from_dict, to_dict
from baby_xp.errors import BabyError
from baby_xp.files import refusal, shown, write
from baby_xp.runs import store
from baby_xp.text.tokenizer import Tokenizer
from baby_xp.training.checkpoint import Checkpoint


def save_weights(path: Path, layout: Layout, flat: np.ndarray, metadata: dict[str, str]) -> None:
    """Write the parameters (P,) as one named array each, "blocks.0.norm1.gain"."""
    _save(path, dict(leaves(layout.unpack(np, flat))), metadata)


def load_weights(path: Path, layout: Layout) -> tuple[np.ndarray, dict[str, str]]:
    """The parameters (P,) of a model with this layout, and the metadata.

    Raises BabyError if the file does not hold them, or is not as it was written.
    """
    arrays, metadata = _load(path)
    if arrays.keys() != set(layout.paths):
        odd = sorted(arrays.keys() ^ set(layout.paths))
        raise BabyError(f"{shown(path)} does not belong to this model: {len(odd)} arrays differ, first {odd[0]!r}")
    for name, shape in zip(layout.paths, layout.shapes, strict=True):
        if arrays[name].shape != shape or arrays[name].dtype.kind != "f":
            found = f"{arrays[name].dtype} {arrays[name].shape}"
            raise BabyError(f"{shown(path)} does not belong to this model: {name} is {found}, not float {shape}")
    return np.concatenate([arrays[name].reshape(-1) for name in layout.paths]), metadata


def save_state(path: Path, checkpoint: Checkpoint, metadata: dict[str, str]) -> None:
    """Write a checkpoint as one file, so that it is either complete or unchanged."""
    best = {} if checkpoint.best is None else {"best": checkpoint.best}
    metadata = {**metadata, "progress": json.dumps(checkpoint.progress)}
    _save(path, {**checkpoint.state, **best}, metadata)


def load_state(path: Path, size: int, dtype: str) -> tuple[Checkpoint, dict[str, str]]:
    """The checkpoint of a model of `size` parameters, and the metadata.

    Raises BabyError if the file does not hold one, or is not as it was written.
    """
    arrays, metadata = _load(path)
    expected = {"params": (size,), "m": (size,), "v": (size,), "step": (1,)}
    found = {name: array.shape for name, array in arrays.items() if name != "best"}
    kinds = {str(array.dtype) for name, array in arrays.items() if name != "step"}
    if found != expected or kinds != {dtype} or arrays.get("best", arrays["m"]).shape != (size,):
        raise BabyError(f"{shown(path)} is no checkpoint of this model ({size:,} parameters in {dtype})")
    try:
        progress = json.loads(metadata.pop("progress"))
    except (KeyError, ValueError):
        raise BabyError(f"{shown(path)} is no checkpoint of a run") from None
    best = arrays.pop("best", None)
    return Checkpoint(arrays, best, progress), metadata


def belonging(guid: str, model_config: ModelConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """What binds a file of arrays to its run, model and tokenizer: metadata of the file."""
    return {
        "guid": guid,
        "model": json.dumps(to_dict(model_config), sort_keys=True),
        "tokenizer": store.digest(tokenizer.to_dict()),
    }


def check_belonging(path: Path, metadata: dict[str, str], expected: dict[str, str]) -> None:
    """Raises BabyError unless the arrays at `path` were written for the run, model and tokenizer of `expected`."""
    found = {**metadata, "model": _completed(metadata.get("model", ""))}
    for name, value in expected.items():
        if found.get(name) != value:
            run = f"run {expected['guid']}"
            raise BabyError(f"{path} was written with another {name}: the files of {run} were mixed up")


def _completed(model: str) -> str:
    """A model's entry in the metadata, with the fields that its config did not have when the file was written."""
    try:
        return json.dumps(to_dict(model_from_dict(json.loads(model), "")), sort_keys=True)
    except (ValueError, RecursionError, BabyError):
        return model


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file, without its arrays and unchecked: for a table of runs. {} if it cannot be read."""
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _save(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    sealed = {**metadata, store.SEAL: _checksum(arrays, metadata)}

    def written(temporary: Path) -> None:  # from the arrays: bytes in memory would be two more copies
        try:
            save_file(arrays, temporary, sealed)
        except SafetensorError as error:
            # "Error while serializing: I/O error: No space left on device (os error 28)"
            number = re.search(r"\(os error (\d+)\)$", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code)) from None

    write(path, written)


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        data = path.read_bytes()
        arrays = load(data)
    except FileNotFoundError:
        raise store.incomplete(path) from None
    except OSError as error:
        raise refusal(path, error, "read") from None
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise BabyError(f"{shown(path)} is damaged ({' '.join(str(error).split())})") from None
    # load has checked the header, but does not return its metadata
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    seal = metadata.pop(store.SEAL, None)
    if seal is None:
        raise BabyError(f"{shown(path)} is no file of a run (it has no checksum); it is damaged or from elsewhere")
    if seal != _checksum(arrays, metadata):
        raise BabyError(f"{shown(path)} is damaged: its checksum differs; bring the old file back")
    return arrays, metadata


def _checksum(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> str:
    """SHA-256 of all arrays, with names, types and shapes, and of the metadata."""
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode("ascii"))
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()
