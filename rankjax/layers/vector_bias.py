"""Query-aware relative bias: a vector per relative position, pair of actions and time difference.

The vectors stand beside the key, q_i . (k_j + Pos[i - j] + Action[a_i, a_j] + Time[b(t_i - t_j)]),
so that what they add depends on the query. No [N, M, Q] array is formed: q times every row of the
tables, then three look-ups of numbers.

Source: GRAB (arXiv 2602.01865), the relative-bias figure.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.batch import Tokens
from rankjax.kernels.softmax_attention import softmax_attention
from rankjax.layers import checks
from rankjax.masks import MaskRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """Sizes of the tables.

    positions: P; distances from P - 1 on share the last row.
    actions: n ids, the last of them for tokens whose action is not known (they are to be scored);
      one row for each pair, n * n in all.
    times: rows for time differences, two to the octave; 0 = none (times that are not exact).
    window: the vectors stand at distances (query position - key position) below it; None = at any.
    Raises ValueError for sizes that are no such numbers.
    """

    positions: int
    actions: int
    times: int
    window: int | None = None

    def __post_init__(self) -> None:
        where = "vector_bias.Tables"
        checks.at_least(where, 1, positions=self.positions)
        checks.at_least(where, 2, actions=self.actions)
        checks.at_least(where, 0, times=self.times, window=self.window or 0)

    @property
    def rows(self) -> tuple[int, int, int]:
        return self.positions, self.actions**2, self.times


def time_bucket(seconds: jax.Array, times: int) -> jax.Array:
    """int32, two buckets to the octave: clip(floor(2 log2(seconds + 1/2)), 0, times - 1).

    seconds: int32, any shape. The half parts 0 seconds from 1 and, in the first weeks, keeps whole
    powers of two clear of the rounding of log2. Differences of int32 seconds fill at most 64.
    """
    octaves = jnp.log2(jnp.maximum(seconds, 0).astype(jnp.float32) + 0.5)
    return jnp.clip(jnp.floor(2 * octaves), 0, times - 1).astype(jnp.int32)


def indices(
    tables: Tables, q: Tokens, k: Tokens, q_action: jax.Array, k_action: jax.Array
) -> tuple[jax.Array, ...]:
    """Rows of the tables laid one below the other, int32 [R, N, M] each; B, past the end, = none.

    Args:
      q, k: what is known of the tokens, [R, N] and [R, M]; positions and seconds are read.
      q_action, k_action: int32 [R, N] and [R, M], ids 0 .. actions - 1; others are clipped.
    Returns: for positions, pairs of actions, and (unless `times` is 0) time differences.
    """
    positions, pairs, times = tables.rows
    n = tables.actions
    distance_rnm = q.position[:, :, None] - k.position[:, None, :]
    q_action, k_action = jnp.clip(q_action, 0, n - 1), jnp.clip(k_action, 0, n - 1)
    found = [
        jnp.clip(distance_rnm, 0, positions - 1),
        positions + q_action[:, :, None] * n + k_action[:, None, :],
    ]
    if times:
        seconds_rnm = q.bias_time[:, :, None] - k.bias_time[:, None, :]
        found.append(positions + pairs + time_bucket(seconds_rnm, times))
    if tables.window is not None:
        inside_rnm = distance_rnm < tables.window
        found = [jnp.where(inside_rnm, x, sum(tables.rows)) for x in found]
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Sight:
    """What one attention sees: who asks, who is read, by what rule, and the rows of `indices`."""

    q: Tokens
    k: Tokens
    rule: MaskRule
    rows: tuple[jax.Array, ...]

    @classmethod
    def of(
        cls,
        mask: tuple[Tokens, Tokens, MaskRule],
        tables: Tables,
        q_action: jax.Array,
        k_action: jax.Array,
    ) -> "Sight":
        """mask: (query tokens, key tokens, rule); actions as in `indices`."""
        return cls(*mask, indices(tables, *mask[:2], q_action, k_action))


class VectorBias(nn.Module):
    """q times every row of the tables: q [R, N, H, Q], any float dtype -> [R, N, B, H], float32.

    B = P + n * n + times. The heads share the tables; `lookup` picks the numbers of each pair.
    Parameters, float32: position [P, Q], action [n * n, Q], and time [times, Q] unless times = 0.
    """

    tables: Tables

    @nn.compact
    def __call__(self, q_rnhq: jax.Array) -> jax.Array:
        names = [x for x in zip(("position", "action", "time"), self.tables.rows) if x[1]]
        init = nn.initializers.normal(0.02)
        rows = [self.param(n, init, (size, q_rnhq.shape[-1]), jnp.float32) for n, size in names]
        table_bq = jnp.concatenate(rows).astype(q_rnhq.dtype)
        wide = jnp.promote_types(q_rnhq.dtype, jnp.float32)
        return jnp.einsum("rnhq,bq->rnbh", q_rnhq, table_bq, preferred_element_type=wide)


def lookup(t_rnbh: jax.Array, rows: tuple[jax.Array, ...]) -> jax.Array:
    """What the vectors add to q.k: the sum over `rows` ([R, N, M] each) of t, [R, H, N, M]."""
    # The heads lie together, so that a look-up moves H numbers at once; one past the end is 0.
    found = (
        jnp.take_along_axis(t_rnbh, x[..., None], axis=2, mode="fill", fill_value=0) for x in rows
    )
    return jnp.moveaxis(functools.reduce(jnp.add, found), -1, 1)


def attention(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhq: jax.Array,
    t_rnbh: jax.Array,
    sight: Sight,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(q . (k + vectors) / sqrt(Q)) v over the keys that the sight's rule allows.

    Args:
      q_rnhq, k_rmhq, v_rmhq: [R, N, H, Q] and [R, M, H, Q], one float dtype.
      t_rnbh: the VectorBias of q, [R, N, B, H].
      implementation: of the kernel; None = the best for the platform compiled for.
    Returns: [R, N, H, Q], dtype of v. A row that may read nothing is 0.
    """
    return softmax_attention(
        *(q_rnhq, k_rmhq, v_rmhq, sight.q, sight.k, sight.rule),
        scale=q_rnhq.shape[-1] ** -0.5,
        scores=lookup(t_rnbh, sight.rows),
        implementation=implementation,
    )
