"""Validation loss: over all of the validation part, or over a sample of it during training."""

from collections.abc import Callable, Iterable
from itertools import islice

from baby_xp.text.batches import Batch


def mean_loss(total_loss: Callable[[Batch], float], batches: Iterable[Batch], every: int = 1) -> float:
    """Mean loss in nats per target.

    `total_loss` gives the sum of the losses of a host batch. `every`: only every n-th batch.
    """
    total, count = 0.0, 0
    for batch in islice(batches, 0, None, every):
        total += total_loss(batch)
        count += batch.targets.size
    return total / count
