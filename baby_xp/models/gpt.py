"""GPT: token and position embeddings, blocks, a last norm, a linear head (Radford et al. 2019).

The Little Baby's model: positions are learned, the head has a bias and its own weights, and there is no
dropout on the embeddings.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from baby_xp.arrays.namespace import replaceable
from baby_xp.layers import Shape, block, embedding, layernorm, linear
from baby_xp.layers.block import ATTENTIONS, NETWORKS, Parts


class Saved(NamedTuple):
    """What backward needs, for one backward pass."""

    shape: Shape
    wte: Any
    blocks: Iterator[block.Saved]
    """What each block has saved, the last block first. Each is freed once its successor is asked for."""
    ln_f: Any
    head: Any


def parts(config) -> Parts:
    """What the config's three switches and its form of GELU stand for."""
    attention, network = ATTENTIONS[config.c_attention], NETWORKS[config.c_network]
    return Parts(config.c_sequence, attention, network, config.gelu)


def spec(config, V: int):
    """Parameters of a GPT with V token ids."""
    C, S, H, L = config.n_emb, config.head_size, config.n_heads, config.n_layers
    residual_scale = 1 / math.sqrt(2 * L)  # two projections of each block write into the residual stream
    return {
        "wte": embedding.spec(V, C),
        "wpe": embedding.spec(config.n_ctx, C),
        "blocks": {str(i): block.spec(parts(config), C, S, H, residual_scale) for i in range(L)},
        "ln_f": layernorm.spec(C),
        "lm_head": linear.spec(C, V),
    }


def dropouts(config) -> int:
    """Places of dropout in the whole model."""
    return config.n_layers * parts(config).dropouts


def forward(xp, p, ids, config, noise=None, cache=None):
    """ids (B, T) -> logits (N, V), saved.

    `noise` is rng.Noise in training, None otherwise. `cache` holds the keys and values of the tokens before
    these ones, as cache_of gives them; then only the new tokens are computed.
    """
    B, T = ids.shape
    t = cache[0][0].shape[2] if cache else 0                       # tokens before these ones
    shape = Shape(B, T, config.n_heads)
    tokens, wte_saved = embedding.forward(xp, p["wte"], xp.reshape(ids, (-1,)))
    places = p["wpe"]["weight"][t : t + T, :]                      # (T, C)
    x = xp.reshape(xp.reshape(tokens, (B, T, -1)) + places[None, ...], (B * T, -1))
    blocks_saved = []
    for i, block_p in enumerate(p["blocks"].values()):
        past = cache[i] if cache else None
        x, saved = block.forward(xp, block_p, x, parts(config), shape, block_noise(noise, config, i), past)
        blocks_saved.append(saved)
    x, ln_f_saved = layernorm.forward(xp, p["ln_f"], x)
    logits, head_saved = linear.forward(xp, p["lm_head"], x)       # (N, V)
    return logits, Saved(shape, wte_saved, from_the_end(blocks_saved), ln_f_saved, head_saved)


def backward(xp, p, saved, dlogits, config):
    """dlogits (N, V) -> dp. `saved` serves once, so that what each block saved is freed as soon as it is used."""
    shape, wte_saved, blocks_saved, ln_f_saved, head_saved = saved
    dlm_head, dx = linear.backward(xp, p["lm_head"], head_saved, dlogits)
    dln_f, dx = layernorm.backward(xp, p["ln_f"], ln_f_saved, dx)
    dblocks = {}
    for i in reversed(p["blocks"]):
        dblocks[i], dx = block.backward(xp, p["blocks"][i], next(blocks_saved), dx, parts(config))
    dwte = embedding.backward(xp, p["wte"], wte_saved, dx)
    dwpe = xp.sum(xp.reshape(dx, (shape.B, shape.T, -1)), axis=0)  # (T, C)
    unused = xp.zeros((config.n_ctx - shape.T, dwpe.shape[1]), dtype=dx.dtype, device=xp.device)
    dwpe = {"weight": xp.concat([dwpe, unused]) if unused.shape[0] else dwpe}
    dblocks = {i: dblocks[i] for i in p["blocks"]}
    return {"wte": dwte, "wpe": dwpe, "blocks": dblocks, "ln_f": dln_f, "lm_head": dlm_head}


def from_the_end(values: list) -> Iterator:
    """Yield the values, the last one first, and keep none of them."""
    while values:
        yield values.pop()


@replaceable
def prepare(xp, p, config):
    """What `decode` needs of the parameters, in the form in which it is fastest: here, as they are."""
    return p


@replaceable
def decode(xp, prepared, ids, config, cache=None):
    """ids (B, T), the tokens that follow those of the cache -> logits (B, V) of the token after them, new cache.

    `cache` is what this returned for the tokens before, None at the beginning; it is given up.
    """
    logits, saved = forward(xp, prepared, ids, config, cache=cache)
    logits = xp.reshape(logits, (*ids.shape, -1))                  # (B, T, V)
    return logits[:, -1, :], cache_of(saved)


def block_noise(noise, config, i: int):
    """The noise of block i: (stream (B,), rate) for each dropout place, or None."""
    if noise is None:
        return None
    n = parts(config).dropouts
    return [(noise.streams[place, :], noise.rate) for place in range(i * n, (i + 1) * n)]


def cache_of(saved):
    """Keys and values (B, H, t, D) of every block, from what forward saved: the cache for the next tokens.

    Like backward, it uses `saved` up.
    """
    heads = [block_saved.attention.layer.heads for block_saved in saved.blocks]
    return [(one.k, one.v) for one in reversed(heads)]
