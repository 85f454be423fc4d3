"""Faster forms of some of the functions in numpy_kernels.py: float32 alone, by numba. The extra `fast` has it.

Same arguments, same results up to rounding. Arrays of other types go to NumPy's functions.
"""

from collections.abc import Callable
from typing import Any

from baby_xp_backends import numba_activations, numba_attention, numba_norms, numba_products, numba_query_key

KERNELS: dict[str, Callable[..., Any]] = {
    "linear.forward": numba_products.linear_forward,
    "linear.backward": numba_products.linear_backward,
    "layernorm.forward": numba_norms.layernorm_forward,
    "layernorm.backward": numba_norms.layernorm_backward,
    "rmsnorm.forward": numba_norms.rmsnorm_forward,
    "rmsnorm.backward": numba_norms.rmsnorm_backward,
    "rmsnorm_gain.forward": numba_norms.rmsnorm_gain_forward,
    "rmsnorm_gain.backward": numba_norms.rmsnorm_gain_backward,
    "gelu.tanh_form": numba_activations.gelu_tanh_form,
    "gelu.erf_form": numba_activations.gelu_erf_form,
    "relu2.forward": numba_activations.relu2_forward,
    "relu2.backward": numba_activations.relu2_backward,
    "swiglu.forward": numba_activations.swiglu_forward,
    "swiglu.backward": numba_activations.swiglu_backward,
    "query_key.forward": numba_query_key.query_key_forward,
    "query_key.backward": numba_query_key.query_key_backward,
    "heads.forward": numba_attention.heads_forward,
    "heads.backward": numba_attention.heads_backward,
}
