"""PyTorch: baby_xp's GPT as a PyTorch user would write it, with autograd and PyTorch's fused parts.

Modules carry the names of baby_xp's parameter tree. Generation has preallocated key-value caches.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from baby_xp import processes
from baby_xp.arrays import tree
from baby_xp.inference.generate import window_start
from baby_xp.resources import process_memory
from baby_xp.text.batches import Batch
from baby_xp.training.loop import READ_EVERY
from bench import peers, workloads
from bench.peers import SEED, Clock, Outcome
from bench.workloads import Workload, on_gpu


def train(
    workload: Workload,
    dropout: float,
    clock: Clock,
    backend: str = "numpy",
    precision: str = "float32",
    compiled: str | None = None,
) -> Outcome:
    """Train on all cores, or on the GPU where baby_xp is on it. compiled: a mode of torch.compile, None: eager."""
    device = device_of(backend)
    torch.set_num_threads(processes.cores())
    set_precision(precision)
    if device.type == "cuda":
        clock.wait = torch.cuda.synchronize
    config, spec = workload.training(len(clock)), workload.model(dropout)
    model = GPT(spec.config, workload.vocab_size)
    load_weights(model, tree.leaves(peers.first_weights(spec)))
    groups = [
        {"params": [p for p in model.to(device).parameters() if (p.ndim > 1) == decays], "weight_decay": rate}
        for decays, rate in ((True, config.weight_decay), (False, 0.0))  # of matrices alone
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)
    if compiled:
        model = torch.compile(model, mode=compiled)
    unread, read = [], 0.0

    def loss_of(batch: Batch) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16) if precision == "half" else nullcontext():
            return model(*on_device(batch, device))

    for step in range(len(clock)):
        loss = loss_of(clock.batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        unread.append(loss.detach().clone())  # a captured graph writes the next loss to the same address
        if len(unread) == READ_EVERY or step + 1 == len(clock):
            read, unread = torch.stack(unread).mean().item(), []
    with torch.no_grad():
        model.eval()
        last = loss_of(clock.batches[0]).item()
    peaks = {"used": torch.cuda.max_memory_allocated, "held": torch.cuda.max_memory_reserved}
    gpu_memory = {name: peak(device) for name, peak in peaks.items() if device.type == "cuda"}
    return Outcome([read, last], about(device), process_memory.taken(), gpu_memory)


def generate(
    workload: Workload, batch: int, num_tokens: int, backend: str = "numpy", threads: int | None = None
) -> tuple[Outcome, list[float]]:
    """Generate in eager mode; threads: None for one per core."""
    torch.set_num_threads(threads or processes.cores())
    torch.manual_seed(SEED)
    with torch.inference_mode():
        decoder = Decoder(workload, batch, num_tokens, backend)
        ms = peers.step_times(decoder.draw(num_tokens))
    return Outcome([], about(decoder.device), process_memory.taken()), ms


def shortfalls(workload: str | dict, ids: list[list[int]], backend: str = "numpy") -> list[list[float]]:
    """How far below PyTorch's largest logit each of these ids (steps, B) lies: 0 where it is the most likely."""
    text = torch.tensor(ids)
    with torch.inference_mode():
        decoder = Decoder(workloads.of(workload), text.shape[1], text.shape[0], backend)
        found = []
        for following in text.to(decoder.device):
            logits = decoder.logits()
            chosen = logits.gather(1, following[:, None])[:, 0]
            found.append((logits.amax(dim=-1) - chosen).tolist())
            decoder.append(following)
    return found


def device_of(backend: str) -> torch.device:
    """The GPU where baby_xp's backend is on it."""
    return torch.device("cuda" if on_gpu(backend) else "cpu")


def set_precision(precision: str) -> None:
    """Set what float32 products round to. By default cuDNN rounds to TF32, cuBLAS does not."""
    fast = precision == "tf32"
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cuda.matmul.allow_tf32 = fast
    torch.backends.cudnn.allow_tf32 = fast


def on_device(batch: Batch, device: torch.device) -> Iterator[torch.Tensor]:
    """Inputs and targets (B, T) of a batch."""
    parts = (torch.from_numpy(part).to(torch.int64) for part in (batch.inputs, batch.targets))
    if device.type == "cuda":  # from pinned memory a copy does not make Python wait
        return (part.pin_memory().to(device, non_blocking=True) for part in parts)
    return parts


def about(device: torch.device) -> dict[str, str]:
    """What a reader must know to interpret PyTorch's times."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return {"torch": torch.__version__, "cuda": str(torch.version.cuda), "device": f"{device} ({name})"}
    # PyTorch links its BLAS statically, so threadpoolctl does not find it
    library = "MKL" if torch.backends.mkl.is_available() else "BLAS of its build"
    blas = f"{library}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "torch": torch.__version__, "device": str(device), "threads": str(torch.get_num_threads()), "blas": blas,
    }  # fmt: skip


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


class Block(nn.Module):
    """Attention and network, each with a norm before and a residual connection around."""

    def __init__(self, C: int, H: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attention = Attention(C, H, dropout)
        up, down, gelu = nn.Linear(C, 4 * C), nn.Linear(4 * C, C), nn.GELU(approximate="tanh")
        self.network = nn.Sequential(OrderedDict(up=up, gelu=gelu, down=down, dropout=nn.Dropout(dropout)))

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
        """ids, targets (B, T) int64 -> mean loss in nats per token."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def load_weights(model: GPT, leaves) -> None:
    """Copy baby_xp's parameters, (path, array) pairs, into the model. Raises RuntimeError if they do not fit.

    A gain is called weight in PyTorch, and the weight of a linear layer is transposed.
    """
    linear, state = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}, {}
    for path, array in leaves:
        owner, _, name = path.rpartition(".")
        tensor = torch.from_numpy(array.T if name == "weight" and owner in linear else array)
        state[f"{owner}.{'weight' if name == 'gain' else name}"] = tensor
    model.load_state_dict(state)


class Decoder:
    """Texts that grow together, and the keys and values of their window, with room for a whole context."""

    def __init__(self, workload: Workload, B: int, num_tokens: int, backend: str):
        """B texts that begin with the prompts of a workload, with room for num_tokens more."""
        spec, self.device, prompts = workload.model(0.0), device_of(backend), peers.prompts_of(workload, B)
        model = GPT(spec.config, workload.vocab_size).eval()
        load_weights(model, tree.leaves(spec.layout.unpack(np, peers.generation_weights(spec))))
        self.model, self.n_ctx, T = model.to(self.device), workload.n_ctx, prompts.shape[1]
        self.text = torch.zeros(B, T + num_tokens, dtype=torch.int64, device=self.device)
        self.text[:, :T] = torch.from_numpy(prompts)
        self.length, self.start, self.cached = T, 0, 0
        shape = 2, B, workload.n_heads, self.n_ctx, workload.n_emb // workload.n_heads
        self.caches = [torch.zeros(shape, device=self.device) for _ in model.blocks]

    def logits(self) -> torch.Tensor:
        """(B, V) after the last token. Computes what is new in the window; all of it where the window moved."""
        start = window_start(self.length, self.n_ctx)
        if start != self.start:
            self.start, self.cached = start, 0
        new = self.text[:, start + self.cached : self.length]
        t, self.cached = self.cached, self.length - start
        x = self.model.wte(new) + self.model.wpe.weight[t : self.cached]
        for block, cache in zip(self.model.blocks, self.caches, strict=True):
            x = x + attend(block.attention, block.norm1(x), cache, t)
            x = x + block.network(block.norm2(x))
        return self.model.lm_head(self.model.ln_f(x[:, -1]))

    def append(self, ids: torch.Tensor) -> None:
        """Append ids (B,) to the texts."""
        self.text[:, self.length] = ids
        self.length += 1

    def draw(self, num_tokens: int) -> Iterator[np.ndarray]:
        """Yield ids (B,) on the host num_tokens times, drawn from the softmax. Needs inference mode."""
        for _ in range(num_tokens):
            ids = torch.multinomial(F.softmax(self.logits(), dim=-1), 1)[:, 0]
            self.append(ids)
            yield ids.cpu().numpy()


def attend(attention, x, cache, t: int):
    """Queries of the new tokens with the keys of all; x (B, n, C), cache (2, B, H, n_ctx, D), t tokens in it."""
    B, n, C = x.shape
    qkv = attention.qkv(x).view(B, n, 3, attention.H, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, n, D)
    cache[:, :, :, t : t + n] = qkv[1:]
    k, v = cache[:, :, :, : t + n].unbind()
    # several tokens are only ever computed at once where the window begins: the mask is the plain triangle
    y = F.scaled_dot_product_attention(qkv[0], k, v, is_causal=n > 1)
    return attention.out(y.transpose(1, 2).reshape(B, n, C))
