"""GRAB in float64 NumPy, one candidate at a time: the impression instance that packing replaces.

Written from the figures' description (arXiv 2602.01865): for each channel a sequence of the events
with its actions, oldest first, then a copy of the candidate; a causal transformer of its own runs
over it, and in every layer the copies are mixed first. `p` is the model's parameter tree as float64
arrays; `c` a dict of heads, layers, channels, starts, positions, actions, times, attn_window,
rab_window, mix, readout, norm, norm_place, token_norm, shared.
"""

import math

import numpy as np

erf = np.vectorize(math.erf, otypes=[float])


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def norm(x_d, p, kind):
    """LayerNorm or RMSNorm over the last axis."""
    if kind == "none":
        return x_d
    if kind == "layer":
        x_d = x_d - x_d.mean(axis=-1, keepdims=True)
    y_d = x_d / np.sqrt((x_d**2).mean(axis=-1, keepdims=True) + 1e-6) * p["scale"]
    return y_d + p["bias"] if kind == "layer" else y_d


def token(x_w, p):
    """MLP & Gate."""
    return dense(gelu(dense(x_w, p["hidden"])), p["out"]) * sigmoid(dense(x_w, p["gate"]))


def bucket(seconds, times):
    """Two buckets to the octave: how many of 2^(1/2), 2^(2/2), .. half a second more reaches."""
    return sum(seconds + 0.5 >= 2 ** (b / 2) for b in range(1, times))


def vector(i, j, p, c):
    """What is added to key j for query i: (index, action, seconds) each; a vector [dh]."""
    distance = i[0] - j[0]
    if c["rab_window"] is not None and distance >= c["rab_window"]:
        return 0 * p["position"][0]
    found = p["position"][min(distance, c["positions"] - 1)]
    found = found + p["action"][i[1] * c["actions"] + j[1]]
    if c["times"]:
        found = found + p["time"][bucket(i[2] - j[2], c["times"])]
    return found


def attention(x_nd, facts, p, c):
    """Out of one channel's sequence [N, D] -> [N, H dh]; the last token is the full one."""
    heads, N = c["heads"], len(x_nd)
    latent = dense(x_nd, p["down"])
    q, k, v = (dense(latent, p[name]).reshape(N, heads, -1) for name in ("query", "key", "value"))
    out = np.zeros_like(v)
    for i in range(N):
        distance = [facts[i][0] - facts[j][0] for j in range(i + 1)]
        w = c["attn_window"]
        keys = [j for j in range(i + 1) if i == j or w is None or distance[j] < w]
        vectors = [vector(facts[i], facts[j], p["relative"], c) for j in keys]
        for h in range(heads):
            score = np.array([q[i, h] @ (k[j, h] + x) for j, x in zip(keys, vectors)])
            weight = np.exp((score - score.max()) / math.sqrt(q.shape[-1]))
            out[i, h] = weight / weight.sum() @ v[keys, h]
    return out.reshape(N, -1)


def update(x_nd, a_nf, p, c):
    """Add & Norm, feed-forward, Add & Norm; or with the norms before."""
    feed_forward = lambda s_nd: dense(gelu(dense(s_nd, p["ffn_in"])), p["ffn_out"])
    s_nd = x_nd + dense(a_nf, p["out"])
    if c["norm_place"] == "pre":
        return s_nd + feed_forward(norm(s_nd, p["ffn_norm"], c["norm"]))
    s_nd = norm(s_nd, p["attention_norm"], c["norm"])
    return norm(s_nd + feed_forward(s_nd), p["ffn_norm"], c["norm"])


def mix(copies_ad, p):
    """h_a + Gate_a(h_1, .., h_A) for every channel."""
    cat, D = np.concatenate(copies_ad), len(copies_ad[0])
    mixed = sigmoid(cat @ p["gate"]["kernel"]) * (cat @ p["value"]["kernel"])
    return [h_d + mixed[a * D : (a + 1) * D] for a, h_d in enumerate(copies_ad)]


def of_channel(p, a, shared):
    """Channel a's part of a tree of parameters."""
    if isinstance(p, dict):
        return {name: of_channel(x, a, shared) for name, x in p.items()}
    return p if shared else p[a]


def logits(p, c, user, events, candidate):
    """Logits [K] of one candidate.

    user: its features side by side; events: [(features, action id, time, seconds)], oldest first,
    all of the sample's; candidate: (features without those of the user, time, seconds).
    """
    own, now, seconds = candidate
    last = c["actions"] - 1
    before = [x for x in events if x[2] < now]
    channels = [[] for _ in range(c["channels"])]
    facts = [[] for _ in range(c["channels"])]
    for index, (x_w, action, _, when) in enumerate(before):
        a = sum(action >= start for start in c["starts"])
        channels[a].append(norm(token(x_w, p["partial"]), p.get("token_norm"), c["token_norm"]))
        facts[a].append((index, min(action, last - 1), when))
    full = token(np.concatenate([user, own]), p["full"])
    for a in range(c["channels"]):
        channels[a].append(norm(full, p.get("token_norm"), c["token_norm"]))
        facts[a].append((len(before), last, seconds))
    streams = [np.stack(x) for x in channels]
    for i in range(c["layers"]):
        layer = p[f"layer_{i}"]
        if c["mix"] == "every_layer" or i == c["layers"] - 1:
            for x_nd, h_d in zip(streams, mix([x_nd[-1] for x_nd in streams], layer["mix"])):
                x_nd[-1] = h_d
        for a, x_nd in enumerate(streams):
            reads = of_channel(layer["read"], a, c["shared"])
            h_nd = norm(x_nd, reads["norm"], c["norm"]) if c["norm_place"] == "pre" else x_nd
            a_nf = attention(h_nd, facts[a], reads, c)
            streams[a] = update(x_nd, a_nf, of_channel(layer["update"], a, c["shared"]), c)
    copies = [x_nd[-1] for x_nd in streams]
    if c["norm_place"] == "pre":
        copies = [norm(h_d, p["output_norm"], c["norm"]) for h_d in copies]
    read = np.mean(copies, axis=0) if c["readout"] == "mean" else np.concatenate(copies)
    out, task = [], 0
    while f"hidden_{task}" in p["head"]:
        hidden = np.maximum(dense(read, p["head"][f"hidden_{task}"]), 0)
        out.append(dense(hidden, p["head"][f"logits_{task}"]))
        task += 1
    return np.concatenate(out)


def sparse_logits(p, groups):
    """Logits [K] of the sparse phase; groups: [inputs of a group side by side], in their order."""
    gate = sigmoid(dense(np.concatenate(groups), p["gate"]))
    x = np.concatenate([g * x_w for g, x_w in zip(gate, groups)])
    for name in ("dense_0", "dense_1"):
        x = np.maximum(dense(x, p["mlp"][name]), 0)
    return dense(x, p["heads"]["logits"])


def allowed(kinds, times):
    """The figure's mask for one user and channel, bool [n, n]; kinds "P" or "F"."""
    reads = lambda i, j: (
        kinds[j] == "P" and (times[j] <= times[i] if kinds[i] == "P" else times[j] < times[i])
    )
    n = range(len(kinds))
    return np.array([[i == j or reads(i, j) for j in n] for i in n])


def transformer(x_nd, allow_nn, layers, heads):
    """A plain post-norm transformer: LayerNorm, softmax attention, GELU feed-forward."""
    for p in layers:
        q, k, v = ((x_nd @ p[n]).reshape(len(x_nd), heads, -1) for n in ("query", "key", "value"))
        out = np.zeros_like(v)
        for h in range(heads):
            score = q[:, h] @ k[:, h].T / math.sqrt(q.shape[-1])
            weight = np.exp(np.where(allow_nn, score, -np.inf))
            out[:, h] = weight / weight.sum(axis=1, keepdims=True) @ v[:, h]
        x_nd = norm(x_nd + out.reshape(len(x_nd), -1) @ p["out"], p["attention_norm"], "layer")
        hidden = gelu(dense(x_nd, p["ffn_in"]))
        x_nd = norm(x_nd + dense(hidden, p["ffn_out"]), p["ffn_norm"], "layer")
    return x_nd
