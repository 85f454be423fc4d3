"""Trains a run and kills it, again and again, in forks of a process that has loaded nothing but baby_xp.

JAX and PyTorch, which the tests have loaded by then, do not stand a fork. Takes JSON on its input; answers how
often it killed the run, and how often while a file was being written.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from quick import quick

from baby_xp import api


def main() -> None:
    asked = json.load(sys.stdin)
    folder, chance = Path(asked["folder"]), random.Random(asked["seed"])
    # imports
    api.train("baby", path=folder.with_name("warm-up"), **{**asked["settings"], "num_steps": 2, "workers": 1})
    sync = os.fsync
    # so that many a kill falls into a checkpoint, and no machine is so fast that the run ends before the last one
    os.fsync = lambda file: (sync(file), time.sleep(asked["pause"]))
    kills, left = 0, set()
    while kills < asked["kills"]:
        child = start(folder, asked["settings"])
        time.sleep(chance.uniform(*asked["seconds"]))
        done = os.waitpid(child, os.WNOHANG)
        if done[0]:
            raise SystemExit(f"the run ended with status {done[1]} after {kills} kills: give it more steps")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        left |= {path.name for path in folder.glob("*/.*.tmp")}
    _, status = os.waitpid(start(folder, asked["settings"]), 0)
    print(json.dumps({"kills": kills, "while_writing": len(left), "status": status}))


def start(folder: Path, settings: dict) -> int:
    """Begin the run in a fork, or go on with it -> the child's number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            go_on(folder, settings)
            code = 0
        finally:
            os._exit(code)
    return child


def go_on(folder: Path, settings: dict) -> None:
    if list(folder.glob("configs/config_*.json")):
        api.resume(path=folder)
    else:
        api.train("baby", path=folder, **settings)


if __name__ == "__main__":
    with quick():
        main()
