"""Chunks as rows of the log: hand-made values, and the keys that sort and group them."""

import dataclasses
import pathlib
import tomllib

import numpy as np
import polars as pl
import pytest

from rankjax.data.own import encoding, learning, plan, rows, schema_file
from tests.references import own_import

SCHEMA = """
name = "x"
[[impressions]]
files = "shown"
user = "u"
item = "i"
time = "t"
labels = {y = "y"}
features = {place = {}, hour = {derive = "hour"}, price = {kind = "dense"}}
[[impressions]]
files = "ads"
user = "u"
time = "t"
labels = {y = "y"}
features = {place = {}, tags = {kind = "ids", values = 2, ids = "hash", rows = 50}}
[[events]]
files = "acts"
user = "u"
item = "i"
time = "t"
features = {place = {table = "place"}, code = {ids = "given", rows = 9}}
[[events]]
files = "more"
user = "u"
time = "t"
"""
LEARNED = learning.Learned(
    users=pl.Series([5, 7, 9]),
    items=pl.Series(["a", "b", "c"]),
    cuts=learning.Cuts(10, 20),
    words={"place": pl.Series(["p", "q"]), "tags": pl.Series([], dtype=pl.Int64)},
    dense={"context.price": {"shift": [4.0], "scale": [2.0]}},
)


def schema(text: str = SCHEMA) -> schema_file.ImportSchema:
    return plan.resolve(schema_file.parse(tomllib.loads(text), "schema"))


def part(one: schema_file.ImportSchema, table: str, number: int, order: int = 3) -> plan.Part:
    spec = getattr(one, table)[number]
    return plan.Part(table, number, 0, order, pathlib.Path(table), spec)


def lists(frame: pl.DataFrame) -> dict[str, list]:
    return {name: frame[name].to_list() for name in frame.columns}


SHOWN = pl.DataFrame(
    {
        "row": [4, 6, 9],
        "user": [7, 5, 7],
        "item": ["c", "a", "c"],
        "time": [10, 21, 11],
        "label:y": pl.Series([1, 0, 0], dtype=pl.Int8),
        "f:place": ["q", None, "z"],
        "f:price": [8.0, None, 1.0],
    }
)


def impressions(one: schema_file.ImportSchema, frame: pl.DataFrame, number: int = 0, lost=None):
    lost = {} if lost is None else lost
    slots = plan.slots(one)
    return rows.impressions(one, part(one, "impressions", number), frame, LEARNED, slots, lost)


def test_impressions_hold_ids_spans_keys_and_every_context_feature():
    lost = {}
    found = lists(impressions(schema(), SHOWN, 0, lost))
    high = 3 << 40
    assert found == {
        "group": [2, 1, 2],  # no request: the users
        "request": [None] * 3,
        "time": [10, 21, 11],
        "clock": [10, 21, 11],
        "row": [high + 4, high + 6, high + 9],
        "position": [0, 0, 0],
        "user": [2, 1, 2],
        "item": [3, 1, 3],
        "span": [0, 2, 1],
        "split": [0, 0, 0],
        "label:y": [1, 0, 0],
        "x:place": [3, 0, 1],
        "x:price": [2.0, 0.0, -1.5],
        "x:tags": [[0, 0]] * 3,  # of the other [[impressions]]
    }
    assert lost == {
        "context.place": {"missing": 1, "cut": 0},
        "context.price": {"missing": 1, "cut": 0},
    }


def test_impressions_of_the_other_table_hold_theirs():
    lost = {"context.place": {"missing": 4, "cut": 0}}
    tags = [[1, 2, 3], None, []]
    frame = SHOWN.drop("item", "f:price").with_columns(pl.Series("f:tags", tags))
    found = lists(impressions(schema(), frame, 1, lost))
    assert found["item"] == [0, 0, 0] and found["x:price"] == [0.0] * 3
    hashed = [1 + own_import.hash_64(x) % 49 for x in (1, 2)]
    assert found["x:tags"] == [hashed, [0, 0], [0, 0]]
    assert lost["context.tags"] == {"missing": 1, "cut": 1}
    assert lost["context.place"] == {"missing": 5, "cut": 0}


@pytest.mark.parametrize(
    ("given", "ids", "group"),
    [
        ('request = "r"', [30, 31, 30], [30, 31, 30]),
        ('request = "r"', ["s", "t", "s"], None),
        ('request = "@row"', None, [(3 << 40) + x for x in (4, 6, 9)]),
        ("request_gap = 5", None, [2, 1, 2]),
    ],
)
def test_what_brings_a_requests_rows_together(given, ids, group):
    one = schema(SCHEMA.replace('labels = {y = "y"}', f'{given}\nlabels = {{y = "y"}}', 1))
    frame = SHOWN if ids is None else SHOWN.with_columns(request=pl.Series(ids))
    found = lists(impressions(one, frame))
    if group is None:
        hashes = [own_import.hash_64(x) for x in ids]
        group = [x - (x >> 63 << 64) for x in hashes]
    assert found["group"] == group
    if ids is not None:
        assert found["request"] == ids


@pytest.mark.parametrize(("gap", "group"), [("", [10, 21, 11]), ("request_gap = 2", [1, 1, 1])])
def test_rows_without_users_are_grouped_by_time_unless_a_gap_joins_them(gap, group):
    text = SCHEMA.replace('files = "shown"\nuser = "u"', f'files = "shown"\n{gap}')
    frame, one = SHOWN.with_columns(user=pl.lit("everyone")), schema(text)
    learned = dataclasses.replace(LEARNED, users=pl.Series(["everyone"]))
    where = part(one, "impressions", 0)
    found = rows.impressions(one, where, frame, learned, plan.slots(one), {})
    assert found["group"].to_list() == group and found["user"].to_list() == [1, 1, 1]


def test_order_and_position_are_taken_and_order_is_the_clock():
    frame = SHOWN.with_columns(order=pl.Series([2, 1, 0]), position=pl.Series([7, 8, 9]))
    found = lists(impressions(schema(), frame))
    assert (found["clock"], found["position"]) == ([2, 1, 0], [7, 8, 9])


def test_a_split_column_names_span_and_split():
    cuts = learning.Cuts(10, 10, {"old": 0, "new": 2})
    learned = dataclasses.replace(LEARNED, cuts=cuts)
    frame = SHOWN.with_columns(split=pl.Series(["old", "new", "old"]))
    one = schema()
    where = part(one, "impressions", 0)
    found = lists(rows.impressions(one, where, frame, learned, plan.slots(one), {}))
    assert (found["span"], found["split"]) == ([0, 2, 1], [0, 2, 0])


@pytest.mark.parametrize("ids", [pl.Series(range(4000)), pl.Series(map(str, range(4000)))])
def test_a_share_of_users_is_told_by_the_hash_of_the_id(ids):
    one = schema("users_share = 0.3\n" + SCHEMA)
    found = rows.sampled(one, ids).to_list()
    assert found == [own_import.hash_64(x) < int(0.3 * 2**64) for x in ids]
    assert 0.27 < np.mean(found) < 0.33
    assert rows.sampled(schema(), ids).all()


def test_only_sampled_users_have_impressions_and_what_they_lose_is_counted():
    low, high = sorted(own_import.hash_64(u) for u in (5, 7))
    one = schema(f"users_share = {(low + high) / 2**65}\n" + SCHEMA)
    kept = [own_import.hash_64(u) == low for u in SHOWN["user"]]
    lost = {}
    found = impressions(one, SHOWN, 0, lost)
    assert found["user"].to_list() == [r for r, k in zip([2, 1, 2], kept) if k]
    missing = sum(k for k, x in zip(kept, SHOWN["f:place"]) if x is None)
    assert lost["context.place"]["missing"] == missing


ACTS = pl.DataFrame(
    {
        "row": [0, 1],
        "user": [9, 5],
        "item": ["b", "b"],
        "time": [3, 2],
        "f:place": ["p", "q"],
        "f:code": [8, None],
        "click": [True, False],
        "c:device": ["m", "n"],
    }
)


def events(one: schema_file.ImportSchema, frame: pl.DataFrame, number: int = 0) -> dict:
    where = part(one, "events", number, order=1)
    return lists(rows.events(one, where, frame, LEARNED, plan.slots(one), {}))


def test_events_hold_keys_and_every_event_feature():
    high = 1 << 40
    assert events(schema(), ACTS) == {
        "user": [3, 1],
        "time": [3, 2],
        "clock": [3, 2],
        "row": [high, high + 1],
        "place": [0, 0],
        "item": [2, 2],
        "x:place": [2, 3],
        "x:code": [8, 0],
    }
    other = events(schema(), ACTS.select("row", "user", "time"), 1)
    assert (other["item"], other["x:place"], other["x:code"]) == ([0, 0], [0, 0], [0, 0])


def test_lists_are_exploded_in_order_before_everything_else():
    text = SCHEMA.replace('files = "more"\nuser = "u"\ntime = "t"', 'files = "more"\nuser = "u"')
    one = schema("time_exact = false\n" + text + 'item = "past"\nlist = true\n')
    frame = pl.DataFrame(
        {"row": [0, 1, 2], "user": [9, 5, 7], "item": [["c", "a"], [], ["b", "b", "c"]]},
        schema_overrides={"item": pl.List(pl.String)},
    )
    found = events(one, frame, 1)
    high = 1 << 40
    # An empty list is one row without an item at place -1.
    assert found["user"] == [3, 3, 1, 2, 2, 2] and found["item"] == [3, 1, 0, 2, 2, 3]
    assert found["place"] == [0, 1, -1, 0, 1, 2]
    assert found["row"] == [high, high, high + 1, high + 2, high + 2, high + 2]
    assert set(found["time"] + found["clock"]) == {rows.LISTED}


def test_clicks_are_the_events_that_become_requests():
    text = SCHEMA[SCHEMA.index("[[events]]") :]
    one = schema('name = "x"\n' + text + "[negatives]\nfeatures = {device = {}}\n")
    learned = dataclasses.replace(LEARNED, words={"device": pl.Series(["m", "n"])})
    where, lost = part(one, "events", 0, order=1), {}
    frame = ACTS.with_columns(time=pl.Series([7300, 2]))
    found = lists(rows.clicks(one, where, frame, learned, plan.slots(one), lost, 3600))
    assert found == {
        "bucket": [3 * 2 + 2],  # the third hour, and the third span
        "time": [7300],
        "row": [1 << 40],
        "user": [3],
        "item": [2],
        "sampled": [True],
        "x:device": [2],
    }
    assert lost == {"context.device": {"missing": 0, "cut": 0}}


def test_given_ids_are_rows():
    own = '[user]\nids = "given"\nrows = 40\n[item]\nids = "given"\nrows = 9\n'
    one, x = schema(SCHEMA + own), pl.Series([3, 8, 3])
    assert rows.user_rows(one, LEARNED, x).tolist() == [3, 8, 3]
    assert rows.item_rows(one, LEARNED, x).dtype == np.int32
    assert rows.counts(one, LEARNED) == {"users": 40, "items": 9}
    assert rows.counts(schema(), LEARNED) == {"users": 4, "items": 4}
    assert rows.user_rows(schema(), LEARNED, pl.Series([9, 5])).tolist() == [3, 1]
    assert rows.item_rows(schema(), LEARNED, pl.Series(["b"])).tolist() == [2]


def test_the_ids_themselves_are_a_feature():
    slot = next(s for s in plan.slots(schema()) if s.name == "user")
    learned = dataclasses.replace(LEARNED, words={"user": pl.Series([5, 9])})
    found, lost = rows.feature(slot, learned, LEARNED.users)
    assert found.tolist() == [encoding.KNOWN, encoding.UNKNOWN, encoding.KNOWN + 1]
    assert lost == {"missing": 0, "cut": 0}
