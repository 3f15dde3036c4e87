"""A stream of tokens made of the features by one linear map for each kind of token.

Source: HSTU (arXiv 2402.17152), §2; merged tokens and the context prefix as in Meta's DLRM-v3.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.batch import Features
from rankjax.layers import initializers, sequence

LAYOUTS = ("merged", "interleaved")


def embed(
    features: Features, *, where: str, width: int, layout: str, context: bool, dtype: str
) -> jax.Array:
    """The stream [context | history | candidates], [R, N, D] in `dtype`.

    A candidate has its item's content, as an event has, and its own context features, but no event
    feature: what the user does with it is the label. Called inside a compact module, whose
    parameters these are, kernels [W, D] with W the width of the features side by side: content,
    event (a bias only where interleaved), candidate_context (no bias), context_<user feature>.

    Args:
      where: names the model in an error.
      width: D. layout: "merged", an event is one token, content + action; "interleaved", it is two,
        [content_0, action_0, content_1, action_1, ...].
      context: one token per user feature stands before the history.
    Raises ValueError for a schema without item features, or without event features of which an
    interleaved action could be made.
    """
    schema = features.schema
    names = {side: [f.name for f in schema.of(side)] for side in ("item", "event", "context")}
    if not names["item"]:
        raise ValueError(f"{where}: the schema has no item feature, of which a token is made")
    if layout == "interleaved" and not names["event"]:
        raise ValueError(f"{where}: tokens='interleaved' needs event features, the schema has none")

    def dense(name: str, bias: bool = True) -> nn.Dense:
        init = initializers.kernel("lecun")
        return nn.Dense(width, use_bias=bias, dtype=dtype, kernel_init=init, name=name)

    content = dense("content")
    history_rsd = content(sequence.concat(features.history, names["item"], dtype))
    candidate_rcd = content(sequence.concat(features.candidate, names["item"], dtype))
    if names["event"]:
        event = sequence.concat(features.history, names["event"], dtype)
        event_rsd = dense("event", bias=layout == "interleaved")(event)
        if layout == "interleaved":
            history_rsd = sequence.interleave(history_rsd, event_rsd)
        else:
            history_rsd += event_rsd
    if names["context"]:
        own = sequence.concat(features.candidate, names["context"], dtype)
        candidate_rcd += dense("candidate_context", bias=False)(own)
    parts = [history_rsd, candidate_rcd]
    if context and schema.user:
        users = [
            dense(f"context_{f.name}")(features.user[f.name].astype(dtype)) for f in schema.user
        ]
        parts = [sequence.interleave(*users), *parts]
    return jnp.concatenate(parts, axis=1)
