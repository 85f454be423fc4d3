"""Every gradient of a real model on a real batch, compared with finite differences of its loss.

A gradient g says how steeply the loss L rises: along a direction d of length 1, by g . d. The loss itself gives
this slope without any formula for a derivative. With D(h) = (L(w + h d) - L(w - h d)) / 2h, the central
difference, whose error falls as h^2,

    slope = (4 D(h) - D(2h)) / 3

has an error that falls as h^4 (Richardson's extrapolation).

The step h is STEP, 2e-4, in float64. A longer one is less accurate where the loss curves strongly: an embedding's
numbers are about 0.02, and the error of the formula grows with (h / 0.02)^4. With a shorter one, rounding shows:
it changes a loss by about 1e-16 and a slope by about 1e-16 / h = 1e-12. An error is relative to the slope, to the
root mean square of the array's gradient, or to FLOOR, 1e-5, whichever is largest: much smaller slopes are lost in
rounding. Over all arrays of trained and untrained runs, the worst error lay between 1e-10 and 2e-7 with The Little
Baby's switches, and at 4e-7 with the modern ones, as the curvature of ReLU squared jumps at zero. TOLERANCE, 1e-5,
is far above these and far below the effect of a fault in a formula.

For each parameter array, d is first a few random directions, then single elements: half of them those with the
largest gradients, the other half drawn at random. A fault in few elements shows in the latter, a fault in all of
them in the former. If the run has dropout, all losses use the same mask, as it is a hash of the step.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from baby_xp import checks, layout
from baby_xp.arrays import registry
from baby_xp.layers import cross_entropy
from baby_xp.models import Model
from baby_xp.resources import limits
from baby_xp.text.batches import Batch, EpochWindows, PairBatches, RandomWindows
from baby_xp.training.step import loss_and_gradients, step_noise

if TYPE_CHECKING:
    from baby_xp.inference.trained_model import TrainedModel

STEP, TOLERANCE, FLOOR = 2e-4, 1e-5, 1e-5


@dataclass(frozen=True)
class GradientCheck:
    """One parameter array: the largest relative errors of its gradient against finite differences."""

    name: str
    """Its path, such as blocks.0.attention.qkv.weight."""
    shape: tuple[int, ...]
    gradient: float
    """Length (Euclidean norm) of the gradient."""
    directions: float
    """Along random directions, backward with the plain functions."""
    elements: float
    """At single elements, likewise."""
    fast: float
    """Along both, backward with NumPy's fast kernels."""

    @property
    def worst(self) -> float:
        """The largest of the three; NaN if one is."""
        return float(np.max([self.directions, self.elements, self.fast]))

    @property
    def agrees(self) -> bool:
        """Whether the gradient agrees with the loss within TOLERANCE."""
        return self.worst < TOLERANCE  # NaN is not


def check(
    trained: "TrainedModel",
    batches: RandomWindows | EpochWindows | PairBatches,
    tokens: int,
    batch: int,
    seed: int,
    elements: int,
    directions: int,
) -> list[GradientCheck]:
    """Check each parameter array on a batch of the data of `batches`; Run.check has the details."""
    tokens, batch = checks.whole("tokens", tokens), checks.whole("batch", batch)
    seed, elements = checks.whole("seed", seed, least=0), checks.whole("elements", elements, least=0)
    directions, model = checks.whole("directions", directions), trained.model
    host, parts = _batch(model, batches, tokens, batch, seed), model.layout
    ends = itertools.accumulate(parts.sizes)
    with threadpool_limits(1):  # threads slow down products this small
        slopes = Slopes(model, trained.params.astype(np.float64), host, seed)
        gradients = slopes.gradients()
        return [
            slopes.compared(path, shape, slice(end - size, end), gradients, seed, elements, directions)
            for path, shape, size, end in zip(parts.paths, parts.shapes, parts.sizes, ends, strict=True)
        ]


class Slopes:
    """The mean loss of one batch as a function of the parameters (P,), in NumPy and float64."""

    def __init__(self, model: Model, flat: np.ndarray, host: Batch, seed: int):
        backend = registry.load("numpy", None, "float64")
        self.model, self.flat, self.fast = model, flat, backend.xp
        self.moving = flat.copy()
        self.xp = registry.load("numpy", None, "float64", kernels="plain").xp
        self.batch = Batch(*(backend.asarray(part) for part in host))
        at = backend.integers([seed]), backend.integers([0])
        self.noise = step_noise(self.xp, model, *at, self.batch)

    def loss(self, flat: np.ndarray) -> float:
        """Forward only, with the plain functions."""
        p = self.model.layout.unpack(np, flat)
        logits, _ = self.model.forward(self.xp, p, self.batch.inputs, self.noise)
        return float(np.mean(cross_entropy.forward(self.xp, {}, logits, self.batch.targets.reshape(-1))[0]))

    def gradients(self) -> list[np.ndarray]:
        """The gradients of the backward pass (P,): with the plain functions, and with the fast kernels."""
        return [
            self.model.layout.pack(np, loss_and_gradients(xp, self.model, self.flat, self.batch, self.noise)[1])
            for xp in (self.xp, self.fast)
        ]

    def along(self, place: slice, direction: np.ndarray) -> float:
        """The slope of the loss along a direction in one parameter's part of the buffer, from differences only."""

        def moved(h: float) -> float:
            self.moving[place] = self.flat[place] + h * direction
            return self.loss(self.moving)

        near, far = ((moved(h) - moved(-h)) / (2 * h) for h in (STEP, 2 * STEP))
        self.moving[place] = self.flat[place]
        return (4 * near - far) / 3

    def compared(
        self, path: str, shape: tuple[int, ...], place: slice, gradients: list[np.ndarray], seed: int,
        elements: int, directions: int,
    ) -> GradientCheck:  # fmt: skip
        """Compare one parameter's part of both gradients with differences."""
        plain, fast = (gradient[place] for gradient in gradients)
        rng = np.random.default_rng([seed, place.start])
        least = max(FLOOR, float(np.sqrt(np.mean(plain * plain))))
        errors: list[list[float]] = [[], [], []]
        with np.errstate(all="ignore"):  # a NaN shows up in the result
            for i, direction in enumerate(chosen_directions(rng, plain, elements, directions)):
                slope = self.along(place, direction)
                errors[0 if i < directions else 1].append(_relative(float(plain @ direction), slope, least))
                errors[2].append(_relative(float(fast @ direction), slope, least))
            worst = [float(np.max(one, initial=0)) for one in errors]
        return GradientCheck(path, shape, float(np.linalg.norm(plain)), *worst)


def chosen_directions(
    rng: np.random.Generator, gradient: np.ndarray, elements: int, directions: int
) -> Iterator[np.ndarray]:
    """Directions of length 1: random ones, then single elements."""
    for _ in range(directions):
        direction = rng.normal(0, 1, gradient.shape)
        yield direction / np.linalg.norm(direction)
    steepest = np.argsort(-np.abs(gradient), kind="stable")[: (elements + 1) // 2]
    others = np.setdiff1d(np.arange(gradient.size), steepest)
    drawn = rng.choice(others, min(elements - len(steepest), others.size), replace=False)
    for element in [*steepest, *drawn]:
        direction = np.zeros_like(gradient)
        direction[element] = 1
        yield direction


def _relative(claimed: float, slope: float, least: float) -> float:
    return abs(claimed - slope) / max(abs(claimed), abs(slope), least)


def _batch(
    model: Model, batches: RandomWindows | EpochWindows | PairBatches, tokens: int, batch: int, seed: int
) -> Batch:
    """A batch of the training text, or of the equations."""
    n_ctx = model.config.n_ctx
    if isinstance(batches, PairBatches):  # enough rows for this many targets
        whole = batches.batch(0)
        number = batch * tokens if whole.targets.ndim == 1 else batch
        rows = np.random.default_rng(seed).permutation(len(whole.samples))[:number]
        limits.check_batch(model, len(rows), n_ctx)
        return Batch(whole.inputs[rows], whole.targets[rows], np.arange(len(rows), dtype=np.int32))
    tokens = min(tokens, n_ctx)
    limits.check_batch(model, batch, tokens)
    return RandomWindows(batches.ids, tokens, batch, seed).batch(0)


# as text --------------------------------------------------------------------------------------------------


def lines(rows: list[GradientCheck]) -> list[str]:
    """The rows as a table for people, layer by layer, with the summary at the end."""
    layers = [row.name.rpartition(".")[0] for row in rows]
    width = max(12, *map(len, layers))
    cells: list[tuple[str, ...]] = [("", "shape", "gradient", "directions", "elements", "fast", "")]
    for row, layer, before in zip(rows, layers, [None, *layers], strict=False):
        if layer != before:
            cells.append((layer, *[""] * 6))
        figures = [f"{one:.1e}" for one in (row.gradient, row.directions, row.elements, row.fast)]
        shape, verdict = " x ".join(map(str, row.shape)), "agrees" if row.agrees else "DISAGREES"
        cells.append((f"  {row.name.rpartition('.')[2]}", shape, *figures, verdict))
    form = f"{{:<{width}}}  {{:<13}} {{:>9}}  {{:>10}}  {{:>9}}  {{:>9}}  {{}}"
    return [*layout.columns(form, cells), "", summary(rows)]


def summary(rows: list[GradientCheck]) -> str:
    """One line: how many arrays, the worst of them, and whether all agree."""
    worst = max(rows, key=lambda row: np.inf if np.isnan(row.worst) else row.worst)
    wrong = [row.name for row in rows if not row.agrees]
    verdict = f"{len(wrong)} disagree{'s' * (len(wrong) == 1)}, {', '.join(wrong)}" if wrong else "all agree"
    return f"{len(rows)} arrays, worst relative error {worst.worst:.1e} at {worst.name}: {verdict}"


def about(model: Model) -> list[str]:
    """An introduction to the table."""
    dropout = f", with its dropout of {model.config.dropout}" if model.config.dropout else ""
    return [
        "The gradients of the backward pass, in float64, compared with finite differences of the loss over steps",
        f"of {STEP:g} and {2 * STEP:g}, on a batch of its training data{dropout}. The columns are the largest",
        "relative errors along random directions, at single elements, and of both with NumPy's fast kernels.",
        f"An array agrees if all of them are below {TOLERANCE:g}.",
    ]
