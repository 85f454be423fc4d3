"""Counts that follow from the shapes of a model: parameters, floating-point operations, bytes of arrays.

The tests compare each with the real computation.
"""

import math

from baby_xp.arrays import params
from baby_xp.arrays.tiles import number_of_tiles
from baby_xp.config import EquationConfig, GPTConfig, ModelConfig
from baby_xp.layers import mixture_of_experts, mlp
from baby_xp.layers.block import ACTIVATIONS
from baby_xp.models import Model

KINDS = {
    "wte": "token embeddings", "wpe": "positions", "norm1": "norms", "norm2": "norms", "ln_f": "norms",
    "ln_emb": "norms", "smear": "smear",
    "attention": "attention", "network": "network", "lm_head": "head",
    "embedding": "token embeddings", "hidden": "hidden layer", "output": "head",
}  # fmt: skip
"""The kind of a parameter, by its name in the tree."""


def parameters(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Number of parameters, by kind."""
    found: dict[str, int] = {}
    for path, shape, number in Model(config, vocab_size).shapes:
        kind = KINDS[_part(path)]
        found[kind] = found.get(kind, 0) + math.prod(shape) * number
    return found


def formula_parameters(config: ModelConfig, vocab_size: int) -> int | None:
    """The Little Baby's P = V H + L (4 H^2 + 4 H F) with H = n_emb and F = 4 H; None for the equation model.

    It is a rule of thumb: an MLP has 2 H F weights and not 4 (and four experts have 8), and positions, norms,
    biases and the head are left out.
    """
    if isinstance(config, EquationConfig):
        return None
    H, L = config.n_emb, config.n_layers
    return vocab_size * H + L * (4 * H**2 + 4 * H * mlp.EXPANSION * H)


def forward_flops(config: ModelConfig, vocab_size: int, batch_size: int) -> int:
    """Floating-point operations of the matrix products of a forward pass: 2 M K N for (M, K) @ (K, N).

    Every weight matrix is multiplied once with each row that passes it. Scores are computed for all T x T
    pairs of tokens, those included that the causal mask then hides.
    """
    N = batch_size * config.n_ctx
    weights = sum(
        math.prod(shape) * number
        for path, shape, number in Model(config, vocab_size).shapes
        if len(shape) == 2 and KINDS[_part(path)] not in ("token embeddings", "positions")
    )
    if isinstance(config, EquationConfig):
        return 2 * batch_size * weights  # one row per context, not per token
    if config.tied_head:
        weights += vocab_size * config.n_emb
    attention = 2 * 2 * N * config.n_ctx * config.head_size  # queries with keys, weights with values
    return 2 * N * weights + config.n_layers * attention


def step_flops(config: ModelConfig, vocab_size: int, batch_size: int) -> int:
    """Floating-point operations of the matrix products of a training step on `batch_size` sequences.

    The backward pass has two products for each one of the forward pass, for the gradients of both factors, except
    that smear's gate has one, as the other would be of a column and a row. One more is the gradient of the
    embeddings, a product with one-hot rows.
    """
    one_hot, gate = (2 * batch_size * config.n_ctx * config.n_emb * width for width in (vocab_size, 1))
    smear = gate if isinstance(config, GPTConfig) and config.smear else 0
    return 3 * forward_flops(config, vocab_size, batch_size) + one_hot - smear


def muon_flops(config: ModelConfig, vocab_size: int, iterations: int) -> int:
    """Floating-point operations of the matrix products of Muon in a step.

    An iteration on (R, C), R <= C, makes three: (R, C) times its transpose, and the result, (R, R), times itself
    and times (R, C). NumPy's kernels need fewer.
    """
    shapes = [shape for _, shape in params.matrices(Model(config, vocab_size).spec)]
    return 2 * iterations * sum(min(shape) ** 2 * (min(shape) + 2 * max(shape)) for shape in shapes)


def saved_bytes(config: ModelConfig, vocab_size: int, batch_size: int, itemsize: int = 4) -> int:
    """Bytes of the arrays that a forward pass with dropout keeps for backward, loss included, on NumPy.

    Other backends keep nearly the same, except that a compiler may decide differently.
    """
    B, T, V, C = batch_size, config.n_ctx, vocab_size, config.n_emb
    if isinstance(config, EquationConfig):
        hidden = {"tanh": 1, "gelu": 2}[config.activation] * config.n_hidden  # gelu keeps its derivative too
        return itemsize * B * (T * C + hidden + V)
    per_token = _norms_saved(config) + _smear_saved(config) + V  # and the loss
    per_token += V if config.logit_cap else 0
    per_token += config.n_layers * (_attention_saved(config) + _network_saved(config))
    masks = 2 * T * C if config.dropout else 0  # of the two outputs, one byte per element
    return B * (T * per_token * itemsize + config.n_layers * (_scores_saved(config) * itemsize + masks))


def _norms_saved(config: GPTConfig) -> int:
    """Elements per token: what each norm keeps, and the input of attention, network and head."""
    C, layers = config.n_emb, 2 * config.n_layers + 1
    norms = layers + config.embedding_norm
    if config.norm != "rmsnorm":
        return norms * (C + 1) + layers * C  # normed channels, and one deviation per token
    # normed channels are the input of a layer, but for the first norm of all before pre-norm blocks, or the last
    first = config.embedding_norm if config.c_sequence == "pre" else 1
    return norms + (layers + first) * C


def _smear_saved(config: GPTConfig) -> int:
    """Elements per token: the normed channels, their deviation and the gate."""
    return config.n_emb + 2 if config.smear else 0


def _attention_saved(config: GPTConfig) -> int:
    """Elements per token: queries, keys, values, scaled queries, outputs, their scale, a sum per head, gate; with
    QK-norm a deviation of each query and key."""
    S, H = config.head_size, config.n_heads
    qk_norm = 2 * H if config.qk_norm else 0
    return 6 * S + H + qk_norm + (H + S // H if config.c_attention == "moh" else 0)


def _scores_saved(config: GPTConfig) -> int:
    """Elements per sequence: exp(scores), by blocks of rows, each with the keys up to its last row; with dropout,
    those that it keeps too.
    """
    rows, T = max(32, config.head_size // config.n_heads), config.n_ctx
    blocks, rest = divmod(T, rows)
    scores = config.n_heads * (rows**2 * blocks * (blocks + 1) // 2 + rest * T)
    return scores * (2 if config.dropout else 1)


def _network_saved(config: GPTConfig) -> int:
    """Elements per token: what the activation keeps, its output; of experts also the gate and the gated output."""
    activation = ACTIVATIONS[config.activation]
    hidden, kept = mlp.width(config.n_emb, activation), 1 if activation.INPUTS == 1 else activation.INPUTS + 1
    if config.c_network == "mlp":
        return (kept + 1) * hidden
    return mixture_of_experts.EXPERTS * ((kept + 2) * hidden + 1)


def cache_bytes(config: ModelConfig, itemsize: int = 4, multiple: int = 1) -> int:
    """Bytes of what generation keeps of a text: keys and values, with room for a multiple of so many tokens, and
    with smear one vector, with room for a multiple of so many numbers."""
    if isinstance(config, EquationConfig):
        return 0
    tokens, vector = (-(-size // multiple) * multiple for size in (config.n_ctx, config.n_emb))
    return itemsize * (config.n_layers * 2 * tokens * config.head_size + (vector if config.smear else 0))


def arrays(
    config: ModelConfig,
    vocab_size: int,
    batch_size: int,
    workers: int = 1,
    itemsize: int = 4,
    tokens_at_once: int | None = None,
) -> dict[str, int]:
    """Bytes of the arrays of training by kind, over all processes; `batch_size`: sequences of a step.

    A worker computes its share of them, tile by tile where the backend limits the tokens computed at once. The
    shared buffers hold its gradients, the weights and moments a second time, and weights that are only evaluated.
    """
    flat = itemsize * sum(parameters(config, vocab_size).values())
    least, more = divmod(batch_size, workers)  # sequences per worker, and the number of workers that get one more
    kept = sum(
        number * saved_bytes(config, vocab_size, _largest_tile(share, config.n_ctx, tokens_at_once), itemsize)
        for share, number in ((least, workers - more), (least + 1, more)) if number
    )  # fmt: skip
    exchange = {"buffers shared by workers": (workers - 1 + 3 + 1) * flat} if workers > 1 else {}
    parts = {"weights": flat, "gradients": flat, "moments": 2 * flat, "decay mask": flat, "activations": kept}
    return {**parts, **exchange}


def _largest_tile(B: int, T: int, tokens_at_once: int | None) -> int:
    """Sequences of the largest tile of a share."""
    return -(-B // number_of_tiles(B, T, tokens_at_once))


NARROW_HEAD = 32
"""The CuPy backend's attention keeps no matrix of scores in memory for heads up to this wide."""
FRAGMENTATION = 0.2
"""Share of a GPU's memory that may lie in pieces too small to use."""
STAYING = 6
"""Arrays of all parameters that stay: weights, two moments, gradients, decay mask, the best weights."""


def batch_that_fits(
    config: ModelConfig, vocab_size: int, batch_size: int, room: int, known: int, itemsize: int = 4,
    optimizer: str = "adamw",
) -> int:  # fmt: skip
    """About how many sequences at once fit into `room` bytes of a GPU, if batch_size did not.

    Counted are the arrays that stay, what forward keeps with whole matrices of scores, and the largest arrays of
    backward beside it. `known`: bytes that batch_size sequences took at least, before they failed; the larger of
    the count and `known` is used. A part of the room is left to FRAGMENTATION. Never more than half of batch_size,
    in case the count is too low; most batches are split into halves anyway. 0: none fits, or the update of the
    parameters does not.
    """
    fixed = STAYING * itemsize * sum(parameters(config, vocab_size).values())
    if room < update_bytes(config, vocab_size, optimizer, itemsize):
        return 0
    scores = isinstance(config, EquationConfig) or config.head_size // config.n_heads > NARROW_HEAD
    growing = max(gpu_bytes(config, vocab_size, batch_size, itemsize, scores), known - fixed)
    return min(batch_size // 2, int(batch_size * (1 - FRAGMENTATION) * (room - fixed) / growing))


def update_bytes(config: ModelConfig, vocab_size: int, optimizer: str = "adamw", itemsize: int = 4) -> int:
    """About the bytes of all arrays on a GPU while the optimizer updates all parameters at once.

    AdamW has old and new weights and moments side by side. Muon copies five arrays of the parameters that AdamW
    updates, which gives three results, and has new weights and moments of the matrices, before it joins all
    results. While it computes the matrices of one shape, it has eight more arrays of theirs and three of the
    smaller square.
    """
    P = sum(parameters(config, vocab_size).values())
    if optimizer == "adamw":
        return itemsize * (STAYING + 3) * P
    shapes = [shape for _, shape in params.matrices(Model(config, vocab_size).spec)]
    by_muon = sum(map(math.prod, shapes))
    together = max((shapes.count(one) * (8 * math.prod(one) + 3 * min(one) ** 2) for one in shapes), default=0)
    return itemsize * (STAYING * P + 8 * (P - by_muon) + 2 * by_muon + max(3 * P, together))


def gpu_bytes(
    config: ModelConfig, vocab_size: int, batch_size: int, itemsize: int = 4, scores_in_memory: bool = True
) -> int:
    """About the bytes of a step's arrays that grow with the batch, if all of it is computed at once."""
    saved = saved_bytes(config, vocab_size, batch_size, itemsize)
    if isinstance(config, EquationConfig):
        return 2 * saved
    T, matrix = config.n_ctx, config.n_heads * config.n_ctx**2 if scores_in_memory else 0
    # in place of the blocks that NumPy keeps, without what the mask hides
    scores = config.n_layers * (matrix * (2 if config.dropout else 1) - _scores_saved(config))
    beside = T * (vocab_size + 3 * mlp.EXPANSION * config.n_emb) + matrix
    return saved + batch_size * itemsize * (scores + beside)


def _part(path: str) -> str:
    """The part of the model that a parameter belongs to: "blocks.0.norm1.gain" -> "norm1"."""
    first, *rest = path.split(".")
    return rest[1] if first == "blocks" else first
