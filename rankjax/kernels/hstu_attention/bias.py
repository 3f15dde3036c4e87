"""The relative bias rab^{p,t}: one table of relative positions and one of time differences.

Source: HSTU, arXiv 2402.17152, §3.2, and its research code for the buckets.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rankjax import batch
from rankjax.batch import Tokens

TIME_BUCKETS = 129


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["position", "time"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeBias:
    """The two learned tables; heads share them, layers do not. None = that part is off.

    position: float [2P - 1]; row P - 1 + (position of key - position of query), clipped to the
      table. time: float [129], indexed by `time_bucket`.
    """

    position: jax.Array | None
    time: jax.Array | None

    def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
        """The bias of every pair, [R, N, M], in the tables' dtype; q [R, N], k [R, M]."""
        shape = (*q.position.shape, k.position.shape[1])
        total_rnm = jnp.zeros(shape, self.dtype)
        if self.position is not None:
            index_rnm = k.position[:, None, :] - q.position[:, :, None] + self.position.size // 2
            total_rnm += jnp.take(self.position, index_rnm, mode="clip")
        if self.time is not None:
            total_rnm += jnp.take(self.time, time_bucket(q, k), mode="clip")
        return total_rnm

    @property
    def dtype(self) -> jnp.dtype:
        tables = [x for x in (self.position, self.time) if x is not None]
        return jnp.result_type(*tables) if tables else jnp.dtype(jnp.float32)


def time_bucket(q: Tokens, k: Tokens) -> jax.Array:
    """int32 [R, N, M]: clip(floor(ln(max(1, |dt|)) / 0.301), 0, 128), dt in whole seconds.

    A natural logarithm over 0.301, as in the research code. Context tokens stand outside of time:
    a pair with one counts as dt = 0.
    """
    dt_rnm = jnp.abs(q.bias_time[:, :, None] - k.bias_time[:, None, :])
    context_rnm = (q.role == batch.CONTEXT)[:, :, None] | (k.role == batch.CONTEXT)[:, None, :]
    dt_rnm = jnp.where(context_rnm, 1, jnp.maximum(dt_rnm, 1)).astype(jnp.float32)
    bucket_rnm = jnp.floor(jnp.log(dt_rnm) / 0.301).astype(jnp.int32)
    return jnp.clip(bucket_rnm, 0, TIME_BUCKETS - 1)
