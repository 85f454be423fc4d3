"""What bench.parameters compares: one base, and variants of it in which one parameter differs."""

from dataclasses import dataclass, field
from typing import Any

PRESET = "baby"
BASE = {
    "data": "shakespeare", "batch_size": 8, "lr": 1e-2, "min_lr": 1e-3, "num_steps": 1000, "eval_every": 100,
    "sample_tokens": 0,
}  # fmt: skip
"""The base: the sizes of preset `baby`, on Shakespeare in place of its own text, with a rate for so few steps.

At the preset's own, 0.003, so few steps leave a model so far from done that a longer context made it worse.
"""
SHORT = 10_000
"""Characters of the short text, the beginning of Shakespeare: few enough to be learned by heart."""
SHORT_STEPS = 2000
"""Steps in which that happens."""


@dataclass(frozen=True)
class Variant:
    """A value of a parameter. `overrides`: what differs from the base; none: it is the base itself."""

    group: str
    value: str
    overrides: dict[str, Any] = field(default_factory=dict)
    short: bool = False
    """Whether it learns the short text."""

    @property
    def key(self) -> str:
        """Its name in the results: that of the base is the same in every group."""
        if not self.overrides:
            return "short text" if self.short else "base"
        told = ", ".join(f"{name} {value}" for name, value in self.overrides.items())
        return f"short text, {told}" if self.short else told


def _of(name: str, *values: Any, base: Any = None) -> list[Variant]:
    """Variants of one parameter, in this order. base: the value that the base has; it gets a row too."""
    return [Variant(name, str(value), {} if value == base else {name: value}) for value in values]


def _rate(value: float) -> Variant:
    # the end of the cosine goes along: the base ends at a tenth of its rate
    return Variant("lr", f"{value:g}", {} if value == 1e-2 else {"lr": value, "min_lr": value / 10})


def _short(value: str, **overrides: Any) -> Variant:
    return Variant("short text", value, overrides, short=True)


ALL = [
    *_of("seed", 0, 1, 2, base=0),
    *_of("n_ctx", 16, 32, 64, 128, base=64),
    *_of("n_emb", 32, 64, 128, base=64),
    *_of("head_size", 16, 32, 64, 128, base=64),
    *_of("n_heads", 1, 2, 4, 8, 16, base=4),
    *_of("n_layers", 1, 2, 3, 4, 6, base=3),
    Variant("more steps", "1,000 steps"),
    Variant("more steps", "4,000 steps", {"num_steps": 4000}),
    Variant("more steps", "4,000 steps, n_layers 1", {"n_layers": 1, "num_steps": 4000}),
    Variant("more steps", "4,000 steps, n_ctx 16", {"n_ctx": 16, "num_steps": 4000}),
    Variant("more steps", "4,000 steps, n_ctx 128", {"n_ctx": 128, "num_steps": 4000}),
    Variant("more steps", "4,000 steps, n_emb 128", {"n_emb": 128, "num_steps": 4000}),
    Variant("more steps", "4,000 steps, c_sequence post", {"c_sequence": "post", "num_steps": 4000}),
    *_of("dropout", 0.0, 0.1, 0.2, base=0.0),
    *_of("c_sequence", "pre", "post", base="pre"),
    *_of("c_attention", "mha", "moh", base="mha"),
    *_of("c_network", "mlp", "moe", base="mlp"),
    *_of("gelu", "tanh", "erf", base="tanh"),
    *_of("tokenizer", "char", "byte", base="char"),
    *_of("dtype", "float32", "float64", base="float32"),
    *_of("batch_size", 2, 4, 8, 16, 32, base=8),
    Variant("accumulate", "1, batch_size 8"),
    Variant("accumulate", "4, batch_size 2", {"batch_size": 2, "accumulate": 4}),
    Variant("base_batch_size", "batch_size 8, lr 0.01"),
    Variant("base_batch_size", "batch_size 2, lr 0.01", {"batch_size": 2}),
    Variant("base_batch_size", "batch_size 2, lr 0.0025 by the rule",
            {"batch_size": 2, "base_batch_size": 8, "min_lr": 2.5e-4}),
    Variant("same tokens", "batch_size 2, 4,000 steps", {"batch_size": 2, "num_steps": 4000}),
    Variant("same tokens", "batch_size 8, 1,000 steps"),
    Variant("same tokens", "batch_size 32, 250 steps", {"batch_size": 32, "num_steps": 250}),
    *_of("num_steps", 250, 500, 1000, 2000, 4000, base=1000),
    Variant("num_epochs", "none: 1,000 steps from random places"),
    Variant("num_epochs", "1, stride 128: 981 steps", {"num_epochs": 1, "stride": 128, "num_steps": None}),
    *(_rate(value) for value in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    *_of("schedule", "cosine", "constant", base="cosine"),
    *_of("min_lr", 0.0, 1e-3, 3e-3, base=1e-3),
    *_of("warmup_steps", 0, 100, 300, base=100),
    *_of("beta1", 0.8, 0.9, 0.95, base=0.9),
    *_of("beta2", 0.95, 0.99, 0.999, base=0.99),
    *_of("weight_decay", 0.0, 0.1, 1.0, base=0.1),
    *_of("clip", 0.0, 0.1, 1.0, base=1.0),
    Variant("too fast", "lr 0.01"),
    *(
        Variant("too fast", told, {"lr": 1e-1, "min_lr": 1e-2, **more})
        for told, more in (
            ("lr 0.1", {}),
            ("no warm-up either", {"warmup_steps": 0}),
            ("no clipping either", {"warmup_steps": 0, "clip": 0.0}),
            ("norms after the layers too", {"warmup_steps": 0, "clip": 0.0, "c_sequence": "post"}),
        )
    ),
    _short("nothing"),
    _short("dropout 0.1", dropout=0.1),
    _short("dropout 0.2", dropout=0.2),
    _short("dropout 0.4", dropout=0.4),
    _short("weight_decay 1", weight_decay=1.0),
    _short("n_layers 1", n_layers=1),
    _short("n_emb 32", n_emb=32),
    _short("num_steps 1000", num_steps=1000),
    _short("patience 3", patience=3),
]  # fmt: skip
"""In the order in which they are shown."""

FIRST = ("seed", "lr", "n_layers", "n_emb", "short text", "n_ctx", "batch_size", "too fast", "num_steps")
"""Groups that are trained first, so that a measurement that is stopped has what matters most."""

ON_SPEED = {
    "n_ctx", "n_emb", "head_size", "n_heads", "n_layers", "dropout", "c_sequence", "c_attention", "c_network",
    "gelu", "tokenizer", "dtype", "batch_size", "accumulate",
}  # fmt: skip
"""Groups whose parameter changes the time or the memory of a step; the others leave them as they are."""

ON_TOKENS = {
    "batch_size", "accumulate", "base_batch_size", "same tokens", "num_steps", "num_epochs",
    "more steps",
}  # fmt: skip
"""Groups whose variants do not all see as many tokens."""


def groups() -> list[str]:
    """The names of the groups, in order."""
    return list(dict.fromkeys(one.group for one in ALL))


def to_train() -> list[Variant]:
    """Each different variant once, the most telling first."""
    order = sorted(ALL, key=lambda one: FIRST.index(one.group) if one.group in FIRST else len(FIRST))
    return list({one.key: one for one in order}.values())


def to_time() -> list[Variant]:
    """Each different variant whose step may take another time, once."""
    return list({one.key: one for one in ALL if one.group in ON_SPEED}.values())
