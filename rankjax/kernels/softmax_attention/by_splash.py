"""Softmax attention by JAX's splash attention, Pallas kernels for TPUs: the way on a TPU.

Splash attention skips the blocks of a mask that hold no pair. The mask is data here, so it holds
all of it; the rows of the batch go one after another (as Pallas would batch them,
whose block lists are per row), and each builds its mask when its turn comes, forward and backward.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from rankjax.batch import Tokens
from rankjax.kernels import blocks
from rankjax.kernels.softmax_attention import mask as mask_lib
from rankjax.masks import MaskRule

BLOCK = 512  # queries and keys of a block; a shorter side is one block
LANES = 128  # blocks are multiples of it
# Pairs of one row. Its mask takes 4 bytes a pair forward and up to 13 backward (compiled for tpu7x;
# Pallas widens booleans): at most 0.9 GB.
MASK = 2**26
_RESIDUALS = "softmax_attention_by_splash"


def unsuited(
    q_rnhq: jax.Array, k_rmhq: jax.Array, v_rmhv: jax.Array, scores_rhnm: jax.Array | None
) -> str | None:
    """Why splash attention does not take these; None where it does."""
    if scores_rhnm is not None:
        return "takes no scores"
    if q_rnhq.dtype == jnp.float64:
        return "takes float32 and bfloat16, found float64"
    N, M = q_rnhq.shape[1], k_rmhq.shape[1]
    if N * M > MASK:
        return f"holds a mask of N x M pairs, at most {MASK}; found {N} x {M}"
    return None


@functools.partial(jax.jit, static_argnames=("rule", "scale", "interpret"))
def softmax_attention(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    rule: MaskRule,
    scale: float,
    scores_rhnm: None,
    interpret: bool = False,
) -> jax.Array:
    """As `api.softmax_attention`, without scores. interpret: run the kernels without a TPU."""
    assert scores_rhnm is None
    q_block, k_block = (min(BLOCK, n + -n % LANES) for n in (q_rnhq.shape[1], k_rmhq.shape[1]))
    row = functools.partial(_row, rule=rule, q_block=q_block, k_block=k_block, interpret=interpret)
    # Kept for the backward pass: what the kernel names (its output and sums), and not the mask.
    keep = jax.checkpoint_policies.save_only_these_names(_RESIDUALS)
    row = jax.checkpoint(row, policy=keep)
    # Splash attention has no scale. Rounded to bfloat16 only where `scale` is no power of two.
    q_rnhq = scale * q_rnhq
    xs = (q_rnhq, k_rmhq, v_rmhv, q_tokens, k_tokens)
    return jax.lax.map(lambda xs: row(*xs), xs)


def _row(
    q_nhq: jax.Array,
    k_mhq: jax.Array,
    v_mhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    *,
    rule: MaskRule,
    q_block: int,
    k_block: int,
    interpret: bool,
) -> jax.Array:
    """One row of the batch: [N, H, Q], [M, H, Q], [M, H, V] and tokens [N], [M] -> [N, H, V]."""
    N = q_nhq.shape[0]
    one = lambda size, tokens: jax.tree.map(lambda x: blocks.padded(x[None], size), tokens)
    mask_1nm, reads_1n = mask_lib.dense(rule, one(q_block, q_tokens), one(k_block, k_tokens))
    sizes = {f"block_q{kind}": q_block for kind in ("", "_dkv", "_dq")}
    sizes |= {f"block_kv{kind}": k_block for kind in ("", "_dkv", "_dq")}
    kernel = splash.make_splash_mha(
        mask_1nm,
        block_sizes=splash.BlockSizes(**sizes),
        **{"head_shards": 1, "q_seq_shards": 1, "interpret": interpret},
        residual_checkpoint_name=_RESIDUALS,
    )
    # Under jit the library makes a tracer of this flag, and then branches on it.
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    heads_first = lambda x, size: blocks.padded(x.swapaxes(0, 1), size)
    q_hnq, k_hmq, v_hmv = (
        heads_first(x, size) for x, size in ((q_nhq, q_block), (k_mhq, k_block), (v_mhv, k_block))
    )
    out_nhv = kernel(q_hnq, k_hmq, v_hmv).swapaxes(0, 1)
    return mask_lib.silenced(out_nhv, reads_1n[0])[:N]
