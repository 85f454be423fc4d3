"""The Little Baby's own files: config, tokenizer and model as JSON.

    configs/config_<guid>.json            the three switches, sizes, and how the model was trained
    tokenizers/tokenizer_<guid>.json      characters in id order
    models/model_<guid>.json              weights by name, as nested lists

`named` gives each of the original's weights as a view of the flat buffer. Reading a model writes into these views,
writing one reads from them, so that names and shapes are listed once. A linear's weight is (in, out) in both.
"""

import json
import os
import reprlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baby_xp import files
from baby_xp.arrays.tree import Layout, Tree
from baby_xp.config import CLASSIC, GPTConfig, ModelConfig, TrainConfig, from_dict
from baby_xp.errors import BabyError
from baby_xp.files import shown
from baby_xp.layers.mixture_of_experts import EXPANSION, EXPERTS
from baby_xp.models import Model
from baby_xp.runs import store
from baby_xp.text.tokenizer import CharTokenizer, Tokenizer, tokenizer_from_dict

SWITCHES = ("c_sequence", "c_attention", "c_network")  # missing in configs from before its version 0.0.8
SIZES = ("n_ctx", "n_emb", "dropout", "head_size", "n_heads", "n_layers")
TRAINING = ("num_epochs", "batch_size", "lr")
OLDER = {"mlp_proj_up_": "mlp_fc_", "mlp_proj_dn_": "mlp_proj_"}  # their names in models from before 0.0.8
FOLDERS = ("configs", "tokenizers", "models", "outputs", "settings")  # the notebook writes into the last two
REMEDY = "get the original's files again, all three of one model"


@dataclass(frozen=True)
class Converted:
    """A model of the original, converted."""

    config: GPTConfig
    tokenizer: CharTokenizer
    params: np.ndarray
    """(P,) float64, in the order of the layout of Model(config, vocab_size)."""
    guid: str | None
    """The tag in the model's file name, if it is a GUID."""
    train: dict[str, Any]
    """Its training settings, all of them fields of TrainConfig; empty if the config has none."""


def read(model: Path, config: Path | None = None, tokenizer: Path | None = None) -> Converted:
    """Read a model of the original. A file that is not given is looked for beside the model's, and in the folder
    where the original keeps it.

    Raises BabyError unless the three files hold one whole model of a supported kind.
    """
    model = files.as_path(model, "model")
    weights, tag = _load(model), model.stem.removeprefix("model_")
    # a finetuned model has its own tokenizer and the config of the model that it was finetuned from
    config = Path(config or _find(model, "config", tag, tag.partition("_finetuned")[0]))
    tokenizer = Path(tokenizer or _find(model, "tokenizer", tag))
    gpt, train = _configs(_load(config), shown(config))
    characters = tokenizer_from_dict(_load(tokenizer), shown(tokenizer))
    if not isinstance(characters, CharTokenizer):
        raise BabyError(f"{shown(tokenizer)} is not a character tokenizer, as the original's are; {REMEDY}")
    params = _params(gpt, characters.vocab_size, weights, model)
    return Converted(gpt, characters, params, tag if store.GUID.fullmatch(tag) else None, train)


def write(
    folder: Path,
    guid: str,
    config: ModelConfig,
    tokenizer: Tokenizer,
    params: np.ndarray,
    train: TrainConfig | None = None,
) -> list[Path]:
    """Write a model for the original's notebook, which reads it with `folder` as its path. Returns the files.

    They hold every digit; the notebook rounds the weights to float32 when it loads them. Raises BabyError for a
    model that the original cannot hold, and if one of the files is there already.
    """
    if not isinstance(config, GPTConfig):
        raise _cannot_hold("equation model")
    for name, value in CLASSIC.items():
        if name not in SWITCHES and (odd := getattr(config, name)) != value:
            raise _cannot_hold(f"model with {name} {odd}")
    if not isinstance(tokenizer, CharTokenizer):
        raise _cannot_hold("byte tokenizer")
    if not store.GUID.fullmatch(guid):
        raise BabyError(f"{guid!r} is not a GUID, which the original needs for the names of its files")
    model, flat = Model(config, tokenizer.vocab_size), np.asarray(params, dtype=np.float64)
    if flat.shape != (model.n_parameters,) or not np.isfinite(flat).all():
        raise BabyError(f"the parameters are not {model.n_parameters} finite numbers; give those of this model")
    vocab = {"vocab": list(tokenizer.vocab), "vocab_size": tokenizer.vocab_size}
    values = {"config": _described(config, train), "tokenizer": vocab, "model": named(config, model.layout, flat)}
    contents = {Path(folder) / f"{kind}s" / f"{kind}_{guid}.json": value for kind, value in values.items()}
    for path in contents:
        if os.path.lexists(path):  # the files of our runs have the same names
            raise BabyError(f"{shown(path)} already exists; name another folder")
    made: list[Path] = []
    written: list[Path] = []
    try:
        for name in FOLDERS:
            try:
                files.make_folder(Path(folder) / name, made)
            except OSError as error:
                raise files.refusal(Path(folder) / name, error, "written", "--to") from None
        for path, value in contents.items():
            written.append(path)
            # json writes ASCII, because the notebook reads files in the system's encoding
            files.write(path, json.dumps(value, default=np.ndarray.tolist), other="--to")
    except BaseException:  # all three files or none, and no empty folders
        for path in written:
            files.remove(path)
        files.remove_folders(made)
        raise
    return list(contents)


def _cannot_hold(what: str) -> BabyError:
    return BabyError(f"The Little Baby has no {what}: this model cannot be exported")


# weights ------------------------------------------------------------------------------------------------


def named(config: GPTConfig, layout: Layout, flat: np.ndarray) -> dict[str, Any]:
    """The content of the original's model file: views of the parameters (P,) by name, and constants."""
    p = layout.unpack(np, flat)
    weights = {"wte_weight": p["wte"]["weight"], "wpe_weight": p["wpe"]["weight"]}
    weights |= {**_norm("ln_f", p["ln_f"]), **_linear("lm_head", p["lm_head"])}
    for i, block in p["blocks"].items():
        parts = {**_norm("ln1", block["norm1"]), **_norm("ln2", block["norm2"])}
        parts |= {"mha": _mha, "moh": _moh}[config.c_attention](block["attention"])
        parts |= {"mlp": _mlp, "moe": _moe}[config.c_network](block["network"])
        weights |= {f"block_{i}_{name}": part for name, part in parts.items()}
    return weights


def _norm(name: str, p: Tree) -> dict[str, Any]:
    return {f"{name}_gamma": p["gain"], f"{name}_beta": p["bias"]}


def _linear(name: str, p: Tree) -> dict[str, Any]:
    return {f"{name}_{part}": view for part, view in p.items()}


def _gate(name: str, p: Tree) -> dict[str, Any]:
    return {**_linear(name, p), f"{name}_bias": None}


def _qkv(name: str, p: Tree) -> dict[str, Any]:
    parts = np.split(p["weight"], 3, axis=1)
    return {f"{name}_{letter}_weight": part for letter, part in zip("qkv", parts, strict=True)}


def _mha(p: Tree) -> dict[str, Any]:
    return {**_qkv("mha", p["qkv"]), **_linear("mha_c", p["out"])}


def _moh(p: Tree) -> dict[str, Any]:
    return {**_qkv("moh", p["qkv"]), **_gate("moh_g", p["gate"]), **_linear("moh_m", p["out"])}


def _mlp(p: Tree) -> dict[str, Any]:
    return {**_linear("mlp_proj_up", p["up"]), **_linear("mlp_proj_dn", p["down"])}


def _moe(p: Tree) -> dict[str, Any]:
    parts = {**_gate("moe_g", p["gate"]), "moe_expansion": EXPANSION, "moe_n_experts": EXPERTS}
    up = np.split(p["up"]["weight"], EXPERTS, axis=1), np.split(p["up"]["bias"], EXPERTS)
    down = np.split(p["down"]["weight"], EXPERTS), p["down"]["bias"]
    for e in range(EXPERTS):
        for name, (weight, bias) in {"up": up, "dn": down}.items():
            parts |= _linear(f"moe_expert_{e}_{name}", {"weight": weight[e], "bias": bias[e]})
    return parts


def _params(config: GPTConfig, V: int, weights: Any, path: Path) -> np.ndarray:
    """The parameters (P,) from the content of a model file."""
    where, model = shown(path), Model(config, V)
    if not isinstance(weights, dict):
        raise BabyError(f"{where} is not a JSON object of weights by name; {REMEDY}")
    # checks that need no memory come first, because a config may claim any size
    n_layers = len({name.split("_")[1] for name in weights if name.startswith("block_")})
    if n_layers != config.n_layers:
        raise BabyError(f"{where} has {n_layers} blocks, but n_layers = {config.n_layers} in its config; {REMEDY}")
    if isinstance(rows := weights.get("wte_weight"), list) and len(rows) != V:
        found = f"{len(rows)} rows of wte_weight for the {V} characters of its tokenizer"
        raise BabyError(f"{where} has {found}; {REMEDY}")
    if model.n_parameters > path.stat().st_size:
        raise BabyError(f"{where} is too small for the {model.n_parameters} weights of its config; {REMEDY}")
    flat = np.full(model.n_parameters, np.nan)
    parts = {_name_in(weights, name): part for name, part in named(config, model.layout, flat).items()}
    # constants before views: the names depend on the number of experts
    for name, part in sorted(parts.items(), key=lambda pair: isinstance(pair[1], np.ndarray)):
        if name not in weights:
            raise BabyError(f"{where} lacks {name}, which a model of its config has; {REMEDY}")
        _take(part, weights[name], f"{where}: {name}")
    if odd := weights.keys() - parts.keys():
        raise BabyError(f"{where} has {min(odd)!r}, which a model of its config does not have; {REMEDY}")
    return flat


def _name_in(weights: dict[str, Any], name: str) -> str:
    """The name, or the older one if the file has that one instead."""
    older = next((name.replace(new, old) for new, old in OLDER.items() if new in name), name)
    return older if name not in weights and older in weights else name


def _take(part: Any, value: Any, what: str) -> None:
    """Write the numbers of nested lists into a view; a constant must be the same."""
    if not isinstance(part, np.ndarray):
        if type(value) is not type(part) or value != part:
            raise BabyError(f"{what} is {_in_words(value)}; baby_xp supports only {_in_words(part)}")
        return
    if not _fits(value, part.shape):
        raise BabyError(f"{what} is {_in_words(value, part.shape)}, not numbers of shape {part.shape}; {REMEDY}")
    with suppress(OverflowError):  # an int too large for a float: the view stays NaN
        part[...] = np.array(value, dtype=np.float64)
    if not np.isfinite(part).all():
        raise BabyError(f"{what} contains a number that is not finite: its training diverged; use another model")


def _fits(value: Any, shape: tuple[int, ...]) -> bool:
    if not isinstance(value, list) or len(value) != shape[0]:
        return False
    if len(shape) == 1:
        return {int, float}.issuperset(map(type, value))
    return all(_fits(row, shape[1:]) for row in value)


def _in_words(value: Any, expected: tuple[int, ...] | None = None) -> str:
    if not isinstance(value, list):
        return "null" if value is None else reprlib.repr(value)
    try:
        found = np.shape(value)
    except ValueError:
        return "lists of different lengths"
    return f"of shape {found}" if found != expected else "not of numbers alone"


# files --------------------------------------------------------------------------------------------------


def _load(path: Path) -> Any:
    """The value in a JSON file. Raises BabyError for a pickle, without loading it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise files.refusal(path, error, "read") from None
    if path.suffix.lower() in (".pkl", ".pickle") or data.startswith(b"\x80"):
        raise BabyError(
            f"{shown(path)} is a pickle, and reading one runs whatever code is in it; get the JSON files, "
            "or let the original's notebook write them if you trust the pickle"
        )
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise BabyError(f"{shown(path)} is not JSON; {REMEDY}") from None


def _find(model: Path, kind: str, *tags: str) -> Path:
    folders = model.parent, model.parent / ".." / f"{kind}s"
    paths = [folder / f"{kind}_{tag}.json" for tag in tags for folder in folders]
    if found := next(filter(os.path.exists, paths), None):
        return found
    places = f"{shown(paths[0])} does not exist, and {shown(folders[1])} does not have it either"
    raise BabyError(f"{places}; give the path of the {kind}")


def _configs(values: Any, where: str) -> tuple[GPTConfig, dict[str, Any]]:
    """The model's config and its training settings, from the content of a config file."""
    if not isinstance(values, dict):
        raise BabyError(f"{where} is not a JSON object of settings; {REMEDY}")
    if missing := [name for name in SIZES if name not in values]:
        raise BabyError(f"{where} lacks {missing[0]}; {REMEDY}")
    if odd := values.keys() - {*SWITCHES, *SIZES, *TRAINING}:
        raise BabyError(f"{where} has {min(odd)!r}, which is not a setting of the original's; {REMEDY}")
    train = {name: values[name] for name in TRAINING if name in values}
    from_dict(TrainConfig, {"num_epochs": 1, "schedule": "constant", **train}, where)  # raises if they do not fit
    return from_dict(GPTConfig, {n: value for n, value in values.items() if n not in TRAINING}, where), train


def _described(config: GPTConfig, train: TrainConfig | None) -> dict[str, Any]:
    """The content of the original's config file. It counts in epochs, at a constant learning rate."""
    train = train or TrainConfig(num_epochs=1)
    settings = {"num_epochs": train.num_epochs or 1, "batch_size": train.step_size, "lr": train.peak_lr}
    return {name: getattr(config, name) for name in (*SWITCHES, *SIZES)} | settings
