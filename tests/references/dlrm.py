"""DLRM-MLP and DLRM for one candidate, float64."""

import numpy as np

from tests.references import din, feature_tokens


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
    return din.dense(mlp(x, p.get("mlp"), layers, norm, norm_place), p["heads"]["logits"])


def dot_logits(sample, p, layers, bottom_layers, poolings, norm="none", norm_place="post"):
    """DLRM with a vector per categorical input: one pair of vectors after the other."""
    found = feature_tokens.named(sample, poolings, p)
    dense = np.concatenate([x for x in found.values() if len(x) == 1])
    bottom = mlp(dense, p["bottom"], bottom_layers, norm, norm_place)
    vectors = [bottom]
    vectors += [din.dense(x, p["tokenizer"][name]) for name, x in found.items() if len(x) > 1]
    products = [
        sum(a * b for a, b in zip(vectors[i], vectors[j], strict=True))
        for i in range(len(vectors))
        for j in range(i + 1, len(vectors))
    ]
    x = np.concatenate([bottom, products])
    return din.dense(mlp(x, p["top"], layers, norm, norm_place), p["heads"]["logits"])
