"""Attention among the tokens of one candidate, with one set of weights for all tokens.

Activations are token-major [T, N, D] as everywhere in the models of tokens; N counts candidates.
There is no mask: a candidate's feature tokens all read each other, and no other candidate's.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.layers import initializers


@functools.partial(jax.jit, static_argnames=("scale",))
def attend(q_tnhq: jax.Array, k_mnhq: jax.Array, v_mnhv: jax.Array, scale: float) -> jax.Array:
    """softmax over the M tokens of scale <q, k>, times v: [T, N, H, V] in the dtype of v.

    q [T, N, H, Q], k [M, N, H, Q], v [M, N, H, V], float32 or bfloat16; scores and softmax are
    float32. Jitted, because XLA:CPU has no eager product of bfloat16 that is summed in float32.
    """
    scores_nhtm = scale * jnp.einsum(
        "tnhq,mnhq->nhtm", q_tnhq, k_mnhq, preferred_element_type=jnp.float32
    )
    weights_nhtm = jax.nn.softmax(scores_nhtm, axis=-1).astype(v_mnhv.dtype)
    return jnp.einsum("nhtm,mnhv->tnhv", weights_nhtm, v_mnhv)


class FeatureAttention(nn.Module):
    """Multi-head attention of tokens q over tokens x; the heads' outputs side by side.

    Head h: softmax over the tokens j of scale <q_i W_Q^h, x_j W_K^h>, times x_j W_V^h, no biases.
    What follows (an output projection, a residual) is the model's.
    residual_layers: L where the values themselves are added to a residual stream of L layers, as
    in AutoInt, which has no output projection.

    Called with q [T, N, D] and x [M, N, D], any float dtype; q = x for all tokens, or the rows
    that are read. Returns [T, N, heads * value_width] in `dtype`.
    Parameters, float32: query and key, kernel [D, heads * key_width], value, kernel
    [D, heads * value_width].
    """

    heads: int
    key_width: int
    value_width: int
    scale: float
    kernel_init: str = "lecun"
    dtype: str = "float32"
    residual_layers: int = 0

    @nn.compact
    def __call__(self, q_tnd: jax.Array, x_mnd: jax.Array) -> jax.Array:
        def project(name: str, x_nd: jax.Array, width: int, residual_layers: int = 0) -> jax.Array:
            init = initializers.kernel(self.kernel_init, residual_layers=residual_layers)
            dense = nn.Dense(
                self.heads * width, use_bias=False, dtype=self.dtype, kernel_init=init, name=name
            )
            return dense(x_nd).reshape(*x_nd.shape[:-1], self.heads, width)

        q_tnhq = project("query", q_tnd, self.key_width)
        k_mnhq = project("key", x_mnd, self.key_width)
        v_mnhv = project("value", x_mnd, self.value_width, self.residual_layers)
        y_tnhv = attend(q_tnhq, k_mnhq, v_mnhv, self.scale)
        return y_tnhv.reshape(*y_tnhv.shape[:2], -1)
