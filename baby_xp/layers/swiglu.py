"""SwiGLU: one half of the channels, passed through SiLU, multiplies the other half (Shazeer 2020).

SiLU is a sigmoid(a), smooth like GELU. In Shazeer's formula a and b are two linear layers of the same input; here
one layer computes both, as one product is faster than two.
"""

from baby_xp.arrays.namespace import replaceable

INPUTS = 2  # channels that go in for each that comes out


@replaceable
def forward(xp, p, x):
    """x (N, 2 F): a and b side by side -> y (N, F), a sigmoid(a) b."""
    F = x.shape[1] // 2
    a, b = x[:, :F], x[:, F:]                                      # (N, F) each
    sigmoid = 0.5 * (1 + xp.tanh(0.5 * a))                         # exp(-a) could overflow
    return a * sigmoid * b, (a, b, sigmoid)


@replaceable
def backward(xp, p, saved, dy):
    """dy (N, F) -> dp, dx (N, 2 F)."""
    a, b, sigmoid = saved
    silu = a * sigmoid
    da = dy * b * (sigmoid + silu * (1 - sigmoid))                 # (N, F)
    db = dy * silu                                                 # (N, F)
    return {}, xp.concat([da, db], axis=1)
