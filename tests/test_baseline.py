"""Trees against brute force: what they see, what they learn from, what they must not know."""

import collections
import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import sklearn.metrics

from rankjax import baseline, schema
from rankjax.data import event_log
from rankjax.data.sources import synthetic
from rankjax.scaling import trial
from tests import tiny

FEW = baseline.BaselineConfig(iterations=25, leaves=7)
SIZES = {"users": 20, "items": 30, "events": 300, "requests": 500}


def write(folder, *, edit=lambda files: None, primary="click", **options):
    """A tiny log with one dense context column `signal`, a counter, 0 unless `edit` fills it."""
    made, files = tiny.columns(**(SIZES | options))
    rows = len(files["impressions"]["request"])
    files["impressions"]["signal"] = np.zeros(rows, np.float32)
    edit(files)
    signal = schema.Feature(
        name="signal", side="context", group="context", kind="dense", counter=True
    )
    made = dataclasses.replace(made, features=(*made.features, signal), primary_task=primary)
    return event_log.EventLog.open(
        event_log.write_log(folder, made, **files, fingerprint={"tiny": 1})
    )


def brute_force(log, row, training) -> dict[str, float]:
    """Every column of one impression, from the definition."""
    shown, items, users = (log.columns[f] for f in ("impressions", "items", "users"))
    user, item, when = (int(shown[c][row]) for c in ("user", "item", "time"))
    nan, known = math.nan, bool(shown["item"][row])

    def often(values_of, value):
        count = collections.Counter(v for r in training for v in np.atleast_1d(values_of(r)))
        return math.log10(1 + count[value]) if value else nan

    of_user = lambda name: lambda r: users[name][shown["user"][r]]
    of_item = lambda name: lambda r: items[name][shown["item"][r]]
    hour = lambda r: 1 + shown["time"][r] // 3600 % 24
    tags = [t for t in items["tags"][item] if t]
    tag_frequency = [often(of_item("tags"), t) for t in tags]
    key = "time" if log.schema.time_exact else "order"
    events = log.columns["events"]
    past = [
        int(t)
        for t, u, k in zip(events["time"], events["user"], events[key])
        if u == user and k < shown[key][row]
    ]
    found = {
        "user user": user,
        "frequency of user user": often(lambda r: shown["user"][r], user),
        "user segment": users["segment"][user],
        "frequency of user segment": often(of_user("segment"), users["segment"][user]),
        "user activity": users["activity"][user],
        "item item": item if known else nan,
        "frequency of item item": often(lambda r: shown["item"][r], item),
        "item category": items["category"][item] if known else nan,
        "frequency of item category": often(of_item("category"), items["category"][item]),
        "item tags values": len(tags) if known else nan,
        "frequency of item tags": np.mean(tag_frequency) if tags else nan,
        "item quality": items["quality"][item] if known else nan,
        "context surface": shown["surface"][row],
        "frequency of context surface": often(lambda r: shown["surface"][r], shown["surface"][row]),
        "context hour": hour(row),
        "frequency of context hour": often(hour, hour(row)),
        "context signal": shown["signal"][row],
        "past events": len(past),
    }
    if log.schema.time_exact:
        days = max(when - int(items["birth"][item]), 0) / 86_400
        found["context item_age"] = math.log1p(days) if known else nan
        found["log seconds since the last event"] = math.log(when - max(past)) if past else nan
    return found


def no_items(files):
    files["impressions"]["item"][::11] = 0
    files["impressions"]["signal"][:] = np.arange(len(files["impressions"]["item"]))


@pytest.mark.parametrize("time_exact", [True, False])
def test_features_are_what_the_definition_says(time_exact, tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "CHUNK", 37)
    log = write(tmp_path / "log", edit=no_items, requests=60, time_exact=time_exact)
    training = np.arange(5, 60)
    rows = np.arange(0, log.rows("impressions"), 2)
    counted = baseline.frequencies(log, training)
    x_nf, names, categorical = baseline.features(log, rows, counted)
    assert x_nf.dtype == np.float32 and x_nf.shape == (len(rows), len(names))
    want = [brute_force(log, row, training) for row in rows]
    assert set(names) == set(want[0])
    for column, name in enumerate(names):
        expected = [w[name] for w in want]
        np.testing.assert_allclose(x_nf[:, column], expected, rtol=1e-5, err_msg=name)
    assert np.isnan(x_nf[0, names.index("item item")])
    few = ("user user", "user segment", "item item", "item category", "context surface")
    assert {n for n, c in zip(names, categorical) if c} == {*few, "context hour"}


def test_a_large_table_is_seen_by_frequency_only(tmp_path):
    log = write(tmp_path / "log", items=254)
    assert "item item" in baseline.features(log, np.arange(3), baseline.frequencies(log, [0]))[1]
    log = write(tmp_path / "larger", items=255)
    names = baseline.features(log, np.arange(3), baseline.frequencies(log, [0]))[1]
    assert "item item" not in names and "frequency of item item" in names


def popular(files):
    """Five items take half of the impressions, and get the clicks; nothing else tells them."""
    shown, rng = files["impressions"], np.random.default_rng(0)
    n = len(shown["item"])
    often = rng.random(n) < 0.5
    shown["item"][:] = np.where(often, rng.integers(1, 6, n), rng.integers(6, 301, n))
    shown["click"][:] = often
    for name in ("category", "tags", "quality", "birth"):
        files["items"][name].fill(0)


def misleading(files):
    popular(files)
    flip("validation")(files)
    flip("test")(files)


def test_validation_decides_whether_frequencies_are_used(tmp_path):
    found = baseline.run(write(tmp_path / "good", edit=popular, items=300), FEW)
    assert found["frequencies"] and found["test_auc"] > 0.9
    assert "frequency of item item" not in found["unused"]
    found = baseline.run(write(tmp_path / "bad", edit=misleading, items=300), FEW)
    assert not found["frequencies"] and 0.35 < found["test_auc"] < 0.65 and found["test_ne"] < 1.1
    assert {n for n in names_of(tmp_path / "bad") if "frequency" in n} <= set(found["unused"])


def names_of(folder):
    log = event_log.EventLog.open(folder)
    return baseline.features(log, np.arange(2), baseline.frequencies(log, np.arange(2)))[1]


def test_columns_without_any_value_are_no_accident(tmp_path):
    def nothing(files):
        files["impressions"]["surface"].fill(0)
        files["impressions"]["item"].fill(0)

    found = baseline.run(write(tmp_path / "log", edit=nothing, events=0), FEW)
    assert found["test_ne"] > 0
    assert {"context surface", "item quality", "log seconds since the last event"} < set(
        found["unused"]
    )
    assert found["features"] + len(found["unused"]) == len(names_of(tmp_path / "log"))


def test_columns_that_are_often_missing_are_used(tmp_path):
    half = lambda files: files["impressions"]["item"][::2].fill(0)
    assert baseline.fit(write(tmp_path / "log", edit=half), FEW).unused == ()


def span_rows(log, span):
    return np.flatnonzero(log.column("impressions", "span") == event_log.SPANS.index(span))


def planted(files, noise=0.1, task="click"):
    """The counter tells the label, up to noise."""
    shown = files["impressions"]
    drawn = np.random.default_rng(1).normal(size=len(shown["click"]))
    shown["signal"][:] = shown[task] + noise * drawn


def shuffled(files):
    planted(files)
    np.random.default_rng(2).shuffle(files["impressions"]["signal"])


def test_a_planted_feature_is_found_and_a_shuffled_one_is_not(tmp_path):
    found = baseline.run(write(tmp_path / "planted", edit=planted), FEW)
    assert found["test_auc"] > 0.99 and found["test_ne"] < 0.3 and found["test_request_auc"] > 0.99
    lost = baseline.run(write(tmp_path / "shuffled", edit=shuffled), FEW)
    assert abs(lost["test_auc"] - 0.5) < 0.12


def test_without_counters_there_are_fewer_columns(tmp_path):
    log = write(tmp_path / "log", edit=planted)
    found = baseline.run(log, FEW)
    plain = event_log.EventLog.open(log.folder, counters=False)
    without = baseline.run(plain, FEW)
    assert (found["counters"], without["counters"]) == (True, False)
    assert found["features"] == without["features"] + 1
    assert abs(without["test_auc"] - 0.5) < 0.12


def test_trees_beat_the_constant_on_the_world(tmp_path):
    world = dataclasses.replace(synthetic.WORLD_SMALL, users=60)
    log = event_log.EventLog.open(synthetic.prepare(world, tmp_path, workers=1))
    found = baseline.run(log, baseline.BaselineConfig(iterations=60))
    assert found["test_ne"] < 0.95 and found["validation_ne"] < 0.95 and found["test_auc"] > 0.65
    assert 1 < found["iterations"] <= 60
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("primary", ["click", "like"])
def test_the_number_of_trees_is_the_best_on_validation(primary, tmp_path):
    """like counts where click = 1, in the choice as in the metrics; elsewhere it misleads."""

    def edit(files):
        planted(files, noise=1.0, task=primary)
        if primary == "like":
            flip("validation", "like", lambda shown: shown["click"] == 0)(files)

    log = write(tmp_path / "log", edit=edit, primary=primary, requests=1500)
    config = baseline.BaselineConfig(iterations=40, leaves=7, seed=3)
    trees = baseline.fit(log, config)
    assert 1 < trees.iterations < 40 and trees.model.random_state == 3
    aucs = {}
    for span in ("validation", "test"):
        rows = span_rows(log, span)
        x_nf = baseline.features(log, rows, trees.frequencies)[0]
        labels = log.column("impressions", primary)[rows]
        weights = log.column("impressions", "click")[rows] if primary == "like" else None
        staged = list(trees.model.staged_predict_proba(x_nf))
        p = staged[trees.iterations - 1][:, 1]
        if span == "validation":
            loss = lambda p, y=labels, w=weights: sklearn.metrics.log_loss(y, p, sample_weight=w)
            assert trees.iterations == 1 + np.argmin(list(map(loss, staged))) and len(staged) == 40
        got = baseline.score(log, trees, rows)
        np.testing.assert_allclose(got, np.log(p / (1 - p)), rtol=1e-4, atol=1e-5)
        aucs[f"{span}_auc"] = sklearn.metrics.roc_auc_score(labels, p, sample_weight=weights)
    found = baseline.run(log, config)
    assert {name: found[name] for name in aucs} == pytest.approx(aucs)


def scores(log, config=FEW):
    return baseline.score(log, baseline.fit(log, config), np.arange(log.rows("impressions")))


def flip(span, task="click", where=lambda shown: True):
    def edit(files):
        shown = files["impressions"]
        at = (shown["span"] == event_log.SPANS.index(span)) & where(shown)
        shown[task][at] = 1 - shown[task][at]

    return edit


def test_labels_of_the_test_span_change_no_prediction(tmp_path):
    want = scores(write(tmp_path / "log"))
    assert np.array_equal(scores(write(tmp_path / "test", edit=flip("test"))), want)
    assert not np.array_equal(scores(write(tmp_path / "train", edit=flip("train"))), want)


def test_a_task_counts_where_its_weight_holds(tmp_path):
    """like given click: the likes of impressions without a click say nothing."""
    want = scores(write(tmp_path / "log", primary="like"))
    for clicked in (0, 1):
        edit = flip("train", "like", lambda shown, c=clicked: shown["click"] == c)
        got = scores(write(tmp_path / f"{clicked}", primary="like", edit=edit))
        assert np.array_equal(got, want) == (clicked == 0)


def test_the_budget_takes_the_newest_rows_and_says_how_many(tmp_path):
    log = write(tmp_path / "log")
    train = span_rows(log, "train")
    half = dataclasses.replace(FEW, budget=len(train) // 2)
    trees = baseline.fit(log, half)
    assert np.array_equal(trees.rows, train[-half.budget :])
    used = np.bincount(log.column("impressions", "item")[trees.rows], minlength=31)
    expected = np.log10(1 + used[1:])
    np.testing.assert_allclose(trees.frequencies["item", "item"][1:], expected, rtol=1e-6)
    older = lambda shown: np.arange(len(shown["click"])) < trees.rows[0]
    assert np.array_equal(
        scores(write(tmp_path / "older", edit=flip("train", where=older)), half), scores(log, half)
    )
    found = baseline.run(log, dataclasses.replace(half, max_rows=100))
    assert (found["rows"], found["rows_asked"]) == (100, half.budget)
    whole = baseline.run(log, FEW)
    assert whole["rows"] == whole["rows_asked"] == len(train)


def test_two_runs_and_any_chunk_give_the_same(tmp_path, monkeypatch):
    log = write(tmp_path / "log")
    first = baseline.run(log, FEW)
    monkeypatch.setattr(baseline, "CHUNK", 101)
    again = baseline.run(log, FEW)
    assert first.pop("seconds") > 0 and again.pop("seconds") > 0
    losses = [first.pop("iterations"), again.pop("iterations")]
    assert losses[0] == losses[1] and again == first


def test_the_result_has_the_columns_of_a_trial(tmp_path):
    assert baseline.METRICS == trial.METRICS
    one_class = lambda files: np.copyto(
        files["impressions"]["click"], 0, where=files["impressions"]["span"] == 2
    )
    found = baseline.run(write(tmp_path / "log", edit=one_class), FEW)
    assert {f"{s}_{m}" for s in ("validation", "test") for m in trial.METRICS} <= set(found)
    assert found["test_auc"] is None and found["test_log_loss"] > 0
    assert "no positives" in found["undefined"]["test"]["auc"]
    assert set(found["undefined"]) == {"test"} and found["validation_auc"] is not None
    assert found["sklearn"] == sklearn.__version__


def test_what_cannot_be_learned_from_is_refused(tmp_path, monkeypatch):
    never = lambda files: files["impressions"]["click"].fill(0)
    with pytest.raises(ValueError, match=r'"click": found \[0.0\] in the \d+ training rows'):
        baseline.run(write(tmp_path / "never", edit=never), FEW)
    only_without = lambda files: np.copyto(
        files["impressions"]["like"], 0, where=files["impressions"]["click"] == 1
    )
    with pytest.raises(ValueError, match=r'"like": found \[0.0\] in the'):
        baseline.run(write(tmp_path / "like", edit=only_without, primary="like"), FEW)
    no_choice = lambda files: np.copyto(
        files["impressions"]["span"], 2, where=files["impressions"]["span"] == 1
    )
    with pytest.raises(ValueError, match="found 0 impressions of weight 0 in span 'validation'"):
        baseline.run(write(tmp_path / "no_choice", edit=no_choice), FEW)
    log = write(tmp_path / "log")
    with pytest.raises(ValueError, match=r"budget=1000000, expected 1 \.\. \d+, the impressions"):
        baseline.run(log, dataclasses.replace(FEW, budget=10**6))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install 'rankjax\[baseline\]'"):
        baseline.run(log, FEW)


@pytest.mark.parametrize(
    ("field", "value"),
    [("budget", 0), ("max_rows", 0), ("iterations", 0), ("leaves", 1), ("learning_rate", 0.0)],
)
def test_settings_that_make_no_sense(field, value):
    with pytest.raises(ValueError, match=rf"BaselineConfig: {field}={value}"):
        baseline.BaselineConfig(**{field: value})
