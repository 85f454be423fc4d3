"""Does steps of test_machine.py in forks of a process that has loaded only baby_xp, and ends them.

JAX and PyTorch, which the tests may have loaded, cannot be forked. test_machine.py starts it with
baby_xp.processes.
"""

import contextlib
import json
import os
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import machine_faults

import baby_xp

ALWAYS = contextlib.ExitStack()  # for as long as this process lives
ALWAYS.enter_context(machine_faults.small_and_quick())
machine_faults.load_all()


def done(seconds: float | None = None, **job: Any) -> dict:
    """Do a job in a fork -> how it ended: done, error, interrupted, killed, escaped.

    job: "name" and "arguments" of what to do, "folder", "root" and "guid", and what happens meanwhile: with
    "signals" [[25, 15], [31, 9]], signal 15 before the 25th file operation and signal 9 before the 31st. seconds:
    killed after so long, with a disk that takes its time.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        answer = {"kind": "killed"}
        try:
            answer = in_child(job, slow=seconds is not None)
        finally:
            os.write(writing, json.dumps(answer).encode())
            os._exit(0)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with open(reading, "rb") as file:
        answer = file.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else {"kind": "killed"}


def in_child(job: dict, slow: bool) -> dict:
    """Runs the job in the fork."""
    signal.alarm(60)  # in case the process never ends
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(job["folder"])
    machine_faults.GUIDS.source = machine_faults.Guids(job["guid"])
    signals = [tuple(pair) for pair in job.get("signals", [])]

    def action(number: int, event: str, args: tuple) -> None:
        for at, which in signals:
            if number == at:
                os.kill(os.getpid(), which)
        if slow and event == "os.fsync":
            time.sleep(0.003)

    try:
        with machine_faults.WATCH.doing(Path(job["root"]), action):
            run = machine_faults.perform(job["name"], job["arguments"])
        return {"kind": "done", "guid": run.guid}
    except baby_xp.BabyError as error:
        return {"kind": "error", "error": str(error)}
    except KeyboardInterrupt:
        return {"kind": "interrupted"}
    except BaseException as error:
        return {"kind": "escaped", "type": type(error).__name__, "traceback": traceback.format_exc()}
