"""A transformer block: attention and a feed-forward network, each with a residual connection and a norm.

    pre    x = x + attention(norm1(x));  x = x + network(norm2(x))     (GPT-2)
    post   x = norm1(x + attention(x));  x = norm2(x + network(x))     (Vaswani et al. 2017)

The three switches are The Little Baby's: c_sequence, c_attention, c_network.
"""

from typing import Any, NamedTuple

from baby_xp.layers import attention, layernorm, mixture_of_experts, mixture_of_heads, mlp

ATTENTIONS = {"mha": attention, "moh": mixture_of_heads}
NETWORKS = {"mlp": mlp, "moe": mixture_of_experts}


class Parts(NamedTuple):
    """What a block is built of: the order of its norms, and the modules of its two halves."""

    sequence: str
    attention: Any
    network: Any
    gelu: str = "tanh"

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
        "norm1": layernorm.spec(C),
        "attention": parts.attention.spec(C, S, H, residual_scale),
        "norm2": layernorm.spec(C),
        "network": parts.network.spec(C, residual_scale),
    }


def forward(xp, p, x, parts: Parts, shape, noise=None, past=None):
    """x (N, C) -> y (N, C). `noise`: one entry for each dropout place, or None; `past` as in heads.forward."""
    noise = noise or [None] * parts.dropouts
    places = parts.attention.DROPOUTS
    attend = (parts.attention.forward, p["attention"], shape, noise[:places], past)
    feed = (parts.network.forward, p["network"], noise[places:], parts.gelu)
    half = {"pre": pre_forward, "post": post_forward}[parts.sequence]
    x, attention_saved = half(xp, p["norm1"], x, *attend)
    y, network_saved = half(xp, p["norm2"], x, *feed)
    return y, Saved(attention_saved, network_saved)


def backward(xp, p, saved, dy, parts: Parts):
    """dy (N, C) -> dp, dx (N, C)."""
    attention_saved, network_saved = saved
    half = {"pre": pre_backward, "post": post_backward}[parts.sequence]
    dnorm2, dnetwork, dx = half(xp, p["norm2"], network_saved, dy, parts.network.backward, p["network"])
    dnorm1, dattention, dx = half(xp, p["norm1"], attention_saved, dx, parts.attention.backward, p["attention"])
    return {"norm1": dnorm1, "attention": dattention, "norm2": dnorm2, "network": dnetwork}, dx


def pre_forward(xp, norm, x, layer, p, *arguments):
    """y = x + layer(norm(x))."""
    normed, norm_saved = layernorm.forward(xp, norm, x)
    y, layer_saved = layer(xp, p, normed, *arguments)
    return x + y, SavedHalf(norm_saved, layer_saved)


def pre_backward(xp, norm, saved, dy, layer_backward, p):
    """dy (N, C) -> gradients of the norm and of the layer, dx (N, C)."""
    norm_saved, layer_saved = saved
    dp, dnormed = layer_backward(xp, p, layer_saved, dy)
    dnorm, dx = layernorm.backward(xp, norm, norm_saved, dnormed)
    return dnorm, dp, dy + dx


def post_forward(xp, norm, x, layer, p, *arguments):
    """y = norm(x + layer(x))."""
    y, layer_saved = layer(xp, p, x, *arguments)
    y, norm_saved = layernorm.forward(xp, norm, x + y)
    return y, SavedHalf(norm_saved, layer_saved)


def post_backward(xp, norm, saved, dy, layer_backward, p):
    """dy (N, C) -> gradients of the norm and of the layer, dx (N, C)."""
    norm_saved, layer_saved = saved
    dnorm, dsum = layernorm.backward(xp, norm, norm_saved, dy)
    dp, dx = layer_backward(xp, p, layer_saved, dsum)
    return dnorm, dp, dsum + dx
