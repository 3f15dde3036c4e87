"""What HSTU's forms share: one projection to u, v, q, k, and SiLU attention over them.

Source: "Actions Speak Louder than Words" (arXiv 2402.17152), §3, and Meta's DLRM-v3.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.batch import Tokens
from rankjax.kernels import hstu_attention
from rankjax.layers import checks, sequence
from rankjax.masks import MaskRule

ACTIVATIONS = ("uvqk", "u")
NORMALIZERS = ("static_max", "valid_len", "const")


def check_widths(where: str, width: int, heads: int, qk: int | None, v: int | None) -> None:
    """Raises ValueError unless the heads' widths are given or divide the layer's."""
    if (qk is None or v is None) and width % heads:
        raise ValueError(
            f"{where}: width={width} is no multiple of heads={heads}; choose one, or give qk_width "
            "and v_width"
        )


def normalizer(kind: str, tokens: Tokens, *, static_max: int, constant: float) -> float | jax.Array:
    """What the sum over the keys is divided by, a number or [R, N].

    "static_max" the tokens that a sample can have; "valid_len" those that it has, one candidate
    included, which depends on later events; "const" `constant`. Never of the batch, which would
    make a score depend on the samples beside it.
    """
    checks.one_of("pointwise_attention.normalizer", "kind", kind, NORMALIZERS)
    if kind == "valid_len":
        return 1.0 + sequence.lengths(tokens)
    return float(static_max) if kind == "static_max" else constant


def widths(heads: int, qk: int, v: int) -> list[int]:
    """The widths of u, v, q, k side by side, in the order of the kernel's columns."""
    return [heads * v, heads * v, heads * qk, heads * qk]


def attend(
    h_rnd: jax.Array,
    kernel_df: jax.Array,
    mask: tuple[Tokens, Tokens, MaskRule],
    *,
    heads: int,
    qk: int,
    v: int,
    normalizer: float | jax.Array,
    scale: float = 1.0,
    activation: str = "uvqk",
    bias_f: jax.Array | None = None,
    relative: hstu_attention.RelativeBias | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(U, A V) of u, v, q, k = Split(h W + b); rows that nobody reads give keys and values only.

    Args:
      h_rnd: [R, N, D], float32 or bfloat16.
      kernel_df, bias_f: [D, 2 h (dv + dqk)] and, where the layer has one, its bias; dtype of h.
      mask: the tokens that are computed, which are the last ones of h, all tokens, and the rule.
      heads, qk, v: h, and the widths dqk and dv of one head.
      normalizer: what the sum over the keys is divided by, a number or [R, N].
      scale: multiplies q k before the SiLU.
      activation: which of u, v, q, k pass a SiLU: "uvqk" (the paper) or "u" (DLRM-v3).
      relative: the bias tables of pairs of tokens, or None.
    Returns: U and A V, [R, rows, h dv], dtype of h; a row that may read nothing has A V = 0.
    Raises ValueError for an unknown activation.
    """
    checks.one_of("pointwise_attention.attend", "activation", activation, ACTIVATIONS)
    R, N, _ = h_rnd.shape
    q_tokens, k_tokens, rule = mask
    rows = q_tokens.segment.shape[1]
    u_rnf, v_rmf, q_rnf, k_rmf = _project(
        h_rnd, kernel_df, bias_f, widths(heads, qk, v), slice(N - rows, N), activation
    )
    per_head = lambda x_rnf: x_rnf.reshape(*x_rnf.shape[:2], heads, -1)
    if jnp.ndim(normalizer):
        normalizer = normalizer[:, N - rows :]
    a_rnhv = hstu_attention.hstu_attention(
        *(per_head(q_rnf), per_head(k_rmf), per_head(v_rmf)),
        *(q_tokens, k_tokens, rule),
        normalizer=normalizer,
        scale=scale,
        bias=relative,
        implementation=implementation,
    )
    return u_rnf, a_rnhv.reshape(R, rows, heads * v)


def _project(
    h_rnd: jax.Array,
    kernel_df: jax.Array,
    bias_f: jax.Array | None,
    sizes: list[int],
    tail: slice,
    activation: str,
) -> tuple[jax.Array, ...]:
    """u and q of the rows in `tail`, v and k of all."""

    def project(x_rnd: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        # Rows as one axis: a little faster on a CPU than a product with three axes.
        y = (x_rnd.reshape(-1, x_rnd.shape[-1]) @ kernel).reshape(*x_rnd.shape[:2], -1)
        return y if bias is None else y + bias

    cuts = [sum(sizes[:i]) for i in (1, 2, 3)]
    every = activation == "uvqk"
    act = nn.silu if every else lambda x: x
    if tail.start:
        w_u, w_v, w_q, w_k = jnp.split(kernel_df, cuts, axis=-1)
        b_u, b_v, b_q, b_k = [None] * 4 if bias_f is None else jnp.split(bias_f, cuts)
        h_tail = h_rnd[:, tail]
        u, q = project(h_tail, w_u, b_u), act(project(h_tail, w_q, b_q))
        return nn.silu(u), act(project(h_rnd, w_v, b_v)), q, act(project(h_rnd, w_k, b_k))
    u, v, q, k = jnp.split(act(project(h_rnd, kernel_df, bias_f)), cuts, axis=-1)
    return (u if every else nn.silu(u)), v, q, k
