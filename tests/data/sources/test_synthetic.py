import dataclasses
import math
import os

import numpy as np
import pytest

from rankjax.data import event_log
from rankjax.data.sources import synthetic, world_merge
from rankjax.data.sources.synthetic import World

TINY = World(users=1100, requests=3.0)  # three blocks


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.arrow")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    assert synthetic.prepare(TINY, folder, workers=1) == folder / "log"
    return folder


@pytest.fixture(scope="module")
def log(folder):
    return event_log.EventLog.open(folder / "log", verify=True)


def test_the_bytes_do_not_depend_on_the_workers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(world_merge, "PARTITION", 1000)  # nor on the partitions
    synthetic.prepare(TINY, tmp_path, workers=2)
    assert sorted(files(folder)) == sorted(files(tmp_path))
    for name, content in files(folder).items():
        assert content == files(tmp_path)[name], name
    assert sorted(os.listdir(tmp_path)) == ["log", "truth.arrow"]  # nothing temporary stays


def test_a_second_preparation_does_nothing(folder):
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert synthetic.prepare(TINY, folder, workers=2) == folder / "log"
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_another_world_in_the_folder_is_refused(folder):
    with pytest.raises(ValueError, match="fingerprint"):
        synthetic.prepare(dataclasses.replace(TINY, seed=1), folder)
    with pytest.raises(ValueError, match="fingerprint"):
        synthetic.prepare(TINY, folder, parts=False)
    with pytest.raises(ValueError, match="workers=0"):
        synthetic.prepare(TINY, folder, workers=0)


def test_an_interrupted_preparation_leaves_no_log(tmp_path, monkeypatch):
    def stop(*_):
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(world_merge, "partitions", stop)
    small = dataclasses.replace(TINY, users=30)
    with pytest.raises(KeyboardInterrupt):
        synthetic.prepare(small, tmp_path)
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    log_dir = synthetic.prepare(small, tmp_path)
    (tmp_path / "truth.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"truth\.arrow: lost"):
        synthetic.prepare(small, tmp_path)
    assert log_dir.exists()


def test_impressions_are_in_order_and_ids_in_range(log):
    x = log.columns["impressions"]
    order = np.lexsort((x["position"], x["request"], x["time"]))
    np.testing.assert_array_equal(order, np.arange(len(order)))
    request = np.unique(np.stack([x["request"], x["user"], x["time"]]), axis=1)
    assert len(np.unique(request[0])) == request.shape[1], "a request id with two users or times"
    assert x["request"].dtype == np.int64
    assert x["user"].min() == 1 and x["user"].max() == TINY.users
    for file in event_log.FILES:
        side = {"users": "user", "items": "item", "events": "event", "impressions": "context"}[file]
        for f in log.schema.of(side):
            if f.table and not f.derive:
                values = log.column(file, f.name)
                some = values if file in ("events", "impressions") else values[1:]
                assert some.min() >= 1 and some.max() < log.schema.table(f.table).rows, f.name
    for file, name in (("users", "user"), ("items", "item")):
        ids = log.column(file, name)
        np.testing.assert_array_equal(ids, np.arange(len(ids)))


def test_events_match_the_clicked_impressions_and_precede_the_next_request(log):
    x, e = log.columns["impressions"], log.columns["events"]
    on = x["click"] == 1
    time = x["time"] + 2 * x["position"]  # position ids start at 1
    want = np.stack([x["user"], time, x["item"], 1 + 2 * x["like"]])[:, on]
    want = want[:, np.lexsort((want[1], want[0]))]
    np.testing.assert_array_equal(
        np.stack([e[k] for k in ("user", "time", "item", "action")]), want
    )
    # The user's next request comes strictly after all events of this one.
    requests = np.unique(np.stack([x["user"], x["time"]]), axis=1)
    key = requests[0] * 10**9 + requests[1]
    at = (x["user"].astype(np.int64) * 10**9 + x["time"])[on]
    following = np.searchsorted(key, at, side="right")
    same = (following < len(key)) & (
        requests[0][np.minimum(following, len(key) - 1)] == x["user"][on]
    )
    assert same.sum() > 100
    assert (time[on][same] < requests[1][following[same]]).all()


def test_spans_are_cut_by_time(log):
    x = log.columns["impressions"]
    horizon = 120 * 86400
    for span, low, high in ((0, 0.0, 0.81), (1, 0.81, 0.9), (2, 0.9, 1.0)):
        time = x["time"][x["span"] == span]
        assert len(time) > 500
        assert time.min() >= low * horizon and time.max() < high * horizon
    assert synthetic.WORLD_550K.held_out == synthetic.WORLD.held_out == 0.08


def test_truth_lies_apart_and_is_aligned(folder, log):
    truth = synthetic.load_truth(log.folder)
    x = log.columns["impressions"]
    assert synthetic.truth_path(log.folder) == folder / "truth.arrow"
    assert folder / "truth.arrow" not in (folder / "log").rglob("*")
    assert truth["p_click"].dtype == truth["p_like"].dtype == np.float64
    clicked = x["click"] == 1
    pairs = ((x["click"], truth["p_click"]), (x["like"][clicked], truth["p_like"][clicked]))
    for y, p in pairs:
        assert len(y) == len(p)
        assert abs((y - p).sum()) < 4 * math.sqrt((p * (1 - p)).sum())
        # Rows shifted by one would lose the correlation within a request.
        assert np.corrcoef(y, p)[0, 1] > 2 * np.corrcoef(y[1:], p[:-1])[0, 1]
    # The parts, and what the log shows of them: position, and the item's birth.
    parts = [truth[name] for name in truth if name.startswith("part_")]
    assert len(parts) == 9
    logit = np.log(truth["p_click"] / (1 - truth["p_click"]))
    np.testing.assert_allclose(-1.1 + sum(p.astype(float) for p in parts), logit, atol=1e-5)
    assert (truth["part_position"][x["position"] == 1] == 0).all()
    assert (truth["part_position"][x["position"] > 1] < 0).all()
    birth = log.column("items", "birth")[x["item"]]
    age = np.log1p((x["time"] - birth) / 86400)
    quality = (truth["part_item"] + 0.12 * age) / 0.45  # one number per item
    order = np.argsort(x["item"], kind="stable")
    same = np.diff(x["item"][order]) == 0
    assert same.sum() > 1000
    np.testing.assert_allclose(np.diff(quality[order])[same], 0, atol=1e-4)


def test_large_worlds_keep_no_parts(tmp_path):
    config = dataclasses.replace(TINY, users=30)
    log_dir = synthetic.prepare(config, tmp_path, parts=False)
    assert set(synthetic.load_truth(log_dir)) == {"p_click", "p_like", "p_known"}


def test_schema(log):
    s = log.schema
    assert s == synthetic.schema(TINY)
    assert [t.name for t in s.tasks] == ["click", "like"] and s.tasks[1].weight == "click"
    assert s.primary_task == "click" and s.time_exact
    assert [f.name for f in s.user] == ["user", "segment", "age", "country", "device"]
    assert [f.name for f in s.features if f.action] == ["action"]
    derived = {f.name: f.side for f in s.features if f.derive}
    assert derived == {
        **{"item_age": "context", "log_age": "event", "hour": "context", "weekday": "context"}
    }
    rows = {t.name: t.rows for t in s.tables}
    assert rows["user"] == 1101 and rows["creator"] == 289 and rows["position"] == 18
    assert s.groups == ("user", "item", "action", "history_time", "context")


def test_control_redraws_labels_that_nothing_predicts(folder, log, tmp_path):
    control = event_log.EventLog.open(synthetic.control(log.folder, tmp_path, seed=3), verify=True)
    before, after = log.columns["impressions"], control.columns["impressions"]
    for name in before:
        assert (name in ("click", "like")) != np.array_equal(before[name], after[name]), name
    for file in ("users", "items", "events"):
        for name, x in log.columns[file].items():
            np.testing.assert_array_equal(x, control.column(file, name))
    truth = synthetic.load_truth(control.folder)
    clicks = before["click"].sum(dtype=int)
    rates = {"p_click": clicks / len(before["click"]), "p_like": before["like"].sum() / clicks}
    for name, rate in (*rates.items(), ("p_known", rates["p_click"])):
        np.testing.assert_allclose(truth[name], rate, rtol=1e-12)
    y, p = after["click"], synthetic.load_truth(log.folder)["p_click"]
    assert abs(y.mean() - rates["p_click"]) < 4 * math.sqrt(0.25 / len(y))
    assert abs(np.corrcoef(y, p)[0, 1]) < 4 / math.sqrt(len(y))
    liked = after["like"][y == 1]
    assert not after["like"][y == 0].any()
    assert abs(liked.mean() - rates["p_like"]) < 4 * math.sqrt(0.25 / len(liked))
    floors = synthetic.floors(control.folder)
    assert floors["click"]["oracle_ne"] == pytest.approx(1, abs=0.02)
    # Twice does nothing; another seed in the folder is refused.
    stamp = (tmp_path / "truth.arrow").stat().st_mtime_ns
    synthetic.control(log.folder, tmp_path, seed=3)
    assert (tmp_path / "truth.arrow").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="fingerprint"):
        synthetic.control(log.folder, tmp_path, seed=4)


def test_floors_are_the_log_losses_of_the_truth(folder, log, monkeypatch):
    monkeypatch.setattr(synthetic, "CHUNK", 777)
    found = synthetic.floors(log.folder, "validation")
    x, truth = log.columns["impressions"], synthetic.load_truth(log.folder)
    on = x["span"] == 1
    y = x["click"][on].astype(float)
    rate = y.mean()
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    assert found["impressions"] == found["click"]["rows"] == on.sum()
    assert found["click"]["base_rate"] == pytest.approx(rate)
    for name, column in (("oracle", "p_click"), ("prior_mean", "p_known")):
        p = truth[column][on]
        loss = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
        assert found["click"][f"{name}_log_loss"] == pytest.approx(loss)
        assert found["click"][f"{name}_ne"] == pytest.approx(loss / entropy)
    on &= x["click"] == 1
    y, p = x["like"][on].astype(float), truth["p_like"][on]
    assert found["like"]["rows"] == on.sum()
    loss = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert found["like"]["oracle_log_loss"] == pytest.approx(loss)
    with pytest.raises(ValueError, match="span='tests', expected one of"):
        synthetic.floors(log.folder, "tests")


def test_at_least_has_a_margin():
    for impressions in (10**4, 10**6, 10**9):
        users = synthetic.at_least(impressions).users
        # Three standard deviations of a sum over users, and no more than that asks for.
        assert users * 211 - 3 * 300 * math.sqrt(users) >= impressions
        assert (users - 2) * 211 - 3 * 300 * math.sqrt(users - 2) < impressions
    assert synthetic.at_least(10**6, dataclasses.replace(TINY, requests=30.0)).creators == 300
    with pytest.raises(ValueError, match="impressions=0"):
        synthetic.at_least(0)


@pytest.mark.slow
def test_world_small_is_the_measured_one(tmp_path):
    log_dir = synthetic.prepare(synthetic.WORLD_SMALL, tmp_path)
    log = event_log.EventLog.open(log_dir)
    assert log.rows("impressions") == pytest.approx(211_000, rel=0.01)
    assert log.rows("items") == 3528 + 1
    click, like = (log.column("impressions", k).sum(dtype=int) for k in ("click", "like"))
    assert click / log.rows("impressions") == pytest.approx(0.175, abs=0.002)
    assert like / click == pytest.approx(0.34, abs=0.01)
    floors = synthetic.floors(log_dir)
    assert floors["click"]["oracle_ne"] == pytest.approx(0.671, abs=0.002)
    assert floors["click"]["prior_mean_ne"] == pytest.approx(0.681, abs=0.002)
