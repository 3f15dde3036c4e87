"""NE, log loss, AUC, GAUC, calibration, per-request AUC, MRR, nDCG, and the oracle alarm.

Host side, NumPy float64. Everything takes logits, not probabilities, so that confident predictions
keep their digits. All are exact up to float64 rounding (ties included); nothing is binned or
sampled. Rows of weight 0 never count.

A metric that the data do not define raises `UndefinedMetric`; nothing returns a made-up 0.5.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rankjax.schema import Schema


class UndefinedMetric(ValueError):
    """The metric has no value on these rows; the message says what was found."""


class _Rows(NamedTuple):
    """Checked rows of positive weight, float64 [m]; `keep` bool [n] says which of the n given."""

    logits: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    keep: np.ndarray


def _rows(metric: str, logits, labels, weights) -> _Rows:
    """Raises ValueError on shapes, NaN or labels that make no sense, UndefinedMetric on no row."""
    x = np.asarray(logits, np.float64)
    y = np.asarray(labels, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    if x.ndim != 1 or y.shape != x.shape or w.shape != x.shape:
        raise ValueError(
            f"metrics.{metric}: logits {x.shape}, labels {y.shape}, weights {w.shape}, "
            "expected one shape [n]"
        )
    if not (np.isfinite(w) & (w >= 0)).all():
        row = int(np.argmin(np.isfinite(w) & (w >= 0)))
        raise ValueError(f"metrics.{metric}: weight of row {row} is {w[row]}, expected finite >= 0")
    keep = w > 0
    if not keep.any():
        raise UndefinedMetric(f"{metric} is undefined: no weight ({x.size} rows, all of weight 0)")
    x, y, w = x[keep], y[keep], w[keep]
    for what, values, fine in (
        ("logit", x, ~np.isnan(x)),
        ("label", y, (y == 0) | (y == 1)),
    ):
        if not fine.all():
            row = int(np.flatnonzero(keep)[np.argmin(fine)])
            found = values[np.argmin(fine)]
            expected = "0 or 1" if what == "label" else "a number"
            raise ValueError(f"metrics.{metric}: {what} of row {row} is {found}, not {expected}")
    return _Rows(x, y, w, keep)


def _positives(metric: str, rows: _Rows, negatives: bool) -> None:
    """Raises UndefinedMetric without positives, or (where they are needed) without negatives."""
    positives = int(rows.labels.sum())
    if positives == 0:
        raise UndefinedMetric(f"{metric} is undefined: no positives in {rows.labels.size} rows")
    if negatives and positives == rows.labels.size:
        raise UndefinedMetric(f"{metric} is undefined: no negatives in {rows.labels.size} rows")


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log p(label) in nats, elementwise. Infinite logits give 0 or inf, never NaN."""
    # z < 0 where the prediction leans to the label; log(1 + e^z) without overflow.
    return np.logaddexp(0.0, np.where(labels > 0, -logits, logits))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, e) / (1.0 + e)


def _entropy(rate):
    """Entropy of Bernoulli(rate) in nats; 0 < rate < 1."""
    return -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))


def log_loss(logits, labels, weights=None) -> float:
    """Weighted mean of -log p(label), nats. logits, labels (0 or 1), weights (>= 0): [n]."""
    rows = _rows("log_loss", logits, labels, weights)
    return float(np.average(_cross_entropy(rows.logits, rows.labels), weights=rows.weights))


def normalized_entropy(logits, labels, weights=None) -> float:
    """Log loss over the entropy of the weighted base rate of the same rows; 1 = knows only that.

    Undefined without positives or without negatives, where that entropy is 0.
    Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook (2014), eq. 1.
    """
    rows = _rows("normalized_entropy", logits, labels, weights)
    _positives("normalized_entropy", rows, negatives=True)
    loss = np.average(_cross_entropy(rows.logits, rows.labels), weights=rows.weights)
    return float(loss / _entropy(np.average(rows.labels, weights=rows.weights)))


def progressive_curve(
    logits, labels, weights=None, points: int | Sequence[int] = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative NE: at each point the NE of all rows so far, in the order given (time).

    points: a number of evenly spaced points, or increasing counts of rows in 1 .. n.
    Returns (counts int64 [P], NE float64 [P]); NaN where the rows so far hold one class only.
    """
    rows = _rows("progressive_curve", logits, labels, weights)
    n = rows.keep.size
    if isinstance(points, int):
        points = np.unique(np.ceil(np.linspace(0, n, min(points, n) + 1)[1:]).astype(np.int64))
    counts = np.asarray(points, np.int64)
    if counts.size == 0 or counts.min() < 1 or counts.max() > n or (np.diff(counts) <= 0).any():
        raise ValueError(f"progressive_curve: points {points}, expected increasing in 1 .. {n}")
    last = np.cumsum(rows.keep)[counts - 1] - 1  # row of the kept ones; -1 = none so far
    w = np.cumsum(rows.weights)[last]
    loss = np.cumsum(rows.weights * _cross_entropy(rows.logits, rows.labels))[last]
    hits = np.cumsum(rows.labels)[last]
    rate = np.cumsum(rows.weights * rows.labels)[last] / w
    defined = (last >= 0) & (hits > 0) & (hits <= last)
    rate = np.where(defined, rate, 0.5)
    return counts, np.where(defined, loss / w / _entropy(rate), np.nan)


def calibration(logits, labels, weights=None) -> float:
    """PCOC, predicted clicks over observed clicks: sum of w p / sum of w y. 1 = calibrated."""
    rows = _rows("calibration", logits, labels, weights)
    _positives("calibration", rows, negatives=False)
    # No BLAS: the last bits of its sums change with the number of threads.
    predicted = np.sum(rows.weights * _sigmoid(rows.logits))
    return float(predicted / np.sum(rows.weights * rows.labels))


def _grouped_auc(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, group: np.ndarray, groups: int
) -> np.ndarray:
    """AUC within each group 0 .. groups - 1, float64 [groups]; NaN where one class is missing.

    Share of (positive, negative) pairs in the right order, by product of weights; ties count half.
    """
    order = np.lexsort((logits, group))
    x, g = logits[order], group[order]
    positive = weights[order] * labels[order]
    negative = weights[order] - positive
    # Blocks of equal logits within a group; per block the negatives below it, in its own group.
    block = np.flatnonzero(np.r_[True, (x[1:] != x[:-1]) | (g[1:] != g[:-1])])
    of_group = g[block]
    p, q = np.add.reduceat(positive, block), np.add.reduceat(negative, block)
    below = np.cumsum(q) - q
    first = np.flatnonzero(np.r_[True, of_group[1:] != of_group[:-1]])
    below -= np.repeat(below[first], np.diff(np.r_[first, of_group.size]))
    pairs = np.bincount(of_group, p * (below + q / 2), groups)
    total = np.bincount(of_group, p, groups) * np.bincount(of_group, q, groups)
    return np.divide(pairs, total, out=np.full(groups, np.nan), where=total > 0)


def auc(logits, labels, weights=None) -> float:
    """Weighted area under the ROC curve, exact: ties count one half. Inputs [n]."""
    rows = _rows("auc", logits, labels, weights)
    _positives("auc", rows, negatives=True)
    everyone = np.zeros(rows.logits.size, np.int8)
    return float(_grouped_auc(rows.logits, rows.labels, rows.weights, everyone, 1)[0])


def _groups(metric: str, group, rows: _Rows) -> tuple[np.ndarray, int]:
    """Group of each kept row as 0 .. count - 1, and the count."""
    group = np.asarray(group)
    if group.shape != rows.keep.shape:
        raise ValueError(f"metrics.{metric}: groups {group.shape}, expected {rows.keep.shape}")
    values, index = np.unique(group[rows.keep], return_inverse=True)
    return index, values.size


def gauc(logits, labels, user, weights=None) -> float:
    """AUC within each user, averaged over users with both classes, weighted by impressions.

    user: [n] ids. "Impressions" is the user's sum of weights.
    Source: Zhu et al., Optimized Cost per Click in Taobao (2017); DIN, arXiv 1706.06978, eq. 7.
    """
    rows = _rows("gauc", logits, labels, weights)
    group, count = _groups("gauc", user, rows)
    within = _grouped_auc(rows.logits, rows.labels, rows.weights, group, count)
    both = ~np.isnan(within)
    if not both.any():
        raise UndefinedMetric(f"gauc is undefined: none of {count} users has both classes")
    return float(np.average(within[both], weights=np.bincount(group, rows.weights, count)[both]))


def per_request(
    logits, labels, request, weights=None, ks: Sequence[int] = (5, 10)
) -> dict[str, float]:
    """Mean over requests with both classes of AUC, MRR and nDCG@k within the request.

    Requests with one class say nothing of a ranking and are left out. Requests count alike; of
    `weights` only matters where it is 0 (the row is left out).
    Tied candidates: the expected value over all orders of the tied ones, for all three metrics, so
    that a constant scores what a random order scores. (nDCG: McSherry and Najork 2008.)

    Returns {"auc", "mrr" (1 / rank of the first positive), "ndcg<k>" for each k}; gain of nDCG is
    the label, discount 1 / log2(1 + rank).
    """
    rows = _rows("per_request", logits, labels, weights)
    group, count = _groups("per_request", request, rows)
    within = _grouped_auc(rows.logits, rows.labels, np.ones_like(rows.weights), group, count)
    both = ~np.isnan(within)
    if not both.any():
        raise UndefinedMetric(
            f"per-request metrics are undefined: none of {count} requests has both classes"
        )
    order = np.lexsort((-rows.logits, group))
    x, g, y = rows.logits[order], group[order], rows.labels[order]
    start = np.flatnonzero(np.r_[True, (x[1:] != x[:-1]) | (g[1:] != g[:-1])])  # blocks of ties
    size = np.diff(np.r_[start, x.size])
    of_group = g[start]
    begin = start - np.searchsorted(g, of_group)  # rank before the block, 0-based
    positives = np.add.reduceat(y, start)
    out = {"auc": float(within[both].mean())}
    with_positive = np.flatnonzero(positives)
    of_request, first = np.unique(of_group[with_positive], return_index=True)
    first = with_positive[first]
    reciprocal = np.zeros(count)
    reciprocal[of_request] = _expected_reciprocal_rank(begin[first], size[first], positives[first])
    out["mrr"] = float(reciprocal[both].mean())
    discount = 1 / np.log2(np.arange(2, int(size.max() + begin.max()) + 2))
    for k in ks:
        gained = np.r_[0.0, np.cumsum(np.where(np.arange(discount.size) < k, discount, 0.0))]
        mean_gain = (gained[begin + size] - gained[begin]) / size
        dcg = np.bincount(of_group, positives * mean_gain, count)
        ideal = gained[np.bincount(of_group, positives, count).astype(np.int64)]
        out[f"ndcg{k}"] = float((dcg[both] / ideal[both]).mean())
    return out


def _expected_reciprocal_rank(begin: np.ndarray, size: np.ndarray, positives: np.ndarray):
    """E[1 / rank of the first positive] in a random order of `size` tied rows after `begin` others.

    The loop runs over the length of the longest block of ties, not over requests.
    """
    expected = np.zeros(begin.size)
    none_yet = np.ones(begin.size)  # P(no positive among the first j of the block)
    for j in range(int((size - positives).max()) + 1):
        here = none_yet * np.minimum(positives / np.maximum(size - j, 1), 1.0)
        expected += here / (begin + j + 1)
        none_yet -= here
    return expected


@dataclasses.dataclass(frozen=True, kw_only=True)
class OracleAlarm:
    """What a comparison with the true probabilities found.

    advantage_nats: the largest value over time of the summed log-loss advantage over the oracle.
    gap: mean log loss minus the oracle's (nats; below 0 = better than possible). se: its standard
    error given the past. z = gap / se. ville, sigma: which rule rings; alarm: either.
    """

    advantage_nats: float
    gap: float
    se: float
    z: float
    ville: bool
    sigma: bool
    alarm: bool


def oracle_alarm(logits, labels, p_true, weights=None, alpha: float = 1e-6) -> OracleAlarm:
    """Does a prediction made from the past beat the probabilities that the labels were drawn from?

    With labels ~ Bernoulli(p) given the past and q made from the past, prod q/p is a martingale of
    mean 1, so that sum[l(p) - l(q)] ever reaching ln(1 / alpha) has probability <= alpha (Ville);
    and mean[l(q) - l(p)] has mean KL >= 0 and the standard error
    sqrt(sum w^2 p (1 - p) (logit p - logit q)^2) / sum w, so that -4 of those are an alarm too.

    Args:
      logits, labels: [n], in time order. A prediction may have read the labels of earlier rows.
      p_true: [n] or a number, strictly between 0 and 1.
      weights: [n] in [0, 1], known before the label (like given click: the click).
    Raises: ValueError where p_true or weights are out of range; UndefinedMetric without any row.
    """
    rows = _rows("oracle_alarm", logits, labels, weights)
    if rows.weights.max() > 1:
        raise ValueError(f"oracle_alarm: weight {rows.weights.max()}, expected at most 1")
    if not 0 < alpha < 1:
        raise ValueError(f"oracle_alarm: alpha={alpha}, expected between 0 and 1")
    p = np.broadcast_to(np.asarray(p_true, np.float64), rows.keep.shape)[rows.keep]
    if not ((p > 0) & (p < 1)).all():
        row = int(np.argmin((p > 0) & (p < 1)))
        raise ValueError(f"oracle_alarm: p_true holds {p[row]}, expected strictly between 0 and 1")
    w, truth = rows.weights, np.log(p) - np.log1p(-p)
    behind = w * (_cross_entropy(rows.logits, rows.labels) - _cross_entropy(truth, rows.labels))
    advantage = max(0.0, float(np.cumsum(-behind).max()))
    gap = float(behind.sum() / w.sum())
    se = float(np.sqrt(np.sum(w**2 * p * (1 - p) * (truth - rows.logits) ** 2)) / w.sum())
    # Rounding of nearly equal losses must not ring; an infinite logit has no z (Ville judges it).
    z = gap / se if se > 1e-15 and math.isfinite(se) else 0.0
    ville = advantage >= math.log(1 / alpha)
    sigma = z < -4
    return OracleAlarm(
        advantage_nats=advantage, gap=gap, se=se, z=z, ville=ville, sigma=sigma,
        alarm=ville or sigma,
    )  # fmt: skip


def learned_parts(logits: np.ndarray, parts: dict[str, np.ndarray]) -> dict[str, float]:
    """How much of each part of a true logit a model has learned: {part: slope}, 1 = all of it.

    The slopes of one least-squares regression, with intercept, of the model's logits [n] on the
    true parts, each [n]. A part that the model makes up for by a correlated one shows there.
    Raises ValueError where the rows are fewer than the slopes.
    """
    x_np = np.stack([np.asarray(part, np.float64) for part in parts.values()], axis=1)
    if len(x_np) <= x_np.shape[1]:
        raise ValueError(f"learned_parts: found {len(x_np)} rows, expected > {x_np.shape[1]}")
    x_np = x_np - x_np.mean(axis=0)  # in place of an intercept
    slopes = np.linalg.lstsq(x_np, np.asarray(logits, np.float64), rcond=None)[0]
    return dict(zip(parts, map(float, slopes)))


def summarize(
    logits, labels, weights, user, request, schema: Schema, ks: Sequence[int] = (5, 10)
) -> dict[str, dict[str, Any]]:
    """All metrics of every task.

    Args: logits, labels, weights [n, K]; user, request [n] ids; K = tasks of the schema.
    Returns: {task: {"impressions" (of weight > 0), "positives", "log_loss", "ne", "auc", "gauc",
      "pcoc", "request_auc", "request_mrr", "request_ndcg<k>", "undefined": {metric: reason}}};
      a metric without a value is None and has its reason in "undefined".
    """
    logits, labels, weights = map(np.asarray, (logits, labels, weights))
    K = len(schema.tasks)
    if (
        logits.ndim != 2
        or logits.shape[1] != K
        or not labels.shape == weights.shape == logits.shape
    ):
        raise ValueError(
            f"metrics.summarize: logits {logits.shape}, labels {labels.shape}, weights "
            f"{weights.shape}, expected [n, {K}] for tasks {[t.name for t in schema.tasks]}"
        )
    return {
        task.name: _summarize_task(logits[:, k], labels[:, k], weights[:, k], user, request, ks)
        for k, task in enumerate(schema.tasks)
    }


def _summarize_task(x, y, w, user, request, ks: Sequence[int]) -> dict[str, Any]:
    """One task of `summarize`; x, y, w [n]."""
    row: dict[str, Any] = {
        "impressions": int((w > 0).sum()),
        "positives": int(((w > 0) & (y > 0)).sum()),
    }
    undefined: dict[str, str] = {}
    for name, metric in (
        ("log_loss", lambda: log_loss(x, y, w)),
        ("ne", lambda: normalized_entropy(x, y, w)),
        ("auc", lambda: auc(x, y, w)),
        ("gauc", lambda: gauc(x, y, user, w)),
        ("pcoc", lambda: calibration(x, y, w)),
    ):
        try:
            row[name] = metric()
        except UndefinedMetric as error:
            row[name], undefined[name] = None, str(error)
    names = [f"request_{name}" for name in ("auc", "mrr", *(f"ndcg{k}" for k in ks))]
    try:
        row |= {f"request_{k}": v for k, v in per_request(x, y, request, w, ks).items()}
    except UndefinedMetric as error:
        row |= dict.fromkeys(names)
        undefined |= dict.fromkeys(names, str(error))
    return {**row, "undefined": undefined}
