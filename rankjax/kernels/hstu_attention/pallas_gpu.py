"""SiLU attention for NVIDIA GPUs, in Pallas by way of Triton: forward and three backward kernels.

A program is one block of queries (or keys) of one head of one row. It walks `blocks.schedule`'s
list of the tiles with work, keeps its sums in registers, and writes its own block of the result:
nothing is added to memory that another program writes, so the same input gives the same bits. For
cards of compute capability 8.0 (Ampere) or newer. The
arrays stay as they are, [R, N, H, width]; only lengths that are no multiple of a block and widths
that are no power of two are padded. The gradients of the bias tables are a kernel of their own
(`pallas_gpu_bias`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.kernels.hstu_attention import pallas_gpu_bias
from rankjax.kernels.hstu_attention.pallas_gpu_launch import Arrays, Launch, dot, fitted
from rankjax.kernels.hstu_attention.tiles import Tiles
from rankjax.masks import MaskRule


def suited() -> bool:
    """False where this machine's GPU is older than Ampere; what is planned for counts as new."""
    device = jax.devices()[0]
    return device.platform != "gpu" or float(getattr(device, "compute_capability", 8)) >= 8


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
    """As `xla.forward`."""
    tile = fitted(tiles.forward, arrays, "forward")
    launch = Launch(arrays, bias, tokens, rule, tile, "queries", interpret)
    launch.operands["inverse"] = launch.pad_queries(inverse_rn.astype(jnp.float32))
    dtype, V = launch.dtype, launch.operands["v"].shape[-1]

    def kernel(refs: dict[str, Any], r: jax.Array, h: jax.Array, i: jax.Array) -> None:
        rows = launch.queries(i)
        q, q_tokens = refs["q"][r, rows, h, :], launch.q_tokens(refs, r, i)

        def step(j: jax.Array, full: bool, total: jax.Array) -> jax.Array:
            keys, k_tokens = launch.keys(j), launch.k_tokens(refs, r, j)
            scores = scale * dot(q, refs["k"][r, keys, h, :], 1, 1)
            scores += launch.relative(refs, q_tokens, k_tokens, full)
            weights = launch.silu(scores, q_tokens, k_tokens, full)[0].astype(dtype)
            return total + dot(weights, refs["v"][r, keys, h, :], 1, 0)

        total = launch.walk(refs, r, i, step, jnp.zeros((launch.q_block, V), jnp.float32))
        total *= refs["inverse"][r, rows][:, None]
        refs["out"][r, rows, h, :] = total.astype(dtype)

    out = launch.run("hstu_forward", kernel, {"out": (*launch.operands["q"].shape[:3], V)})["out"]
    return out[:, : arrays[0].shape[1], :, : arrays[2].shape[-1]]


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
    """As `xla.backward`."""
    d_rnhv = (d_rnhv * inverse_rn[..., None, None]).astype(arrays[2].dtype)
    of = functools.partial(Launch, arrays, bias, tokens, rule, d_rnhv=d_rnhv, interpret=interpret)
    dq = _d_queries(of(fitted(tiles.d_queries, arrays, "d_queries"), "queries"), scale)
    dk, dv = _d_keys(of(fitted(tiles.d_keys, arrays, "d_keys"), "keys"), scale)
    d_bias = None
    if bias is not None:
        dense = bias_lib.dense_positions(tokens)
        of = functools.partial(Launch, arrays, bias, dense, rule, d_rnhv=d_rnhv)
        # One stage: it reads again what it has written.
        tile = fitted(tiles.d_tables, arrays, "d_tables")._replace(stages=1)
        launch = of(tile, "queries", interpret)
        d_bias = pallas_gpu_bias.gradients(launch, scale)
    gradients = tuple(
        found[:, : like.shape[1], :, : like.shape[-1]] for found, like in zip((dq, dk, dv), arrays)
    )
    return gradients, d_bias


def _d_queries(launch: Launch, scale: float) -> jax.Array:
    """For every block of queries, over the keys that it reads."""
    dtype, Q = launch.dtype, launch.operands["q"].shape[-1]

    def kernel(refs: dict[str, Any], r: jax.Array, h: jax.Array, i: jax.Array) -> None:
        rows = launch.queries(i)
        q, d = refs["q"][r, rows, h, :], refs["d"][r, rows, h, :]
        q_tokens = launch.q_tokens(refs, r, i)

        def step(j: jax.Array, full: bool, total: jax.Array) -> jax.Array:
            keys, k_tokens = launch.keys(j), launch.k_tokens(refs, r, j)
            k = refs["k"][r, keys, h, :]
            scores = scale * dot(q, k, 1, 1) + launch.relative(refs, q_tokens, k_tokens, full)
            slope = launch.silu(scores, q_tokens, k_tokens, full)[1]
            d_scores = dot(d, refs["v"][r, keys, h, :], 1, 1) * slope
            return total + dot(d_scores.astype(dtype), k, 1, 0)

        total = launch.walk(refs, r, i, step, jnp.zeros((launch.q_block, Q), jnp.float32))
        refs["dq"][r, rows, h, :] = (scale * total).astype(dtype)

    return launch.run("hstu_d_queries", kernel, {"dq": launch.operands["q"].shape})["dq"]


def _d_keys(launch: Launch, scale: float) -> tuple[jax.Array, jax.Array]:
    """(dk, dv): for every block of keys, over the queries that read it; tiles lie [keys, queries].

    So no tile is transposed on its way from one product to the next.
    """
    dtype = launch.dtype
    shapes = {"dk": launch.operands["k"].shape, "dv": launch.operands["v"].shape}

    def kernel(refs: dict[str, Any], r: jax.Array, h: jax.Array, j: jax.Array) -> None:
        keys = launch.keys(j)
        k, v = refs["k"][r, keys, h, :], refs["v"][r, keys, h, :]
        k_tokens = launch.k_tokens(refs, r, j)

        def step(i: jax.Array, full: bool, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dk, dv = sums
            q, d = (refs[x][r, launch.queries(i), h, :] for x in "qd")
            q_tokens = launch.q_tokens(refs, r, i)
            scores_mn = scale * dot(k, q, 1, 1)
            scores_mn += launch.relative(refs, q_tokens, k_tokens, full)
            weights_mn, slope_mn = launch.silu(scores_mn, q_tokens, k_tokens, full)
            dv += dot(weights_mn.astype(dtype), d, 1, 0)
            d_scores_mn = dot(v, d, 1, 1) * slope_mn
            return dk + dot(d_scores_mn.astype(dtype), q, 1, 0), dv

        zeros = tuple(jnp.zeros((launch.k_block, s[-1]), jnp.float32) for s in shapes.values())
        dk, dv = launch.walk(refs, r, j, step, zeros)
        refs["dk"][r, keys, h, :] = (scale * dk).astype(dtype)
        refs["dv"][r, keys, h, :] = dv.astype(dtype)

    found = launch.run("hstu_d_keys", kernel, shapes)
    return found["dk"], found["dv"]
