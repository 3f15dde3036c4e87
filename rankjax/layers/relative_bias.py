"""The parameters of a relative bias: how its two tables begin.

Source: HSTU (arXiv 2402.17152), §3.2, and its research code.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.kernels import hstu_attention

POSITION_INITS = ("normal", "recency")


def recency(per_event: int) -> nn.initializers.Initializer:
    """2 exp(-distance / 3) over a table of relative positions, distance in events."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        distance = jnp.abs(jnp.arange(shape[0]) - shape[0] // 2) / per_event
        return (2 * jnp.exp(-distance / 3)).astype(dtype)

    return init


def tables(
    param: Callable[..., jax.Array],
    *,
    positions: int | None,
    time: bool,
    position_init: str = "normal",
    per_event: int = 1,
) -> hstu_attention.RelativeBias | None:
    """The bias of one layer, whose `param` method makes its tables; None where both are off.

    Parameters, float32: position_bias [2P - 1] where `positions` (P) is given, N(0, 0.02) or
    "recency"; time_bias [129] where `time`, N(0, 0.02).
    """
    normal = nn.initializers.normal(0.02)
    by_position = by_time = None
    if positions is not None:
        init = recency(per_event) if position_init == "recency" else normal
        by_position = param("position_bias", init, (2 * positions - 1,), jnp.float32)
    if time:
        by_time = param("time_bias", normal, (hstu_attention.TIME_BUCKETS,), jnp.float32)
    if by_position is None and by_time is None:
        return None
    return hstu_attention.RelativeBias(position=by_position, time=by_time)
