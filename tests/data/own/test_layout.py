"""Which file is which table, on files of a few columns that stand for whole ones."""

import pathlib

import polars as pl
import pytest

from rankjax.data.own import glance, layout

START = 1_600_000_000
IDS, ONCE = [1, 1, 2, 3], [1, 2, 3, 4]
TIMES = [START, START, START + 5, START + 9]
COLUMNS = {
    "shown": {"user_id": IDS, "item_id": IDS, "timestamp": TIMES, "click": [0, 1, 0, 0]},
    "shown_too": {"uid": IDS, "item_id": IDS, "timestamp": TIMES, "click": [0, 1, 0, 0]},
    "liked": {"user_id": IDS, "item_id": IDS, "timestamp": TIMES, "like": [0, 1, 0, 0]},
    "rated": {"user_id": IDS, "item_id": IDS, "timestamp": TIMES, "rating": [1, 2, 3, 4]},
    "clicks": {"user_id": IDS, "item_id": IDS, "ts": TIMES},
    "lists": {"user_id": ONCE, "history": [[1], [], [2], [3]]},
    "users": {"user_id": ONCE, "age": [1, 1, 2, 2]},
    "more_users": {"user_id": ONCE, "city": ["a"] * 4},
    "items": {"item_id": ONCE, "genre": ["a"] * 4},
    "requests": {"user_id": IDS, "device": ["a"] * 4},
    "deeds": {"user_id": IDS, "ts": TIMES, "behavior": ["pv"] * 4},
    "untimed": {"user_id": IDS, "item_id": IDS, "click": [0, 1, 0, 0]},
}


def look(columns, name, **more):
    path = pathlib.Path(f"{name}.csv")
    options = {"separator": ",", "header": None, "bounds": {}, "gaps": frozenset()}
    return glance.Glance(path=path, frame=pl.DataFrame(columns), **options | more)


def lay(*names):
    return layout.layout(layout.groups([look(COLUMNS[n], n) for n in names]))


def held(groups):
    return [n.removesuffix(".csv") for g in groups for n in g.names]


@pytest.mark.parametrize(
    ("names", "tables", "exact"),
    [
        ("shown users items clicks", {"shown": "shown", "past": "clicks"}, True),
        ("shown", {"shown": "shown"}, True),
        ("shown rated", {"shown": "shown", "past": "rated"}, True),
        ("shown deeds", {"shown": "shown", "past": "deeds"}, True),
        ("clicks deeds", {"past": "clicks", "unused": "deeds"}, True),
        ("shown shown_too", {"shown": "shown shown_too"}, True),
        ("liked shown", {"shown": "liked", "unused": "shown"}, True),
        ("shown lists requests", {"shown": "shown", "lists": "lists", "unused": "requests"}, False),
        ("rated items", {"shown": "rated", "past": "rated"}, True),
        ("rated clicks", {"shown": "rated", "past": "clicks"}, True),
        ("clicks users more_users", {"past": "clicks", "users": "more_users"}, True),
        ("untimed", {"shown": "untimed"}, False),
    ],
)
def test_tables(names, tables, exact):
    found = lay(*names.split())
    for table in ("shown", "past", "lists"):
        assert held(getattr(found, table)) == tables.get(table, "").split()
    assert found.exact == exact
    if "users" in names.split():
        assert held(found.users) == [tables.get("users", "users")]
    if "items" in names.split():
        assert held(found.items) == ["items"]
    unused = tables.get("unused", "users" if "more_users" in names else "")
    assert held(found.unused) == unused.split()
    assert found.acts == [*found.shown, *found.past]


def test_files_of_equal_columns_are_one_group():
    seen = [look(COLUMNS["clicks"], n) for n in ("b", "a")]
    (group,) = layout.groups([*seen, look(COLUMNS["clicks"], "c")])
    assert group.names == ("a.csv", "b.csv", "c.csv") and group.frame.height == 12
    many = [look(COLUMNS["clicks"], "a"), look(COLUMNS["clicks"], "b", separator=";")]
    assert len(layout.groups(many)) == 2
    assert layout.groups([look(COLUMNS["clicks"], "a[1]*")])[0].names == ("a[[]1][*].csv",)


def test_names_that_do_not_tell_files_apart():
    one, other = look(COLUMNS["clicks"], "day/log"), look(COLUMNS["users"], "night/log")
    with pytest.raises(
        ValueError, match=r"night/log.csv: found another file of the name 'log.csv'"
    ):
        layout.groups([one, other])
    (group,) = layout.groups([one, look(COLUMNS["clicks"], "night/log")])
    assert group.names == ("log.csv",)


@pytest.mark.parametrize("names", ["users items", "requests", "lists", "users", "deeds"])
def test_nobody_does_anything(names):
    with pytest.raises(
        ValueError, match=r"starter: found files with columns .*, expected one with"
    ):
        lay(*names.split())


def test_items_that_several_columns_name():
    items = {"place": ["a", "a", "b", "b"], "sku": [1, 2, 1, 2], "x": [0.5] * 4}
    shown = {"user_id": IDS, "item_id": IDS, "place": ["a", "a", "b", "b"], **COLUMNS["shown"]}
    found = layout.layout(layout.groups([look(items, "items"), look(shown, "shown")]))
    assert found.key == ("place", None)
    assert found.item_of(found.items[0]) == ("place", "sku")
    assert found.item_of(found.shown[0]) == ("place", "item_id")
    # where the impressions lack the other column, nothing tells the items apart
    found = layout.layout(layout.groups([look(items, "items"), look(COLUMNS["shown"], "shown")]))
    assert (found.items, found.key, held(found.unused)) == ([], (None,), ["items"])
    assert found.item_of(found.shown[0]) == ("item_id",)
