"""The command line: parse, call, print. What a command does is in api.py and the modules it calls.

Input that cannot be used ends in one line on stderr and exit code 2.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from baby_xp import __version__, options
from baby_xp.errors import BabyError, NothingTrained
from baby_xp.files import refusal, write
from baby_xp.screen import Screen, counting
from baby_xp.streams import Output, OutputLost, guarded, one_line, printable
from baby_xp.training.stop import interruptible, interruption

if TYPE_CHECKING:
    from baby_xp.config import Preset

USAGE = f"""baby_xp {__version__}: train baby language models from scratch

usage: python -m baby_xp COMMAND [options]

  train [PRESET]        train a model; without a preset, the baby
  finetune RUN --data   continue training a run on another text
  resume [RUN]          continue a run that was stopped or killed, from its last checkpoint
  generate [RUN]        generate text from a prompt (also called inference)
  evaluate [RUN]        measure a run: loss, perplexity, words, copies
  inspect [RUN]         show every array of a forward pass, the predictions and the attention
  check [RUN]           compare the gradients of a run with finite differences, layer by layer
  equations [gpt]       hold out each sum in turn, train a model without it, ask for it
  estimate [PRESET]     size, time and memory of a run, before it starts
  runs                  list all runs, newest first
  presets               list what can be trained
  backends              list which array libraries work here, and what the others lack
  import littlebaby     import a model of the original Little Baby as a run
  export littlebaby     export a run as the original Little Baby's files

RUN is a GUID, the beginning of one, or last. COMMAND --help lists its options.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command -> exit code."""
    with guarded() as output:
        code, line = _ending(list(sys.argv[1:] if arguments is None else arguments), output)
        if line:
            print(f"baby_xp: {one_line(line)}", file=sys.stderr)
        return code


def _ending(arguments: list[str], output: Output) -> tuple[int, str]:
    """Run one command -> exit code, and in one line what went wrong."""
    try:
        with interruptible():
            try:
                code = _dispatch(arguments)
            except SystemExit as end:  # after --help
                code = int(end.code or 0)
            finally:  # nothing may be left to write when the interpreter ends
                with contextlib.suppress(OutputLost):
                    output.flush()
    except OutputLost as lost:
        return _lost(lost)
    except NothingTrained as error:
        return _interrupted(interruption())[0], str(error)
    except BabyError as error:
        return 2, str(error)
    except MemoryError as error:
        reason = str(error) or "an array did not fit"
        return 2, f"not enough memory ({reason}); choose a smaller model or batch"
    except KeyboardInterrupt as interrupt:
        return _interrupted(interrupt)
    except OSError as error:  # the last resort: who opens a file says more of it
        doing = "read" if isinstance(error, FileNotFoundError) else "used"
        return 2, str(refusal(error.filename or "a file or a process", error, doing))
    return _lost(output.lost) if output.lost else (code, "")


def _lost(lost: OutputLost) -> tuple[int, str]:
    """Exit code and line where standard output was lost; of a pipe that nobody reads, there is nothing to say."""
    return lost.code, str(lost) if lost.code == 2 else ""


def _interrupted(interrupt: KeyboardInterrupt) -> tuple[int, str]:
    """Exit code and line after a signal, Ctrl-C or another one."""
    return 128 + getattr(interrupt, "number", signal.SIGINT), f"interrupted {interrupt}".rstrip()


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"baby_xp {__version__}")
        return 0
    if command not in COMMANDS:
        raise BabyError(f"unknown command {command!r}: choose one of {', '.join(COMMANDS)}")
    return COMMANDS[command](rest) or 0


# train --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a run computes and where its files lie."""

    backend: str = "auto"
    """auto, numpy, cupy, torch, jax or array-api-strict; `baby_xp backends` lists which work."""
    device: str | None = None
    """Device of the backend, such as cuda:1; none: its default."""
    path: str = "runs"
    """Folder of the runs."""


@dataclass(frozen=True)
class GpuPlace(Place):
    """Where a run computes, how a GPU does it, and where its files lie."""

    tf32: bool = False
    """TF32 matrix products: faster, less precise (cupy backend)."""
    memory_gib: float | None = None
    """Limit of GPU memory, in GiB (cupy backend); none: no limit."""


@dataclass(frozen=True)
class TrainPlace(GpuPlace):
    """Where a run computes and where its files lie."""

    workers: int | None = None
    """Processes that share each step (numpy backend); none: chosen automatically."""


def train(arguments: list[str]) -> None:
    """Train a preset, with flags for every field of its configs."""
    chosen, asked, place = _parse_preset("train", arguments, TrainPlace())
    from baby_xp import api

    run = api.train(chosen, listener=Screen(place.backend), **dataclasses.asdict(place), **asked)
    _show_end(run, place.path)


@dataclass(frozen=True)
class EstimatePlace(TrainPlace):
    """Where a run would compute. Nothing is written."""

    measure: bool = True
    """Train for some seconds to measure time and memory; --no-measure: only what can be counted."""


def estimate(arguments: list[str]) -> None:
    """Estimate what a run would take, with the flags of train."""
    chosen, asked, place = _parse_preset("estimate", arguments, EstimatePlace())
    from baby_xp import estimating

    where = {name: value for name, value in dataclasses.asdict(place).items() if name != "path"}
    print("\n".join(estimating.lines(estimating.estimate(chosen, **where, **asked))))


@dataclass(frozen=True)
class Changes:
    """What finetuning may change of the model."""

    dropout: float
    """Share of activations that training sets to zero, from 0 to below 1."""


@dataclass(frozen=True)
class Text:
    """What finetuning reads."""

    data: str
    """A path to a UTF-8 text, or a name: nursery or shakespeare."""


def finetune(arguments: list[str]) -> None:
    """Train a run on, on another text: finetune [RUN] --data TEXT, and the flags of train."""
    from baby_xp import api

    name, rest = _positional(arguments, "last")
    base = api.load(name, path=options.peek(rest, "--path")[0] or "runs", backend="numpy")
    chosen = api.finetuning(base)
    default = {"model": Changes(chosen.model.dropout), "train": chosen.train, "data": Text("")}
    about = f"Continue training run {base.guid} on another text."
    asked, place = _parse_settings(default, TrainPlace(), about, "baby_xp finetune RUN", rest)
    if not asked.get("data"):
        raise BabyError("finetuning needs a text: name it with --data")
    run = api.finetune(base.guid, listener=Screen(place.backend), **dataclasses.asdict(place), **asked)
    _show_end(run, place.path)


@dataclass(frozen=True)
class Resumption:
    """Continue a run from its last checkpoint. Settings that are not given stay as they were."""

    backend: str | None = None
    """numpy, cupy, torch, jax or array-api-strict."""
    device: str | None = None
    """Device of the backend, such as cuda:1."""
    path: str = "runs"
    """Folder of the runs."""
    workers: int | None = None
    """Processes that share each step; another number changes results by rounding only."""
    tf32: bool = False
    """TF32 matrix products: faster, less precise (cupy backend)."""
    memory_gib: float | None = None
    """Limit of GPU memory, in GiB (cupy backend); not kept from the last session."""
    data: str | None = None
    """Where the text is now; it must be the same text."""
    num_steps: int | None = None
    """Total number of steps; a larger one continues a run that is done."""
    lr: float | None = None
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine."""
    clip: float | None = None
    """Clip gradients to this global norm; 0: no clipping."""
    eval_every: int | None = None
    """Steps between evaluations of the validation loss."""
    sample_tokens: int | None = None
    """Tokens of the sample printed with each evaluation; 0: none."""
    patience: int | None = None
    """Stop after this many evaluations without a better validation loss; 0: never."""
    max_minutes: float | None = None
    """Minutes after which this training session stops; 0: no limit."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; 0: by time alone."""
    checkpoint_minutes: float | None = None
    """Minutes between checkpoints; 0: by steps alone."""


def resume(arguments: list[str]) -> None:
    """Go on with a run from its last checkpoint."""
    name, rest = _positional(arguments, "last")
    asked, given = _asked(Resumption(), "baby_xp resume [RUN]", rest)
    from baby_xp import api

    given = {name: value for name, value in given.items() if value is not None}
    run = api.resume(name, listener=Screen(asked.backend or ""), **given)
    _show_end(run, asked.path)


def _parse_preset(command: str, arguments: list[str], place: TrainPlace) -> tuple["Preset", dict[str, Any], Any]:
    """A preset, the settings that flags give in place of its own, and the place."""
    from baby_xp.presets import preset

    name, rest = _positional(arguments, "baby")
    chosen = preset(name)
    parts = {"model": chosen.model, "train": chosen.train, "data": chosen.data}
    program, about = f"baby_xp {command} {chosen.name}", f"{command} {chosen.name}: {chosen.about}."
    asked, place = _parse_settings(parts, place, about, program, rest)
    return chosen, asked, place


def _parse_settings(
    parts: dict[str, Any], place: Any, about: str, program: str, arguments: list[str]
) -> tuple[dict[str, Any], Any]:
    """The settings that flags give in place of those of `parts`, which are configs, and the place that they name.

    Those that are not given are not among them: it matters what was asked for, not only what results.
    """
    given = options.parse({**parts, "place": place}, about, program, arguments)
    of_place = {field.name: given.pop(field.name) for field in dataclasses.fields(place) if field.name in given}
    return given, replace(place, **of_place)


def _show_end(run: Any, path: str) -> None:
    """Tell how a sitting ended. Raises KeyboardInterrupt if a signal ended it: the exit code is that of one."""
    result = run.config["result"]
    resuming = f"python -m baby_xp resume {_short(run.guid)}{_path_flag(path)}"
    if result["reason"] == "interrupted":
        print(f"stopped after step {result['steps']}, with a checkpoint; to go on: {resuming}")
        raise interruption()
    print(f"\n{printable(_sample(run))}\n")
    if result["reason"] == "time":
        print(f"the time is up: stopped after step {result['steps']}; to go on: {resuming}")
    if result["reason"] == "patience":
        print(f"ended after step {result['steps']}: the validation loss no longer falls")
    if result["best_step"] not in (None, result["steps"]):
        print(f"kept the weights of step {result['best_step']}, the best")
    print(f"validation loss {result['val_loss']:.4f} nats a token, over the whole validation part")
    print(f"run {run.guid}")
    print(f"report {run.files.report}")
    print(f"more: python -m baby_xp generate {_short(run.guid)}{_path_flag(path)}")


def _short(guid: str) -> str:
    """Enough of a GUID to find its run, as a rule."""
    return guid[:8] + guid[36:]


def _sample(run: Any) -> str:
    return run.files.completion().read_text(encoding="utf-8").rstrip("\n")


# generate -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generation(GpuPlace):
    """Generate text from a prompt."""

    prompt: str = ""
    """Text to continue."""
    num_tokens: int = 500
    """Tokens to generate."""
    temperature: float = 1.0
    """Below 1: more predictable; above 1: more random."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities add up to this; 1: from all."""
    greedy: bool = False
    """Always take the most likely token."""
    seed: int = 0
    """Seed of the sampling."""
    cache: bool = True
    """Keep keys and values of earlier tokens; --no-cache gives the same text, more slowly."""
    weights: Literal["best", "last"] = "best"
    """The weights with the best validation loss, or those of the last checkpoint."""


WAYS_TO_DRAW = ("temperature", "top_k", "top_p")
"""Settings that have no effect where nothing is drawn."""


def generate(arguments: list[str]) -> None:
    """Generate from a run and keep the completion."""
    name, rest = _positional(arguments, "last")
    asked, given = _asked(Generation(), "baby_xp generate [RUN]", rest)
    if asked.greedy and (ways := [name for name in WAYS_TO_DRAW if name in given]):
        flags = " and ".join("--" + name.replace("_", "-") for name in ways)
        raise BabyError(f"--greedy always takes the most likely token: leave out {flags}, or --greedy")
    run = _load(name, asked)
    pieces = run.stream(
        asked.prompt, asked.num_tokens, asked.cache,
        temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, greedy=asked.greedy, seed=asked.seed,
    )  # fmt: skip
    _note_on_equations(run, asked.prompt)
    text = asked.prompt
    print(printable(text), end="", flush=True)
    for piece in pieces:
        print(printable(piece), end="", flush=True)
        text += piece
    print()
    when = datetime.now()
    while os.path.lexists(completion := run.files.completion(when)):  # two in one second: the first one stays
        when += timedelta(seconds=1)
    write(completion, text + "\n", other=None)
    print(f"kept in {completion}", file=sys.stderr)


def _note_on_equations(run: Any, prompt: str) -> None:
    """Say so if a run that learned equations is given something else to go on from."""
    from baby_xp_data import equations as table

    data = run.config["data"]
    if not prompt or "digits" not in data:
        return
    of_table = data["max_sum"], data["digits"], data["operators"]
    if not table.begins_answer(prompt, *of_table):
        example = table.example(*of_table[1:])
        what = f"its equations were asked like {example}=, and {prompt!r} is none of them"
        print(f"note: {what}; what follows means nothing", file=sys.stderr, flush=True)


def _load(name: str, asked: Any) -> Any:
    """A run where it is asked for, to generate or to be measured."""
    from baby_xp import api, backend

    settings = ("path", "backend", "device", "weights", "tf32", "memory_gib")
    run = api.load(name, **{setting: getattr(asked, setting) for setting in settings})
    if note := backend.first_use(run.backend):
        print(note, file=sys.stderr, flush=True)
    return run


# other programs' files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """Import a model of the original Little Baby as a run: its model_<guid>.json, with config and tokenizer."""

    config: str | None = None
    """The config file; none: beside the model, or in ../configs."""
    tokenizer: str | None = None
    """The tokenizer file; none: beside the model, or in ../tokenizers."""
    path: str = "runs"
    """Folder of the runs."""
    dtype: Literal["float64", "float32"] = "float64"
    """Precision; the original computes in float64, float32 is faster."""


@dataclass(frozen=True)
class Exported:
    """Export a run as files of the original Little Baby."""

    to: str = "littlebaby"
    """Folder of the original's notebook; the files go to its folders configs, tokenizers and models."""
    path: str = "runs"
    """Folder of the runs."""
    weights: Literal["best", "last"] = "best"
    """The weights with the best validation loss, or those of the last checkpoint."""


def import_(arguments: list[str]) -> None:
    """import littlebaby MODEL.json: make a run of a model of the original Little Baby."""
    model, rest = _positional(_of_littlebaby("import", arguments), "")
    asked, _ = _asked(Imported(), "baby_xp import littlebaby MODEL.json", rest)
    if not model:
        raise BabyError("name the model to import: import littlebaby models/model_<guid>.json")
    from baby_xp import api

    run = api.import_littlebaby(
        model, config=asked.config, tokenizer=asked.tokenizer, path=asked.path, dtype=asked.dtype
    )
    print(f"{run.model.n_parameters:,} parameters, {run.tokenizer.vocab_size} different tokens")
    print(f"run {run.guid}")
    print(f"more: python -m baby_xp generate {_short(run.guid)}{_path_flag(asked.path)}")


def export(arguments: list[str]) -> None:
    """export littlebaby [RUN] --to FOLDER: write a run as files of the original Little Baby."""
    name, rest = _positional(_of_littlebaby("export", arguments), "last")
    asked, _ = _asked(Exported(), "baby_xp export littlebaby [RUN]", rest)
    from baby_xp import api

    run = api.load(name, path=asked.path, backend="numpy", weights=asked.weights)
    for file in api.export_littlebaby(run, asked.to):
        print(file)


def _of_littlebaby(command: str, arguments: list[str]) -> list[str]:
    """The arguments after the name of the other program; there is one so far."""
    program, rest = _positional(arguments, "")
    if program != "littlebaby" and not {"-h", "--help"} & set(arguments):
        raise BabyError(f"say whose files to {command}: {command} littlebaby ...")
    return rest


# evaluate -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement(GpuPlace):
    """Measure a run over the whole validation part of its text."""

    data: str | None = None
    """Another text to measure on; none: the run's own."""
    num_tokens: int = 2000
    """Tokens to generate for the shares of known words and of copied sequences."""
    seed: int = 0
    """Seed of the generated text."""
    weights: Literal["best", "last"] = "best"
    """The weights with the best validation loss, or those of the last checkpoint."""


def evaluate(arguments: list[str]) -> None:
    """Measure a run."""
    name, rest = _positional(arguments, "last")
    asked, _ = _asked(Measurement(), "baby_xp evaluate [RUN]", rest)
    run = _load(name, asked)
    found = run.evaluate(asked.data, asked.num_tokens, asked.seed)
    print(f"run {run.guid}, the {asked.weights} weights")
    print("\n".join(found.lines()))


# inspect, check -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look(Place):
    """Show every array between a prompt and the next token, the predictions, and what the heads attend to."""

    backend: str = "numpy"
    """numpy, cupy, torch, jax or array-api-strict."""
    prompt: str = ""
    """Text for the model to read."""
    layer: str | None = None
    """Show all arrays of one block (0, 1, ...), or of all; none: what passes from layer to layer."""
    backward: bool = False
    """Also show the gradients of the prompt's loss."""
    attention: str | None = None
    """LAYER.HEAD, such as 0.1: show what this head attends to; all: compare the heads; none: the sharpest head."""
    picture: str | None = None
    """Draw that attention, or that of all heads, to this file (.png, .svg, ...); needs the extra `plots`."""
    neighbours: str | None = None
    """Show the tokens whose embeddings are nearest to that of this token."""
    off: tuple[str, ...] = ()
    """LAYER.HEAD [LAYER.HEAD ...]: ablate these heads and show the effect on the loss."""
    top: int = 5
    """How many predictions and neighbours to list."""
    weights: Literal["best", "last"] = "best"
    """The weights with the best validation loss, or those of the last checkpoint."""


def inspect(arguments: list[str]) -> None:
    """Look into a run."""
    name, rest = _positional(arguments, "last")
    asked, _ = _asked(Look(), "baby_xp inspect [RUN]", rest)
    from baby_xp import api, inspection

    run = api.load(name, path=asked.path, backend=asked.backend, device=asked.device, weights=asked.weights)
    wish = {field.name: getattr(asked, field.name) for field in dataclasses.fields(inspection.Wish)}
    print("\n".join(inspection.report(run, inspection.Wish(**wish), plain=not _can_show("░█▏␣↵"))))


@dataclass(frozen=True)
class GradientCheck:
    """Compare the gradient of every parameter with finite differences, in float64, on the run's own text."""

    path: str = "runs"
    """Folder of the runs."""
    data: str | None = None
    """Another text to take the batch from; none: the run's own."""
    batch: int = 2
    """Sequences in the batch."""
    tokens: int = 16
    """Tokens in each sequence, at most n_ctx."""
    directions: int = 3
    """Random directions for each parameter array."""
    elements: int = 4
    """Single elements for each array: half with the largest gradients, half random."""
    seed: int = 0
    """Seed of the batch, the dropout and the directions."""
    weights: Literal["best", "last"] = "best"
    """The weights with the best validation loss, or those of the last checkpoint."""


def check(arguments: list[str]) -> int:
    """Check the gradients of a run -> 0 if all agree with finite differences, 1 if one does not."""
    name, rest = _positional(arguments, "last")
    asked, _ = _asked(GradientCheck(), "baby_xp check [RUN]", rest)
    from baby_xp import api, checking

    run = api.load(name, path=asked.path, backend="numpy", weights=asked.weights)
    rows = run.check(asked.tokens, asked.batch, asked.seed, asked.elements, asked.directions, asked.data)
    print(f"run {run.guid}, the {asked.weights} weights")
    print("\n".join([*checking.about(run), "", *checking.lines(rows)]))
    return 0 if all(row.agrees for row in rows) else 1


# equations ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """How many models, and what to show. Nothing is kept except the picture."""

    seeds: int = 5
    """Models for each held-out case or share, with consecutive seeds from --seed on."""
    workers: int | None = None
    """Models that train at the same time, one process each; none: one per core."""
    picture: str | None = None
    """Draw the map of correct answers to this file (.png, .svg, ...); needs the extra `plots`."""


def equations(arguments: list[str]) -> None:
    """Measure what equation models, or GPTs (equations gpt), say to equations that they never saw."""
    kind, rest = _positional(arguments, "mlp")
    if kind not in ("mlp", "gpt"):
        raise BabyError(f"the lab trains the equation model (mlp) or a gpt, not {kind!r}")
    from baby_xp import api, lab

    chosen = lab.suitable(kind, *options.peek(rest, "--digits", "--max-sum", "--operators"))
    parts = {"model": chosen.model, "train": chosen.train, "data": chosen.data}
    about = f"Train {chosen.name} with equations held out ({lab.EACH}: each in turn), and ask for them."
    asked, experiment = _parse_settings(parts, Experiment(), about, f"baby_xp equations {kind}", rest)
    lab.refuse_ignored(asked)
    chosen = api.override(chosen, asked)
    if experiment.picture:
        from baby_xp import pictures

        pictures.check(experiment.picture)
    with counting("models") as told:
        results = lab.experiment(chosen, experiment.seeds, experiment.workers, told)
    print("\n".join(results.lines()))
    if experiment.picture:
        print(f"\npicture {pictures.answers(results, experiment.picture)}")


# runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """List all runs, the last trained one first."""

    path: str = "runs"
    """Folder of the runs."""


def runs(arguments: list[str]) -> None:
    """List all runs, the one last trained first."""
    asked, _ = _asked(Folder(), "baby_xp runs", arguments)
    from baby_xp import api

    found = api.list_runs(asked.path)
    if not found:
        print(f"no runs in {asked.path} yet")
        return
    width = max(len(_short(run.guid)) for run in found)
    head = f"{'run':<{width}}  {'state':<8} {'preset':<12} {'steps':>15}  {'val loss':>8}"
    print(f"{head}  {'started (UTC)':<16}  data")
    for run in found:
        steps = f"{run.steps:,} of {run.num_steps:,}" if run.num_steps else ""
        loss = "" if run.val_loss is None else f"{run.val_loss:.4f}"
        line = f"{_short(run.guid):<{width}}  {run.state:<8} {run.preset:<12} {steps:>15}  {loss:>8}  "
        print(f"{line}{run.started[:16].replace('T', ' '):<16}  {run.data}".rstrip())


# lists --------------------------------------------------------------------------------------------------


def presets(arguments: list[str]) -> None:
    """List the presets."""
    _nothing("presets", arguments)
    from baby_xp.presets import PRESETS

    for preset in PRESETS.values():
        print(f"{preset.name:<16} {preset.about}; data: {preset.data.data}")


def backends(arguments: list[str]) -> None:
    """List the backends: what works, and for the others the reason and the remedy."""
    _nothing("backends", arguments)
    from baby_xp import backend

    for state in backend.states():
        if state.works:
            details = f"; {state.details}" if state.details else ""
            print(f"{state.name:<17} works    {state.version}, {state.device}{details}")
        else:
            print(f"{state.name:<17} missing  {state.reason}; remedy: {state.remedy}")
    chosen, why = backend.choose()
    print(f"auto takes {chosen.name}: {why}")


# helpers ------------------------------------------------------------------------------------------------


def _positional(arguments: list[str], default: str) -> tuple[str, list[str]]:
    """The first argument if it is no flag, and the rest."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return default, arguments


def _nothing(command: str, arguments: list[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print(COMMANDS[command].__doc__)
        raise SystemExit(0)
    if arguments:
        raise BabyError(f"{command} takes no arguments, not {' '.join(arguments)!r}")


def _asked(default: Any, program: str, arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """The options of a command, a dataclass whose values are the defaults, and those of them that were given."""
    about = " ".join((type(default).__doc__ or "").split())
    given = options.parse({"options": default}, about, program, arguments)
    return replace(default, **given), given


def _can_show(characters: str) -> bool:
    """Whether the terminal's encoding has these characters."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _path_flag(path: str) -> str:
    return "" if path == "runs" else f" --path {shlex.quote(path)}"


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": train,
    "finetune": finetune,
    "resume": resume,
    "generate": generate,
    "inference": generate,
    "estimate": estimate,
    "evaluate": evaluate,
    "inspect": inspect,
    "check": check,
    "equations": equations,
    "import": import_,
    "export": export,
    "runs": runs,
    "presets": presets,
    "backends": backends,
}
