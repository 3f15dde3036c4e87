"""SiLU attention in plain XLA: the fallback on every platform.

Small problems go in one piece. Above `PAIRS` (rows x heads x queries x keys) a scan over blocks of
keys holds one [N, block] strip at a time, forward and (by rematerialisation) backward: SiLU
attention needs no running maximum, so the blocks' results simply add up.
"""

import functools

import jax
import jax.numpy as jnp

from rankjax.batch import PAD, Tokens
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.masks import MaskRule

PAIRS = 2**24  # 64 MiB of float32 scores
BLOCK = 128  # keys of one step of the scan


@functools.partial(jax.jit, static_argnames=("rule", "scale", "pairs", "block"))
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
    pairs: int = PAIRS,
    block: int = BLOCK,
) -> jax.Array:
    """As `api.hstu_attention`. Products of bfloat16 inputs are summed in float32."""
    R, N, H, _ = q_rnhq.shape
    M, V = v_rmhv.shape[1], v_rmhv.shape[-1]
    wide = jnp.promote_types(q_rnhq.dtype, jnp.float32)
    strip = functools.partial(_strip, q_rnhq, q_tokens, rule=rule, scale=scale, bias=bias)
    if pairs >= R * H * N * M:
        out_rnhv = strip(k_rmhq, v_rmhv, k_tokens)
    else:
        blocks = -(-M // block)

        def split(x: jax.Array, fill: int) -> jax.Array:
            widths = [(0, 0), (0, blocks * block - M)] + [(0, 0)] * (x.ndim - 2)
            x = jnp.pad(x, widths, constant_values=fill)
            return jnp.moveaxis(x.reshape(R, blocks, block, *x.shape[2:]), 1, 0)

        # PAD = 0, so a key that padding adds is read by nobody.
        keys = jax.tree.map(functools.partial(split, fill=PAD), (k_rmhq, v_rmhv, k_tokens))

        # The sum stays outside the checkpoint, else every step would save the sum so far.
        def step(sum_rnhv: jax.Array, key_block: tuple) -> tuple[jax.Array, None]:
            return sum_rnhv + jax.checkpoint(strip)(*key_block), None

        out_rnhv, _ = jax.lax.scan(step, jnp.zeros((R, N, H, V), wide), keys)
    normalizer = jnp.asarray(normalizer, wide)
    if normalizer.ndim:
        normalizer = normalizer[:, :, None, None]
    return (out_rnhv / normalizer).astype(v_rmhv.dtype)


def _strip(
    q_rnhq: jax.Array,
    q_tokens: Tokens,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    k_tokens: Tokens,
    *,
    rule: MaskRule,
    scale: float,
    bias: bias_lib.RelativeBias | None,
) -> jax.Array:
    """What all queries read from these keys, before the division; [R, N, H, V] in float32."""
    wide = jnp.promote_types(q_rnhq.dtype, jnp.float32)
    scores_rhnm = jnp.einsum("rnhq,rmhq->rhnm", q_rnhq, k_rmhq, preferred_element_type=wide)
    scores_rhnm = scale * scores_rhnm
    if bias is not None:
        scores_rhnm += bias(q_tokens, k_tokens)[:, None].astype(wide)
    allow_rnm = rule.allow(q_tokens, k_tokens)
    weights_rhnm = jnp.where(allow_rnm[:, None], jax.nn.silu(scores_rhnm), 0)
    weights_rhnm = weights_rhnm.astype(v_rmhv.dtype)
    return jnp.einsum("rhnm,rmhv->rnhv", weights_rhnm, v_rmhv, preferred_element_type=wide)
