"""What a column could be as a feature: small columns with one property each."""

import datetime

import numpy as np
import polars as pl
import pytest

from rankjax.data.own import hints

RNG = np.random.default_rng(0)
DENSE, SIZES = {"kind": "dense"}, {"kind": "dense", "transform": "symlog"}
SHORT = [f"w{i}" for i in range(50)]
START = 1_600_000_000


@pytest.mark.parametrize(
    ("name", "values", "given"),
    [
        ("color", ["red", "blue", None] * 20, {}),
        ("on", [True, False, None] * 20, {}),
        ("hour_of_day", [1, 2, 3] * 20, {}),
        ("code", RNG.integers(0, 10**9, 3000), {"min_count": 5}),
        ("word", [f"w{i}" for i in RNG.integers(0, 3000, 10_000)], {"min_count": 5}),
        ("weight", RNG.normal(size=100), DENSE),
        ("weight", [0.5, None, float("nan")], DENSE),
        ("income", [1.0] * 99 + [1e6], SIZES),
        ("n_words", [10, 20, 30] * 20, SIZES),
        ("price", [10, 20, 30] * 20, SIZES),
        ("play_count", [10, 20, 30] * 20, SIZES),
        (
            "genres",
            ["a|b", "a|b|c", "a", "b|c"] * 20,
            {"kind": "ids", "separator": "|", "values": 3},
        ),
        (
            "tags",
            ["12,65", "8,12", "65,8", "12", "8"] * 20,
            {"kind": "ids", "separator": ",", "values": 2},
        ),
        (
            "tags",
            ["x;y", "x", "y;z;x", "z;y", "z", "x;z"] * 20,
            {"kind": "ids", "separator": ";", "values": 3},
        ),
        ("city", ["Paris, France", "Bonn"] * 20, {}),
        ("day", pl.Series([1, 2, 3] * 20, dtype=pl.Int8), {}),
        ("tags", [[1, 2], [3], []] * 20, {"kind": "ids", "values": 2}),
        ("tags", [["a"] * 50] * 20, {"kind": "ids", "values": 32}),
        ("tags", [["a", "b"]] * 96 + [["a"] * 9] * 4, {"kind": "ids", "values": 2}),
    ],
)
def test_features(name, values, given):
    x = pl.Series(name, values)
    for happened in (False, True):
        assert hints.hint(x, happened=happened).given == given


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("empty", [None, None], "empty in the rows"),
        (
            "title",
            [f"the story of number {i}" for i in range(50)],
            "text, nearly every row another",
        ),
        ("uuid", SHORT, "text, nearly every row another"),
        ("row", list(range(10, 60)), "numbers the rows"),
        ("seen", ["2020-01-02 03:04:05"] * 9, "a time;"),
        ("date", [20_220_408] * 9, "a time;"),
        ("created_at", [START] * 9, "a time;"),
        ("when", [datetime.datetime(2020, 1, 2)] * 9, "type Datetime"),
        ("timestamp_ms_part", [1, 2, 3] * 9, "a part of a time"),
        ("affinity", [[0.5, 1.0]] * 9, "lists of Float64; `at`"),
        ("ratio", [float("inf"), 1.0], "holds infinite"),
        ("ratio", [float("nan")] * 2, "empty in the rows"),
        ("thing", [{"a": 1}] * 9, "type Struct"),
    ],
)
def test_left_out(name, values, why):
    found = hints.hint(pl.Series(name, values), happened=False)
    assert found.given is None and found.why.startswith(why)


@pytest.mark.parametrize("happened", [False, True])
def test_what_a_visit_ends_with_is_never_known(happened):
    found = hints.hint(pl.Series("session_size", [1, 2, 3] * 9), happened=happened)
    assert found.given is None and found.why == "known only when the visit is over"


def test_short_columns_are_not_called_texts_or_rows():
    """Twenty rows are too few to say that all rows differ."""
    assert hints.hint(pl.Series("name", SHORT[:20]), happened=False).given == {}
    assert hints.hint(pl.Series("n", range(20)), happened=False).given == {}
    assert hints.hint(pl.Series("n", [i * i for i in range(50)]), happened=False).given == {}


OUTCOMES = ["read_time", "next_scroll", "propensity_score", "watch_ratio", "rating", "is_like"]


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcomes_are_known_of_events_only(name):
    x = pl.Series(name, RNG.normal(size=9))
    assert hints.hint(x, happened=False).given is None
    assert hints.hint(x, happened=True).given == {"kind": "dense", "action": True}


@pytest.mark.parametrize("name", ["behavior", "event_type", "action", "btag"])
def test_what_the_user_did_is_an_action(name):
    x = pl.Series(name, [1, 2, 3] * 9)
    assert hints.acted(name)
    assert hints.hint(x, happened=True).given == {"action": True}
    assert hints.hint(x, happened=False).given == {}
    assert not hints.acted("device")


def test_columns_that_tell_a_label():
    click, like = RNG.integers(0, 2, 500), RNG.integers(0, 2, 500)
    columns = {"click": click, "like": like, "nonclk": 1 - click, "liked": [f"x{i}" for i in like]}
    columns |= {"row": np.arange(500), "free": RNG.integers(0, 3, 500), "same": np.ones(500)}
    columns["nearly"] = np.where(np.arange(500) == 7, 1 - click, click)
    columns["fine"] = click * 1000 + RNG.integers(0, 50, 500)  # most of its values come again
    frame = pl.DataFrame({**columns, "list": [[1]] * 500})
    wanted = {"nonclk": "click", "liked": "like", "fine": "click"}
    assert hints.telling(frame, ("click", "like")) == wanted
    assert hints.telling(frame, ()) == {}
    always = frame.with_columns(click=pl.lit(1))
    assert hints.telling(always, ("click",)) == {}  # a label that is always 1 is told by anything


def test_columns_that_depend_on_a_key():
    """Against a count by hand in a dictionary."""
    key, other = RNG.integers(0, 60, 500), RNG.integers(0, 5, 500)
    columns = {"key": key, "of": key % 7, "of_text": [f"t{k % 3}" for k in key], "free": other}
    columns |= {"nearly": np.where(np.arange(500) == 499, 99, key % 7), "same": np.ones(500)}
    frame = pl.DataFrame({**columns, "list": [[1]] * 500})
    wanted = set()
    for name in ("of", "of_text", "free", "nearly", "same"):
        values = {}
        for k, v in zip(key, columns[name]):
            values.setdefault(k, set()).add(v)
        if all(len(v) == 1 for v in values.values()) and len(set(columns[name])) > 1:
            wanted.add(name)
    assert hints.determined(frame, ("key",)) == wanted == {"of", "of_text"}
    assert hints.determined(frame, ()) == set()
    assert hints.determined(frame.head(30), ("key",)) == set()  # too few keys repeat
