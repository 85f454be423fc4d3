"""Settings: typed flags, settings that depend on each other, and settings without effect."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from baby_xp_data.equation_table import EquationTable
from small_runs import TEXT, needs_signals

import baby_xp
from baby_xp import api, config
from baby_xp.cli import main, options
from baby_xp.cli.progress import Screen
from baby_xp.compute import Compute
from baby_xp.config import TrainConfig
from baby_xp.equations import leave_one_out
from baby_xp.errors import BabyError
from baby_xp.estimation import estimate
from baby_xp.inspection.printing import InspectOptions
from baby_xp.presets import preset
from baby_xp.text import dataset
from baby_xp.training.signals import SIGNALS
from baby_xp.training.workers import PROGRAM

pytestmark = pytest.mark.usefixtures("work")
TINY = {
    "n_layers": 1, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_ctx": 8, "batch_size": 4, "num_steps": 4,
    "sample_tokens": 0, "workers": 1, "backend": "numpy",
}  # fmt: skip


def flags(**values) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


@pytest.fixture
def asked(monkeypatch):
    """Run a command -> the arguments with which it would call the library."""

    def run(module, function: str, *arguments: str) -> tuple[list, dict]:
        class Enough(Exception):
            pass

        seen = []

        def record(*values, **named):
            seen.append((list(values), named))
            raise Enough

        with monkeypatch.context() as patch:
            patch.setattr(module, function, record)
            with contextlib.suppress(Enough):
                main(list(arguments))
        return seen[0]

    return run


# flags that were typed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "expected"), [
    ([], {}),
    (["--lr", "0.5"], {"lr": 0.5}),
    (["--lr=0.003"], {"lr": 0.003}),  # the preset's own value, but it was typed
    (["--num_epochs", "2", "--gelu=erf", "--data", "--lr"], None),
    (["--num_epochs", "2", "--gelu=erf", "--data=--lr"], {"num_epochs": 2, "gelu": "erf", "data": "--lr"}),
    (["--num-steps=None", "--num-epochs=1"], {"num_steps": None, "num_epochs": 1}),
])  # fmt: skip
@pytest.mark.parametrize("command", ["train", "estimate"])
def test_train_gets_only_the_typed_settings(asked, call, command, arguments, expected):
    if expected is None:
        assert call(command, *arguments)[0] == 2
        return
    module = {"train": api, "estimate": estimate}[command]
    values, named = asked(module, command, command, *arguments, "--tf32", "--path=elsewhere")
    assert [one.name for one in values] == ["baby"]
    named.pop("listener", None)
    where = {"train": {"path": "elsewhere"}, "estimate": {}}[command]  # an estimate writes nothing
    assert named == {"tf32": True, **where, **expected}


def test_finetune_and_resume_get_only_the_typed_settings(asked, call):
    assert call("train", "--data=text.txt", *flags(**TINY))[0] == 0
    (name,), named = asked(api, "finetune", "finetune", "--data=text.txt", "--dropout=0.1", "--num-epochs=1")
    del named["listener"]
    assert name == api.load(backend="numpy").guid
    assert named == {"data": "text.txt", "dropout": 0.1, "num_epochs": 1}
    (name,), named = asked(api, "resume", "resume", "last", "--num-steps=9", "--no-tf32", "--min-lr=None")
    del named["listener"]
    assert (name, named) == ("last", {"num_steps": 9, "tf32": False})


# epochs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "overrides", "expected"), [
    ("classic", {"num_epochs": 1}, (None, 1)),
    ("classic", {"num_epochs": 2, "num_steps": 7}, (7, 2)),
    ("classic", {"num_epochs": None}, (2500, None)),
    ("classic", {}, (2500, None)),
    ("3-months", {"num_steps": 7}, (7, 1)),
    ("3-months", {"num_epochs": 2}, (None, 2)),
    ("equations", {"num_epochs": 3}, (None, 3)),
])  # fmt: skip
def test_num_epochs_overrides_num_steps(name, overrides, expected):
    train = preset(name).override(overrides).train
    assert (train.num_steps, train.num_epochs) == expected


def test_one_epoch_is_trained_if_requested(call):
    settings = {name: value for name, value in TINY.items() if name != "num_steps"}
    for command in (["train"], ["finetune", "last"]):
        if command[0] == "finetune":
            settings = {name: settings[name] for name in ("batch_size", "sample_tokens", "workers", "backend")}
        code, _, _ = call(*command, "--data=text.txt", "--num-epochs=1", "--stride=50", *flags(**settings))
        run = api.load(backend="numpy")
        n_train = int(0.9 * len(TEXT))
        assert (code, run.config["result"]["steps"]) == (0, -(-((n_train - 9) // 50 + 1) // 4))


# settings that have no effect ---------------------------------------------------------------------------

IN_VAIN = [
    ("classic", {"stride": 3}, ("stride 3", "give --num-epochs too, or leave out --stride")),
    ("classic", {"stride": 3, "num_epochs": None}, ("stride 3", "--num-epochs")),
    ("3-months", {"stride": 3, "num_epochs": None, "num_steps": 5}, ("stride 3", "--num-epochs")),
    ("equations", {"stride": 3, "num_epochs": 1}, ("stride 3", "equations", "leave out --stride")),
    ("equations-gpt", {"stride": 2}, ("stride 2", "equations", "leave out --stride")),
    ("classic", {"min_lr": 1e-5, "schedule": "constant"}, ("min_lr", "--schedule cosine", "leave out --min-lr")),
    ("3-months", {"min_lr": 1e-5}, ("min_lr", "--schedule cosine")),
    ("classic", {"decay_fraction": 0.2}, ("decay_fraction", "--schedule linear", "leave out --decay-fraction")),
    ("classic", {"muon_lr": 0.1}, ("muon_lr", "adamw", "--optimizer muon", "leave out --muon-lr")),
    ("classic", {"muon_momentum": 0.9}, ("muon_momentum", "--optimizer muon")),
    ("classic", {"muon_iterations": 3, "optimizer": "adamw"}, ("muon_iterations", "leave out --muon-iterations")),
    ("equations", {"operators": "-", "max_sum": 12}, ("max_sum", "--operators", "leave out --max-sum")),
]
WITH_EFFECT = [
    ("classic", {"stride": 1}),
    ("classic", {"stride": 3, "num_epochs": 1}),
    ("3-months", {"stride": 3, "num_steps": 5}),
    ("3-months", {"schedule": "cosine", "min_lr": 1e-5}),
    ("classic", {"schedule": "constant"}),
    ("classic", {"schedule": "linear", "decay_fraction": 0.2, "min_lr": 1e-5}),
    ("classic", {"optimizer": "muon", "muon_lr": 0.1, "muon_momentum": 0.0, "muon_iterations": 3}),
    ("equations", {"operators": "+-", "max_sum": 12}),
    ("equations", {"operators": "-", "max_sum": 0}),  # 0 means all sums, and this table has none
]


@pytest.mark.parametrize(("name", "overrides", "words"), IN_VAIN)
def test_a_setting_without_effect_is_refused(call, work, name, overrides, words):
    with pytest.raises(BabyError) as refused:
        preset(name).override(overrides)
    for word in words:
        assert word in str(refused.value)
    for command in ("train", "estimate") if name == "classic" else ("train",):
        assert call(command, name, *flags(**overrides)) == (2, "", f"baby_xp: {refused.value}\n")
    assert [path.name for path in work.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(("name", "overrides"), WITH_EFFECT)
def test_a_setting_with_an_effect_is_accepted(name, overrides):
    chosen = preset(name).override(overrides)
    found = {**vars(chosen.model), **vars(chosen.train), **vars(chosen.data)}
    assert overrides.items() <= found.items()


def test_stored_settings_are_not_refused():
    """Its config may contain settings that are refused today."""
    train = config.from_dict(TrainConfig, {"num_steps": 9, "stride": 3, "schedule": "constant"}, "x")
    chosen = replace(preset("classic"), train=train)
    assert chosen.override({}) == chosen
    assert chosen.override({"lr": 0.1}).train.lr == 0.1
    with pytest.raises(BabyError, match="min_lr has no effect"):
        chosen.override({"min_lr": 0.1})


def test_finetuning_keeps_the_tokenizer(call):
    assert call("train", "--data=text.txt", *flags(**TINY))[0] == 0
    with pytest.raises(BabyError, match="finetuning keeps the tokenizer, which is char"):
        baby_xp.finetune("last", data="text.txt", backend="numpy", tokenizer="byte")


@pytest.mark.parametrize("name", leave_one_out.IGNORED)
def test_the_lab_refuses_settings_that_it_ignores(call, name):
    value = {"max_minutes": 2.0, "checkpoint_minutes": 2.0}.get(name, 2)
    code, out, err = call("equations", *flags(**{name: value}))
    assert (code, out) == (2, "")
    assert err.startswith(f"baby_xp: {name} has no effect in the equation lab")
    assert err.endswith(f": leave out --{name.replace('_', '-')}\n")
    if name != "eval_every":  # each preset has one that differs from the default
        with pytest.raises(BabyError, match=f"{name} has no effect"):
            leave_one_out.experiment(preset("equations").override({name: value}), seeds=1, workers=1)


@pytest.mark.parametrize(("more", "named"), [
    (["--top-k=3"], "--top-k"),
    (["--temperature=1.0"], "--temperature"),
    (["--top-p=0.5", "--top_k", "2"], "--top-k and --top-p"),
])  # fmt: skip
def test_greedy_refuses_sampling_options(call, more, named):
    line = f"baby_xp: --greedy always takes the most likely token: leave out {named} or --greedy\n"
    assert call("generate", "--greedy", *more) == (2, "", line)


# equations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overrides", "expected"), [
    ({}, "4+4"),
    ({"operators": "-"}, "8-4"),
    ({"operators": "+-"}, "4+4"),
    ({"max_sum": 0}, "4+4"),
    ({"operators": "-", "held_out": "3-1"}, "3-1"),
    ({"operators": "-", "held_out": "4+4"}, "4+4"),  # it was given explicitly, and will be refused
    ({"digits": 2, "max_sum": 99, "n_ctx": 9}, "4+4"),
])  # fmt: skip
def test_a_changed_table_gets_a_held_out_case_that_it_has(overrides, expected):
    assert preset("equations").override(overrides).data.held_out == expected
    for share in ("10%", leave_one_out.EACH):
        chosen = replace(preset("equations"), data=replace(preset("equations").data, held_out=share))
        assert chosen.override(overrides).data.held_out == overrides.get("held_out", share)


@pytest.mark.parametrize(("held_out", "table", "expected"), [
    ("4+4,3+5", (9, 1, "+"), "4+4,3+5"),
    ("4+4, 9+9", (9, 1, "+"), "4+4"),
    ("12+34", (9, 1, "+-"), "4+4"),
    ("12+34", (99, 2, "+-"), "12+34"),
    ("12+34", (0, 2, "-"), "8-4"),
    ("8-4", (9, 1, "+"), "4+4"),
    ("4*4", (9, 1, "-"), "4*4"),
    ("", (9, 1, "-"), ""),
])  # fmt: skip
def test_a_suitable_case_is_in_the_table(held_out, table, expected):
    found = EquationTable(*table).suitable(held_out)
    assert found == expected
    if found != held_out:
        assert EquationTable(*table).with_mirrors(found)


def test_a_table_of_differences_alone_is_trained_and_measured(call):
    more = flags(num_steps=2, backend="numpy")
    assert call("train", "equations", "--operators", "-", *more)[::2] == (0, "")
    assert api.load(backend="numpy").config["data"]["held_out"] == "8-4"
    assert call("estimate", "equations", "--operators", "-", "--no-measure", "--backend=numpy")[::2] == (0, "")
    for kind in ("mlp", "gpt"):
        chosen = leave_one_out.suitable(kind, None, None, "-")
        leave_one_out.jobs_of(chosen.override({"operators": "-"}), 1)


@pytest.mark.parametrize(("text", "table", "expected"), [
    ("4+4=", (9, 1, "+"), True), ("4+4=8", (9, 1, "+"), True), ("4+4=8 ", (9, 1, "+"), True),
    ("4+4=9", (9, 1, "+"), False), ("4+4", (9, 1, "+"), False), ("4 + 4 =", (9, 1, "+"), False),
    ("9+1=", (9, 1, "+"), False), ("9+1=", (0, 1, "+"), True), ("12+3=", (0, 1, "+"), False),
    ("12+34=4", (0, 2, "+-"), True), ("8-4=", (9, 1, "+"), False), ("4-8=-", (9, 1, "+-"), True),
    ("04+4=", (0, 2, "+"), False), ("x4+4=", (9, 1, "+"), False), ("4+4= 4+4=", (9, 1, "+"), False),
])  # fmt: skip
def test_a_prompt_is_recognised_as_a_question_of_the_table(text, table, expected):
    assert EquationTable(*table).begins_answer(text) is expected


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("operators", ["+", "-", "+-"])
def test_the_example_is_a_question_of_its_table(digits, operators):
    for max_sum in (0, 9):
        table = EquationTable(max_sum, digits, operators)
        assert table.begins_answer(table.question(table.example))


def test_a_prompt_that_is_not_a_question_gets_a_note(call):
    assert call("train", "equations", *flags(num_steps=2, backend="numpy"))[0] == 0
    for prompt, noted in (("4+4=", False), ("4 + 4 =", True), ("4+4", True), ("9+9=", True), ("", False)):
        code, out, err = call("generate", f"--prompt={prompt}", "--num-tokens=2", "--greedy", "--backend=numpy")
        *notes, kept = err.splitlines()
        assert (code, out[: len(prompt)], kept[:9]) == (0, prompt, "saved to ")
        note = f"note: the run learned equations, such as 4+4=; the continuation of {prompt!r} is meaningless"
        assert notes == ([note] if noted else [])


# bad flags ----------------------------------------------------------------------------------------------

DASH = "needs a value; write a value that begins with - as "
WRONG = [
    ("train", ["--num-steps", "1e4"], "--num-steps must be a whole number, not '1e4'"),
    ("train", ["--num_steps=2.5"], "--num-steps must be a whole number, not '2.5'"),
    ("train", ["--clip=0.5", "--lr", "fast"], "--lr must be a number, not 'fast'"),
    ("train", ["--lr="], "--lr must be a number, not ''"),
    ("train", ["--c-attention=mhb"], "--c-attention must be one of mha, moh, not 'mhb'"),
    ("train", ["--workers", "two"], "--workers must be a whole number, not 'two'"),
    ("train", ["--tf32=yes"], "--tf32 takes no value: give --tf32 or --no-tf32"),
    ("train", ["--no-tf32=yes"], "--tf32 takes no value: give --tf32 or --no-tf32"),
    ("train", ["--tf32", "yes"], "unexpected argument 'yes'"),
    ("train", ["--lr"], "--lr needs a value"),
    ("train", ["--lr", "--clip", "1"], "--lr needs a value"),
    ("train", ["--n-layer=3"], "unknown option '--n-layer'; did you mean --n-layers?"),
    ("train", ["--no-lr"], "unknown option '--no-lr'; did you mean --min-lr?"),
    ("train", ["--zzz"], "unknown option '--zzz'"),
    ("train", ["-x"], "unknown option '-x'"),
    ("train", [f"--lr={'9' * 200}x"], f"--lr must be a number, not '{'9' * 80}...'"),
    ("train", ["--lr=\x1b[1m"], "--lr must be a number, not '\\x1b[1m'"),
    ("train", ["--min-lr", "-x"], f"--min-lr {DASH}--min-lr=-x"),
    ("train", ["--", "--lr"], "unexpected argument '--'"),
    ("train", ["--help=x"], "-h takes no value"),
    ("generate", ["--prompt", "-x"], f"--prompt {DASH}--prompt=-x"),
    ("generate", ["--prompt", "-x&y"], f"--prompt {DASH}'--prompt=-x&y'"),
    ("generate", ["--prompt", "-x\x1b"], f"--prompt {DASH}--prompt=-..."),
    ("generate", ["--prompt", "-", "--top-k", "-x"], f"--top-k {DASH}--top-k=-x"),
    ("inspect", ["--off", "0.1", "0.2", "--top=x"], "--top must be a whole number, not 'x'"),
    ("inspect", ["--top=--"], "--top must be a whole number, not '--'"),
    ("inspect", ["--top", "--"], f"--top {DASH}--top=--"),
    ("runs", ["--path"], "--path needs a value"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "arguments", "message"), WRONG)
def test_a_bad_flag_is_reported_in_one_sentence(monkeypatch, command, arguments, message):
    check_sentence(monkeypatch, command, arguments, message, "ascii")


def test_the_sentence_is_the_same_on_a_unicode_terminal(monkeypatch):
    for wrong in (WRONG[1], WRONG[8], WRONG[-3]):
        check_sentence(monkeypatch, *wrong, "utf-8")


def check_sentence(monkeypatch, command, arguments, message, encoding):
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert main([command, *arguments]) == 2
    err.flush()
    name = "train baby" if command == "train" else command
    assert err.buffer.getvalue().decode() == f"baby_xp: {message}; see baby_xp {name} --help\n"



# signals ------------------------------------------------------------------------------------------------


@needs_signals
@pytest.mark.parametrize("number", SIGNALS[1:], ids=lambda number: number.name)
def test_a_signal_before_training_ends_it_in_one_line(call, work, monkeypatch, signals, number):
    monkeypatch.setattr(dataset, "prepare", lambda *_: os.kill(os.getpid(), number))
    line = f"baby_xp: interrupted by {number.name}\n"
    assert call("train", "--data=text.txt", *flags(**TINY)) == (128 + number, "", line)
    assert [path.name for path in work.iterdir()] == ["text.txt"]


@needs_signals
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_before_the_first_step_has_its_exit_code(call, monkeypatch, signals, number):
    monkeypatch.setattr(Screen, "started", lambda self, *_: os.kill(os.getpid(), number))
    monkeypatch.setattr(Screen, "note", lambda self, text: None)
    line = "baby_xp: interrupted before the first step was done; nothing was trained\n"
    assert call("train", "--data=text.txt", *flags(**TINY)) == (128 + number, "", line)


@pytest.mark.parametrize("line", [b"", b'{"file": 3, "ra'])
def test_a_worker_without_a_main_process_prints_nothing(line):
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=line, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_values_may_be_negative_and_flags_may_have_underscores(call):
    for arguments in (["--min-lr", "-1e-3"], ["--min_lr=-1e-3"], ["--min_lr", "-.001"]):
        code, out, err = call("train", *arguments, *flags(backend="numpy"))
        assert (code, out, err) == (2, "", "baby_xp: min_lr must be a number of at least 0, not -0.001\n")


def test_given_settings_are_distinguished_from_resulting_ones():
    def given(part, *arguments):
        return options.parse([("", part)], "", "baby_xp x", arguments)

    found = given(Compute(), "--tf32", "--device=None", "--memory-gib=2", "--backend", "auto")
    assert found == {"tf32": True, "device": None, "memory_gib": 2, "backend": "auto"}
    assert given(Compute()) == {}
    assert given(InspectOptions(), "--prompt=--") == {"prompt": "--"}
    assert given(InspectOptions(), "--off", "0.1", "1.0") == {"off": ["0.1", "1.0"]}
    some = options.Subset(Compute(), ("tf32", "workers"))
    assert given(some, "--workers=2") == {"workers": 2}
    with pytest.raises(BabyError, match="--device"):
        given(some, "--device=x")
