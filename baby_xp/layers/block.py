"""A transformer block: attention and a feed-forward network, each with a residual connection and a norm.

    pre    x = x + attention(norm1(x));  x = x + network(norm2(x))     (GPT-2)
    post   x = norm1(x + attention(x));  x = norm2(x + network(x))     (Vaswani et al. 2017)

Parts says what a block is built of. Its modules are chosen by name from the tables below: the alternatives of a
table have the same functions.
"""

from typing import Any, NamedTuple

from baby_xp.layers import (
    attention,
    gelu,
    layernorm,
    mixture_of_experts,
    mixture_of_heads,
    mlp,
    relu2,
    rmsnorm,
    rmsnorm_gain,
    swiglu,
)
from baby_xp.layers.query_key import NO_STEPS, Steps

ATTENTIONS = {"mha": attention, "moh": mixture_of_heads}
NETWORKS = {"mlp": mlp, "moe": mixture_of_experts}
NORMS = {"layernorm": layernorm, "rmsnorm": rmsnorm, "rmsnorm-gain": rmsnorm_gain}
ACTIVATIONS = {"gelu": gelu, "relu2": relu2, "swiglu": swiglu}


class Parts(NamedTuple):
    """What a block is built of: the order of its norms, and the modules of its two halves and within them."""

    sequence: str
    attention: Any
    network: Any
    norm: Any = layernorm
    activation: Any = gelu
    form: tuple[str, ...] = ()
    """That of the activation, if it has several."""
    query_key: Steps = NO_STEPS
    qkv_bias: bool = False
    bias: bool = True
    """Whether the other linear layers of attention and network have one."""

    @property
    def dropouts(self) -> int:
        """Places of dropout in one block."""
        return self.attention.DROPOUTS + self.network.DROPOUTS


class Saved(NamedTuple):
    """What the two halves have saved."""

    attention: "SavedHalf"
    network: "SavedHalf"


class SavedHalf(NamedTuple):
    """What the norm and the layer of a half have saved."""

    norm: Any
    layer: Any


def spec(parts: Parts, C: int, S: int, H: int, residual_scale: float = 1.0):
    """Parameters of one block; `residual_scale` is the factor of params.scaled."""
    return {
        "norm1": parts.norm.spec(C),
        "attention": parts.attention.spec(C, S, H, residual_scale, parts.qkv_bias, parts.bias),
        "norm2": parts.norm.spec(C),
        "network": parts.network.spec(C, residual_scale, parts.activation, parts.bias),
    }


def forward(xp, p, x, parts: Parts, shape, noise=None, past=None):
    """x (N, C) -> y (N, C). `noise`: one entry for each dropout place, or None; `past` as in heads.forward."""
    noise = noise or [None] * parts.dropouts
    places = parts.attention.DROPOUTS
    attend = (parts.attention.forward, p["attention"], shape, noise[:places], past, parts.query_key)
    feed = (parts.network.forward, p["network"], noise[places:], parts.activation, *parts.form)
    half = {"pre": pre_forward, "post": post_forward}[parts.sequence]
    x, attention_saved = half(xp, parts.norm, p.get("norm1", {}), x, *attend)
    y, network_saved = half(xp, parts.norm, p.get("norm2", {}), x, *feed)
    return y, Saved(attention_saved, network_saved)


def backward(xp, p, saved, dy, parts: Parts):
    """dy (N, C) -> dp, dx (N, C)."""
    attend = (parts.attention.backward, p["attention"])
    feed = (parts.network.backward, p["network"], parts.activation)
    half = {"pre": pre_backward, "post": post_backward}[parts.sequence]
    dnorm2, dnetwork, dx = half(xp, parts.norm, p.get("norm2", {}), saved.network, dy, *feed)
    dnorm1, dattention, dx = half(xp, parts.norm, p.get("norm1", {}), saved.attention, dx, *attend)
    return {"norm1": dnorm1, "attention": dattention, "norm2": dnorm2, "network": dnetwork}, dx


def pre_forward(xp, norm, norm_p, x, layer, p, *arguments):
    """y = x + layer(norm(x))."""
    normed, norm_saved = norm.forward(xp, norm_p, x)
    y, layer_saved = layer(xp, p, normed, *arguments)
    return x + y, SavedHalf(norm_saved, layer_saved)


def pre_backward(xp, norm, norm_p, saved, dy, layer_backward, p, *arguments):
    """dy (N, C) -> gradients of the norm and of the layer, dx (N, C)."""
    norm_saved, layer_saved = saved
    dp, dnormed = layer_backward(xp, p, layer_saved, dy, *arguments)
    dnorm, dx = norm.backward(xp, norm_p, norm_saved, dnormed)
    return dnorm, dp, dy + dx


def post_forward(xp, norm, norm_p, x, layer, p, *arguments):
    """y = norm(x + layer(x))."""
    y, layer_saved = layer(xp, p, x, *arguments)
    y, norm_saved = norm.forward(xp, norm_p, x + y)
    return y, SavedHalf(norm_saved, layer_saved)


def post_backward(xp, norm, norm_p, saved, dy, layer_backward, p, *arguments):
    """dy (N, C) -> gradients of the norm and of the layer, dx (N, C)."""
    norm_saved, layer_saved = saved
    dnorm, dsum = norm.backward(xp, norm_p, norm_saved, dy)
    dp, dx = layer_backward(xp, p, layer_saved, dsum, *arguments)
    return dnorm, dp, dsum + dx
