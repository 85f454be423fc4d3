"""PyTorch: additions to the modern GPT that were tried before any was taken over into baby_xp, as smear was.

All are from the record runs of modded-nanogpt (Jordan et al.), and begin as if they were not there.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import nn

from bench.peers.torch_modern import ModernGPT, norm


class Sketch(ModernGPT):
    """A modern GPT with some of these parts.

    values: in each block, an embedding of the token is added to the values of attention. x0: before each block,
    x becomes a x + b x0, with two learned numbers for each block, where x0 is the normed embedding. smear: that of
    ModernGPT.
    """

    def __init__(self, config, vocab_size: int, parts: Collection[str]):
        super().__init__(replace(config, smear="smear" in parts), vocab_size)
        L, C = config.n_layers, config.n_emb
        self.parts = parts
        if "values" in parts:
            self.values = nn.ModuleList(nn.Embedding(vocab_size, C) for _ in range(L))
            for one in self.values:
                nn.init.zeros_(one.weight)
        if "x0" in parts:
            self.mix = nn.Parameter(torch.tensor([[1.0, 0.0]] * L))

    def load_state_dict(self, state_dict, *args, **kwargs):
        """The twin's weights; the parts of a sketch keep their own."""
        return super().load_state_dict({**self.state_dict(), **state_dict}, *args, **kwargs)

    def forward(self, ids, targets):
        """ids, targets (B, T) int64 -> mean loss in nats per token."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = x0 = norm(self.smear(self.wte(ids)))                       # (B, T, C)
        for i, block in enumerate(self.blocks):
            if "x0" in self.parts:
                x = self.mix[i, 0] * x + self.mix[i, 1] * x0
            x = block(x, cos, sin, self.values[i](ids) if "values" in self.parts else None)
        logits = self.lm_head(norm(x))                                 # (B, T, V)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
