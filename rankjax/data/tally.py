"""Counts over a log's impressions, chunk by chunk: what `describe` and `check` are made of.

V values of an id (0 = missing) are counted in arrays as long as the largest id met, M ids stand in
a row of a feature of kind "ids".
"""

import datetime
from collections.abc import Callable, Iterator

import numpy as np
import polars as pl

from rankjax.data import event_log, samples
from rankjax.schema import Feature, Task

DAY = 86_400
BINS = 1 << 16  # of `histogram`
Values = Callable[[slice], np.ndarray]  # rows of the impressions -> [n], or [n, M]


def chunks(rows: int, start: int = 0) -> Iterator[slice]:
    """Slices of at most CHUNK rows that cover start .. rows."""
    for first in range(start, rows, event_log.CHUNK):
        yield slice(first, min(rows, first + event_log.CHUNK))


def grown(total: np.ndarray, size: int) -> np.ndarray:
    """Counts whose last axis is at least `size` long: filled up with 0 where it is shorter."""
    short = size - total.shape[-1]
    return np.pad(total, [(0, 0)] * (total.ndim - 1) + [(0, short)]) if short > 0 else total


def values(log: event_log.EventLog, feature: Feature) -> Values:
    """How to read a context feature, stored or derived: int32, or float32 where it is dense."""
    if not feature.derive:
        column = log.column("impressions", feature.name)
        return lambda part: column[part]
    rule = samples.DERIVED[feature.derive]
    time, item = (log.column("impressions", name) for name in ("time", "item"))
    dtype = np.int32 if rule.rows else np.float32

    def derived(part: slice) -> np.ndarray:
        birth = (
            log.column("items", "birth")[item[part]] if rule.birth else np.zeros_like(time[part])
        )
        return rule.rule(time[part], time[part], birth).astype(dtype)

    return derived


def count(rows: int, read: Values) -> np.ndarray:
    """How often each id stands in the rows of any file that `read` reads: int64 [V]."""
    total = np.zeros(1, np.int64)
    for part in chunks(rows):
        found = np.bincount(read(part).ravel())
        total = grown(total, len(found))
        total[: len(found)] += found
    return total


def by_span(log: event_log.EventLog, read: Values) -> np.ndarray:
    """How often each id stands in each span's impressions: int64 [3, V]."""
    span = log.column("impressions", "span")
    total = np.zeros((len(event_log.SPANS), 1), np.int64)
    for part in chunks(len(span)):
        x, of = read(part), span[part]
        size = int(x.max()) + 1
        total = grown(total, size)
        for k in range(len(total)):
            total[k, :size] += np.bincount(x[of == k].ravel(), minlength=size)
    return total


def labels(log: event_log.EventLog, task: Task, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """A task's label and whether it counts (its weight is 1), bool [n]."""
    label = log.column("impressions", task.name)[part] == 1
    if not task.weight:
        return label, np.ones(len(label), bool)
    return label, log.column("impressions", task.weight)[part] == 1


def train_rows(log: event_log.EventLog) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Chunk by chunk: its rows, which of them train, int64 [m], and which of those are newer, [m].

    Newer: in the second half of the train span's impressions.
    """
    span = log.column("impressions", "span")
    middle = sum(int(np.count_nonzero(span[part] == 0)) for part in chunks(len(span))) // 2
    before = 0
    for part in chunks(len(span)):
        train = np.flatnonzero(span[part] == 0)
        yield part, train, before + np.arange(len(train)) >= middle
        before += len(train)


def by_label(log: event_log.EventLog, task: Task, read: Values) -> np.ndarray:
    """How often each id stands in the train span by half and label: int64 [2, 2, V].

    First axis: the older and the newer half of the train span's impressions. Second: label 0, 1.
    Only impressions that count for the task.
    """
    total = np.zeros((2, 2, 1), np.int64)
    for part, train, newer in train_rows(log):
        x = read(part)[train]
        label, counts = (flag[train] for flag in labels(log, task, part))
        size = int(x.max(initial=0)) + 1
        total = grown(total, size)
        for half, label_is in np.ndindex(2, 2):
            rows = counts & (newer == half) & (label == label_is)
            total[half, label_is, :size] += np.bincount(x[rows].ravel(), minlength=size)
    return total


def through(ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Counts of entities [..., E'] -> counts of what a feature [E] or [E, M] says of them.

    E' <= E: the entities after the last that was met are left out. Returns int64 [..., V].
    """
    ids = ids[: counts.shape[-1]].reshape(counts.shape[-1], -1)
    size = int(ids.max(initial=0)) + 1
    out = np.zeros((*counts.shape[:-1], size), np.int64)
    for at in np.ndindex(counts.shape[:-1]):
        for column in ids.T:
            # float64 holds counts up to 2^53 exactly
            found = np.bincount(column, weights=counts[at], minlength=size)
            out[at] += found.astype(np.int64)
    return out


def unseen(counts: np.ndarray) -> list[float | None]:
    """Per later span the share of its ids, missing ones left out, that train never holds.

    counts: [3, V], as of `by_span`. Returns validation's and test's; None for a span without ids.
    """
    never = counts[0, 1:] == 0
    totals = counts[1:, 1:].sum(axis=1)
    missed = (counts[1:, 1:] * never).sum(axis=1)
    return [int(m) / int(t) if t else None for m, t in zip(missed, totals)]


def request_starts(log: event_log.EventLog) -> np.ndarray:
    """The first row of each request: int64 [requests]; rows are sorted by time, then request."""
    request, time = (log.column("impressions", name) for name in ("request", "time"))
    found = [np.zeros(min(1, len(request)), np.int64)]
    for part in chunks(len(request), start=1):
        before = slice(part.start - 1, part.stop - 1)
        differs = (request[part] != request[before]) | (time[part] != time[before])
        found.append(part.start + np.flatnonzero(differs))
    return np.concatenate(found)


def request_chunks(starts: np.ndarray, rows: int) -> Iterator[slice]:
    """Slices of whole requests that cover all rows, of CHUNK rows or the fewest above."""
    ends = np.append(starts[1:], rows)
    at = 0
    while at < rows:
        stop = int(ends[min(np.searchsorted(ends, at + event_log.CHUNK), len(ends) - 1)])
        yield slice(at, stop)
        at = stop


def days(log: event_log.EventLog) -> pl.DataFrame:
    """One row a span and day (days since 1970, UTC), in order.

    Columns: span, day, impressions; per task `<task>.rows` (those that count) and
    `<task>.positives`, int64.
    """
    span, time = (log.column("impressions", name) for name in ("span", "time"))
    found = []
    for part in chunks(len(span)):
        columns = {"span": span[part], "day": time[part] // DAY}
        for task in log.schema.tasks:
            label, counts = labels(log, task, part)
            columns |= {f"{task.name}.rows": counts, f"{task.name}.positives": label & counts}
        of_day = pl.DataFrame(columns).group_by("span", "day")
        found.append(
            of_day.agg(pl.len().cast(pl.Int64).alias("impressions"), pl.all().cast(pl.Int64).sum())
        )
    if not found:
        names = [f"{t.name}.{what}" for t in log.schema.tasks for what in ("rows", "positives")]
        empty = {"span": pl.Int8, "day": pl.Int64, "impressions": pl.Int64}
        return pl.DataFrame(schema=empty | dict.fromkeys(names, pl.Int64))
    return pl.concat(found).group_by("span", "day").agg(pl.all().sum()).sort("span", "day")


def date(day: int) -> str:
    """A day since 1970 as "2024-05-31"; "day 12345678" where no calendar has it."""
    try:
        return str(datetime.date(1970, 1, 1) + datetime.timedelta(days=int(day)))
    except OverflowError:  # times that are no seconds
        return f"day {day}"


def auc(score: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> float:
    """Area under the ROC curve of entries [E] that hold these counts; ties count one half.

    NaN where a class is missing.
    """
    _, block = np.unique(score, return_inverse=True)
    p, q = (np.bincount(block, weights=x) for x in (positives, negatives))
    return _area(p, q)


def histogram(values: np.ndarray, label: np.ndarray) -> np.ndarray:
    """How many of the finite float32 values [n] share label and leading 16 bits: int64 [2, BINS].

    Bins ascend with the values: sign, exponent and seven bits of the rest.
    """
    leading = (values + np.float32(0)).view(np.int32) >> 16  # -0 becomes 0
    bins = np.where(leading < 0, -1 - leading, leading + BINS // 2)
    return np.bincount(2 * bins + label, minlength=2 * BINS).reshape(BINS, 2).T


def auc_range(counts: np.ndarray) -> tuple[float, float]:
    """What the AUC is at least and at most, given counts [2, BINS] of `histogram`; NaN as `auc`."""
    q, p = counts
    pairs = float(p.sum()) * float(q.sum())
    within = float((p * q).sum()) / 2 / pairs if pairs else float("nan")
    return _area(p, q) - within, _area(p, q) + within


def auc_rows(values: np.ndarray, label: np.ndarray) -> float:
    """Area under the ROC curve of finite float32 values [n] with bool labels; NaN without both.

    One sort of numbers that hold value and label, several times faster than sorting indices.
    """
    if not len(values):
        return float("nan")
    key = values.view(np.int32).astype(np.int64)
    negative = key < 0  # the sign stands apart from the size
    key[negative] = -(key[negative] & 0x7FFFFFFF)
    key *= 2
    key += label
    key.sort()
    start = np.flatnonzero(np.append(True, (key[1:] >> 1) != (key[:-1] >> 1)))
    p = np.add.reduceat(key & 1, start)
    return _area(p, np.diff(np.append(start, len(key))) - p)


def _area(p: np.ndarray, q: np.ndarray) -> float:
    """Share of (positive, negative) pairs in order, from their counts by ascending score."""
    pairs = float(p.sum()) * float(q.sum())
    below = np.cumsum(q) - q
    return float((p * (below + q / 2)).sum() / pairs) if pairs else float("nan")
