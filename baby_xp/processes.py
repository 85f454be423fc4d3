"""Child processes: a new interpreter that calls one function for each request and returns JSON.

    with started("package.module:function", "a process of the lab") as child:
        result = ask(child, {"argument": 1})
"""

import errno
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from baby_xp.errors import BabyError
from baby_xp.files import reason

J = TypeVar("J")
R = TypeVar("R")
PROGRAM = "from baby_xp.processes import serve; serve()"


class Ended(BabyError):
    """A process ended without an answer; the message says how."""


def cores() -> int:
    """How many processor cores this process may use."""
    return len(cores_used())


def cores_used() -> set[int]:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def environment() -> dict[str, str]:
    """The environment of a Python process that finds the modules that this one does: a script may have added to
    its path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@contextmanager
def started(task: str, what: str, advice: str = "try --workers 1", **options: Any) -> Iterator[subprocess.Popen]:
    """A process for the function that `task` names, such as "package.module:function". It is killed at the end.

    what, advice: for the message if the system refuses it, see `refusal`. options: those of subprocess.Popen.
    Raises BabyError if the system refuses it.
    """
    options = {"env": environment(), **options}
    try:
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, task],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options,
        )  # fmt: skip
    except OSError as error:
        raise refusal(what, error, advice) from None
    try:
        yield child
    finally:
        child.kill()
        with suppress(OSError), child:  # waits and closes the pipes, in which a request may be left
            pass


def ask(child: subprocess.Popen, request: Mapping[str, Any]) -> Any:
    """The result of the child's function for these arguments, as JSON values.

    Raises the child's BabyError, and Ended if the process ends first.
    """
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        answer = json.loads(child.stdout.readline())
    except (OSError, ValueError):  # a living process answers with a line of JSON
        raise Ended(how_it_ended(child)) from None
    if "error" in answer:
        raise BabyError(answer["error"])
    return answer["result"]


def results(jobs: Iterable[J], slots: Sequence[Callable[[J], Future[R]]]) -> Iterator[tuple[int, R]]:
    """The result of each job with its number, in the order in which they are there. Raises what a job raises.

    slots: functions that start a job in some process; each has one job at a time.
    """
    waiting, idle, running = enumerate(jobs), list(slots), {}
    while True:
        while idle and (following := next(waiting, None)):
            number, job = following
            slot = idle.pop(0)
            running[slot(job)] = number, slot
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            number, slot = running.pop(future)
            idle.append(slot)
            yield number, future.result()


def how_it_ended(child: subprocess.Popen) -> str:
    """How a process ended, such as "was killed by signal 9"; waits for its end."""
    code = child.wait()
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def serve() -> None:
    """The child's main loop: a request on each line of its input, an answer on each line of its output."""
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    computing = threading.Event()
    threading.Thread(target=_end_with_parent, args=(computing,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with suppress(OSError):
        os.dup2(2, 1)  # what the function prints must not mix with the answer
    try:
        for line in sys.stdin:
            computing.set()
            try:
                answer = {"result": function(**json.loads(line))}
            except BabyError as error:
                answer = {"error": str(error)}
            computing.clear()
            try:
                print(json.dumps(answer), file=answers, flush=True)
            except BrokenPipeError:  # the parent has ended, and a flush at the end would fail again
                os._exit(1)
    except KeyboardInterrupt:  # the parent gets the signal too and reports it
        raise SystemExit(130) from None


def _end_with_parent(computing: threading.Event) -> None:
    """Interrupt the function that computes, as Ctrl-C would, when the parent has ended: nobody waits for it."""
    if hasattr(select, "poll"):  # not on Windows, where the process ends with its next answer
        requests = select.poll()
        requests.register(0, 0)  # only that the pipe was closed
        requests.poll()
        computing.wait()  # for a request that the parent has left in the pipe; without one, the process ends
        os.kill(os.getpid(), signal.SIGINT)


def refusal(what: str, error: Exception, advice: str = "try --workers 1") -> BabyError:
    """The one-line error for processes (`what`, such as "workers") that could not be started, with advice."""
    code, hints = getattr(error, "errno", None), [advice]
    if code in (errno.EMFILE, errno.ENFILE):
        hints.append("raise the limit of open files (ulimit -n)")
    elif code == errno.EAGAIN:
        hints.append("raise the limit of processes (ulimit -u)")
    elif code == errno.ENOMEM:
        hints.append("stop other programs that use memory")
    return BabyError(f"{what} cannot be started ({reason(error)}); {', or '.join(hints)}")
