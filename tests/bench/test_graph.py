"""The probe of CUDA graphs, on fake_cupy.py's machine: whether a replayed step is a step."""

import json
import sys
from unittest import mock

import fake_cupy
import numpy as np
import pytest

from bench import graph
from bench.workloads import Workload

pytestmark = pytest.mark.skipif(fake_cupy.compiler() is None, reason="no C++ compiler to run the kernels with")

SMALL = Workload("W1", "W1, smaller", 17, 4, 8, 2, 1, 2, 0.1, 2, 1)


@pytest.fixture
def machine(monkeypatch):
    """A machine whose GPU the CPU plays, in place of any real CuPy."""
    machine = fake_cupy.Machine()
    monkeypatch.setitem(sys.modules, "nvmath", mock.Mock())
    monkeypatch.setattr(graph, "COMPARED", 3)
    for name, module in fake_cupy.modules(machine).items():
        monkeypatch.setitem(sys.modules, name, module)
    return machine


def test_replayed_steps_are_steps_bit_for_bit(machine):
    result = graph.probe(SMALL, "float32", 2, 1)
    assert result["same_bits"]
    assert result["losses"]["graph"] == result["losses"]["plain"]
    assert len(set(result["losses"]["plain"])) == graph.COMPARED  # they learn, from batch to batch
    assert set(result["median_ms"]) == {"plain", "graph"}
    assert "the same bits" in graph.report(result)


def test_other_bits_are_reported_with_the_difference(machine, monkeypatch):
    monkeypatch.setattr(graph, "CHANGING", ("params", "m", "step"))
    result = graph.probe(SMALL, "float32", 1, 1)
    assert not result["same_bits"]
    assert "parameters differ by" in graph.report(result)


def test_the_command_keeps_each_result(machine, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(graph.WORKLOADS, "W1", SMALL)
    monkeypatch.setattr(sys, "argv", ["bench.graph", "--steps", "1", "--rounds", "1", "--out", str(tmp_path)])
    assert graph.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    kept = json.loads((tmp_path / "graph-W1-tf32.json").read_text("utf-8"))
    assert np.isfinite(kept["losses"]["graph"]).all()


def test_a_call_of_cupys_cublas_ends_a_capture(machine):
    """So the probe's products must all go through nvmath-python."""
    backend = fake_cupy.backend(machine)
    ones, stream = backend.asarray(np.ones((2, 2))), sys.modules["cupy"].cuda.Stream(non_blocking=True)
    stream.begin_capture()
    with pytest.raises(fake_cupy.CUDARuntimeError):
        backend.xp.product(ones, ones)
