"""The distinct ids of a batch, found on the device with a static capacity; exact.

Two ways with equal results: "hash" (scatters into slots, O(n)) and "sort" (O(n log n)).
"""

import jax
import jax.numpy as jnp


def find(ids: jax.Array, rows: int, method: str | None) -> tuple[jax.Array, jax.Array]:
    """ids int32 [n] in 0 .. rows - 1 -> distinct ids [U], position of each id among them [n]."""
    found = {"hash": lambda x: _by_hash(x, rows), "sort": lambda x: _by_sort(x, rows)}
    if method is not None:
        return found[method](ids)
    # A TPU sorts fast and scatters single words slowly; a CPU or GPU the reverse.
    return jax.lax.platform_dependent(ids, tpu=found["sort"], default=found["hash"])


def _compact(leader: jax.Array, ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Numbers the leaders 1, 2, ...: distinct ids [U] (position 0 = row 0) and the numbers [n]."""
    capacity = min(rows - 1, ids.size) + 1
    rank = jnp.cumsum(leader, dtype=jnp.int32)
    unique = jnp.full(capacity, rows, jnp.int32).at[0].set(0)
    unique = unique.at[jnp.where(leader, rank, capacity)].set(ids, mode="drop")
    return unique, rank


def _by_hash(ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Exact, O(n): every id writes its index at a hashed slot, the largest index wins and speaks
    for all entries with its id; losers with another id try again with another hash. Each round
    settles at least one distinct id; with 4 slots an id nearly all, so 1 to 5 rounds are usual.
    """
    n = ids.size
    bits = max((4 * n - 1).bit_length(), 1)
    index = jnp.arange(n, dtype=jnp.int32)

    def round_(state):
        trial, leader_of, slots = state
        # The finaliser of MurmurHash3, salted by the trial.
        h = ids.astype(jnp.uint32) + (trial.astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B9)
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        slot = ((h ^ (h >> 16)) >> (32 - bits)).astype(jnp.int32)
        open_ = leader_of < 0
        # Later trials write larger numbers, so that slots need no clearing in between; scatter-max
        # (not set) makes the winner the same on every platform.
        base = trial * n
        slots = slots.at[jnp.where(open_, slot, 2**bits)].max(base + index, mode="drop")
        winner = jnp.maximum(slots[slot] - base, 0)
        return trial + 1, jnp.where(open_ & (ids[winner] == ids), winner, leader_of), slots

    start = (
        jnp.int32(0),
        jnp.where(ids == 0, 0, -1),  # id 0 has its place already
        jnp.full(2**bits, -1, jnp.int32),
    )
    _, leader_of, _ = jax.lax.while_loop(lambda s: jnp.any(s[1] < 0), round_, start)
    leader = (leader_of == index) & (ids != 0)
    unique, rank = _compact(leader, ids, rows)
    return unique, jnp.where(ids == 0, 0, rank[leader_of])


def _by_sort(ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Exact, O(n log n): sorts the ids and looks each up again by bisection (on XLA:CPU 3 times
    faster than jnp.unique, whose sort carries the indices along)."""
    ordered = jnp.sort(ids)
    new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    unique, _ = _compact(new & (ordered != 0), ordered, rows)
    return unique, jnp.searchsorted(unique, ids).astype(jnp.int32)
