"""What a run is made of: frozen dataclasses, validated when they are made.

Every field is a flag of the command line (n_ctx is --n-ctx) and a key of the run's config file. The names are
The Little Baby's where it has them.
"""

from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from baby_xp import checks
from baby_xp.arrays import rng
from baby_xp.checks import LARGEST, Range, check_fields
from baby_xp.errors import BabyError
from baby_xp.training import optimizers

MOST_LAYERS = 10_000
"""With more blocks it takes many seconds to lay out their parameters alone, and seconds more at each step."""
LARGEST_DROPOUT = 0.99999
"""Nearly the largest share that leaves something: dropout is met to 1 / 65536."""
LARGEST_STD = 1e6
"""Of first weights: far from any use, and from what float32 does not hold."""

Size = Annotated[int, Range(1, LARGEST)]
Count = Annotated[int, Range(0, LARGEST)]
NotNegative = Annotated[float, Range(0)]


@dataclass(frozen=True)
class GPTConfig:
    """A GPT: sizes and the three switches."""

    kind: ClassVar[str] = "gpt"

    n_ctx: Size = 64
    """Context: how many tokens the model sees at most."""
    n_emb: Size = 128
    """Width: dimensions of a token's vector."""
    head_size: Size = 128
    """Width of all attention heads together, a multiple of n_heads."""
    n_heads: Size = 4
    """Attention heads per block."""
    n_layers: Annotated[int, Range(1, MOST_LAYERS)] = 4
    """Number of blocks."""
    dropout: Annotated[float, Range(0, below=1)] = 0.0
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
        check_fields(self)
        if self.head_size % self.n_heads:
            raise BabyError(
                f"n_heads {self.n_heads} does not divide head_size {self.head_size}: "
                f"choose a head_size that is a multiple of n_heads"
            )
        if rng.drop_threshold(self.dropout) == rng.HALVES:
            met = f"dropout is met to 1 / {rng.HALVES}"
            raise BabyError(f"dropout {self.dropout} drops everything, as {met}: choose {LARGEST_DROPOUT} at most")


@dataclass(frozen=True)
class EquationConfig:
    """The equation model of babyLLM."""

    kind: ClassVar[str] = "equations"
    dropout: ClassVar[float] = 0.0

    n_ctx: Size = 4
    """Context: "4+4=" is 4 tokens; 6 hold an equation up to 9+9 whole."""
    n_emb: Size = 1
    """Width: dimensions of a token's vector."""
    n_hidden: Size = 64
    """Neurons in the hidden layer."""
    activation: Literal["tanh", "gelu"] = "tanh"
    """Non-linearity of the hidden layer."""
    std: Annotated[float, Range(above=0, most=LARGEST_STD)] = 0.1
    """Standard deviation of the initial weights."""

    def __post_init__(self):
        check_fields(self)


ModelConfig = GPTConfig | EquationConfig


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained."""

    batch_size: Size = 16
    """Sequences per batch."""
    accumulate: Size = 1
    """Batches whose gradients add up to one step: a large batch in the memory of a small one."""
    num_steps: Size | None = None
    """Total number of steps; None, or if num_epochs alone is given: as many as the epochs take."""
    num_epochs: Size | None = None
    """Passes over the training windows, each in a new order; None: windows at random positions."""
    stride: Size = 1
    """Tokens between the starts of two windows of an epoch."""
    lr: Annotated[float, Range(above=0)] = 1e-3
    """Peak learning rate."""
    base_batch_size: Size | None = None
    """Batch size that lr was chosen for; if given, lr is scaled by batch_size / base_batch_size."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or half a cosine down to min_lr."""
    min_lr: NotNegative = 1e-4
    """Learning rate at the end of the cosine."""
    warmup_steps: Count = 100
    """Steps over which the learning rate rises linearly to lr."""
    beta1: Annotated[float, Range(above=0, below=1)] = 0.9
    """AdamW: decay of the mean of the gradients."""
    beta2: Annotated[float, Range(above=0, below=1)] = 0.99
    """AdamW: decay of the mean of the squared gradients."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay; gains and biases have none."""
    clip: NotNegative = 1.0
    """Clip gradients to this global norm; 0: no clipping."""
    eval_every: Size = 250
    """Steps between evaluations of the validation loss."""
    sample_tokens: Count = 80
    """Tokens of the sample printed with each evaluation; 0: none."""
    patience: Count = 0
    """Stop after this many evaluations without a better validation loss; 0: never."""
    max_minutes: NotNegative = 0.0
    """Minutes after which this training session stops; it can be resumed. 0: no limit."""
    checkpoint_every: Count = 0
    """Steps between checkpoints; 0: by time alone."""
    checkpoint_minutes: NotNegative = 1.0
    """Minutes between checkpoints; 0: by steps alone. There is always one at the end."""
    seed: Annotated[int, Range(0, 2**64 - 1)] = 0
    """Seed of the weights, the order of the data, dropout and sampling."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating-point precision."""

    def __post_init__(self):
        check_fields(self)
        if self.step_size > LARGEST:
            raise BabyError(f"a step of {self.batch_size} x {self.accumulate} sequences is too large")
        if self.num_steps is None and self.num_epochs is None:
            raise BabyError("neither num_steps nor num_epochs is given: say how long to train")
        if self.schedule == "cosine" and self.min_lr > self.peak_lr:
            raise BabyError(f"min_lr {self.min_lr} is above lr {self.peak_lr}: lower --min-lr or raise --lr")

    @property
    def step_size(self) -> int:
        """Sequences in one step."""
        return self.batch_size * self.accumulate

    @property
    def peak_lr(self) -> float:
        """The learning rate at its highest, by the batch-size rule where base_batch_size is given."""
        if self.base_batch_size is None:
            return self.lr
        return optimizers.scaled_rate(self.lr, self.base_batch_size, self.step_size)


@dataclass(frozen=True)
class DataConfig:
    """What a run reads."""

    data: Annotated[str, checks.path] = "nursery"
    """A path to a UTF-8 text, or a name: nursery (generated here) or shakespeare (downloaded once)."""
    tokenizer: Literal["char", "byte"] = "char"
    """One id a character of the text, or one id a byte of its UTF-8."""

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class EquationData(DataConfig):
    """Equations, and which of them training never sees."""

    data: Annotated[str, checks.path] = "equations"
    """equations: sums and differences, made here."""
    digits: Annotated[int, Range(1, 2)] = 1
    """Digits of the largest operand, 1 or 2."""
    operators: Literal["+", "-", "+-"] = "+"
    """Plus, minus, or both."""
    max_sum: Count = 9
    """Largest sum, at least 9; 0: all of them. Differences have no limit."""
    held_out: Annotated[str, partial(checks.text, hint="a sum such as 4+4 or a share such as 10%")] = "4+4"
    """What training never sees, nor with its operands swapped: one or more like 4+4,3+5, or a share like 10%."""

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.max_sum < 9:
            raise BabyError(f"max_sum must be at least 9, or 0 for all sums, not {self.max_sum}")
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

