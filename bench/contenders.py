"""Who is measured: baby_xp and its peers. Each trains for some steps and tells when each step began.

    contender(workload, dropout, batches, **options) -> Outcome

`batches` is a Clock: a contender asks it for the batch of each step, and it notes the time. All train on the
same batches from the same first weights by the same rule, then measure the loss of the first batch once more.
"""

import importlib.util
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np

import baby_xp
from baby_xp import backend as backends
from baby_xp import memory, params, tree
from baby_xp.api import Silent
from baby_xp.task import Task
from baby_xp.text.batches import Batch
from baby_xp.training.checkpoint import first
from baby_xp.training.loop import READ_EVERY, fit
from baby_xp.training.stop import Stop
from baby_xp.training.workers import Workers, suitable_number
from bench import precision as precisions
from bench import processes
from bench.workloads import Workload, on_gpu

SEED = 0


class Clock:
    """Batches that were drawn before, and the time in seconds at which each was asked for.

    Every so many steps it waits for the device first: only these times are those of whole steps. A contender
    says in `wait` how to wait.
    """

    def __init__(self, batches: list[Batch], every: int = 1):
        self.batches, self.every, self.marks = batches, every, []
        self.wait: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, step: int) -> Batch:
        """The batch of a step; called once a step, at its beginning."""
        if step % self.every == 0:
            self.wait()
        self.marks.append(time.perf_counter())
        return self.batches[step]


@dataclass
class Outcome:
    """What a contender did."""

    losses: list[float]
    """Nats a token: the last mean that training showed, and that of the first batch after the last step."""
    about: dict[str, str]
    """Versions, threads or workers, BLAS kernel: what a reader must know to read the time."""
    memory: list[dict[str, int]] = field(default_factory=list)
    """What memory.taken told while all of its processes lived."""
    gpu_memory: dict[str, int] = field(default_factory=dict)
    """Peak bytes of the GPU's memory in use, and held by the library; empty on a CPU."""


def train_baby_xp(
    workload: Workload,
    dropout: float,
    batches: Clock,
    backend: str = "numpy",
    workers: int | None = None,
    precision: str = "float32",
) -> Outcome:
    """What the command `train` does between reading the text and writing the files: training.loop.fit.

    workers: None for the number that `train` would choose.
    """
    loaded = backends.load(backend, None, "float32", **precisions.load_options(precision))
    model, batches.wait = workload.model(dropout), loaded.synchronize
    number = workers or suitable_number(loaded, model, workload.batch_size)
    task, config = _task(batches), workload.training(len(batches))
    pool = Workers(loaded, model, workload.batch_size, number) if number > 1 else nullcontext()
    with pool as running:
        start = first(model, config)
        result = fit(loaded, model, config, task, start, Silent(), lambda checkpoint: None, Stop(), running)
        taken = memory.taken([child.pid for child in running.children] if running else [])
    last = result.checkpoint.progress["records"][-1]
    about = {
        "baby_xp": baby_xp.__version__, "backend": loaded.version, "device": loaded.device,
        "workers": str(number), "blas": processes.blas(),
    }  # fmt: skip
    if hasattr(loaded, "details"):
        about = {**about, "details": loaded.details()}
    losses = [last["train_loss"], last["val_loss"]]
    return Outcome(losses, about, taken, gpu_memory_of(loaded))


def gpu_memory_of(loaded) -> dict[str, int]:
    """Peak bytes of the GPU's memory in use and held; {} for a backend without memory of its own."""
    found = backends.memory(loaded)
    return {} if found is None else {"used": found.peak_used, "held": found.peak_held}


def _task(batches: Clock) -> Task:
    """Train on the batches, be measured on the first of them. No tokenizer: there is no text."""
    first = batches.batches[0]
    return Task("bench", None, batches, len(batches), lambda: iter([first]), first.targets.size, {})


def train_torch(
    workload: Workload,
    dropout: float,
    batches: Clock,
    backend: str = "numpy",
    precision: str = "float32",
    compiled: str | None = None,
) -> Outcome:
    """PyTorch in eager mode or compiled, on all cores, or on the GPU where baby_xp is on it.

    compiled: a mode of torch.compile, None for eager mode.
    """
    import torch

    from bench import torch_gpt

    device = torch.device("cuda" if on_gpu(backend) else "cpu")
    torch.set_num_threads(processes.cores())
    precisions.set_torch(torch, precision)
    if device.type == "cuda":
        batches.wait = torch.cuda.synchronize
    config, spec = workload.training(len(batches)), workload.model(dropout)
    model = torch_gpt.GPT(spec.config, workload.vocab_size)
    torch_gpt.load_weights(model, tree.leaves(first_weights(spec)))
    optimizer = torch_gpt.optimizer(model.to(device), config)
    if compiled:
        model = torch.compile(model, mode=compiled)
    unread, shown = [], 0.0

    def loss_of(batch):
        with precisions.autocast(torch, device.type, precision):
            return model(*_on_device(torch, batch, device))

    for step in range(len(batches)):
        loss = loss_of(batches.batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        unread.append(loss.detach().clone())  # a captured graph writes the next loss to the same place
        if len(unread) == READ_EVERY or step + 1 == len(batches):
            shown, unread = torch.stack(unread).mean().item(), []
    with torch.no_grad():
        model.eval()
        last = loss_of(batches.batches[0]).item()
    return Outcome([shown, last], about_torch(torch, device), memory.taken(), torch_gpu_memory(torch, device))


def about_torch(torch, device) -> dict[str, str]:
    """What a reader must know to read PyTorch's times."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return {"torch": torch.__version__, "cuda": str(torch.version.cuda), "device": f"{device} ({name})"}
    return {
        "torch": torch.__version__, "device": str(device), "threads": str(torch.get_num_threads()),
        "blas": torch_blas(torch),
    }  # fmt: skip


def torch_gpu_memory(torch, device) -> dict[str, int]:
    """Peak bytes of the GPU's memory since the process began; {} on a CPU."""
    if device.type != "cuda":
        return {}
    return {"used": torch.cuda.max_memory_allocated(device), "held": torch.cuda.max_memory_reserved(device)}


def train_torch_compile(
    workload: Workload, dropout: float, batches: Clock, backend: str = "numpy", precision: str = "float32"
) -> Outcome:
    """PyTorch with the model compiled."""
    return train_torch(workload, dropout, batches, backend, precision, compiled="default")


def train_torch_compile_graphs(
    workload: Workload, dropout: float, batches: Clock, backend: str = "numpy", precision: str = "float32"
) -> Outcome:
    """PyTorch with the model compiled, forward and backward as captured graphs."""
    return train_torch(workload, dropout, batches, backend, precision, compiled="reduce-overhead")


def train_jax(
    workload: Workload, dropout: float, batches: Clock, backend: str = "numpy", precision: str = "float32"
) -> Outcome:
    """JAX with autodiff and one jitted step, on all cores, or on the GPU where baby_xp is on it."""
    import jax

    from bench import jax_gpt

    if on_gpu(backend):
        precisions.set_jax(jax, precision)
        batches.wait = lambda: unread and unread[-1].block_until_ready()
    config, spec = workload.training(len(batches)), workload.model(dropout)
    step, state = jax_gpt.make_step(spec.config, config), jax_gpt.first_state(first_weights(spec), SEED)
    unread, shown = [], 0.0
    for number in range(len(batches)):
        batch = batches.batch(number)
        state, loss = step(state, batch.inputs, batch.targets)
        unread.append(loss)
        if not on_gpu(backend):
            loss.block_until_ready()  # else a step would seem to end when it was asked for
        if len(unread) == READ_EVERY or number + 1 == len(batches):
            shown, unread = float(sum(unread)) / len(unread), []  # waits for the device
    loss_of, first_batch = jax.jit(jax_gpt.loss, static_argnums=1), batches.batches[0]
    last = float(loss_of(state["params"], spec.config, first_batch.inputs, first_batch.targets))
    about = {"jax": jax.__version__, "device": str(jax.devices()[0])}
    return Outcome([shown, last], about, memory.taken())


def first_weights(model) -> dict:
    """The tree of first weights that baby_xp's fit draws, host arrays."""
    return model.layout.unpack(np, params.draw(model.spec, SEED))


def _on_device(torch, batch: Batch, device):
    parts = (torch.from_numpy(part).to(torch.int64) for part in (batch.inputs, batch.targets))
    if device.type == "cuda":  # from pinned memory a copy does not make Python wait
        return (part.pin_memory().to(device, non_blocking=True) for part in parts)
    return parts


def torch_blas(torch) -> str:
    """PyTorch links its BLAS in, where threadpoolctl cannot see it: what PyTorch itself says."""
    library = "MKL" if torch.backends.mkl.is_available() else "BLAS of its build"
    return f"{library}, {torch.backends.cpu.get_cpu_capability()}"


PEERS = {"torch": train_torch, "torch.compile": train_torch_compile, "jax": train_jax}
"""Those that are measured unless others are named."""
MORE_PEERS = {"torch.compile-graphs": train_torch_compile_graphs}
CONTENDERS = {"baby_xp": train_baby_xp, **PEERS, **MORE_PEERS}
LACKING = {"baby_xp": ("half",), "jax": ("half",)}
"""Precisions that a contender is not measured in."""


def missing(peer: str, backend: str) -> str | None:
    """Why a peer cannot be measured here, or None."""
    if peer in MORE_PEERS and not on_gpu(backend):
        return f"{peer} is for a GPU: it is left out"
    library = library_of(peer)
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed: {peer} is left out (pip install {library})"
    if not on_gpu(backend):
        if peer == "torch.compile" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return f"no C++ compiler is installed, which {peer} needs: it is left out"
        return None
    # asked in a process of its own: JAX would take most of the GPU's memory, and keep it until this one ends
    works = processes.ask("sees_gpu", library=library)["works"]
    return None if works else f"this {library} sees no GPU: {peer} is left out"


def sees_gpu(library: str) -> bool:
    """Whether torch or jax can compute on a GPU."""
    if library == "jax":
        import jax

        return jax.default_backend() == "gpu"
    import torch

    return torch.cuda.is_available()


def present(peers: list[str], backend: str, program: str) -> list[str]:
    """Those of the peers that can be measured here; of each other one a line says why not."""
    reasons = {peer: missing(peer, backend) for peer in peers}
    for reason in filter(None, reasons.values()):
        print(f"{program}: {reason}", file=sys.stderr)
    return [peer for peer in peers if not reasons[peer]]


def library_of(peer: str) -> str:
    """What a peer needs installed: its name begins with it, as in "torch.compile" and "torch-1-thread"."""
    return re.split("[.-]", peer)[0]


def steps_to_a_reading(backend: str) -> int:
    """Steps between two moments at which training waits for its device: 1 where every call waits."""
    return 1 if backend in ("numpy", "torch", "array-api-strict") else READ_EVERY


def versions() -> dict[str, str]:
    """What all contenders share."""
    return {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
