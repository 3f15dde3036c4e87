"""Requests gathered from sorted runs against plain loops, sampled negatives and their laws."""

import collections
import pathlib

import numpy as np
import polars as pl
import pytest
import scipy.stats

from rankjax.data.own import requests, runs, schema_file

HOUR = 3600


def spec(**given) -> schema_file.Impressions:
    labels = {"y": schema_file.Label(column="y")}
    return schema_file.Impressions(files=("a",), time="t", user="u", labels=labels, **given)


def shown(rng: np.random.Generator, n: int, text: bool) -> pl.DataFrame:
    """Rows of requests, a user each, times of a request up to five seconds apart."""
    request = rng.integers(0, n // 3, n)
    time = 100 * (request * 7919 % 13) + rng.integers(0, 5, n)
    names = pl.Series("request", request)
    return pl.DataFrame(
        {
            "group": request % 4 if text else request,
            "request": names.cast(pl.String) if text else names,
            "time": time,
            "clock": time * 2,
            "row": rng.permutation(n),
            "user": (request % 5).astype(np.int32),
            "span": (time > 600).astype(np.int8),
            "split": np.zeros(n, np.int8),
        }
    )


def write_runs(
    folder: pathlib.Path, frame: pl.DataFrame, keys: tuple[str, ...], size: int
) -> list[pathlib.Path]:
    paths = [folder / f"run.{i:03d}.arrow" for i in range(-(-frame.height // size))]
    for i, path in enumerate(paths):
        runs.write_run(path, frame.slice(i * size, size), keys)
    return paths


def gathered(paths, one: schema_file.Impressions, count: int, own: bool) -> list[pl.DataFrame]:
    frames = runs.merged(paths, requests.keys_of(one), count)
    return [requests.gathered(frame, one, own) for frame in frames]


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(("size", "count"), [(1000, 1000), (17, 5), (40, 1)])
def test_a_request_gets_the_time_clock_and_span_of_its_oldest_row(text, size, count, tmp_path):
    frame, one = shown(np.random.default_rng(0), 150, text), spec(request="r")
    paths = write_runs(tmp_path, frame, requests.keys_of(one), size)
    found = gathered(paths, one, count, not text)
    by_request = collections.defaultdict(list)
    for row in frame.sort("time", "row").rows(named=True):
        by_request[row["request"]].append(row)
    wanted = {}
    for name, rows in by_request.items():
        first = rows[0]
        for row in rows:
            key = first["row"] if text else name
            wanted[row["row"]] = (first["time"], first["clock"], first["span"], key, row["user"])
    columns = ("row", "time", "clock", "span", "key", "user")
    assert {row[0]: row[1:] for x in found for row in x.select(columns).rows()} == wanted
    whole = [x["request"].unique().to_list() for x in found]
    assert len(set().union(*whole)) == sum(map(len, whole))  # no request lies in two frames


@pytest.mark.parametrize("gap", [None, 0, 3, 60])
def test_without_ids_a_gap_of_time_parts_requests(gap, tmp_path):
    rng = np.random.default_rng(1)
    frame = shown(rng, 200, False).with_columns(group=pl.col("user").cast(pl.Int64))
    frame = frame.with_columns(request=pl.lit(None, pl.Int64))
    one = spec(request_gap=gap)
    paths = write_runs(tmp_path, frame, requests.keys_of(one), 30)
    found = pl.concat(gathered(paths, one, 20, False))
    wanted, first, last = {}, None, None
    for row in frame.sort("user", "time", "row").rows(named=True):
        chained = last and last["user"] == row["user"] and row["time"] - last["time"] <= (gap or 0)
        first = first if chained else row
        wanted[row["row"]] = (first["row"], first["time"], first["span"])
        last = row
    assert {r: x for r, *x in found.select("row", "key", "time", "span").rows()} == {
        r: list(x) for r, x in wanted.items()
    }
    assert 1 < len({x[0] for x in wanted.values()}) < 200


@pytest.mark.parametrize(
    ("given", "column", "message"),
    [
        ({"request": "r"}, "user", "found request 3 with two users, expected one"),
        ({"request": "r"}, "split", "found request 3 with two values of the split column"),
        ({}, "split", "found request at time 300 with two values of the split column"),
    ],
)
def test_a_request_of_two_users_or_splits_is_refused(given, column, message, tmp_path):
    frame = pl.DataFrame({"request": [1, 3, 3, 4], "group": [1, 3, 3, 4]})
    frame = frame.with_columns(time=pl.col("group") * 100, clock=0, row=pl.int_range(4), span=0)
    frame = frame.with_columns(user=pl.col("group"), split=0)
    other = pl.when(pl.col("row") == 2).then(9).otherwise(pl.col(column)).alias(column)
    one = spec(**given)
    paths = write_runs(tmp_path, frame.with_columns(other), requests.keys_of(one), 4)
    with pytest.raises(ValueError, match=rf"\[impressions\]: {message}"):
        gathered(paths, one, 10, False)


def test_families_and_whose_numbers_the_log_keeps(tmp_path):
    named, row, gap = spec(request="r"), spec(request="@row"), spec(request_gap=5)
    assert requests.families([row, named, gap, named]) == [(1, 3), (0,), (2,)]
    assert requests.families([gap]) == [(0,)]
    numbers, text, none = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    runs.write(numbers, pl.DataFrame({"request": [1]}))
    runs.write(text, pl.DataFrame({"request": ["x"]}))
    runs.write(none, pl.DataFrame({"request": pl.Series([], dtype=pl.String)}))
    assert requests.own_numbers([named, named], [numbers, none])
    assert not requests.own_numbers([named], [numbers, text])
    for other in (row, gap):
        assert not requests.own_numbers([named, other], [numbers])
        assert not requests.own_numbers([other], [numbers])


def test_numbers_count_requests_over_frames_or_are_the_files_own():
    frames = [pl.DataFrame({"key": x}) for x in ([7, 7, 3], [3, 3], [9], [3, 8])]
    found = [x["number"].to_list() for x in requests.numbered(iter(frames), False)]
    assert found == [[1, 1, 2], [2, 2], [3], [4, 5]]
    own = [x["number"].to_list() for x in requests.numbered(iter(frames), True)]
    assert own == [[7, 7, 3], [3, 3], [9], [3, 8]]


def test_log_columns_take_a_feature_before_a_key_of_its_name():
    frame = pl.DataFrame(
        {
            "number": [5, 6],
            "request": ["a", "b"],
            "position": [9, 9],
            "x:position": np.array([1, 2], np.int32),
            "label:row": np.array([0, 1], np.int8),
            "row": [10, 11],
            "x:tags": np.array([[1, 2], [3, 0]], np.int32),
            "time": [3, 4],
        }
    )
    kinds = {"request": np.int64, "time": np.int64, "position": np.int32, "row": np.int8}
    names = {name: (np.dtype(x), ()) for name, x in kinds.items()}
    names["tags"] = np.dtype(np.int32), (2,)
    found = requests.log_columns(frame, names)
    lists = {name: x.tolist() for name, x in found.items()}
    assert lists == {
        "request": [5, 6],
        "time": [3, 4],
        "position": [1, 2],
        "row": [0, 1],
        "tags": [[1, 2], [3, 0]],
    }
    assert all(found[name].dtype == dtype for name, (dtype, _) in names.items())


def clicks(rng: np.random.Generator, n: int, hours: int = 6, items: int = 30) -> pl.DataFrame:
    time = rng.integers(0, hours * HOUR, n)
    return pl.DataFrame(
        {
            "bucket": time // HOUR,
            "time": time,
            "row": rng.permutation(n),
            "user": rng.integers(1, 12, n).astype(np.int32),
            "item": (1 + rng.geometric(0.15, n) % items).astype(np.int32),
            "sampled": rng.random(n) < 0.8,
            "x:place": rng.integers(0, 5, n).astype(np.int32),
        }
    )


def drawn(
    folder: pathlib.Path, frame: pl.DataFrame, count: int = 50, size: int = 40, **given
) -> tuple[pl.DataFrame, int]:
    """All impressions of these clicks, and how many negatives were given up."""
    folder.mkdir(exist_ok=True)
    one = schema_file.Negatives(**given)
    paths = write_runs(folder, frame, ("bucket", "time", "row"), size)
    pairs = np.unique(frame["user"].to_numpy().astype(np.int64) * 100 + frame["item"].to_numpy())
    found = list(requests.with_negatives(paths, one, pairs, 100, count))
    return pl.concat([x for x, _ in found]), sum(n for _, n in found)


@pytest.mark.parametrize("exclude", ["user", "bucket"])
def test_every_click_is_a_request_with_negatives_of_its_hour(exclude, tmp_path):
    frame = clicks(np.random.default_rng(2), 300)
    found, given_up = drawn(tmp_path, frame, per_click=4, exclude=exclude, task="buy")
    pool, own = collections.defaultdict(set), collections.defaultdict(set)
    sampled = frame.filter("sampled")
    for row in frame.rows(named=True):
        pool[row["bucket"]].add(row["item"])
        own[row["user"], row["bucket"] * (exclude == "bucket")].add(row["item"])
    asked = collections.defaultdict(list)
    for row in found.rows(named=True):
        asked[row["number"]].append(row)
    columns = ("time", "row", "user", "bucket", "x:place")
    ordered = frame.with_row_index("at").sort("time", "row").with_row_index("number", 1)
    wanted = {n: x for n, *x in ordered.filter("sampled").select("number", *columns, "item").rows()}
    assert list(asked) == sorted(wanted) and len(wanted) == sampled.height
    for number, rows in asked.items():
        *same, item = wanted[number]
        assert all([row[c] for c in columns] == same for row in rows)
        assert [row["item"] for row in rows if row["label:buy"]] == [item]
        negatives = [row["item"] for row in rows if not row["label:buy"]]
        bucket, user = rows[0]["bucket"], rows[0]["user"]
        assert len(set(negatives)) == len(negatives) <= 4
        if exclude == "bucket":  # of the clicks that become samples
            mine = sampled.filter(user=user, bucket=bucket)["item"].to_list()
            assert set(negatives) <= pool[bucket] - set(mine)
        else:
            assert set(negatives) <= pool[bucket] - own[user, 0]
    assert found.height == 5 * sampled.height - given_up
    assert (given_up > 0) == (exclude == "user")


def test_draws_depend_on_the_seed_and_the_hour_alone(tmp_path):
    frame = clicks(np.random.default_rng(3), 200)
    whole, _ = drawn(tmp_path / "whole", frame, exclude="bucket")
    for number, (count, size) in enumerate(((1, 7), (10**6, 200))):
        again, _ = drawn(tmp_path / str(number), frame, count, size, exclude="bucket")
        assert again.equals(whole)
    one, _ = drawn(tmp_path / "one", frame.filter(bucket=4), exclude="bucket")
    assert one.drop("number").equals(whole.filter(bucket=4).drop("number"))
    other, _ = drawn(tmp_path / "seed", frame, exclude="bucket", seed=1)
    assert not other["item"].equals(whole["item"])
    moved = frame.filter(bucket=4).with_columns(bucket=pl.lit(5, pl.Int64))
    assert not drawn(tmp_path / "moved", moved, exclude="bucket")[0]["item"].equals(one["item"])


def test_negatives_are_as_popular_as_the_hours_clicks_and_stand_anywhere(tmp_path):
    rng = np.random.default_rng(4)
    popularity, n = {1: 0.5, 2: 0.3, 3: 0.15, 4: 0.05}, 6000
    item = rng.choice(list(popularity), n, p=list(popularity.values())).astype(np.int32)
    hour = pl.DataFrame(
        {
            "bucket": np.full(n, 3),
            "time": np.full(n, 3 * HOUR),
            "row": np.arange(n),
            "user": np.arange(n, dtype=np.int32),  # each clicks once
            "item": item,
            "sampled": np.ones(n, bool),
        }
    )
    # The next hour's clicks are all on another item.
    later = hour.head(2000).with_columns(
        bucket=pl.lit(4, pl.Int64),
        item=pl.lit(9, pl.Int32),
        user=pl.lit(7000, pl.Int32),
    )
    found, given_up = drawn(tmp_path, pl.concat([hour, later]), 10**5, 10**5, per_click=1)
    assert given_up == 2000
    rows = found.filter(bucket=3)
    clicked = rows.filter(pl.col("label:click") == 1).sort("number")["item"].to_numpy()
    negative = rows.filter(pl.col("label:click") == 0).sort("number")["item"].to_numpy()
    share = np.bincount(item, minlength=5)[1:] / n
    for i in popularity:
        wanted = share.copy()
        wanted[i - 1] = 0
        counted = np.bincount(negative[clicked == i], minlength=5)[1:]
        assert counted[i - 1] == 0
        rest = wanted > 0
        expected = counted.sum() * wanted[rest] / wanted.sum()
        assert scipy.stats.chisquare(counted[rest], expected).pvalue > 1e-3
    places = rows["label:click"].to_numpy().reshape(n, 2)[:, 0]
    assert scipy.stats.binomtest(int(places.sum()), n).pvalue > 1e-3


def test_the_place_of_the_click_is_uniform(tmp_path):
    frame = clicks(np.random.default_rng(5), 3000, hours=1, items=90)
    frame = frame.with_columns(user=np.arange(3000, dtype=np.int32), sampled=True)
    found, given_up = drawn(tmp_path, frame, per_click=2)
    assert given_up == 0
    place = found["label:click"].to_numpy().reshape(3000, 3).argmax(axis=1)
    assert scipy.stats.chisquare(np.bincount(place, minlength=3)).pvalue > 1e-3


def test_an_hour_without_other_items_gives_its_negatives_up(tmp_path):
    frame = clicks(np.random.default_rng(6), 5).with_columns(sampled=True)
    frame = frame.with_columns(
        bucket=pl.Series([0, 1, 1, 2, 2]),
        time=pl.Series([0, 1, 1, 2, 2]) * HOUR,
        row=pl.Series(range(5)),
        user=pl.Series([1, 2, 3, 4, 5], dtype=pl.Int32),
        item=pl.Series([1, 1, 1, 1, 2], dtype=pl.Int32),
    )
    found, given_up = drawn(tmp_path, frame, per_click=4)
    rows = found.sort("number", "item").select("number", "item", "label:click").rows()
    assert rows == [(1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1), (4, 2, 0), (5, 1, 0), (5, 2, 1)]
    assert given_up == 4 + 4 + 4 + 3 + 3


def test_hours_before_1970_are_hours(tmp_path):
    frame = clicks(np.random.default_rng(7), 200).with_columns(
        bucket=pl.col("bucket") - 3, time=pl.col("time") - 3 * HOUR
    )
    found, _ = drawn(tmp_path, frame, exclude="bucket")
    assert found["bucket"].min() == -3
    assert found.select("time", "row").rows() == sorted(found.select("time", "row").rows())


@pytest.mark.parametrize("within", ["hour", "day"])
def test_the_rule_says_how_negatives_were_drawn(within):
    one = schema_file.Negatives(per_click=7, within=within, exclude="bucket")
    text = requests.rule(one)
    assert "7 sampled negatives" in text and f"clicks of the same {within}" in text
    assert f"never an item that the user clicks in that {within}" in text
    anywhere = requests.rule(schema_file.Negatives(within=within))
    assert "never an item that the user clicks anywhere in the log" in anywhere
