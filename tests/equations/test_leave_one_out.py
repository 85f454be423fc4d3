"""The equation lab and babyLLM's six steps: what is held out is never seen, and the answers are counted right."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from baby_xp_data import equation_table
from baby_xp_data.equation_table import BABYLLM, EquationTable, pairs

import baby_xp
from baby_xp import cli, config, equations, processes
from baby_xp.arrays import registry
from baby_xp.config import EquationConfig, EquationData
from baby_xp.distributed import Group
from baby_xp.equations import leave_one_out
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.presets import PRESETS, preset
from baby_xp.text import dataset
from baby_xp.training.alone import suitable_number

OF_EQUATIONS = [name for name, run_config in PRESETS.items() if isinstance(run_config.data, EquationData)]


def shortened(name, **overrides):
    """A preset that trains quickly, and learns little."""
    return preset(name).override({"num_steps": 3, "batch_size": 64, **overrides})


# settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "overrides", "match"), [
    ("equations", {"n_ctx": 3}, "n_ctx 3 does not hold a question"),
    ("equations", {"digits": 2}, "n_ctx 4 does not hold a question with operands of 2 digits: the minimum is 6"),
    ("equations", {"max_sum": 19}, "from 9 to 18"),
    ("equations", {"data": "nursery"}, "leave out --data"),
    ("equations-gpt", {"data": "nursery"}, "data of this preset is equations, not 'nursery': leave out --data"),
    ("baby", {"data": "equations"}, "equations have their own presets"),
    ("equations-gpt", {"n_ctx": 8}, "n_ctx 8 does not hold an equation"),
    ("equations", {"held_out": ",".join(BABYLLM.distinct())}, "leaves no equation to train on"),
])  # fmt: skip
def test_bad_settings_are_refused(name, overrides, match, tmp_path):
    with pytest.raises(BabyError, match=match):
        baby_xp.train(name, path=tmp_path / "runs", backend="numpy", num_steps=1, **overrides)
    assert not list(tmp_path.rglob("*.json"))


def test_training_uses_the_settings():
    four = preset("equations").override({"max_sum": 18, "held_out": "4+4,9+7"})
    batch, table = dataset.prepare(four.data, four.model, four.train, None).batches.batch(0), EquationTable(18)
    # without the contexts that do not determine the next token
    contexts, targets = pairs(table.equations(["4+4", "9+7"]), table.undetermined())
    assert np.array_equal(batch.inputs, contexts)
    assert np.array_equal(batch.targets, targets)
    nine = preset("equations-2").override({"seed": 5})
    found, table = dataset.prepare(nine.data, nine.model, nine.train, None), EquationTable(0, 2, "+-")
    assert (found.table, found.held_out) == (table, table.choose("10%", 5))
    assert np.array_equal(found.batches.contexts, pairs(table.equations(found.held_out), n_ctx=9)[0])
    unseen = np.concatenate([batch.inputs for batch in found.validation()])
    assert np.array_equal(unseen, pairs(table.held_out_equations(found.held_out), n_ctx=9)[0])
    assert found.n_validation == len(unseen)


# the six steps --------------------------------------------------------------------------------------------


def test_the_six_steps_answer_a_held_out_sum():
    assert equations.encode("1+1=2 ").tolist() == [3, 1, 3, 12, 4, 0]
    known = equations.make_equations(held_out="4+4")
    assert "4+4=8 " not in known
    contexts, targets = equations.sequences(known)
    settings = equations.hyperparameters()
    weights = equations.initial_weights(settings.model, seed=3)
    assert weights["hidden"]["weight"].shape == (4 * settings.model.n_emb, settings.model.n_hidden)
    before = weights["output"]["weight"].copy()
    brief = replace(settings.train, num_steps=700)
    trained, losses = equations.train(weights, contexts, targets, settings.model, brief)
    assert losses[0] == pytest.approx(np.log(13), abs=0.1)
    assert losses[-1] < 0.01
    assert np.array_equal(before, weights["output"]["weight"])
    likeliest = equations.predict(trained, "4+4=", settings.model)
    assert next(iter(likeliest)) == "8"
    assert likeliest["8"] > 0.9
    assert sum(likeliest.values()) == pytest.approx(1)
    assert list(likeliest.values()) == sorted(likeliest.values(), reverse=True)


@pytest.mark.first_case
@pytest.mark.parametrize("name", OF_EQUATIONS)
def test_the_steps_give_the_weights_of_the_command_train(name, tmp_path):
    run_config = shortened(name, dtype="float64")
    run = baby_xp.train(run_config, path=tmp_path, backend="numpy", workers=1, eval_every=3)
    batches = dataset.prepare(run_config.data, run_config.model, run_config.train, None).batches
    weights = equations.initial_weights(run_config.model, run.tokenizer.vocab_size, run_config.train.seed)
    seen = []
    trained, _ = equations.train(
        weights, batches.contexts, batches.targets, run_config.model, run_config.train,
        each_step=lambda number, weights: seen.append(number),
    )  # fmt: skip
    flat = run.model.layout.pack(np, trained)
    # the weights that a run keeps are those of its best evaluation, here the only one
    np.testing.assert_allclose(flat, run.params, rtol=1e-6, atol=1e-7)
    assert seen == [0, 1, 2]


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["equations-table", "equations-gpt"])
def test_evaluate_reports_the_share_of_held_out_equations(name, tmp_path, capsys):
    settings = {"digits": 1, "operators": "+", "max_sum": 9, "held_out": "60%", "seed": 1}
    steps = 600 if name == "equations-table" else 150
    run_config = shortened(name, num_steps=steps, eval_every=steps, **settings)
    run = baby_xp.train(run_config, path=tmp_path, backend="numpy", workers=1)
    asked = BABYLLM.held_out_equations(BABYLLM.choose("60%", 1))
    right = [run.answer(equation_table.question(equation)) == equation.rstrip() for equation in asked]
    assert run.evaluate().answered == np.mean(right)
    assert 0 < np.mean(right) < 1 or name == "equations-gpt"
    assert cli.main(["evaluate", "--path", str(tmp_path)]) == 0
    assert f"held-out equations answered correctly  {np.mean(right):.1%}" in capsys.readouterr().out


@pytest.mark.first_case
@pytest.mark.parametrize("name", OF_EQUATIONS)
def test_answers_equal_generated_ones(name, tmp_path):
    table = preset(name).data.table
    small = table.digits == 1
    run_config = shortened(name, num_steps=400 if small else 20, eval_every=400)
    run = baby_xp.train(run_config, path=tmp_path, backend="numpy", workers=1)
    asked = table.equations()[:: 2 if small else 370]
    weights = run.model.layout.unpack(np, run.params)
    right, probability = equations.answers(weights, asked, run_config.model, table)
    whole = run_config.model.n_ctx >= table.longest
    for row, equation in enumerate(asked):
        question, answer = equation_table.question(equation), equation_table.answer(equation)
        expected = equation.rstrip() if whole else question + answer[0]
        assert right[row] == (run.answer(question) == expected), equation
    assert not small or 0 < right.mean() < 1  # both cases were seen
    assert np.all((probability > 0) & (probability < 1))


def test_the_probability_of_an_answer_includes_all_its_tokens():
    config = EquationConfig(n_ctx=6, n_emb=2, n_hidden=8)
    weights = equations.initial_weights(config, 13, seed=5)
    weights = {part: {name: 10 * array for name, array in values.items()} for part, values in weights.items()}
    expected = 1.0
    for context, target in [("9+8=", "1"), ("9+8=1", "7"), ("9+8=17", " ")]:
        expected *= equations.predict(weights, context, config)[target]
    _, probability = equations.answers(weights, ["9+8=17 "], config)
    assert probability[0] == pytest.approx(expected)
    four = EquationConfig(n_ctx=4, n_emb=2, n_hidden=8)  # it does not hold "9+8=17": only the first token counts
    weights = equations.initial_weights(four, 13, seed=5)
    _, probability = equations.answers(weights, ["9+8=17 "], four)
    assert probability[0] == pytest.approx(equations.predict(weights, "9+8=", four)["1"])


def test_an_answer_without_an_end_has_one_token_too_many(tmp_path):
    run = baby_xp.train(shortened("equations-table"), path=tmp_path, backend="numpy", workers=1)
    weights = run.model.layout.unpack(np, run.params.copy())
    weights["output"]["bias"][equations.encode("1")] = 1e3
    babbling = replace(run, params=run.model.layout.pack(np, weights))
    assert babbling.answer("9+9=") == "9+9=111"


@pytest.mark.slow
def test_a_gpt_learns_a_small_table(tmp_path):
    run = baby_xp.train(
        "equations-gpt", path=tmp_path, backend="numpy", workers=1, digits=1, operators="+", max_sum=9,
        held_out="4+4", n_ctx=6, n_emb=32, head_size=32, n_layers=1, num_steps=400, batch_size=64,
    )  # fmt: skip
    weights = run.model.layout.unpack(np, run.params)
    known = BABYLLM.equations(["4+4"])
    right, _ = equations.answers(weights, known, run.model.config)
    assert right.mean() > 0.9
    assert baby_xp.load("last", path=tmp_path, backend="numpy").answer("3+4=").startswith("3+4=")


# the lab --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overrides", "seeds"), [
    ("equations", {"seed": 7}, 2), ("equations-table", {"operators": "+-", "n_hidden": 4}, 1),
])  # fmt: skip
def test_each_case_in_turn_and_every_seed(name, overrides, seeds):
    run_config = shortened(name, held_out=leave_one_out.EACH, **overrides)
    results, table = leave_one_out.experiment(run_config, seeds, workers=1), run_config.data.table
    assert results.models == seeds * len(table.distinct())
    asked = sorted((answer.seed, answer.equation) for answer in results.answers)
    first = run_config.train.seed
    assert asked == sorted((first + i, equation) for i in range(seeds) for equation in table.equations())


def test_each_seed_draws_another_share():
    run_config, seen = shortened("equations-2", digits=1, held_out="20%", seed=3, n_hidden=8), []
    results = leave_one_out.experiment(run_config, 2, workers=1, progress=lambda *args: seen.append(args))
    assert seen == [(1, 2), (2, 2)]
    table = EquationTable(0, 1, "+-")
    for seed in (3, 4):
        held_out = table.held_out_equations(table.choose("20%", seed))
        assert [answer.equation for answer in results.answers if answer.seed == seed] == held_out
    assert results.models == 2


def test_several_processes_give_the_results_of_one():
    run_config = shortened("equations", held_out=leave_one_out.EACH)
    one, two = (leave_one_out.experiment(run_config, seeds=1, workers=workers) for workers in (1, 2))
    assert (one.answers, one.losses, one.copied) == (two.answers, two.losses, two.copied)
    assert (one.processes, two.processes) == (1, 2)


def test_the_model_of_a_case_equals_a_run_with_that_case(tmp_path):
    run_config = shortened("equations", num_steps=200, eval_every=200, held_out="2+3", seed=4)
    run = baby_xp.train(run_config, path=tmp_path, backend="numpy", workers=1)
    (answers, loss, _), found = leave_one_out.run_job(run_config), run.model.layout.unpack(np, run.params)
    right, probability = equations.answers(found, ["2+3=5 ", "3+2=5 "], run_config.model)
    assert [answer.equation for answer in answers] == ["2+3=5 ", "3+2=5 "]
    assert [answer.right for answer in answers] == right.tolist()
    assert [answer.probability for answer in answers] == pytest.approx(probability.tolist(), rel=1e-4)
    assert loss < 1


@pytest.mark.slow
def test_answerable_sums_are_answered_correctly():
    """The accuracy that docs/equations.md reports, on a few cases of the table."""
    cases = ["4+4", "1+2", "2+6", "0+7"]
    run_config = preset("equations")
    answers = [leave_one_out.run_job(run_config.override({"held_out": case}))[0] for case in cases]
    assert all(answer.right for of_case in answers for answer in of_case)
    assert np.mean([answer.probability for of_case in answers for answer in of_case]) > 0.9


def fixed(run_config, *rows):
    answers = tuple(leave_one_out.Answer(equation, seed, right, p) for equation, seed, right, p in rows)
    return leave_one_out.Results(run_config, answers, 0.25, 4, 3.0, 2, (0.5, 0.25))


def test_the_figures_of_known_answers():
    results = fixed(
        preset("equations"), ("0+0=0 ", 0, False, 0.1), ("0+0=0 ", 1, False, 0.3), ("1+2=3 ", 0, True, 0.9),
        ("1+2=3 ", 1, False, 0.2), ("2+1=3 ", 0, True, 0.8), ("2+1=3 ", 1, True, 0.7),
    )  # fmt: skip
    assert results.share == 0.5
    assert results.share_without_zeros == 0.75
    assert results.probability == pytest.approx(0.5)
    assert results.of_seeds() == {0: 2 / 3, 1: 1 / 3}
    shares = results.map()
    assert (shares[0, 0], shares[1, 2], shares[2, 1]) == (0, 0.5, 1)
    assert np.isnan(shares).sum() == 97
    text = "\n".join(results.lines())
    held_out = "3 equations, 6 answers of 4 models, 2 seeds"
    for part in (held_out, "50.0%", "75.0%", "33.3% to 66.7%", "25.0% correct"):
        assert part in text
    rows = text.splitlines()[-10:]
    assert rows[1].split() == ["1", ".", ".", "50", *"......."]
    assert rows[2].split() == ["2", ".", "100", *"........"]


def test_the_map_of_larger_operands_groups_them_by_tens():
    run_config = preset("equations-2")
    rows = [("12+34=46 ", 0, True, 1.0), ("15+30=45 ", 0, False, 0.0), ("34-12=22 ", 0, True, 1.0)]
    results = fixed(run_config, *rows)
    assert results.map("+")[1, 3] == 0.5
    assert results.map("-")[3, 1] == 1
    assert results.of_operators() == {"+": 0.5, "-": 1.0}
    again = fixed(run_config, *[("1+1=2 ", seed, True, 1.0) for seed in range(3)], ("2+2=4 ", 0, False, 0.0))
    assert again.of_operators() == {"+": 0.75}  # the mean is over answers, not over equations
    assert results.share_without_zeros is None


@pytest.mark.parametrize(("asked", "name", "held_out"), [
    (("mlp", None, None, None), "equations", leave_one_out.EACH),
    (("mlp", "1", "9", "+"), "equations", leave_one_out.EACH),
    (("mlp", None, "18", None), "equations-table", leave_one_out.EACH),
    (("mlp", None, 0, None), "equations-table", leave_one_out.EACH),
    (("mlp", None, None, "+-"), "equations-table", leave_one_out.EACH),
    (("mlp", "2", None, "+-"), "equations-2", "10%"),
    (("gpt", "2", None, None), "equations-gpt", "10%"),
])  # fmt: skip
def test_the_preset_that_an_experiment_starts_from(asked, name, held_out):
    found, named = leave_one_out.suitable(*asked), preset(name)
    assert found == replace(named, data=replace(named.data, held_out=held_out))


@pytest.mark.parametrize(("asked", "known", "whole", "expected"), [
    ("4+4=8 ", ["4+5=9 ", "3+4=7 ", "1+1=2 "], True, 0),  # 4+5 and 3+4 are equally near: 9 and 7
    ("4+6=10 ", ["4+5=9 ", "5+5=10 "], True, 0),
    ("9+8=17 ", ["9+7=16 ", "8+8=16 ", "2+2=4 "], True, 0),
    ("9+8=17 ", ["9+7=16 ", "8+8=16 ", "2+2=4 "], False, 1),
    ("4+4=8 ", ["4+5=8 ", "3+4=7 "], True, 0.5),
    # operands are aligned by their last digits, and the operator counts
    ("12-3=9 ", ["12+3=15 ", "2-3=9 ", "99-99=0 "], True, 0.5),
])  # fmt: skip
def test_copying_the_nearest(asked, known, whole, expected):
    assert leave_one_out.nearest_copies([asked], known, whole).tolist() == [expected]


def test_the_lab_refuses_texts():
    with pytest.raises(BabyError, match="the equation lab cannot use baby"):
        leave_one_out.experiment(preset("baby"))


@pytest.mark.first_case
@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_that_diverges_ends_in_one_line(workers):
    run_config = shortened("equations", num_steps=300, lr=1e38, min_lr=0.0)
    with pytest.raises(BabyError, match=r"the loss became (nan|inf) with 4\+4 held out, seed [01]: lower --lr"):
        leave_one_out.experiment(run_config, seeds=2, workers=workers)


@pytest.fixture
def children(monkeypatch) -> list[subprocess.Popen]:
    """The processes that were started."""
    started, popen = [], subprocess.Popen
    start = lambda *args, **options: started.append(popen(*args, **options)) or started[-1]  # noqa: E731
    monkeypatch.setattr(subprocess, "Popen", start)
    return started


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_process_ends_the_lab_in_one_line(children):
    def kill(done, of):
        for child in children:
            child.kill()

    with pytest.raises(BabyError, match="a process was killed by signal 9 before its model was trained"):
        leave_one_out.experiment(shortened("equations", num_steps=100), seeds=40, workers=2, progress=kill)
    assert [child.returncode for child in children] == [-signal.SIGKILL] * 2


def test_refused_processes_end_the_lab_in_one_line(children, monkeypatch):
    popen = subprocess.Popen

    def refuse(*args, **options):
        if len(children) == 2:
            raise OSError(errno.EAGAIN, "no more")
        return popen(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", refuse)
    message = r"processes of the equation lab cannot be started \(no more\); try --workers 1"
    with pytest.raises(BabyError, match=message):
        leave_one_out.experiment(shortened("equations", held_out=leave_one_out.EACH), seeds=1, workers=4)
    assert len(children) == 2
    assert all(child.returncode is not None for child in children)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_lab_processes_ignore_signals():
    run_config = preset("equations").override({"num_steps": 1})
    parts = {name: config.to_dict(getattr(run_config, name)) for name in ("model", "train", "data")}
    with processes.started(leave_one_out.TASK, "a process") as child:
        for number in (None, signal.SIGTERM, signal.SIGHUP):
            if number:
                child.send_signal(number)
            assert "answers" in processes.ask(child, {"preset": run_config.name, **parts})


@pytest.mark.first_case
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("name", "line"), [
    ("SIGINT", "baby_xp: interrupted"), ("SIGTERM", "baby_xp: interrupted by SIGTERM"),
])  # fmt: skip
def test_a_signal_ends_the_lab_and_leaves_no_process(signals, name, line):
    """SIGTERM comes to all processes of a group, as job schedulers send it."""
    # the test runner may ignore Ctrl-C, and its child processes would inherit that
    program = """if True:
        import signal, subprocess, sys
        from baby_xp.cli import main
        class Popen(subprocess.Popen):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                print(self.pid, flush=True)
        subprocess.Popen = Popen
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(main(["equations", "--seeds", "40", "--workers", "2"]))
    """
    lab_process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    children = [int(lab_process.stdout.readline()) for _ in range(2)]
    time.sleep(1)
    (os.kill if name == "SIGINT" else os.killpg)(lab_process.pid, getattr(signal, name))
    _, errors = lab_process.communicate(timeout=120)
    assert lab_process.returncode == 128 + getattr(signal, name)
    assert errors.strip() == line
    for child in children:
        with pytest.raises(ProcessLookupError):  # not even as a zombie
            os.kill(child, 0)


# the command ----------------------------------------------------------------------------------------------


def test_the_command_prints_what_it_measured(capsys, tmp_path):
    arguments = ["equations", "--held-out", "4+4", "--seeds", "2", "--workers", "1", "--num-steps", "400"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "1 equation, 2 answers of 2 models, 2 seeds" in text
    assert "answered correctly                      100.0%" in text
    assert "copying the nearest trained equation    0.0% correct" in text


@pytest.mark.slow
def test_the_command_draws_its_map(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures are the extra `plots`")
    file = tmp_path / "map.png"
    arguments = ["equations", "gpt", "--digits", "1", "--seeds", "1", "--num-steps", "2", "--batch-size", "8"]
    assert cli.main([*arguments, "--max_sum", "9", "--operators", "+-", "--picture", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "percent of + answered correctly; down: the first operand" in text
    assert "percent of - answered correctly" in text
    assert "by operator" in text


@pytest.mark.parametrize(("arguments", "match"), [
    (["rnn"], "the equation lab trains the equation model"),
    (["--seeds", "0"], "seeds must be a whole number of at least 1"),
    (["--held-out", "each,4+4"], "a held-out case must be digit+digit"),
    (["--digits", "2", "--n-ctx", "5"], "n_ctx 5 does not hold a question"),
    (["--picture", "map.xyz"], "map.xyz"),
    (["--picture", "nowhere/map.png"], "no folder"),
])  # fmt: skip
def test_bad_input_is_reported_in_one_line(arguments, match, capsys, monkeypatch, tmp_path):
    if "--picture" in arguments:
        pytest.importorskip("matplotlib", reason="pictures are the extra `plots`")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["equations", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert match in err
    assert not list(tmp_path.iterdir())


def test_an_equation_run_keeps_its_data_and_resumes(tmp_path):
    settings = {"digits": 2, "operators": "-", "max_sum": 0, "held_out": "25%", "n_hidden": 8, "eval_every": 2}
    run = baby_xp.train(shortened("equations-2", **settings), path=tmp_path, backend="numpy", workers=1)
    kept = json.loads(run.files.config.read_text("utf-8"))
    assert kept["data"]["held_out"] == "25%"
    again = baby_xp.resume(run.guid, path=tmp_path, backend="numpy", num_steps=6)
    assert again.config["data"]["digits"] == 2
    assert again.config["result"]["steps"] == 6
    sample = run.files.completion().read_text("utf-8").strip().split(", ")
    assert len(sample) in (5, 6)
    assert all(part.split("=")[0].count("-") == 1 for part in sample)


@pytest.mark.parametrize("name", ["equations", "equations-table"])
def test_small_presets_of_equations_train_in_one_process(name):
    assert suitable_number(registry.load("numpy"), Model(preset(name).model, 13), 108, Group()) == 1
