import dataclasses
import re

import numpy as np
import pytest

from rankjax.data import columns, event_log
from tests import tiny


def write(folder, found, files):
    return event_log.write_log(folder / "log", found, **files, fingerprint={})


def refuses(folder, found, files, match):
    """The log is refused with this message, and nothing stays behind."""
    with pytest.raises(ValueError, match=match):
        write(folder, found, files)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "file, column",
    [("events", "time"), ("impressions", "like"), ("items", "category"), ("users", "activity")],
)
def test_missing_column(tmp_path, file, column):
    found, files = tiny.columns()
    del files[file][column]
    refuses(tmp_path, found, files, rf"log/{file}.arrow: found columns \[.*\], expected '{column}'")


def test_unknown_column_and_lengths(tmp_path):
    found, files = tiny.columns()
    files["events"]["price"] = files["events"]["dwell"]
    refuses(tmp_path, found, files, r"events.arrow: found columns \['price'\] too, expected only")
    del files["events"]["price"]
    files["events"]["dwell"] = files["events"]["dwell"][1:]
    refuses(tmp_path, found, files, r"events.arrow: found columns of lengths .*'dwell': 199")


@pytest.mark.parametrize(
    "file, column, dtype, expected",
    [
        ("events", "time", np.int32, "int64"),
        ("events", "time", np.float64, "int64"),
        ("events", "dwell", np.float64, "float32"),
        ("events", "action", np.int64, "int32"),
        ("impressions", "click", np.bool_, "int8"),
        ("items", "birth", np.int32, "int64"),
    ],
)
def test_wrong_dtype(tmp_path, file, column, dtype, expected):
    found, files = tiny.columns()
    files[file][column] = files[file][column].astype(dtype)
    match = f'{file}.arrow, column "{column}": found dtype {np.dtype(dtype)}, expected {expected}'
    refuses(tmp_path, found, files, match)


def test_wrong_shape(tmp_path):
    found, files = tiny.columns()
    files["items"]["tags"] = files["items"]["tags"][:, :2].copy()
    refuses(tmp_path, found, files, r'"tags": found shape \(31, 2\), expected \(\'n\', 3\)')


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_time_is_not_a_number(tmp_path, value):
    found, files = tiny.columns()
    time = files["impressions"]["time"].astype(np.float64)
    time[17] = value
    files["impressions"]["time"] = time
    refuses(tmp_path, found, files, f'"time": row 17 holds {value}, expected whole seconds')


def test_dense_is_not_a_number(tmp_path):
    found, files = tiny.columns()
    files["events"]["dwell"][3] = np.nan
    refuses(tmp_path, found, files, '"dwell": row 3 holds nan, expected a finite number')


@pytest.mark.parametrize("time_exact", [True, False])
def test_events_sorted_by_user_then_time_or_order(tmp_path, time_exact):
    found, files = tiny.columns(time_exact=time_exact)
    key, user = "time" if time_exact else "order", files["events"]["user"]
    same = int(np.flatnonzero(np.diff(user) == 0)[5])
    broken = files["events"][key].copy()
    broken[same] = broken[same + 1] + 1
    files["events"][key] = broken
    match = rf'events.arrow, columns "user", "{key}": row {same + 1} holds \({user[same]}, .* after'
    refuses(tmp_path, found, files, match)
    files["events"] = {name: x[::-1].copy() for name, x in tiny.columns()[1]["events"].items()}
    if time_exact:
        refuses(tmp_path, found, files, "expected rows sorted by user, then time")


def test_impressions_sorted_by_time_then_request(tmp_path):
    found, files = tiny.columns()
    shown = files["impressions"]
    shown["time"][40] = shown["time"][39] - 1
    refuses(tmp_path, found, files, 'impressions.arrow, columns "time", "request": row 40 holds')
    found, files = tiny.columns()
    shown = files["impressions"]
    shown["time"][:] = 1000 * tiny.DAY
    shown["request"][40] = shown["request"][39] - 1
    refuses(tmp_path, found, files, "row 40 holds .* expected rows sorted by time, then request")


def test_rows_out_of_order_between_chunks(tmp_path):
    found, files = tiny.columns()
    with event_log.LogWriter(tmp_path / "log", found, {}) as writer:
        first = {name: x[:50] for name, x in files["events"].items()}
        writer.append("events", first)
        with pytest.raises(ValueError, match=r'"user", "time": row 50 holds \(2, '):
            writer.append("events", first)
    assert list(tmp_path.iterdir()) == []


def test_rows_in_messages_count_from_the_files_start(tmp_path):
    found, files = tiny.columns()
    shown = files["impressions"]
    shown["click"][120] = 3
    with event_log.LogWriter(tmp_path / "log", found, {}) as writer:
        writer.append("impressions", {name: x[:100] for name, x in shown.items()})
        match = 'impressions.arrow, column "click": row 120 holds 3, expected 0 or 1'
        with pytest.raises(ValueError, match=match):
            writer.append("impressions", {name: x[100:] for name, x in shown.items()})


@pytest.mark.parametrize("value", [-1, 2])
@pytest.mark.parametrize("task", ["click", "like"])
def test_labels_are_zero_or_one(tmp_path, task, value):
    found, files = tiny.columns()
    files["impressions"][task][11] = value
    refuses(tmp_path, found, files, f'"{task}": row 11 holds {value}, expected 0 or 1')


def test_span_is_a_code(tmp_path):
    found, files = tiny.columns()
    files["impressions"]["span"][0] = 3
    refuses(tmp_path, found, files, '"span": row 0 holds 3, expected 0 .. 2')


@pytest.mark.parametrize(
    "file, column, value, expected",
    [
        ("items", "category", 8, r"0 .. 7 \('category'\)"),
        ("events", "action", -1, r"0 .. 3 \('action'\)"),
        ("impressions", "surface", 5, r"0 .. 4 \('surface'\)"),
        ("users", "user", 9, r"0 .. 8 \('user'\)"),
        ("items", "tags", 12, r"0 .. 11 \('tag'\)"),
    ],
)
def test_ids_beyond_the_vocabulary(tmp_path, file, column, value, expected):
    found, files = tiny.columns()
    files[file][column].reshape(len(files[file][column]), -1)[6, -1] = value
    match = f'{file}.arrow, column "{column}": row 6 holds {value}, expected {expected}'
    refuses(tmp_path, found, files, match)


@pytest.mark.parametrize("file", ["events", "impressions"])
def test_users_and_items_exist(tmp_path, file, monkeypatch):
    monkeypatch.setattr(columns, "CHUNK", 10)  # rows in messages do not count from a chunk's start
    for column, value, expected in [
        ("item", 31, "0 .. 30 .the rows of items.arrow"),
        ("item", -2, "0 .. 30 .the rows of items.arrow"),
        ("user", 9, "1 .. 8 .the rows of users.arrow"),
        ("user", 0, "1 .. 8 .the rows of users.arrow"),
    ]:
        found, files = tiny.columns()
        row = 0 if value == 0 else len(files[file][column]) - 1
        files[file][column][row] = value
        match = f'{file}.arrow, column "{column}": row {row} holds {value}, expected {expected}'
        refuses(tmp_path, found, files, match)


def test_row_zero_means_missing(tmp_path):
    found, files = tiny.columns()
    files["items"]["tags"][0, 1] = 1
    refuses(tmp_path, found, files, '"tags": row 0 holds 1, expected 0 in row 0')


def test_columns_stay_the_same(tmp_path):
    found, files = tiny.columns()
    first = {name: x[:10] for name, x in files["items"].items()}
    second = {name: x[10:] for name, x in files["items"].items() if name != "birth"}
    with event_log.LogWriter(tmp_path / "log", found, {}) as writer:
        writer.append("items", first)
        with pytest.raises(ValueError, match=r"items.arrow: found columns .* as before"):
            writer.append("items", second)


def test_schemas_that_make_no_files():
    found, _ = tiny.columns()
    with_feature = lambda old, **fields: dataclasses.replace(
        found,
        features=tuple(
            dataclasses.replace(f, **fields) if f.name == old else f for f in found.features
        ),
    )
    for name, new in (("surface", "click"), ("dwell", "time")):
        file = "impressions" if name == "surface" else "events"
        with pytest.raises(ValueError, match=f"found two columns '{new}' in {file}"):
            columns.kinds(file, with_feature(name, name=new))
    message = "['category'] of items are derived, expected stored"
    with pytest.raises(ValueError, match=re.escape(message)):
        columns.kinds("items", with_feature("category", derive="hour"))
    none = dataclasses.replace(found, features=found.of("item", "event", "context"))
    with pytest.raises(ValueError, match="found no user feature, expected at least one"):
        columns.kinds("users", none)


def test_order_is_a_column_where_times_are_not_exact():
    exact, _ = tiny.columns()
    inexact, _ = tiny.columns(time_exact=False)
    for file in ("events", "impressions"):
        assert "order" not in columns.kinds(file, exact)
        assert columns.kinds(file, inexact)["order"] == (np.int32, ())
    assert "hour" not in columns.kinds("impressions", exact)  # derived, so not stored
