"""A run and its text: it is found from any folder, its ids are checked, and no other text is used silently."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import all_of, metrics_of

import baby_xp
import baby_xp.session
from baby_xp import api
from baby_xp.config import DataConfig
from baby_xp.errors import BabyError
from baby_xp.files import try_to_lock
from baby_xp.run import Run
from baby_xp.runs import store, table
from baby_xp.text import dataset
from baby_xp.text.corpus import Corpus, text_hash

TEXT = "the cat sat on the mat.\nit sat and sat, and so did the hat. " * 30
TINY = {
    "n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 1, "batch_size": 4, "num_steps": 12,
    "eval_every": 4, "checkpoint_every": 4, "sample_tokens": 5, "warmup_steps": 3, "backend": "numpy",
    "workers": 1,
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The current folder with a text, and another folder beside it with a different text of the same name."""
    for name, text in (("home", TEXT), ("other", TEXT.replace("cat", "cow"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "input.txt").write_text(text, encoding="utf-8", newline="\n")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


class Meddler(baby_xp.Listener):
    """Calls a function at the first evaluation of a training."""

    def __init__(self, meddle, at: int = 4):
        self.meddle, self.at = meddle, at

    def evaluated(self, record) -> None:
        if record["step"] == self.at and not record["whole_validation"]:
            self.meddle()


def stop() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """A run without interruptions, which no test changes."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "input.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    return api.train("classic", data=str(folder / "input.txt"), path=folder / "runs", **TINY)


def assert_same(found: Run, expected: Run) -> None:
    arrays = load_file(found.files.state)
    for name, array in load_file(expected.files.state).items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def ids_of(runs: Path) -> Path:
    (path,) = (runs / "corpora").glob("*.ids")
    return path


# locations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["input.txt", "../home/input.txt"])
def test_the_text_is_the_one_that_was_trained_on_wherever_the_run_is_called_from(home, monkeypatch, data, whole):
    runs = home / "runs"
    run = api.train("classic", data=data, path=runs, listener=Meddler(stop), **TINY)
    loss, rows = run.evaluate(num_tokens=5).loss, run.check(tokens=4, elements=1, directions=1)
    monkeypatch.chdir(home.parent / "other")
    assert api.load(path=runs, backend="numpy").evaluate(num_tokens=5).loss == loss
    assert api.load(path=runs, backend="numpy").check(tokens=4, elements=1, directions=1) == rows
    assert_same(api.resume(path=runs), whole)


def test_a_folder_that_was_moved_as_a_whole_finds_its_text_there(home, monkeypatch):
    run = api.train("classic", data="input.txt", **TINY)
    loss = run.evaluate(num_tokens=5).loss
    home.rename(home.parent / "moved")
    monkeypatch.chdir(home.parent / "moved")
    assert api.load(backend="numpy").evaluate(num_tokens=5).loss == loss
    monkeypatch.chdir(home.parent / "other")
    with pytest.raises(BabyError, match=r"is no longer the text .*--data"):  # a different text with the same name
        api.load(path="../moved/runs", backend="numpy").evaluate()
    monkeypatch.chdir(home.parent)
    with pytest.raises(BabyError, match=r"no longer at .*home/input\.txt; give its new path with --data"):
        api.load(path="moved/runs", backend="numpy").evaluate()
    with pytest.raises(BabyError, match="no longer at"):
        api.resume(path="moved/runs", num_steps=13)
    assert api.resume(path="moved/runs", num_steps=13, data="moved/input.txt").config["result"]["steps"] == 13


def test_among_two_texts_of_one_name_the_hash_decides(home, monkeypatch):
    run = api.train("classic", data="input.txt", **TINY)
    loss = run.evaluate(num_tokens=5).loss
    shutil.copy("input.txt", home.parent / "copy.txt")
    Path("input.txt").write_text("another text, now, " * 50)
    monkeypatch.chdir(home.parent / "other")
    Path("input.txt").write_text(TEXT.upper())
    with pytest.raises(BabyError, match=r"home/input\.txt is no longer the text"):
        api.load(path=home / "runs", backend="numpy").evaluate()
    Path("input.txt").write_text(TEXT)
    assert api.load(path=home / "runs", backend="numpy").evaluate(num_tokens=5).loss == loss


@pytest.mark.slow
def test_a_file_named_like_a_built_in_text_needs_a_path(home):
    Path("nursery").write_text("not a rhyme\n" * 200)
    Path("shakespeare").write_text("not a play\n" * 200)
    run = api.train("classic", **{**TINY, "num_steps": 2})
    assert run.config["data"] == {**run.config["data"], "data": "nursery", "file": None}
    assert run.evaluate(num_tokens=5).entropy > 0
    # as earlier commits wrote it
    (home.parent / "nursery").write_text("not a rhyme either")
    assert dataset.of_run(DataConfig("nursery"), str(home.parent / "nursery"), "0" * 64) == DataConfig("nursery")
    assert dataset.of_run(DataConfig("shakespeare"), str(home.parent / "nursery"), "0" * 64).data == "shakespeare"
    named = api.train("classic", data="./nursery", **{**TINY, "num_steps": 2})
    assert named.config["data"]["file"] == str(home / "nursery")


@pytest.mark.parametrize("code", [errno.EACCES, errno.ELOOP])
def test_a_text_that_cannot_be_read_is_an_error_with_advice(home, monkeypatch, code):
    run, stat = api.train("classic", data="input.txt", **TINY), os.stat

    def refuse(path, **how):
        if str(path).endswith("input.txt"):
            raise OSError(code, os.strerror(code))
        return stat(path, **how)

    monkeypatch.setattr(os, "stat", refuse)
    advice = {errno.EACCES: "check its permissions", errno.ELOOP: "symbolic links"}[code]
    for ask in (run.evaluate, run.check, lambda: api.resume(num_steps=13)):
        with pytest.raises(BabyError, match=rf"input\.txt cannot be read \({os.strerror(code)}\); .*{advice}"):
            ask()


@pytest.mark.skipif(os.name == "nt", reason="there, every file name is text")
def test_the_name_of_a_text_need_not_be_utf_8(home, whole):
    name = os.fsdecode(b"caf\xe9\n.txt")
    try:
        os.rename("input.txt", name)
    except OSError:
        pytest.skip("this file system takes no such name")
    run = api.train("classic", data=name, listener=Meddler(stop), **TINY)
    assert run.config["result"]["state"] == "stopped"
    assert_same(api.resume(), whole)
    assert "caf\\udce9\\n.txt" in run.files.report.read_text("utf-8")
    assert api.load(backend="numpy").evaluate(num_tokens=5).tokens > 0


# ids ----------------------------------------------------------------------------------------------------

DAMAGE = {
    "zeros": lambda data: bytes(len(data)),
    "ids out of range": lambda data: b"\xc8" * len(data),
    "one byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "the hash": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut": lambda data: data[:100],
    "as older commits wrote it": lambda data: data[:-32],
    "longer": lambda data: data + b"\0",
    "empty": lambda data: b"",
}


def test_damaged_ids_are_created_again(home, whole):
    run = api.train("classic", data="input.txt", listener=Meddler(stop), **TINY)
    loss, path = run.evaluate(num_tokens=5).loss, ids_of(Path("runs"))
    data = path.read_bytes()
    for name, damage in DAMAGE.items():
        path.write_bytes(damage(data))
        assert run.evaluate(num_tokens=5).loss == loss, name
        assert path.read_bytes() == data, name
        shutil.copytree("runs", name)
        ids_of(Path(name)).write_bytes(damage(data))
        assert_same(api.resume(path=name), whole)
        assert ids_of(Path(name)).read_bytes() == data, name
    path.write_bytes(b"x")
    Path("input.txt").unlink()
    with pytest.raises(BabyError, match="no longer at"):
        run.evaluate()


def test_ids_that_change_during_training_have_no_effect(home, whole):
    """Even if they are truncated, which would kill the process if they were memory-mapped."""
    for name, damage in DAMAGE.items():

        def meddle(name=name, damage=damage):
            path = ids_of(Path(name))
            path.write_bytes(damage(path.read_bytes()))

        assert_same(api.train("classic", data="input.txt", path=name, listener=Meddler(meddle), **TINY), whole)


def test_mapped_ids_that_change_end_the_training_before_the_next_checkpoint(home, monkeypatch, whole):
    monkeypatch.setattr("baby_xp.text.corpus.IN_MEMORY", 0)

    def damage():
        path = ids_of(Path("runs"))
        with path.open("r+b") as file:  # in place, because the training has mapped it
            file.write(bytes(200))

    with pytest.raises(BabyError, match=r"\.ids was changed while it was in use; it will be rewritten"):
        api.train("classic", data="input.txt", listener=Meddler(damage, at=8), **TINY)
    (files,) = (store.RunFiles(Path("runs"), guid) for guid in store.guids(Path("runs")))
    config = store.read_sealed(files.config)
    assert (config["result"]["state"], config["result"]["steps"]) == ("failed", 4)
    assert_same(api.resume(), whole)


def test_touched_or_removed_mapped_ids_have_no_effect(home, monkeypatch, whole):
    monkeypatch.setattr("baby_xp.text.corpus.IN_MEMORY", 0)
    touched = api.train(
        "classic", data="input.txt", path="a",
        listener=Meddler(lambda: os.utime(ids_of(Path("a")), (1, 1))), **TINY,
    )  # fmt: skip
    assert_same(touched, whole)
    if os.name != "nt":  # where a mapped file cannot be removed
        gone = Meddler(lambda: shutil.rmtree("b/corpora"))
        assert_same(api.train("classic", data="input.txt", path="b", listener=gone, **TINY), whole)


def test_half_written_ids_of_killed_processes_are_removed(home):
    folder = Path("runs/corpora")
    folder.mkdir(parents=True)
    for name in ("0a.17.0b.tmp", ".0a.ids.1a2b3c4d.tmp"):  # the names in earlier versions and in this one
        (folder / name).write_bytes(b"half")
    with open(folder / ".0b.ids.1a2b3c4d.tmp", "wb") as growing:
        assert try_to_lock(growing)  # as its writer locks it
        api.train("classic", data="input.txt", **{**TINY, "num_steps": 2})
        assert sorted(path.suffix for path in folder.iterdir()) == [".ids", ".tmp"]


# several runs -------------------------------------------------------------------------------------------

BAD = {
    "not UTF-8 at its end": TEXT.encode() + b"\xff",
    "too short": b"ab",
    "empty": b"",
}


@pytest.mark.first_case
@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
@pytest.mark.parametrize("keep_text", [False, True])
def test_a_failed_run_keeps_the_files_of_one_that_trains(home, content, keep_text, whole):
    """The other run's folder of outputs is still empty, and the runs share the folder of ids."""
    Path("bad.txt").write_bytes(content)

    class Fails(baby_xp.Listener):
        def started(self, session, step):
            with pytest.raises(BabyError):
                api.train("classic", data="bad.txt", **TINY)
            if not keep_text:  # even if others remove it
                shutil.rmtree("runs/outputs")

    run = api.train("classic", data="input.txt", listener=Fails(), **TINY)
    assert_same(run, whole)
    assert run.files.report.exists()
    assert len(list(Path("runs/configs").iterdir())) == 1


def test_a_text_that_cannot_be_used_leaves_no_ids_and_keeps_those_of_others(home):
    with pytest.raises(BabyError, match="too short"):
        api.train("classic", data="input.txt", **{**TINY, "n_ctx": 100_000})
    assert not Path("runs").exists()
    api.train("classic", data="input.txt", **{**TINY, "num_steps": 2})
    before = ids_of(Path("runs")).read_bytes()
    for wrong, words in (({"n_ctx": 100_000}, "too short"), ({"workers": 0}, "workers")):
        with pytest.raises(BabyError, match=words):
            api.train("classic", data="input.txt", **{**TINY, **wrong})
        assert ids_of(Path("runs")).read_bytes() == before


def test_a_broken_link_among_the_configs_hides_no_run(home):
    run = api.train("classic", data="input.txt", **{**TINY, "num_steps": 2})
    other = store.RunFiles(Path("runs"), "aaaaaaaa-1111-4111-8111-111111111111")
    try:
        other.config.symlink_to("nowhere")
    except OSError:
        pytest.skip("this file system has no links")
    assert [(found.guid, found.state) for found in table.summaries("runs")] == [
        (run.guid, "done"), (other.guid, "damaged"),
    ]  # fmt: skip
    assert api.load(backend="numpy").guid == run.guid
    with pytest.raises(BabyError, match="is missing: the run is incomplete"):
        api.load(other.guid, backend="numpy")


def test_the_hash_of_a_text_equals_that_of_its_corpus(home):
    for data in (b"a\r\nb\rc", b"\xef\xbb\xbfcaf\xc3\xa9"):
        Path("input.txt").write_bytes(data)
        assert text_hash("input.txt") == Corpus.from_file("input.txt", "byte", "cache").sha256


def test_a_run_in_a_read_only_folder_can_be_evaluated(home, monkeypatch):
    """Its ids are then kept in memory."""
    run = api.train("classic", data="input.txt", **TINY)
    loss, rows = run.evaluate(num_tokens=5).loss, run.check(tokens=4, elements=1, directions=1)
    shutil.rmtree("runs/corpora")
    before = all_of(Path("runs"))

    def read_only(self, *how, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("touch", "mkdir"):
        monkeypatch.setattr(Path, name, read_only)
    assert run.evaluate(num_tokens=5).loss == loss
    assert run.check(tokens=4, elements=1, directions=1) == rows
    assert before == all_of(Path("runs"))


def test_ids_that_cannot_be_stored_leave_no_folder(home, monkeypatch):
    run = api.train("classic", data="input.txt", **TINY)
    shutil.rmtree("runs/corpora")

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BabyError, match="free some space on that disk"):
            run.check(tokens=4, elements=1, directions=1)
    assert not os.path.exists("runs/corpora")
    run.check(tokens=4, elements=1, directions=1)
    assert os.listdir("runs/corpora")


def test_a_removed_current_folder_is_harmless(home, monkeypatch):
    run = api.train("classic", data=str(home / "input.txt"), path=home.parent / "runs", **TINY)
    loss = run.evaluate(num_tokens=5).loss

    def gone():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(os, "getcwd", gone)
    assert api.load(path=home.parent / "runs", backend="numpy").evaluate(num_tokens=5).loss == loss


def test_an_interrupt_after_an_evaluation_still_writes_its_line(home, monkeypatch):
    """A second Ctrl-C may come at any time."""
    append = baby_xp.session.append_line

    def interrupted(path, value):
        if value["step"] == 8:
            raise KeyboardInterrupt
        append(path, value)

    monkeypatch.setattr(baby_xp.session, "append_line", interrupted)
    run = api.train("classic", data="input.txt", **TINY)
    assert run.config["result"]["state"] == "stopped"
    assert [record["step"] for record in metrics_of(run.files)] == [4, 8]
