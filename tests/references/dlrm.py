"""DLRM-MLP for one candidate, float64: a plain deep network on its inputs side by side."""

import numpy as np

from tests.references import din


def normalise(x, p, kind):
    if kind == "none":
        return x
    if kind == "rms":
        return x / np.sqrt((x**2).mean() + 1e-6) * p["scale"]
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * p["scale"] + p["bias"]


def mlp(x, p, layers, norm="none", norm_place="post"):
    for layer in range(layers):
        weights, norm_p = p.get(f"dense_{layer}"), p.get(f"norm_{layer}")
        if norm_place == "pre":
            x = np.maximum(din.dense(normalise(x, norm_p, norm), weights), 0)
        else:
            x = normalise(np.maximum(din.dense(x, weights), 0), norm_p, norm)
    return x


def logits(sample, p, layers, poolings, activation="sigmoid", norm="none", norm_place="post"):
    x = din.inputs(sample, poolings, p, activation)
    return din.dense(mlp(x, p["mlp"], layers, norm, norm_place), p["heads"]["logits"])
