"""Nested dicts of arrays, and the flat buffer that they are views into.

A model's parameters are a tree: {"wte": {"weight": (V, C)}, "blocks": {"0": {...}}}. A leaf's path is its
keys joined by dots, "blocks.0.attention.qkv.weight": the name under which it is saved.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from baby_xp.arrays.namespace import Array

Tree = dict[str, Any]


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) of every leaf, in the order of the dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def from_leaves(pairs: Iterable[tuple[str, Any]]) -> Tree:
    """Build the nested dict back from (path, leaf) pairs."""
    tree: Tree = {}
    for path, leaf in pairs:
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


class Parameters(dict[str, Any]):
    """A tree of parameters whose nodes know where their gradients belong.

    `gradients` is the same tree of views of the flat gradient. A backend's kernel may write a parameter's gradient
    there and return that very view, which then need not be packed; the layers themselves know nothing about it.
    A parameter that a model uses twice must not be written twice: hand it to one of the layers in a plain dict.

    Gradients that other ranks wait for can leave before the backward pass is over: `sender`, if there is one, has
    a method `completed`, see below, and a method `progress`, which is called often in a backward pass. `gradients`
    is None if no gradient may be written.
    """

    def __init__(self, tree: Tree, gradients: Tree | None, sender: Any = None):
        self.gradients, self.sender = gradients, sender
        super().__init__(
            (key, Parameters(value, gradients and gradients[key], sender) if isinstance(value, dict) else value)
            for key, value in tree.items()
        )


def gradient_of(p: Tree, name: str) -> Array:
    """Where the gradient of the parameter p[name] may be written, or None."""
    if not isinstance(p, Parameters):
        return None
    if p.sender is not None:
        p.sender.progress()
    return p.gradients and p.gradients[name]


def completed(p: Tree, dp: Tree) -> None:
    """A model's backward pass says that dp, a part of the gradients of all parameters p, is complete.

    It does so from the last parameters to the first. What it has not reported is complete at its end.
    """
    if isinstance(p, Parameters) and p.sender is not None:
        p.sender.completed(dp)


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in the flat buffer of all parameters, in the order of the tree."""

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tree: Tree) -> "Layout":
        """The layout of a tree whose leaves have a `shape`: arrays or parameter specs."""
        pairs = list(leaves(tree))
        return cls(tuple(path for path, _ in pairs), tuple(tuple(leaf.shape) for _, leaf in pairs))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Number of parameters, P."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The part of the flat buffer that each parameter takes, by path."""
        bounds = pairwise(accumulate(self.sizes, initial=0))
        return {path: slice(*ends) for path, ends in zip(self.paths, bounds, strict=True)}

    def pack(self, xp: Any, tree: Tree) -> Array:
        """Lay the leaves one after the other: a tree of arrays -> (P,)."""
        by_path = dict(leaves(tree))
        if by_path.keys() != set(self.paths):
            raise KeyError(f"tree does not fit the layout: {sorted(by_path.keys() ^ set(self.paths))}")
        return xp.concat([xp.reshape(by_path[path], (-1,)) for path in self.paths])

    def unpack(self, xp: Any, flat: Array) -> Tree:
        """The tree of arrays that `flat` (P,) holds; views of it where the library has views."""
        shapes = zip(self.slices.items(), self.shapes, strict=True)
        return from_leaves((path, xp.reshape(flat[at], shape)) for (path, at), shape in shapes)


def fill(views: Tree, tree: Tree) -> None:
    """Copy the leaves of a tree into views of the same tree, except those that are these views already."""
    by_path = dict(leaves(tree))
    for path, view in leaves(views):
        if by_path[path] is not view:
            view[...] = by_path[path]


def address(array: Any) -> int:
    """Where an array of NumPy begins in the memory of this process."""
    return int(array.__array_interface__["data"][0])
