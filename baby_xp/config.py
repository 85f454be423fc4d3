"""The settings of a run: frozen dataclasses, validated when they are created.

Every field is a flag of the command line (n_ctx is --n-ctx) and a key of the run's config file. The names are
The Little Baby's where it has them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from baby_xp_data.equation_table import EquationTable

from baby_xp import checks
from baby_xp.arrays import rng
from baby_xp.checks import LARGEST, Range, check_fields
from baby_xp.errors import BabyError

MOST_LAYERS = 10_000
"""With more blocks, laying out the parameters takes many seconds, and each step several seconds more."""
LARGEST_DROPOUT = 0.99999
"""The largest rate, rounded down, that does not drop everything: rates are rounded to multiples of 1 / 65536."""
LARGEST_STD = 1e6
"""Limit of the initial standard deviation: far above any useful value, far below the largest float32."""

Size = Annotated[int, Range(1, LARGEST)]
Count = Annotated[int, Range(0, LARGEST)]
NotNegative = Annotated[float, Range(0)]
Switch = Annotated[bool, checks.flag]


@dataclass(frozen=True)
class GPTConfig:
    """A GPT: sizes and switches. The defaults of the switches make The Little Baby's model."""

    kind: ClassVar[str] = "gpt"

    n_ctx: Size = 64
    """Context: the maximum number of tokens that the model sees."""
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
    """Norm before each half of a block (pre) or after it (post)."""
    c_attention: Literal["mha", "moh"] = "mha"
    """Multi-head attention (mha) or a mixture of heads (moh)."""
    c_network: Literal["mlp", "moe"] = "mlp"
    """Feed-forward network (mlp) or a dense mixture of four of them (moe)."""
    positions: Literal["learned", "rotary"] = "learned"
    """A learned vector for each position, or queries and keys rotated by their position (rotary)."""
    norm: Literal["layernorm", "rmsnorm", "rmsnorm-gain"] = "layernorm"
    """Layer norm, or RMSNorm without or with a learned gain."""
    smear: Switch = False
    """Add to each token's embedding a gated share of that of the token before it."""
    embedding_norm: Switch = False
    """A norm after the embedding too."""
    qk_norm: Switch = False
    """RMSNorm of each query and each key, so that no attention score is large."""
    activation: Literal["gelu", "relu2", "swiglu"] = "gelu"
    """Non-linearity of the network: GELU, ReLU squared (relu2) or SwiGLU."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """GELU by its tanh approximation, or exact, by erf."""
    qkv_bias: Switch = False
    """A bias for queries, keys and values."""
    linear_bias: Switch = True
    """A bias for the other linear layers of attention and network."""
    head_bias: Switch = True
    """A bias for the logits."""
    tied_head: Switch = False
    """Use the token embeddings as the weights of the head."""
    zero_init: Switch = False
    """Start with zeros in the last layer of attention and network, and in a head that is not tied."""
    logit_cap: Annotated[float, Range(0, 1e6)] = 0.0
    """Keep logits between -cap and cap, by cap * tanh(logits / cap); at least 1, 0: no cap."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.head_size % self.n_heads:
            raise BabyError(
                f"n_heads {self.n_heads} does not divide head_size {self.head_size}: "
                f"choose a head_size that is a multiple of n_heads"
            )
        if rng.drop_threshold(self.dropout) == rng.HALVES:
            problem = f"dropout {self.dropout} drops everything, as it is rounded to multiples of 1 / {rng.HALVES}"
            raise BabyError(f"{problem}: choose at most {LARGEST_DROPOUT}")
        width = self.head_size // self.n_heads
        if self.positions == "rotary" and width % 2:
            raise BabyError(
                f"rotary positions rotate pairs of channels, and head_size {self.head_size} with n_heads "
                f"{self.n_heads} makes heads of {width}: choose an even width, or positions learned"
            )
        if self.gelu != "tanh" and self.activation != "gelu":
            raise BabyError(
                f"gelu {self.gelu} has no effect on activation {self.activation}: leave out gelu, or choose "
                f"activation gelu"
            )
        if 0 < self.logit_cap < 1:
            raise BabyError(f"logit_cap {self.logit_cap} is too low to predict anything: choose 1 or more, or 0")


MODERN: dict[str, Any] = {
    "c_sequence": "pre", "c_attention": "mha", "c_network": "mlp", "positions": "rotary", "norm": "rmsnorm",
    "smear": False, "embedding_norm": True, "qk_norm": True, "activation": "relu2", "gelu": "tanh",
    "qkv_bias": False, "linear_bias": False, "head_bias": False, "tied_head": False, "zero_init": True,
    "logit_cap": 0.0,
}  # fmt: skip
"""All switches of a GPT, as in NanoChat."""
CLASSIC = {name: getattr(GPTConfig(), name) for name in MODERN}
"""All switches as in The Little Baby: the defaults."""


@dataclass(frozen=True)
class Combination:
    """What stands for all switches of a GPT. It is a setting only: a run keeps the switches."""

    c_model: Literal["classic", "modern"] | None = None
    """All switches at once: The Little Baby's (classic) or NanoChat's (modern); single ones given too are kept."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class EquationConfig:
    """The equation model of babyLLM."""

    kind: ClassVar[str] = "equations"
    dropout: ClassVar[float] = 0.0

    n_ctx: Size = 4
    """Context in tokens: 4 for "4+4=", 6 for a whole equation up to 9+9."""
    n_emb: Size = 1
    """Width: dimensions of a token's vector."""
    n_hidden: Size = 64
    """Neurons in the hidden layer."""
    activation: Literal["tanh", "gelu"] = "tanh"
    """Non-linearity of the hidden layer."""
    std: Annotated[float, Range(above=0, most=LARGEST_STD)] = 0.1
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
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
    """Total number of steps; if only num_epochs is given, as many as the epochs take."""
    num_epochs: Size | None = None
    """Passes over the training windows, each in a new order; by default, windows at random positions."""
    stride: Size = 1
    """Tokens between the starts of two windows of an epoch."""
    lr: Annotated[float, Range(above=0)] = 1e-3
    """Peak learning rate."""
    base_batch_size: Size | None = None
    """Batch size that lr was chosen for; if given, lr is scaled by batch_size / base_batch_size."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """After the warm-up: constant, half a cosine down to min_lr, or constant and then linear down to min_lr."""
    min_lr: NotNegative = 1e-4
    """Learning rate at the end of the cosine or the linear decay."""
    decay_fraction: Annotated[float, Range(above=0, most=1)] = 0.5
    """Share of the steps, the last ones, over which the linear schedule decays."""
    warmup_steps: Count = 100
    """Steps over which the learning rate rises linearly to lr."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all parameters, or Muon for the weight matrices inside blocks and AdamW for the others."""
    muon_lr: Annotated[float, Range(above=0)] = 0.02
    """Muon: peak learning rate; warm-up and schedule are those of lr."""
    muon_momentum: Annotated[float, Range(0, below=1)] = 0.95
    """Muon: decay of the mean of the gradients."""
    muon_iterations: Annotated[int, Range(1, 10)] = 5
    """Muon: iterations that make an update orthogonal; fewer are faster and less exact."""
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
    """Steps between checkpoints; 0: only by time."""
    checkpoint_minutes: NotNegative = 1.0
    """Minutes between checkpoints; 0: only by steps. There is always one at the end."""
    seed: Annotated[int, Range(0, 2**64 - 1)] = 0
    """Seed of the weights, the order of the data, dropout and sampling."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating-point precision."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.step_size > LARGEST:
            size = f"a step of {self.batch_size} x {self.accumulate} sequences"
            raise BabyError(f"{size} is too large: lower --batch-size or --accumulate")
        if self.num_steps is None and self.num_epochs is None:
            raise BabyError("neither num_steps nor num_epochs is given: give one of them")
        if self.schedule != "constant" and self.min_lr > self.peak_lr:
            raise BabyError(f"min_lr {self.min_lr} is above lr {self.peak_lr}: lower --min-lr or raise --lr")

    @property
    def step_size(self) -> int:
        """Sequences in one step."""
        return self.batch_size * self.accumulate

    def total_steps(self, steps_per_epoch: int) -> int:
        """num_steps, or as many as num_epochs take if that alone is given."""
        return self.num_steps or (self.num_epochs or 0) * steps_per_epoch

    @property
    def peak_lr(self) -> float:
        """The highest learning rate; with base_batch_size it is proportional to the batch (The Little Baby)."""
        if self.base_batch_size is None:
            return self.lr
        return self.lr * (self.step_size / self.base_batch_size)


@dataclass(frozen=True)
class DataConfig:
    """What a run reads."""

    data: Annotated[str, checks.path] = "nursery"
    """A path to a UTF-8 text, or a name: nursery (generated here) or shakespeare (downloaded once)."""
    tokenizer: Literal["char", "byte"] = "char"
    """One token per character of the text, or one per byte of its UTF-8 encoding."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class EquationData(DataConfig):
    """Equations, and which of them are held out."""

    data: Annotated[str, checks.path] = "equations"
    """equations: sums and differences (generated here)."""
    digits: Annotated[int, Range(1, 2)] = 1
    """Digits of the largest operand, 1 or 2."""
    operators: Literal["+", "-", "+-"] = "+"
    """Plus, minus, or both."""
    max_sum: Count = 9
    """Largest sum, at least 9; 0: all of them. Differences have no limit."""
    held_out: Annotated[str, partial(checks.text, hint="a sum such as 4+4 or a share such as 10%")] = "4+4"
    """Equations to hold out, and those with swapped operands: some such as 4+4,3+5, or a share such as 10%."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.max_sum < 9:
            raise BabyError(f"max_sum must be at least 9, or 0 for all sums, not {self.max_sum}")
        if self.data != "equations":
            raise BabyError(f"data of this preset is equations, not {self.data!r}: leave out --data")
        if self.tokenizer != "char":
            raise BabyError(f"tokenizer of equations is char, not {self.tokenizer}")

    @property
    def table(self) -> EquationTable:
        """The table of equations. Raises BabyError if max_sum does not fit the digits."""
        return EquationTable(self.max_sum, self.digits, self.operators)


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. A preset is a RunConfig with a name."""

    name: str
    """Name of the preset."""
    model: ModelConfig
    train: TrainConfig
    data: DataConfig

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, with the keys of a run's config file."""
        parts = {part: to_dict(getattr(self, part)) for part in PARTS}
        return {"preset": self.name, **parts}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> "RunConfig":
        """What `to_dict` gave, or a run's config file. Raises BabyError, naming `where`, if it makes no sense."""
        return cls(
            str(values["preset"]),
            model_from_dict(values["model"], where),
            from_dict(TrainConfig, values["train"], where),
            data_from_dict(values["data"], where),
        )

    def override(self, settings: Mapping[str, Any]) -> "RunConfig":
        """The same with some fields of its parts replaced.

        num_epochs without num_steps replaces num_steps of the preset. c_model stands for all switches of a GPT
        that are not given themselves. A changed table of equations gets a held-out case that it has. Raises
        BabyError for an unknown setting, and for one without effect.
        """
        if "c_model" in settings and isinstance(self.model, GPTConfig):
            rest = {name: value for name, value in settings.items() if name != "c_model"}
            chosen = Combination(settings["c_model"]).c_model
            settings = {**{"classic": CLASSIC, "modern": MODERN, None: {}}[chosen], **rest}
        known = {part: {field.name for field in fields(getattr(self, part))} for part in PARTS}
        unknown = [name for name in settings if not any(name in names for names in known.values())]
        if unknown:
            raise BabyError(f"preset {self.name} has no setting {unknown[0]!r}")
        if settings.get("num_epochs") is not None and "num_steps" not in settings:
            settings = {**settings, "num_steps": None}
        parts = {
            part: replace(getattr(self, part), **{name: settings[name] for name in names & settings.keys()})
            for part, names in known.items()
        }
        found = replace(self, **parts)
        _refuse_what_changes_nothing(found, settings)
        data, of_table = found.data, {"max_sum", "digits", "operators"}
        if isinstance(data, EquationData) and of_table & settings.keys() and "held_out" not in settings:
            found = replace(found, data=replace(data, held_out=data.table.suitable(data.held_out)))
        return found


PARTS = ("model", "train", "data")
MODELS: dict[str, type[ModelConfig]] = {kind.kind: kind for kind in (GPTConfig, EquationConfig)}


def _refuse_what_changes_nothing(config: RunConfig, settings: Mapping[str, Any]) -> None:
    """Raises BabyError for a given setting that has no effect in combination with the others."""
    train, data = config.train, config.data
    of_equations = isinstance(data, EquationData)
    if "stride" in settings and train.stride != 1:
        what = f"stride {train.stride} has no effect"
        if of_equations:
            raise BabyError(f"{what} on equations, which are not cut out of a text: leave out --stride")
        if train.num_epochs is None:
            raise BabyError(f"{what} on windows at random positions: give --num-epochs too, or leave out --stride")
    if "min_lr" in settings and train.schedule == "constant":
        raise BabyError(
            "min_lr has no effect on a constant learning rate: choose --schedule cosine or linear, "
            "or leave out --min-lr"
        )
    if "decay_fraction" in settings and train.schedule != "linear":
        raise BabyError(
            f"decay_fraction has no effect on a {train.schedule} schedule: choose --schedule linear, "
            "or leave out --decay-fraction"
        )
    for name in ("muon_lr", "muon_momentum", "muon_iterations"):
        if name in settings and train.optimizer != "muon":
            flag = f"--{name.replace('_', '-')}"
            raise BabyError(f"{name} has no effect on adamw: choose --optimizer muon, or leave out {flag}")
    if "max_sum" in settings and isinstance(data, EquationData) and data.max_sum and "+" not in data.operators:
        raise BabyError("max_sum has no effect without sums: add + to --operators, or leave out --max-sum")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; a model config with its kind."""
    kind = {"kind": config.kind} if isinstance(config, ModelConfig) else {}
    return {**kind, **asdict(config)}


def from_dict(kind: type, values: Any, where: str) -> Any:
    """A config of `kind` from JSON values. Raises BabyError, naming `where`, if they do not fit it."""
    names = {field.name for field in fields(kind)}
    if not isinstance(values, dict) or not values.keys() <= names:
        odd = sorted(set(values) - names) if isinstance(values, dict) else values
        raise BabyError(
            f"{where}: {odd!r} is not part of a {kind.__name__}; the file is damaged or was not written by baby_xp"
        )
    try:
        return kind(**values)
    except (BabyError, TypeError, ValueError) as error:
        raise BabyError(f"{where}: {error}") from None


def model_from_dict(values: Any, where: str) -> ModelConfig:
    """The model config that to_dict wrote."""
    name = values.get("kind") if isinstance(values, dict) else None
    kind = MODELS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise BabyError(
            f"{where}: the kind of model must be one of {', '.join(MODELS)}; "
            f"the file is damaged or was not written by baby_xp"
        )
    return from_dict(kind, {name: value for name, value in values.items() if name != "kind"}, where)


def data_from_dict(values: Any, where: str) -> DataConfig:
    """The data config that to_dict wrote, without what else a run's config file says of its data."""
    if not isinstance(values, dict):
        raise BabyError(
            f"{where}: {values!r} is not the data of a run; the file is damaged or was not written by baby_xp"
        )
    kind = EquationData if "held_out" in values else DataConfig
    return from_dict(kind, {name: values[name] for name in values if name not in ("file", "sha256")}, where)
