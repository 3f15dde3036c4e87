import dataclasses
import functools
import math
import os

import numpy as np
import pytest

from rankjax import schema
from rankjax.data import counters, event_log, loader, samples
from rankjax.data.sources import world_truth
from tests import tiny

QUARTER, HOUR, DAY = 900, 3600, tiny.DAY
WINDOWS = (QUARTER, HOUR, DAY, None)  # tiny's times are whole quarters, so that edges tie
LABELS = {QUARTER: "900s", HOUR: "1h", DAY: "24h", None: "ever"}


def columns(*, birth=True):
    """tiny's log with two items of no category, and impressions of no known item."""
    found, files = tiny.columns(users=5, items=12, requests=150, days=2)
    files["items"]["category"][[3, 7]] = 0
    files["impressions"]["item"][::9] = 0
    files["events"]["item"][::11] = 0
    if not birth:
        del files["items"]["birth"]
        kept = tuple(f for f in found.features if f.derive != "item_age")
        found = dataclasses.replace(found, features=kept)
    return found, files


def write(folder, found, files, **info):
    event_log.write_log(folder, found, **files, fingerprint={"of": str(folder)}, **info)
    return folder


def counted(folder, found, files, config, **info):
    """The counters of the log, {name: float32 [n]}, through files in a new folder."""
    folder.mkdir()
    out = counters.add(write(folder / "log", found, files, **info), folder / "out", config)
    log = event_log.EventLog.open(out, verify=True)
    return {f.name: np.array(log.column("impressions", f.name)) for f in added(log)}


def added(log):
    return [f for f in log.schema.features if f.counter]


def logit(p):
    return math.log(p / (1 - p))


def brute(files, config, *, clicked, clicks_only=False):
    """Every counter, by plain loops over rows; clicked(file, row) -> 0 or 1."""
    shown, items = files["impressions"], files["items"]
    source = "events" if clicks_only else "impressions"
    counted_rows = [
        (
            int(files[source]["time"][row]),
            int(files[source]["user"][row]),
            int(files[source]["item"][row]),
            1 if clicks_only else clicked(row),
        )
        for row in range(len(files[source]["time"]))
    ]
    category = items["category"].tolist()
    keys = {
        "item": lambda user, item: item or None,
        "category": lambda user, item: category[item] or None,
        "user_category": lambda user, item: (user, category[item]) if category[item] else None,
    }
    want = {}
    for user, item, t in zip(shown["user"], shown["item"], shown["time"], strict=True):
        known = [x for x in counted_rows if x[0] + config.delay < t]
        p = (sum(x[3] for x in known) + 1) / (len(known) + 2)
        for by, key in keys.items():
            if by.startswith("user_") and not config.user:
                continue
            mine = key(int(user), int(item))
            same = [x for x in counted_rows if mine is not None and key(x[1], x[2]) == mine]
            for window in config.windows:
                start = -math.inf if window is None else t - window
                n = sum(1 for x in same if start <= x[0] < t)
                labelled = [x for x in same if start <= x[0] and x[0] + config.delay < t]
                k = sum(x[3] for x in labelled)
                rate = logit((k + 20 * p) / (len(labelled) + 20)) - logit(p)
                values = {"impressions": math.log10(1 + n), "clicks": math.log10(1 + k)}
                values["rate"] = rate
                for measure, value in values.items():
                    if clicks_only and measure != "clicks":
                        continue
                    if measure != "impressions" and window is not None and window <= config.delay:
                        continue
                    want.setdefault(f"{by}_{measure}_{LABELS[window]}", []).append(value)
    return want


CONFIGS = {
    "default of": counters.CounterConfig(windows=WINDOWS),
    "delay": counters.CounterConfig(windows=WINDOWS, of=("category",), delay=HOUR),
    "short delay": counters.CounterConfig(windows=(None, HOUR), user=False, delay=1),
    "weighted task": counters.CounterConfig(windows=(DAY,), task="like"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_counters_are_the_plain_loops(tmp_path, case):
    config = CONFIGS[case]
    found, files = columns()
    got = counted(tmp_path / "a", found, files, config)
    shown = files["impressions"]
    clicked = lambda row: int(shown["click"][row])
    if config.task == "like":
        clicked = lambda row: int(shown["click"][row] and shown["like"][row])
    want = brute(files, config, clicked=clicked)
    assert list(got) == [*want, "item_known_age", "user_idle", "user_has_past", "user_events"]
    for name, values in want.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], values, rtol=1e-6, atol=1e-7, err_msg=name)
        assert len(np.unique(got[name])) > 1, name
    missing = shown["item"] == 0
    for name in want:
        assert (got[name][missing] == 0).all()
    category = files["items"]["category"][shown["item"]]
    assert (got[f"category_impressions_{LABELS[config.windows[0]]}"][category == 0] == 0).all()
    assert ((category == 0) & ~missing).any()


def test_what_stands_beside_the_counts(tmp_path):
    found, files = columns()
    got = counted(tmp_path / "a", found, files, counters.CounterConfig(of=()))
    shown, happened = files["impressions"], files["events"]
    lonely = 0
    for row, (user, item, t) in enumerate(
        zip(shown["user"], shown["item"], shown["time"], strict=True)
    ):
        past = happened["time"][(happened["user"] == user) & (happened["time"] < t)]
        hours = (t - past.max()) / 3600 if len(past) else 0
        age = max(t - files["items"]["birth"][item], 0) / 3600 if item else 0
        assert got["user_has_past"][row] == bool(len(past))
        assert got["user_events"][row] == pytest.approx(math.log10(1 + len(past)), rel=1e-6)
        assert got["user_idle"][row] == pytest.approx(math.log10(1 + hours), rel=1e-6)
        assert got["item_known_age"][row] == pytest.approx(math.log10(1 + age), rel=1e-6)
        lonely += not len(past)
    assert 0 < lonely < len(shown["time"])


def future_changed(files, t, rng):
    """The files with everything at and after t changed that rows up to t must not see."""
    shown, happened, items = (dict(files[f]) for f in ("impressions", "events", "items"))
    kept = shown["time"] <= t
    at = shown["time"] == t
    n = 40
    more = {name: x[rng.integers(0, len(x), n)] for name, x in shown.items()}
    more["time"] = np.sort(t + rng.integers(0, 3, n) * QUARTER)
    more["request"] = 1000 + np.arange(n)
    for name in ("click", "like"):
        shown[name] = np.where(at, 1 - shown[name], shown[name])
    shown = {name: np.concatenate([x[kept], more[name]]) for name, x in shown.items()}
    old = happened["time"] < t
    more = {name: x[rng.integers(0, len(x), n)] for name, x in happened.items()}
    more["time"] = t + rng.integers(0, 3, n) * QUARTER
    more["user"] = rng.integers(1, 6, n, dtype=np.int32)
    happened = {name: np.concatenate([x[old], more[name]]) for name, x in happened.items()}
    order = np.lexsort((happened["time"], happened["user"]))
    happened = {name: x[order] for name, x in happened.items()}
    if "birth" in items:
        late = items["birth"] >= t
        items["birth"] = np.where(late, t + rng.integers(0, DAY, len(late)), items["birth"])
    return {**files, "impressions": shown, "events": happened, "items": items}, kept.sum()


@pytest.mark.parametrize("case", ["birth", "no birth", "clicks only"])
def test_the_future_changes_no_bit(tmp_path, case):
    found, files = columns(birth=case == "birth")
    info = {"negatives": {"per_click": 4}} if case == "clicks only" else {}
    config = counters.CounterConfig(windows=WINDOWS)
    old = counted(tmp_path / "old", found, files, config, **info)
    times = np.unique(files["impressions"]["time"])
    moved = 0
    for number, t in enumerate(times[[0, len(times) // 3, len(times) // 2, -2]]):
        changed, kept = future_changed(files, t, np.random.default_rng(number))
        new = counted(tmp_path / str(number), found, changed, config, **info)
        for name in old:
            assert old[name][:kept].tobytes() == new[name][:kept].tobytes(), (name, t)
            after = min(len(old[name]), len(new[name]))
            moved += (old[name][kept:after] != new[name][kept:after]).any()
    assert moved > len(old)  # the change was one that counters after it do see


def test_partitions_and_chunks_change_no_byte(tmp_path, monkeypatch):
    found, files = columns()
    log = write(tmp_path / "log", found, files)
    config = counters.CounterConfig(windows=WINDOWS, delay=60)
    whole = counters.add(log, tmp_path / "whole", config)
    monkeypatch.setattr("rankjax.data.counting.PARTITION", 10)
    monkeypatch.setattr(event_log, "CHUNK", 17)
    parts = counters.add(log, tmp_path / "parts", config)
    assert sorted(os.listdir(whole)) == sorted(os.listdir(parts))
    for path in whole.iterdir():
        assert path.read_bytes() == (parts / path.name).read_bytes(), path.name
    assert sorted(os.listdir(tmp_path)) == ["log", "parts", "whole"]  # no temporary file is left


def test_on_a_log_of_clicks_impressions_do_not_matter(tmp_path):
    found, files = columns(birth=False)
    files["events"]["time"] += DAY // 2  # so that many an impression comes before all events
    config = counters.CounterConfig(windows=WINDOWS, delay=QUARTER)
    info = {"negatives": {"per_click": 4}}
    got = counted(tmp_path / "a", found, files, config, **info)
    want = brute(files, config, clicked=None, clicks_only=True)
    assert list(got)[:-4] == list(want)
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-6, atol=1e-7, err_msg=name)
        assert got[name].any()
    assert all("_clicks_" in name for name in want) and "item_clicks_900s" not in want
    kept = np.arange(len(files["impressions"]["time"])) % 3 == 1
    fewer = {name: x[kept] for name, x in files["impressions"].items()}
    fewer["click"] = 1 - fewer["click"]
    again = counted(tmp_path / "b", found, {**files, "impressions": fewer}, config, **info)
    for name in got:
        np.testing.assert_array_equal(got[name][kept], again[name], err_msg=name)


def test_the_log_stays_what_it_was(tmp_path):
    found, files = columns()
    notes = {"notes": ["Hand-made."], "source": "tiny"}
    folder = write(tmp_path / "log", found, files, **notes)
    config = counters.CounterConfig(windows=(2 * DAY, 7 * DAY), delay=5)
    out = counters.add(folder, tmp_path / "out", config)
    log, old = event_log.EventLog.open(out, verify=True), event_log.EventLog.open(folder)
    for file in event_log.FILES:
        for name, x in old.columns[file].items():
            np.testing.assert_array_equal(log.column(file, name), x)
    plain = event_log.EventLog.open(out, counters=False).schema
    assert plain == log.schema.without_counters()
    # All but the scale of item_age, which the old log leaves at 1.
    raw = [dataclasses.replace(f, shift=0.0, scale=1.0) for f in plain.features]
    assert dataclasses.replace(plain, features=tuple(raw)) == old.schema
    assert [f.name for f in plain.features if f.scale != 1] == ["item_age"]
    names = [f.name for f in added(log)]
    assert names == counters.describe(config, old) and len(names) == 3 * 3 * 2 + 4
    assert {f.name: f.group for f in added(log)} == {
        n: "cross" if n.startswith("user_") else "item" for n in names
    }
    assert names[:4] == [
        *("item_impressions_2d", "item_clicks_2d", "item_rate_2d", "item_impressions_7d")
    ]
    assert "user_category_rate_7d" in names
    assert log.fingerprint == {
        **{"source": "counters", "version": 1, "log": old.fingerprint},
        "config": {"windows": [2 * DAY, 7 * DAY], "of": None, "user": True, "task": "", "delay": 5},
    }
    assert log.info == {
        **notes,
        "counters": {
            **{"of": ["category"], "user": True, "windows": ["2d", "7d"], "task": "click"},
            **{"delay": 5, "counted": "impressions", "features": names},
        },
    }


def test_twice_does_nothing(tmp_path):
    folder = write(tmp_path / "log", *columns())
    out = counters.add(folder, tmp_path / "out")
    stamp = (out / "log.json").stat().st_mtime_ns
    assert counters.add(folder, out) == out
    assert (out / "log.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"'user': True.*expected .*'user': False"):
        counters.add(folder, out, counters.CounterConfig(user=False))


def test_batches_load(tmp_path):
    out = counters.add(write(tmp_path / "log", *columns()), tmp_path / "out")
    log = event_log.EventLog.open(out)
    config = samples.SampleConfig(organisation="request", history=4)
    batches = loader.Batches(log, samples.build(log, config, "train"), batch_samples=8)
    batch = batches[len(batches) // 2]
    real = batch.impression >= 0
    for f in added(log):
        want = log.column("impressions", f.name)[batch.impression[real]]
        got = batch.candidate[f.name]
        np.testing.assert_allclose(got[real] * f.scale + f.shift, want, atol=1e-5)
        assert (got[~real] == 0).all()
    plain = event_log.EventLog.open(out, counters=False)
    batch = loader.Batches(plain, samples.build(plain, config, "train"), batch_samples=8)[0]
    assert not {f.name for f in added(log)} & set(batch.candidate)


def test_models_read_counters_of_mean_0_and_deviation_1_over_the_training_span(tmp_path):
    out = counters.add(write(tmp_path / "log", *columns()), tmp_path / "out")
    log = event_log.EventLog.open(out)
    config = samples.SampleConfig(organisation="impression", history=4)
    for span, scaled in (("train", True), ("test", False)):
        found = samples.build(log, config, span)
        batch = loader.Batches(log, found, batch_samples=len(found))[0]
        dense = [f.name for f in log.schema.features if f.counter] + ["item_age"]
        values = np.stack([batch.candidate[name][:, 0] for name in dense], axis=-1)
        varies = values.std(axis=0) > 1e-6
        near = np.allclose(values.mean(axis=0), 0, atol=1e-4)
        near &= np.allclose(values.std(axis=0)[varies], 1, atol=1e-4)
        assert near == scaled and varies.sum() > 20


def test_items_that_share_an_id_are_still_counted_one_by_one(tmp_path):
    found, files = columns()
    files["items"]["item"][5:] = 4  # as where rare items are all unknown
    log = event_log.EventLog.open(write(tmp_path / "log", found, files))
    names = counters.describe(counters.CounterConfig(windows=(DAY,)), log)
    assert sum(n == "item_clicks_24h" for n in names) == 1
    assert names == counters.describe(
        counters.CounterConfig(windows=(DAY,)),
        event_log.EventLog.open(write(tmp_path / "plain", *columns())),
    )


def test_the_truth_of_a_world_stays_beside_the_log(tmp_path):
    folder = write(tmp_path / "log", *columns())
    (tmp_path / "truth.arrow").touch()
    out = counters.add(folder, tmp_path / "counted")
    assert world_truth.truth_path(out) == world_truth.truth_path(folder)
    assert sorted(os.listdir(out)) == sorted(os.listdir(folder))


def test_a_log_without_impressions_and_events(tmp_path):
    found, files = columns()
    for file in ("events", "impressions"):
        files[file] = {name: x[:0] for name, x in files[file].items()}
    for number, info in enumerate(({}, {"negatives": {}})):
        got = counted(tmp_path / str(number), found, files, counters.CounterConfig(), **info)
        assert all(len(x) == 0 for x in got.values()) and "item_clicks_7d" in got


def test_only_real_categories_are_counted_by_default(tmp_path):
    found, files = columns()
    twin = dict(side="item", group="item", table="item")
    more = tuple(schema.Feature(name=name, **twin) for name in ("code", "half"))
    found = dataclasses.replace(found, features=found.features + more)
    files["items"]["code"] = np.array([0, *range(1, 8), *[1] * 5], np.int32)  # 7 of 12 items
    files["items"]["half"] = np.array([0, *range(1, 7), *[0] * 6], np.int32)  # 6 of 12
    log = event_log.EventLog.open(write(tmp_path / "log", found, files))
    describe = functools.partial(counters.describe, log=log)
    windows = {"windows": (None,), "user": False}
    rates = lambda names: [n.removesuffix("_rate_ever") for n in names if "_rate_" in n]
    assert rates(describe(counters.CounterConfig(**windows))) == ["item", "category", "half"]
    of_code = counters.CounterConfig(of=("code",), **windows)
    assert rates(describe(of_code)) == ["item", "code"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"windows": ()}, r"windows=\(\), expected seconds >= 1"),
        ({"windows": (HOUR, 0)}, r"windows=\(3600, 0\), expected seconds >= 1"),
        ({"windows": (-5,)}, "expected seconds >= 1"),
        ({"windows": (None, 5, None)}, "windows=.*expected no entry twice"),
        ({"of": ("category", "category")}, "of=.*expected no entry twice"),
        ({"delay": -1}, "delay=-1, expected seconds >= 0"),
    ],
)
def test_configurations_that_mean_nothing(options, match):
    with pytest.raises(ValueError, match=match):
        counters.CounterConfig(**options)


@pytest.mark.parametrize(
    ("options", "info", "match"),
    [
        ({"of": ("color",)}, {}, r"log.json: found no .* named \['color'\].*'category'"),
        ({"of": ("tags",)}, {}, r"named \['tags'\]"),
        ({"of": ("quality", "segment")}, {}, r"named \['quality', 'segment'\]"),
        ({"of": ("item",)}, {}, r"names \['item_clicks_1h', .*expected one each"),
        ({"task": "buy"}, {}, r"found task='buy' .*expected one of \['click', 'like'\]"),
        ({"task": "like"}, {"negatives": {}}, r"'like' .*sampled negatives.*expected 'click'"),
    ],
)
def test_names_that_the_log_lacks(tmp_path, options, info, match):
    folder = write(tmp_path / "log", *columns(), **info)
    config = counters.CounterConfig(**options)
    for call in (
        lambda: counters.add(folder, tmp_path / "out", config),
        lambda: counters.describe(config, event_log.EventLog.open(folder)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert os.listdir(tmp_path) == ["log"]


def test_logs_that_cannot_be_counted(tmp_path):
    found, files = columns()
    folder = write(tmp_path / "log", found, files)
    out = counters.add(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"out.*found a log with counters, expected one without"):
        counters.add(out, tmp_path / "more")
    orders = tiny.log(tmp_path / "orders", time_exact=False)
    with pytest.raises(ValueError, match=r"time_exact=false.*expected exact times: prepare"):
        counters.add(orders, tmp_path / "more")
    taken = schema.Feature(name="user_idle", side="context", group="x", kind="dense")
    found = dataclasses.replace(found, features=(*found.features, taken))
    files["impressions"]["user_idle"] = np.zeros(len(files["impressions"]["time"]), np.float32)
    taken = write(tmp_path / "taken", found, files)
    with pytest.raises(ValueError, match=r"found features \['user_idle'\], the names of counters"):
        counters.add(taken, tmp_path / "more")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(ValueError, match="found a folder that is not empty"):
        counters.add(folder, tmp_path / "full")
    assert sorted(os.listdir(tmp_path)) == ["full", "log", "orders", "out", "taken"]


def test_rows_shown_after_their_requests_time_count_later(tmp_path):
    found, files = columns(birth=False)
    config, late = counters.CounterConfig(windows=(DAY, None), delay=60), 2 * QUARTER
    got = counted(tmp_path / "a", found, files, config, request_spread=late)
    whole = counters.CounterConfig(windows=(DAY, None), delay=60 + late)
    labels = counted(tmp_path / "b", found, files, whole)
    for name in ("item_clicks_ever", "item_rate_ever", "user_category_clicks_24h"):
        np.testing.assert_array_equal(got[name], labels[name], err_msg=name)
    shown, clicks = files["impressions"], got["item_impressions_ever"]
    for row, t in enumerate(shown["time"]):
        n = np.count_nonzero((shown["item"] == shown["item"][row]) & (shown["time"] < t - late))
        assert clicks[row] == np.float32(np.log10(1 + n)) or shown["item"][row] == 0
    short = counters.CounterConfig(windows=(QUARTER, DAY))
    names = counted(tmp_path / "c", found, files, short, request_spread=late)
    assert not any("900s" in name for name in names) and "item_impressions_24h" in names
