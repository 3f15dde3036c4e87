"""Softmax attention as textbooks print it, with whole [N, M] arrays."""

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.masks import MaskRule


def softmax_attention(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    rule: MaskRule,
    scale: float,
    scores_rhnm: jax.Array | None,
) -> jax.Array:
    """softmax over the allowed keys of scale * (Q K^T + scores), times V; shapes as in `api`.

    Computed in float32, in float64 for float64 inputs.
    """
    wide = jnp.promote_types(q_rnhq.dtype, jnp.float32)
    logits_rhnm = jnp.einsum("rnhq,rmhq->rhnm", q_rnhq.astype(wide), k_rmhq.astype(wide))
    if scores_rhnm is not None:
        logits_rhnm += scores_rhnm.astype(wide)
    allow_r1nm = rule.allow(q_tokens, k_tokens)[:, None]
    # Finite, not -inf: a row that may read nothing would be inf - inf.
    logits_rhnm = jnp.where(allow_r1nm, scale * logits_rhnm, jnp.finfo(wide).min)
    most_rhn1 = jax.lax.stop_gradient(logits_rhnm.max(axis=-1, keepdims=True))
    weights_rhnm = jnp.where(allow_r1nm, jnp.exp(logits_rhnm - most_rhn1), 0)
    total_rhn1 = weights_rhnm.sum(axis=-1, keepdims=True)
    weights_rhnm = weights_rhnm / jnp.where(total_rhn1 > 0, total_rhn1, 1)
    return jnp.einsum("rhnm,rmhv->rnhv", weights_rhnm, v_rmhv.astype(wide)).astype(v_rmhv.dtype)
