"""What each parameter does to size, speed and quality: the tables of docs/parameters.md.

    python -m bench.parameters --train [--file FILE] [--jobs N] [--groups lr,n_ctx]
    python -m bench.parameters --speed [--file FILE] [--steps N] [--rounds R]
    python -m bench.parameters --table [--file FILE] [--page docs/parameters.md]

One base model is trained, and variants in which one parameter differs. FILE keeps what was measured; what it has
already is not trained again. Without --file it is the newest of bench/results. See bench/README.md.
"""

import argparse
import datetime
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from baby_xp_data import catalog
from threadpoolctl import threadpool_limits

import baby_xp
from baby_xp import api, memory, presets, task
from baby_xp import backend as backends
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.training.checkpoint import first
from baby_xp.training.loop import fit
from baby_xp.training.stop import Stop
from baby_xp.training.workers import Workers
from bench import arguments, contenders, processes, report, variants
from bench.tables import markdown
from bench.variants import Variant

RESULTS = processes.ROOT / "bench/results"
WARMUP = 5
"""Steps before those that are timed."""
MIB = 2**20
MARK = "<!-- table: {} -->"


def main() -> int:
    """Do what the command line asks for."""
    asked = parse()
    try:
        if asked.train:
            train_all(asked.file, asked.jobs, asked.groups)
        if asked.speed:
            time_all(asked.file, asked.steps, asked.rounds)
        if asked.table:
            show(read(asked.file), asked.page)
    except BabyError as error:
        print(f"bench.parameters: {error}", file=sys.stderr)
        return 2
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.parameters", description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", help="train the variants that the file does not have")
    parser.add_argument("--speed", action="store_true", help="time a step of each; wants a quiet machine")
    parser.add_argument("--table", action="store_true", help="print the tables")
    parser.add_argument("--file", type=Path, default=newest(), help="where results are kept (%(default)s)")
    parser.add_argument("--jobs", type=arguments.positive, default=1, help="trainings side by side (%(default)s)")
    known = arguments.names_of(variants.groups(), "group")
    parser.add_argument("--groups", type=known, default=variants.groups(), help="train these alone")
    parser.add_argument("--steps", type=arguments.positive, default=20, help="timed steps a round (%(default)s)")
    parser.add_argument("--rounds", type=arguments.positive, default=3, help="rounds (%(default)s)")
    parser.add_argument("--page", type=Path, help="put the tables into this page too")
    asked = parser.parse_args()
    if not (asked.train or asked.speed or asked.table):
        parser.error("say what to do: --train, --speed, --table")
    if asked.file is None:
        parser.error("no results are kept yet: name a file with --file")
    return asked


def newest() -> Path | None:
    """The latest results that are kept."""
    return max(RESULTS.glob("*-parameters.json"), default=None)


def read(file: Path) -> dict:
    """What a file keeps. Raises BabyError if there is no such file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BabyError(f"there is no {file}: measure first, with --train") from None


def write(file: Path, result: dict) -> None:
    """Keep a result, and its tables beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, file)
    file.with_suffix(".md").write_text("\n".join(document(result)), encoding="utf-8")


# quality ------------------------------------------------------------------------------------------------


def train_all(file: Path, jobs: int, groups: list[str]) -> None:
    """Train what the file lacks, and keep each result as it comes."""
    result = read(file) if file.exists() else beginning()
    if result["base"] != base():
        raise BabyError(f"{file} is of another base or another short text: name a new file with --file")
    wanted = {one.key for one in variants.ALL if one.group in groups}
    todo = [one for one in variants.to_train() if one.key in wanted - result["trained"].keys()]
    with ProcessPoolExecutor(jobs) as pool:
        running = {pool.submit(trained, one): one for one in todo}
        try:
            for done in as_completed(running):
                found = result["trained"][running[done].key] = done.result()
                write(file, result)
                print(f"{running[done].key}: {found['failed'] or found['val_loss']}", file=sys.stderr, flush=True)
        except BaseException:  # Ctrl-C above all: do not begin with those that wait
            pool.shutdown(cancel_futures=True)
            raise


def beginning() -> dict:
    """The head of a result: when and where."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processes.processor(), "cores": processes.cores(), "baby_xp": baby_xp.__version__,
            **contenders.versions(),
        },
        "base": base(),
        "trained": {},
        "timed": {},
    }  # fmt: skip


def base() -> dict:
    """What the variants are variants of."""
    return {
        "preset": variants.PRESET, **variants.BASE, "short text": variants.SHORT,
        "steps on the short text": variants.SHORT_STEPS,
    }  # fmt: skip


def trained(variant: Variant) -> dict:
    """Train a variant: parameters, losses (nats a token) on the way, and what the best weights reach.

    val_loss is that of the best weights over the whole validation part. failed: why there is none. One process
    and one thread, so that the numbers do not depend on the number of cores.
    """
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        settings = settings_of(variant, Path(folder))
        try:
            run = baby_xp.train(variants.PRESET, path=folder, backend="numpy", workers=1, **settings)
        except BabyError as error:
            return {"overrides": variant.overrides, "failed": str(error)}
        records = [json.loads(line) for line in run.files.metrics.read_text("utf-8").splitlines()]
    result = run.config["result"]
    if result["state"] != "done":
        raise KeyboardInterrupt  # the run took it as a wish to stop, and this is none to keep
    return {
        "overrides": variant.overrides,
        "parameters": run.model.n_parameters,
        "steps": result["steps"],
        "tokens": result["steps"] * step_size(run.config["train"]) * run.model.config.n_ctx,
        "curve": [[one[name] for name in ("step", "train_loss", "val_loss", "grad_norm")] for one in records],
        "best_step": result["best_step"],
        "val_loss": result["val_loss"],
        "failed": None,
    }


def step_size(train: dict) -> int:
    """Sequences of a step, of a train config as a run keeps it."""
    return train["batch_size"] * train["accumulate"]


def settings_of(variant: Variant, folder: Path) -> dict:
    """The fields that make the variant of the preset; the short text is written into `folder`."""
    steps = {"num_steps": variants.SHORT_STEPS} if variant.short else {}
    settings = {**variants.BASE, **steps, **variant.overrides}
    if settings.get("schedule") == "constant":
        del settings["min_lr"]  # the base's: it would have no effect
    if variant.short:
        text = catalog.find("shakespeare").read_text(encoding="utf-8")[: variants.SHORT]
        settings["data"] = str(folder / "short.txt")
        (folder / "short.txt").write_text(text, encoding="utf-8")
    return settings


# speed --------------------------------------------------------------------------------------------------


def time_all(file: Path, steps: int, rounds: int) -> None:
    """Time a step of each variant that may take another time, in turn, and keep it."""
    result = read(file)
    entries = [report.Entry(one.key, {"key": one.key, "steps": steps}) for one in variants.to_time()]
    idle = processes.ask("footprint", what="baseline")["memory"]
    before = report.product_rate()
    report.take_turns("parameters", entries, rounds)
    result["timed"] = {one.label: speed_of(one, idle[0] if idle else None) for one in entries}
    result["product_rate_before"], result["product_rate_after"] = before, report.product_rate()
    result["timed_on"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write(file, result)


def speed_of(entry: report.Entry, idle: dict | None) -> dict:
    """Milliseconds a step, the median of the rounds' medians, and the peak of memory over an idle process's."""
    if entry.failed:
        raise BabyError(f"{entry.label}: {entry.failed}")
    known = idle is not None and all(run["memory"] for run in entry.runs)
    by_round = [statistics.median(run["ms"]) for run in entry.runs]
    return {
        "ms": statistics.median(by_round),
        "by_round": by_round,
        "memory": min(memory.growth(run["memory"], idle) for run in entry.runs) if known else None,
        "workers": entry.runs[0]["workers"],
    }


def timed(key: str, steps: int) -> dict:
    """The child's part: train a variant for some steps as `train` does -> ms of each, memory, workers."""
    variant = next(one for one in variants.ALL if one.key == key)
    with tempfile.TemporaryDirectory() as folder:
        chosen = api.override(presets.preset(variants.PRESET), settings_of(variant, Path(folder)))
        learned = task.prepare(chosen.data, chosen.model, chosen.train, Path(folder) / "corpora")
        clock = contenders.Clock([learned.batches.batch(step) for step in range(WARMUP + steps + 1)])
        model = Model(chosen.model, learned.tokenizer.vocab_size)
        loaded = backends.load("numpy", None, chosen.train.dtype)
        number = api.number_of_workers(None, loaded, model, chosen.train.batch_size)
        config = replace(chosen.train, num_steps=len(clock), eval_every=len(clock) + 1, checkpoint_minutes=0.0)
        measured = {"n_validation": 1, "validation": lambda: iter(clock.batches[:1])}  # little, at the end
        short = replace(learned, batches=clock, num_steps=len(clock), **measured)
        pool = Workers(loaded, model, chosen.train.batch_size, number) if number > 1 else nullcontext()
        # a step that is too small to be split is too small for threads as well: where other programs take a core,
        # threads that wait for each other made a step of 4 ms one of 400
        with threadpool_limits(1), pool as running:
            fit(
                loaded,
                model,
                config,
                short,
                first(model, config),
                api.Silent(),
                lambda kept: None,
                Stop(),
                running,
            )
            taken = memory.taken([child.pid for child in running.children] if running else [])
    marks = clock.marks[WARMUP:]
    return {
        "ms": [1e3 * (end - begin) for begin, end in itertools.pairwise(marks)],
        "memory": taken,
        "workers": number,
    }


# what is told -------------------------------------------------------------------------------------------


def document(result: dict) -> list[str]:
    """All tables as Markdown, with what a reader must know of them."""
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    lines = [f"{result['date']}; {machine}", "", f"Base: {base_command()}", ""]
    if result["timed"]:
        rates = {name: result[f"product_rate_{name}"] for name in ("before", "after")}
        told = "; ".join(f"{name} {rate['alone']:.0f} Gflop/s" for name, rate in rates.items())
        busy = "; THE MACHINE WAS BUSY: the times say little" if report.busy(result) else ""
        lines += [f"Timed {result['timed_on']}; matrix product rate {told}{busy}", ""]
    for group, rows in tables(result).items():
        lines += [group, "", *rows, ""]
    return lines


def base_command() -> str:
    """How a reader trains the base."""
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in variants.BASE.items())
    return f"python -m baby_xp train {variants.PRESET} {flags}"


def tables(result: dict) -> dict[str, list[str]]:
    """A Markdown table for each group of variants that were trained, all or some of them."""
    found = {}
    for group in variants.groups():
        some = [one for one in variants.ALL if one.group == group and one.key in result["trained"]]
        if some:
            found[group] = markdown([row(one, result) for one in some])
    return found


def row(variant: Variant, result: dict) -> dict[str, str]:
    """A line of a table."""
    found, group = result["trained"][variant.key], variant.group
    name = variant.value if variant.overrides else f"{variant.value} (base)"
    cells = {"what differs" if " " in group else group: name}
    if group in variants.ON_SPEED:
        speed = result["timed"].get(variant.key)
        cells["parameters"] = "" if found["failed"] else f"{found['parameters']:,}"
        cells["ms a step"] = f"{speed['ms']:.1f}" if speed else ""
        cells["memory, MiB"] = f"{speed['memory'] / MIB:.0f}" if speed and speed["memory"] is not None else ""
    if group in variants.ON_TOKENS:
        cells["tokens"] = "" if found["failed"] else f"{found['tokens']:,}"
    return cells | (of_short(found) if variant.short else of_losses(found, result))


def of_losses(found: dict, result: dict) -> dict[str, str]:
    """The losses of a variant, and how far its validation loss is from the base's."""
    names = ("training loss", "validation loss", "against the base")
    if found["failed"]:
        return dict(zip(names, ("", found["failed"].partition(";")[0], ""), strict=True))
    difference = found["val_loss"] - result["trained"].get("base", found)["val_loss"]
    told = (f"{last(found)[1]:.3f}", f"{found['val_loss']:.3f}", f"{difference:+.3f}" if difference else "")
    return dict(zip(names, told, strict=True))


def of_short(found: dict) -> dict[str, str]:
    """The losses of a variant that may overfit: at the end, and where the validation loss was best."""
    _, train, validation, _ = last(found)
    return {
        "training loss": f"{train:.3f}",
        "validation loss at the end": f"{validation:.3f}",
        "at its best": f"{found['val_loss']:.3f}",
        "best step": str(found["best_step"]),
    }


def last(found: dict) -> list:
    """The last measurement on the way: step, training loss, validation loss, norm of the gradients."""
    return [point for point in found["curve"] if point[1] is not None][-1]


def show(result: dict, page: Path | None) -> None:
    """Print the tables, and put them into a page where one is named."""
    print("\n".join(document(result)))
    if page:
        page.write_text(filled(page.read_text(encoding="utf-8"), tables(result)), encoding="utf-8")
        print(f"the tables are in {page}", file=sys.stderr)


def filled(text: str, found: dict[str, list[str]]) -> str:
    """A page with each table below its mark, in the place of what stood there. BabyError for an unknown mark."""
    for name in re.findall(MARK.format("(.*?)"), text):
        if name not in found:
            raise BabyError(f"the page has a place for a table of {name!r}, and there is none")
        rows = "\n".join(found[name])
        text = re.sub(rf"({re.escape(MARK.format(name))}\n)(?:\|.*\n)*", lambda at: f"{at[1]}{rows}\n", text)  # noqa: B023
    return text


if __name__ == "__main__":
    raise SystemExit(main())
