"""Does steps of test_machine.py in forks of a process that has loaded nothing but baby_xp, and ends them.

JAX and PyTorch, which the tests have loaded by then, do not stand a fork. Takes one job as JSON a line and answers
each with one line: name and arguments of what to do, and what happens meanwhile:

    signals: [[25, 15], [31, 9]]     signal 15 before the 25th file operation, signal 9 before the 31st
    seconds: 0.05                    killed after so long, with a disk that takes its time
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import machine_world

import baby_xp


def main() -> None:
    sys.stdin.reconfigure(encoding="utf-8")
    with machine_world.small_and_quick():
        machine_world.load_all()
        for line in sys.stdin:
            print(json.dumps(done(json.loads(line))), flush=True)


def done(job: dict) -> dict:
    """Do a job in a fork -> how it ended: done, error, interrupted, killed, escaped."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        answer = {"kind": "killed"}
        try:
            answer = in_child(job)
        finally:
            os.write(writing, json.dumps(answer).encode())
            os._exit(0)
    os.close(writing)
    if "seconds" in job:
        time.sleep(job["seconds"])
        os.kill(child, signal.SIGKILL)
    with open(reading, "rb") as file:
        told = file.read()
    os.waitpid(child, 0)
    return json.loads(told) if told else {"kind": "killed"}


def in_child(job: dict) -> dict:
    """What a fork does."""
    signal.alarm(60)  # in case it never ends
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(job["folder"])
    machine_world.GUIDS.source = machine_world.Guids(job["guid"])
    signals = [tuple(pair) for pair in job.get("signals", [])]

    def action(number: int, event: str, args: tuple) -> None:
        for at, which in signals:
            if number == at:
                os.kill(os.getpid(), which)
        if "seconds" in job and event == "os.fsync":
            time.sleep(0.003)

    try:
        with machine_world.WATCH.doing(Path(job["root"]), action):
            run = machine_world.perform(job["name"], job["arguments"])
        return {"kind": "done", "guid": run.guid}
    except baby_xp.BabyError as error:
        return {"kind": "error", "error": str(error)}
    except KeyboardInterrupt:
        return {"kind": "interrupted"}
    except BaseException as error:
        told = traceback.format_exc()
        return {"kind": "escaped", "type": type(error).__name__, "traceback": told}


if __name__ == "__main__":
    main()
