"""Baby language models from scratch: every forward and backward pass explicit, one text for every backend.

Axis letters, the same in every comment and docstring of this package:

    B  batch: sequences in one step          T  time: tokens in one sequence, at most n_ctx
    N  tokens in one step, B * T             C  channels: n_emb, the width of a token's vector
    H  attention heads: n_heads              D  channels of one head: head_size / n_heads
    S  all heads side by side: head_size     V  vocabulary: number of different token ids
    F  hidden channels of the MLP: 4 * n_emb E  experts of a mixture
    L  blocks: n_layers                      P  parameters of the whole model
"""

__version__ = "0.1.0"

_PUBLIC = {
    "train": "api", "finetune": "api", "resume": "api", "load": "api", "list_runs": "api", "Run": "run",
    "estimate": "estimation.estimate",
    "import_littlebaby": "api", "export_littlebaby": "api", "BabyError": "errors",
}  # fmt: skip


def __getattr__(name: str):
    # on demand, so that `import baby_xp` costs nothing but this file
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(f"baby_xp.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_PUBLIC])
