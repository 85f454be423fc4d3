"""Why a run diverged: computes its last steps again and looks at every parameter's gradient."""

from dataclasses import dataclass

import numpy as np

from baby_xp.arrays.backend import Backend
from baby_xp.arrays.tree import Layout
from baby_xp.config import TrainConfig
from baby_xp.distributed.group import Group
from baby_xp.models import Model
from baby_xp.text.dataset import Dataset
from baby_xp.training import optimizers
from baby_xp.training.alone import Alone
from baby_xp.training.checkpoint import Checkpoint, state_on_device
from baby_xp.training.ranks import Ranks
from baby_xp.training.step import on_device
from baby_xp.training.workers import Workers


@dataclass(frozen=True)
class Finding:
    """The parameter whose gradient was largest, its norm, and the step, counted from 1.

    The norm is not finite where the gradients were the first to diverge.
    """

    parameter: str
    norm: float
    step: int


def largest_gradient(
    backend: Backend, model: Model, config: TrainConfig, dataset: Dataset, start: Checkpoint, last: int,
    own: Alone | Workers, group: Group,
) -> Finding | None:  # fmt: skip
    """The largest gradient in the last step with a finite loss; from `start` to `last`, the step that diverged.

    Computing the steps again gives the same numbers, so that a run need not store its past.
    """
    xp, finding = backend.xp, None
    ranks = Ranks(group, own, backend, model, config)
    compute, optimizer = ranks.gradients(), ranks.optimizer()
    state = state_on_device(backend, model, config, start)
    with np.errstate(all="ignore"):
        for step in range(start.step, last):
            batch = dataset.batches.batch(step)
            loss, gradients = compute(xp, model, state, on_device(backend, batch))
            ranks.gather(gradients)
            if not np.isfinite(backend.to_numpy(loss)).all():
                break
            norms = _norms(model.layout, backend.to_numpy(gradients))
            diverged = [path for path, norm in norms.items() if not np.isfinite(norm)]
            if len(diverged) == len(norms) and finding is not None:  # the previous step is more informative
                break
            parameter = diverged[0] if diverged else max(norms, key=lambda path: norms[path])
            finding = Finding(parameter, norms[parameter], step + 1)
            if diverged:
                break
            state, _ = optimizers.update(xp, state, gradients, config, optimizer, ranks.norm)
    return finding


def _norms(layout: Layout, gradients: np.ndarray) -> dict[str, float]:
    """Norm of each parameter's gradient, from the flat buffer (P,); in float64, where squares do not overflow."""
    return {
        path: float(np.linalg.norm(gradients[at].astype(np.float64))) for path, at in layout.slices.items()
    }
