"""Faster forms of replaceable functions: float32 alone, by numba. The extra `fast` has it.

Same arguments, same results up to rounding. Arrays of other types go to the functions of numpy_kernels.py, or to
the plain ones where it has none.
"""

from collections.abc import Callable
from typing import Any

from baby_xp_backends import (
    numba_activations,
    numba_attention,
    numba_dropout,
    numba_norms,
    numba_optimizers,
    numba_tokens,
)

KERNELS: dict[str, Callable[..., Any]] = {
    "layernorm.forward": numba_norms.layernorm_forward,
    "layernorm.backward": numba_norms.layernorm_backward,
    "gelu.tanh_form": numba_activations.gelu_tanh_form,
    "heads.forward": numba_attention.heads_forward,
    "heads.backward": numba_attention.heads_backward,
    "cross_entropy.forward": numba_tokens.cross_entropy_forward,
    "cross_entropy.backward": numba_tokens.cross_entropy_backward,
    "embedding.sum_by_id": numba_tokens.sum_by_id,
    "dropout.drop": numba_dropout.dropout_drop,
    "dropout.select": numba_dropout.dropout_select,
    "optimizers.adamw": numba_optimizers.adamw,
    "workers.adamw_into": numba_optimizers.adamw_into,
    "muon.muon": numba_optimizers.muon_step,
    "muon.update_into": numba_optimizers.muon_update_into,
}
