"""The namespace `xp` that all maths is written against, and the seam behind which a backend may be fast.

`xp` is what array-api-compat resolves for an array library, as an object of its own, so that two
configurations (float32 on NumPy, float64 on CuPy) can live in one process. A backend speeds it up in two
ways, and both are tested against what they replace:

- by functions of the Array API with the same names and meaning, laid over the library's own;
- by whole functions of ours, those marked `@replaceable` below (a softmax, AdamW, the dropout mask).

A backend that is loaded with kernels="plain" does neither.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

Array = Any
"""An array of whatever library: they share no type."""


class Namespace(types.SimpleNamespace):
    """All public names of an array library, with `device` for creation calls and `kernels` for our own.

    `kernels` maps the qualified name of a replaceable function ("gelu.tanh_form") to a faster one with the
    same signature. Attributes are copied once: a lookup costs no more than on the module itself.
    `tokens_at_once` is how many tokens of a batch are best computed together, None for all of them: on a
    processor, arrays that outgrow its caches cost time and save none. `gradients_in_place` says that arrays may be
    written to: the kernels of a backward pass then put gradients where they belong, see tree.Parameters. The cache
    of generation has room for a multiple of `cache_multiple` tokens.
    """

    def __init__(
        self,
        library: Any,
        device: Any = None,
        kernels: Mapping[str, Callable[..., Any]] | None = None,
        tokens_at_once: int | None = None,
        gradients_in_place: bool = False,
        cache_multiple: int = 1,
        **faster: Callable[..., Any],
    ):
        names = {name: getattr(library, name) for name in dir(library) if not name.startswith("_")}
        super().__init__(**{**names, **faster})
        self.library, self.device, self.kernels = library, device, dict(kernels or {})
        self.tokens_at_once, self.gradients_in_place = tokens_at_once, gradients_in_place
        self.cache_multiple = cache_multiple

    def __repr__(self) -> str:
        return f"Namespace({getattr(self.library, '__name__', self.library)!s})"


REPLACEABLE: dict[str, Callable[..., Any]] = {}
"""Every function that a backend may replace, in its plain form, by qualified name. Tests walk this table."""


def replaceable(function: Callable[..., Any]) -> Any:
    """Mark a function of (xp, arrays...) that a backend may replace by one of the same signature and meaning.

    Its qualified name is that of its module, without the package, and its own: two may not have the same.
    """
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    if REPLACEABLE.get(name, function).__module__ != function.__module__:
        raise ValueError(f"{name} is replaceable in {REPLACEABLE[name].__module__} already")
    REPLACEABLE[name] = function

    @functools.wraps(function)
    def call(xp: Any, *args: Any, **kwargs: Any) -> Any:
        return xp.kernels.get(name, function)(xp, *args, **kwargs)

    return call
