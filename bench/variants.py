"""Variants of a base: trained on one thread, timed in turn, kept in a file that is continued, shown in tables.

Shared by bench.parameters and bench.recipes.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

import baby_xp
from baby_xp import distributed, files, processes
from baby_xp.config import RunConfig
from baby_xp.distributed.group import Others
from baby_xp.errors import BabyError
from baby_xp.run import Run
from baby_xp.runs import config_file
from bench import harness, results
from bench.harness import say

RESULTS = harness.ROOT / "bench/results"
WARMUP = 5  # steps before those that are timed
EARLIER: dict[str, dict[str, Any]] = {
    "shakespeare": {
        "smear": False, "num_steps": 300, "lr": 6e-3, "warmup_steps": 10, "muon_lr": 0.03, "muon_momentum": 0.9,
        "beta1": 0.9,
    },
}  # fmt: skip
"""Presets that have changed since they were measured -> the settings that they had then."""
MARK = "<!-- table: {} -->"


# command lines ------------------------------------------------------------------------------------------


def parser(program: str, about: str, ending: str, steps: int, rounds: int) -> argparse.ArgumentParser:
    """A command line. about: the docstring of the module; ending: that of the names of its kept results."""
    made = harness.parser(program, about, steps=steps, rounds=rounds)
    made.add_argument("--train", action="store_true", help="train variants without results in the file")
    made.add_argument("--speed", action="store_true", help="time a step of each variant; needs a quiet machine")
    made.add_argument("--table", action="store_true", help="print the tables")
    made.add_argument("--file", type=Path, default=newest(ending), help="file of the results (%(default)s)")
    made.add_argument("--jobs", type=harness.positive, default=1, help="trainings at once (%(default)s)")
    help_of_ranks = "mpi: one training at a time in each process that mpiexec or srun started, in place of --jobs"
    made.add_argument("--distributed", choices=("none", "mpi"), default="none", help=help_of_ranks)
    made.add_argument("--page", type=Path, help="also insert the tables into this page")
    return made


def check(made: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    """End the program, with one line, where there is nothing to do or no file."""
    if not (asked.train or asked.speed or asked.table):
        made.error("nothing to do: give --train, --speed or --table")
    if asked.speed and asked.distributed != "none":
        made.error("--speed needs a quiet machine: leave out --distributed")
    if asked.file is None:
        made.error("there are no results yet: name a file with --file")


def in_ranks(program: str, kind: distributed.Kind, measure: Callable[[Others], None]) -> int:
    """Call a function on rank 0, with the other ranks to help -> exit code. What goes wrong is one line."""
    try:
        with distributed.join(kind).others() as others:
            if others is not None:
                measure(others)
    except (BabyError, harness.Failed) as error:
        say(f"{program}: {error}")
        distributed.current().after_last_words()
        return 2
    return 0


def flags(settings: dict[str, Any]) -> str:
    """Settings as a command line has them."""
    names = {name: name.replace("_", "-") for name in settings}
    return "".join(
        f" --{'' if value else 'no-'}{names[name]}" if isinstance(value, bool) else f" --{names[name]} {value}"
        for name, value in settings.items()
    )


# the file -----------------------------------------------------------------------------------------------


def newest(ending: str) -> Path | None:
    """The latest results that are kept, of the benchmark with this ending of its files."""
    return max(RESULTS.glob(f"*-{ending}.json"), default=None)


def read(file: Path) -> dict:
    """What a file keeps. Raises BabyError if there is no such file, or it is none of these."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BabyError(f"there is no {file}: measure first, with --train") from None
    except ValueError:
        result = None
    if not isinstance(result, dict) or not {"base", "trained", "timed"} <= result.keys():
        raise BabyError(f"{file} is not a result of this benchmark: name a new file with --file")
    return result


def started(file: Path, base: dict) -> dict:
    """What a file keeps, or a new result. Raises BabyError if it is of another base."""
    if not file.exists():
        machine = {**harness.ask("bench.harness:machine"), "baby_xp": baby_xp.__version__}
        return {"date": config_file.now(), "machine": machine, "base": base, "trained": {}, "timed": {}}
    result = read(file)
    if completed(result["base"]) != base:
        raise BabyError(f"{file} is of another base or another text: name a new file with --file")
    return result


def completed(kept: Any) -> Any:
    """What a file keeps, where configs have the fields that came later too, with their defaults."""
    if not isinstance(kept, dict):
        return kept
    if kept.keys() == {"preset", "model", "train", "data"}:
        return RunConfig.from_dict(kept, "the file").to_dict()
    return {name: completed(value) for name, value in kept.items()}


def write(file: Path, result: dict, document: list[str]) -> None:
    """Keep a result, and its tables beside it."""
    files.write(file, json.dumps(result, indent=1) + "\n")
    files.write(file.with_suffix(".md"), "\n".join(document))


# training and timing ------------------------------------------------------------------------------------


def train_all(
    task: str, requests: dict[str, dict], result: dict, jobs: int, keep: Callable[[], None], others: Others = ()
) -> None:
    """Train the variants that the result lacks, `jobs` at once, each in a process of its own.

    task: what a child calls with one of the requests. keep: is called as soon as the result has one more. others:
    ranks that train too, one variant at a time as this one does then. Raises BabyError for more jobs than that.
    """
    if others and jobs > 1:
        raise BabyError("each of several ranks trains one variant at a time: leave out --jobs")
    todo = {key: request for key, request in requests.items() if key not in result["trained"]}
    keys = list(todo)
    with ThreadPoolExecutor(jobs) as pool:  # each thread waits for a child process
        slots = [partial(start, _ask, task) for start in (*[pool.submit] * jobs, *others)]
        for number, found in processes.results(todo.values(), slots):
            key = keys[number]
            result["trained"][key] = found
            keep()
            say(f"{key}: {found['failed'] or found['val_loss']}")


def _ask(task: str, request: dict) -> dict:
    """What a child process returns."""
    return harness.ask(task, **request)


def trained(preset: str | RunConfig, settings: dict[str, Any], folder: str) -> tuple[dict, Run | None]:
    """Train a preset with these settings into a folder -> parameters, losses in nats per token, and the run.

    val_loss: of the best weights. failed: why there is no loss, and no run. In one process and one thread, so that
    losses do not depend on the number of cores.
    """
    with threadpool_limits(1):
        try:
            run = baby_xp.train(preset, path=folder, backend="numpy", workers=1, **settings)
        except BabyError as error:
            return {"failed": str(error)}, None
        records = [json.loads(line) for line in run.files.metrics.read_text("utf-8").splitlines()]
    result, config = run.config["result"], run.config["train"]
    if result["state"] != "done":
        raise KeyboardInterrupt  # the run treats it as a request to stop, and a stopped run is not kept
    found = {
        "parameters": run.model.n_parameters, "failed": None,
        "tokens": result["steps"] * config["batch_size"] * config["accumulate"] * run.model.config.n_ctx,
        "curve": [[one[name] for name in ("step", "train_loss", "val_loss", "grad_norm")] for one in records],
        **{name: result[name] for name in ("steps", "best_step", "val_loss")},
    }  # fmt: skip
    return found, run


def time_all(task: str, requests: dict[str, dict], result: dict, rounds: int) -> None:
    """Time a step of each variant in turn, and add the times to the result."""
    idle, before = harness.ask("bench.peers.ours:idle"), results.product_rate()
    *_, (runs, _) = harness.take_turns(task, requests, rounds, "variant", all_needed=True)
    result["timed"] |= {key: speed_of(found, idle) for key, found in runs.items()}
    result["product_rate_before"], result["product_rate_after"] = before, results.product_rate()
    result["timed_on"] = config_file.now()
    # the losses may be from a machine of another class
    result["timed_class"] = harness.class_of(harness.ask("bench.harness:machine"))


def speed_of(runs: list[dict], idle: list[dict]) -> dict:
    """Milliseconds per step, the median of the rounds' medians, and the peak of memory over an idle process's."""
    by_round = [statistics.median(run["ms"]) for run in runs]
    more = {"memory": results.least_growth(runs, idle), "workers": runs[0]["workers"]}
    return {"ms": statistics.median(by_round), "by_round": by_round, **more}


# the tables ---------------------------------------------------------------------------------------------


def about_times(result: dict) -> list[str]:
    """Where and when steps were timed, and how fast the machine was; no lines if they were not."""
    if not result["timed"]:
        return []
    where = result.get("timed_class", "see the product rate for the class of machine")
    return [f"Timed {result['timed_on']}; {where}", "", *results.rate_lines(result), ""]


def show(document: list[str], tables: dict[str, list[str]], page: Path | None) -> None:
    """Print a document, and insert the tables into a page if there is one."""
    print("\n".join(document))
    if page:
        try:
            page.write_text(filled(page.read_text("utf-8"), tables), encoding="utf-8")
        except OSError as error:
            raise BabyError(f"{page} cannot be changed ({error.strerror}): give the path of a page") from None
        say(f"the tables are in {page}")


def filled(text: str, found: dict[str, list[str]]) -> str:
    """A page with each table below its mark, in the place of what stood there. BabyError for an unknown mark."""
    for name in re.findall(MARK.format("(.*?)"), text):
        if name not in found:
            raise BabyError(f"the page has a place for a table of {name!r}, and there is none")
        rows = "\n".join(found[name])
        text = re.sub(rf"({re.escape(MARK.format(name))}\n)(?:\|.*\n)*", lambda at: f"{at[1]}{rows}\n", text)  # noqa: B023
    return text
