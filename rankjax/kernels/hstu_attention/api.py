"""The one public function of this folder."""

import math

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.kernels.hstu_attention import reference, xla
from rankjax.masks import MaskRule

_FUNCTIONS = {"reference": reference.hstu_attention, "xla": xla.hstu_attention}
IMPLEMENTATIONS = tuple(_FUNCTIONS)
_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float64)


def hstu_attention(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    rule: MaskRule,
    *,
    normalizer: float | jax.Array,
    scale: float = 1.0,
    bias: bias_lib.RelativeBias | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """out = A V with A = SiLU(scale * Q K^T + bias) / normalizer, masked after the SiLU.

    Args:
      q_rnhq: queries [R, N, H, Q], float32 or bfloat16 (float64 where JAX has it enabled).
      k_rmhq, v_rmhv: keys [R, M, H, Q] and values [R, M, H, V], dtype of the queries.
      q_tokens, k_tokens: what the rule and the bias know of the tokens, int32 [R, N] and [R, M].
      rule: who may read whom.
      normalizer: n of eq. 2, the padded maximum in the research code; > 0; a number or [R, N].
      scale: multiplies q.k before the SiLU; 1 in the paper, 1/sqrt(Q) in DLRM-v3.
      bias: tables of relative position [2P - 1] and of time buckets [129], float32, differentiable;
        None = no bias. Its times are bias_time: the query's own against the key's.
      implementation: one of IMPLEMENTATIONS; None = the best for the platform compiled for.
        "reference" holds [R, H, N, M] arrays; "xla" does so only where they are small.

    Returns: [R, N, H, V], dtype of v, summed in float32. A row that may read nothing is 0.
    Raises:
      ValueError: shapes or dtypes do not fit together, or the implementation is unknown.
    Source: HSTU, arXiv 2402.17152, §3.2, eq. 2.
    """
    name = "xla" if implementation is None else implementation
    if name not in _FUNCTIONS:
        raise ValueError(
            f"hstu_attention: implementation={name!r}, expected None or one of {IMPLEMENTATIONS}"
        )
    _check(q_rnhq, k_rmhq, v_rmhv, q_tokens, k_tokens, normalizer, bias)
    return _FUNCTIONS[name](
        q_rnhq, k_rmhq, v_rmhv, q_tokens, k_tokens, rule, normalizer, scale=float(scale), bias=bias
    )


def _check(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    normalizer: float | jax.Array,
    bias: bias_lib.RelativeBias | None,
) -> None:
    """Raises ValueError where shapes or dtypes do not fit together."""
    for name, x in (("q", q_rnhq), ("k", k_rmhq), ("v", v_rmhv)):
        if x.ndim != 4:
            raise ValueError(f"hstu_attention: {name} has shape {x.shape}, expected four axes")
    R, N, H, Q = q_rnhq.shape
    M = k_rmhq.shape[1]
    expected = (("k", k_rmhq.shape, (R, M, H, Q)), ("v", v_rmhv.shape[:3], (R, M, H)))
    tokens = (("q_tokens", q_tokens, (R, N)), ("k_tokens", k_tokens, (R, M)))
    expected += tuple(
        (f"{name}.{field}", x.shape, shape)
        for name, t, shape in tokens
        for field, x in vars(t).items()
    )
    if bias is not None and bias.time is not None:
        expected += (("bias.time", bias.time.shape, (bias_lib.TIME_BUCKETS,)),)
    if jnp.ndim(normalizer):
        expected += (("normalizer", jnp.shape(normalizer), (R, N)),)
    for name, found, want in expected:
        if tuple(found) != want:
            raise ValueError(
                f"hstu_attention: {name} has shape {tuple(found)}, expected {want} beside q of "
                f"shape {q_rnhq.shape}"
            )
    if bias is not None and bias.position is not None:
        shape = bias.position.shape
        if len(shape) != 1 or shape[0] % 2 == 0:
            raise ValueError(
                f"hstu_attention: bias.position has shape {shape}, expected (2P - 1,), an odd "
                "number of relative positions"
            )
    dtypes = [str(x.dtype) for x in (q_rnhq, k_rmhq, v_rmhv)]
    if len(set(dtypes)) > 1 or q_rnhq.dtype not in _FLOATS:
        raise ValueError(
            f"hstu_attention: q, k, v are {dtypes}, expected one of float32, bfloat16, float64"
        )
    if isinstance(normalizer, (int, float)) and not 0 < normalizer < math.inf:
        raise ValueError(f"hstu_attention: normalizer={normalizer}, expected a number > 0")
