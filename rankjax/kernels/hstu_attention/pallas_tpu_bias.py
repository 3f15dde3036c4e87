"""The bias tables inside a TPU kernel: look-up by lanes, and gradients summed without scatter.

A TPU looks up within 128 lanes, and cannot add to scattered addresses. Looking up walks the windows
of 128 table rows that a tile's allowed pairs reach: two or three, as positions lie side by side. A
tile's gradient by position becomes, by products with one-hot matrices, an array over (query
position, key position), whose diagonals are summed after turning every row by one lane more. Its
gradient by time bucket is a masked sum for every bucket between the tile's least and most.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rankjax.batch import Tokens
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.masks import MaskRule

LANES = 128
BEFORE = 2  # rows before the first one of the position table's sums, for windows that begin there
FAR = 2**30


class Tables:
    """Operands, sums and gradients of the tables that a bias has."""

    def __init__(self, bias: bias_lib.RelativeBias | None) -> None:
        self.bias = bias
        position = None if bias is None else bias.position
        time = None if bias is None else bias.time
        self.operands: dict[str, jax.Array] = {}
        self.outputs: dict[str, tuple[int, int]] = {}
        self.scratch: dict[str, tuple[int, int]] = {}
        self.size = 0
        if position is not None:
            self.size = position.size
            rows = -(-self.size // LANES)
            padded = jnp.pad(position.astype(jnp.float32), (0, rows * LANES - self.size))
            self.operands["position"] = padded.reshape(rows, LANES)
            # Three rows more behind the last: a window's sums are three rows long.
            self.outputs["d_position"] = (-(-(BEFORE + rows + 3) // 8) * 8, LANES)
        if time is not None:
            # int32 seconds reach bucket 71: one row of lanes holds all that can be.
            self.operands["time"] = time[:LANES].astype(jnp.float32)[None]
            self.outputs["d_time"] = (8, LANES)
            self.scratch["time_sum"] = (LANES, LANES)

    def look_up(self, refs: dict[str, Any], q: Tokens, k: Tokens, allow: jax.Array) -> jax.Array:
        """The bias of every pair of a tile, float32; what is not allowed may have any."""
        total = jnp.zeros(allow.shape, jnp.float32)
        if "position" in self.operands:
            index = bias_lib.position_index(q, k, self.size)
            least = jnp.min(jnp.where(allow, index, FAR)) >> 7
            most = jnp.max(jnp.where(allow, index, -1)) >> 7

            def window(w: jax.Array, total: jax.Array) -> jax.Array:
                local = index - (w << 7)
                inside = (local >= 0) & (local < LANES)
                found = _take(refs["position"][pl.ds(w, 1), :], local & (LANES - 1))
                return jnp.where(inside, found, total)

            total = jax.lax.fori_loop(least, most + 1, window, total)
        if "time" in self.operands:
            total += _take(refs["time"][...], bias_lib.bucket(q, k))
        return total

    def clear(self, refs: dict[str, Any]) -> None:
        for name in (*(n for n in self.outputs if n == "d_position"), *self.scratch):
            refs[name][...] = jnp.zeros_like(refs[name])

    def add(
        self, refs: dict[str, Any], d_nm: jax.Array, q: Tokens, k: Tokens, rule: MaskRule
    ) -> None:
        """Adds a tile's gradient, summed over its heads; q [N, 1] and k [1, M]."""
        if not self.outputs:
            return
        allow = rule.between(q, k)
        if "d_position" in self.outputs:
            self._add_position(refs["d_position"], d_nm, q.position, k.position, allow)
        if "d_time" in self.outputs:
            bucket = bias_lib.bucket(q, k)
            least = jnp.min(jnp.where(allow, bucket, FAR))
            most = jnp.max(jnp.where(allow, bucket, -1))

            def one(b: jax.Array, _: None) -> None:
                of_lane = jnp.sum(jnp.where(bucket == b, d_nm, 0.0), axis=0, keepdims=True)
                parts = [of_lane[:, i : i + LANES] for i in range(0, d_nm.shape[1], LANES)]
                refs["time_sum"][pl.ds(b, 1), :] += functools.reduce(jnp.add, parts)

            jax.lax.fori_loop(least, most + 1, one, None)

    def _add_position(
        self, sums: Any, d_nm: jax.Array, q_position: jax.Array, k_position: jax.Array,
        allow: jax.Array,
    ) -> None:  # fmt: skip
        shape = d_nm.shape
        q_nm = jnp.broadcast_to(q_position, shape)
        k_nm = jnp.broadcast_to(k_position, shape)
        q_most = jnp.max(jnp.where(allow, q_nm, -FAR))
        q_least = jnp.min(jnp.where(allow, q_nm, FAR))
        k_most = jnp.max(jnp.where(allow, k_nm, -FAR))
        k_least = jnp.min(jnp.where(allow, k_nm, FAR))
        d_nm = jnp.where(allow, d_nm, 0.0)
        N, M = shape

        def of_keys(b: jax.Array, _: None) -> None:
            first = k_least + (b << 7)
            at_bm = jax.lax.broadcasted_iota(jnp.int32, (LANES, M), 0) + first == k_position
            by_key_nb = _exact(d_nm, at_bm.astype(jnp.float32), 1, 1)

            def of_queries(a: jax.Array, _: None) -> None:
                newest = q_most - (a << 7)
                at_na = newest - jax.lax.broadcasted_iota(jnp.int32, (N, LANES), 1) == q_position
                both_ab = _exact(at_na.astype(jnp.float32), by_key_nb, 0, 0)
                self._add_diagonals(sums, both_ab, first - newest + self.size // 2)

            jax.lax.fori_loop(0, ((q_most - q_least) >> 7) + 1, of_queries, None)

        @pl.when(q_most >= q_least)
        def _() -> None:
            jax.lax.fori_loop(0, ((k_most - k_least) >> 7) + 1, of_keys, None)

    def _add_diagonals(self, sums: Any, both_ab: jax.Array, origin: jax.Array) -> None:
        """Entry (a, b) to table row origin + a + b, clipped to the table."""
        wide = jnp.concatenate([both_ab, jnp.zeros_like(both_ab)], axis=1)
        turned = pltpu.roll(wide, 0, 1, stride=1, stride_axis=0)
        line = jnp.sum(turned, axis=0, keepdims=True)  # [1, 256]: by a + b
        row = origin + jax.lax.broadcasted_iota(jnp.int32, line.shape, 1)
        last = self.size - 1
        # What lies beyond the table belongs to its ends.
        below = jnp.sum(jnp.where(row < 0, line, 0.0), axis=1, keepdims=True)
        above = jnp.sum(jnp.where(row > last, line, 0.0), axis=1, keepdims=True)
        line = jnp.where((row >= 0) & (row <= last), line, 0.0)
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        line = jnp.concatenate([line, jnp.zeros((1, LANES), jnp.float32)], axis=1)
        line = jnp.broadcast_to(line, (8, 3 * LANES))
        line = pltpu.roll(line, origin & (LANES - 1), 1)[:1]
        start = jnp.clip((origin >> 7) + BEFORE, 0, sums.shape[2] - 3)
        for i in range(3):
            sums[0, 0, pl.ds(start + i, 1), :] += line[:, i * LANES : (i + 1) * LANES]
        sums[0, 0, BEFORE : BEFORE + 1, :] += jnp.where(lane == 0, below, 0.0)
        end = BEFORE + last // LANES
        sums[0, 0, end : end + 1, :] += jnp.where(lane == last % LANES, above, 0.0)

    def finish(self, refs: dict[str, Any]) -> None:
        """Sums over lanes by a product, which leaves the buckets along the lanes."""
        if "d_time" in self.outputs:
            ones = jnp.ones((8, LANES), jnp.float32)
            refs["d_time"][0, 0] = _exact(ones, refs["time_sum"][...], 1, 1)

    def gradients(self, found: dict[str, jax.Array]) -> bias_lib.RelativeBias | None:
        """Of the tables, from every row's and group's outputs."""
        if self.bias is None:
            return None
        position = time = None
        if "d_position" in found:
            flat = found["d_position"][:, :, BEFORE:].sum(axis=(0, 1)).reshape(-1)[: self.size]
            position = flat.astype(self.bias.position.dtype)
        if "d_time" in found:
            summed = found["d_time"][:, :, 0].sum(axis=(0, 1))
            behind = bias_lib.TIME_BUCKETS - LANES
            time = jnp.pad(summed, (0, behind)).astype(self.bias.time.dtype)
        return bias_lib.RelativeBias(position=position, time=time)


def _take(row: jax.Array, index: jax.Array) -> jax.Array:
    """row[0, index] for row [1, 128] and index [N, M] in 0 to 127, M a multiple of 128."""
    found = []
    for start in range(0, index.shape[1], LANES):
        part = index[:, start : start + LANES]
        table = jnp.broadcast_to(row, part.shape)
        found.append(jnp.take_along_axis(table, part, axis=1, mode="promise_in_bounds"))
    return jnp.concatenate(found, axis=1)


def _exact(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
