"""DCN-V2 for one candidate, float64, layer by layer as the paper writes it."""

import numpy as np

from tests.references import din, dlrm


def cross(x0, x, p):
    """x0 * (W x + b) + x with W full, U V^T, or a gated mixture of low-rank experts."""
    if "w" in p:
        return x0 * (p["w"]["kernel"].T @ x + p["w"]["bias"]) + x
    if "gate" not in p:
        low = p["v"]["kernel"].T @ x
        return x0 * (p["u"]["kernel"].T @ low + p["u"]["bias"]) + x
    scores = p["gate"]["kernel"].T @ x + p["gate"].get("bias", 0)
    gates = np.exp(scores - scores.max())
    gates /= gates.sum()
    out = x.copy()
    for i, gate in enumerate(gates):
        low = np.tanh(p["c"][i].T @ np.tanh(p["v"][i].T @ x))
        out += gate * x0 * (p["u"][i].T @ low + p["bias"])
    return out


def logits(sample, p, layers, deep_layers, poolings, structure, activation="sigmoid"):
    x0 = din.inputs(sample, poolings, p, activation)
    x = x0
    for layer in range(layers):
        x = cross(x0, x, p[f"cross_{layer}"])
    if structure == "stacked":
        out = dlrm.mlp(x, p["deep"], deep_layers) if deep_layers else x
    elif deep_layers:
        out = np.concatenate([x, dlrm.mlp(x0, p["deep"], deep_layers)])
    else:
        out = x
    return din.dense(out, p["heads"]["logits"])
