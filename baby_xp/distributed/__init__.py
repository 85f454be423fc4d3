"""Ranks: processes, on one machine or several, that train one model together. A launcher such as mpiexec starts
them.

The rest of the program knows only the group: its size, the rank of this process, a sum over all ranks, and values
that one of them tells the others.
"""

import importlib
from typing import Literal

from baby_xp.distributed.group import Group

Kind = Literal["none", "mpi", "nccl"]

_MODULES = {"mpi": "baby_xp.distributed.mpi", "nccl": "baby_xp_backends.cupy_nccl"}
"""What joins a group of each kind, imported when it is asked for."""
_joined: dict[str, Group] = {}


def join(kind: Kind) -> Group:
    """The group of this process, which it joins once: "none" is a group of one. Waits for the other ranks.

    Raises BabyError if the kind needs a package that is missing, or if some ranks do not come.
    """
    if kind not in _joined:
        _joined[kind] = Group() if kind == "none" else importlib.import_module(_MODULES[kind]).join()
    return _joined[kind]


def current() -> Group:
    """The group that this process has joined; a group of one if there is none."""
    return next((group for group in _joined.values() if group.size > 1), Group())
