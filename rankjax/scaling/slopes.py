"""Straight lines in log FLOPs: trends, the slope of an axis, and comparisons inside a shared range.

Ladders have four to eight sizes and one to three seeds: too few for a bootstrap, whose intervals
come out too narrow there. So these intervals are Student t intervals of a regression within pairs
(every seed has its own level), and where the points leave the line by more than the seeds explain
(an F test), the means of the sizes count as the only independent points.
"""

import dataclasses

import numpy as np
import polars
from scipy import stats

from rankjax.scaling import fit, support

SIZE_COLUMNS = ("tokens", "history", "layers", "width")
BENT = 0.05  # level of the test against a straight line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """y = a + b log10(x), with 95% t intervals of "a" and "b" (empty where none can be had).

    ok: at least three distinct x over a factor of four, and an interval; else `reasons` says why.
    residuals [n]; covariance [2, 2] of (a, b); freedom: degrees of freedom of the intervals.
    """

    a: float
    b: float
    intervals: dict[str, fit.Interval]
    residuals: np.ndarray
    ok: bool
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    covariance: np.ndarray
    freedom: int
    x_range: fit.Interval

    def predict(self, x) -> np.ndarray:
        """y on the line at x [m] -> [m], float64."""
        return self.a + self.b * np.log10(np.asarray(x, np.float64))

    def band(self, x) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper 95% limits of the line (not of a new point) at x [m] -> ([m], [m])."""
        design = np.stack([np.ones_like(x, float), np.log10(np.asarray(x, np.float64))], -1)
        error = np.sqrt(np.einsum("mi,ij,mj->m", design, self.covariance, design))
        half = stats.t.isf((1 - fit.LEVEL) / 2, max(self.freedom, 1)) * error
        return self.predict(x) - half, self.predict(x) + half


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slope:
    """The change of a metric per doubling of training FLOPs along one axis, all else at the base.

    low, high: 95% interval, None where the data give none. levels, seeds: distinct sizes (or
    budgets) and seeds behind it. method: how the interval was made, in words.
    better: +1 if the interval lies on the improving side of 0, -1 on the other, 0 if it holds 0 or
    the sizes span less than one doubling. doublings: log2 of the largest over the smallest FLOPs.
    """

    architecture: str
    axis: str
    metric: str
    per_doubling: float
    low: float | None
    high: float | None
    levels: int
    seeds: int
    points: int
    method: str
    better: int
    doublings: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a and b differ (a - b) over the range of x both cover; 95% limits at its two ends.

    at, difference, low, high: [m] along the range. winner: "a", "b" or None (undecided).
    """

    at: np.ndarray
    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    winner: str | None
    reason: str


def lower_is_better(metric: str) -> bool:
    """True for losses (ne, log_loss), False for the AUCs and per-request metrics."""
    return metric in ("ne", "log_loss")


def log_linear(x, y, *, seed_groups=None) -> Line:
    """Fits y = a + b log10(x), x [n] > 0, y [n] finite; see `Line`.

    seed_groups [n]: rows with one label are seeds of one size; None: equal x, one size.
    Source: the form in which LONGER and RankMixer print their AUC (see the report).
    Raises: ValueError: shapes differ, x is not above 0, or y is not finite.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x has shape {x.shape}, y {y.shape}; expected the same [n]")
    if not (np.isfinite(x).all() and (x > 0).all() and np.isfinite(y).all()):
        raise ValueError("x must be finite and above 0, y finite")
    sizes = np.unique(x if seed_groups is None else np.asarray(seed_groups), return_inverse=True)[1]
    span = (float(x.min()), float(x.max())) if len(x) else (np.nan, np.nan)
    distinct = len(np.unique(x))
    if distinct < 2:
        why = f"only {distinct} distinct sizes; a line needs at least 3 to show its error"
        return Line(
            **dict(a=np.nan, b=np.nan, intervals={}, residuals=np.full(len(x), np.nan), ok=False),
            **dict(reasons=(why,), warnings=(), covariance=np.full((2, 2), np.nan), freedom=0),
            x_range=span,
        )
    design = np.stack([np.ones_like(x), np.log10(x)], -1)
    solved = _regress(design, y, np.zeros(len(x), int), sizes)
    (a, b), covariance, freedom = solved.coefficients, solved.covariance, solved.freedom
    reasons = support.range_reasons({"x": x})
    if distinct < 3:
        reasons += (f"only {distinct} distinct sizes; a line needs at least 3 to show its error",)
    intervals = {}
    if freedom:
        t = stats.t.isf((1 - fit.LEVEL) / 2, freedom)
        for i, name in enumerate("ab"):
            half = t * np.sqrt(covariance[i, i])
            intervals[name] = tuple(float(solved.coefficients[i] + s * half) for s in (-1, 1))
    warnings = ("the points bend away from a straight line",) if solved.bent else ()
    if intervals and intervals["b"][0] <= 0 <= intervals["b"][1]:
        warnings += ("the interval of the slope includes 0",)
    return Line(
        **dict(a=float(a), b=float(b), intervals=intervals, residuals=y - design @ (a, b)),
        **dict(ok=not reasons, reasons=reasons, warnings=warnings, covariance=covariance),
        **dict(freedom=freedom, x_range=span),
    )


def axis_rows(rows: polars.DataFrame, architecture: str, axis: str) -> polars.DataFrame:
    """The trials of one architecture that move only `axis` ("T", "S", "L", "D") from its base.

    The base's own trial may stand under another axis, so trials of the other axes whose remaining
    sizes equal this ladder's are taken too; each (size, budget, seed) once.
    """
    own = rows.filter((polars.col("architecture") == architecture) & (polars.col("axis") == axis))
    fixed = [c for c in SIZE_COLUMNS if c != _moved_column(own, axis) and c in own.columns]
    fixed = [c for c in fixed if own[c].n_unique() == 1]
    if own.is_empty() or len(fixed) < 2:
        return own
    same = polars.col("architecture") == architecture
    for column in fixed:
        same = same & polars.col(column).eq_missing(polars.lit(own[column][0]))
    both = polars.concat([own, rows.filter(same & (polars.col("axis") != axis))])
    key = [c for c in (*SIZE_COLUMNS, "budget", "seed") if c in both.columns]
    return both.unique(key, keep="first", maintain_order=True).sort("training_flops", "seed")


def axis_slope(rows: polars.DataFrame, metric: str = "ne", axis: str | None = None) -> Slope:
    """The test metric's change per doubling of training FLOPs over `rows` (one architecture).

    rows: final trials that move one axis only (see `axis_rows`), of one budget; or, for the axis
    "data", trials of one or more sizes at several budgets. Seeds are paired: every seed (for the
    data axis, every size and seed) has its own level, and only differences within it count.
    Raises: ValueError: more than one architecture, or none.
    """
    names = rows["architecture"].unique().to_list()
    if len(names) != 1:
        raise ValueError(f"axis_slope: rows of {names}, expected one architecture")
    axis = axis or rows["axis"][0]
    column = f"test_{metric}"
    rows = rows.filter(polars.col(column).is_not_null() & polars.col(column).is_finite())
    x = np.log2(rows["training_flops"].to_numpy().astype(np.float64))
    level_columns = ["budget"] if axis == "data" else [*SIZE_COLUMNS, "axis_value"]
    levels = _codes(rows, level_columns)
    pairs = _codes(rows, [*SIZE_COLUMNS, "seed"] if axis == "data" else ["budget", "seed"])
    shared = dict(
        architecture=names[0], axis=axis, metric=metric, points=len(rows),
        levels=len(set(levels)), seeds=rows["seed"].n_unique(),
    )  # fmt: skip
    if len(set(levels)) < 2 or not any(np.ptp(x[pairs == p]) > 0 for p in set(pairs)):
        why = "fewer than two sizes with the same seed, so there is no difference to take"
        return Slope(**shared, per_doubling=np.nan, low=None, high=None, method=why, better=0)
    solved = _regress(x[:, None], rows[column].to_numpy().astype(np.float64), pairs, levels)
    value, low, high = float(solved.coefficients[0]), None, None
    method = "no interval: two sizes and one seed leave nothing to estimate the noise from"
    if solved.freedom:
        half = stats.t.isf((1 - fit.LEVEL) / 2, solved.freedom) * np.sqrt(solved.covariance[0, 0])
        low, high = float(value - half), float(value + half)
        method = f"t interval within seeds, {solved.freedom} degrees of freedom"
    sign = -1 if lower_is_better(metric) else 1
    better = 0 if low is None or low <= 0 <= high else int(np.sign(value)) * sign
    bent = "the points bend away from a straight line: the slope is an average over the ladder"
    warnings = (bent,) if solved.bent else ()
    doublings = max(float(np.ptp(x[pairs == p])) for p in set(pairs))
    if doublings < 1:  # a gain per doubling would be an extrapolation
        better = 0
        warnings += (f"the sizes span {doublings:.2f} doublings of training FLOPs, less than one",)
    return Slope(
        **shared, per_doubling=value, low=low, high=high, method=method, better=better,
        doublings=doublings, warnings=warnings,
    )  # fmt: skip


def rank_axes(slopes) -> list[dict]:
    """Slopes of one metric, the most improving first: [{"slope", "rank", "overlap"}].

    overlap: names of the axes whose intervals overlap this one's, or that have no interval, so
    that their order is not decided. rank: 1 + the number of axes that are decidedly better.
    """
    slopes = [s for s in slopes if np.isfinite(s.per_doubling)]
    if not slopes:
        return []
    sign = -1 if lower_is_better(slopes[0].metric) else 1
    ordered = sorted(slopes, key=lambda s: -sign * s.per_doubling)
    out = []
    for one in ordered:
        others = [other for other in ordered if other is not one]
        overlap = [other.axis for other in others if _overlap(one, other)]
        beaten = sum(
            other.axis not in overlap and sign * (other.per_doubling - one.per_doubling) > 0
            for other in others
        )
        out.append({"slope": one, "rank": 1 + beaten, "overlap": overlap})
    return out


def compare(a, b, x_range=None, *, metric: str = "ne", points: int = 9) -> Comparison:
    """a - b over `x_range`, which both must cover; a, b: anything with predict, band, x_range.

    The limits of the difference combine the two bands' half-widths as independent errors (Zou and
    Donner 2008, MOVER). The winner is decided where the whole interval at the upper end, nearest
    to what one would scale to, lies on one side of 0.
    x_range None: the whole shared range. An empty shared range decides nothing and says so.
    """
    low = max(a.x_range[0], b.x_range[0], *(x_range or ())[:1])
    high = min(a.x_range[1], b.x_range[1], *(x_range or ())[1:])
    if not low < high:
        none = np.zeros(0)
        why = "no range of training FLOPs is covered by both"
        return Comparison(at=none, difference=none, low=none, high=none, winner=None, reason=why)
    at = np.geomspace(low, high, points)
    (a_low, a_high), (b_low, b_high) = a.band(at), b.band(at)
    a_mid, b_mid = a.predict(at), b.predict(at)
    difference = a_mid - b_mid
    below = difference - np.hypot(a_mid - a_low, b_high - b_mid)
    above = difference + np.hypot(a_high - a_mid, b_mid - b_low)
    if not np.isfinite([below[-1], above[-1]]).all() or below[-1] <= 0 <= above[-1]:
        winner, reason = None, f"the interval at {high:.3g} FLOPs includes 0"
    else:
        winner = "a" if (difference[-1] < 0) == lower_is_better(metric) else "b"
        reason = f"decided at {high:.3g} FLOPs, the upper end of the shared range"
    return Comparison(
        at=at, difference=difference, low=below, high=above, winner=winner, reason=reason
    )


def compare_best(a, b, spread: tuple[float, int], *, metric: str = "ne") -> Comparison:
    """a - b between the best sizes at the most training FLOPs that both ladders cover.

    For architectures whose points support no law, as where a ladder is flat. Each one's best cell
    is chosen on validation among those of at most so many FLOPs, and compared on test.
    a, b: cells of one architecture each, means over `test_<metric>_n` seeds. spread: (standard
    deviation over seeds, pooled over sizes, its degrees of freedom); t interval of the difference
    of two means.
    """
    columns = [f"{span}_{metric}" for span in ("validation", "test")]
    a, b = (x.filter(polars.col(c).is_finite() for c in columns) for x in (a, b))
    none = np.zeros(0)
    nothing = dict(at=none, difference=none, low=none, high=none, winner=None)
    x, y = (cells["training_flops"].to_numpy() for cells in (a, b))
    if not len(x) or not len(y) or max(x.min(), y.min()) > min(x.max(), y.max()):
        return Comparison(**nothing, reason="no range of training FLOPs is covered by both")
    high, (std, freedom) = min(x.max(), y.max()), spread
    if not freedom:
        return Comparison(**nothing, reason="one seed a size leaves the best sizes undecided")
    lower = lower_is_better(metric)
    best = [
        cells.filter(polars.col("training_flops") <= high)
        .sort(columns[0], descending=not lower)
        .row(0, named=True)
        for cells in (a, b)
    ]
    difference = best[0][columns[1]] - best[1][columns[1]]
    half = (
        stats.t.isf((1 - fit.LEVEL) / 2, freedom)
        * std
        * np.sqrt(sum(1 / cell[f"{columns[1]}_n"] for cell in best))
    )
    winner, reason = None, f"the best sizes up to {high:.3g} FLOPs differ by no more than seeds do"
    if abs(difference) > half:
        winner = "a" if (difference < 0) == lower else "b"
        reason = f"decided between the best sizes up to {high:.3g} FLOPs, by the spread over seeds"
    return Comparison(
        at=np.array([high]), difference=np.array([difference]), low=np.array([difference - half]),
        high=np.array([difference + half]), winner=winner, reason=reason,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Regression:
    coefficients: np.ndarray
    covariance: np.ndarray
    freedom: int
    bent: bool


def _regress(design, y, pairs, levels) -> _Regression:
    """Least squares of y [n] on design [n, p] with an own level per pair; error as the module says.

    With a constant among the columns of design, `pairs` must be all equal (no further level).
    """
    wanted = design.shape[1]
    full = design if wanted > 1 else np.concatenate([design, _dummies(pairs)], axis=1)
    beta, rss, rank = _least_squares(full, y)
    freedom = len(y) - rank
    # Saturated in the levels: what is left there is the spread over seeds alone.
    _, rss_seeds, rank_seeds = _least_squares(
        np.concatenate([full, _dummies(levels)], axis=1), y
    )  # fmt: skip
    freedom_seeds, freedom_line = len(y) - rank_seeds, rank_seeds - rank
    bent = False
    if freedom_seeds > 0 and freedom_line > 0:
        ratio = ((rss - rss_seeds) / freedom_line) / max(rss_seeds / freedom_seeds, 1e-300)
        bent = bool(stats.f.sf(ratio, freedom_line, freedom_seeds) < BENT)
    if bent:
        variance, freedom = (rss - rss_seeds) / freedom_line, freedom_line
    else:
        variance = rss / freedom if freedom > 0 else np.nan
    covariance = variance * np.linalg.pinv(full.T @ full)[:wanted, :wanted]
    return _Regression(
        coefficients=beta[:wanted], covariance=covariance, freedom=max(freedom, 0), bent=bent
    )


def _least_squares(design, y):
    beta, _, rank, _ = np.linalg.lstsq(design, y, rcond=1e-10)
    return beta, float(((y - design @ beta) ** 2).sum()), int(rank)


def _dummies(codes) -> np.ndarray:
    return (np.asarray(codes)[:, None] == np.unique(codes)[None]).astype(np.float64)


def _codes(rows: polars.DataFrame, columns) -> np.ndarray:
    """[n] one integer per distinct combination of the columns that exist."""
    present = [c for c in columns if c in rows.columns]
    return rows.select(polars.struct(present).rank("dense")).to_series().to_numpy()


def _moved_column(own: polars.DataFrame, axis: str) -> str:
    """The size column of an axis. Tables of before there was a column "history" hold S under
    "tokens", as newer ones do for architectures without feature tokens."""
    if axis == "S" and "history" in own.columns and own["history"].null_count() == 0:
        return "history"
    return {"L": "layers", "D": "width"}.get(axis, "tokens")


def _overlap(one: Slope, other: Slope) -> bool:
    if one.low is None or other.low is None:
        return True
    return one.low <= other.high and other.low <= one.high
