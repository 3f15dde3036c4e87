"""The summary against loops over the rows of a tiny log, in chunks that cut everything."""

import json

import numpy as np
import pytest

from rankjax.data import describe, event_log
from tests import tiny
from tests.data import worlds

DAY = 86_400


@pytest.fixture(scope="module", params=[True, False], ids=["times", "order"])
def exact(request):
    return request.param


@pytest.fixture(scope="module")
def files(exact):
    return tiny.columns(time_exact=exact)[1]


@pytest.fixture(scope="module")
def log(tmp_path_factory, exact):
    path = tiny.log(tmp_path_factory.mktemp("describe") / "tiny", time_exact=exact)
    return event_log.EventLog.open(path)


@pytest.fixture(scope="module")
def summary(log):
    return describe.describe(log)


def spans_of(x):
    return {
        "all": np.ones(len(x["span"]), bool),
        **{n: x["span"] == k for k, n in enumerate(NAMES)},
    }


NAMES = ("train", "validation", "test")


def test_it_is_json_and_chunks_change_nothing(log, summary, monkeypatch):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    monkeypatch.setattr(event_log, "CHUNK", 11)
    again = describe.describe(log)
    for a, b in zip(summary["dense_features"], again.pop("dense_features"), strict=True):
        assert list(a) == list(b)
        for x, y in zip(a.values(), b.values()):  # float64 is summed in another order
            assert x == (pytest.approx(y, rel=1e-12) if isinstance(x, float) else y)
    assert again == {k: v for k, v in summary.items() if k != "dense_features"}


def test_rows_times_and_spans(summary, files):
    x, happened = files["impressions"], files["events"]
    assert summary["rows"] == {
        **{"users": 8, "items": 30, "events": 200, "impressions": len(x["item"])},
        "requests": 60,
    }
    for file in ("impressions", "events"):
        time = files[file]["time"]
        assert summary["time"][file] == {"first": time.min(), "last": time.max()}
    assert summary["events_after_last_impression"] == (happened["time"] > x["time"].max()).sum() > 0
    for name, own in list(spans_of(x).items())[1:]:
        assert summary["spans"][name] == {
            "impressions": own.sum(),
            "requests": len(set(x["request"][own])),
            "share": own.mean(),
            "first": x["time"][own].min(),
            "last": x["time"][own].max(),
        }


def test_label_rates_by_span_and_day(summary, files):
    x = files["impressions"]
    for task, counts in (("click", np.ones(len(x["click"]), bool)), ("like", x["click"] == 1)):
        assert summary["tasks"][task]["weight"] == ("" if task == "click" else "click")
        for name, own in spans_of(x).items():
            rows, positives = (own & counts).sum(), x[task][own & counts].sum()
            want = {"rows": rows, "positives": positives, "rate": positives / rows}
            assert summary["tasks"][task][name] == want
        days = sorted(set(x["time"] // DAY))
        assert summary["days"]["day"] == [f"1970-01-0{1 + day}" for day in days]
        of_day = [counts & (x["time"] // DAY == day) for day in days]
        got = summary["days"]["tasks"][task]
        assert got["rows"] == [own.sum() for own in of_day]
        assert got["positives"] == [x[task][own].sum() for own in of_day]
    for name, own in list(spans_of(x).items())[1:]:
        want = [(own & (x["time"] // DAY == day)).sum() for day in days]
        assert summary["days"]["spans"][name] == want


def check_distribution(got, values):
    values = np.asarray(values)
    assert got["count"] == len(values) and got["zeros"] == np.mean(values == 0)
    assert got["mean"] == pytest.approx(values.mean()) and got["std"] == pytest.approx(values.std())
    for name, q in {"min": 0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1}.items():
        assert got[name] == np.quantile(values, q, method="inverted_cdf"), name


def test_histories_candidates_and_events(summary, files, exact):
    x, happened = files["impressions"], files["events"]
    key = "time" if exact else "order"
    lengths = np.array(
        [
            ((happened["user"] == user) & (happened[key] < when)).sum()
            for user, when in zip(x["user"], x[key])
        ]
    )
    assert (lengths == 0).any() and lengths.max() > 5
    for name, own in spans_of(x).items():
        check_distribution(summary["history"][name], lengths[own])
    check_distribution(summary["candidates"], np.unique(x["request"], return_counts=True)[1])
    check_distribution(
        summary["events_per_user"], [(happened["user"] == u).sum() for u in range(1, 9)]
    )


def new(values, span):
    """Shares of the ids of validation and of test that train does not hold."""
    ids = [set(values[span == 0].ravel().tolist()) - {0}]
    out = {}
    for k, name in enumerate(NAMES[1:], 1):
        own = [v for v in values[span == k].ravel().tolist() if v]
        out[name] = np.mean([v not in ids[0] for v in own])
    return out


def test_users_items_and_id_features(summary, files):
    x = files["impressions"]
    features = {f["name"]: f for f in summary["id_features"]}
    for file, name in (("users", "user"), ("items", "item")):
        got, shown = summary[file], len(set(x[name].tolist()))
        known = len(files[file][name]) - 1
        assert (got["known"], got["shown"], got["never_shown"]) == (known, shown, known - shown)
        assert got["unseen"] == pytest.approx(new(x[name], x["span"]))
    columns = {
        "segment": files["users"]["segment"][x["user"]],
        "item": x["item"],
        "tags": files["items"]["tags"][x["item"]],
        "surface": x["surface"],
        "hour": 1 + x["time"] // 3600 % 24,
    }
    for name, values in columns.items():
        got = features[name]
        rows = values.reshape(len(values), -1)
        assert got["distinct"] == len(set(values.ravel().tolist()) - {0}), name
        assert got["missing"] == np.mean((rows == 0).all(axis=1)), name
        assert got["unseen"] == pytest.approx(new(values, x["span"])), name
        assert got["of"] == "impressions"
    action = features["action"]
    assert (action["of"], action["distinct"], action["missing"]) == ("events", 3, 0)
    assert action["unseen"] is None and "log_age" not in features


def test_tables_hold_what_all_their_features_met(tmp_path):
    found, files = tiny.columns(requests=4, candidates=1, events=2)
    summary = describe.describe(worlds.written(tmp_path, found, files))
    got = {t["name"]: t["distinct"] for t in summary["tables"]}
    shown, happened = files["impressions"], files["events"]
    items = set(shown["item"].tolist()) | set(happened["item"].tolist())
    of_items = set(files["items"]["category"][list(items)].tolist())
    of_users = set(files["users"]["segment"][shown["user"]].tolist())
    assert of_users - of_items and len(items) > len(set(shown["item"].tolist()))
    assert got["category"] == len((of_items | of_users) - {0})
    assert got["item"] == len(items)
    assert got["action"] == len(set(happened["action"].tolist()))
    assert [t["rows"] for t in summary["tables"]][:3] == [9, 31, 8]


def test_dense_features(summary, files, exact):
    got = {f["name"]: f for f in summary["dense_features"]}
    assert got["activity"]["of"] == "users" and got["dwell"]["of"] == "events"
    check_distribution(got["activity"], files["users"]["activity"][1:])
    check_distribution(got["quality"], files["items"]["quality"][1:])
    check_distribution(got["dwell"], files["events"]["dwell"])
    assert ("item_age" in got) == exact
    if exact:
        x = files["impressions"]
        age = np.maximum(x["time"] - files["items"]["birth"][x["item"]], 0) / DAY
        check_distribution(got["item_age"], np.log1p(age).astype(np.float32))


def test_what_does_not_apply_is_said(summary, exact):
    words = " ".join(summary["not_applicable"])
    assert summary["time_exact"] == exact
    assert ("Times are not exact" in words) != exact
    assert ("log_age" in words) == exact
    assert "birth" not in words and "sampled" not in words


def test_notes_and_sampled_negatives(tmp_path):
    found, files = worlds.clean()
    info = {"notes": ["Negatives were drawn from one hour."], "negatives": {"per_click": 4}}
    summary = describe.describe(worlds.written(tmp_path, found, files, **info))
    assert summary["notes"] == info["notes"] and summary["negatives"] == {"per_click": 4}
    assert "Negatives were sampled" in summary["not_applicable"][-1]
    assert info["notes"][0] in describe.text(summary)
    assert info["notes"][0] in describe.page(summary)


def test_an_empty_log_is_described(tmp_path):
    found, files = tiny.columns()
    for file in ("events", "impressions"):
        files[file] = {name: x[:0] for name, x in files[file].items()}
    summary = describe.describe(worlds.written(tmp_path, found, files))
    assert summary["rows"]["requests"] == 0 and summary["candidates"]["mean"] is None
    assert summary["tasks"]["click"]["all"] == {"rows": 0, "positives": 0, "rate": None}
    assert summary["time"]["events"] == {"first": None, "last": None}
    json.dumps(summary, allow_nan=False)
    assert "- to - UTC" in describe.text(summary) and "<html" in describe.page(summary)


def test_counters_are_marked_and_may_be_left_out(tmp_path):
    found, files = worlds.clean()
    n = len(files["impressions"]["item"])
    files["impressions"]["seen"] = np.arange(n, dtype=np.float32)
    found = worlds.with_feature(found, name="seen", kind="dense", counter=True)
    summary = describe.describe(worlds.written(tmp_path, found, files))
    assert [f["name"] for f in summary["dense_features"] if f["counter"]] == ["seen"]
    without = event_log.EventLog.open(tmp_path / "log", counters=False)
    assert "seen" not in {f["name"] for f in describe.describe(without)["dense_features"]}


def test_a_derived_feature_that_cannot_be_made_is_refused(tmp_path):
    found, files = tiny.columns()
    del files["items"]["birth"]
    with pytest.raises(ValueError, match=r"item_age.*birth"):
        describe.describe(worlds.written(tmp_path, found, files))
