"""What a run learns from: a tokenizer, batches to train on, and batches to be measured on."""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from baby_xp_data import catalog, equations, nursery

from baby_xp.config import DataConfig, EquationConfig, GPTConfig, ModelConfig, TrainConfig
from baby_xp.errors import BabyError
from baby_xp.text.batches import Batch, EpochWindows, PairBatches, RandomWindows, consecutive_windows
from baby_xp.text.corpus import Corpus, Making, check_length
from baby_xp.text.tokenizer import CharTokenizer, Tokenizer

NURSERY_CHARACTERS, NURSERY_SEED = 1_000_000, 0


class Batches(Protocol):
    """Batches by the number of the step alone, so that a run can go on where another stopped."""

    def batch(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class Task:
    """Everything that training asks of the data."""

    name: str
    tokenizer: Tokenizer
    batches: Batches
    num_steps: int
    validation: Callable[[], Iterator[Batch]]
    n_validation: int
    """Number of targets in all validation batches."""
    facts: dict[str, Any]
    """What a report tells of the data: numbers of tokens, hash, the exact entropy where it is known."""
    corpus: Corpus | None = None
    """The text, where there is one."""


def prepare(
    data: DataConfig,
    model: ModelConfig,
    train: TrainConfig,
    cache_folder: Path,
    tokenizer: Tokenizer | Making | None = None,
    sha256: str | None = None,
) -> Task:
    """Find the text, make ids of it and lay out its batches. tokenizer, sha256: as for `read_corpus`.

    Raises BabyError if the text cannot serve.
    """
    if isinstance(model, EquationConfig):
        return _equations(data, model, train)
    return _text(read_corpus(data, cache_folder, tokenizer, sha256), model, train)


def read_corpus(
    data: DataConfig,
    cache_folder: Path,
    tokenizer: Tokenizer | Making | None = None,
    sha256: str | None = None,
) -> Corpus:
    """The text that `--data` names, as ids: a built-in one, one of the catalog, or a file.

    tokenizer: that of an earlier run, or what makes one; None: one of the kind that `data` names. sha256: what
    the text must hash to, where it is known. Raises BabyError if there is no such text, or it is another one.
    """
    tokenizer = tokenizer or data.tokenizer
    if data.data == "nursery":
        text = nursery.generate(NURSERY_CHARACTERS, NURSERY_SEED)
        return Corpus.from_text(text, "nursery", tokenizer, sha256=sha256)
    if data.data == "equations":
        raise BabyError("equations are for the equation model: train equations, or give a text with --data")
    path = catalog.find(data.data) if data.data in catalog.TEXTS else Path(data.data)
    try:
        return Corpus.from_file(path, tokenizer, cache_folder, sha256)
    except BabyError as error:
        if data.data.isidentifier() and not os.path.exists(path):  # it was meant as a name, perhaps
            raise BabyError(f"{error}; names that are known: {', '.join(catalog.names())}") from None
        raise


def _text(corpus: Corpus, model: GPTConfig, train: TrainConfig) -> Task:
    check_length(corpus, model.n_ctx)
    if train.num_epochs is None:
        batches = RandomWindows(corpus.train, model.n_ctx, train.step_size, train.seed)
        num_steps = train.num_steps
    else:
        batches = EpochWindows(corpus.train, model.n_ctx, train.step_size, train.stride, train.seed)
        num_steps = train.num_steps or train.num_epochs * batches.steps_per_epoch
    facts = {
        **asdict(corpus.statistics),
        "vocabulary": corpus.tokenizer.vocab_size,
        "training tokens": len(corpus.train),
        "validation tokens": len(corpus.validation),
        "sha256": corpus.sha256,
    }
    if corpus.name == "nursery":
        facts["entropy, nats per character"] = nursery.entropy_per_character()

    def validation() -> Iterator[Batch]:
        return consecutive_windows(corpus.validation, model.n_ctx, train.batch_size)

    n_validation = len(corpus.validation) - 1
    return Task(corpus.name, corpus.tokenizer, batches, num_steps, validation, n_validation, facts, corpus)


def _equations(data: DataConfig, model: EquationConfig, train: TrainConfig) -> Task:
    if data.data != "equations":
        raise BabyError(f"the equation model learns equations, not {data.data!r}: leave out --data")
    contexts, targets = equations.training_pairs(model.max_sum, model.held_out)
    batches = PairBatches(contexts, targets, train.step_size, train.seed)
    held_out = PairBatches(*equations.held_out_pairs(model.max_sum, model.held_out))
    num_steps = train.num_steps or train.num_epochs * -(-len(targets) // train.step_size)
    facts = {"training contexts": len(targets), "held out": model.held_out, "largest sum": model.max_sum}
    tokenizer = CharTokenizer(tuple(equations.VOCABULARY))
    validation = held_out.batch(0)
    return Task(
        "equations", tokenizer, batches, num_steps, lambda: iter([validation]), len(validation.targets), facts
    )
