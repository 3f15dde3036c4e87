"""Composite projections: what attends is made of all tokens of a candidate at once.

Token-major as in `per_token` and `hetero_attention`; `outputs` P as there.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.layers import checks, hetero_attention, initializers, per_token


def check(where: str, **ranks: int | None) -> None:
    """Raises ValueError for a rank that is neither None (full) nor a positive integer."""
    for name, rank in ranks.items():
        if rank is not None:
            checks.at_least(where, 1, **{name: rank})


def weights(width: int, tokens: int, features: int, rank: int | None) -> int:
    """Parameters of a Projection: W T F, or r (W + T F); its FLOPs are twice that per candidate."""
    if rank is None:
        return width * tokens * features
    return rank * (width + tokens * features)


class Projection(nn.Module):
    """One matrix from a whole vector to all tokens: x W, cut into tokens; low rank: (x L) R.

    Called with x [N, W], any float dtype; returns [tokens, N, features] in `dtype`.
    Parameters, float32: kernel [W, tokens * features], or left [W, rank] and right
    [rank, tokens * features]; columns hold token after token. Where features = H d, the factors
    are shared by the heads. No bias.
    Source: Hiformer (arXiv 2311.05884), §5, where x is the concatenation of the tokens; HHFT's
    virtual tokens are the same of one pooled vector.
    """

    tokens: int
    features: int
    rank: int | None = None  # None: full
    dtype: str = "float32"
    kernel_init: str = "lecun"

    @nn.compact
    def __call__(self, x_nw: jax.Array) -> jax.Array:
        (N, W), out = x_nw.shape, self.tokens * self.features
        y_nf = x_nw.astype(self.dtype)
        if self.rank is None:
            factors = [("kernel", (W, out))]
        else:
            factors = [("left", (W, self.rank)), ("right", (self.rank, out))]
        for name, shape in factors:
            init = initializers.kernel(self.kernel_init)
            y_nf = y_nf @ self.param(name, init, shape, jnp.float32).astype(self.dtype)
        return y_nf.reshape(N, self.tokens, self.features).swapaxes(0, 1)


class CompositeAttention(nn.Module):
    """HeteroAttention with composite projections: q, k, v of a token are made of all tokens.

    Called with x [T, N, D], any float dtype; returns [P, N, D] in `dtype`.
    composite_query=False: a token's query is made of itself alone, as in HeteroAttention.
    Parameters, float32: query, key and value as Projection of W = T D to P, T and T tokens of
    H Q, H Q and H V (the query [P, D, H Q] where it is not composite); out [P, H V, D].
    Source: Hiformer (arXiv 2311.05884), §5.
    """

    heads: int
    qk_width: int  # Q
    v_width: int  # V
    outputs: int  # P <= T
    rank_query: int | None = None
    rank_key: int | None = None
    rank_value: int | None = None
    composite_query: bool = True
    dtype: str = "float32"
    kernel_init: str = "lecun"
    residual_layers: int = 0

    @nn.compact
    def __call__(self, x_tnd: jax.Array) -> jax.Array:
        T, N, D = x_tnd.shape
        H, Q, V, P = self.heads, self.qk_width, self.v_width, self.outputs
        x_nw = x_tnd.swapaxes(0, 1).reshape(N, T * D)

        def composite(name: str, tokens: int, features: int, rank: int | None) -> jax.Array:
            project = Projection(tokens, features, rank, self.dtype, self.kernel_init, name=name)
            return project(x_nw)

        if self.composite_query:
            q_pnf = composite("query", P, H * Q, self.rank_query)
        else:
            own = per_token.Dense(H * Q, self.dtype, self.kernel_init, use_bias=False, name="query")
            q_pnf = own(x_tnd[:P])
        k_tnf = composite("key", T, H * Q, self.rank_key)
        v_tnf = composite("value", T, H * V, self.rank_value)
        how = self.dtype, self.kernel_init, self.residual_layers
        out = per_token.Dense(D, *how, use_bias=False, name="out")
        return out(hetero_attention.attend(q_pnf, k_tnf, v_tnf, H))
