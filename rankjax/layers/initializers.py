"""Initialisation of weight matrices, by the name that a Config gives.

"lecun": truncated normal of variance 1 / fan-in. "xavier": uniform of variance
2 / (fan-in + fan-out). "truncated_normal": normal of scale SIGMA cut at 2 SIGMA, whatever the
shape. "small_residual": lecun, and matrices that write to a residual stream divided by sqrt(2 L),
so that the stream's variance does not grow with the number of layers L.
"""

import math

import jax
from flax import linen as nn
from flax.typing import Initializer

from rankjax.layers import checks

NAMES = ("lecun", "xavier", "truncated_normal", "small_residual")
SIGMA = 0.02


def check(where: str, name: str) -> None:
    """Raises ValueError unless `name` is known; `where` names the Config."""
    checks.one_of(where, "init", name, NAMES)


def kernel(name: str, *, residual_layers: int = 0, batch_axis: tuple[int, ...] = ()) -> Initializer:
    """The initialiser of a kernel [..., fan_in, fan_out].

    Args:
      name: one of NAMES.
      residual_layers: L where the matrix writes to a residual stream of L layers, else 0; only
        "small_residual" looks at it.
      batch_axis: axes that count separate matrices, (0,) for per-token kernels [T, D, F]. Without
        it T would enter the fan-in and the standard deviation would be sqrt(T) too small.
    Returns: f(key, shape, dtype) -> array.
    Raises ValueError for an unknown name.
    """
    checks.one_of("initializers.kernel", "name", name, NAMES)
    if name == "xavier":
        return nn.initializers.xavier_uniform(batch_axis=batch_axis)
    if name == "truncated_normal":
        return nn.initializers.truncated_normal(SIGMA)
    lecun = nn.initializers.lecun_normal(batch_axis=batch_axis)
    if name == "lecun" or not residual_layers:
        return lecun
    divisor = math.sqrt(2 * residual_layers)

    def small(key: jax.Array, shape: tuple[int, ...], *dtype: jax.typing.DTypeLike) -> jax.Array:
        return lecun(key, shape, *dtype) / divisor

    return small
