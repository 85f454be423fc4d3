"""AdamW on the flat buffer, Muon for the matrices in it, and clipping by the global norm."""

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from baby_xp.arrays import params
from baby_xp.arrays.namespace import Array, replaceable
from baby_xp.config import TrainConfig
from baby_xp.distributed.group import PIECE
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.training import muon, schedules

EPS = 1e-8
ELEMENT_COST = 30
"""Multiplications of one of Muon's iterations in the time that AdamW takes for an element, about."""
LINE = 16
"""Shares of the flat buffer begin at multiples of this many elements: no two processes write to one cache line."""


@replaceable
def adamw(xp, w, g, m, v, decays, scale, lr, bias1, bias2, beta1: float, beta2: float, weight_decay: float):
    """One step of AdamW with decoupled decay (Loshchilov and Hutter 2019), element by element.

    w, g, m, v (P,): parameters, gradients, first and second moments. decays (P,): 1 where weight decay
    applies, else 0. scale, lr, bias1, bias2 (1,): the factor that clips the gradients, the learning rate,
    1 - beta1^t, 1 - beta2^t. -> new w, m, v.
    """
    g = scale * g
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    step = (m / bias1) / (xp.sqrt(v / bias2) + EPS)
    return w - lr * (step + weight_decay * decays * w), m, v


@replaceable
def adamw_into(xp, new, w, g, m, v, decays, scale, lr, bias1, bias2, beta1, beta2, weight_decay) -> None:
    """As adamw, on NumPy alone; the new w, m, v (P,) go into the arrays of `new`."""
    arguments = w, g, m, v, decays, scale, lr, bias1, bias2, beta1, beta2, weight_decay
    for array, values in zip(new, adamw(xp, *arguments), strict=True):
        array[:] = values


class Parts(NamedTuple):
    """What one process updates: slices of the flat buffer by AdamW, matrices (slice, shape) by Muon."""

    slices: list[slice]
    matrices: list[tuple[slice, tuple[int, ...]]]


def matrices_of(model: Model, optimizer: str) -> list[tuple[slice, tuple[int, ...]]]:
    """The matrices that Muon updates, in the order of the flat buffer. Raises BabyError if Muon has none."""
    matrices = params.matrices(model.spec) if optimizer == "muon" else []
    if optimizer == "muon" and not matrices:
        raise BabyError(
            "muon updates the weight matrices of blocks, and this model has none: choose --optimizer adamw"
        )
    return matrices


def shares(model: Model, optimizer: str, weights: Sequence[int]) -> list[int]:
    """Where the shares of ranks begin in the flat buffer, and where the last one ends. weights: of their shares.

    The work is divided as the weights say, up to the matrices that Muon updates, each of which stays whole.
    """
    ends, costs, before = [0], [0.0], 0
    for at, shape in matrices_of(model, optimizer):
        ends += [at.start, at.stop]
        costs += [(at.start - before) * ELEMENT_COST, muon.cost(*shape)]
        before = at.stop
    ends.append(model.n_parameters)
    costs.append((model.n_parameters - before) * ELEMENT_COST)
    done, whole = list(itertools.accumulate(costs)), sum(weights)
    return [_place(ends, done, done[-1] * part / whole) for part in itertools.accumulate(weights, initial=0)]


def pieces(elements: int, ranks: int) -> list[list[int]]:
    """The flat buffer (P,) in pieces, from its end to its beginning: the bounds of the ranks' shares in each.

    Each rank has as much of every piece as the others, up to whole cache lines.
    """
    found = []
    for end in range(elements, 0, -PIECE * ranks):
        first = max(0, end - PIECE * ranks)
        found.append([first + (end - first) * rank // ranks // LINE * LINE for rank in range(ranks)] + [end])
    return found


def _place(ends: list[int], done: list[float], goal: float) -> int:
    """Where about `goal` of the work is done; `done`: at each end of matrices and of what lies between them."""
    i = max(1, bisect.bisect_left(done, goal))
    begin, end = ends[i - 1], ends[i]
    share = (goal - done[i - 1]) / max(done[i] - done[i - 1], 1.0)
    if i % 2 == 0:  # a matrix
        return end if share >= 0.5 else begin
    return min(end, begin + math.ceil((end - begin) * share / LINE) * LINE)


@functools.lru_cache(maxsize=4)
def parts(
    model: Model, optimizer: str, rank: int = 0, number: int = 1, share: tuple[int, int] | None = None
) -> Parts:
    """What one of `number` processes updates, of the whole or of a share of the flat buffer: shapes alone decide.

    The matrices go to the processes one by one, the costliest first, each to the process that has least to do; the
    other parameters are divided evenly. Raises BabyError if the optimizer is Muon and the model has no matrix.
    """
    first, last = share or (0, model.n_parameters)
    matrices = [one for one in matrices_of(model, optimizer) if first <= one[0].start < last]
    own: list[list[Any]] = [[] for _ in range(number)]
    costs = [0] * number
    for one in sorted(matrices, key=lambda one: -muon.cost(*one[1])):
        least = costs.index(min(costs))
        own[least].append(one)
        costs[least] += muon.cost(*one[1])
    ends = [first, *(end for at, _ in matrices for end in (at.start, at.stop)), last]
    gaps = [slice(*pair) for pair in zip(ends[::2], ends[1::2], strict=True) if pair[0] < pair[1]]
    n = sum(at.stop - at.start for at in gaps)
    bounds = [min(n, -(-n * one // (number * LINE)) * LINE) for one in (rank, rank + 1)]
    return Parts(list(cut(gaps, *bounds)), own[rank])


def cut(slices, first: int, last: int):
    """Elements first to last of those in the slices, as slices."""
    before = 0
    for at in slices:
        begin, end = at.start + max(0, first - before), min(at.stop, at.start + last - before)
        if begin < end:
            yield slice(begin, end)
        before += at.stop - at.start


def update_into(
    xp, own: Parts, settings, new, old, g, decays, scale, lr, bias1, bias2, beta1, beta2, weight_decay
) -> None:
    """Update the parts of one process, on NumPy alone: from the state `old`, w, m, v (3, P), into `new`."""
    for at in own.slices:
        arrays = old[0][at], g[at], old[1][at], old[2][at], decays[at]
        adamw_into(xp, [array[at] for array in new], *arrays, scale, lr, bias1, bias2, beta1, beta2, weight_decay)
    muon.update_into(xp, new, own.matrices, old[0], g, old[1], scale, lr, weight_decay, *settings)


def of(model: Model, config: TrainConfig) -> Callable[..., Any]:
    """The optimizer of a config: a function with the signature of adamw. Raises BabyError as `parts` does."""
    if config.optimizer == "adamw":
        return adamw
    return functools.partial(muon_and_adamw, parts(model, "muon"), muon.settings(config))


def muon_and_adamw(
    own: Parts, settings, xp, w, g, m, v, decays, scale, lr, bias1, bias2, beta1, beta2, weight_decay
):
    """As adamw, but by Muon for the matrices; their m is its momentum, and their v stays as it is."""
    gathered = [xp.concat([flat[at] for at in own.slices]) for flat in (w, g, m, v, decays)]
    rest = adamw(xp, *gathered, scale, lr, bias1, bias2, beta1, beta2, weight_decay)
    done, begin = [], 0
    for at in own.slices:
        end = begin + at.stop - at.start
        done.append((at, *(flat[begin:end] for flat in rest)))
        begin = end
    for at, new_w, new_m in muon.update(xp, own.matrices, w, g, m, scale, lr, weight_decay, *settings):
        done.append((at, new_w, new_m, v[at]))
    done.sort(key=lambda one: one[0].start)
    _, *new = zip(*done, strict=True)
    return tuple(xp.concat(pieces) for pieces in new)


def update(
    xp: Any, state: dict[str, Array], gradients: Array, config: TrainConfig, optimizer: Callable[..., Any] = adamw,
    norm_of: Callable[..., Array] | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
    """The state after one step, and its metrics; the gradient norm is that before clipping.

    state: params, m, v (P,), decays (P,), step (1,) int32. `optimizer` has the signature of adamw, norm_of that of
    global_norm, the default.
    """
    norm = (norm_of or global_norm)(xp, gradients)
    scale, lr, bias1, bias2 = rates(xp, norm, state["step"], config)
    w, m, v = optimizer(
        xp, state["params"], gradients, state["m"], state["v"], state["decays"], scale, lr, bias1, bias2,
        config.beta1, config.beta2, config.weight_decay,
    )  # fmt: skip
    state = {**state, "params": w, "m": m, "v": v, "step": state["step"] + 1}
    return state, {"grad_norm": norm, "lr": lr}


@replaceable
def rates(xp, norm, step, config):
    """What differs from step to step, (1,) each: the factor that clips gradients of this global norm (1,), the
    learning rate, and AdamW's bias corrections. step (1,) int32, counted from 0.
    """
    t = xp.astype(step + 1, norm.dtype)
    # -expm1(t log(beta)) is 1 - beta^t without the cancellation that costs float32 its digits at small t
    bias1, bias2 = (-xp.expm1(t * math.log(beta)) for beta in (config.beta1, config.beta2))
    lr = schedules.learning_rate(xp, step, config, norm.dtype)
    return clip_scale(xp, norm, config.clip), lr, bias1, bias2


def clip_scale(xp: Any, norm: Array, limit: float) -> Array:
    """The factor that brings gradients of this global norm (1,) down to at most `limit` (0: no limit) -> (1,).

    Pascanu et al. 2013.
    """
    if limit == 0:
        return xp.ones_like(norm)
    return xp.minimum(limit / (norm + 1e-6), xp.ones_like(norm))


@replaceable
def global_norm(xp, gradients):
    """Root of the sum of squares: (P,) -> (1,)."""
    return xp.reshape(xp.sqrt(xp.vecdot(gradients, gradients)), (1,))
