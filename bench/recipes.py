"""What each change from the classic recipe to the modern one is worth: the tables of docs/recipes.md.

See bench/README.md.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from baby_xp_data import catalog, nursery
from threadpoolctl import threadpool_limits

from baby_xp import presets
from baby_xp.config import RunConfig
from baby_xp.distributed.group import Others
from baby_xp.errors import BabyError
from baby_xp.run import Run
from baby_xp.text import dataset
from baby_xp.text.batches import consecutive_windows
from baby_xp.text.corpus import TRAIN_SHARE
from baby_xp.training.step import on_device, total_loss
from baby_xp.training.validation import mean_loss
from bench import harness, variants
from bench.harness import say
from bench.peers import ours
from bench.quality import WINDOW, Recipe, described, recipe
from bench.results import markdown


def main() -> int:
    """Do what the command line asks for."""
    try:
        asked = parse()
    except BabyError as error:
        say(f"bench.recipes: {error}")
        return 2
    return variants.in_ranks("bench.recipes", asked.distributed, partial(measure, asked))


def measure(asked: argparse.Namespace, others: Others) -> None:
    """Do it, on rank 0, together with the other ranks."""
    if asked.tune:
        tune(asked.file, asked.tune, asked.seeds, asked.jobs, others)
        return
    if asked.train:
        train_all(asked.file, asked.jobs, asked.texts, asked.only, asked.seeds, others)
    if asked.speed:
        time_all(asked.file, asked.texts, asked.only, asked.steps, asked.rounds)
    if asked.table:
        result = variants.read(asked.file)
        variants.show(document(result), tables(result), asked.page)


def parse() -> argparse.Namespace:
    """The command line. Raises BabyError for a recipe that cannot be used."""
    parser = variants.parser("bench.recipes", __doc__, "recipes", steps=30, rounds=5)
    some = harness.names_of(TEXTS, "text")
    parser.add_argument("--texts", type=some, default=[*TEXTS], help="texts, of shakespeare and nursery (both)")
    names = list(dict.fromkeys(one.name for one in all_variants() if one.name))
    help_of_only = "only these changes, by their names in the tables (all)"
    parser.add_argument("--only", type=harness.names_of(names, "change"), default=names, help=help_of_only)
    parser.add_argument("--seeds", type=harness.positive, default=3, help="seeds, from 0 (%(default)s)")
    help_of_tune = (
        "train recipes such as 'NAME: PRESET SETTING=VALUE ...' on the first part of the training part, and print "
        "their losses on its last part; keeps them in --file"
    )
    parser.add_argument("--tune", nargs="+", metavar="RECIPE", help=help_of_tune)
    asked = parser.parse_args()
    if not asked.tune:
        variants.check(parser, asked)
        return asked
    if asked.train or asked.speed or asked.table:
        parser.error("--tune is for itself: leave out --train, --speed and --table")
    if asked.file == parser.get_default("file"):
        parser.error("--tune keeps losses in a file of their own: name it with --file")
    asked.tune = [recipe(text) for text in asked.tune]
    labels = [one.label for one in asked.tune]
    if twice := [label for label in labels if labels.count(label) > 1]:
        parser.error(f"argument --tune: two of them are called {twice[0]!r}")
    return asked


# the variants -------------------------------------------------------------------------------------------

TEXTS = {"shakespeare": "shakespeare", "nursery": "baby"}
"""The preset that is the full recipe on each text, as it was when the tables were made."""
SETTINGS: dict[str, Any] = {"sample_tokens": 0}
"""What differs from the preset in every training, and does not change what is learned."""
SHORTER: dict[str, dict[str, Any]] = {"shakespeare": {}, "nursery": {"num_steps": 400}}
"""What else differs on a text: the preset's 1,000 steps would take hours for all variants of the nursery."""
PLAIN: dict[str, Any] = {
    "c_model": "classic", "optimizer": "adamw", "lr": 3e-3, "schedule": "cosine", "min_lr": 3e-4,
    "warmup_steps": 30, "weight_decay": 0.1, "clip": 1.0,
}  # fmt: skip
"""The plain recipe: what differs from the full one, which has the same sizes, batches and number of steps."""
CHANGES: dict[str, tuple[str, ...]] = {
    "rotary positions": ("positions",), "RMSNorm": ("norm",), "norm after the embedding": ("embedding_norm",),
    "QK-norm": ("qk_norm",), "ReLU squared": ("activation",), "no biases": ("linear_bias", "head_bias"),
    "zeros as first weights": ("zero_init",), "Muon": ("optimizer",), "higher rate": ("lr",),
    "linear decay to zero": ("schedule", "min_lr"), "no decay or clipping": ("weight_decay", "clip"),
    "shorter warm-up": ("warmup_steps",),
}  # fmt: skip
"""The changes between them: the settings of each, whose values are those of the two recipes."""
ADDITIONS: dict[str, dict[str, Any]] = {
    "SwiGLU": {"activation": "swiglu"}, "RMSNorm with gain": {"norm": "rmsnorm-gain"},
    "tied head": {"tied_head": True}, "soft cap": {"logit_cap": 15.0}, "smear": {"smear": True},
}  # fmt: skip
"""What the full recipe does not have, added to both recipes."""
OF_MUON: dict[str, dict[str, Any]] = {
    "3 iterations": {"muon_iterations": 3}, "4 iterations": {"muon_iterations": 4},
    "momentum 0.9": {"muon_momentum": 0.9}, "momentum 0.95": {"muon_momentum": 0.95},
}  # fmt: skip
"""What is added to the full recipe only."""
SAME_STEP = ("zeros as first weights", "higher rate", "linear decay to zero", "shorter warm-up", "momentum")
"""Beginnings of the names of what cannot change the time of a step."""
SIDES = ("plain", "full")


@dataclass(frozen=True)
class Variant:
    """A recipe on a text: plain or full, without a name, or with something added ("+") or left out ("-")."""

    text: str
    base: str
    sign: str = ""
    name: str = ""
    changed: tuple[tuple[str, Any], ...] = ()
    """What differs from that base."""

    @property
    def key(self) -> str:
        """Its name in the results."""
        return " ".join(filter(None, (f"{self.text}, {self.base}", self.sign, self.name)))

    @property
    def overrides(self) -> dict[str, Any]:
        """What differs from the full recipe."""
        return {**(PLAIN if self.base == "plain" else {}), **dict(self.changed)}

    @property
    def config(self) -> RunConfig:
        """All its settings."""
        full = presets.preset(TEXTS[self.text]).override(earlier(self.text))
        return full.override({**SETTINGS, **SHORTER[self.text], **self.overrides})


def value_of(config: RunConfig, name: str) -> Any:
    """A setting of a config."""
    return next(getattr(part, name) for part in (config.model, config.train, config.data) if hasattr(part, name))


def earlier(text: str) -> dict[str, Any]:
    """What makes the preset of a text the full recipe again."""
    return variants.EARLIER.get(TEXTS[text], {})


def variants_of(text: str) -> list[Variant]:
    """All variants on a text in the order of the tables, plain and full first.

    A change is left out of the table where both recipes have the same value, an addition where the base has it.
    """
    found = [Variant(text, side) for side in SIDES]
    plain, full = (one.config for one in found)

    def add(base: str, sign: str, name: str, settings: dict[str, Any]) -> None:
        of_base = plain if base == "plain" else full
        changed = {name: value for name, value in settings.items() if value_of(of_base, name) != value}
        if changed:
            found.append(Variant(text, base, sign, name, tuple(changed.items())))

    for name, settings in CHANGES.items():
        add("plain", "+", name, {one: value_of(full, one) for one in settings})
        add("full", "-", name, {one: value_of(plain, one) for one in settings})
    # as many tokens per step, in shorter windows
    n_ctx, batch_size = full.model.n_ctx, full.train.batch_size
    shorter = {f"context of {WINDOW}": {"n_ctx": WINDOW, "batch_size": batch_size * n_ctx // WINDOW}}
    for name, settings in {**ADDITIONS, **shorter}.items():
        add("plain", "+", name, settings)
        add("full", "+", name, settings)
    for name, settings in OF_MUON.items():
        add("full", "+", name, settings)
    return found


def all_variants(texts: Iterable[str] = TEXTS, only: list[str] | None = None) -> list[Variant]:
    """The variants on these texts; only: with these names, and the two recipes themselves."""
    found = [one for text in texts for one in variants_of(text)]
    return [one for one in found if only is None or not one.name or one.name in only]


def by_key() -> dict[str, Variant]:
    """All variants."""
    return {one.key: one for one in all_variants()}


def base() -> dict:
    """What the variants are variants of, and the two recipes on each text."""
    full = {text: Variant(text, "full").config.to_dict() for text in TEXTS}
    return {"settings": SETTINGS, "shorter": SHORTER, "plain": PLAIN, "full": full}


def of_seed(key: str, seed: int) -> str:
    """The name of a training."""
    return f"{key}, seed {seed}"


# training and timing ------------------------------------------------------------------------------------


def train_all(
    file: Path, jobs: int, texts: list[str], only: list[str], seeds: int, others: Others = ()
) -> None:
    """Train what the file lacks, all variants with seed 0 first, and keep each result as soon as it is there."""
    result, chosen = variants.started(file, base()), all_variants(texts, only)
    requests = {of_seed(one.key, seed): {"key": one.key, "seed": seed} for seed in range(seeds) for one in chosen}
    for one in chosen:
        for seed in range(seeds):
            kept = result["trained"].get(of_seed(one.key, seed))
            if kept and kept["overrides"] != one.overrides:
                raise BabyError(f"{file} has another {one.key!r}: name a new file with --file")
    keep: Callable[[], None] = lambda: write(file, result)  # noqa: E731
    variants.train_all("bench.recipes:trained", requests, result, jobs, keep, others)


def trained(key: str, seed: int) -> dict:
    """The child's part: train a variant -> what differs from the preset, and what `variants.trained` returns.

    loss_64 is the loss of the best weights in windows of 64 tokens.
    """
    variant = by_key()[key]
    with TemporaryDirectory() as folder:
        found, run = variants.trained(variant.config, {"seed": seed}, folder)
        if run is not None:
            found["loss_64"] = short_loss(run) if run.model.config.n_ctx > WINDOW else found["val_loss"]
    return {"overrides": variant.overrides, "seed": seed, **found}


def short_loss(run: Run) -> float:
    """Loss in nats per token of the best weights of a run, over the whole validation part in windows of WINDOW."""
    settings, flat = run.settings, run.backend.asarray(run.params)
    with TemporaryDirectory() as folder, threadpool_limits(1):
        ids = dataset.read_corpus(settings.data, Path(folder), run.tokenizer).validation
        total = lambda batch: total_loss(run.backend.xp, run.model, flat, on_device(run.backend, batch)).item()  # noqa: E731
        return mean_loss(total, consecutive_windows(ids, WINDOW, settings.train.batch_size))


def time_all(file: Path, texts: list[str], only: list[str], steps: int, rounds: int) -> None:
    """Time a step of each variant that may take a different time, in turn, and keep it."""
    result = variants.started(file, base())
    chosen = [one for one in all_variants(texts, only) if not one.name.startswith(SAME_STEP)]
    requests = {one.key: {"key": one.key, "steps": steps} for one in chosen}
    variants.time_all("bench.recipes:timed", requests, result, rounds)
    write(file, result)


def write(file: Path, result: dict) -> None:
    """Keep a result, and its tables beside it."""
    variants.write(file, result, document(result))


def timed(key: str, steps: int) -> dict:
    """The child's part: train a variant for some steps as `train` does -> ms of each, memory, workers."""
    return ours.train_preset(by_key()[key].config, {}, steps, variants.WARMUP)


# tuning -------------------------------------------------------------------------------------------------

TUNED = "the first 90 % of the text, of which the last 10 % are the validation part"


def tune(file: Path, recipes: list[Recipe], seeds: int, jobs: int, others: Others = ()) -> None:
    """Train recipes on the training part alone, print their losses, and keep them in a file that is continued."""
    result, requests = variants.started(file, {"tuned on": TUNED}), {}
    configs = {one.label: one.config.override(SETTINGS) for one in recipes}
    for label, config in configs.items():
        if config.data.data not in TEXTS:
            raise BabyError(f"recipe {label!r} is about {config.data.data}: choose {' or '.join(TEXTS)}")
    for seed in range(seeds):
        for label, config in configs.items():
            request = {"label": label, "config": config.to_dict(), "seed": seed}
            kept = result["trained"].get(of_seed(label, seed))
            if kept and variants.completed(kept["config"]) != request["config"]:
                raise BabyError(f"{file} has another recipe that is called {label!r}: name a new file with --file")
            requests[of_seed(label, seed)] = request
    keep: Callable[[], None] = lambda: variants.write(file, result, tuned_document(result))  # noqa: E731
    variants.train_all("bench.recipes:tuned", requests, result, jobs, keep, others)
    variants.show(tuned_document(result), {}, None)


def tuned(label: str, config: dict, seed: int) -> dict:
    """The child's part: train a recipe on the training part of its text -> what `variants.trained` returns.

    The run never sees the validation part: it reads a file that ends before it, and keeps a part of that for its
    own validation.
    """
    chosen = RunConfig.from_dict(config, "the recipe")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "training.txt"
        file.write_text(training_part(chosen.data.data), encoding="utf-8")
        found, _ = variants.trained(chosen, {"seed": seed, "data": str(file)}, folder)
    return {"recipe": label, "config": config, "seed": seed, **found}


def training_part(text: str) -> str:
    """The characters of a text that runs train on."""
    if text == "nursery":
        whole = nursery.generate(dataset.NURSERY_CHARACTERS, dataset.NURSERY_SEED)
    else:
        whole = catalog.find(text).read_text(encoding="utf-8")
    return whole[: int(TRAIN_SHARE * len(whole))]


def tuned_document(result: dict) -> list[str]:
    """The losses of all recipes that a file has, as Markdown."""
    recipes: dict[str, list[dict]] = {}
    for found in result["trained"].values():
        recipes.setdefault(found["recipe"], []).append(found)
    rows = []
    for label, runs in recipes.items():
        settings, runs = described(runs[0]["config"]), sorted(runs, key=lambda run: run["seed"])
        rows.append({"recipe": label, "settings": settings, "validation loss": values(runs, "val_loss", digits=4)})
    return [*heading(result), f"Trained on {TUNED}.", "", *markdown(rows), ""]


# the tables ---------------------------------------------------------------------------------------------


def heading(result: dict) -> list[str]:
    """When and where the losses were measured."""
    return [f"{result['date']}; " + ", ".join(f"{name} {value}" for name, value in result["machine"].items()), ""]


def document(result: dict) -> list[str]:
    """All tables as Markdown, with what a reader must know about them."""
    recipes = []
    for text, preset in TEXTS.items():
        full = {**earlier(text), **SHORTER[text]}
        plain = variants.flags({name: value for name, value in {**full, **PLAIN}.items() if "muon_" not in name})
        recipes.append(f"{text}: full is preset {preset}{variants.flags(full)}, plain is {preset}{plain}")
    lines = [*heading(result), *recipes, "", *variants.about_times(result)]
    for name, rows in tables(result).items():
        lines += [name, "", *rows, ""]
    return lines


def tables(result: dict) -> dict[str, list[str]]:
    """Markdown tables of the texts that were trained: the changes, and the additions."""
    found = {}
    for text in TEXTS:
        some = [one for one in variants_of(text) if runs_of(one, result)]
        if sum(not one.name for one in some) == len(SIDES):
            changes = [one for one in some if not one.name or one.name in CHANGES]
            found[text] = markdown(table(text, changes, "left out of full", result))
            rest = [one for one in some if one.name and one.name not in CHANGES]
            if rest:
                found[f"{text}, additions"] = markdown(table(text, rest, "added to full", result))
    return found


def table(text: str, some: list[Variant], on_full: str, result: dict) -> list[dict[str, str]]:
    """The lines of a table: one for each name of these variants, with two cells for each of the two recipes."""
    lines = []
    for name in dict.fromkeys(one.name for one in some):
        of_side = {one.base: one for one in some if one.name == name}
        kinds = {"val_loss": ""}
        if any("n_ctx" in one.overrides for one in of_side.values()):  # a longer window has a lower loss by itself
            kinds["loss_64"] = f", both losses in windows of {WINDOW}"
        for key, windows in kinds.items():
            cells = {"change": (name or measure_of(text)) + windows, "settings": settings_of(text, name, some)}
            for side, what in zip(SIDES, ("added to plain", on_full), strict=True):
                one = of_side.get(side)
                cells[what] = "" if one is None else loss_cell(one, key, result)
                cells[f"step, {side}"] = "" if one is None else step_cell(one, result)
            lines.append(cells)
    return lines


def measure_of(text: str) -> str:
    """What the losses of the two recipes themselves are."""
    return "the recipe itself: loss" + (" above the entropy" if entropy(text) else "")


def entropy(text: str) -> float:
    """What is subtracted from losses on this text: its exact entropy in nats per token, or 0 if it is unknown."""
    return nursery.entropy_per_character() if text == "nursery" else 0.0


def settings_of(text: str, name: str, some: list[Variant]) -> str:
    """What a row changes, for a change from its value in plain to that in full."""
    if name in CHANGES:
        plain, full = (Variant(text, side).config for side in SIDES)
        pairs = [(one, shown(value_of(plain, one)), shown(value_of(full, one))) for one in CHANGES[name]]
        return ", ".join(f"{one} {before} to {after}" for one, before, after in pairs if before != after)
    changed = next(one.changed for one in some if one.name == name)
    return ", ".join(f"{one} {shown(value)}" for one, value in changed)


def shown(value: Any) -> str:
    """The value of a setting in a cell."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def runs_of(one: Variant, result: dict) -> list[dict]:
    """The trainings of a variant that a result has, in the order of their seeds."""
    found = [run for key, run in result["trained"].items() if key.startswith(f"{one.key}, seed ")]
    return sorted(found, key=lambda run: run["seed"])


def values(runs: list[dict], key: str, least: float = 0.0, digits: int = 3) -> str:
    """The median of losses, or of their distances to the least possible, then that of each seed; or a failure."""
    if failed := [run["failed"].partition(";")[0] for run in runs if run["failed"]]:
        return failed[0]
    losses = [run[key] - least for run in runs]
    median, *each = (f"{loss:.{digits}f}" for loss in (statistics.median(losses), *losses))
    return f"{median} ({', '.join(each)})"


def loss_cell(one: Variant, key: str, result: dict) -> str:
    """The losses of a recipe; of a variant the differences of each seed to it: their median, and their range."""
    runs = runs_of(one, result)
    if not one.name:
        return values(runs, key, entropy(one.text))
    if failed := [run["failed"].partition(";")[0] for run in runs if run["failed"]]:
        return failed[0]
    of_base = {run["seed"]: run for run in runs_of(Variant(one.text, one.base), result) if not run["failed"]}
    found = [run[key] - of_base[run["seed"]][key] for run in runs if run["seed"] in of_base]
    return f"{statistics.median(found):+.3f} ({min(found):+.3f} to {max(found):+.3f})" if found else ""


def step_cell(one: Variant, result: dict) -> str:
    """The time of a step: of a recipe in milliseconds, of a variant as a multiple of that.

    It is the least median of the rounds: changes cost less than a machine's speed may differ from one round to the
    next.
    """
    timed, base = (result["timed"].get(key) for key in (one.key, f"{one.text}, {one.base}"))
    if timed is None or base is None:
        return ""
    ms = min(timed["by_round"])
    return f"{ms / min(base['by_round']):.2f}" if one.name else f"{ms:.1f} ms"


if __name__ == "__main__":
    raise SystemExit(main())
