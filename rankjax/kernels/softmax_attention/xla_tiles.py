"""Softmax attention in plain XLA, tile by tile: only the tiles in which anybody may read anybody.

A loop over those tiles keeps, for every query, the largest score so far, the sum of exponentials
and the sum of values (online softmax). The backward pass holds the output and the logarithm of the
sums, and computes the tiles again. No array of N x M elements exists; sums have a fixed order.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.kernels import blocks
from rankjax.masks import MaskRule

Arrays = tuple[jax.Array, jax.Array, jax.Array]
TILE = (128, 128)  # queries, keys
STEP = 2**19  # scores of one step of the loop; short rows share a step


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def softmax_attention(
    arrays: Arrays, tokens: tuple[Tokens, Tokens], rule: MaskRule, scale: float, tile: tuple
) -> jax.Array:
    """As `api.softmax_attention`, without scores. tile: (queries, keys) of one tile."""
    return _forward(arrays, tokens, rule, scale, tile)[0]


def _forward(
    arrays: Arrays, tokens: tuple[Tokens, Tokens], rule: MaskRule, scale: float, tile: tuple
) -> tuple[jax.Array, Any]:
    work = _Work.of(arrays, tokens, rule, scale, tile)

    def step(w: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        query, key = work.place(w)
        scores, allow = work.scores(query, key)
        most, total, out = (_at(x, query) for x in sums)
        found = jnp.maximum(most, scores.max(axis=-1, keepdims=True))
        weights = jnp.where(allow, jnp.exp(scores - found), 0)
        shrink = jnp.exp(most - found)
        total = shrink * total + weights.sum(axis=-1, keepdims=True)
        values = _at(work.v, key)
        out = shrink * out + work.dot("ghnm,ghmv->ghnv", weights.astype(values.dtype), values)
        return tuple(_put(x, query, new) for x, new in zip(sums, (found, total, out)))

    one = (*work.q.shape[:-1], 1)
    first = (
        jnp.full(one, jnp.finfo(work.wide).min, work.wide),
        jnp.zeros(one, work.wide),
        jnp.zeros((*one[:-1], work.v.shape[-1]), work.wide),
    )
    most, total, out = jax.lax.fori_loop(0, work.count, step, first)
    out_rnhv = work.whole(out / jnp.where(total > 0, total, 1), arrays[0])
    out_rnhv = out_rnhv.astype(arrays[2].dtype)
    # Of a row that reads nothing 0: no tile takes weights from it.
    logarithm = jnp.where(total > 0, most + jnp.log(total), 0)
    return out_rnhv, (arrays, tokens, out_rnhv, logarithm)


def _backward(rule: MaskRule, scale: float, tile: tuple, kept: Any, d_rnhv: jax.Array):
    arrays, tokens, out_rnhv, logarithm = kept
    work = _Work.of(arrays, tokens, rule, scale, tile)
    wide = work.wide
    share_rnh1 = jnp.sum(d_rnhv.astype(wide) * out_rnhv.astype(wide), axis=-1, keepdims=True)
    d_all, share_all = (_split(x, work.tile[0], work.tile[2]) for x in (d_rnhv, share_rnh1))

    def step(w: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        query, key = work.place(w)
        scores, allow = work.scores(query, key)
        q, d = _at(work.q, query), _at(d_all, query)
        k, v = _at(work.k, key), _at(work.v, key)
        weights = jnp.where(allow, jnp.exp(scores - _at(logarithm, query)), 0)
        d_scores = weights * (work.dot("ghnv,ghmv->ghnm", d, v) - _at(share_all, query))
        d_scores, weights = (scale * d_scores).astype(q.dtype), weights.astype(v.dtype)
        more = (
            (query, work.dot("ghnm,ghmq->ghnq", d_scores, k)),
            (key, work.dot("ghnm,ghnq->ghmq", d_scores, q)),
            (key, work.dot("ghnm,ghnv->ghmv", weights, d)),
        )
        return tuple(_put(x, i, _at(x, i) + new) for x, (i, new) in zip(sums, more))

    zeros = tuple(jnp.zeros(x.shape, wide) for x in (work.q, work.k, work.v))
    sums = jax.lax.fori_loop(0, work.count, step, zeros)
    return tuple(work.whole(x, like).astype(like.dtype) for x, like in zip(sums, arrays)), None


softmax_attention.defvjp(_forward, _backward)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _put(x: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, new, index, 0)


def _split(x: jax.Array, block: int, group: int) -> jax.Array:
    """[R, N, H, W] -> [row groups * blocks, group, H, block, W]; tokens [R, N] without H and W."""
    x = blocks.cut(blocks.cut(x, block, axis=1), group, axis=0).swapaxes(1, 2)
    x = x.swapaxes(3, 4) if x.ndim == 6 else x
    return x.reshape(-1, *x.shape[2:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """Arrays cut into blocks as by `_split`, and the list of tiles with any work.

    order: int32, tiles numbered ((row group * n) + query block) * m + key block, those with work
      first; count: how many have. tile: queries, keys and rows of one.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    tokens: tuple[Tokens, Tokens]
    order: jax.Array
    count: jax.Array
    tile: tuple[int, int, int]
    numbers: tuple[int, int]  # n, m
    rule: MaskRule
    scale: float

    @classmethod
    def of(
        cls,
        arrays: Arrays,
        tokens: tuple[Tokens, Tokens],
        rule: MaskRule,
        scale: float,
        tile: tuple,
    ) -> "_Work":
        (R, N, H, _), M = arrays[0].shape, arrays[1].shape[1]
        sizes = tuple(min(b, length) for b, length in zip(tile, (N, M)))
        g = max(1, min(R, STEP // (H * sizes[0] * sizes[1])))
        padded = tuple(
            jax.tree.map(lambda x, b=b: blocks.padded(blocks.padded(x, b), g, axis=0), t)
            for t, b in zip(tokens, sizes)
        )
        active_rnm = blocks.active(rule, *padded, *sizes)
        together = blocks.cut(active_rnm, g, axis=0).any(axis=1).reshape(-1)
        q, k, v = (
            _split(x, b, g) for x, b in zip(arrays, (sizes[0], sizes[1], sizes[1]), strict=True)
        )
        return cls(
            **{"q": q, "k": k, "v": v, "rule": rule, "scale": scale},
            tokens=tuple(
                jax.tree.map(lambda x, b=b: _split(x, b, g), t) for t, b in zip(padded, sizes)
            ),
            order=jnp.argsort(~together, stable=True).astype(jnp.int32),
            count=jnp.sum(together, dtype=jnp.int32),
            tile=(*sizes, g),
            numbers=active_rnm.shape[1:],
        )

    @property
    def wide(self) -> jnp.dtype:
        return jnp.promote_types(self.q.dtype, jnp.float32)

    def dot(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=self.wide)

    def place(self, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Query block and key block of tile number w of the order."""
        n, m = self.numbers
        tile = self.order[w]
        return tile // m, tile // (n * m) * m + tile % m

    def scores(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(scale * q.k [g, H, q_block, k_block], least where not allowed; allowed, with one H)."""
        places = zip((query, key), self.tokens)
        pair = (jax.tree.map(lambda x, i=i: _at(x, i), t) for i, t in places)
        allow = self.rule.allow(*pair)[:, None]
        found = self.dot("ghnq,ghmq->ghnm", _at(self.q, query), _at(self.k, key))
        # Finite, not -inf: a row that may read nothing would be inf - inf.
        return jnp.where(allow, self.scale * found, jnp.finfo(self.wide).min), allow

    def whole(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """[row groups * blocks, g, H, block, W] -> [R, N, H, W], R and N those of `like`."""
        _, g, H, block, width = x.shape
        R, N = like.shape[:2]
        x = x.reshape(-(-R // g), -(-N // block), g, H, block, width)
        return x.transpose(0, 2, 1, 4, 3, 5).reshape(-(-R // g) * g, -1, H, width)[:R, :N]
