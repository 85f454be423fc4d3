"""The benchmarks: turn taking, medians and ratios, refusals and results. Nothing here depends on measured time."""

import itertools
import json
import os
from dataclasses import dataclass

import numpy as np
import pytest
from bench_cases import (
    FAILURE,
    MACHINE,
    MIB,
    RATE,
    TINY,
    TINY_FIELDS,
    answering,
    nothing,
    numbers,
    parsed,
    result,
    run,
    says,
)
from threadpoolctl import threadpool_info

import baby_xp
from baby_xp.arrays.registry import load
from baby_xp.inference.generate import Sampling, generate_several
from baby_xp.presets import PRESETS
from baby_xp.resources import counts, process_memory
from baby_xp.training import alone
from baby_xp.training.loop import Loop
from bench import generate, gpu, growth, harness, memory, parameters, peers, results, roofline, train, workloads
from bench.peers import ours


@pytest.fixture
def on_cpu() -> dict:
    """Medians of both rounds are 20 ms for baby_xp, 25 for torch and 40 for jax."""
    return result(
        "numpy", {},
        baby_xp=[run(10, 30, peak=30 * MIB), run(20, 20, peak=20 * MIB)],
        torch=[run(25, 25, peak=60 * MIB), run(25, 25, peak=60 * MIB)],
        jax=[run(40, 40, peak=40 * MIB), run(40, 40, peak=50 * MIB)],
    )  # fmt: skip


# child processes, the machine and turns -----------------------------------------------------------------


def test_a_child_process_does_not_inherit_settings_that_distort_the_comparison(monkeypatch):
    names = ["OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "NVIDIA_TF32_OVERRIDE", "BENCH_TEST"]
    for name in names:
        monkeypatch.setenv(name, "1")
    assert [harness.ask("os:getenv", key=name) for name in names] == [None, None, None, "1"]
    assert set(names[:3]) < set(harness.REMOVED)


def test_a_failed_child_process_reports_the_reason():
    for task, request, reason in (
        ("baby_xp.arrays.registry:load", {"name": "fortran"}, "'fortran'"),
        ("os:_exit", {"status": 3}, "exit code 3"),
        ("no_such_library:train", {}, "ModuleNotFoundError: No module named 'no_such_library'"),
    ):
        with pytest.raises(harness.Failed, match=f"bench: .*{reason}"):
            harness.ask(task, **request)


def test_a_library_that_fails_is_left_out_and_the_others_continue(monkeypatch, capsys, tmp_path):
    turns = []

    def answer(task, name, **request):
        if task == "bench.peers:losses":
            return [4.0, 3.0]
        (file,) = tmp_path.glob("*.json")  # whatever happens next, what was measured is kept
        (race,) = json.loads(file.read_text())["races"]
        assert sum(map(len, race["runs"].values())) == sum(one not in race["failed"] for one in turns)
        turns.append(name)
        if name == "torch" and len(turns) > 2:
            raise harness.Failed(FAILURE)
        return run(10.0)

    answering(monkeypatch, answer)
    words = ["--workloads", "W1", "--peers", "torch,jax", "--rounds", "3", "--out", str(tmp_path)]
    assert says(monkeypatch, train, *words) == 1
    assert turns == ["baby_xp", "torch", "jax", "baby_xp", "torch", "jax", "baby_xp", "jax"]
    (kept,) = tmp_path.glob("*.json")
    (race,) = json.loads(kept.read_text())["races"]
    assert (race["runs"].keys(), race["failed"]) == ({"baby_xp", "jax"}, {"torch": FAILURE})
    assert FAILURE in capsys.readouterr().out


def test_with_all_needed_a_failure_ends_the_measurement(monkeypatch):
    def fail(task, **request):
        raise harness.Failed(FAILURE)

    answering(monkeypatch, fail)
    with pytest.raises(harness.Failed, match="1"):
        list(harness.take_turns("bench.peers:generate", {"baby_xp": {}}, 2, "W1", all_needed=True))


def test_a_result_names_the_machine_class(monkeypatch):
    found = harness.machine()
    assert {"vendor", "vectors", "blas", "cores"} <= found.keys()
    assert all(str(found[name]) in harness.class_of(found) for name in ("vendor", "vectors", "cores"))
    assert harness.class_of({**MACHINE, "blas": "b 1.2.0 K"}) == "A, AVX2, b K, 2 cores"  # of any version
    for levels, width in (["X86_V3", "X86_V4"], "AVX-512"), (["AVX2"], "AVX2"), (["X86_V3"], "AVX2"):
        monkeypatch.setattr(np, "show_config", lambda mode, now=levels: {"SIMD Extensions": {"found": now}})
        assert harness.vectors() == width


# refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (program, words)
        for program, known, refused in (
            (train, [], [["--workloads", "W9"], ["--workloads", ""], ["--peers", "theano"], ["--steps", "0"],
                         ["--rounds", "-1"], ["--backend", "fortran"], ["--backend", "auto"], ["--precision", ""],
                         ["--precision", "float8"], ["--precision", "tf32"], ["--page", "x.md"],
                         ["--keep", "--backend", "torch"]]),
            (generate, [], [["--tokens", "none"], ["--batches", "1,0"]]),
            (growth, ["scaling"], [["--axes", "depth"], ["--axes", ""]]),
            (growth, ["crossover"], [["--widths", "24"], ["--backend", "numpy"]]),
            (growth, [], [[]]),
            (memory, ["needed"], [["--workloads", "W9"], ["--steps", "0"]]),
            (memory, ["estimate"], [["--presets", "equations"], ["--steps", "-1"],
                                    ["--data", "no-such.txt", "--presets", "3-months"]]),
            (parameters, [], [[], ["--train", "--jobs", "0"], ["--train", "--groups", "depth"],
                              ["--speed", "--steps", "x"], ["--table", "--file", "nowhere.json"]]),
            (gpu, ["--out", "x"], [["--stage", "dance"], ["--stage", ""], ["--minutes", "0"],
                                   ["--data", "no-such.txt"], ["--precision", "float8"], ["--only", "W9"]]),
            (gpu, [], [[]]),
        )
        for words in ([*known, *more] for more in refused)
    ],
)  # fmt: skip
def test_bad_arguments_end_with_2_and_one_line(monkeypatch, capsys, tmp_path, program, words):
    answering(monkeypatch, nothing)
    monkeypatch.setattr(gpu, "run_stage", nothing)
    monkeypatch.chdir(tmp_path)
    assert says(monkeypatch, program, *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("bench.")
    assert sum(not line.startswith(("usage: ", " ")) for line in lines) == 1


@pytest.mark.parametrize(
    ("kind", "theirs", "differ"),
    [("float32", [4.0, 3.0], False), ("float32", [4.0003, 3.0], False), ("float32", [4.0005, 3.0], True),
     ("float32", [4.0, 2.999], True), ("float32", [4.0, float("nan")], True), ("tf32", [4.0016, 3.0], False),
     ("tf32", [4.0024, 3.0], True), ("half", [4.0, 3.0057], False), ("half", [4.0, 3.0063], True)],
)  # fmt: skip
def test_who_trains_differently_is_left_out_and_the_others_race(monkeypatch, capsys, kind, theirs, differ):
    asked = []

    def answer(task, name, precision, **request):
        if task == "bench.peers:train":
            return run(10.0)
        asked.append((name, precision))
        if name == "jax":
            raise harness.Failed(FAILURE)
        return theirs if (name, precision) in (("torch", kind), ("baby_xp", "tf32")) else [4.0, 3.0]

    answering(monkeypatch, answer)
    ours_too = ["baby_xp"] if kind == "tf32" else []  # our own coarser precision
    for name in "torch", *ours_too:
        found = train.left_out(workloads.WORKLOADS["W1"], {kind: ["jax", name]}, "cupy")
        assert found.keys() == {(kind, "jax"), *([(kind, name)] if differ else [])}
    assert asked[0] == ("baby_xp", "float32")  # what all are compared with
    if differ and kind == "float32":
        capsys.readouterr()
        words = ["--workloads", "W1", "--peers", "torch,torch.compile", "--rounds", "1"]
        assert says(monkeypatch, train, *words) == 1
        said = capsys.readouterr()
        assert len([line for line in said.err.splitlines() if "is left out" in line]) == 1
        assert len([line for line in said.out.splitlines() if "torch is left out: its losses" in line]) == 1
        rows = [line.split()[3] for line in said.out.splitlines() if line.startswith("| W1")]
        assert rows == ["baby_xp", "torch.compile"]


def test_without_our_own_losses_nobody_is_compared(monkeypatch, capsys):
    def answer(task, name, **request):
        if request["workload"] == "W1" and name == "baby_xp":
            raise harness.Failed(FAILURE)
        return run(10.0) if task == "bench.peers:train" else [4.0, 3.0]

    answering(monkeypatch, answer)
    assert says(monkeypatch, train, "--workloads", "W1,W2", "--peers", "torch", "--rounds", "1") == 1
    rows = [line.split()[1:4:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| W")]
    assert rows == [["W2", "baby_xp"], ["W2", "torch"]]


@pytest.mark.parametrize(
    ("shortfall", "differ"), [(0.0, False), (5e-5, False), (2e-4, True), (float("nan"), True)]
)
def test_generation_that_differs_is_not_compared(monkeypatch, capsys, shortfall, differ):
    found = {"greedy": [[1, 2], [3, 4]], "shortfalls": [[0.0, 0.0], [0.0, shortfall]]}
    answering(monkeypatch, lambda task, **request: found[task.partition(":")[2]])
    monkeypatch.setattr(generate, "measure", lambda *a: [{"measured": True}])
    monkeypatch.setattr(generate, "document", lambda measured: ["measured"])
    assert says(monkeypatch, generate, "--batches", "2", "--peers", "torch") == (2 if differ else 0)
    said = capsys.readouterr()
    assert (said.out == "", len(said.err.splitlines())) == (differ, differ)


# medians, ratios and files ------------------------------------------------------------------------------


def test_the_table_and_the_verdict_against_the_best_peer(on_cpu):
    (race,) = on_cpu["races"]
    assert roofline.floor(on_cpu, race)[0] == pytest.approx(4.0)  # 0.4 Gflop at 2 cores x 50 Gflop/s, the best
    columns = ("products' share", "ms per step", "baby_xp / this")
    assert [tuple(row[name] for name in columns) for row in train.rows_of(on_cpu, race)] == [
        ("20%", "20.0", ""), ("16%", "25.0", "0.80"), ("10%", "40.0", "0.50"),
    ]  # fmt: skip
    race["runs"]["baby_xp"] = [run(20, 20, peak=30 * MIB), run(30, 30, peak=20 * MIB)]
    time, memory, _ = train.verdict(on_cpu, race)
    assert ("torch" in time, numbers(time)) == (True, [1.0, 0.8, 1.2])  # of both rounds, the least, the most
    assert ("jax" in memory, numbers(memory)) == (True, [0.6])
    for one in race["runs"]["torch"] + race["runs"]["jax"]:
        one["memory"] = []
    assert len(train.verdict(on_cpu, race)) == 2
    race["runs"] = {"baby_xp": race["runs"]["baby_xp"]}
    assert len(train.verdict(on_cpu, race)) == 1


def test_memory_of_several_processes_counts_shared_pages_once():
    sizes = [{"peak": 100, "shared": 40}, {"peak": 70, "shared": 60}]
    runs = [{"memory": sizes}, {"memory": [{"peak": 105, "shared": 0}]}]
    assert results.peak(runs) == 110
    assert results.least_growth(runs, [{"peak": 50, "shared": 45}]) == min(50 + 5, 55)
    assert results.least_growth(runs, []) is results.peak([*runs, {"memory": []}]) is None


def test_kept_results_have_every_time_and_do_not_replace_one_another(on_cpu, tmp_path):
    document = train.document(on_cpu)
    states = [{**on_cpu, "races": []}, on_cpu]  # as it grows
    stems = [results.show(states, train.document, tmp_path, "-generate")[1] for _ in range(2)]
    name = "2026-01-02-a-1-2-cores-avx2-generate"
    assert [stem.name for stem in stems] == [name, f"{name}-2"]
    kept = json.loads((tmp_path / f"{name}.json").read_text())
    assert [one["ms"] for one in kept["races"][0]["runs"]["baby_xp"]] == [[10, 30], [20, 20]]
    assert (tmp_path / f"{name}-2.md").read_text() == "\n".join(document) + "\n"
    _, stem = results.show([{**on_cpu, "backend": "cupy"}], lambda result: [], tmp_path)
    assert stem.name == "2026-01-02-nvidia-h200"


@pytest.mark.parametrize(("rate", "busy"), [(38.0, False), (37.0, True)])
def test_a_busy_machine_is_reported(on_cpu, rate, busy):
    on_cpu["product_rate_after"] = {**RATE, "two at once": rate}
    assert any("BUSY" in line for line in train.document(on_cpu)) == busy


# baby_xp and its peers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "small"), [(1, True), (1, False), (2, False)])
def test_steps_are_measured_with_the_workers_and_threads_of_train(monkeypatch, tmp_path, number, small):
    seen, run = [], Loop.run

    def watched(*arguments):
        threads = [info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"]
        seen.append((threads, len(process_memory.children())))
        return run(*arguments)

    monkeypatch.setattr(Loop, "run", watched)
    if not small:
        monkeypatch.setattr(alone, "WORTH_SPLITTING", 0.0)
    (tmp_path / "text.txt").write_text("A small red hen sings. " * 40, "utf-8")
    sizes = {"n_ctx": 8, "n_emb": 16, "head_size": 16, "n_heads": 2, "n_layers": 1, "batch_size": 3}
    text = {"data": str(tmp_path / "text.txt"), "num_steps": 2, "eval_every": 2, "sample_tokens": 0}
    baby_xp.train("classic", path=tmp_path / "runs", backend="numpy", workers=number, **sizes, **text)
    found = ours.train(TINY, 0.0, peers.Clock(TINY.batches(2)), workers=number)
    by_train, by_bench = seen
    assert by_bench == by_train
    assert found.about["workers"] == str(number)
    if small or number > 1:
        assert set(by_bench[0]) <= {1}


def test_the_clock_waits_for_the_device_only_at_readings(monkeypatch):
    happened = []
    monkeypatch.setattr(peers.time, "perf_counter", lambda: happened.append("mark") or 0.0)
    clock = peers.Clock(TINY.batches(5), every=2)
    clock.wait = lambda: happened.append("wait")
    for step in range(5):
        clock.batch(step)
    assert happened == ["wait", "mark", "mark", "wait", "mark", "mark", "wait", "mark"]


def stub_trainer(workload, dropout, clock, backend, precision):
    for step in range(len(clock)):
        clock.batch(step)
        clock.marks[-1] = 0.001 * step**2 if step % 10 == 0 else 1e9  # only readings count
    return peers.Outcome([1.0, 2.0], {"steps": len(clock)})


def stub_generator(workload, batch, num_tokens, backend):
    return peers.Outcome([], {}), [float(number) for number in range(num_tokens - 1)]


def test_times_are_means_between_readings_after_the_warm_up(monkeypatch):
    monkeypatch.setitem(peers.TRAINERS, "stub", (f"{__name__}:stub_trainer", {}))
    monkeypatch.setitem(peers.GENERATORS, "stub", (f"{__name__}:stub_generator", {}))
    request = {"steps": 15, "warmup": 3, "dropout": 0.0, "backend": "cupy", "precision": "float32"}
    found = peers.train("stub", TINY_FIELDS, **request)
    assert found["about"]["steps"] == 10 + 20 + 1
    assert found["ms"] == pytest.approx([30.0, 50.0])  # (400 - 100) / 10 and (900 - 400) / 10
    found = peers.generate("stub", TINY_FIELDS, 1, tokens=3, warmup=5, backend="numpy")
    assert found["ms"] == [4.0, 5.0, 6.0]


def test_tokens_per_second_come_from_the_mean_and_count_all_texts():
    race = {"workload": "W1", "batch": 16, "runs": {"baby_xp": [run(1, 1, 4)], "torch": [run(2, 2, 2)]}}
    own, theirs = generate.rows_of(race)
    assert (own["ms per step"], own["mean"], own["tokens/s"]) == ("1.000", "2.000", "8,000")
    assert (theirs["baby_xp / this"], theirs["by mean"]) == ("0.50", "1.00")
    by_median, by_mean = generate.verdict(race)
    assert (0.5 in numbers(by_median), 1.0 in numbers(by_mean)) == (True, True)


@pytest.mark.parametrize("name", ["baby_xp", peers.WITHOUT_NUMBA, "torch", "jax"])
def test_all_libraries_train_the_same_model(name):
    pytest.importorskip(peers.library_of(name))
    own = peers.losses("baby_xp", TINY_FIELDS, workers=1)
    assert peers.losses(name, TINY_FIELDS) == pytest.approx(own, rel=workloads.TOLERANCES["float32"])
    assert own[1] != own[0]


@pytest.mark.parametrize("fault", [None, "window", "positions", "cache"])
def test_a_peer_that_generates_other_tokens_is_detected(monkeypatch, fault):
    pytest.importorskip("torch")
    from bench.peers import torch

    model, backend = TINY.model(0.0), load("numpy")
    weights, prompt = backend.asarray(peers.generation_weights(model)), peers.prompts_of(TINY, 1)[0]
    greedy = Sampling(greedy=True)
    ids = generate_several(backend, model, weights, [prompt], 40, greedy, use_cache=False)
    text = [[int(one[0])] for one in ids]
    assert len(set(np.ravel(text))) > 3
    if fault == "window":  # drops one token at a time
        monkeypatch.setattr(torch, "window_start", lambda length, n_ctx: max(0, length - n_ctx))
    elif fault == "positions":  # never moves on to the second half of the context
        monkeypatch.setattr(torch, "window_start", lambda length, n_ctx: (length - 1) // 4 * 4)
    elif fault == "cache":  # what was cached is lost
        plain = torch.attend
        monkeypatch.setattr(torch, "attend", lambda a, x, cache, t: plain(a, x, cache.zero_() if t else cache, t))
    assert (np.max(torch.shortfalls(TINY_FIELDS, text)) <= generate.TOLERANCE) == (fault is None)


# growth -------------------------------------------------------------------------------------------------


def point(value: int, ms: float, flops: int = 100, peak: int | None = 10, needed: int = 10, workers: int = 1):
    return {"axis": "n_ctx", "value": value, "ms": ms, "flops": flops, "peak": peak, "arrays": {"all": needed},
            "workers": workers}  # fmt: skip


@pytest.mark.parametrize(
    ("later", "jumps"),
    [
        (point(2, ms=3.0, flops=200), []),  # 1.5 times per operation, no more
        (point(2, ms=3.1, flops=200), ["time"]),
        (point(2, ms=0.1, flops=200), []),  # a decrease is not a jump
        (point(2, ms=1.0, peak=16), ["memory"]),
        (point(2, ms=1.0, peak=30, needed=20), []),
        (point(2, ms=1.6, peak=None), ["time"]),
        (point(2, ms=2.0, peak=20, workers=2), ["time", "memory"]),
    ],
)
def test_a_jump_is_growth_beyond_the_counts(later, jumps):
    assert growth.jumps(point(1, ms=1.0), later) == jumps
    note = growth.scaling_row(point(1, ms=1.0), later)["note"]
    assert (note.count("JUMP"), "1 -> 2" in note) == (len(jumps), later["workers"] == 2)


@pytest.mark.parametrize(("medians", "runs", "jumped"), [([9, 2, 8], 2, []), ([9, 8, 7], 3, ["time"])])
def test_a_suspected_jump_is_measured_again_and_the_minimum_counts(monkeypatch, medians, runs, jumped):
    left, peaks = iter(medians), iter([30, 25, 28])
    answering(monkeypatch, lambda task, **request: run(next(left), peak=next(peaks)))
    flops = growth.flops_of(growth.at("n_layers", 1))
    previous = point(1, ms=1.0, flops=flops, peak=None)
    found = growth.measured("n_layers", 2, 5, [{"peak": 10, "shared": 5}], previous)
    assert found["flops"] > 1.9 * flops
    assert (len(found["runs"]), growth.jumps(previous, found)) == (runs, jumped)
    assert (found["ms"], found["peak"]) == (min(medians[:runs]), 15)
    config = growth.at("n_layers", 2).model(0.0).config
    assert found["arrays"] == counts.arrays(config, growth.BASE.vocab_size, growth.BASE.batch_size, 1)


def test_every_point_has_heads_of_the_same_width_and_a_bounded_number_of_steps(monkeypatch):
    taken = []
    for axis, values in growth.AXES.items():
        for value in values:
            workload = growth.at(axis, value)
            config = workload.model(0.0).config
            assert config.n_emb // config.n_heads == 32
            assert {"batch": workload.batch_size, **vars(config)}[axis] == value
            taken.append((growth.flops_of(workload), growth.request_of(workload, "numpy", None)["steps"]))
    steps = [count for _, count in sorted(taken)]
    assert steps == sorted(steps, reverse=True)
    assert growth.FEWEST <= steps[-1] < steps[0] <= growth.MOST
    assert growth.request_of(growth.BASE, "cupy", None)["steps"] == growth.GPU_STEPS
    assert growth.request_of(growth.BASE, "cupy", 7)["steps"] == 7
    assert workloads.of(vars(growth.at("batch", 2))) == growth.at("batch", 2)
    asked = parsed(monkeypatch, growth, "crossover", "--widths", "256,16,64,32,128")
    assert asked.widths == [16, 32, 64, 128, 256]
    family = [growth.flops_of(growth.at("family", width)) for width in asked.widths]
    assert all(4 < after / before < 9 for before, after in itertools.pairwise(family))


@pytest.mark.slow
def test_growth_is_plotted(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    points = [point(1, ms=1.0), point(2, ms=3.0, flops=200)]
    growth.plot({"axes": {"n_ctx": points, "n_emb": points}}, tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text()
    assert all(f"<!-- {label} -->" in drawn for label in ("n_ctx", "n_emb", "measured", "as counted operations"))


def crossing(*pairs: tuple[float, float]) -> list[float]:
    """The numbers in the line about where models of growing width cross, with these times on CPU and GPU."""
    widths = zip(growth.BATCHES.items(), pairs, strict=False)
    points = [
        {"n_emb": width, "batch": batch, "flops": 10**6 * width, "cpu": cpu, "gpu": other}
        for (width, batch), (cpu, other) in widths
    ]
    return numbers(growth.crossing(points, "cupy"))


def test_where_the_gpu_overtakes_the_cpu():
    # from a quarter as fast at 32 Mflop to four times at 64: half way in logarithms
    found = [0.045, 32, 2, 64, 4, 9.0]
    assert crossing((1, 2), (1, 4), (4, 1), (9, 1)) == found
    assert crossing((1, 0.1), (1, 4), (4, 1), (9, 1)) == found  # faster at first by chance
    assert crossing((4, 2), (9, 3)) == [2.0, 3.0]  # always, by this factor
    assert crossing((4, 2), (3, 6)) == [2.0]  # never, by this factor


@pytest.mark.slow
def test_the_crossover_runs_with_another_backend_in_place_of_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(results, "product_rate", lambda: RATE)
    words = ["crossover", "--backend", "array-api-strict", "--widths", "32,16", "--steps", "1", "--rounds", "1"]
    assert says(monkeypatch, growth, *words, "--out", str(tmp_path)) == 0
    (kept,) = tmp_path.glob("*-crossover.json")
    points = json.loads(kept.read_text())["points"]
    assert capsys.readouterr().out.splitlines()[-1] == f"- {growth.crossing(points, 'array-api-strict')}"
    for one in points:
        assert min(one["gpu"], one["cpu"]) > 0
        assert one["runs"]["array-api-strict"][0]["about"]["backend"].startswith("array-api-strict")


# memory and estimates -----------------------------------------------------------------------------------


def test_needed_memory_counts_each_array_once_and_a_view_as_its_base(monkeypatch):
    whole, other = np.zeros(100, np.float32), np.zeros(3)
    found = memory.owners(([whole[:5], {"a": whole.reshape(10, 10)[2]}], other, None, 3))
    assert sorted(found.values()) == [24, 400]
    monkeypatch.setitem(workloads.WORKLOADS, "W1", TINY)
    found = memory.needed("W1")
    assert found["parameters"] == found["gradients"] == found["moments"] / 2 == 4 * TINY.model(0.0).n_parameters
    assert found["saved"] > 0
    own = os.path.realpath(memory.__file__)  # the innermost line of the checkout holds the memory
    assert memory.innermost([("f", "/else/numpy.py", 3), ("g", own, 5), ("h", own, 7)]) == (own, 5)
    assert memory.innermost([("f", "/else/numpy.py", 3)]) == ("/else/numpy.py", 3)


@pytest.fixture
def estimated(monkeypatch) -> list[dict]:
    """The arguments of `estimate`, which reports 270 s and 90 MiB. A real run takes 100 MiB."""
    asked = []

    @dataclass
    class Trial:
        memory: int = 90 * MIB

    class Found:
        n_parameters, trial, seconds = 1234, Trial(), {"training": 251.0, "evaluations": 19.0}
        facts = type("Facts", (), {"num_steps": 62733, "workers": 1})

    def answer(task, preset, settings, place):
        asked.append({"preset": preset, "settings": settings, "place": place})
        return {"ms": 5.0, "taken": 100 * MIB}

    answering(monkeypatch, answer)
    monkeypatch.setattr(memory, "estimate", lambda name, **more: asked.append(more) or Found())
    return asked


@pytest.mark.parametrize(("backend", "judged"), [("cupy", True), ("numpy", False)], ids=["gpu", "cpu"])
def test_a_whole_run_is_the_sum_of_its_parts_and_only_a_gpu_has_a_goal(
    monkeypatch, capsys, estimated, tmp_path, backend, judged
):
    words = ["--presets", "48-months", "--data", "here.txt", "--out", str(tmp_path), "--tf32", "--steps", "0"]
    assert says(monkeypatch, memory, "estimate", *words, "--backend", backend) == 0
    assert estimated == [{"backend": backend, "tf32": True, "data": "here.txt"}]  # nothing was trained
    last = capsys.readouterr().out.splitlines()[-1]
    assert (last.startswith("- goal") and numbers(last) == [5.0, 4.5]) == judged
    (kept,) = tmp_path.glob("*-estimate.json")
    (found,) = json.loads(kept.read_text())["presets"]
    assert memory.row_of(found)["whole run"] == "4 min"


@pytest.mark.parametrize(("taken", "ratio", "within"), [(100, "0.900", "met"), (110, "0.818", "MISSED")])
def test_an_estimate_is_compared_with_a_real_run(monkeypatch, estimated, taken, ratio, within):
    asked = parsed(monkeypatch, memory, "estimate", "--presets", "classic", "--steps", "20")
    *_, result = memory.compare(asked)
    (found,) = result["presets"]
    projected, real = estimated
    assert (real["preset"], real["place"]) == ("classic", projected)
    assert real["settings"] == {"num_steps": 20, "eval_every": 10, "checkpoint_every": 3}
    found["real"]["taken"] = taken * MIB
    row = memory.row_of(found)
    assert (row["ratio"], row["within 15%"]) == (ratio, within)


@pytest.mark.slow
def test_a_real_run_uses_train_and_includes_the_memory_of_workers():
    settings = {"num_steps": 21, "eval_every": 10, "sample_tokens": 0, "n_ctx": 16, "n_layers": 1, "n_emb": 16}
    found = ours.train_run("classic", settings, {"backend": "numpy", "tf32": False})
    assert found["ms"] > 0
    assert found["taken"] is None or found["taken"] > 5 * MIB
    assert set(memory.GPTS) < set(PRESETS)
