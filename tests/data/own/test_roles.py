"""Roles guessed from names and values, on small frames made here."""

import pathlib

import numpy as np
import polars as pl
import pytest

from rankjax.data.own import glance, roles

DAY = 86_400
START = 1_600_000_000


def seen(columns, name="log.parquet", **more):
    frame = pl.DataFrame(columns)
    gaps = frozenset(c for c in frame.columns if frame[c].null_count())
    return glance.Glance(
        **{"path": pathlib.Path(name), "separator": ",", "header": None, "frame": frame}
        | {"bounds": {}, "gaps": gaps}
        | more
    )


def found(columns, name="log.parquet"):
    return roles.roles_of(seen(columns, name))


IDS = [5, 6, 5, 7]
TIMES = [START + 1, START + 2, START + 3, START + 3]
USERS = (
    "user_id userId USER_ID uid user userID msno_user_id customer_id visitorid device_id memberId"
)
ITEMS = "item_id itemId article_id movieId video_id adgroup_id news_id asin product_id listing_id "
ITEMS += "click_article_id clicked_item_id photo_id creative_id prop_id"


@pytest.mark.parametrize("name", [n for n in USERS.split() if n != "msno_user_id"])
def test_users(name):
    r = found({"x": IDS, name: IDS, "item_id": IDS})
    assert (r.user, r.item) == ((name,), ("item_id",))


@pytest.mark.parametrize("name", ITEMS.split())
def test_items(name):
    r = found({"x": IDS, "user_id": IDS, name: IDS})
    assert (r.user, r.item) == (("user_id",), (name,))


@pytest.mark.parametrize(
    "name", ["postcode", "paid", "category_id", "author_id", "user_name", "n_items", "item_count"]
)
def test_what_names_nobody(name):
    r = found({name: IDS})
    assert (r.user, r.item) == ((), ())


def test_the_plainest_name_is_taken():
    r = found({"device_id": IDS, "video_id": IDS, "user_id": IDS, "item_id": IDS})
    assert (r.user, r.item) == (("user_id",), ("item_id",))
    # numbers with fractions are no ids
    assert found({"user_id": [0.5, 1.5], "uid": [1, 2]}).user == ("uid",)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("users.csv", (("id",), ())),
        ("user_features_1k.csv", (("id",), ())),
        ("movies.dat.csv", ((), ("id",))),
        ("ad_feature.parquet", ((), ("id",))),
        ("other.csv", ((), ())),
    ],
)
def test_a_bare_id_is_named_by_its_file(name, wanted):
    r = found({"id": [1, 2, 3], "x": [1, 2, 3]}, name)
    assert (r.user, r.item) == wanted


LABELS = "click is_click clk clicked label isLiked long_view is_follow add_to_cart purchase "
LABELS += "label_ctr click_label booking_bool target y click_bool"


@pytest.mark.parametrize("name", LABELS.split())
@pytest.mark.parametrize("values", [[0, 1, 0, 0], [True, False, True, True], [0.0, 1.0, 1.0, 0.0]])
def test_labels(name, values):
    if name == "isLiked":
        name = "is_liked"
    assert found({"user_id": IDS, "item_id": IDS, name: values}).labels == (name,)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("click", [0, 1, 2, 0]),
        ("click", [0, 1, None, 0]),
        ("click", ["0", "1", "0", "0"]),
        ("nonclk", [0, 1, 0, 0]),
        ("is_organic", [0, 1, 0, 0]),
        ("is_subscriber", [True, False, True, True]),
        ("clicks_before", [0, 1, 0, 0]),
    ],
)
def test_what_is_no_label(name, values):
    assert found({"user_id": IDS, "item_id": IDS, name: values}).labels == ()


def test_a_label_with_gaps_further_down_is_none():
    columns = {"user_id": IDS, "item_id": IDS, "click": [0, 1, 0, 0], "like": [0, 1, 0, 0]}
    assert roles.roles_of(seen(columns, gaps=frozenset({"click"}))).labels == ("like",)


def test_several_labels_in_order_of_columns():
    r = found({"is_like": [0, 1, 0, 0], "is_click": [1, 1, 0, 0], "follow": [0, 0, 0, 1]})
    assert r.labels == ("is_like", "is_click", "follow")


def test_users_without_ids_are_what_describes_them():
    feature = ["a", "b", "a", "a"]
    r = found(
        {"user_feature_0": feature, "user_age": IDS, "user_x": [0.5] * 4, "click": [0, 1, 0, 0]}
    )
    assert r.user == ("user_feature_0", "user_age")
    assert found({"user_feature_0": feature}).user == ()


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"time": TIMES}, "time"),
        ({"time_ms": [t * 1000 for t in TIMES]}, "time_ms"),
        ({"event_time": TIMES, "x": TIMES}, "event_time"),
        ({"click_timestamp": TIMES}, "click_timestamp"),
        ({"date": ["2020-01-02"] * 4, "ts": TIMES}, "ts"),  # the finer one
        ({"timestamp": ["2020-01-02"] * 4, "updated_at": TIMES}, "updated_at"),
        ({"created_at": TIMES}, "created_at"),
        ({"created_at": TIMES, "date": ["2020-01-02"] * 4}, "date"),
        ({"timestamp": [*TIMES[:3], None], "t": TIMES}, "t"),  # the one without gaps
        ({"timestamp": [*TIMES[:3], None]}, "timestamp"),
        ({"timestamp": TIMES, "time": TIMES}, "timestamp"),
        ({"number": TIMES}, ""),
        ({"event_time": [1, 2, 3, 4]}, ""),
        ({"time": [-1, 2, 3, 4]}, ""),
        ({"time": [1, 2, 3, 700_000_000]}, ""),
        ({"time": [5, 5, 5, 5]}, ""),
        ({"time": [0.5, 1.5, 2.5, 3.5]}, ""),
        ({"time": [1, 2, 3, None]}, ""),
        ({"conversion_time": TIMES, "next_time": TIMES}, ""),
    ],
)
def test_time(columns, wanted):
    r = found({"user_id": IDS, "item_id": IDS, **columns})
    assert r.time == wanted and (r.clock is None) == (wanted == "")
    if wanted:
        assert r.clock == glance.clock(pl.DataFrame(columns)[wanted])


@pytest.mark.parametrize("name", ["time", "timestamp"])
def test_seconds_since_who_knows_when(name):
    r = found({"user_id": IDS, "item_id": IDS, name: [0, 5, 10, 15]})
    assert r.time == name and r.clock.relative and r.clock.unit == "s"
    assert [t.timestamp() for t in (r.clock.first, r.clock.last)] == [0, 15]
    assert found({"user_id": IDS, "item_id": IDS, name: [0, 5, 10, 15], "ts": TIMES}).time == "ts"


def test_births_of_items_are_no_times_of_events():
    columns = {"item_id": [1, 2, 3, 4], "publish_time": TIMES, "upload_dt": ["2020-01-02"] * 4}
    r = found(columns)
    assert r.birth == "publish_time" and roles.kind_of(pl.DataFrame(columns), r) == "items"
    by = {**columns, "user_id": IDS}
    assert roles.kind_of(pl.DataFrame(by), found(by)) == "items"
    again = {**by, "item_id": IDS}
    assert roles.kind_of(pl.DataFrame(again), found(again)) == "events"
    assert found({**columns, "user_id": IDS, "ts": TIMES}).time == "ts"


@pytest.mark.parametrize("name", ["rating", "stars", "score", "overall", "movieRating"])
def test_ratings(name):
    assert found({name: [1.0, 2.5, 5.0, 4.0]}).rating == name


@pytest.mark.parametrize("values", [[1, 1, 2, 2], [1.0, None, 2.0, 3.0], [-1, 2, 3, 4], ["a"] * 4])
def test_what_is_no_rating(values):
    assert found({"rating": values}).rating == ""


ALIKE = {"user_id": [5, 5, 6, 6], "timestamp": [1, 1, 2, 2]}


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"request_id": [1, 1, 2, 2]}, "request_id"),
        ({"impression_id": ["a", "a", "b", "b"]}, "impression_id"),
        ({"session_id": [1, 1, 2, 2], "search_id": [1, 1, 2, 2]}, "search_id"),
        ({"request_id": [1, 2, 3, 4]}, ""),  # every row another
        ({"request_id": [1, 1, 1, 2]}, ""),  # two users
        ({"request_id": [1, 1, 2, None]}, ""),
        ({"category": [1, 1, 2, 2]}, ""),
    ],
)
def test_requests(columns, wanted):
    times = {"timestamp": [START + t for t in ALIKE["timestamp"]]}
    assert found({**ALIKE, **times, **columns}).request == wanted


def test_a_request_has_one_time():
    columns = {"user_id": [5, 5], "session_id": [1, 1], "timestamp": [START, START]}
    assert found({**columns, "timestamp": [START, START + 60]}).request == ""
    assert found({**columns, "user_id": [5, 5], "x": [1, 2]}).request == "session_id"


def test_position_and_history():
    r = found(
        {
            "user_id": IDS,
            "slot": [1, 2, 3, 1],
            "history": [[1, 2], [3], [], [4]],
            "rank": [0.5, 1.0, 2.0, 3.0],
            "past_scores": [[0.5], [], [], []],
        }
    )
    assert (r.position, r.history) == ("slot", "history")
    assert found({"rank": [0.5, 1.0]}).position == ""
    assert found({"past": [[0.5], []]}).history == ""


@pytest.mark.parametrize(
    ("values", "bounds", "wanted"),
    [
        (["train", "test"], (), {"train_values": ["train"], "test_values": ["test"]}),
        (
            ["Training", "dev", "TEST"],
            (),
            {"train_values": ["Training"], "validation_values": ["dev"], "test_values": ["TEST"]},
        ),
        (["train", "valid"], (), {"train_values": ["train"], "test_values": ["valid"]}),
        (["train", "train"], (), {}),
        (["train", "train"], ("train", "val"), {"train_values": ["train"], "test_values": ["val"]}),
        (["train", "test", "other"], (), {}),
        (["test", "val"], (), {}),
        ([1, 2], (), {}),
        (["train", None, "test"], (), {}),
    ],
)
def test_splits(values, bounds, wanted):
    one = seen({"split": values}, bounds={"split": bounds} if bounds else {})
    assert roles.spans(one, "split") == wanted
    assert roles.roles_of(one).split == ("split" if wanted else "")
    assert roles.roles_of(seen({"other": ["train", "test"]})).split == ""


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        (
            {"user_id": IDS, "item_id": IDS, "timestamp": TIMES, "click": [0, 1, 0, 0]},
            "impressions",
        ),
        ({"label": [0, 1, 0, 0], "a": IDS}, "impressions"),
        ({"user_id": IDS, "item_id": IDS, "click": [0, 1, 0, 0]}, "impressions"),
        ({"user_id": IDS, "item_id": IDS, "timestamp": TIMES, "rating": [1, 2, 3, 4]}, "ratings"),
        ({"user_id": IDS, "item_id": IDS, "timestamp": TIMES}, "events"),
        ({"user_id": IDS, "history": [[1], [2], [], [3]]}, "lists"),
        ({"item_id": [1, 2, 3, 4], "genre": ["a"] * 4}, "items"),
        ({"item_id": [1, 2, 3, 4], "user_id": [1, 1, 2, 2]}, "items"),  # by whom
        ({"item_id": [1, 1, 2, 2], "campaign": ["a", "b", "a", "b"]}, "items"),
        ({"user_id": [1, 2, 3, 4], "age": [30] * 4}, "users"),
        ({"user_id": [1, 2, 3, 4], "is_like": [0, 0, 0, 1]}, "users"),
        ({"user_id": [1, 1, 3, 4], "age": [30] * 4}, ""),
        ({"user_id": IDS, "ts": TIMES, "btag": ["pv"] * 4}, "events"),  # of no item
        ({"user_id": IDS, "ts": TIMES, "device": ["tv"] * 4}, ""),
        ({"x": [1, 2], "y_": [3, 4]}, ""),
    ],
)
def test_kinds(columns, wanted):
    frame = pl.DataFrame(columns)
    assert roles.kind_of(frame, found(columns)) == wanted


def key(columns, shown):
    return roles.item_key(pl.DataFrame(columns), found(columns), shown)


def test_items_are_named_by_as_many_columns_as_it_takes():
    a, b, c, i = np.meshgrid([1, 2], [1, 2], [1, 2], range(5), indexing="ij")
    columns = {"a": a.ravel(), "item_id": i.ravel(), "b": b.ravel(), "c": c.ravel()}
    columns["same"] = np.ones(a.size, int)
    assert key(columns, ["same", "c", "b", "a", "x"]) == ("a", "item_id", "b", "c")
    assert key(columns, ["a", "b"]) == ()  # c is in no other file
    one = {n: x[columns["c"] == 1] for n, x in columns.items()}
    assert key(one, ["a", "b", "c"]) == ("a", "item_id", "b")
    assert key({"item_id": [1, 2], "a": [1, 2]}, ["a"]) == ("item_id",)


@pytest.mark.parametrize("name", ["next_read_time", "dwell_ms", "watch_ratio", "propensity_score"])
def test_outcomes(name):
    assert roles.fits(name, roles.OUTCOME)


@pytest.mark.parametrize(
    "name",
    [
        "device_type",
        "age",
        "n_inview",
        "duration_ms",
        "is_subscriber",
        "reader_age",
        "price",
        "city",
    ],
)
def test_what_is_known_before(name):
    assert not roles.fits(name, roles.OUTCOME)
