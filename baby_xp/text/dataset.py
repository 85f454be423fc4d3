"""Datasets, texts or equations: the tokenizer, batches and validation part that a run trains on."""

import codecs
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from baby_xp_data import catalog, equation_table, nursery
from baby_xp_data.equation_table import EquationTable

from baby_xp.config import DataConfig, EquationConfig, EquationData, GPTConfig, ModelConfig, TrainConfig
from baby_xp.errors import BabyError
from baby_xp.files import absolute, shown
from baby_xp.models import Model
from baby_xp.text import text_metrics
from baby_xp.text.answers import answers
from baby_xp.text.batches import Batch, EpochWindows, PairBatches, RandomWindows, consecutive_windows
from baby_xp.text.corpus import Corpus, Making, check_length, text_hash
from baby_xp.text.tokenizer import CharTokenizer, Tokenizer

NURSERY_CHARACTERS, NURSERY_SEED = 1_000_000, 0
SAMPLE_ANSWERS = 6
"""Answers to held-out equations in a sample, at most."""
CHUNK = 1 << 16
"""Ids that are decoded at a time."""


class Batches(Protocol):
    """Batches as a function of the step only, so that a resumed run continues exactly."""

    @property
    def batch_size(self) -> int:
        """Sequences in a step."""

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""


class Trained(Protocol):
    """The parts of a trained model that a dataset uses: see inference.trained_model.TrainedModel."""

    @property
    def model(self) -> Model: ...

    @property
    def params(self) -> np.ndarray: ...

    def stream(self, *, num_tokens: int, seed: int) -> Iterator[str]: ...

    def ask(self, question: str, table: EquationTable) -> str: ...


@dataclass(frozen=True)
class Dataset:
    """The interface of the data for training and evaluation."""

    name: str
    tokenizer: Tokenizer
    batches: Batches
    num_steps: int
    validation: Callable[[], Iterator[Batch]]
    n_validation: int
    """Number of targets in all validation batches."""
    facts: dict[str, Any]
    """For the report: numbers of tokens, hash and so on."""
    file: str | None = None
    """The absolute path of the text, if it was named by a path."""
    entropy: float | None = None
    """Exact entropy in nats per character, if it is known: no model can have a lower expected loss."""

    def check(self) -> None:
        """Raises BabyError if the data on disk changed since it was opened. Costs little."""

    def discard(self) -> None:
        """Remove the files that opening the data wrote."""

    def sample(self, trained: Trained, seed: int, num_tokens: int) -> Iterator[str]:
        """A text that a trained model generates, piece by piece."""
        raise NotImplementedError

    def score(self, trained: Trained, loss: float, num_tokens: int, seed: int) -> dict[str, Any]:
        """Metrics of a trained model besides its validation loss, by name: see evaluate.Evaluation.

        loss is in nats per token. num_tokens are generated, with `seed`, where the data is a text.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TextDataset(Dataset):
    """Windows of a text."""

    batches: RandomWindows | EpochWindows
    corpus: Corpus

    def check(self) -> None:
        """Raises BabyError if the ids on disk changed since they were opened."""
        self.corpus.check()

    def discard(self) -> None:
        """Remove the file of the ids if opening the text wrote it."""
        self.corpus.discard()

    def sample(self, trained: Trained, seed: int, num_tokens: int) -> Iterator[str]:
        """What a trained model generates without a prompt."""
        return trained.stream(num_tokens=num_tokens, seed=seed)

    def score(self, trained: Trained, loss: float, num_tokens: int, seed: int) -> dict[str, Any]:
        """Bits per character, and the generated tokens compared with the training part."""
        train, validation = self.corpus.train, self.corpus.validation
        per_character = len(validation) / max(1, sum(map(len, self._decoded(validation))))
        text = "".join(self.sample(trained, seed, num_tokens))
        return {
            "bits_per_character": loss * per_character / math.log(2),
            "num_tokens": num_tokens,
            "known_words": text_metrics.known_words(text, self._decoded(train)),
            "copied_ngrams": text_metrics.copied_ngrams(text, self._decoded(train)),
        }

    def _decoded(self, ids: np.ndarray) -> Iterator[str]:
        """The text of ids (n,), in chunks."""
        decoder, is_bytes = codecs.getincrementaldecoder("utf-8")("replace"), self.tokenizer.kind == "byte"
        for first in range(0, len(ids), CHUNK):
            chunk = ids[first : first + CHUNK]
            yield decoder.decode(chunk.astype(np.uint8).tobytes()) if is_bytes else self.tokenizer.decode(chunk)


@dataclass(frozen=True, kw_only=True)
class EquationDataset(Dataset):
    """Equations of a table, some of them held out."""

    batches: PairBatches
    table: EquationTable
    held_out: list[str]
    """The cases that training never sees, nor their mirrors."""

    def sample(self, trained: Trained, seed: int, num_tokens: int) -> Iterator[str]:
        """A trained model's answers to some of the held-out equations."""
        some = self.held_out[:: -(-len(self.held_out) // SAMPLE_ANSWERS)]
        return iter([", ".join(trained.ask(f"{case}=", self.table) for case in some)])

    def score(self, trained: Trained, loss: float, num_tokens: int, seed: int) -> dict[str, Any]:
        """The share of held-out equations that a trained model answers correctly."""
        asked = self.table.held_out_equations(self.held_out)
        weights = trained.model.layout.unpack(np, trained.params)
        return {"answered": float(np.mean(answers(weights, asked, trained.model.config, self.table)[0]))}


def prepare(
    data: DataConfig,
    model: ModelConfig,
    train: TrainConfig,
    cache_folder: Path | None,
    tokenizer: Tokenizer | Making | None = None,
    sha256: str | None = None,
) -> TextDataset | EquationDataset:
    """Find the text, encode it and lay out its batches. tokenizer, sha256: as for `read_corpus`.

    Raises BabyError if the text cannot be used.
    """
    if isinstance(data, EquationData):
        return prepare_equations(data, model, train)
    if isinstance(model, EquationConfig):
        raise BabyError(f"the equation model learns equations, not {data.data!r}: leave out --data")
    corpus = read_corpus(data, cache_folder, tokenizer, sha256)
    try:
        return _text(data.data, corpus, model, train)
    except BaseException:
        corpus.discard()
        raise


def of_run(data: DataConfig, file: str | None, sha256: str | None) -> DataConfig:
    """The settings of a run with the current path of its text, whatever the current folder is.

    file: the path where the run read it, None for a text that has a name; sha256: its hash. A text is looked for
    there and then, as a folder may have been moved as a whole, where its name leads from the current folder. If
    both exist, the one with that hash is taken. Raises BabyError if neither does.
    """
    if file is None or data.data in catalog.names():
        return data
    paths = list(dict.fromkeys([file, absolute(data.data)]))
    found = [path for path in paths if _may_exist(path)]
    if not found:
        raise BabyError(f"the text of the run is no longer at {shown(file)}; give its new path with --data")
    fitting = [path for path in found if len(found) == 1 or _hashes_to(path, sha256)]
    path = (fitting or found)[0]
    return data if path == absolute(data.data) else replace(data, data=path)


def _may_exist(path: str) -> bool:
    """Whether there is such a file; also true if that is unknown: reading it then says why."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def _hashes_to(path: str, sha256: str | None) -> bool:
    try:
        return text_hash(path) == sha256
    except BabyError:
        return False


def read_corpus(
    data: DataConfig,
    cache_folder: Path | None,
    tokenizer: Tokenizer | Making | None = None,
    sha256: str | None = None,
) -> Corpus:
    """The text that `--data` names, as ids: a built-in one, one of the catalog, or a file.

    tokenizer: that of an earlier run, or what makes one; None: one of the kind that `data` names. sha256: the
    hash that the text must have, if it is known. Raises BabyError if there is no such text, or it is another one.
    """
    known = tokenizer or data.tokenizer
    if data.data == "nursery":
        text = nursery.generate(NURSERY_CHARACTERS, NURSERY_SEED)
        return Corpus.from_text(text, "nursery", known, sha256=sha256)
    if data.data == "equations":
        raise BabyError("equations have their own presets: train equations or equations-gpt")
    path = catalog.find(data.data) if data.data in catalog.TEXTS else Path(data.data)
    try:
        return Corpus.from_file(path, known, cache_folder, sha256)
    except BabyError as error:
        if data.data.isidentifier() and not os.path.exists(path):  # perhaps it was meant as a name
            raise BabyError(f"{error}; known names: {', '.join(catalog.names())}") from None
        raise


def _text(name: str, corpus: Corpus, model: GPTConfig, train: TrainConfig) -> TextDataset:
    check_length(corpus, model.n_ctx)
    batches: RandomWindows | EpochWindows
    if train.num_epochs is None:
        batches = RandomWindows(corpus.train, model.n_ctx, train.step_size, train.seed)
        num_steps = train.total_steps(0)
    else:
        batches = EpochWindows(corpus.train, model.n_ctx, train.step_size, train.stride, train.seed)
        num_steps = train.total_steps(batches.steps_per_epoch)
    facts = {
        **asdict(corpus.statistics),
        "vocabulary": corpus.tokenizer.vocab_size,
        "training tokens": len(corpus.train),
        "validation tokens": len(corpus.validation),
        "sha256": corpus.sha256,
    }

    def validation() -> Iterator[Batch]:
        return consecutive_windows(corpus.validation, model.n_ctx, train.batch_size)

    return TextDataset(
        name=corpus.name,
        tokenizer=corpus.tokenizer,
        batches=batches,
        num_steps=num_steps,
        validation=validation,
        n_validation=len(corpus.validation) - 1,
        facts=facts,
        file=None if name in catalog.names() or corpus.file is None else str(corpus.file),
        entropy=nursery.entropy_per_character() if name == "nursery" else None,
        corpus=corpus,
    )


def prepare_equations(data: EquationData, model: ModelConfig, train: TrainConfig) -> EquationDataset:
    """Write out the equations of a table and lay out their batches. Raises BabyError if they cannot be used."""
    table = data.table
    held_out = table.choose(data.held_out, train.seed)
    known, unseen = table.equations(held_out), table.held_out_equations(held_out)
    if not known:
        raise BabyError(f"{data.held_out} leaves no equation to train on: hold out fewer")
    if isinstance(model, EquationConfig):
        _check_context(model.n_ctx, table)
        leave_out = table.undetermined(model.n_ctx)
        make = functools.partial(equation_table.pairs, leave_out=leave_out, n_ctx=model.n_ctx)
    else:
        make = functools.partial(equation_table.rows, n_ctx=model.n_ctx)
    inputs, targets = make(known)
    whole = PairBatches(*make(unseen)).batch(0)
    facts = {
        "training equations": len(known), "training contexts": len(targets), "held out": data.held_out,
        "held-out equations": len(unseen),
    }  # fmt: skip

    def validation() -> Iterator[Batch]:
        for start in range(0, len(whole.samples), train.batch_size):
            yield Batch(*(part[start : start + train.batch_size] for part in whole))

    return EquationDataset(
        name="equations",
        tokenizer=CharTokenizer(tuple(table.vocabulary)),
        batches=PairBatches(inputs, targets, train.step_size, train.seed),
        num_steps=train.total_steps(-(-len(targets) // train.step_size)),
        validation=validation,
        n_validation=whole.targets.size,
        facts=facts,
        table=table,
        held_out=held_out,
    )


def _check_context(n_ctx: int, table: EquationTable) -> None:
    """Raises BabyError unless the context holds a question such as "12+34="."""
    digits, least = table.digits, 2 * table.digits + 2
    if n_ctx < least:
        raise BabyError(
            f"n_ctx {n_ctx} does not hold a question with operands of {digits} digit{'s' * (digits > 1)}: "
            f"the minimum is {least}, and {table.longest} holds every equation as a whole"
        )
