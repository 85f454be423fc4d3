"""Baby language models from scratch: every forward and backward pass explicit, one text for every backend.

Axis letters, the same in every comment and docstring of this package:

    B  batch: sequences in one step          T  time: tokens in one sequence, at most n_ctx
    N  tokens in one step, B * T             C  channels: n_emb, the width of a token's vector
    H  attention heads: n_heads              D  channels of one head: head_size / n_heads
    S  all heads side by side: head_size     V  vocabulary: number of different token ids
    F  hidden channels of the MLP            E  experts of a mixture
    L  blocks: n_layers                      P  parameters of the whole model
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "train": "api", "finetune": "api", "resume": "api", "load": "api", "list_runs": "api", "Run": "run",
    "estimate": "estimation.estimate", "Listener": "training.listener",
    "import_littlebaby": "api", "export_littlebaby": "api", "BabyError": "errors",
}  # fmt: skip

if TYPE_CHECKING:  # for editors and type checkers
    from baby_xp.api import export_littlebaby as export_littlebaby
    from baby_xp.api import finetune as finetune
    from baby_xp.api import import_littlebaby as import_littlebaby
    from baby_xp.api import list_runs as list_runs
    from baby_xp.api import load as load
    from baby_xp.api import resume as resume
    from baby_xp.api import train as train
    from baby_xp.errors import BabyError as BabyError
    from baby_xp.estimation.estimate import estimate as estimate
    from baby_xp.run import Run as Run
    from baby_xp.training.listener import Listener as Listener
else:  # on demand, so that `import baby_xp` only loads this file

    def __getattr__(name: str) -> Any:
        if name in _PUBLIC:
            return getattr(importlib.import_module(f"baby_xp.{_PUBLIC[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
