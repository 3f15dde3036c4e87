"""From sorted chunks to the log's files: hand-made rows, hand-made logs."""

import tomllib

import polars as pl
import pytest

from rankjax.data import event_log, importer
from rankjax.data.own import schema_file

HEAD = 'name = "x"\n{top}[split]\ntrain_until = 700000100\nvalidation_until = 700000200\n'
SHOWN = """
[[impressions]]
files = "shown*"
user = "u"
item = "i"
time = "t"
request = "r"
labels = {y = "y"}
"""
LISTS = '[[events]]\nfiles = "lists"\nuser = "u"\nitem = "past"\nlist = true\n'
T = 700_000_000
ROWS = [
    # u, i, t, r, y
    ("a", 1, T + 50, 4, 1),
    ("b", 2, T + 150, 9, 0),
    ("a", 3, T + 250, 2, 0),
    ("b", 1, T + 90, 7, 1),
]


def shown(rows: list[tuple] = ROWS) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["u", "i", "t", "r", "y"], orient="row")


def run(folder, text: str, top: str = "", **frames: pl.DataFrame) -> event_log.EventLog:
    paths = [folder / f"{name}.parquet" for name in frames]
    for path, frame in zip(paths, frames.values()):
        frame.write_parquet(path)
    text = HEAD.format(top=top) + text.replace('"lists"', '"lists*"').replace('"acts"', '"acts*"')
    schema = schema_file.parse(tomllib.loads(text), "schema")
    return event_log.EventLog.open(importer.run(schema, paths, folder / "log"), verify=True)


def column(log: event_log.EventLog, file: str, name: str) -> list:
    return log.column(file, name).tolist()


def test_a_birth_that_is_not_known_is_the_earliest_that_is(tmp_path):
    things = pl.DataFrame({"i": [1, 3, 8], "born": [T - 7, None, T - 70]})
    items = '[items]\nfiles = "things*"\nid = "i"\nbirth = "born"\n'
    log = run(tmp_path, SHOWN + items, shown=shown(), things=things)
    # The rows are missing, 1, 2, 3, 8; of 2 there is no row, of 3 no birth.
    assert column(log, "items", "birth") == [0, T - 7, T - 70, T - 70, T - 70]
    assert log.info["items_without_birth"] == 2 and log.info["items_without_a_row"] == 1
    assert "users_without_a_row" not in log.info


def test_without_any_birth_all_are_0(tmp_path):
    things = pl.DataFrame({"i": [1], "born": pl.Series([None], dtype=pl.Int64)})
    items = '[items]\nfiles = "things*"\nid = "i"\nbirth = "born"\n'
    log = run(tmp_path, SHOWN + items, shown=shown(), things=things)
    assert column(log, "items", "birth") == [0] * 4
    assert log.info["items_without_birth"] == 3


def test_what_a_catalogue_loses_is_counted(tmp_path):
    people = pl.DataFrame({"u": ["a", "b"], "tags": [["p", "q", "r"], None]})
    users = '[users]\nfiles = "people*"\nid = "u"\nfeatures.tags = {kind = "ids", values = 1}\n'
    log = run(tmp_path, SHOWN + users, shown=shown(), people=people)
    assert column(log, "users", "tags") == [[0], [2], [0]]
    assert log.info["lost"] == {"user.tags": {"missing": 1, "cut": 2}}
    assert log.info["users_without_a_row"] == 0


def test_of_lists_each_users_shortest_counts_and_lies_before_everything(tmp_path):
    lists = pl.DataFrame({"u": ["b", "c", "b", "c"], "past": [[6, 1, 4], [5], [6, 1], [7]]})
    acts = pl.DataFrame({"u": ["b", "b"], "i": [3, 2], "t": [T + 120, T + 90]})
    timed = '[[events]]\nfiles = "acts"\nuser = "u"\nitem = "i"\ntime = "t"\n'
    top = "time_exact = false\n"
    log = run(tmp_path, SHOWN + LISTS + timed, top, shown=shown(), lists=lists, acts=acts)
    items = dict(enumerate(range(1, 8), 1))
    assert [items[i] for i in column(log, "events", "item")] == [6, 1, 2, 3, 5]
    assert column(log, "events", "user") == [2, 2, 2, 2, 3]
    assert column(log, "events", "order") == [0, 1, 2, 3, 0]
    # A list's times are the user's first impression's, of "c", who has none, the log's.
    assert column(log, "events", "time") == [T + 90, T + 90, T + 90, T + 120, T + 50]
    assert column(log, "impressions", "user") == [1, 2, 2, 1]
    # "b" at T + 90 reads the list alone, the event of that second not.
    assert column(log, "impressions", "order") == [0, 2, 4, 0]
    assert log.info["longer_lists"] == 1


def test_an_empty_list_says_that_there_was_no_past(tmp_path):
    lists = pl.DataFrame({"u": ["b", "a", "b"], "past": [[6, 1], [5], []]})
    log = run(tmp_path, SHOWN + LISTS, "time_exact = false\n", shown=shown(), lists=lists)
    assert column(log, "events", "user") == [1] and log.info["longer_lists"] == 1
    assert column(log, "impressions", "order") == [1, 0, 0, 1]


def test_one_request_may_stand_in_two_tables_but_has_one_user(tmp_path):
    ads = shown([("a", 2, T + 40, 4, 0), ("b", 3, T + 95, 7, 1)])
    text = SHOWN + SHOWN.replace("shown", "ads")
    log = run(tmp_path, text, shown=shown(), ads=ads)
    assert column(log, "impressions", "request") == [4, 4, 7, 7, 9, 2]
    assert column(log, "impressions", "time") == [T + d for d in (40, 40, 90, 90, 150, 250)]
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match="found request 4 with two users"):
        run(other, text, shown=shown(), ads=ads.with_columns(u=pl.lit("b")))
    assert not (other / "log").exists()


def test_a_request_that_the_split_column_parts_is_refused(tmp_path):
    rows = shown().with_columns(r=pl.Series([1, 2, 1, 3]), part=pl.Series(list("tvet")))
    text = SHOWN + 'split = "part"\n'
    named = 'name = "x"\n[split]\ntrain_values = "t"\nvalidation_values = "v"\ntest_values = "e"\n'
    rows.write_parquet(tmp_path / "shown.parquet")
    schema = schema_file.parse(tomllib.loads(named + text), "schema")
    with pytest.raises(ValueError, match="found request 1 with two values of the split column"):
        importer.run(schema, [tmp_path / "shown.parquet"], tmp_path / "log")


def test_the_schemas_own_notes_are_kept_and_those_of_the_import_added(tmp_path):
    info = '\n[info]\nnotes = ["Old."]\nnegatives = {per_click = 3}\n'
    log = run(tmp_path, SHOWN + info, shown=shown())
    assert log.info["notes"] == ["Old."] and log.info["negatives"] == {"per_click": 3}
    assert log.info["name"] == "x"
    assert log.info["rows"] == {"impressions.0.0000: shown.parquet": {"read": 4, "kept": 4}}
