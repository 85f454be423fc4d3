"""Cross-entropy of the next token, token by token, in nats: -log softmax(logits)[target].

It is one value per token: the mean over a batch, the sum over a text or the share of a worker are then
plain sums, and `dy` carries their weights.
"""

from baby_xp.arrays.namespace import replaceable


@replaceable
def forward(xp, p, logits, targets):
    """logits (N, V), targets (N,) ids -> losses (N,) in nats."""
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)      # the largest is 0: no overflow
    e = xp.exp(shifted)
    total = xp.sum(e, axis=-1, keepdims=True)                      # (N, 1)
    at_target = xp.take_along_axis(shifted, targets[:, None], axis=-1)
    losses = xp.log(total) - at_target                             # (N, 1)
    return losses[:, 0], (e / total, targets)


@replaceable
def backward(xp, p, saved, dy):
    """dy (N,): the weight of each token's loss -> dp, dlogits (N, V)."""
    probabilities, targets = saved
    ids = xp.arange(probabilities.shape[1], dtype=targets.dtype, device=xp.device)
    hit = xp.astype(targets[:, None] == ids[None, :], dy.dtype)    # (N, V), one-hot
    return {}, (probabilities - hit) * dy[:, None]
