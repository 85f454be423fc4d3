"""Measuring on a GPU, as far as it can be tested without one: arithmetic, rules, and what follows a failure."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import numpy as np
import pytest
from bench_cases import MACHINE, RATE, TINY, TINY_FIELDS, answering, numbers, parsed, result, run, says
from small_runs import wait_until

from baby_xp import api, cli
from baby_xp.arrays.registry import load
from baby_xp.config import GPTConfig
from baby_xp.errors import BabyError
from baby_xp.resources import counts
from bench import gpu, graph, growth, harness, memory, peers, results, roofline, train, workloads
from bench.peers import ours


@pytest.fixture
def on_gpu() -> dict:
    """A GPU whose products reach 0.1 Tflop/s and whose memory 250 GB/s: a step of W1 takes at least 4 ms."""
    rates = {"flops": 1e11, "bytes": 2.5e11, "n": 8192, "elements": 100, "device": "cuda:0 (H200)"}
    own, theirs = [run(8, 8, used=10), run(10, 10, used=20)], [run(12, 12, used=40), run(12, 12, used=40)]
    return result("cupy", {"float32": rates, "half": None}, baby_xp=own, torch=theirs)


# workloads and precisions -------------------------------------------------------------------------------


def test_w5_is_gpt_2_small_and_measured_on_a_cpu_only_by_name(monkeypatch):
    model = workloads.WORKLOADS["W5"].model(0.0)
    # GPT-2's 124,439,808 parameters, with no bias on q, k, v, and a head with weights and a bias of its own
    assert model.n_parameters == 124_439_808 - 12 * 3 * 768 + 50257 * 768 + 50257
    for words, last in ((), "W4"), (("--backend", "torch"), "W4"), (("--backend", "cupy"), "W5"):
        assert parsed(monkeypatch, train, *words).workloads[-1].name == last
    assert [one.name for one in parsed(monkeypatch, train, "--workloads", "W5").workloads] == ["W5"]
    for workload in workloads.WORKLOADS.values():
        assert workload.pace("numpy") == (workload.warmup, workload.steps)
        warmup, steps = workload.pace("cupy")  # graphs are captured during it, and waits are rare
        assert (warmup >= 2 * peers.READ_EVERY, steps >= 3 * peers.READ_EVERY) == (True, True)


def test_a_library_without_a_precision_is_left_out_and_named(capsys):
    assert train.able(["torch", "jax"], "half") == ["torch"]
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert train.able(["torch", "jax"], "tf32") == ["baby_xp", "torch", "jax"]
    assert capsys.readouterr().err == ""


def test_pytorch_is_set_to_the_precision(monkeypatch):
    torch = pytest.importorskip("torch")
    from bench.peers.torch import set_precision

    for kind in ("tf32", "half", "tf32", "float32"):
        set_precision(kind)
        flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        assert flags == (kind == "tf32", kind == "tf32")
        assert torch.get_float32_matmul_precision() == ("high" if kind == "tf32" else "highest")
    kinds, autocast = [], torch.autocast
    losses = lambda kind: peers.losses("torch", TINY_FIELDS, precision=kind)  # noqa: E731
    monkeypatch.setattr(torch, "autocast", lambda *kind: kinds.append(kind) or autocast(*kind))
    exact, same, half = losses("float32"), losses("float32"), losses("half")
    assert kinds == [("cpu", torch.bfloat16)] * 2  # a step, and the loss after it
    assert exact == same
    assert 0 < abs(half[1] - exact[1]) <= workloads.TOLERANCES["half"] * exact[1]


@pytest.fixture
def jax(monkeypatch):
    """JAX, whose settings are as before afterwards."""
    module = pytest.importorskip("jax")
    names = "jax_default_matmul_precision", "jax_default_device"
    before = {name: getattr(module.config, name) for name in names}
    yield module
    for name, value in before.items():
        module.config.update(name, value)


def test_jax_is_set_to_the_precision(jax, monkeypatch):
    from bench.peers.jax import set_precision

    monkeypatch.setattr(jax, "devices", lambda kind: ["a GPU"])
    for kind, setting in (("float32", "highest"), ("tf32", "tensorfloat32")) * 2:
        set_precision(kind)
        assert jax.config.jax_default_matmul_precision == setting
        jax.config.update("jax_default_matmul_precision", None)
        ours.load_at("jax:gpu", kind)
        assert jax.config.jax_default_matmul_precision == setting
    load("jax", "gpu")  # as `train` does it
    assert jax.config.jax_default_matmul_precision == "highest"


def test_a_step_of_our_jax_gives_its_state_up_and_computes_the_same(jax, monkeypatch):
    clocks = [peers.Clock(TINY.batches(12)) for _ in range(2)]
    found = ours.train(TINY, 0.2, clocks[0], library="jax")
    kept, compiled = [], []
    compile = lambda function: compiled.append(jax.jit(function)) or compiled[-1]  # noqa: E731
    monkeypatch.setattr(ours, "compile_donating", compile)
    assert ours.train(TINY, 0.2, clocks[1], library="jax").losses == found.losses
    assert (found.about["backend"].split()[0], len(compiled)) == ("jax", 2)
    monkeypatch.undo()
    step = ours.compile_donating(lambda state, batch: (kept.append(1) or state + batch, batch))
    total = ours.compile_donating(lambda params, batch: params + batch)
    state, batch = jax.numpy.ones(1000), jax.numpy.ones(1000)
    total(state, batch), step(state, batch)
    assert (state.is_deleted(), batch.is_deleted()) == (True, False)


@pytest.mark.parametrize(
    ("where", "kind", "arguments"),
    [
        ("cupy", "float32", ("cupy", None, "float32", "fast", {"tf32": False})),
        ("cupy:cuda:1", "tf32", ("cupy", "cuda:1", "float32", "fast", {"tf32": True})),
    ],
)
def test_baby_xp_is_set_to_the_precision_and_reports_its_memory(monkeypatch, where, kind, arguments):
    asked, load = [], ours.load

    def fake(*arguments, **extra):
        asked.append((*arguments, extra))
        loaded = load("numpy")
        loaded.memory = lambda: SimpleNamespace(peak_used=3, peak_held=5)
        return loaded

    monkeypatch.setattr(ours, "load", fake)
    clock = peers.Clock(TINY.batches(2))
    found = ours.train(TINY, 0.0, clock, where, kind, workers=1)
    assert asked == [arguments]
    assert clock.wait.__name__ == "synchronize"
    assert found.gpu_memory == {"used": 3, "held": 5}


def test_a_peer_is_checked_for_a_gpu_in_a_separate_process(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(harness, "ask", lambda task: asked.append(task) or "torch" in task)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    assert peers.present(["torch.compile-graphs", "jax"], "cupy", "bench.train") == ["torch.compile-graphs"]
    assert "jax" in capsys.readouterr().err
    assert peers.missing("torch.compile-graphs", "numpy")
    assert asked == ["torch.cuda:is_available", "jax:default_backend"]

    def broken(task):
        raise harness.Failed("bench: ImportError: it is broken")

    monkeypatch.setattr(harness, "ask", broken)
    assert peers.present(["torch", "baby_xp-jax"], "jax:gpu", "bench.train") == []
    assert [line.count("broken") for line in capsys.readouterr().err.splitlines()] == [1, 1]


def test_our_jax_on_a_gpu_is_measured_beside_peers_on_it(monkeypatch):
    words = ["--backend", "jax", "--precision", "float32,tf32"]
    asked = parsed(monkeypatch, train, *words, "--device", "gpu")
    assert (asked.backend, workloads.on_gpu(asked.backend), asked.workloads[-1].name) == ("jax:gpu", True, "W5")
    assert parsed(monkeypatch, train, *words[:2]).backend == "jax:cpu"
    with pytest.raises(SystemExit):
        parsed(monkeypatch, train, *words)
    assert not workloads.on_gpu("jax:cpu")
    rows = {"baby_xp": [run(4)], "baby_xp-jax": [run(2)], "torch.compile": [run(3)], "torch": [run(8)]}
    shares = [line.split()[4:] for line in results.step_goals("W1", "tf32", rows)]
    assert [(who, whose, share) for who, _, _, whose, *_, share, _ in shares] == [
        ("baby_xp's", "torch.compile's", "1.33,"), ("baby_xp's", "torch's", "0.50,"),
        ("baby_xp-jax's", "torch.compile's", "0.67,"), ("baby_xp-jax's", "torch's", "0.25,"),
    ]  # fmt: skip
    assert results.against_best({"baby_xp": 4, "baby_xp-jax": 2, "torch": 8}) == (0.5, "torch")
    assert numbers(results.versus("x", rows, us="baby_xp-jax"))[0] == 0.67


@pytest.mark.parametrize(
    ("code", "said", "found"),
    [(0, "H200, 143771 MiB\n", "H200, 143771 MiB"), (0, "A\nB\n", "A; B"), (9, "failed\n", None), (0, "\n", None)],
)
def test_the_gpu_is_read_from_nvidia_smi(monkeypatch, code, said, found):
    monkeypatch.setattr(harness.shutil, "which", lambda name: "/bin/nvidia-smi")
    done = SimpleNamespace(returncode=code, stdout=said)
    monkeypatch.setattr(harness.subprocess, "run", lambda *arguments, **options: done)
    assert harness.gpu() == found


# the roofline -------------------------------------------------------------------------------------------


def test_step_bytes_match_a_count_by_hand():
    config = GPTConfig(n_ctx=2, n_emb=2, head_size=4, n_heads=2, n_layers=3, dropout=0.0)
    # 3 sequences of 2 tokens: N = 6 rows of C = 2 channels, S = 4, F = 8, V = 5
    qkv, out = 3 * (6 * 2 + 2 * 12 + 6 * 12), 3 * (6 * 4 + 4 * 2 + 6 * 2)
    up = down = 3 * (6 * 2 + 2 * 8 + 6 * 8)
    attention, head, embedding = 12 * 6 * 4, 3 * (6 * 2 + 2 * 5 + 6 * 5), 3 * 6 * 2 + 5 * 2
    passed = 3 * (qkv + attention + out + up + down) + head + embedding
    parameters = sum(counts.parameters(config, 5).values())
    assert roofline.step_bytes(config, 5, 3) == 4 * passed + 32 * parameters
    assert roofline.step_bytes(config, 5, 3, itemsize=2) == 2 * passed + 32 * parameters


def test_step_flops_match_a_count_by_hand():
    config = GPTConfig(n_ctx=4, n_emb=2, head_size=6, n_heads=2, n_layers=3, dropout=0.0)
    # 5 sequences of 4 tokens; of 16 pairs of tokens the mask leaves 10, each with 6 channels in all heads
    weights = 3 * (2 * 18 + 6 * 2 + 2 * 8 + 8 * 2) + 2 * 11
    assert roofline.step_flops(config, 11, 5) == 3 * 2 * (20 * weights + 2 * (3 * 5 * 10 * 6))


@pytest.mark.parametrize(("flops", "moved", "ms"), [(3e9, 1e6, 3.0), (1e6, 3e9, 1.5)])
def test_the_floor_is_the_longer_of_operations_and_bytes(flops, moved, ms):
    found = result("cupy", {"float32": {"flops": 1e12, "bytes": 2e12}})
    least, line = roofline.floor(found, {"flops": flops, "bytes": moved, "precision": "float32"})
    assert (least, numbers(line)[0]) == (pytest.approx(ms), ms)
    assert roofline.floor(found, {"flops": flops, "bytes": moved, "precision": "half"}) == (None, None)


@pytest.mark.parametrize(("kind", "itemsize"), [("float32", 4), ("half", 2)])
def test_rates_of_a_device(monkeypatch, kind, itemsize):
    if kind == "half":
        pytest.importorskip("torch")
    shapes = []

    def three_per_second(call, wait, seconds):
        shapes.append(tuple(call().shape))
        wait()
        return 3.0

    monkeypatch.setattr(roofline, "calls_per_second", three_per_second)
    found = roofline.measure("numpy", kind, (16, 100))
    assert shapes == [(16, 16), (100,)]
    assert (found["flops"], found["bytes"]) == (3 * 2 * 16**3, 3 * 3 * itemsize * 100)


def test_a_rate_is_that_of_the_best_reading_and_the_first_calls_do_not_count(monkeypatch):
    # between two readings: 5 calls in 1 s, then in 0.5 s, then in 2 s
    times = iter([0.0, 0.0, 1.0, 1.0, 1.5, 1.5, 3.5])
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(times))
    calls, waits = [], []
    assert roofline.calls_per_second(lambda: calls.append(len(waits)), lambda: waits.append(1), 3.0) == 10.0
    assert calls == [0, 0] + 5 * [1] + 5 * [2] + 5 * [3]


# what bench.train says about a GPU ----------------------------------------------------------------------


def test_the_table_and_the_verdict_of_a_gpu(on_gpu):
    (race,) = on_gpu["races"]
    own, theirs = train.rows_of(on_gpu, race)
    # 4 ms at least: 0.4 Gflop in 4 ms, 1 GB in 4 ms; medians are 9 and 12
    assert (own["ms per step"], own["share of the roofline"]) == ("9.000", "44%")
    assert (theirs["baby_xp / this"], theirs["share of the roofline"]) == ("0.75", "33%")
    assert (own["peak GPU MiB used/held"], theirs["peak GPU MiB used/held"]) == ("20 / 40", "40 / 80")
    assert "products' share" not in own  # the speed of CPU cores gives no lower bound for a GPU
    time, used, floor, compiled, eager = train.verdict(on_gpu, race)
    assert [numbers(line) for line in (time, used)] == [[0.75, 0.67, 0.83], [0.5]]
    assert numbers(floor)[0] == 4.0
    assert (compiled.rpartition(": ")[2], eager.rpartition(": ")[2]) == ("not measured", "0.75, MISSED")
    assert MACHINE["gpu"] in "\n".join(train.document(on_gpu))
    race |= {"precision": "half", "runs": {"torch": [run(4, used=1)]}}  # a precision that baby_xp does not have
    (row,) = train.rows_of(on_gpu, race)
    assert (row["baby_xp / this"], row["share of the roofline"]) == ("", "")
    assert ["baby_xp" in line for line in train.verdict(on_gpu, race)] == [True]


def test_all_precisions_take_turns_in_one_run(monkeypatch):
    asked = []

    def answer(task, **request):
        if task == "bench.peers:losses":
            return [4.0, 3.0]
        if task == "bench.roofline:measure":
            return {"flops": 1e12, "bytes": 1e12, "n": 1, "elements": 1, "device": "cuda:0"}
        asked.append((request["name"], request["precision"], request["steps"], request["warmup"]))
        return run(1.0)

    answering(monkeypatch, answer)
    words = ["--backend", "cupy", "--workloads", "W4", "--precision", "float32,tf32,half", "--rounds", "2"]
    lineup = {"float32": ["baby_xp", "torch"], "tf32": ["baby_xp"], "half": ["torch"]}
    *_, found = train.measure(parsed(monkeypatch, train, *words), lineup)
    workload = workloads.WORKLOADS["W4"]
    turns = [("baby_xp", "float32"), ("torch", "float32"), ("baby_xp", "tf32"), ("torch", "half")]
    assert asked == 2 * [(*turn, workload.gpu_steps, workloads.GPU_WARMUP) for turn in turns]
    races = {one["precision"]: one for one in found["races"]}
    assert list(races) == list(found["rooflines"]) == ["float32", "tf32", "half"]
    assert list(races["half"]["runs"]) == ["torch"]
    shape = workload.model(workload.dropout).config, 65, 64
    assert races["float32"]["flops"] == roofline.step_flops(*shape)
    assert races["tf32"]["bytes"] == roofline.step_bytes(*shape)
    assert races["half"]["bytes"] == roofline.step_bytes(*shape, itemsize=2)


@pytest.mark.parametrize(
    ("lines", "verdicts"),
    [
        (results.step_goals("W3", "tf32", {"baby_xp": [run(6)], "torch": [run(12)], "torch.compile": [run(5)]}),
         ["1.20, MISSED", "0.50, met"]),
        (results.step_goals("W4", "tf32", {"baby_xp": [run(6)], "torch.compile": [run(5)]}), ["1.20, met"]),
        (results.step_goals("W5", "tf32", {"baby_xp": [run(6)], "torch.compile": [run(5)]}), []),
        ([results.epoch_goal(299.0)], ["4.98 minutes, met"]),
        ([results.epoch_goal(300.0)], ["5.00 minutes, MISSED"]),
        (results.train_goals(1.47, 89.0, 5000), ["1.4700, met", "89.0 s, met"]),
        (results.train_goals(1.4701, 90.0, 5000), ["1.4701, MISSED", "90.0 s, MISSED"]),
    ],
)  # fmt: skip
def test_goals(lines, verdicts):
    assert [line.rpartition(": ")[2] for line in lines] == verdicts
    for unfinished in results.train_goals(1.0, 1.0, 4999), results.train_goals(None, 1.0, 5000):
        assert ["not measured" in line for line in unfinished] == [True]


# the session --------------------------------------------------------------------------------------------


def jobs_of(monkeypatch, tmp_path, *words: str) -> dict[str, list[gpu.Job]]:
    words = ["--out", str(tmp_path), "--stage", ",".join(gpu.STAGES), *words]
    return parsed(monkeypatch, gpu, *words).jobs


def test_the_stages_of_a_session(monkeypatch, tmp_path):
    jobs = jobs_of(monkeypatch, tmp_path)
    ages = [f"{months}-months" for months in (3, 6, 12, 24, 48)]
    assert {stage: [job.name for job in found] for stage, found in jobs.items()} == {
        "tests": ["backends", "parity", "gpu"],
        "sanitizer": ["memcheck", "racecheck"],
        "steps": ["W1", "W2", "W3", "W4"],
        "graph": ["W1"],
        "train": ["nanogpt-gpu"],
        "epoch": ["48-months"],
        "crossover": ["family"],
        "w5": ["W5"],
        "ages": ages,
    }
    trained = jobs["train"] + jobs["epoch"] + jobs["ages"]
    assert ["--tf32" in job.command for job in trained] == [True] * len(trained)
    assert [job.judged for job in jobs["train"] + jobs["ages"]] == [True] + [False] * len(ages)
    only = jobs_of(monkeypatch, tmp_path, "--only", "W3,24-months", "--precision", "float32")
    assert [job.name for found in only.values() for job in found] == ["W3", "24-months"]
    assert "--tf32" not in only["ages"][0].command
    on_cpu = jobs_of(monkeypatch, tmp_path, "--backend", "numpy")
    assert [job.name for job in on_cpu["tests"]] == ["backends", "parity"]
    assert on_cpu["sanitizer"] == on_cpu["graph"] == on_cpu["crossover"] == []
    assert [(job.name, job.judged) for job in on_cpu["train"]] == [("nanogpt-gpu", False)]


def test_kernels_are_clean_only_if_they_ran(monkeypatch, capsys, tmp_path):
    memcheck, racecheck = jobs_of(monkeypatch, tmp_path)["sanitizer"]
    clean = {"memcheck": "= ERROR SUMMARY: 0 errors",
             "racecheck": "= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"}  # fmt: skip
    for job in memcheck, racecheck:
        for said, works in ((f"6 passed\n{clean[job.name]}", True), (f"6 skipped\n{clean[job.name]}", False),
                            ("6 passed\n= ERROR SUMMARY: 10 errors", False)):  # fmt: skip
            assert all(re.search(pattern, said) for pattern in job.must_say) == works
    monkeypatch.setattr(gpu.shutil, "which", lambda program: None)
    (outcome,) = gpu.run_stage("sanitizer", [memcheck], tmp_path, 9)
    assert outcome.result == "not begun: compute-sanitizer is not installed"
    assert capsys.readouterr().out.count("\n") == 2  # one line, and one that is empty


@pytest.mark.parametrize("backend", ["cupy", "torch"], ids=["gpu", "cpu"])
def test_each_program_accepts_the_arguments_of_a_session(monkeypatch, tmp_path, backend):
    trained, known = [], set()

    def refuse(chosen, **asked):
        trained.append((chosen.name, asked["num_steps"], asked.get("tf32", False), asked["backend"]))
        raise BabyError("it is not trained")

    monkeypatch.setattr(api, "train", refuse)
    words = ["--backend", backend, "--steps", "20"]
    kinds = "float32,tf32,half" if backend == "cupy" else "float32"
    programs = {"bench.train": train, "bench.memory": memory, "bench.growth": growth}
    for stage, jobs in jobs_of(monkeypatch, tmp_path, *words, "--precision", kinds).items():
        for job in jobs:
            if stage in ("train", "ages"):
                assert cli.main(job.command[3:]) == 2
                assert trained.pop() == (job.name, 20, backend == "cupy", backend)
            elif stage == "graph":
                assert parsed(monkeypatch, graph, *job.command[3:]).workloads == [job.name]
            elif stage in ("steps", "w5", "epoch", "crossover"):
                asked = parsed(monkeypatch, programs[job.command[2]], *job.command[3:])
                assert (asked.backend, asked.steps) == (backend, 0 if stage == "epoch" else 20)
                known.add(job.command[2])
    assert known == programs.keys()


@pytest.mark.slow
def test_an_age_is_trained_in_parts_and_then_left_alone(monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text("A small red hen sings. " * 40, "utf-8")
    words = ["--backend", "numpy", "--data", str(tmp_path / "text.txt"), "--steps", "4", "--only", "3-months"]

    def session(*more: str) -> tuple[str, gpu.Outcome]:
        (job,) = jobs_of(monkeypatch, tmp_path, *words, *more)["ages"]
        (outcome,) = gpu.run_stage("ages", [job], tmp_path, 120)
        return job.command[3], outcome

    command, first = session("--minutes", "1e-6")
    assert command == "train"
    assert re.fullmatch("unfinished after [0-3] steps: run the stage again", first.result)
    command, second = session("--minutes", "5")
    assert (command, second.result, second.run["steps"]) == ("resume", "ok", 4)
    assert second.run["val_loss"] > 0 < len(second.run["sample"])
    command, third = session()
    assert (command, third.result, third.run) == ("runs", "ok", second.run)


def job(name: str, code: str, **more) -> gpu.Job:
    return gpu.Job(name, ["python", "-c", code], **more)


def test_a_session_continues_after_a_failure_and_reports_it(monkeypatch, capsys, tmp_path):
    stages = {
        "tests": [job("broken", "raise SystemExit(3)"), job("next", "print('- goal, x: 1, met')")],
        "steps": [job("skips", "print('5 skipped') # 5 passed", must_say=(gpu.PASSED,))],  # no command says it
        "w5": [job("says", "print('5 passed')", must_say=(gpu.PASSED,))],
    }
    monkeypatch.setattr(gpu, "jobs_of", lambda stage, asked: stages[stage])

    def session(stage: str) -> tuple[int, list[str], dict]:
        words = ["--out", str(tmp_path), "--backend", "numpy", "--stage", stage]
        code, said = says(monkeypatch, gpu, *words), capsys.readouterr().out.splitlines()
        kept = json.loads((tmp_path / "summary.json").read_text())["stages"]
        return (
            code,
            said[-2:],
            {stage: {name: one["result"][:6] for name, one in found.items()} for stage, found in kept.items()},
        )

    code, (goal, last), kept = session("tests,steps,w5")
    others = {"steps": {"skips": "failed"}, "w5": {"says": "ok"}}
    assert kept == {"tests": {"broken": "failed", "next": "ok"}, **others}
    assert (code, goal) == (1, "- goal, x: 1, met")
    assert all(name in last for name in ("tests broken", "exit code 3", "steps skips"))
    assert (tmp_path / "w5-says.txt").read_text() == "5 passed\n"
    # a later call for one job leaves what is known of the others
    stages["tests"] = [job("broken", "pass")]
    code, _, kept = session("tests")
    assert (code, kept) == (0, {"tests": {"broken": "ok", "next": "ok"}, **others})


@pytest.mark.skipif(os.name == "nt", reason="looks for processes as POSIX does")
def test_a_stage_past_its_limit_is_killed_with_its_children(monkeypatch, tmp_path):
    file = tmp_path / "pid"
    outer = (
        "import subprocess, sys, time; print('begun', flush=True);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(file)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )

    class Begun(subprocess.Popen):
        """Its time starts when everything has started, however long that takes on a busy machine."""

        def wait(self, timeout=None):
            wait_until(lambda: file.exists() and file.read_text())
            return super().wait(timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", Begun)
    outcomes = gpu.run_stage("steps", [job("long", outer), job("later", "pass")], tmp_path, 0.1)
    assert [one.result for one in outcomes] == ["out of time", "not begun"]
    assert "begun" in (tmp_path / "steps-long.txt").read_text()
    wait_until(lambda: not alive(int(file.read_text())))  # init takes a while to collect it


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_session_trains_and_reads_the_result(tmp_path):
    words = ["equations", "--num-steps", "20", "--backend", "numpy", "--path", str(tmp_path / "runs")]
    trains = gpu.Job("run", ["python", "-m", "baby_xp", "train", *words], runs=tmp_path / "runs", judged=True)
    (outcome,) = gpu.run_stage("train", [trains], tmp_path, 120)
    assert (outcome.result, outcome.run["steps"]) == ("ok", 20)
    assert np.isfinite(outcome.run["val_loss"])
    assert ["not measured" in line for line in outcome.goals] == [True]


@pytest.mark.slow
def test_bench_train_runs_completely_on_a_fake_gpu(monkeypatch, capsys, tmp_path):
    """The CuPy backend on tests/fake_cupy.py; child processes are calls; W1 is tiny."""
    import fake_cupy

    if fake_cupy.compiler() is None:
        pytest.skip("no C++ compiler to run the kernels with")
    for name, module in fake_cupy.modules(fake_cupy.Machine(devices=1)).items():
        monkeypatch.setitem(sys.modules, name, module)

    def ask(task, **request):
        try:
            if task == "bench.roofline:measure" and request["precision"] == "half":
                raise RuntimeError("no PyTorch computes on a pretended GPU")
            return MACHINE if task == "bench.harness:machine" else resolve_name(task)(**request)
        except Exception as error:
            raise harness.Failed(f"{task} failed") from error

    monkeypatch.setattr(harness, "ask", ask)
    monkeypatch.setitem(workloads.WORKLOADS, "W1", replace(TINY, name="W1", gpu_steps=10))
    monkeypatch.setitem(roofline.SIZES, True, (16, 100))
    monkeypatch.setattr(results, "product_rate", lambda: RATE)
    measured = roofline.calls_per_second
    monkeypatch.setattr(roofline, "calls_per_second", lambda call, wait, seconds: measured(call, wait, 0.01))
    words = ["--backend", "cupy", "--workloads", "W1", "--precision", "float32,tf32,half", "--peers", ""]
    assert says(monkeypatch, train, *words, "--rounds", "2", "--out", str(tmp_path)) == 0
    (kept,) = tmp_path.glob("*.json")
    found = json.loads(kept.read_text())
    assert [one["precision"] for one in found["races"]] == ["float32", "tf32", "half"]
    exact, coarse = (one["runs"]["baby_xp"] for one in found["races"][:2])
    assert (len(exact), len(coarse), len(exact[0]["ms"])) == (2, 2, 1)  # ten steps between two readings
    assert exact[0]["losses"] == exact[1]["losses"]
    assert exact[0]["losses"] != coarse[0]["losses"]  # TF32 was actually switched on
    assert coarse[0]["losses"] == pytest.approx(exact[0]["losses"], rel=workloads.TOLERANCES["tf32"])
    assert 0 < exact[0]["gpu_memory"]["used"] <= exact[0]["gpu_memory"]["held"]
    assert "TF32 on" in coarse[0]["about"]["details"]
    assert found["rooflines"]["tf32"]["flops"] > 0
    assert found["rooflines"]["half"] is None
    assert "- W1 tf32: no step can take less than" in capsys.readouterr().out
