"""The benchmarks' arithmetic, refusals and rules, without measuring anything."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from baby_xp import backend as backends
from baby_xp import counts
from baby_xp import generate as decoding
from baby_xp.models import Model

sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed
from bench import (
    child,
    contenders,
    crossover,
    epoch,
    generate,
    generators,
    gpu,
    processes,
    report,
    scaling,
    train,
    workloads,
)

RATE = {"alone": 45.0, "two at once": 44.0, "best": 50.0}
TINY = workloads.Workload("tiny", "for tests", 11, 8, 16, 2, 2, 3, 0.0, 2, 1)


def run(*ms: float, peak: int = 2**20) -> dict:
    """What a child process tells of one round."""
    return {"ms": list(ms), "memory": [{"peak": peak, "shared": 0}], "about": {"version": "1", "workers": "1"}}


@pytest.fixture
def result() -> dict:
    """A race of W1 in two rounds: medians over both are 20 for us, 25 for torch and 40 for jax."""
    machine = {"processor": "A 1", "cores": 2, "system": "Linux x", "python": "3"}
    found = {
        "baby_xp": [run(10, 30, peak=30 << 20), run(20, 20, peak=20 << 20)],
        "torch": [run(25, 25, peak=60 << 20), run(25, 25, peak=60 << 20)],
        "jax": [run(40, 40, peak=40 << 20), run(40, 40, peak=50 << 20)],
    }
    return {
        "date": "2026-01-02T03:04:05+00:00", "machine": machine, "removed_variables": [], "backend": "numpy",
        "product_rate_before": RATE, "product_rate_after": {**RATE, "best": 40.0}, "ceilings": {},
        "races": [
            {"workload": "W1", "precision": "float32", "flops": 400_000_000, "bytes": 30_000_000, "runs": found,
             "failed": {}},
        ],
    }  # fmt: skip


def says(monkeypatch, program, *arguments: str) -> int:
    """The exit code of a program with these arguments."""
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    try:
        return program.main()
    except SystemExit as end:
        return end.code


# the floor of the products, and the best peer


def test_products_at_full_speed(result):
    # 0.4 Gflop at 2 cores x 50 Gflop/s, the better of the two rates
    assert train.products_ms(result, *result["races"]) == pytest.approx(4.0)
    shares = [row["products' share"] for row in train.rows_of(result, *result["races"])]
    assert shares == ["20%", "16%", "10%"]


def test_the_speed_of_cpu_cores_is_no_floor_of_a_gpu(result):
    result["backend"] = "cupy"
    assert not any("products' share" in row for row in train.rows_of(result, *result["races"]))
    assert [row["share of the ceiling"] for row in train.rows_of(result, *result["races"])] == ["", "", ""]
    assert not any("full speed" in line for line in train.verdict(result, *result["races"]))


def test_the_verdict_is_against_the_best_peer(result):
    time, memory, _ = train.verdict(result, *result["races"])
    assert time == "- W1: time a step: 0.80 of the best peer's (torch); by round 0.80 to 0.80"
    assert memory == "- W1: peak memory: 0.60 of the smallest peer's (jax)"


def test_rounds_that_differ_are_told(result):
    result["races"][0]["runs"]["baby_xp"] = [run(20, 20), run(30, 30)]
    assert "1.00 of the best peer's (torch); by round 0.80 to 1.20" in train.verdict(result, *result["races"])[0]


def test_without_peers_or_memory_there_is_no_verdict(result):
    (race,) = result["races"]
    found = race["runs"]
    for one in found["torch"] + found["jax"]:
        one["memory"] = []
    assert not any("memory" in line for line in train.verdict(result, race))
    race["runs"] = {"baby_xp": found["baby_xp"]}
    assert [line for line in train.verdict(result, race) if "peer" in line] == []


def test_kept_results_hold_every_time_and_do_not_replace_one_another(result, tmp_path):
    text = "\n".join(train.document(result))
    stems = [report.keep(tmp_path, result, text, "-generate") for _ in range(2)]
    assert [stem.name for stem in stems] == [
        "2026-01-02-a-1-2-cores-generate",
        "2026-01-02-a-1-2-cores-generate-2",
    ]
    kept = json.loads((tmp_path / f"{stems[0].name}.json").read_text())
    assert [one["ms"] for one in kept["races"][0]["runs"]["baby_xp"]] == [[10, 30], [20, 20]]
    assert (tmp_path / f"{stems[1].name}.md").read_text() == text + "\n"


@pytest.mark.parametrize(("rate", "busy"), [(38.0, False), (37.0, True)])
def test_a_busy_machine_is_told(result, rate, busy):
    result["product_rate_after"] = {**RATE, "two at once": rate}
    assert any("BUSY" in line for line in train.document(result)) == busy


# refusals


@pytest.mark.parametrize("program", [train, generate, scaling, crossover, epoch, gpu])
@pytest.mark.parametrize(
    "arguments",
    [["--workloads", "W9"], ["--peers", "theano"], ["--axes", "depth"], ["--steps", "0"], ["--tokens", "none"],
     ["--batches", "1,0"], ["--rounds", "-1"], ["--backend", "fortran"], ["--axes", ""], ["--workloads", ""],
     ["--precision", "float8"], ["--precision", ""], ["--widths", "24"], ["--preset", "baby"]],
)  # fmt: skip
def test_bad_arguments_end_with_2(monkeypatch, capsys, program, arguments):
    monkeypatch.setattr(processes, "ask", lambda task, **request: pytest.fail("something was measured"))
    assert says(monkeypatch, program, *arguments) == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("theirs", "differ"),
    [([4.0, 3.0], False), ([4.0003, 3.0], False), ([4.0005, 3.0], True), ([4.0, 2.999], True),
     ([4.0, float("nan")], True)],
)  # fmt: skip
def test_training_that_differs_is_not_compared(monkeypatch, capsys, theirs, differ):
    losses = {"baby_xp": [4.0, 3.0], "torch": theirs}
    monkeypatch.setattr(processes, "ask", lambda task, name, **request: {"losses": losses[name]})
    monkeypatch.setattr(contenders, "missing", lambda peer, backend: None)
    lineup = {"float32": ["baby_xp", "torch"]}
    assert bool(train.disagreement(workloads.WORKLOADS["W1"], lineup, "numpy")) == differ
    if differ:
        monkeypatch.setattr(train, "measure", lambda *a: pytest.fail("something was measured"))
        assert says(monkeypatch, train, "--workloads", "W1", "--peers", "torch") == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("shortfall", "differ"), [(0.0, False), (5e-5, False), (2e-4, True), (float("nan"), True)]
)
def test_generation_that_differs_is_not_compared(monkeypatch, capsys, shortfall, differ):
    answers = {"greedy": {"ids": [[1, 2], [3, 4]]}, "read_along": {"shortfalls": [[0.0, 0.0], [0.0, shortfall]]}}
    monkeypatch.setattr(processes, "ask", lambda task, **request: answers[task])
    monkeypatch.setattr(contenders, "missing", lambda peer, backend: None)
    problem = generate.disagreement(workloads.WORKLOADS["W1"], 2, ["torch-1-thread"], "numpy")
    assert bool(problem) == differ
    if differ:
        assert "token 2 of baby_xp is not the likeliest for torch" in problem
        monkeypatch.setattr(generate, "measure", lambda *a: pytest.fail("something was measured"))
        assert says(monkeypatch, generate, "--batches", "2", "--peers", "torch") == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


# generation


def test_generation_counts_the_steps_after_the_warm_up(monkeypatch):
    asked = []

    def stub(workload, batch, num_tokens, backend):
        asked.append(num_tokens)
        return contenders.Outcome([], {}), [float(number) for number in range(num_tokens - 1)]

    monkeypatch.setitem(generators.GENERATORS, "stub", stub)
    found = child.generate("stub", "W1", 1, tokens=3, warmup=5, backend="numpy")
    assert (asked, found["ms"]) == ([8], [4.0, 5.0, 6.0])


def test_tokens_a_second_come_from_the_mean_and_count_all_texts():
    race = {"workload": "W1", "batch": 16, "runs": {"baby_xp": [run(1, 1, 4)], "torch": [run(2, 2, 2)]}}
    ours, theirs = generate.rows_of(race)
    assert (ours["ms a step"], ours["mean"], ours["tokens/s"]) == ("1.000", "2.000", "8,000")
    assert (theirs["baby_xp / this"], theirs["by mean"]) == ("0.50", "1.00")
    assert [line.partition(" of ")[0] for line in generate.verdict(race)] == [
        "- W1, 16 at once: median step: 0.50",
        "- W1, 16 at once: mean step: 1.00",
    ]


def our_text(workload, steps: int) -> np.ndarray:
    """The likeliest tokens by baby_xp (steps, 1), without a cache."""
    model, backend = workload.model(0.0), backends.load("numpy")
    weights = backend.asarray(generators.weights_of(model))
    greedy, prompt = decoding.Sampling(greedy=True), generators.prompts_of(workload, 1)[0]
    return np.array([list(decoding.generate(backend, model, weights, prompt, steps, greedy, use_cache=False))]).T


def test_the_peer_writes_the_same_text():
    pytest.importorskip("torch")
    text = our_text(TINY, 40)
    assert len(set(text.ravel())) > 3
    assert generators.torch_shortfalls(TINY, text).max() <= generate.TOLERANCE


@pytest.mark.parametrize("fault", ["window", "positions", "cache"])
def test_a_peer_that_does_something_else_is_noticed(monkeypatch, fault):
    pytest.importorskip("torch")
    from bench import torch_generate

    text = our_text(TINY, 40)
    if fault == "window":  # drops one token at a time
        monkeypatch.setattr(torch_generate, "window_start", lambda length, n_ctx: max(0, length - n_ctx))
    elif fault == "positions":  # never moves on to the second half of the context
        monkeypatch.setattr(torch_generate, "window_start", lambda length, n_ctx: (length - 1) // 4 * 4)
    else:  # what was kept is lost
        attention = torch_generate._attention
        monkeypatch.setattr(
            torch_generate, "_attention", lambda a, x, cache, t: attention(a, x, cache.zero_() if t else cache, t)
        )
    assert generators.torch_shortfalls(TINY, text).max() > generate.TOLERANCE


# scaling


def point(value: int, ms: float, flops: int = 100, peak: int | None = 10, needed: int = 10, workers: int = 1):
    return {"axis": "n_ctx", "value": value, "ms": ms, "flops": flops, "peak": peak, "arrays": {"all": needed},
            "workers": workers}  # fmt: skip


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        (point(2, ms=3.0, flops=200), []),  # 1.5 a piece, no more
        (point(2, ms=3.1, flops=200), ["time"]),
        (point(2, ms=0.1, flops=200), []),  # what falls is no jump
        (point(2, ms=1.0, peak=16), ["memory"]),
        (point(2, ms=1.0, peak=30, needed=20), []),
        (point(2, ms=1.6, peak=None), ["time"]),
    ],
)
def test_a_jump_is_more_than_the_counts_explain(later, expected):
    assert scaling.jumps(point(1, ms=1.0), later) == expected


def test_notes_name_jumps_and_another_number_of_workers():
    assert scaling.note(None, point(1, ms=1.0)) == ""
    assert scaling.note(point(1, ms=1.0), point(2, ms=1.0, workers=2)) == "workers 1 -> 2"
    later = point(2, ms=2.0, peak=20, workers=2)
    assert scaling.note(point(1, ms=1.0), later) == "workers 1 -> 2, JUMP in time, JUMP in memory"


@pytest.mark.parametrize(("medians", "runs", "jumped"), [([9, 2, 8], 2, []), ([9, 8, 7], 3, ["time"])])
def test_what_seems_to_jump_is_measured_again(monkeypatch, medians, runs, jumped):
    answers = iter(medians)
    monkeypatch.setattr(processes, "ask", lambda task, **request: run(next(answers)))
    flops = scaling.counted("n_layers", 1, scaling.at("n_layers", 1))["flops"]
    previous = point(1, ms=1.0, flops=flops)
    found = scaling.measured("n_layers", 2, 5, None, previous)
    assert found["flops"] > 1.9 * flops
    assert (len(found["runs"]), scaling.jumps(previous, found)) == (runs, jumped)


def test_memory_is_what_an_idle_process_does_not_have():
    found = scaling.point_of({}, [run(1, peak=30), run(1, peak=25)], scaling.BASE, {"peak": 10, "shared": 5})
    config = scaling.BASE.model(0.0).config
    assert found["peak"] == 15
    assert found["arrays"] == counts.arrays(config, scaling.BASE.vocab_size, scaling.BASE.batch_size, 1)


def test_every_point_is_a_model_with_heads_of_one_width():
    for axis, values in scaling.AXES.items():
        for value in values:
            workload = scaling.at(axis, value)
            model = workload.model(0.0)
            assert isinstance(model, Model)
            assert model.config.n_emb // model.config.n_heads == 32
            assert {"batch": workload.batch_size, **vars(model.config)}[axis] == value
    assert workloads.of(vars(scaling.at("batch", 2))) == scaling.at("batch", 2)


def test_the_number_of_steps_stays_in_bounds():
    steps = [scaling.steps_for(flops) for flops in (10**6, 4 * 10**9, 10**12)]
    assert steps[0] == scaling.MOST
    assert scaling.FEWEST < steps[1] < scaling.MOST
    assert steps[2] == scaling.FEWEST


def test_the_table_tells_what_jumped(result):
    points = [{**point(16, ms=1.0), "runs": [run(1)]}, {**point(32, ms=2.0), "runs": [run(2)]}]
    document = scaling.document({**result, "axes": {"n_ctx": points}})
    assert document[-1] == "- jumps: n_ctx 32 (JUMP in time)"
    assert "workers 1" not in "\n".join(document[:6])
