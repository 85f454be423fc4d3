"""The original Little Baby's files: models give the original's numbers, survive a round trip, and invalid files
raise only BabyError.
"""

import copy
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_table import SWITCHES

from baby_xp.arrays import params
from baby_xp.config import EquationConfig, GPTConfig, TrainConfig
from baby_xp.convert import littlebaby
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.text.tokenizer import ByteTokenizer, CharTokenizer

REFERENCES = ["pre-mha-mlp", "post-mha-mlp", "pre-moh-mlp", "pre-mha-moe"]
GUID = "0f8fad5b-d9cb-469f-a165-70867728950e"
TOKENIZER = CharTokenizer("\n aé漢🙂")  # not sorted by code point: the order is the file's
KINDS = ("config", "tokenizer", "model")


def config_of(switches: dict, **others) -> GPTConfig:
    sizes = {"n_ctx": 3, "n_emb": 4, "head_size": 6, "n_heads": 2, "n_layers": 2, "dropout": 0.25}
    return GPTConfig(**{**sizes, **switches, **others})


def parameters(config: GPTConfig, V: int = TOKENIZER.vocab_size) -> np.ndarray:
    flat = np.random.default_rng(0).normal(size=Model(config, V).n_parameters)
    flat[:4] = [-0.0, np.finfo(float).max, np.finfo(float).smallest_subnormal, 3.0]
    return flat


def documents(folder: Path, switches: dict) -> dict[str, dict]:
    """The contents of the three files of a model."""
    config = config_of(switches)
    files = littlebaby.write(folder, GUID, config, TOKENIZER, parameters(config))
    return {kind: json.loads(path.read_text("ascii")) for kind, path in zip(KINDS, files, strict=True)}


def put(folder: Path, documents: dict) -> Path:
    """Write the documents into one folder. Returns the model's file."""
    for kind, value in documents.items():
        (folder / f"{kind}_x.json").write_text(json.dumps(value), "ascii")
    return folder / "model_x.json"


def read_or_refused(folder: Path) -> littlebaby.Converted | None:
    """The model in a folder; None if a BabyError, of one line, refused it."""
    try:
        return littlebaby.read(folder / "model_x.json")
    except BabyError as error:
        return None if str(error).isprintable() else pytest.fail(f"more than one line: {error}")


def message_of(caught) -> str:
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Documents of a small model with a mixture of heads and of experts; to be copied, not changed."""
    return documents(tmp_path_factory.mktemp("made"), SWITCHES[7])


# files of the original ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFERENCES)
def test_exported_files_equal_the_originals(reference_folder, tmp_path, name):
    found = littlebaby.read(reference_folder / f"model_{name}.json")
    train = TrainConfig(**found.train)
    files = littlebaby.write(tmp_path, GUID, found.config, found.tokenizer, found.params, train)
    for kind, path in zip(KINDS, files, strict=True):
        original = json.loads((reference_folder / f"{kind}_{name}.json").read_text("utf-8"))
        assert json.loads(path.read_text("ascii")) == original


# round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: " ".join(s.values()))
def test_all_eight_kinds_survive_a_round_trip_bit_for_bit(tmp_path, switches):
    config = config_of(switches)
    flat = parameters(config)
    files = littlebaby.write(tmp_path, GUID, config, TOKENIZER, flat)
    found = littlebaby.read(files[2])
    assert found.params.dtype == np.float64
    assert found.params.tobytes() == flat.tobytes()
    assert (found.config, found.tokenizer, found.guid) == (config, TOKENIZER, GUID)
    assert found.train == {"num_epochs": 1, "batch_size": 16, "lr": 1e-3}
    names = [f"{kind}s/{kind}_{GUID}.json" for kind in KINDS]
    assert [path.relative_to(tmp_path).as_posix() for path in files] == names
    assert {path.name for path in tmp_path.iterdir()} == set(littlebaby.FOLDERS)  # the notebook writes into some


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(SWITCHES),
    *[st.integers(1, 3)] * 5,
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
)
def test_models_of_any_size_survive_a_round_trip(
    tmp_path_factory, switches, n_ctx, n_emb, n_heads, width, n_layers, text
):
    sizes = {"n_ctx": n_ctx, "n_emb": n_emb, "n_heads": n_heads, "n_layers": n_layers}
    config, tokenizer = GPTConfig(**switches, **sizes, head_size=n_heads * width), CharTokenizer.from_text(text)
    flat = params.draw(Model(config, tokenizer.vocab_size).spec, 0)
    files = littlebaby.write(tmp_path_factory.mktemp("any"), GUID, config, tokenizer, flat)
    found = littlebaby.read(files[2])
    assert (found.config, found.tokenizer) == (config, tokenizer)
    assert found.params.astype("float32").tobytes() == flat.tobytes()


def test_training_settings_are_exported_in_the_originals_form(tmp_path):
    config, train = config_of({}), TrainConfig(num_steps=9, batch_size=8, accumulate=3, lr=1e-3, base_batch_size=6)
    files = littlebaby.write(tmp_path, GUID, config, TOKENIZER, parameters(config), train)
    found = littlebaby.read(files[2])
    assert found.train == {"num_epochs": 1, "batch_size": 24, "lr": train.peak_lr}


# locations of the files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", [GUID, "small", ""])
def test_files_are_found_beside_the_model_and_a_guid_is_kept(
    tmp_path, made, monkeypatch, tag
):
    for kind in KINDS:
        (tmp_path / f"{kind}_{tag}.json").write_text(json.dumps(made[kind]), "ascii")
    monkeypatch.chdir(tmp_path)
    for model in (tmp_path / f"model_{tag}.json", Path(f"model_{tag}.json")):
        assert littlebaby.read(model).guid == (tag if tag == GUID else None)


def test_the_given_files_are_used(tmp_path, made):
    documents(tmp_path, SWITCHES[0])
    paths = [tmp_path / name for name in ("a", "b", "c.weights")]
    for path, kind in zip(paths, KINDS, strict=True):
        path.write_text(json.dumps(made[kind]), "ascii")
    config, tokenizer, model = paths
    found = littlebaby.read(model, config, tokenizer)
    assert (found.config, found.guid) == (config_of(SWITCHES[7]), None)


def test_a_finetuned_model_uses_the_config_of_its_base(tmp_path):
    documents(tmp_path, SWITCHES[0])
    model = tmp_path / f"models/model_{GUID}_finetuned.json"
    shutil.copy(tmp_path / f"models/model_{GUID}.json", model)
    with pytest.raises(BabyError, match="give the path of the tokenizer"):  # its own has other ids
        littlebaby.read(model)
    tokenizer = tmp_path / f"tokenizers/tokenizer_{GUID}.json"
    shutil.copy(tokenizer, model.with_name(f"tokenizer_{GUID}_finetuned.json"))
    assert littlebaby.read(model).config == config_of(SWITCHES[0])


def test_models_without_switches_are_read(tmp_path):
    new = documents(tmp_path, SWITCHES[0])
    names = {"mlp_proj_up_": "mlp_fc_", "mlp_proj_dn_": "mlp_proj_"}
    older = re.compile("|".join(names))
    config = {name: value for name, value in new["config"].items() if not name.startswith("c_")}
    model = {older.sub(lambda m: names[m[0]], name): value for name, value in new["model"].items()}
    assert sum("mlp_fc" in name for name in model) == 4
    found = littlebaby.read(put(tmp_path, {"config": config, "tokenizer": new["tokenizer"], "model": model}))
    assert found.config == config_of(SWITCHES[0])
    assert found.params.tobytes() == parameters(found.config).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_named(tmp_path, made, kind):
    for one in set(KINDS) - {kind}:
        (tmp_path / f"{one}_x.json").write_text(json.dumps(made[one]), "ascii")
    with pytest.raises(BabyError, match=rf"{kind}_x\.json (cannot be read \(No such|does not exist)") as caught:
        littlebaby.read(tmp_path / "model_x.json")
    message_of(caught)


@pytest.mark.parametrize("model", ["", "a\0b", "x" * 5000, "nowhere/model_\n.json"])
def test_a_path_that_cannot_be_a_file_is_refused(tmp_path, model):
    with pytest.raises(BabyError, match=r"cannot be read|is not a path") as caught:
        littlebaby.read(tmp_path / model)
    message_of(caught)


# faults -------------------------------------------------------------------------------------------------

Q, BIAS = "block_0_moh_q_weight", "block_1_moe_expert_3_dn_bias"
FAULTS = {
    "a name is missing": ("model", Q, None, f"lacks {Q}"),
    "a name is unknown": ("model", "block_0_moh_z_weight\n", [1.0], r"has 'block_0_moh_z_weight\\n'"),
    "a block too many": ("model", "block_2_ln1_gamma", [1.0] * 4, "has 3 blocks, but n_layers = 2 in its config"),
    "shape": ("model", BIAS, [1.0, 2.0], r"is of shape \(2,\), not numbers of shape \(4,\)"),
    "transposed": ("model", Q, [[1.0] * 4] * 6, r"is of shape \(6, 4\), not numbers of shape \(4, 6\)"),
    "ragged": ("model", Q, [[1.0] * 6] * 3 + [[1.0] * 5], "is lists of different lengths"),
    "too few axes": ("model", Q, [1.0] * 4, r"is of shape \(4,\)"),
    "too many axes": ("model", BIAS, [[1.0]] * 4, r"is of shape \(4, 1\)"),
    "empty": ("model", BIAS, [], r"is of shape \(0,\)"),
    "a word": ("model", BIAS, [1.0, 2.0, 3.0, "4"], "is not of numbers alone"),
    "true": ("model", BIAS, [1.0, 2.0, 3.0, True], "is not of numbers alone"),
    "null within": ("model", BIAS, [1.0, 2.0, 3.0, None], "is not of numbers alone"),
    "null": ("model", BIAS, "null", "is null, not numbers"),
    "an object": ("model", BIAS, {"a": 1}, "is {'a': 1}, not numbers"),
    "nan": ("model", BIAS, [1.0, 2.0, 3.0, float("nan")], "not finite"),
    "infinity": ("model", BIAS, [1.0, 2.0, 3.0, float("-inf")], "not finite"),
    "too large for a float": ("model", BIAS, [1.0, 2.0, 3.0, 10**400], "not finite"),
    "a bias that the original does not have": ("model", "block_0_moh_g_bias", [0.0, 0.0], "supports only null"),
    "8 experts": ("model", "block_1_moe_n_experts", 8, "is 8; baby_xp supports only 4"),
    "expansion": ("model", "block_1_moe_expansion", 2, "is 2; baby_xp supports only 4"),
    "expansion as a float": ("model", "block_1_moe_expansion", 4.0, "is 4.0; baby_xp supports only 4"),
    "no such order": ("config", "c_sequence", "sandwich", "c_sequence must be one of pre, post, not 'sandwich'"),
    "no such attention": ("config", "c_attention", None, "lacks block_0_mha_q_weight"),
    "another network": ("config", "c_network", "mlp", "lacks block_0_mlp_proj_up_weight"),
    "a switch that is a list": ("config", "c_network", ["moe"], "c_network must be one of"),
    "unknown setting": ("config", "c_position", "rotary", "'c_position', which is not a setting"),
    "our own config": ("config", "kind", "gpt", "'kind', which is not a setting"),
    "missing size": ("config", "n_heads", None, "lacks n_heads"),
    "size": ("config", "n_emb", 5, r"not numbers of shape \(6, 5\)"),
    "fractional size": ("config", "n_ctx", 2.5, "n_ctx must be a whole number"),
    "enormous width": ("config", "n_emb", 2**31 - 1, "is too small for the"),
    "enormous depth": ("config", "n_layers", 10_000, "has 2 blocks, but n_layers = 10000 in its config"),
    "heads that do not divide": ("config", "n_heads", 4, "n_heads 4 does not divide head_size 6"),
    "dropout": ("config", "dropout", 1.0, "dropout must be a number of at least 0 and below 1"),
    "rate": ("config", "lr", "fast", "lr must be a number above 0"),
    "epochs": ("config", "num_epochs", 0, "num_epochs must be a whole number of at least 1"),
    "no epochs": ("config", "num_epochs", "null", "neither num_steps nor num_epochs is given"),
    "vocabulary": ("tokenizer", "vocab", ["a", "b"], "vocab_size"),
    "no vocabulary": ("tokenizer", "vocab", None, "not a list of characters"),
    "bytes": ("tokenizer", "kind", "byte", "vocab_size"),
    "tokenizer of another size": ("tokenizer", {"vocab": list("ab")}, "6 rows of wte_weight for the 2 characters"),
    "a byte tokenizer": ("tokenizer", {"kind": "byte"}, "is not a character tokenizer"),
    "a list": ("tokenizer", ["a"], "a tokenizer is a JSON object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_invalid_file_is_one_line(tmp_path, made, fault):
    kind, *change, message = FAULTS[fault]
    changed = copy.deepcopy(made)
    match change:
        case [whole]:
            changed[kind] = whole
        case [name, None]:
            del changed[kind][name]
        case [name, value]:
            changed[kind][name] = None if value == "null" else value
    with pytest.raises(BabyError, match=message) as caught:
        littlebaby.read(put(tmp_path, changed))
    assert re.search(rf"({kind}|model)_x\.json", message_of(caught)) or kind == "config"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[1, 2", b"null", b"3", b"[]", b'"x"', b"[" * 100_000])
def test_files_that_hold_something_else_are_refused(tmp_path, made, kind, data):
    for one in KINDS:
        (tmp_path / f"{one}_x.json").write_bytes(data if one == kind else json.dumps(made[one]).encode("ascii"))
    with pytest.raises(BabyError, match=f"{kind}_x.json") as caught:
        littlebaby.read(tmp_path / "model_x.json")
    message_of(caught)


class Trap:
    """An object that creates a file when it is unpickled."""

    def __reduce__(self):
        return exec, ("import builtins; builtins.sprung = True",)


@pytest.mark.parametrize(("suffix", "protocol"), [(".json", 2), (".json", 5), (".pkl", 0), (".PKL", 5)])
def test_pickles_are_refused_with_the_reason_and_never_opened(tmp_path, made, suffix, protocol):
    import builtins

    path = tmp_path / f"model_x{suffix}"
    path.write_bytes(pickle.dumps(Trap(), protocol))
    for config, tokenizer, model in (None, None, path), (path, path, path):
        with pytest.raises(BabyError, match=r"is a pickle, .* runs whatever code .*; get the JSON") as caught:
            littlebaby.read(model, config, tokenizer)
        message_of(caught)
    assert not hasattr(builtins, "sprung")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


def mutate(draw, value):
    """Choose a place in a JSON value; change, drop, double or replace what is there."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)) if isinstance(value, dict) else st.integers(0, len(value) - 1))
        match draw(st.sampled_from(["deeper", "deeper", "deeper", "drop", "double"])):
            case "deeper":
                value[key] = mutate(draw, value[key])
            case "drop":
                del value[key]
            case "double" if isinstance(value, dict):
                value[draw(st.sampled_from([key + "_", key.replace("0", "1"), "block_7_x", ""]))] = value[key]
            case "double":
                value.insert(key, value[key])
        return value
    return draw(JSON)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_changed_values_raise_only_baby_error(tmp_path_factory, made, data):
    changed = copy.deepcopy(made)
    for _ in range(data.draw(st.integers(1, 2))):
        kind = data.draw(st.sampled_from(KINDS))
        changed[kind] = mutate(data.draw, changed[kind])
    found = read_or_refused(put(tmp_path_factory.mktemp("changed"), changed).parent)
    if found is None:
        return
    assert found.params.shape == (Model(found.config, found.tokenizer.vocab_size).n_parameters,)
    assert np.isfinite(found.params).all()
    TrainConfig(**{"num_epochs": 1, "schedule": "constant", **found.train})


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.binary(max_size=3), st.booleans())
def test_damaged_bytes_raise_only_baby_error(tmp_path_factory, made, kind, at, new, cut):
    folder = tmp_path_factory.mktemp("damaged")
    for one in KINDS:
        data = json.dumps(made[one]).encode("ascii")
        i = at % len(data)
        damaged = data[:i] + new + (b"" if cut else data[i + len(new) :])
        (folder / f"{one}_x.json").write_bytes(damaged if one == kind else data)
    found = read_or_refused(folder)
    assert found is None or np.isfinite(found.params).all()


# models that the original lacks --------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    ({"config": config_of({}, gelu="erf")}, "no model with gelu erf"),
    ({"config": config_of({}, norm="rmsnorm")}, "no model with norm rmsnorm"),
    ({"config": config_of({}, linear_bias=False)}, "no model with linear_bias False"),
    ({"config": config_of({}, smear=True)}, "no model with smear True"),
    ({"config": config_of({}, logit_cap=15)}, "no model with logit_cap 15"),
    ({"tokenizer": ByteTokenizer()}, "no byte tokenizer"),
    ({"config": EquationConfig()}, "no equation model"),
    *(({"guid": guid}, "is not a GUID") for guid in ("", "small", "../x", GUID.upper(), GUID + "/x")),
    ({"params": np.zeros(3)}, "finite numbers"),
    ({"params": parameters(config_of({})) * np.nan}, "finite numbers"),
    ({"params": np.zeros((1, 1))}, "finite numbers"),
], ids=str)  # fmt: skip
def test_models_that_the_original_lacks_are_refused(tmp_path, change, message):
    fine = {"guid": GUID, "config": config_of({}), "tokenizer": TOKENIZER, "params": parameters(config_of({}))}
    with pytest.raises(BabyError, match=message) as caught:
        littlebaby.write(tmp_path / "new", **{**fine, **change})
    message_of(caught)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_is_overwritten(tmp_path, kind):
    config = config_of({})
    there = tmp_path / f"{kind}s" / f"{kind}_{GUID}.json"
    there.parent.mkdir()
    there.write_text("mine")
    with pytest.raises(BabyError, match="already exists"):
        littlebaby.write(tmp_path, GUID, config, TOKENIZER, parameters(config))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [there]
    assert there.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    config = config_of({})
    (tmp_path / "file").write_text("")
    with pytest.raises(BabyError, match="cannot be written") as caught:
        littlebaby.write(tmp_path / "file", GUID, config, TOKENIZER, parameters(config))
    message_of(caught)
