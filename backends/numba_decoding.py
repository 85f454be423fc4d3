"""Generation by the compiled step of numba_gpt.py: packs the weights, and keeps the cache and the memory.

All switches are computed by the one step, in float32; arrays of other types go to numpy_decoding.py.
"""

import numpy as np
from baby_xp_backends import numba_gpt, numpy_decoding
from baby_xp_backends.numba_gpt import ACTIVATIONS, PANEL, Sizes, padded, room, row_width, tiled
from baby_xp_backends.numba_library import aligned, flat

from baby_xp.layers import mixture_of_experts, mlp, rotary, soft_cap
from baby_xp.models import gpt

AT_ONCE = 128
"""Tokens of all texts that a step computes at most; a longer prompt takes several steps."""


def prepare(xp, p, config):
    """As gpt.prepare."""
    suits = p["wte"]["weight"].dtype == np.float32
    return Prepared(xp, p, config) if suits else numpy_decoding.prepare(xp, p, config)


def decode(xp, prepared, ids, config, cache=None):
    """As gpt.decode."""
    if not isinstance(prepared, Prepared):
        return numpy_decoding.decode(xp, prepared, ids, config, cache)
    (B, T), cache = ids.shape, cache or Cache(len(ids), prepared.sizes)
    if B != cache.B or cache.length + T > config.n_ctx:
        raise ValueError(f"{B} x {T} ids do not fit a cache of {cache.B} texts with {cache.length} tokens each")
    at_once = max(1, AT_ONCE // B)
    for first in range(0, T, at_once):
        logits = prepared.step(ids[:, first : first + at_once], cache)
    return logits, cache


class Cache:
    """Keys and values of B texts, with room for a whole context; for smear, the last vector of each text."""

    def __init__(self, B: int, sizes: Sizes):
        self.B, self.length = B, 0
        # what is not written yet is never used, and zeros would take longer than a step
        vectors = B * padded(sizes.C) if sizes.smear else 0
        self.array = aligned(sizes.L * B * sizes.S * 2 * padded(sizes.n_ctx) + vectors + PANEL)


class Prepared:
    """The weights of a step, packed, and the memory that it computes in."""

    def __init__(self, xp, p, config):
        self.sizes, self.weights = packed_model(xp, p, config)
        self.numbers = np.array(self.sizes, np.int64)
        self.tokens = flat(p["wte"]["weight"])
        self.places = flat(p["wpe"]["weight"]) if self.sizes.places else np.zeros(1, np.float32)
        self.cap, self.scratch, self.shapes = config.logit_cap, aligned(0), set[tuple[int, int]]()

    def step(self, ids, cache: Cache) -> np.ndarray:
        """ids (B, T) -> logits (B, V) after them; appends to the cache."""
        (B, T), sizes = ids.shape, self.sizes
        if (B, T) not in self.shapes:
            self.shapes.add((B, T))
            if len(self.scratch) < (needed := scratch_size(sizes, B, T)):
                self.scratch = aligned(needed, np.zeros)
        ids = np.ascontiguousarray(ids, np.int32).reshape(-1)
        memory = cache.array, self.scratch, self.numbers
        at = numba_gpt.step(self.weights, self.tokens, self.places, ids, *memory, B, T, cache.length)
        if at < 0:
            raise IndexError(f"ids must be from 0 to {sizes.V - 1}")
        cache.length += T
        rows = self.scratch[at : at + B * padded(sizes.V)].reshape(B, -1)
        return soft_cap.forward(np, {}, rows[:, : sizes.V].copy(), self.cap)[0]


def scratch_size(sizes: Sizes, B: int, T: int) -> int:
    """Numbers that a step needs besides the cache."""
    Q = 3 * sizes.S + sizes.H * sizes.mixes_heads
    width = row_width(sizes.C, sizes.S, Q, sizes.G, sizes.F + sizes.experts)
    return room(sizes.n_ctx) + tiled(B * T) * width + tiled(B) * padded(sizes.V)


# packing ------------------------------------------------------------------------------------------------


def packed_model(xp, p, config) -> tuple[Sizes, np.ndarray]:
    """The sizes of a model, and all its weights but those of the embeddings in one flat array."""
    parts, C, S, H = gpt.parts(config), config.n_emb, config.head_size, config.n_heads
    moe, moh = config.c_network == "moe", config.c_attention == "moh"
    experts = mixture_of_experts.EXPERTS if moe else 0
    F = mlp.width(C, parts.activation) * max(1, experts)
    angles = np.concatenate(rotary.tables(xp, 0, config.n_ctx, S // H, np.float64), axis=-1)
    head = gpt.head_of(np, p, config)
    arrays = [
        whole_panels(np.ones(1)),
        packed_norm(p.get("ln_emb", {}), C),
        packed_norm(p.get("ln_f", {}), C),
        packed(head["weight"], head.get("bias")),
        whole_panels(angles),
        packed_smear(p["smear"], C) if config.smear else whole_panels(np.zeros(0)),
        *(array for block in p["blocks"].values() for array in packed_block(block, C, moh, moe)),
    ]
    ends = np.cumsum([0, *(array.size for array in arrays)]).tolist()
    _, ln_emb, ln_f, lm_head, angles_at, smear, norm1, qkv, out, norm2, up, down, block_end = ends[:13]
    sizes = Sizes(
        C, S, H, config.n_layers, len(p["wte"]["weight"]), config.n_ctx, F,
        G=parts.activation.INPUTS * F + experts,
        experts=experts,
        activation=ACTIVATIONS.index(" ".join([config.activation, *parts.form])),
        mixes_heads=int(moh),
        pre=int(config.c_sequence == "pre"),
        centres=int(config.norm == "layernorm"),
        rotates=int(parts.query_key.rotary),
        qk_norm=int(parts.query_key.norm),
        embedding_norm=int(config.embedding_norm),
        places=int(config.positions == "learned"),
        block=block_end - norm1,
        norm1=norm1, qkv=qkv, out=out, norm2=norm2, up=up, down=down,
        ln_emb=ln_emb, ln_f=ln_f, head=lm_head, angles=angles_at,
        smear=smear if config.smear else 0,
    )  # fmt: skip
    return sizes, np.concatenate(arrays, out=aligned(ends[-1]))


def packed_block(block, C: int, moh: bool, moe: bool) -> tuple[np.ndarray, ...]:
    """norm1, qkv, out, norm2, up, down; gates are more columns of qkv and up, the experts' biases more rows."""
    attention, network = block["attention"], block["network"]
    qkv, out, up, down = attention["qkv"], attention["out"], network["up"], network["down"]
    wide, high, bias = up["weight"], down["weight"], down.get("bias")
    if moe:
        wide = np.concatenate([wide, network["gate"]["weight"]], axis=1)
        high = np.concatenate([high, np.zeros((mixture_of_experts.EXPERTS, C)) if bias is None else bias])
        bias = None
    queries = np.concatenate([qkv["weight"], attention["gate"]["weight"]], axis=1) if moh else qkv["weight"]
    return (
        packed_norm(block.get("norm1", {}), C), packed(queries, qkv.get("bias")),
        packed(out["weight"], out.get("bias")), packed_norm(block.get("norm2", {}), C),
        packed(wide, up.get("bias")), packed(high, bias),
    )  # fmt: skip


def packed(weight, bias) -> np.ndarray:
    """weight (K, F), bias: that of the first columns, or None -> panels of (K + 1, PANEL), flat."""
    K, F = weight.shape
    whole = np.zeros((K + 1, padded(F)), np.float32)
    whole[1:, :F] = weight
    if bias is not None:
        whole[0, : len(bias)] = bias
    return whole.reshape(K + 1, -1, PANEL).swapaxes(0, 1).reshape(-1)


def packed_smear(smear, C: int) -> np.ndarray:
    """A gain of ones and no bias, for its norm, then the gate and the scale, each in whole panels."""
    gate, scale = whole_panels(smear["gate"]["weight"]), whole_panels(smear["scale"])
    return np.concatenate([packed_norm({}, C), gate, scale])


def packed_norm(norm, C: int) -> np.ndarray:
    """Gain and bias, each in whole panels."""
    pair = np.zeros((2, padded(C)), np.float32)
    pair[0, :C], pair[1, :C] = norm.get("gain", 1), norm.get("bias", 0)
    return pair.reshape(-1)


def whole_panels(array) -> np.ndarray:
    """The numbers one after the other, followed by zeros."""
    whole = np.zeros(padded(array.size), np.float32)
    whole[: array.size] = array.reshape(-1)
    return whole
