"""The models, and one object that goes by the kind of config: `Model(config, vocab_size)`."""

from dataclasses import dataclass
from functools import cached_property

from baby_xp import params
from baby_xp.config import EquationConfig, GPTConfig
from baby_xp.models import gpt, mlp
from baby_xp.tree import Layout, Tree

MODULES = {GPTConfig: gpt, EquationConfig: mlp}


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

    @property
    def n_parameters(self) -> int:
        """Number of parameters, P."""
        return params.count(self.spec)

    @property
    def dropouts(self) -> int:
        """Places of dropout."""
        return self.module.dropouts(self.config)

    def forward(self, xp, p: Tree, ids, noise=None):
        """ids (B, T) -> logits (rows, V) and saved: a row a token for the GPT, a row a context otherwise."""
        return self.module.forward(xp, p, ids, self.config, noise)

    def backward(self, xp, p: Tree, saved, dlogits) -> Tree:
        """dlogits (rows, V) -> dp."""
        return self.module.backward(xp, p, saved, dlogits, self.config)
