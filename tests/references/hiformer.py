"""HeteroAtt and Hiformer for one candidate, float64, token by token and head by head.

The order of tokens: task tokens, then those of the features. Settings `s`: a dict with heads,
layers, tasks, norm, norm_place, prune, tokenizer, tokens, dense_tokens, poolings.
"""

import math

import numpy as np

from tests.references import din

erf = np.vectorize(math.erf, otypes=[float])
GROUPS = {"user": 2, "item": 3, "context": 1}  # how many inputs each group has, before the history


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def normalise(x_d, p, kind):
    """Of one vector, with its own scale and bias."""
    if kind == "none":
        return x_d
    if kind == "rms":
        return x_d / math.sqrt((x_d**2).mean() + 1e-6) * p["scale"]
    centred_d = x_d - x_d.mean()
    return centred_d / math.sqrt((centred_d**2).mean() + 1e-6) * p["scale"] + p["bias"]


def own_norms(x_td, p, kind):
    """Token t with its own scale and bias."""
    if kind == "none":
        return x_td
    own = [{name: value[t] for name, value in p["norm"].items()} for t in range(len(x_td))]
    return np.stack([normalise(x_d, q, kind) for x_d, q in zip(x_td, own, strict=True)])


def attend(q_pf, k_tf, v_tf, heads):
    """Rows of H heads side by side: softmax over keys, per query and head."""
    Q, V = q_pf.shape[1] // heads, v_tf.shape[1] // heads
    out = np.zeros((len(q_pf), heads * V))
    for i in range(len(q_pf)):
        for h in range(heads):
            q = q_pf[i, h * Q : (h + 1) * Q]
            keys = k_tf[:, h * Q : (h + 1) * Q]
            scores = np.array([q @ k for k in keys]) / math.sqrt(Q)
            for w, v in zip(softmax(scores), v_tf[:, h * V : (h + 1) * V], strict=True):
                out[i, h * V : (h + 1) * V] += w * v
    return out


def own_matrices(x_td, kernel):
    return np.stack([x_td[t] @ kernel[t] for t in range(len(kernel))])


def projected(x_td, p, tokens):
    """concat of all tokens, times one matrix or two factors, cut into `tokens` rows."""
    whole = np.concatenate(list(x_td))
    matrix = p["kernel"] if "kernel" in p else p["left"] @ p["right"]
    return (whole @ matrix).reshape(tokens, -1)


def attention(x_td, p, heads, outputs):
    """Each projection composite where its parameters are; else one matrix per token."""
    found = {}
    for name, tokens in (("query", outputs), ("key", len(x_td)), ("value", len(x_td))):
        if "left" in p[name] or p[name]["kernel"].ndim == 2:
            found[name] = projected(x_td, p[name], tokens)
        else:
            found[name] = own_matrices(x_td[:tokens], p[name]["kernel"])
    a_pf = attend(found["query"], found["key"], found["value"], heads)
    return own_matrices(a_pf, p["out"]["kernel"])


def feed_forward(x_td, p):
    first, second = p["ffn_in"], p["ffn_out"]
    rows = []
    for t in range(len(x_td)):
        h_f = gelu(x_td[t] @ first["kernel"][t] + first["bias"][t])
        rows.append(h_f @ second["kernel"][t] + second["bias"][t])
    return np.stack(rows)


def block(x_td, p, heads, outputs, norm, norm_place):
    attention_norm, ffn_norm = p.get("attention_norm"), p.get("ffn_norm")
    kept = x_td[:outputs]
    if norm_place == "post":
        s = own_norms(kept + attention(x_td, p["attention"], heads, outputs), attention_norm, norm)
        return own_norms(s + feed_forward(s, p["ffn"]), ffn_norm, norm)
    z = own_norms(x_td, attention_norm, norm)
    s = kept + attention(z, p["attention"], heads, outputs)
    return s + feed_forward(own_norms(s, ffn_norm, norm), p["ffn"])


def features(sample, poolings, p):
    """{name: vector} of one candidate, in the order of groups, the pooled history last."""
    found = {f"user.{name}": sample["user"][name] for name in din.USER}
    for name in (*din.ITEMS, *din.CONTEXT):
        found[f"candidate.{name}"] = sample["candidate"][name]
    for pooling in poolings:
        if pooling == "mean":
            pooled = din.mean(sample["history"])
        else:
            attention_p = p["history"]["attention"]
            pooled = din.target(sample["history"], sample["candidate"], attention_p, "sigmoid")
        at = 0
        for name in (*din.ITEMS, *din.EVENTS):
            width = sample["history"][name].shape[1]
            found[f"history_{pooling}.{name}"] = pooled[at : at + width]
            at += width
    return found


def tokens(found, p, kind, count, dense_tokens):
    """Feature tokens [T, D] of the inputs {name: vector}."""
    if kind == "per_feature":
        wide = {name: x for name, x in found.items() if len(x) > 1 or not dense_tokens}
        rows = [din.dense(x, p[name]) for name, x in wide.items()]
        if dense_tokens:
            dense = np.concatenate([x for x in found.values() if len(x) == 1])
            rows += list(din.dense(dense, p["dense"]).reshape(dense_tokens, -1))
        return np.stack(rows)
    if kind == "group":
        names, rows, at = list(found), [], 0
        for group, size in (*GROUPS.items(), ("history", len(found) - sum(GROUPS.values()))):
            together = np.concatenate([found[name] for name in names[at : at + size]])
            rows.append(din.dense(together, p[group]))
            at += size
        return np.stack(rows)
    whole = np.concatenate(list(found.values()))
    if kind == "auto_split":
        return din.dense(whole, p["all"]).reshape(count, -1)
    d = -(-len(whole) // count)
    padded = np.zeros(count * d)
    padded[: len(whole)] = whole
    kernel, bias = p["slices"]["kernel"], p["slices"]["bias"]
    return np.stack([padded[t * d : (t + 1) * d] @ kernel[t] + bias[t] for t in range(count)])


def head(x_kd, p, hidden):
    """Task k reads row k through `hidden` ReLU layers and one output."""
    found = []
    for k, x in enumerate(x_kd):
        for layer in range(hidden):
            own = p[f"hidden_{layer}"]
            x = np.maximum(x @ own["kernel"][k] + own["bias"][k], 0)
        found.append((x @ p["logits"]["kernel"][k] + p["logits"]["bias"][k])[0])
    return np.array(found)


def logits(sample, p, s):
    found = features(sample, s["poolings"], p)
    x_td = tokens(found, p["tokenizer"], s["tokenizer"], s["tokens"], s["dense_tokens"])
    x_td = np.concatenate([p["task"]["tokens"], x_td])
    for layer in range(s["layers"]):
        last = s["prune"] and layer == s["layers"] - 1
        outputs = s["tasks"] if last else len(x_td)
        x_td = block(x_td, p[f"block_{layer}"], s["heads"], outputs, s["norm"], s["norm_place"])
    x_kd = x_td[: s["tasks"]]
    if s["norm_place"] == "pre":
        x_kd = own_norms(x_kd, p.get("out_norm"), s["norm"])
    return head(x_kd, p["heads"], 0)
