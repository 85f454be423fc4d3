"""Named configurations, each with the reason for its numbers; and the settings that can be changed of one."""

from dataclasses import replace
from os import PathLike
from typing import Literal, TypedDict

from baby_xp import checks
from baby_xp.config import MODERN, DataConfig, EquationConfig, EquationData, GPTConfig, RunConfig, TrainConfig
from baby_xp.errors import BabyError


def _age(months: int, n_ctx: int, says: str) -> tuple[str, RunConfig]:
    # The Little Baby's ages are one model with a growing context. The rate is constant, without warm-up; betas and
    # weight decay are those of its optimizer. Clipping is added here: 16 layers can diverge without it.
    return (
        f"The Little Baby at {months} months: {says}",
        RunConfig(
            f"{months}-months",
            GPTConfig(n_ctx=n_ctx, n_emb=128, head_size=128, n_heads=16, n_layers=16, dropout=0.1),
            TrainConfig(
                batch_size=16, num_epochs=1, lr=1e-3, base_batch_size=16, schedule="constant", warmup_steps=0,
                beta2=0.999, weight_decay=0.01, clip=1.0, eval_every=1000,
            ),
            DataConfig(data="shakespeare"),
        ),
    )  # fmt: skip


_ALL: tuple[tuple[str, RunConfig], ...] = (
    # Small enough to train in half a minute on a laptop, large enough to learn words: the built-in text needs
    # no download, and its exact entropy is a lower bound for the loss. 512 tokens in batches of 4 came to 0.350,
    # but took a quarter longer; with both, most stories end with another name than they begin with.
    (
        "nursery stories, learned in half a minute on two cores",
        RunConfig(
            "baby",
            replace(GPTConfig(n_ctx=256, n_emb=64, head_size=64, n_heads=2, n_layers=2, dropout=0.0), **MODERN),
            TrainConfig(
                batch_size=8, num_steps=1000, lr=6e-3, schedule="linear", min_lr=0.0, warmup_steps=10,
                optimizer="muon", muon_lr=0.03, weight_decay=0.0, clip=0.0, eval_every=100,
            ),
            DataConfig(data="nursery"),
        ),
    ),
    # The seed's model on the same text, as a reference: what `baby` was before.
    (
        "nursery stories with The Little Baby's model and AdamW: a reference for baby",
        RunConfig(
            "classic",
            GPTConfig(n_ctx=64, n_emb=64, head_size=64, n_heads=4, n_layers=3, dropout=0.0),
            TrainConfig(
                batch_size=16, num_steps=2500, lr=3e-3, min_lr=3e-4, warmup_steps=100, eval_every=250
            ),
            DataConfig(data="nursery"),
        ),
    ),
    # The embedding must have one number: then the digits lie on a line, and what the model learns from
    # some sums also holds for the others. With 16 numbers it fits as well but does not generalise.
    # 128 neurons without decay answered every answerable held-out sum, with all 10 seeds; with 64, or
    # with decay, one seed in five missed some. docs/equations.md has the figures.
    (
        "babyLLM: sums of two one-digit numbers; answers 4+4 without having seen it",
        RunConfig(
            "equations",
            EquationConfig(n_ctx=4, n_emb=1, n_hidden=128, activation="tanh", std=0.1),
            TrainConfig(
                batch_size=1024,
                num_steps=1500,
                lr=1e-2,
                min_lr=0.0,
                warmup_steps=100,
                weight_decay=0.0,
                clip=0.0,
                eval_every=250,
            ),
            EquationData(),
        ),
    ),
    # The same network with a context that holds a whole equation, so that both digits of a sum follow
    # from what it sees.
    (
        "sums of two one-digit numbers up to 9+9, the whole equation in the context",
        RunConfig(
            "equations-table",
            EquationConfig(n_ctx=6, n_emb=1, n_hidden=128, activation="tanh", std=0.1),
            TrainConfig(
                batch_size=1024, num_steps=1500, lr=1e-2, min_lr=0.0, warmup_steps=100, weight_decay=0.1, clip=0.0,
                eval_every=250,
            ),
            EquationData(max_sum=0),
        ),
    ),
    # Two digits need more than a line: to carry, the model must distinguish a digit from its neighbours.
    (
        "sums and differences of operands up to 99, a tenth of them held out",
        RunConfig(
            "equations-2",
            EquationConfig(n_ctx=9, n_emb=8, n_hidden=512, activation="gelu", std=0.03),
            TrainConfig(
                batch_size=1024, num_steps=10000, lr=3e-3, min_lr=0.0, warmup_steps=200, weight_decay=0.1,
                clip=1.0, eval_every=1000,
            ),
            EquationData(digits=2, operators="+-", max_sum=0, held_out="10%"),
        ),
    ),
    (
        "the same sums and differences for a GPT",
        RunConfig(
            "equations-gpt",
            GPTConfig(n_ctx=9, n_emb=64, head_size=64, n_heads=4, n_layers=2, dropout=0.0),
            TrainConfig(
                batch_size=512, num_steps=3000, lr=3e-3, min_lr=0.0, warmup_steps=200, weight_decay=0.1, clip=1.0,
                eval_every=500,
            ),
            EquationData(digits=2, operators="+-", max_sum=0, held_out="10%"),
        ),
    ),
    # nanoGPT's Shakespeare run for a laptop: its README reports a validation loss of 1.88.
    (
        "nanoGPT's Shakespeare run for a laptop",
        RunConfig(
            "nanogpt-cpu",
            GPTConfig(n_ctx=64, n_emb=128, head_size=128, n_heads=4, n_layers=4, dropout=0.0),
            TrainConfig(
                batch_size=12, num_steps=2000, lr=1e-3, min_lr=1e-4, warmup_steps=100, eval_every=250
            ),
            DataConfig(data="shakespeare"),
        ),
    ),
    # nanoGPT's Shakespeare run for a GPU: its README reports a best validation loss of 1.4697.
    (
        "nanoGPT's Shakespeare run for a GPU",
        RunConfig(
            "nanogpt-gpu",
            GPTConfig(n_ctx=256, n_emb=384, head_size=384, n_heads=6, n_layers=6, dropout=0.2),
            TrainConfig(
                batch_size=64, num_steps=5000, lr=1e-3, min_lr=1e-4, warmup_steps=100, eval_every=250
            ),
            DataConfig(data="shakespeare"),
        ),
    ),
    # The switches of a modern GPT, with smear, Muon, a longer context and a smaller model: the loss of nanogpt-cpu
    # in a fraction of its time. The rates, the momenta and the warm-up suit a training as short as this one. Four
    # heads were worse; so were four iterations of Muon in place of five. docs/presets.md tells how it was tuned.
    (
        "Shakespeare with a modern GPT and Muon: the loss of nanogpt-cpu in seconds",
        RunConfig(
            "shakespeare",
            replace(
                GPTConfig(n_ctx=128, n_emb=64, head_size=64, n_heads=2, n_layers=3, dropout=0.0),
                **{**MODERN, "smear": True},
            ),
            TrainConfig(
                batch_size=12, num_steps=250, lr=1e-2, schedule="linear", min_lr=0.0, warmup_steps=5,
                optimizer="muon", muon_lr=0.035, muon_momentum=0.87, beta1=0.8, weight_decay=0.0, clip=0.0,
                eval_every=50,
            ),
            DataConfig(data="shakespeare"),
        ),
    ),
    # As much as two cores learn in 20 minutes. Untuned, except that the steps are few enough to overfit little.
    (
        "Shakespeare with a larger modern GPT: about 20 minutes on two cores",
        RunConfig(
            "shakespeare-20",
            replace(GPTConfig(n_ctx=256, n_emb=256, head_size=256, n_heads=4, n_layers=6, dropout=0.1), **MODERN),
            TrainConfig(
                batch_size=16, num_steps=900, lr=3e-3, schedule="linear", decay_fraction=0.7, min_lr=0.0,
                warmup_steps=30, optimizer="muon", weight_decay=0.1, clip=0.0, eval_every=100,
            ),
            DataConfig(data="shakespeare"),
        ),
    ),
    # The lowest loss found in an hour: wider, with a little more dropout. Untuned.
    (
        "Shakespeare with a wider modern GPT: less than an hour on two cores",
        RunConfig(
            "shakespeare-60",
            replace(GPTConfig(n_ctx=256, n_emb=384, head_size=384, n_heads=6, n_layers=6, dropout=0.15), **MODERN),
            TrainConfig(
                batch_size=16, num_steps=1250, lr=3e-3, schedule="linear", decay_fraction=0.7, min_lr=0.0,
                warmup_steps=30, optimizer="muon", weight_decay=0.1, clip=0.0, eval_every=125,
            ),
            DataConfig(data="shakespeare"),
        ),
    ),
    _age(3, 8, "coos and gurgles"),
    _age(6, 16, "loud, random cries"),
    _age(12, 32, "joyful noise with hints of intention"),
    _age(24, 64, "words arrive"),
    _age(48, 128, "stories and opinions"),
)
PRESETS = {config.name: config for _, config in _ALL}
ABOUT = {config.name: about for about, config in _ALL}
"""What each preset is, in a few words."""


TOKENS = {"nursery": 50, "shakespeare": 65}
VOCABULARIES = {
    name: len(config.data.table.vocabulary) if isinstance(config.data, EquationData) else TOKENS[config.data.data]
    for name, config in PRESETS.items()
}
"""Different tokens in the text of each preset."""
MEASURED_ON = (
    "on two cores of an AMD EPYC Milan (equations-2, equations-gpt and shakespeare: of one with AVX-512; baby, "
    "shakespeare-20 and -60: of an Intel Xeon with AVX-512); hours are projected"
)
TIMES = {
    "baby": "23 s", "classic": "53 s", "equations": "1 s", "equations-table": "1 s", "equations-2": "24 s",
    "equations-gpt": "55 s",
    "nanogpt-cpu": "1.4 min", "shakespeare": "3 s", "shakespeare-20": "24 min", "shakespeare-60": "50 min",
    "3-months": "1.1 h", "6-months": "1.5 h", "12-months": "2.7 h", "24-months": "4.6 h", "48-months": "10.7 h",
}  # fmt: skip
"""How long the training of each takes there; docs/presets.md has the losses too."""


def preset(name: str | RunConfig) -> RunConfig:
    """The preset of that name; a RunConfig is returned unchanged. Raises BabyError for an unknown name."""
    if isinstance(name, RunConfig):
        return name
    if checks.text("preset", name) not in PRESETS:
        raise BabyError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


class ResumeSettings(TypedDict, total=False):
    """The settings that can be changed when a run is resumed: fields of TrainConfig, as keyword arguments."""

    num_steps: int | None
    lr: float
    muon_lr: float
    min_lr: float
    clip: float
    eval_every: int
    sample_tokens: int
    patience: int
    max_minutes: float
    checkpoint_every: int
    checkpoint_minutes: float


class FinetuneSettings(ResumeSettings, total=False):
    """The settings that can be changed when a run is finetuned: fields of TrainConfig, and dropout."""

    batch_size: int
    accumulate: int
    num_epochs: int | None
    stride: int
    base_batch_size: int | None
    schedule: Literal["constant", "cosine", "linear"]
    decay_fraction: float
    warmup_steps: int
    optimizer: Literal["adamw", "muon"]
    muon_momentum: float
    muon_iterations: int
    beta1: float
    beta2: float
    weight_decay: float
    seed: int
    dtype: Literal["float32", "float64"]
    dropout: float
    tokenizer: Literal["char", "byte"]


class Settings(FinetuneSettings, total=False):
    """What may be changed of a preset: all fields of its configs."""

    n_ctx: int
    n_emb: int
    head_size: int
    n_heads: int
    n_layers: int
    c_sequence: Literal["pre", "post"]
    c_attention: Literal["mha", "moh"]
    c_network: Literal["mlp", "moe"]
    c_model: Literal["classic", "modern"] | None
    positions: Literal["learned", "rotary"]
    norm: Literal["layernorm", "rmsnorm", "rmsnorm-gain"]
    smear: bool
    embedding_norm: bool
    qk_norm: bool
    activation: Literal["gelu", "relu2", "swiglu", "tanh"]
    gelu: Literal["tanh", "erf"]
    qkv_bias: bool
    linear_bias: bool
    head_bias: bool
    tied_head: bool
    zero_init: bool
    logit_cap: float
    n_hidden: int
    std: float
    data: str | PathLike[str]
    digits: int
    operators: Literal["+", "-", "+-"]
    max_sum: int
    held_out: str
