"""NumPy's faster functions: each gives what the plain function gives that it replaces."""

import itertools
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from baby_xp_backends import numpy_kernels
from conftest import case_of
from layer_table import TABLE, noting, numbers_for

from baby_xp.arrays import params
from baby_xp.arrays.namespace import Namespace
from baby_xp.arrays.tiles import tile_sizes
from baby_xp.config import GPTConfig
from baby_xp.layers import Shape, gelu, heads, layernorm
from baby_xp.models import Model
from baby_xp.text.batches import Batch
from baby_xp.training import optimizers
from baby_xp.training.step import initial_state, loss_and_gradients_with_dropout, total_loss

FAST, PLAIN = case_of("numpy"), case_of("numpy plain")


def test_the_layer_table_and_this_file_reach_every_faster_function(monkeypatch):
    every, reached = set(FAST.xp.kernels), set()
    monkeypatch.setattr(FAST.xp, "kernels", noting(FAST.xp.kernels, reached))
    for entry in TABLE:
        numbers = numbers_for(entry)
        p = numbers.layout.unpack(FAST.xp, numbers.flat)
        y, saved = entry.forward(FAST.xp, p, numbers.x, numbers.streams)
        entry.backward(FAST.xp, p, saved, numbers.dy(y.shape))
    elsewhere = {"optimizers.adamw", "optimizers.adamw_into", "step.add_tree"}
    elsewhere |= {"muon.orthogonalize"}  # tests/training/test_muon.py
    generation = {"gpt.prepare", "gpt.decode"}  # tests/inference/test_cache.py
    assert reached | elsewhere | generation == every


@pytest.mark.parametrize("size", [5, 1000, 3 * numpy_kernels.TILE + 17])
def test_adamw_in_tiles_is_adamw(size):
    rng_ = np.random.default_rng(0)
    w, g, m = (rng_.normal(size=size) for _ in range(3))
    v, decays = rng_.uniform(size=size), rng_.integers(0, 2, size).astype(float)
    scalars = [np.array([x]) for x in (0.7, 1e-2, 0.3, 0.05)]
    arguments = (w, g, m, v, decays, *scalars, 0.9, 0.99, 0.1)
    fast, plain = (optimizers.adamw(backend.xp, *arguments) for backend in (FAST, PLAIN))
    for found, expected in zip(fast, plain, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-15)
    for backend, expected in ((FAST, fast), (PLAIN, plain)):
        new = np.empty((3, size))
        optimizers.adamw_into(backend.xp, new, *arguments)
        assert new.tobytes() == np.stack(expected).tobytes()


def test_gradients_of_tiles_add_up():
    """Those of a batch in parts, on NumPy, are those of the batch at once; parts are as equal as they can be."""
    config = GPTConfig(n_ctx=8, n_emb=8, head_size=8, n_heads=2, n_layers=1, dropout=0.2)
    model, draw = Model(config, 11), np.random.default_rng(0)
    inputs, targets = draw.integers(0, 11, (2, 7, 8), dtype=np.int32)
    batch = Batch(inputs, targets, np.arange(7, dtype=np.int32))
    flat = params.draw(model.spec, 0, "float64")
    state = initial_state(FAST.backend, flat, params.decay_mask(model.spec), 5)
    results = []
    for tokens_at_once, in_place in itertools.product((None, 24, 1), (False, True)):  # 1, 2 and 7 parts
        xp = Namespace(FAST.xp.library, "cpu", FAST.xp.kernels, tokens_at_once, in_place)
        loss, gradients = loss_and_gradients_with_dropout(xp, model, state, batch)
        results.append([loss, gradients, total_loss(xp, model, state["params"], batch)])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("shape", "tokens_at_once", "sizes"),
    [((7, 8), None, [7]), ((7, 8), 24, [3, 4]), ((7, 8), 1, [1] * 7), ((7, 8), 56, [7]), ((7, 8), 1000, [7]),
     ((16, 128), 1024, [8, 8]), ((32, 256), 1024, [4] * 8), ((1, 5000), 1024, [1]), ((0, 8), 16, [0])],
)  # fmt: skip
def test_tiles_are_as_equal_as_they_can_be(shape, tokens_at_once, sizes):
    assert tile_sizes(*shape, tokens_at_once) == sizes


@pytest.mark.parametrize("rows", [1, 700])
def test_layer_norm_in_tiles_is_layer_norm(rows):
    draw = np.random.default_rng(0).normal
    x, dy, p = draw(3, 2, (rows, 200)), draw(size=(rows, 200)), {"gain": draw(size=200), "bias": draw(size=200)}
    results = []
    for xp in (FAST.xp, PLAIN.xp):
        y, saved = layernorm.forward(xp, p, x)
        dp, dx = layernorm.backward(xp, p, saved, dy)
        results.append([y, dp["gain"], dp["bias"], dx])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_gelu_holds_far_from_zero():
    x = np.array([-1e4, -200.0, -40.0, -10.0, 0.0, 10.0, 1e4])
    for found, expected in zip(gelu.tanh_form(FAST.xp, x), gelu.tanh_form(PLAIN.xp, x), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_attention_holds_for_scores_that_lie_far_apart(spread, dtype):
    """The block's largest score is far above some rows' scores: their softmax must not underflow to 0 / 0."""
    B, T, H, D = 2, 9, 3, 4
    qkv = np.random.default_rng(0).normal(0, spread, (B * T, 3 * H * D)).astype(dtype)
    found, saved = heads.forward(FAST.xp, {}, qkv, Shape(B, T, H))
    expected, saved0 = heads.forward(PLAIN.xp, {}, qkv, Shape(B, T, H))
    tolerance = {"float32": 1e-3, "float64": 1e-10}[dtype] * spread
    np.testing.assert_allclose(found, expected, atol=tolerance)
    dy = np.ones_like(found)
    _, dqkv = heads.backward(FAST.xp, {}, saved, dy)
    _, dqkv0 = heads.backward(PLAIN.xp, {}, saved0, dy)
    np.testing.assert_allclose(dqkv, dqkv0, atol=tolerance * spread)


@pytest.mark.parametrize("T", [31, 32, 33, 64, 300, 301])
def test_attention_in_blocks_is_attention(T):
    B, H, D = 5, 3, 4
    qkv = np.random.default_rng(0).normal(size=(B * T, 3 * H * D))
    noise = (np.arange(5, dtype=np.int32), 0.2)
    found, saved = heads.forward(FAST.xp, {}, qkv, Shape(B, T, H), noise)
    expected, saved0 = heads.forward(PLAIN.xp, {}, qkv, Shape(B, T, H), noise)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    dy = np.random.default_rng(1).normal(size=found.shape)
    np.testing.assert_allclose(
        heads.backward(FAST.xp, {}, saved, dy)[1], heads.backward(PLAIN.xp, {}, saved0, dy)[1], atol=1e-12
    )


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LOADED = """
import mmap, re
from pathlib import Path
import numpy as np
from baby_xp.arrays.registry import load
from baby_xp_backends import numpy_backend
heap = lambda: [part for part in Path("/proc/self/smaps").read_text().split("VmFlags:") if "[heap]" in part]
resident = lambda: int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])
before = resident()
numpy_backend.keep_freed_memory()
print(resident() - before)
arrays = [np.ones(1_000_000, np.float32) for _ in range(20)]
huge = lambda parts: sum(int(size) for part in parts for size in re.findall(r"AnonHugePages: *(\\d+)", part))
print(huge(heap()))
everything = lambda: [Path("/proc/self/smaps").read_text()]
before = huge(everything())
asked = mmap.mmap(-1, 80_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
asked.madvise(mmap.MADV_HUGEPAGE)
np.frombuffer(asked, np.uint8)[:] = 1
print(huge(everything()) - before)
"""


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text() or platform.libc_ver()[0] != "glibc",
    reason="this system does not give huge pages to those who ask for them",
)
def test_the_heap_is_in_huge_pages_and_takes_no_memory_in_advance():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    taken, huge, given = map(int, done.stdout.split())  # kB
    assert taken < 8192
    if given < 70_000:  # its memory is in pieces, or a setting of this process forbids it
        pytest.skip("this system has no huge pages to give just now")
    assert huge > 40_000  # of 80,000 kB of arrays
