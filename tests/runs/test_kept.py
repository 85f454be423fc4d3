"""Runs that earlier commits wrote can be loaded, generate the same text and resume to the same end.

Each folder of tests/runs/kept is named after the commit that wrote it: its runs (`stored`), their texts, and the
results of that commit for each stopped run without the stop: text, loss and the parameters at the end.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import baby_xp

KEPT = sorted((Path(__file__).parent / "kept").iterdir())
RUNS = [
    pytest.param(folder, name, id=f"{folder.name}-{name}")
    for folder in KEPT
    for name in json.loads((folder / "expected.json").read_text("utf-8"))
]


@pytest.fixture
def kept(tmp_path, monkeypatch, request):
    """A kept run: its folder, and the expected results."""
    folder, name = request.param
    shutil.copytree(folder, tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "kept")
    expected = json.loads(Path("expected.json").read_text("utf-8"))[name]
    return expected, load_file("expected.safetensors").get(name)


@pytest.mark.parametrize("kept", [pytest.param(p.values, id=p.id) for p in RUNS], indirect=True)
def test_a_kept_run_loads_generates_and_resumes(kept):
    expected, params = kept
    guid = expected["guid"]
    run = baby_xp.load(guid, path="stored", backend="numpy")
    prompt = "4+" if "digits" in run.config["data"] else "the "
    assert run.generate(prompt, num_tokens=8, greedy=True) == expected["now"]
    assert next(found for found in baby_xp.list_runs("stored") if found.guid == guid).state == (
        run.config["result"]["state"]
    )
    if run.config["result"]["state"] != "stopped":
        return
    resumed = baby_xp.resume(guid, path="stored")
    # to the last bit on the machine that wrote them; on others, matrix products round differently
    np.testing.assert_allclose(load_file(resumed.files.state)["params"], params, rtol=1e-4, atol=1e-6)
    assert resumed.config["result"]["val_loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_every_kept_run_is_listed(folder):
    guids = {run["guid"] for run in json.loads((folder / "expected.json").read_text("utf-8")).values()}
    assert {found.guid for found in baby_xp.list_runs(folder / "stored")} == guids
    assert all(found.state != "damaged" for found in baby_xp.list_runs(folder / "stored"))
