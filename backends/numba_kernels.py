"""Faster forms of replaceable functions: float32 alone, by numba. The extra `fast` has it.

Same arguments, same results up to rounding. Arrays of other types go to the functions of numpy_kernels.py, or to
the plain ones where it has none.
"""

from collections.abc import Callable
from typing import Any

from baby_xp_backends import (
    numba_activations,
    numba_attention,
    numba_decoding,
    numba_dropout,
    numba_gpt,
    numba_norms,
    numba_optimizers,
    numba_products,
    numba_query_key,
    numba_tokens,
)

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
    "cross_entropy.forward": numba_tokens.cross_entropy_forward,
    "cross_entropy.backward": numba_tokens.cross_entropy_backward,
    "embedding.sum_by_id": numba_tokens.sum_by_id,
    "dropout.drop": numba_dropout.dropout_drop,
    "dropout.select": numba_dropout.dropout_select,
    "muon.muon": numba_optimizers.muon_step,
    "muon.update_into": numba_optimizers.muon_update_into,
    "optimizers.adamw": numba_optimizers.adamw,
    "optimizers.adamw_into": numba_optimizers.adamw_into,
    "gpt.prepare": numba_decoding.prepare,
    "gpt.decode": numba_decoding.decode,
}

CACHE_MULTIPLE = numba_gpt.PANEL
"""The cache of generation has room for a multiple of this many tokens."""
