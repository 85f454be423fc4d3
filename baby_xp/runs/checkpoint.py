"""Weights and training state as safetensors: named arrays, no code, readable everywhere."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from baby_xp.errors import BabyError
from baby_xp.runs import store
from baby_xp.text.corpus import shown
from baby_xp.tree import Layout


def save_weights(path: Path, layout: Layout, flat: np.ndarray, metadata: dict[str, str]) -> None:
    """Write the parameters (P,) as one named array each, "blocks.0.norm1.gain"."""
    ends = np.cumsum(layout.sizes)
    arrays = {
        name: np.ascontiguousarray(flat[end - size : end].reshape(shape))
        for name, shape, size, end in zip(layout.paths, layout.shapes, layout.sizes, ends, strict=True)
    }
    store.write(path, save(arrays, metadata))


def load_weights(path: Path, layout: Layout) -> np.ndarray:
    """The parameters (P,) of a model with this layout. Raises BabyError if the file does not hold them."""
    arrays = _load(path)
    if arrays.keys() != set(layout.paths):
        odd = sorted(arrays.keys() ^ set(layout.paths))
        raise BabyError(
            f"{shown(path)} does not belong to this model: {len(odd)} arrays differ, first {odd[0]!r}"
        )
    for name, shape in zip(layout.paths, layout.shapes, strict=True):
        if arrays[name].shape != shape or arrays[name].dtype.kind != "f":
            found = f"{arrays[name].dtype} {arrays[name].shape}"
            raise BabyError(
                f"{shown(path)} does not belong to this model: {name} is {found}, not float {shape}"
            )
    return np.concatenate([arrays[name].reshape(-1) for name in layout.paths])


def save_state(path: Path, state: dict[str, np.ndarray]) -> None:
    """Write the arrays of a training state that are not the parameters."""
    store.write(path, save({name: np.ascontiguousarray(state[name]) for name in ("m", "v", "step")}))


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise BabyError(f"{shown(path)} cannot be read ({error.strerror}); the run is incomplete") from None
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise BabyError(f"{shown(path)} is damaged ({' '.join(str(error).split())})") from None
