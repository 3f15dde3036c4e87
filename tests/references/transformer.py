"""A Transformer over the feature tokens of one candidate, float64, the same weights for each."""

import math

import numpy as np

from tests.references import din, feature_tokens

erf = np.vectorize(math.erf, otypes=[float])


def feed_forward(x_td, p):
    h_tf = din.dense(x_td, p["ffn_in"])
    return din.dense(h_tf * (1 + erf(h_tf / math.sqrt(2))) / 2, p["ffn_out"])


def attention(x_td, p, heads):
    query_width = p["attention"]["query"]["kernel"].shape[1] // heads
    scale = 1 / math.sqrt(query_width)
    read_tf = feature_tokens.attention(x_td, p["attention"], heads, scale)
    return read_tf @ p["attention_out"]["kernel"]


def block(x_td, p, heads, norm="layer", norm_place="pre"):
    def first(x):
        return feature_tokens.normalise(x, p.get("attention_norm"), norm)

    def second(x):
        return feature_tokens.normalise(x, p.get("ffn_norm"), norm)

    if norm_place == "pre":
        h_td = x_td + attention(first(x_td), p, heads)
        return h_td + feed_forward(second(h_td), p)
    h_td = first(x_td + attention(x_td, p, heads))
    return second(h_td + feed_forward(h_td, p))


def logits(sample, p, layers, heads, poolings, readout, norm="layer", norm_place="pre"):
    x_td = feature_tokens.tokens(sample, poolings, p)
    if readout == "task":
        x_td = np.concatenate([p["task_tokens"]["tokens"], x_td])
    for i in range(layers):
        x_td = block(x_td, p[f"block_{i}"], heads, norm, norm_place)
    if norm_place == "pre":
        x_td = feature_tokens.normalise(x_td, p.get("out_norm"), norm)
    if readout == "mean":
        return din.dense(x_td.mean(axis=0), p["heads"]["logits"])
    kernel_kd1, bias_k1 = p["heads"]["logits"]["kernel"], p["heads"]["logits"]["bias"]
    return np.array([x_td[k] @ kernel_kd1[k, :, 0] + bias_k1[k, 0] for k in range(len(kernel_kd1))])
