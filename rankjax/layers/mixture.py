"""Per-token mixtures of experts: each of T tokens has X experts of its own. Token-major [T, N, D].

All experts are computed and a gate of 0 takes away what was not chosen: exact, no token is ever
dropped, and no FLOPs are saved. One expert's matrices lie side by side with those of the others,
so that a layer of all experts is one matrix product per token.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.layers import activations, initializers, per_token


def top_k_gates(scores_tnx: jax.Array, k: int) -> jax.Array:
    """softmax over the k largest of the last axis, 0 at the others; of equal ones the first win."""
    chosen = jax.lax.top_k(scores_tnx, k)[1]
    kept = (chosen[..., None] == jnp.arange(scores_tnx.shape[-1])).any(axis=-2)
    return nn.softmax(jnp.where(kept, scores_tnx, -jnp.inf), axis=-1)


class Hidden(nn.Module):
    """h_tx = x_t W_tx + b_tx: every expert's own layer, [T, N, D] -> [T, N, X, F] in `dtype`.

    `tokens` as in per_token.Dense. Parameters, float32: kernel [T, X, D, F], bias [T, X, F].
    """

    experts: int  # X
    features: int  # F
    dtype: str = "float32"
    kernel_init: str = "lecun"
    tokens: int | None = None  # T; None = as many as x holds

    @nn.compact
    def __call__(self, x_tnd: jax.Array) -> jax.Array:
        t, N, D = x_tnd.shape
        T, X, F = self.tokens or t, self.experts, self.features
        # batch_axis: every token's every expert is a layer of its own.
        init = initializers.kernel(self.kernel_init, batch_axis=(0, 1))
        kernel_txdf = self.param("kernel", init, (T, X, D, F), jnp.float32)[:t]
        bias_txf = self.param("bias", nn.initializers.zeros, (T, X, F), jnp.float32)[:t]
        kernel_tdf = kernel_txdf.swapaxes(1, 2).reshape(t, D, X * F)
        h_tnxf = per_token.matmul(x_tnd, kernel_tdf, self.dtype).reshape(t, N, X, F)
        return h_tnxf + bias_txf.astype(self.dtype)[:, None]


class Combine(nn.Module):
    """y_t = sum_x g_tx (h_tx W_tx + b_tx): [T, N, X, F] and gates [T, N, X] -> [T, N, features].

    `tokens` and `first` as in per_token.Dense: fewer tokens of h, fewer features of the output.
    std: of the kernel, a normal; None = as kernel_init says.
    Parameters, float32: kernel [T, X, F, features], bias [T, X, features].
    """

    features: int
    dtype: str = "float32"
    kernel_init: str = "lecun"
    residual_layers: int = 0
    std: float | None = None
    tokens: int | None = None  # T; None = as many as h holds

    @nn.compact
    def __call__(
        self, h_tnxf: jax.Array, gate_tnx: jax.Array, first: int | None = None
    ) -> jax.Array:
        t, N, X, F = h_tnxf.shape
        shape = (self.tokens or t, X, F, self.features)
        init = initializers.kernel(
            self.kernel_init, residual_layers=self.residual_layers, batch_axis=(0, 1)
        )
        if self.std is not None:
            init = nn.initializers.normal(self.std)
        kernel_txfd = self.param("kernel", init, shape, jnp.float32)
        bias_txd = self.param("bias", nn.initializers.zeros, (*shape[:2], shape[3]), jnp.float32)
        kernel_tfd = kernel_txfd[:t, ..., :first].reshape(t, X * F, -1)
        gate_tnx = gate_tnx.astype(self.dtype)
        gated_tnf = (gate_tnx[..., None] * h_tnxf).reshape(t, N, X * F)
        y_tnd = per_token.matmul(gated_tnf, kernel_tfd, self.dtype)
        return y_tnd + per_token.matmul(gate_tnx, bias_txd[:t, :, :first], self.dtype)


class FeedForwardExperts(nn.Module):
    """y_t = sum_x g_tx e_tx(x_t), every expert e_tx a GELU layer of its own, kD wide.

    Called with x [T, N, D] and gates [T, N, X], any float dtype; returns [T, N, D] in `dtype`.
    Parameters: T X (2 D F + F + D), F = expansion * D. X = 1 and gates of 1: per_token.FeedForward.
    Source: RankMixer (arXiv 2507.15551), sparse MoE.
    """

    expansion: int  # k
    dtype: str = "float32"
    kernel_init: str = "lecun"
    residual_layers: int = 0

    @nn.compact
    def __call__(self, x_tnd: jax.Array, gate_tnx: jax.Array) -> jax.Array:
        D, X = x_tnd.shape[-1], gate_tnx.shape[-1]
        hidden = Hidden(X, self.expansion * D, self.dtype, self.kernel_init, name="ffn_in")
        out = Combine(D, self.dtype, self.kernel_init, self.residual_layers, name="ffn_out")
        return out(activations.gelu(hidden(x_tnd)), gate_tnx)


class SwiGLUExperts(nn.Module):
    """A SwiGLU cut into X experts: y_t = e_t1(x_t) + alpha sum over the top k of p_tx e_tx(x_t).

    Expert 1 is shared, always on. p = softmax over the k = active - 1 largest of the router's
    X - 1 scores, x_t R_t + r_t, computed in float32: a rounded score would choose another expert.
    Called with x [T, N, D], any float dtype; returns [T, N, D] in `dtype`. `tokens` and `first` as
    in per_token.Dense.
    Parameters: T (X (3 D F + 2 F + D) + (X - 1) (D + 1)), F = hidden, of one expert. The down
    matrices start as normals of standard deviation `std` (None = as kernel_init says).
    Source: TokenMixer-Large (arXiv 2602.06563), Sparse-Pertoken MoE.
    """

    experts: int  # X, the shared one included
    active: int  # experts that a token uses, the shared one included
    hidden: int  # F, of one expert
    scale: float  # alpha
    dtype: str = "float32"
    kernel_init: str = "lecun"
    residual_layers: int = 0
    std: float | None = None
    tokens: int | None = None  # T; None = as many as x holds

    @nn.compact
    def __call__(self, x_tnd: jax.Array, first: int | None = None) -> jax.Array:
        X, F, T = self.experts, self.hidden, self.tokens
        router = per_token.Dense(X - 1, "float32", self.kernel_init, tokens=T, name="router")
        gate = Hidden(X, F, self.dtype, self.kernel_init, T, name="gate")
        up = Hidden(X, F, self.dtype, self.kernel_init, T, name="up")
        options = (self.dtype, self.kernel_init, self.residual_layers, self.std, T)
        down = Combine(x_tnd.shape[-1], *options, name="down")
        routed_tnx = self.scale * top_k_gates(router(x_tnd), self.active - 1)
        gate_tnx = jnp.concatenate([jnp.ones_like(routed_tnx[..., :1]), routed_tnx], axis=-1)
        return down(nn.swish(gate(x_tnd)) * up(x_tnd), gate_tnx, first)
