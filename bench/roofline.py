"""What bounds a step on a device: its operations at the measured rate of products, its bytes at the bandwidth."""

import operator
import time
from collections.abc import Callable

import numpy as np

from baby_xp.config import GPTConfig
from baby_xp.layers import mlp
from baby_xp.resources import counts
from bench import results
from bench.peers import ours
from bench.workloads import on_gpu

SIZES = {True: (8192, 2**27), False: (1024, 2**22)}
"""On a GPU or not: rows of the square product, and elements of the arrays of the sum (half a GiB each)."""
SECONDS, CALLS = 1.5, 5
"""How long each of the two is repeated, and calls between two waits for the device."""


def measure(backend: str, precision: str = "float32", sizes: tuple[int, int] | None = None) -> dict:
    """Measure this device through the backend, in this process; half precision through PyTorch.

    Returns "flops": operations per second of a square product, "bytes": bytes per second of a sum of two arrays
    (two are read, one is written), "device", and the sizes. The best of many readings.
    """
    n, elements = sizes or SIZES[on_gpu(backend)]
    if precision == "half":  # baby_xp has none
        import torch

        from bench.peers.torch import device_of

        itemsize, device = 2, device_of(backend)
        put = lambda host: torch.from_numpy(host).to(device, torch.bfloat16)  # noqa: E731
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    else:
        loaded = ours.load_at(backend, precision)
        put, wait, itemsize, device = loaded.asarray, loaded.synchronize, 4, loaded.device

    def most(operation: Callable, *shape: int) -> float:
        # a product of zeros draws less power, and runs faster than one of numbers
        factors = [put(np.random.default_rng(0).random(shape, np.float32)) for _ in range(2)]
        return calls_per_second(lambda: operation(*factors), wait, SECONDS)

    flops = 2 * n**3 * most(operator.matmul, n, n)
    moved = 3 * itemsize * elements * most(operator.add, elements)
    return {"flops": flops, "bytes": moved, "n": n, "elements": elements, "device": str(device)}


def calls_per_second(call: Callable, wait: Callable[[], None], seconds: float) -> float:
    """The highest rate of all readings. The first calls, which compile and allocate memory, do not count."""
    call(), call()
    wait()
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        wait()
        now = time.perf_counter()
        best = max(best, CALLS / (now - begin))
        if now >= end:
            return best


def step_flops(config: GPTConfig, vocab_size: int, batch_size: int) -> int:
    """Floating-point operations that no step can leave out: 2 M K N per product, forward and for both gradients.

    Unlike in counts.step_flops, scores that the mask hides do not count, nor does the gradient of the embeddings.
    """
    T, N = config.n_ctx, batch_size * config.n_ctx
    hidden = 2 * config.n_layers * N * (T - 1) * config.head_size  # of queries with keys, and weights with values
    return 3 * (counts.forward_flops(config, vocab_size, batch_size) - hidden)


def step_bytes(config: GPTConfig, vocab_size: int, batch_size: int, itemsize: int = 4) -> int:
    """Bytes that a step must move at least: what passes between its products, and AdamW's arrays.

    AdamW reads the weights, gradients, both moments and the decay mask and writes weights and moments, in float32.
    For `mha` and `mlp` alone.
    """
    N, C, S, F = batch_size * config.n_ctx, config.n_emb, config.head_size, mlp.EXPANSION * config.n_emb
    linear = lambda K, M: 3 * (N * K + K * M + N * M)  # noqa: E731  forward, and the gradients of both factors
    attention = (3 + 1) * N * S + (3 + 1 + 1 + 3) * N * S  # q k v -> y; q k v y dy -> dq dk dv
    block = linear(C, 3 * S) + attention + linear(S, C) + linear(C, F) + linear(F, C)
    embedding = 2 * N * C + N * C + vocab_size * C  # rows read and written; their gradient
    moved = config.n_layers * block + linear(C, vocab_size) + embedding
    return itemsize * moved + 4 * 8 * sum(counts.parameters(config, vocab_size).values())


def floor(result: dict, race: dict) -> tuple[float | None, str | None]:
    """What the products of a step, and on a GPU the bytes, take at full speed: in ms, and as a line, or None.

    On a CPU, full speed is the best product of this run, before or after, on every core; on a GPU, the roofline.
    """
    gflop, gpu = 1e-9 * race["flops"], on_gpu(result["backend"])
    if not gpu:
        best = max(rate["best"] for rate in results.rates(result).values())  # Gflop/s of a core
        ms = 1e3 * gflop / (result["machine"]["cores"] * best)
        return ms, f"{gflop:.1f} Gflop of matrix products per step: {ms:.1f} ms at full speed"
    if not (rates := result["rooflines"].get(race["precision"])):
        return None, None
    computing, moving = (1e3 * race[what] / rates[what] for what in ("flops", "bytes"))
    parts = f"{gflop:.1f} Gflop take {computing:.3f} ms, {1e-9 * race['bytes']:.2f} GB {moving:.3f} ms"
    return max(computing, moving), f"no step can take less than {max(computing, moving):.3f} ms: {parts}"
