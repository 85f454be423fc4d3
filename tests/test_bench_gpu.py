"""The measuring side of a GPU, as far as it can be tested without one: arithmetic, rules, and how it goes on."""

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from baby_xp import backend as backends
from baby_xp import counts
from baby_xp.config import GPTConfig
from baby_xp.presets import PRESETS

sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed
from bench import (
    arguments,
    ceiling,
    child,
    contenders,
    crossover,
    epoch,
    goals,
    gpu,
    precision,
    processes,
    report,
    scaling,
    train,
    workloads,
)

RATE = {"alone": 45.0, "two at once": 44.0, "best": 50.0}
TINY = workloads.Workload("tiny", "for tests", 11, 8, 16, 2, 2, 3, 0.0, 2, 1)
MIB = 2**20


def run(*ms: float, used: int | None = None) -> dict:
    """What a child process tells of one round; used: MiB of the GPU, of which twice as many are held."""
    memory = {} if used is None else {"used": used * MIB, "held": 2 * used * MIB}
    return {"ms": list(ms), "memory": [], "about": {"version": "1"}, "gpu_memory": memory}


def race(name: str = "W1", kind: str = "float32", **runs) -> dict:
    """2 Gflop and 1 GB a step."""
    return {
        "workload": name, "precision": kind, "flops": 2 * 10**9, "bytes": 10**9, "runs": runs, "failed": {},
    }  # fmt: skip


@pytest.fixture
def result() -> dict:
    """A race of W1 on a GPU whose products reach 1 Tflop/s and whose memory 250 GB/s: a floor of 4 ms."""
    machine = {"processor": "A 1", "cores": 2, "system": "Linux x", "python": "3", "gpu": "NVIDIA H200, 139 GiB"}
    rates = {"flops": 1e12, "bytes": 2.5e11, "n": 8192, "elements": 100, "device": "cuda:0 (H200)"}
    ours, theirs = [run(8, 8, used=10), run(10, 10, used=20)], [run(12, 12, used=40), run(12, 12, used=40)]
    return {
        "date": "2026-01-02T03:04:05+00:00", "machine": machine, "removed_variables": [], "backend": "cupy",
        "product_rate_before": RATE, "product_rate_after": RATE, "ceilings": {"float32": rates, "half": None},
        "races": [race(baby_xp=ours, torch=theirs)],
    }  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """No rates of the processor are measured."""
    monkeypatch.setattr(report, "product_rate", lambda: RATE)


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


# workloads ----------------------------------------------------------------------------------------------


def test_w5_is_gpt_2_small():
    model = workloads.WORKLOADS["W5"].model(0.0)
    # GPT-2's 124,439,808 parameters, with no bias on q, k, v, and a head with weights and a bias of its own
    assert model.n_parameters == 124_439_808 - 12 * 3 * 768 + 50257 * 768 + 50257
    assert workloads.WORKLOADS["W5"].tokens == 8 * 1024


def test_w5_is_measured_on_a_cpu_only_by_name(monkeypatch):
    names = lambda *words: [one.name for one in parsed(monkeypatch, train, *words).workloads]  # noqa: E731
    assert names() == ["W1", "W2", "W3", "W4"]
    assert names("--backend", "torch") == ["W1", "W2", "W3", "W4"]
    assert names("--backend", "cupy") == ["W1", "W2", "W3", "W4", "W5"]
    assert names("--workloads", "W5") == ["W5"]


def test_a_gpu_is_given_more_steps_and_a_longer_warm_up():
    for name, workload in workloads.WORKLOADS.items():
        assert workload.pace("numpy") == (workload.warmup, workload.steps), name
        warmup, steps = workload.pace("cupy")
        assert warmup >= 2 * contenders.READ_EVERY
        assert steps >= 3 * contenders.READ_EVERY


# precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tf32", "half", "float32,tf32"])
def test_coarser_precisions_are_for_a_gpu(monkeypatch, capsys, kind):
    assert says(monkeypatch, train, "--precision", kind) == 2
    assert "is for a GPU: --backend cupy" in capsys.readouterr().err.splitlines()[-1]
    assert parsed(monkeypatch, train, "--backend", "cupy", "--precision", kind).precision == kind.split(",")


def test_baby_xp_says_that_it_has_no_half_precision(capsys):
    assert train.able(["torch", "jax"], "half") == ["torch"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "bench.train: baby_xp has no half precision yet: it is left out there"
    assert len(told) == 2
    assert train.able(["torch", "jax"], "tf32") == ["baby_xp", "torch", "jax"]
    assert capsys.readouterr().err == ""


def test_tf32_is_switched_on_and_off_in_pytorch():
    torch = pytest.importorskip("torch")
    settings = lambda: (  # noqa: E731
        torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )  # fmt: skip
    for kind in ("tf32", "half", "tf32", "float32"):
        precision.set_torch(torch, kind)
        assert settings() == (("high", True, True) if kind == "tf32" else ("highest", False, False))


def test_jax_is_told_its_precision():
    jax = pytest.importorskip("jax")
    before = jax.config.jax_default_matmul_precision
    try:
        for kind, told in (("float32", "highest"), ("tf32", "tensorfloat32")):
            precision.set_jax(jax, kind)
            assert jax.config.jax_default_matmul_precision == told
    finally:
        jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.parametrize(("kind", "told"), [("float32", {}), ("tf32", {"tf32": True})])
def test_baby_xp_is_told_its_precision(monkeypatch, kind, told):
    asked, load = [], backends.load

    def fake(name, device=None, dtype="float32", **extra):
        asked.append((name, device, dtype, extra))
        return load("numpy")

    monkeypatch.setattr(backends, "load", fake)
    clock = contenders.Clock(TINY.batches(2))
    contenders.train_baby_xp(TINY, 0.0, clock, "cupy", 1, precision=kind)
    assert asked == [("cupy", None, "float32", told)]
    assert clock.wait.__name__ == "synchronize"


def test_half_precision_computes_in_bfloat16():
    torch = pytest.importorskip("torch")
    kinds, autocast = [], torch.autocast

    def losses(kind):
        clock = contenders.Clock(TINY.batches(3))
        return contenders.train_torch(TINY, 0.0, clock, precision=kind).losses

    def seen(device, dtype):
        kinds.append((device, dtype))
        return autocast(device, dtype)

    torch.autocast = seen
    try:
        exact, same, half = losses("float32"), losses("float32"), losses("half")
    finally:
        torch.autocast = autocast
    assert kinds == [("cpu", torch.bfloat16)] * 4  # three steps, and the loss after them
    assert exact == same
    assert 0 < abs(half[1] - exact[1]) <= precision.TOLERANCES["half"] * exact[1]


@pytest.mark.parametrize(
    ("kind", "off", "differ"),
    [("float32", 0.9e-4, False), ("float32", 1.1e-4, True), ("tf32", 4e-4, False), ("tf32", 6e-4, True),
     ("half", 1.9e-3, False), ("half", 2.1e-3, True), ("tf32", float("nan"), True)],
)  # fmt: skip
def test_a_coarser_precision_is_checked_within_wider_bounds(monkeypatch, kind, off, differ):
    asked = []

    def answer(task, name, precision, **request):
        asked.append((task, name, precision))
        return {"losses": [4.0, 4.0 * (1 + off) if name == "torch" else 4.0]}

    monkeypatch.setattr(processes, "ask", answer)
    problem = train.disagreement(workloads.WORKLOADS["W1"], {kind: ["baby_xp", "torch"]}, "cupy")
    assert bool(problem) == differ
    # what all are held against is ours in float32
    assert asked[0] == ("losses", "baby_xp", "float32")
    assert ("losses", "torch", kind) in asked
    if differ:
        assert "torch" in problem
        assert "baby_xp 4.000000, 4.000000" in problem


def test_our_own_coarser_precision_is_checked_too(monkeypatch):
    losses = {"float32": [4.0, 4.0], "tf32": [4.0, 4.1]}
    monkeypatch.setattr(processes, "ask", lambda task, name, precision, **rest: {"losses": losses[precision]})
    lineup = {"float32": ["baby_xp"], "tf32": ["baby_xp"]}
    assert "baby_xp tf32 4.000000, 4.100000" in train.disagreement(workloads.WORKLOADS["W1"], lineup, "cupy")


# clocks and the GPU's side of PyTorch -------------------------------------------------------------------


def test_the_device_is_waited_for_at_readings_alone(monkeypatch):
    happened = []
    monkeypatch.setattr(contenders.time, "perf_counter", lambda: happened.append("mark") or 0.0)
    clock = contenders.Clock(TINY.batches(5), every=2)
    clock.wait = lambda: happened.append("wait")
    for step in range(5):
        clock.batch(step)
    assert happened == ["wait", "mark", "mark", "wait", "mark", "mark", "wait", "mark"]


def test_a_time_is_the_mean_between_two_readings(monkeypatch):
    counted = []

    def stub(workload, dropout, clock, backend, precision):
        for step in range(len(clock)):
            clock.batch(step)
            clock.marks[-1] = 0.001 * step**2 if step % 10 == 0 else 1e9  # only readings count
        counted.append(len(clock))
        return contenders.Outcome([1.0, 2.0], {})

    monkeypatch.setitem(contenders.CONTENDERS, "stub", stub)
    found = child.train("stub", "W1", steps=15, warmup=3, dropout=0.0, backend="cupy", precision="float32")
    assert counted == [10 + 20 + 1]
    assert found["ms"] == pytest.approx([30.0, 50.0])  # (400 - 100) / 10 and (900 - 400) / 10


def fake_torch(calls: list) -> SimpleNamespace:
    """PyTorch with a GPU, as far as the contender looks."""
    cuda = SimpleNamespace(
        get_device_name=lambda device: "NVIDIA H200", max_memory_allocated=lambda device: 3 * MIB,
        max_memory_reserved=lambda device: 5 * MIB,
    )  # fmt: skip

    class Tensor:
        def to(self, *args, **kwargs):
            calls.append(("to", args, kwargs))
            return self

        def pin_memory(self):
            calls.append(("pin_memory",))
            return self

    return SimpleNamespace(
        __version__="2.13.0", version=SimpleNamespace(cuda="13.0"), cuda=cuda, int64="int64",
        from_numpy=lambda part: Tensor(),
    )  # fmt: skip


def test_pytorch_on_a_gpu_tells_its_device_and_memory():
    torch, device = fake_torch([]), SimpleNamespace(type="cuda")
    about = contenders.about_torch(torch, device)
    assert about["cuda"] == "13.0"
    assert "(NVIDIA H200)" in about["device"]
    assert contenders.torch_gpu_memory(torch, device) == {"used": 3 * MIB, "held": 5 * MIB}
    assert contenders.torch_gpu_memory(torch, SimpleNamespace(type="cpu")) == {}


def test_batches_reach_the_gpu_without_making_pytorch_wait():
    calls, device = [], SimpleNamespace(type="cuda")
    list(contenders._on_device(fake_torch(calls), TINY.batches(1)[0], device))
    assert calls == 2 * [("to", ("int64",), {}), ("pin_memory",), ("to", (device,), {"non_blocking": True})]


def test_a_peer_is_asked_for_a_gpu_in_a_process_of_its_own(monkeypatch):
    asked = []

    def answer(task, library):
        asked.append((task, library))
        return {"works": library == "torch"}

    monkeypatch.setattr(processes, "ask", answer)
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: object())
    assert contenders.missing("torch.compile-graphs", "cupy") is None
    assert contenders.missing("jax", "cupy") == "this jax sees no GPU: jax is left out"
    assert asked == [("sees_gpu", "torch"), ("sees_gpu", "jax")]
    assert (
        contenders.missing("torch.compile-graphs", "numpy") == "torch.compile-graphs is for a GPU: it is left out"
    )
    assert len(asked) == 2


def test_what_would_decide_the_precision_is_removed():
    assert {"NVIDIA_TF32_OVERRIDE", "CUPY_TF32", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"} <= set(processes.REMOVED)


@pytest.mark.parametrize(
    ("code", "said", "told"),
    [(0, "NVIDIA H200, 143771 MiB, 580.1, 700 W\n", "NVIDIA H200, 143771 MiB, 580.1, 700 W"),
     (0, "A\nB\n", "A; B"), (9, "NVIDIA-SMI has failed\n", None), (0, "\n", None)],
)  # fmt: skip
def test_nvidia_smi_is_asked(monkeypatch, code, said, told):
    monkeypatch.setattr(processes.shutil, "which", lambda name: "/bin/nvidia-smi")
    done = SimpleNamespace(returncode=code, stdout=said)
    monkeypatch.setattr(processes.subprocess, "run", lambda *args, **kwargs: done)
    assert processes.gpu() == told


# going on after a failure -------------------------------------------------------------------------------


def test_a_contender_that_fails_is_left_out_and_the_others_go_on(monkeypatch, capsys, quick, tmp_path):
    rounds = []

    def answer(task, name, **request):
        if task == "losses":
            return {"losses": [4.0, 3.0]}
        rounds.append(name)
        if name == "torch" and len(rounds) > 2:
            raise processes.Failed("bench: a child process ended with exit code 1")
        return run(10.0)

    monkeypatch.setattr(processes, "ask", answer)
    monkeypatch.setattr(contenders, "missing", lambda peer, backend: None)
    words = ["--workloads", "W1", "--peers", "torch,jax", "--rounds", "3", "--out", str(tmp_path)]
    assert says(monkeypatch, train, *words) == 1
    assert rounds == ["baby_xp", "torch", "jax", "baby_xp", "torch", "jax", "baby_xp", "jax"]
    said = capsys.readouterr().out
    assert "- W1: torch failed: bench: a child process ended with exit code 1" in said
    assert "of the best peer's (jax)" in said
    (kept,) = tmp_path.glob("*.json")
    assert set(json.loads(kept.read_text())["races"][0]["runs"]) == {"baby_xp", "jax"}


def test_a_peer_that_fails_the_check_is_left_out(monkeypatch, capsys):
    def answer(task, name, **request):
        if name == "jax":
            raise processes.Failed("bench: a child process ended with exit code 1")
        return {"losses": [4.0, 3.0]}

    monkeypatch.setattr(processes, "ask", answer)
    lineup = {"float32": ["baby_xp", "jax", "torch"]}
    assert train.disagreement(workloads.WORKLOADS["W1"], lineup, "numpy") is None
    assert lineup == {"float32": ["baby_xp", "torch"]}
    assert "jax float32" in capsys.readouterr().err


def test_generation_ends_with_the_first_failure(monkeypatch):
    def fail(task, **request):
        raise processes.Failed("a child failed")

    monkeypatch.setattr(processes, "ask", fail)
    with pytest.raises(processes.Failed, match="a child failed"):
        report.in_turn("generate", ("baby_xp",), 2, "W1")


# the ceiling --------------------------------------------------------------------------------------------


def test_bytes_of_a_step_by_hand():
    config = GPTConfig(n_ctx=2, n_emb=2, head_size=4, n_heads=2, n_layers=3, dropout=0.0)
    # 3 sequences of 2 tokens: N = 6 rows of C = 2 channels, S = 4, F = 8, V = 5
    qkv = 3 * (6 * 2 + 2 * 12 + 6 * 12)
    out = 3 * (6 * 4 + 4 * 2 + 6 * 2)
    up = down = 3 * (6 * 2 + 2 * 8 + 6 * 8)
    attention = 12 * 6 * 4
    head = 3 * (6 * 2 + 2 * 5 + 6 * 5)
    embedding = 3 * 6 * 2 + 5 * 2
    passed = 3 * (qkv + attention + out + up + down) + head + embedding
    parameters = sum(counts.parameters(config, 5).values())
    assert ceiling.step_bytes(config, 5, 3) == 4 * passed + 32 * parameters
    assert ceiling.step_bytes(config, 5, 3, itemsize=2) == 2 * passed + 32 * parameters


def test_operations_of_a_step_by_hand():
    config = GPTConfig(n_ctx=4, n_emb=2, head_size=6, n_heads=2, n_layers=3, dropout=0.0)
    # 5 sequences of 4 tokens; of 16 pairs of tokens the mask leaves 10, each with 6 channels in all heads
    weights = 3 * (2 * 18 + 6 * 2 + 2 * 8 + 8 * 2) + 2 * 11
    pairs = 3 * 5 * 10 * 6
    assert ceiling.step_flops(config, 11, 5) == 3 * 2 * (20 * weights + 2 * pairs)


def test_peak_memory_is_what_the_backend_tells(monkeypatch):
    told = SimpleNamespace(peak_used=3, peak_held=5)
    monkeypatch.setattr(backends, "memory", lambda loaded: told)
    clock = contenders.Clock(TINY.batches(2))
    assert contenders.train_baby_xp(TINY, 0.0, clock, workers=1).gpu_memory == {"used": 3, "held": 5}
    monkeypatch.setattr(backends, "memory", lambda loaded: None)
    assert contenders.train_baby_xp(TINY, 0.0, clock, workers=1).gpu_memory == {}


@pytest.mark.parametrize(("flops", "moved", "ms"), [(3e9, 1e6, 3.0), (1e6, 3e9, 1.5)])
def test_the_floor_is_the_longer_of_operations_and_bytes(flops, moved, ms):
    assert ceiling.floor_ms(flops, moved, {"flops": 1e12, "bytes": 2e12}) == pytest.approx(ms)


@pytest.mark.parametrize(("kind", "itemsize"), [("float32", 4), ("half", 2)])
def test_rates_of_a_device(monkeypatch, kind, itemsize):
    if kind == "half":
        pytest.importorskip("torch")
    shapes = []

    def three_a_second(call, wait, seconds):
        shapes.append(tuple(call().shape))
        wait()
        return 3.0

    monkeypatch.setattr(ceiling, "calls_a_second", three_a_second)
    found = ceiling.measure("numpy", kind, (16, 100))
    assert shapes == [(16, 16), (100,)]
    assert found["flops"] == 3 * 2 * 16**3
    assert found["bytes"] == 3 * 3 * itemsize * 100


def test_a_rate_is_that_of_the_best_reading_and_the_first_calls_do_not_count(monkeypatch):
    # between two readings: 5 calls in 1 s, then in 0.5 s, then in 2 s
    times = iter([0.0, 0.0, 1.0, 1.0, 1.5, 1.5, 3.5])
    monkeypatch.setattr(ceiling.time, "perf_counter", lambda: next(times))
    calls, waits = [], []
    rate = ceiling.calls_a_second(lambda: calls.append(len(waits)), lambda: waits.append(1), 3.0)
    assert rate == 10.0
    assert calls == [0, 0] + 5 * [1] + 5 * [2] + 5 * [3]


def test_the_device_is_really_measured():
    found = ceiling.measure("numpy", sizes=(64, 1000), seconds=0.02)
    assert found["flops"] > 1e6
    assert found["bytes"] > 1e6
    assert found["device"] == "cpu"


# what bench.train says of a GPU -------------------------------------------------------------------------


def test_the_table_of_a_gpu(result):
    ours, theirs = train.rows_of(result, *result["races"])
    # 4 ms at the least: 2 Gflop in 2 ms, 1 GB in 4 ms; medians are 9 and 12
    assert (ours["ms a step"], ours["share of the ceiling"]) == ("9.000", "44%")
    assert (theirs["baby_xp / this"], theirs["share of the ceiling"]) == ("0.75", "33%")
    assert (ours["precision"], ours["peak GPU MiB used/held"]) == ("float32", "20 / 40")
    assert theirs["peak GPU MiB used/held"] == "40 / 80"


def test_the_verdict_on_a_gpu(result):
    assert train.verdict(result, *result["races"]) == [
        "- W1 float32: time a step: 0.75 of the best peer's (torch); by round 0.67 to 0.83",
        "- W1 float32: peak GPU memory in use: 0.50 of the smallest peer's (torch)",
        "- W1 float32: no step can take less than 4.000 ms: 2.0 Gflop take 2.000 ms, 1.00 GB 4.000 ms",
        "- goal, W1 float32: at most 1.00 of torch.compile's time: not measured",
        "- goal, W1 float32: at most 0.50 of torch's time: 0.75, MISSED",
    ]


def test_a_race_without_baby_xp_says_so(result):
    result["races"] = [race(kind="half", torch=[run(4, used=1)])]
    (row,) = train.rows_of(result, *result["races"])
    assert (row["baby_xp / this"], row["share of the ceiling"]) == ("", "")
    assert train.verdict(result, *result["races"]) == ["- W1 half: baby_xp has no half precision yet"]


def test_the_document_tells_the_gpu_and_its_rates(result):
    text = "\n".join(train.document(result))
    assert "NVIDIA H200, 139 GiB" in text
    rates = "a product of 8,192 rows at 1.00 Tflop/s, a sum of 100 elements at 250 GB/s"
    assert f"- float32: cuda:0 (H200): {rates}" in text


def test_results_of_a_gpu_are_named_after_it(result, tmp_path):
    assert report.keep(tmp_path, result, "").name == "2026-01-02-nvidia-h200"
    result["backend"] = "numpy"  # on the same machine
    assert report.keep(tmp_path, result, "").name == "2026-01-02-a-1-2-cores"


def test_all_precisions_take_turns_in_one_run(monkeypatch, quick):
    asked = []

    def answer(task, **request):
        if task == "ceiling":
            return {"flops": 1e12, "bytes": 1e12, "n": 1, "elements": 1, "device": "cuda:0"}
        asked.append((request["name"], request["precision"], request["steps"], request["warmup"]))
        return run(1.0)

    monkeypatch.setattr(processes, "ask", answer)
    words = ["--backend", "cupy", "--workloads", "W4", "--precision", "float32,tf32,half", "--rounds", "2"]
    options = parsed(monkeypatch, train, *words)
    lineup = {"float32": ["baby_xp", "torch"], "tf32": ["baby_xp"], "half": ["torch"]}
    found = train.measure(options, lineup)
    workload = workloads.WORKLOADS["W4"]
    turns = [("baby_xp", "float32"), ("torch", "float32"), ("baby_xp", "tf32"), ("torch", "half")]
    assert asked == 2 * [(*turn, workload.gpu_steps, workloads.GPU_WARMUP) for turn in turns]
    assert [one["precision"] for one in found["races"]] == ["float32", "tf32", "half"]
    assert list(found["races"][2]["runs"]) == ["torch"]
    config = workload.model(workload.dropout).config
    assert found["races"][0]["flops"] == ceiling.step_flops(config, 65, 64)
    assert found["races"][0]["bytes"] == ceiling.step_bytes(config, 65, 64)
    assert found["races"][2]["bytes"] == ceiling.step_bytes(config, 65, 64, itemsize=2)
    assert set(found["ceilings"]) == {"float32", "tf32", "half"}


# goals --------------------------------------------------------------------------------------------------


def test_goals_of_a_step():
    runs = {"baby_xp": [run(6.0)], "torch": [run(12.0)], "torch.compile": [run(5.0)]}
    assert goals.step_lines("W3", "tf32", runs) == [
        "- goal, W3 tf32: at most 1.00 of torch.compile's time: 1.20, MISSED",
        "- goal, W3 tf32: at most 0.50 of torch's time: 0.50, met",
    ]
    assert goals.step_lines("W4", "tf32", runs) == [
        "- goal, W4 tf32: at most 1.20 of torch.compile's time: 1.20, met"
    ]
    assert goals.step_lines("W5", "tf32", runs) == []


@pytest.mark.parametrize(("seconds", "told"), [(299.0, "4.98 minutes, met"), (300.0, "5.00 minutes, MISSED")])
def test_the_goal_of_an_epoch(seconds, told):
    assert goals.epoch_line(seconds) == f"- goal, one epoch under 5 minutes: {told}"


@pytest.mark.parametrize(
    ("loss", "seconds", "ends"),
    [(1.47, 89.0, ("1.4700, met", "89.0 s, met")), (1.4701, 90.0, ("1.4701, MISSED", "90.0 s, MISSED"))],
)
def test_the_goals_of_a_run(loss, seconds, ends):
    assert tuple(line.partition(": ")[2] for line in goals.train_lines(loss, seconds, 5000)) == ends


def test_a_short_run_meets_no_goal():
    for loss, steps in ((1.0, 4999), (None, 5000)):
        (line,) = goals.train_lines(loss, 1.0, steps)
        assert "not measured" in line


# crossover ----------------------------------------------------------------------------------------------


def point(width: int, cpu: float, other: float) -> dict:
    return {"n_emb": width, "batch": crossover.BATCHES[width], "flops": 10**6 * width, "cpu": cpu, "gpu": other}


def test_where_the_gpu_overtakes_the_cpu():
    points = [point(16, 1, 2), point(32, 1, 4), point(64, 4, 1), point(128, 9, 1)]
    # from a quarter as fast at 32 Mflop to four times at 64: half way in logarithms
    assert crossover.crossing(points, "cupy") == (
        "cupy overtakes numpy at about 0.045 Gflop a step, between n_emb 32 with batch 2 and n_emb 64 with "
        "batch 4; at the largest size it is 9.0 times as fast"
    )
    points[0]["gpu"] = 0.1  # faster at first by chance: it counts from where on it stays so
    assert "about 0.045 Gflop" in crossover.crossing(points, "cupy")


def test_where_it_never_does_or_always_is():
    assert crossover.crossing([point(16, 4, 2), point(32, 9, 3)], "cupy") == (
        "cupy is faster at every size measured, 2.0 to 3.0 times"
    )
    assert crossover.crossing([point(16, 4, 2), point(32, 3, 6)], "cupy") == (
        "cupy never overtakes numpy: at the largest size it takes 2.0 times as long"
    )


def test_the_family_grows_evenly():
    found = [crossover.at(width) for width in crossover.BATCHES]
    flops = [counts.step_flops(one.model(0.0).config, one.vocab_size, one.batch_size) for one in found]
    for before, after in itertools.pairwise(flops):
        assert 4 < after / before < 9
    assert crossover.request(found[0], "cupy", flops[0], None)["steps"] == crossover.GPU_STEPS
    assert crossover.request(found[0], "numpy", flops[0], None)["steps"] == scaling.steps_for(flops[0])


@pytest.mark.slow
def test_the_crossover_runs_with_another_backend_in_place_of_a_gpu(monkeypatch, capsys, quick, tmp_path):
    words = ["--backend", "array-api-strict", "--widths", "32,16", "--steps", "1", "--rounds", "1"]
    assert says(monkeypatch, crossover, *words, "--out", str(tmp_path)) == 0
    said = capsys.readouterr().out.splitlines()
    (kept,) = tmp_path.glob("*-crossover.json")
    points = json.loads(kept.read_text())["points"]
    assert [one["n_emb"] for one in points] == [16, 32]
    assert said[-1] == f"- {crossover.crossing(points, 'array-api-strict')}"
    for one in points:
        assert min(one["gpu"], one["cpu"]) > 0
        assert one["runs"]["array-api-strict"][0]["about"]["backend"].startswith("array-api-strict")
    plots = list(tmp_path.glob("*-crossover.svg"))
    assert len(plots) == (1 if contenders.importlib.util.find_spec("matplotlib") else 0)


def test_numpy_is_not_measured_against_itself(monkeypatch, capsys):
    assert says(monkeypatch, crossover, "--backend", "numpy") == 2
    assert "what it is measured against" in capsys.readouterr().err


# epoch --------------------------------------------------------------------------------------------------


def test_an_epoch_by_hand(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(epoch.time, "perf_counter", lambda: now[0])
    watch = epoch.Watch()

    def at(seconds, call, *told):
        now[0] = 100.0 + seconds
        call(*told)

    on_the_way, whole = {"whole_validation": False}, {"whole_validation": True}
    at(5, watch.started, None, 0)  # libraries and the text took 5 s
    at(8, watch.progress, 10, 1.0, 50.0)  # 10 steps in 3 s: kernels were compiled
    at(9, watch.evaluated, on_the_way)
    at(10, watch.progress, 20, 1.0, 100.0)
    at(10.5, watch.evaluated, on_the_way)
    at(11.5, watch.progress, 30, 1.0, 100.0)
    at(13.5, watch.progress, 40, 1.0, 50.0)
    at(14.2, watch.evaluated, on_the_way)
    at(18.2, watch.evaluated, whole)
    # steps of 10 tokens at 100 tokens/s: 0.1 s each
    found = epoch.projection(watch, steps=1001, tokens=10, eval_every=500)
    assert found["ms_a_step"] == pytest.approx(100.0)
    assert found["seconds"] == pytest.approx({"beginning": 2.0, "steps": 100.1, "evaluations": 1.8, "end": 4.0})
    assert found["total_seconds"] == pytest.approx(107.9)


@pytest.mark.parametrize(("backend", "judged"), [("cupy", True), ("numpy", False)], ids=["gpu", "cpu"])
def test_only_a_gpu_is_held_against_the_goal(backend, judged):
    found = {
        "preset": "48-months", "backend": backend, "precision": "tf32", "machine": {}, "gpu": None,
        "ms_a_step": 4.0, "measured_steps": 10, "steps": 62733, "seconds": {"steps": 251.0},
        "total_seconds": 251.0,
    }  # fmt: skip
    assert ("- goal, one epoch under 5 minutes: 4.18 minutes, met" in epoch.lines(found)) == judged


def test_an_epoch_is_projected_from_a_real_part_of_it(monkeypatch, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A small red hen sings. " * 100, encoding="utf-8")
    preset = PRESETS["3-months"]
    small = replace(
        preset,
        model=replace(preset.model, n_ctx=8, n_emb=8, head_size=8, n_heads=2, n_layers=1),
        train=replace(preset.train, sample_tokens=0),
    )
    monkeypatch.setitem(PRESETS, "3-months", small)
    words = ["--preset", "3-months", "--backend", "numpy", "--data", str(text), "--steps", "40"]
    assert says(monkeypatch, epoch, *words, "--out", str(tmp_path / "out")) == 0
    found = json.loads((tmp_path / "out/epoch.json").read_text())
    # 2,300 characters: windows of 8 in the first nine tenths, 16 a step
    assert found["steps"] == -(-(2070 - 8) // 16)
    assert found["ms_a_step"] > 0
    assert found["total_seconds"] == pytest.approx(sum(found["seconds"].values()))
    assert all(found["seconds"][part] > 0 for part in ("steps", "evaluations", "end"))
    assert "by projection" in capsys.readouterr().out


def test_an_epoch_of_a_text_that_is_not_there(monkeypatch, capsys):
    assert says(monkeypatch, epoch, "--backend", "numpy", "--data", "no-such.txt", "--preset", "3-months") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# the session --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [[], ["--out", "x", "--stage", "dance"], ["--out", "x", "--stage", ""], ["--out", "x", "--minutes", "0"],
     ["--out", "x", "--data", "no-such.txt"], ["--out", "x", "--precision", "float8"]],
)  # fmt: skip
def test_a_session_refuses_what_it_cannot_do(monkeypatch, capsys, words):
    monkeypatch.setattr(gpu, "run_stage", lambda *told: pytest.fail("something was run"))
    assert says(monkeypatch, gpu, *words) == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def jobs_of(monkeypatch, tmp_path, *words: str) -> dict[str, list[gpu.Job]]:
    asked = parsed(monkeypatch, gpu, "--out", str(tmp_path), *words)
    return {stage: make(asked) for stage, make in gpu.STAGES.items()}


def test_the_stages_of_a_session(monkeypatch, tmp_path):
    jobs = jobs_of(monkeypatch, tmp_path)
    assert {stage: [job.name for job in found] for stage, found in jobs.items()} == {
        "check": ["backends", "parity", "gpu"],
        "steps": ["W1", "W2", "W3", "W4"],
        "w5": ["W5"],
        "train": ["nanogpt-gpu-float32", "nanogpt-gpu-tf32"],
        "epoch": ["48-months-float32", "48-months-tf32"],
        "crossover": ["family"],
    }
    assert "--tf32" in jobs["train"][1].command
    assert "--tf32" not in jobs["train"][0].command
    assert all(job.judged for job in jobs["train"])
    on_cpu = jobs_of(monkeypatch, tmp_path, "--backend", "numpy")
    assert [job.name for job in on_cpu["check"]] == ["backends", "parity"]
    assert [job.name for job in on_cpu["train"]] == ["nanogpt-gpu-float32"]
    assert not on_cpu["train"][0].judged


@pytest.mark.parametrize("backend", ["cupy", "torch"], ids=["gpu", "cpu"])
def test_the_programs_take_what_a_session_gives_them(monkeypatch, tmp_path, backend):
    words = ["--backend", backend, "--steps", "20", "--peers", "torch"]
    kinds = "float32,tf32,half" if backend == "cupy" else "float32"
    programs = {"bench.train": train, "bench.epoch": epoch, "bench.crossover": crossover}
    known = set()
    for jobs in jobs_of(monkeypatch, tmp_path, *words, "--precision", kinds).values():
        for job in jobs:
            if job.command[1] in programs:
                asked = parsed(monkeypatch, programs[job.command[1]], *job.command[2:])
                assert (asked.backend, asked.steps) == (backend, 20)
                known.add(job.command[1])
    assert known == programs.keys()


def test_what_a_session_trains_can_be_parsed(monkeypatch, tmp_path):
    from baby_xp.cli import train_commands

    jobs = jobs_of(monkeypatch, tmp_path, "--backend", "numpy", "--steps", "7")
    (job,) = jobs["train"]
    assert job.command[:3] == ["-m", "baby_xp", "train"]
    chosen, asked, place = train_commands.parse_preset("train", job.command[3:], train_commands.TrainPlace())
    assert (chosen.name, asked["num_steps"], chosen.data.data) == ("nanogpt-gpu", 7, "shakespeare")
    assert (place.backend, place.path, place.tf32) == ("numpy", str(tmp_path / "runs-float32"), False)
    (_, job) = jobs_of(monkeypatch, tmp_path)["train"]
    chosen, asked, place = train_commands.parse_preset("train", job.command[3:], train_commands.TrainPlace())
    assert (asked.get("num_steps", chosen.train.num_steps), place.backend, place.tf32) == (5000, "cupy", True)


def job(name: str, code: str, **more) -> gpu.Job:
    return gpu.Job(name, ["-c", code], **more)


def test_a_session_goes_on_after_a_failure_and_says_what_failed(monkeypatch, capsys, tmp_path):
    stages = {
        "check": lambda asked: [job("broken", "raise SystemExit(3)"), job("next", "print('- goal, x: 1, met')")],
        "steps": lambda asked: [job("skips", "print('5 skipped')", must_say=r"\d+ passed")],
        "w5": lambda asked: [job("says", "print('5 passed')", must_say=r"\d+ passed")],
    }
    monkeypatch.setattr(gpu, "STAGES", stages)
    assert says(monkeypatch, gpu, "--out", str(tmp_path), "--backend", "numpy") == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "failed: check broken (failed, exit code 3); steps skips (failed: it did nothing)"
    assert said[-2] == "- goal, x: 1, met"
    kept = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [one["result"] for stage in kept.values() for one in stage] == ["failed", "ok", "failed", "ok"]
    assert (tmp_path / "w5-says.txt").read_text().splitlines()[1:] == ["5 passed"]
    # a later call for one stage leaves what is known of the others
    stages["check"] = lambda asked: [job("broken", "pass")]
    assert says(monkeypatch, gpu, "--out", str(tmp_path), "--backend", "numpy", "--stage", "check") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing failed"
    kept = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert {stage: [one["result"] for one in found] for stage, found in kept.items()} == {
        "check": ["ok"], "steps": ["failed"], "w5": ["ok"],
    }  # fmt: skip


def test_what_a_command_looks_like_is_not_what_it_says(tmp_path):
    (outcome,) = gpu.run_stage("check", [job("x", "pass # 5 passed", must_say="5 passed")], tmp_path, 60)
    assert outcome.result == "failed"


@pytest.mark.skipif(os.name == "nt", reason="looks for processes as POSIX does")
def test_what_takes_too_long_is_ended_with_all_that_it_started(monkeypatch, tmp_path):
    file = tmp_path / "pid"
    inner = "import time; time.sleep(600)"
    outer = (
        "import subprocess, sys, time; print('begun', flush=True);"
        f"child = subprocess.Popen([sys.executable, '-c', {inner!r}]);"
        f"open({str(file)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )

    class Begun(subprocess.Popen):
        """Its time begins once all is started, however long that takes on a busy machine."""

        def wait(self, timeout=None):
            end = time.monotonic() + 120
            while not (file.exists() and file.read_text()) and time.monotonic() < end:
                time.sleep(0.02)
            return super().wait(timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", Begun)
    begin = time.perf_counter()
    outcomes = gpu.run_stage("steps", [job("long", outer), job("later", "pass")], tmp_path, 0.1)
    assert time.perf_counter() - begin < 300
    assert [one.result for one in outcomes] == ["out of time", "not begun"]
    assert "begun" in (tmp_path / "steps-long.txt").read_text()
    for _ in range(1000):  # init takes a moment to collect it
        if not _alive(int(file.read_text())):
            return
        time.sleep(0.05)
    pytest.fail("the process that it started still runs")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_session_trains_and_reads_the_result(monkeypatch, capsys, tmp_path):
    words = ["equations", "--num-steps", "20", "--backend", "numpy", "--path", str(tmp_path / "runs")]
    trains = gpu.Job("run", ["-m", "baby_xp", "train", *words], runs=tmp_path / "runs", judged=True)
    (outcome,) = gpu.run_stage("train", [trains], tmp_path, 120)
    assert outcome.result == "ok"
    assert outcome.run["steps"] == 20
    assert np.isfinite(outcome.run["val_loss"])
    assert outcome.goals == ["- goal, nanogpt-gpu: not measured, as only 20 of 5,000 steps were done (run)"]


def test_a_backend_is_named_not_guessed():
    with pytest.raises(arguments.ArgumentTypeError):
        arguments.backend("auto")


# the whole of it, on a machine that only pretends to have a GPU -------------------------------------------


@pytest.fixture
def pretended(monkeypatch, quick):
    """The CuPy backend on tests/fake_cupy.py; child processes are calls; W1 is tiny."""
    import fake_cupy

    if fake_cupy.compiler() is None:
        pytest.skip("no C++ compiler to run the kernels with")
    for name, module in fake_cupy.modules(fake_cupy.Machine(devices=1)).items():
        monkeypatch.setitem(sys.modules, name, module)

    def ask(task, **request):
        try:
            return child.TASKS[task](**request)
        except Exception as error:
            raise processes.Failed(f"{task} failed") from error

    monkeypatch.setattr(processes, "ask", ask)
    monkeypatch.setitem(workloads.WORKLOADS, "W1", replace(TINY, name="W1", gpu_steps=10))
    monkeypatch.setitem(ceiling.SIZES, "cupy", (16, 100))
    measured = ceiling.calls_a_second
    monkeypatch.setattr(ceiling, "calls_a_second", lambda call, wait, seconds: measured(call, wait, 0.01))


@pytest.mark.slow
def test_bench_train_goes_all_the_way_on_a_pretended_gpu(monkeypatch, capsys, pretended, tmp_path):
    def no_gpu(backend, kind):
        raise RuntimeError("no PyTorch computes on a pretended GPU")

    monkeypatch.setattr(ceiling, "through_torch", no_gpu)
    words = ["--backend", "cupy", "--workloads", "W1", "--precision", "float32,tf32,half", "--peers", ""]
    assert says(monkeypatch, train, *words, "--rounds", "2", "--out", str(tmp_path)) == 0
    said = capsys.readouterr()
    assert "baby_xp has no half precision yet" in said.err
    (kept,) = tmp_path.glob("*.json")
    found = json.loads(kept.read_text())
    assert [one["precision"] for one in found["races"]] == ["float32", "tf32", "half"]
    exact, coarse = (one["runs"]["baby_xp"] for one in found["races"][:2])
    assert len(exact) == len(coarse) == 2
    assert len(exact[0]["ms"]) == 1  # ten steps between two readings
    assert exact[0]["losses"] == exact[1]["losses"]
    assert exact[0]["losses"] != coarse[0]["losses"]  # TF32 was really on
    assert coarse[0]["losses"] == pytest.approx(exact[0]["losses"], rel=precision.TOLERANCES["tf32"])
    memory = exact[0]["gpu_memory"]
    assert 0 < memory["used"] <= memory["held"]
    assert "TF32 on" in coarse[0]["about"]["details"]
    assert found["ceilings"]["tf32"]["flops"] > 0
    assert found["ceilings"]["half"] is None
    assert "no ceiling for half" in said.err
    assert "- W1 tf32: no step can take less than" in said.out
    assert "- W1 half: baby_xp has no half precision yet" in said.out
