"""One training step, as a pure function: step(state, batch) -> state, metrics.

A batch is computed in parts whose losses and gradients are added up: batches of a larger one where gradients are
accumulated, and tiles of each, sized for the processor's caches. Workers split it into shards, see
workers.py.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable

from baby_xp.arrays import rng
from baby_xp.arrays.backend import Backend
from baby_xp.arrays.namespace import replaceable
from baby_xp.arrays.tiles import samples, tiles
from baby_xp.arrays.tree import Parameters, fill
from baby_xp.layers import cross_entropy
from baby_xp.text.batches import Batch
from baby_xp.training import optimizers
from baby_xp.training.sender import Sender


def initial_state(backend, flat, decays, seed: int):
    """The state before the first step, on the backend's device.

    flat (P,): first values of the parameters; decays (P,): params.decay_mask, both host arrays.
    """
    params = backend.asarray(flat)
    zeros = backend.xp.zeros_like
    return {
        "params": params,
        "m": zeros(params),
        "v": zeros(params),
        "decays": backend.asarray(decays),
        "step": backend.integers([0]),
        "seed": backend.integers([seed]),
    }


def on_device(backend: Backend, batch: Batch) -> Batch:
    """A batch of host arrays on the backend's device."""
    return Batch(*backend.asarrays(batch))


def make_step(xp, model, config, compute=None, optimizer=None, norm_of=None):
    """The step of a model under a TrainConfig. Pure: a backend may trace, compile and run it ahead.

    compute gives loss and gradients of a step, optimizer has the signature of optimizers.adamw, and norm_of that
    of optimizers.global_norm; the defaults are those of the config, in one process. Workers and ranks have others.
    Raises BabyError if the optimizer has nothing to do in this model.
    """
    optimizer = optimizer or optimizers.of(model, config)
    compute = compute or gradients_of_step(config)

    def step(state, batch):
        loss, gradients = compute(xp, model, state, batch)
        state, metrics = optimizers.update(xp, state, gradients, config, optimizer, norm_of)
        return state, {"loss": loss, **metrics}

    return step


def loss_and_gradients(xp, model, params, batch, noise=None, n_targets=None, views=None, sender=None):
    """Mean loss (1,) in nats per token, and the tree of its gradients, at params (P,).

    batch: inputs (B, T), targets (B, T) or (B,) for a model with one target per context, samples (B,). Where the
    batch is a part of a larger one, `n_targets` is the number of targets of the whole: the parts' losses and
    gradients then add up to those of the whole. views: a tree where gradients may be written; sender: what sends
    those that are complete; see tree.Parameters.
    """
    p = model.layout.unpack(xp, params)
    if views is not None or sender is not None:
        p = Parameters(p, views, sender)
    logits, saved = model.forward(xp, p, batch.inputs, noise)
    losses, loss_saved = cross_entropy.forward(xp, {}, logits, xp.reshape(batch.targets, (-1,)))
    weight = xp.full_like(losses, 1 / (n_targets or losses.shape[0]))
    _, dlogits = cross_entropy.backward(xp, {}, loss_saved, weight)
    dp = model.backward(xp, p, saved, dlogits)
    return xp.reshape(xp.sum(losses * weight), (1,)), dp


def over_parts(parts: Iterable, compute: Callable):
    """Loss and gradients of a batch: those of its parts, added up in their order.

    compute(part, total) -> loss of the part, total of the gradients so far; `total` is None at the first part, and
    may be reused.
    """
    loss = total = None
    for part in parts:
        more, total = compute(part, total)
        loss = more if loss is None else loss + more
    return loss, total


def loss_and_gradients_with_dropout(xp, model, state, batch, n_targets: int | None = None, out=None, sum_=None):
    """Mean loss (1,) and its gradients (P,), at the parameters and with the dropout of `state`, tile by tile.

    out (P,): an array for the gradients, where the backend writes in place; None: a new one. sum_: a sum of `out`
    over several ranks, which has begun and gets the gradients of the last tile while they are computed.
    """
    n_targets = n_targets or math.prod(batch.targets.shape)
    if out is None and xp.gradients_in_place:
        out = xp.empty_like(state["params"])
    # not a closure: the frames of a step that ran out of memory would keep the state alive
    add_tile = functools.partial(_add_tile, xp, model, state, n_targets, out)
    if sum_ is None:
        return over_parts(tiles(xp, batch), add_tile)
    *others, last = tiles(xp, batch)
    loss, total = over_parts(others, add_tile)
    if total is not None and total is not out:  # what adds up the tiles need not do so in place
        out[:] = total
    more, _ = add_tile(last, total, Sender(model.layout, out, total is not None, sum_))
    return more if loss is None else loss + more, out


def _add_tile(xp, model, state, n_targets: int, out, tile, total, sender=None):
    noise = step_noise(xp, model, state["seed"], state["step"], tile)
    views = model.layout.unpack(xp, out) if total is None and out is not None else None
    loss, tree = loss_and_gradients(xp, model, state["params"], tile, noise, n_targets, views, sender)
    if sender is not None:
        sender.completed(tree)
        return loss, out
    if views is not None:
        fill(views, tree)
        return loss, out
    return loss, model.layout.pack(xp, tree) if total is None else add_tree(xp, model.layout, total, tree)


def gradients_of_step(config, compute=None):
    """The function that gives a step's loss and gradients: `compute`, in parts where the config accumulates."""
    compute = compute or loss_and_gradients_with_dropout
    return accumulated(compute, config.batch_size) if config.accumulate > 1 else compute


def accumulated(compute, batch_size: int):
    """A function like `compute`, which is loss_and_gradients_with_dropout or that of workers, but in parts.

    Parts have `batch_size` samples. Loss and gradients are those of the whole, up to rounding; the memory is that
    of a part.
    """

    def of_whole(xp, model, state, batch, n_targets=None):
        B, n_targets = batch.inputs.shape[0], n_targets or math.prod(batch.targets.shape)
        parts = (samples(batch, first, min(first + batch_size, B)) for first in range(0, B, batch_size))
        return over_parts(parts, functools.partial(_add_part, compute, xp, model, state, n_targets))

    return of_whole


def _add_part(compute, xp, model, state, n_targets: int, part, total):
    loss, gradients = compute(xp, model, state, part, n_targets=n_targets)
    # a copy, as workers write the gradients of the next part into the same memory
    return loss, xp.asarray(gradients, copy=True) if total is None else total + gradients


def total_loss(xp, model, params, batch):
    """Sum of the losses of all targets (1,) in nats, without dropout: for evaluation."""
    return functools.reduce(operator.add, (loss for loss, _ in _losses(xp, model, params, batch)))


def loss_and_predictions(xp, model, params, batch):
    """As total_loss, and the most likely token at each target (N,)."""
    losses, predictions = zip(
        *((loss, xp.argmax(logits, axis=-1)) for loss, logits in _losses(xp, model, params, batch)), strict=True
    )
    return functools.reduce(operator.add, losses), xp.concat(predictions)


def _losses(xp, model, params, batch):
    """Sum of the losses (1,) and logits (N, V) of each tile."""
    p = model.layout.unpack(xp, params)
    for tile in tiles(xp, batch):
        logits, _ = model.forward(xp, p, tile.inputs)
        losses, _ = cross_entropy.forward(xp, {}, logits, xp.reshape(tile.targets, (-1,)))
        yield xp.reshape(xp.sum(losses), (1,)), logits


def step_noise(xp, model, seed, step, batch):
    """The dropout of a step, for the samples of `batch`: seed (1,), step (1,) int32 -> rng.Noise or None."""
    rate = model.config.dropout
    if rate == 0:
        return None
    return rng.Noise(rng.streams(xp, seed, step, batch.samples, model.dropouts), rate)


@replaceable
def add_tree(xp, layout, flat, tree):
    """The flat buffer (P,) plus a tree that is packed like it. The caller gives `flat` up."""
    return flat + layout.pack(xp, tree)
