"""The setup of a training: its config, and the backend, dataset and model made from it."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from baby_xp.arrays.backend import Backend
from baby_xp.compute import Compute
from baby_xp.config import RunConfig
from baby_xp.distributed.group import Group
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.resources import limits
from baby_xp.text import dataset
from baby_xp.text.corpus import Making
from baby_xp.text.dataset import EquationDataset, TextDataset
from baby_xp.text.tokenizer import Tokenizer
from baby_xp.training import optimizers
from baby_xp.training.alone import Alone, suitable_number
from baby_xp.training.workers import Workers


@dataclass(frozen=True)
class Setup:
    """A training that can start: `prepare` makes it for training, finetuning, resuming and estimating."""

    config: RunConfig
    """With the number of steps, even if the user gave epochs."""
    compute: Compute
    """As it was asked for."""
    backend: Backend
    dataset: TextDataset | EquationDataset
    model: Model
    workers: int
    """Processes that share a step, or a rank's part of it."""
    group: Group
    """The ranks that train together."""

    def processes(self) -> Alone | Workers:
        """The processes of this rank, or this one alone."""
        of_step = self.backend, self.model, self.config.train.batch_size
        if self.workers > 1:
            return Workers(*of_step, self.workers)
        return Alone(*of_step, self.group.cores() if self.group.size > 1 else None)


def prepare(
    config: RunConfig,
    compute: Compute,
    folder: Path | None,
    tokenizer: Tokenizer | Making | None = None,
    sha256: str | None = None,
    check_memory: bool = True,
    group: Group | None = None,
) -> Setup:
    """Load the backend, read the text and lay out the model.

    folder: where the ids of a text are kept; None: in memory. tokenizer, sha256: as for dataset.prepare.
    check_memory: refuse what certainly does not fit this machine, before any of it is made; a resumed run
    has fitted before. group: the ranks that train together.
    Raises BabyError if the config and the machine do not go together; no ids are then left behind.
    """
    limits.check_context(config)
    group = group or Group()
    backend = _at(compute, group).load(config.train.dtype)
    if group.size > 1 and backend.name != group.backend:
        raise BabyError(
            f"--distributed {group.kind} computes with the {group.backend} backend, not {backend.name}: "
            f"give --backend {group.backend}"
        )
    data = dataset.prepare(config.data, config.model, config.train, folder, tokenizer, sha256)
    with ExitStack() as undo:
        undo.callback(data.discard)
        model = Model(config.model, data.tokenizer.vocab_size)
        limits.check_size(model)
        optimizers.parts(model, config.train.optimizer)  # raises if the optimizer has nothing to do
        workers = number_of_workers(compute.workers, backend, model, config.train.batch_size, group)
        if check_memory:
            limits.check_training(config, model, backend, data.batches, workers)
        undo.pop_all()
    config = replace(config, train=replace(config.train, num_steps=data.num_steps))
    return Setup(config, compute, backend, data, model, workers, group)


def _at(compute: Compute, group: Group) -> Compute:
    """Where this rank computes, where that is left to us: with the backend and on the device of the group."""
    if group.size == 1:
        return compute
    backend = group.backend if compute.backend == "auto" else compute.backend
    return replace(compute, backend=backend, device=group.device or compute.device)


def number_of_workers(
    asked: int | None, backend: Backend, model: Model, batch_size: int, group: Group | None = None
) -> int:
    """Processes that share a step, or the part of it that a rank has: as many as asked for, or a suitable number.

    Raises BabyError if unable.
    """
    if asked is None:
        return suitable_number(backend, model, batch_size, group or Group())
    if asked > 1 and backend.name != "numpy":
        raise BabyError(f"workers are processes of the numpy backend; with {backend.name} leave out --workers")
    return min(asked, batch_size)
