"""babyLLM's six steps, each a plain function: from a vocabulary to a model that answers 4+4, which it never saw.

    vocabulary and encoding    encode, decode, VOCABULARY
    training data              make_equations
    sequences                  sequences
    hyperparameters            hyperparameters
    initial weights            initial_weights
    training loop              train

`predict` and `answers` show what the model learned. The maths is that of every other model: models/equation.py
forward and backward, optimizers.py. `python -m baby_xp train equations` does the same and keeps files.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from baby_xp_data import equation_table
from baby_xp_data.equation_table import BABYLLM, CONTEXT, VOCABULARY, EquationTable, decode, encode

from baby_xp.arrays import params, registry
from baby_xp.arrays.backend import Backend
from baby_xp.arrays.tree import Tree
from baby_xp.config import EquationConfig, ModelConfig, RunConfig, TrainConfig
from baby_xp.models import Model
from baby_xp.presets import preset
from baby_xp.text.answers import answers, probabilities, vocab_size
from baby_xp.text.batches import PairBatches
from baby_xp.training.step import initial_state, make_step

__all__ = [
    "VOCABULARY", "EquationTable", "answers", "decode", "encode", "hyperparameters", "initial_weights",
    "make_equations", "predict", "sequences", "train",
]  # fmt: skip


def make_equations(held_out: str = "4+4", table: EquationTable = BABYLLM) -> list[str]:
    """Step 2: all equations "a+b=s " except the held-out ones, such as "4+4" or "4+4,3+5", and their mirrors.

    Raises BabyError for a held-out case that the table does not have.
    """
    return table.equations(table.choose(held_out, seed=0))


def sequences(equations: Sequence[str], n_ctx: int = CONTEXT) -> tuple[np.ndarray, np.ndarray]:
    """Step 3: contexts (n, n_ctx) and the token that follows each, targets (n,), int32 ids.

    "1+1=2 " gives [3, 1, 3, 12] -> 4 and [1, 3, 12, 4] -> 0.
    """
    return equation_table.pairs(equations, n_ctx=n_ctx)


def hyperparameters(name: str = "equations") -> RunConfig:
    """Step 4: sizes of the model (`.model`) and how it is trained (`.train`)."""
    return preset(name)


def initial_weights(config: ModelConfig, vocab_size: int = len(VOCABULARY), seed: int = 0) -> Tree:
    """Step 5: the initial weights, a dict of float32 arrays; the same for the same seed.

    Those of the equation model: embedding.weight (V, C), hidden.weight (T C, n_hidden) and .bias (n_hidden,),
    output.weight (n_hidden, V) and .bias (V,), with T = n_ctx.
    """
    model = Model(config, vocab_size)
    return model.layout.unpack(np, params.draw(model.spec, seed))


def train(
    weights: Tree,
    contexts: np.ndarray,
    targets: np.ndarray,
    config: ModelConfig,
    training: TrainConfig,
    backend: Backend | None = None,
    each_step: Callable[[int, Tree], None] | None = None,
) -> tuple[Tree, list[float]]:
    """Step 6: forward, loss, backward, AdamW, num_steps times -> the trained weights, and the loss of each step.

    contexts (n, T), targets (n,), or (n, T) for a GPT; a step takes batch_size of them, or all if there are
    fewer. Losses are in nats per target. `each_step(step, weights)` is called before each step, with the device's
    arrays. `weights` is not changed.
    """
    training = replace(training, num_steps=training.total_steps(-(-len(targets) // training.step_size)))
    backend = backend or registry.load("numpy", dtype=training.dtype)
    xp, model = backend.xp, Model(config, vocab_size(weights))
    step = backend.compile(make_step(xp, model, training))
    batches, losses = PairBatches(contexts, targets, training.step_size, training.seed), []
    state = initial_state(backend, model.layout.pack(np, weights), params.decay_mask(model.spec), training.seed)
    batch = None
    with np.errstate(all="ignore"):  # numbers that are not finite show up in the losses
        for number in range(training.total_steps(0)):
            if each_step is not None:
                each_step(number, model.layout.unpack(xp, state["params"]))
            if batch is None or batches.batch_size < len(targets):  # the batch is the whole dataset at each step
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
    shares = probabilities(weights, ids[None, :], config)[0]
    order = np.argsort(-shares, kind="stable")
    return {decode([i], operators): float(shares[i]) for i in order}
