import datetime
import os
import pathlib

import numpy as np
import polars as pl
import pytest

from rankjax.data import event_log
from rankjax.data.sources import ebnerd

ROOT = pathlib.Path(__file__).parents[3]
DATA = pathlib.Path(os.environ.get("RANKJAX_DATA", ROOT.parent / "shared" / "data"))

# split, request, user, time, page, in view, clicked, device, subscriber, gender, age
REQUESTS = [
    ("train", 51, 8, 1000, None, [30, 10, 20], [10], 2, False, None, None),
    ("train", 12, 5, 1000, 10, [20, 30, 10, 40, 50], [20, 50], 1, True, 1, 40),
    ("train", 40, 5, 1899, None, [10, 20], [10], 0, None, 0, 0),
    ("train", 41, 8, 1900, 20, [40], [40], 3, False, None, 90),
    ("train", 42, 8, 1901, 20, [50, 40], [50], 2, False, None, None),
    ("train", 43, 8, 2000, 20, [10, 30], [30], 2, False, None, None),
    ("validation", 60, 5, 2900, None, [60, 10], [60], 2, False, None, None),
]
# split, user, item, time, read time, scroll
HISTORY = [
    ("train", 5, 90, 100, 30.0, 55.0),
    ("train", 5, 90, 100, 30.0, 55.0),  # twice in one file
    ("train", 8, 30, 200, None, None),
    ("train", 8, 20, 900, 101.0, 100.0),  # not read to its end when request 51 came at 1000
    ("train", 8, 10, 850, 150.0, 9.9),  # read until exactly then
    ("validation", 5, 90, 100, 30.0, 55.0),  # in both files
    ("validation", 5, 20, 1900, 0.0, 0.0),  # request 12's click, 900 s later: the same click
    ("validation", 5, 10, 1898, 1.0, None),  # a second before request 40: another click
    ("validation", 5, 50, 1901, 1800.0, 40.0),  # 901 s after request 12: another click
    ("validation", 8, 40, 1905, 7.0, 100.0),  # request 41's click
]


def when(seconds):
    return datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)


def write_kept(folder):
    folder.mkdir()
    shown = {name: [] for name in ("split", "request_id", "item_id", "position", "click")}
    for split, request, _, _, _, view, clicked, *_ in REQUESTS:
        for position, item in enumerate(view):
            row = (split, request, item, position, int(item in clicked))
            for name, value in zip(shown, row):
                shown[name].append(value)
    pl.DataFrame(shown).write_parquet(folder / "impressions.parquet")
    names = ("split", "request_id", "user_id", "timestamp", "page_item_id", "", "", "device_type")
    names += ("is_subscriber", "gender", "age")
    requests = {n: [r[k] for r in REQUESTS] for k, n in enumerate(names) if n}
    requests["is_sso_user"] = [False, None, True, False, False, False, False]
    pl.DataFrame(requests).write_parquet(folder / "requests.parquet")
    names = ("split", "user_id", "item_id", "timestamp", "read_time", "scroll_percentage")
    pl.DataFrame(HISTORY, schema=list(names), orient="row").write_parquet(
        folder / "history.parquet"
    )
    return folder


def write_published(folder):
    sso = dict(zip((r[1] for r in REQUESTS), [False, None, True, False, False, False, False]))
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        rows = [r for r in REQUESTS if r[0] == split]
        behaviors = {
            "impression_id": pl.Series([r[1] for r in rows], dtype=pl.UInt32),
            "user_id": pl.Series([r[2] for r in rows], dtype=pl.UInt32),
            "impression_time": pl.Series([when(r[3]) for r in rows], dtype=pl.Datetime("us")),
            "article_id": pl.Series([r[4] for r in rows], dtype=pl.Int32),
            "article_ids_inview": pl.Series([r[5] for r in rows], dtype=pl.List(pl.Int32)),
            # 77 was clicked but is in no list
            "article_ids_clicked": [r[6] + [77] * (r[1] == 60) for r in rows],
            "device_type": pl.Series([r[7] for r in rows], dtype=pl.Int8),
            "is_subscriber": pl.Series([r[8] for r in rows], dtype=pl.Boolean),
            "gender": pl.Series([r[9] for r in rows], dtype=pl.Int8),
            "age": pl.Series([r[10] for r in rows], dtype=pl.Int8),
            "is_sso_user": pl.Series([sso[r[1]] for r in rows], dtype=pl.Boolean),
            "next_read_time": [9.0] * len(rows),
        }
        pl.DataFrame(behaviors).write_parquet(folder / split / "behaviors.parquet")
        users = sorted({r[1] for r in HISTORY if r[0] == split})
        of = [[r for r in HISTORY if r[:2] == (split, u)] for u in users] + [[]]
        history = {
            "user_id": pl.Series([*users, 8], dtype=pl.UInt32),
            "impression_time_fixed": [[when(r[3]) for r in rows] for rows in of],
            "scroll_percentage_fixed": [[r[5] for r in rows] for rows in of],
            "article_id_fixed": [[r[2] for r in rows] for rows in of],
            "read_time_fixed": [[r[4] for r in rows] for rows in of],
        }
        pl.DataFrame(history).write_parquet(folder / split / "history.parquet")
    return folder


WRITERS = {"kept": write_kept, "published": write_published}
USER, ITEM = {5: 1, 8: 2}, {item: k for k, item in enumerate((10, 20, 30, 40, 50, 60, 90), 1)}


def columns(log, file, *names):
    return list(zip(*(log.column(file, name).tolist() for name in names)))


@pytest.fixture(params=WRITERS)
def log(request, tmp_path):
    raw = WRITERS[request.param](tmp_path / "raw")
    return event_log.EventLog.open(ebnerd.prepare(raw, tmp_path / "log"))


def test_events_are_the_union_and_the_clicks_that_no_history_tells(log):
    read = {None: 1, 0.0: 2, 1.0: 3, 7.0: 5, 30.0: 7, 150.0: 10, 1800.0: 13}
    scroll = {None: 1, 0.0: 2, 9.9: 2, 40.0: 6, 55.0: 7, 100.0: 12}
    want = []
    for _, user, item, time, seconds, percent in set(HISTORY[2:]):
        # 20 at 900 by request 51; 50 at 1901 by request 60; 40 at 1905 was over before 2000.
        unfinished = (item, time) in {(20, 900), (50, 1901)}
        r, s = (1, 1) if unfinished else (read[seconds], scroll[percent])
        want.append((USER[user], time, ITEM[item], r, s))
    for user, time, item in ((8, 1000, 10), (5, 1000, 50), (5, 1899, 10), (8, 1901, 50)):
        want.append((USER[user], time, ITEM[item], 1, 1))
    want += [(USER[8], 2000, ITEM[30], 1, 1), (USER[5], 2900, ITEM[60], 1, 1)]
    got = columns(log, "events", "user", "time", "item", "read_time", "scroll")
    assert got == sorted(want)
    counts = log.info["counts"]
    assert {k: counts[k] for k in ("history_rows", "history_events", "clicks", "click_events")} == {
        "history_rows": 10,
        "history_events": 8,
        "clicks": 8,
        "click_events": 6,
    }
    assert counts["unfinished_events"] == 2


def test_impressions_are_requests_in_time_order(log):
    order = [12, 51, 40, 41, 42, 43, 60]
    by_id = {r[1]: r for r in REQUESTS}
    want = []
    # Train runs from 1000 to 2000, so that what comes after 1900 is validation.
    span = {42: 1, 43: 1, 60: 2}
    for request in order:
        _, _, user, time, page, view, clicked, *_ = by_id[request]
        for item in view:
            row = (request, USER[user], time, ITEM[item], span.get(request, 0))
            want.append((*row, int(item in clicked), ITEM.get(page, 0)))
    names = ("request", "user", "time", "item", "span", "click", "page_item")
    assert columns(log, "impressions", *names) == want
    first = np.unique(log.column("impressions", "request"), return_index=True)[1]
    names = ("request", "device", "list_length", "subscriber", "sso", "gender", "age")
    got = columns(log, "impressions", *names)
    assert {got[k] for k in first} == {
        (51, 2, 2, 1, 1, 0, 0),
        (12, 1, 3, 2, 0, 2, 5),
        (40, 0, 2, 0, 2, 1, 1),
        (41, 3, 1, 1, 1, 0, 10),
        (42, 2, 2, 1, 1, 0, 0),
        (43, 2, 2, 1, 1, 0, 0),
        (60, 2, 2, 1, 1, 0, 0),
    }


def test_schema_holds_nothing_that_is_known_later(log):
    names = {f.name for f in log.schema.features}
    assert not {n for n in names if n.startswith("next_")} and "position" not in names
    assert [f.name for f in log.schema.features if f.name == "read_time"] == ["read_time"]
    assert all(f.side == "event" for f in log.schema.features if f.action)
    assert {f.name for f in log.schema.features if f.derive} == {"log_age", "hour", "weekday"}
    assert log.column("items", "item").tolist() == list(range(len(ITEM) + 1))
    assert log.column("users", "user").tolist() == [0, 1, 2]


def test_clicks_outside_the_list_are_counted(tmp_path):
    raw = write_published(tmp_path / "raw")
    log = event_log.EventLog.open(ebnerd.prepare(raw, tmp_path / "log"))
    assert log.info["counts"]["clicked_not_shown"] == 1


def test_a_later_request_changes_no_earlier_event(tmp_path):
    """What a reading time becomes by the user's next request is known at that request."""
    raw = write_kept(tmp_path / "raw")
    path = raw / "requests.parquet"
    before = event_log.EventLog.open(ebnerd.prepare(raw, tmp_path / "before"))
    time = pl.col("timestamp")
    later = pl.when(pl.col("request_id") == 43).then(time - 92).otherwise(time)  # 1908
    pl.read_parquet(path).with_columns(later.alias("timestamp")).write_parquet(path)
    after = event_log.EventLog.open(ebnerd.prepare(raw, tmp_path / "after"))

    def history(log):
        rows = columns(log, "events", "user", "time", "item", "read_time")
        return {row[:3]: row[3] for row in rows if row[1] not in (1908, 2000)}

    changed = {key for key in history(before) if history(before)[key] != history(after)[key]}
    assert changed == {(USER[8], 1905, ITEM[40])}  # 7 s of reading from 1905 on


def test_preparing_twice_does_nothing(tmp_path):
    raw = write_kept(tmp_path / "raw")
    ebnerd.prepare(raw, tmp_path / "log")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "log").iterdir()}
    ebnerd.prepare(raw, tmp_path / "log")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "log").iterdir()} == before
    other = write_published(tmp_path / "other")
    with pytest.raises(ValueError, match="found a log with fingerprint"):
        ebnerd.prepare(other, tmp_path / "log")


def change(file, column):
    def write(raw):
        table = pl.read_parquet(raw / file)
        table.with_columns(column).write_parquet(raw / file)

    return write


def unequal(raw):
    path = raw / "train" / "history.parquet"
    pl.read_parquet(path).with_columns(pl.col("read_time_fixed").list.head(1)).write_parquet(path)


@pytest.mark.parametrize(
    ("writer", "spoil", "message"),
    [
        (
            write_kept,
            change("impressions.parquet", pl.Series("click", [3] + [0] * 16)),
            r'impressions\.parquet, column "click": row 0 holds 3, expected 0 or 1',
        ),
        (
            write_kept,
            change("requests.parquet", pl.lit("test").alias("split")),
            r'requests\.parquet, column "split": row 0 holds \'test\'',
        ),
        (
            write_kept,
            change("requests.parquet", pl.col("timestamp") * 1.0),
            r'requests\.parquet, column "timestamp": found type Float64, expected time',
        ),
        (
            write_kept,
            change("requests.parquet", pl.lit(51).alias("request_id")),
            "request 51 occurs twice",
        ),
        (
            write_kept,
            change("impressions.parquet", pl.lit(99).alias("request_id")),
            r"row 0 holds 99, expected one of those in .*requests\.parquet",
        ),
        (
            write_kept,
            lambda raw: (raw / "history.parquet").unlink(),
            r"found \['impressions.parquet', 'requests.parquet'\], expected the file 'history",
        ),
        (
            write_published,
            lambda raw: (raw / "validation" / "history.parquet").unlink(),
            r"expected the file 'validation/history\.parquet'",
        ),
        (
            write_published,
            change(
                "train/behaviors.parquet", pl.col("article_ids_inview").cast(pl.List(pl.String))
            ),
            r'behaviors\.parquet, column "article_ids_inview": found type List\(String\)',
        ),
        (
            write_published,
            unequal,
            r'history\.parquet, column "impression_time_fixed": row 0 has \d values, expected|'
            r'history\.parquet, column "read_time_fixed": row 0 has 1 values, expected',
        ),
    ],
)
def test_refusals_name_the_file(tmp_path, writer, spoil, message):
    raw = writer(tmp_path / "raw")
    spoil(raw)
    with pytest.raises(ValueError, match=message):
        ebnerd.prepare(raw, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_demo_bundle_has_the_published_counts(tmp_path):
    raw = DATA / "ebnerd-demo"
    if not raw.is_dir():
        pytest.skip(f"{raw} is not there (RANKJAX_DATA names the folder of real data)")
    log = event_log.EventLog.open(ebnerd.prepare(raw, tmp_path / "log"))
    assert log.rows("impressions") == 583_054 and log.rows("users") - 1 == 1935
    request = log.column("impressions", "request")
    assert np.unique(request).size == 50_080
    assert np.unique(log.column("impressions", "item")).size == 3729
    assert log.column("impressions", "click").mean() == pytest.approx(0.0862, abs=5e-5)
    counts = log.info["counts"]
    assert counts["history_rows"] == 498_376 and counts["clicked_not_shown"] == 0
    assert log.rows("events") == counts["history_events"] + counts["click_events"]
    span, time = log.column("impressions", "span"), log.column("impressions", "time")
    assert np.unique(request[span == 2]).size == 25_356
    assert (np.diff(span[np.argsort(time, kind="stable")]) >= 0).all()
