"""Attention over the T tokens of a candidate where every token has matrices of its own.

Token-major [T, N, D] as in `per_token`; N candidates, each with its own T tokens, which all read
each other: no mask. `outputs` P: only the first P tokens are computed, and only their queries,
output matrices and norms exist; keys and values are made of all T.
"""

import math

import jax
from flax import linen as nn

from rankjax.layers import checks, feature_attention, norms, per_token


def check(where: str, width: int, heads: int, qk_width: int | None, v_width: int | None) -> None:
    """Raises ValueError for head widths that are not positive, or that D / H does not give."""
    for name, value in (("qk_width", qk_width), ("v_width", v_width)):
        if value is not None:
            checks.at_least(where, 1, **{name: value})
    if None in (qk_width, v_width) and width % heads:
        raise ValueError(
            f"{where}: width={width} is no multiple of heads={heads}; choose one, or give qk_width "
            "and v_width"
        )


def attend(q_pnf: jax.Array, k_tnf: jax.Array, v_tnf: jax.Array, heads: int) -> jax.Array:
    """Softmax attention of P queries to T keys, per candidate and head, scaled by 1 / sqrt(Q).

    q [P, N, H Q], k [T, N, H Q] and v [T, N, H V], one float dtype -> [P, N, H V] in the dtype of
    v. The softmax is taken in float32.
    """
    heads_of = lambda x_tnf: x_tnf.reshape(*x_tnf.shape[:2], heads, -1)
    q_pnhq = heads_of(q_pnf)
    scale = 1 / math.sqrt(q_pnhq.shape[-1])
    out_pnhv = feature_attention.attend(q_pnhq, heads_of(k_tnf), heads_of(v_tnf), scale)
    return out_pnhv.reshape(*q_pnf.shape[:2], -1)


def score_flops(tokens: int, outputs: int, heads: int, qk_width: int, v_width: int) -> int:
    """FLOPs of `attend` per candidate, softmax left out: 2 P T H (Q + V)."""
    return 2 * outputs * tokens * heads * (qk_width + v_width)


def weights(tokens: int, outputs: int, width: int, heads: int, qk_width: int, v_width: int) -> int:
    """Parameters of a HeteroAttention: D H (P Q + T Q + T V) + P H V D; its FLOPs are twice that,
    per candidate and beside `score_flops`."""
    keys_and_values = tokens * (qk_width + v_width)
    return width * heads * (outputs * qk_width + keys_and_values + outputs * v_width)


class HeteroAttention(nn.Module):
    """o_i = concat_h(softmax_j((e_i Q_i^h) (e_j K_j^h)^T / sqrt(d_k)) (e_j V_j^h)) O_i.

    Called with x [T, N, D], any float dtype; returns [P, N, D] in `dtype`.
    Parameters, float32: query [P, D, H Q], key [T, D, H Q], value [T, D, H V], out [P, H V, D];
    the columns of the first three hold head after head. No biases.
    Source: HeteroAtt of Hiformer (arXiv 2311.05884), §4; HHFT's heterogeneous layer is the same.
    """

    heads: int
    qk_width: int  # Q
    v_width: int  # V
    outputs: int  # P <= T
    dtype: str = "float32"
    kernel_init: str = "lecun"
    residual_layers: int = 0

    @nn.compact
    def __call__(self, x_tnd: jax.Array) -> jax.Array:
        def linear(name: str, head_width: int) -> per_token.Dense:
            width = self.heads * head_width
            return per_token.Dense(width, self.dtype, self.kernel_init, use_bias=False, name=name)

        a_pnf = attend(
            linear("query", self.qk_width)(x_tnd[: self.outputs]),
            linear("key", self.qk_width)(x_tnd),
            linear("value", self.v_width)(x_tnd),
            self.heads,
        )
        out = per_token.Dense(
            x_tnd.shape[-1],
            *(self.dtype, self.kernel_init, self.residual_layers),
            use_bias=False,
            name="out",
        )
        return out(a_pnf)


class TokenNorm(nn.Module):
    """A `norms.Norm` of its own for every token: x [T, N, D] -> [T, N, D] of the same dtype.

    Parameters, float32: those of the norm, each with a leading axis T.
    """

    kind: str

    @nn.compact
    def __call__(self, x_tnd: jax.Array) -> jax.Array:
        each = nn.vmap(norms.Norm, variable_axes={"params": 0}, split_rngs={"params": True})
        return each(self.kind, name="norm")(x_tnd)


def residual(
    x_tnd: jax.Array, sublayer: nn.Module, norm: TokenNorm, place: str, outputs: int
) -> jax.Array:
    """The first P tokens of norm(f(x) + x) ("post") or f(norm(x)) + x ("pre"): [P, N, D]."""
    if place == "post":
        return norm(sublayer(x_tnd) + x_tnd[:outputs])
    return sublayer(norm(x_tnd)) + x_tnd[:outputs]
