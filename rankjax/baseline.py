"""Gradient-boosted trees on the same features, split and metrics: what one would use instead.

scikit-learn's HistGradientBoostingClassifier sees every impression as one row of numbers: dense
features and counters, how often each id occurs in the training rows, the ids of small vocabularies
as categories, how many events the user has, and how long ago the last one was. It learns from the
train span; validation chooses the number of trees, and whether the frequencies are used (where new
items come every day they mislead); test is read once.
"""

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from rankjax import evaluate
from rankjax.data import event_log, samples
from rankjax.schema import Feature

METRICS = ("ne", "auc", "log_loss", "gauc", "pcoc", "request_auc", "request_mrr", "request_ndcg10")
SIDES = ("user", "item", "context")
FILE = {"user": "users", "item": "items", "context": "impressions"}
CATEGORIES = 255  # rows of a table at most: scikit-learn's bins hold one category each
CHUNK = event_log.CHUNK  # impressions that are gathered or scored at once
KNOWN = 1e-3  # share of the training rows that must know a column's value
FREQUENCY = "frequency of "  # what names of such columns start with
ONE_THREAD = 50_000  # rows up to which threads wait for each other longer than they save

Frequencies = dict[tuple[str, str], np.ndarray]
Column = tuple[str, np.ndarray, bool]  # name, values [n], categorical


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """How the trees are grown; what does not stand here is scikit-learn's default."""

    budget: int | None = None  # newest n impressions of the train span; None = all of them
    max_rows: int = 2_000_000  # of those the newest at most; a column takes 20 bytes a row
    learning_rate: float = 0.1
    iterations: int = 300  # trees that are grown; validation says how many of them count
    leaves: int = 31
    seed: int = 0  # of the rows that scikit-learn draws to place the bins

    def __post_init__(self) -> None:
        least = {"max_rows": 1, "iterations": 1, "leaves": 2, "seed": 0}
        least |= {} if self.budget is None else {"budget": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(
                    f"BaselineConfig: {name}={getattr(self, name)}, expected at least {low}"
                )
        if not self.learning_rate > 0:
            raise ValueError(
                f"BaselineConfig: learning_rate={self.learning_rate}, expected more than 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trees:
    """What `fit` learned.

    model: the fitted classifier, of which the first `iterations` trees count. frequencies: of the
    training rows. rows: int64 [n], the impressions learned from; asked: how many there were to
    learn from before `max_rows`. names [F]: the columns; unused: those of them that were left out,
    because less than KNOWN of the rows know them, which scikit-learn cannot cut into bins, or
    because validation is better off without the frequencies.
    """

    model: Any
    iterations: int
    frequencies: Frequencies
    rows: np.ndarray
    asked: int
    names: tuple[str, ...]
    unused: tuple[str, ...]


def _places(log: event_log.EventLog, side: str, rows: np.ndarray) -> np.ndarray:
    """Rows of the side's file that these impressions point at, [n]; 0 = missing, but in context."""
    return rows if side == "context" else log.column("impressions", side)[rows]


def _values(log: event_log.EventLog, f: Feature, rows: np.ndarray) -> np.ndarray:
    """A feature of impressions `rows`, stored or derived, [n] or [n, M]."""
    if not f.derive:
        return log.column(FILE[f.side], f.name)[_places(log, f.side, rows)]
    rule = samples.DERIVED[f.derive]
    when = log.column("impressions", "time")[rows]
    born = log.column("items", "birth")[_places(log, "item", rows)] if rule.birth else when
    return rule.rule(when, when, born)


def _missing(log: event_log.EventLog, f: Feature, rows: np.ndarray) -> np.ndarray:
    """Whether the user or the item that the feature tells of is unknown, bool [n]."""
    side = "item" if f.derive and samples.DERIVED[f.derive].birth else f.side
    return np.zeros(len(rows), bool) if side == "context" else _places(log, side, rows) == 0


def frequencies(log: event_log.EventLog, rows: np.ndarray) -> Frequencies:
    """{(side, feature): float32 [rows of its table]}: log10(1 + how often an id occurs in `rows`).

    rows: int64 [n], of the impressions file; every value of a feature with several counts. Id 0,
    which means missing, is NaN.
    """
    samples.check_derived(log)
    found = {}
    for f in log.schema.of(*SIDES):
        if f.kind == "dense":
            continue
        size = log.schema.table(f.table).rows
        counts = np.zeros(size, np.int64)
        for start in range(0, len(rows), CHUNK):
            ids = _values(log, f, rows[start : start + CHUNK])
            counts += np.bincount(ids.ravel(), minlength=size)
        found[f.side, f.name] = np.log10(1 + counts).astype(np.float32)
        found[f.side, f.name][0] = np.nan
    return found


def _of_feature(
    log: event_log.EventLog, f: Feature, rows: np.ndarray, frequency: np.ndarray | None
) -> Iterator[Column]:
    """What one feature gives; frequency [rows of its table]: of its ids."""
    name, values = f"{f.side} {f.name}", _values(log, f, rows)
    if frequency is None:
        yield name, np.where(_missing(log, f, rows), np.nan, values), False
    elif f.kind == "ids":
        known = values > 0
        count = known.sum(axis=1)
        yield f"{name} values", np.where(_missing(log, f, rows), np.nan, count), False
        total = np.where(known, frequency[values], 0).sum(axis=1, dtype=np.float64)
        mean = np.divide(total, count, out=np.full(len(rows), np.nan), where=count > 0)
        yield FREQUENCY + name, mean, False
    else:
        yield FREQUENCY + name, frequency[values], False
        if len(frequency) <= CATEGORIES:
            yield name, np.where(values == 0, np.nan, values), True


def _of_past(log: event_log.EventLog, rows: np.ndarray) -> Iterator[Column]:
    """The user's events that the candidate may read: how many, and log seconds since the last."""
    end = samples.past_events(log, rows)
    count = end - log.event_start[log.column("impressions", "user")[rows]]
    yield "past events", count, False
    if log.schema.time_exact:
        some = count > 0
        since = np.full(len(rows), np.nan)
        happened = log.column("events", "time")[end[some] - 1]
        since[some] = np.log(log.column("impressions", "time")[rows[some]] - happened)
        yield "log seconds since the last event", since, False


def _columns(log: event_log.EventLog, rows: np.ndarray, frequency: Frequencies) -> Iterator[Column]:
    """One column after the other, so that only one is held beside the matrix."""
    for f in log.schema.of(*SIDES):
        yield from _of_feature(log, f, rows, frequency.get((f.side, f.name)))
    yield from _of_past(log, rows)


def features(
    log: event_log.EventLog, rows: np.ndarray, frequency: Frequencies
) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """Impressions `rows` int64 [n] -> (x float32 [n, F], names [F], categorical bool [F]).

    NaN where a value is missing. frequency: what `frequencies` counted in the training rows.
    Raises ValueError where the schema asks for a derived feature that cannot be computed.
    """
    samples.check_derived(log)
    layout = [(name, categorical) for name, _, categorical in _columns(log, rows[:0], frequency)]
    names, categorical = zip(*layout)
    x_nf = np.empty((len(rows), len(layout)), np.float32)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        for column, (_, values, _) in enumerate(_columns(log, chunk, frequency)):
            x_nf[start : start + CHUNK, column] = values
    return x_nf, names, np.array(categorical)


def _sklearn() -> ModuleType:
    # Read when OpenMP is loaded: threads that spin while they wait starve on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import sklearn.ensemble
    except ImportError as error:
        raise ValueError(
            "baseline: found no scikit-learn, expected it: pip install 'rankjax[baseline]'"
        ) from error
    return sklearn


def _threads(x_nf: np.ndarray) -> contextlib.AbstractContextManager:
    """On a busy machine the threads of a small job take ten times as long as one alone."""
    import threadpoolctl  # scikit-learn brings it

    few = len(x_nf) <= ONE_THREAD
    return threadpoolctl.threadpool_limits(1 if few else None, user_api="openmp")


def _span(log: event_log.EventLog, span: str) -> np.ndarray:
    """Rows of a span's impressions, oldest first."""
    return np.flatnonzero(log.column("impressions", "span") == event_log.SPANS.index(span))


def _train_rows(log: event_log.EventLog, config: BaselineConfig) -> tuple[np.ndarray, int]:
    """(rows to learn from, how many there were to learn from)."""
    rows = _span(log, "train")
    if config.budget is not None and config.budget > len(rows):
        raise ValueError(
            f"baseline: budget={config.budget}, expected 1 .. {len(rows)}, the impressions of the "
            f"train span in {log.folder / 'impressions.arrow'}"
        )
    asked = len(rows) if config.budget is None else config.budget
    return rows[len(rows) - min(asked, config.max_rows) :], asked


def _labels(log: event_log.EventLog, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The primary task's labels and weights, float64 [n]."""
    labels, weights = evaluate.labels_of(log, rows)
    return labels[:, log.schema.primary], weights[:, log.schema.primary]


def fit(log: event_log.EventLog, config: BaselineConfig) -> Trees:
    """Grows the trees on the train span, with frequencies and without.

    Log loss on validation chooses between the two, and how many trees count.

    Raises:
      ValueError: scikit-learn is missing; a budget larger than the train span; the rows to learn
        from hold one class only; nothing of weight lies in the validation span.
    """
    ensemble = _sklearn().ensemble
    rows, asked = _train_rows(log, config)
    labels, weights = _labels(log, rows)
    counted = weights > 0  # weights are labels or 1
    if len(found := np.unique(labels[counted])) < 2:
        raise ValueError(
            f'{log.folder / "impressions.arrow"}, column "{log.schema.primary_task}": found '
            f"{found.tolist()} in the {len(rows)} training rows, expected both 0 and 1"
        )
    frequency = frequencies(log, rows)
    x_nf, names, categorical = features(log, rows[counted], frequency)
    unused = np.array([np.mean(~np.isnan(x_n)) < KNOWN for x_n in x_nf.T])
    tried = []
    for left_out in (unused, unused | [name.startswith(FREQUENCY) for name in names]):
        x_nf[:, left_out] = 0  # a constant is never split on
        model = ensemble.HistGradientBoostingClassifier(
            learning_rate=config.learning_rate,
            max_iter=config.iterations,
            max_leaf_nodes=config.leaves,
            categorical_features=categorical,
            early_stopping=False,  # it would split at random; validation is chosen by time
            random_state=config.seed,
        )
        with _threads(x_nf):
            model.fit(x_nf, labels[counted])
        loss = _validation_loss(log, model, config.iterations, frequency)
        tried.append((loss.min(), 1 + int(loss.argmin()), model, left_out))
    _, iterations, model, left_out = min(tried, key=lambda one: one[0])
    return Trees(
        model=model,
        iterations=iterations,
        frequencies=frequency,
        rows=rows,
        asked=asked,
        names=names,
        unused=tuple(itertools.compress(names, left_out)),
    )


def _staged(
    log: event_log.EventLog, model: Any, rows: np.ndarray, frequency: Frequencies
) -> Iterator[np.ndarray]:
    """Logits float64 [n] of `rows` after each number of trees."""
    x_nf = features(log, rows, frequency)[0]
    with _threads(x_nf):
        yield from model.staged_decision_function(x_nf)


def _validation_loss(
    log: event_log.EventLog, model: Any, iterations: int, frequency: Frequencies
) -> np.ndarray:
    """Summed log loss on validation after each number of trees, nats, float64 [iterations]."""
    rows, total, loss = _span(log, "validation"), 0.0, np.zeros(iterations)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        labels, weights = _labels(log, chunk)
        for i, logits in enumerate(_staged(log, model, chunk, frequency)):
            loss[i] += np.sum(weights * np.logaddexp(0, (1 - 2 * labels) * logits))
        total += weights.sum()
    if not total:
        raise ValueError(
            f"{log.folder / 'impressions.arrow'}: found {len(rows)} impressions of weight 0 in "
            "span 'validation', expected some to choose the number of trees on"
        )
    return loss


def score(log: event_log.EventLog, trees: Trees, rows: np.ndarray) -> np.ndarray:
    """Logits of the primary task for impressions `rows` int64 [n]: float32 [n]."""
    logits = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), CHUNK):
        staged = _staged(log, trees.model, rows[start : start + CHUNK], trees.frequencies)
        logits[start : start + CHUNK] = next(itertools.islice(staged, trees.iterations - 1, None))
    return logits


def run(log: event_log.EventLog, config: BaselineConfig = BaselineConfig()) -> dict[str, Any]:
    """Grows the trees and evaluates them once on validation and test.

    Returns, as JSON types: `validation_<metric>` and `test_<metric>` of METRICS for the primary
    task, None where undefined, and "undefined" {span: {metric: reason}} or None; "rows" learned
    from, "rows_asked" (more than "rows" where max_rows cut them), "features" (columns used),
    "unused" (names of columns left out), "frequencies" and "counters" (whether those of ids and
    those of the log are among the features), "iterations" (trees that count), "config", "sklearn"
    (its version), "seconds" (wall time).

    Raises ValueError as `fit` does.
    """
    began = time.monotonic()
    trees = fit(log, config)
    found: dict[str, Any] = {
        "rows": len(trees.rows),
        "rows_asked": trees.asked,
        "features": len(trees.names) - len(trees.unused),
        "unused": list(trees.unused),
        "frequencies": any(n.startswith(FREQUENCY) for n in {*trees.names} - {*trees.unused}),
        "iterations": trees.iterations,
        "counters": any(f.counter for f in log.schema.features),
        "config": dataclasses.asdict(config),
        "sklearn": _sklearn().__version__,
    }
    undefined = {}
    for span in ("validation", "test"):
        rows = _span(log, span)
        logits = np.zeros((len(rows), len(log.schema.tasks)), np.float32)
        logits[:, log.schema.primary] = score(log, trees, rows)
        scored = evaluate.Scored(rows, logits)
        metrics = evaluate.summarize(log, scored)[log.schema.primary_task]
        found |= {f"{span}_{name}": metrics[name] for name in METRICS}
        if reasons := {k: v for k, v in metrics["undefined"].items() if k in METRICS}:
            undefined[span] = reasons
    return {**found, "undefined": undefined or None, "seconds": time.monotonic() - began}
