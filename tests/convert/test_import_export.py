"""Models of the original Little Baby are imported as runs and exported again."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
from small_runs import all_of

from baby_xp import api
from baby_xp.cli import main
from baby_xp.errors import BabyError

NAMES = ["pre-mha-mlp", "post-mha-mlp", "pre-moh-mlp", "pre-mha-moe"]
TEXT = "The cat sat on the mat. " * 60


def logits(run, inputs) -> np.ndarray:
    p = run.model.layout.unpack(np, run.params)
    return run.model.forward(run.backend.xp, p, np.array(inputs, np.int32))[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_reference_model_gives_its_logits_as_a_run_and_after_the_round_trip(reference_folder, tmp_path, name):
    expected = json.loads((reference_folder / f"expected_{name}.json").read_text("utf-8"))
    there = api.import_littlebaby(reference_folder / f"model_{name}.json", path=tmp_path / "runs")
    api.export_littlebaby(api.load(there.guid, path=tmp_path / "runs", backend="numpy"), tmp_path / "original")
    model = tmp_path / "original" / "models" / f"model_{there.guid}.json"
    back = api.import_littlebaby(model, path=tmp_path / "again")
    for run in (there, api.load(path=tmp_path / "again", backend="numpy")):
        found = logits(run, expected["inputs"])
        np.testing.assert_allclose(found, np.reshape(expected["logits"], found.shape), atol=1e-10, rtol=0)
    assert back.guid == there.guid
    assert back.params.tobytes() == there.params.tobytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    small = {"n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "num_steps": 20, "batch_size": 4}
    small |= {"sample_tokens": 0, "backend": "numpy"}
    return api.train("classic", path=folder / "ours", data=str(folder / "text.txt"), **small)


@pytest.fixture
def imported(tmp_path, trained):
    """A run that was exported to the original's files and imported again."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    shutil.copytree(trained.files.folder, tmp_path / "ours")
    run = api.load(trained.guid, path=tmp_path / "ours", backend="numpy")
    files = api.export_littlebaby(run, tmp_path / "original")
    return run, api.import_littlebaby(files[2], path=tmp_path / "runs", dtype="float32"), text


def test_it_generates_the_same_text_and_can_be_finetuned(imported):
    ours, run, text = imported
    assert run.guid == ours.guid
    assert run.generate("The ", num_tokens=40, greedy=True) == ours.generate("The ", num_tokens=40, greedy=True)
    text.write_text(TEXT + "Ü" * 9, encoding="utf-8")
    tuned = api.finetune(path=run.files.folder, data=str(text), num_steps=3, backend="numpy")
    assert tuned.guid == f"{run.guid}_finetuned"
    assert tuned.tokenizer.vocab[-1] == "Ü"


def test_an_imported_run_has_no_last_weights(imported, capsys):
    _, run, _ = imported
    with pytest.raises(BabyError, match=f"run {run.guid} was imported and has no last checkpoint"):
        api.load(path=run.files.folder, backend="numpy", weights="last")
    assert main(["generate", "--weights=last", "--backend=numpy", f"--path={run.files.folder}"]) == 2
    assert "was imported" in capsys.readouterr().err


def test_an_imported_run_cannot_be_resumed_and_has_no_text(imported):
    _, run, text = imported
    with pytest.raises(BabyError, match="imported and has no training to resume"):
        api.resume(path=run.files.folder)
    with pytest.raises(BabyError, match="imported without its text; name one with --data"):
        run.evaluate()
    assert run.evaluate(data=str(text), num_tokens=20).loss > 0
    assert [one.state for one in api.list_runs(run.files.folder)] == ["imported"]


def test_importing_twice_is_refused_and_changes_nothing(imported, tmp_path):
    _, run, _ = imported
    before = all_of(run.files.folder)
    model = tmp_path / "original" / "models" / f"model_{run.guid}.json"
    with pytest.raises(BabyError, match=r"there is already a run "):
        api.import_littlebaby(model, path=run.files.folder)
    assert before == all_of(run.files.folder)


def test_an_export_that_fails_half_way_leaves_nothing_and_names_its_own_flag(imported, tmp_path, monkeypatch):
    replace = os.replace

    def full(source, target):
        if target.name.startswith("model_"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BabyError, match=r"free some space on that disk, or name another place with --to$"):
        api.export_littlebaby(imported[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()  # nor any of the folders


def test_the_command_line_imports_and_exports(imported, tmp_path, capsys):
    _, run, _ = imported
    there = ["export", "littlebaby", run.guid[:8], f"--path={run.files.folder}", f"--to={tmp_path / 'out'}"]
    assert main(there) == 0
    model = capsys.readouterr().out.splitlines()[-1]
    assert main(["import", "littlebaby", model, f"--path={tmp_path / 'third'}"]) == 0
    assert f"run {run.guid}" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "words"), [
    (["import"], "import littlebaby"),
    (["import", "gpt2", "x"], "import littlebaby"),
    (["import", "littlebaby"], "name the model"),
    (["import", "littlebaby", "nothing.json"], "nothing.json cannot be read"),
    (["import", "littlebaby", "model.pkl"], "is a pickle"),
    (["export", "onnx"], "export littlebaby"),
    (["export", "littlebaby", "--path=nowhere"], "there are no runs in nowhere"),
])  # fmt: skip
def test_bad_arguments_of_import_and_export_are_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04N.")
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model.pkl"}
