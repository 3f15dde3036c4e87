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
    work = tile_loop.Work.of(arrays, tokens, rule, tiles.forward[:2])

    def step(place: tile_loop.Place, out: jax.Array) -> jax.Array:
        scores, allow = _scores(work, bias, rule, scale, place)
        v = work.keys(work.v, place)
        weights = jnp.where(allow, jax.nn.silu(scores), 0).astype(v.dtype)
        return work.add_queries(out, place, work.dot("ghnm,gmhv->gnhv", weights, v))

    (R, N), V = arrays[0].shape[:2], arrays[2].shape[-1]
    out = work.loop(step, jnp.zeros((*work.q.shape[:-1], V), work.wide))[:R, :N]
    return (out * inverse_rn[..., None, None].astype(work.wide)).astype(arrays[2].dtype)


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
    work = tile_loop.Work.of(arrays, tokens, rule, tiles.d_queries[:2])
    d_rnhv = d_rnhv * inverse_rn[..., None, None].astype(work.wide)
    d_all = work.like_q(d_rnhv.astype(arrays[2].dtype))

    def step(place: tile_loop.Place, sums: Any) -> Any:
        (dq, dk, dv), d_bias = sums
        q, d = work.queries(work.q, place), work.queries(d_all, place)
        k, v = work.keys(work.k, place), work.keys(work.v, place)
        scores, allow = _scores(work, bias, rule, scale, place)
        gate = jnp.where(allow, jax.nn.sigmoid(scores), 0)
        slope = gate * (1 + scores * (1 - gate))
        d_scores = work.dot("gnhv,gmhv->ghnm", d, v) * slope
        if bias is not None:
            d_bias = bias_lib.add_gradients(d_bias, d_scores.sum(axis=1), *work.pair(place))
        weights, d_scores = (scores * gate).astype(v.dtype), (scale * d_scores).astype(q.dtype)
        dq = work.add_queries(dq, place, work.dot("ghnm,gmhq->gnhq", d_scores, k))
        dk = work.add_keys(dk, place, work.dot("ghnm,gnhq->gmhq", d_scores, q))
        dv = work.add_keys(dv, place, work.dot("ghnm,gnhv->gmhv", weights, d))
        return (dq, dk, dv), d_bias

    zeros = tuple(jnp.zeros(x.shape, work.wide) for x in (work.q, work.k, work.v))
    sums, d_bias = work.loop(step, (zeros, jax.tree.map(jnp.zeros_like, bias)))
    gradients = tuple(
        x[: like.shape[0], : like.shape[1]].astype(like.dtype) for x, like in zip(sums, arrays)
    )
    return gradients, d_bias


def _scores(
    work: tile_loop.Work,
    bias: bias_lib.RelativeBias | None,
    rule: MaskRule,
    scale: float,
    place: tile_loop.Place,
) -> tuple[jax.Array, jax.Array]:
    """(scale * q.k + bias [g, H, queries, keys], what is allowed, with one H) of a tile."""
    pair = work.pair(place)
    q, k = work.queries(work.q, place), work.keys(work.k, place)
    found = scale * work.dot("gnhq,gmhq->ghnm", q, k)
    if bias is not None:
        found += bias(*pair)[:, None].astype(work.wide)
    return found, rule.allow(*pair)[:, None]
