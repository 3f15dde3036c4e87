"""OneTrans in float64 NumPy: one candidate of one sample, its valid events only, whole matrices.

Written from arXiv 2510.26104: X0 = [S; NS], one causal mask over both, mixed parameters, pyramid.
`p` is the model's parameter tree as float64 arrays. `c` is a dict of tokens, layers, heads,
history, sequences, merge, pos_emb, tokenizer, ffn, norm, norm_place, token_norm, pyramid,
pyramid_round. A sample is {"user", "candidate", "history": {name: values},
"actions": [n]}.
"""

import numpy as np

from tests.references import din
from tests.references.din import dense
from tests.references.rankmixer import erf, even_split, normalise

HISTORY = (*din.ITEMS, *din.EVENTS)
GROUPS = {
    "user": (("user", "age"), ("user", "spend")),
    "item": (("candidate", "item"), ("candidate", "price"), ("candidate", "tag")),
    "context": (("candidate", "hour"),),
}


def schedule(first, end, layers, to):
    """S tokens left by block n: the multiple of `to` next to first + (end - first) n / layers."""
    lengths = [first + (end - first) * n / layers for n in range(1, layers)]
    return [int(np.floor(x / to + 0.5)) * to for x in lengths] + [end]


def mlp(x, p, name, hidden):
    """A linear layer, behind a ReLU layer where there is one."""
    return dense(np.maximum(dense(x, p[hidden]), 0) if hidden in p else x, p[name])


def merged(actions, c):
    """The sample's list: (event, sequence) in order, event None where a [SEP] stands."""
    events = list(range(len(actions)))[-c["history"] :]
    of = lambda e: min(max(actions[e] - 1, 0), c["sequences"] - 1)
    if c["merge"] == "time":
        return [(e, of(e)) for e in events]
    found = []
    for i in range(c["sequences"]):
        found += [(None, i - 1)] if i else []
        found += [(e, i) for e in events if of(e) == i]
    return found


def event_tokens(sample, p, c):
    """List of S tokens [D], before the norm."""
    p, rows = p["events"], []
    for place, (event, i) in enumerate(merged(sample["actions"], c)):
        if event is None:
            x_d = p["separator"]
        else:
            x_w = np.concatenate([sample["history"][name][event] for name in HISTORY])
            x_d = mlp(x_w, p, f"sequence_{i}", f"hidden_{i}")
            if c["sequences"] > 1 and c["merge"] == "time":
                x_d = x_d + p["type"][i]
        rows.append(x_d + (p["position"][place] if c["pos_emb"] == "input" else 0))
    return rows


def ns_tokens(sample, p, c):
    """NS tokens [T, D], before the norm."""
    p, groups = p["tokenizer"], {}
    for group, names in GROUPS.items():
        groups[group] = np.concatenate([sample[side][name] for side, name in names])
    if c["tokenizer"] == "group":
        return np.stack([mlp(x, p, g, f"{g}.hidden") for g, x in groups.items()])
    if c["tokenizer"] == "per_feature":
        names = [name for group in GROUPS.values() for name in group]
        return np.stack([dense(sample[s][n], p[f"{s}.{n}"]) for s, n in names])
    x_w = np.concatenate(list(groups.values()))
    if c["tokenizer"] == "even_split":
        return even_split(x_w, c["tokens"], p["slices"])
    return mlp(x_w, p, "all", "all.hidden").reshape(c["tokens"], -1)


def mixed(x_d, p, slot):
    """W_i x + b_i: shared where `slot` is None (an S token), the slot's own where there is one."""
    if slot is None or "own" not in p:
        return dense(x_d, p["shared"])
    return x_d @ p["own"]["kernel"][slot] + p["own"]["bias"][slot]


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def feed_forward(x_d, p, slot, c):
    h = mixed(x_d, p["ffn_in"], slot)
    if c["ffn"] == "gelu":
        h = gelu(h)
    else:
        gate = mixed(x_d, p["ffn_gate"], slot)
        h = gate * din.sigmoid(gate) * h
    return mixed(h, p["ffn_out"], slot)


def attend(q_d, keys, values, heads):
    """One query over the keys and values [M, D] that it may read."""
    out, size = [], len(q_d) // heads
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        scores = keys[:, own] @ q_d[own] / np.sqrt(size)
        weights = np.exp(scores - scores.max())
        out.append(weights / weights.sum() @ values[:, own])
    return np.concatenate(out)


def block(x_nd, slots, queries, p, c, cached=None):
    """X' of the rows `queries` (indices into x); slots: None for an S token, t of an NS token.

    cached: keys and values of tokens that stand before x's, which all of x may read.
    Returns (rows, keys, values), the last two of all of x.
    """
    norm = lambda x, name: normalise(x, p.get(name), c["norm"])
    post = c["norm_place"] == "post"
    a = p["mha"]
    n_nd = x_nd if post else norm(x_nd, "mha_norm")
    keys = np.stack([mixed(n_nd[j], a["key"], s) for j, s in enumerate(slots)])
    values = np.stack([mixed(n_nd[j], a["value"], s) for j, s in enumerate(slots)])
    before = (keys[:0], values[:0]) if cached is None else cached
    rows = []
    for i in queries:
        readable = [np.concatenate([b, m[: i + 1]]) for b, m in zip(before, (keys, values))]
        q_d = mixed(n_nd[i], a["query"], slots[i])
        out_d = mixed(attend(q_d, *readable, c["heads"]), a["out"], slots[i])
        z_d = out_d + x_nd[i]
        z_d = norm(z_d, "mha_norm") if post else z_d
        f_d = feed_forward(z_d if post else norm(z_d, "ffn_norm"), p["ffn"], slots[i], c)
        rows.append(norm(f_d + z_d, "ffn_norm") if post else f_d + z_d)
    return np.array(rows).reshape(-1, x_nd.shape[1]), keys, values


def start(sample, p, c):
    """(S tokens [L_S, D], NS tokens [T, D]) as they enter block 0."""
    norm = lambda x: normalise(x, p.get("token_norm"), c["token_norm"])
    ns_td = norm(ns_tokens(sample, p, c))
    s_nd = np.array([norm(x_d) for x_d in event_tokens(sample, p, c)])
    return s_nd.reshape(-1, ns_td.shape[1]), ns_td


def head(ns_td, p, c):
    """K logits from the final NS tokens side by side."""
    if c["norm_place"] == "pre":
        ns_td = normalise(ns_td, p.get("out_norm"), c["norm"])
    x, out = ns_td.reshape(-1), []
    while f"hidden_{len(out)}" in p["head"]:
        k = len(out)
        h = np.maximum(dense(x, p["head"][f"hidden_{k}"]), 0)
        out.append(dense(h, p["head"][f"logits_{k}"])[0])
    return np.array(out)


def logits(sample, p, c):
    """[K] of the sample's one candidate: [S; NS] as one list, one causal mask."""
    s_nd, ns_td = start(sample, p, c)
    T, x_nd = len(ns_td), np.concatenate([s_nd, ns_td])
    first = c["history"] + (c["sequences"] - 1) * (c["merge"] == "intent")
    most = [first] * c["layers"]
    if c["pyramid"]:
        most = schedule(first, c["tokens"] or c["pyramid_round"], c["layers"], c["pyramid_round"])
    for i in range(c["layers"]):
        n = len(x_nd) - T
        slots = [None] * n + list(range(T))
        kept = range(n - min(n, most[i]), n + T)
        x_nd, _, _ = block(x_nd, slots, kept, p[f"block_{i}"], c)
    return head(x_nd[len(x_nd) - T :], p, c)


def stage_one(s_nd, p, c, cache=None):
    """Once per request, or with the cache of an earlier one for the events that came since.

    s_nd: S tokens that are new to the cache. Returns [(keys, values)] of every block; without
    pyramid.
    """
    found = []
    for i in range(c["layers"]):
        before = cache[i] if cache else None
        s_nd, keys, values = block(
            s_nd, [None] * len(s_nd), range(len(s_nd)), p[f"block_{i}"], c, before
        )
        new = (keys, values)
        found.append(new if before is None else tuple(np.concatenate(x) for x in zip(before, new)))
    return found


def stage_two(ns_td, cache, p, c):
    """Per candidate: NS tokens read the cached S tokens and each other."""
    for i in range(c["layers"]):
        T = len(ns_td)
        ns_td, _, _ = block(ns_td, range(T), range(T), p[f"block_{i}"], c, cache[i])
    return head(ns_td, p, c)


def transformer(x_nd, p, heads):
    """A causal pre-RMSNorm Transformer block in matrix form; p: query, ..., ffn_out [D, F], [F]."""
    N, D = x_nd.shape
    rms = lambda x, scale: x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * scale
    q, k, v = (dense(rms(x_nd, p["mha_norm"]), p[name]) for name in ("query", "key", "value"))
    split = lambda x: x.reshape(N, heads, -1).transpose(1, 0, 2)
    scores = split(q) @ split(k).transpose(0, 2, 1) / np.sqrt(D // heads)
    scores = np.where(np.tri(N, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed_nd = (weights @ split(v)).transpose(1, 0, 2).reshape(N, D)
    z_nd = dense(mixed_nd, p["out"]) + x_nd
    return dense(gelu(dense(rms(z_nd, p["ffn_norm"]), p["ffn_in"])), p["ffn_out"]) + z_nd
