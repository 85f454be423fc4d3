"""An inspection shows what the plain code computes, under the names in its source."""

import ast
import dataclasses
import itertools
import re
import sys
import types
from inspect import getsource
from pathlib import Path

import numpy as np
import pytest
from layer_table import LATER

from baby_xp import api
from baby_xp.arrays import params, registry, rng
from baby_xp.arrays.namespace import REPLACEABLE
from baby_xp.arrays.tree import leaves
from baby_xp.cli import main
from baby_xp.config import DataConfig, EquationConfig, GPTConfig, RunConfig, TrainConfig
from baby_xp.errors import BabyError, BackendUnavailable
from baby_xp.inference.generate import Logits
from baby_xp.inspection import inspect, printing, render, trace
from baby_xp.inspection.trace import Copies, Recorder
from baby_xp.layers import cross_entropy, gelu, heads
from baby_xp.models import Model, gpt
from baby_xp.run import Run
from baby_xp.runs.store import RunFiles
from baby_xp.text.tokenizer import ByteTokenizer, CharTokenizer

TEXT = "the cat sat on the mat.\nit sat and sat. " * 25
LETTERS = CharTokenizer.from_text(TEXT)
SUMS = CharTokenizer(tuple(" +0123456789="))
SWITCHES = list(itertools.product(("pre", "post"), ("mha", "moh"), ("mlp", "moe")))
SIZES = {"n_ctx": 12, "n_emb": 8, "head_size": 12, "n_heads": 3, "n_layers": 2}


def gpt_config(sequence="pre", attention="mha", network="mlp", **more) -> GPTConfig:
    return GPTConfig(**{**SIZES, "c_sequence": sequence, "c_attention": attention, "c_network": network, **more})


def a_run(config, tokenizer=LETTERS, dtype="float64", backend="numpy", seed=0) -> Run:
    """A run with parameters far from their small first values, so that every array matters."""
    model = Model(config, tokenizer.vocab_size)
    flat = params.draw(model.spec, seed, dtype)
    flat += np.random.default_rng(seed).normal(0, 0.3, flat.shape).astype(dtype)
    settings = RunConfig("a-run", config, TrainConfig(num_steps=1), DataConfig())
    files, loaded = RunFiles(Path("runs"), "a-run"), registry.load(backend, None, dtype)
    return Run(model, tokenizer, flat, loaded, files, {}, settings)


MODELS = [
    *(pytest.param(gpt_config(*one), LETTERS, "the cat sat", id=" ".join(one)) for one in SWITCHES),
    pytest.param(gpt_config("post", "moh", "moe", gelu="erf"), LETTERS, "the cat", id="erf"),
    *(pytest.param(GPTConfig(**SIZES, **one), LETTERS, "the cat", id=name) for name, one in LATER.items()),
    *(
        pytest.param(EquationConfig(n_emb=2, n_hidden=5, activation=name), SUMS, "4+4=8", id=f"equations {name}")
        for name in ("tanh", "gelu")
    ),
]
EVERY_MODEL = pytest.mark.parametrize(("config", "tokenizer", "prompt"), MODELS)


@pytest.fixture(scope="module")
def run() -> Run:
    return a_run(gpt_config())


def by_hand(run: Run, windows, targets):
    """Logits, mean loss and the tree of gradients, by the modules themselves with their plain functions."""
    xp = registry.load("numpy", None, run.backend.dtype, "plain").xp
    p = run.model.layout.unpack(xp, run.params)
    logits, saved = run.model.forward(xp, p, windows)
    losses, loss_saved = cross_entropy.forward(xp, {}, logits[: len(targets)], targets)
    weight = np.full_like(losses, 1 / len(targets))
    _, dlogits = cross_entropy.backward(xp, {}, loss_saved, weight)
    dlogits = np.concatenate([dlogits, np.zeros_like(logits[len(targets) :])])
    return logits, float(np.sum(losses * weight)), dict(leaves(run.model.backward(xp, p, saved, dlogits)))


def same(a, b) -> bool:
    """Whether two arrays are equal bit for bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# the copies compute what the plain code computes ----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@EVERY_MODEL
def test_logits_loss_and_gradients_equal_the_plain_modules_bit_for_bit(
    config, tokenizer, prompt, dtype
):
    run = a_run(config, tokenizer, dtype)
    ids = tokenizer.encode(prompt)
    windows = np.array([[6, 1, 6, 12], [1, 6, 12, 10]], np.int32) if tokenizer is SUMS else ids[None, :]
    targets = ids[4:] if tokenizer is SUMS else ids[1:]
    logits, loss, dp = by_hand(run, windows, targets)
    seen = run.inspect(prompt, backward=True)
    assert same(seen.logits, logits)
    assert same(seen.arrays["logits:2" if getattr(config, "logit_cap", 0) else "logits"], logits)
    assert seen.loss == loss
    assert dp.keys() == set(run.model.layout.paths)
    for path, gradient in dp.items():
        assert same(seen.gradients[path], gradient), path


@pytest.mark.parametrize("one", SWITCHES, ids=" ".join)
def test_copies_with_dropout_equal_the_plain_modules(one):
    """The copies themselves, on a batch of training."""
    run = a_run(gpt_config(*one, dropout=0.3))
    xp, model = registry.load("numpy", None, run.backend.dtype, "plain").xp, run.model
    p = model.layout.unpack(xp, run.params)
    draw = np.random.default_rng(1)
    ids = draw.integers(0, LETTERS.vocab_size, (3, 7)).astype(np.int32)
    at = np.array([0], np.int32), np.array([5], np.int32), np.arange(3, dtype=np.int32)
    streams = rng.streams(xp, *at, model.dropouts)
    recorder = Recorder(xp, np.asarray, p)
    copy = Copies(recorder).of(gpt)
    found, saved = copy.forward(xp, p, ids, model.config, rng.Noise(streams, 0.3))
    logits, plain_saved = model.forward(xp, p, ids, rng.Noise(streams, 0.3))
    assert same(found, logits)
    dlogits = draw.normal(0, 1, logits.shape)
    recorder.begin_backward()
    gradients = dict(leaves(copy.backward(xp, p, saved, dlogits, model.config)))
    for path, gradient in leaves(model.backward(xp, p, plain_saved, dlogits)):
        assert same(gradients[path], gradient), path
    assert recorder.arrays["blocks.1.attention.heads.dropout.keep"].dtype == bool
    assert "blocks.1.attention.heads.dropped" in recorder.arrays


@pytest.mark.parametrize("name", ["array-api-strict", "torch", "jax"])
def test_every_backend_shows_the_same_arrays(name):
    run = a_run(gpt_config(n_layers=1))
    try:
        other = dataclasses.replace(run, backend=registry.load(name, None, "float64"))
    except BackendUnavailable as error:
        pytest.skip(str(error))
    patch = {"blocks.0.attention.heads.weights": lambda w: w * 0.5, "ln_f.gain": lambda g: g * 2}
    found, expected = (one.inspect("the cat", backward=True, patch=patch) for one in (other, run))
    for part in ("arrays", "gradients"):
        ours, theirs = getattr(expected, part), getattr(found, part)
        assert list(theirs) == list(ours)
        for key in ours:
            np.testing.assert_allclose(theirs[key], ours[key], rtol=1e-10, atol=1e-12, err_msg=key)
    assert type(found.arrays["logits"]) is np.ndarray


def test_the_plain_modules_are_left_as_they_were(run):
    before = dict(REPLACEABLE), gelu.forward, dict(run.backend.xp.kernels)
    run.inspect("the cat", backward=True)
    assert before == (REPLACEABLE, gelu.forward, run.backend.xp.kernels)
    assert not any(name.startswith("__see") for name in vars(heads))


def test_copies_refer_only_to_copies(run):
    recorder = Recorder(np, np.asarray, {})
    copies = Copies(recorder)
    for name in trace.found():
        for value in vars(copies.named(name)).values():
            if isinstance(value, types.ModuleType) and value.__name__ in trace.found():
                assert copies.modules[value.__name__] is value, name
            elif isinstance(value, types.FunctionType) and value.__module__ in trace.found():
                assert value.__globals__ is not vars(sys.modules[value.__module__]), f"{name}.{value.__name__}"


# names ----------------------------------------------------------------------------------------------------


def test_names_are_the_layers_path_and_the_name_in_the_source(run):
    seen = run.inspect("the cat", backward=True)
    for name, shape in {
        "tokens": (7, 8), "blocks.0.norm1.xhat": (7, 8), "blocks.0.attention.heads.q": (1, 3, 7, 4),
        "blocks.1.attention.heads.scores": (1, 3, 7, 7), "blocks.1.attention.heads.scores:2": (1, 3, 7, 7),
        "blocks.0.attention.heads.softmax.e": (1, 3, 7, 7), "blocks.0.network.gelu.y": (7, 32),
        "blocks.0.network.h": (7, 32), "ln_f.rstd": (7, 1), "logits": (7, LETTERS.vocab_size),
        "cross_entropy.losses": (6, 1),
    }.items():  # fmt: skip
        assert seen.arrays[name].shape == shape, name
    for name, shape in {
        "blocks.1.attention.heads.dscores": (1, 3, 7, 7), "blocks.0.network.gelu.dx": (7, 32), "dlogits": (7, 14),
        "blocks.0.norm1.dx": (7, 8), "blocks.0.attention.qkv.weight": (8, 36), "wpe.weight": (12, 8),
    }.items():  # fmt: skip
        assert seen.gradients[name].shape == shape, name
    assert not seen.arrays.keys() & seen.gradients.keys()


def test_arrays_are_in_the_order_of_computation(run):
    names = list(run.inspect("the cat").arrays)
    order = [
        "tokens", "blocks.0.norm1.y", "blocks.0.attention.heads.scores", "blocks.0.attention.heads.scores:2",
        "blocks.0.attention.heads.weights", "blocks.0.network.gelu.y", "blocks.1.norm1.y", "ln_f.y", "logits",
    ]  # fmt: skip
    assert [name for name in names if name in order] == order


def test_the_recorded_scores_are_masked(run):
    arrays = run.inspect("the cat").arrays
    first, masked = (arrays[f"blocks.0.attention.heads.scores{n}"] for n in ("", ":2"))
    above = np.triu(np.ones((7, 7), bool), 1)
    assert np.isfinite(first).all()
    assert (masked[..., above] == -np.inf).all()
    assert same(masked[..., ~above], first[..., ~above])


def test_every_array_matches_its_formula(run):
    arrays = run.inspect("the cat").arrays
    p = run.model.layout.unpack(np, run.params)["blocks"]["0"]
    xhat = arrays["blocks.0.norm1.xhat"]
    np.testing.assert_allclose(arrays["blocks.0.normed"], p["norm1"]["gain"] * xhat + p["norm1"]["bias"])
    q, k = (arrays[f"blocks.0.attention.heads.{name}"] for name in "qk")
    np.testing.assert_allclose(arrays["blocks.0.attention.heads.scores"], q @ k.swapaxes(-1, -2) / 2)
    up = arrays["blocks.0.network.up.y"] + p["network"]["up"]["bias"]
    np.testing.assert_allclose(arrays["blocks.0.network.up.y:2"], up)
    np.testing.assert_allclose(arrays["blocks.0.x"], arrays["x"] + arrays["blocks.0.attention.y:2"])


def test_gradients_of_any_array_match_finite_differences(run):
    """dL/da of an intermediate array, by changing only that array."""
    seen = run.inspect("the cat", backward=True)
    pairs = {"blocks.0.attention.heads.scores:2": "blocks.0.attention.heads.dscores", "logits": "dlogits",
             "blocks.1.network.h": "blocks.1.network.dh:2", "blocks.0.norm1.y": "blocks.0.attention.dx",
             "x": "dx:3"}  # fmt: skip
    for name, gradient in pairs.items():
        direction = np.random.default_rng(3).normal(0, 1, seen.arrays[name].shape)

        def loss(h, name=name, direction=direction):
            return run.inspect("the cat", patch={name: lambda a: a + h * direction}).loss

        claimed = float(np.sum(seen.gradients[gradient] * direction))
        assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(claimed, rel=1e-6, abs=1e-9), name


def with_source(monkeypatch, module, old: str, new: str) -> None:
    """Replaces a line of a module's source."""
    plain = trace.source_of

    def source_of(name):
        source = plain(name)
        if name == module.__name__:
            assert old in source
            source = source.replace(old, new)
        return source

    monkeypatch.setattr(trace, "source_of", source_of)


def test_a_new_local_variable_is_recorded(run, monkeypatch):
    assert "blocks.0.network.gelu.cube" not in run.inspect("the cat").arrays
    square, dq = "    square = x * x ", "    dq = dscores @ k"
    with_source(monkeypatch, gelu, square, f"    cube, (twice, *_) = x * x * x, [2 * x]\n{square}")
    with_source(monkeypatch, heads, dq, "    half = dscores / 2\n    dq = half @ k + half @ k")
    seen = run.inspect("the cat", backward=True)
    x, of_heads = seen.arrays["blocks.0.network.h"], "blocks.1.attention.heads"
    assert same(seen.arrays["blocks.0.network.gelu.cube"], x * x * x)
    assert same(seen.arrays["blocks.0.network.gelu.twice"], 2 * x)
    assert same(seen.gradients[f"{of_heads}.half"], seen.gradients[f"{of_heads}.dscores:2"] / 2)


TOY = '''
def forward(xp, p, x):
    """Every way to bind a name."""
    a = b = x + 1
    total = x[2]
    total += 1
    c: object = a * 2
    (d, [e, *f]), g = (a + 1, [a + 2, a + 3]), "no array"
    if d is not None:
        d = d * 2
    else:
        never = d
    for i in range(3):
        last = x * i
        for j in range(2):
            inner = last + j
    for _ in ():
        nothing = x
    _hidden = x * 5
    renamed = a
    box = {"key": None}
    box["key"] = x - 1
    with_helper = helper(xp, x)
    return with_helper * 2, (a,)


def helper(xp, x):
    inside = x * 7
    return inside + 1


def backward(xp, p, saved, dy):
    (a,) = saved
    return {}, dy * a
'''


def test_every_kind_of_assignment_is_recorded(monkeypatch):
    monkeypatch.setattr(trace, "source_of", lambda name: TOY)
    x = np.arange(3.0)
    recorder = Recorder(np, np.asarray, {})
    toy = Copies(recorder).named("baby_xp.layers.tanh")
    y, saved = toy.forward(np, {}, x)
    plain: dict = {}
    exec(TOY, plain)
    assert same(y, plain["forward"](np, {}, x)[0])
    expected = {
        "a": x + 1, "b": x + 1, "total": x[2], "total:2": x[2] + 1, "c": 2 * x + 2, "d": x + 2, "e": x + 3,
        "d:2": 2 * x + 4, "last": 2 * x, "inner": 2 * x + 1, "inside": 7 * x, "with_helper": 7 * x + 1,
        "y": 14 * x + 2,
    }  # fmt: skip
    assert recorder.arrays.keys() == {f"tanh.{name}" for name in expected}
    for name, array in expected.items():
        assert same(recorder.arrays[f"tanh.{name}"], array), name
    recorder.begin_backward()
    toy.backward(np, {}, saved, x)
    assert list(recorder.gradients) == ["tanh.dx"]
    assert same(recorder.gradients["tanh.dx"], x * saved[0])


def test_arrays_saved_for_backward_are_not_gradients(monkeypatch):
    toy = TOY.replace("    (a,) = saved", "    a = taken = saved[0]")
    monkeypatch.setattr(trace, "source_of", lambda name: toy)
    recorder, x = Recorder(np, np.asarray, {}), np.arange(3.0)
    toy = Copies(recorder).named("baby_xp.layers.tanh")
    _, saved = toy.forward(np, {}, x)
    recorder.begin_backward()
    toy.backward(np, {}, saved, x)
    assert list(recorder.gradients) == ["tanh.dx"]


def test_a_helper_of_another_module_has_its_own_path(monkeypatch):
    sources = {
        "baby_xp.layers.tanh": "from baby_xp.layers import softmax\n\n"
        "def forward(xp, p, x):\n    y = softmax.helper(xp, x) + own(x)\n    return y, ()\n\n"
        "def own(x):\n    mine = x * 3\n    return mine\n",
        "baby_xp.layers.softmax": "def helper(xp, x):\n    theirs = x * 2\n    return theirs\n",
    }
    monkeypatch.setattr(trace, "source_of", sources.get)
    recorder = Recorder(np, np.asarray, {})
    Copies(recorder).named("baby_xp.layers.tanh").forward(np, {}, np.ones(2))
    assert list(recorder.arrays) == ["tanh.softmax.theirs", "tanh.mine", "tanh.y"]


@EVERY_MODEL
def test_an_array_reassigned_to_its_name_is_not_numbered_again(config, tokenizer, prompt):
    seen = a_run(config, tokenizer).inspect(prompt, backward=True)
    for names in seen.names:
        bases = [name.partition(":")[0] for name in names]
        assert len(bases) == len(set(bases)), names


def test_a_traceback_through_a_copy_shows_the_source(run, monkeypatch):
    def fail(scores):
        raise RuntimeError("here")

    with pytest.raises(RuntimeError) as caught:
        run.inspect("the cat", patch={"blocks.0.attention.heads.scores": fail})
    frames = [(str(entry.path), entry.lineno) for entry in caught.traceback]
    lines = getsource(heads).splitlines()
    at = next(line for path, line in frames if path.endswith("heads.py"))
    assert "scores = q @" in lines[at]


def test_all_sources_can_be_rewritten():
    """Only calls of `see` are added: without them, the syntax tree equals the original."""
    for name in trace.found():
        source = trace.source_of(name)
        text = ast.unparse(trace.rewritten(source))
        text = re.sub(r"\n *if '(\w+)' in locals\(\):\n *\1 = __see__\('\1', \1\)", "", text)
        text = re.sub(r"\n *(\w+) = __see__\('\1', \1\)", "", text)
        text = re.sub(r"@__scope__\n", "", text)
        plain = ast.unparse(ast.parse(source))
        kept = [line for line in text.splitlines() if "__see__" not in line and "__import_copy__" not in line]
        assert [line for line in plain.splitlines() if line in set(kept)] == kept


# patches --------------------------------------------------------------------------------------------------


@EVERY_MODEL
def test_an_array_replaced_by_itself_changes_nothing(config, tokenizer, prompt):
    run = a_run(config, tokenizer, "float32")
    plain = run.inspect(prompt, backward=True)
    asked = []

    def itself(name):
        return lambda array: asked.append(name) or array

    names = [*plain.arrays, *plain.gradients]
    found = run.inspect(prompt, backward=True, patch={name: itself(name) for name in names})
    assert set(asked) == set(names)
    assert found.loss == plain.loss
    for part in ("arrays", "gradients"):
        assert list(getattr(found, part)) == list(getattr(plain, part))
        for name, array in getattr(plain, part).items():
            assert same(getattr(found, part)[name], array), name


@pytest.mark.parametrize("network", ["mlp", "moe"])
@pytest.mark.parametrize("head", [0, 2])
def test_ablating_a_head_zeroes_its_slice_of_the_out_projection(network, head):
    run, D = a_run(gpt_config(network=network)), 4

    def zero_slice(weight):
        weight[head * D : (head + 1) * D] = 0  # it may write into its argument
        return weight

    before = run.inspect("the cat sat")
    found = run.inspect("the cat sat", patch=inspect.ablate(run, [(1, head)]))
    expected = run.inspect("the cat sat", patch={"blocks.1.attention.out.weight": zero_slice})
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert abs(found.loss - before.loss) > 1e-3
    assert (found.attention(1, head) == 0).all()
    assert same(run.inspect("the cat sat").logits, before.logits)  # no change remains


def test_an_ablated_head_of_a_mixture_adds_nothing():
    run = a_run(gpt_config(attention="moh"))
    found = run.inspect("the cat", patch=inspect.ablate(run, [(0, 1), (0, 2), (1, 0)]))
    mixed = found.arrays["blocks.0.attention.mixed"]
    gate, y = found.arrays["blocks.0.attention.gate:2"], found.arrays["blocks.0.attention.y:2"]
    np.testing.assert_allclose(mixed, gate[:, :1] * y[:, 0])
    assert found.arrays["blocks.1.attention.y:2"][:, 0].any() == np.False_


def test_a_patch_gets_a_copy(run):
    plain, heads_of = run.inspect("the cat"), "blocks.0.attention.heads"

    def spoil(weights):
        weights[...] = 0
        return weights

    found = run.inspect("the cat", patch={f"{heads_of}.weights": spoil})
    assert same(found.arrays[f"{heads_of}.softmax.y"], plain.arrays[f"{heads_of}.softmax.y"])
    assert (found.arrays[f"{heads_of}.weights"] == 0).all()
    assert not same(found.logits, plain.logits)


def test_recorded_arrays_are_copies(run):
    seen = run.inspect("the cat", backward=True)
    arrays = [(seen.arrays | seen.gradients)[names[0]] for names in seen.names]
    arrays += [seen.gradients[path] for path in run.model.layout.paths] + [seen.logits, run.params]
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(arrays, 2))


def test_an_unchanged_array_stays_the_same_object():
    """With its layout in memory, on which the order of sums may depend."""
    value = np.arange(12.0).reshape(3, 4)[:, ::2].T
    recorder = Recorder(np, np.asarray, {}, {"a": lambda a: a + 0, "b": lambda a: a + 1})
    assert recorder.patched("a", value) is value
    assert same(recorder.patched("b", value), value + 1)


def test_a_gradient_can_be_patched(run):
    """If the gradient of a block's contribution is set to zero, its parameters have no gradient."""
    patch = {"blocks.1.network.down.dx": lambda dx: dx * 0}
    gradients = run.inspect("the cat", backward=True, patch=patch).gradients
    assert not gradients["blocks.1.network.up.weight"].any()
    assert gradients["blocks.1.network.down.weight"].any()
    assert gradients["blocks.1.attention.qkv.weight"].any()  # by way of the residual connection


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"blocks.0.attention.weights": abs}, ("no array 'blocks.0.attention.weights'", "heads.weights")),
        ({"blocks.0.network.dh": abs}, ("no array 'blocks.0.network.dh'", "backward=True")),
        ({"???": abs}, ("no array '???'", "hold all names")),
        ({"logits": lambda a: a[:-1]}, ("patch of logits", "shape (7, 14) and type float64", "shape (6, 14)")),
        ({"logits": lambda a: a.astype("float32")}, ("patch of logits", "float32")),
        ({"logits": lambda a: None}, ("patch of logits", "nothing", "return")),
        ({"logits": lambda a: 3.0}, ("patch of logits", "not a float")),
        ({"ln_f.gain": lambda a: a[1:]}, ("patch of ln_f.gain", "shape (8,)")),
    ],
    ids=lambda value: str(list(value))[:40],
)  # fmt: skip
def test_a_bad_patch_is_an_error(run, patch, words):
    with pytest.raises(BabyError) as caught:
        run.inspect("the cat", patch=patch)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# predictions and attention --------------------------------------------------------------------------------


def test_attention_is_causal_and_adds_up_to_one(run):
    seen = run.inspect("the cat sat")
    for layer, head in itertools.product(range(2), range(3)):
        weights = seen.attention(layer, head)
        assert weights.shape == (11, 11)
        np.testing.assert_allclose(weights.sum(axis=1), 1)
        assert (np.triu(weights, 1) == 0).all()
        assert same(weights, seen.arrays[f"blocks.{layer}.attention.heads.weights"][0, head])
    back, most = seen.heads()[1, 2]
    by_hand = seen.attention(1, 2)[1:]
    distances = [sum(w * (i + 1 - j) for j, w in enumerate(row)) for i, row in enumerate(by_hand)]
    assert back == pytest.approx(np.mean(distances))
    assert most == pytest.approx(np.mean(by_hand.max(axis=1)))
    assert seen.heads()[seen.sharpest_head()][1] == seen.heads()[..., 1].max()
    for layer, head, word in ((2, 0, "layers 0 to 1"), (0, 3, "heads 0 to 2"), (-1, 0, "layer -1")):
        with pytest.raises(BabyError, match=word):
            seen.attention(layer, head)


def test_probabilities_and_the_next_tokens(run):
    seen = run.inspect("the cat")
    e = np.exp(seen.logits)
    np.testing.assert_allclose(seen.probabilities, e / e.sum(axis=1, keepdims=True))
    for position in (-1, 6, 0, -7):
        found, row = seen.next_tokens(position, 3), seen.probabilities[position]
        assert [share for _, share in found] == sorted(row, reverse=True)[:3]
        assert [LETTERS.encode(token)[0] for token, _ in found] == list(np.argsort(-row)[:3])
    assert len(seen.next_tokens(k=99)) == LETTERS.vocab_size
    token, share, rank = seen.own_next(1)
    assert (token, share) == ("e", seen.probabilities[1, LETTERS.encode("e")[0]])
    assert rank == 1 + sum(seen.probabilities[1] > share)
    assert seen.own_next(6) is None
    for position in (7, -8):
        with pytest.raises(BabyError, match="predictions at 0 to 6"):
            seen.next_tokens(position)


def test_the_loss_is_the_mean_over_the_own_next_tokens(run):
    seen = run.inspect("the cat")
    shares = [seen.own_next(position)[1] for position in range(6)]
    assert seen.loss == pytest.approx(-np.mean(np.log(shares)), rel=1e-12)
    assert run.inspect("t").loss is None
    with pytest.raises(BabyError, match="at least 2 tokens"):
        run.inspect("t", backward=True)


def test_inspection_uses_the_window_of_generation(run):
    of = Logits(run.backend, run.model, run.model.layout.unpack(np, run.params))
    logits = of.next([list(LETTERS.encode("the c"))])
    np.testing.assert_allclose(run.inspect("the c").logits[-1], logits[0], rtol=1e-10)


def test_prompts(run):
    seen = run.inspect("the cat sat on the mat")
    assert "".join(seen.tokens) == "t on the mat"
    assert same(seen.logits, run.inspect("the cat sat on the mat"[-12:]).logits)
    assert any("22 tokens; the model sees only the last 12" in note for note in seen.notes)
    empty = run.inspect("")
    assert empty.tokens == ["\n"]
    assert same(empty.logits, run.inspect("\n").logits)
    assert any("prompt is empty" in note for note in empty.notes)
    with pytest.raises(BabyError, match=r"prompt: '!' \(U\+0021\) at index 3"):
        run.inspect("the!")


def test_byte_tokens_are_readable():
    run = a_run(gpt_config(), ByteTokenizer())
    seen = run.inspect("aé\n")
    assert seen.tokens == ["a", "\\xc3", "\\xa9", "\n"]
    assert len(seen.vocabulary) == len(set(seen.vocabulary)) == 256
    with pytest.raises(BabyError, match="'é' is 2 tokens"):
        run.neighbours("é")
    assert "█" in "".join(printing.report(run, printing.InspectOptions("aé\n", neighbours="a")))


def test_a_note_names_the_first_array_with_a_nan(run):
    broken = run.params.copy()
    layout = run.model.layout
    broken[sum(layout.sizes[: layout.paths.index("blocks.1.network.up.weight")])] = np.nan
    seen = dataclasses.replace(run, params=broken).inspect("the cat")
    assert any("NaN first appears in blocks.1.network.up.y" in note for note in seen.notes)
    lines = printing.report(dataclasses.replace(run, params=broken), printing.InspectOptions("the cat"))
    assert any("note: NaN first appears in" in line for line in lines)
    assert not run.inspect("the cat", backward=True).notes


# equations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx", [4, 6])
@pytest.mark.parametrize(
    ("prompt", "answers"), [("4+4=", 1), ("4+4=8", 2), ("4+4=8 ", 3), ("4", 1), ("4+", 1), ("", 1)]
)
def test_an_equation_model_answers_after_each_window(n_ctx, prompt, answers):
    run = a_run(EquationConfig(n_ctx=n_ctx, n_emb=2, n_hidden=5), SUMS)
    seen = run.inspect(prompt)
    assert seen.logits.shape == (answers, 13)
    of = Logits(run.backend, run.model, run.model.layout.unpack(np, run.params))
    ids = list(SUMS.encode(prompt or " "))
    for back in range(answers):
        logits = of.next([ids[: len(ids) - back]])
        np.testing.assert_allclose(seen.logits[-1 - back], logits[0], rtol=1e-10)
    shares = [seen.own_next(position)[1] for position in seen.positions[:-1]]
    assert (seen.loss is None) == (answers == 1)
    assert answers == 1 or seen.loss == pytest.approx(-np.mean(np.log(shares)))


def test_an_equation_model_has_no_attention():
    run = a_run(EquationConfig(n_emb=2, n_hidden=5), SUMS)
    with pytest.raises(BabyError, match="the equation model has no attention"):
        run.inspect("4+4=").attention(0, 0)
    with pytest.raises(BabyError, match="gradients need an answer, as in 4\\+4=8"):
        run.inspect("4+4=", backward=True)
    with pytest.raises(BabyError, match="predictions at 3 to 4"):
        run.inspect("4+4=8").next_tokens(0)
    for asked in ({"attention": "0.0"}, {"picture": "a.png"}, {"off": ("0.0",)}, {"layer": "0"}):
        with pytest.raises(BabyError, match="the equation model has no"):
            printing.report(run, printing.InspectOptions("4+4=", **asked))


# neighbours -----------------------------------------------------------------------------------------------


def test_neighbours_are_the_nearest_by_the_cosine(run):
    table = run.model.layout.unpack(np, run.params)["wte"]["weight"]
    me = table[LETTERS.encode("t")[0]]
    cosines = {
        token: table[i] @ me / np.linalg.norm(table[i]) / np.linalg.norm(me)
        for i, token in enumerate(LETTERS.vocab)
    }
    del cosines["t"]
    expected = sorted(cosines.items(), key=lambda pair: -pair[1])
    found = run.neighbours("t", 4)
    assert [token for token, _ in found] == [token for token, _ in expected[:4]]
    np.testing.assert_allclose([share for _, share in found], [share for _, share in expected[:4]])
    assert len(run.neighbours("t", k=99)) == LETTERS.vocab_size - 1
    for token, word in (("th", "2 tokens"), ("", "0 tokens"), ("!", "not among the")):
        with pytest.raises(BabyError, match=word):
            run.neighbours(token)


def test_neighbours_among_single_numbers_are_sorted_by_distance():
    run = a_run(EquationConfig(n_emb=1, n_hidden=5), SUMS)
    table = run.model.layout.unpack(np, run.params)["embedding"]["weight"][:, 0]
    found = [float(table[SUMS.encode(token)[0]]) for token, _ in run.neighbours("4", 12)]
    mine = float(table[SUMS.encode("4")[0]])
    order = sorted(found, key=lambda number: ((number > 0) != (mine > 0), abs(number - mine)))
    assert found == order
    lines = printing.report(run, printing.InspectOptions("4", neighbours="4"))
    assert any("whose embedding is one number" in line for line in lines)


# as text --------------------------------------------------------------------------------------------------


def test_the_table_has_every_array_once_with_its_figures(run):
    seen = run.inspect("the cat", backward=True)
    for lines, arrays in ((seen.table(), seen.arrays), (seen.gradient_table(), seen.gradients)):
        names = [line.split()[0] for line in lines[1:] if line]
        firsts = [group[0] for group in seen.names if group[0] in arrays]
        assert names == [*firsts, *(path for path in run.model.layout.paths if path in arrays)]
        assert len({id(array) for array in arrays.values()}) == len(names)
    xhat = seen.arrays["blocks.0.norm1.xhat"]
    row = next(line for line in seen.table() if line.startswith("blocks.0.norm1.xhat")).split()
    assert row[1:4] == ["7", "x", "8"]
    assert float(row[5]) == pytest.approx(np.std(xhat), abs=1e-4)
    assert [float(one) for one in row[6:8]] == pytest.approx([xhat.min(), xhat.max()], abs=1e-4)
    masked = next(line for line in seen.table() if line.startswith("blocks.0.attention.heads.scores:2"))
    assert "(63 not finite)" in masked
    assert "inf" not in masked.replace("finite", "")
    for line in seen.table(layer=1)[1:]:
        assert line.startswith("blocks.1.")
    stream = [line.split()[0] for line in seen.table(stream=True)[1:] if line]
    assert stream[:4] == ["tokens", "places", "x", "blocks.0.normed"]
    assert stream[-1] == "logits"
    assert not any("gelu" in name for name in stream)
    back = [line.split()[0] for line in seen.gradient_table(stream=True)[1:] if line]
    assert back[:2] == ["dlogits", "dx"]
    last = next(line for line in seen.gradient_table() if line.startswith("blocks.1.dx:4"))
    assert last.endswith("  blocks.0.network.dy")
    assert next(line for line in seen.table() if line.startswith("blocks.0.y:2")).endswith("  x")
    assert back[-len(run.model.layout.paths) :] == list(run.model.layout.paths)
    assert not any("gelu" in name for name in back)
    assert repr(seen) == f"<Inspection of 'the cat': {len(seen.names)} arrays, loss {seen.loss:.4f}>"
    full = run.inspect("the cat sat ", backward=True)  # n_ctx tokens: no position is left over
    assert full.gradients["unused"].shape == (0, 8)
    assert len(full.gradient_table()) == len(seen.gradient_table())
    with pytest.raises(BabyError, match="there is no layer 2"):
        seen.table(layer=2)
    with pytest.raises(BabyError, match="no gradients"):
        run.inspect("the cat").gradient_table()


def test_the_map_of_a_head_shows_its_weights(run):
    seen = run.inspect("the cat")
    weights = np.tril(np.array([[1.0, 0, 0], [0.2, 0.8, 0], [0.01, 0.5, 0.49]]))
    seen.arrays["blocks.0.attention.heads.weights"][0, 0, :3, :3] = weights
    cut = {name: array[:, :, :3, :3] for name, array in seen.arrays.items() if name.endswith("heads.weights")}
    seen = dataclasses.replace(seen, tokens=["a", "b", "\n"], arrays=cut)
    lines = seen.attention_lines(0, 0)
    assert lines[2].split() == ["a", "b", "↵"]
    assert [line.split()[2] for line in lines[3:]] == ["██", "▒▒██", "··▓▓▓▓"]
    assert lines[5].endswith("50% at 1 'b'")
    plain = seen.attention_lines(0, 0, plain=True)
    assert plain[2].split() == ["a", "b", "/"]
    assert [line.split()[2] for line in plain[3:]] == ["##", "++##", "..****"]


def test_ordinals_bars_figures_and_glyphs():
    ordinals = ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th"]
    assert [render.ordinal(int(word[:-2])) for word in ordinals] == ordinals
    assert [render.bar(0.5, 4), render.bar(0.25, 1), render.bar(0.5, 4, plain=True)] == ["██", "▎", "##"]
    assert render.bar(float("nan"), 4) == ""
    figures = ["0.0000", "1.5000", "-1.2e-04", "1.2e+06"]
    assert [render.figure(n) for n in (0, 1.5, -0.00012, 1234567.0)] == figures
    assert [render.glyph(t) for t in ("a", " ", "\n", "漢", "\\xc3", "\u0301")] == ["a", "␣", "↵", "?", "?", "?"]


# the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    return api.train(
        "classic", path=folder / "runs", data=str(folder / "text.txt"), backend="numpy", batch_size=4,
        num_steps=20, eval_every=10, sample_tokens=0, lr=1e-2, warmup_steps=5, **SIZES,
    )  # fmt: skip


@pytest.fixture
def call(trained, capsys):
    def run(*arguments):
        code = main(["inspect", trained.guid[:8], f"--path={trained.files.folder}", *arguments])
        return code, *capsys.readouterr()

    return run


def test_the_command_shows_all_arrays_predictions_and_neighbours(call, trained):
    shown = "--layer=all", "--attention=1.2", "--neighbours=t", "--top=3"
    code, out, err = call("--prompt=the cat", "--backward", *shown)
    assert (code, err) == (0, "")
    seen = trained.inspect("the cat", backward=True)
    assert f"loss of the prompt: {seen.loss:.4f} nats per token" in out
    for names in seen.names:
        assert f"\n{names[0]} " in out
    for path in trained.model.layout.paths:
        assert f"\n{path} " in out
    for token, share in seen.next_tokens(k=3):
        assert re.search(rf"^     {re.escape(repr(token))} +{share:.1%}", out, re.MULTILINE)
    token, share, _ = seen.own_next(2)
    assert re.search(rf"^   2 'e' +then {re.escape(repr(token))} +{share:.1%}", out, re.MULTILINE)
    assert "attention of layer 1, head 2" in out
    for token, cosine in trained.neighbours("t", 3):
        assert re.search(rf"^     {re.escape(repr(token))} +{cosine:.3f}", out, re.MULTILINE)


def test_the_output_is_short_by_default(call, trained):
    code, out, _ = call("--prompt=the cat")
    assert code == 0
    assert "gelu" not in out
    assert "--layer 0" in out
    layer, head = trained.inspect("the cat").sharpest_head()
    assert f"attention of layer {layer}, head {head}" in out
    assert len(out.splitlines()) < 60


def test_the_heads_are_compared(call):
    out = call("--prompt=the cat", "--attention=all")[1]
    assert re.search(r"^layer 1( +[\d.]+ +\d+%){3}$", out, re.MULTILINE)


def test_ablated_heads_change_the_loss_that_is_shown(call, trained):
    out = call("--prompt=the cat", "--off", "0.1", "1.0,1.2")[1]
    patch = inspect.ablate(trained, [(0, 1), (1, 0), (1, 2)])
    before, after = trained.inspect("the cat"), trained.inspect("the cat", patch=patch)
    assert "heads 0.1, 1.0, 1.2 ablated" in out
    assert f"{before.loss:.4f} with, {after.loss:.4f} without" in out
    assert f"loss of the prompt: {after.loss:.4f}" in out
    out = call("--prompt=t", "--off=0.1")[1]
    assert "head 0.1 ablated; a prompt of one token has no loss" in out


def test_the_plain_output_is_ascii(trained):
    every = {"backward": True, "layer": "0", "off": ("0.0",), "neighbours": "t"}
    for asked in ({}, {"attention": "all"}, {"backward": True}, every):
        options = printing.InspectOptions("the cat", **asked)
        assert "\n".join(printing.report(trained, options, plain=True)).isascii()


@pytest.mark.parametrize(("encoding", "plain"), [("utf-8", False), ("cp1252", True), (None, True)])
def test_the_encoding_of_the_terminal_decides(call, monkeypatch, encoding, plain):
    asked = []
    monkeypatch.setattr(printing, "report", lambda run, options, plain: asked.append(plain) or ["done"])
    terminal = types.SimpleNamespace(encoding=encoding, write=len, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert call("--prompt=t")[0] == 0
    assert asked == [plain]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt=the!"], ("prompt: '!'", "14 characters")),
        (["--prompt=t", "--backward"], ("at least 2 tokens",)),
        (["--attention=2.0"], ("--attention 2.0", "no layer 2", "layers 0 to 1")),
        (["--attention=0.3"], ("no head 3", "heads 0 to 2")),
        (["--attention=first"], ("LAYER.HEAD", "or all", "'first'")),
        (["--attention=1"], ("LAYER.HEAD", "'1'")),
        (["--off=9.0"], ("--off 9.0", "no layer 9")),
        (["--off=all"], ("--off must be LAYER.HEAD",)),
        (["--off=" + "9" * 5000 + ".1"], ("--off must be LAYER.HEAD",)),
        (["--layer=" + "9" * 5000], ("there is no layer",)),
        (["--layer=2"], ("no layer '2'", "0 to 1, or all")),
        (["--layer=-1"], ("no layer '-1'",)),
        (["--neighbours=cat"], ("'cat' is 3 tokens",)),
        (["--neighbours=!"], ("'!'",)),
        (["--top=0"], ("top must be at least 1, not 0",)),
        (["--weights=worst"], ("--weights",)),
        (["--backend=tensorflow"], ("unknown backend",)),
    ],
)
def test_bad_arguments_of_inspect_are_one_line(call, arguments, words):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_inspect_works_without_a_prompt(call):
    code, out, _ = call()
    assert code == 0
    assert "the prompt is empty" in out
    assert "attention of" not in out


def test_the_equation_model_is_inspected(tmp_path, capsys):
    api.train("equations", path=tmp_path, num_steps=30, backend="numpy")
    assert main(["inspect", f"--path={tmp_path}", "--prompt=4+4=8", "--backward", "--neighbours=4"]) == 0
    out = capsys.readouterr().out
    for word in ("hidden.weight", "tanh.y", "dlogits", "3 '='", "after 4 '8'"):
        assert word in out
