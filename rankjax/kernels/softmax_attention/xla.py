"""Softmax attention in plain XLA: the fallback on every platform.

Without scores a CPU goes by tiles (xla_tiles.py), which skips what nobody reads. Otherwise small
problems go in one piece, and above `PAIRS` (rows x heads x queries x keys) a scan over blocks of
queries holds one [block, M] strip at a time, forward and (by rematerialisation) backward: few steps
over all rows, where an accelerator would wait for the many small ones of the tiles.
"""

import functools

import jax
import jax.numpy as jnp

from rankjax.batch import PAD, Tokens
from rankjax.kernels.softmax_attention import xla_tiles
from rankjax.masks import MaskRule

PAIRS = 2**24  # 64 MiB of float32 scores
FEW = 2**20  # a CPU's one piece without scores: 4 MiB; tiles are no faster
BLOCK = 128  # queries of one step of the scan


@functools.partial(jax.jit, static_argnames=("rule", "scale"))
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
    """As `api.softmax_attention`. Products of bfloat16 inputs are summed in float32."""
    by_strips = functools.partial(strips, rule=rule, scale=scale)
    args = (q_rnhq, k_rmhq, v_rmhv, q_tokens, k_tokens)
    R, N, H, _ = q_rnhq.shape
    if scores_rhnm is not None or R * H * N * k_rmhq.shape[1] <= FEW:
        return by_strips(*args, scores_rhnm=scores_rhnm)

    def by_tiles(q: jax.Array, k: jax.Array, v: jax.Array, *tokens: Tokens) -> jax.Array:
        return xla_tiles.softmax_attention((q, k, v), tokens, rule, scale, xla_tiles.TILE)

    return jax.lax.platform_dependent(
        *args, cpu=by_tiles, default=functools.partial(by_strips, scores_rhnm=None)
    )


def strips(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    rule: MaskRule,
    scale: float,
    scores_rhnm: jax.Array | None,
    pairs: int = PAIRS,
    block: int = BLOCK,
) -> jax.Array:
    """The same in one piece up to `pairs`, in strips of `block` queries above."""
    R, N, H, _ = q_rnhq.shape
    M = k_rmhq.shape[1]
    strip = functools.partial(_strip, k_rmhq, v_rmhv, k_tokens, rule=rule, scale=scale)
    if pairs >= R * H * N * M:
        return strip(q_rnhq, q_tokens, scores_rhnm)
    block = min(block, N)
    blocks = -(-N // block)

    def split(x: jax.Array, axis: int = 1, fill: int = 0) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, blocks * block - N)
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(
            x.reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :]), axis, 0
        )

    queries = split(q_rnhq), jax.tree.map(functools.partial(split, fill=PAD), q_tokens)
    if scores_rhnm is not None and scores_rhnm.shape[2] != 1:
        queries = (*queries, split(scores_rhnm, axis=2))
        out = jax.lax.map(jax.checkpoint(lambda xs: strip(*xs)), queries)
    else:
        out = jax.lax.map(jax.checkpoint(lambda xs: strip(*xs, scores_rhnm)), queries)
    return jnp.moveaxis(out, 0, 1).reshape(R, blocks * block, H, -1)[:, :N]


def _strip(
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    k_tokens: Tokens,
    q_rnhq: jax.Array,
    q_tokens: Tokens,
    scores_rhnm: jax.Array | None,
    *,
    rule: MaskRule,
    scale: float,
) -> jax.Array:
    """What these queries read from all keys, [R, N, H, V]."""
    wide = jnp.promote_types(q_rnhq.dtype, jnp.float32)
    logits_rhnm = jnp.einsum("rnhq,rmhq->rhnm", q_rnhq, k_rmhq, preferred_element_type=wide)
    if scores_rhnm is not None:
        logits_rhnm += scores_rhnm.astype(wide)
    allow_r1nm = rule.allow(q_tokens, k_tokens)[:, None]
    # Finite, not -inf: a row that may read nothing would be inf - inf.
    logits_rhnm = jnp.where(allow_r1nm, scale * logits_rhnm, jnp.finfo(wide).min)
    most_rhn1 = jax.lax.stop_gradient(logits_rhnm.max(axis=-1, keepdims=True))
    weights_rhnm = jnp.where(allow_r1nm, jnp.exp(logits_rhnm - most_rhn1), 0)
    total_rhn1 = weights_rhnm.sum(axis=-1, keepdims=True)
    # Divided after the product, which is smaller than the weights.
    out_rhnv = jnp.einsum(
        "rhnm,rmhv->rhnv", weights_rhnm.astype(v_rmhv.dtype), v_rmhv, preferred_element_type=wide
    )
    out_rhnv = out_rhnv / jnp.where(total_rhn1 > 0, total_rhn1, 1)
    return out_rhnv.swapaxes(1, 2).astype(v_rmhv.dtype)
