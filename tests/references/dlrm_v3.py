"""DLRM-v3 in float64 NumPy, one sample at a time and of its valid events only.

Written from the description of Meta's public code: a sample is the sequence [c context tokens |
n events | m candidates], and masks and positions are computed from indices in it, as there.
`p` is the model's parameter tree as float64 arrays; `c` a dict of heads, qk, v, layers, scale,
normalizer, window (or None), full (context tokens read the history), group_norm, buckets (or None),
post ("layer", "time", "l2") and enough (whether user features count).
"""

import math

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x_d, eps, p=None):
    y_d = (x_d - x_d.mean()) / math.sqrt(((x_d - x_d.mean()) ** 2).mean() + eps)
    return y_d if p is None else y_d * p["scale"] + p["bias"]


def linear(x_d, p):
    return x_d @ p["kernel"] + p["bias"]


def swish(x_d, p):
    return x_d / (1 + np.exp(-norm(x_d, 1e-5, p["norm"])))


def network(x_d, p):
    return norm(linear(swish(linear(x_d, p["in"]), p["swish"]), p["out"]), 1e-5, p["norm"])


def allow(c, n, m, full, window):
    """bool [N, N]. With full: the code's mask for c contextual tokens, by ids; else of a plain
    sequence of c + n tokens and m targets. The window is one of events."""
    N = c + n + m
    lead = c if full else 0
    top = c + n - (lead - 1 if full else 0)
    ids = [min(max(i - lead + 1, 0) if full else i, top) for i in range(N)]
    table = np.zeros((N, N), bool)
    for i in range(N):
        for j in range(N):
            table[i, j] = i == j or ids[i] > ids[j]
            if window is not None and j >= c and i != j:
                table[i, j] &= ids[i] - ids[j] <= window
            if full:
                table[i, j] |= ids[i] == 0 and ids[j] < top
    return table


def positions(c, n, m, rows):
    """Indices of the table of positions: clip(high - min(col, high) + c), high the first target."""
    high = c + n
    found = [min(high - min(col, high) + c, rows - 1) for col in range(c + n + m)]
    return list(range(c)) + found[c:]


def bucket(seconds, buckets):
    return min(max(int(math.sqrt(max(seconds, 1e-6) / 60)), 0), buckets)


def layer(x_nd, table, p, c):
    h, Q, V, N = c["heads"], c["qk"], c["v"], len(x_nd)
    x_norm = np.stack([norm(x_d, 1e-6, p["input_norm"]) for x_d in x_nd])
    uvqk = x_norm @ p["uvqk_kernel"] + p["uvqk_bias"]
    u, v, q, k = np.split(uvqk, [h * V, 2 * h * V, 2 * h * V + h * Q], axis=1)
    q, k, v = q.reshape(N, h, Q), k.reshape(N, h, Q), v.reshape(N, h, V)
    u, out = silu(u), np.empty_like(x_nd)
    for i in range(N):
        a_hv = np.zeros((h, V))
        for j in range(N):
            if table[i, j]:
                for head in range(h):
                    weight = silu(c["scale"] * (q[i, head] @ k[j, head])) / c["normalizer"]
                    a_hv[head] += weight * v[j, head]
        a_f = a_hv.reshape(-1)
        if c["group_norm"]:
            scale, bias = p["attention_scale"], p["attention_bias"]
            rows = [norm(a_hv[g], 1e-6) * scale[g] + bias[g] for g in range(h)]
            n_f = np.concatenate(rows)
        else:
            n_f = norm(a_f, 1e-6, p["attention_norm"])
        out[i] = x_nd[i] + np.concatenate([u[i], a_f, u[i] * n_f]) @ p["output"]["kernel"]
    return out


def logits(p, c, user, events, candidates):
    """Logits [candidates, K] of one sample, whose candidates share one time.

    user: [(name, embedding)]; events: [(item embedding, event embedding, seconds)] oldest first;
    candidates: [(item embedding, context embedding, clock embedding, seconds)].
    """
    x, times = [], []
    for name, e in user:
        x.append(linear(e if c["enough"] else 0 * e, p[f"context_{name}"]))
        times.append(None)
    for item, event, seconds in events:
        x.append(network(item, p["content"]) + network(event, p["action"]))
        times.append(seconds)
    for item, own, _, seconds in candidates:
        target = network(p["target_action"], p["action"])
        x.append(network(item, p["content"]) + target + network(own, p["candidate_context"]))
        times.append(seconds)
    sizes = len(user), len(events), len(candidates)
    table = p["places"]["positions"]
    index = positions(*sizes, len(table))
    x_nd = np.stack(x) * math.sqrt(len(x[0])) + table[index]
    if c["buckets"] is not None:
        now = times[-1]
        for i, seconds in enumerate(times):  # a context token has the time 0 of all clocks
            b = c["buckets"] if seconds is None else bucket(now - seconds, c["buckets"])
            x_nd[i] += p["places"]["times"][b]
    mask = allow(*sizes, c["full"], c["window"])
    for i in range(c["layers"]):
        x_nd = layer(x_nd, mask, p[f"layer_{i}"], c)
    encoded = x_nd[len(x_nd) - len(candidates) :]
    return np.stack([head(x_d, one, p, c) for x_d, one in zip(encoded, candidates)])


def head(x_d, candidate, p, c):
    item, _, clock, _ = candidate
    if c["post"] == "l2":
        x_d = x_d / max(math.sqrt(x_d @ x_d), 1e-6)
    else:
        if c["post"] == "time":
            x_d = linear(np.concatenate([x_d, clock]), p["clock"])
        x_d = norm(x_d, 1e-5, p["output_norm"])
    h_m = linear(x_d * network(item, p["item"]), p["head_in"])
    return linear(swish(h_m, p["head_swish"]), p["head_out"])
