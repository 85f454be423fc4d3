"""What a run learns from: a tokenizer, batches to train on, and batches to be measured on."""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from baby_xp_data import catalog, equations, nursery

from baby_xp.config import DataConfig, EquationConfig, EquationData, GPTConfig, ModelConfig, TrainConfig
from baby_xp.errors import BabyError
from baby_xp.files import absolute, shown
from baby_xp.text.batches import Batch, EpochWindows, PairBatches, RandomWindows, consecutive_windows
from baby_xp.text.corpus import Corpus, Making, check_length, text_hash
from baby_xp.text.tokenizer import CharTokenizer, Tokenizer

NURSERY_CHARACTERS, NURSERY_SEED = 1_000_000, 0


class Batches(Protocol):
    """Batches by the number of the step alone, so that a run can go on where another stopped."""

    @property
    def batch_size(self) -> int:
        """Sequences in a step."""

    def batch(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class Dataset:
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
    file: str | None = None
    """The absolute path of the text, if it was named by a path."""

    @classmethod
    def empty(cls, name: str, tokenizer: Tokenizer) -> "Dataset":
        """Of a model that came without what it learned from."""
        return cls(name, tokenizer, None, 0, lambda: iter(()), 0, {})

    def check(self) -> None:
        """Raises BabyError if the ids on disk were changed since they were opened. Costs little."""
        if self.corpus is not None:
            self.corpus.check()

    def discard(self) -> None:
        """Remove the ids from the disk if they were not there before."""
        if self.corpus is not None:
            self.corpus.discard()


def prepare(
    data: DataConfig,
    model: ModelConfig,
    train: TrainConfig,
    cache_folder: Path | None,
    tokenizer: Tokenizer | Making | None = None,
    sha256: str | None = None,
) -> Dataset:
    """Find the text, make ids of it and lay out its batches. tokenizer, sha256: as for `read_corpus`.

    Raises BabyError if the text cannot serve.
    """
    if isinstance(model, EquationConfig) or isinstance(data, EquationData):
        return _equations(data, model, train)
    corpus = read_corpus(data, cache_folder, tokenizer, sha256)
    try:
        return _text(data.data, corpus, model, train)
    except BaseException:
        corpus.discard()
        raise


def of_run(data: DataConfig, file: str | None, sha256: str | None) -> DataConfig:
    """The settings of a run with the place where its text lies now, whatever the current folder is.

    file: where the run read it, None for a text that goes by a name; sha256: its hash. A text is looked for there,
    and then, for a folder that was moved as a whole, where its name leads from the current folder. Where there are
    both, the one with that hash is taken. Raises BabyError if there is neither.
    """
    if file is None or data.data in catalog.names():
        return data
    places = list(dict.fromkeys([file, absolute(data.data)]))
    there = [place for place in places if _may_be_there(place)]
    if not there:
        raise BabyError(f"the text of the run is no longer at {shown(file)}; name where it is now with --data")
    fitting = [place for place in there if len(there) == 1 or _hashes_to(place, sha256)]
    place = (fitting or there)[0]
    return data if place == absolute(data.data) else replace(data, data=place)


def _may_be_there(path: str) -> bool:
    """Whether there is such a file, or that cannot be found out: reading it tells why."""
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

    tokenizer: that of an earlier run, or what makes one; None: one of the kind that `data` names. sha256: what
    the text must hash to, where it is known. Raises BabyError if there is no such text, or it is another one.
    """
    tokenizer = tokenizer or data.tokenizer
    if data.data == "nursery":
        text = nursery.generate(NURSERY_CHARACTERS, NURSERY_SEED)
        return Corpus.from_text(text, "nursery", tokenizer, sha256=sha256)
    if data.data == "equations":
        raise BabyError("equations have presets of their own: train equations or equations-gpt")
    path = catalog.find(data.data) if data.data in catalog.TEXTS else Path(data.data)
    try:
        return Corpus.from_file(path, tokenizer, cache_folder, sha256)
    except BabyError as error:
        if data.data.isidentifier() and not os.path.exists(path):  # it was meant as a name, perhaps
            raise BabyError(f"{error}; names that are known: {', '.join(catalog.names())}") from None
        raise


def _text(name: str, corpus: Corpus, model: GPTConfig, train: TrainConfig) -> Dataset:
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
    if name == "nursery":
        facts["entropy, nats per character"] = nursery.entropy_per_character()

    def validation() -> Iterator[Batch]:
        return consecutive_windows(corpus.validation, model.n_ctx, train.batch_size)

    n_validation = len(corpus.validation) - 1
    file = None if name in catalog.names() or corpus.file is None else str(corpus.file)
    return Dataset(
        corpus.name, corpus.tokenizer, batches, num_steps, validation, n_validation, facts, corpus, file
    )


def _equations(data: DataConfig, model: ModelConfig, train: TrainConfig) -> Dataset:
    if not isinstance(data, EquationData):
        raise BabyError(f"the equation model learns equations, not {data.data!r}: leave out --data")
    of_table = {"digits": data.digits, "operators": data.operators}
    held_out = equations.chosen(data.held_out, train.seed, data.max_sum, **of_table)
    known = equations.equations(data.max_sum, held_out, **of_table)
    if not known:
        raise BabyError(f"{data.held_out} leaves no equation to train on: hold out fewer")
    if isinstance(model, EquationConfig):
        _check_context(model.n_ctx, data.digits)
        leave_out = set()
        if model.n_ctx < equations.longest(data.digits):
            leave_out = equations.undetermined(equations.equations(data.max_sum, (), **of_table), model.n_ctx)
        make = functools.partial(equations.pairs, leave_out=leave_out, n_ctx=model.n_ctx)
    else:
        make = functools.partial(equations.rows, n_ctx=model.n_ctx)
    pairs = make(known)
    batches = PairBatches(*pairs, train.step_size, train.seed)
    unseen = PairBatches(*make(equations.held_out_equations(data.max_sum, held_out, **of_table)))
    num_steps = train.num_steps or train.num_epochs * -(-len(pairs[1]) // train.step_size)
    facts = {
        "training equations": len(known), "training contexts": len(pairs[1]), "held out": data.held_out,
        "held-out equations": len(equations.cases(data.max_sum, held_out, **of_table)),
    }  # fmt: skip
    tokenizer = CharTokenizer(tuple(equations.vocabulary(data.operators)))
    whole = unseen.batch(0)

    def validation() -> Iterator[Batch]:
        for start in range(0, len(whole.samples), train.batch_size):
            yield Batch(*(part[start : start + train.batch_size] for part in whole))

    return Dataset("equations", tokenizer, batches, num_steps, validation, whole.targets.size, facts)


def _check_context(n_ctx: int, digits: int) -> None:
    """Raise BabyError unless the context holds a question such as "12+34="."""
    least, whole = 2 * digits + 2, equations.longest(digits)
    if n_ctx < least:
        raise BabyError(
            f"n_ctx {n_ctx} does not hold a question with operands of {digits} digit{'s' * (digits > 1)}: "
            f"{least} is the least, {whole} holds every equation whole"
        )
