"""What attention in plain XLA shares: arrays cut into blocks, and a loop over tiles with work.

A tile is one block of queries, one block of keys, and as many rows as make a step worth its while.
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
STEP = 2**19  # scores of one step of the loop; short rows share a step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """q, k and v in blocks, their tokens, and the list of tiles with any work.

    q, k, v: [row groups * blocks, g, H, block, width]; tokens [row groups * blocks, g, block].
    order: int32, tiles numbered ((row group * n) + query block) * m + key block, those with work
      first; count: how many have.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    tokens: tuple[Tokens, Tokens]
    order: jax.Array
    count: jax.Array
    sizes: tuple[int, int, int]  # g, queries, keys of a tile
    numbers: tuple[int, int]  # n, m
    lengths: tuple[int, int, int]  # R, N, M
    wide: jnp.dtype  # of sums

    @classmethod
    def of(
        cls, arrays: Arrays, tokens: tuple[Tokens, Tokens], rule: MaskRule, tile: tuple[int, int]
    ) -> "Work":
        """arrays: q [R, N, H, Q], k [R, M, H, Q], v [R, M, H, V]; tokens [R, N] and [R, M]."""
        (R, N, H, _), M = arrays[0].shape, arrays[1].shape[1]
        q_block, k_block = (min(b, length) for b, length in zip(tile, (N, M)))
        g = max(1, min(R, STEP // (H * q_block * k_block)))
        cut = functools.partial(_cut, group=g)
        padded = tuple(
            jax.tree.map(lambda x, b=b: blocks.padded(blocks.padded(x, b), g, axis=0), t)
            for t, b in zip(tokens, (q_block, k_block))
        )
        active_rnm = blocks.active(rule, *padded, q_block, k_block)
        together = blocks.cut(active_rnm, g, axis=0).any(axis=1).reshape(-1)
        return cls(
            **{"q": cut(arrays[0], q_block), "k": cut(arrays[1], k_block)},
            v=cut(arrays[2], k_block),
            tokens=tuple(
                jax.tree.map(lambda x, b=b: cut(x, b), t)
                for t, b in zip(padded, (q_block, k_block))
            ),
            order=jnp.argsort(~together, stable=True).astype(jnp.int32),
            count=jnp.sum(together, dtype=jnp.int32),
            **{"sizes": (g, q_block, k_block), "numbers": active_rnm.shape[1:]},
            **{"lengths": (R, N, M), "wide": jnp.promote_types(arrays[0].dtype, jnp.float32)},
        )

    def loop(self, step: Callable[[jax.Array, jax.Array, Any], Any], sums: Any) -> Any:
        """step(query block, key block, sums) -> sums, over the tiles with work, in their order."""
        n, m = self.numbers

        def one(w: jax.Array, sums: Any) -> Any:
            tile = self.order[w]
            return step(tile // m, tile // (n * m) * m + tile % m, sums)

        return jax.lax.fori_loop(0, self.count, one, sums)

    def pair(self, query: jax.Array, key: jax.Array) -> tuple[Tokens, Tokens]:
        """The tokens of a tile, [g, queries] and [g, keys]."""
        places = zip((query, key), self.tokens)
        return tuple(jax.tree.map(lambda x, i=i: at(x, i), t) for i, t in places)

    def queries(self, x: jax.Array) -> jax.Array:
        """Cuts an array [R, N, H, width] as q is cut."""
        return _cut(x, self.sizes[1], group=self.sizes[0])

    def dot(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=self.wide)

    def whole(self, x: jax.Array, side: str) -> jax.Array:
        """Puts together what was cut as q (side "q") or as k and v ("k"): [R, length, H, width]."""
        _, g, H, block, width = x.shape
        R, length = self.lengths[0], self.lengths[1 if side == "q" else 2]
        x = x.reshape(-(-R // g), -(-length // block), g, H, block, width)
        x = x.transpose(0, 2, 1, 4, 3, 5).reshape(-(-R // g) * g, -1, H, width)
        return x[:R, :length]


def at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index]."""
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def put(x: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """x with x[index] = new."""
    return jax.lax.dynamic_update_index_in_dim(x, new, index, 0)


def _cut(x: jax.Array, block: int, group: int) -> jax.Array:
    """[R, N, ...] -> [row groups * blocks, group, ..., block, width], ... the heads if any."""
    x = blocks.cut(blocks.cut(x, block, axis=1), group, axis=0).swapaxes(1, 2)
    x = x.swapaxes(3, 4) if x.ndim == 6 else x
    return x.reshape(-1, *x.shape[2:])
