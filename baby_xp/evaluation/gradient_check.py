"""Every gradient of a real model on a real batch, held against finite differences of its loss.

A gradient g says how steeply the loss L rises: along a direction d of length 1, by g . d. The loss itself tells
the same without any formula of ours for a derivative. With D(h) = (L(w + h d) - L(w - h d)) / 2h, the central
difference, whose error falls as h^2,

    slope = (4 D(h) - D(2h)) / 3

is left with an error that falls as h^4 (Richardson's extrapolation).

STEP, the h of it, is 2e-4, in float64. A longer one costs where the loss curves strongly: an embedding's numbers
are some 0.02, and the error of the formula grows with (h / 0.02)^4. With a shorter one, rounding shows: it does
1e-16 or so to a loss, and some 1e-16 / h = 1e-12 to a slope. An error is relative to the slope, or to the root
mean square of the array's gradient, or to FLOOR, 1e-5, whichever is largest: of a slope much smaller than that,
rounding leaves too little. Among all arrays of the runs that were tried, trained and untrained, of all switches,
the worst error lay between 1e-10 and 2e-7, and TOLERANCE, 1e-5, is far above these and far below what a fault in a
formula does.

For each parameter array, d is drawn at random several times, then is single elements: half of them those with the
largest gradients, the other half drawn at random. A fault in few elements shows in these, one in all of them in
the random directions. Where the run has dropout, the same mask holds for all losses, as it is a hash of the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from baby_xp import checks
from baby_xp.arrays import registry
from baby_xp.config import Preset
from baby_xp.layers import cross_entropy
from baby_xp.models import Model
from baby_xp.resources import limits
from baby_xp.runs import store
from baby_xp.text import dataset
from baby_xp.text.batches import Batch, RandomWindows
from baby_xp.training.step import loss_and_gradients, step_noise

if TYPE_CHECKING:
    from baby_xp.run import Run

STEP, TOLERANCE, FLOOR = 2e-4, 1e-5, 1e-5


@dataclass(frozen=True)
class Row:
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
        """Whether the gradient is that of the loss, as far as TOLERANCE tells."""
        return self.worst < TOLERANCE  # NaN is not


def check(
    run: "Run",
    chosen: Preset,
    sha256: str | None,
    tokens: int,
    batch: int,
    seed: int,
    elements: int,
    directions: int,
) -> list[Row]:
    """A row for each parameter array; as Run.check, which tells more. The text is that of `chosen`."""
    tokens, batch = checks.whole("tokens", tokens), checks.whole("batch", batch)
    seed, elements = checks.whole("seed", seed, least=0), checks.whole("elements", elements, least=0)
    directions = checks.whole("directions", directions)
    host = _batch(run, chosen, sha256, tokens, batch, seed)
    layout = run.model.layout
    with threadpool_limits(1):  # products this small only wait for each other's threads
        slopes = Slopes(run.model, run.params.astype(np.float64), host, seed)
        plain, fast = slopes.gradients()
        return [
            _row(path, shape, at, slopes, plain, fast, seed, elements, directions)
            for (path, at), shape in zip(layout.slices.items(), layout.shapes, strict=True)
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
        """Forward alone, with the plain functions."""
        p = self.model.layout.unpack(np, flat)
        logits, _ = self.model.forward(self.xp, p, self.batch.inputs, self.noise)
        return float(np.mean(cross_entropy.forward(self.xp, {}, logits, self.batch.targets.reshape(-1))[0]))

    def gradients(self) -> list[np.ndarray]:
        """What backward says (P,): with the plain functions, and with the fast kernels."""
        return [
            self.model.layout.pack(np, loss_and_gradients(xp, self.model, self.flat, self.batch, self.noise)[1])
            for xp in (self.xp, self.fast)
        ]

    def along(self, place: slice, direction: np.ndarray) -> float:
        """The slope of the loss along a direction in one parameter's part of the buffer, by differences alone."""

        def moved(h: float) -> float:
            self.moving[place] = self.flat[place] + h * direction
            return self.loss(self.moving)

        near, far = ((moved(h) - moved(-h)) / (2 * h) for h in (STEP, 2 * STEP))
        self.moving[place] = self.flat[place]
        return (4 * near - far) / 3


def _row(
    path: str,
    shape: tuple[int, ...],
    place: slice,
    slopes: Slopes,
    plain: np.ndarray,
    fast: np.ndarray,
    seed: int,
    elements: int,
    directions: int,
) -> Row:
    """Measure one parameter array."""
    of_plain, of_fast = plain[place], fast[place]
    rng = np.random.default_rng([seed, place.start])
    least = max(FLOOR, float(np.sqrt(np.mean(of_plain * of_plain))))
    errors: list[list[float]] = [[], [], []]
    with np.errstate(all="ignore"):  # a NaN is an error that the row tells of
        for i, direction in enumerate(_directions(rng, of_plain, elements, directions)):
            slope = slopes.along(place, direction)
            errors[0 if i < directions else 1].append(_relative(float(of_plain @ direction), slope, least))
            errors[2].append(_relative(float(of_fast @ direction), slope, least))
        worst = [float(np.max(one, initial=0)) for one in errors]
    return Row(path, shape, float(np.linalg.norm(of_plain)), *worst)


def _directions(
    rng: np.random.Generator, gradient: np.ndarray, elements: int, directions: int
) -> Iterator[np.ndarray]:
    """Directions of length 1: random ones, then single elements."""
    for _ in range(directions):
        direction = rng.normal(0, 1, gradient.shape)
        yield direction / np.linalg.norm(direction)
    steepest = np.argsort(-np.abs(gradient), kind="stable")[: (elements + 1) // 2]
    others = np.setdiff1d(np.arange(gradient.size), steepest)
    drawn = rng.choice(others, min(elements - len(steepest), others.size), replace=False) if others.size else []
    for element in [*steepest, *drawn]:
        direction = np.zeros_like(gradient)
        direction[element] = 1
        yield direction


def _relative(claimed: float, slope: float, least: float) -> float:
    return abs(claimed - slope) / max(abs(claimed), abs(slope), least)


def _batch(run: "Run", chosen: Preset, sha256: str | None, tokens: int, batch: int, seed: int) -> Batch:
    """A batch of the run's training text, or of its equations."""
    learned = dataset.prepare(
        chosen.data, chosen.model, chosen.train, store.folder_for_ids(run.files), run.tokenizer, sha256
    )
    if learned.corpus is None:  # equations: as many rows as have so many targets
        whole = learned.batches.batch(0)
        number = batch * tokens if whole.targets.ndim == 1 else batch
        rows = np.random.default_rng(seed).permutation(len(whole.samples))[:number]
        limits.check_batch(run.model, len(rows), chosen.model.n_ctx)
        return Batch(whole.inputs[rows], whole.targets[rows], np.arange(len(rows), dtype=np.int32))
    tokens = min(tokens, chosen.model.n_ctx)
    limits.check_batch(run.model, batch, tokens)
    return RandomWindows(learned.corpus.train, tokens, batch, seed).batch(0)


# in words -------------------------------------------------------------------------------------------------


def lines(rows: list[Row]) -> list[str]:
    """The rows as a table for people, layer by layer, with the summary at the end."""
    layers = [row.name.rpartition(".")[0] for row in rows]
    width = max(12, *map(len, layers))
    text = [f"{'':<{width}}  {'shape':<13} {'gradient':>9}  {'directions':>10}  {'elements':>9}  {'fast':>9}"]
    before = None
    for row, layer in zip(rows, layers, strict=True):
        if layer != before:
            text.append(layer)
        before, name = layer, f"  {row.name.rpartition('.')[2]}"
        shape = " x ".join(map(str, row.shape))
        errors = f"{row.directions:>10.1e}  {row.elements:>9.1e}  {row.fast:>9.1e}"
        verdict = "agrees" if row.agrees else "DISAGREES"
        text.append(f"{name:<{width}}  {shape:<13} {row.gradient:>9.1e}  {errors}  {verdict}")
    return [*text, "", summary(rows)]


def summary(rows: list[Row]) -> str:
    """One line: how many arrays, the worst of them, and whether all agree."""
    worst = max(rows, key=lambda row: np.inf if np.isnan(row.worst) else row.worst)
    wrong = [row.name for row in rows if not row.agrees]
    told = f"{len(rows)} arrays, worst relative error {worst.worst:.1e} at {worst.name}: "
    if not wrong:
        return told + "all agree"
    return told + f"{len(wrong)} disagree{'s' if len(wrong) == 1 else ''}, {', '.join(wrong)}"


def about(run: "Run") -> list[str]:
    """What the table holds, for a reader who has not seen it before."""
    dropout = f", with its dropout of {run.model.config.dropout}" if run.model.config.dropout else ""
    return [
        f"Backward's gradients on a batch of its training data{dropout}, in float64, against finite",
        f"differences of the loss over steps of {STEP:g} and {2 * STEP:g}. For each array, the largest relative",
        "error along random directions, at single elements, and at both with NumPy's fast kernels;",
        f"it agrees where these are below {TOLERANCE:g}.",
    ]
