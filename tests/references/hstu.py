"""HSTU's ranking form in float64 NumPy, one sample at a time and of its valid events only.

Written from arXiv 2402.17152 (eqs. 1-3) with merged or interleaved tokens and a context prefix.
`p` is the model's parameter tree as float64 arrays; `c` a dict of heads, qk, v, layers, per_event,
normalizer, scale, activation ("uvqk" or "u"), norm ("layer" or "rms"), norm_place, affine,
query_time ("own", or "next": of the token after a query, for candidates of one time).
"""

import numpy as np

from tests.references import hstu_attention as attention
from tests.references.hstu_attention import silu


def norm(x_d, p=None, kind="layer"):
    if kind == "rms":
        y_d = x_d / np.sqrt((x_d**2).mean() + 1e-6)
        return y_d if p is None else y_d * p["scale"]
    y_d = (x_d - x_d.mean()) / np.sqrt(x_d.var() + 1e-6)
    return y_d if p is None else y_d * p["scale"] + p["bias"]


def layer(x_nd, tokens, p, c):
    """X_out of one sample; tokens as in references/hstu_attention.py."""
    h, Q, V, N = c["heads"], c["qk"], c["v"], len(x_nd)
    post = c["norm_place"] == "post"

    def layer_norm(rows, name):
        return np.stack([norm(x_d, p[name] if c["affine"] else None, c["norm"]) for x_d in rows])

    projected = (x_nd if post else layer_norm(x_nd, "input_norm")) @ p["w1"]
    u, v, q, k = np.split(projected, [h * V, 2 * h * V, 2 * h * V + h * Q], axis=1)
    u = silu(u)
    if c["activation"] == "uvqk":
        v, q, k = silu(v), silu(q), silu(k)
    q, k, v = q.reshape(N, h, Q), k.reshape(N, h, Q), v.reshape(N, h, V)
    tables = p.get("position_bias"), p.get("time_bias")
    queries = [t | {"bias_time": t.get("query_time", t["bias_time"])} for t in tokens]
    a = attention.attention(q, k, v, queries, tokens, [c["normalizer"]] * N, c["scale"], *tables)
    a = a.reshape(N, h * V)
    y = layer_norm(a, "attention_norm") * u
    out_nd = y @ p["w2"]["kernel"] + p["w2"]["bias"] + x_nd
    return layer_norm(out_nd, "output_norm") if post else out_nd


def logits(p, c, user, events, candidates):
    """Logits [candidates, K] of one sample.

    user: [(name, embedding)]; events: [(item embedding, event embedding, time, seconds)] oldest
    first; candidates: [(item embedding, context embedding, time, seconds)].
    """
    x, tokens = [], []

    def add(value, role, time, seconds, position, group=-1):
        fields = {"segment": 0, "role": role, "time": time, "bias_time": seconds}
        tokens.append(fields | {"position": position, "group": group})
        x.append(value)

    for name, e in user:
        w = p[f"context_{name}"]
        add(e @ w["kernel"] + w["bias"], attention.CONTEXT, 0, 0, len(x))
    first = len(x)
    content = lambda e: e @ p["content"]["kernel"] + p["content"]["bias"]
    for item, event, time, seconds in events:
        action = event @ p["event"]["kernel"] + p["event"].get("bias", 0)
        if c["per_event"] == 2:
            add(content(item), attention.HISTORY, time, seconds, len(x))
            add(action, attention.HISTORY, time, seconds, len(x))
        else:
            add(content(item) + action, attention.HISTORY, time, seconds, len(x))
    for k, (item, own, time, seconds) in enumerate(candidates):
        readable = sum(event_time < time for _, _, event_time, _ in events)
        value = content(item) + own @ p["candidate_context"]["kernel"]
        position = first + c["per_event"] * readable
        add(value, attention.CANDIDATE, time, seconds, position, group=k)
    if c.get("query_time") == "next":  # t_{i + 1}: of the next token, here the same candidate time
        for i, token in enumerate(tokens[: len(tokens) - len(candidates)]):
            token["query_time"] = tokens[i + 1]["bias_time"]
    x_nd = np.stack(x)
    if c["token_norm"] == "sqrt_width":
        x_nd = x_nd * np.sqrt(x_nd.shape[1])
    else:
        x_nd = np.stack([norm(x_d, p["token_norm"]) for x_d in x_nd])
    for i in range(c["layers"]):
        x_nd = layer(x_nd, tokens, p[f"layer_{i}"], c)
    return np.stack([head(x_d, p) for x_d in x_nd[len(x_nd) - len(candidates) :]])


def head(x_d, p):
    x_d, out, task = norm(x_d, p["output_norm"]), [], 0
    while f"hidden_{task}" in p["head"]:
        hidden, last = p["head"][f"hidden_{task}"], p["head"][f"logits_{task}"]
        out.append(np.maximum(x_d @ hidden["kernel"] + hidden["bias"], 0) @ last["kernel"])
        out[-1] = out[-1] + last["bias"]
        task += 1
    return np.concatenate(out)
