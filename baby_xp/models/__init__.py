"""The models, and one object that chooses among them by the kind of config: `Model(config, vocab_size)`."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from baby_xp.arrays.tree import Layout, Tree, leaves
from baby_xp.config import EquationConfig, GPTConfig
from baby_xp.models import equation, gpt

MODULES = {GPTConfig: gpt, EquationConfig: equation}


@dataclass(frozen=True)
class Model:
    """A config and the number of token ids, with the maths that belongs to them. Holds no array."""

    config: GPTConfig | EquationConfig
    vocab_size: int

    @property
    def module(self):
        """The module that holds spec, forward and backward."""
        return MODULES[type(self.config)]

    @cached_property
    def spec(self) -> Tree:
        """Tree of parameter specs."""
        return self.module.spec(self.config, self.vocab_size)

    @cached_property
    def layout(self) -> Layout:
        """Where each parameter lies in the flat buffer (P,)."""
        return Layout.of(self.spec)

    @cached_property
    def shapes(self) -> list[tuple[str, tuple[int, ...], int]]:
        """Path, shape and number of all parameters, where those of block 0 stand for those of every block: found
        quickly, however many blocks there are."""
        one, blocks = self.config, 1
        if isinstance(one, GPTConfig):
            one, blocks = replace(one, n_layers=1), one.n_layers
        return [
            (path, tuple(spec.shape), blocks if path.startswith("blocks.") else 1)
            for path, spec in leaves(self.module.spec(one, self.vocab_size))
        ]

    @property
    def n_parameters(self) -> int:
        """Number of parameters, P."""
        return sum(math.prod(shape) * number for _, shape, number in self.shapes)

    @property
    def dropouts(self) -> int:
        """Places of dropout."""
        return self.module.dropouts(self.config)

    def forward(self, xp, p: Tree, ids, noise=None):
        """ids (B, T) -> logits (rows, V) and saved: one row per token for the GPT, one per context otherwise."""
        return self.module.forward(xp, p, ids, self.config, noise)

    def backward(self, xp, p: Tree, saved, dlogits) -> Tree:
        """dlogits (rows, V) -> dp."""
        return self.module.backward(xp, p, saved, dlogits, self.config)
