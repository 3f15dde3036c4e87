"""HHFT for one candidate, float64: heterogeneous layers, pooling, Hiformer layers, towers.

Settings `s`: a dict with heads, hetero_layers, layers, virtual_tokens, pool, tower, tasks, norm,
norm_place, prune, tokenizer, tokens, poolings.
"""

import numpy as np

from tests.references import din
from tests.references import hiformer as shared


def hiformer_attention(z_w, p, heads, M):
    """The M virtual tokens of one vector, each with its own three projections, attend: [M, H V]."""
    rows = {}
    for name in ("query", "key", "value"):
        kernel = p[name]["kernel"]
        width = kernel.shape[1] // M
        rows[name] = np.stack([z_w @ kernel[:, m * width : (m + 1) * width] for m in range(M)])
    return shared.attend(rows["query"], rows["key"], rows["value"], heads)


def hiformer_layer(t_w, p, heads, M, norm, norm_place):
    own = p.get("norm")
    z_w = shared.normalise(t_w, own, norm) if norm_place == "pre" else t_w
    together = np.concatenate(list(hiformer_attention(z_w, p, heads, M)))
    y_w = t_w + din.dense(shared.gelu(din.dense(together, p["ffn_in"])), p["ffn_out"])
    return shared.normalise(y_w, own, norm) if norm_place == "post" else y_w


def pooled(x_td, kind, tasks):
    """The vectors that the Hiformer layers read: one per task, or one for all."""
    if kind == "task":
        return list(x_td[:tasks])
    if kind == "concat":
        return [np.concatenate(list(x_td))]
    total = sum(x_td)
    return [total / len(x_td) if kind == "mean" else total]


def logits(sample, p, s):
    found = shared.features(sample, s["poolings"], p)
    x_td = shared.tokens(found, p["tokenizer"], s["tokenizer"], s["tokens"], 0)
    x_td = np.concatenate([p["cls"]["tokens"], x_td])
    for layer in range(s["hetero_layers"]):
        last = s["prune"] and s["pool"] == "task" and layer == s["hetero_layers"] - 1
        outputs = s["tasks"] if last else len(x_td)
        own = p[f"hetero_{layer}"]
        x_td = shared.block(x_td, own, s["heads"], outputs, s["norm"], s["norm_place"])
    rows = []
    for t_w in pooled(x_td, s["pool"], s["tasks"]):
        for layer in range(s["layers"]):
            own = p[f"hiformer_{layer}"]
            t_w = hiformer_layer(
                t_w, own, s["heads"], s["virtual_tokens"], s["norm"], s["norm_place"]
            )
        if s["norm_place"] == "pre":
            t_w = shared.normalise(t_w, p.get("out_norm"), s["norm"])
        rows.append(t_w)
    rows = rows if len(rows) == s["tasks"] else rows * s["tasks"]
    return shared.head(rows, p["tower"], len(s["tower"]))
