"""Worker processes that share a step: each computes the gradients of its samples and updates its parameters.

NumPy holds Python's lock too often for threads to help. So the main process starts others and gives each a shard,
a share of the samples; it computes a shard itself and adds up the gradients in the order of the workers: a run is
the same bit for bit for the same number of workers. Dropout does not depend on the split (see rng.py). Then each
process does AdamW for its part of the flat buffer; or Muon for its part of the matrices, and AdamW for its part of
the other parameters.

Arrays pass through one mapped piece of memory, commands through pipes. A worker whose main process is gone reads
the end of its pipe and exits; a main process whose worker is gone reads the end of that pipe and raises. The
memory has no name in the file system, or has lost it before the first worker starts, so that nothing stays behind.
Only Windows cannot do that: there it is a file that is deleted at the end.

A worker is a Python process of its own, not a fork and not `multiprocessing`: it works the same on Linux,
macOS and Windows, in notebooks, and in scripts without a guarded main.
"""

import functools
import io
import itertools
import json
import math
import mmap
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

import numpy as np
from threadpoolctl import threadpool_limits

from baby_xp import processes
from baby_xp.arrays import registry
from baby_xp.arrays.backend import Backend
from baby_xp.arrays.params import decay_mask
from baby_xp.arrays.tiles import samples
from baby_xp.arrays.tree import address
from baby_xp.config import TrainConfig, model_from_dict, to_dict
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.text.batches import Batch
from baby_xp.training import muon, optimizers
from baby_xp.training.step import loss_and_gradients_with_dropout, total_loss

COMMAND = struct.Struct("<c9q")
"""What to do; the number of the command, and numbers that the command needs."""
ANSWER = struct.Struct("<q")
"""The number of the command that is done; 0: the worker is ready."""
PROGRAM = """import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # these are for the main process, which then ends this one
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for name in {"SIGHUP", "SIGUSR1"} & set(dir(signal)):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
from baby_xp.training.workers import serve
serve()
"""
GRADIENTS, TOTAL, UPDATE = b"g", b"t", b"u"
OPTIMIZERS = "adamw", "muon"
ELSEWHERE = 2
"""Where parameters lie: 0 or 1, one of the two states in the arena, or this: apart from them."""
INHERITED = os.name != "nt"
"""Whether a child can be given an open file, so that the file needs no name."""


class Arena:
    """The arrays that all processes see: one piece of memory, cut into named arrays.

    The state of the optimizer is there twice. An update reads one and writes the other: a step that is cut short
    leaves the state before it as it was.
    """

    states: np.ndarray
    params: np.ndarray
    gradients: np.ndarray
    rates: np.ndarray
    settings: np.ndarray
    losses: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray
    samples: np.ndarray

    def __init__(self, file: int, model: Model, dtype: str, batch_size: int, number: int, create: bool):
        n_ctx, size = model.config.n_ctx, model.n_parameters
        shapes = {
            "states": ((2, 3, size), dtype),  # parameters and both moments
            "params": ((size,), dtype),
            "gradients": ((number, size), dtype),
            "rates": ((4, 1), dtype),
            "settings": ((3 + len(muon.Settings._fields),), "float64"),
            "losses": ((number,), "float64"),
            "inputs": ((batch_size * n_ctx,), "int32"),
            "targets": ((batch_size * n_ctx,), "int32"),
            "samples": ((batch_size,), "int32"),
        }
        lengths = [math.prod(shape) * np.dtype(kind).itemsize for shape, kind in shapes.values()]
        begins = [0, *itertools.accumulate(-(-length // 64) * 64 for length in lengths)]
        if create:
            _reserve(file, begins[-1])
        # not a numpy.memmap: all that is computed from one is one too, and each operation then runs Python code
        whole = np.frombuffer(mmap.mmap(file, begins[-1]), np.uint8)
        for (name, (shape, kind)), begin, length in zip(shapes.items(), begins[:-1], lengths, strict=True):
            setattr(self, name, whole[begin : begin + length].view(kind).reshape(shape))
        self._addresses = [[address(array) for array in state] for state in self.states]

    def batch(self, first: int, last: int, T: int, per_sample: int) -> Batch:
        """Samples first to last of the batch that lies in the arena."""
        inputs = self.inputs[first * T : last * T].reshape(-1, T)
        targets = self.targets[first * per_sample : last * per_sample].reshape(last - first, -1)
        return Batch(inputs, targets, self.samples[first:last])

    def place_of(self, *arrays: np.ndarray) -> int:
        """Which of the two states begins with these arrays (P,), by their place in memory; else ELSEWHERE."""
        found = [address(array) for array in arrays]
        return next((i for i, own in enumerate(self._addresses) if own[: len(found)] == found), ELSEWHERE)

    def params_at(self, place: int) -> np.ndarray:
        """The parameters (P,) of one of the two states, or those apart."""
        return self.params if place == ELSEWHERE else self.states[place, 0]


def _reserve(file: int, length: int) -> None:
    """Give the file this length, reserving the space where the system can: a write to a full disk would kill."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, length)
    else:
        os.ftruncate(file, length)


class Workers:
    """`number` processes in all, this one included. A context manager: leaving it ends the others.

    loss_and_gradients and optimizer(config) are for make_step. The state that an optimizer gives lies in the arena
    and is valid until the update after the next one. Raises BabyError if a worker cannot be started or ends before
    its time.
    """

    arena: Arena

    def __init__(self, backend: Backend, model: Model, batch_size: int, number: int):
        self.backend, self.model, self.number, self.batch_size = backend, model, number, batch_size
        self.children: list[subprocess.Popen[bytes]] = []
        self._path, self._file = "", -1
        self._number = 0  # of the last command

    def __enter__(self) -> "Workers":
        self._limits = threadpool_limits(1)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            for pipe in pipes(child):
                with suppress(OSError):
                    pipe.close()
        for child in self.children:
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self.children = []
        self._limits.restore_original_limits()
        vars(self).pop("arena", None)  # its memory goes with it
        self._forget_file()

    def _start(self) -> None:
        self.backend.before_workers()
        try:
            self._make_arena()
            for rank in range(1, self.number):
                self.children.append(self._child(rank))
            for rank in range(1, self.number):
                self._wait(rank)
        except (OSError, OverflowError) as error:
            raise processes.refusal("workers", error) from None
        if INHERITED:
            self._forget_file()

    def _make_arena(self) -> None:
        """In memory where the system has such files and room for them, else in the folder for temporary files."""
        shape = (self.model, self.backend.dtype, self.batch_size, self.number)
        in_memory = [_file_in_memory] if hasattr(os, "memfd_create") and INHERITED else []
        for make in [*in_memory, _temporary_file]:
            try:
                self._file, self._path = make()
                self.arena = Arena(self._file, *shape, create=True)
                return
            except (OSError, OverflowError):  # overflow: more bytes than a file can have
                self._forget_file()
                if make is _temporary_file:
                    raise

    def _child(self, rank: int) -> subprocess.Popen:
        setup = {
            "file": self._file if INHERITED else self._path, "rank": rank, "number": self.number,
            "batch_size": self.batch_size, "config": to_dict(self.model.config),
            "vocab_size": self.model.vocab_size, "dtype": self.backend.dtype, "kernels": self.backend.kernels,
        }  # fmt: skip
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            pass_fds=(self._file,) if INHERITED else (),
            env={
                **processes.environment(),
                "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            },
        )  # fmt: skip
        commands, _ = pipes(child)
        commands.write(json.dumps(setup).encode() + b"\n")
        commands.flush()
        return child

    def _forget_file(self) -> None:
        """What is mapped stays."""
        if self._file >= 0:
            os.close(self._file)
        if self._path:
            with suppress(OSError):
                os.unlink(self._path)
        self._path, self._file = "", -1

    def loss_and_gradients(
        self, xp: Any, model: Model, state: dict[str, Any], batch: Batch, n_targets: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As step.loss_and_gradients_with_dropout, by all processes together.

        The gradients lie in the arena, and the next call overwrites them.
        """
        seed, step = int(state["seed"][0]), int(state["step"][0])
        targets = n_targets or batch.targets.size
        shard = self._hand_out(GRADIENTS, state["params"], batch, targets, seed, step)
        loss, total = _gradients_of_shard(self.backend, model, state, shard, targets, self.arena.gradients[0])
        for rank in self._asked:
            self._wait(rank)
            loss = loss + loss.dtype.type(self.arena.losses[rank])
            total += self.arena.gradients[rank]
        return loss, total

    def total_loss(self, params: np.ndarray, batch: Batch) -> np.ndarray:
        """As step.total_loss, by all processes together."""
        shard = self._hand_out(TOTAL, params, batch)
        total: np.ndarray = total_loss(self.backend.xp, self.model, params, shard)
        for rank in self._asked:
            self._wait(rank)
            total = total + total.dtype.type(self.arena.losses[rank])
        return total

    def optimizer(self, config: TrainConfig, share: tuple[int, int] | None = None) -> Callable[..., Any]:
        """As optimizers.of, by all processes together: each updates its parts, see also Alone.optimizer."""
        share = share or (0, self.model.n_parameters)
        return functools.partial(self._update, config.optimizer, muon.settings(config), share)

    def _update(
        self, optimizer, more, share, xp, w, g, m, v, decays, scale, lr, bias1, bias2, beta1, beta2, weight_decay
    ):  # fmt: skip
        """What is not in the arena is copied there first."""
        arena = self.arena
        old = arena.place_of(w, m, v)
        if old == ELSEWHERE:
            old = 0
            for own, given in zip(arena.states[old], (w, m, v), strict=True):
                own[:] = given
            arena.states[1 - old, 2] = v  # where Muon leaves it as it is
        if address(g) != address(arena.gradients[0]):
            arena.gradients[0][:] = g
        for own, given in zip(arena.rates, (scale, lr, bias1, bias2), strict=True):
            own[:] = given
        arena.settings[:] = beta1, beta2, weight_decay, *more
        self._number += 1
        for rank in range(1, self.number):
            self._send(rank, UPDATE, old, OPTIMIZERS.index(optimizer), *share)
        _update_parts(self.backend, self.model, arena, 0, decays, old, OPTIMIZERS.index(optimizer), *share)
        for rank in range(1, self.number):
            self._wait(rank)
        return tuple(arena.states[1 - old])

    def _hand_out(self, what: bytes, params: np.ndarray, batch: Batch, *numbers: int) -> Batch:
        """Give the other processes their shards of the batch, and numbers -> the shard of this one."""
        B, T = batch.inputs.shape
        self._number += 1
        place = self.arena.place_of(params)
        if place == ELSEWHERE:
            self.arena.params[:] = params
        self.arena.inputs[: B * T] = batch.inputs.reshape(-1)
        self.arena.targets[: batch.targets.size] = batch.targets.reshape(-1)
        self.arena.samples[:B] = batch.samples
        # rounded such that the first shard is never empty
        bounds = [-(-B * rank // self.number) for rank in range(self.number + 1)]
        self._asked = [rank for rank in range(1, self.number) if bounds[rank] < bounds[rank + 1]]
        for rank in self._asked:
            shape = bounds[rank], bounds[rank + 1], T, batch.targets.size // B
            self._send(rank, what, place, *shape, *numbers)
        return samples(batch, 0, bounds[1])

    def _send(self, rank: int, what: bytes, *numbers: int) -> None:
        numbers = (*numbers, *[0] * (8 - len(numbers)))
        commands, _ = pipes(self.children[rank - 1])
        try:
            commands.write(COMMAND.pack(what, self._number, *numbers))
            commands.flush()
        except OSError:
            raise self._lost(rank) from None

    def _wait(self, rank: int) -> None:
        """Wait for the answer to the last command; those to commands that Ctrl-C cut short are skipped."""
        _, answers = pipes(self.children[rank - 1])
        while True:
            answer = answers.read(ANSWER.size)
            if len(answer) < ANSWER.size:
                raise self._lost(rank)
            if ANSWER.unpack(answer)[0] == self._number:
                return

    def _lost(self, rank: int) -> BabyError:
        how = processes.how_it_ended(self.children[rank - 1])
        return BabyError(f"worker {rank} of {self.number} {how}; train with fewer --workers, or --workers 1")


def pipes(child: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """Where a child's commands go, and where its answers come from."""
    assert child.stdin is not None
    assert child.stdout is not None
    return child.stdin, child.stdout


def _file_in_memory() -> tuple[int, str]:
    """An open file without a name."""
    return os.memfd_create("baby_xp"), ""


def _temporary_file() -> tuple[int, str]:
    """An open file and its name, which is empty where the file needs none."""
    file, path = tempfile.mkstemp(prefix="baby_xp_", suffix=".arena")
    if not INHERITED:
        return file, path
    os.unlink(path)
    return file, ""


def _gradients_of_shard(
    backend: Backend, model: Model, state: dict[str, Any], shard: Batch, n_targets: int, flat: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Loss (1,) and gradients (P,) of a shard of a batch; the gradients are `flat`, an array in the arena."""
    loss, total = loss_and_gradients_with_dropout(backend.xp, model, state, shard, n_targets, flat)
    if total is not flat:  # what adds up the tiles need not do so in place
        flat[:] = total
    return loss, flat


def _update_parts(backend, model, arena, rank, decays, old, optimizer, first, last, *_) -> None:
    """Compute the parts of a process: from one state in the arena to the other."""
    own = optimizers.parts(model, OPTIMIZERS[optimizer], rank, len(arena.gradients), (first, last))
    beta1, beta2, weight_decay, rate, momentum, iterations = arena.settings.tolist()
    settings, states = muon.Settings(rate, momentum, int(iterations)), (arena.states[1 - old], arena.states[old])
    more = decays, *arena.rates, beta1, beta2, weight_decay
    optimizers.update_into(backend.xp, own, settings, *states, arena.gradients[0], *more)


def serve() -> None:
    """What a worker process does until its input ends."""
    # answers go out unbuffered: nothing is left to flush, at the end, to a main process that is gone
    commands, answers = sys.stdin.buffer, io.FileIO(sys.stdout.fileno(), "w", closefd=False)
    line = commands.readline()
    if not line.endswith(b"\n"):  # the main process is gone already
        return
    setup = json.loads(line)
    rank, dtype = setup["rank"], setup["dtype"]
    model = Model(model_from_dict(setup["config"], "worker"), setup["vocab_size"])
    backend = registry.load("numpy", dtype=dtype, kernels=setup["kernels"])
    file = setup["file"] if isinstance(setup["file"], int) else os.open(setup["file"], os.O_RDWR)
    arena = Arena(file, model, dtype, setup["batch_size"], setup["number"], create=False)
    os.close(file)
    decays = decay_mask(model.spec).astype(dtype)
    actions = {
        GRADIENTS: functools.partial(_compute_gradients, backend, model, arena, rank),
        TOTAL: functools.partial(_compute_total, backend, model, arena, rank),
        UPDATE: functools.partial(_update_parts, backend, model, arena, rank, decays),
    }
    # numbers that are not finite show in the loss, which the main process checks
    with threadpool_limits(1), suppress(BrokenPipeError), np.errstate(all="ignore"):
        answers.write(ANSWER.pack(0))
        while len(command := commands.read(COMMAND.size)) == COMMAND.size:
            what, number, *rest = COMMAND.unpack(command)
            actions[what](*rest)
            answers.write(ANSWER.pack(number))


def _compute_gradients(backend, model, arena, rank, place, first, last, T, per_sample, n_targets, seed, step):
    batch = arena.batch(first, last, T, per_sample)
    state = {"params": arena.params_at(place), "seed": backend.integers([seed]), "step": backend.integers([step])}
    loss, _ = _gradients_of_shard(backend, model, state, batch, n_targets, arena.gradients[rank])
    arena.losses[rank] = loss[0]


def _compute_total(backend, model, arena, rank, place, first, last, T, per_sample, *_):
    batch = arena.batch(first, last, T, per_sample)
    arena.losses[rank] = total_loss(backend.xp, model, arena.params_at(place), batch)[0]
