"""How each parameter affects size, speed and quality: the tables of docs/parameters.md. See bench/README.md."""

import argparse
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from baby_xp_data import catalog

from baby_xp.distributed.group import Others
from bench import harness, variants
from bench.peers import ours
from bench.results import markdown, mib


def main() -> int:
    """Do what the command line asks for."""
    asked = parse()
    return variants.in_ranks("bench.parameters", asked.distributed, partial(measure, asked))


def measure(asked: argparse.Namespace, others: Others) -> None:
    """Do it, on rank 0, together with the other ranks."""
    if asked.train:
        train_all(asked.file, asked.jobs, asked.groups, others)
    if asked.speed:
        time_all(asked.file, asked.steps, asked.rounds)
    if asked.table:
        result = variants.read(asked.file)
        variants.show(document(result), tables(result), asked.page)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = variants.parser("bench.parameters", __doc__, "parameters", steps=20, rounds=3)
    known = harness.names_of(groups(), "group")
    parser.add_argument("--groups", type=known, default=groups(), help="train only these groups")
    asked = parser.parse_args()
    variants.check(parser, asked)
    return asked


def write(file: Path, result: dict) -> None:
    """Keep a result, and its tables beside it."""
    variants.write(file, result, document(result))


# the variants -------------------------------------------------------------------------------------------

PRESET = "classic"
BASE = {
    "data": "shakespeare", "batch_size": 8, "lr": 1e-2, "min_lr": 1e-3, "num_steps": 1000, "eval_every": 100,
    "sample_tokens": 0,
}  # fmt: skip
"""The base: the sizes of preset `classic`, on Shakespeare in place of its own text, with a rate for so few steps.

At the preset's own, 0.003, so few steps leave the model so undertrained that a longer context made it worse.
"""
SHORT, SHORT_STEPS = 10_000, 2000
"""Characters of the short text, the beginning of Shakespeare, and steps in which they are memorized."""


@dataclass(frozen=True)
class Variant:
    """A value of a parameter. overrides: what differs from the base, {} for itself. short: on the short text."""

    group: str
    value: str
    overrides: dict[str, Any] = field(default_factory=dict)
    short: bool = False

    @property
    def key(self) -> str:
        """Its name in the results: that of the base is the same in every group."""
        if not self.overrides:
            return "short text" if self.short else "base"
        changes = ", ".join(f"{name} {value}" for name, value in self.overrides.items())
        return f"short text, {changes}" if self.short else changes


def _of(name: str, *values: Any, base: Any = None) -> list[Variant]:
    """Variants of one parameter, in this order. base: the value that the base has; it gets a row too."""
    return [Variant(name, str(value), {} if value == base else {name: value}) for value in values]


def _each(group: str, overrides_of: dict[str, dict[str, Any]], short: bool = False) -> list[Variant]:
    """Variants of several parameters, by what their row is called."""
    return [Variant(group, value, overrides, short) for value, overrides in overrides_of.items()]


FAST = {"lr": 1e-1, "min_lr": 1e-2}
ALL = [
    *_of("seed", 0, 1, 2, base=0),
    *_of("n_ctx", 16, 32, 64, 128, base=64),
    *_of("n_emb", 32, 64, 128, base=64),
    *_of("head_size", 16, 32, 64, 128, base=64),
    *_of("n_heads", 1, 2, 4, 8, 16, base=4),
    *_of("n_layers", 1, 2, 3, 4, 6, base=3),
    *_each("more steps", {"1,000 steps": {}, "4,000 steps": {"num_steps": 4000}} | {
        f"4,000 steps, {name} {value}": {name: value, "num_steps": 4000}
        for name, value in (("n_layers", 1), ("n_ctx", 16), ("n_ctx", 128), ("n_emb", 128), ("c_sequence", "post"))
    }),
    *_of("dropout", 0.0, 0.1, 0.2, base=0.0),
    *_of("c_sequence", "pre", "post", base="pre"),
    *_of("c_attention", "mha", "moh", base="mha"),
    *_of("c_network", "mlp", "moe", base="mlp"),
    *_of("gelu", "tanh", "erf", base="tanh"),
    *_of("tokenizer", "char", "byte", base="char"),
    *_of("dtype", "float32", "float64", base="float32"),
    *_of("batch_size", 2, 4, 8, 16, 32, base=8),
    *_each("accumulate", {"1, batch_size 8": {}, "4, batch_size 2": {"batch_size": 2, "accumulate": 4}}),
    *_each("base_batch_size", {
        "batch_size 8, lr 0.01": {}, "batch_size 2, lr 0.01": {"batch_size": 2},
        "batch_size 2, lr 0.0025 by the rule": {"batch_size": 2, "base_batch_size": 8, "min_lr": 2.5e-4},
    }),
    *_each("same tokens", {
        "batch_size 2, 4,000 steps": {"batch_size": 2, "num_steps": 4000}, "batch_size 8, 1,000 steps": {},
        "batch_size 32, 250 steps": {"batch_size": 32, "num_steps": 250},
    }),
    *_of("num_steps", 250, 500, 1000, 2000, 4000, base=1000),
    *_each("num_epochs", {
        "none: 1,000 steps from random places": {},
        "1, stride 128: 981 steps": {"num_epochs": 1, "stride": 128, "num_steps": None},
    }),
    # the cosine ends at a tenth of the rate, as the base's does
    *_each("lr", {
        f"{rate:g}": {"lr": rate, "min_lr": rate / 10} if rate != 1e-2 else {}
        for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    }),
    *_of("schedule", "cosine", "constant", base="cosine"),
    *_of("min_lr", 0.0, 1e-3, 3e-3, base=1e-3),
    *_of("warmup_steps", 0, 100, 300, base=100),
    *_of("beta1", 0.8, 0.9, 0.95, base=0.9),
    *_of("beta2", 0.95, 0.99, 0.999, base=0.99),
    *_of("weight_decay", 0.0, 0.1, 1.0, base=0.1),
    *_of("clip", 0.0, 0.1, 1.0, base=1.0),
    *_each("too fast", {
        "lr 0.01": {}, "lr 0.1": FAST, "no warm-up either": {**FAST, "warmup_steps": 0},
        "no clipping either": {**FAST, "warmup_steps": 0, "clip": 0.0},
        "norms after the layers too": {**FAST, "warmup_steps": 0, "clip": 0.0, "c_sequence": "post"},
    }),
    *_each("short text", {"nothing": {}} | {
        f"{name} {value:g}": {name: value}
        for name, value in (("dropout", 0.1), ("dropout", 0.2), ("dropout", 0.4), ("weight_decay", 1.0),
                            ("n_layers", 1), ("n_emb", 32), ("num_steps", 1000), ("patience", 3))
    }, short=True),
]  # fmt: skip
"""In the order of the tables."""
ON_SPEED = {
    "n_ctx", "n_emb", "head_size", "n_heads", "n_layers", "dropout", "c_sequence", "c_attention", "c_network",
    "gelu", "tokenizer", "dtype", "batch_size", "accumulate",
}  # fmt: skip
"""Groups whose parameter changes the time or the memory of a step."""
ON_TOKENS = {"batch_size", "accumulate", "base_batch_size", "same tokens", "num_steps", "num_epochs", "more steps"}
"""Groups whose variants do not all see as many tokens."""


def groups() -> list[str]:
    """The names of the groups, in order."""
    return list(dict.fromkeys(one.group for one in ALL))


def to_train() -> list[Variant]:
    """Each different variant once, the base first."""
    return list({one.key: one for one in ALL}.values())


def to_time() -> list[Variant]:
    """Each different variant whose step may take a different time, once."""
    return list({one.key: one for one in ALL if one.group in ON_SPEED}.values())


def train_all(file: Path, jobs: int, chosen: list[str], others: Others = ()) -> None:
    """Train what the file lacks of the chosen groups, and keep each result as soon as it is there."""
    result = variants.started(file, base())
    wanted = {one.key for one in ALL if one.group in chosen}
    requests = {one.key: {"key": one.key} for one in to_train() if one.key in wanted}
    variants.train_all("bench.parameters:trained", requests, result, jobs, lambda: write(file, result), others)


def base() -> dict:
    """What the variants are variants of."""
    return {"preset": PRESET, **BASE, "short text": SHORT, "steps on the short text": SHORT_STEPS}


def trained(key: str) -> dict:
    """The child's part: train a variant -> what differs from the base, and what `variants.trained` returns."""
    variant = next(one for one in ALL if one.key == key)
    with tempfile.TemporaryDirectory() as folder:
        found, _ = variants.trained(PRESET, settings_of(variant, Path(folder)), folder)
    return {"overrides": variant.overrides, **found}


def settings_of(variant: Variant, folder: Path) -> dict:
    """The fields that make the variant of the preset; the short text is written into `folder`."""
    steps = {"num_steps": SHORT_STEPS} if variant.short else {}
    settings = {**BASE, **steps, **variant.overrides}
    if settings.get("schedule") == "constant":
        del settings["min_lr"]  # the base's min_lr would have no effect
    if variant.short:
        text = catalog.find("shakespeare").read_text(encoding="utf-8")[:SHORT]
        settings["data"] = str(folder / "short.txt")
        (folder / "short.txt").write_text(text, encoding="utf-8")
    return settings


def time_all(file: Path, steps: int, rounds: int) -> None:
    """Time a step of each variant that may take a different time, in turn, and keep it."""
    result, requests = variants.read(file), {one.key: {"key": one.key, "steps": steps} for one in to_time()}
    variants.time_all("bench.parameters:timed", requests, result, rounds)
    write(file, result)


def timed(key: str, steps: int) -> dict:
    """The child's part: train a variant for some steps as `train` does -> ms of each, memory, workers."""
    variant = next(one for one in ALL if one.key == key)
    with tempfile.TemporaryDirectory() as folder:
        return ours.train_preset(PRESET, settings_of(variant, Path(folder)), steps, variants.WARMUP)


# the tables ---------------------------------------------------------------------------------------------


def document(result: dict) -> list[str]:
    """All tables as Markdown, with what a reader must know about them."""
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in BASE.items())
    lines = [f"{result['date']}; {machine}", "", f"Base: python -m baby_xp train {PRESET} {flags}", ""]
    lines += variants.about_times(result)
    for group, rows in tables(result).items():
        lines += [group, "", *rows, ""]
    return lines


def tables(result: dict) -> dict[str, list[str]]:
    """A Markdown table for each group of variants that were trained, all or some of them."""
    some = [one for one in ALL if one.key in result["trained"]]
    return {
        group: markdown([row(one, result) for one in some if one.group == group])
        for group in groups()
        if any(one.group == group for one in some)
    }


def row(variant: Variant, result: dict) -> dict[str, str]:
    """A line of a table."""
    found, group = result["trained"][variant.key], variant.group
    name = variant.value if variant.overrides else f"{variant.value} (base)"
    cells = {"what differs" if " " in group else group: name}
    if group in ON_SPEED:
        speed = result["timed"].get(variant.key)
        cells["parameters"] = "" if found["failed"] else f"{found['parameters']:,}"
        cells["ms per step"] = f"{speed['ms']:.1f}" if speed else ""
        cells["memory, MiB"] = mib(speed["memory"]) if speed else ""
    if group in ON_TOKENS:
        cells["tokens"] = "" if found["failed"] else f"{found['tokens']:,}"
    return cells | losses(variant, found, result["trained"].get("base", found))


def losses(variant: Variant, found: dict, base: dict) -> dict[str, str]:
    """The losses of a variant, at the end and at the best step if it may overfit; else why there are none."""
    if found["failed"]:
        reason = found["failed"].partition(";")[0]
        return {"training loss": "", "validation loss": reason, "against the base": ""}
    # the last evaluation during training: step, training loss, validation loss, norm of the gradients
    _, train, validation, _ = [point for point in found["curve"] if point[1] is not None][-1]
    best, cells = f"{found['val_loss']:.3f}", {"training loss": f"{train:.3f}"}
    if variant.short:
        at_end = {"validation loss at the end": f"{validation:.3f}"}
        return {**cells, **at_end, "at its best": best, "best step": str(found["best_step"])}
    difference = found["val_loss"] - base["val_loss"]
    return {**cells, "validation loss": best, "against the base": f"{difference:+.3f}" if difference else ""}


if __name__ == "__main__":
    raise SystemExit(main())
