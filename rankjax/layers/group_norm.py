"""Group-LN: LayerNorm whose affine pair belongs to a token's group.

Tokens of different domains (user features, long history, real-time events, candidates) share the
statistics' definition, per token over its channels, but not the scale and bias that follow.
Source: MTGR (arXiv 2505.18654).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.layers import checks, norms


class GroupNorm(nn.Module):
    """y_n = (x_n - mean) / sqrt(var + epsilon) * scale_g(n) + bias_g(n).

    Called with x [..., N, D], any float dtype, and the groups int32 of a shape that broadcasts to
    [..., N] (numbers 0 .. groups - 1; traced, since which group an event belongs to may depend on
    the data); returns x's shape and dtype, computed in float32.
    Parameters, float32: scale [groups, D], bias [groups, D]; groups = 1 is a LayerNorm.
    Raises ValueError unless groups is an integer >= 1.
    """

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x_nd: jax.Array, group_n: jax.Array) -> jax.Array:
        checks.at_least("group_norm.GroupNorm", 1, groups=self.groups)
        shape = (self.groups, x_nd.shape[-1])
        scale_gd = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias_gd = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        plain = norms.Norm("layer", affine=False, epsilon=self.epsilon)
        y_nd = plain(x_nd.astype(jnp.float32))
        y_nd = y_nd * _of_group(scale_gd, group_n) + _of_group(bias_gd, group_n)
        return y_nd.astype(x_nd.dtype)


def _of_group(table_gd: jax.Array, group_n: jax.Array) -> jax.Array:
    """table[group], [..., N, D].

    By selection: its gradient is a sum per group, where that of an indexed read would be a scatter
    of every token.
    """
    x_nd = table_gd[0]
    for group in range(1, len(table_gd)):
        x_nd = jnp.where((group_n == group)[..., None], table_gd[group], x_nd)
    return x_nd
