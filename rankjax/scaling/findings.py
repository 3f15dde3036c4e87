"""What a study's results say: fits, slopes, comparisons and choices, as numbers.

Fits, slopes and figures read the final trials' test metrics only; rates and sizes are chosen on
validation. advice.py puts the findings into words, figures.py draws them.
"""

import dataclasses
import itertools

import numpy as np
import polars
from scipy import stats

from rankjax.scaling import fit, slopes

METRICS = ("ne", "auc")
SIZE = ["architecture", *slopes.SIZE_COLUMNS]
REQUIRED = ("trial", "stage", "architecture", "axis", "seed", "training_flops", "test_ne")
NUMBERS = (
    *("axis_value", "size", "samples", "steps", "batch", "seed", "learning_rate", "padding_share"),
    *("table_learning_rate", "embedding_std", "dense_params", "embedding_params", "tokens"),
    *(
        "history",
        "layers",
        "width",
        "flops",
        "flops_valid",
        "training_flops",
        "paper_params",
        "paper_flops",
    ),
    *("oracle_ne", "test_ne", "test_auc", "test_request_auc", "validation_ne", "validation_auc"),
)
TEXT = ("trial", "stage", "architecture", "ladder", "axis", "config", "paper_scope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """What was fitted to the final trials of one architecture and one axis at one budget.

    axis: "T", "S", "L", "D", "data" (several budgets of one size) or "frontier" (the envelope of
    all its sizes and budgets). rows: the trials fitted, x = training_flops. label: the size that is
    held (data axis) or the budget. power: on NE only.
    """

    architecture: str
    axis: str
    label: str
    metric: str
    rows: polars.DataFrame
    line: slopes.Line
    power: fit.Fit | None

    @property
    def best(self):
        """The law that the data support: the power law, else the line, else None."""
        if self.power is not None and self.power.ok:
            return self.power
        return self.line if self.line.ok and self.line.intervals else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """All that the report shows; frames hold one row a trial, unless said otherwise.

    cells: one row a size, axis and budget with mean, std and n over seeds. spread: {metric: (pooled
    std over seeds, degrees of freedom)}. best: one row an architecture, its size chosen on
    validation. envelope: the cells on the frontier over all architectures, by training FLOPs.
    rates: one row a swept (architecture, ladder, size); tables: the table and scale sweep's choice.
    """

    trials: polars.DataFrame
    final: polars.DataFrame
    cells: polars.DataFrame
    spread: dict[str, tuple[float, int]]
    best: list[dict]
    curves: list[Curve]
    envelope: dict[str, polars.DataFrame]
    envelope_curves: dict[str, Curve]
    joints: dict[str, fit.Joint]
    slopes: list[slopes.Slope]
    rankings: dict[tuple[str, str], list[dict]]
    comparisons: list[dict]
    rates: list[dict]
    tables: list[dict]
    baseline: str
    oracle_ne: float | None
    alarms: dict
    dropped: int


def analyse(results: polars.DataFrame, *, baseline="dlrm_mlp", bootstrap: int = 200) -> Findings:
    """results.parquet -> Findings.

    Args: results: one row a trial; baseline: the plain DNN's name; bootstrap: resamples of a fit.
    Raises: ValueError: a column that nothing can be said without is missing.
    """
    trials = _complete(results)
    final = trials.filter(polars.col("stage") == "final")
    usable = final.filter(finite("test_ne") & (polars.col("test_ne") > 0), finite("training_flops"))
    usable = usable.filter(polars.col("training_flops") > 0)
    cells = _cells(usable, ["axis", "ladder", "axis_value", "size", *SIZE, "budget"])
    points = _cells(_once(usable), [*SIZE, "budget"])
    spread = {m: _spread(usable, m) for m in METRICS}
    curves = _axis_curves(usable, bootstrap) + _frontier_curves(usable, points, bootstrap)
    found = _slopes(usable)
    envelope = {m: _envelope(points, m) for m in METRICS}
    names = usable["architecture"].unique(maintain_order=True).to_list()
    alarm = trials.unique("trial")["alarm"].drop_nulls()  # sweeps are judged too
    rang = trials.filter(polars.col("alarm"))["trial"].unique(maintain_order=True).to_list()
    oracle = usable["oracle_ne"].drop_nulls()
    return Findings(
        trials=trials, final=usable, cells=cells, spread=spread, curves=curves, slopes=found,
        best=_best(points, spread, baseline), envelope=envelope,
        envelope_curves={
            m: _curve("all", "frontier", "all architectures", m, _rows_of(usable, cells), bootstrap)
            for m, cells in envelope.items()
            if len(cells)
        },
        joints={name: _joint(usable, name, bootstrap) for name in names},
        rankings={
            (n, m): slopes.rank_axes([s for s in found if s.architecture == n and s.metric == m])
            for n in names for m in METRICS
        },
        comparisons=_comparisons(curves, points, spread),
        rates=_rates(trials), tables=_tables(trials),
        baseline=baseline, oracle_ne=float(oracle.median()) if len(oracle) else None,
        alarms={"checked": len(alarm), "rang": rang},
        dropped=len(final) - len(usable),
    )  # fmt: skip


def _complete(results: polars.DataFrame) -> polars.DataFrame:
    """Adds the columns that are missing as nulls; every number float64, ids as they are."""
    missing = [c for c in REQUIRED if c not in results.columns]
    if missing:
        raise ValueError(
            f"results: columns {missing} are missing; found {sorted(results.columns)}, expected at "
            f"least {list(REQUIRED)}"
        )
    new = [
        polars.lit(None, polars.Float64).alias(c)
        for c in (*NUMBERS, "budget")
        if c not in results.columns
    ]
    new += [polars.lit(None, polars.String).alias(c) for c in TEXT if c not in results.columns]
    if "alarm" not in results.columns:
        new.append(polars.lit(None, polars.Boolean).alias("alarm"))
    return results.with_columns(new).with_columns(
        *(polars.col(c).cast(polars.Float64) for c in NUMBERS),
        # A budget of null is "all of the span": the samples say how many those were.
        polars.coalesce(polars.col("budget", "samples").cast(polars.Float64)).alias("budget"),
        polars.col("alarm").cast(polars.Boolean),
        *(polars.col(c).cast(polars.String) for c in TEXT),
    )


def finite(column: str) -> polars.Expr:
    """Neither null nor NaN nor infinite."""
    return polars.col(column).is_not_null() & polars.col(column).is_finite()


def _once(rows: polars.DataFrame) -> polars.DataFrame:
    """Each (size, budget, seed) once: ladders share their base, maybe at slightly other rates."""
    return rows.unique([*SIZE, "budget", "seed"], keep="first", maintain_order=True)


def _cells(rows: polars.DataFrame, by: list[str]) -> polars.DataFrame:
    """Mean and std (n - 1) over seeds of every metric, beside the sizes' own columns."""
    metrics = [f"{s}_{m}" for s in ("validation", "test") for m in METRICS] + ["test_request_auc"]
    same = ["training_flops", "dense_params", "samples", "learning_rate", "flops_valid"]
    rows = rows.with_columns(polars.when(finite(m)).then(polars.col(m)) for m in metrics)
    return (
        rows.group_by(by, maintain_order=True)
        .agg(
            polars.len().alias("seeds"),
            *(polars.col(c).mean() for c in same),
            *(polars.col(m).mean() for m in metrics),
            *(polars.col(m).std().alias(f"{m}_std") for m in metrics),
            *(polars.col(m).count().alias(f"{m}_n") for m in metrics),
        )
        .sort("architecture", "training_flops", maintain_order=True)
    )


def _spread(rows: polars.DataFrame, metric: str) -> tuple[float, int]:
    """Standard deviation over seeds, pooled over all sizes and budgets, and its freedom."""
    rows = _once(rows).filter(finite(f"test_{metric}"))
    over = rows.group_by([*SIZE, "budget"], maintain_order=True).agg(
        polars.col(f"test_{metric}").var().alias("var"), (polars.len() - 1).alias("freedom")
    )
    over = over.filter(polars.col("freedom") > 0)
    freedom = int(over["freedom"].sum())
    if not freedom:
        return float("nan"), 0
    return float(np.sqrt((over["var"] * over["freedom"]).sum() / freedom)), freedom


def tied(one: dict, other: dict, metric: str, spread: tuple[float, int]) -> bool | None:
    """Whether two cells' test means differ by less than the pooled seed spread explains (5%).

    None where no size has two seeds, so that nobody knows.
    """
    std, freedom = spread
    column = f"test_{metric}"
    if not freedom or one[column] is None or other[column] is None:
        return None
    error = std * np.sqrt(1 / one[f"{column}_n"] + 1 / other[f"{column}_n"])
    return bool(abs(one[column] - other[column]) <= stats.t.isf(0.025, freedom) * error)


def _best(points: polars.DataFrame, spread: dict, baseline: str) -> list[dict]:
    """Per architecture the size of lowest validation NE at the largest budget, best test first."""
    if points.is_empty():
        return []
    at = points.filter(polars.col("budget").eq_missing(polars.lit(points["budget"].max())))
    chosen = [
        max(group.to_dicts(), key=lambda c: -_or_inf(c["validation_ne"]))
        for _, group in at.group_by("architecture", maintain_order=True)
    ]
    chosen.sort(key=lambda c: _or_inf(c["test_ne"]))
    plain = next((c for c in chosen if c["architecture"] == baseline), None)
    for cell in chosen:
        cell["tied_with_first"] = (
            cell is not chosen[0] and tied(cell, chosen[0], "ne", spread["ne"])
        )  # fmt: skip
        cell["ne_to_baseline"] = None if plain is None else cell["test_ne"] - plain["test_ne"]
    return chosen


def _or_inf(value) -> float:
    return float("inf") if value is None or not np.isfinite(value) else value


def _curve(architecture, axis, label, metric, rows, bootstrap) -> Curve:
    rows = rows.filter(finite(f"test_{metric}"))
    x, y = rows["training_flops"].to_numpy(), rows[f"test_{metric}"].to_numpy()
    sizes = rows.select(polars.struct(*SIZE, "budget").rank("dense")).to_series().to_numpy()
    line = slopes.log_linear(x, y, seed_groups=sizes)
    power = None
    if slopes.lower_is_better(metric) and len(rows):
        power = fit.power_law(x, y, seed_groups=sizes, bootstrap=bootstrap)
    return Curve(
        architecture=architecture, axis=axis, label=label, metric=metric, rows=rows, line=line,
        power=power,
    )  # fmt: skip


def _axis_curves(final: polars.DataFrame, bootstrap: int) -> list[Curve]:
    out = []
    pairs = final.select("architecture", "axis").unique(maintain_order=True).drop_nulls()
    for architecture, axis in pairs.rows():
        ladder = slopes.axis_rows(final, architecture, axis)
        for (budget,), rows in ladder.group_by(["budget"], maintain_order=True):
            label = "" if budget is None else f"{budget:,.0f} impressions"
            out += [_curve(architecture, axis, label, m, rows, bootstrap) for m in METRICS]
    for key, rows in _once(final).group_by(SIZE, maintain_order=True):
        if rows["budget"].n_unique() > 1:
            held = zip(("T/S", "L", "D"), key[1:])
            label = ", ".join(f"{n} {v:g}" for n, v in held if v is not None)
            out += [_curve(key[0], "data", label, m, rows, bootstrap) for m in METRICS]
    return out


def _frontier_curves(final, points, bootstrap) -> list[Curve]:
    out = []
    for (name,), own in points.group_by(["architecture"], maintain_order=True):
        for metric in METRICS:
            rows = _rows_of(final, _envelope(own, metric))
            out.append(_curve(name, "frontier", "all sizes and budgets", metric, rows, bootstrap))
    return out


def _envelope(points: polars.DataFrame, metric: str) -> polars.DataFrame:
    """The cells on the compute-optimal frontier of the seed means, chosen on validation."""
    points = points.filter(finite(f"test_{metric}"), finite(f"validation_{metric}"))
    keep = fit.frontier(
        points["training_flops"].to_numpy(),
        points[f"validation_{metric}"].to_numpy(),
        lower_is_better=slopes.lower_is_better(metric),
    )
    return points[keep]


def _rows_of(final: polars.DataFrame, cells: polars.DataFrame) -> polars.DataFrame:
    keys = cells.select(*SIZE, "budget")
    return _once(final).join(keys, on=[*SIZE, "budget"], how="semi", nulls_equal=True)


def _joint(final: polars.DataFrame, architecture: str, bootstrap: int) -> fit.Joint:
    rows = final.filter(polars.col("architecture") == architecture)
    rows = _once(rows)
    rows = rows.filter(finite("dense_params") & finite("samples"))
    rows = rows.filter(polars.col("dense_params") > 0, polars.col("samples") > 0)
    columns = (rows[c].to_numpy() for c in ("dense_params", "samples", "test_ne"))
    return fit.joint(*columns, bootstrap=bootstrap)


def _slopes(final: polars.DataFrame) -> list[slopes.Slope]:
    """Every axis at its largest budget, and the data axis over the sizes that have several."""
    out = []
    pairs = final.select("architecture", "axis").unique(maintain_order=True).drop_nulls()
    for architecture, axis in pairs.rows():
        rows = slopes.axis_rows(final, architecture, axis)
        rows = rows.filter(polars.col("budget").eq_missing(polars.lit(rows["budget"].max())))
        out += [slopes.axis_slope(rows, m, axis) for m in METRICS]
    for (_,), rows in _once(final).group_by(["architecture"], maintain_order=True):
        several = polars.col("budget").n_unique().over(SIZE) > 1
        rows = rows.filter(several).sort("training_flops", "seed", "trial")
        if len(rows):
            out += [slopes.axis_slope(rows, m, "data") for m in METRICS]
    return out


def _comparisons(curves: list[Curve], points: polars.DataFrame, spread: dict) -> list[dict]:
    """Every pair of architectures: on the laws of their own frontiers, else their best sizes."""
    out = []
    for metric in METRICS:
        own = [c for c in curves if c.axis == "frontier" and c.metric == metric]
        for a, b in itertools.combinations(own, 2):
            row = {"metric": metric, "a": a.architecture, "b": b.architecture, "result": None}
            lacking = [c.architecture for c in (a, b) if c.best is None]
            why = f"no law is supported for {' and '.join(lacking)}"
            if not lacking:
                row["result"] = slopes.compare(a.best, b.best, metric=metric)
                row["reason"], why = row["result"].reason, "the laws share no range"
            if lacking or not len(row["result"].at):
                best = (points.filter(polars.col("architecture") == c.architecture) for c in (a, b))
                row["result"] = slopes.compare_best(*best, spread[metric], metric=metric)
                row["reason"] = f"{why}; {row['result'].reason}"
            out.append(row)
    return out


def _rates(trials: polars.DataFrame) -> list[dict]:
    """Validation NE at every swept rate, the best of them, and whether it is the sweep's edge."""
    swept = trials.filter(polars.col("stage") == "sweep").sort("learning_rate")
    by = ["architecture", "ladder", "axis", "axis_value", "size", "budget", *SIZE[1:]]
    out = []
    for key, rows in swept.group_by(by, maintain_order=True):
        rates, ne = rows["learning_rate"].to_list(), rows["validation_ne"].to_list()
        best = int(np.argmin([_or_inf(v) for v in ne]))
        known = np.isfinite(_or_inf(ne[best])) and len(set(rates)) > 1
        edge = None
        if known and len(set(rates)) > 2:
            edge = {min(rates): "lowest", max(rates): "highest"}.get(rates[best])
        out.append(
            {**dict(zip(by, key)), "rates": rates, "validation_ne": ne, "edge": edge}
            | {"best": rates[best] if known else None}
        )
    return out


def _tables(trials: polars.DataFrame) -> list[dict]:
    """Validation NE at every table rate and embedding scale tried, and the best of them."""
    rows = trials.filter(polars.col("stage") == "tables").sort(
        "embedding_std", "table_learning_rate"
    )
    out = []
    for (name,), own in rows.group_by(["architecture"], maintain_order=True):
        tried = own.select("table_learning_rate", "embedding_std", "validation_ne").to_dicts()
        best = min(tried, key=lambda r: _or_inf(r["validation_ne"]))
        rates = {r["table_learning_rate"] for r in tried}
        edge = None
        if len(rates) > 2 and np.isfinite(_or_inf(best["validation_ne"])):
            edge = {min(rates): "lowest", max(rates): "highest"}.get(best["table_learning_rate"])
        out.append({"architecture": name, "tried": tried, "best": best, "edge": edge})
    return out
