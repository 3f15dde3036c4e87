"""report.html and summary.json of a study: one sentence of advice, and everything behind it.

The page is self-contained: plotly.js stands in it once, a content policy forbids it to load
anything, and text from data is escaped.
"""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import polars

from rankjax.scaling import advice, architectures, findings, fit, page, slopes


def write(
    results: polars.DataFrame,
    study: dict,
    folder: str | os.PathLike,
    *,
    timing: polars.DataFrame | None = None,
    trees: dict | None = None,
    bootstrap: int = 200,
) -> pathlib.Path:
    """Writes folder/report.html and folder/summary.json and returns the path of the report.

    Args:
      results: one row a trial, as in results.parquet; null where a metric is undefined.
      study: what was asked (study.json); shown as the protocol, "command" and "study" if present;
        "notes", sentences that the log wants shown, above everything.
      folder: made if absent. timing: timing.parquet, joined to the table of trials.
      trees: what baseline.run returned (baseline.json); None = not run, which the report says.
      bootstrap: resamples behind the power laws' intervals and bands.
    Raises:
      ValueError: a column that nothing can be said without is missing.
    """
    found = findings.analyse(results, bootstrap=bootstrap)
    summed = _summed(found, trees, study.get("notes", []))
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text_of = {
        "summary.json": json.dumps(summed, indent=1, allow_nan=False),
        "report.html": page.render(found, summed, study, timing),
    }
    for name, content in text_of.items():  # whole or not at all, whoever reads or kills us
        partial = folder / f".{name}.{os.getpid()}"
        partial.write_text(content, encoding="utf-8")
        partial.replace(folder / name)
    return folder / "report.html"


def summary(
    results: polars.DataFrame,
    *,
    trees: dict | None = None,
    notes: Sequence[str] = (),
    bootstrap: int = 200,
) -> dict:
    """What the report says, for machines: JSON types only, null where a number is undefined.

    Keys: advice {sentence, supported, architecture, axes, reasons}, counts, architectures (the size
    chosen on validation, its test metrics), trees (what baseline.json holds, or null), notes, fits
    (power laws and lines), joint, frontier, slopes, ranking, comparisons, learning_rates, tables,
    seed_spread, oracle_ne, alarm, warnings.
    Raises: ValueError: a column that nothing can be said without is missing.
    """
    return _summed(findings.analyse(results, bootstrap=bootstrap), trees, notes)


def text(summary: dict) -> str:
    """The summary for a terminal: notes, advice, architectures, axes, warnings; no markup."""
    lines = [f"note: {text}" for text in summary["notes"]]
    lines += [summary["advice"]["sentence"], "", *architectures.lines(summary)]
    if summary["oracle_ne"] is not None:
        rang = len(summary["alarm"]["rang"])
        state = f"rang in {rang} trial(s)" if rang else "silent"
        lines.append(f"oracle: NE {summary['oracle_ne']:.4f}; leak alarm {state}")
    lines += ["", *(row["words"] for row in summary["ranking"] if row["metric"] == "ne")]
    if summary["warnings"]:
        lines += ["", *(f"warning: {w}" for w in summary["warnings"])]
    return "\n".join(lines)


def _summed(found: findings.Findings, trees: dict | None, notes: Sequence[str]) -> dict:
    final = found.final
    envelope_law = {m: _law(c) for m, c in found.envelope_curves.items()}
    out = {
        "advice": advice.advise(found),
        "counts": {
            "trials": found.trials.height,
            "final_trials": final.height,
            "architectures": final["architecture"].n_unique(),
            "seeds": final["seed"].n_unique(),
            "budgets": sorted(final["budget"].drop_nulls().unique().to_list()),
        },
        "architectures": found.best,
        "baseline": found.baseline,
        "trees": trees,
        "notes": notes,
        "fits": [_law(c) for c in found.curves],
        "joint": {name: _joint(joint) for name, joint in found.joints.items()},
        "frontier": {
            m: {"points": cells.to_dicts(), "fit": envelope_law.get(m)}
            for m, cells in found.envelope.items()
        },
        "slopes": [_slope(s) for s in found.slopes],
        "ranking": [
            {
                "architecture": name,
                "metric": metric,
                "order": [
                    {"axis": r["slope"].axis, "rank": r["rank"], "overlap": r["overlap"]}
                    for r in ranking
                ],
                "words": advice.ranking_words(name, metric, ranking),
            }
            for (name, metric), ranking in found.rankings.items()
        ],
        "comparisons": [_comparison(c) for c in found.comparisons],
        "learning_rates": found.rates,
        "tables": found.tables,
        "seed_spread": {
            m: {"std": std, "degrees_of_freedom": freedom}
            for m, (std, freedom) in found.spread.items()
        },
        "oracle_ne": found.oracle_ne,
        "alarm": found.alarms,
        "warnings": advice.warnings(found, trees),
    }
    return plain(out)


def _law(curve: findings.Curve) -> dict:
    line, power = curve.line, curve.power
    out = {
        "architecture": curve.architecture,
        "axis": curve.axis,
        "of": curve.label,
        "metric": curve.metric,
        "points": curve.rows.height,
        "x_range": line.x_range,
        "line": {
            **dict(a=line.a, b=line.b, intervals=line.intervals, ok=line.ok),
            **dict(reasons=line.reasons, warnings=line.warnings, freedom=line.freedom),
        },
        "power_law": None,
    }
    if power is not None:
        out["power_law"] = {
            **dict(E=power.E, A=power.A, alpha=power.alpha, intervals=power.intervals),
            **dict(ok=power.ok, reasons=power.reasons, warnings=power.warnings),
        }
    return out


def _joint(joint: fit.Joint) -> dict:
    names = ("E", "A", "alpha", "B", "beta", "intervals", "ok", "reasons", "warnings")
    return {name: getattr(joint, name) for name in names}


def _slope(slope: slopes.Slope) -> dict:
    names = (
        *("architecture", "axis", "metric", "per_doubling", "low", "high", "better"),
        *("levels", "seeds", "points", "doublings", "method", "warnings"),
    )
    return {name: getattr(slope, name) for name in names}


def _comparison(row: dict) -> dict:
    result = row["result"]
    out = {k: row[k] for k in ("metric", "a", "b", "reason")}
    out |= {"range": None, "difference": None, "low": None, "high": None, "ahead": None}
    if result is not None and len(result.at):
        out |= {
            "range": [result.at[0], result.at[-1]],
            **{k: getattr(result, k)[-1] for k in ("difference", "low", "high")},
            "ahead": row[result.winner] if result.winner else None,
        }
    return out


def plain(value):
    """Numbers, arrays, tuples -> JSON types; what is not finite -> None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
