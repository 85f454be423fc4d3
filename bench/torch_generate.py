"""The peer in generation: PyTorch's GPT with preallocated key-value caches, and baby_xp's window policy."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F

from baby_xp.generate import window_start


class Decoder:
    """Texts that grow together, and the keys and values of the tokens of their window.

    The caches have room for a whole context from the beginning, so that a step writes one row and copies none.
    """

    def __init__(self, model, prompts: np.ndarray, num_tokens: int):
        """prompts (B, T): ids; room is made for num_tokens more."""
        B, T = prompts.shape
        self.model, self.device = model, model.wpe.weight.device
        self.n_ctx, C = model.wpe.weight.shape
        H = model.blocks[0].attention.H
        self.text = torch.zeros(B, T + num_tokens, dtype=torch.int64, device=self.device)
        self.text[:, :T] = torch.from_numpy(prompts)
        self.length, self.start, self.cached = T, 0, 0
        self.caches = [
            torch.zeros(2, B, H, self.n_ctx, C // H, device=self.device) for _ in range(len(model.blocks))
        ]

    def logits(self) -> torch.Tensor:
        """(B, V) after the last token. Computes what is new in the window; all of it where the window moved."""
        start = window_start(self.length, self.n_ctx)
        if start != self.start:
            self.start, self.cached = start, 0
        new = self.text[:, start + self.cached : self.length]
        t, self.cached = self.cached, self.length - start
        x = self.model.wte(new) + self.model.wpe.weight[t : self.cached]
        for block, cache in zip(self.model.blocks, self.caches, strict=True):
            x = x + _attention(block.attention, block.norm1(x), cache, t)
            x = x + block.network(block.norm2(x))
        return self.model.lm_head(self.model.ln_f(x[:, -1]))

    def append(self, ids: torch.Tensor) -> None:
        """The texts go on with ids (B,)."""
        self.text[:, self.length] = ids
        self.length += 1


def generate(decoder: Decoder, num_tokens: int) -> Iterator[np.ndarray]:
    """Yield ids (B,) on the host num_tokens times, drawn from the softmax. To be run in inference mode."""
    for _ in range(num_tokens):
        ids = torch.multinomial(F.softmax(decoder.logits(), dim=-1), 1)[:, 0]
        decoder.append(ids)
        yield ids.cpu().numpy()


def shortfalls(decoder: Decoder, text: np.ndarray) -> np.ndarray:
    """How far below the largest logit each next id of text (steps, B) lies: 0 where it is the likeliest one."""
    found = []
    for ids in torch.from_numpy(text).to(decoder.device):
        logits = decoder.logits()
        found.append((logits.amax(dim=-1) - logits.gather(1, ids[:, None])[:, 0]).cpu().numpy())
        decoder.append(ids)
    return np.array(found)


def _attention(attention, x, cache, t: int):
    """Queries of the new tokens with the keys of all; x (B, n, C), cache (2, B, H, n_ctx, D), t tokens in it."""
    B, n, C = x.shape
    qkv = attention.qkv(x).view(B, n, 3, attention.H, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, n, D)
    cache[:, :, :, t : t + n] = qkv[1:]
    k, v = cache[:, :, :, : t + n].unbind()
    # several tokens are only ever computed at once where the window begins: the mask is the plain triangle
    y = F.scaled_dot_product_attention(qkv[0], k, v, is_causal=n > 1)
    return attention.out(y.transpose(1, 2).reshape(B, n, C))
