"""The command line: parse, call, print. What a command does is in api.py and the modules it calls.

Input that cannot be used ends in one line on stderr and exit code 2.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Sequence

from baby_xp import __version__, distributed
from baby_xp.cli import conversion_commands, lab_command, list_commands, model_commands, train_commands
from baby_xp.cli.streams import Output, OutputLost, guarded, one_line
from baby_xp.errors import BabyError, NothingTrained
from baby_xp.files import refusal
from baby_xp.training.signals import interruptible, interruption

USAGE = f"""baby_xp {__version__}: train baby language models from scratch

usage: python -m baby_xp COMMAND [options]

  train [PRESET]        train a model; the default preset is baby
  finetune RUN --data   continue training a run on another text
  resume [RUN]          continue a run that was stopped or killed, from its last checkpoint
  generate [RUN]        generate text from a prompt (also called inference)
  evaluate [RUN]        measure a run: loss, perplexity, words, copies
  inspect [RUN]         show every array of a forward pass, the predictions and the attention
  check [RUN]           compare the gradients of a run with finite differences, layer by layer
  equations [gpt]       hold out each sum in turn, train a model without it, and test it on that sum
  estimate [PRESET]     size, time and memory of a run, before it starts
  runs                  list all runs, newest first
  presets               list the presets, the models that can be trained
  backends              list the array libraries that work here, and what is missing for the others
  import littlebaby     import a model of the original Little Baby as a run
  export littlebaby     export a run as the original Little Baby's files

RUN is a GUID, the beginning of one, or last. COMMAND --help lists its options.
"""


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": train_commands.train,
    "finetune": train_commands.finetune,
    "resume": train_commands.resume,
    "generate": model_commands.generate,
    "inference": model_commands.generate,
    "estimate": train_commands.estimate,
    "evaluate": model_commands.evaluate,
    "inspect": model_commands.inspect,
    "check": model_commands.check,
    "equations": lab_command.equations,
    "import": conversion_commands.import_,
    "export": conversion_commands.export,
    "runs": list_commands.runs,
    "presets": list_commands.presets,
    "backends": list_commands.backends,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command -> exit code."""
    with guarded() as output:
        code, line = _ending(list(sys.argv[1:] if arguments is None else arguments), output)
        if line:
            group = distributed.current()
            group.before_last_words()
            rank = f"rank {group.rank}: " if group.rank else ""
            print(f"baby_xp: {rank}{one_line(line)}", file=sys.stderr, flush=True)
            group.after_last_words()
        return code


def _ending(arguments: list[str], output: Output) -> tuple[int, str]:
    """Run one command -> exit code, and in one line what went wrong."""
    try:
        with interruptible():
            try:
                code = _dispatch(arguments)
            except SystemExit as end:  # after --help
                code = int(end.code or 0)
            finally:  # no output may be left in a buffer when the interpreter ends
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
    except OSError as error:  # the last resort: code that opens files reports more details itself
        doing = "read" if isinstance(error, FileNotFoundError) else "used"
        return 2, str(refusal(error.filename or "a file or a process", error, doing))
    return _lost(output.lost) if output.lost else (code, "")


def _lost(lost: OutputLost) -> tuple[int, str]:
    """Exit code and message if standard output was lost; a closed pipe needs no message."""
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
