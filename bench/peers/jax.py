"""JAX: baby_xp's GPT as a JAX user would write it: a pure function, autodiff, one jitted step.

The parameters are baby_xp's own tree. AdamW and clipping are written out, as XLA fuses them into the step.
"""

import functools

import jax
import jax.numpy as jnp

from baby_xp.resources import process_memory
from baby_xp.training.loop import READ_EVERY
from bench import peers
from bench.peers import SEED, Clock, Outcome
from bench.workloads import Workload, on_gpu

EPS = 1e-5


def train(
    workload: Workload, dropout: float, clock: Clock, backend: str = "numpy", precision: str = "float32"
) -> Outcome:
    """Train on all cores, or on the GPU where baby_xp is on it."""
    device = jax.devices("gpu" if on_gpu(backend) else "cpu")[0]
    jax.config.update("jax_default_device", device)
    set_precision(precision)
    clock.wait = lambda: unread and unread[-1].block_until_ready()
    config, spec = workload.training(len(clock)), workload.model(dropout)
    params = jax.tree.map(jnp.asarray, peers.first_weights(spec))
    m, v = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    state = {"params": params, "m": m, "v": v, "step": jnp.zeros((), jnp.int32), "key": jax.random.key(SEED)}
    step, unread, read = make_step(spec.config, config), [], 0.0
    for number in range(len(clock)):
        batch = clock.batch(number)
        state, value = step(state, batch.inputs, batch.targets)
        unread.append(value)
        if not on_gpu(backend):
            value.block_until_ready()  # otherwise a step would seem to end when it is launched
        if len(unread) == READ_EVERY or number + 1 == len(clock):
            read, unread = float(sum(unread)) / len(unread), []  # waits for the device
    loss_of, start = jax.jit(loss, static_argnums=1), clock.batches[0]
    last = float(loss_of(state["params"], spec.config, start.inputs, start.targets))
    about = {"jax": jax.__version__, "device": str(device)}
    return Outcome([read, last], about, process_memory.taken())


def set_precision(precision: str) -> None:
    """Set what float32 products round to. On a GPU, JAX's default is TF32."""
    jax.config.update("jax_default_matmul_precision", {"float32": "highest", "tf32": "tensorfloat32"}[precision])


def layernorm(p, x):
    """x (B, T, C) with mean 0 and variance 1 over channels, scaled and shifted."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
    return p["gain"] * (x - mean) * jax.lax.rsqrt(variance + EPS) + p["bias"]


def dropout(key, rate: float, x):
    """x with a share `rate` of its elements set to zero, the others scaled up; without a key, x itself."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def attention(p, x, H: int, rate: float, key):
    """Causal self-attention, (B, T, C) -> (B, T, C)."""
    B, T, _ = x.shape
    q, k, v = jnp.split((x @ p["qkv"]["weight"]).reshape(B, T, 3 * H, -1), 3, axis=2)  # each (B, T, H, D)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)
    weights = dropout(key, rate, jax.nn.softmax(scores, axis=-1))
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(B, T, -1)
    return y @ p["out"]["weight"] + p["out"]["bias"]


def network(p, x):
    """The feed-forward half of a block."""
    h = jax.nn.gelu(x @ p["up"]["weight"] + p["up"]["bias"], approximate=True)
    return h @ p["down"]["weight"] + p["down"]["bias"]


def loss(p, config, ids, targets, key=None):
    """ids, targets (B, T) -> mean loss in nats per token; `key` for dropout, None without."""
    rate, L = config.dropout, config.n_layers
    keys = jax.random.split(key, 3 * L) if key is not None and rate else [None] * 3 * L
    x = p["wte"]["weight"][ids] + p["wpe"]["weight"][: ids.shape[1]]
    for i in range(L):
        block = p["blocks"][str(i)]
        half = attention(block["attention"], layernorm(block["norm1"], x), config.n_heads, rate, keys[3 * i])
        x = x + dropout(keys[3 * i + 1], rate, half)
        half = network(block["network"], layernorm(block["norm2"], x))
        x = x + dropout(keys[3 * i + 2], rate, half)
    logits = layernorm(p["ln_f"], x) @ p["lm_head"]["weight"] + p["lm_head"]["bias"]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    return -jnp.mean(chosen)


def make_step(config, train):
    """A jitted step by a GPTConfig and a TrainConfig: (state, ids, targets) -> state, loss."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, ids, targets):
        key, used = jax.random.split(state["key"])
        value, gradients = jax.value_and_grad(loss)(state["params"], config, ids, targets, used)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
        gradients = jax.tree.map(lambda g: g * jnp.minimum(1, train.clip / (norm + 1e-6)), gradients)
        t = state["step"] + 1
        mean = lambda beta: lambda old, new: beta * old + (1 - beta) * new  # noqa: E731
        m = jax.tree.map(mean(train.beta1), state["m"], gradients)
        v = jax.tree.map(mean(train.beta2), state["v"], jax.tree.map(jnp.square, gradients))

        def moved(w, m, v):
            update = (m / (1 - train.beta1**t)) / (jnp.sqrt(v / (1 - train.beta2**t)) + 1e-8)
            return w - train.lr * (update + (train.weight_decay * w if w.ndim > 1 else 0))

        params = jax.tree.map(moved, state["params"], m, v)
        return {"params": params, "m": m, "v": v, "step": t, "key": key}, value

    return step
