"""Sweeps of variants in several ranks of MPI: all of them train, and only the first one writes and prints."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from bench_cases import ROOT, answering, nothing, says
from mpi_runs import mpiexec, needs_mpi

from baby_xp.errors import BabyError
from bench import parameters, recipes, variants

PROGRAM = '''
"""Trains three variants, as fast as children start."""
import json, os
from baby_xp import distributed
from bench import variants

def trained(value):
    """What a child does: it says which rank asked it."""
    return {"failed": None, "val_loss": value, "rank": os.environ["RANK_OF_TEST"]}

if __name__ == "__main__":
    group, kept, result = distributed.join("mpi"), [], {"trained": {"kept": {}}}
    os.environ["RANK_OF_TEST"] = str(group.rank)
    requests = {name: {"value": number / 3} for number, name in enumerate(["kept", "a", "b", "c"])}
    with group.others() as others:
        if others is not None:
            keep = lambda: kept.append(len(result["trained"]))
            variants.train_all("sweep:trained", requests, result, 1, keep, others)
    if group.rank == 0:
        print(json.dumps([kept, result["trained"]]))
'''
SETTINGS = "n_ctx=8 n_emb=8 head_size=8 n_heads=2 n_layers=1 batch_size=8 num_steps=4 eval_every=4"
TUNE = "--tune", f"fast: baby {SETTINGS}", f"slow: baby {SETTINGS} muon_lr=0.001", "--seeds", "1", "--file"


def test_other_ranks_train_too(monkeypatch):
    asked, trained = [], {"kept": {}}
    answering(monkeypatch, lambda task, key: asked.append(key) or {"failed": None, "val_loss": f"{task} {key}"})
    requests = {key: {"key": key} for key in ("kept", *"abcd")}
    with ThreadPoolExecutor(1) as rank:
        variants.train_all("x:y", requests, {"trained": trained}, 1, lambda: None, [rank.submit])
        assert sorted(asked) == [*"abcd"]
        assert {key: found["val_loss"] for key, found in trained.items() if found} == {
            key: f"x:y {key}" for key in "abcd"
        }
        with pytest.raises(BabyError, match="one variant at a time: leave out --jobs"):
            variants.train_all("x:y", requests, {"trained": {}}, 2, lambda: None, [rank.submit])


@pytest.mark.parametrize("program", [parameters, recipes])
def test_times_are_not_measured_in_several_ranks(monkeypatch, capsys, program):
    answering(monkeypatch, nothing)
    assert says(monkeypatch, program, "--speed", "--file", "x.json", "--distributed", "mpi") == 2
    assert "--speed needs a quiet machine: leave out --distributed" in capsys.readouterr().err


@needs_mpi
@pytest.mark.slow
def test_each_rank_trains_in_processes_of_its_own(tmp_path):
    (tmp_path / "sweep.py").write_text(PROGRAM, "utf-8")
    done = mpiexec(3, str(tmp_path / "sweep.py"), cwd=ROOT, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 0, done.stderr
    kept, trained = json.loads(done.stdout)
    assert kept == [2, 3, 4]
    assert {name: found.get("val_loss") for name, found in trained.items()} == {
        "kept": None, "a": 1 / 3, "b": 2 / 3, "c": 1.0,
    }  # fmt: skip
    assert sorted(found["rank"] for found in trained.values() if found) == ["0", "1", "2"]
    assert sorted(line.split()[0] for line in done.stderr.splitlines()) == ["a:", "b:", "c:"]


@needs_mpi
@pytest.mark.slow
def test_the_losses_are_those_of_one_rank(tmp_path, monkeypatch, capsys):
    done = mpiexec(3, "-m", "bench.recipes", *TUNE, str(tmp_path / "ranks.json"), "--distributed", "mpi", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert says(monkeypatch, recipes, *TUNE, str(tmp_path / "one.json")) == 0
    ranks, one = (json.loads((tmp_path / f"{name}.json").read_text("utf-8")) for name in ("ranks", "one"))
    assert ranks["trained"] == one["trained"]
    assert done.stdout.count("Trained on") == 1


@needs_mpi
@pytest.mark.slow
def test_a_file_of_another_base_ends_all_ranks_in_one_line(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"base": {}, "trained": {}, "timed": {}}), "utf-8")
    file = str(tmp_path / "other.json")
    done = mpiexec(3, "-m", "bench.parameters", "--train", "--file", file, "--distributed", "mpi", cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("bench.parameters: ") == 1
    assert "is of another base or another text: name a new file with --file" in done.stderr
