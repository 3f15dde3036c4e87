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
    work = tile_loop.Work.of(arrays, tokens, rule, tile)

    def step(place: tile_loop.Place, sums: Sums) -> Sums:
        scores, allow = _scores(work, rule, scale, place)
        most, total, out = (work.queries(x, place) for x in sums)
        # Sums lie as the arrays do, [g, n, H, ...]; scores have the heads in front.
        found = jnp.maximum(most, scores.max(axis=-1).swapaxes(1, 2)[..., None])
        weights = jnp.where(allow, jnp.exp(scores - _heads_first(found)), 0)
        shrink = jnp.exp(most - found)
        total = shrink * total + weights.sum(axis=-1).swapaxes(1, 2)[..., None]
        values = work.keys(work.v, place)
        out = shrink * out + work.dot("ghnm,gmhv->gnhv", weights.astype(values.dtype), values)
        return tuple(work.put_queries(x, place, new) for x, new in zip(sums, (found, total, out)))

    one = (*work.q.shape[:-1], 1)
    first = (
        jnp.full(one, jnp.finfo(work.wide).min, work.wide),
        jnp.zeros(one, work.wide),
        jnp.zeros((*one[:-1], work.v.shape[-1]), work.wide),
    )
    most, total, out = work.loop(step, first)
    R, N = arrays[0].shape[:2]
    out_rnhv = (out / jnp.where(total > 0, total, 1))[:R, :N].astype(arrays[2].dtype)
    # Of a row that reads nothing 0: no tile takes weights from it.
    logarithm = jnp.where(total > 0, most + jnp.log(total), 0)
    return out_rnhv, (arrays, tokens, out_rnhv, logarithm)


def _backward(rule: MaskRule, scale: float, tile: tuple, kept: Any, d_rnhv: jax.Array):
    arrays, tokens, out_rnhv, logarithm = kept
    work = tile_loop.Work.of(arrays, tokens, rule, tile)
    wide = work.wide
    share_rnh1 = jnp.sum(d_rnhv.astype(wide) * out_rnhv.astype(wide), axis=-1, keepdims=True)
    d_all, share_all = work.like_q(d_rnhv), work.like_q(share_rnh1)

    def step(place: tile_loop.Place, sums: Sums) -> Sums:
        dq, dk, dv = sums
        scores, allow = _scores(work, rule, scale, place)
        q, d = work.queries(work.q, place), work.queries(d_all, place)
        k, v = work.keys(work.k, place), work.keys(work.v, place)
        share, own = (_heads_first(work.queries(x, place)) for x in (share_all, logarithm))
        weights = jnp.where(allow, jnp.exp(scores - own), 0)
        d_scores = weights * (work.dot("gnhv,gmhv->ghnm", d, v) - share)
        d_scores, weights = (scale * d_scores).astype(q.dtype), weights.astype(v.dtype)
        dq = work.add_queries(dq, place, work.dot("ghnm,gmhq->gnhq", d_scores, k))
        dk = work.add_keys(dk, place, work.dot("ghnm,gnhq->gmhq", d_scores, q))
        dv = work.add_keys(dv, place, work.dot("ghnm,gnhv->gmhv", weights, d))
        return dq, dk, dv

    zeros = tuple(jnp.zeros(x.shape, wide) for x in (work.q, work.k, work.v))
    sums = work.loop(step, zeros)
    gradients = tuple(
        x[: like.shape[0], : like.shape[1]].astype(like.dtype) for x, like in zip(sums, arrays)
    )
    return gradients, None


softmax_attention.defvjp(_forward, _backward)


def _heads_first(x_gnh1: jax.Array) -> jax.Array:
    return x_gnh1.swapaxes(1, 2)


def _scores(
    work: tile_loop.Work, rule: MaskRule, scale: float, place: tile_loop.Place
) -> tuple[jax.Array, jax.Array]:
    """(scale * q.k [g, H, queries, keys], least where not allowed; what is, with one H)."""
    allow = rule.allow(*work.pair(place))[:, None]
    q, k = work.queries(work.q, place), work.keys(work.k, place)
    found = scale * work.dot("gnhq,gmhq->ghnm", q, k)
    # Finite, not -inf: a row that may read nothing would be inf - inf.
    return jnp.where(allow, found, jnp.finfo(work.wide).min), allow
