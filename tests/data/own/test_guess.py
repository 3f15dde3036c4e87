"""Starters: each parses, imports the clean files it was made for, and says the roles they have."""

import dataclasses
import datetime
import os
import pathlib
import tomllib

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from rankjax.data import counters, event_log, importer
from rankjax.data.own import guess, inputs, schema_file

ROOT = pathlib.Path(__file__).parents[3]
DATA = pathlib.Path(os.environ.get("RANKJAX_DATA", ROOT.parent / "shared" / "data"))
START = 1_600_000_000
RNG = np.random.default_rng(0)
N = 400  # rows of the files that are made here


def write(folder, files, separator=","):
    """{name: {column: values}} as files; returns their paths."""
    folder.mkdir(exist_ok=True)
    for name, columns in files.items():
        path, frame = folder / name, pl.DataFrame(columns)
        if name.endswith(".parquet"):
            frame.write_parquet(path)
        elif name.endswith(".arrow"):
            table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
            with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
                writer.write_table(table)
        else:
            frame.write_csv(path, separator=separator, include_header="column_0" not in columns)
    return sorted(folder.iterdir())


def schema(paths):
    """The starter, read."""
    return schema_file.parse(tomllib.loads(guess.starter(paths)), "starter")


def imported(paths, out, **changed):
    """The starter and the log that it makes of these files."""
    found = schema(paths)
    asked = dataclasses.replace(found, **changed)
    return found, event_log.EventLog.open(importer.run(asked, paths, out), verify=True)


def requests(n=N):
    """Impressions of n / 4 requests, four rows each, sorted by time."""
    request = np.arange(n) // 4
    return {
        "request_id": 1000 + request,
        "user_id": RNG.integers(1, 20, n // 4)[request],
        "item_id": RNG.integers(1, 60, n),
        "timestamp": START + 3600 * request,
        "position": np.arange(n) % 4,
        "device": np.array(["phone", "tablet"])[RNG.integers(0, 2, n // 4)][request],
        "is_click": RNG.integers(0, 2, n),
        "is_like": RNG.integers(0, 2, n),
        "score_before": RNG.normal(size=n),
        "next_read_time": RNG.exponential(size=n),
    }


def catalogues(zone=""):
    user, item = np.arange(1, 20), np.arange(1, 60)
    return {
        "users.csv": {"user_id": user, "age": 20 + user, "country": ["NL", "BE", "DE"][0:1] * 19},
        "items.csv": {
            "item_id": item,
            "genres": ["drama|news", "sport", "sport|news"] * 19 + ["drama", "news"],
            "title": [f"what happened to number {i} and why" for i in item],
            "published": [f"2020-01-{1 + i % 28:02d} 10:00:00" for i in item],
            "price": item * 1.5,
            "publisher": [f"p{i % 7}" for i in item],
        },
    }


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_impressions_with_catalogues(separator, tmp_path):
    files = {"impressions.csv": requests(), **catalogues()}
    paths = write(tmp_path / "raw", files, separator)
    found, log = imported(paths, tmp_path / "log")
    (shown,) = found.impressions
    assert (shown.user, shown.item, shown.time) == ("user_id", "item_id", "timestamp")
    assert (shown.request, shown.position, shown.time_unit) == ("request_id", "position", "s")
    assert shown.separator == found.items.separator == separator
    assert shown.labels == {n: inputs.Label(column=n) for n in ("is_click", "is_like")}
    assert found.task == "is_click"
    assert shown.features.keys() == {"hour", "weekday", "item_age", "device", "score_before"}
    assert (found.users.id, found.items.id, found.items.birth) == (
        "user_id",
        "item_id",
        "published",
    )
    assert found.items.time_unit == "%Y-%m-%d %H:%M:%S"
    assert found.users.features.keys() == {"age", "country"}
    genres = found.items.features["genres"]
    assert (genres.kind, genres.separator, genres.values) == ("ids", "|", 2)
    assert found.items.features["price"].kind == "dense"
    assert found.items.features.keys() == {"genres", "price", "publisher"}
    (events,) = found.events  # what was clicked, where no file tells the past
    assert events.where == inputs.Condition(column="is_click", equals=1)
    assert found.counters == counters.CounterConfig()
    assert log.rows("impressions") == N and log.rows("users") == 20
    assert log.rows("events") == files["impressions.csv"]["is_click"].sum()
    assert [t.name for t in log.schema.tasks] == ["is_click", "is_like"]


def test_every_column_is_used_or_named_with_a_reason(tmp_path):
    paths = write(tmp_path / "raw", {"impressions.csv": requests(), **catalogues()})
    text = guess.starter(paths)
    for name in ("next_read_time", "title"):
        assert f'# not used: "{name}" (' in text
    lines = [
        x for x in text.splitlines() if " = " in x and not x.startswith(("#", "files", "train"))
    ]
    bare = {x.split(" =")[0] for x in lines if "#" not in x}
    assert bare <= {"name", "validation", "time_unit", "per_click"}  # every guess says why
    for columns in ({**requests()}, *catalogues().values()):
        for name in columns:
            assert f'"{name}"' in text
    assert "known only" in text.split("\n\n")[0]
    assert guess.starter(list(reversed(paths))) == text  # whatever the order of the files


def test_ratings_without_a_line_of_names(tmp_path):
    """As MovieLens 100K's u.data."""
    rows = [RNG.integers(1, 900, N), RNG.integers(1, 900, N), RNG.integers(1, 6, N)]
    columns = [*rows, START + 60 * np.arange(N)]
    files = {"u.txt": {f"column_{i}": x for i, x in enumerate(columns)}}
    found, log = imported(write(tmp_path / "raw", files, "\t"), tmp_path / "log")
    (shown,), (past,) = found.impressions, found.events
    for one in (shown, past):
        assert one.header == ("user", "item", "rating", "time") and one.separator == "\t"
        assert (one.user, one.item, one.time) == ("user", "item", "time")
    assert shown.request == "@row"
    assert shown.labels["positive"] == inputs.Label(column="rating", at_least=4)
    assert past.features["rating"].action
    assert log.column("impressions", "positive").sum() == (rows[2] >= 4).sum()


@pytest.mark.parametrize(("highest", "least"), [(5, 4), (10, 8), (100, 80)])
def test_what_a_good_rating_is(highest, least, tmp_path):
    files = {
        "ratings.parquet": {
            **{"userId": RNG.integers(1, 20, N), "movieId": RNG.integers(1, 60, N)},
            **{"rating": np.arange(N) % (highest + 1) * 1.0, "timestamp": START + np.arange(N)},
        }
    }
    found = schema(write(tmp_path / "raw", files))
    assert found.impressions[0].labels["positive"].at_least == least


def clicks():
    item = RNG.integers(1, 60, N)
    return {
        "uid": RNG.integers(1, 20, N),
        "article_id": item,
        "time_ms": (START + 600 * np.arange(N)) * 1000,
        "session_id": np.arange(N) // 3 * 7,
        "category": [f"c{i % 7}" for i in item],  # of the item alone
        "behavior": np.array(["pv", "pv", "buy"])[RNG.integers(0, 3, N)],
        "os": RNG.integers(1, 4, N),
        "dwell_ms": RNG.exponential(size=N),
    }


@pytest.mark.parametrize("name", ["clicks.parquet", "clicks.arrow", "clicks.csv"])
def test_clicks_only(name, tmp_path):
    found, log = imported(write(tmp_path / "raw", {name: clicks()}), tmp_path / "log")
    (past,) = found.events
    assert not found.impressions and found.negatives == schema_file.Negatives(
        features={
            **{n: inputs.Input(derive=n) for n in ("hour", "weekday")},
            "os": inputs.Input(column="os"),  # the item's category would tell what was clicked
        }
    )
    assert (past.user, past.item, past.time) == ("uid", "article_id", "time_ms")
    assert past.time_unit == "ms"
    assert past.features.keys() == {"log_age", "behavior", "dwell_ms"}
    assert past.features["behavior"].action and past.features["dwell_ms"].action
    assert found.counters is not None
    assert log.rows("events") == N and log.column("impressions", "click").sum() == N
    text = guess.starter(write(tmp_path / "raw", {}))
    assert '# of = {column = "behavior", equals = "pv"}' in text
    assert '# not used: "category" (tells which item was clicked' in text
    assert '# not used: "session_id" (' in text


def test_lists_of_the_past(tmp_path):
    users = np.arange(1, 20)
    files = {
        "behaviors.parquet": requests(),
        "histories.parquet": {
            "user_id": users,
            "history": [[int(i) for i in RNG.integers(1, 60, u % 5)] for u in users],
            "n_read": users,
        },
    }
    found, log = imported(write(tmp_path / "raw", files), tmp_path / "log")
    assert not found.time_exact and found.counters is None
    listed, clicked = found.events
    assert listed.list and (listed.user, listed.item) == ("user_id", "history")
    assert clicked.where == inputs.Condition(column="is_click", equals=1)
    assert "log_age" not in clicked.features
    assert (
        log.rows("events")
        == sum(u % 5 for u in users) + files["behaviors.parquet"]["is_click"].sum()
    )


def test_no_user_and_no_time(tmp_path):
    """As Criteo's display ads: a label, counts and hashes."""
    columns = [np.arange(N) % 2, RNG.integers(-1, 50_000, N)]
    columns += [[f"{x:08x}" for x in RNG.integers(0, 90, N)]]
    files = {"train.txt": {f"column_{i}": x for i, x in enumerate(columns)}}
    found, log = imported(write(tmp_path / "raw", files, "\t"), tmp_path / "log")
    (shown,) = found.impressions
    assert not found.time_exact and not found.events and found.counters is None
    assert (shown.user, shown.item, shown.time, shown.request) == ("", "", "@row", "@row")
    assert shown.labels["label"].column == "label"
    assert shown.features.keys() == {"column_2", "column_3"}
    assert log.rows("impressions") == N and log.rows("events") == 0


def test_users_that_are_only_described(tmp_path):
    shown = requests()
    del shown["user_id"], shown["request_id"]
    shown["user_type"] = RNG.integers(0, 4, N)
    shown["user_city"] = [f"city {i % 5}" for i in range(N)]
    found, _ = imported(write(tmp_path / "raw", {"log.csv": shown}), tmp_path / "log")
    (one,) = found.impressions
    assert one.user == ("user_type", "user_city") and one.request == "@row"
    assert {"user_type", "user_city", "position"} <= one.features.keys()
    assert not found.events  # a kind of user has no past


def test_items_named_by_two_columns(tmp_path):
    shop, sku = (x.ravel() for x in np.meshgrid(["a", "b"], np.arange(1, 31), indexing="ij"))
    items = {"sku": sku, "shop": shop, "brand": [f"b{i % 3}" for i in sku]}
    shown = {**requests(), "shop": np.array(["a", "b"])[RNG.integers(0, 2, N)]}
    shown["item_id"] = 1 + shown["item_id"] % 30
    files = {"items.csv": items, "impressions.csv": shown}
    found, log = imported(write(tmp_path / "raw", files), tmp_path / "log")
    assert found.items.id == ("sku", "shop")
    assert found.impressions[0].item == found.events[0].item == ("item_id", "shop")
    assert log.rows("items") == 61 and log.info["items_without_a_row"] == 0


def test_files_of_one_kind_and_files_of_other_columns(tmp_path):
    one, two, other = requests(), requests(), requests()
    other["surface"] = ["home"] * N
    del other["next_read_time"]
    two["timestamp"], two["request_id"] = two["timestamp"] + 10**6, two["request_id"] + 10**6
    other["request_id"] = other["request_id"] + 2 * 10**6
    files = {"a.parquet": one, "b.parquet": two, "other.parquet": other}
    found, log = imported(write(tmp_path / "raw", files), tmp_path / "log")
    assert [x.files for x in found.impressions] == [("a.parquet", "b.parquet"), ("other.parquet",)]
    assert found.impressions[0].features["device"] == found.impressions[1].features["device"]
    assert log.rows("impressions") == 3 * N


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (
            ["train", "val", "test"],
            {"train": ("train",), "validation": ("val",), "test": ("test",)},
        ),
        (["train", "train", "test"], {"train": ("train",), "validation": (), "test": ("test",)}),
    ],
)
def test_a_split_column(values, wanted, tmp_path):
    shown = requests()
    shown["split"] = np.repeat(values, [200, 100, 100])
    found, log = imported(write(tmp_path / "raw", {"log.parquet": shown}), tmp_path / "log")
    assert found.impressions[0].split == "split"
    assert {n: getattr(found.split, f"{n}_values") for n in wanted} == wanted
    assert "split" not in found.impressions[0].features
    assert (log.column("impressions", "span") == 2).sum() == 100


def test_a_split_column_that_not_all_files_have(tmp_path):
    one, other = requests(), requests()
    one["split"] = np.repeat(["train", "test"], [300, 100])
    paths = write(tmp_path / "raw", {"a.parquet": one, "b.parquet": other})
    found = schema(paths)
    assert not any(x.split for x in found.impressions) and not found.split.train_values
    assert '# not used: "split" (a split of the rows)' in guess.starter(paths)


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        (lambda s: [datetime.datetime.fromtimestamp(t, datetime.UTC) for t in s], "s"),
        (
            lambda s: [
                f"{datetime.datetime.fromtimestamp(t, datetime.UTC):%d.%m.%Y %H:%M}" for t in s
            ],
            "%d.%m.%Y %H:%M",
        ),
        (lambda s: s * 1_000_000, "us"),
    ],
)
def test_units_of_time(times, unit, tmp_path):
    shown = requests()
    seconds = shown["timestamp"] // 60 * 60
    shown["timestamp"] = times(seconds)
    shown["is_click"] = shown["is_click"] == 1
    found, log = imported(write(tmp_path / "raw", {"log.parquet": shown}), tmp_path / "log")
    assert found.impressions[0].time_unit == unit
    assert sorted(log.column("impressions", "time")) == sorted(seconds)
    assert found.events[0].where.equals is True
    assert log.rows("events") == shown["is_click"].sum()


def test_whole_days_have_no_hours(tmp_path):
    shown = requests()
    shown["timestamp"] = [datetime.date(2020, 1, 1 + i // 40) for i in range(N)]
    text = guess.starter(write(tmp_path / "raw", {"log.parquet": shown}))
    assert "whole days" in text and 'derive = "hour"' not in text


ODD = [
    'a "b"',
    "c d",
    "e.f",
    "ü→😀",
    "back\\slash",
    "tab\t",
    "line\nbreak",
    "#x",
    "[z]",
    "it's",
    "\x7f",
]
NAMED_LIKE_ROLES = [
    "user",
    "item",
    "time",
    "request",
    "span",
    "birth",
    "hour",
    "publisher",
]


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_odd_names(suffix, tmp_path):
    """Columns whose names TOML must quote, and features called like other columns of the log."""
    shown, odd = requests(), [n for n in ODD if suffix == "parquet" or n.strip() == n]
    for name in (*odd, *NAMED_LIKE_ROLES):
        shown[name] = [f"v{i}" for i in RNG.integers(0, 3, N)]
    files = {f'the "log" [1].{suffix}': shown, **catalogues()}
    found, log = imported(write(tmp_path / "raw", files), tmp_path / "log")
    features = found.impressions[0].features
    by_column = {x.column: name for name, x in features.items()}
    assert {by_column[n] for n in odd} == set(odd)
    for name in NAMED_LIKE_ROLES:
        assert by_column[name] == f"context_{name}"
    assert {f.name for f in log.schema.of("context")} >= {*odd, "context_publisher"}
    tables = [f.table for f in log.schema.features if f.table and not f.derive]
    assert len(set(tables)) == len(tables)


def test_no_two_features_share_a_table(tmp_path):
    files = {"impressions.csv": requests(), **catalogues()}
    for columns in files.values():
        columns["country"] = RNG.integers(1, 5, len(next(iter(columns.values()))))
    _, log = imported(write(tmp_path / "raw", files), tmp_path / "log")
    features = log.schema.without_counters().features
    of = {f"{f.side}.{f.name}": f.table for f in features if "country" in f.name}
    assert of.keys() == {"user.country", "item.country", "context.context_country"}
    assert len(set(of.values())) == 3


def test_what_depends_on_the_user_or_the_item_is_grouped(tmp_path):
    shown = requests()
    shown["user_id"] = shown["request_id"] % 40
    shown["mood"], shown["shape"] = shown["user_id"] % 3, shown["item_id"] % 3
    features = schema(write(tmp_path / "raw", {"log.csv": shown})).impressions[0].features
    groups = {name: features[name].group for name in ("mood", "shape", "device")}
    assert groups == {"mood": "user", "shape": "item", "device": ""}


def test_what_tells_the_label_is_no_feature(tmp_path):
    """As Taobao's raw_sample: clk and nonclk; and flags that say more of what happened."""
    shown = requests()
    shown["nonclk"], shown["rating"] = 1 - shown["is_click"], RNG.integers(1, 6, N)
    shown["is_profile_enter"], shown["is_rand"] = RNG.integers(0, 2, N), np.zeros(N, int)
    paths = write(tmp_path / "raw", {"log.csv": shown})
    features, text = schema(paths).impressions[0].features, guess.starter(paths)
    assert features.keys() == {"hour", "weekday", "device", "score_before", "is_rand"}
    assert '# not used: "nonclk" (tells "is_click" in every row)' in text
    assert '# not used: "is_profile_enter" (0 and 1 of neither' in text
    assert '# not used: "rating" (may be known only afterwards' in text


def test_events_of_no_item(tmp_path):
    deeds = {"user": RNG.integers(1, 20, N), "time_stamp": START - 9 - np.arange(N)[::-1]}
    deeds |= {"btag": ["pv", "buy"] * (N // 2), "brand": RNG.integers(1, 9, N)}
    files = {"behavior_log.csv": deeds, "raw_sample.csv": requests()}
    found, log = imported(write(tmp_path / "raw", files), tmp_path / "log")
    (past,) = found.events
    assert past.item == "" and past.features.keys() == {"log_age", "btag", "brand"}
    assert log.rows("events") == N and not log.column("events", "item").any()


def test_times_that_are_no_dates(tmp_path):
    """As Yambda's: seconds since an unknown start."""
    columns = clicks()
    columns["timestamp"] = columns.pop("time_ms") // 1000 - START
    found, log = imported(write(tmp_path / "raw", {"a.parquet": columns}), tmp_path / "log")
    assert found.earliest == 0 and found.events[0].time == "timestamp"
    assert found.negatives.features.keys() == {"os"}  # nobody knows the hour
    assert log.column("events", "time").min() == 0


def test_what_fits_nowhere_is_said(tmp_path):
    files = {"log.csv": requests(), "notes.csv": {"a": [1, 2], "b c": [3, 4]}}
    text = guess.starter(write(tmp_path / "raw", files))
    assert '# not used (leave out of the import): "notes.csv"' in text and '"b c"' in text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "starter: found no files, expected at least one"),
        ({"a.csv": b""}, "a.csv: found an empty file"),
        ({"a.csv": b"user_id,item_id\n"}, "a.csv: found no rows"),
        ({"a.xlsx": b"x"}, "a.xlsx: found suffix '.xlsx'"),
        ({"a.parquet": b"x"}, "a.parquet: found"),
        ({"a.csv": b"x,y\n1,2\n"}, r"found files with columns \{'a.csv': \['x', 'y'\]\}"),
    ],
)
def test_refused(files, message, tmp_path):
    for name, held in files.items():
        (tmp_path / name).write_bytes(held)
    with pytest.raises(ValueError, match=message):
        guess.starter([tmp_path / name for name in files])


def published(name):
    """The files of a published set; the test is skipped where they are not there."""
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not there (set RANKJAX_DATA)")
    return sorted((DATA / name).glob("*.parquet"))


def test_globo_news():
    found = schema(published("globo_news"))
    (past,) = found.events
    assert (past.user, past.item, past.time, past.time_unit) == (
        *("user_id", "item_id"),
        *("timestamp", "s"),
    )
    assert past.features.keys() == {"log_age"}
    wanted = {"environment", "device_group", "os", "country", "region", "referrer_type"}
    assert found.negatives.features.keys() == wanted | {"hour", "weekday"}
    assert found.counters is not None


def test_mind():
    found = schema(published("mind-5k-requests"))
    (shown,), (listed, clicked) = found.impressions, found.events
    assert (shown.user, shown.item, shown.time) == ("user_id", "item_id", "timestamp")
    assert (shown.request, shown.position, [*shown.labels]) == ("request_id", "position", ["click"])
    assert (listed.files, listed.item, listed.list) == (("requests.parquet",), "history", True)
    assert clicked.where == inputs.Condition(column="click", equals=1)
    assert not found.time_exact and found.items.id == "item_id"
    kinds = {n: x.kind for n, x in found.items.features.items()}
    assert kinds == {
        **{"category": "id", "subcategory": "id"},
        **{"abstract_words": "dense", "title_entities": "ids"},
    }


def test_open_bandit(tmp_path):
    paths = published("open-bandit-40k")
    found, log = imported(paths, tmp_path / "log", counters=None)
    (shown,) = found.impressions
    assert shown.user == tuple(f"user_feature_{i}" for i in range(4))
    assert shown.item == found.items.id == ("policy", "campaign", "item_id")
    assert (shown.request, [*shown.labels], found.events) == ("@row", ["click"], ())
    assert "propensity_score" not in shown.features and "position" in shown.features
    assert log.rows("impressions") == 40_000 and log.info["items_without_a_row"] == 0


def test_movielens(tmp_path):
    found, log = imported(published("ml-latest-small"), tmp_path / "log", counters=None)
    (shown,), (past,) = found.impressions, found.events
    assert shown.labels == {"positive": inputs.Label(column="rating", at_least=4)}
    assert shown.request == "@row" and past.features["rating"].action
    assert found.items.features.keys() == {"year", "genres"}
    assert log.rows("events") == log.rows("impressions") == 100_836


def test_ebnerd():
    paths = published("ebnerd-demo")
    found = schema(paths)
    (shown,), (past,) = found.impressions, found.events
    assert (shown.files, past.files) == (("impressions.parquet",), ("history.parquet",))
    assert (shown.request, shown.position, shown.split) == ("request_id", "position", "split")
    assert (found.split.train_values, found.split.test_values) == (("train",), ("validation",))
    assert {n for n, x in past.features.items() if x.action} == {"read_time", "scroll_percentage"}
    assert "split" not in past.features
    assert '(leave out of the import): "requests.parquet"' in guess.starter(paths)


def test_words_without_id_name_requests_and_times(tmp_path):
    """The columns of the page's own example."""
    view = np.repeat(np.arange(100), 3)
    shown = pl.DataFrame(
        {
            "customer": [f"c{c}" for c in RNG.integers(0, 9, 100)[view]],
            "product": [f"p{p}" for p in (view + np.tile(np.arange(3), 100)) % 40],
            "shown_at": 1_700_000_000 + 60 * view,
            "page_view": view + 5000,
            "clicked": RNG.integers(0, 2, 300),
        }
    )
    clicks = shown.filter(pl.col("clicked") == 1).select("customer", "product", at="shown_at")
    shown.write_csv(tmp_path / "shown.csv")
    clicks.write_csv(tmp_path / "clicks.csv")
    text = guess.starter([tmp_path / "shown.csv", tmp_path / "clicks.csv"])
    found = schema_file.parse(tomllib.loads(text), "schema.toml")
    assert found.impressions[0].request == "page_view" and not found.impressions[0].features.get(
        "page_view"
    )
    assert found.events[0].time == "at" and found.events[0].user == "customer"
