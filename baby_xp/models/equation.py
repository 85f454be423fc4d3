"""The equation model of babyLLM: a context of few tokens in, the next token out.

trainable embedding -> flattened context -> W1, b1 -> hidden -> W2, b2 -> logits (Bengio et al. 2003 without
its direct connections).
"""

from baby_xp.layers import embedding, gelu, linear, tanh

ACTIVATIONS = {"tanh": tanh, "gelu": gelu}


def spec(config, V: int):
    """Parameters of an equation model with V token ids."""
    return {
        "embedding": embedding.spec(V, config.n_emb, config.std),
        "hidden": linear.spec(config.n_ctx * config.n_emb, config.n_hidden, std=config.std),
        "output": linear.spec(config.n_hidden, V, std=config.std),
    }


def dropouts(config) -> int:
    """The equation model has no dropout."""
    return 0


def forward(xp, p, ids, config, noise=None):
    """ids (B, T) with T = n_ctx -> logits (B, V), saved."""
    x, embedding_saved = embedding.forward(xp, p["embedding"], xp.reshape(ids, (-1,)))
    x = xp.reshape(x, (ids.shape[0], -1))                          # (B, T C)
    h, hidden_saved = linear.forward(xp, p["hidden"], x)           # (B, hidden)
    h, activation_saved = ACTIVATIONS[config.activation].forward(xp, {}, h)
    logits, output_saved = linear.forward(xp, p["output"], h)      # (B, V)
    return logits, (embedding_saved, hidden_saved, activation_saved, output_saved)


def backward(xp, p, saved, dlogits, config):
    """dlogits (B, V) -> dp."""
    embedding_saved, hidden_saved, activation_saved, output_saved = saved
    doutput, dh = linear.backward(xp, p["output"], output_saved, dlogits)
    _, dh = ACTIVATIONS[config.activation].backward(xp, {}, activation_saved, dh)
    dhidden, dx = linear.backward(xp, p["hidden"], hidden_saved, dh)
    dx = xp.reshape(dx, (-1, config.n_emb))                        # (B T, C)
    dembedding = embedding.backward(xp, p["embedding"], embedding_saved, dx)
    return {"embedding": dembedding, "hidden": dhidden, "output": doutput}
