"""Worker processes that share a step's batch: each computes the gradients of its samples, and they add up.

NumPy holds Python's lock too often for threads to help. So the main process starts others, gives every one a
share of the samples, computes a share itself, and adds up the gradients in the order of the workers: a run is
the same bit for bit for the same number of workers. Dropout does not depend on the split (see rng.py).

Arrays pass through one memory-mapped file, commands through pipes. A worker whose main process is gone reads
the end of its pipe and ends; a main process whose worker is gone reads the end of that pipe and raises. The
file is unlinked as soon as every worker has opened it (on Windows, at the end), so nothing is left behind.

A worker is a Python process of its own, not a fork and not `multiprocessing`: it works the same on Linux,
macOS and Windows, in notebooks, and in scripts without a guarded main.
"""

import io
import itertools
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from baby_xp import backend as backends
from baby_xp import config as configs
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.text.batches import Batch
from baby_xp.training.step import add_tree, noisy_loss_and_gradients, shard_by_shard, total_loss
from baby_xp.tree import leaves

COMMAND = struct.Struct("<c9q")
"""What to do; the number of the command, first and last sample, B, T, targets a sample, targets of the whole
step, seed, step."""
ANSWER = struct.Struct("<q")
"""The number of the command that is done; 0: the worker is ready."""
PROGRAM = """import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # these are for the main process, which then ends this one
signal.signal(signal.SIGTERM, signal.SIG_IGN)
from baby_xp.training.workers import serve
serve()
"""
GRADIENTS, TOTAL = b"g", b"t"
WORTH_SPLITTING = 3e8
"""Floating-point operations of a step below which passing arrays around costs more than it gains."""


def suitable_number(backend, model: Model, batch_size: int) -> int:
    """How many processes suit a run: one a core on NumPy, but one in all for small steps."""
    tokens = batch_size * model.config.n_ctx
    if backend.name != "numpy" or 6 * model.n_parameters * tokens < WORTH_SPLITTING:
        return 1
    return min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, batch_size
    )


class Arena:
    """The arrays that all processes see: one mapped file, cut into named arrays."""

    def __init__(self, path: str, model: Model, dtype: str, batch_size: int, number: int, create: bool):
        n_ctx, size = model.config.n_ctx, model.n_parameters
        shapes = {
            "params": ((size,), dtype),
            "gradients": ((number - 1, size), dtype),  # the main process keeps its own
            "losses": ((number - 1,), "float64"),
            "inputs": ((batch_size * n_ctx,), "int32"),
            "targets": ((batch_size * n_ctx,), "int32"),
            "samples": ((batch_size,), "int32"),
        }
        lengths = [math.prod(shape) * np.dtype(kind).itemsize for shape, kind in shapes.values()]
        begins = [0, *itertools.accumulate(-(-length // 64) * 64 for length in lengths)]
        if create:
            _reserve(path, begins[-1])
        whole = np.memmap(path, np.uint8, "r+")
        for (name, (shape, kind)), begin, length in zip(shapes.items(), begins[:-1], lengths, strict=True):
            setattr(self, name, whole[begin : begin + length].view(kind).reshape(shape))

    def batch(self, first: int, last: int, T: int, per_sample: int) -> Batch:
        """Samples first to last of the batch that lies in the arena."""
        inputs = self.inputs[first * T : last * T].reshape(-1, T)
        targets = self.targets[first * per_sample : last * per_sample].reshape(last - first, -1)
        return Batch(inputs, targets, self.samples[first:last])


def _reserve(path: str, length: int) -> None:
    """Make the file so long. Where the system can, it reserves the room: a write to a full disk would kill."""
    with open(path, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, length)
        else:
            file.truncate(length)


class Workers:
    """`number` processes in all, this one included. A context manager: leaving it ends the others.

    Raises BabyError if a worker cannot be started or ends before its time.
    """

    def __init__(self, backend, model: Model, batch_size: int, number: int):
        self.backend, self.model, self.number, self.batch_size = backend, model, number, batch_size
        self.children: list[subprocess.Popen] = []
        self.path = ""
        self._number = 0  # of the last command

    def __enter__(self) -> "Workers":
        self._limits = threadpool_limits(1)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for child in self.children:
            for pipe in (child.stdin, child.stdout):
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
        self._unlink()

    def _start(self) -> None:
        try:
            self._make_arena()
            for rank in range(1, self.number):
                self.children.append(self._child(rank))
            for rank in range(1, self.number):
                self._wait(rank)
        except (OSError, OverflowError) as error:
            raise BabyError(f"workers cannot be started ({error}); try --workers 1") from None
        if os.name != "nt":
            self._unlink()

    def _make_arena(self) -> None:
        """In memory where there is room (containers may have little), else in the folder for temporary files."""
        shape = (self.model, self.backend.dtype, self.batch_size, self.number)
        for folder in ("/dev/shm", None):
            try:
                handle, self.path = tempfile.mkstemp(prefix="baby_xp_", suffix=".arena", dir=folder)
                os.close(handle)
                self.arena = Arena(self.path, *shape, create=True)
                return
            except (OSError, OverflowError):  # overflow: more bytes than a file can have
                self._unlink()
                if folder is None:
                    raise

    def _child(self, rank: int) -> subprocess.Popen:
        setup = {
            "path": self.path, "rank": rank, "number": self.number, "batch_size": self.batch_size,
            "config": configs.to_dict(self.model.config), "vocab_size": self.model.vocab_size,
            "dtype": self.backend.dtype,
        }  # fmt: skip
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={
                **os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # a script may have added to it
            },
        )  # fmt: skip
        child.stdin.write(json.dumps(setup).encode() + b"\n")
        child.stdin.flush()
        return child

    def _unlink(self) -> None:
        if self.path:
            with suppress(OSError):
                os.unlink(self.path)
            self.path = ""

    def loss_and_gradients(
        self, xp, model: Model, state: dict[str, Any], batch: Batch, n_targets: int | None = None
    ):
        """As step.noisy_loss_and_gradients, by all processes together."""
        seed, step = int(state["seed"][0]), int(state["step"][0])
        n_targets = n_targets or batch.targets.size
        first, last = self._send(GRADIENTS, state["params"], batch, n_targets, seed, step)
        share = Batch(*(part[first:last] for part in batch))
        loss, gradients = noisy_loss_and_gradients(xp, model, state, share, n_targets)
        for rank in self._asked:
            self._wait(rank)
            loss = loss + loss.dtype.type(self.arena.losses[rank - 1])
            gradients += self.arena.gradients[rank - 1]
        return loss, gradients

    def total_loss(self, params, batch: Batch):
        """As step.total_loss, by all processes together."""
        first, last = self._send(TOTAL, params, batch, 0, 0, 0)
        total = total_loss(self.backend.xp, self.model, params, Batch(*(part[first:last] for part in batch)))
        for rank in self._asked:
            self._wait(rank)
            total = total + total.dtype.type(self.arena.losses[rank - 1])
        return total

    def _send(self, what: bytes, params, batch: Batch, n_targets: int, seed: int, step: int) -> tuple[int, int]:
        """Hand the batch and its shares out -> the share of this process."""
        B, T = batch.inputs.shape
        self._number += 1
        self.arena.params[:] = params
        self.arena.inputs[: B * T] = batch.inputs.reshape(-1)
        self.arena.targets[: batch.targets.size] = batch.targets.reshape(-1)
        self.arena.samples[:B] = batch.samples
        bounds = [
            -(-B * rank // self.number) for rank in range(self.number + 1)
        ]  # the first share is never empty
        self._asked = [rank for rank in range(1, self.number) if bounds[rank] < bounds[rank + 1]]
        for rank in self._asked:
            shape = bounds[rank], bounds[rank + 1], B, T, batch.targets.size // B, n_targets
            try:
                self.children[rank - 1].stdin.write(COMMAND.pack(what, self._number, *shape, seed, step))
                self.children[rank - 1].stdin.flush()
            except OSError:
                raise self._lost(rank) from None
        return 0, bounds[1]

    def _wait(self, rank: int) -> None:
        """Wait for the answer to the last command; those to commands that Ctrl-C cut short are passed over."""
        while True:
            answer = self.children[rank - 1].stdout.read(ANSWER.size)
            if len(answer) < ANSWER.size:
                raise self._lost(rank)
            if ANSWER.unpack(answer)[0] == self._number:
                return

    def _lost(self, rank: int) -> BabyError:
        code = self.children[rank - 1].wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return BabyError(f"worker {rank} of {self.number} {how}; train with fewer --workers, or --workers 1")


def serve() -> None:
    """What a worker process does until its input ends."""
    # answers go out unbuffered: nothing is left to flush, at the end, to a main process that is gone
    commands, answers = sys.stdin.buffer, io.FileIO(sys.stdout.fileno(), "w", closefd=False)
    setup = json.loads(commands.readline())
    rank, dtype = setup["rank"], setup["dtype"]
    model = Model(configs.model_from_dict(setup["config"], "worker"), setup["vocab_size"])
    backend = backends.load("numpy", dtype=dtype)
    arena = Arena(setup["path"], model, dtype, setup["batch_size"], setup["number"], create=False)
    # numbers that are not finite show in the loss, and the main process says so
    with threadpool_limits(1), suppress(BrokenPipeError), np.errstate(all="ignore"):
        answers.write(ANSWER.pack(0))
        while len(command := commands.read(COMMAND.size)) == COMMAND.size:
            what, number, *rest = COMMAND.unpack(command)
            _obey(backend, model, arena, rank, what, *rest)
            answers.write(ANSWER.pack(number))


def _obey(backend, model, arena, rank, what, first, last, B, T, per_sample, n_targets, seed, step) -> None:
    xp, batch = backend.xp, arena.batch(first, last, T, per_sample)
    if what == TOTAL:
        arena.losses[rank - 1] = total_loss(xp, model, arena.params, batch)[0]
        return
    state = {"params": arena.params, "seed": backend.integers([seed]), "step": backend.integers([step])}
    total, flat = 0.0, arena.gradients[rank - 1]
    for number, (loss, dp) in enumerate(shard_by_shard(xp, model, state, batch, n_targets)):
        total += loss[0]
        if number:
            add_tree(xp, model.layout, flat, dp)
        else:  # packed where the main process reads it, in the order of the layout: one copy less
            gradients = dict(leaves(dp))
            np.concatenate([gradients[path].reshape(-1) for path in model.layout.paths], out=flat)
    arena.losses[rank - 1] = total
