"""Refuses runs that do not fit this machine, before they start.

Only arrays that certainly exist are counted, and compared with the free memory: without a limit, the system kills
this process or another one when memory runs out. A run takes more in all, and `estimate` measures it. A GPU knows
its own memory, see backend.py.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from baby_xp import layout
from baby_xp.arrays.backend import Backend
from baby_xp.config import EquationConfig, EquationData, ModelConfig, RunConfig
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.resources import counts, process_memory
from baby_xp.text.batches import EpochWindows

MOST_PARAMETERS = 2**40
"""More than fit any machine, and few enough that no size in bytes overflows."""
MOST_CHARACTERS = 2**25
"""The most characters of all equations, each padded to the context: they are made at once, in some seconds."""
BATCH_BYTES = 16
"""Per token of a step's batch: input and target, on the host and on the backend, int32 each."""
PROCESS_BYTES = 10 * 2**20
"""The minimum per worker, for Python and NumPy."""


def check_size(model: Model) -> None:
    """Raises BabyError for a model that is too large for any machine."""
    if model.n_parameters > MOST_PARAMETERS:
        raise BabyError(f"{model.n_parameters:,} parameters are too many for any machine; choose a smaller model")


def check_context(config: RunConfig) -> None:
    """Raises BabyError for equations that are padded to a huge context."""
    data, n_ctx = config.data, config.model.n_ctx
    if isinstance(data, EquationData):
        most = MOST_CHARACTERS // (len(data.operators) * 10 ** (2 * data.digits))
        if n_ctx > most:
            whole = data.table.longest
            raise BabyError(f"n_ctx must be at most {most}, not {n_ctx}; {whole} tokens hold every equation")


def check_training(config: RunConfig, model: Model, backend: Backend, batches: Any, workers: int) -> None:
    """Raises BabyError for a run on NumPy that this machine's memory cannot hold.

    batches: those of training. workers: processes that share a step.
    """
    check_size(model)
    room = _room(backend)
    if room is None:
        return
    sequences = batches.batch_size
    if isinstance(batches, EpochWindows):
        sequences = min(sequences, batches.n_windows)  # a batch is never larger than an epoch
    together, itemsize = min(config.train.batch_size, sequences), np.dtype(config.train.dtype).itemsize
    sizes = model.vocab_size, together, min(workers, together), itemsize
    parts = counts.arrays(config.model, *sizes, backend.xp.tokens_at_once)
    parts["batch"] = BATCH_BYTES * sequences * config.model.n_ctx
    if workers > 1:
        parts["processes"] = (workers - 1) * PROCESS_BYTES
        # the shared buffers have room for a whole batch, even if there are fewer sequences
        parts["batch"] += BATCH_BYTES // 2 * config.train.batch_size * config.model.n_ctx
    if (taken := sum(parts.values())) > room:
        lower = _to_lower(parts, config.model)
        raise BabyError(f"this training needs {_too_much(taken, room)}: lower {lower}")


def check_batch(model: Model, batch: int, tokens: int) -> None:
    """Raises BabyError for a batch that `check` cannot compute at once, in float64 and without tiles."""
    room, config = process_memory.free(), model.config
    if room is None or isinstance(config, EquationConfig):  # a table of equations is small
        return
    one = counts.gpu_bytes(replace(config, n_ctx=tokens), model.vocab_size, 1, 8)
    fixed = 6 * 8 * model.n_parameters  # parameters twice, two gradients, and the trees they are packed from
    if fixed + batch * one > room:
        most = max(0, room - fixed) // one
        advice = f"choose a batch of at most {most:,}" if most else "use a machine with more memory"
        raise BabyError(f"a check of {batch:,} sequences needs {_too_much(fixed + batch * one, room)}: {advice}")


def check_texts(model: Model, backend: Backend, number: int) -> None:
    """Raises BabyError for more texts than can be generated together."""
    room = _room(backend)
    if room is None:
        return
    itemsize, multiple = np.dtype(backend.dtype).itemsize, backend.xp.cache_multiple
    one = counts.cache_bytes(model.config, itemsize, multiple) + 2 * 8 * model.vocab_size
    if number * one > room:
        raise BabyError(
            f"{number:,} texts at once need {_too_much(number * one, room)}: ask for at most {room // one:,}"
        )


def _room(backend: Backend) -> int | None:
    return process_memory.free() if backend.name == "numpy" else None


def _too_much(size: int, room: int) -> str:
    return f"at least {layout.size(size)}, and this machine has {layout.size(room)} free"


def _to_lower(parts: dict[str, int], config: ModelConfig) -> str:
    """The settings that determine most of the memory."""
    largest = max(parts, key=lambda kind: parts[kind])
    if largest == "batch":
        return "--batch-size or --accumulate"
    if largest in ("processes", "buffers shared by workers"):
        return "--workers"
    if isinstance(config, EquationConfig):
        return "--n-ctx, --n-emb or --n-hidden"
    return "--n-ctx, --n-emb, --head-size or --n-layers"
