"""Soft cap: cap * tanh(x / cap) keeps every number between -cap and cap (Gemma Team 2024, section 2).

Small numbers stay as they are, nearly; large ones approach the cap, and their gradient fades.
"""


def forward(xp, p, x, cap: float = 0.0):
    """x, any shape -> y, of the same shape. A cap of 0: x itself."""
    if not cap:
        return x, None
    tanh = xp.tanh(x / cap)
    return cap * tanh, (tanh,)


def backward(xp, p, saved, dy):
    """dy, shaped as x -> dp, dx."""
    if saved is None:
        return {}, dy
    (tanh,) = saved
    return {}, (1 - tanh * tanh) * dy
