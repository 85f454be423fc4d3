"""Helpers of the benchmark tests: a tiny workload, runs as child processes return them, command lines."""

import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import harness, peers, results, workloads

ROOT = Path(__file__).parents[1]
FAILURE = "bench: a child process ended with exit code 1"
MACHINE = {"vendor": "A", "processor": "A 1", "cores": 2, "vectors": "AVX2", "blas": "b 1 K", "system": "Linux x",
           "python": "3", "gpu": "NVIDIA H200, 139 GiB"}  # fmt: skip
RATE = {"alone": 45.0, "two at once": 44.0, "best": 50.0}
TINY = workloads.Workload("tiny", "for tests", 11, 8, 16, 2, 2, 3, 0.0, 2, 1)
TINY_FIELDS = asdict(TINY)
MIB = 2**20


def run(*ms: float, peak: int | None = None, used: int | None = None, backend: str = "numpy 1") -> dict:
    """A round of one library. used: MiB of the GPU, of which twice as many are held."""
    return {
        "ms": list(ms),
        "memory": [] if peak is None else [{"peak": peak, "shared": 0}],
        "about": {"backend": backend, "workers": "1"},
        "gpu_memory": {} if used is None else {"used": used * MIB, "held": 2 * used * MIB},
    }


def result(backend: str, rooflines: dict, **runs) -> dict:
    """A race of W1 as bench.train keeps it: 400 Mflop and 1 GB per step, two cores at 50 Gflop/s."""
    race = {
        "workload": "W1", "precision": "float32", "flops": 400_000_000, "bytes": 10**9, "runs": runs, "failed": {},
    }  # fmt: skip
    return {
        "date": "2026-01-02T03:04:05+00:00", "machine": MACHINE, "removed_variables": [], "backend": backend,
        "product_rate_before": RATE, "product_rate_after": {**RATE, "best": 48.0}, "rooflines": rooflines,
        "races": [race],
    }  # fmt: skip


def answering(monkeypatch, function) -> None:
    """Child processes are replaced by a function; no rates are measured and every peer is available."""
    special = {"bench.harness:machine": MACHINE, "bench.peers.ours:idle": [{"peak": 1, "shared": 0}]}
    answer = lambda task, **request: special[task] if task in special else function(task, **request)  # noqa: E731
    monkeypatch.setattr(harness, "ask", answer)
    monkeypatch.setattr(results, "product_rate", lambda: RATE)
    monkeypatch.setattr(peers, "missing", lambda peer, backend: None)


def nothing(*arguments, **options):
    """Replaces a function that must not be called."""
    pytest.fail("something was measured")


def says(monkeypatch, program, *words: str) -> int:
    """The exit code of a program with these arguments."""
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    try:
        return program.main()
    except SystemExit as end:
        return end.code


def parsed(monkeypatch, program, *words: str):
    """What a program makes of its command line."""
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    return program.parse()


def numbers(text: str) -> list[float]:
    """The numbers that stand by themselves in a line, in order."""
    return [float(one.replace(",", "")) for one in re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?![\w.-]*\w)", text)]
