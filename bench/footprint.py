"""The memory of a training step, from inside a process: what is needed, and what is there at the peak."""

import linecache
import os
import sys
import tracemalloc
from collections import Counter

import numpy as np

from baby_xp import backend as backends
from baby_xp import memory, params
from baby_xp.layers import cross_entropy
from baby_xp.training.step import initial_state, step_noise
from bench import processes
from bench.contenders import SEED, Clock, train_baby_xp
from bench.workloads import WORKLOADS

FRAMES = 8
"""Depth of the tracebacks that are kept: enough to get from NumPy back into a line of ours."""
CLOSE = 0.99
"""Share of the highest sum seen from which on a moment counts as the peak."""


def baseline() -> dict:
    """Memory of a process that imports baby_xp, makes the backend and does nothing."""
    backends.load("numpy")
    return {"memory": memory.taken()}


def needed(workload: str) -> dict[str, int]:
    """Bytes of the arrays that a training step cannot do without, by kind.

    saved: the distinct arrays that `forward` keeps for `backward`. A view counts as the array it belongs to,
    since it keeps the whole of that alive; parameters and the batch do not count again.
    """
    chosen = WORKLOADS[workload]
    backend, model, (batch,) = backends.load("numpy"), chosen.model(chosen.dropout), chosen.batches(1)
    xp, flat = backend.xp, params.draw(model.spec, SEED)
    state = initial_state(backend, flat, params.decay_mask(model.spec), SEED)
    noise = step_noise(xp, model, state["seed"], state["step"], batch)
    logits, saved = model.forward(xp, model.layout.unpack(xp, state["params"]), batch.inputs, noise)
    _, loss_saved = cross_entropy.forward(xp, {}, logits, batch.targets.reshape(-1))
    elsewhere = owners((state["params"], *batch))
    kept = {key: size for key, size in owners((saved, loss_saved)).items() if key not in elsewhere}
    return {
        "parameters": state["params"].nbytes,
        "moments": state["m"].nbytes + state["v"].nbytes,
        "decays": state["decays"].nbytes,
        "gradients": flat.nbytes,
        "saved": sum(kept.values()),
    }


def owners(value) -> dict[int, int]:
    """Bytes of each distinct array in nested tuples, lists and dicts, by the identity of what owns it."""
    if isinstance(value, np.ndarray):
        while isinstance(value.base, np.ndarray):
            value = value.base
        return {id(value): value.nbytes}
    found: dict[int, int] = {}
    if isinstance(value, tuple | list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            found.update(owners(one))
    return found


def traced(workload: str, steps: int, top: int) -> dict:
    """What Python's allocations add up to at the peak of a run in one process, and the lines that hold most.

    The run is done twice, as only at its end is it known how high the peak was: every run of the same seed
    allocates alike.
    """
    tracemalloc.start(FRAMES)
    first = _watched(workload, steps, threshold=float("inf"))
    peak = tracemalloc.get_traced_memory()[1]
    second = _watched(workload, steps, threshold=CLOSE * first.highest)
    return {"peak": peak, "between_lines": first.highest, "lines": _lines(second.snapshot, top)}


class Watch:
    """A trace function that looks at the traced memory (bytes) before every line of Python.

    What lives only within a line is not seen.
    """

    def __init__(self, threshold: float):
        self.threshold, self.highest, self.snapshot = threshold, 0, None

    def __call__(self, frame, event, argument):
        now = tracemalloc.get_traced_memory()[0]
        self.highest = max(self.highest, now)
        if now >= self.threshold and self.snapshot is None:
            sys.settrace(None)
            self.snapshot = tracemalloc.take_snapshot()
        return None if self.snapshot else self


def _watched(workload: str, steps: int, threshold: float) -> Watch:
    chosen, watch = WORKLOADS[workload], Watch(threshold)
    batches = Clock(chosen.batches(steps))
    sys.settrace(watch)
    try:
        train_baby_xp(chosen, chosen.dropout, batches, workers=1)
    finally:
        sys.settrace(None)
    return watch


def _lines(snapshot, top: int) -> list[dict]:
    """The lines of ours that allocated most of what lives: file, line, code, bytes, blocks."""
    sizes, blocks = Counter(), Counter()
    for trace in snapshot.traces:
        place = _ours(trace.traceback)
        sizes[place] += trace.size
        blocks[place] += 1
    return [
        {
            "file": os.path.relpath(file, processes.ROOT), "line": line,
            "code": linecache.getline(file, line).strip(), "bytes": size, "blocks": blocks[file, line],
        }
        for (file, line), size in sizes.most_common(top)
    ]  # fmt: skip


def _ours(traceback) -> tuple[str, int]:
    """The innermost frame in this checkout, or the innermost at all."""
    frames, root = list(traceback)[::-1], str(processes.ROOT)
    for frame in frames:
        # a virtual environment may lie in the checkout
        if frame.filename.startswith(root) and "site-packages" not in frame.filename:
            return frame.filename, frame.lineno
    return frames[0].filename, frames[0].lineno


TASKS = {"baseline": baseline, "needed": needed, "traced": traced}
