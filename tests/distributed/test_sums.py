"""The order in which ranks add up."""

import numpy as np
import pytest

from baby_xp.distributed import mpi


@pytest.mark.parametrize("n", [2, 3, 5])
def test_terms_are_added_in_the_order_of_the_ranks_wherever_the_sum_lies(n):
    """In float32, where another order would give other bits."""
    draw = np.random.default_rng(0)
    for own in (None, *range(n)):
        terms = [draw.standard_normal(1000).astype("float32") for _ in range(n)]
        expected = terms[0].copy()
        for term in terms[1:]:
            expected = expected + term
        out = np.empty(1000, "float32") if own is None else terms[own]
        mpi.add(terms, out)
        np.testing.assert_array_equal(out, expected)
