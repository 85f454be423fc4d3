"""What the processes that this one starts have in common: where they find modules, and why there may be none."""

import errno
import os
import sys

from baby_xp.errors import BabyError
from baby_xp.files import reason


def environment() -> dict[str, str]:
    """The environment of a Python process that finds the modules that this one does: a script may have added to
    its path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def refusal(what: str, error: Exception) -> BabyError:
    """The one line for processes (`what`, such as "workers") that could not be started, with what helps."""
    code, advice = getattr(error, "errno", None), ["try --workers 1"]
    if code in (errno.EMFILE, errno.ENFILE):
        advice.append("raise the limit of open files (ulimit -n)")
    elif code == errno.EAGAIN:
        advice.append("raise the limit of processes (ulimit -u)")
    elif code == errno.ENOMEM:
        advice.append("end what else takes memory")
    return BabyError(f"{what} cannot be started ({reason(error)}); {', or '.join(advice)}")
