"""Rows of tables that are split over many devices: fetched from their owners, and sent back.

Everything here runs on one device, inside of a `shard_map` over `axes`: shard s of n owns rows
s * share to (s + 1) * share - 1. A device asks for distinct rows in ascending order, so that what
it asks of one owner stands side by side. What one pair of devices exchanges in a round is
`capacity` rows; where that is too little for some pair, another round follows, until nobody has any
left: nothing is lost, whatever the skew. The number of rounds is counted and reported.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rankjax import distinct

FACTOR = 2.0  # of what each pair would exchange if every owner had its equal share


@dataclasses.dataclass(frozen=True)
class Split:
    """axes: of the mesh, over which the rows are split; shards: devices on them."""

    axes: tuple[str, ...]
    shards: int

    def share(self, rows: int) -> int:
        """Rows of one shard. Raises ValueError for rows that cannot be split evenly."""
        if rows % self.shards:
            raise ValueError(
                f"exchange: a table of {rows} rows on {self.shards} devices, expected a multiple"
            )
        return rows // self.shards

    def capacity(self, ids: int, factor: float = FACTOR) -> int:
        """Rows that a pair of devices exchanges in a round, for `ids` asked for by each."""
        return max(1, min(ids, math.ceil(factor * ids / self.shards)))


def bytes_of_round(
    split: Split, ids: int, row_bytes: int, factor: float = FACTOR
) -> dict[str, int]:
    """What a device sends in one round of each kind: {"ids", "rows", "gradients"}.

    It grows with the ids of a device, not with the number of devices: shards * capacity rows, of
    which a part of 1 / shards stays where it is.
    """
    sent = (split.shards - 1) * split.capacity(ids, factor)
    return {"ids": 4 * sent, "rows": row_bytes * sent, "gradients": (4 + row_bytes) * sent}


def take(table: Any, asked: jax.Array) -> Any:
    """Rows of every array; zeros for those that are not there."""
    return jax.tree.map(lambda x: x.at[asked].get(mode="fill", fill_value=0), table)


def fetch(
    table: Any,
    unique_u: jax.Array,
    split: Split,
    factor: float = FACTOR,
    *,
    share: int | None = None,
    take: Callable[[Any, jax.Array], Any] = take,
) -> tuple[Any, jax.Array]:
    """The rows asked for, and how many rounds it took (int32, the same on all devices).

    Args:
      table: pytree of [share, ...], this device's rows.
      unique_u: int32 [U], ascending rows of the whole table; out of range = asks for nothing.
      share: rows of this device; None = the length of the arrays.
      take: (table, rows int32 [...] of this shard, out of range = none) -> pytree of [..., width].
    Returns: pytree of [U, ...]; zeros where nothing is asked for.
    """
    share = jax.tree.leaves(table)[0].shape[0] if share is None else share
    capacity = split.capacity(unique_u.size, factor)
    start_s, end_s = _slices(unique_u, share, split)
    rounds = _most(-(-(end_s - start_s) // capacity), split)
    first_s = jnp.arange(split.shards, dtype=jnp.int32) * share

    def one(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        done, found = state
        place_sc = start_s[:, None] + done * capacity + jnp.arange(capacity)
        there_sc = place_sc < end_s[:, None]
        wanted_sc = unique_u.at[place_sc].get(mode="clip") - first_s[:, None]
        asked_sc = _to_owners(jnp.where(there_sc, wanted_sc, share), split)
        place_sc = jnp.where(there_sc, place_sc, unique_u.size)

        def exchanged(x: jax.Array, out: jax.Array) -> jax.Array:
            return out.at[place_sc].set(_to_owners(x, split), mode="drop")

        return done + 1, jax.tree.map(exchanged, take(table, asked_sc), found)

    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(take, table, unique_u)
    )
    state = jnp.int32(0), zeros
    return jax.lax.while_loop(lambda state: state[0] < rounds, one, state)[1], rounds


def send(
    table: Any,
    unique_u: jax.Array,
    gradients: Any,
    update: Callable[[Any, jax.Array, Any], Any],
    split: Split,
    factor: float = FACTOR,
    *,
    share: int | None = None,
) -> tuple[Any, jax.Array]:
    """Gradients go to the owners, which add up what devices send for the same row, and update.

    A row is updated once, with all of its gradient: in a round all devices send an owner's rows
    below one row that is found together, so that none of them can be met again later.

    Args:
      table: pytree of [share, ...], whatever the update reads and writes (rows, accumulators).
      unique_u: as in `fetch`. gradients: pytree of [U, ...].
      update: (table, rows int32 [n] of this shard, distinct; out of range = none, gradients
        [n, ...]) -> table.
      share: as in `fetch`.
    Returns: the table, and the number of rounds.
    """
    share = jax.tree.leaves(table)[0].shape[0] if share is None else share
    capacity = split.capacity(unique_u.size, factor)
    start_s, end_s = _slices(unique_u, share, split)
    first_s = jnp.arange(split.shards, dtype=jnp.int32) * share
    beyond = jnp.iinfo(jnp.int32).max

    def left(state: tuple[Any, jax.Array, jax.Array]) -> jax.Array:
        return state[2]

    def one(state: tuple[Any, ...]) -> tuple[Any, ...]:
        table, begin_s, _, rounds = state
        # The first row that does not fit, of any device: all of an owner's below it go now.
        next_s = begin_s + capacity
        limit_s = jnp.where(next_s < end_s, unique_u.at[next_s].get(mode="clip"), beyond)
        limit_s = jax.lax.pmin(limit_s, split.axes)
        stop_s = jnp.searchsorted(unique_u, limit_s).astype(jnp.int32)
        stop_s = jnp.clip(stop_s, begin_s, end_s)
        place_sc = begin_s[:, None] + jnp.arange(capacity)
        there_sc = place_sc < stop_s[:, None]
        rows_sc = unique_u.at[place_sc].get(mode="clip") - first_s[:, None]
        rows_sc = _to_owners(jnp.where(there_sc, rows_sc, share), split)
        # One more than there are: rows of nobody. `distinct` keeps a place for row 0.
        own_n, place_n = distinct.find(rows_sc.reshape(-1) + 1, share + 2, "sort")

        def summed(g: jax.Array) -> jax.Array:
            sent = _to_owners(g.at[place_sc].get(mode="clip"), split)
            sent = sent.reshape(-1, *g.shape[1:])
            return jnp.zeros((own_n.size, *g.shape[1:]), g.dtype).at[place_n].add(sent)

        rows_n = jnp.where((own_n > 0) & (own_n <= share), own_n - 1, share)
        table = update(table, rows_n, jax.tree.map(summed, gradients))
        more = _most((stop_s < end_s).astype(jnp.int32), split) > 0
        return table, stop_s, more, rounds + 1

    state = table, start_s, jnp.bool_(True), jnp.int32(0)
    table, _, _, rounds = jax.lax.while_loop(left, one, state)
    return table, rounds


def fetch_simply(table: Any, unique_u: jax.Array, split: Split) -> Any:
    """`fetch` by one sum over all devices: each adds the rows that it owns. To compare with."""
    share = jax.tree.leaves(table)[0].shape[0]
    asked_su = jax.lax.all_gather(unique_u, split.axes)
    local_su = asked_su - jax.lax.axis_index(split.axes) * share
    local_su = jnp.where((local_su >= 0) & (local_su < share), local_su, share)

    def of(x: jax.Array) -> jax.Array:
        own = x.at[local_su].get(mode="fill", fill_value=0)
        return jax.lax.psum_scatter(own, split.axes, scatter_dimension=0)

    return jax.tree.map(of, table)


def send_simply(
    table: Any,
    unique_u: jax.Array,
    gradients: Any,
    update: Callable[[Any, jax.Array, Any], Any],
    split: Split,
) -> Any:
    """`send` by giving everything to everyone. To compare with."""
    share = jax.tree.leaves(table)[0].shape[0]
    gather = lambda x: jax.lax.all_gather(x, split.axes, tiled=True)
    local_n = gather(unique_u) - jax.lax.axis_index(split.axes) * share
    local_n = jnp.where((local_n >= 0) & (local_n < share), local_n, share)
    own_n, place_n = distinct.find(local_n + 1, share + 2, "sort")
    summed = jax.tree.map(
        lambda g: jnp.zeros((own_n.size, *g.shape[1:]), g.dtype).at[place_n].add(gather(g)),
        gradients,
    )
    rows_n = jnp.where((own_n > 0) & (own_n <= share), own_n - 1, share)
    return update(table, rows_n, summed)


def _slices(unique_u: jax.Array, share: int, split: Split) -> tuple[jax.Array, jax.Array]:
    """(start, end) int32 [shards]: where the rows of each owner stand among those asked for."""
    edges = jnp.arange(split.shards + 1, dtype=jnp.int32) * share
    places = jnp.searchsorted(unique_u, edges).astype(jnp.int32)
    return places[:-1], places[1:]


def _to_owners(x_sc: jax.Array, split: Split) -> jax.Array:
    """[shards, ...], row s for device s -> [shards, ...], row s from device s."""
    return jax.lax.all_to_all(x_sc, split.axes, split_axis=0, concat_axis=0, tiled=True)


def _most(x: jax.Array, split: Split) -> jax.Array:
    return jax.lax.pmax(jnp.max(x), split.axes)
