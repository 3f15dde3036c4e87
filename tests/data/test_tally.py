"""Counts against loops over the rows of a tiny log, in chunks that cut everything."""

import collections
import datetime

import numpy as np
import pytest
from sklearn import metrics

from rankjax.data import event_log, tally
from tests import tiny

DAY = 86_400


@pytest.fixture(params=[7, 1 << 20])
def chunk(request, monkeypatch):
    monkeypatch.setattr(event_log, "CHUNK", request.param)


@pytest.fixture
def log(tmp_path, chunk):
    return event_log.EventLog.open(tiny.log(tmp_path / "log"))


def impressions(log):
    """Every impression as a dict."""
    x = log.columns["impressions"]
    return [{name: x[name][row] for name in x} for row in range(log.rows("impressions"))]


def test_chunks_cover_all_rows_once(chunk):
    assert list(tally.chunks(0)) == [] and list(tally.chunks(5, start=5)) == []
    for rows in (1, 6, 7, 8, 20):
        parts = list(tally.chunks(rows, start=1))
        covered = np.concatenate([np.arange(rows)[p] for p in parts] or [np.arange(0)])
        assert covered.tolist() == list(range(1, rows))
        assert all(0 < p.stop - p.start <= event_log.CHUNK for p in parts)


def test_grown_fills_with_zeros_and_never_shrinks():
    x = np.array([[1, 2], [3, 4]])
    np.testing.assert_array_equal(tally.grown(x, 3), [[1, 2, 0], [3, 4, 0]])
    assert tally.grown(x, 1) is x and tally.grown(x, 2) is x


def test_ids_by_span(log):
    want = collections.Counter((x["span"], x["item"]) for x in impressions(log))
    got = tally.by_span(log, log.column("impressions", "item").__getitem__)
    assert got.sum() == log.rows("impressions")
    assert all(got[key] == n for key, n in want.items())
    items = log.column("events", "item")
    got = tally.count(len(items), items.__getitem__)
    assert got.tolist() == [int((items == k).sum()) for k in range(items.max() + 1)]


@pytest.mark.parametrize("task", [0, 1])
def test_ids_by_half_and_label(log, task):
    task = log.schema.tasks[task]
    train = [x for x in impressions(log) if x["span"] == 0]
    want = collections.Counter(
        (int(row >= len(train) // 2), x[task.name], x["item"])
        for row, x in enumerate(train)
        if not task.weight or x[task.weight]
    )
    got = tally.by_label(log, task, log.column("impressions", "item").__getitem__)
    assert got.sum() == want.total() > 0
    assert all(got[key] == n for key, n in want.items())


def test_counts_pass_through_features(log):
    counts = tally.by_span(log, log.column("impressions", "item").__getitem__)
    for name in ("category", "tags"):
        column = log.column("items", name)
        want = collections.Counter(
            (x["span"], v) for x in impressions(log) for v in np.atleast_1d(column[x["item"]])
        )
        got = tally.through(column, counts)
        assert got.sum() == want.total()
        assert all(got[key] == n for key, n in want.items())


def test_context_values_are_those_of_a_batch(log):
    features = {f.name: f for f in log.schema.of("context")}
    birth = log.column("items", "birth")
    for name in ("surface", "hour", "item_age"):
        read = tally.values(log, features[name])
        got = np.concatenate([read(part) for part in tally.chunks(log.rows("impressions"))])
        assert got.dtype == (np.float32 if features[name].kind == "dense" else np.int32)
        for x, value in zip(impressions(log), got):
            age = max(0, x["time"] - birth[x["item"]]) / DAY
            hour = datetime.datetime.fromtimestamp(int(x["time"]), datetime.UTC).hour
            want = {"surface": x["surface"], "hour": 1 + hour, "item_age": np.log(1 + age)}
            assert value == pytest.approx(want[name], rel=1e-6)


def test_the_share_of_new_ids_leaves_missing_ones_out():
    counts = np.array([[9, 1, 0, 2], [5, 3, 1, 0], [7, 0, 0, 0]])
    assert tally.unseen(counts) == [0.25, None]


def test_requests(log):
    request = log.column("impressions", "request")
    starts = tally.request_starts(log)
    assert starts.tolist() == [k for k in range(len(request)) if request[k] != request[k - 1]]
    parts = list(tally.request_chunks(starts, len(request)))
    assert [p.start for p in parts] == [0, *(p.stop for p in parts[:-1])]
    assert parts[-1].stop == len(request) and {p.start for p in parts} <= set(starts.tolist())
    for p in parts:  # the last request of a chunk reaches its size, or the end
        assert starts[starts < p.stop][-1] - p.start < event_log.CHUNK
        assert p.stop == len(request) or p.stop - p.start >= event_log.CHUNK
    assert list(tally.request_chunks(np.empty(0, np.int64), 0)) == []


def test_a_request_at_two_times_starts_twice(tmp_path):
    found, files = tiny.columns(requests=2, candidates=1)
    files["impressions"]["request"][:] = 5
    path = event_log.write_log(tmp_path / "log", found, **files, fingerprint={})
    assert tally.request_starts(event_log.EventLog.open(path)).tolist() == [0, 1]


def test_days(log):
    got = tally.days(log)
    want = collections.defaultdict(lambda: np.zeros(5, int))
    for x in impressions(log):
        want[int(x["span"]), int(x["time"] // DAY)] += (
            *(1, 1, x["click"]),
            *(x["click"], x["click"] * x["like"]),
        )
    names = ["click.rows", "click.positives", "like.rows", "like.positives"]
    assert got.columns == ["span", "day", "impressions", *names]
    assert got.rows() == [(*key, *row) for key, row in sorted(want.items())]


def test_days_of_no_rows_have_the_same_columns(tmp_path, log):
    found, files = tiny.columns()
    files["impressions"] = {name: x[:0] for name, x in files["impressions"].items()}
    path = event_log.write_log(tmp_path / "empty", found, **files, fingerprint={})
    empty = event_log.EventLog.open(path)
    assert tally.days(empty).schema == tally.days(log).schema
    assert tally.request_starts(empty).tolist() == []


def test_dates():
    assert tally.date(0) == "1970-01-01" and tally.date(19_874) == "2024-05-31"
    assert tally.date(10**9) == "day 1000000000"


def test_auc_of_rows_and_of_counts():
    rng = np.random.default_rng(0)
    x = np.round(rng.normal(size=500), 1).astype(np.float32)  # of both signs, with ties
    x[:20] = -0.0
    x[20:40] = 0.0
    x[40], x[41] = 1e-42, -1e-42
    label = rng.random(500) < 0.5 + 0.2 * np.sign(x)
    want = metrics.roc_auc_score(label, x)
    assert want > 0.55
    assert tally.auc_rows(x, label) == pytest.approx(want, abs=1e-12)
    assert tally.auc_rows(-x, label) == pytest.approx(1 - want, abs=1e-12)
    values = np.unique(x)
    p, q = ([int(((x == v) & (label == y)).sum()) for v in values] for y in (True, False))
    assert tally.auc(values, np.array(p), np.array(q)) == pytest.approx(want, abs=1e-12)
    low, high = tally.auc_range(tally.histogram(x, label))
    assert low <= want <= high and high - low < 0.05
    for one_class in (np.zeros(500, bool), np.ones(500, bool)):
        assert np.isnan(tally.auc_rows(x, one_class))
        assert np.isnan(tally.auc_range(tally.histogram(x, one_class))).all()
    assert np.isnan(tally.auc_rows(x[:0], label[:0]))


def test_a_histogram_ascends_with_the_values():
    exact = np.float32([-np.finfo(np.float32).max, -3, -2, -1, -1e-30, 0, 1e-30, 1, 2, 3, 1e38])
    rows = tally.histogram(exact, np.zeros(len(exact), bool))
    assert rows[0].sum() == len(exact) and rows[0].max() == 1 and rows[1].sum() == 0
    bins = [np.flatnonzero(tally.histogram(x[None], np.ones(1, bool))[1])[0] for x in exact]
    assert bins == sorted(bins) and bins[0] >= 0 and bins[-1] < tally.BINS
    assert tally.histogram(np.float32([-0.0, 0.0]), np.ones(2, bool)).max() == 2
