"""RankMixer for one candidate, float64, token by token, as the paper prints it."""

import math

import numpy as np

from tests.references import din

erf = np.vectorize(math.erf, otypes=[float])


def normalise(x_td, p, kind):
    if kind == "none":
        return x_td
    if kind == "rms":
        return x_td / np.sqrt((x_td**2).mean(axis=-1, keepdims=True) + 1e-6) * p["scale"]
    centred_td = x_td - x_td.mean(axis=-1, keepdims=True)
    scaled_td = centred_td / np.sqrt((centred_td**2).mean(axis=-1, keepdims=True) + 1e-6)
    return scaled_td * p["scale"] + p["bias"]


def mix(x_td):
    """New token h = slice h of every old token, concatenated."""
    T, D = x_td.shape
    slices_thd = x_td.reshape(T, T, D // T)
    return np.stack([np.concatenate(list(slices_thd[:, h])) for h in range(T)])


def feed_forward(x_td, p):
    y_td = np.empty_like(x_td)
    for t in range(len(x_td)):
        h_f = x_td[t] @ p["ffn_in"]["kernel"][t] + p["ffn_in"]["bias"][t]
        h_f = h_f * (1 + erf(h_f / math.sqrt(2))) / 2
        y_td[t] = h_f @ p["ffn_out"]["kernel"][t] + p["ffn_out"]["bias"][t]
    return y_td


def gates(x_td, p):
    """G_tj = ReLU(h_t(x_t)_j), a linear router for each token."""
    return np.stack(
        [np.maximum(x_td[t] @ p["kernel"][t] + p["bias"][t], 0) for t in range(len(x_td))]
    )


def experts(x_td, gate_tx, p):
    """v_t = sum_j G_tj e_tj(x_t), e_tj a feed-forward of its own."""
    v_td = np.zeros_like(x_td)
    for t, j in np.ndindex(*gate_tx.shape):
        h_f = x_td[t] @ p["ffn_in"]["kernel"][t, j] + p["ffn_in"]["bias"][t, j]
        h_f = h_f * (1 + erf(h_f / math.sqrt(2))) / 2
        v_td[t] += gate_tx[t, j] * (h_f @ p["ffn_out"]["kernel"][t, j] + p["ffn_out"]["bias"][t, j])
    return v_td


def sub_layer(s_td, p, router):
    """(output, gates): the dense feed-forward, or the mixture under one router."""
    if router not in p:
        return feed_forward(s_td, p["ffn"]), None
    gate_tx = gates(s_td, p[router])
    return experts(s_td, gate_tx, p["ffn"]), gate_tx


def block(x_td, p, norm="layer", norm_place="post", router="router"):
    """(y, gates); the gates are None where the block is dense."""
    mix_norm, ffn_norm = p.get("mix_norm"), p.get("ffn_norm")
    if norm_place == "post":
        s_td = normalise(mix(x_td) + x_td, mix_norm, norm)
        v_td, gate_tx = sub_layer(s_td, p, router)
        return normalise(v_td + s_td, ffn_norm, norm), gate_tx
    s_td = mix(normalise(x_td, mix_norm, norm)) + x_td
    v_td, gate_tx = sub_layer(normalise(s_td, ffn_norm, norm), p, router)
    return v_td + s_td, gate_tx


def even_split(x_w, T, p):
    """Zeros until T divides the width, T equal slices, one projection per slice."""
    d = -(-len(x_w) // T)
    padded = np.zeros(T * d)
    padded[: len(x_w)] = x_w
    return np.stack([padded[t * d : (t + 1) * d] @ p["kernel"][t] + p["bias"][t] for t in range(T)])


def logits(sample, p, tokens, layers, poolings, norm="layer", norm_place="post", router="router"):
    """(logits [K], the gates of every block)."""
    x_td = even_split(din.inputs(sample, poolings, p), tokens, p["tokenizer"]["slices"])
    gates_ltx = []
    for layer in range(layers):
        x_td, gate_tx = block(x_td, p[f"block_{layer}"], norm, norm_place, router)
        gates_ltx.append(gate_tx)
    if norm_place == "pre":
        x_td = normalise(x_td, p.get("out_norm"), norm)
    return din.dense(x_td.mean(axis=0), p["heads"]["logits"]), gates_ltx
