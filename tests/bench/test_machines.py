"""The newest results of each machine class, and the tables with a column for each of them."""

import re

import pytest
from bench_cases import MACHINE, MIB, RATE, ROOT, answering, nothing, result, run, says

from bench import harness, machines, peers, train, variants

PAGE = ROOT / "docs/performance.md"
CLASS = "A, AVX2, b K, 2 cores"
BY_NUMBA = "numpy 1 with numba 2"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Results are kept there."""
    monkeypatch.setattr(machines, "RESULTS", tmp_path)
    return tmp_path


def measured(*workloads: str, day: int = 1, machine: dict | None = None, **runs) -> dict:
    """What bench.train measures on these workloads, with the same runs on each."""
    found = result("numpy", {}, **runs)
    races = [{**race, "workload": workload} for race in found["races"] for workload in workloads]
    machine = {**MACHINE, **(machine or {})}
    return {**found, "date": f"2026-01-{day:02}T03:04:05+00:00", "machine": machine, "races": races}


def test_a_workload_that_is_measured_again_replaces_its_older_result_alone(folder):
    older = [run(30.0), run(40.0)]
    machines.keep(measured("W1", "W2", baby_xp=older))
    machines.keep(measured("W2", day=2, machine={"cores": 4}, baby_xp=older))
    newer = measured("W2", day=3, machine={"blas": "b 2 K", "processor": "A 2"}, baby_xp=[run(10.0)])
    machines.keep(newer)
    machines.keep(measured("W1", day=4, torch=older))  # without baby_xp
    kept = machines.read()
    days = {name: {workload: one["date"][8:10] for workload, one in found.items()} for name, found in kept.items()}
    assert days == {CLASS: {"W1": "01", "W2": "03"}, "A, AVX2, b K, 4 cores": {"W2": "02"}}
    assert kept[CLASS]["W2"] == newer
    (race,) = kept[CLASS]["W1"]["races"]
    assert (race["workload"], race["runs"]) == ("W1", {"baby_xp": older})
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["train-a-avx2-b-k-2-cores.json", "train-a-avx2-b-k-4-cores.json"]


def test_each_class_has_a_column_with_and_without_numba():
    whole = measured(
        "W1", baby_xp=[run(7, peak=30 * MIB, backend=BY_NUMBA), run(9, peak=20 * MIB, backend=BY_NUMBA)],
        **{peers.WITHOUT_NUMBA: [run(10, 10, peak=20 * MIB)]}, torch=[run(20, 20, peak=60 * MIB)],
        jax=[run(1000, 2000, peak=40 * MIB)],
    )  # fmt: skip
    alone = measured("W1", day=2, baby_xp=[run(200.0)])
    alone["product_rate_after"] = {**RATE, "two at once": 30.0}
    kept = {"A": {"W1": whole, "W4": whole}, "B": {"W1": alone}}
    found = {}
    for table, (_, _, *lines) in machines.tables(kept).items():
        for line in lines:
            row, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found[table, row] = cells
    missing = machines.LACKING
    of_w1 = {at: cells for at, cells in found.items() if at[1].startswith("W1")}
    assert of_w1 == {
        ("time", "W1, with numba"): ["8.0 ms, ratio 0.40", missing],
        ("time", "W1, NumPy alone"): ["10.0 ms, ratio 0.50", "200 ms"],
        ("time", "W1, best peer"): ["20.0 ms (torch)", missing],
        ("time", "W1, measured"): ["2026-01-01", "2026-01-02, on a busy machine"],
        ("products", "W1, with numba"): ["50%", missing],  # 400 Mflop at 2 x 50 Gflop/s take 4 ms
        ("products", "W1, NumPy alone"): ["40%", "2%"],
        ("products", "W1, products alone"): ["4.0 ms at 50 Gflop/s per core"] * 2,
        ("memory", "W1, with numba"): ["30 MiB, ratio 0.75", missing],
        ("memory", "W1, NumPy alone"): ["20 MiB, ratio 0.50", missing],
        ("memory", "W1, smallest peer"): ["40 MiB (jax)", missing],
    }
    others = {row: cells for (_, row), cells in found.items() if not row.startswith("W1")}
    assert {row[:2] for row in others} == {"W4"}
    assert {cells[1] for cells in others.values()} == {missing}
    heads = [lines[0].strip("| ").split("|") for lines in machines.tables(kept).values()]
    assert [[cell.strip() for cell in head] for head in heads] == [["A", "B"]] * 3


def test_bench_train_keeps_a_whole_run_and_writes_the_tables_into_a_page(monkeypatch, capsys, folder):
    ms = {"baby_xp": 8.0, peers.WITHOUT_NUMBA: 10.0, "torch": 20.0}

    def answer(task, name, **request):
        backend = BY_NUMBA if name == "baby_xp" else "numpy 1"
        return run(ms[name], backend=backend) if task == "bench.peers:train" else [4.0, 3.0]

    answering(monkeypatch, answer)
    words = ["--workloads", "W1", "--peers", f"{peers.WITHOUT_NUMBA},torch", "--rounds", "2"]
    assert says(monkeypatch, train, *words) == 0
    assert machines.read() == {}
    assert says(monkeypatch, train, *words, "--keep") == 0
    (race,) = machines.read()[CLASS]["W1"]["races"]
    assert {name: [one["ms"] for one in runs] for name, runs in race["runs"].items()} == {
        name: [[value]] * 2 for name, value in ms.items()
    }
    monkeypatch.setattr(harness, "ask", nothing)
    page = folder / "page.md"
    page.write_text("".join(f"{variants.MARK.format(name)}\n\n" for name in machines.TABLES), "utf-8")
    capsys.readouterr()
    assert says(monkeypatch, train, "--table", "--page", str(page)) == 0
    said, tables = capsys.readouterr().out, machines.tables(machines.read())
    for text in (said, page.read_text("utf-8")):
        assert all("\n".join(lines) in text for lines in tables.values())


@pytest.mark.parametrize("option", ["--keep", "--table"])
def test_a_damaged_result_is_reported_before_anything_is_measured(monkeypatch, capsys, folder, option):
    (folder / "train-x.json").write_text("{}")
    answering(monkeypatch, nothing)
    assert says(monkeypatch, train, option) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train-x.json" in line


def test_numpy_alone_is_measured_on_the_backend_numpy_where_numba_is(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "numba" else object())
    assert "numba is not installed" in peers.missing(peers.WITHOUT_NUMBA, "numpy")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    assert peers.missing(peers.WITHOUT_NUMBA, "numpy") is None
    assert "for the backend numpy" in peers.missing(peers.WITHOUT_NUMBA, "cupy")
    assert peers.WITHOUT_NUMBA not in peers.BY_NAME


def test_the_tables_of_the_page_match_the_kept_results():
    text = PAGE.read_text("utf-8")
    assert re.findall(variants.MARK.format("(.*)"), text) == list(machines.TABLES)
    assert variants.filled(text, machines.tables(machines.read())) == text
