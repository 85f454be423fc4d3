"""Plain values as bytes, for other ranks: JSON values and arrays of NumPy. Bytes cannot bring code along.

A message is the length of its text, the text, and the bytes of all arrays in turn. In the text, an array is an
object with the single key ARRAY, and its type and shape. Tuples become lists; keys of dicts must be strings.
"""

import json
import struct
from typing import Any

import numpy as np

LENGTH = struct.Struct("!Q")
ARRAY = "array of NumPy"


def packed(value: Any) -> bytes:
    """The bytes of a value. Raises TypeError for what is neither an array nor a JSON value."""
    arrays: list[bytes] = []

    def described(array: Any) -> dict[str, Any]:
        if not isinstance(array, np.ndarray) or array.dtype.hasobject:
            raise TypeError(f"ranks cannot send each other a {type(array).__name__}")
        arrays.append(array.tobytes())
        return {ARRAY: [array.dtype.str, array.shape]}

    text = json.dumps(value, default=described).encode()
    return b"".join([LENGTH.pack(len(text)), text, *arrays])


def unpacked(data: Any) -> Any:
    """The value of such bytes."""
    (length,) = LENGTH.unpack_from(data)
    at = LENGTH.size + length

    def restored(found: dict[str, Any]) -> Any:
        nonlocal at
        if found.keys() != {ARRAY}:
            return found
        kind, shape = found[ARRAY]
        array = np.ndarray(shape, kind, data, at).copy()  # aligned, and writable
        at += array.nbytes
        return array

    return json.loads(bytes(data[LENGTH.size : at]), object_hook=restored)
