"""Wukong for one candidate, float64: X [n, d], with X X^T written out as in section 3."""

import numpy as np

from tests.references import din, dlrm, feature_tokens


def projection(x_nd, p):
    """Y [n, k]: learned, or made of the tokens."""
    if "compress" not in p:
        return p["projection"]
    compressed_kd = p["compress"]["kernel"].T @ x_nd
    h = dlrm.mlp(compressed_kd.reshape(-1), p["attention"], 1)
    return din.dense(h, p["projection"]).reshape(len(x_nd), -1)


def fm_block(x_nd, p, mlp_layers, norm="layer"):
    interactions_nk = (x_nd @ x_nd.T) @ projection(x_nd, p)
    flat = feature_tokens.normalise(interactions_nk.reshape(-1), p.get("norm"), norm)
    return din.dense(dlrm.mlp(flat, p["mlp"], mlp_layers), p["out"]).reshape(-1, x_nd.shape[1])


def layer(x_nd, p, mlp_layers, norm="layer", norm_place="post"):
    def normed(x):
        return feature_tokens.normalise(x, p.get("norm"), norm)

    z_nd = normed(x_nd) if norm_place == "pre" else x_nd
    made = np.concatenate(
        [fm_block(z_nd, p["fm"], mlp_layers, norm), p["linear"]["kernel"].T @ z_nd]
    )
    residual = p["residual"]["kernel"].T @ x_nd if "residual" in p else x_nd
    return normed(made + residual) if norm_place == "post" else made + residual


def logits(sample, p, layers, mlp_layers, top_layers, poolings, norm="layer", norm_place="post"):
    x_nd = feature_tokens.tokens(sample, poolings, p)
    for i in range(layers):
        x_nd = layer(x_nd, p[f"layer_{i}"], mlp_layers, norm, norm_place)
    if norm_place == "pre":
        x_nd = feature_tokens.normalise(x_nd, p.get("out_norm"), norm)
    top = dlrm.mlp(x_nd.reshape(-1), p.get("top"), top_layers)
    return din.dense(top, p["heads"]["logits"])
