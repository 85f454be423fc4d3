"""The answers of models to equations: probabilities, computed with NumPy for all questions at once."""

from collections.abc import Sequence

import numpy as np
from baby_xp_data import equation_table
from baby_xp_data.equation_table import BABYLLM, EquationTable, encode

from baby_xp.arrays import registry
from baby_xp.arrays.namespace import Namespace
from baby_xp.arrays.tree import Tree
from baby_xp.config import EquationConfig, ModelConfig
from baby_xp.layers import softmax
from baby_xp.models import Model


def answers(
    weights: Tree, equations: Sequence[str], config: ModelConfig, table: EquationTable = BABYLLM
) -> tuple[np.ndarray, np.ndarray]:
    """For each equation: whether the most likely tokens are its answer, bool (n,), and its probability (n,).

    An answer counts as a whole, up to the space after it. If the context does not hold the longest equation of
    `table`, only the first token of the answer is asked for: the others do not follow from what the model sees.
    """
    whole = config.n_ctx >= table.longest
    right, probability = np.ones(len(equations), bool), np.ones(len(equations))
    for i in range(max(len(equation_table.answer(equation)) for equation in equations) if whole else 1):
        rows = [row for row, equation in enumerate(equations) if i < len(equation_table.answer(equation))]
        ends = [equations[row].index("=") + 1 + i for row in rows]
        shares = _after(weights, [equations[row][:end] for row, end in zip(rows, ends, strict=True)], config)
        targets = encode("".join(equations[row][end] for row, end in zip(rows, ends, strict=True)), "+-")
        right[rows] &= shares.argmax(axis=-1) == targets
        probability[rows] *= shares[np.arange(len(rows)), targets]
    return right, probability


def _after(weights: Tree, texts: list[str], config: ModelConfig) -> np.ndarray:
    """Probabilities (n, V) of the token after each text, which the model sees from its beginning on."""
    T = config.n_ctx
    if isinstance(config, EquationConfig):
        ids = encode("".join(text[-T:].rjust(T) for text in texts), "+-").reshape(-1, T)
        return probabilities(weights, ids, config)
    ids = encode("".join(text.ljust(T) for text in texts), "+-").reshape(-1, T)
    last = np.array([len(text) - 1 for text in texts])
    return probabilities(weights, ids, config).reshape(len(texts), T, -1)[np.arange(len(texts)), last]


def probabilities(weights: Tree, ids: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Probabilities of the next token in float64: ids (n, T) -> (n, V), or (n T, V) for a GPT."""
    backend = registry.load("numpy")
    with np.errstate(all="ignore"):
        logits, _ = Model(config, vocab_size(weights)).forward(backend.xp, weights, ids)
        return softmax.forward(Namespace(np), {}, logits.astype(np.float64))[0]


def vocab_size(weights: Tree) -> int:
    """The number of token ids V of a model with these weights."""
    return (weights["wte"] if "wte" in weights else weights["embedding"])["weight"].shape[0]
