"""Layers in which every token has parameters of its own. Activations are token-major [T, N, D].

Token-major, because one `dot_general` that batches over T then reads and writes contiguous
matrices: up to twice the speed of einsum("ntd,tdf->ntf") on a CPU, forward and backward together
(`rankjax bench models`). A model transposes once, where its tokens are made, and never again.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.layers import activations, initializers


def matmul(x_tnd: jax.Array, kernel_tdf: jax.Array, dtype: str) -> jax.Array:
    """x_t W_t for every token t: [T, N, D] times [T, D, F] -> [T, N, F], computed in `dtype`."""
    return jax.lax.dot_general(
        x_tnd.astype(dtype),
        kernel_tdf.astype(dtype),
        dimension_numbers=(((2,), (1,)), ((0,), (0,))),
    )


class Dense(nn.Module):
    """y_t = x_t W_t + b_t: token t has its own dense layer.

    Called with x [T, N, D], any float dtype; returns [T, N, features] in `dtype`. Where only a part
    of the output is read, `tokens` = T lets x hold the first tokens only, and `first` = F in the
    call computes the first F features only; the parameters stay whole.
    Parameters, float32: kernel [T, D, features] and, unless use_bias=False, bias [T, features].
    Source: RankMixer (arXiv 2507.15551), per-token FFN; also HeteroAtt, HHFT, OneTrans.
    """

    features: int
    dtype: str = "float32"
    kernel_init: str = "lecun"
    residual_layers: int = 0  # L where the output is added to a residual stream of L layers
    tokens: int | None = None  # T; None = as many as x holds
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_tnd: jax.Array, first: int | None = None) -> jax.Array:
        T, D = self.tokens or len(x_tnd), x_tnd.shape[-1]
        # batch_axis: every token is a layer of its own, so T is no part of the fan-in.
        init = initializers.kernel(
            self.kernel_init, residual_layers=self.residual_layers, batch_axis=(0,)
        )
        kernel_tdf = self.param("kernel", init, (T, D, self.features), jnp.float32)
        y_tnf = matmul(x_tnd, kernel_tdf[: len(x_tnd), :, :first], self.dtype)
        if not self.use_bias:
            return y_tnf
        bias_tf = self.param("bias", nn.initializers.zeros, (T, self.features), jnp.float32)
        return y_tnf + bias_tf[: len(x_tnd), :first].astype(self.dtype)[:, None]


class FeedForward(nn.Module):
    """PFFN: y_t = GELU(x_t W1_t + b1_t) W2_t + b2_t, with the exact (erf) GELU.

    Called with x [T, N, D], any float dtype; returns [T, N, D] in `dtype`.
    Parameters: T (2 D F + F + D), F = expansion * D.
    Source: RankMixer (arXiv 2507.15551), per-token FFN.
    """

    expansion: int  # k
    dtype: str = "float32"
    kernel_init: str = "lecun"
    residual_layers: int = 0

    @nn.compact
    def __call__(self, x_tnd: jax.Array) -> jax.Array:
        D = x_tnd.shape[-1]
        hidden = Dense(self.expansion * D, self.dtype, self.kernel_init, name="ffn_in")
        out = Dense(D, self.dtype, self.kernel_init, self.residual_layers, name="ffn_out")
        return out(activations.gelu(hidden(x_tnd)))


class SwiGLU(nn.Module):
    """y_t = (swish(x_t G_t + b_t) * (x_t U_t + c_t)) W_t + d_t, swish(x) = x sigmoid(x).

    Called with x [T, N, D], any float dtype; returns [T, N, D] in `dtype`. `tokens` and `first` as
    in Dense: fewer tokens of x, fewer columns of the output.
    Parameters: T (3 D F + 2 F + D), F = hidden: gate, up and down, each a Dense.
    Source: TokenMixer-Large (arXiv 2602.06563), pSwiGLU.
    """

    hidden: int  # F
    dtype: str = "float32"
    kernel_init: str = "lecun"
    residual_layers: int = 0
    tokens: int | None = None  # T; None = as many as x holds
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_tnd: jax.Array, first: int | None = None) -> jax.Array:
        def dense(features: int, name: str, layers: int = 0) -> Dense:
            return Dense(features, self.dtype, self.kernel_init, layers, self.tokens, name=name)

        gate, up = dense(self.hidden, "gate"), dense(self.hidden, "up")
        down = dense(x_tnd.shape[-1], "down", self.residual_layers)
        return down(nn.swish(gate(x_tnd)) * up(x_tnd), first)
