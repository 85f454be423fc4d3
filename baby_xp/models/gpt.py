"""GPT: token and position embeddings, blocks, a last norm, a linear head (Radford et al. 2019).

The config's switches say which parts a model is made of. The defaults are The Little Baby's: learned positions,
layer norm, and a head with a bias and its own weights. There is no dropout on the embeddings.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from baby_xp.arrays.namespace import replaceable
from baby_xp.arrays.params import scaled, zeros
from baby_xp.arrays.tree import completed
from baby_xp.layers import Shape, block, embedding, linear, smear, soft_cap
from baby_xp.layers.block import ACTIVATIONS, ATTENTIONS, NETWORKS, NORMS, Parts
from baby_xp.layers.query_key import Steps


class Cache(NamedTuple):
    """What the tokens so far leave for the next ones."""

    blocks: list[tuple[Any, Any]]
    """Keys and values (B, H, t, D) of each block."""
    smear: Any
    """The last token's vectors (B, C), as smear.last gives them; None without the switch."""


class Saved(NamedTuple):
    """What backward needs, for one backward pass."""

    shape: Shape
    input: Any
    blocks: Iterator[block.Saved]
    """What each block has saved, the last block first. Each is freed once its successor is asked for."""
    output: Any


class InputSaved(NamedTuple):
    """What embed has saved: None for a part that the model does not have."""

    wte: Any
    smear: Any
    ln_emb: Any


def parts(config) -> Parts:
    """What the config's switches stand for."""
    return Parts(
        sequence=config.c_sequence,
        attention=ATTENTIONS[config.c_attention],
        network=NETWORKS[config.c_network],
        norm=NORMS[config.norm],
        activation=ACTIVATIONS[config.activation],
        form=(config.gelu,) if config.activation == "gelu" else (),
        query_key=Steps(rotary=config.positions == "rotary", norm=config.qk_norm),
        qkv_bias=config.qkv_bias,
        bias=config.linear_bias,
    )


def spec(config, V: int):
    """Parameters of a GPT with V token ids. A part without any is an empty dict here, and absent from `p`."""
    C, S, H, L = config.n_emb, config.head_size, config.n_heads, config.n_layers
    # two projections of each block write into the residual stream
    residual_scale = 0.0 if config.zero_init else 1 / math.sqrt(2 * L)
    norm = parts(config).norm.spec(C)
    return {
        "wte": embedding.spec(V, C),
        "wpe": embedding.spec(config.n_ctx, C) if config.positions == "learned" else {},
        "smear": smear.spec(C) if config.smear else {},
        "ln_emb": norm if config.embedding_norm else {},
        "blocks": {str(i): block.spec(parts(config), C, S, H, residual_scale) for i in range(L)},
        "ln_f": norm,
        "lm_head": head_spec(config, V),
    }


def head_spec(config, V: int):
    """Weight (C, V), unless it is that of the embedding; bias (V,)."""
    if config.tied_head:
        return {"bias": zeros(V)} if config.head_bias else {}
    head = linear.spec(config.n_emb, V, config.head_bias)
    return scaled(head, 0.0) if config.zero_init else head


def dropouts(config) -> int:
    """Places of dropout in the whole model."""
    return config.n_layers * parts(config).dropouts


def forward(xp, p, ids, config, noise=None, cache=None):
    """ids (B, T) -> logits (N, V), saved.

    `noise` is rng.Noise in training, None otherwise. `cache` is that of the tokens before these ones, as cache_of
    gives it; then only the new tokens are computed.
    """
    B, T = ids.shape
    shape = Shape(B, T, config.n_heads)
    x, input_saved = embed(xp, p, ids, config, shape, cache)       # (N, C)
    blocks_saved = []
    for i, block_p in enumerate(p["blocks"].values()):
        past = cache.blocks[i] if cache else None
        x, saved = block.forward(xp, block_p, x, parts(config), shape, block_noise(noise, config, i), past)
        blocks_saved.append(saved)
    logits, output_saved = predict(xp, p, x, config)               # (N, V)
    return logits, Saved(shape, input_saved, from_the_end(blocks_saved), output_saved)


def backward(xp, p, saved, dlogits, config):
    """dlogits (N, V) -> dp. `saved` serves once, so that what each block saved is freed as soon as it is used."""
    shape, input_saved, blocks_saved, output_saved = saved
    doutput, dx = predict_backward(xp, p, output_saved, dlogits, config)
    if config.tied_head:  # the head's gradient is one of wte, transposed
        dhead = doutput["lm_head"].pop("weight")
    completed(p, doutput)
    dblocks = {}
    for i in reversed(p["blocks"]):
        dblocks[i], dx = block.backward(xp, p["blocks"][i], next(blocks_saved), dx, parts(config))
        completed(p, {"blocks": {i: dblocks[i]}})
    dinput = embed_backward(xp, p, input_saved, dx, shape, config)
    if config.tied_head:
        dinput["wte"] = {"weight": dinput["wte"]["weight"] + xp.matrix_transpose(dhead)}
    return {**dinput, "blocks": {i: dblocks[i] for i in p["blocks"]}, **doutput}


def embed(xp, p, ids, config, shape, cache=None):
    """ids (B, T) -> x (N, C), saved: what goes into the first block. `cache` as in forward."""
    B, T, _ = shape
    tokens, wte_saved = embedding.forward(xp, p["wte"], xp.reshape(ids, (-1,)))
    x = tokens
    if config.positions == "learned":
        t = cache.blocks[0][0].shape[2] if cache else 0            # tokens before these ones
        places = p["wpe"]["weight"][t : t + T, :]                  # (T, C)
        x = xp.reshape(xp.reshape(tokens, (B, T, -1)) + places[None, ...], (B * T, -1))
    smear_saved = ln_emb_saved = None
    if config.smear:
        x, smear_saved = smear.forward(xp, p["smear"], x, shape, cache.smear if cache else None)
    if config.embedding_norm:
        x, ln_emb_saved = parts(config).norm.forward(xp, p.get("ln_emb", {}), x)
    return x, InputSaved(wte_saved, smear_saved, ln_emb_saved)


def embed_backward(xp, p, saved, dx, shape, config):
    """dx (N, C) -> gradients of wte, wpe, smear and ln_emb."""
    wte_saved, smear_saved, ln_emb_saved = saved
    dln_emb, dsmear, dwpe = {}, {}, {}
    if config.embedding_norm:
        dln_emb, dx = parts(config).norm.backward(xp, p.get("ln_emb", {}), ln_emb_saved, dx)
    if config.smear:
        dsmear, dx = smear.backward(xp, p["smear"], smear_saved, dx)
    dwte = embedding.backward(xp, p["wte"], wte_saved, dx)
    if config.positions == "learned":
        dwpe = xp.sum(xp.reshape(dx, (shape.B, shape.T, -1)), axis=0)  # (T, C)
        unused = xp.zeros((config.n_ctx - shape.T, dwpe.shape[1]), dtype=dx.dtype, device=xp.device)
        dwpe = {"weight": xp.concat([dwpe, unused]) if unused.shape[0] else dwpe}
    return {"wte": dwte, "wpe": dwpe, "smear": dsmear, "ln_emb": dln_emb}


def predict(xp, p, x, config):
    """x (N, C) -> logits (N, V), saved: what follows the last block."""
    x, ln_f_saved = parts(config).norm.forward(xp, p.get("ln_f", {}), x)
    logits, head_saved = linear.forward(xp, head_of(xp, p, config), x)
    logits, cap_saved = soft_cap.forward(xp, {}, logits, config.logit_cap)
    return logits, (ln_f_saved, head_saved, cap_saved)


def predict_backward(xp, p, saved, dlogits, config):
    """dlogits (N, V) -> gradients of ln_f and lm_head, dx (N, C)."""
    ln_f_saved, head_saved, cap_saved = saved
    _, dlogits = soft_cap.backward(xp, {}, cap_saved, dlogits)
    dlm_head, dx = linear.backward(xp, head_of(xp, p, config), head_saved, dlogits)
    dln_f, dx = parts(config).norm.backward(xp, p.get("ln_f", {}), ln_f_saved, dx)
    return {"ln_f": dln_f, "lm_head": dlm_head}, dx


def head_of(xp, p, config):
    """The parameters of the head; the weight of a tied one is the embedding's, transposed."""
    if config.tied_head:
        return {"weight": xp.matrix_transpose(p["wte"]["weight"]), **p.get("lm_head", {})}
    return p["lm_head"]


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
    return logits[:, -1, :], cache_of(xp, saved)


def block_noise(noise, config, i: int):
    """The noise of block i: (stream (B,), rate) for each dropout place, or None."""
    if noise is None:
        return None
    n = parts(config).dropouts
    return [(noise.streams[place, :], noise.rate) for place in range(i * n, (i + 1) * n)]


def cache_of(xp, saved):
    """The cache for the next tokens, from what forward saved. Like backward, it uses `saved` up."""
    heads = [block_saved.attention.layer.heads for block_saved in saved.blocks]
    of_smear = saved.input.smear
    return Cache(
        [(one.k, one.v) for one in reversed(heads)], None if of_smear is None else smear.last(xp, of_smear)
    )
