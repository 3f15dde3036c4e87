"""SiLU attention in plain XLA: the fallback on every platform, and the way on a CPU.

Small problems go in one piece (`whole`). Larger ones are a loop over the tiles [q_block, k_block]
that have any work (`forward`, `backward`): SiLU attention needs no running maximum, so tiles simply
add up, and the backward pass computes a tile's scores again. No array of N x M elements exists.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.kernels import tile_loop
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.kernels.hstu_attention.tiles import Tiles
from rankjax.masks import MaskRule

Arrays = tile_loop.Arrays
PAIRS = 2**20  # one piece up to so many scores: 4 MiB in float32


def whole(
    arrays: Arrays,
    bias: bias_lib.RelativeBias | None,
    tokens: tuple[Tokens, Tokens],
    inverse_rn: jax.Array,
    rule: MaskRule,
    scale: float,
) -> jax.Array:
    """All pairs at once; as `api.hstu_attention`, with 1 / normalizer."""
    q_rnhq, k_rmhq, v_rmhv = arrays
    wide = jnp.promote_types(q_rnhq.dtype, jnp.float32)
    scores_rhnm = jnp.einsum("rnhq,rmhq->rhnm", q_rnhq, k_rmhq, preferred_element_type=wide)
    scores_rhnm = scale * scores_rhnm
    if bias is not None:
        scores_rhnm += bias(*tokens)[:, None].astype(wide)
    allow_rnm = rule.allow(*tokens)
    weights_rhnm = jnp.where(allow_rnm[:, None], jax.nn.silu(scores_rhnm), 0)
    weights_rhnm = weights_rhnm.astype(v_rmhv.dtype)
    out = jnp.einsum("rhnm,rmhv->rnhv", weights_rhnm, v_rmhv, preferred_element_type=wide)
    return (out * inverse_rn[..., None, None].astype(wide)).astype(v_rmhv.dtype)


def forward(
    arrays: Arrays,
    bias: bias_lib.RelativeBias | None,
    tokens: tuple[Tokens, Tokens],
    inverse_rn: jax.Array,
    rule: MaskRule,
    scale: float,
    tiles: Tiles,
) -> jax.Array:
    """As `whole`, tile by tile."""
    tile = tiles.forward[:2]
    g = tile_loop.rows_of_a_step(arrays[0].shape, arrays[1].shape[1], tile)

    def rows(_: None, xs: Any) -> tuple[None, jax.Array]:
        arrays, tokens, inverse_rn = xs
        work = tile_loop.Work.of(arrays, tokens, rule, tile)

        def step(query: jax.Array, key: jax.Array, out: jax.Array) -> jax.Array:
            scores, allow = _scores(work, bias, rule, scale, query, key)
            v = tile_loop.at(work.v, key)
            weights = jnp.where(allow, jax.nn.silu(scores), 0).astype(v.dtype)
            return _add(out, query, work.dot("ghnm,ghmv->ghnv", weights, v))

        shape = (*work.q.shape[:-1], work.v.shape[-1])
        out = work.whole(work.loop(step, jnp.zeros(shape, work.wide)), "q")
        return None, (out * inverse_rn[..., None, None].astype(work.wide)).astype(work.v.dtype)

    return tile_loop.over_rows(rows, None, (arrays, tokens, inverse_rn), g)[1]


def backward(
    arrays: Arrays,
    bias: bias_lib.RelativeBias | None,
    tokens: tuple[Tokens, Tokens],
    inverse_rn: jax.Array,
    d_rnhv: jax.Array,
    rule: MaskRule,
    scale: float,
    tiles: Tiles,
) -> tuple[Arrays, bias_lib.RelativeBias | None]:
    """Gradients of sum(d * forward) with respect to q, k, v and the tables, in their dtypes."""
    tile = (tiles.d_queries if bias is None else tiles.d_tables)[:2]
    g = tile_loop.rows_of_a_step(arrays[0].shape, arrays[1].shape[1], tile)

    def rows(d_bias: Any, xs: Any) -> tuple[Any, Arrays]:
        arrays, tokens, inverse_rn, d_rnhv = xs
        work = tile_loop.Work.of(arrays, tokens, rule, tile)
        d_rnhv = d_rnhv * inverse_rn[..., None, None].astype(work.wide)
        d_all = work.queries(d_rnhv.astype(arrays[2].dtype))

        def step(query: jax.Array, key: jax.Array, sums: Any) -> Any:
            (dq, dk, dv), d_bias = sums
            q, d = tile_loop.at(work.q, query), tile_loop.at(d_all, query)
            k, v = tile_loop.at(work.k, key), tile_loop.at(work.v, key)
            scores, allow = _scores(work, bias, rule, scale, query, key)
            gate = jnp.where(allow, jax.nn.sigmoid(scores), 0)
            slope = gate * (1 + scores * (1 - gate))
            d_scores = work.dot("ghnv,ghmv->ghnm", d, v) * slope
            if bias is not None:
                pair = work.pair(query, key)
                d_bias = bias_lib.add_gradients(d_bias, d_scores.sum(axis=1), *pair)
            weights, d_scores = (scores * gate).astype(v.dtype), (scale * d_scores).astype(q.dtype)
            dq = _add(dq, query, work.dot("ghnm,ghmq->ghnq", d_scores, k))
            dk = _add(dk, key, work.dot("ghnm,ghnq->ghmq", d_scores, q))
            dv = _add(dv, key, work.dot("ghnm,ghnv->ghmv", weights, d))
            return (dq, dk, dv), d_bias

        zeros = tuple(jnp.zeros(x.shape, work.wide) for x in (work.q, work.k, work.v))
        sums, d_bias = work.loop(step, (zeros, d_bias))
        gradients = (work.whole(x, side) for x, side in zip(sums, "qkk"))
        return d_bias, tuple(x.astype(like.dtype) for x, like in zip(gradients, arrays))

    first = jax.tree.map(jnp.zeros_like, bias)
    d_bias, gradients = tile_loop.over_rows(rows, first, (arrays, tokens, inverse_rn, d_rnhv), g)
    return gradients, d_bias


def _scores(
    work: tile_loop.Work,
    bias: bias_lib.RelativeBias | None,
    rule: MaskRule,
    scale: float,
    query: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(scale * q.k + bias [g, H, queries, keys], what is allowed, with one H) of a tile."""
    pair = work.pair(query, key)
    q, k = tile_loop.at(work.q, query), tile_loop.at(work.k, key)
    found = scale * work.dot("ghnq,ghmq->ghnm", q, k)
    if bias is not None:
        found += bias(*pair)[:, None].astype(work.wide)
    return found, rule.allow(*pair)[:, None]


def _add(total: jax.Array, index: jax.Array, x: jax.Array) -> jax.Array:
    return tile_loop.put(total, index, tile_loop.at(total, index) + x)
