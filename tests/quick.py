"""Makes small runs fast, for the tests and for the processes that they start."""

import functools
import importlib.metadata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from baby_xp import session

SAMPLE_TOKENS = 10
"""Length of the text that a run ends with: the usual one takes longer than the training in these tests."""


@contextmanager
def quick(sample_tokens: int = SAMPLE_TOKENS) -> Iterator[None]:
    """Short samples, and entry points that are looked up once."""
    entry_points = functools.cache(importlib.metadata.entry_points)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(session, "SAMPLE_TOKENS", sample_tokens))
        stack.enter_context(mock.patch.object(importlib.metadata, "entry_points", entry_points))
        yield
