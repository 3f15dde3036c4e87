"""Softmax attention by jax.nn.dot_product_attention: cuDNN on CUDA where it can, XLA elsewhere.

Only on request. cuDNN can be traced only where it is installed, so a program planned elsewhere
would be another one; it takes bfloat16 only; and it reads the mask as a bfloat16 bias, whose
gradient it writes out as well. XLA's form holds [R, H, N, M] arrays.
"""

import functools

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.kernels import blocks
from rankjax.kernels.softmax_attention import mask as mask_lib
from rankjax.masks import MaskRule

WIDTH = 128  # cuDNN's widest head before Hopper
STEP = 8  # and what widths are multiples of


def unsuited(
    q_rnhq: jax.Array, k_rmhq: jax.Array, v_rmhv: jax.Array, scores_rhnm: jax.Array | None
) -> str | None:
    """Why jax.nn does not take these; None where it does."""
    return "takes float32 and bfloat16, found float64" if q_rnhq.dtype == jnp.float64 else None


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
    """As `api.softmax_attention`. Scores go to XLA: cuDNN would round them to bfloat16."""
    args = (q_rnhq, k_rmhq, v_rmhv, q_tokens, k_tokens, scores_rhnm)
    call = functools.partial(_call, rule=rule, scale=scale)
    branches = {"default": functools.partial(call, implementation="xla")}
    width = max(q_rnhq.shape[-1], v_rmhv.shape[-1])
    if q_rnhq.dtype == jnp.bfloat16 and scores_rhnm is None and width <= WIDTH:
        cudnn = functools.partial(call, implementation="cudnn")
        try:
            jax.eval_shape(cudnn, *args)
            branches["cuda"] = cudnn
        except RuntimeError:  # cuDNN is not detected
            pass
    return jax.lax.platform_dependent(*args, **branches)


def _call(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    scores_rhnm: jax.Array | None,
    *,
    rule: MaskRule,
    scale: float,
    implementation: str,
) -> jax.Array:
    N, V = q_rnhq.shape[1], v_rmhv.shape[-1]
    width = max(q_rnhq.shape[-1], V)
    if implementation == "cudnn":
        # It wants even lengths beside a bias, and widths in steps.
        width += -width % STEP
        even = lambda x: jax.tree.map(lambda x: blocks.padded(x, 2), x)
        q_rnhq, k_rmhq, v_rmhv, q_tokens, k_tokens = map(
            even, (q_rnhq, k_rmhq, v_rmhv, q_tokens, k_tokens)
        )
    mask_rnm, reads_rn = mask_lib.dense(rule, q_tokens, k_tokens)
    # Values are as wide as queries and keys.
    out_rnhv = jax.nn.dot_product_attention(
        *(blocks.padded(x, width, axis=3) for x in (q_rnhq, k_rmhq, v_rmhv)),
        bias=None if scores_rhnm is None else scale * scores_rhnm.astype(jnp.float32),
        **{"mask": mask_rnm[:, None], "scale": scale, "implementation": implementation},
    )
    return mask_lib.silenced(out_rnhv, reads_rn)[:, :N, :, :V]
