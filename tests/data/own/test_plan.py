"""Which file is what, and the log's schema, against what is written out by hand."""

import dataclasses
import pathlib

import polars as pl
import pytest

from rankjax import schema as schemas
from rankjax.data import samples
from rankjax.data.own import plan, schema_file

Condition, Input, Label = schema_file.Condition, schema_file.Input, schema_file.Label
Feature, Table = schemas.Feature, schemas.Table


def impressions(files=("shown.csv",), **fields) -> schema_file.Impressions:
    base = {"user": "u", "item": "i", "time": "t", "labels": {"click": Label(column="y")}}
    return schema_file.Impressions(files=files, **base | fields)


def events(files=("past.csv",), **fields) -> schema_file.Events:
    return schema_file.Events(files=files, **{"user": "u", "item": "i", "time": "t"} | fields)


def schema(**fields) -> schema_file.ImportSchema:
    return schema_file.ImportSchema(name="s", **{"impressions": (impressions(),)} | fields)


def paths(*names: str, folder: str = "in") -> list[pathlib.Path]:
    return [pathlib.Path(folder, name) for name in names]


# parts


def test_parts_by_name_and_glob():
    catalogue = schema_file.Catalogue(files=("people.csv",), id="u")
    found = schema(
        users=catalogue,
        items=dataclasses.replace(catalogue, files=("things.*",)),
        events=(events(), events(("shown-?.csv", "shown-*.csv"))),
        impressions=(impressions(("shown-*.csv",)), impressions(("extra.csv",))),
    )
    files = paths("shown-2.csv", "extra.csv", "people.csv", "past.csv", "shown-1.csv", "things.pq")
    parts = plan.parts(found, files)
    assert [(p.table, p.number, p.file, p.path.name) for p in parts] == [
        ("users", 0, 0, "people.csv"),
        ("items", 0, 0, "things.pq"),
        ("events", 0, 0, "past.csv"),
        ("events", 1, 0, "shown-1.csv"),  # a file that two patterns fit counts once
        ("events", 1, 1, "shown-2.csv"),
        ("impressions", 0, 0, "shown-1.csv"),  # and may play several roles
        ("impressions", 0, 1, "shown-2.csv"),
        ("impressions", 1, 0, "extra.csv"),
    ]
    assert [p.order for p in parts] == [*range(8)] and len({p.tag for p in parts}) == 8
    assert all(p.spec is getattr(found, p.table)[p.number] for p in parts[2:])
    for again in (files[::-1], files + files, sorted(files)):
        assert plan.parts(found, again) == parts


def test_one_file_under_two_names_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "shown.csv").write_text("u\n1\n")
    monkeypatch.chdir(tmp_path)
    names = [pathlib.Path("shown.csv"), tmp_path / "shown.csv", tmp_path / "." / "shown.csv"]
    assert len(plan.parts(schema(), names)) == 1


def test_a_name_with_brackets_is_itself():
    found = schema(impressions=(impressions(("shown[1].csv",)),))
    (part,) = plan.parts(found, paths("shown[1].csv"))
    assert part.path.name == "shown[1].csv"


@pytest.mark.parametrize("name", ["shown.csv", "Shown-1.csv"])
def test_a_pattern_without_a_file(name):
    found = schema(impressions=(impressions(("shown.csv", "shown-*.csv")),))
    files = [*paths("shown.csv"), *paths(name)]
    message = r"\[impressions\]: found files \['.*'\], expected one like 'shown-\*.csv'"
    with pytest.raises(ValueError, match=message):
        plan.parts(found, files)


def test_a_file_without_a_role():
    files = paths("shown.csv", "notes.csv")
    like = r"expected names like \['past.csv', 'shown.csv'\]"
    message = rf"found files \['in/notes.csv'\] that no table names, {like}"
    with pytest.raises(ValueError, match=message):
        plan.parts(
            schema(events=(events(("shown.csv", "past.csv")),)), [*files, *paths("past.csv")]
        )


# columns


def write(tmp_path, **files: list[str]) -> list[pathlib.Path]:
    found = []
    for name, names in files.items():
        found.append(tmp_path / f"{name}.csv")
        pl.DataFrame({n: [1] for n in names}).write_csv(found[-1])
    return found


def test_columns_that_nothing_reads(tmp_path):
    spec = impressions(("shown.csv",), features={"c": Input(column="c")})
    clicks = events(("shown.csv",), where=Condition(column="k", equals=1))
    found = schema(impressions=(spec,), events=(clicks, events()))
    files = write(
        tmp_path, shown=["u", "i", "t", "y", "c", "x", "k"], past=["a", "u", "i", "t", "y"]
    )
    unused = plan.check_columns(found, plan.parts(found, files))
    assert sorted(unused) == ["past.csv: a", "past.csv: y", "shown.csv: x"]


NEGATIVES = schema_file.Negatives(
    of=Condition(column="k", equals=1), features={"place": Input(column="p")}
)


@pytest.mark.parametrize(
    ("lost", "role"),
    [
        ("u", r"user of \[events\]"),
        ("i", r"item of \[events\]"),
        ("t", r"time of \[events\]"),
        ("w", r"where of \[events\]"),
        ("f", r"feature f of \[events\]"),
        ("k", r"negatives.of of \[events\]"),
        ("p", r"feature place of \[negatives\] of \[events\]"),
        ("id", r"id of \[items\]"),
        ("born", r"birth of \[items\]"),
        ("brand", r"feature brand of \[items\]"),
    ],
)
def test_a_missing_column_is_said_with_its_role(lost, role, tmp_path):
    names = {
        "past": ["u", "i", "t", "w", "f", "k", "p"],
        "things": ["id", "born", "brand"],
    }
    found = schema(
        impressions=(),
        negatives=NEGATIVES,
        events=(events(where=Condition(column="w", above=0), features={"f": Input(column="f")}),),
        items=schema_file.Catalogue(
            files=("things.csv",), id="id", birth="born", features={"brand": Input(column="brand")}
        ),
    )
    files = write(tmp_path, **names)
    assert plan.check_columns(found, plan.parts(found, files)) == []
    kept = {file: [n for n in columns if n != lost] for file, columns in names.items()}
    (file,) = (f for f in names if kept[f] != names[f])
    write(tmp_path, **kept)
    message = rf"{file}.csv: found columns \[.*\], expected '{lost}' too, which .* names as {role}$"
    with pytest.raises(ValueError, match=message):
        plan.check_columns(found, plan.parts(found, files))


def test_columns_of_impressions_and_own_ids(tmp_path):
    spec = impressions(
        request="r",
        position="p",
        labels={"click": Label(column="y"), "buy": Label(column="b", above=0)},
        features={"e": Input(column="l", kind="dense", at="k")},
    )
    people = schema_file.Catalogue(files=("people.csv",), id=("u", "v"))
    found = plan.resolve(schema(impressions=(spec,), users=people, user=Input(column="own")))
    names = ["u", "i", "t", "r", "p", "y", "b", "l", "k"]
    files = write(tmp_path, shown=names, people=["u", "v", "own"])
    parts = plan.parts(found, files)
    assert plan.check_columns(found, parts) == []
    for lost, role in (("b", "label buy"), ("k", "feature e"), ("r", "request"), ("p", "position")):
        write(tmp_path, shown=[n for n in names if n != lost])
        with pytest.raises(ValueError, match=f"expected '{lost}' too.* as {role} of"):
            plan.check_columns(found, parts)
    write(tmp_path, shown=names, people=["u", "v"])
    with pytest.raises(ValueError, match=r"people.csv.*'own' too, .* as feature user of \[users\]"):
        plan.check_columns(found, parts)


# defaults


def test_defaults_are_written_out():
    found = schema(
        ids=schema_file.Ids(ids="hash", rows=100, min_count=3),
        users=schema_file.Catalogue(files=("p.csv",), id="u", features={"town": Input(column="t")}),
        events=(
            events(
                features={
                    "own": Input(
                        column="o", group="g", table="w", ids="given", rows=9, min_count=2
                    ),
                    "known": Input(column="k", ids="vocabulary"),
                    "dwell": Input(column="d", kind="dense"),
                    "hour": Input(derive="hour"),
                }
            ),
        ),
    )
    got = plan.resolve(found)
    base = {"ids": "hash", "rows": 100, "min_count": 3}
    assert got.user == Input(group="user", table="user", **base)
    assert got.item == Input(group="item", table="item", **base)
    assert got.users.features["town"] == Input(column="t", group="user", table="town", **base)
    assert got.events[0].features == {
        "own": Input(column="o", group="g", table="w", ids="given", rows=9, min_count=2),
        "known": Input(column="k", group="event", table="known", ids="vocabulary", min_count=3),
        "dwell": Input(column="d", group="event", kind="dense"),
        "hour": Input(group="event", table="hour", derive="hour"),
    }
    others = {"users", "events", "user", "item"}
    for f in dataclasses.fields(found):
        if f.name not in others:
            assert getattr(got, f.name) == getattr(found, f.name)
    assert plan.resolve(got) == got


def test_defaults_of_context_and_derived_numbers():
    items = schema_file.Catalogue(files=("p.csv",), id="i", birth="b")
    features = {"age": Input(derive="item_age"), "slot": Input(column="s")}
    shown = plan.resolve(schema(impressions=(impressions(features=features),), items=items))
    clicks = schema_file.Negatives(features=features)
    clicks = plan.resolve(schema(impressions=(), events=(events(),), negatives=clicks, items=items))
    want = {
        "age": Input(derive="item_age", kind="dense", group="context"),
        "slot": Input(column="s", group="context", table="slot", ids="vocabulary", min_count=1),
    }
    assert shown.impressions[0].features == clicks.negatives.features == want


@pytest.mark.parametrize(
    ("ids", "own", "message"),
    [
        (schema_file.Ids(ids="hash"), {}, "feature '(user|c)': found ids='hash' with rows=None"),
        (schema_file.Ids(ids="given"), {}, "found ids='given' with rows=None, expected `rows`"),
        (schema_file.Ids(), {"rows": 5}, "feature 'c': found ids='vocabulary' with rows=5"),
    ],
)
def test_sizes_that_lack_or_do_not_count(ids, own, message):
    features = {"c": Input(column="c", **own)}
    with pytest.raises(ValueError, match=message):
        plan.resolve(schema(ids=ids, impressions=(impressions(features=features),)))


def test_own_ids_of_a_column_are_a_feature_of_the_catalogue():
    own = Input(column="code", table="codes", ids="given", rows=50)
    town = Input(column="town", group="user", table="town", ids="vocabulary", min_count=1)
    people = schema_file.Catalogue(files=("p.csv",), id="u", features={"town": town})
    got = plan.resolve(schema(users=people, user=own))
    column = dataclasses.replace(own, group="user", min_count=1)
    assert list(got.users.features.items()) == [("user", column), ("town", town)]
    assert got.user.ids == "vocabulary" and got.user.rows is None  # rows are not those ids
    names = [(s.side, s.name, s.column, s.number) for s in plan.slots(got)]
    assert names == [
        *(("user", "user", "f:user", 0), ("user", "town", "f:town", 0)),
        ("item", "item", "item", None),
    ]
    twice = dataclasses.replace(people, features={"user": town})
    with pytest.raises(ValueError, match=r"user.column: found 'code' and \[users.features\] user"):
        plan.resolve(schema(users=twice, user=own))


# the log's schema


def test_slots_in_the_order_of_the_schema():
    one, two = Input(column="a"), Input(column="b")
    catalogue = schema_file.Catalogue(files=("p.csv",), id="u", features={"z": one, "a": two})
    found = schema(
        users=catalogue,
        items=catalogue,
        events=(
            events(features={"y": one, "hour": Input(derive="hour")}),
            events(features={"y": two}),
        ),
        impressions=(impressions(features={"k": one}), impressions(features={"j": two, "k": two})),
    )
    assert [dataclasses.astuple(s)[:5] for s in plan.slots(found)] == [
        ("user", "user", "user", "users", None),
        ("user", "z", "f:z", "users", 0),
        ("user", "a", "f:a", "users", 0),
        ("item", "item", "item", "items", None),
        ("item", "z", "f:z", "items", 0),
        ("item", "a", "f:a", "items", 0),
        ("event", "y", "f:y", "events", 0),
        ("event", "hour", "f:hour", "events", 0),
        ("event", "y", "f:y", "events", 1),
        ("context", "k", "f:k", "impressions", 0),
        ("context", "j", "f:j", "impressions", 1),
        ("context", "k", "f:k", "impressions", 1),
    ]
    clicks = schema(
        impressions=(),
        events=(events(), events()),
        negatives=schema_file.Negatives(features={"k": one}),
    )
    assert [dataclasses.astuple(s)[:5] for s in plan.slots(clicks)][2:] == [
        ("context", "k", "c:k", "events", 0),
        ("context", "k", "c:k", "events", 1),
    ]


def log_schema(found: schema_file.ImportSchema, **words: int) -> schemas.Schema:
    found = plan.resolve(found)
    return plan.log_schema(found, plan.slots(found), words)


def test_log_schema():
    found = schema(
        task="buy",
        items=schema_file.Catalogue(
            files=("p.csv",),
            id="i",
            birth="b",
            features={
                "tags": Input(column="g", kind="ids", values=4, table="word"),
                "title": Input(column="w", kind="ids", separator=" ", table="word", group="text"),
                "price": Input(column="p", kind="dense"),
            },
        ),
        events=(
            events(features={"kind": Input(column="k", action=True, ids="given", rows=5)}),
            events(features={"kind": Input(column="l", action=True, ids="given", rows=5)}),
        ),
        impressions=(
            impressions(
                labels={"click": Label(column="y"), "buy": Label(column="b", weight="click")},
                features={
                    "device": Input(column="d", ids="hash", rows=33),
                    "hour": Input(derive="hour"),
                    "age": Input(derive="item_age"),
                },
            ),
        ),
    )
    got = log_schema(found, user=10, item=20, word=7)
    feature = dataclasses.replace
    context = Feature(name="device", side="context", group="context", table="device")
    item = Feature(name="item", side="item", group="item", table="item")
    assert got.features == (
        Feature(name="user", side="user", group="user", table="user"),
        item,
        feature(item, name="tags", kind="ids", values=4, table="word"),
        feature(item, name="title", kind="ids", values=8, table="word", group="text"),
        feature(item, name="price", kind="dense", table=""),
        Feature(name="kind", side="event", group="event", table="kind", action=True),
        context,
        feature(context, name="hour", table="hour", derive="hour"),
        feature(context, name="age", kind="dense", table="", derive="item_age"),
    )
    assert got.tables == (
        *(Table(name="user", rows=12), Table(name="item", rows=22), Table(name="word", rows=9)),
        *(Table(name="kind", rows=5), Table(name="device", rows=33, hashed=True)),
        Table(name="hour", rows=samples.DERIVED["hour"].rows),
    )
    assert got.tasks == (schemas.Task(name="click"), schemas.Task(name="buy", weight="click"))
    assert got.primary_task == "buy" and got.time_exact
    assert not log_schema(dataclasses.replace(schema(), time_exact=False)).time_exact


def test_a_log_of_clicks_has_one_task():
    clicks = schema(
        impressions=(), events=(events(),), negatives=schema_file.Negatives(task="play")
    )
    got = log_schema(clicks)
    assert got.tasks == (schemas.Task(name="play"),) and got.primary_task == "play"
    assert [t.rows for t in got.tables] == [2, 2]  # 0 missing, 1 unknown, though nothing is known


def test_the_order_comes_first_and_the_rest_follows():
    features = {"a": Input(column="a"), "b": Input(column="b"), "c": Input(column="c")}
    found = schema(impressions=(impressions(features=features),))
    got = log_schema(dataclasses.replace(found, order=("context.c", "item.item")))
    assert [f.name for f in got.features] == ["c", "item", "user", "a", "b"]
    assert [t.name for t in got.tables] == ["c", "item", "user", "a", "b"]
    with pytest.raises(
        ValueError, match=r"order: found \['event.c', 'd'\], expected some of \['us"
    ):
        log_schema(dataclasses.replace(found, order=("context.c", "event.c", "d")))


def test_tables_of_the_schema_are_of_their_size_and_first():
    found = schema(
        tables={
            "device": schema_file.Table(rows=40),
            "nobody's": schema_file.Table(rows=3, hashed=True),
            "user": schema_file.Table(rows=50, hashed=True),
        },
        impressions=(impressions(features={"device": Input(column="d", ids="hash", rows=33)}),),
    )
    got = log_schema(found, user=48, item=5)
    assert got.tables == (
        Table(name="device", rows=40, hashed=True),
        Table(name="nobody's", rows=3, hashed=True),
        Table(name="user", rows=50, hashed=True),
        Table(name="item", rows=7),
    )
    message = "tables.user: found rows=50, expected at least 51 for feature 'user' of side 'user'"
    with pytest.raises(ValueError, match=message):
        log_schema(found, user=49, item=5)


KIND = Input(column="k", ids="given", rows=5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dataclasses.replace(KIND, group="g"), "found feature 'kind' of side 'event' twice, as Fe"),
        (dataclasses.replace(KIND, action=True), "found feature 'kind' of side 'event' twice"),
        (dataclasses.replace(KIND, kind="ids"), "found feature 'kind' of side 'event' twice"),
        (dataclasses.replace(KIND, rows=6), "found table 'kind' twice, as .*rows=5.* and .*rows=6"),
        (dataclasses.replace(KIND, ids="hash"), "found table 'kind' twice"),
        (Input(column="k", ids="vocabulary"), "found table 'kind' twice"),
        (dataclasses.replace(KIND, column="other", min_count=3), None),
    ],
)
def test_features_of_one_name_say_the_same(other, message):
    found = schema(events=(events(features={"kind": KIND}), events(features={"kind": other})))
    if message is None:
        assert len(log_schema(found).features) == 3
        return
    with pytest.raises(ValueError, match=message):
        log_schema(found)


def test_labels_of_all_impressions_have_one_weight():
    labels = {"click": Label(column="y"), "buy": Label(column="b")}
    other = labels | {"buy": Label(column="b", weight="click")}
    found = schema(impressions=(impressions(labels=labels), impressions(labels=other)))
    with pytest.raises(ValueError, match="found weight of label 'buy' twice, as '' and 'click'"):
        log_schema(found)
