"""A kernel's grid over tiles: its blocks, the list of tiles with work, its operands by name."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rankjax.batch import Tokens
from rankjax.kernels import blocks
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.kernels.hstu_attention import pallas_tpu_bias as tables_lib
from rankjax.kernels.hstu_attention.tiles import Tile
from rankjax.masks import MaskRule

Arrays = tuple[jax.Array, jax.Array, jax.Array]
FIELDS = ("segment", "role", "time", "position", "group", "bias_time")
LANES = 128
VMEM = 8 * 2**20  # bytes for the blocks of a step; the compiler's own temporaries come on top
VMEM_LIMIT = 48 * 2**20  # a v7x core has 64 MiB, the others 128
MASKED = -1e30


def blocks_of(arrays: Arrays, tile: Tile) -> tuple[int, int]:
    """Multiples of the lanes, no longer than the padded sequences."""
    lanes = lambda n: max(1, -(-n // LANES)) * LANES
    asked = [lanes(b) for b in tile[:2]]
    return tuple(min(b, lanes(x.shape[1])) for b, x in zip(asked, arrays))


class Grid:
    """The blocks, the schedule and the operands of one kernel.

    side: "queries", a step of the grid's third axis is a query block and the last axis walks its
    key blocks; "keys", the other way round, and tiles lie [keys, queries].
    """

    def __init__(
        self,
        arrays: Arrays,
        tokens: tuple[Tokens, Tokens],
        bias: bias_lib.RelativeBias | None,
        rule: MaskRule,
        tile: Tile,
        interpret: bool,
        side: str,
        inverse_rn: jax.Array,
        d_rnhv: jax.Array | None = None,
    ) -> None:
        self.arrays, self.rule, self.interpret, self.side = arrays, rule, interpret, side
        self.dtype = arrays[0].dtype
        R, _, H, Q = arrays[0].shape
        V = arrays[2].shape[-1]
        self.q_block, self.k_block = blocks_of(arrays, tile)
        self.heads = _heads_at_once(H, Q, V, self.q_block, self.k_block, self.dtype.itemsize)
        self.tables = tables_lib.Tables(bias)
        pad = lambda x, b: jax.tree.map(lambda x: blocks.padded(x, b), x)
        q_tokens, k_tokens = pad(tokens[0], self.q_block), pad(tokens[1], self.k_block)
        active = blocks.active(rule, q_tokens, k_tokens, self.q_block, self.k_block)
        if side == "keys":
            active = active.swapaxes(1, 2)
        self.outer, self.inner = active.shape[1:]
        self.rows, self.groups = R, H // self.heads
        self.schedule = tuple(x.reshape(-1) for x in blocks.schedule(active))
        heads_first = lambda x, b: blocks.padded(x, b).swapaxes(1, 2)
        self.operands = {
            "q": heads_first(arrays[0], self.q_block),
            "k": heads_first(arrays[1], self.k_block),
            "v": heads_first(arrays[2], self.k_block),
        }
        if d_rnhv is not None:
            self.operands["d"] = heads_first(d_rnhv, self.q_block)
        bits = jax.lax.bitcast_convert_type(inverse_rn.astype(jnp.float32), jnp.int32)
        column = side == "queries"
        self.operands["q_tokens"] = _together(q_tokens, blocks.padded(bits, self.q_block), column)
        self.operands["k_tokens"] = _together(k_tokens, None, not column)

    def first(self) -> jax.Array:
        return pl.program_id(3) == 0

    def last(self) -> jax.Array:
        return pl.program_id(3) == self.inner - 1

    def first_of_row(self) -> jax.Array:
        return (pl.program_id(2) == 0) & self.first()

    def last_of_row(self) -> jax.Array:
        return (pl.program_id(2) == self.outer - 1) & self.last()

    def facing(self, refs: dict[str, Any]) -> tuple[Tokens, Tokens]:
        """Queries and keys whose fields broadcast against each other, as the tile lies."""

        def of(name: str, column: bool) -> Tokens:
            x = refs[name][0]
            take = lambda i: x[:, i : i + 1] if column else x[i : i + 1, :]
            return Tokens(**{field: take(i) for i, field in enumerate(FIELDS)})

        column = self.side == "queries"
        return of("q_tokens", column), of("k_tokens", not column)

    def added_scores(self, refs: dict[str, Any]) -> jax.Array:
        """The bias where a pair is allowed, MASKED elsewhere."""
        q, k = self.facing(refs)
        allow = self.rule.between(q, k)
        return jnp.where(allow, self.tables.look_up(refs, q, k, allow), MASKED)

    def dot(self, x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
        # A float32 product is otherwise one of bfloat16 on a TPU.
        exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        contract = (((x_axis,), (y_axis,)), ((), ()))
        return jax.lax.dot_general(
            x, y, contract, precision=exact, preferred_element_type=jnp.float32
        )

    def scores(self, x: jax.Array, y: jax.Array, scale: float, added: jax.Array) -> jax.Array:
        found = self.dot(x, y, 1, 1)
        return (found if scale == 1 else scale * found) + added

    def whole(self, x_rhnw: jax.Array, length: int) -> jax.Array:
        return x_rhnw.swapaxes(1, 2)[:, :length]

    def _spec(self, side: str, shape: tuple[int, ...], heads: bool, column: bool) -> pl.BlockSpec:
        """Of an operand or output that runs along the queries ("q") or the keys ("k")."""
        outer = (side == "q") == (self.side == "queries")
        n, m = self.outer, self.inner

        def index(r, g, i, j, order, count):
            block = i if outer else order[(r * n + i) * m + j]
            if heads:
                return r, g, block, 0
            return (r, block, 0) if column else (r, 0, block)

        return pl.BlockSpec(shape, index)

    def run(
        self,
        kernel: Any,
        *,
        outputs: dict[str, tuple[str, int, Any]],
        scratch: dict[str, tuple[int, ...]],
        tables: bool = False,
    ) -> dict[str, jax.Array]:
        """Calls the kernel with its references by name; outputs {name: (side, width, dtype)}."""
        size = {"q": self.q_block, "k": self.k_block}
        lengths = {s: self.operands[s].shape[2] for s in "qk"}
        specs, operands = [], []
        for name, x in self.operands.items():
            side = "k" if name in ("k", "v", "k_tokens") else "q"
            if name.endswith("_tokens"):
                column = (side == "q") == (self.side == "queries")
                shape = (1, size[side], 8) if column else (1, 8, size[side])
                specs.append(self._spec(side, shape, heads=False, column=column))
            else:
                shape = (1, self.heads, size[side], x.shape[-1])
                specs.append(self._spec(side, shape, heads=True, column=False))
            operands.append(x)
        names = [*self.operands, *self.tables.operands]
        for x in self.tables.operands.values():
            specs.append(pl.BlockSpec(x.shape, lambda *_: (0, 0)))
            operands.append(x)
        R, H = self.rows, self.groups * self.heads
        out_shapes = [
            jax.ShapeDtypeStruct((R, H, lengths[side], width), dtype)
            for side, width, dtype in outputs.values()
        ]
        out_specs = [
            self._spec(side, (1, self.heads, size[side], width), heads=True, column=False)
            for side, width, _ in outputs.values()
        ]
        out_names = list(outputs)
        kept = dict(scratch)
        if tables:
            for name, shape in self.tables.outputs.items():
                out_names.append(name)
                out_shapes.append(jax.ShapeDtypeStruct((R, self.groups, *shape), jnp.float32))
                out_specs.append(pl.BlockSpec((1, 1, *shape), lambda r, g, *_: (r, g, 0, 0)))
            kept |= self.tables.scratch
        names += [*out_names, *kept]

        def body(order, count, *refs):
            named = dict(zip(names, refs))
            done = count[pl.program_id(0) * self.outer + pl.program_id(2)]
            kernel(named | {"has_work": pl.program_id(3) < done})

        # The tables' sums go on from one block of a row to the next, in their order.
        blocks_of_a_row = "arbitrary" if tables and self.tables.outputs else "parallel"
        found = pl.pallas_call(
            body,
            out_shape=out_shapes,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(R, self.groups, self.outer, self.inner),
                in_specs=specs,
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in kept.values()],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", blocks_of_a_row, "arbitrary"),
                vmem_limit_bytes=VMEM_LIMIT,
            ),
            interpret=self.interpret,
        )(*self.schedule, *operands)
        return dict(zip(out_names, found))


def _together(tokens: Tokens, bits_rn: jax.Array | None, column: bool) -> jax.Array:
    """The fields side by side, int32 [R, N, 8], or one above the other, [R, 8, N]."""
    fields = [getattr(tokens, field) for field in FIELDS]
    zero = jnp.zeros_like(fields[0])
    fields += [zero if bits_rn is None else bits_rn, zero]
    return jnp.stack(fields, axis=2 if column else 1).astype(jnp.int32)


def _heads_at_once(H: int, Q: int, V: int, q_block: int, k_block: int, itemsize: int) -> int:
    """The most heads, a divisor of H, whose blocks fit: two copies in flight, and the sums."""
    lanes = lambda w: -(-w // LANES) * LANES
    one = (q_block + k_block) * (lanes(Q) + lanes(V))
    most = max(1, VMEM // (one * (2 * itemsize + 4)))
    return max(h for h in range(1, H + 1) if H % h == 0 and h <= most)
