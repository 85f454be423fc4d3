"""Generation by one compiled function: the GPT's forward pass for the next tokens of several texts, any switches.

A single token is bound by reading every weight once, so the weights are packed in the order in which a product
reads them: in panels of PANEL columns, one after the other, each with the bias as its first row. ROWS tokens share
what was read. Each number is added up in the same order whatever the number of rows, so the logits of a token do
not depend on what is computed together with it: not on other texts, and not on the pieces in which a prompt is
computed.

The rows of a step, N = B T tokens text by text, lie in `scratch`: a row holds all arrays of a token side by side,
each with room up to whole panels and one panel more, because vectors may write past its end. The kernels take flat
arrays, and the places of their first elements.
"""

import math
from typing import NamedTuple

import numpy as np
from baby_xp_backends.numba_activations import erf_pair, tanh_pair
from baby_xp_backends.numba_library import COMPILING, FLOATS, INTEGERS, PLACES, compiled, inlined, numba_function
from baby_xp_backends.simd_width import W

from baby_xp.layers import layernorm, rmsnorm

if COMPILING:
    from baby_xp_backends.numba_maths import exp_of_negative, sigmoid
    from baby_xp_backends.simd import (
        axpy_rows,
        lanes,
        load,
        load_first,
        load_rows,
        select,
        spread,
        store,
        store_first,
        store_rows,
        total,
        zero_rows,
    )
    from baby_xp_backends.simd_lanes import highest

PANEL = 2 * W
ROWS = 8 if W == 16 else 4
"""Tokens of a tile: its sums, two vectors for each token, stay in registers."""
LINE = 16
"""Numbers of a cache line."""
ONE = 0
"""The place of a 1 in the weights."""

ACTIVATIONS = "gelu tanh", "gelu erf", "relu2", "swiglu"


def shared(function):
    """Decorate a function that Python calls too."""
    if COMPILING:
        from numba.extending import register_jitable

        return register_jitable(function)
    return function


def part(function):
    """Decorate a function that only the step calls."""
    return numba_function(function) if COMPILING else function


class Sizes(NamedTuple):
    """What the kernel knows of a model, as an array of integers: its sizes and switches, and places of weights."""

    C: int
    S: int
    H: int
    L: int
    V: int
    n_ctx: int
    F: int
    """Hidden channels of the network, of all experts together."""
    G: int
    """What `up` makes: F or 2 F, and the experts' gates."""
    experts: int
    """0: the network is a single one, without a gate."""
    activation: int
    """The place in ACTIVATIONS."""
    mixes_heads: int
    pre: int
    centres: int
    """Whether the norm subtracts the mean."""
    rotates: int
    qk_norm: int
    embedding_norm: int
    places: int
    """Whether positions have vectors of their own."""
    block: int
    """From the weights of a block to those of the next."""
    norm1: int
    qkv: int
    out: int
    norm2: int
    up: int
    down: int
    ln_emb: int
    ln_f: int
    head: int
    angles: int
    smear: int
    """The place of a gain of ones, the gate and the scale; 0: no smear."""


@shared
def padded(n):
    """n, rounded up to whole panels."""
    return (n + (PANEL - 1)) // PANEL * PANEL


@shared
def tiled(rows):
    """Rows, rounded up to whole tiles; a single one stays."""
    return rows if rows == 1 else (rows + (ROWS - 1)) // ROWS * ROWS


@shared
def room(n):
    """What n numbers take in a row."""
    return padded(n) + PANEL


@shared
def row_width(C, S, Q, G, K):
    """From a row to the next: an odd number of cache lines. A cache has few places for lines 4096 bytes apart."""
    width = 2 * room(C) + room(Q) + room(S) + room(G) + room(K)
    return width if width // LINE % 2 else width + LINE


# parts of the step --------------------------------------------------------------------------------------


@inlined
def axpy_panel(panels, place, x, at, step, a, b):
    """Add the row of a panel at `place` times x[at], x[at + step], ... to the sums a, of its left half, and b."""
    return axpy_rows(load(panels, place), x, at, step, a), axpy_rows(load(panels, place + W), x, at, step, b)


@part
def product(scratch, at, step, rows, K, weights, base, to, to_step, F, add):
    """The rows x (rows, K) at `at` -> x W + b, or with `add` y + x W + b, the rows y (rows, F) at `to`.

    `step` is from a row to the next. Several rows are rounded up to whole tiles.
    """
    end = padded(F)
    if rows == 1:  # two panels at once, as an operation that waits for the one before takes four times as long
        for column in range(0, end, 2 * PANEL):
            other = min(column + PANEL, end - PANEL)
            left, right = base + column * (K + 1), base + other * (K + 1)
            a, b, c, d = zero_rows(1), zero_rows(1), zero_rows(1), zero_rows(1)
            if add:
                a, b = load_rows(scratch, to + column, W, 1), load_rows(scratch, to + column + W, W, 1)
                c, d = load_rows(scratch, to + other, W, 1), load_rows(scratch, to + other + W, W, 1)
            a, b = axpy_panel(weights, left, weights, ONE, 0, a, b)
            c, d = axpy_panel(weights, right, weights, ONE, 0, c, d)
            for k in range(at, at + K):
                left, right = left + PANEL, right + PANEL
                a, b = axpy_panel(weights, left, scratch, k, 0, a, b)
                c, d = axpy_panel(weights, right, scratch, k, 0, c, d)
            store_rows(scratch, to + column, W, a)
            store_rows(scratch, to + column + W, W, b)
            store_rows(scratch, to + other, W, c)
            store_rows(scratch, to + other + W, W, d)
        return
    for column in range(0, end, PANEL):
        for row in range(0, rows, ROWS):
            panel, target = base + column * (K + 1), to + row * to_step + column
            a, b = zero_rows(ROWS), zero_rows(ROWS)
            if add:
                a, b = load_rows(scratch, target, to_step, ROWS), load_rows(scratch, target + W, to_step, ROWS)
            a, b = axpy_panel(weights, panel, weights, ONE, 0, a, b)
            for k in range(at + row * step, at + row * step + K):
                panel += PANEL
                a, b = axpy_panel(weights, panel, scratch, k, step, a, b)
            store_rows(scratch, target, to_step, a)
            store_rows(scratch, target + W, to_step, b)


@part
def norm(scratch, at, step, to, to_step, rows, C, weights, gain, centres):
    """Rows (rows, C) at `at` -> `to`: layer norm, or RMSNorm if it does not centre. The bias follows the gain."""
    end, eps = padded(C), layernorm.EPS if centres else rmsnorm.EPS
    for row in range(rows):
        x, y = at + row * step, to + row * to_step
        sums, squares = spread(0.0), spread(0.0)
        if centres:
            for i in range(0, end, W):
                sums = sums + load(scratch, x + i)                 # zeros behind C
        mean = total(sums) / C
        for i in range(0, end, W):
            centred = select(lanes() + i < C, load(scratch, x + i) - mean, 0.0)
            squares = squares + centred * centred
        scale = 1 / math.sqrt(total(squares) / C + eps)
        for i in range(0, end, W):
            normed = (load(scratch, x + i) - mean) * scale
            store(scratch, y + i, normed * load(weights, gain + i) + load(weights, gain + end + i))


@part
def turn(scratch, at, H, D, weights, angles, rotates, qk_norm):
    """Queries and keys (2 H, D) of a token: rotation and norm; queries are divided by sqrt(D)."""
    half = D // 2
    for j in range(2 * H):
        x = at + j * D
        factor = 1.0 if j >= H else 1 / math.sqrt(D)
        if qk_norm:
            squares = spread(0.0)
            for i in range(0, D, W):
                part = load_first(scratch, x + i, D - i)
                squares = squares + part * part
            factor /= math.sqrt(total(squares) / D + rmsnorm.EPS)
        if rotates:
            for i in range(0, half, W):
                n = half - i
                a, b = load_first(scratch, x + i, n) * factor, load_first(scratch, x + half + i, n) * factor
                cos, sin = load_first(weights, angles + i, n), load_first(weights, angles + half + i, n)
                store_first(scratch, x + i, a * cos + b * sin, n)
                store_first(scratch, x + half + i, b * cos - a * sin, n)
        else:
            for i in range(0, D, W):
                store_first(scratch, x + i, load_first(scratch, x + i, D - i) * factor, D - i)


@part
def exp_of_shifted(scratch, at, n):
    """n numbers -> exp(x - the largest), followed by zeros up to whole vectors; returns 1 / their sum."""
    top, sums = spread(-math.inf), spread(0.0)
    for i in range(0, n, W):
        x = select(lanes() + i < n, load(scratch, at + i), -math.inf)
        top = select(x > top, x, top)
    largest = highest(top)
    for i in range(0, n, W):
        e = select(lanes() + i < n, exp_of_negative(load(scratch, at + i) - largest), 0.0)
        store(scratch, at + i, e)
        sums = sums + e
    return 1.0 / total(sums)


@part
def attend(scratch, query, to, scores, cache, keys, values, end, H, D):
    """Queries (H, D) of a token, keys (P / PANEL, H, D, PANEL) and values (P, H, D) of `end` tokens -> (H, D)."""
    for h in range(H):
        for j in range(0, end, PANEL):
            a, b, place = zero_rows(1), zero_rows(1), keys + (j * H + h * PANEL) * D
            for d in range(query + h * D, query + h * D + D):
                a, b = axpy_panel(cache, place, scratch, d, 0, a, b)
                place += PANEL
            store_rows(scratch, scores + j, W, a)
            store_rows(scratch, scores + j + W, W, b)
        inverse = exp_of_shifted(scratch, scores, end)
        for d in range(0, D, PANEL):
            a, b, place = zero_rows(1), zero_rows(1), values + h * D + d
            for j in range(scores, scores + end):
                a, b = axpy_panel(cache, place, scratch, j, 0, a, b)
                place += H * D
            store(scratch, to + h * D + d, a[0] * inverse)         # what lies behind D belongs to the next head
            store(scratch, to + h * D + d + W, b[0] * inverse)


@part
def mix_heads(scratch, heads, H, D, gate):
    """The outputs of the heads (H, D) -> their sum (D,), in the same place, each times softmax(gate) (H,)."""
    inverse = exp_of_shifted(scratch, gate, H)
    for d in range(0, D, W):
        mixed = spread(0.0)
        for h in range(H):
            mixed = mixed + load(scratch, heads + h * D + d) * (scratch[gate + h] * inverse)
        store(scratch, heads + d, mixed)


@part
def activate(scratch, g, to, F, activation):
    """What `up` made of a token -> (F,)."""
    for i in range(0, F, W):
        x = load(scratch, g + i)
        if activation == 0:
            y, _ = tanh_pair(x)
        elif activation == 1:
            y, _ = erf_pair(x)
        elif activation == 2:
            relu = select(x <= 0.0, 0.0, x)                        # NaN stays
            y = relu * relu
        else:
            y = x * sigmoid(x) * load(scratch, g + F + i)
        store(scratch, to + i, y)


@part
def gate_experts(scratch, h, F, experts, gate):
    """Hidden channels (experts, F / experts) times softmax(gate) (experts,), which then follows them."""
    width, inverse = F // experts, exp_of_shifted(scratch, gate, experts)
    for e in range(experts):
        weight = scratch[gate + e] * inverse
        for i in range(0, width, W):
            at, n = h + e * width + i, width - i
            store_first(scratch, at, load_first(scratch, at, n) * weight, n)
    for e in range(experts):
        scratch[h + F + e] = scratch[gate + e] * inverse


@part
def smear(scratch, at, step, T, C, weights, gate, cache, before):
    """To the rows (T, C) of a text at `at`, add their share of the row before; that of the first is at `before`.

    Rows and gate (C,) are followed by zeros up to whole panels, the gate then by the scale. At the end, what was
    in the last row is at `before`.
    """
    end = padded(C)
    for row in range(at, at + T * step, step):
        logits = spread(0.0)
        for i in range(0, end, W):
            logits = logits + load(scratch, row + i) * load(weights, gate + i)
        share = sigmoid(spread(0.0) + total(logits)) * weights[gate + end]
        for i in range(0, end, W):
            x = load(scratch, row + i)
            store(scratch, row + i, x + share * load(cache, before + i))
            store(cache, before + i, x)


# the step -----------------------------------------------------------------------------------------------


@compiled(f"i8({FLOATS}, {FLOATS}, {FLOATS}, {INTEGERS}, {FLOATS}, {FLOATS}, {PLACES}, i8, i8, i8)")
def step(weights, tokens, places, ids, cache, scratch, sizes, B, T, t):
    """Compute the tokens `ids` (B, T) at the positions t to t + T - 1 -> the place of the logits in scratch.

    tokens (V, C), places (n_ctx, C). cache: keys (L, B, P / PANEL, S, PANEL), values (L, B, P, S), where P is
    n_ctx padded, and for smear the last vectors (B, padded(C)). The logits are those of the last tokens, (B, V) in
    rows of padded(V) numbers. Returns -1 for an id that is not below V.
    """
    C, S, H, L, V, n_ctx, F, G, experts, activation = (
        sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], sizes[9]
    )  # fmt: skip
    mixes_heads, pre, centres, rotates, qk_norm, embedding_norm, has_places = (
        sizes[10], sizes[11], sizes[12], sizes[13], sizes[14], sizes[15], sizes[16]
    )  # fmt: skip
    block, norm1, qkv_, out_, norm2, up_, down_, ln_emb, ln_f, head, angles, smear_ = (
        sizes[17], sizes[18], sizes[19], sizes[20], sizes[21], sizes[22], sizes[23], sizes[24], sizes[25],
        sizes[26], sizes[27], sizes[28],
    )  # fmt: skip
    N, D, P = B * T, S // H, padded(n_ctx)
    Q = 3 * S + H * mixes_heads
    A = D if mixes_heads else S
    rows = tiled(N)
    stream = room(n_ctx)                                           # behind the scores of a head
    normed, qkv = stream + room(C), stream + 2 * room(C)
    heads, g = qkv + room(Q), qkv + room(Q) + room(S)
    h, width = g + room(G), row_width(C, S, Q, G, F + experts)
    logits = stream + rows * width
    source = normed if pre else stream
    scores, new, added = np.int64(0), np.bool_(False), np.bool_(True)  # literals would compile functions twice
    for n in range(N):
        if not 0 <= ids[n] < V:
            return -1
    for row in range(rows):
        x = stream + row * width
        for i in range(0, padded(C), W):
            vector = spread(0.0)
            if row < N:
                vector = load_first(tokens, ids[row] * C + i, C - i)
                if has_places:
                    vector = vector + load_first(places, (t + row % T) * C + i, C - i)
            store(scratch, x + i, vector)
    if smear_:
        norm(scratch, stream, width, stream, width, N, C, weights, smear_, np.int64(0))
        for text in range(B):
            before = 2 * L * B * P * S + text * padded(C)
            if t == 0:
                for i in range(0, padded(C), W):
                    store(cache, before + i, spread(0.0))
            first = stream + text * T * width
            smear(scratch, first, width, T, C, weights, smear_ + 2 * padded(C), cache, before)
    if embedding_norm:
        norm(scratch, stream, width, stream, width, N, C, weights, ln_emb, centres)
    keys, values = 0, L * B * P * S
    for layer in range(L):
        base = layer * block
        if pre:
            norm(scratch, stream, width, normed, width, N, C, weights, base + norm1, centres)
        product(scratch, source, width, rows, C, weights, base + qkv_, qkv, width, Q, new)
        for row in range(N):
            text, position, at = layer * B + row // T, t + row % T, qkv + row * width
            turn(scratch, at, H, D, weights, angles + position * D, rotates, qk_norm)
            own = keys + text * P * S + position // PANEL * S * PANEL + position % PANEL
            for i in range(S):
                cache[own + i * PANEL] = scratch[at + S + i]
            own = values + (text * P + position) * S
            for i in range(0, S, W):
                store_first(cache, own + i, load(scratch, at + 2 * S + i), S - i)
        for row in range(N):
            text, at, to = layer * B + row // T, qkv + row * width, heads + row * width
            own = text * P * S
            attend(scratch, at, to, scores, cache, keys + own, values + own, t + row % T + 1, H, D)
            if mixes_heads:
                mix_heads(scratch, to, H, D, at + 3 * S)
        product(scratch, heads, width, rows, A, weights, base + out_, stream, width, C, added)
        if pre:
            norm(scratch, stream, width, normed, width, N, C, weights, base + norm2, centres)
        else:
            norm(scratch, stream, width, stream, width, N, C, weights, base + norm1, centres)
        product(scratch, source, width, rows, C, weights, base + up_, g, width, G, new)
        for row in range(N):
            at, to = g + row * width, h + row * width
            activate(scratch, at, to, F, activation)
            if experts:
                gate_experts(scratch, to, F, experts, at + G - experts)
        product(scratch, h, width, rows, F + experts, weights, base + down_, stream, width, C, added)
        if not pre:
            norm(scratch, stream, width, stream, width, N, C, weights, base + norm2, centres)
    last = stream + (T - 1) * width
    norm(scratch, last, T * width, normed, width, B, C, weights, ln_f, centres)
    product(scratch, normed, width, tiled(B), C, weights, head, logits, padded(V), V, new)
    return logits
