"""Python objects as bytes, for other ranks: processes of the same user, which one launcher started with this code.

Nothing that comes from a file is read here: a file could bring code along.
"""

import pickle
from typing import Any


def packed(value: Any) -> bytes:
    """The bytes of a value."""
    return pickle.dumps(value, 5)


def unpacked(data: Any) -> Any:
    """The value of bytes that another rank has packed."""
    return pickle.loads(data)
