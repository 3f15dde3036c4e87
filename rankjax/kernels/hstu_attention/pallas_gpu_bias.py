"""Gradients of the bias tables on a GPU, without atomics: the same input gives the same bits.

A fixed number of programs share the blocks of queries; each sums into tables of its own, and the
sums are added up at the end. Heads share the bias, so a tile's gradient is summed over them first.
By time bucket: a masked sum for every bucket between the tile's least and most. By position: a
product with a one-hot matrix lays the keys side by side by position, so that every query's row is
written to memory moved by its own position, and the columns are summed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from rankjax.batch import Tokens
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.kernels.hstu_attention import pallas_gpu_time
from rankjax.kernels.hstu_attention.pallas_gpu_launch import Launch, dot

PROGRAMS = 256  # more than a card has multiprocessors; each holds a table
WINDOW = 64  # positions of queries and of keys that are summed at a time
TIMES = 128  # int32 seconds reach bucket 71
FAR = 2**30


def gradients(launch: Launch, scale: float) -> bias_lib.RelativeBias:
    """Of launch.bias, in the tables' dtypes. Positions should ascend along a row."""
    R, n, _ = launch.operands["order"].shape
    H = launch.operands["q"].shape[2]
    G = min(PROGRAMS, R * n)
    size = 0 if launch.bias.position is None else launch.bias.position.size
    wide = -(-size // 128) * 128 + 2 * WINDOW  # room behind, for lanes that hit no row
    # ends: what lies before and behind the table, which belongs to its first and last row.
    outputs = {"line": (G, wide), "ends": (G, 2), "time_sum": (G, TIMES)}
    outputs["moved"] = (G, launch.q_block, 2 * WINDOW)

    def barrier() -> None:
        if not launch.interpret:  # programs run one thread each there
            plgpu.debug_barrier()

    def tile(
        refs: dict[str, Any], g: jax.Array, r: jax.Array, i: jax.Array, j: jax.Array, sums: Any
    ) -> Any:
        q_tokens, k_tokens = launch.q_tokens(refs, r, i), launch.k_tokens(refs, r, j)
        relative = launch.relative(refs, q_tokens, k_tokens, full=False)  # the heads' common

        def head(h: jax.Array, d_nm: jax.Array) -> jax.Array:
            rows, keys = launch.queries(i), launch.keys(j)
            scores = scale * dot(refs["q"][r, rows, h, :], refs["k"][r, keys, h, :], 1, 1)
            slope = launch.silu(scores + relative, q_tokens, k_tokens, full=True)[1]
            return d_nm + slope * dot(refs["d"][r, rows, h, :], refs["v"][r, keys, h, :], 1, 1)

        d_nm = jnp.zeros((launch.q_block, launch.k_block), jnp.float32)
        allow = launch.rule.between(q_tokens, k_tokens)
        d_nm = jnp.where(allow, jax.lax.fori_loop(0, H, head, d_nm), 0.0)
        time_b, before, behind = sums
        if "time" in refs:
            bucket = pallas_gpu_time.bucket(refs["cells"], q_tokens, k_tokens, with_context=True)
            time_b = _by_time(time_b, d_nm, bucket, allow)
        if "position" in refs:
            ends = _by_position(refs, g, d_nm, q_tokens, k_tokens, allow, barrier)
            before, behind = before + ends[0], behind + ends[1]
        return time_b, before, behind

    def kernel(refs: dict[str, Any], g: jax.Array) -> None:
        def clear(w: jax.Array, _: None) -> None:
            refs["line"][g, pl.ds(w * 128, 128)] = jnp.zeros((128,), jnp.float32)

        jax.lax.fori_loop(0, wide // 128, clear, None)

        def block(b: jax.Array, sums: Any) -> Any:
            # Neighbouring programs take neighbouring blocks, whose lengths of walk are alike.
            item = g + b * G
            r, i = jax.lax.div(item, n), jax.lax.rem(item, n)
            step = lambda w, sums: tile(refs, g, r, i, refs["order"][r, i, w], sums)
            return jax.lax.fori_loop(0, refs["count"][r, i], step, sums)

        zero = jnp.zeros((), jnp.float32)
        sums = jnp.zeros((TIMES,), jnp.float32), zero, zero
        blocks_of_g = jax.lax.div(R * n - g + G - 1, G)
        time_b, before, behind = jax.lax.fori_loop(0, blocks_of_g, block, sums)
        refs["time_sum"][g, :] = time_b
        refs["ends"][g, 0], refs["ends"][g, 1] = before, behind

    found = launch.run("hstu_d_tables", kernel, outputs, jnp.float32, grid=(G,))
    position = time = None
    if launch.bias.position is not None:
        row = jnp.arange(size)
        before, behind = found["ends"].sum(axis=0)
        position = found["line"].sum(axis=0)[:size] + jnp.where(row == 0, before, 0)
        position += jnp.where(row == size - 1, behind, 0)
        position = position.astype(launch.bias.position.dtype)
    if launch.bias.time is not None:
        time = jnp.pad(found["time_sum"].sum(axis=0), (0, bias_lib.TIME_BUCKETS - TIMES))
        time = time.astype(launch.bias.time.dtype)
    return bias_lib.RelativeBias(position=position, time=time)


def _by_time(time_b: jax.Array, d_nm: jax.Array, bucket: jax.Array, allow: jax.Array) -> jax.Array:
    """The sums by bucket, with a tile's added."""
    least = jnp.min(jnp.where(allow, bucket, FAR))
    most = jnp.max(jnp.where(allow, bucket, -1))
    place_b = jnp.arange(TIMES)

    def one(b: jax.Array, time_b: jax.Array) -> jax.Array:
        return time_b + jnp.where(place_b == b, jnp.sum(jnp.where(bucket == b, d_nm, 0.0)), 0.0)

    return jax.lax.fori_loop(least, most + 1, one, time_b)


def _by_position(
    refs: dict[str, Any],
    g: jax.Array,
    d_nm: jax.Array,
    q: Tokens,
    k: Tokens,
    allow: jax.Array,
    barrier: Any,
) -> tuple[jax.Array, jax.Array]:
    """Adds a tile's to program g's line; returns what lies before and behind the table."""
    q_n, k_m = q.position.reshape(-1), k.position.reshape(-1)
    reads_n, read_m = (jnp.max(allow.astype(jnp.int32), axis=axis) > 0 for axis in (1, 0))
    q_least, q_most = _range(q_n, reads_n)
    k_least, k_most = _range(k_m, read_m)
    size = refs["position"].shape[0]
    lane_b, lane_c = jnp.arange(WINDOW), jnp.arange(2 * WINDOW)
    places_n = jnp.arange(q_n.shape[0])

    def of_keys(b: jax.Array, ends: Any) -> Any:
        first = k_least + b * WINDOW
        at_mb = (k_m[:, None] - first == lane_b[None, :]).astype(jnp.bfloat16)
        by_key_nb = _exact(d_nm, at_mb)

        def of_queries(a: jax.Array, ends: Any) -> Any:
            newest = q_most - a * WINDOW
            move_n = newest - q_n
            inside_n1 = ((move_n >= 0) & (move_n < WINDOW))[:, None]
            column_nb = jnp.clip(move_n, 0, WINDOW - 1)[:, None] + lane_b[None, :]
            moved = refs["moved"].at[g, places_n[:, None], column_nb]
            barrier()  # everyone has read what lay there, and added to the line
            plgpu.store(moved, by_key_nb, mask=jnp.broadcast_to(inside_n1, column_nb.shape))
            barrier()
            from_nc = lane_c[None, :] - move_n[:, None]
            there_nc = inside_n1 & (from_nc >= 0) & (from_nc < WINDOW)
            found_nc = plgpu.load(refs["moved"].at[g], mask=there_nc, other=0.0)
            line_c = jnp.sum(found_nc, axis=0)
            row_c = first - newest + size // 2 + lane_c
            inside_c = (row_c >= 0) & (row_c < size)
            # Distinct places for the others too: the interpreter writes what is masked.
            slot = refs["line"].at[g, jnp.where(inside_c, row_c, size + lane_c)]
            old_c = plgpu.load(slot, mask=inside_c, other=0.0)
            plgpu.store(slot, old_c + line_c, mask=inside_c)
            before = jnp.sum(jnp.where(row_c < 0, line_c, 0.0))
            behind = jnp.sum(jnp.where(row_c >= size, line_c, 0.0))
            return ends[0] + before, ends[1] + behind

        return jax.lax.fori_loop(0, ((q_most - q_least) >> 6) + 1, of_queries, ends)

    zero = jnp.zeros((), jnp.float32)
    windows = jnp.where(k_most >= k_least, ((k_most - k_least) >> 6) + 1, 0)
    return jax.lax.fori_loop(0, windows, of_keys, (zero, zero))


def _range(x: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.min(jnp.where(there, x, FAR)), jnp.max(jnp.where(there, x, -FAR))


def _exact(x_nm: jax.Array, one_hot_mb: jax.Array) -> jax.Array:
    """x @ one_hot, x in three bfloat16 parts of 8 bits each: fast, and nothing is rounded off."""
    total = 0.0
    for _ in range(3):
        part_nm = x_nm.astype(jnp.bfloat16)
        total += dot(part_nm, one_hot_mb, 1, 0)
        x_nm = x_nm - part_nm.astype(jnp.float32)
    return total
