"""Who generates: baby_xp and its peers. Each continues the same prompts from the same weights.

generator(workload, batch, num_tokens, backend) -> Outcome, milliseconds of each step but the first
"""

import itertools
import time

import numpy as np

import baby_xp
from baby_xp import backend as backends
from baby_xp import generate as ours
from baby_xp import memory, params, tree
from baby_xp.models import Model
from bench import contenders, processes
from bench.contenders import SEED, Outcome
from bench.workloads import Workload

Timed = tuple[Outcome, list[float]]
SPREAD = 5.0
"""Factor on first weights. As they are drawn, attention hardly sways the logits, and the check whether two models
agree would miss a fault in it; no step's time depends on it."""


def weights_of(model: Model) -> np.ndarray:
    """The weights that all generate with, (P,) on the host."""
    return params.draw(model.spec, SEED) * np.where(params.decay_mask(model.spec) > 0, SPREAD, 1).astype("float32")


def prompts_of(workload: Workload, batch: int) -> np.ndarray:
    """One token a text, (B, 1): all the rest is generated."""
    return np.random.default_rng(SEED).integers(0, workload.vocab_size, (batch, 1))


def generate_baby_xp(workload: Workload, batch: int, num_tokens: int, backend: str = "numpy") -> Timed:
    """What the command `generate` calls, drawing from the whole distribution."""
    loaded = backends.load(backend)
    ms = timed(_texts(loaded, workload, batch, num_tokens, ours.Sampling(seed=SEED)))
    about = {
        "baby_xp": baby_xp.__version__, "backend": loaded.version, "device": loaded.device,
        "blas": processes.blas(),
    }  # fmt: skip
    return Outcome([], about, memory.taken()), ms


def greedy(workload: Workload, batch: int, num_tokens: int, backend: str = "numpy") -> np.ndarray:
    """baby_xp's likeliest tokens (num_tokens, B)."""
    return np.array(list(_texts(backends.load(backend), workload, batch, num_tokens, ours.Sampling(greedy=True))))


def _texts(loaded, workload: Workload, batch: int, num_tokens: int, sampling):
    model, prompts = workload.model(0.0), prompts_of(workload, batch).tolist()
    weights = loaded.asarray(weights_of(model))
    return ours.generate_several(loaded, model, weights, prompts, num_tokens, sampling)


def generate_torch(
    workload: Workload, batch: int, num_tokens: int, backend: str = "numpy", threads: int | None = None
) -> Timed:
    """PyTorch in eager mode; threads: None for one a core."""
    import torch

    from bench import torch_generate

    torch.set_num_threads(threads or processes.cores())
    torch.manual_seed(SEED)
    with torch.inference_mode():
        decoder = _decoder(workload, batch, num_tokens, backend)
        ms = timed(torch_generate.generate(decoder, num_tokens))
    about = {
        "torch": torch.__version__, "device": str(decoder.device), "threads": str(torch.get_num_threads()),
        "blas": contenders.torch_blas(torch),
    }  # fmt: skip
    return Outcome([], about, memory.taken()), ms


def generate_torch_one_thread(workload: Workload, batch: int, num_tokens: int, backend: str = "numpy") -> Timed:
    """PyTorch on one core: a single token is too little work to share."""
    return generate_torch(workload, batch, num_tokens, backend, threads=1)


def torch_shortfalls(workload: Workload, text: np.ndarray, backend: str = "numpy") -> np.ndarray:
    """How far below PyTorch's largest logit each id of text (num_tokens, B) lies."""
    import torch

    from bench import torch_generate

    with torch.inference_mode():
        decoder = _decoder(workload, text.shape[1], text.shape[0], backend)
        return torch_generate.shortfalls(decoder, text)


def _decoder(workload: Workload, batch: int, num_tokens: int, backend: str):
    from bench import torch_generate, torch_gpt

    spec = workload.model(0.0)
    model = torch_gpt.GPT(spec.config, workload.vocab_size).eval()
    torch_gpt.load_weights(model, tree.leaves(spec.layout.unpack(np, weights_of(spec))))
    model = model.to("cuda" if backend == "cupy" else "cpu")
    return torch_generate.Decoder(model, prompts_of(workload, batch), num_tokens)


def timed(texts) -> list[float]:
    """Milliseconds from each yield to the next."""
    marks = [time.perf_counter() for _ in texts]
    return [1e3 * (end - begin) for begin, end in itertools.pairwise(marks)]


PEERS = {"torch": generate_torch, "torch-1-thread": generate_torch_one_thread}
GENERATORS = {"baby_xp": generate_baby_xp, **PEERS}
