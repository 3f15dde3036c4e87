"""Softmax attention in plain XLA, tile by tile: only the tiles in which anybody may read anybody.

A loop over those tiles keeps, for every query, the largest score so far, the sum of exponentials
and the sum of values (online softmax). The backward pass holds the output and the logarithm of the
sums, and computes the tiles again. No array of N x M elements exists; sums have a fixed order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.kernels import tile_loop
from rankjax.masks import MaskRule

Arrays = tile_loop.Arrays
Sums = tuple[jax.Array, ...]
TILE = (128, 128)  # queries, keys


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def softmax_attention(
    arrays: Arrays, tokens: tuple[Tokens, Tokens], rule: MaskRule, scale: float, tile: tuple
) -> jax.Array:
    """As `api.softmax_attention`, without scores. tile: (queries, keys) of one tile."""
    return _forward(arrays, tokens, rule, scale, tile)[0]


def _forward(
    arrays: Arrays, tokens: tuple[Tokens, Tokens], rule: MaskRule, scale: float, tile: tuple
) -> tuple[jax.Array, Any]:
    g = tile_loop.rows_of_a_step(arrays[0].shape, arrays[1].shape[1], tile)

    def rows(_: None, xs: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
        return None, _forward_rows(tile_loop.Work.of(*xs, rule, tile), rule, scale)

    _, (out_rnhv, logarithm_rnh1) = tile_loop.over_rows(rows, None, (arrays, tokens), g)
    return out_rnhv, (arrays, tokens, out_rnhv, logarithm_rnh1)


def _forward_rows(
    work: tile_loop.Work, rule: MaskRule, scale: float
) -> tuple[jax.Array, jax.Array]:
    def step(query: jax.Array, key: jax.Array, sums: Sums) -> Sums:
        scores, allow = _scores(work, rule, scale, query, key)
        most, total, out = (tile_loop.at(x, query) for x in sums)
        found = jnp.maximum(most, scores.max(axis=-1, keepdims=True))
        weights = jnp.where(allow, jnp.exp(scores - found), 0)
        shrink = jnp.exp(most - found)
        total = shrink * total + weights.sum(axis=-1, keepdims=True)
        values = tile_loop.at(work.v, key)
        out = shrink * out + work.dot("ghnm,ghmv->ghnv", weights.astype(values.dtype), values)
        return tuple(tile_loop.put(x, query, new) for x, new in zip(sums, (found, total, out)))

    one = (*work.q.shape[:-1], 1)
    first = (
        jnp.full(one, jnp.finfo(work.wide).min, work.wide),
        jnp.zeros(one, work.wide),
        jnp.zeros((*one[:-1], work.v.shape[-1]), work.wide),
    )
    most, total, out = work.loop(step, first)
    out_rnhv = work.whole(out / jnp.where(total > 0, total, 1), "q").astype(work.v.dtype)
    # Of a row that reads nothing 0: no tile takes weights from it.
    logarithm = jnp.where(total > 0, most + jnp.log(total), 0)
    return out_rnhv, work.whole(logarithm, "q")


def _backward(rule: MaskRule, scale: float, tile: tuple, kept: Any, d_rnhv: jax.Array):
    arrays = kept[0]
    g = tile_loop.rows_of_a_step(arrays[0].shape, arrays[1].shape[1], tile)

    def rows(_: None, xs: Any) -> tuple[None, Arrays]:
        (arrays, tokens, *rest), d_rnhv = xs
        work = tile_loop.Work.of(arrays, tokens, rule, tile)
        return None, _backward_rows(work, rule, scale, arrays, *rest, d_rnhv)

    return tile_loop.over_rows(rows, None, (kept, d_rnhv), g)[1], None


def _backward_rows(
    work: tile_loop.Work,
    rule: MaskRule,
    scale: float,
    arrays: Arrays,
    out_rnhv: jax.Array,
    logarithm_rnh1: jax.Array,
    d_rnhv: jax.Array,
) -> Arrays:
    wide = work.wide
    share_rnh1 = jnp.sum(d_rnhv.astype(wide) * out_rnhv.astype(wide), axis=-1, keepdims=True)
    d_all, share_all = work.queries(d_rnhv), work.queries(share_rnh1)
    logarithm_all = work.queries(logarithm_rnh1)

    def step(query: jax.Array, key: jax.Array, sums: Sums) -> Sums:
        scores, allow = _scores(work, rule, scale, query, key)
        q, d = tile_loop.at(work.q, query), tile_loop.at(d_all, query)
        k, v = tile_loop.at(work.k, key), tile_loop.at(work.v, key)
        weights = jnp.where(allow, jnp.exp(scores - tile_loop.at(logarithm_all, query)), 0)
        d_scores = weights * (work.dot("ghnv,ghmv->ghnm", d, v) - tile_loop.at(share_all, query))
        d_scores, weights = (scale * d_scores).astype(q.dtype), weights.astype(v.dtype)
        more = (
            (query, work.dot("ghnm,ghmq->ghnq", d_scores, k)),
            (key, work.dot("ghnm,ghnq->ghmq", d_scores, q)),
            (key, work.dot("ghnm,ghnv->ghmv", weights, d)),
        )
        return tuple(
            tile_loop.put(x, i, tile_loop.at(x, i) + new) for x, (i, new) in zip(sums, more)
        )

    zeros = tuple(jnp.zeros(x.shape, wide) for x in (work.q, work.k, work.v))
    gradients = (work.whole(x, side) for x, side in zip(work.loop(step, zeros), "qkk"))
    return tuple(x.astype(like.dtype) for x, like in zip(gradients, arrays))


softmax_attention.defvjp(_forward, _backward)


def _scores(
    work: tile_loop.Work, rule: MaskRule, scale: float, query: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(scale * q.k [g, H, queries, keys], least where not allowed; what is, with one H)."""
    allow = rule.allow(*work.pair(query, key))[:, None]
    q, k = tile_loop.at(work.q, query), tile_loop.at(work.k, key)
    found = scale * work.dot("ghnq,ghmq->ghnm", q, k)
    # Finite, not -inf: a row that may read nothing would be inf - inf.
    return jnp.where(allow, found, jnp.finfo(work.wide).min), allow
