"""A Transformer block over one stream of tokens, whose reads a mask rule decides."""

from collections.abc import Callable

import jax
from flax import linen as nn

from rankjax.batch import Tokens
from rankjax.kernels import softmax_attention
from rankjax.layers import activations, initializers, norms
from rankjax.masks import MaskRule

EXPANSION = 4  # the feed-forward is 4 D wide


def parameters(width: int, norm: str = "layer") -> int:
    """Parameters of a Block: 12 D^2 + 13 D with LayerNorm."""
    linear = 4 * width * width + 4 * width
    feed_forward = 2 * EXPANSION * width * width + (EXPANSION + 1) * width
    return linear + feed_forward + 2 * norms.parameters(norm, width)


def flops(width: int, queries: int, keys: int) -> int:
    """Forward FLOPs of a Block's products, unskipped scores; 24 N D^2 + 4 N^2 D for N = N."""
    of_query = 2 * (2 + 2 * EXPANSION) * width**2  # Q, O, feed-forward
    return queries * of_query + 4 * keys * width**2 + 4 * queries * keys * width


class Block(nn.Module):
    """h = MHA(norm(x)) + x, y = FFN(norm(h)) + h; "post": h = norm(MHA(x) + x), y = norm(...).

    MHA is softmax attention with scale 1 / sqrt(D / H), FFN(x) = GELU(x W1 + b1) W2 + b2, GELU
    exact. Called with x [R, M, D] in `dtype`, the Tokens of the queries [R, N] and of the keys
    [R, M], and the rule; the queries are the last N rows of x. Returns their y, [R, N, D].
    Parameters, float32: query, key, value and out, each a kernel [D, D] and a bias [D]; ffn_in
    [D, 4 D], [4 D]; ffn_out [4 D, D], [D]; two norms: 12 D^2 + 13 D with LayerNorm.
    """

    heads: int
    norm: str = "layer"
    norm_place: str = "pre"
    kernel_init: str = "lecun"
    residual_layers: int = 0
    dropout: float = 0.0  # of what is added to the residual stream
    dtype: str = "float32"
    implementation: str | None = None  # of the attention

    @nn.compact
    def __call__(
        self, x_rmd: jax.Array, queries: Tokens, keys: Tokens, rule: MaskRule, *, train: bool
    ) -> jax.Array:
        D, N = x_rmd.shape[-1], queries.role.shape[1]
        pre = self.norm_place == "pre"
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        attention_norm = norms.Norm(self.norm, name="attention_norm")
        ffn_norm = norms.Norm(self.norm, name="ffn_norm")
        h_rmd = attention_norm(x_rmd) if pre else x_rmd
        a_rnd = dropout(self._attend(h_rmd, queries, keys, rule))
        h_rnd = x_rmd[:, x_rmd.shape[1] - N :] + a_rnd
        if not pre:
            h_rnd = attention_norm(h_rnd)
        f_rnf = self._dense("ffn_in", EXPANSION * D)(ffn_norm(h_rnd) if pre else h_rnd)
        f_rnf = activations.gelu(f_rnf)
        y_rnd = h_rnd + dropout(self._dense("ffn_out", D, writes=True)(f_rnf))
        return y_rnd if pre else ffn_norm(y_rnd)

    def _attend(self, h_rmd: jax.Array, queries: Tokens, keys: Tokens, rule: MaskRule) -> jax.Array:
        R, M, D = h_rmd.shape
        N = queries.role.shape[1]
        heads = lambda x_rnd: x_rnd.reshape(*x_rnd.shape[:2], self.heads, -1)
        a_rnhv = softmax_attention.softmax_attention(
            heads(self._dense("query", D)(h_rmd[:, M - N :])),
            heads(self._dense("key", D)(h_rmd)),
            heads(self._dense("value", D)(h_rmd)),
            *(queries, keys, rule),
            scale=(D // self.heads) ** -0.5,
            implementation=self.implementation,
        )
        return self._dense("out", D, writes=True)(a_rnhv.reshape(R, N, D))

    def _dense(
        self, name: str, features: int, writes: bool = False
    ) -> Callable[[jax.Array], jax.Array]:
        """writes: its output is added to the residual stream."""
        init = initializers.kernel(
            self.kernel_init, residual_layers=self.residual_layers if writes else 0
        )
        return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)
