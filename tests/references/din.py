"""The inputs of one candidate, its history pooled by a mean or by DIN's target attention; float64.

ITEMS and EVENTS name the history features in the order in which an event's vector holds them.
"""

import numpy as np

ITEMS, EVENTS = ("item", "price", "tag"), ("action",)
USER, CONTEXT = ("age", "spend"), ("hour",)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def activate(x, p, layer, activation):
    if activation == "sigmoid":
        return sigmoid(x)
    gate = sigmoid(p[f"dice_scale_{layer}"] * (x - p[f"dice_center_{layer}"]))
    return gate * x + (1 - gate) * p[f"dice_alpha_{layer}"] * x


def weight(h, own, c, p, activation):
    """a(h, c): an MLP on [own, h, c, h - c, h * c], own = what only the event has."""
    x = dense(np.concatenate([own, h, c, h - c, h * c]), p)
    x = activate(x, p, 0, activation)
    layer = 1
    while f"dense_{layer}" in p:
        x = activate(dense(x, p[f"dense_{layer}"]), p, layer, activation)
        layer += 1
    return dense(x, p["weight"])[0]


def target(history, candidate, p, activation):
    """Sum over events of a(h, c) [h, own], one event at a time."""
    c = np.concatenate([candidate[name] for name in ITEMS])
    width = len(c) + sum(history[name].shape[1] for name in EVENTS)
    total = np.zeros(width)
    for s in range(len(history["item"])):
        h = np.concatenate([history[name][s] for name in ITEMS])
        own = np.concatenate([history[name][s] for name in EVENTS])
        total += weight(h, own, c, p, activation) * np.concatenate([h, own])
    return total


def mean(history):
    rows = np.concatenate([history[name] for name in (*ITEMS, *EVENTS)], axis=1)
    return rows.mean(axis=0) if len(rows) else np.zeros(rows.shape[1])


def hidden(x, p, activation):
    """f(x W + b) of one hidden layer."""
    z = dense(x, p["dense"])
    if activation == "relu":
        return np.maximum(z, 0)
    if activation == "prelu":
        return np.where(z > 0, z, p["alpha"] * z)
    share = sigmoid(p["scale"] * (z - p["center"]))
    return share * z + (1 - share) * p["alpha"] * z


def logits(sample, p, layers, poolings, activation, attention_activation, normalise, place):
    """normalise(x, its parameters): the norm of a layer, before or behind it."""
    x = inputs(sample, poolings, p, attention_activation)
    for layer in range(layers):
        q = p[f"layer_{layer}"]
        if place == "pre":
            x = hidden(normalise(x, q.get("norm")), q, activation)
        else:
            x = normalise(hidden(x, q, activation), q.get("norm"))
    return dense(x, p["heads"]["logits"])


def inputs(sample, poolings, p, activation="sigmoid"):
    """Everything about one candidate side by side: user, item, context, then each pooling."""
    found = [sample["user"][name] for name in USER]
    found += [sample["candidate"][name] for name in (*ITEMS, *CONTEXT)]
    for pooling in poolings:
        if pooling == "mean":
            found.append(mean(sample["history"]))
        else:
            attention = p["history"]["attention"]
            found.append(target(sample["history"], sample["candidate"], attention, activation))
    return np.concatenate(found)
