"""A probe: a training step captured as a CUDA graph, and replayed with one launch.

CuPy's own calls of cuBLAS refuse to be captured, so the products are those of nvmath-python's bindings, with a
handle and a workspace of their own. All work goes to one stream, all memory comes from a pool that lives as long
as the graph: a replay writes to the addresses of the capture. At its end, the new state is copied over the old.

The probe compares the replayed steps with plain ones, bit by bit, and reports the time of both. What it measures
on a GPU decides whether the CuPy backend's `compile` becomes this.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from baby_xp.arrays import params
from baby_xp.arrays.registry import load
from baby_xp.text.batches import Batch
from baby_xp.training.step import initial_state, make_step, on_device
from bench import harness
from bench.peers import SEED
from bench.workloads import WORKLOADS, Workload

COMPARED = 10
"""Steps whose losses are compared."""
WORKSPACE = 32 * harness.MIB
"""Bytes for cuBLAS, which must not allocate any while a graph is captured."""
CHANGING = ("params", "m", "v", "step")
"""What a step changes of the state."""


class Captured:
    """The step as a graph: call it with a batch of the host; `state` and `metrics` are always the same arrays."""

    def __init__(self, backend: Any, step: Any, state: dict[str, Any], batch: Batch):
        import cupy
        from nvmath.bindings import cublas

        self._stream, self._pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
        handle, before = cublas.create(), backend.products.gemm
        backend.synchronize()
        with self._stream, cupy.cuda.using_allocator(self._pool.malloc):
            self._workspace = cupy.empty((WORKSPACE,), dtype=np.uint8)
            cublas.set_stream(handle, self._stream.ptr)
            cublas.set_workspace(handle, self._workspace.data.ptr, WORKSPACE)
            self.state = {name: backend.xp.asarray(array, copy=True) for name, array in state.items()}
            self._batch = backend.to_device(packed(batch))
            backend.products.gemm = functools.partial(cublas.gemm_strided_batched_ex, handle)
            try:
                for _ in range(2):  # compiles the kernels, and fills the pool with blocks of all sizes
                    step(self.state, self._views(batch))
                self._stream.synchronize()
                self._stream.begin_capture()
                new, self.metrics = step(self.state, self._views(batch))
                for name in CHANGING:
                    self.state[name][...] = new[name]
                self._graph = self._stream.end_capture()
            finally:
                backend.products.gemm = before

    def __call__(self, batch: Batch) -> None:
        with self._stream:
            self._batch.set(packed(batch))
            self._graph.launch(self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def _views(self, batch: Batch) -> Batch:
        ends = np.cumsum([part.size for part in batch]).tolist()
        views = (self._batch[end - part.size : end] for part, end in zip(batch, ends, strict=True))
        return Batch(*(view.reshape(part.shape) for view, part in zip(views, batch, strict=True)))


def packed(batch: Batch) -> np.ndarray:
    """All parts of a batch, one after the other."""
    return np.concatenate([part.reshape(-1) for part in batch])


def probe(workload: Workload, precision: str, steps: int, rounds: int) -> dict[str, Any]:
    """Losses, last parameters and times of plain steps and of replayed ones."""
    backend = load("cupy", **({"tf32": True} if precision == "tf32" else {}))
    model, batches = workload.model(workload.dropout), workload.batches(max(COMPARED, steps))
    config = workload.training(COMPARED + 1)
    step = backend.compile(make_step(backend.xp, model, config))
    first = initial_state(backend, params.draw(model.spec, SEED), params.decay_mask(model.spec), SEED)
    captured, state = Captured(backend, step, first, batches[0]), first
    losses: dict[str, list[float]] = {"plain": [], "graph": []}
    for batch in batches[:COMPARED]:
        state, metrics = step(state, on_device(backend, batch))
        losses["plain"].append(float(backend.to_numpy(metrics["loss"])[0]))
        captured(batch)
        captured.synchronize()
        losses["graph"].append(float(backend.to_numpy(captured.metrics["loss"])[0]))
    found, expected = (backend.to_numpy(one["params"]) for one in (captured.state, state))

    def plain_steps() -> None:
        now = state
        for batch in batches[:steps]:
            now, _ = step(now, on_device(backend, batch))
        backend.synchronize()

    def replayed_steps() -> None:
        for batch in batches[:steps]:
            captured(batch)
        captured.synchronize()

    ms: dict[str, list[float]] = {"plain": [], "graph": []}
    for _ in range(rounds):
        for name, run in (("plain", plain_steps), ("graph", replayed_steps)):
            begin = time.perf_counter()
            run()
            ms[name].append(1e3 * (time.perf_counter() - begin) / steps)
    return {
        "workload": workload.name, "precision": precision, "backend": backend.version, "device": backend.device,
        "ms": ms, "median_ms": {name: statistics.median(times) for name, times in ms.items()}, "losses": losses,
        "same_bits": bool(found.tobytes() == expected.tobytes() and losses["plain"] == losses["graph"]),
        "largest_difference": float(np.max(np.abs(found - expected))),
    }  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """What the probe found, in one line."""
    plain, graph = result["median_ms"]["plain"], result["median_ms"]["graph"]
    same = "the same bits" if result["same_bits"] else f"parameters differ by {result['largest_difference']:.1e}"
    what = f"{result['workload']} in {result['precision']} on {result['device']}"
    return f"{what}: plain {plain:.3f} ms a step, graph {graph:.3f} ms, {graph / plain:.2f} of it; {same}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser("bench.graph", __doc__ or "", steps=100, rounds=5, out=None)
    workloads = harness.names_of(WORKLOADS, "workload")
    parser.add_argument("--workloads", type=workloads, default="W1", help="(%(default)s)")
    precisions = harness.names_of(("float32", "tf32"), "precision")
    parser.add_argument("--precision", type=precisions, default="float32,tf32", help="(%(default)s)")
    return parser.parse_args()


def main() -> int:
    """Probe the workloads that the command line names. Exit code 1 if replayed steps learn something else."""
    asked, wrong = parse(), 0
    for name in asked.workloads:
        for precision in asked.precision:
            result = probe(WORKLOADS[name], precision, asked.steps, asked.rounds)
            print(report(result), flush=True)
            wrong += not np.allclose(*result["losses"].values(), rtol=1e-3)
            if asked.out is not None:
                asked.out.mkdir(parents=True, exist_ok=True)
                file: Path = asked.out / f"graph-{name}-{precision}.json"
                file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
