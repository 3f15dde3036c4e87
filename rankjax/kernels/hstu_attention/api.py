"""The one public function of this folder."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rankjax.batch import CONTEXT, PAD, Tokens
from rankjax.kernels import partition
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.kernels.hstu_attention import pallas_gpu, pallas_tpu, reference, xla
from rankjax.kernels.hstu_attention import tiles as tiles_lib
from rankjax.masks import MaskRule

_TILED = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
IMPLEMENTATIONS = ("reference", *_TILED)
_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float64)


def hstu_attention(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    rule: MaskRule,
    *,
    normalizer: float | jax.Array,
    scale: float = 1.0,
    bias: bias_lib.RelativeBias | None = None,
    implementation: str | None = None,
    tile: tuple[int, ...] | tiles_lib.Tiles | None = None,
) -> jax.Array:
    """out = A V with A = SiLU(scale * Q K^T + bias) / normalizer, masked after the SiLU.

    Jagged rows: samples of different lengths may share a row (their tokens differ in `segment`);
    tiles in which nobody reads anybody are skipped, forward and backward. Sums have a fixed order:
    the same input gives the same bits. The gradients of the bias tables on a GPU are the exception
    where XLA makes them: with "xla", and where pairs are few and neither `implementation` nor
    `tile` is given. "pallas_gpu" has a fixed order there too.

    Args:
      q_rnhq: queries [R, N, H, Q], float32 or bfloat16 (float64 where JAX has it enabled).
      k_rmhq, v_rmhv: keys [R, M, H, Q] and values [R, M, H, V], dtype of the queries.
      q_tokens, k_tokens: what the rule and the bias know of the tokens, int32 [R, N] and [R, M].
        The segments of the tokens of one role ascend along a row, padding apart; those of context
        may start over once.
      rule: who may read whom.
      normalizer: n of eq. 2, the padded maximum in the research code; > 0; a number or [R, N]. A
        constant to the gradient.
      scale: multiplies q.k before the SiLU; 1 in the paper, 1/sqrt(Q) in DLRM-v3.
      bias: tables of relative position [2P - 1] and of time buckets [129], float32, differentiable;
        None = no bias. Its times are bias_time: the query's own against the key's.
      implementation: one of IMPLEMENTATIONS; None = the best for the platform compiled for.
        "reference" holds [R, H, N, M] arrays, the others only where they are small. A Pallas
        kernel compiled for another platform is interpreted: right, and slow.
      tile: (queries, keys) of one tile, for a GPU (queries, keys, warps, stages), or `Tiles` with
        one for every kernel; a TPU rounds up to multiples of 128, a GPU to powers of two from 16
        on, and down to what its shared memory holds. None = what was measured best for the
        kind of device (tiles.json), or all pairs in one piece where they are few.

    Returns: [R, N, H, V], dtype of v, summed in float32. A row that may read nothing is 0.
    Raises:
      ValueError: shapes or dtypes do not fit together, segments descend (seen where the tokens are
        no tracers), or the implementation is unknown.
      NotImplementedError: a Pallas kernel is forced on float64, or a TPU's on one row of so many
        tiles that their list exceeds its scalar memory.
    Source: HSTU, arXiv 2402.17152, §3.2, eq. 2.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"hstu_attention: implementation={implementation!r}, expected None or one of "
            f"{IMPLEMENTATIONS}"
        )
    _check(q_rnhq, k_rmhq, v_rmhv, q_tokens, k_tokens, normalizer, bias)
    _check_tile(tile)
    normalizer = jax.lax.stop_gradient(normalizer)
    arrays, tokens = (q_rnhq, k_rmhq, v_rmhv), (q_tokens, k_tokens)
    if implementation == "reference":
        return reference.hstu_attention(
            *arrays, *tokens, rule, normalizer, scale=float(scale), bias=bias
        )
    if q_rnhq.dtype == jnp.float64:
        if implementation not in (None, "xla"):
            raise NotImplementedError(
                f"hstu_attention: implementation={implementation!r} takes float32 and bfloat16, "
                "found float64; use 'xla' or 'reference'"
            )
        implementation = "xla"
    wide = jnp.promote_types(q_rnhq.dtype, jnp.float32)
    inverse_rn = jnp.broadcast_to(1 / jnp.asarray(normalizer, wide), q_rnhq.shape[:2])
    tiles = tiles_lib.Tiles.same(tile) if isinstance(tile, tuple) else tile
    call = _Call(implementation=implementation, rule=rule, scale=float(scale), tiles=tiles)
    args = arrays, bias, tokens, inverse_rn
    return partition.run(call, args, ("r.h.", "", "r.", "r."), "r.h.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static about a call."""

    implementation: str | None
    rule: MaskRule
    scale: float
    tiles: tiles_lib.Tiles | None

    def __call__(
        self,
        arrays: xla.Arrays,
        bias: bias_lib.RelativeBias | None,
        tokens: tuple[Tokens, Tokens],
        inverse_rn: jax.Array,
    ) -> jax.Array:
        """Of one device: its rows and heads decide whether pairs are few."""
        (R, N, H, _), M = arrays[0].shape, arrays[1].shape[1]
        few = R * H * N * M <= xla.PAIRS
        if self.implementation in (None, "xla") and self.tiles is None and few:
            return xla.whole(arrays, bias, tokens, inverse_rn, self.rule, self.scale)
        return _tiled(self, arrays, bias, tokens, inverse_rn)

    def run(self, direction: str, arrays: xla.Arrays, *args: jax.Array) -> jax.Array:
        """`forward` or `backward` of the implementation, or of the platform compiled for."""
        width = max(arrays[0].shape[-1], arrays[2].shape[-1])

        def of(name: str, **more: bool) -> functools.partial:
            tiles = self.tiles or tiles_lib.best(name, width)
            options = {"rule": self.rule, "scale": self.scale, "tiles": tiles, **more}
            return functools.partial(getattr(_TILED[name], direction), **options)

        if self.implementation == "xla":
            return of("xla")(arrays, *args)
        # The platform compiled for, not the one we run on: a plan for a pod is made on a CPU.
        kernels = {"tpu": "pallas_tpu"} | ({"cuda": "pallas_gpu"} if pallas_gpu.suited() else {})
        if self.implementation is not None:
            kernels = {p: name for p, name in kernels.items() if name == self.implementation}
        elsewhere = of(self.implementation, interpret=True) if self.implementation else of("xla")
        branches = {platform: of(name) for platform, name in kernels.items()}
        return jax.lax.platform_dependent(arrays, *args, **branches, default=elsewhere)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(
    call: _Call,
    arrays: xla.Arrays,
    bias: bias_lib.RelativeBias | None,
    tokens: tuple[Tokens, Tokens],
    inverse_rn: jax.Array,
) -> jax.Array:
    return call.run("forward", arrays, bias, tokens, inverse_rn)


def _tiled_forward(call: _Call, *args: Any) -> tuple[jax.Array, Any]:
    return _tiled(call, *args), args


def _tiled_backward(call: _Call, args: Any, d_rnhv: jax.Array) -> tuple[Any, ...]:
    arrays, bias = call.run("backward", *args, d_rnhv)
    return arrays, bias, None, None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _check_tile(tile: tuple[int, ...] | tiles_lib.Tiles | None) -> None:
    if tile is None or isinstance(tile, tiles_lib.Tiles):
        return
    if not 2 <= len(tile) <= 4 or any(int(b) != b or b < 1 for b in tile):
        raise ValueError(
            f"hstu_attention: tile={tile}, expected (queries, keys) or (queries, keys, "
            "warps, stages), all >= 1"
        )


def _check_segments(name: str, tokens: Tokens) -> None:
    """Raises ValueError where the segments of one role descend; tracers are not looked into."""
    if any(isinstance(x, jax.core.Tracer) for x in (tokens.segment, tokens.role)):
        return
    segment, role = np.asarray(tokens.segment), np.asarray(tokens.role)
    for kind in set(np.unique(role)) - {PAD}:
        starts_over = kind == CONTEXT  # once: MTGR lays features and events side by side
        for r in range(len(segment)):
            (places,) = np.nonzero(role[r] == kind)
            (falls,) = np.nonzero(np.diff(segment[r, places]) < 0)
            if len(falls) > starts_over:
                n = places[falls[-1] + 1]
                raise ValueError(
                    f"hstu_attention: {name}.segment of row {r} is {segment[r, n]} at token {n}, "
                    f"behind a larger one of the same role ({kind}); expected ascending segments"
                )


def _check(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    normalizer: float | jax.Array,
    bias: bias_lib.RelativeBias | None,
) -> None:
    """Raises ValueError where shapes or dtypes do not fit together."""
    for name, x in (("q", q_rnhq), ("k", k_rmhq), ("v", v_rmhv)):
        if x.ndim != 4:
            raise ValueError(f"hstu_attention: {name} has shape {x.shape}, expected four axes")
    R, N, H, Q = q_rnhq.shape
    M = k_rmhq.shape[1]
    expected = (("k", k_rmhq.shape, (R, M, H, Q)), ("v", v_rmhv.shape[:3], (R, M, H)))
    tokens = (("q_tokens", q_tokens, (R, N)), ("k_tokens", k_tokens, (R, M)))
    expected += tuple(
        (f"{name}.{field}", x.shape, shape)
        for name, t, shape in tokens
        for field, x in vars(t).items()
    )
    if bias is not None and bias.time is not None:
        expected += (("bias.time", bias.time.shape, (bias_lib.TIME_BUCKETS,)),)
    if jnp.ndim(normalizer):
        expected += (("normalizer", jnp.shape(normalizer), (R, N)),)
    for name, found, want in expected:
        if tuple(found) != want:
            raise ValueError(
                f"hstu_attention: {name} has shape {tuple(found)}, expected {want} beside q of "
                f"shape {q_rnhq.shape}"
            )
    if bias is not None and bias.position is not None:
        shape = bias.position.shape
        if len(shape) != 1 or shape[0] % 2 == 0:
            raise ValueError(
                f"hstu_attention: bias.position has shape {shape}, expected (2P - 1,), an odd "
                "number of relative positions"
            )
    dtypes = [str(x.dtype) for x in (q_rnhq, k_rmhq, v_rmhv)]
    if len(set(dtypes)) > 1 or q_rnhq.dtype not in _FLOATS:
        raise ValueError(
            f"hstu_attention: q, k, v are {dtypes}, expected one of float32, bfloat16, float64"
        )
    for name, t, _ in tokens:
        for field, x in vars(t).items():
            if not jnp.issubdtype(x.dtype, jnp.integer):
                raise ValueError(f"hstu_attention: {name}.{field} is {x.dtype}, expected integers")
        _check_segments(name, t)
    for name in ("position", "time"):
        table = getattr(bias, name, None)
        if table is not None and table.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"hstu_attention: bias.{name} is {table.dtype}, expected float32: its gradient "
                "sums as many pairs as there are"
            )
    if isinstance(normalizer, (int, float)) and not 0 < normalizer < math.inf:
        raise ValueError(f"hstu_attention: normalizer={normalizer}, expected a number > 0")
