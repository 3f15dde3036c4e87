"""One candidate's inputs by name, and one token per input; float64."""

import numpy as np

from tests.references import din


def named(sample, poolings, p, activation="sigmoid"):
    """{name: vector} in the order of din.inputs: user, item, context, then each pooling."""
    found = {f"user.{name}": sample["user"][name] for name in din.USER}
    for name in (*din.ITEMS, *din.CONTEXT):
        found[f"candidate.{name}"] = sample["candidate"][name]
    for pooling in poolings:
        if pooling == "mean":
            pooled = din.mean(sample["history"])
        else:
            attention = p["history"]["attention"]
            pooled = din.target(sample["history"], sample["candidate"], attention, activation)
        for name in (*din.ITEMS, *din.EVENTS):
            width = sample["history"][name].shape[1]
            found[f"history_{pooling}.{name}"], pooled = pooled[:width], pooled[width:]
    return found


def tokens(sample, poolings, p):
    """[T, D]: every input through a dense layer of its own."""
    found = named(sample, poolings, p)
    return np.stack([din.dense(x, p["tokenizer"][name]) for name, x in found.items()])


def normalise(x, p, kind):
    """LayerNorm, RMSNorm or nothing over the last axis."""
    if kind == "none":
        return x
    if kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
    return x * p["scale"] + (p["bias"] if kind == "layer" else 0)


def attention(x_td, p, heads, scale):
    """Head by head and token by token; the heads' outputs side by side."""
    out = []
    for token in x_td:
        parts = []
        for h in range(heads):
            query, key, value = (
                np.split(p[name]["kernel"], heads, axis=1)[h] for name in ("query", "key", "value")
            )
            scores = np.array([scale * (token @ query) @ (other @ key) for other in x_td])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            parts.append(sum(w * (other @ value) for w, other in zip(weights, x_td, strict=True)))
        out.append(np.concatenate(parts))
    return np.stack(out)
