"""SiLU attention in plain XLA: the fallback on every platform, and the way on a CPU.

Small problems go in one piece (`whole`). Larger ones are a loop over the tiles [q_block, k_block]
that have any work (`forward`, `backward`): SiLU attention needs no running maximum, so tiles simply
add up, and the backward pass computes a tile's scores again. No array of N x M elements exists.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.kernels import blocks
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.kernels.hstu_attention.tiles import Tile, Tiles
from rankjax.masks import MaskRule

Arrays = tuple[jax.Array, jax.Array, jax.Array]
PAIRS = 2**20  # one piece up to so many scores: 4 MiB in float32
TILE = 2**19  # scores of one step of the loop; short rows share a step


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
    q_rnhq, _, v_rmhv = arrays
    work = _Work.of(arrays, tokens, rule, scale, bias, tiles.forward)

    def step(w: jax.Array, out: jax.Array) -> jax.Array:
        q, k, v, q_tokens, k_tokens = work.tile(w)
        scores, allow = work.scores(q, k, q_tokens, k_tokens)
        weights = jnp.where(allow, jax.nn.silu(scores), 0).astype(v.dtype)
        return _add(out, work.query(w), _dot("ghnm,ghmv->ghnv", weights, v, work.wide))

    shape = (*work.q.shape[:-1], v_rmhv.shape[-1])
    out = jax.lax.fori_loop(0, work.count, step, jnp.zeros(shape, work.wide))
    out_rnhv = work.whole(out, q_rnhq.shape[:2])
    return (out_rnhv * inverse_rn[..., None, None].astype(work.wide)).astype(v_rmhv.dtype)


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
    work = _Work.of(arrays, tokens, rule, scale, bias, tiles.d_queries)
    d_rnhv = d_rnhv * inverse_rn[..., None, None].astype(work.wide)
    d_all = work.split(d_rnhv.astype(arrays[2].dtype), 0)

    def step(w: jax.Array, sums: Any) -> Any:
        (dq, dk, dv), d_bias = sums
        q, k, v, q_tokens, k_tokens = work.tile(w)
        d = jax.lax.dynamic_index_in_dim(d_all, work.query(w), keepdims=False)
        scores, allow = work.scores(q, k, q_tokens, k_tokens)
        gate = jnp.where(allow, jax.nn.sigmoid(scores), 0)
        slope = gate * (1 + scores * (1 - gate))
        d_scores = _dot("ghnv,ghmv->ghnm", d, v, work.wide) * slope
        if bias is not None:
            d_bias = bias_lib.add_gradients(d_bias, d_scores.sum(axis=1), q_tokens, k_tokens)
        weights, d_scores = (scores * gate).astype(v.dtype), (scale * d_scores).astype(q.dtype)
        dq = _add(dq, work.query(w), _dot("ghnm,ghmq->ghnq", d_scores, k, work.wide))
        dk = _add(dk, work.key(w), _dot("ghnm,ghnq->ghmq", d_scores, q, work.wide))
        dv = _add(dv, work.key(w), _dot("ghnm,ghnv->ghmv", weights, d, work.wide))
        return (dq, dk, dv), d_bias

    zeros = tuple(jnp.zeros(x.shape, work.wide) for x in (work.q, work.k, work.v))
    first = zeros, jax.tree.map(jnp.zeros_like, bias)
    sums, d_bias = jax.lax.fori_loop(0, work.count, step, first)
    lengths = [x.shape[:2] for x in arrays]
    return tuple(
        work.whole(x, length).astype(like.dtype) for x, length, like in zip(sums, lengths, arrays)
    ), d_bias


def _dot(equation: str, x: jax.Array, y: jax.Array, wide: jnp.dtype) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=wide)


def _add(total: jax.Array, index: jax.Array, x: jax.Array) -> jax.Array:
    found = jax.lax.dynamic_index_in_dim(total, index, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(total, found + x, index, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """Arrays cut into blocks, and the list of tiles with any work.

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
    sizes: tuple[int, int, int]  # g, q_block, k_block
    numbers: tuple[int, int]  # n, m
    scores: Callable[..., tuple[jax.Array, jax.Array]]
    wide: jnp.dtype

    @classmethod
    def of(
        cls,
        arrays: Arrays,
        tokens: tuple[Tokens, Tokens],
        rule: MaskRule,
        scale: float,
        bias: bias_lib.RelativeBias | None,
        tile: Tile,
    ) -> "_Work":
        q_rnhq, k_rmhq, v_rmhv = arrays
        R, N, H, _ = q_rnhq.shape
        M = k_rmhq.shape[1]
        wide = jnp.promote_types(q_rnhq.dtype, jnp.float32)
        q_block, k_block = (min(b, length) for b, length in zip(tile[:2], (N, M)))
        g = max(1, min(R, TILE // (H * q_block * k_block)))
        sizes = g, q_block, k_block
        cut = functools.partial(_split, group=g)
        q_tokens, k_tokens = (
            jax.tree.map(lambda x, b=b: blocks.padded(blocks.padded(x, b), g, axis=0), t)
            for t, b in zip(tokens, (q_block, k_block))
        )
        active_rnm = blocks.active(rule, q_tokens, k_tokens, q_block, k_block)
        numbers = active_rnm.shape[1:]
        together = blocks.cut(active_rnm, g, axis=0).any(axis=1).reshape(-1)

        def scores(q: jax.Array, k: jax.Array, *pair: Tokens) -> tuple[jax.Array, jax.Array]:
            found = scale * _dot("ghnq,ghmq->ghnm", q, k, wide)
            if bias is not None:
                found += bias(*pair)[:, None].astype(wide)
            return found, rule.allow(*pair)[:, None]

        return cls(
            **{"q": cut(q_rnhq, q_block), "k": cut(k_rmhq, k_block), "v": cut(v_rmhv, k_block)},
            tokens=(
                jax.tree.map(lambda x: cut(x, q_block), q_tokens),
                jax.tree.map(lambda x: cut(x, k_block), k_tokens),
            ),
            order=jnp.argsort(~together, stable=True).astype(jnp.int32),
            count=jnp.sum(together, dtype=jnp.int32),
            **{"sizes": sizes, "numbers": numbers, "scores": scores, "wide": wide},
        )

    def split(self, x: jax.Array, side: int) -> jax.Array:
        """Cuts an array as q (side 0) or k (side 1) is cut."""
        return _split(x, self.sizes[1 + side], group=self.sizes[0])

    def query(self, w: jax.Array) -> jax.Array:
        return self.order[w] // self.numbers[1]

    def key(self, w: jax.Array) -> jax.Array:
        n, m = self.numbers
        return self.order[w] // (n * m) * m + self.order[w] % m

    def tile(self, w: jax.Array) -> tuple[Any, ...]:
        """(q, k, v, q_tokens, k_tokens) of tile number w of the order."""

        def at(x: Any, index: jax.Array) -> Any:
            take = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
            return jax.tree.map(take, x)

        query, key = self.query(w), self.key(w)
        pair = at(self.tokens[0], query), at(self.tokens[1], key)
        return at(self.q, query), at(self.k, key), at(self.v, key), *pair

    def whole(self, x: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """[row groups * blocks, g, H, block, width] -> [R, N, H, width] of shape [R, N]."""
        _, g, H, block, width = x.shape
        R, N = shape
        x = x.reshape(-(-R // g), -(-N // block), g, H, block, width)
        x = x.transpose(0, 2, 1, 4, 3, 5).reshape(-(-R // g) * g, -1, H, width)
        return x[:R, :N]


def _split(x: jax.Array, block: int, group: int) -> jax.Array:
    """[R, N, ...] -> [row groups * blocks, group, ..., block, width], ... the heads if any."""
    x = blocks.cut(blocks.cut(x, block, axis=1), group, axis=0)  # [R / g, g, n, block, ...]
    x = x.swapaxes(1, 2)
    if x.ndim == 6:
        x = x.swapaxes(3, 4)
    return x.reshape(-1, *x.shape[2:])
