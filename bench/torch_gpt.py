"""The peer: baby_xp's GPT as a PyTorch user would write it, with autograd and PyTorch's fused parts.

Same structure and numbers of parameters: learned positions, norms before each half of a block, no bias on
queries, keys and values, tanh GELU, a head with weights and bias of its own, and dropout on the attention
weights and on the output of each half. Modules carry the names of baby_xp's parameter tree.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal self-attention through PyTorch's own kernel."""

    def __init__(self, C: int, H: int, dropout: float):
        super().__init__()
        self.H, self.rate = H, dropout
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.out = nn.Linear(C, C)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.H, -1).transpose(1, 2) for part in self.qkv(x).split(C, dim=2))
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)  # (B, H, T, D)
        return self.dropout(self.out(y.transpose(1, 2).reshape(B, T, C)))


class Network(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, C: int, dropout: float):
        super().__init__()
        self.up = nn.Linear(C, 4 * C)
        self.gelu = nn.GELU(approximate="tanh")
        self.down = nn.Linear(4 * C, C)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.down(self.gelu(self.up(x))))


class Block(nn.Module):
    """Attention and network, each with a norm before and a residual connection around."""

    def __init__(self, C: int, H: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attention = Attention(C, H, dropout)
        self.network = Network(C, dropout)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.network(self.norm2(x))


class GPT(nn.Module):
    """The whole model, from a baby_xp GPTConfig and the number of ids."""

    def __init__(self, config, vocab_size: int):
        super().__init__()
        C = config.n_emb
        self.wte = nn.Embedding(vocab_size, C)
        self.wpe = nn.Embedding(config.n_ctx, C)
        self.blocks = nn.ModuleList(Block(C, config.n_heads, config.dropout) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(C)
        self.lm_head = nn.Linear(C, vocab_size)

    def forward(self, ids, targets):
        """ids, targets (B, T) int64 -> mean loss in nats a token."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))                        # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def load_weights(model: GPT, leaves) -> None:
    """Copy baby_xp's parameters, (path, array) pairs, into the model. Raises RuntimeError if they do not fit.

    A gain is called weight in PyTorch, and the weight of a linear layer is transposed.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    state = {}
    for path, array in leaves:
        owner, _, name = path.rpartition(".")
        tensor = torch.from_numpy(array)
        turned = name == "weight" and owner in linear
        state[f"{owner}.{'weight' if name == 'gain' else name}"] = tensor.T if turned else tensor
    model.load_state_dict(state)


def optimizer(model: GPT, config) -> torch.optim.Optimizer:
    """Fused AdamW by a baby_xp TrainConfig: weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)
