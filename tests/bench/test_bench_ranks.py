"""bench.ranks: the model of the time of a step, its tables, ranks started by mpiexec, hosts in namespaces."""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from bench_cases import ROOT, TINY_FIELDS, answering, nothing, result, run, says
from mpi_runs import needs_mpi
from thread_ranks import together

from baby_xp.errors import BabyError
from baby_xp.training.ranks import Ranks
from bench import harness, hosts, launch, peers, rank, ranks, time_model, variants, workloads
from bench.hosts import Line
from bench.time_model import Link, Traffic, Work
from bench.workloads import WORKLOADS

PAGE = ROOT / "docs/machines.md"
LINK = Link(latency=1e-3, bandwidth=1e8, message=1e-5, add=1e-9)
FREE = Link(latency=0.0, bandwidth=float("inf"), message=0.0, add=0.0)


# the model ----------------------------------------------------------------------------------------------


def test_what_a_rank_sends():
    # three quarters of 4 MB to the others, twice; shares of 1 MB, in two pieces; five numbers of 8 bytes
    assert time_model.traffic(1_000_000, 4) == Traffic(2 * 3_000_000 + 3 * 40, (2 + 3) * 3, 7)
    assert time_model.traffic(1_000, 2) == Traffic(4_000 + 40, 4, 3)
    assert time_model.traffic(1_000_000, 512).trips == 3  # shares of 8 KB
    assert time_model.traffic(1_000_000, 1) == Traffic(0.0, 0, 0)


def test_the_time_of_an_exchange_is_that_of_its_parts():
    parts = time_model.exchange_parts(1_000_000, 4, LINK)
    assert parts == pytest.approx({"bytes": 0.0600012, "messages": 15e-5, "adding": 1e-3, "latency": 7e-3})
    assert time_model.exchange_seconds(1_000_000, 4, LINK) == pytest.approx(sum(parts.values()))
    assert time_model.exchange_seconds(1_000_000, 1, LINK) == 0.0


def test_what_is_computed_follows_from_two_batches():
    work = time_model.work(16, 1.7, 4, 0.5)
    assert (work.sample, work.update) == pytest.approx((0.1, 0.1))
    assert work.seconds(8, 2) == pytest.approx(0.85)
    assert time_model.work(16, 1.6, 4, 0.4).update == pytest.approx(0.0, abs=1e-12)


def test_the_efficiency_of_ranks():
    ideal, work = Work(0.1, 0.0), Work(0.1, 0.1)
    assert time_model.efficiency(ideal, 16, 1, 1000, LINK) == 1.0
    assert time_model.efficiency(ideal, 16, 16, 1000, FREE) == pytest.approx(1.0)
    assert time_model.efficiency(ideal, 16, 64, 1000, FREE) == pytest.approx(0.25)  # 48 ranks have no sample
    assert time_model.efficiency(work, 16, 16, 1000, FREE) == pytest.approx(1.0)
    assert time_model.efficiency(work, 16, 16, 1000, LINK) < 1.0


# tables -------------------------------------------------------------------------------------------------


def races(**losses) -> dict:
    """A kept result: two ranks take 1.02 of the time of two workers."""
    found = result("numpy", {})
    race = lambda ms, of=(4.0, 3.0): [{**run(*ms), "losses": list(of)}]  # noqa: E731
    runs = {ranks.WORKERS: race((1700.0,)), ranks.RANKS: race((1734.0,)), ranks.QUARTER: race((500.0,))}
    return {**found, "races": [{"workload": name, "runs": runs, "failed": {}} for name in ("W3", "W4")]}


def networks() -> dict:
    """A kept result: one place, in which an exchange took 10 % less than the model says."""
    model = 1e3 * time_model.exchange_seconds(1_000_000, 2, LINK)
    one = {
        "place": "TCP, not limited", "ranks": 2, "link": vars(LINK),
        "exchanges": [{"elements": 1_000_000, "ms": [model / 1.1] * 3, "bytes": 4_040_000.0}],
        "steps": [{"workload": "W1", "elements": 1_000_000, "ms": [model + 10], "ms computing": [10.0]}],
    }  # fmt: skip
    return {**result("numpy", {}), "networks": [one]}


def overlaps() -> dict:
    """A kept result: sending while computing saves a tenth, and a fifth in the other round."""
    one = {"workload": "W1", "steps": 2, "at the end": [50.0] * 4, "meanwhile": [45.0, 45.0, 40.0, 40.0]}
    return {**result("numpy", {}), "overlaps": [{"place": "1 Gbit/s", "ranks": 2, "found": [one]}]}


KEPT = {"ranks": races, "network": networks, "overlap": overlaps}


def cells(lines: list[str]) -> list[list[str]]:
    """The cells of a table's rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_tables():
    found = ranks.tables({kind: make() for kind, make in KEPT.items()})
    assert cells(found["ranks"])[0] == ["W3", "1700.0", "1734.0", "1.020", "1.020 to 1.020"]
    assert cells(found["links"]) == [["TCP, not limited", "2", "1.000", "0.8", "10.0", "1.00"]]
    assert cells(found["exchanges"]) == [["TCP, not limited", "2", "1,000,000", "43.70", "48.07", "+10%", "1.010"]]
    assert cells(found["steps"]) == [["TCP, not limited", "2", "W1", "10.0", "48.1", "58.07", "58.07", "+0%"]]
    assert cells(found["machine"])[1] == ["networks", "2026-01-02", "A, AVX2, b K, 2 cores"]
    assert cells(found["machine"])[2][0] == "sending while computing"
    assert cells(found["overlaps"])[0][2:] == ["W1", "50.0", "42.5", "+15.0%", "+10.0% to +20.0%"]
    assert found.keys() == {"machine", "ranks", "links", "exchanges", "steps", "overlaps", "paper"}


def test_on_paper_ranks_without_samples_gain_nothing():
    rows = cells(ranks.tables({kind: make() for kind, make in KEPT.items()})["paper"])
    of_w3 = {row[2]: row for row in rows if row[:2] == ["W3", "16"]}
    # two samples of 0.1 s, and an eighth of 0.1 s; then one
    assert [of_w3[ranks][3] for ranks in ("8", "64", "512")] == ["212 ms", "102 ms", "100 ms"]
    more = {row[2]: row for row in rows if row[:2] == ["W3", f"{16 * 64:,}"]}
    assert more["64"][3] == "1.6 s"
    efficiencies = [[float(cell.split(", ")[1].rstrip("%")) for cell in row[4:]] for row in rows]
    assert all(a <= b for of_row in efficiencies for a, b in itertools.pairwise(of_row))
    assert {row[0] for row in rows} == {"W3", "W4", "GPT-2 small"}


def test_a_workload_that_was_not_measured_computes_at_the_same_rate():
    w4, gpt2 = WORKLOADS["W4"], WORKLOADS["W5"]
    assert ranks.extrapolated(Work(1.0, 2.0), w4, w4) == Work(1.0, 2.0)
    twice = ranks.extrapolated(Work(1.0, 2.0), w4, replace(w4, n_layers=12))
    assert 1.9 < twice.sample < 2.0
    assert 3.8 < twice.update < 4.0
    assert ranks.extrapolated(Work(1.0, 2.0), w4, gpt2).sample > 10


def test_the_tables_of_the_page_match_the_kept_results():
    text = PAGE.read_text("utf-8")
    found = ranks.tables(ranks.read())
    assert set(re.findall(variants.MARK.format("(.*)"), text)) == found.keys()
    assert variants.filled(text, found) == text


def test_ranks_sent_the_bytes_of_the_model():
    counted = [
        one["bytes"] / time_model.traffic(one["elements"], network["ranks"]).bytes
        for network in ranks.read()["network"]["networks"]
        for one in network["exchanges"]
        if one["bytes"] and one["elements"] >= 100_000
    ]
    assert counted
    assert all(0.98 < share < 1.05 for share in counted)


# the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [["--workloads", "W9"], ["--rounds", "0"], ["--page", "x.md"], ["--network", "--steps", "3"],
     ["--network", "--workloads", "W1"], ["--overlap", "--steps", "3"], ["--overlap", "--network"]],
)  # fmt: skip
def test_bad_flags_are_refused_before_anything_is_measured(monkeypatch, capsys, words):
    answering(monkeypatch, nothing)
    assert says(monkeypatch, ranks, *words) == 2
    assert "error: argument" in capsys.readouterr().err


def test_a_measurement_is_kept_and_its_goal_is_judged(monkeypatch, capsys, tmp_path):
    ms, losses = {1: 20.0, 2: 21.5}, {1: [4.0, 3.0], 2: [4.0, 3.0]}

    def answer(of_launch, ranks, **request):
        return {**run(ms[ranks]), "losses": losses[ranks]}

    answering(monkeypatch, answer)
    monkeypatch.setitem(ranks.KEPT, "ranks", tmp_path / "ranks.json")
    words = ["--workloads", "W1,W2", "--rounds", "2"]
    assert says(monkeypatch, ranks, *words, "--keep") == 0
    assert "W1, 2 ranks / 2 workers: at most 1.050: 1.075, MISSED" in capsys.readouterr().out
    kept = json.loads((tmp_path / "ranks.json").read_text("utf-8"))
    assert [race["workload"] for race in kept["races"]] == ["W1", "W2"]
    losses[2] = [4.0, 3.1]
    assert says(monkeypatch, ranks, *words) == 1
    assert "a loss differs: 3.100000, that of 2 workers 3.000000" in capsys.readouterr().out


def test_without_a_kept_result_there_is_no_table(monkeypatch, capsys, tmp_path):
    (tmp_path / "ranks.json").write_text("{}")
    monkeypatch.setattr(ranks, "KEPT", {kind: tmp_path / f"{kind}.json" for kind in KEPT})
    assert says(monkeypatch, ranks, "--paper") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "python -m bench.ranks --network --keep" in line


# ranks and hosts ----------------------------------------------------------------------------------------


@needs_mpi
@pytest.mark.slow
def test_two_ranks_train_as_one_process_does():
    request = {"name": harness.US, "workload": TINY_FIELDS, "steps": 3, "warmup": 1, "dropout": 0.0, "workers": 1}
    alone = peers.train(**request)
    found = launch.answer(2, "bench.peers:train", {**request, "distributed": "mpi"})
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert len(found["ms"]) == 3
    apart = launch.answer(2, "bench.peers:train", {**request, "distributed": "mpi", "exchange": False})
    assert apart["losses"] != pytest.approx(alone["losses"], rel=1e-6)


@needs_mpi
@pytest.mark.slow
def test_ranks_that_fail_end_with_one_line(capfd):
    with pytest.raises(BabyError, match="mpiexec with 2 ranks ended with exit code"):
        launch.together(2, "bench.peers:train", {"name": "nobody", "workload": "W1"})


def test_without_mpiexec_nothing_is_started(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *arguments, **options: None)
    with pytest.raises(BabyError, match="install mpi4py"):
        launch.together(2, "os:getpid", {})


def test_hosts_need_root(monkeypatch, capsys):
    answering(monkeypatch, nothing)
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    monkeypatch.setattr(ranks, "PLACES", {"1 Gbit/s": ranks.PLACES["1 Gbit/s, 1 ms"]})
    assert says(monkeypatch, ranks, "--network") == 2
    assert "run it as root" in capsys.readouterr().err


def test_both_ways_of_sending_take_turns():
    workload = workloads.of(TINY_FIELDS)
    for found in together(2, lambda group: rank.in_turn(group, workload, 2, 3)):
        assert (found["workload"], found["steps"]) == (workload.name, 3)
        assert [len(found[name]) for name in rank.MACHINES] == [6, 6]


def test_other_losses_are_noticed(monkeypatch):
    class Wrong(Ranks):
        def step(self):
            step, scale = super().step(), self.group.machines()

            def scaled(state, batch):
                state, metrics = step(state, batch)
                return state, {"loss": metrics["loss"] * scale}

            return scaled

    monkeypatch.setattr(rank, "Ranks", Wrong)
    with pytest.raises(BabyError, match=r"losses of .* differ"):
        together(2, lambda group: rank.in_turn(group, workloads.of(TINY_FIELDS), 1, 1))


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("delay", [1e-4, 0.0])
def test_ranks_on_hosts_of_their_own_send_the_bytes_of_the_model(delay):
    request = {"sizes": [300_000], "workloads": {}}
    try:
        with hosts.connected(2, Line(1e9, delay)) as place:
            found = launch.together(2, "bench.rank:measure", {**request, "interface": place.interface}, place)
    except BabyError as reason:
        if "mpiexec" in str(reason):
            raise
        pytest.skip(str(reason))
    (one,) = found["exchanges"]
    assert 1.0 <= one["bytes"] / time_model.traffic(300_000, 2).bytes < 1.05
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert hosts.NAME not in left


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone has such namespaces")
def test_frames_reach_the_host_of_their_address():
    """The process between the hosts; pairs of sockets take the place of the network devices."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(3)]
    theirs = [pair[1].fileno() for pair in pairs]
    command = [sys.executable, "-m", "bench.hosts", "0.001", *map(str, theirs)]
    frame = lambda *to: bytes([*to, *range(100)])  # noqa: E731
    options = {"stdin": subprocess.PIPE, "pass_fds": theirs, "cwd": ROOT, "env": harness.environment()}
    with subprocess.Popen(command, **options) as switch:
        ours = [pair[0] for pair in pairs]
        for one in ours:
            one.settimeout(60)
        to_2, to_all = frame(2, 0, 0, 0, 0, 2), frame(*[255] * 6)
        ours[0].send(to_2)
        ours[1].send(to_all)
        assert sorted(ours[2].recv(200) for _ in range(2)) == sorted([to_2, to_all])
        assert ours[0].recv(200) == to_all
        switch.stdin.close()
        assert switch.wait(60) == 0
    ours[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        ours[1].recv(200)
    for pair in pairs:
        for one in pair:
            one.close()


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="for Linux")
def test_bytes_sent_are_read_from_the_system():
    assert hosts.sent("lo") >= 0
    with pytest.raises(BabyError, match="no interface nowhere"):
        hosts.sent("nowhere")
