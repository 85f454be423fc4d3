"""babyLLM's six steps, each a plain function: from a vocabulary to a model that answers 4+4, which it never saw.

    vocabulary and encoding    encode, decode, VOCABULARY
    training data              make_equations
    sequences                  sequences
    hyperparameters            hyperparameters
    initial weights            initial_weights
    training loop              train

`predict` and `answers` look at what came of it. The maths is that of every other model: models/mlp.py forward and
backward, optimizers.py. `python -m baby_xp train equations` does the same and keeps files.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from baby_xp_data import equations as data
from baby_xp_data.equations import VOCABULARY, decode, encode

from baby_xp.arrays import params, registry
from baby_xp.arrays.backend import Backend
from baby_xp.arrays.tree import Tree
from baby_xp.config import EquationConfig, GPTConfig, RunConfig, TrainConfig
from baby_xp.models import Model
from baby_xp.presets import preset
from baby_xp.text.batches import PairBatches
from baby_xp.training.step import initial_state, make_step

__all__ = [
    "VOCABULARY", "answers", "decode", "encode", "hyperparameters", "initial_weights", "make_equations", "predict",
    "sequences", "train",
]  # fmt: skip


def make_equations(held_out: str = "4+4", max_sum: int = 9, digits: int = 1, operators: str = "+") -> list[str]:
    """Step 2: all equations "a+b=s " but the held-out ones, such as "4+4" or "4+4,3+5", and their mirrors.

    Raises BabyError for a held-out case that the table does not have.
    """
    cases = data.chosen(held_out, 0, max_sum, digits, operators)
    return data.equations(max_sum, cases, digits, operators)


def sequences(equations: Sequence[str], n_ctx: int = data.CONTEXT) -> tuple[np.ndarray, np.ndarray]:
    """Step 3: contexts (n, n_ctx) and the token that follows each, targets (n,), int32 ids.

    "1+1=2 " gives [3, 1, 3, 12] -> 4 and [1, 3, 12, 4] -> 0.
    """
    return data.pairs(equations, n_ctx=n_ctx)


def hyperparameters(name: str = "equations") -> RunConfig:
    """Step 4: sizes of the model (`.model`) and how it is trained (`.train`)."""
    return preset(name)


def initial_weights(config: EquationConfig | GPTConfig, vocab_size: int = len(VOCABULARY), seed: int = 0) -> Tree:
    """Step 5: the first weights, a dict of float32 arrays; the same for the same seed.

    Of the equation model: embedding.weight (V, E), hidden.weight (n_ctx E, H) and .bias (H,), output.weight
    (H, V) and .bias (V,).
    """
    model = Model(config, vocab_size)
    return model.layout.unpack(np, params.draw(model.spec, seed))


def train(
    weights: Tree,
    contexts: np.ndarray,
    targets: np.ndarray,
    config: EquationConfig | GPTConfig,
    training: TrainConfig,
    backend: Backend | None = None,
    each_step: Callable[[int, Tree], None] | None = None,
) -> tuple[Tree, list[float]]:
    """Step 6: forward, loss, backward, AdamW, num_steps times -> the trained weights, and the loss of each step.

    contexts (n, T), targets (n,), or (n, T) for a GPT; a step takes batch_size of them, or all where there are
    fewer. Losses are in nats per target. `each_step(step, weights)` is called before each step, on the device's
    arrays. `weights` is left as it was.
    """
    backend = backend or registry.load("numpy", dtype=training.dtype)
    xp, model = backend.xp, Model(config, _vocab_size(weights))
    step = backend.compile(make_step(xp, model, training))
    batches, losses = PairBatches(contexts, targets, training.step_size, training.seed), []
    state = initial_state(backend, model.layout.pack(np, weights), params.decay_mask(model.spec), training.seed)
    batch = None
    with np.errstate(all="ignore"):  # numbers that are not finite show in the losses
        for number in range(training.num_steps):
            if each_step is not None:
                each_step(number, model.layout.unpack(xp, state["params"]))
            if batch is None or batches.batch_size < len(targets):  # the whole set is the same at each step
                host = batches.batch(number)
                batch = type(host)(*(backend.asarray(part) for part in host))
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
    trained = model.layout.unpack(np, backend.to_numpy(state["params"]).copy())
    return trained, [float(backend.to_numpy(loss)[0]) for loss in losses]


def predict(weights: Tree, context: str, config: EquationConfig, operators: str = "+") -> dict[str, float]:
    """The probability of every character to follow a context such as "4+4=", the most likely first.

    Raises BabyError for a character that equations are not written with.
    """
    ids = encode(context[-config.n_ctx :].rjust(config.n_ctx), operators)
    probabilities = _probabilities(weights, ids[None, :], config)[0]
    order = np.argsort(-probabilities, kind="stable")
    return {decode([i], operators): float(probabilities[i]) for i in order}


def answers(
    weights: Tree, equations: Sequence[str], config: EquationConfig | GPTConfig, digits: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Of each equation: whether the most likely tokens are its answer, bool (n,), and the probability of it, (n,).

    An answer counts as a whole, up to the space after it. Where the context does not hold an equation whole, the
    first token of the answer alone is asked for: the others do not follow from what the model sees.
    """
    whole = config.n_ctx >= data.longest(digits)
    right, probability = np.ones(len(equations), bool), np.ones(len(equations))
    for place in range(max(len(data.answer(equation)) for equation in equations) if whole else 1):
        rows = [i for i, equation in enumerate(equations) if place < len(data.answer(equation))]
        ends = [equations[i].index("=") + 1 + place for i in rows]
        shares = _after(weights, [equations[i][:end] for i, end in zip(rows, ends, strict=True)], config)
        targets = encode("".join(equations[i][end] for i, end in zip(rows, ends, strict=True)), "+-")
        right[rows] &= shares.argmax(axis=-1) == targets
        probability[rows] *= shares[np.arange(len(rows)), targets]
    return right, probability


def _after(weights: Tree, texts: list[str], config: Any) -> np.ndarray:
    """Probabilities (n, V) of the token after each text, which the model sees from its beginning on."""
    T = config.n_ctx
    if isinstance(config, EquationConfig):
        ids = encode("".join(text[-T:].rjust(T) for text in texts), "+-").reshape(-1, T)
        return _probabilities(weights, ids, config)
    ids = encode("".join(text.ljust(T) for text in texts), "+-").reshape(-1, T)
    last = np.array([len(text) - 1 for text in texts])
    return _probabilities(weights, ids, config).reshape(len(texts), T, -1)[np.arange(len(texts)), last]


def _probabilities(weights: Tree, ids: np.ndarray, config: Any) -> np.ndarray:
    """softmax of the logits, in float64: ids (n, T) -> (rows, V)."""
    backend = registry.load("numpy")
    with np.errstate(all="ignore"):
        logits, _ = Model(config, _vocab_size(weights)).forward(backend.xp, weights, ids)
    e = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _vocab_size(weights: Tree) -> int:
    return (weights["wte"] if "wte" in weights else weights["embedding"])["weight"].shape[0]
