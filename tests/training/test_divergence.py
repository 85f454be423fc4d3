"""Why a run diverged: the last steps are computed again, and the largest gradient is named."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import case_of

from baby_xp.config import GPTConfig, TrainConfig
from baby_xp.distributed import Group
from baby_xp.models import Model
from baby_xp.text.batches import RandomWindows
from baby_xp.training import checkpoint, optimizers
from baby_xp.training.alone import Alone
from baby_xp.training.divergence import largest_gradient

MODEL = Model(GPTConfig(n_ctx=4, n_emb=4, head_size=4, n_heads=2, n_layers=1, dropout=0.1), 11)
IDS = np.random.default_rng(0).integers(0, 11, 300)
CONFIG = TrainConfig(batch_size=3, num_steps=30, lr=1e-2, warmup_steps=2, dtype="float64")
SMALL = 1e-3
"""A gradient that is not the largest."""


def found(last: int, config: TrainConfig = CONFIG, own=None):
    """The finding in the steps from the first on, if step `last` is not finite."""
    dataset = SimpleNamespace(batches=RandomWindows(IDS, 4, config.step_size, 0))
    backend = case_of("numpy", config.dtype).backend
    start = checkpoint.first(MODEL, config)
    own = own or Alone(backend, MODEL, config.batch_size)
    return largest_gradient(backend, MODEL, config, dataset, start, last, own, Group())


class Scripted:
    """Workers that give losses and gradients as scripted, and note the sizes of the batches."""

    number = 1

    def __init__(self, *steps, dtype: str = "float64"):
        self.steps, self.dtype, self.sizes = iter(steps), dtype, []

    def loss_and_gradients(self, xp, model, state, batch, n_targets=None):
        loss, at, value = next(self.steps)
        self.sizes.append(len(batch.inputs))
        gradients = np.full(model.n_parameters, value if at == "all" else SMALL, self.dtype)
        if at != "all":
            gradients[sum(model.layout.sizes[: model.layout.paths.index(at)])] = value
        return np.array([loss], self.dtype), gradients

    def optimizer(self, config):
        return optimizers.of(MODEL, config)


GOOD = (3.0, "wte.weight", 5.0)
N = MODEL.layout.sizes[MODEL.layout.paths.index("wte.weight")]
NORM = np.sqrt(25 + (N - 1) * SMALL**2)


@pytest.mark.parametrize(
    ("steps", "last", "parameter", "step", "norm"),
    [
        ([GOOD, (np.nan, "ln_f.gain", 9.0)], 6, "wte.weight", 1, NORM),
        ([(3.0, "ln_f.gain", 9.0), GOOD], 2, "wte.weight", 2, NORM),
        # gradients that diverge first are the cause
        ([GOOD, (3.0, "ln_f.gain", np.inf), (3.0, "wte.weight", 7.0)], 6, "ln_f.gain", 2, np.inf),
        ([GOOD, (3.0, "ln_f.gain", np.nan), (3.0, "wte.weight", 7.0)], 6, "ln_f.gain", 2, np.nan),
        ([GOOD, (3.0, "ln_f.gain", -np.inf), (3.0, "wte.weight", 7.0)], 6, "ln_f.gain", 2, np.inf),
        # if all diverge at once, the previous step is more informative, if there is one
        ([GOOD, (3.0, "all", np.nan)], 2, "wte.weight", 1, NORM),
        ([(3.0, "all", np.nan)], 1, "wte.weight", 1, np.nan),
    ],
    ids=["loss NaN", "last step", "infinite", "NaN", "negative", "all at once", "all in the first step"],
)
def test_the_largest_gradient_of_the_last_good_step_is_named(steps, last, parameter, step, norm):
    finding = found(last, own=Scripted(*steps))
    assert (finding.parameter, finding.step) == (parameter, step)
    assert finding.norm == pytest.approx(norm, rel=1e-12, nan_ok=True)


def test_a_first_step_that_diverges_has_no_earlier_gradient():
    assert found(3, own=Scripted((np.nan, "ln_f.gain", 1.0))) is None
    assert found(0) is None


def test_gradients_are_accumulated_as_in_training_and_give_the_same_finding():
    workers = Scripted(*[(3.0, "all", SMALL)] * 8)
    found(2, replace(CONFIG, accumulate=4), workers)
    assert workers.sizes == [3] * 8
    whole = found(2, replace(CONFIG, batch_size=12))
    parts = found(2, replace(CONFIG, accumulate=4))
    assert (parts.parameter, parts.step) == (whole.parameter, whole.step) == (whole.parameter, 2)
    assert parts.norm == pytest.approx(whole.norm, rel=1e-10)


def test_a_gradient_whose_square_overflows_float32_has_a_norm():
    workers = Scripted((3.0, "ln_f.gain", 1e30), dtype="float32")
    finding = found(1, replace(CONFIG, dtype="float32"), workers)
    assert finding.parameter == "ln_f.gain"
    assert finding.norm == pytest.approx(1e30, rel=1e-6)
