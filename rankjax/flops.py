"""Exact FLOPs of a function, counted over its jaxpr, and their polynomial in sequence lengths.

A multiply-add is 2 FLOPs: a product of [M, K] and [K, N] is 2 M N K. Every other arithmetic
primitive is 1 per number that it writes, transcendental ones (exp, tanh, erf, logistic) too.
Reductions, running sums, sorts and adding scatters are 1 per number that they read. Numbers are
floating-point ones: arithmetic on integers and booleans (positions, masks) and comparisons are 0,
and so is what only moves or makes data (gather, select, transpose, reshape, broadcast, slice,
concatenate, iota, dtype conversion, random bits, collectives). Papers print the matmul part.
"""

import collections
import dataclasses
import fractions
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


MATMUL = frozenset({"dot_general", "conv_general_dilated"})

# 1 per element of the first output, where that is floating-point.
ELEMENTWISE = _names(
    """
    abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp cos cosh digamma div erf
    erf_inv erfc exp exp2 expm1 floor integer_pow lgamma log log1p log2 logistic max min mul neg
    nextafter pow reciprocal rem round rsqrt sign sin sinh sqrt square sub tan tanh
    """
)

# 1 per element of the first operand, where that is floating-point.
READING = _names(
    """
    approx_top_k argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce reduce_and
    reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_window reduce_window_max
    reduce_window_min reduce_window_sum reduce_xor sort top_k
    """
)

# 1 per element of the updates.
ADDING_SCATTERS = _names("scatter-add scatter-sub scatter-mul scatter-min scatter-max")

FREE = _names(
    """
    after_all all_gather all_gather_invariant all_to_all and axis_index bitcast_convert_type
    broadcast_in_dim clz eq ge gt is_finite le lt ne not or population_count shift_left
    shift_right_arithmetic shift_right_logical xor concatenate convert_element_type copy
    create_token dce_sink debug_callback debug_print device_put dynamic_slice
    dynamic_update_slice empty empty2 gather iota
    layout_constraint name optimization_barrier pad philox2x32 philox4x32 platform_index pmax pmin
    ppermute psum psum_invariant pvary random_bits random_clone random_fold_in random_seed
    random_split random_unwrap random_wrap reduce_precision reduce_scatter reshape reshard rev
    rng_bit_generator rng_uniform scatter select_n sharding_constraint slice split squeeze stack
    stop_gradient threefry2x32 threefry4x32 tie tile transpose unstack zeros_like
    """
)

# Most bfloat16 FLOPs a second of one device, dense, as the vendors' data sheets print it; by
# `jax.Device.device_kind`.
PEAK = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}

FAR = 100  # how far beyond a break `Piecewise.fit` looks for breaks that it was not told

# Calls, and where their jaxpr is.
CALLS = {
    **dict.fromkeys(("jit", "pjit", "checkpoint", "remat2", "composite", "shard_map"), "jaxpr"),
    **dict.fromkeys(("call", "closed_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """total = matmul + elementwise (everything else, reductions included) = sum(by_primitive)."""

    matmul: int
    elementwise: int
    by_primitive: dict[str, int]

    @property
    def total(self) -> int:
        return self.matmul + self.elementwise


def count(
    fn: Callable[..., Any], *args: Any, trip_counts: Sequence[int] = (), **kwargs: Any
) -> Flops:
    """FLOPs of one call of fn, from its jaxpr: nothing is computed, nothing compiled.

    A scan counts its body `length` times; a cond the branch with the largest total, or, where it
    selects by platform (`platform_dependent`), the default; a shard_map its body on every device.
    What remat computes again stands in the jaxpr of a gradient, and counts there.

    Args:
      args, kwargs: pytrees of arrays or jax.ShapeDtypeStruct; bind flags and strings with
        functools.partial.
      trip_counts: how often each while loop runs, in the order of the program (a loop inside a
        scan or another loop stands there once).
    Raises:
      ValueError: a while loop without a trip count, or more trip counts than loops.
      NotImplementedError: an unknown primitive, or one that hides its work (a Pallas kernel);
        trace with implementation="reference" instead.
    """
    trips = iter(trip_counts)
    counts = _count_jaxpr(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr, trips)
    left = len(list(trips))
    if left:
        raise ValueError(
            f"flops.count: {len(trip_counts)} trip_counts given, the function has "
            f"{len(trip_counts) - left} while loops"
        )
    matmul = sum(n for name, n in counts.items() if name in MATMUL)
    elementwise = sum(counts.values()) - matmul
    return Flops(matmul=matmul, elementwise=elementwise, by_primitive=dict(sorted(counts.items())))


def _count_jaxpr(jaxpr: Any, trips: Iterator[int]) -> collections.Counter[str]:
    total: collections.Counter[str] = collections.Counter()
    for eqn in jaxpr.eqns:
        total.update(_count_equation(eqn, trips))
    return total


def _count_equation(eqn: Any, trips: Iterator[int]) -> collections.Counter[str]:
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        body = _count_jaxpr(_open(params[CALLS[name]]), trips)
        return _times(body, _devices(eqn) if name == "shard_map" else 1)
    if name == "scan":
        return _times(_count_jaxpr(_open(params["jaxpr"]), trips), params["length"])
    if name == "while":
        return _count_while(params, trips)
    if name == "cond":
        return _count_cond(params, trips)
    if name in FREE:
        return collections.Counter()
    if name == "dot_general":
        n = _dot_general(eqn)
    elif name == "conv_general_dilated":
        n = _convolution(eqn)
    elif name in ELEMENTWISE:
        n = _numbers(eqn.outvars[0])
    elif name == "polynomial":  # Horner: operands are x and the degree + 1 coefficients
        n = 2 * (len(eqn.invars) - 2) * _size(eqn.outvars[0])
    elif name == "one_minus_square":
        n = 2 * _size(eqn.outvars[0])
    elif name in READING:
        n = _numbers(eqn.invars[0])
    elif name in ADDING_SCATTERS:
        n = _numbers(eqn.invars[2])
    else:
        raise NotImplementedError(
            f"flops.count: primitive {name!r} has no rule; a kernel that hides its work is counted "
            'by its implementation="reference", a new primitive needs a line in rankjax/flops.py'
        )
    return collections.Counter({name: n} if n else {})


def _count_while(params: dict[str, Any], trips: Iterator[int]) -> collections.Counter[str]:
    trip_count = next(trips, None)
    if trip_count is None:
        raise ValueError(
            "flops.count: a while loop's number of trips is not in the jaxpr; found no entry of "
            f"trip_counts for the loop with body {str(_open(params['body_jaxpr']))[:200]}"
        )
    # The condition is evaluated once more than the body.
    total = _times(_count_jaxpr(_open(params["cond_jaxpr"]), trips), trip_count + 1)
    total.update(_times(_count_jaxpr(_open(params["body_jaxpr"]), trips), trip_count))
    return total


def _count_cond(params: dict[str, Any], trips: Iterator[int]) -> collections.Counter[str]:
    branches = [_open(branch) for branch in params["branches"]]
    platforms = params.get("branches_platforms")
    if platforms is not None:
        if None not in platforms:
            raise NotImplementedError(
                f"flops.count: platform_dependent over {platforms} has no default branch"
            )
        return _count_jaxpr(branches[platforms.index(None)], trips)
    return max((_count_jaxpr(branch, trips) for branch in branches), key=lambda c: c.total())


def _open(jaxpr: Any) -> Any:
    """The Jaxpr of a ClosedJaxpr; a Jaxpr itself."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _times(counts: collections.Counter[str], n: int) -> collections.Counter[str]:
    return collections.Counter({name: n * k for name, k in counts.items() if n * k})


def _devices(eqn: Any) -> int:
    """Over how many devices a shard_map runs its body."""
    shape = dict(eqn.params["mesh"].shape)
    manual = eqn.params.get("manual_axes", shape.keys())
    return math.prod(shape[axis] for axis in manual)


def _size(v: Any) -> int:
    return math.prod(v.aval.shape)


def _numbers(v: Any) -> int:
    """Floating-point elements: 0 for integers and booleans."""
    return _size(v) if jnp.issubdtype(v.aval.dtype, jnp.inexact) else 0


def _dot_general(eqn: Any) -> int:
    """2 x numbers of the result x length of the contraction."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * _numbers(eqn.outvars[0]) * math.prod(shape[i] for i in contracted)


def _convolution(eqn: Any) -> int:
    """2 x elements of the result x the filter's elements per output channel; products with padding
    and with dilation's zeros count."""
    channels = eqn.invars[1].aval.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * _size(eqn.outvars[0]) * (_size(eqn.invars[1]) // channels) if channels else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polynomial:
    """A polynomial of degree <= 2 in a few lengths, such as (S, C).

    FLOPs are traced at a few small lengths, fitted exactly, and evaluated at every sample's own
    lengths: FLOPs without padding, with no trace per shape.
    exponents: per monomial, one exponent per length. coefficients: exact.
    """

    exponents: tuple[tuple[int, ...], ...]
    coefficients: tuple[fractions.Fraction, ...]

    @classmethod
    def fit(cls, points: Sequence[tuple[tuple[int, ...], float]]) -> "Polynomial":
        """The one polynomial through all points ((lengths), value), in rational arithmetic.

        Raises ValueError when the points do not determine it, or when none of degree <= 2 passes
        through all of them (a length is rounded up or cut off somewhere: fit on each side alone).
        More points than monomials (6 for two lengths) make the second check mean something.
        """
        if not points or len({len(lengths) for lengths, _ in points}) != 1:
            raise ValueError(f"flops.Polynomial.fit: {points}, expected points of equal dimension")
        variables = range(len(points[0][0]))
        exponents = tuple(
            tuple(chosen.count(v) for v in variables)
            for degree in range(3)
            for chosen in itertools.combinations_with_replacement(variables, degree)
        )
        rows = [[math.prod(x**e for x, e in zip(xs, es)) for es in exponents] for xs, _ in points]
        values = [fractions.Fraction(value) for _, value in points]
        coefficients = _solve(rows, values)
        if coefficients is None:
            raise ValueError(
                f"flops.Polynomial.fit: the lengths {[xs for xs, _ in points]} do not determine "
                f"{len(exponents)} coefficients"
            )
        for (xs, value), row in zip(points, rows):
            got = sum(c * x for c, x in zip(coefficients, row))
            if abs(got - value) > 1e-9 * max(abs(value), 1):
                raise ValueError(
                    f"flops.Polynomial.fit: at lengths {xs} found {value}, expected {float(got)} "
                    "from the other points: no polynomial of degree <= 2"
                )
        return cls(exponents=exponents, coefficients=tuple(coefficients))

    def __call__(self, lengths: Sequence[np.ndarray | int]) -> np.ndarray:
        """Values, float64, at lengths: one array (or number) per variable, of broadcastable
        shapes."""
        if len(lengths) != len(self.exponents[0]):
            raise ValueError(
                f"flops.Polynomial: {len(lengths)} lengths, expected {len(self.exponents[0])}"
            )
        xs = [np.asarray(x, np.float64) for x in lengths]
        total = np.zeros(np.broadcast_shapes(*(x.shape for x in xs)))
        for es, c in zip(self.exponents, self.coefficients):
            if c:
                total += float(c) * math.prod(x**e for x, e in zip(xs, es))
        return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piecewise:
    """Polynomials of degree <= 2 in (S, C), one per stretch of S, for models that round or cut S.

    With s = ceil(S / unit), piece i holds where breaks[i - 1] <= s <= breaks[i]; neighbours agree
    at a break, as min(s, break) does.
    """

    unit: int
    breaks: tuple[int, ...]
    pieces: tuple[Polynomial, ...]

    @classmethod
    def fit(
        cls, count: Callable[[int, int], float], *, unit: int = 1, breaks: Sequence[int] = ()
    ) -> "Piecewise":
        """From count(S, C), called at few lengths per piece. breaks: lengths S, not s.

        A break stands at every length that the pieces between two given breaks are too short to
        show as a polynomial. Raises ValueError where a piece is none (see `Polynomial.fit`).
        """
        cuts = sorted({-(-b // unit) for b in breaks if b > 0})
        short = [(a, b) for a, b in itertools.pairwise([1, *cuts]) if b - a < 3]
        cuts = sorted({*cuts, *(s for a, b in short for s in range(a, b + 1) if s > 1)})
        starts, ends = [1, *cuts], [*cuts, math.inf]
        pieces = []
        for start, end in zip(starts, ends):
            inside = [start + i for i in range(3) if start + i <= end]
            points = [(s, c) for s in inside for c in (1, 2, 3)]
            if len(inside) == 3:
                points.append((int(min(end, start + FAR)), 4))  # a break not told shows here
            values = [((s, c), count(s * unit, c)) for s, c in points]
            pieces.append(_of_few(values) if len(inside) < 3 else Polynomial.fit(values))
        return cls(unit=unit, breaks=tuple(cuts), pieces=tuple(pieces))

    def __call__(self, lengths: Sequence[np.ndarray | int]) -> np.ndarray:
        """Values, float64, at (S, C): numbers or arrays of broadcastable shapes."""
        s, c = np.broadcast_arrays(*(np.asarray(x, np.int64) for x in lengths))
        # A first piece of one or two lengths says nothing of 0: no event counts as one there.
        first = self.breaks[0] if self.breaks else math.inf
        s = np.maximum(-(-s // self.unit), 1 if first < 3 else 0)
        found = np.zeros(s.shape)
        which = np.searchsorted(self.breaks, s)  # s on a break belongs to the piece before it
        for i, piece in enumerate(self.pieces):
            found = np.where(which == i, piece((s, c)), found)
        return found


def _of_few(values: list[tuple[tuple[int, int], float]]) -> Polynomial:
    """Through one or two lengths s: the straight line between them, for every power of C."""
    ends = sorted({s for (s, _), _ in values})
    own = [Polynomial.fit([((c,), v) for (s, c), v in values if s == end]) for end in ends]
    terms: dict[tuple[int, int], fractions.Fraction] = collections.defaultdict(fractions.Fraction)
    for i, exponents in enumerate(own[0].exponents):
        low, high = own[0].coefficients[i], own[-1].coefficients[i]
        slope = (high - low) / max(ends[-1] - ends[0], 1)
        terms[(1, exponents[0])] += slope
        terms[(0, exponents[0])] += low - slope * ends[0]
    return Polynomial(exponents=tuple(terms), coefficients=tuple(terms.values()))


def _solve(
    rows: list[list[int]], values: list[fractions.Fraction]
) -> list[fractions.Fraction] | None:
    """Least squares of rows @ c = values by the normal equations, exactly; None if singular."""
    n = len(rows[0])
    # [A^T A | A^T b], reduced to [1 | c] by Gauss and Jordan.
    m = [
        [fractions.Fraction(sum(r[i] * r[j] for r in rows)) for j in range(n)]
        + [sum((r[i] * b for r, b in zip(rows, values)), fractions.Fraction(0))]
        for i in range(n)
    ]
    for i in range(n):
        pivot = next((k for k in range(i, n) if m[k][i]), None)
        if pivot is None:
            return None
        m[i], m[pivot] = m[pivot], m[i]
        m[i] = [x / m[i][i] for x in m[i]]
        for k in range(n):
            if k != i and m[k][i]:
                m[k] = [x - m[k][i] * y for x, y in zip(m[k], m[i])]
    return [row[n] for row in m]
