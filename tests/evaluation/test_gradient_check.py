"""`check` agrees if the gradients are correct, and names exactly the wrong ones if they are not."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from baby_xp_backends.numpy_kernels import KERNELS

from baby_xp import api
from baby_xp.cli import main
from baby_xp.errors import BabyError
from baby_xp.evaluation import gradient_check
from baby_xp.layers import embedding, layernorm, linear
from baby_xp.resources import limits, process_memory
from baby_xp.run import Run

TEXT = "the cat sat on the mat.\nit sat and sat. " * 25
TINY = {
    "n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 2, "batch_size": 4, "num_steps": 20,
    "eval_every": 10, "sample_tokens": 0, "lr": 1e-2, "warmup_steps": 5, "backend": "numpy",
}  # fmt: skip


def trained(folder, **more) -> Run:
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8", newline="\n")
    return api.train("classic", path=folder / "runs", **{"data": str(text), **TINY, **more})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return trained(tmp_path_factory.mktemp("run"))


def wrong(rows) -> list[str]:
    return [row.name for row in rows if not row.agrees]


@pytest.mark.first_case
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"c_sequence": "post", "c_attention": "moh", "c_network": "moe", "dropout": 0.2, "gelu": "erf"},
        {"dropout": 0.3, "dtype": "float64"},
        {"c_model": "modern"},
        # the gate of an untrained model has hardly a gradient: slopes below what rounding resolves
        {"c_sequence": "post", "c_attention": "moh", "c_network": "moe", "num_steps": 1},
    ],
    ids=["classic", "other switches", "dropout", "modern", "untrained"],
)
def test_every_array_of_a_trained_run_agrees(tmp_path, settings):
    run = trained(tmp_path, **settings)
    rows = run.check()
    layout = run.model.layout
    assert [(row.name, row.shape) for row in rows] == list(zip(layout.paths, layout.shapes, strict=True))
    assert wrong(rows) == []
    assert max(row.worst for row in rows) < 1e-6
    assert all(row.gradient > 0 and row.directions > 0 and row.elements > 0 for row in rows)


def test_the_equation_model_agrees(tmp_path):
    for activation in ("tanh", "gelu"):
        run = api.train("equations", path=tmp_path, num_steps=30, backend="numpy", activation=activation)
        rows = run.check(tokens=8)
        assert [row.name for row in rows] == list(run.model.layout.paths)
        assert wrong(rows) == []


# faults ---------------------------------------------------------------------------------------------------


def fault_in(monkeypatch, module, spoil) -> None:
    """The module's backward, with wrong parameter gradients."""
    plain = module.backward

    def backward(xp, p, saved, dy):
        found = plain(xp, p, saved, dy)
        return (spoil(found[0]), found[1]) if isinstance(found, tuple) else spoil(found)

    monkeypatch.setattr(module, "backward", backward)


def scaled(key, factor):
    return lambda dp: {**dp, key: dp[key] * factor} if key in dp else dp


def one_element(key):
    """All elements are correct except the one with the largest gradient."""

    def spoil(dp):
        g = dp[key].copy().reshape(-1)
        g[np.argmax(np.abs(g))] *= 0.99
        return {**dp, key: g.reshape(dp[key].shape)}

    return spoil


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("module", "spoil", "ends"),
    [
        (layernorm, scaled("gain", 1.001), ("norm1.gain", "norm2.gain", "ln_f.gain")),
        (layernorm, scaled("bias", 0.0), ("norm1.bias", "norm2.bias", "ln_f.bias")),
        (layernorm, one_element("gain"), ("norm1.gain", "norm2.gain", "ln_f.gain")),
        (embedding, scaled("weight", -1), ("wte.weight",)),
        (linear, scaled("bias", 2), ("out.bias", "up.bias", "down.bias", "lm_head.bias")),
        (linear, scaled("weight", 1 + 1e-4),
         ("qkv.weight", "out.weight", "up.weight", "down.weight", "lm_head.weight")),
        (linear, one_element("weight"),
         ("qkv.weight", "out.weight", "up.weight", "down.weight", "lm_head.weight")),
    ],
    ids=["gain", "bias", "one gain", "embedding", "linear bias", "linear weight", "one weight"],
)  # fmt: skip
def test_an_error_in_a_layer_shows_only_in_its_arrays(run, monkeypatch, module, spoil, ends):
    fault_in(monkeypatch, module, spoil)
    expected = [path for path in run.model.layout.paths if path.endswith(ends)]
    assert expected
    assert wrong(run.check(elements=6)) == expected


def test_an_error_in_a_passed_on_gradient_shows_in_all_earlier_arrays(run, monkeypatch):
    plain = layernorm.backward

    def backward(xp, p, saved, dy):
        dp, dx = plain(xp, p, saved, dy)
        return dp, dx * 1.01 if p["gain"][0] == last else dx

    tree = run.model.layout.unpack(np, run.params.astype(np.float64))
    last = tree["ln_f"]["gain"][0]
    monkeypatch.setattr(layernorm, "backward", backward)
    assert wrong(run.check(directions=1, elements=1)) == [
        path for path in run.model.layout.paths if not path.startswith(("ln_f", "lm_head"))
    ]


def test_an_error_in_a_fast_kernel_shows_only_in_its_column(run, monkeypatch):
    plain = KERNELS["layernorm.backward"]

    def backward(xp, p, saved, dy):
        dp, dx = plain(xp, p, saved, dy)
        return {**dp, "gain": dp["gain"] * 1.01}, dx

    monkeypatch.setitem(KERNELS, "layernorm.backward", backward)
    rows = {row.name: row for row in run.check(directions=1, elements=1)}
    for name, row in rows.items():
        assert row.agrees == (not name.endswith("gain")), name
        assert max(row.directions, row.elements) < 1e-6
    assert rows["ln_f.gain"].fast == pytest.approx(0.01, rel=0.02)


def test_nan_does_not_agree(run):
    broken = run.params.copy()
    broken[run.model.layout.sizes[0]] = np.nan  # of wpe
    rows = dataclasses.replace(run, params=broken).check(directions=1, elements=1)
    assert "wpe.weight" in wrong(rows)
    assert "nan" in gradient_check.summary(rows)


# the batch and the directions -----------------------------------------------------------------------------


def test_slopes_are_exact_for_polynomials_up_to_the_fourth_degree(monkeypatch):
    """The plain central difference is exact only up to the second degree: 4 D(h) - D(2h) has no h^2 term."""
    slopes = gradient_check.Slopes.__new__(gradient_check.Slopes)
    slopes.flat = np.array([0.5, -0.3, 0.8])
    slopes.moving = slopes.flat.copy()
    monkeypatch.setattr(
        slopes, "loss", lambda w: float(w[0] + w[1] ** 3 * 1e4 + w[1] ** 4 - w[2] ** 2), raising=False
    )
    assert slopes.along(slice(1, 2), np.array([1.0])) == pytest.approx(3e4 * 0.09 + 4 * -0.027, rel=1e-9)
    assert slopes.along(slice(0, 3), np.array([1.0, 0, -1.0])) == pytest.approx(1 + 1.6, rel=1e-9)
    np.testing.assert_array_equal(slopes.moving, slopes.flat)


def test_directions_and_elements():
    gradient = np.array([0.1, -5, 0.2, 3, 0.0, 1])
    found = list(gradient_check.chosen_directions(np.random.default_rng(0), gradient, 4, 3))
    assert len(found) == 7
    for direction in found:
        assert np.linalg.norm(direction) == pytest.approx(1)
    elements = [int(np.argmax(direction)) for direction in found[3:]]
    assert elements[:2] == [1, 3]
    assert len(set(elements)) == 4
    assert len(list(gradient_check.chosen_directions(np.random.default_rng(0), gradient[:2], 9, 1))) == 3
    assert len(list(gradient_check.chosen_directions(np.random.default_rng(0), gradient, 0, 1))) == 1


def test_rows_depend_on_the_seed(run):
    rows = run.check(directions=1, elements=0)
    assert rows == run.check(directions=1, elements=0)
    assert rows != run.check(directions=1, elements=0, seed=1)


def test_the_check_uses_the_dropout_of_the_run(tmp_path, monkeypatch):
    run = trained(tmp_path, dropout=0.3)
    rows = run.check(directions=1, elements=0)
    monkeypatch.setattr(gradient_check, "step_noise", lambda *_: None)
    assert run.check(directions=1, elements=0)[0].gradient != rows[0].gradient


def test_the_batch_is_from_the_training_text(run, monkeypatch):
    batches, windows = [], gradient_check.RandomWindows

    def watched(ids, *more):
        found = windows(ids, *more)
        batches.append((run.tokenizer.decode(ids), found.batch(0)))
        return found

    monkeypatch.setattr(gradient_check, "RandomWindows", watched)
    for tokens, length in ((5, 5), (99, 8)):
        run.check(tokens=tokens, batch=3, directions=1, elements=0)
        text, batch = batches[-1]
        assert text == TEXT[: int(0.9 * len(TEXT))]
        assert batch.inputs.shape == batch.targets.shape == (3, length)
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_a_changed_text_is_refused_and_another_one_can_be_given(tmp_path):
    run = trained(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT[:-1], encoding="utf-8", newline="\n")
    with pytest.raises(BabyError, match="no longer the text"):
        run.check()
    assert wrong(run.check(data=str(tmp_path / "text.txt"), directions=1, elements=0)) == []


@pytest.mark.parametrize("name", ["tokens", "batch", "directions"])
def test_bad_sizes_are_refused(run, name):
    for value in (0, -1, 1.5, True):
        with pytest.raises(BabyError, match=f"{name} must be a whole number of at least 1"):
            run.check(**{name: value})
    for other in ("seed", "elements"):
        with pytest.raises(BabyError, match=f"{other} must be a whole number of at least 0"):
            run.check(**{other: -1})


def test_a_batch_that_cannot_fit_is_refused_with_the_largest_that_does(run, monkeypatch):
    monkeypatch.setattr(process_memory, "free", lambda: 64 * 2**20)
    monkeypatch.setattr(gradient_check, "RandomWindows", None)  # the batch is not created
    with pytest.raises(BabyError, match=r"a check of 1,000,000 sequences needs .* choose a batch of") as caught:
        run.check(batch=10**6)
    most = int(str(caught.value).split("choose a batch of at most ")[1].split()[0].replace(",", ""))
    limits.check_batch(run.model, most, 8)
    with pytest.raises(BabyError, match=f"choose a batch of at most {most:,}"):
        limits.check_batch(run.model, most + 1, 8)
    limits.check_batch(run.model, 4 * most, 1)  # shorter sequences take less memory
    monkeypatch.setattr(process_memory, "free", lambda: 1000)
    with pytest.raises(BabyError, match="use a machine with more memory"):
        run.check()


@pytest.mark.slow
def test_the_largest_batch_really_fits(run, monkeypatch):
    monkeypatch.setattr(process_memory, "free", lambda: 16 * 2**20)
    with pytest.raises(BabyError) as caught:
        run.check(batch=10**6)
    most = int(str(caught.value).split("choose a batch of at most ")[1].split()[0].replace(",", ""))
    tracemalloc.start()
    try:
        run.check(batch=most, elements=0, directions=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 8 * 2**20 < peak < 24 * 2**20


def test_a_table_of_equations_bounds_a_check_by_itself(tmp_path, monkeypatch):
    run = api.train("equations", path=tmp_path, num_steps=5, backend="numpy", workers=1)
    monkeypatch.setattr(process_memory, "free", lambda: 2**20)
    assert run.check(batch=10**6, elements=0, directions=1)


# the command ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_prints_a_row_per_array_and_returns_0(run, capsys):
    assert main(["check", run.guid[:8], f"--path={run.files.folder}"]) == 0
    out = capsys.readouterr().out
    rows = run.check()
    layer = ""
    for line in out.splitlines():
        layer = line if line and not line.startswith(" ") else layer
        if line.endswith("agrees"):
            row = next(row for row in rows if row.name == f"{layer}.{line.split()[0]}")
            rows.remove(row)
            assert f"{row.directions:.1e}  {row.elements:>9.1e}  {row.fast:>9.1e}" in line
    assert rows == []
    worst = max(run.check(), key=lambda row: row.worst)
    assert out.splitlines()[-1] == f"28 arrays, worst relative error {worst.worst:.1e} at {worst.name}: all agree"


def test_the_command_returns_1_if_one_array_disagrees(run, capsys, monkeypatch):
    fault_in(monkeypatch, layernorm, scaled("gain", 1.5))
    assert main(["check", run.guid[:8], f"--path={run.files.folder}", "--directions=1", "--elements=0"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("DISAGREES") == 5
    last = out.splitlines()[-1]
    assert "5 disagree, blocks.0.norm1.gain, blocks.0.norm2.gain, blocks.1.norm1.gain" in last


@pytest.mark.parametrize("arguments", [["--tokens=0"], ["--elements=x"], ["--data=nothing.txt"], ["1234"]])
def test_a_run_that_cannot_be_checked_is_one_line(run, capsys, arguments):
    name = [] if arguments == ["1234"] else [run.guid[:8]]
    assert main(["check", *name, *arguments, f"--path={run.files.folder}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
