"""Feed-forward networks that all tokens, or a whole concatenated input, share."""

import jax
from flax import linen as nn

from rankjax.layers import initializers, norms


class MLP(nn.Module):
    """ReLU layers of the given widths: [..., W], any float dtype -> [..., widths[-1]] in `dtype`.

    norm "layer" or "rms" adds a Norm to each layer: norm_place "pre" relu(norm(x) W + b), "post"
    norm(relu(x W + b)). widths=() returns x in `dtype`.
    Parameters, float32, per layer: kernel [W, F], bias [F], and its Norm's.
    """

    widths: tuple[int, ...]
    norm: str = "none"
    norm_place: str = "post"
    kernel_init: str = "lecun"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_nd: jax.Array) -> jax.Array:
        init = initializers.kernel(self.kernel_init)
        x_nd = x_nd.astype(self.dtype)
        for layer, width in enumerate(self.widths):
            norm = norms.Norm(self.norm, name=f"norm_{layer}")
            dense = nn.Dense(width, dtype=self.dtype, kernel_init=init, name=f"dense_{layer}")
            if self.norm_place == "pre":
                x_nd = nn.relu(dense(norm(x_nd)))
            else:
                x_nd = norm(nn.relu(dense(x_nd)))
        return x_nd
