"""Check of label rates over time, which tells drift from chance and from the week.

Impressions of one user on one day resemble each other, so a day of a few busy users strays far from
the rate without any drift: cells are a user's impressions on a day, and rho is the correlation of
two labels of a cell. Weekends differ from week to week alike: a day that is as its weekday was in
train is no drift either.
"""

import numpy as np
import polars as pl

from rankjax.data import event_log, finding, tally
from rankjax.data.finding import Finding
from rankjax.schema import Task

# Holidays and campaigns move rates by less than this factor.
FACTOR = 1.5
# Six standard errors: no false alarm over thousands of days.
Z = 6.0
# One user who clicks on everything is no drift, however sure it is that this user does.
FEWEST_USERS = 10
TOLD = 5  # spans and runs that the evidence lists
CHANGED = (
    "find out what changed (logging, product, traffic); a study over such a break measures the "
    "break"
)
SAMPLED = (
    "the negatives were sampled, so this rate is that of the sampling: where an hour or day holds "
    "few items, fewer negatives are found than asked for; end the spans before such a tail"
)


def label_changes_over_time(log: event_log.EventLog) -> list[Finding]:
    """Spans and runs of days whose label rate is far from the train span's.

    Spans that hold one class only are left out; `one_class` names them.
    """
    out = []
    for task in log.schema.tasks:
        cells = _cells(log, task)
        train = cells.filter(pl.col("span") == 0)
        if train.is_empty():
            continue
        rate = train["y"].sum() / train["n"].sum()
        rho, week, found = _correlation(train, rate), _week(train, rate), []
        for k, name in enumerate(event_log.SPANS[1:], start=1):
            found.append((name, cells.filter(pl.col("span") == k)))
        found += _runs(cells, np.maximum(rate, week), np.minimum(rate, week))
        told = [
            (_z(own, rate, week, rho), name, own["n"].sum(), own["y"].sum()) for name, own in found
        ]
        told = sorted((x for x in told if x[0] > Z), key=lambda x: -x[0])
        if not told:
            continue
        words = [f"{name} {y / n:.4g} (z {z:.1f}, {n:,} rows)" for z, name, n, y in told]
        more = f", and {len(words) - TOLD} more" if len(words) > TOLD else ""
        out.append(
            Finding(
                kind="label_changes_over_time",
                severity="warning",
                where=finding.place("impressions", task.name),
                evidence=f"rate in train {rate:.4g}; {', '.join(words[:TOLD])}{more}",
                advice=SAMPLED if "negatives" in log.info else CHANGED,
            )
        )
    return out


def _cells(log: event_log.EventLog, task: Task) -> pl.DataFrame:
    """span, day, user, n rows that count, y positives; spans of one class are left out."""
    span, time, user = (log.column("impressions", name) for name in ("span", "time", "user"))
    keys, sums = ["span", "day", "user"], pl.col("n", "y").sum()
    found = [
        pl.DataFrame(schema={"span": pl.Int8, "day": pl.Int64, "user": pl.Int32})
        .with_columns(n=pl.lit(0, pl.Int64), y=pl.lit(0, pl.Int64))
        .clear()
    ]
    for part in tally.chunks(len(span)):
        label, counts = tally.labels(log, task, part)
        columns = {"span": span[part], "day": time[part] // tally.DAY, "user": user[part]}
        rows = pl.DataFrame(columns | {"n": counts, "y": label}).filter("n")
        found.append(rows.with_columns(pl.col("n", "y").cast(pl.Int64)).group_by(keys).agg(sums))
    y, n = pl.col("y").sum(), pl.col("n").sum()
    return pl.concat(found).group_by(keys).agg(sums).filter(((y > 0) & (y < n)).over("span"))


def _correlation(cells: pl.DataFrame, rate: float) -> float:
    """rho by moments, at least 0, from sums of integers: in any order the same bits."""
    n, y = cells["n"], cells["y"]
    square = (y * y).sum() - 2 * rate * (n * y).sum() + rate**2 * (n * n).sum()
    pairs = (n * (n - 1)).sum()
    if not pairs:
        return 0.0
    return max(0.0, (square / (rate * (1 - rate)) - n.sum()) / pairs)


def _runs(cells: pl.DataFrame, high: np.ndarray, low: np.ndarray) -> list[tuple[str, pl.DataFrame]]:
    """Maximal runs of days all above `high` [7], or below `low` [7], by more than FACTOR.

    high, low: by weekday. Returns name and cells of each.
    """
    table = cells.group_by("day").agg(pl.col("n", "y").sum()).sort("day")
    day, n, y = (table[name].to_numpy() for name in ("day", "n", "y"))
    high, low = high[day % 7], low[day % 7]
    side = np.where(y > FACTOR * high * n, 1, np.where(y < low * n / FACTOR, -1, 0))
    start = np.flatnonzero(np.append(True, side[1:] != side[:-1]))
    out = []
    for a, b in zip(start, np.append(start[1:], len(side))):
        if side[a]:
            first, last = day[a], day[b - 1]
            name = " to ".join(dict.fromkeys(tally.date(x) for x in (first, last)))
            out.append((name, cells.filter(pl.col("day").is_between(first, last))))
    return out


def _week(train: pl.DataFrame, rate: float) -> np.ndarray:
    """Train's label rate by weekday, Thursday first, float64 [7]; `rate` for those met once."""
    out = np.full(7, rate)
    weeks = train.group_by(pl.col("day") % 7).agg(
        pl.col("n", "y").sum(), pl.col("day").n_unique().alias("days")
    )
    for weekday, n, y, days in weeks.rows():
        if days > 1:
            out[weekday] = y / n
    return out


def _z(cells: pl.DataFrame, rate: float, week: np.ndarray, rho: float) -> float:
    """|z| of the cells' rate against train's, or its weekdays' where that is closer.

    0 within FACTOR of either, or with few users. The variance is that of labels of which any two of
    a user correlate by rho.
    """
    users = cells.group_by("user").agg(pl.col("n", "y").sum())
    if users.height < FEWEST_USERS:
        return 0.0
    n, y = users["n"].sum(), users["y"].sum()
    pairs = (users["n"] * (users["n"] - 1)).sum()
    days = cells.group_by("day").agg(pl.col("n").sum()).sort("day")
    of_week = float((days["n"].to_numpy() * week[days["day"].to_numpy() % 7]).sum()) / n
    found = []
    for p in (rate, of_week):
        near = p / FACTOR <= y / n <= p * FACTOR or not 0 < p < 1
        found.append(0.0 if near else abs(y - p * n) / np.sqrt(p * (1 - p) * (n + rho * pairs)))
    return float(min(found))
