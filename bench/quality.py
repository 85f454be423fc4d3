"""Time to a validation loss: recipes of baby_xp beside the same recipes in PyTorch. See bench/README.md."""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any

from baby_xp import files, presets
from baby_xp.arrays import params
from baby_xp.config import CLASSIC, MODERN, EquationData, GPTConfig, RunConfig
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.runs import config_file
from baby_xp.text.batches import Batch, consecutive_windows
from baby_xp.text.dataset import prepare
from bench import harness, peers, results, variants
from bench.harness import US, say
from bench.peers import Curve
from bench.workloads import TOLERANCES

FITTERS = {US: "bench.peers.ours:fit", "torch": "bench.peers.torch_modern:fit"}
REFERENCE = "nanogpt-cpu"
RECIPES = REFERENCE, "shakespeare"
"""By default: nanoGPT's recipe, and the preset that is to reach its loss sooner."""
WINDOW = 64
"""Tokens of the windows in which models of different contexts are compared."""
CHECKED_STEPS, CHECKED_BATCHES = 2, 2
"""Steps after which two libraries must have the same losses, and validation batches of these losses."""
CLASS = 2, "AVX-512"
"""Cores and vector width of the machine on which SECONDS is a goal."""
SECONDS, OF_REFERENCE, OF_RECIPE = 3.0, 1 / 20, 0.5
"""Goals: time to the target, and its share of PyTorch's time with nanoGPT's recipe and with the same recipe."""


@dataclass(frozen=True)
class Recipe:
    """A preset with some settings, and what to call it."""

    label: str
    config: RunConfig


def main() -> int:
    """Measure what the command line asks for, print the table, and keep it in the file of --out.

    Exit code 1 if a library failed or was left out on the way: the others are measured all the same.
    """
    try:
        asked = parse()
        result = finished(asked, kept_in(asked))
    except BabyError as error:
        say(f"bench.quality: {error}")
        return 2
    print("\n".join(document(result)))
    return 1 if result["failed"] else 0


def parse() -> argparse.Namespace:
    """The command line. Raises BabyError for a recipe that cannot be used."""
    parser = harness.parser("bench.quality", __doc__, data="shakespeare")
    what = "presets, or texts such as 'NAME: PRESET SETTING=VALUE ...' (nanogpt-cpu and shakespeare)"
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help=what)
    parser.add_argument("--target", type=float, default=1.88, help="validation loss to reach (%(default)s)")
    parser.add_argument("--seeds", type=harness.positive, default=3, help="seeds, from 0 (%(default)s)")
    help_of_points = "evaluations of each training, about (%(default)s)"
    parser.add_argument("--evaluations", type=harness.positive, default=20, help=help_of_points)
    others = [name for name in FITTERS if name != US]
    known = harness.names_of(others, "peer", none=True)
    parser.add_argument("--peers", type=known, default=",".join(others), help='libraries; "": none (%(default)s)')
    help_of_out = "JSON file of the results, which is continued if it exists; the table is written beside it"
    parser.add_argument("--out", type=Path, help=help_of_out)
    asked = parser.parse_args()
    if not math.isfinite(asked.target):
        parser.error(f"argument --target: {asked.target} is not a loss")
    if asked.out and asked.out.suffix != ".json":
        parser.error(f"argument --out: {asked.out} is not the name of a file that ends in .json")
    if asked.data != "shakespeare":
        if not Path(asked.data).is_file():
            parser.error(f"argument --data: there is no file {asked.data}")
        asked.data = str(Path(asked.data).resolve())  # child processes run in another folder
    asked.recipes = [recipe(text, asked.data) for text in asked.recipes]
    labels = [one.label for one in asked.recipes]
    if twice := [label for label in labels if labels.count(label) > 1]:
        parser.error(f"argument --recipes: two of them are called {twice[0]!r}")
    return asked


def recipe(text: str, data: str | None = None) -> Recipe:
    """What a text like "preset", "preset name=value ..." or "label: preset name=value ..." describes.

    data: what it trains on; None: what it says itself. Values are read as JSON, and where they are none, as texts.
    Raises BabyError where they do not fit together.
    """
    label, colon, rest = text.partition(":")
    words = (rest if colon else text).split()
    preset, *settings = words or [""]
    values: dict[str, Any] = {}
    for word in settings:
        name, equals, value = word.partition("=")
        if not equals:
            raise BabyError(f"recipe {text!r}: {word!r} is not a setting: write it as name=value")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    config = presets.preset(preset)
    if isinstance(config.data, EquationData):
        raise BabyError(f"recipe {text!r} is about equations: choose a preset that learns a text")
    return Recipe(label.strip(), config.override(values if data is None else {**values, "data": data}))


# measuring ----------------------------------------------------------------------------------------------


def kept_in(asked: argparse.Namespace) -> dict | None:
    """What the file of --out has; None without one. Raises BabyError if it is of other recipes, or a machine's."""
    if asked.out is None or not asked.out.exists():
        return None
    try:
        kept = variants.completed(json.loads(asked.out.read_text(encoding="utf-8")))
        recipes, was = kept["recipes"], (harness.class_of(kept["machine"]), kept["data"], kept["evaluations"])
    except (ValueError, KeyError, TypeError):
        raise BabyError(f"{asked.out} is not a result of bench.quality: name a new file") from None
    here = harness.class_of(harness.ask("bench.harness:machine"))
    if was != (here, asked.data, asked.evaluations):
        raise BabyError(
            f"{asked.out} was measured differently (machine {was[0]}; data {was[1]}; {was[2]} evaluations): "
            "name a new file"
        )
    for one in asked.recipes:
        if recipes.get(one.label, one.config.to_dict()) != one.config.to_dict():
            raise BabyError(f"{asked.out} has another recipe that is called {one.label!r}: name a new file")
    return kept


def finished(asked: argparse.Namespace, kept: dict | None) -> dict:
    """The result with everything that is asked for; what was kept is not measured again."""
    libraries = [US, *peers.present(asked.peers, "numpy", "bench.quality")]
    before, recipes = kept or {}, {one.label: one.config.to_dict() for one in asked.recipes}
    facts = {
        "target": asked.target, "data": asked.data, "evaluations": asked.evaluations,
        "recipes": {**before.get("recipes", {}), **recipes}, "runs": before.get("runs", []), "failed": {},
    }  # fmt: skip
    done = {(run["recipe"], run["library"], run["seed"]) for run in facts["runs"]}
    todo = [  # the seeds in turn, so that a disturbance of some minutes affects all
        (one, library, seed)
        for seed in range(asked.seeds)
        for one in asked.recipes
        for library in libraries
        if (one.label, library, seed) not in done
    ]
    if kept and not todo:
        result = {**kept, **facts}
        write(asked.out, result)
        return result
    for result in measure(todo, facts):
        write(asked.out, result)
    return result


def measure(todo: list[tuple[Recipe, str, int]], facts: dict) -> Iterator[dict]:
    """The result after each run, and once more at the end."""
    with results.measurement(**facts) as result:
        failed, evaluations = result["failed"], facts["evaluations"]
        pairs = {(one.label, library): one for one, library, _ in todo if library != US}
        for (label, library), one in pairs.items():
            if why := difference(one.config, library):
                failed[f"{label}, {library}"] = why
                say(f"bench.quality: {label}: {library} is left out: {why}")
        for one, library, seed in todo:
            key = f"{one.label}, {library}"
            if key in failed:
                continue
            config = one.config.override({"seed": seed}).to_dict()
            request = {"library": library, "config": config, "evaluations": evaluations}
            try:
                found = harness.ask("bench.quality:trained", **request)
            except harness.Failed as error:
                failed[key] = str(error)
                say(f"bench.quality: {label_of(one.label, library, seed)}: {error}: it is left out")
            else:
                run = {"recipe": one.label, "library": library, "seed": seed, "date": config_file.now(), **found}
                result["runs"].append(run)
                _, seconds, loss, _ = run["curve"][-1]
                say(f"{label_of(one.label, library, seed)}: {loss:.4f} after {seconds:.1f} s")
            yield result
    yield result


def label_of(label: str, library: str, seed: int) -> str:
    """For a progress line."""
    return f"{label} {library} seed {seed}"


def write(out: Path | None, result: dict) -> None:
    """Keep a result, and the table beside it."""
    if out is not None:
        files.write(out, json.dumps(result, indent=1) + "\n")
        files.write(out.with_suffix(".md"), "\n".join(document(result)) + "\n")


def difference(config: RunConfig, library: str) -> str | None:
    """Why a library cannot be compared with baby_xp on a recipe: its losses differ, or it fails; None if it can.

    Both train a few steps without dropout and warm-up. No first weights are zeros, nor is smear's scale, and all
    matrices are larger than usual: otherwise most of the model would hardly change the losses.
    """
    if not has_twin(config.model):
        known = "the switches of c_model classic, or of modern with or without smear, and a head_size of n_emb"
        return f"the model in {library} has {known}"
    short = {"num_steps": CHECKED_STEPS, "warmup_steps": 0, "dropout": 0.0, "zero_init": False}
    request = {"config": config.override(short).to_dict(), "evaluations": CHECKED_STEPS, "check": True}
    try:
        ours, theirs = (harness.ask("bench.quality:trained", library=name, **request) for name in (US, library))
    except harness.Failed as error:
        return str(error)
    return disagreement(ours["curve"], theirs["curve"])


def disagreement(ours: list[list], theirs: list[list]) -> str | None:
    """Which losses of two curves differ by more than float32 explains; None if none does."""
    for (step, _, *of_us), (_, _, *of_them) in zip(ours, theirs, strict=True):
        for a, b in zip(of_us, of_them, strict=True):
            # written so that NaN counts as a difference
            if a is not None and not abs(b - a) <= TOLERANCES["float32"] * abs(a):
                return f"its losses differ: {b:.6f} after {step} steps, that of {US} {a:.6f}"
    return None


def has_twin(model: GPTConfig) -> bool:
    """Whether bench.peers has this model in PyTorch. What it starts from does not matter: weights are loaded."""
    switches = {name: getattr(model, name) for name in MODERN if name != "zero_init"}
    known = ({name: kind[name] for name in switches} for kind in (CLASSIC, MODERN, {**MODERN, "smear": True}))
    return model.head_size == model.n_emb and switches in known


def trained(library: str, config: dict, evaluations: int, check: bool = False) -> dict:
    """The child's part: train with a library -> the points of its Curve, facts about it, number of parameters.

    Evaluations are over the whole validation part, in windows of n_ctx and of WINDOW tokens. check: they are over
    CHECKED_BATCHES of it, also before the first step, and the first weights are larger.
    """
    chosen = RunConfig.from_dict(config, "the recipe")
    n_ctx, batch_size = chosen.model.n_ctx, chosen.train.batch_size
    with TemporaryDirectory() as folder:
        dataset = prepare(chosen.data, chosen.model, chosen.train, Path(folder) / "corpora")
        n, ids = dataset.num_steps, dataset.corpus.validation
        model = Model(chosen.model, dataset.tokenizer.vocab_size)

        def windows(length: int) -> Callable[[], Iterable[Batch]]:
            return lambda: islice(consecutive_windows(ids, length, batch_size), CHECKED_BATCHES if check else None)

        kinds = [windows(n_ctx), windows(WINDOW) if n_ctx > WINDOW else None]
        curve = Curve(dataset.batches, -(-n // evaluations), kinds, check)
        train = replace(chosen.train, num_steps=n, num_epochs=None)
        weights = params.draw(model.spec, train.seed, train.dtype)
        if check:
            weights[params.decay_mask(model.spec) > 0] *= peers.SPREAD
            if chosen.model.smear:
                weights[model.layout.slices["smear.scale"]] = 0.5
        about = resolve_name(FITTERS[library])(model, train, dataset, curve, weights)
        # in windows of WINDOW tokens, a model with that context has the loss that it has anyway
        points = [(*point[:3], point[2] if n_ctx == WINDOW else point[3]) for point in curve.points]
    return {"curve": points, "about": about, "parameters": model.n_parameters}


# the table ----------------------------------------------------------------------------------------------


def document(result: dict) -> list[str]:
    """The results as Markdown."""
    found = grouped(result["runs"])
    about = results.about_each({"runs": {library: runs}} for (_, library), runs in found.items())
    rows = [row(result, *key, found) for key in found]
    recipes = [f"- {label}: {described(config)}" for label, config in result["recipes"].items()]
    failed = [f"- {key} is left out: {why}" for key, why in result["failed"].items()]
    return results.page(result, about, rows, *recipes, *failed, *goals(result, found))


def grouped(runs: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The runs of each recipe in each library."""
    found: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        found.setdefault((run["recipe"], run["library"]), []).append(run)
    return found


def described(config: dict) -> str:
    """A recipe in one line: what differs from its preset."""
    chosen, base = RunConfig.from_dict(config, "the recipe").to_dict(), presets.preset(config["preset"]).to_dict()
    changes = [
        f"{name}={value}"
        for part in ("model", "train", "data")
        for name, value in chosen[part].items()
        if value != base[part].get(name)
    ]
    return " ".join(["preset", config["preset"], *changes])


def reached(run: dict, target: float) -> list | None:
    """The first point of a run whose loss is at most the target; None if there is none."""
    return next((point for point in run["curve"] if point[2] <= target), None)


def seconds_to(runs: list[dict], target: float) -> list[float]:
    """Seconds of training of each run until the target; infinite where it was not reached."""
    points = [reached(run, target) for run in runs]
    return [math.inf if point is None else point[1] for point in points]


def share(ours: list[dict], theirs: list[dict], target: float) -> tuple[float, bool] | None:
    """Our median time to the target as a share of theirs, and whether that is only an upper bound.

    It is one where most of their runs do not reach the target: their time is then that of the whole training. None
    where most of ours do not.
    """
    own, other = (statistics.median(seconds_to(runs, target)) for runs in (ours, theirs))
    if math.isinf(own):
        return None
    bound = math.isinf(other)
    return own / (whole(theirs) if bound else other), bound


def whole(runs: list[dict]) -> float:
    """The median time of the whole training, in seconds."""
    return statistics.median(run["curve"][-1][1] for run in runs)


def row(result: dict, label: str, library: str, found: dict[tuple[str, str], list[dict]]) -> dict[str, str]:
    """A line of the table: the runs of a recipe in a library."""
    runs, target = found[label, library], result["target"]
    times = seconds_to(runs, target)
    points = [point for run in runs if (point := reached(run, target))]
    beside = share(found[label, US], runs, target) if library != US and (label, US) in found else None
    model, steps = result["recipes"][label]["model"], runs[0]["curve"][-1][0]
    ends = [run["curve"][-1] for run in runs]
    return {
        "recipe": label, "library": library, "parameters": f"{runs[0]['parameters']:,}",
        "n_ctx": str(model["n_ctx"]), "steps": f"{steps:,}",
        f"s to {target:g}": seconds(statistics.median(times)),
        "min": seconds(min(times)), "max": seconds(max(times)),
        "seeds that reach it": f"{len(points)} of {len(runs)}",
        "loss there": loss(points, 2), f"in windows of {WINDOW} there": loss(points, 3),
        "s in all": seconds(whole(runs)),
        "loss at the end": loss(ends, 2), f"in windows of {WINDOW}": loss(ends, 3),
        "baby_xp / this": shown(beside) if beside else "",
    }  # fmt: skip


def seconds(value: float) -> str:
    """For a cell."""
    return "not reached" if math.isinf(value) else f"{value:.2f}"


def loss(points: list[list], column: int) -> str:
    """The median loss of some points, for a cell; "" where they have none."""
    values = [point[column] for point in points if point[column] is not None]
    return f"{statistics.median(values):.4f}" if values else ""


def shown(found: tuple[float, bool]) -> str:
    """A share, for a cell or a line."""
    return f"{'below ' if found[1] else ''}{found[0]:.3f}"


def goals(result: dict, found: dict[tuple[str, str], list[dict]]) -> list[str]:
    """A line for each goal of each recipe of ours but the reference."""
    target, lines = result["target"], []
    there = (result["machine"]["cores"], result["machine"]["vectors"]) == CLASS
    for (label, library), runs in found.items():
        if library != US or label == REFERENCE:
            continue
        time = statistics.median(seconds_to(runs, target))
        what = f"{label}, s to {target:g} on {CLASS[0]} cores with {CLASS[1]}"
        lines.append(results.goal(what, time, SECONDS, "{:.2f}") if there else f"- goal, {what}: not this machine")
        others = {REFERENCE: (REFERENCE, OF_REFERENCE), "the same recipe": (label, OF_RECIPE)}
        for with_what, (peer, most) in others.items():
            theirs = found.get((peer, "torch"))
            part = share(runs, theirs, target) if theirs else None
            lines.append(goal(f"{label}, share of PyTorch's time with {with_what}", part, most))
    return lines


def goal(what: str, found: tuple[float, bool] | None, most: float) -> str:
    """A line about a share, which may be an upper bound: one above the limit decides nothing."""
    if found is None:
        return f"- goal, {what}: at most {most:g}: not measured, or the target was not reached"
    decided = "undecided" if found[1] and found[0] > most else results.verdict(found[0] <= most)
    return f"- goal, {what}: at most {most:g}: {shown(found)}, {decided}"


if __name__ == "__main__":
    raise SystemExit(main())
