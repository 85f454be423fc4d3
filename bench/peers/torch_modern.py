"""PyTorch: baby_xp's modern GPT and Muon as a PyTorch user would write them, and training on a text.

The model is NanoChat's: rotary positions, RMSNorm without gain (also after the embedding and of queries and keys),
ReLU squared, no biases; with smear if the config says so. Modules carry the names of baby_xp's parameter tree.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from baby_xp import processes
from baby_xp.arrays import tree
from baby_xp.arrays.registry import load
from baby_xp.config import TrainConfig
from baby_xp.models import Model
from baby_xp.text.batches import Batch
from baby_xp.text.dataset import Dataset
from baby_xp.training import schedules
from bench.peers import Curve
from bench.peers.torch import GPT, about, load_weights, on_device

EPS, BASE = 1e-6, 10_000
COEFFICIENTS = 3.4445, -4.7750, 2.0315


def fit(
    model: Model,
    config: TrainConfig,
    dataset: Dataset,
    curve: Curve,
    weights: np.ndarray,
    make: Callable[..., nn.Module] | None = None,
    threads: int | None = None,
) -> dict[str, str]:
    """Train by the settings of baby_xp, from its first weights (P,) -> facts about PyTorch.

    make: (config, number of ids) -> the module, by default the model's twin. threads: by default one per core.
    """
    torch.set_num_threads(threads or processes.cores())
    cpu = torch.device("cpu")
    make = make or (ModernGPT if model.config.positions == "rotary" else GPT)
    twin = make(model.config, dataset.tokenizer.vocab_size).to(getattr(torch, config.dtype))
    load_weights(twin, tree.leaves(model.layout.unpack(np, weights)))
    first = on_device(curve.batches.batch(0), cpu)
    spare = copy.deepcopy(twin)
    # a step that does not count, as PyTorch imports much of itself at the first one
    advance(spare, first, optimizers_of(spare, config), config.lr, config.clip)
    torch.manual_seed(config.seed)
    optimizers, rates = optimizers_of(twin, config), learning_rates(config)

    def total_loss(batch: Batch) -> float:
        with torch.inference_mode():
            return twin(*on_device(batch, cpu)).item() * batch.targets.size

    def evaluate(step: int) -> None:
        twin.eval()
        curve.evaluate(step, total_loss)
        twin.train()

    if curve.first:
        evaluate(0)
    for step in range(dataset.num_steps):
        advance(twin, on_device(curve.batch(step), cpu), optimizers, rates[step], config.clip)
        if (step + 1) % curve.every == 0 or step + 1 == dataset.num_steps:
            curve.lap()
            evaluate(step + 1)
    return about(cpu)


def advance(
    twin: nn.Module,
    batch: Iterable[torch.Tensor],
    optimizers: list[torch.optim.Optimizer],
    lr: float,
    clip: float,
) -> None:
    """One step at AdamW's rate lr."""
    twin(*batch).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(twin.parameters(), clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def learning_rates(config: TrainConfig) -> list[float]:
    """AdamW's rate at each step."""
    xp, steps = load("numpy").xp, np.arange(config.num_steps, dtype=np.int32)
    return schedules.learning_rate(xp, steps, config, np.float64).tolist()


def optimizers_of(twin: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and where the config says so Muon for the matrices inside blocks.

    The share of a group is its rate as a multiple of AdamW's.
    """
    matrices = [p for p in twin.blocks.parameters() if p.ndim == 2] if config.optimizer == "muon" else []
    of_muon = set(matrices)
    groups = [
        {"params": [p for p in twin.parameters() if p not in of_muon and (p.ndim > 1) == decays],
         "weight_decay": rate, "share": 1.0}
        for decays, rate in ((True, config.weight_decay), (False, 0.0))
    ]  # fmt: skip
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True,
    )  # fmt: skip
    return [adamw, Muon(matrices, config)] if matrices else [adamw]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) in the precision of the weights; matrices of one shape are computed together."""

    def __init__(self, matrices: Iterable[torch.Tensor], config: TrainConfig):
        super().__init__(matrices, {
            "lr": config.muon_lr, "share": config.muon_lr / config.lr, "momentum": config.muon_momentum,
            "iterations": config.muon_iterations, "weight_decay": config.weight_decay,
        })  # fmt: skip

    @torch.no_grad()
    def step(self) -> None:
        """One step with Nesterov's momentum and decoupled decay."""
        for group in self.param_groups:
            for shape in {p.shape for p in group["params"]}:
                alike = [p for p in group["params"] if p.shape == shape]  # (out, in) each
                g = torch.stack([p.grad for p in alike])
                state = self.state[alike[0]]
                m = state.setdefault("momentum", torch.zeros_like(g))
                m.lerp_(g, 1 - group["momentum"])
                direction = orthogonalized(g.lerp(m, group["momentum"]), group["iterations"])
                size = math.sqrt(max(1.0, shape[0] / shape[1]))
                torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(alike, list(direction), alpha=-group["lr"] * size)


def orthogonalized(x: torch.Tensor, iterations: int) -> torch.Tensor:
    """Newton-Schulz for n matrices (n, R, C): their singular values become about 1."""
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last axis, without gain."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys (B, H, T, D) rotated by their position; cos, sin (T, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention through PyTorch's own kernel."""

    def __init__(self, C: int, H: int, dropout: float):
        super().__init__()
        self.H, self.rate = H, dropout
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cos, sin, more=None):
        """more (B, T, C): what is added to the values."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, dim=2)
        v = v if more is None else v + more
        q, k, v = (part.view(B, T, self.H, -1).transpose(1, 2) for part in (q, k, v))
        q, k = norm(rotated(q, cos, sin)), norm(rotated(k, cos, sin))
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)  # (B, H, T, D)
        return self.dropout(self.out(y.transpose(1, 2).reshape(B, T, C)))


class ReLU2(nn.Module):
    """ReLU squared."""

    def forward(self, x):
        return F.relu(x).square()


class Block(nn.Module):
    """Attention and network, each with a norm before and a residual connection around."""

    def __init__(self, C: int, H: int, dropout: float):
        super().__init__()
        self.attention = Attention(C, H, dropout)
        up, down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)
        self.network = nn.Sequential(OrderedDict(up=up, relu2=ReLU2(), down=down, dropout=nn.Dropout(dropout)))

    def forward(self, x, cos, sin, more=None):
        x = x + self.attention(norm(x), cos, sin, more)
        return x + self.network(norm(x))


class Smear(nn.Module):
    """To each token's normed vector, a gated share of that of the token before it is added."""

    def __init__(self, C: int):
        super().__init__()
        self.gate, self.scale = nn.Linear(C, 1, bias=False), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        x = norm(x)
        return x + self.scale * torch.sigmoid(self.gate(x)) * F.pad(x, (0, 0, 1, -1))


class ModernGPT(nn.Module):
    """The whole model, from a baby_xp GPTConfig and the number of ids."""

    def __init__(self, config, vocab_size: int):
        super().__init__()
        C, half = config.n_emb, config.n_emb // config.n_heads // 2
        self.wte = nn.Embedding(vocab_size, C)
        self.smear = Smear(C) if config.smear else nn.Identity()
        self.blocks = nn.ModuleList(Block(C, config.n_heads, config.dropout) for _ in range(config.n_layers))
        self.lm_head = nn.Linear(C, vocab_size, bias=False)
        frequencies = BASE ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(config.n_ctx, dtype=torch.float64)[:, None] * frequencies  # (n_ctx, D / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids, targets):
        """ids, targets (B, T) int64 -> mean loss in nats per token."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = norm(self.smear(self.wte(ids)))
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.lm_head(norm(x))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
