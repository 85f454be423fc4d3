"""Dense mixture of experts: y = sum over e of gate(x)_e expert_e(x), every expert an MLP of its own.

The Little Baby's `moe`: the gate is a softmax over all experts and none is left out. Then the experts are one
wide MLP: their weights stand side by side, and the gate scales each expert's hidden channels. Two products of
matrices do the work of eight.
"""

from baby_xp.arrays.params import normal, scaled, zeros
from baby_xp.layers import dropout, gelu, linear, mlp, softmax

DROPOUTS = 1  # places in one block: output
EXPANSION, EXPERTS = mlp.EXPANSION, 4


def spec(C: int, residual_scale: float = 1.0, activation=gelu, bias: bool = True):
    """gate (C, E); up (C, E F), the experts side by side; down (E F, C) and one bias (C,) for each expert.

    For an activation that makes one channel of two, up is (C, 2 E F): first what it takes first, of all experts.
    """
    wide = EXPERTS * mlp.width(C, activation)
    down = {"weight": normal(wide, C), **({"bias": zeros(EXPERTS, C)} if bias else {})}
    return {
        "gate": linear.spec(C, EXPERTS, bias=False),
        "up": linear.spec(C, activation.INPUTS * wide, bias),
        "down": scaled(down, residual_scale),
    }


def forward(xp, p, x, noise=(None,), activation=gelu, *form):
    """x (N, C) -> y (N, C). `noise` is that of its dropout, `form` the activation's, if it has several."""
    gate, gate_saved = linear.forward(xp, p["gate"], x)            # (N, E)
    gate, softmax_saved = softmax.forward(xp, {}, gate)
    h, up_saved = linear.forward(xp, p["up"], x)                   # (N, E F)
    h, activation_saved = activation.forward(xp, {}, h, *form)
    h = xp.reshape(h, (*gate.shape, -1))                           # (N, E, F)
    gated = xp.reshape(gate[:, :, None] * h, (x.shape[0], -1))     # (N, E F)
    y = gated @ p["down"]["weight"]                                # (N, C)
    if "bias" in p["down"]:
        y = y + gate @ p["down"]["bias"]
    y, dropout_saved = dropout.forward(xp, {}, y, noise[0])
    return y, (gate_saved, softmax_saved, up_saved, activation_saved, h, gated, dropout_saved)


def backward(xp, p, saved, dy, activation=gelu):
    """dy (N, C) -> dp, dx (N, C)."""
    gate_saved, softmax_saved, up_saved, activation_saved, h, gated, dropout_saved = saved
    (gate,) = softmax_saved
    _, dy = dropout.backward(xp, {}, dropout_saved, dy)
    ddown = {"weight": xp.matrix_transpose(gated) @ dy}            # (E F, C)
    dgated = xp.reshape(dy @ xp.matrix_transpose(p["down"]["weight"]), h.shape)
    dgate = xp.sum(dgated * h, axis=-1)                            # (N, E)
    if "bias" in p["down"]:
        ddown["bias"] = xp.matrix_transpose(gate) @ dy             # (E, C)
        dgate = dgate + dy @ xp.matrix_transpose(p["down"]["bias"])
    dh = xp.reshape(gate[:, :, None] * dgated, gated.shape)        # (N, E F)
    _, dh = activation.backward(xp, {}, activation_saved, dh)
    dup, dx = linear.backward(xp, p["up"], up_saved, dh)
    _, dgate = softmax.backward(xp, {}, softmax_saved, dgate)
    dgate, dx_gate = linear.backward(xp, p["gate"], gate_saved, dgate)
    return {"gate": dgate, "up": dup, "down": ddown}, dx + dx_gate
