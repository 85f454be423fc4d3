"""Validation loss: over all of the validation part, or over a sample of it during training."""

from collections.abc import Callable, Iterable
from itertools import islice

from baby_xp.distributed.group import Group
from baby_xp.text.batches import Batch
from baby_xp.training.signals import Agreed, Stop


def mean_loss(
    total_loss: Callable[[Batch], float], batches: Iterable[Batch], every: int = 1,
    group: Group | None = None, stop: Stop | None = None,
) -> float:  # fmt: skip
    """Mean loss in nats per target.

    `total_loss` gives the sum of the losses of a host batch. `every`: only every n-th batch. The ranks of a group
    take batches in turn. A request to stop, on any rank, raises Agreed on all.
    """
    group, stop = group or Group(), stop or Stop()
    own = islice(batches, group.rank * every, None, group.size * every)
    total, count = 0.0, 0.0
    while True:
        batch = None if stop.asked else next(own, None)
        found = (0.0, 0) if batch is None else (total_loss(batch), batch.targets.size)
        losses, targets, asked = group.sum_of_numbers(*found, stop.asked)
        if asked:
            raise Agreed
        if not targets:
            return total / count
        total += losses
        count += targets
