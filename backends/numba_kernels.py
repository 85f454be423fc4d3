"""Faster forms of some of the functions in numpy_kernels.py: float32 alone, by numba. The extra `fast` has it.

Same arguments, same results up to rounding. Arrays of other types go to NumPy's functions.
"""

from collections.abc import Callable
from typing import Any

from baby_xp_backends import numba_activations, numba_attention, numba_decoding, numba_norms

KERNELS: dict[str, Callable[..., Any]] = {
    "layernorm.forward": numba_norms.layernorm_forward,
    "layernorm.backward": numba_norms.layernorm_backward,
    "gelu.tanh_form": numba_activations.gelu_tanh_form,
    "heads.forward": numba_attention.heads_forward,
    "heads.backward": numba_attention.heads_backward,
    "gpt.prepare": numba_decoding.prepare,
    "gpt.decode": numba_decoding.decode,
}
