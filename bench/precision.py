"""Precisions of the matrix products: what each contender is told, and how far its losses may then lie apart.

- float32: products in float32, as on a CPU; what a GPU's libraries do that is coarser is turned off
- tf32: arrays in float32, factors of products rounded to 10 bits: tensor cores of NVIDIA GPUs from 2020 on
- half: for PyTorch, bfloat16 autocast: factors and results of products have 7 bits, weights stay float32
"""

from contextlib import nullcontext

TOLERANCES = {"float32": 1e-4, "tf32": 5e-4, "half": 2e-3}
"""Largest relative difference of a loss from baby_xp's in float32, where both do the same work.

Measured with PyTorch 2.13 on a CPU, W1 to W3: bfloat16 autocast changes the two losses by up to 8e-5 of their
value. TF32 rounds 8 times finer than bfloat16. A GPU adds up in another order; W5's losses are not known yet.
"""


def load_options(precision: str) -> dict[str, bool]:
    """What baby_xp.backend.load is told beyond name and device."""
    return {"tf32": True} if precision == "tf32" else {}


def set_torch(torch, precision: str) -> None:
    """Set what PyTorch's float32 products round to. cuDNN rounds to TF32 by default, cuBLAS does not."""
    fast = precision == "tf32"
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cuda.matmul.allow_tf32 = fast
    torch.backends.cudnn.allow_tf32 = fast


def autocast(torch, device: str, precision: str):
    """The context of a forward pass; device: "cuda" or "cpu"."""
    return torch.autocast(device, torch.bfloat16) if precision == "half" else nullcontext()


def set_jax(jax, precision: str) -> None:
    """JAX rounds float32 products to TF32 on a GPU unless it is told not to."""
    jax.config.update("jax_default_matmul_precision", {"float32": "highest", "tf32": "tensorfloat32"}[precision])
