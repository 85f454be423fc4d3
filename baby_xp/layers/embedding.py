"""Embedding: row `ids[n]` of a table, for each token n."""

from baby_xp.arrays.namespace import replaceable
from baby_xp.arrays.params import normal


def spec(V: int, C: int, std: float = 0.02):
    """Weight (V, C): one row per id."""
    return {"weight": normal(V, C, std=std)}


def forward(xp, p, ids):
    """ids (N,) integers below V -> (N, C). Ids are checked on the host: a GPU would wrap them silently."""
    return xp.take(p["weight"], ids, axis=0), (ids,)


def backward(xp, p, saved, dy):
    """dy (N, C) -> dp. No gradient flows to ids."""
    (ids,) = saved
    return {"weight": sum_by_id(xp, ids, dy, p["weight"].shape[0])}


@replaceable
def sum_by_id(xp, ids, dy, V: int):
    """Add up the rows of dy (N, C) that belong to the same id: (V, C).

    As a product with one-hot rows: the Array API has no scatter-add, and at the vocabulary of characters the
    product is the faster of the two.
    """
    rows = xp.arange(V, dtype=ids.dtype, device=xp.device)
    onehot = xp.astype(ids[:, None] == rows[None, :], dy.dtype)    # (N, V)
    return xp.matrix_transpose(onehot) @ dy                        # (V, C)
