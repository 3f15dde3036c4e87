"""AutoInt for one candidate, float64, from eq. 5-9 of the paper."""

import numpy as np

from tests.references import din, feature_tokens


def layer(x_tw, p, heads, norm="none", norm_place="post"):
    z_tw = feature_tokens.normalise(x_tw, p.get("norm"), norm) if norm_place == "pre" else x_tw
    read_tf = feature_tokens.attention(z_tw, p["attention"], heads, 1.0)
    y_tf = np.maximum(read_tf + x_tw @ p["residual"]["kernel"], 0)
    return feature_tokens.normalise(y_tf, p.get("norm"), norm) if norm_place == "post" else y_tf


def logits(sample, p, layers, heads, poolings, norm="none", norm_place="post"):
    x_td = feature_tokens.tokens(sample, poolings, p)
    for i in range(layers):
        x_td = layer(x_td, p[f"layer_{i}"], heads, norm, norm_place)
    if norm_place == "pre":
        x_td = feature_tokens.normalise(x_td, p.get("out_norm"), norm)
    return din.dense(np.concatenate(list(x_td)), p["heads"]["logits"])
