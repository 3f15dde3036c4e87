"""Whole files by role against plain loops over their rows, whatever the format and the chunks."""

import dataclasses
import datetime
import decimal
import random

import polars as pl
import pytest

from rankjax.data.own import plan, reading, schema_file

Condition, Input, Label = schema_file.Condition, schema_file.Input, schema_file.Label
START = 1_600_000_000


def rows(n: int = 60) -> list[dict]:
    """An impressions file that has every role; a tenth of what may be missing is."""
    rng = random.Random(0)
    maybe = lambda x: None if rng.random() < 0.1 else x
    return [
        {
            "who": rng.randrange(9),
            "thing": f"thing {rng.randrange(20)}",
            "shop": rng.randrange(3),
            "ms": (START + rng.randrange(10**6)) * 1000 + rng.randrange(1000),
            "page": f"p{i // 3}",
            "slot": i % 3,
            "part": rng.choice(["a", "b"]),
            "clicked": rng.random() < 0.3,
            "stars": rng.choice([1.0, 2.5, 4.0, 5.0]),
            "device": maybe(rng.choice(["phone", "desk"])),
            "tags": maybe("|".join(str(rng.randrange(50)) for _ in range(rng.randrange(4)))),
            "price": maybe(rng.random() * 9),
            "fits": [rng.random() for _ in range(3)],
        }
        for i in range(n)
    ]


FEATURES = {
    "device": Input(column="device"),
    "tags": Input(column="tags", kind="ids", separator="|"),
    "price": Input(column="price", kind="dense"),
    "hour": Input(derive="hour"),
}
SHOWN = schema_file.Impressions(
    files=("f.*",),
    user="who",
    item=("shop", "thing"),
    time="ms",
    time_unit="ms",
    request="page",
    position="slot",
    split="part",
    where=Condition(column="shop", one_of=(0, 1)),
    labels={"click": Label(column="clicked"), "good": Label(column="stars", at_least=4)},
    features=FEATURES,
)
SPLIT = schema_file.Split(train_values=("a",), test_values=("b",))


def schema(spec=SHOWN, **fields) -> schema_file.ImportSchema:
    found = {"impressions": (spec,), **fields} if isinstance(spec, type(SHOWN)) else fields
    if found.get("impressions") and spec.split:
        found.setdefault("split", SPLIT)
    return plan.resolve(schema_file.ImportSchema(name="s", **found))


def read(path, found: schema_file.ImportSchema, spec=None, chunk: int = 1000) -> pl.DataFrame:
    spec = found.impressions[0] if spec is None else spec
    return pl.concat(frame for _, frame in reading.chunks(path, spec, found, chunk))


def expected(data: list[dict]) -> list[dict]:
    found = []
    for i, r in enumerate(data):
        if r["shop"] not in (0, 1):
            continue
        tags = None if r["tags"] in (None, "") else [t for t in r["tags"].split("|") if t]
        found.append(
            {
                "row": i,
                "user": r["who"],
                "item": f"{r['shop']}\x1f{r['thing']}",
                "time": r["ms"] // 1000,
                "request": r["page"],
                "position": r["slot"],
                "split": r["part"],
                "label:click": int(r["clicked"]),
                "label:good": int(r["stars"] >= 4),
                "f:device": r["device"],
                "f:tags": tags,
                "f:price": r["price"],
            }
        )
    return found


def write(path, data: list[dict]):
    frame = pl.DataFrame(data)
    if path.suffix == ".csv":
        frame.drop("fits").write_csv(path)
    else:
        frame.write_parquet(path, row_group_size=7)
    return path


@pytest.mark.parametrize("chunk", [1, 7, 59, 60, 1000])
@pytest.mark.parametrize("name", ["f.csv", "f.parquet"])
def test_impressions(name, chunk, tmp_path):
    data = rows()
    path, found = write(tmp_path / name, data), schema()
    frames = list(reading.chunks(path, found.impressions[0], found, chunk))
    assert [until for until, _ in frames] == [min(i + chunk, 60) for i in range(0, 60, chunk)]
    for until, frame in frames:
        assert frame["row"].is_between(until - chunk, until - 1).all()
    got = pl.concat(frame for _, frame in frames)
    want = pl.DataFrame(expected(data))
    if name == "f.parquet":  # where an empty text is no missing cell
        empty = {i for i, r in enumerate(data) if r["tags"] == ""}
        tags = [[] if r in empty else t for r, t in want.select("row", "f:tags").rows()]
        want = want.with_columns(pl.Series("f:tags", tags))
        assert empty
    assert got.columns == want.columns and got.rows() == want.rows()
    assert got.schema["label:click"] == pl.Int8 and got.schema["f:tags"] == pl.List(pl.String)


def test_the_element_of_a_list(tmp_path):
    data = rows()
    spec = dataclasses.replace(
        SHOWN, where=None, features={"fit": Input(column="fits", kind="dense", at="slot")}
    )
    got = read(write(tmp_path / "f.parquet", data), schema(spec))
    assert got["f:fit"].to_list() == [r["fits"][r["slot"]] for r in data]


@pytest.mark.parametrize("where", [None, Condition(column="shop", above=0)])
def test_rows_as_times_and_requests(where, tmp_path):
    """Nobody acts; the row counts in the file, before `where`."""
    data = rows(20)
    labels = {"click": Label(column="clicked")}
    spec = schema_file.Impressions(
        files=("f",), time="@row", request="@row", labels=labels, where=where
    )
    path = write(tmp_path / "f.parquet", data)
    got = read(path, schema(spec, time_exact=False, earliest=50), chunk=3)
    kept = [i for i, r in enumerate(data) if where is None or r["shop"] > 0]
    assert got.columns == ["row", "user", "time", "label:click"]
    assert got["row"].to_list() == kept and got["time"].to_list() == [50 + i for i in kept]
    assert got["user"].to_list() == ["everyone"] * len(kept)


def test_events_that_become_impressions(tmp_path):
    data = rows()
    events = schema_file.Events(
        files=("f",),
        user="who",
        item="thing",
        time="ms",
        time_unit="ms",
        features={"stars": Input(column="stars", kind="dense", action=True)},
    )
    negatives = schema_file.Negatives(
        of=Condition(column="stars", at_least=4),
        features={"device": Input(column="device"), "hour": Input(derive="hour")},
    )
    items = schema_file.Catalogue(files=("f",), id="thing")
    found = schema(None, events=(events,), negatives=negatives, items=items)
    got = read(write(tmp_path / "f.csv", data), found, found.events[0], chunk=11)
    assert read(tmp_path / "f.csv", found, found.items).columns == ["row", "id"]
    assert got.columns == ["row", "user", "item", "time", "click", "f:stars", "c:device"]
    assert got["click"].to_list() == [r["stars"] >= 4 for r in data]
    assert got["f:stars"].to_list() == [r["stars"] for r in data]
    assert got["c:device"].to_list() == [r["device"] for r in data]
    every = schema(None, events=(events,), negatives=schema_file.Negatives())
    assert read(tmp_path / "f.csv", every, every.events[0])["click"].all()


def test_events_without_items_and_with_an_order(tmp_path):
    data = rows(20)
    events = schema_file.Events(files=("f",), user="who", time="ms", time_unit="ms", order="slot")
    found = schema(dataclasses.replace(SHOWN, order="slot"), events=(events,), time_exact=False)
    path = write(tmp_path / "f.parquet", data)
    got = read(path, found, found.events[0])
    assert got.columns == ["row", "user", "time", "order"]
    assert got["order"].to_list() == [r["slot"] for r in data]
    assert read(path, found)["order"].to_list() == [r["slot"] for r in data if r["shop"] < 2]


def test_events_of_lists(tmp_path):
    past = [["a", "b"], [], None, ["c", None]]
    frame = pl.DataFrame({"who": [1, 2, 3, 4], "past": past, "old": [[1, 2]] * 4})
    frame.write_parquet(tmp_path / "f.parquet")
    text = schema_file.Events(files=("f",), user="who", item="past", list=True)
    spec = dataclasses.replace(SHOWN, where=None)
    found = schema(spec, events=(text,), time_exact=False)
    got = read(tmp_path / "f.parquet", found, found.events[0])
    assert got.columns == ["row", "user", "item"]
    assert got["item"].to_list() == [["a", "b"], [], None, ["c"]]


@pytest.mark.parametrize("side", ["users", "items"])
def test_catalogues(side, tmp_path):
    """Ids of several columns; births that may be missing; features."""
    day = datetime.date(2024, 3, 1)
    frame = pl.DataFrame(
        {
            "a": [1, 2],
            "b": ["x", "y"],
            "since": [day, None],
            "age": [30, None],
            "town": ["Bonn"] * 2,
        }
    )
    frame.write_csv(tmp_path / "f.csv")
    features = {"age": Input(column="age", kind="dense"), "town": Input(column="town")}
    spec = schema_file.Catalogue(
        files=("f",), id=("a", "b"), birth="since", time_unit="%Y-%m-%d", features=features
    )
    found = schema(**{side: spec})
    got = read(tmp_path / "f.csv", found, getattr(found, side))
    born = int(datetime.datetime(2024, 3, 1, tzinfo=datetime.UTC).timestamp())
    assert got.rows(named=True) == [
        {"row": 0, "id": "1\x1fx", "birth": born, "f:age": 30.0, "f:town": "Bonn"},
        {"row": 1, "id": "2\x1fy", "birth": None, "f:age": None, "f:town": "Bonn"},
    ]


def test_given_ids_are_those_of_their_own_side(tmp_path):
    """1 .. rows - 1, of users and items each; requests are nobody's."""
    data = {"u": [1, 9], "i": [1, 19], "t": [START] * 2, "r": [-5, 10**12], "y": [0, 1]}
    labels = {"click": Label(column="y")}
    spec = schema_file.Impressions(
        files=("f",), user="u", item="i", time="t", request="r", labels=labels
    )
    catalogue = schema_file.Catalogue(files=("f",), id="i")
    people = dataclasses.replace(catalogue, id="u")
    user, item = (Input(table=t, ids="given", rows=n) for t, n in (("user", 10), ("item", 20)))
    found = schema(spec, user=user, item=item, users=people, items=catalogue)
    path = tmp_path / "f.parquet"
    pl.DataFrame(data).write_parquet(path)
    assert read(path, found)["request"].to_list() == data["r"]
    assert read(path, found, found.users)["id"].to_list() == data["u"]
    assert read(path, found, found.items)["id"].to_list() == data["i"]
    for column, bad, high in (("u", 0, 9), ("u", 10, 9), ("i", 20, 19), ("i", 2**40, 19)):
        wrong = data | {column: [1, bad]}
        pl.DataFrame(wrong).write_parquet(path)
        message = rf'parquet, column "{column}": row 1 holds {bad}, expected 1 .. {high} '
        for spec in (found.impressions[0], found.users if column == "u" else found.items):
            with pytest.raises(ValueError, match=message):
                read(path, found, spec)


def test_several_columns_are_no_given_id(tmp_path):
    path = write(tmp_path / "f.parquet", rows(3))
    found = schema(item=Input(table="item", ids="given", rows=20))
    message = r'column "shop", "thing": found type String, expected whole numbers \(ids = .given'
    with pytest.raises(ValueError, match=message):
        read(path, found)


def test_parts_of_an_id_stay_apart(tmp_path):
    frame = pl.DataFrame({"a": ["x", "xy", "1"], "b": ["yz", "z", None], "t": [START] * 3})
    spec = schema_file.Impressions(
        files=("f",), user=("a", "b"), time="t", labels={"y": Label(column="t", above=0)}
    )
    frame[:2].write_parquet(tmp_path / "f.parquet")
    assert read(tmp_path / "f.parquet", schema(spec))["user"].n_unique() == 2
    frame.write_parquet(tmp_path / "f.parquet")
    with pytest.raises(ValueError, match='column "b": row 2 holds nothing, expected an id'):
        read(tmp_path / "f.parquet", schema(spec))


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize(
    ("column", "bad", "message"),
    [
        ("who", None, "nothing, expected an id"),
        ("thing", None, "nothing, expected an id"),
        ("page", None, "nothing, expected an id"),
        ("slot", None, "nothing, expected a whole number"),
        ("ms", None, "nothing, expected a time"),
        ("ms", START, r"expected a time from .*time_unit = 's' would fit"),
        ("ms", 4_102_444_800_000, "expected a time from 1990-01-01 to today"),
        ("clicked", None, "nothing, expected a label"),
        ("stars", None, "nothing, expected a label"),
        ("price", float("inf"), "inf, expected a finite number"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_files_row(column, bad, message, chunk, tmp_path):
    """Rows that `where` leaves out count, and may hold anything."""
    data = rows()
    out = next(i for i, r in enumerate(data) if r["shop"] == 2 and i > 10)
    row = next(i for i, r in enumerate(data) if r["shop"] < 2 and i > 20)
    data[out][column] = bad
    path, found = write(tmp_path / "f.parquet", data), schema()
    assert read(path, found, chunk=chunk).height == sum(r["shop"] < 2 for r in data)
    data[row][column] = bad
    write(path, data)
    with pytest.raises(
        ValueError, match=rf'f.parquet, column "{column}": row {row} holds .*{message}'
    ):
        read(path, found, chunk=chunk)


def test_what_polars_cannot_do_names_file_and_rows(tmp_path):
    spec = dataclasses.replace(SHOWN, time="page", time_unit="%Y %M")  # an hour is missing
    with pytest.raises(ValueError, match=r"f\.csv, rows 0 to 9: found Invalid format string"):
        read(write(tmp_path / "f.csv", rows()), schema(spec), chunk=10)
    large = [decimal.Decimal(START)] * 15 + [decimal.Decimal(10**30)] * 5
    path = tmp_path / "f.parquet"
    pl.DataFrame(rows(20)).with_columns(ms=pl.Series(large)).write_parquet(path)
    with pytest.raises(ValueError, match=r"f\.parquet, rows 10 to 19: found "):
        read(path, schema(dataclasses.replace(SHOWN, time_unit="s")), chunk=10)


@pytest.mark.parametrize("name", ["f.csv", "f.parquet"])
def test_a_file_without_rows_gives_no_chunk(name, tmp_path):
    found = schema()
    write(tmp_path / name, rows(1))
    empty = pl.DataFrame(rows(1)).clear()
    if name == "f.csv":
        empty.drop("fits").write_csv(tmp_path / name)
    else:
        empty.write_parquet(tmp_path / name)
    assert list(reading.chunks(tmp_path / name, found.impressions[0], found, 10)) == []


def test_where_may_leave_nothing(tmp_path):
    spec = dataclasses.replace(SHOWN, where=Condition(column="shop", above=9))
    path, found = write(tmp_path / "f.csv", rows()), schema(spec)
    frames = list(reading.chunks(path, found.impressions[0], found, 25))
    assert [(until, f.height) for until, f in frames] == [(25, 0), (50, 0), (60, 0)]
    assert frames[0][1].schema == read(path, schema()).schema


def test_wanted_columns_and_their_roles():
    found = reading.wanted_columns(SHOWN, None)
    assert found == {
        **{"who": "user", "shop": "item", "thing": "item", "ms": "time", "page": "request"},
        **{"slot": "position", "part": "split", "clicked": "label click", "stars": "label good"},
        **{"device": "feature device", "tags": "feature tags", "price": "feature price"},
    }
    events = schema_file.Events(
        files=("f",),
        user="u",
        time="t",
        where=Condition(column="w", equals=1),
        features={"x": Input(column="l", kind="dense", at="k")},
    )
    more = schema_file.Negatives(
        of=Condition(column="o", equals=1),
        features={"c": Input(column="d"), "u": Input(column="u")},
    )
    assert reading.wanted_columns(events, more) == {
        **{
            "u": "user",
            "t": "time",
            "w": "where",
            "o": "negatives.of",
            "l": "feature x",
            "k": "feature x",
        },
        "d": "feature c of [negatives]",
    }
    catalogue = schema_file.Catalogue(files=("f",), id=("a", "b"), birth="t")
    assert reading.wanted_columns(catalogue, None) == {"a": "id", "b": "id", "t": "birth"}
