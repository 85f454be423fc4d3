"""What a run is made of: frozen dataclasses, validated when they are made.

Every field is a flag of the command line (n_ctx is --n-ctx) and a key of the run's config file. The names are
The Little Baby's where it has them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from baby_xp import checks
from baby_xp.arrays import rng
from baby_xp.checks import LARGEST
from baby_xp.errors import BabyError

MOST_LAYERS = 10_000
"""With more blocks it takes many seconds to lay out their parameters alone, and seconds more at each step."""
LARGEST_DROPOUT = 0.99999
"""Nearly the largest share that leaves something: dropout is met to 1 / 65536."""
LARGEST_STD = 1e6
"""Of first weights: far from any use, and from what float32 does not hold."""


@dataclass(frozen=True)
class GPTConfig:
    """A GPT: sizes and the three switches."""

    kind: ClassVar[str] = "gpt"

    n_ctx: int = 64
    """Context: how many tokens the model sees at most."""
    n_emb: int = 128
    """Width: dimensions of a token's vector."""
    head_size: int = 128
    """Width of all attention heads together, a multiple of n_heads."""
    n_heads: int = 4
    """Attention heads per block."""
    n_layers: int = 4
    """Number of blocks."""
    dropout: float = 0.0
    """Share of activations that training sets to zero, from 0 to below 1."""
    c_sequence: Literal["pre", "post"] = "pre"
    """Layer norm before each half of a block (pre) or after it (post)."""
    c_attention: Literal["mha", "moh"] = "mha"
    """Multi-head attention (mha) or a mixture of heads (moh)."""
    c_network: Literal["mlp", "moe"] = "mlp"
    """Feed-forward network (mlp) or a dense mixture of four of them (moe)."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """GELU by its tanh approximation, or exactly, by erf."""

    def __post_init__(self):
        _check(self, checks.whole, "n_ctx", "n_emb", "head_size", "n_heads")
        _check(self, checks.whole, "n_layers", most=MOST_LAYERS)
        _choice(self, "c_sequence", "c_attention", "c_network", "gelu")
        if self.head_size % self.n_heads:
            raise BabyError(
                f"n_heads {self.n_heads} does not divide head_size {self.head_size}: "
                f"choose a head_size that is a multiple of n_heads"
            )
        _check(self, checks.number, "dropout", least=0, below=1)
        if rng.drop_threshold(self.dropout) == rng.HALVES:
            met = f"dropout is met to 1 / {rng.HALVES}"
            raise BabyError(f"dropout {self.dropout} drops everything, as {met}: choose {LARGEST_DROPOUT} at most")


@dataclass(frozen=True)
class EquationConfig:
    """The equation model of babyLLM."""

    kind: ClassVar[str] = "equations"
    dropout: ClassVar[float] = 0.0

    n_ctx: int = 4
    """Context: "4+4=" is 4 tokens; 6 hold an equation up to 9+9 whole."""
    n_emb: int = 1
    """Width: dimensions of a token's vector."""
    n_hidden: int = 64
    """Neurons in the hidden layer."""
    activation: Literal["tanh", "gelu"] = "tanh"
    """Non-linearity of the hidden layer."""
    std: float = 0.1
    """Standard deviation of the initial weights."""

    def __post_init__(self):
        _check(self, checks.whole, "n_ctx", "n_emb", "n_hidden")
        _choice(self, "activation")
        _check(self, checks.number, "std", above=0, most=LARGEST_STD)


ModelConfig = GPTConfig | EquationConfig


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained."""

    batch_size: int = 16
    """Sequences per batch."""
    accumulate: int = 1
    """Batches whose gradients add up to one step: a large batch in the memory of a small one."""
    num_steps: int | None = None
    """Total number of steps; None, or if num_epochs alone is given: as many as the epochs take."""
    num_epochs: int | None = None
    """Passes over the training windows, each in a new order; None: windows at random positions."""
    stride: int = 1
    """Tokens between the starts of two windows of an epoch."""
    lr: float = 1e-3
    """Peak learning rate."""
    base_batch_size: int | None = None
    """Batch size that lr was chosen for; if given, lr is scaled by batch_size / base_batch_size."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or half a cosine down to min_lr."""
    min_lr: float = 1e-4
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to lr."""
    beta1: float = 0.9
    """AdamW: decay of the mean of the gradients."""
    beta2: float = 0.99
    """AdamW: decay of the mean of the squared gradients."""
    weight_decay: float = 0.1
    """Decoupled weight decay; gains and biases have none."""
    clip: float = 1.0
    """Clip gradients to this global norm; 0: no clipping."""
    eval_every: int = 250
    """Steps between evaluations of the validation loss."""
    sample_tokens: int = 80
    """Tokens of the sample printed with each evaluation; 0: none."""
    patience: int = 0
    """Stop after this many evaluations without a better validation loss; 0: never."""
    max_minutes: float = 0.0
    """Minutes after which this training session stops; it can be resumed. 0: no limit."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: by time alone."""
    checkpoint_minutes: float = 1.0
    """Minutes between checkpoints; 0: by steps alone. There is always one at the end."""
    seed: int = 0
    """Seed of the weights, the order of the data, dropout and sampling."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating-point precision."""

    def __post_init__(self):
        _check(self, checks.whole, "batch_size", "accumulate", "stride", "eval_every")
        optional = ("num_steps", "num_epochs", "base_batch_size")
        _check(self, checks.whole, *(name for name in optional if getattr(self, name) is not None))
        _check(self, checks.number, "lr", above=0)
        _choice(self, "schedule", "dtype")
        _check(
            self, checks.number, "min_lr", "weight_decay", "clip", "max_minutes", "checkpoint_minutes", least=0
        )
        _check(self, checks.whole, "warmup_steps", "sample_tokens", "patience", "checkpoint_every", least=0)
        if self.step_size > LARGEST:
            raise BabyError(f"a step of {self.batch_size} x {self.accumulate} sequences is too large")
        _check(self, checks.whole, "seed", least=0, most=2**64 - 1)
        if self.num_steps is None and self.num_epochs is None:
            raise BabyError("neither num_steps nor num_epochs is given: say how long to train")
        _check(self, checks.number, "beta1", "beta2", above=0, below=1)
        if self.schedule == "cosine" and self.min_lr > self.peak_lr:
            raise BabyError(f"min_lr {self.min_lr} is above lr {self.peak_lr}: lower --min-lr or raise --lr")

    @property
    def step_size(self) -> int:
        """Sequences in one step."""
        return self.batch_size * self.accumulate

    @property
    def peak_lr(self) -> float:
        """The highest learning rate; with base_batch_size it is proportional to the batch (The Little Baby)."""
        if self.base_batch_size is None:
            return self.lr
        return self.lr * (self.step_size / self.base_batch_size)


@dataclass(frozen=True)
class DataConfig:
    """What a run reads."""

    data: str = "nursery"
    """A path to a UTF-8 text, or a name: nursery (generated here) or shakespeare (downloaded once)."""
    tokenizer: Literal["char", "byte"] = "char"
    """One id a character of the text, or one id a byte of its UTF-8."""

    def __post_init__(self):
        _check(self, checks.path, "data")
        _choice(self, "tokenizer")


@dataclass(frozen=True)
class EquationData(DataConfig):
    """Equations, and which of them training never sees."""

    data: str = "equations"
    """equations: sums and differences, made here."""
    digits: int = 1
    """Digits of the largest operand, 1 or 2."""
    operators: Literal["+", "-", "+-"] = "+"
    """Plus, minus, or both."""
    max_sum: int = 9
    """Largest sum, at least 9; 0: all of them. Differences have no limit."""
    held_out: str = "4+4"
    """What training never sees, nor with its operands swapped: one or more like 4+4,3+5, or a share like 10%."""

    def __post_init__(self):
        super().__post_init__()
        _choice(self, "operators")
        _check(self, checks.whole, "digits", most=2)
        _check(self, checks.whole, "max_sum", least=0)
        if 0 < self.max_sum < 9:
            raise BabyError(f"max_sum must be at least 9, or 0 for all sums, not {self.max_sum}")
        _check(self, checks.text, "held_out", hint="a sum such as 4+4 or a share such as 10%")
        if self.data != "equations":
            raise BabyError(f"data of this preset is equations, not {self.data!r}: leave out --data")
        if self.tokenizer != "char":
            raise BabyError(f"tokenizer of equations is char, not {self.tokenizer}")


@dataclass(frozen=True)
class Preset:
    """A named configuration."""

    name: str
    about: str
    model: ModelConfig
    train: TrainConfig
    data: DataConfig


CONFIGS = {config.kind: config for config in (GPTConfig, EquationConfig)}


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; a model's with its kind."""
    kind = {"kind": config.kind} if type(config) in CONFIGS.values() else {}
    return {**kind, **asdict(config)}


def from_dict(kind: type, values: Any, where: str) -> Any:
    """A config of `kind` from JSON values. Raises BabyError, naming `where`, if they do not fit it."""
    names = {field.name for field in fields(kind)}
    if not isinstance(values, dict) or not values.keys() <= names:
        odd = sorted(set(values) - names) if isinstance(values, dict) else values
        raise BabyError(
            f"{where}: {odd!r} is not part of a {kind.__name__}; the file is damaged or from elsewhere"
        )
    try:
        return kind(**values)
    except (BabyError, TypeError, ValueError) as error:
        raise BabyError(f"{where}: {error}") from None


def model_from_dict(values: Any, where: str) -> ModelConfig:
    """The model config that to_dict wrote."""
    name = values.get("kind") if isinstance(values, dict) else None
    kind = CONFIGS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise BabyError(
            f"{where}: kind of model is none of {', '.join(CONFIGS)}; the file is damaged or from elsewhere"
        )
    return from_dict(kind, {name: value for name, value in values.items() if name != "kind"}, where)


def data_from_dict(values: Any, where: str) -> DataConfig:
    """The data config that to_dict wrote, without what else a run's config tells of its data."""
    if not isinstance(values, dict):
        raise BabyError(f"{where}: {values!r} is not the data of a run; the file is damaged or from elsewhere")
    kind = EquationData if "held_out" in values else DataConfig
    return from_dict(kind, {name: values[name] for name in values if name not in ("file", "sha256")}, where)


def settings_of(config: dict[str, Any], where: str) -> Preset:
    """The settings that a run's config holds. Raises BabyError, naming `where`, if they make no sense."""
    return Preset(
        str(config["preset"]),
        "a run",
        model_from_dict(config["model"], where),
        from_dict(TrainConfig, config["train"], where),
        data_from_dict(config["data"], where),
    )


def _check(config: Any, check: Callable[..., Any], *names: str, **limits: Any) -> None:
    """Check some fields, and keep them as plain Python values: JSON has no others."""
    for name in names:
        object.__setattr__(config, name, check(name, getattr(config, name), **limits))


def _choice(config: Any, *names: str) -> None:
    for name in names:
        _check(config, checks.choice, name, allowed=config.__dataclass_fields__[name].type.__args__)
