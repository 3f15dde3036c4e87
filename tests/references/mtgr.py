"""MTGR in float64 NumPy, one sample at a time and of its valid tokens only.

Written from arXiv 2505.18654 and the authors' article. `p` is the model's parameter tree as float64
arrays; `c` a dict of heads, layers, normalizer (None = the number of tokens), residual_from,
norm_before_gate, output_norm. A token is a dict of group ("U", "S", "R" or "I"), time and, of a
candidate, its number.
"""

import math

import numpy as np

GROUPS = ("U", "S", "R", "I")
erf = np.vectorize(math.erf)


def allow(q, k):
    """The dynamic mask: may token q read token k?"""
    if k["group"] in "US":
        return True
    if k["group"] == "R":
        if q["group"] == "R":
            return k["time"] <= q["time"]
        return q["group"] == "I" and k["time"] < q["time"]
    return q["group"] == "I" and q["number"] == k["number"]


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def layer_norm(x_d):
    return (x_d - x_d.mean()) / math.sqrt(x_d.var() + 1e-6)


def group_norm(x_nd, groups, p):
    """Every token over its own channels; the affine pair is its group's, or one for all."""
    out = []
    for x_d, group in zip(x_nd, groups):
        g = GROUPS.index(group) if len(p["scale"]) > 1 else 0
        out.append(layer_norm(x_d) * p["scale"][g] + p["bias"][g])
    return np.stack(out)


def attention(q_nd, k_nd, v_nd, tokens, heads, normalizer):
    """Sum over the keys that may be read of SiLU(q.k) / normalizer times the value, per head."""
    N, D = q_nd.shape
    width, out_nd = D // heads, np.zeros((N, D))
    for n in range(N):
        for m in range(N):
            if allow(tokens[n], tokens[m]):
                for h in range(heads):
                    of_head = slice(h * width, (h + 1) * width)
                    weight = silu(q_nd[n, of_head] @ k_nd[m, of_head]) / normalizer
                    out_nd[n, of_head] += weight * v_nd[m, of_head]
    return out_nd


def layer(x_nd, tokens, p, c):
    groups = [t["group"] for t in tokens]
    normalizer = len(tokens) if c["normalizer"] is None else c["normalizer"]
    h_nd = group_norm(x_nd, groups, p["input_norm"])
    q_nd, k_nd, v_nd, u_nd = (linear(h_nd, p[name]) for name in ("query", "key", "value", "gate"))
    a_nd = attention(q_nd, k_nd, v_nd, tokens, c["heads"], normalizer)
    if c["norm_before_gate"]:
        y_nd = group_norm(a_nd, groups, p["attention_norm"]) * u_nd
    else:
        y_nd = group_norm(a_nd * u_nd, groups, p["attention_norm"])
    return linear(y_nd, p["out"]) + (h_nd if c["residual_from"] == "normed" else x_nd)


def mmoe(x_d, p):
    """Logits [K]: a gate and a tower per task over shared experts."""
    experts = [
        np.maximum(x_d @ kernel + bias, 0)
        for kernel, bias in zip(p["experts_kernel"], p["experts_bias"])
    ]
    logits = []
    for k, gate_dx in enumerate(p["gates"]):
        score_x = x_d @ gate_dx
        share_x = np.exp(score_x - score_x.max())
        share_x = share_x / share_x.sum()
        mixed_f = sum(share * expert_f for share, expert_f in zip(share_x, experts))
        tower, last = p["tower"], p["logits"]
        hidden = np.maximum(mixed_f @ tower["kernel"][k] + tower["bias"][k], 0)
        logits.append((hidden @ last["kernel"][k] + last["bias"][k])[0])
    return np.array(logits)


def logits(p, c, user, events, candidates):
    """Logits [candidates, K] of one sample.

    user: [(name, embedding)]; events: [(features, time)] in any order; candidates: [(features,
    time)], the earliest of which parts S from R.
    """
    x, tokens = [], []
    for name, e in user:
        x.append(gelu(linear(e, p[f"user_{name}"])))
        tokens.append({"group": "U"})
    first = min(time for _, time in candidates)
    for e, time in events:
        x.append(gelu(linear(e, p["event"])))
        tokens.append({"group": "S" if time < first else "R", "time": time})
    for k, (e, time) in enumerate(candidates):
        x.append(gelu(linear(e, p["candidate"])))
        tokens.append({"group": "I", "time": time, "number": k})
    x_nd = np.stack(x)
    for i in range(c["layers"]):
        x_nd = layer(x_nd, tokens, p[f"layer_{i}"], c)
    out = []
    for x_d in x_nd[len(x_nd) - len(candidates) :]:
        if c["output_norm"] == "layer":
            x_d = layer_norm(x_d) * p["output_norm"]["scale"] + p["output_norm"]["bias"]
        out.append(mmoe(x_d, p["head"]))
    return np.stack(out)
