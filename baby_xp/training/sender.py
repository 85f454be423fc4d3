"""Sends gradients to the other ranks while the backward pass computes those before them."""

from typing import Any

from baby_xp.arrays.tree import Layout, Tree, address, leaves
from baby_xp.distributed.group import GradualSum


class Sender:
    """Puts gradients that are complete into the flat buffer (P,), and lets a sum over the ranks begin with them.

    For NumPy, and for the last tile of a step. adds: the buffer has gradients of earlier tiles, to which these are
    added. It is what tree.Parameters calls in a backward pass.
    """

    def __init__(self, layout: Layout, flat: Any, adds: bool, sum_: GradualSum):
        self.layout, self.flat, self.adds, self.sum = layout, flat, adds, sum_
        self.first = layout.size
        """Where the gradients begin that are in place."""
        self.progress = sum_.progress

    def completed(self, tree: Tree) -> None:
        """Take a part of the tree of gradients; what it took before is left out.

        Raises ValueError if gradients between this part and the earlier ones are missing.
        """
        new = [(self.layout.slices[path], leaf) for path, leaf in leaves(tree)]
        new = [(at, leaf) for at, leaf in new if at.start < self.first]
        first = min((at.start for at, _ in new), default=self.first)
        if first + sum(at.stop - at.start for at, _ in new) != self.first:
            raise ValueError(f"gradients before element {self.first} of the buffer are missing: {sorted(tree)}")
        for at, leaf in new:
            view = self.flat[at]
            if self.adds:
                view += leaf.reshape(-1)
            elif address(view) != address(leaf):  # it was not written in place
                view[:] = leaf.reshape(-1)
        self.first = first
        self.sum.ready(first)
