"""A rank on pretended GPUs, as a process of its own: nccl_rank.py DEVICES train ... (see fake_cupy.py).

The variable KILL, such as 1:5, kills rank 1 before step 5, when the others wait for it. RAISE makes it fail. Both
are for the first attempt of torchrun.
"""

import os
import signal
import sys
import time

import fake_cupy
from quick import quick

from baby_xp.cli import main
from baby_xp.errors import BabyError
from baby_xp.text.batches import RandomWindows

draw = RandomWindows.batch


def batch(windows, step):
    here = f"{os.environ.get('RANK')}:{step}"
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return draw(windows, step)
    if here == os.environ.get("KILL"):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if here == os.environ.get("RAISE"):
        raise BabyError("this rank cannot go on")
    return draw(windows, step)


if __name__ == "__main__":
    RandomWindows.batch = batch
    sys.modules.update(fake_cupy.modules(fake_cupy.Machine(devices=int(sys.argv[1]))))
    with quick():
        sys.exit(main(sys.argv[2:]))
