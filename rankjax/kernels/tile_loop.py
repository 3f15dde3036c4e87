"""What attention in plain XLA shares: a loop over the tiles with any work.

A tile is one block of queries, one block of keys, and as many rows as make a step worth its while.
Tiles are read from the arrays where they lie, and added to sums where those lie: beside the inputs
and the results there is nothing but one tile's scores.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.kernels import blocks
from rankjax.masks import MaskRule

Arrays = tuple[jax.Array, jax.Array, jax.Array]
STEP = 2**19  # scores of one step of the loop; short rows share a step


class Place(NamedTuple):
    """Of a tile: its first row, its first query, its first key."""

    row: jax.Array
    query: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """q, k and v, padded to whole tiles, their tokens, and the list of tiles with any work.

    q [R', N', H, Q], k [R', M', H, Q], v [R', M', H, V]; tokens [R', N'] and [R', M'].
    order: int32, tiles numbered ((row group * n) + query block) * m + key block, those with work
      first; count: how many have.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    tokens: tuple[Tokens, Tokens]
    order: jax.Array
    count: jax.Array
    sizes: tuple[int, int, int]  # rows, queries, keys of a tile
    numbers: tuple[int, int]  # n, m
    wide: jnp.dtype  # of sums

    @classmethod
    def of(
        cls, arrays: Arrays, tokens: tuple[Tokens, Tokens], rule: MaskRule, tile: tuple[int, int]
    ) -> "Work":
        """arrays: q [R, N, H, Q], k [R, M, H, Q], v [R, M, H, V]; tokens [R, N] and [R, M]."""
        (R, N, H, _), M = arrays[0].shape, arrays[1].shape[1]
        q_block, k_block = (min(b, length) for b, length in zip(tile, (N, M)))
        g = max(1, min(R, STEP // (H * q_block * k_block)))
        pad = functools.partial(_pad, rows=g)
        padded = tuple(
            jax.tree.map(lambda x, b=b: pad(x, b), t) for t, b in zip(tokens, (q_block, k_block))
        )
        active_rnm = blocks.active(rule, *padded, q_block, k_block)
        together = blocks.cut(active_rnm, g, axis=0).any(axis=1).reshape(-1)
        return cls(
            **{"q": pad(arrays[0], q_block), "k": pad(arrays[1], k_block)},
            **{"v": pad(arrays[2], k_block), "tokens": padded},
            order=jnp.argsort(~together, stable=True).astype(jnp.int32),
            count=jnp.sum(together, dtype=jnp.int32),
            **{"sizes": (g, q_block, k_block), "numbers": active_rnm.shape[1:]},
            wide=jnp.promote_types(arrays[0].dtype, jnp.float32),
        )

    def loop(self, step: Callable[[Place, Any], Any], sums: Any) -> Any:
        """step(place, sums) -> sums, over the tiles with work, in their order."""
        (g, q_block, k_block), (n, m) = self.sizes, self.numbers

        def one(w: jax.Array, sums: Any) -> Any:
            tile = self.order[w]
            block, key = jnp.divmod(tile, m)
            group, query = jnp.divmod(block, n)
            return step(Place(group * g, query * q_block, key * k_block), sums)

        return jax.lax.fori_loop(0, self.count, one, sums)

    def pair(self, place: Place) -> tuple[Tokens, Tokens]:
        """The tokens of a tile, [g, queries] and [g, keys]."""
        of = (self.queries, self.keys)
        return tuple(
            jax.tree.map(lambda x, at=at: at(x, place), t) for at, t in zip(of, self.tokens)
        )

    def queries(self, x: jax.Array, place: Place) -> jax.Array:
        """[g, queries, ...] of an array that runs along the queries."""
        return self._at(x, place.row, place.query, self.sizes[1])

    def keys(self, x: jax.Array, place: Place) -> jax.Array:
        return self._at(x, place.row, place.key, self.sizes[2])

    def _at(self, x: jax.Array, row: jax.Array, start: jax.Array, block: int) -> jax.Array:
        size = (self.sizes[0], block, *x.shape[2:])
        return jax.lax.dynamic_slice(x, _starts(x, row, start), size)

    def put_queries(self, x: jax.Array, place: Place, new: jax.Array) -> jax.Array:
        """x with [g, queries, ...] replaced."""
        return jax.lax.dynamic_update_slice(x, new, _starts(x, place.row, place.query))

    def add_queries(self, x: jax.Array, place: Place, more: jax.Array) -> jax.Array:
        return self.put_queries(x, place, self.queries(x, place) + more)

    def add_keys(self, x: jax.Array, place: Place, more: jax.Array) -> jax.Array:
        more = self.keys(x, place) + more
        return jax.lax.dynamic_update_slice(x, more, _starts(x, place.row, place.key))

    def like_q(self, x: jax.Array) -> jax.Array:
        """[R, N, ...], padded as q is."""
        return _pad(x, self.sizes[1], rows=self.sizes[0])

    def dot(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=self.wide)


def _starts(x: jax.Array, row: jax.Array, start: jax.Array) -> tuple[jax.Array, ...]:
    return *(jnp.asarray(i, jnp.int32) for i in (row, start)), *[jnp.int32(0)] * (x.ndim - 2)


def _pad(x: jax.Array, block: int, rows: int) -> jax.Array:
    return blocks.padded(blocks.padded(x, block), rows, axis=0)
