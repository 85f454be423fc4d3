"""What is measured: five GPTs, their batches, and the precisions of their products. See bench/README.md."""

from dataclasses import dataclass

import numpy as np

from baby_xp.config import GPTConfig, TrainConfig
from baby_xp.models import Model
from baby_xp.text.batches import Batch, RandomWindows
from bench import harness

TOLERANCES = {"float32": 1e-4, "tf32": 5e-4, "half": 2e-3}
"""Largest relative difference of a loss from baby_xp's in float32, where both do the same work.

On a CPU, W1 to W3, PyTorch's bfloat16 autocast changes the losses by up to 8e-5 of their value; TF32 rounds 8
times finer. A GPU adds up in another order; W5's losses are not known yet.
"""
GPU_WARMUP, N_IDS = 20, 100_000
"""Steps; and the length of the text of random ids, on which the time of a step does not depend."""


@dataclass(frozen=True)
class Workload:
    """Sizes of a model and of its batch, and how many steps a round measures: steps, on a GPU gpu_steps.

    warmup: steps before them, in which caches, thread pools and memory settle, and all is compiled.
    """

    name: str
    about: str
    vocab_size: int
    n_ctx: int
    n_emb: int
    n_heads: int
    n_layers: int
    batch_size: int
    dropout: float
    steps: int
    warmup: int
    gpu_steps: int = 100

    def pace(self, backend: str) -> tuple[int, int]:
        """Warm-up and steps of a round on that backend; a step runs a few times before a GPU has it as a graph."""
        return (GPU_WARMUP, self.gpu_steps) if on_gpu(backend) else (self.warmup, self.steps)

    def model(self, dropout: float) -> Model:
        """The model with that dropout rate."""
        sizes = {name: getattr(self, name) for name in ("n_ctx", "n_emb", "n_heads", "n_layers")}
        return Model(GPTConfig(head_size=self.n_emb, dropout=dropout, **sizes), self.vocab_size)

    def training(self, num_steps: int) -> TrainConfig:
        """How every library trains: AdamW at a constant rate, clipped, float32."""
        return TrainConfig(
            batch_size=self.batch_size, num_steps=num_steps, lr=1e-3, schedule="constant", warmup_steps=0,
            beta1=0.9, beta2=0.99, weight_decay=0.1, clip=1.0, eval_every=num_steps + 1,
            checkpoint_minutes=0.0,
        )  # fmt: skip

    def batches(self, count: int) -> list[Batch]:
        """The first `count` batches: the same for every library."""
        ids = np.random.default_rng(0).integers(0, self.vocab_size, N_IDS, dtype=np.int32)
        windows = RandomWindows(ids, self.n_ctx, self.batch_size, seed=0)
        return [windows.batch(step) for step in range(count)]


# With these numbers of steps a round of one library takes seconds on two cores, not minutes.
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "nanoGPT's Shakespeare run for a laptop", 65, 64, 128, 4, 4, 12, 0.0, 100, 10, 500),
        Workload("W2", "The Little Baby's table, n_ctx 64, 4 layers", 65, 64, 128, 16, 4, 16, 0.1, 60, 10, 500),
        Workload("W3", "The Little Baby's table, n_ctx 128, 16 layers", 65, 128, 128, 16, 16, 16, 0.1, 15, 3, 200),
        Workload("W4", "nanoGPT's Shakespeare run for a GPU", 65, 256, 384, 6, 6, 64, 0.2, 3, 1, 100),
        Workload("W5", "GPT-2 small's shape", 50257, 1024, 768, 12, 12, 8, 0.0, 1, 1, 30),
    )
}
FOR_A_GPU = ("W5",)  # a CPU is measured on it only if it is named: a step takes minutes there


def on_gpu(backend: str) -> bool:
    """Whether that backend of baby_xp is measured as a GPU, and its peers on the GPU too.

    backend: its name, and after a colon its device if that is not the usual one: "cupy", "jax:gpu".
    """
    name, _, device = backend.partition(":")
    return name == "cupy" or device.startswith(("gpu", "cuda"))


def of(workload: str | dict) -> Workload:
    """The workload with that name or with these fields: a parent process sends one or the other to a child."""
    return WORKLOADS[workload] if isinstance(workload, str) else Workload(**workload)


def named(text: str) -> list[Workload]:
    """An argument that lists workloads, like "W1,W2"."""
    return [WORKLOADS[name] for name in harness.names_of(WORKLOADS, "workload")(text)]
