"""One training step, as a pure function: step(state, batch) -> state, metrics."""

import itertools
import math

from baby_xp.arrays import rng
from baby_xp.arrays.namespace import replaceable
from baby_xp.layers import cross_entropy
from baby_xp.training import optimizers


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


def loss_and_gradients(xp, model, params, batch, noise=None, n_targets: int | None = None):
    """Mean loss (1,) in nats per token, and its gradients (P,), at params (P,); as loss_and_tree, but packed."""
    loss, dp = loss_and_tree(xp, model, params, batch, noise, n_targets)
    return loss, model.layout.pack(xp, dp)


def loss_and_tree(xp, model, params, batch, noise=None, n_targets: int | None = None):
    """Mean loss (1,) in nats per token, and the tree of its gradients, at params (P,).

    batch: inputs (B, T), targets (B, T) or (B,) for a model of one target a context, samples (B,). Where the
    batch is a share of a larger one, `n_targets` is the number of targets of the whole: the shares' losses
    and gradients then add up to those of the whole.
    """
    p = model.layout.unpack(xp, params)
    logits, saved = model.forward(xp, p, batch.inputs, noise)
    losses, loss_saved = cross_entropy.forward(xp, {}, logits, xp.reshape(batch.targets, (-1,)))
    weight = xp.full_like(losses, 1 / (n_targets or losses.shape[0]))
    _, dlogits = cross_entropy.backward(xp, {}, loss_saved, weight)
    dp = model.backward(xp, p, saved, dlogits)
    return xp.reshape(xp.sum(losses * weight), (1,)), dp


def total_loss(xp, model, params, batch):
    """Sum of the losses of all targets (1,) in nats, without dropout: for evaluation."""
    p, total = model.layout.unpack(xp, params), None
    for part in shards(xp, batch):
        logits, _ = model.forward(xp, p, part.inputs)
        losses, _ = cross_entropy.forward(xp, {}, logits, xp.reshape(part.targets, (-1,)))
        of_part = xp.reshape(xp.sum(losses), (1,))
        total = of_part if total is None else total + of_part
    return total


def step_noise(xp, model, seed, step, batch):
    """The dropout of a step, for the samples of `batch`: seed (1,), step (1,) int32 -> rng.Noise or None."""
    rate = model.config.dropout
    if rate == 0:
        return None
    return rng.Noise(rng.streams(xp, seed, step, batch.samples, model.dropouts), rate)


def noisy_loss_and_gradients(xp, model, state, batch, n_targets: int | None = None):
    """Mean loss (1,) and its gradients (P,), at the parameters and with the dropout of `state`."""
    loss, gradients = None, None
    for more_loss, dp in shard_by_shard(xp, model, state, batch, n_targets):
        if gradients is None:
            loss, gradients = more_loss, model.layout.pack(xp, dp)
        else:
            loss, gradients = loss + more_loss, add_tree(xp, model.layout, gradients, dp)
    return loss, gradients


def shard_by_shard(xp, model, state, batch, n_targets: int | None = None):
    """Yield loss and tree of gradients of each shard of the batch; together they are those of the batch."""
    n_targets = n_targets or math.prod(batch.targets.shape)
    for part in shards(xp, batch):
        noise = step_noise(xp, model, state["seed"], state["step"], part)
        yield loss_and_tree(xp, model, state["params"], part, noise, n_targets)


def shards(xp, batch):
    """The batch, or equal parts of it of about as many tokens as the backend computes best at once."""
    sizes = shard_sizes(*batch.inputs.shape, xp.tokens_at_once)
    bounds = [0, *itertools.accumulate(sizes)]
    return [batch] if len(sizes) == 1 else [_part(batch, *ends) for ends in itertools.pairwise(bounds)]


def shard_sizes(B: int, T: int, tokens_at_once: int | None) -> list[int]:
    """Samples of each shard of B samples of T tokens."""
    number = number_of_shards(B, T, tokens_at_once)
    return [B * (i + 1) // number - B * i // number for i in range(number)]


def number_of_shards(B: int, T: int, tokens_at_once: int | None) -> int:
    """Into how many shards B samples of T tokens go."""
    return max(1, min(B, round(B * T / tokens_at_once))) if tokens_at_once else 1


@replaceable
def add_tree(xp, layout, flat, tree):
    """The flat buffer (P,) plus a tree that is packed like it. The caller gives `flat` up."""
    return flat + layout.pack(xp, tree)


def accumulated(loss_and_gradients, batch_size: int):
    """A function like noisy_loss_and_gradients that takes a batch in parts of `batch_size` samples.

    Loss and gradients are those of the whole, up to rounding; the memory is that of a part.
    """

    def of_whole(xp, model, state, batch):
        B = batch.inputs.shape[0]
        parts = [_part(batch, start, min(start + batch_size, B)) for start in range(0, B, batch_size)]
        n_targets = math.prod(batch.targets.shape)
        loss, gradients = loss_and_gradients(xp, model, state, parts[0], n_targets)
        for part in parts[1:]:
            more_loss, more_gradients = loss_and_gradients(xp, model, state, part, n_targets)
            loss, gradients = loss + more_loss, gradients + more_gradients
        return loss, gradients

    return of_whole


def _part(batch, first: int, last: int):
    """Samples first to last."""
    return type(batch)(*(array[first:last, ...] for array in batch))


def make_step(xp, model, config, loss_and_gradients=noisy_loss_and_gradients):
    """The step of a model under a TrainConfig. Pure: a backend may trace, compile and run it ahead.

    `loss_and_gradients` has the signature of noisy_loss_and_gradients: workers put theirs in its place.
    """
    if config.accumulate > 1:
        loss_and_gradients = accumulated(loss_and_gradients, config.batch_size)

    def step(state, batch):
        loss, gradients = loss_and_gradients(xp, model, state, batch)
        state, metrics = optimizers.update(xp, state, gradients, config)
        return state, {"loss": loss, **metrics}

    return step


def loss_and_predictions(xp, model, params, batch):
    """As total_loss, and the most likely token at each target (N,), in one forward pass: for evaluation."""
    p, total, predictions = model.layout.unpack(xp, params), None, []
    for part in shards(xp, batch):
        logits, _ = model.forward(xp, p, part.inputs)
        losses, _ = cross_entropy.forward(xp, {}, logits, xp.reshape(part.targets, (-1,)))
        of_part = xp.reshape(xp.sum(losses), (1,))
        total = of_part if total is None else total + of_part
        predictions.append(xp.argmax(logits, axis=-1))
    return total, xp.concat(predictions)
