"""How a GPU kernel is launched: operands by name, the list of tiles, and what a tile computes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from rankjax import batch, masks
from rankjax.batch import Tokens
from rankjax.kernels import blocks
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.kernels.hstu_attention import pallas_gpu_time
from rankjax.kernels.hstu_attention.tiles import Tile
from rankjax.masks import MaskRule

Arrays = tuple[jax.Array, jax.Array, jax.Array]
FIELDS = ("segment", "role", "time", "position", "group", "bias_time")
LEAST = 16  # of every side of a product on tensor cores
SHARED = 96 * 2**10  # bytes; an L4's multiprocessor has 99 KiB, an H100's 227


def power(n: int) -> int:
    """The least power of two from LEAST on that holds n: Triton's arrays are that long."""
    return max(LEAST, 1 << (n - 1).bit_length())


def fitted(tile: Tile, arrays: Arrays, kernel: str) -> Tile:
    """Powers of two, no longer than the sequences ask for, that any card's shared memory holds.

    kernel: a field of Tiles. Blocks of one side stay, those of the other pass in `stages` copies.
    """
    N, M = arrays[0].shape[1], arrays[1].shape[1]
    queries, keys = (min(power(b), power(n)) for b, n in zip(tile[:2], (N, M)))
    stages = max(1, tile.stages)
    size = arrays[0].dtype.itemsize
    Q, both = (size * n for n in (power(arrays[0].shape[-1]), power(arrays[2].shape[-1])))
    both += Q

    def needed() -> int:
        stay, passing = (keys, queries) if kernel == "d_keys" else (queries, keys)
        return (Q if kernel == "forward" else both) * stay + both * stages * passing

    while needed() > SHARED and (stages > 1 or max(queries, keys) > LEAST):
        if stages > 1:
            stages -= 1
        elif queries > keys:
            queries //= 2
        else:
            keys //= 2
    return tile._replace(queries=queries, keys=keys, stages=stages)


def dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """Summed in float32; exact products of float32 too, which would be tf32 otherwise."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, contract, precision=exact, preferred_element_type=jnp.float32)


class Launch:
    """The operands and the schedule of one kernel.

    side: "queries", a program is a block of queries and walks blocks of keys; "keys", the other way
      round, and tiles lie [keys, queries].
    operands: {name: array}, padded. order [R, outer, inner] lists the blocks with work of every
      program's walk: first the `full` [R, outer] ones that need no mask and hold no context, then
      the others, `count` [R, outer] in all.
    """

    def __init__(
        self,
        arrays: Arrays,
        bias: bias_lib.RelativeBias | None,
        tokens: tuple[Tokens, Tokens],
        rule: MaskRule,
        tile: Tile,
        side: str,
        interpret: bool,
        d_rnhv: jax.Array | None = None,
    ) -> None:
        self.rule, self.tile, self.side, self.interpret = rule, tile, side, interpret
        self.bias, self.dtype = bias, arrays[0].dtype
        self.q_block, self.k_block = tile.queries, tile.keys
        q_tokens, k_tokens = (
            jax.tree.map(lambda x, b=b: blocks.padded(x, b), t)
            for t, b in zip(tokens, (self.q_block, self.k_block))
        )
        order, count, full = self._schedule(q_tokens, k_tokens)
        sizes = {"q": self.q_block, "k": self.k_block, "v": self.k_block, "d": self.q_block}
        given = dict(zip("qkv", arrays)) | ({} if d_rnhv is None else {"d": d_rnhv})
        self.operands = {name: _padded(x, sizes[name]) for name, x in given.items()}
        self.operands |= {"order": order, "count": count, "full": full}
        self.operands |= {"q_tokens": _together(q_tokens), "k_tokens": _together(k_tokens)}
        for name in ("position", "time"):
            if (table := getattr(bias, name, None)) is not None:
                self.operands[name] = table.astype(jnp.float32)
        if "time" in self.operands:
            self.operands["cells"] = jnp.asarray(pallas_gpu_time.cells())

    def _schedule(self, q: Tokens, k: Tokens) -> tuple[jax.Array, jax.Array, jax.Array]:
        q_ranges, k_ranges = masks.ranges(q, self.q_block), masks.ranges(k, self.k_block)
        active = self.rule.possible(q_ranges, k_ranges)
        without = lambda x: ~x.of(batch.CONTEXT).alone
        full = self.rule.certain(q_ranges, k_ranges)
        full &= without(q_ranges)[:, :, None] & without(k_ranges)[:, None, :]
        if self.side == "keys":
            active, full = active.swapaxes(1, 2), full.swapaxes(1, 2)
        return *blocks.schedule(active, full), jnp.sum(full, axis=2, dtype=jnp.int32)

    def pad_queries(self, x_rn: jax.Array) -> jax.Array:
        return blocks.padded(x_rn, self.q_block)

    def queries(self, i: jax.Array) -> Any:
        return pl.ds(i * self.q_block, self.q_block)

    def keys(self, j: jax.Array) -> Any:
        return pl.ds(j * self.k_block, self.k_block)

    def q_tokens(self, refs: dict[str, Any], r: jax.Array, i: jax.Array) -> Tokens:
        """Of one block, as a column or a row: they broadcast against the keys'."""
        return _tokens(refs["q_tokens"], r, self.queries(i), column=self.side == "queries")

    def k_tokens(self, refs: dict[str, Any], r: jax.Array, j: jax.Array) -> Tokens:
        return _tokens(refs["k_tokens"], r, self.keys(j), column=self.side == "keys")

    def walk(
        self,
        refs: dict[str, Any],
        r: jax.Array,
        block: jax.Array,
        step: Callable[[jax.Array, bool, Any], Any],
        sums: Any,
    ) -> Any:
        """step(the other side's block, is the tile full?, sums), over a program's list.

        Two loops: a mask costs more instructions a pair than the rest of a tile without bias.
        """
        at = lambda full: lambda w, sums: step(refs["order"][r, block, w], full, sums)
        full = refs["full"][r, block]
        sums = jax.lax.fori_loop(0, full, at(True), sums)
        return jax.lax.fori_loop(full, refs["count"][r, block], at(False), sums)

    def relative(self, refs: dict[str, Any], q: Tokens, k: Tokens, full: bool) -> Any:
        """The bias of every pair of a tile."""
        total = 0.0
        if "position" in refs:
            index = bias_lib.position_index(q, k, refs["position"].shape[0])
            total = plgpu.load(refs["position"].at[index])
        if "time" in refs:
            bucket = pallas_gpu_time.bucket(refs["cells"], q, k, with_context=not full)
            total += plgpu.load(refs["time"].at[bucket])
        return total

    def silu(
        self, scores: jax.Array, q: Tokens, k: Tokens, full: bool
    ) -> tuple[jax.Array, jax.Array]:
        """(SiLU, its slope), both 0 where a pair is not allowed."""
        # For bfloat16, whose rounding is coarser, by the card's own tanh.
        approximate = self.dtype == jnp.bfloat16 and not self.interpret
        half = 0.5 * scores
        gate = 0.5 + 0.5 * (plgpu.approx_tanh(half) if approximate else jnp.tanh(half))
        if not full:
            gate = jnp.where(self.rule.between(q, k), gate, 0.0)
        return scores * gate, gate * (1 + scores * (1 - gate))

    def run(
        self,
        name: str,
        kernel: Callable[..., None],
        outputs: dict[str, tuple[int, ...]],
        dtype: jnp.dtype | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> dict[str, jax.Array]:
        """Calls kernel(references by name, *program); outputs {name: shape}, of `dtype` or q's.

        program: (row, head, block), or the indices of another `grid`. Blocks come in falling order,
        as under a causal rule the last has most to do. Profilers show `name`.
        """
        names = [*self.operands, *outputs]
        R, n, _ = self.operands["order"].shape
        H = self.operands["q"].shape[2]

        def body(*refs: Any) -> None:
            named = dict(zip(names, refs))
            if grid is None:
                block = n - 1 - pl.program_id(0)
                kernel(named, pl.program_id(2), pl.program_id(1), block)
            else:
                kernel(named, *(pl.program_id(axis) for axis in range(len(grid))))

        body.__name__ = name
        found = pl.pallas_call(
            body,
            grid=(n, H, R) if grid is None else grid,
            out_shape=[jax.ShapeDtypeStruct(s, dtype or self.dtype) for s in outputs.values()],
            compiler_params=plgpu.CompilerParams(
                num_warps=self.tile.warps, num_stages=self.tile.stages
            ),
            interpret=self.interpret,
        )(*self.operands.values())
        return dict(zip(outputs, found))


def _padded(x: jax.Array, block: int) -> jax.Array:
    """Zeros up to a multiple of the block and a power of two of the width."""
    x = blocks.padded(x, block)
    return jnp.pad(x, [(0, 0)] * 3 + [(0, power(x.shape[-1]) - x.shape[-1])])


def _together(tokens: Tokens) -> jax.Array:
    """int32 [R, fields, N]."""
    return jnp.stack([getattr(tokens, field) for field in FIELDS], axis=1).astype(jnp.int32)


def _tokens(ref: Any, r: jax.Array, places: Any, column: bool) -> Tokens:
    shape = (-1, 1) if column else (1, -1)
    return Tokens(**{f: ref[r, i, places].reshape(shape) for i, f in enumerate(FIELDS)})
