"""What attention in plain XLA shares: arrays cut into blocks, and a loop over tiles with work.

A tile is one block of queries, one block of keys, and as many rows as make a step worth its while.
Such groups of rows go one after the other (`over_rows`), so that blocks are cut of one at a time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.kernels import blocks
from rankjax.masks import MaskRule

Arrays = tuple[jax.Array, jax.Array, jax.Array]
STEP = 2**16  # scores of one step of the loop; short rows share a step


def rows_of_a_step(shape: tuple[int, ...], keys: int, tile: tuple[int, int]) -> int:
    """For queries of shape [R, N, H, Q] and so many keys."""
    R, N, H, _ = shape
    return max(1, min(R, STEP // (H * min(tile[0], N) * min(tile[1], keys))))


def over_rows(step: Callable[[Any, Any], tuple[Any, Any]], sums: Any, xs: Any, g: int) -> Any:
    """step(sums, g rows of xs) -> (sums, g rows of ys), group by group: (sums, ys [R, ...]).

    Rows that fill up the last group are zeros: padding, for Tokens.
    """
    R = jax.tree.leaves(xs)[0].shape[0]
    if g == R:
        return step(sums, xs)
    # Rows are sliced out of the arrays as they are: scan's [groups, g, ...] would be laid out anew.
    xs = jax.tree.map(lambda x: blocks.padded(x, g, axis=0), xs)
    groups = -(-R // g)
    one = jax.eval_shape(step, sums, jax.tree.map(lambda x: x[:g], xs))[1]
    ys = jax.tree.map(lambda y: jnp.zeros((groups * g, *y.shape[1:]), y.dtype), one)

    def group(i: jax.Array, carry: Any) -> Any:
        sums, ys = carry
        rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * g, g), xs)
        sums, new = step(sums, rows)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * g, axis=0)
        return sums, jax.tree.map(put, ys, new)

    sums, ys = jax.lax.fori_loop(0, groups, group, (sums, ys))
    return sums, jax.tree.map(lambda y: y[:R], ys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """q, k and v of g rows in blocks, their tokens, and the list of tiles with any work.

    q, k, v: [g, blocks, H, block, width]; tokens [g, blocks, block]. order: int32, tiles numbered
      query block * m + key block, those with work first; count: how many have.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    tokens: tuple[Tokens, Tokens]
    order: jax.Array
    count: jax.Array
    keys: int  # m
    blocks: tuple[int, int]  # queries, keys of a tile
    lengths: tuple[int, int]  # N, M
    wide: jnp.dtype  # of sums

    @classmethod
    def of(
        cls, arrays: Arrays, tokens: tuple[Tokens, Tokens], rule: MaskRule, tile: tuple[int, int]
    ) -> "Work":
        """arrays: q [g, N, H, Q], k [g, M, H, Q], v [g, M, H, V]; tokens [g, N] and [g, M]."""
        N, M = arrays[0].shape[1], arrays[1].shape[1]
        q_block, k_block = (min(b, length) for b, length in zip(tile, (N, M)))
        padded = tuple(
            jax.tree.map(lambda x, b=b: blocks.padded(x, b), t)
            for t, b in zip(tokens, (q_block, k_block))
        )
        active_nm = blocks.active(rule, *padded, q_block, k_block).any(axis=0)
        return cls(
            **{"q": _cut(arrays[0], q_block), "k": _cut(arrays[1], k_block)},
            v=_cut(arrays[2], k_block),
            tokens=tuple(
                jax.tree.map(lambda x, b=b: _cut(x, b), t)
                for t, b in zip(padded, (q_block, k_block))
            ),
            order=jnp.argsort(~active_nm.reshape(-1), stable=True).astype(jnp.int32),
            count=jnp.sum(active_nm, dtype=jnp.int32),
            **{"keys": active_nm.shape[1], "blocks": (q_block, k_block), "lengths": (N, M)},
            wide=jnp.promote_types(arrays[0].dtype, jnp.float32),
        )

    def loop(self, step: Callable[[jax.Array, jax.Array, Any], Any], sums: Any) -> Any:
        """step(query block, key block, sums) -> sums, over the tiles with work, in their order."""

        def one(w: jax.Array, sums: Any) -> Any:
            query, key = jnp.divmod(self.order[w], self.keys)
            return step(query, key, sums)

        return jax.lax.fori_loop(0, self.count, one, sums)

    def pair(self, query: jax.Array, key: jax.Array) -> tuple[Tokens, Tokens]:
        """The tokens of a tile, [g, queries] and [g, keys]."""
        places = zip((query, key), self.tokens)
        return tuple(jax.tree.map(lambda x, i=i: at(x, i), t) for i, t in places)

    def queries(self, x: jax.Array) -> jax.Array:
        """Cuts an array [g, N, H, width] as q is cut."""
        return _cut(x, self.blocks[0])

    def dot(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=self.wide)

    def whole(self, x: jax.Array, side: str) -> jax.Array:
        """Puts together what was cut as q (side "q") or as k and v ("k"): [g, length, H, width]."""
        g, n, H, block, width = x.shape
        x = x.swapaxes(2, 3).reshape(g, n * block, H, width)
        return x[:, : self.lengths[0 if side == "q" else 1]]


def at(x: jax.Array, index: jax.Array) -> jax.Array:
    """Block `index` of what is cut: x[:, index]."""
    return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)


def put(x: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """x with x[:, index] = new."""
    return jax.lax.dynamic_update_index_in_dim(x, new, index, axis=1)


def _cut(x: jax.Array, block: int) -> jax.Array:
    """[g, N, ...] -> [g, blocks, ..., block, width], ... the heads if any."""
    x = blocks.cut(x, block, axis=1)
    return x.swapaxes(2, 3) if x.ndim == 5 else x
