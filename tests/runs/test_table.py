"""The table of runs: it has every run, whatever happened to it, with its current state."""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_runs import metrics_of

import baby_xp
import baby_xp.api
import baby_xp.files
from baby_xp.cli import main
from baby_xp.errors import BabyError
from baby_xp.runs import state_file, store, table
from baby_xp.runs.store import RunFiles
from baby_xp.runs.table import Summary
from baby_xp.training.checkpoint import Checkpoint

GUIDS = [f"{i}0000000-1111-4111-8111-111111111111" for i in range(6)]
STARTED = "2026-01-02T03:04:05+00:00"


def a_run(folder: Path, guid: str, state: str, *, step: int = 3, val_loss=1.25, losses=(), **result) -> RunFiles:
    """The files of a run that the table reads."""
    files = RunFiles(folder, guid)
    for path in files.of_training:
        path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.zeros(2, np.float32) for name in ("params", "m", "v")}
    state_of = Checkpoint({**arrays, "step": np.array([step], np.int32)})
    state_file.save_state(files.state, state_of, {"step": str(step), "num_steps": "1200"})
    for loss in losses:
        baby_xp.files.append_line(files.metrics, {"step": 1, "val_loss": loss})
    config = {
        "preset": "baby", "started": STARTED, "data": {"data": "my text.txt"},
        "result": {"state": state, "steps": step, "val_loss": val_loss, **result},
    }  # fmt: skip
    store.write_sealed(files.config, config)
    return files


def expected(guid: str, state: str, **more) -> Summary:
    figures = {"steps": 3, "val_loss": 1.25, **more}
    return Summary(guid, state, "baby", "my text.txt", STARTED, num_steps=1200, **figures)


def listed(folder: Path) -> list[str]:
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["runs", f"--path={folder}"]) == 0
    return out.getvalue().splitlines()


@pytest.mark.parametrize("state", ["done", "stopped", "failed"])
def test_a_run_that_ended_shows_how(tmp_path, state):
    a_run(tmp_path, GUIDS[0], state, losses=[9.0])
    assert table.summaries(tmp_path) == [expected(GUIDS[0], state)]


def test_an_imported_run_has_no_checkpoint_and_no_steps(tmp_path):
    a_run(tmp_path, GUIDS[0], "imported", val_loss=None).state.unlink()
    assert table.summaries(tmp_path) == [Summary(GUIDS[0], "imported", "baby", "my text.txt", STARTED, 0, 0, None)]
    assert listed(tmp_path)[1].split()[:3] == ["00000000", "imported", "baby"]


def test_a_run_that_is_held_is_running(tmp_path):
    """Its steps are read from its checkpoint, because the config has those at the start."""
    files = a_run(tmp_path, GUIDS[0], "running", val_loss=None, losses=[3.0, 2.5], steps=0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with store.hold(files):
        assert table.summaries(tmp_path) == [expected(GUIDS[0], "running", val_loss=2.5)]
        assert store.is_held(files)  # the table has not removed it
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_that_says_it_is_running_but_is_not_held_was_killed(tmp_path):
    files = a_run(tmp_path, GUIDS[0], "running", val_loss=None, losses=[3.0, 2.5])
    files.lock.write_bytes(b"")  # a killed process cannot remove it
    assert table.summaries(tmp_path) == [expected(GUIDS[0], "stopped", val_loss=2.5)]


@pytest.mark.parametrize(
    "metrics", [None, b"", b"{", b"[]\n", b"5\n", b'{"step": 1}\n', b"\xff\n", b'"val_loss"\n']
)
def test_a_running_run_without_an_evaluation_has_no_loss(tmp_path, metrics):
    files = a_run(tmp_path, GUIDS[0], "running", val_loss=None)
    if metrics is not None:
        files.metrics.write_bytes(metrics)
    assert table.summaries(tmp_path) == [expected(GUIDS[0], "stopped", val_loss=None)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda config: config.unlink() or config.mkdir(),
        lambda config: config.write_bytes(b""),
        lambda config: config.write_bytes(config.read_bytes()[:-30]),
        lambda config: config.write_bytes(config.read_bytes().replace(b'"done"', b'"lost"')),
        lambda config: config.write_text("{}"),
        lambda config: store.write_sealed(config, {}),
        lambda config: store.write_sealed(config, {"result": None}),
        lambda config: store.write_sealed(config, {"result": {"state": "done"}}),
        lambda config: store.write_sealed(config, {"result": {"state": "done", "val_loss": 1}, "data": 3}),
    ],
)
def test_a_damaged_run_is_listed_and_hides_no_other(tmp_path, damage):
    a_run(tmp_path, GUIDS[0], "done")
    damage(a_run(tmp_path, GUIDS[1], "done").config)
    found = {run.guid: run for run in table.summaries(tmp_path)}
    assert found == {GUIDS[0]: expected(GUIDS[0], "done"), GUIDS[1]: Summary(GUIDS[1], "damaged")}


@pytest.mark.parametrize("metadata", [{"step": "many"}, {"num_steps": ""}, {"step": "3.5"}])
def test_a_checkpoint_without_a_step_makes_a_damaged_run(tmp_path, metadata):
    files = a_run(tmp_path, GUIDS[0], "done")
    save_file({"params": np.zeros(2, np.float32)}, files.state, metadata)
    assert table.summaries(tmp_path) == [Summary(GUIDS[0], "damaged")]


def test_the_newest_comes_first(tmp_path):
    for age, i in enumerate((2, 0, 1)):
        os.utime(a_run(tmp_path, GUIDS[i], "done").config, ns=(0, 10**18 + age))
    assert [run.guid for run in table.summaries(tmp_path)] == [GUIDS[1], GUIDS[0], GUIDS[2]]
    os.utime(RunFiles(tmp_path, GUIDS[2]).config, ns=(0, 2 * 10**18))
    assert table.summaries(tmp_path)[0].guid == GUIDS[2]
    assert [run.guid for run in baby_xp.api.list_runs(tmp_path)] == [GUIDS[2], GUIDS[1], GUIDS[0]]


@pytest.mark.parametrize("kind", ["nothing", "empty", "file"])
def test_a_folder_without_runs_has_an_empty_table(tmp_path, kind):
    folder = tmp_path / "runs"
    {"nothing": lambda: None, "empty": folder.mkdir, "file": lambda: folder.write_text("x")}[kind]()
    if kind == "file":
        with pytest.raises(BabyError, match="cannot be read"):
            table.summaries(folder)
    else:
        assert table.summaries(folder) == []
        assert listed(folder) == [f"no runs in {folder} yet"]


# on the command line ------------------------------------------------------------------------------------


def test_the_command_line_lists_one_run_per_line(tmp_path):
    tuned = f"{GUIDS[0]}_finetuned-2"
    states = ("done", "stopped", "failed", "running", "done")
    runs = list(zip((GUIDS[0], GUIDS[1], tuned, GUIDS[3], GUIDS[4]), states, strict=True))
    for age, (guid, state) in enumerate(runs):
        files = a_run(tmp_path, guid, state, val_loss=None if guid == tuned else 1.25)
        os.utime(files.config, ns=(0, 10**18 + age))
    baby_xp.files.write_json(RunFiles(tmp_path, GUIDS[4]).config, {})
    with store.hold(RunFiles(tmp_path, GUIDS[3])):
        head, *lines = listed(tmp_path)
    assert head.split() == ["run", "state", "preset", "steps", "val", "loss", "started", "(UTC)", "data"]
    steps, when = ["3", "of", "1,200"], ["2026-01-02", "03:04", "my", "text.txt"]
    assert [line.split() for line in lines] == [
        ["40000000", "damaged"],
        ["30000000", "running", "baby", *steps, *when],
        ["00000000_finetuned-2", "failed", "baby", *steps, *when],
        ["10000000", "stopped", "baby", *steps, "1.2500", *when],
        ["00000000", "done", "baby", *steps, "1.2500", *when],
    ]
    assert len({line.find("my text.txt") for line in lines if "my text" in line} | {head.find("data")}) == 1
    for line in lines:  # the first column is a name that the other commands accept
        assert store.find(tmp_path, line.split()[0]).guid in [guid for guid, _ in runs]


def test_trained_runs_are_in_the_table(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 20)
    sizes = {"n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 2, "num_steps": 2}
    seen = []

    class Onlooker(baby_xp.Listener):
        def evaluated(self, record):
            seen.append(table.summaries(tmp_path / "runs")[0])

    run = baby_xp.api.train(
        "baby", path=tmp_path / "runs", backend="numpy", listener=Onlooker(), data=str(tmp_path / "text.txt"),
        sample_tokens=0, eval_every=1, checkpoint_every=1, **sizes,
    )  # fmt: skip
    records = metrics_of(run.files)
    assert [(one.state, one.steps, one.num_steps) for one in seen] == [
        ("running", 0, 2), ("running", 1, 2), ("running", 2, 2),
    ]  # fmt: skip
    assert [one.val_loss for one in seen] == [record["val_loss"] for record in records]
    (ended,) = table.summaries(tmp_path / "runs")
    assert (ended.guid, ended.state, ended.preset, ended.steps) == (run.guid, "done", "baby", 2)
    assert ended.val_loss == run.config["result"]["val_loss"] == records[-1]["val_loss"]
