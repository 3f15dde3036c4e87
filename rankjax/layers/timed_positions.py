"""Learned embeddings of how far before the request a token stands, in events and in time.

Source: Meta's public code of DLRM-v3 (generative-recommenders, HSTUPositionalEncoder).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax import batch
from rankjax.batch import Tokens
from rankjax.layers import sequence


def position_index(tokens: Tokens, context: int) -> jax.Array:
    """int32 [R, N]: c + events from here to the candidates for an event, c for a candidate.

    c = `context`, the context tokens of a sample, which have 0 .. c - 1. So the newest event of
    every sample has c + 1, whatever its length; all candidates stand "now".
    """
    end_rn = sequence.lengths(tokens)  # where the candidates stand; positions count from the oldest
    index_rn = jnp.where(tokens.role == batch.CANDIDATE, context, tokens.position)
    return jnp.where(tokens.role == batch.HISTORY, context + end_rn - tokens.position, index_rn)


def time_bucket(tokens: Tokens, buckets: int) -> jax.Array:
    """int32 [R, N]: floor(sqrt(minutes before the sample's candidates)), 0 .. buckets.

    Context tokens stand before all time: `buckets`, as for an event of long ago.
    """
    same_rnm = tokens.segment[:, :, None] == tokens.segment[:, None, :]
    same_rnm &= (tokens.role == batch.CANDIDATE)[:, None, :]
    least = jnp.iinfo(jnp.int32).min
    request_rn = jnp.max(jnp.where(same_rnm, tokens.bias_time[:, None, :], least), axis=-1)
    # A sample without candidates is read by nobody.
    request_rn = jnp.where(jnp.any(same_rnm, axis=-1), request_rn, tokens.bias_time)
    minutes_rn = jnp.maximum(request_rn - tokens.bias_time, 0).astype(jnp.float32) / 60
    bucket_rn = jnp.clip(jnp.sqrt(minutes_rn).astype(jnp.int32), 0, buckets)
    return jnp.where(tokens.role == batch.CONTEXT, buckets, bucket_rn)


def _uniform(bound: float) -> nn.initializers.Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class TimedPositions(nn.Module):
    """P[position_index] + T[time_bucket] of every token; samples' candidates share one time.

    Called with the Tokens of `sequence.tokens` and its `context`; returns [R, N, D] in `dtype`.
    Indices beyond a table share its last row. Parameters, float32: positions [P, D], uniform
    within 1 / sqrt(P); where buckets is given, times [buckets + 1, D], within 1 / sqrt(buckets).
    """

    positions: int  # P
    buckets: int | None  # None = no times
    width: int  # D
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: Tokens, context: int) -> jax.Array:
        shape = (self.positions, self.width)
        table = self.param("positions", _uniform(self.positions**-0.5), shape, jnp.float32)
        sum_rnd = jnp.take(table, position_index(tokens, context), axis=0, mode="clip")
        if self.buckets is not None:
            shape = (self.buckets + 1, self.width)
            table = self.param("times", _uniform(self.buckets**-0.5), shape, jnp.float32)
            sum_rnd += jnp.take(table, time_bucket(tokens, self.buckets), axis=0, mode="clip")
        return sum_rnd.astype(self.dtype)
