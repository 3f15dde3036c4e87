"""A token from the fields of an event or of a candidate: GRAB's "MLP & Gate".

Source: GRAB (arXiv 2602.01865), the architecture figure, which names the box and prints no formula.
"""

import jax
from flax import linen as nn

from rankjax.layers import activations, initializers


class MLPGate(nn.Module):
    """y = (GELU(x W1 + b1) W2 + b2) * sigmoid(x Wg + bg), with the exact (erf) GELU.

    Called with x [..., W], any float dtype; returns [..., width] in `dtype`.
    Parameters, float32: hidden and gate [W, D], out [D, D], with biases: 2 (W D + D) + D^2 + D.
    """

    width: int  # D
    kernel_init: str = "lecun"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_nw: jax.Array) -> jax.Array:
        def linear(name: str) -> nn.Dense:
            init = initializers.kernel(self.kernel_init)
            return nn.Dense(self.width, dtype=self.dtype, kernel_init=init, name=name)

        h_nd = activations.gelu(linear("hidden")(x_nw))
        return linear("out")(h_nd) * nn.sigmoid(linear("gate")(x_nw))
