"""The measuring side of a GPU, as far as it can be tested without one: arithmetic, rules, and how it goes on."""

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
from bench_cases import RATE, TINY, parsed, result, run, says

from baby_xp import api, cli
from baby_xp.config import GPTConfig
from baby_xp.errors import BabyError
from baby_xp.resources import counts
from bench import gpu, growth, harness, peers, presets, results, roofline, train, workloads
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


def test_a_gpu_is_given_more_steps_and_a_longer_warm_up():
    for workload in workloads.WORKLOADS.values():
        assert workload.pace("numpy") == (workload.warmup, workload.steps)
        warmup, steps = workload.pace("cupy")
        assert warmup >= 2 * peers.READ_EVERY
        assert steps >= 3 * peers.READ_EVERY


def test_who_lacks_a_precision_is_left_out_and_named(capsys):
    assert train.able(["torch", "jax"], "half") == ["torch"]
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert train.able(["torch", "jax"], "tf32") == ["baby_xp", "torch", "jax"]
    assert capsys.readouterr().err == ""


def test_tf32_is_switched_on_and_off_in_pytorch():
    torch = pytest.importorskip("torch")
    from bench.peers.torch import set_precision

    settings = lambda: (  # noqa: E731
        torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )  # fmt: skip
    for kind in ("tf32", "half", "tf32", "float32"):
        set_precision(kind)
        assert settings() == (("high", True, True) if kind == "tf32" else ("highest", False, False))


def test_jax_gets_its_precision():
    jax = pytest.importorskip("jax")
    from bench.peers.jax import set_precision

    before = jax.config.jax_default_matmul_precision
    try:
        for kind, setting in (("float32", "highest"), ("tf32", "tensorfloat32")):
            set_precision(kind)
            assert jax.config.jax_default_matmul_precision == setting
    finally:
        jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.parametrize(("kind", "options"), [("float32", {}), ("tf32", {"tf32": True})])
def test_baby_xp_gets_its_precision_and_reports_its_memory(monkeypatch, kind, options):
    asked, load = [], ours.load

    def fake(*arguments, **extra):
        asked.append((*arguments, extra))
        loaded = load("numpy")
        loaded.memory = lambda: SimpleNamespace(peak_used=3, peak_held=5)
        return loaded

    monkeypatch.setattr(ours, "load", fake)
    clock = peers.Clock(TINY.batches(2))
    found = ours.train(TINY, 0.0, clock, "cupy", kind, workers=1)
    assert asked == [("cupy", None, "float32", options)]
    assert clock.wait.__name__ == "synchronize"
    assert found.gpu_memory == {"used": 3, "held": 5}


def test_half_precision_computes_in_bfloat16(monkeypatch):
    torch = pytest.importorskip("torch")
    from bench.peers import torch as peer

    kinds, autocast = [], torch.autocast
    losses = lambda kind: peer.train(TINY, 0.0, peers.Clock(TINY.batches(3)), precision=kind).losses  # noqa: E731
    monkeypatch.setattr(torch, "autocast", lambda *kind: kinds.append(kind) or autocast(*kind))
    exact, same, half = losses("float32"), losses("float32"), losses("half")
    assert kinds == [("cpu", torch.bfloat16)] * 4  # three steps, and the loss after them
    assert exact == same
    assert 0 < abs(half[1] - exact[1]) <= workloads.TOLERANCES["half"] * exact[1]


# who sees a GPU -----------------------------------------------------------------------------------------


def test_a_peer_is_asked_for_a_gpu_in_a_process_of_its_own(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(harness, "ask", lambda task, library: asked.append(library) or library == "torch")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    names = ["torch.compile-graphs", "jax"]
    assert peers.present(names, "cupy", "bench.train") == ["torch.compile-graphs"]
    assert "jax" in capsys.readouterr().err
    assert asked == ["torch", "jax"]
    assert peers.missing("torch.compile-graphs", "numpy")
    assert asked == ["torch", "jax"]


@pytest.mark.parametrize(
    ("code", "said", "found"),
    [(0, "NVIDIA H200, 143771 MiB, 580.1, 700 W\n", "NVIDIA H200, 143771 MiB, 580.1, 700 W"),
     (0, "A\nB\n", "A; B"), (9, "NVIDIA-SMI has failed\n", None), (0, "\n", None)],
)  # fmt: skip
def test_nvidia_smi_is_asked(monkeypatch, code, said, found):
    monkeypatch.setattr(harness.shutil, "which", lambda name: "/bin/nvidia-smi")
    done = SimpleNamespace(returncode=code, stdout=said)
    monkeypatch.setattr(harness.subprocess, "run", lambda *arguments, **options: done)
    assert harness.gpu() == found


# the roofline -------------------------------------------------------------------------------------------


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
    assert roofline.step_bytes(config, 5, 3) == 4 * passed + 32 * parameters
    assert roofline.step_bytes(config, 5, 3, itemsize=2) == 2 * passed + 32 * parameters


def test_operations_of_a_step_by_hand():
    config = GPTConfig(n_ctx=4, n_emb=2, head_size=6, n_heads=2, n_layers=3, dropout=0.0)
    # 5 sequences of 4 tokens; of 16 pairs of tokens the mask leaves 10, each with 6 channels in all heads
    weights = 3 * (2 * 18 + 6 * 2 + 2 * 8 + 8 * 2) + 2 * 11
    pairs = 3 * 5 * 10 * 6
    assert roofline.step_flops(config, 11, 5) == 3 * 2 * (20 * weights + 2 * pairs)


@pytest.mark.parametrize(("flops", "moved", "ms"), [(3e9, 1e6, 3.0), (1e6, 3e9, 1.5)])
def test_the_floor_is_the_longer_of_operations_and_bytes(flops, moved, ms):
    assert roofline.floor_ms(flops, moved, {"flops": 1e12, "bytes": 2e12}) == pytest.approx(ms)


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
    assert found["flops"] == 3 * 2 * 16**3
    assert found["bytes"] == 3 * 3 * itemsize * 100


def test_a_rate_is_that_of_the_best_reading_and_the_first_calls_do_not_count(monkeypatch):
    # between two readings: 5 calls in 1 s, then in 0.5 s, then in 2 s
    times = iter([0.0, 0.0, 1.0, 1.0, 1.5, 1.5, 3.5])
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(times))
    calls, waits = [], []
    rate = roofline.calls_per_second(lambda: calls.append(len(waits)), lambda: waits.append(1), 3.0)
    assert rate == 10.0
    assert calls == [0, 0] + 5 * [1] + 5 * [2] + 5 * [3]


def test_the_device_is_really_measured():
    found = roofline.measure("numpy", sizes=(64, 1000), seconds=0.02)
    assert found["flops"] > 1e6
    assert found["bytes"] > 1e6
    assert found["device"] == "cpu"


# what bench.train says about a GPU ----------------------------------------------------------------------


def test_the_table_and_the_verdict_of_a_gpu(on_gpu):
    (race,) = on_gpu["races"]
    own, theirs = train.rows_of(on_gpu, race)
    # 4 ms at least: 0.4 Gflop in 4 ms, 1 GB in 4 ms; medians are 9 and 12
    assert (own["ms a step"], own["share of the roofline"]) == ("9.000", "44%")
    assert (theirs["baby_xp / this"], theirs["share of the roofline"]) == ("0.75", "33%")
    assert (own["peak GPU MiB used/held"], theirs["peak GPU MiB used/held"]) == ("20 / 40", "40 / 80")
    time, memory, floor, compiled, eager = train.verdict(on_gpu, race)
    assert "0.75 of the best peer's (torch); by round 0.67 to 0.83" in time
    assert "0.50 of the smallest peer's" in memory
    assert "less than 4.000 ms" in floor
    assert compiled.endswith("not measured")
    assert eager.endswith("0.75, MISSED")
    text = "\n".join(train.document(on_gpu))
    assert "NVIDIA H200, 139 GiB" in text
    assert "8,192 rows at 0.10 Tflop/s, a sum of 100 elements at 250 GB/s" in text
    assert "products' share" not in own  # the speed of CPU cores is no floor of a GPU


def test_a_race_without_baby_xp_says_so(on_gpu):
    (race,) = on_gpu["races"]
    race |= {"precision": "half", "runs": {"torch": [run(4, used=1)]}}
    (row,) = train.rows_of(on_gpu, race)
    assert (row["baby_xp / this"], row["share of the roofline"]) == ("", "")
    (line,) = train.verdict(on_gpu, race)
    assert "baby_xp has no half precision" in line


def test_all_precisions_take_turns_in_one_run(monkeypatch):
    asked = []

    def answer(task, **request):
        if task == "bench.roofline:measure":
            return {"flops": 1e12, "bytes": 1e12, "n": 1, "elements": 1, "device": "cuda:0"}
        asked.append((request["name"], request["precision"], request["steps"], request["warmup"]))
        return run(1.0)

    monkeypatch.setattr(harness, "ask", answer)
    monkeypatch.setattr(results, "product_rate", lambda: RATE)
    words = ["--backend", "cupy", "--workloads", "W4", "--precision", "float32,tf32,half", "--rounds", "2"]
    lineup = {"float32": ["baby_xp", "torch"], "tf32": ["baby_xp"], "half": ["torch"]}
    found = train.measure(parsed(monkeypatch, train, *words), lineup)
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
        (results.train_goals(1.0, 1.0, 4999), ["not measured, as only 4,999 of 5,000 steps were done"]),
        (results.train_goals(None, 1.0, 5000), ["not measured, as only 5,000 of 5,000 steps were done"]),
    ],
)  # fmt: skip
def test_goals(lines, verdicts):
    assert [line.rpartition(": ")[2] for line in lines] == verdicts


# the session --------------------------------------------------------------------------------------------


def jobs_of(monkeypatch, tmp_path, *words: str) -> dict[str, list[gpu.Job]]:
    asked = parsed(monkeypatch, gpu, "--out", str(tmp_path), *words)
    return {stage: gpu.jobs_of(stage, asked) for stage in gpu.STAGES}


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
    programs = {"bench.train": train, "bench.presets": presets, "bench.growth": growth}
    known = set()
    for jobs in jobs_of(monkeypatch, tmp_path, *words, "--precision", kinds).values():
        for job in jobs:
            if job.command[1] in programs:
                asked = parsed(monkeypatch, programs[job.command[1]], *job.command[2:])
                assert asked.backend == backend
                assert getattr(asked, "steps", 20) == 20
                known.add(job.command[1])
    assert known == programs.keys()


@pytest.mark.parametrize(
    ("words", "number", "steps", "tf32"),
    [(["--backend", "numpy", "--steps", "7"], 0, 7, False), ([], 1, None, True)],
)
def test_the_command_line_takes_what_a_session_trains(monkeypatch, tmp_path, words, number, steps, tf32):
    seen = []

    def train(chosen, **asked):
        seen.append((chosen.name, asked))
        raise BabyError("it is not trained")

    monkeypatch.setattr(api, "train", train)
    job = jobs_of(monkeypatch, tmp_path, *words)["train"][number]
    assert job.command[:2] == ["-m", "baby_xp"]
    assert cli.main(job.command[2:]) == 2
    ((name, asked),) = seen
    assert (name, asked.get("num_steps"), asked["tf32"]) == ("nanogpt-gpu", steps, tf32)
    assert asked["path"] == str(job.runs)


def job(name: str, code: str, **more) -> gpu.Job:
    return gpu.Job(name, ["-c", code], **more)


def test_a_session_goes_on_after_a_failure_and_says_what_failed(monkeypatch, capsys, tmp_path):
    stages = {
        "check": [job("broken", "raise SystemExit(3)"), job("next", "print('- goal, x: 1, met')")],
        "steps": [job("skips", "print('5 skipped')", must_say=r"\d+ passed")],
        "w5": [job("says", "print('5 passed')", must_say=r"\d+ passed")],
    }
    monkeypatch.setattr(gpu, "jobs_of", lambda stage, asked: stages[stage])
    words = ["--out", str(tmp_path), "--backend", "numpy"]
    assert says(monkeypatch, gpu, *words, "--stage", "check,steps,w5") == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "failed: check broken (failed, exit code 3); steps skips (failed: it did nothing)"
    assert said[-2] == "- goal, x: 1, met"
    kept = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [one["result"] for stage in kept.values() for one in stage] == ["failed", "ok", "failed", "ok"]
    assert (tmp_path / "w5-says.txt").read_text().splitlines()[1:] == ["5 passed"]
    # a later call for one stage leaves what is known of the others
    stages["check"] = [job("broken", "pass")]
    assert says(monkeypatch, gpu, *words, "--stage", "check") == 0
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


# the whole of it, on a machine that only pretends to have a GPU -------------------------------------------


@pytest.fixture
def pretended(monkeypatch):
    """The CuPy backend on tests/fake_cupy.py; child processes are calls; W1 is tiny."""
    import fake_cupy

    if fake_cupy.compiler() is None:
        pytest.skip("no C++ compiler to run the kernels with")
    for name, module in fake_cupy.modules(fake_cupy.Machine(devices=1)).items():
        monkeypatch.setitem(sys.modules, name, module)

    def ask(task, **request):
        try:
            return harness.function_of(task)(**request)
        except Exception as error:
            raise harness.Failed(f"{task} failed") from error

    monkeypatch.setattr(harness, "ask", ask)
    monkeypatch.setitem(workloads.WORKLOADS, "W1", replace(TINY, name="W1", gpu_steps=10))
    monkeypatch.setitem(roofline.SIZES, "cupy", (16, 100))
    monkeypatch.setattr(results, "product_rate", lambda: RATE)
    measured = roofline.calls_per_second
    monkeypatch.setattr(roofline, "calls_per_second", lambda call, wait, seconds: measured(call, wait, 0.01))


@pytest.mark.slow
def test_bench_train_goes_all_the_way_on_a_pretended_gpu(monkeypatch, capsys, pretended, tmp_path):
    def no_gpu(backend, kind):
        raise RuntimeError("no PyTorch computes on a pretended GPU")

    monkeypatch.setattr(roofline, "through_torch", no_gpu)
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
    assert coarse[0]["losses"] == pytest.approx(exact[0]["losses"], rel=workloads.TOLERANCES["tf32"])
    memory = exact[0]["gpu_memory"]
    assert 0 < memory["used"] <= memory["held"]
    assert "TF32 on" in coarse[0]["about"]["details"]
    assert found["rooflines"]["tf32"]["flops"] > 0
    assert found["rooflines"]["half"] is None
    assert "no roofline for half" in said.err
    assert "- W1 tf32: no step can take less than" in said.out
    assert "- W1 half: baby_xp has no half precision yet" in said.out
