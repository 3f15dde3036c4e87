"""From a candidate's representation to K logits, in float32 whatever the compute dtype."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.layers import initializers, per_token


class Linear(nn.Module):
    """One linear layer for all K tasks: [..., D], any float dtype -> logits [..., K], float32.

    Parameters, float32: kernel [D, K], bias [K].
    """

    tasks: int
    kernel_init: str = "lecun"

    @nn.compact
    def __call__(self, x_nd: jax.Array) -> jax.Array:
        init = initializers.kernel(self.kernel_init)
        return nn.Dense(self.tasks, kernel_init=init, name="logits")(x_nd.astype(jnp.float32))


class MLP(nn.Module):
    """One hidden layer of its own per task: [..., D], any float dtype -> logits [..., K], float32.

    Parameters, float32, per task: hidden D * F + F, logits F + 1.
    """

    tasks: int
    hidden: int  # F
    kernel_init: str = "lecun"

    @nn.compact
    def __call__(self, x_nd: jax.Array) -> jax.Array:
        x_nd = x_nd.astype(jnp.float32)
        init = initializers.kernel(self.kernel_init)
        logits = []
        for task in range(self.tasks):
            h_nf = nn.relu(nn.Dense(self.hidden, kernel_init=init, name=f"hidden_{task}")(x_nd))
            logits.append(nn.Dense(1, kernel_init=init, name=f"logits_{task}")(h_nf))
        return jnp.concatenate(logits, axis=-1)


class OwnVector(nn.Module):
    """Task k reads its own vector through layers of its own: [K, N, D], any float dtype -> [N, K].

    ReLU layers of the widths `hidden`, then one output; logits float32.
    Parameters, float32: hidden_i kernel [K, D, F] and bias [K, F], logits kernel [K, F, 1] and
    bias [K, 1].
    """

    hidden: tuple[int, ...] = ()
    kernel_init: str = "lecun"

    @nn.compact
    def __call__(self, x_knd: jax.Array) -> jax.Array:
        for layer, width in enumerate(self.hidden):
            dense = per_token.Dense(width, kernel_init=self.kernel_init, name=f"hidden_{layer}")
            x_knd = nn.relu(dense(x_knd))
        out = per_token.Dense(1, kernel_init=self.kernel_init, name="logits")
        return out(x_knd)[..., 0].swapaxes(0, 1)
