"""Layers of a stream of two kinds of tokens: those that share weights, and slots with their own.

The shared part, of any number of tokens (a history), is row-major [R, N, D]; the own part, T token
slots of M = R * C candidates, is token-major [T, M, D] (see `per_token`). Either may be empty.
Source: OneTrans (arXiv 2510.26104), mixed parameterisation.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.batch import Tokens
from rankjax.kernels import softmax_attention
from rankjax.layers import activations, initializers, per_token
from rankjax.masks import MaskRule

KINDS = ("gelu", "swiglu")
Stream = tuple[jax.Array, jax.Array]  # shared [R, N, D], own [T, M, D]


class Dense(nn.Module):
    """y_n = x_n W_S + b_S for shared tokens, y_t = x_t W_t + b_t for slot t.

    Called with x [R, N, D] and [T, M, D], any float dtype; returns the pair with D -> features, in
    `dtype`. own=False: the slots use W_S and b_S too.
    Parameters, float32: shared kernel [D, features], bias [features]; own kernel [T, D, features],
    bias [T, features].
    """

    features: int
    own: bool = True
    dtype: str = "float32"
    kernel_init: str = "lecun"
    residual_layers: int = 0  # L where the output is added to a residual stream of L layers

    @nn.compact
    def __call__(self, x_rnd: jax.Array, x_tmd: jax.Array) -> Stream:
        init = initializers.kernel(self.kernel_init, residual_layers=self.residual_layers)
        shared = nn.Dense(self.features, dtype=self.dtype, kernel_init=init, name="shared")
        own = shared
        if self.own:
            own = per_token.Dense(
                features=self.features,
                dtype=self.dtype,
                kernel_init=self.kernel_init,
                residual_layers=self.residual_layers,
                name="own",
            )
        return shared(x_rnd), own(x_tmd)


class Attention(nn.Module):
    """Softmax attention over [shared tokens | T slots of candidate 0 | of candidate 1 | ...].

    Scores are divided by sqrt(D / heads); query, key and value weights are a slot's own where
    `own`, those of the output where `own_output`.

    Called with x [R, N, D] and [T, R * C, D], the tokens of queries [R, n + C * T] and of keys
    [R, N + C * T], and the rule, by which shared tokens must read no slot. The shared queries are
    the last n shared tokens. Returns [R, n, D] and [T, R * C, D] in `dtype`; the output's bias
    where a token may read nothing.
    Parameters, float32: query, key, value, out: `Dense` D -> D each.
    """

    heads: int
    own: bool = True
    own_output: bool = False
    dtype: str = "float32"
    kernel_init: str = "lecun"
    residual_layers: int = 0
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x_rnd: jax.Array,
        x_tmd: jax.Array,
        q_tokens: Tokens,
        k_tokens: Tokens,
        rule: MaskRule,
    ) -> Stream:
        R, N, D = x_rnd.shape
        T, M, _ = x_tmd.shape
        H, C = self.heads, M // R
        n = N - (k_tokens.role.shape[1] - q_tokens.role.shape[1])

        def heads(name: str, shared_rnd: jax.Array) -> Stream:
            """[R, n, H, D / H] and, candidate after candidate, [R, C * T, H, D / H]."""
            dense = Dense(D, self.own, self.dtype, self.kernel_init, name=name)
            s_rnd, y_tmd = dense(shared_rnd, x_tmd)
            y_rctd = y_tmd.reshape(T, R, C, D).transpose(1, 2, 0, 3)
            return s_rnd.reshape(R, -1, H, D // H), y_rctd.reshape(R, C * T, H, D // H)

        q_s, q_own = heads("query", x_rnd[:, N - n :])
        (k_s, k_own), (v_s, v_own) = heads("key", x_rnd), heads("value", x_rnd)

        def attend(q: jax.Array, queries: slice, k: jax.Array, v: jax.Array) -> jax.Array:
            return softmax_attention.softmax_attention(
                *(q, k, v),
                jax.tree.map(lambda x_rn: x_rn[:, queries], q_tokens),
                jax.tree.map(lambda x_rn: x_rn[:, : k.shape[1]], k_tokens),
                rule,
                scale=(D // H) ** -0.5,
                implementation=self.implementation,
            )

        # Shared tokens read no slot: two products, and no scores between them and the slots.
        s_rnhq = attend(q_s, slice(n), k_s, v_s) if n else q_s
        every = lambda s, own: jnp.concatenate([s, own], axis=1)
        own_rnhq = attend(q_own, slice(n, None), every(k_s, k_own), every(v_s, v_own))
        own_tmd = own_rnhq.reshape(R, C, T, D).transpose(2, 0, 1, 3).reshape(T, M, D)
        out = Dense(
            *(D, self.own_output, self.dtype, self.kernel_init, self.residual_layers), name="out"
        )
        return out(s_rnhq.reshape(R, n, D), own_tmd)


class FeedForward(nn.Module):
    """y = act(x) W2 + b2 with a token's own or shared weights, as in `Dense`; F = expansion * D.

    kind "gelu": act(x) = GELU(x W1 + b1), the exact (erf) one; "swiglu": SiLU(x Wg + bg) *
    (x W1 + b1). Called with x [R, N, D] and [T, M, D]; returns the same shapes in `dtype`.
    Parameters, for the shared weights and for each slot's own: see `parameters`.
    Raises ValueError for an unknown kind.
    """

    expansion: int
    kind: str = "gelu"
    own: bool = True
    dtype: str = "float32"
    kernel_init: str = "lecun"
    residual_layers: int = 0

    @nn.compact
    def __call__(self, x_rnd: jax.Array, x_tmd: jax.Array) -> Stream:
        if self.kind not in KINDS:
            raise ValueError(f"mixed.FeedForward: kind={self.kind!r}, expected one of {KINDS}")
        D = x_rnd.shape[-1]

        def dense(features: int, name: str, residual_layers: int = 0) -> Dense:
            how = (self.own, self.dtype, self.kernel_init, residual_layers)
            return Dense(features, *how, name=name)

        hidden = dense(self.expansion * D, "ffn_in")(x_rnd, x_tmd)
        if self.kind == "gelu":
            hidden = tuple(activations.gelu(x) for x in hidden)
        else:
            gates = dense(self.expansion * D, "ffn_gate")(x_rnd, x_tmd)
            hidden = tuple(nn.silu(gate) * x for gate, x in zip(gates, hidden))
        return dense(D, "ffn_out", self.residual_layers)(*hidden)


def parameters(kind: str, width: int, expansion: int) -> int:
    """Of one set of a FeedForward's weights: 2 F D + F + D, or 3 F D + 2 F + D for "swiglu"."""
    inner = {"gelu": 1, "swiglu": 2}[kind]
    hidden = expansion * width
    return inner * (width * hidden + hidden) + hidden * width + width
