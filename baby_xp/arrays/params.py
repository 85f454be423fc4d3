"""Parameter specs: the shape of each parameter and how its first value is drawn.

First values are drawn on the host with NumPy, so that every backend starts from the same numbers. Each
parameter has a stream of its own, keyed by (seed, path): adding one to a model leaves the others as they
were, and the rows that finetuning appends can be drawn in the same way.
"""

import zlib
from dataclasses import dataclass, replace

import numpy as np

from baby_xp.arrays.tree import Layout, Tree, from_leaves, leaves


@dataclass(frozen=True)
class Spec:
    """Shape and first value of one parameter: normal(mean, std), constant where std is 0.

    `decays`: whether weight decay applies to it; to weights, not to gains and biases, stacked ones included.
    """

    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0
    decays: bool = False


def normal(*shape: int, std: float = 0.02) -> Spec:
    """A weight, normal with mean 0. The default std of 0.02 is The Little Baby's, and GPT-2's."""
    return Spec(shape, std=std, decays=True)


def zeros(*shape: int) -> Spec:
    """A bias, zero at first."""
    return Spec(shape)


def ones(*shape: int) -> Spec:
    """A gain, one at first."""
    return Spec(shape, mean=1.0)


def scaled(spec: Tree, factor: float) -> Tree:
    """The same specs with the spread of the weights multiplied by `factor`.

    GPT-2 scales the weights of the projections that write into the residual stream by 1 / sqrt(2 L), so that
    the stream's spread does not grow with depth (Radford et al. 2019, section 2.3).
    """
    return from_leaves((path, replace(one, std=one.std * factor)) for path, one in leaves(spec))


def draw(spec: Tree, seed: int, dtype: str = "float32") -> np.ndarray:
    """First values of all parameters as one flat host array (P,), in the order of the tree."""
    return np.concatenate([draw_one(one, seed, path).astype(dtype).reshape(-1) for path, one in leaves(spec)])


def draw_one(spec: Spec, seed: int, path: str) -> np.ndarray:
    """First value of the parameter at `path`, in float64."""
    if spec.std == 0:
        return np.full(spec.shape, spec.mean)
    key = np.array([seed % 2**64, zlib.crc32(path.encode())], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).normal(spec.mean, spec.std, spec.shape)


def grown(spec: Tree, seed: int, old_layout: Layout, old: np.ndarray) -> np.ndarray:
    """First values (P,) of a model that is larger than an old one (old P,) of the same parameters.

    The old values stay, in the leading rows and columns; the rest is drawn as for a new model.
    """
    fresh, layout = draw(spec, seed, str(old.dtype)), Layout.of(spec)
    before = dict(leaves(old_layout.unpack(np, old)))
    for path, now in leaves(layout.unpack(np, fresh)):  # views of `fresh`
        now[tuple(slice(length) for length in before[path].shape)] = before[path]
    return fresh


def decay_mask(spec: Tree) -> np.ndarray:
    """For each element of the flat buffer, 1 if weight decay applies to it, else 0: (P,)."""
    mask = np.zeros(count(spec), "float32")
    slices = Layout.of(spec).slices
    for path, one in leaves(spec):
        mask[slices[path]] = one.decays
    return mask


def matrices(spec: Tree) -> list[tuple[slice, tuple[int, ...]]]:
    """The weight matrices inside blocks, which Muon updates: slice of the flat buffer and shape of each."""
    slices = Layout.of(spec).slices
    return [
        (slices[path], one.shape)
        for path, one in leaves(spec) if path.startswith("blocks.") and one.decays and len(one.shape) == 2
    ]  # fmt: skip


def count(spec: Tree) -> int:
    """Number of parameters, P."""
    return Layout.of(spec).size
