"""The activation of DLRM-v3's small networks, and the network that it builds of them."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.layers import initializers, norms


class SwishLayerNorm(nn.Module):
    """y = x * sigmoid(LN(x)): a swish whose gate sees x normalised.

    Called with x [..., D], any float dtype; returns [..., D] of the same dtype, computed in
    float32. Parameters, float32: norm/scale [D] and norm/bias [D].
    Source: Meta's public code of DLRM-v3 (generative-recommenders), epsilon 1e-5 as there.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x_nd: jax.Array) -> jax.Array:
        wide_nd = x_nd.astype(jnp.float32)
        gate_nd = nn.sigmoid(norms.Norm("layer", epsilon=self.epsilon, name="norm")(wide_nd))
        return (wide_nd * gate_nd).astype(x_nd.dtype)


class SwishNetwork(nn.Module):
    """Linear(W -> F), SwishLayerNorm, Linear(F -> D), LayerNorm: what embeds a token's features.

    Called with x [..., W], any float dtype; returns [..., D] in `dtype`.
    Parameters, float32, F (W + D + 3) + 3 D in all: in/kernel [W, F], in/bias [F], swish (2 F),
    out/kernel [F, D], out/bias [D], norm (2 D).
    Source: as SwishLayerNorm; DLRM-v3's content, action, additional and item networks.
    """

    hidden: int  # F
    width: int  # D
    kernel_init: str = "xavier"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_nw: jax.Array) -> jax.Array:
        def dense(width: int, name: str) -> nn.Dense:
            init = initializers.kernel(self.kernel_init)
            return nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)

        h_nf = SwishLayerNorm(name="swish")(dense(self.hidden, "in")(x_nw))
        return norms.Norm("layer", epsilon=1e-5, name="norm")(dense(self.width, "out")(h_nf))


def parameters(inputs: int, hidden: int, width: int) -> int:
    """The number of parameters of one SwishNetwork with W = `inputs`."""
    return hidden * (inputs + width + 3) + 3 * width
