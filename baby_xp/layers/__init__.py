"""The layers, one per file, each with `spec`, `forward` and `backward` and no hidden state.

    spec(...)                         tree of parameter specs, where the layer has parameters
    forward(xp, p, x, ...)            -> y, saved
    backward(xp, p, saved, dy)        -> dp, dx

`p` is the tree of arrays that `spec` describes, `dp` the same tree of gradients. `saved` is what backward
needs of forward, a tuple of arrays (and of plain numbers where the layer has a rate); a NamedTuple where others
read it. Arrays are (N, C) with N = B * T unless a comment says otherwise. No array is changed in place and no
value of an array is read, so that a backend can trace, fuse or run ahead.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """What the shape (N, C) leaves out: sequences B, tokens T in each, attention heads H."""

    B: int
    T: int
    H: int
