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
        q, k = _facing(q, k)
        shape = jnp.broadcast_shapes(q.position.shape, k.position.shape)
        total_rnm = jnp.zeros(shape, self.dtype)
        if self.position is not None:
            index_rnm = position_index(q, k, self.position.size)
            total_rnm += jnp.take(self.position, index_rnm, mode="clip")
        if self.time is not None:
            total_rnm += jnp.take(self.time, bucket(q, k), mode="clip")
        return total_rnm

    @property
    def dtype(self) -> jnp.dtype:
        tables = [x for x in (self.position, self.time) if x is not None]
        return jnp.result_type(*tables) if tables else jnp.dtype(jnp.float32)


def add_gradients(
    total: RelativeBias, d_rnm: jax.Array, q_tokens: Tokens, k_tokens: Tokens
) -> RelativeBias:
    """`total` and what the gradient of every pair's bias, [R, N, M], adds to the tables."""
    q, k = _facing(q_tokens, k_tokens)
    position, time = total.position, total.time
    if position is not None:
        index_rnm = position_index(q, k, position.size)
        position = position.at[index_rnm].add(d_rnm.astype(position.dtype), mode="clip")
    if time is not None:
        time = time.at[bucket(q, k)].add(d_rnm.astype(time.dtype), mode="clip")
    return RelativeBias(position=position, time=time)


def _facing(q: Tokens, k: Tokens) -> tuple[Tokens, Tokens]:
    """Queries [R, N, 1] and keys [R, 1, M]."""
    return (
        jax.tree.map(lambda x_rn: x_rn[:, :, None], q),
        jax.tree.map(lambda x_rm: x_rm[:, None, :], k),
    )


def position_index(q: Tokens, k: Tokens, rows: int) -> jax.Array:
    """Rows of the position table; the fields of q and k broadcast against each other."""
    return jnp.clip(k.position - q.position + rows // 2, 0, rows - 1)


def bucket(q: Tokens, k: Tokens) -> jax.Array:
    """int32: clip(floor(ln(max(1, |dt|)) / 0.301), 0, 128), dt in whole seconds, pair by pair.

    A natural logarithm over 0.301, as in the research code. Context tokens stand outside of time:
    a pair with one counts as dt = 0. The fields of q and k broadcast against each other. int32
    seconds reach bucket 71 at most.
    """
    context = (q.role == batch.CONTEXT) | (k.role == batch.CONTEXT)
    dt = jnp.maximum(jnp.abs(q.bias_time - k.bias_time), 1)
    dt = jnp.where(context, 1, dt).astype(jnp.float32)
    return jnp.clip(jnp.floor(jnp.log(dt) / 0.301).astype(jnp.int32), 0, TIME_BUCKETS - 1)


def time_bucket(q: Tokens, k: Tokens) -> jax.Array:
    """`bucket` of every pair, [R, N, M]; q [R, N], k [R, M]."""
    return bucket(*_facing(q, k))


def dense_positions(tokens: tuple[Tokens, Tokens]) -> tuple[Tokens, Tokens]:
    """Positions that ascend along the whole row, shifted by one number a segment.

    Rules and biases compare positions within a segment only. Shifted so that an event's position
    is its place in the row, those of one block lie side by side, also where samples share a row.
    """
    keys = tokens[1]
    place_m = jnp.arange(keys.segment.shape[1], dtype=jnp.int32)
    none = jnp.iinfo(jnp.int32).min
    start_rm = jnp.where(keys.role == batch.HISTORY, place_m - keys.position, none)

    # By segment, and within it by start: the last one of a segment is its largest.
    segment_rm, start_rm = jax.lax.sort((keys.segment, start_rm), dimension=1, num_keys=2)
    behind = jax.vmap(functools.partial(jnp.searchsorted, side="right"))

    def shifted(t: Tokens) -> Tokens:
        place_rn = jnp.maximum(behind(segment_rm, t.segment) - 1, 0)
        take = functools.partial(jnp.take_along_axis, indices=place_rn, axis=1)
        there_rn = (take(segment_rm) == t.segment) & (take(start_rm) != none)
        position = t.position + jnp.where(there_rn, take(start_rm), 0)
        return Tokens(**{**vars(t), "position": position})

    return shifted(tokens[0]), shifted(keys)
