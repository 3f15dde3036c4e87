"""SiLU attention for TPUs, in Pallas: forward, and a backward pass of two kernels.

A grid step is one tile of one row and one group of heads. Mask and bias are the heads' common, so a
tile makes them once, as one array that is added to the scores (-1e30 where not allowed: SiLU and
its slope are 0 there). The grid walks `blocks.schedule`'s list of the tiles with work; its tail
fetches nothing and computes nothing. The kernel that makes dq also sums the gradients of the bias
tables (`pallas_tpu_bias`), in the order of the grid: same input, same bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from rankjax.batch import Tokens
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.kernels.hstu_attention.pallas_tpu_grid import Arrays, Grid, blocks_of
from rankjax.kernels.hstu_attention.tiles import Tile, Tiles
from rankjax.masks import MaskRule

SMEM_TILES = 2**17  # most entries of the list of tiles, which lies in scalar memory


def forward(
    arrays: Arrays,
    bias: bias_lib.RelativeBias | None,
    tokens: tuple[Tokens, Tokens],
    inverse_rn: jax.Array,
    *,
    rule: MaskRule,
    scale: float,
    tiles: Tiles,
    interpret: bool = False,
) -> jax.Array:
    """As `xla.forward`. Raises NotImplementedError for a row of too many tiles."""
    settings = {"rule": rule, "scale": scale, "tiles": tiles, "interpret": interpret}
    if _too_many_tiles(arrays, tiles.forward):
        halves = _halves((arrays, tokens, inverse_rn))
        parts = [forward(x, bias, t, i, **settings) for x, t, i in halves]
        return jnp.concatenate(parts)
    tokens = bias_lib.dense_positions(tokens)
    grid = Grid(arrays, tokens, bias, rule, tiles.forward, interpret, "queries", inverse_rn)
    v_dtype, V = arrays[2].dtype, arrays[2].shape[-1]

    def kernel(refs: dict[str, Any]) -> None:
        total, added = refs["total"], refs["added"]

        @pl.when(grid.first())
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        @pl.when(refs["has_work"])
        def _() -> None:
            added[...] = grid.added_scores(refs)

            def head(h: jax.Array, _: None) -> None:
                scores = grid.scores(refs["q"][0, h], refs["k"][0, h], scale, added[...])
                half = 0.5 * scores
                weights = (half + half * jnp.tanh(half)).astype(v_dtype)
                total[h] += grid.dot(weights, refs["v"][0, h], 1, 0)

            jax.lax.fori_loop(0, grid.heads, head, None)

        @pl.when(grid.last())
        def _() -> None:
            inverse_n1 = jax.lax.bitcast_convert_type(refs["q_tokens"][0][:, 6:7], jnp.float32)
            refs["out"][0] = (total[...] * inverse_n1[None]).astype(v_dtype)

    out = grid.run(
        kernel,
        outputs={"out": ("q", V, v_dtype)},
        scratch={"total": (grid.heads, grid.q_block, V), "added": (grid.q_block, grid.k_block)},
    )["out"]
    return grid.whole(out, arrays[0].shape[1])


def backward(
    arrays: Arrays,
    bias: bias_lib.RelativeBias | None,
    tokens: tuple[Tokens, Tokens],
    inverse_rn: jax.Array,
    d_rnhv: jax.Array,
    *,
    rule: MaskRule,
    scale: float,
    tiles: Tiles,
    interpret: bool = False,
) -> tuple[Arrays, bias_lib.RelativeBias | None]:
    """As `xla.backward`. Raises NotImplementedError for a row of too many tiles."""
    settings = {"rule": rule, "scale": scale, "tiles": tiles, "interpret": interpret}
    if _too_many_tiles(arrays, tiles.d_queries) or _too_many_tiles(arrays, tiles.d_keys):
        halves = _halves((arrays, tokens, inverse_rn, d_rnhv))
        parts = [backward(x, bias, t, i, d, **settings) for x, t, i, d in halves]
        gradients = (jnp.concatenate(x) for x in zip(*(arrays for arrays, _ in parts)))
        return tuple(gradients), jax.tree.map(jnp.add, *(d_bias for _, d_bias in parts))
    tokens = bias_lib.dense_positions(tokens)
    d_rnhv = (d_rnhv * inverse_rn[..., None, None]).astype(arrays[2].dtype)
    settings = {"rule": rule, "interpret": interpret, "inverse_rn": inverse_rn}
    of = functools.partial(Grid, arrays, tokens, bias, d_rnhv=d_rnhv, **settings)
    dq, d_bias = _of_queries(of(side="queries", tile=tiles.d_queries), scale)
    dk, dv = _of_keys(of(side="keys", tile=tiles.d_keys), scale)
    return (dq, dk, dv), d_bias


def _of_queries(grid: Grid, scale: float) -> tuple[jax.Array, bias_lib.RelativeBias | None]:
    """dq, and the gradients of the tables: for every query block, over its key blocks."""
    dtype, Q = grid.dtype, grid.arrays[0].shape[-1]

    def kernel(refs: dict[str, Any]) -> None:
        total, added, d_sum = refs["total"], refs["added"], refs["d_sum"]

        @pl.when(grid.first())
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        @pl.when(grid.first_of_row())
        def _() -> None:
            grid.tables.clear(refs)

        @pl.when(refs["has_work"])
        def _() -> None:
            added[...] = grid.added_scores(refs)
            d_sum[...] = jnp.zeros_like(d_sum)

            def head(h: jax.Array, _: None) -> None:
                q, k = refs["q"][0, h], refs["k"][0, h]
                scores = grid.scores(q, k, scale, added[...])
                d_scores = grid.dot(refs["d"][0, h], refs["v"][0, h], 1, 1) * _slope(scores)
                d_sum[...] += d_scores
                total[h] += grid.dot(d_scores.astype(dtype), k, 1, 0)

            jax.lax.fori_loop(0, grid.heads, head, None)
            grid.tables.add(refs, d_sum[...], *grid.facing(refs), grid.rule)

        @pl.when(grid.last())
        def _() -> None:
            refs["out"][0] = (scale * total[...]).astype(dtype)

        @pl.when(grid.last_of_row())
        def _() -> None:
            grid.tables.finish(refs)

    tile = (grid.q_block, grid.k_block)
    found = grid.run(
        kernel,
        outputs={"out": ("q", Q, dtype)},
        scratch={"total": (grid.heads, grid.q_block, Q), "added": tile, "d_sum": tile},
        tables=True,
    )
    return grid.whole(found["out"], grid.arrays[0].shape[1]), grid.tables.gradients(found)


def _of_keys(grid: Grid, scale: float) -> tuple[jax.Array, jax.Array]:
    """(dk, dv): for every key block, over the query blocks that read it.

    Tiles lie [keys, queries].
    """
    dtype = grid.dtype
    Q, V = (grid.arrays[i].shape[-1] for i in (1, 2))

    def kernel(refs: dict[str, Any]) -> None:
        dk, dv, added = refs["dk_sum"], refs["dv_sum"], refs["added"]

        @pl.when(grid.first())
        def _() -> None:
            dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

        @pl.when(refs["has_work"])
        def _() -> None:
            added[...] = grid.added_scores(refs)

            def head(h: jax.Array, _: None) -> None:
                q, d = refs["q"][0, h], refs["d"][0, h]
                scores_mn = grid.scores(refs["k"][0, h], q, scale, added[...])
                half = 0.5 * scores_mn
                weights_mn = half + half * jnp.tanh(half)
                dv[h] += grid.dot(weights_mn.astype(dtype), d, 1, 0)
                d_scores_mn = grid.dot(refs["v"][0, h], d, 1, 1) * _slope(scores_mn)
                dk[h] += grid.dot(d_scores_mn.astype(dtype), q, 1, 0)

            jax.lax.fori_loop(0, grid.heads, head, None)

        @pl.when(grid.last())
        def _() -> None:
            refs["dk"][0] = (scale * dk[...]).astype(dtype)
            refs["dv"][0] = dv[...].astype(dtype)

    found = grid.run(
        kernel,
        outputs={"dk": ("k", Q, dtype), "dv": ("k", V, dtype)},
        scratch={
            "dk_sum": (grid.heads, grid.k_block, Q),
            "dv_sum": (grid.heads, grid.k_block, V),
            "added": (grid.k_block, grid.q_block),
        },
    )
    M = grid.arrays[1].shape[1]
    return grid.whole(found["dk"], M), grid.whole(found["dv"], M)


def _too_many_tiles(arrays: Arrays, tile: Tile) -> bool:
    """Must the rows be halved for the list of tiles to fit?"""
    (R, N, *_), M = arrays[0].shape, arrays[1].shape[1]
    q_block, k_block = blocks_of(arrays, tile)
    n, m = -(-N // q_block), -(-M // k_block)
    if n * m > SMEM_TILES:
        raise NotImplementedError(
            f"hstu_attention: the list of {n} x {m} tiles of a row exceeds a TPU's scalar memory "
            f"({SMEM_TILES} entries); choose larger tiles than {(q_block, k_block)}"
        )
    return R * n * m > SMEM_TILES


def _halves(args: Any) -> tuple[Any, Any]:
    """The first and the second half of the rows of every array."""
    half = jax.tree.leaves(args)[0].shape[0] // 2
    return jax.tree.map(lambda x: x[:half], args), jax.tree.map(lambda x: x[half:], args)


def _slope(scores: jax.Array) -> jax.Array:
    """The derivative of SiLU."""
    gate = 0.5 + 0.5 * jnp.tanh(0.5 * scores)
    return gate * (1 + scores * (1 - gate))
