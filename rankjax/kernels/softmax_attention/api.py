"""The one public function of this folder."""

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.kernels.softmax_attention import reference, xla
from rankjax.masks import MaskRule

_FUNCTIONS = {"reference": reference.softmax_attention, "xla": xla.softmax_attention}
IMPLEMENTATIONS = tuple(_FUNCTIONS)
_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float64)


def softmax_attention(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    rule: MaskRule,
    *,
    scale: float,
    scores: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """out = softmax over the allowed keys of scale * (Q K^T + scores), times V.

    Args:
      q_rnhq: queries [R, N, H, Q], float32 or bfloat16 (float64 where JAX has it enabled).
      k_rmhq, v_rmhv: keys [R, M, H, Q] and values [R, M, H, V], dtype of the queries.
      q_tokens, k_tokens: what the rule knows of the tokens, int32 [R, N] and [R, M].
      rule: who may read whom.
      scale: 1 / sqrt(Q) in the papers.
      scores: what is added to q.k, any float dtype, differentiable; [R, H, N, M] or broadcastable
        to it.
      implementation: one of IMPLEMENTATIONS; None = the best for the platform compiled for.
        "reference" holds [R, H, N, M] arrays; "xla" does so only where they are small.

    Returns: [R, N, H, V], dtype of v, summed in float32. A row that may read nothing is 0.
    Raises:
      ValueError: shapes or dtypes do not fit together, or the implementation is unknown.
    """
    name = "xla" if implementation is None else implementation
    if name not in _FUNCTIONS:
        raise ValueError(
            f"softmax_attention: implementation={name!r}, expected None or one of {IMPLEMENTATIONS}"
        )
    _check(q_rnhq, k_rmhq, v_rmhv, q_tokens, k_tokens, scores)
    return _FUNCTIONS[name](
        *(q_rnhq, k_rmhq, v_rmhv, q_tokens, k_tokens, rule), scale=float(scale), scores_rhnm=scores
    )


def _check(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    scores: jax.Array | None,
) -> None:
    """Raises ValueError where shapes or dtypes do not fit together."""
    for name, x in (("q", q_rnhq), ("k", k_rmhq), ("v", v_rmhv)):
        if x.ndim != 4:
            raise ValueError(f"softmax_attention: {name} has shape {x.shape}, expected four axes")
    R, N, H, Q = q_rnhq.shape
    M = k_rmhq.shape[1]
    expected = [("k", k_rmhq.shape, (R, M, H, Q)), ("v", v_rmhv.shape[:3], (R, M, H))]
    for name, tokens, shape in (("q_tokens", q_tokens, (R, N)), ("k_tokens", k_tokens, (R, M))):
        expected += [(f"{name}.{field}", x.shape, shape) for field, x in vars(tokens).items()]
    for name, found, want in expected:
        if tuple(found) != want:
            raise ValueError(
                f"softmax_attention: {name} has shape {tuple(found)}, expected {want} beside q of "
                f"shape {q_rnhq.shape}"
            )
    if scores is not None:
        full = (R, H, N, M)
        fits = scores.ndim == 4 and all(s in (1, f) for s, f in zip(scores.shape, full))
        if not fits:
            raise ValueError(
                f"softmax_attention: scores have shape {scores.shape}, expected {full} or 1 in "
                "place of any of them"
            )
    dtypes = [str(x.dtype) for x in (q_rnhq, k_rmhq, v_rmhv)]
    if len(set(dtypes)) > 1 or q_rnhq.dtype not in _FLOATS:
        raise ValueError(
            f"softmax_attention: q, k, v are {dtypes}, expected one of float32, bfloat16, float64"
        )
