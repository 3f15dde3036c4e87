"""SiLU attention as the paper prints it, with whole [N, M] arrays."""

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.masks import MaskRule


def hstu_attention(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    rule: MaskRule,
    normalizer: float | jax.Array,
    scale: float,
    bias: bias_lib.RelativeBias | None,
) -> jax.Array:
    """out = A V, A = SiLU(scale * Q K^T + bias) / normalizer, zero where not allowed (eq. 2).

    Shapes as in `api.hstu_attention`; computed in float32, in float64 for float64 inputs.
    """
    wide = jnp.promote_types(q_rnhq.dtype, jnp.float32)
    q_rnhq, k_rmhq, v_wide_rmhv = (x.astype(wide) for x in (q_rnhq, k_rmhq, v_rmhv))
    scores_rhnm = scale * jnp.einsum("rnhq,rmhq->rhnm", q_rnhq, k_rmhq)
    if bias is not None:
        scores_rhnm += bias(q_tokens, k_tokens)[:, None].astype(wide)
    allow_rnm = rule.allow(q_tokens, k_tokens)
    # After the SiLU: SiLU(bias) of a masked pair is not 0.
    weights_rhnm = jnp.where(allow_rnm[:, None], jax.nn.silu(scores_rhnm), 0)
    out_rnhv = jnp.einsum("rhnm,rmhv->rnhv", weights_rhnm, v_wide_rmhv)
    normalizer = jnp.asarray(normalizer, wide)
    if normalizer.ndim:
        normalizer = normalizer[:, :, None, None]
    return (out_rnhv / normalizer).astype(v_rmhv.dtype)
