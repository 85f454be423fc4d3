"""Tiles: parts of a batch, sized for the processor's caches."""

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baby_xp.text.batches import Batch


def tiles(xp: Any, batch: "Batch") -> list["Batch"]:
    """The batch, or equal parts of it of about xp.tokens_at_once tokens."""
    B, T = batch.inputs.shape
    sizes = tile_sizes(B, T, xp.tokens_at_once)
    bounds = [0, *itertools.accumulate(sizes)]
    return [batch] if len(sizes) == 1 else [samples(batch, *ends) for ends in itertools.pairwise(bounds)]


def tile_sizes(B: int, T: int, tokens_at_once: int | None) -> list[int]:
    """Samples of each tile of B samples of T tokens."""
    number = number_of_tiles(B, T, tokens_at_once)
    return [B * (i + 1) // number - B * i // number for i in range(number)]


def number_of_tiles(B: int, T: int, tokens_at_once: int | None) -> int:
    """The number of tiles of B samples of T tokens."""
    return max(1, min(B, round(B * T / tokens_at_once))) if tokens_at_once else 1


def samples(batch: "Batch", first: int, last: int) -> "Batch":
    """Samples first to last of a batch."""
    return type(batch)(*(array[first:last, ...] for array in batch))
