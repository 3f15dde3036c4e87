"""TokenMixer-Large for one candidate, float64, token by token and expert by expert."""

import numpy as np

from tests.references import din
from tests.references.rankmixer import mix, normalise


def inputs(sample, poolings, p):
    """{group: its features side by side}: user, item, context, and the pooled history."""
    whole = din.inputs(sample, poolings, p)
    found, start = {}, 0
    names = {"user": ("age", "spend"), "item": ("item", "price", "tag"), "context": ("hour",)}
    for group, features in names.items():
        side = "user" if group == "user" else "candidate"
        width = sum(len(sample[side][name]) for name in features)
        found[group] = whole[start : start + width]
        start += width
    return found | {"history": whole[start:]}


def mlp(x, p, name):
    if f"{name}.hidden" in p:
        x = np.maximum(din.dense(x, p[f"{name}.hidden"]), 0)
    return din.dense(x, p[name])


def tokens(sample, poolings, p):
    """The global token, then one for each group."""
    groups = inputs(sample, poolings, p)
    whole = mlp(np.concatenate(list(groups.values())), p["global"], "all")
    return np.stack([whole, *(mlp(x, p["tokenizer"], group) for group, x in groups.items())])


def swiglu(x_d, p, at):
    """down(swish(gate(x)) * up(x)) with the matrices that stand at index `at`."""

    def dense(x, name):
        return x @ p[name]["kernel"][at] + p[name]["bias"][at]

    gate = dense(x_d, "gate")
    return dense(gate * din.sigmoid(gate) * dense(x_d, "up"), "down")


def mixture(x_d, p, t, active, alpha):
    """The shared expert, and alpha times the top experts' sum weighted by their softmax."""
    scores = x_d @ p["router"]["kernel"][t] + p["router"]["bias"][t]
    chosen = np.argsort(-scores, kind="stable")[: active - 1]
    shares = np.exp(scores[chosen]) / np.exp(scores[chosen]).sum()
    y_d = swiglu(x_d, p, (t, 0))
    for j, share in zip(chosen, shares):
        y_d = y_d + alpha * share * swiglu(x_d, p, (t, 1 + j))
    return y_d


def per_token(x_td, p, active, alpha):
    if "router" not in p:
        return np.stack([swiglu(x_d, p, t) for t, x_d in enumerate(x_td)])
    return np.stack([mixture(x_d, p, t, active, alpha) for t, x_d in enumerate(x_td)])


def block(x_td, p, norm="rms", norm_place="pre", active=1, alpha=1.0):
    """Mix, one SwiGLU per mixed token, mix back, add; one SwiGLU per token, add."""

    def normed(x, name, place):
        return normalise(x, p.get(name), norm) if norm_place == place else x

    h_td = per_token(mix(normed(x_td, "mix_norm", "pre")), p["mixed"], active, alpha)
    x_td = normed(mix(h_td) + x_td, "mix_norm", "post")
    h_td = per_token(normed(x_td, "norm", "pre"), p["own"], active, alpha)
    return normed(h_td + x_td, "norm", "post")


def streams(x_td, p, layers, inter_residual, **options):
    """X^(1) .. X^(L); after every s blocks the stream of s blocks before is added."""
    found = [x_td]
    for layer in range(1, layers + 1):
        x_td = block(found[-1], p[f"block_{layer - 1}"], **options)
        if inter_residual and layer % inter_residual == 0:
            x_td = x_td + found[layer - inter_residual]
        found.append(x_td)
    return found[1:]


def logits(sample, p, poolings, layers, inter_residual, depths=(), **options):
    """(logits [K], {depth: logits of the head there})."""
    place, norm = options.get("norm_place", "pre"), options.get("norm", "rms")
    found = streams(tokens(sample, poolings, p), p, layers, inter_residual, **options)

    def head(x_td, norm_name, name):
        x_d = x_td[0]
        if place == "pre":
            x_d = normalise(x_d, p.get(norm_name), norm)
        return din.dense(x_d, p[name]["logits"])

    aux = {d: head(found[d - 1], f"aux_norm_{d}", f"aux_heads_{d}") for d in depths}
    return head(found[-1], "out_norm", "heads"), aux
