"""LONGER in float64 NumPy, one sample and one candidate at a time, of valid events only.

Written from arXiv 2505.04421 as notes on it give it. `p` is the model's parameter tree as float64
arrays; `c` a dict of merge, recent, heads, inner, inner_heads, layers, cls, order ("cacheable" or
"paper"), token_norm, norm, norm_place, mean.
"""

import math

import numpy as np

from tests.references import softmax_attention

erf = np.vectorize(math.erf, otypes=[float])
YEAR = 365 * 24 * 3600


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def norm(x_nd, p, kind):
    if kind == "none":
        return x_nd
    if kind == "rms":
        return x_nd / np.sqrt((x_nd**2).mean(axis=-1, keepdims=True) + 1e-6) * p["scale"]
    x_nd = x_nd - x_nd.mean(axis=-1, keepdims=True)
    x_nd = x_nd / np.sqrt((x_nd**2).mean(axis=-1, keepdims=True) + 1e-6)
    return x_nd * p["scale"] + p["bias"]


def block(x_md, rows, allow_nm, p, heads, kind, place):
    """What the rows `rows` of x become, reading all rows that `allow` names: [N, D]."""
    D = x_md.shape[1]
    pre = place == "pre"
    h_md = norm(x_md, p.get("attention_norm"), kind) if pre else x_md
    q, k, v = (dense(h_md, p[x]).reshape(-1, heads, D // heads) for x in ("query", "key", "value"))
    zeros = np.zeros((heads, len(rows), len(x_md)))
    scale = 1 / math.sqrt(D // heads)
    a_nhv = softmax_attention.attention(q[rows], k, v, allow_nm, scale, zeros)
    h_nd = x_md[rows] + dense(a_nhv.reshape(len(rows), D), p["out"])
    if not pre:
        h_nd = norm(h_nd, p.get("attention_norm"), kind)
    f_nd = norm(h_nd, p.get("ffn_norm"), kind) if pre else h_nd
    y_nd = h_nd + dense(gelu(dense(f_nd, p["ffn_in"])), p["ffn_out"])
    return y_nd if pre else norm(y_nd, p.get("ffn_norm"), kind)


def merged(events, ago, p, c):
    """Merged tokens [groups, w], oldest first; `ago` seconds before the request, or None."""
    tokens = []
    for i, event in enumerate(events):
        if ago is not None:
            event = np.append(event, math.log(1 + ago[i]) / math.log(1 + YEAR))
        x = event + p["positions"][len(events) - 1 - i]
        x = dense(gelu(dense(x, p["event_in"])), p["event_out"])
        tokens.append(norm(x, p.get("event_norm"), c["token_norm"]))
    groups = []
    while tokens:
        tokens, group = tokens[: -c["merge"]], np.stack(tokens[-c["merge"] :])
        n, d = group.shape
        if c["inner"]:
            everything = np.ones((n, n), bool)
            place = p["inner_trans"], c["inner_heads"], c["norm"], c["norm_place"]
            group = block(group, np.arange(n), everything, *place)
        padding = np.zeros((c["merge"] - n) * d)
        groups.insert(0, np.concatenate([padding, group.ravel()]))
    return np.stack(groups) if groups else np.zeros((0, p["candidate"]["bias"].size))


def globals_of(user, candidate, p, c):
    """(the user's globals, the candidate's token)."""
    found = [] if user is None else [dense(user, p["user"])]
    found += list(p["cls"]) if c["cls"] else []
    finish = lambda x: norm(x, p.get("global_norm"), c["token_norm"])
    return [finish(x) for x in found], finish(dense(candidate, p["candidate"]))


def head(user_rows, own_row, history_rows, p, c):
    finish = lambda x: norm(x, p.get("output_norm"), c["norm"]) if c["norm_place"] == "pre" else x
    user = [finish(x) for x in user_rows]
    own = finish(own_row)
    # A candidate with its own copies of the user's globals reads them behind its token.
    read = [own, *user]
    if c["mean"]:
        rows = [finish(x) for x in history_rows]
        read.append(np.mean(rows, axis=0) if rows else np.zeros_like(own))
    x, out, task = np.concatenate(read), [], 0
    while f"hidden_{task}" in p["head"]:
        hidden = np.maximum(dense(x, p["head"][f"hidden_{task}"]), 0)
        out.append(dense(hidden, p["head"][f"logits_{task}"]))
        task += 1
    return np.concatenate(out)


def logits(p, c, events, ago, user, candidate, convention="canonical"):
    """Logits [K] of one candidate.

    convention: "canonical", [H old -> new; G], a row reads j <= i; "printed", [G; H newest first],
    it reads j >= i.
    """
    history = merged(events, ago, p, c)
    user_globals, own = globals_of(user, candidate, p, c)
    paper, m = c["order"] == "paper", len(user_globals) + 1
    in_order = [own, *user_globals] if paper else [*user_globals, own]
    x = np.concatenate([history, np.stack(in_order)])
    kept = min(c["recent"], len(history)) + m
    if convention == "printed":
        x = x[::-1]
    for layer in range(c["layers"]):
        i = np.arange(len(x))
        allow = i[None] >= i[:, None] if convention == "printed" else i[None] <= i[:, None]
        rows = i[:kept] if convention == "printed" else i[len(i) - kept :]
        place = c["heads"], c["norm"], c["norm_place"]
        x = block(x, rows, allow[rows], p[f"layer_{layer + 1}"], *place)
    if convention == "printed":
        x = x[::-1]
    history, rest = x[: kept - m], x[kept - m :]
    own, user_rows = (rest[0], rest[1:]) if paper else (rest[-1], rest[:-1])
    return head(user_rows, own, history, p, c)


def logits_cached(p, c, events, ago, user, candidates):
    """Logits [candidates, K]: history and user's globals once, their rows kept for every layer."""
    history = merged(events, ago, p, c)
    user_globals, _ = globals_of(user, candidates[0], p, c)
    x = np.concatenate([history, np.reshape(user_globals, (-1, history.shape[1]))])
    kept = min(c["recent"], len(history)) + len(user_globals)
    cache = [x]
    place = c["heads"], c["norm"], c["norm_place"]
    for layer in range(c["layers"]):
        i = np.arange(len(x))
        rows = i[len(i) - kept :]
        x = block(x, rows, (i[None] <= i[:, None])[rows], p[f"layer_{layer + 1}"], *place)
        cache.append(x)
    out = []
    for candidate in candidates:
        own = globals_of(user, candidate, p, c)[1]
        for layer in range(c["layers"]):
            x = np.concatenate([cache[layer], own[None]])
            allow = np.ones((1, len(x)), bool)
            (own,) = block(x, [len(x) - 1], allow, p[f"layer_{layer + 1}"], *place)
        final = cache[-1]
        split = len(final) - len(user_globals)
        out.append(head(final[split:], own, final[:split], p, c))
    return np.stack(out)
