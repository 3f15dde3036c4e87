"""experiments/schemas/: every schema imports files of its publisher's layout, and what it should.

The files are made here, a few hundred random rows each; real ones are read where they lie.
"""

import collections
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import tomllib

import numpy as np
import polars as pl
import pytest

from rankjax.data import counters, event_log, importer, loader, samples
from rankjax.data.own import inputs, schema_file
from tests import publishers

ROOT = pathlib.Path(__file__).parents[1]
SCHEMAS = ROOT / "experiments" / "schemas"
DATA = pathlib.Path(os.environ.get("RANKJAX_DATA", ROOT.parent / "shared" / "data"))


def head(path: pathlib.Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, x in enumerate(lines) if not x.startswith("#"))])


def opened(name: str, files, folder: pathlib.Path, **changes) -> event_log.EventLog:
    schema = dataclasses.replace(schema_file.load(SCHEMAS / f"{name}.toml"), **changes)
    path = importer.run(schema, list(files), folder / "log")
    return event_log.EventLog.open(path, verify=True)


def real(name: str) -> pathlib.Path:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there (RANKJAX_DATA names the folder of real data)")
    return DATA / name


def numbered(values) -> dict:
    """{id as written: row of the log}: sorted, from 1 on."""
    return {x: i + 1 for i, x in enumerate(sorted(set(values)))}


def rows_of(log: event_log.EventLog, file: str, *names: str) -> list[tuple]:
    """The file's rows, sorted, so that they do not depend on the order of ties."""
    return sorted(zip(*(log.column(file, name).tolist() for name in names)))


def spans(times, train: float, validation: float) -> list[int]:
    """0, 1, 2 by instants."""
    return [0 if t <= train else 1 if t <= validation else 2 for t in times]


def cuts(times) -> tuple[int, int]:
    """The times of the last of the oldest 80% and 90%."""
    ordered = sorted(times)
    return tuple(ordered[-(-share * len(ordered) // 100) - 1] for share in (80, 90))


def check_ids(ids, values, known) -> None:
    """0 where missing, 1 where not known, else one id of its own for every value."""
    one: dict = {}
    for found, value in zip(ids.tolist(), values, strict=True):
        if value is None:
            assert found == 0
        elif value not in known:
            assert found == 1
        else:
            assert found >= 2 and one.setdefault(value, found) == found
    assert len(set(one.values())) == len(one)


def check_dense(found, values, learned) -> None:
    """Standardised by `learned` (None left out); a missing value is 0."""
    known = np.array([x for x in learned if x is not None], np.float64)
    wanted = [0 if x is None else (x - known.mean()) / known.std() for x in values]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def check_past(log: event_log.EventLog, happened: collections.Counter) -> None:
    """Every impression reads what `happened` {(user, time): events} says came before it."""
    per_user = collections.defaultdict(list)
    for (user, time), n in happened.items():
        per_user[user].append((time, n))
    user, time = log.column("impressions", "user"), log.column("impressions", "time")
    found = samples.past_events(log, np.arange(len(user))) - log.event_start[user]
    pairs = zip(user.tolist(), time.tolist())
    assert found.tolist() == [sum(n for t, n in per_user[u] if t < now) for u, now in pairs]


def check_batches(log: event_log.EventLog) -> None:
    """Every impression of every span comes once, with its label and its user's newest events."""
    task = log.schema.primary
    label = log.column("impressions", log.schema.primary_task)
    for span, organisation in enumerate(("request", "impression", "request")):
        config = samples.SampleConfig(organisation=organisation, history=8)
        made = samples.build(log, config, event_log.SPANS[span])
        batches = loader.Batches(log, made, batch_samples=32)
        taken = [batches[step] for step in range(len(batches))]
        shown = np.concatenate([b.impression[b.impression >= 0] for b in taken])
        labels = np.concatenate([b.labels[..., task][b.impression >= 0] for b in taken])
        assert sorted(shown) == np.flatnonzero(log.column("impressions", "span") == span).tolist()
        np.testing.assert_array_equal(labels, label[shown])
        assert sum((b.history_sample >= 0).sum() for b in taken) == made.event_counts.sum()


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_schema_loads_and_its_head_says_whose_data_it_reads(path):
    schema = schema_file.load(path)
    assert schema.name == path.stem
    for word in ("publisher", "terms", "cite", "files", "command"):
        assert re.search(rf"^# {word} +\S", head(path), flags=re.MULTILINE), word
    command = shlex.split(re.search(r"^# command +(.*)$", head(path), re.MULTILINE)[1])
    assert command[:5] == ["rankjax", "data", "import", "--schema", str(path.relative_to(ROOT))]
    given = {pathlib.PurePath(x).name for x in command[5 : command.index("--out")]}
    tables = [*schema.impressions, *schema.events, schema.users, schema.items]
    assert given == {pattern for x in tables if x is not None for pattern in x.files}


def test_the_page_shows_every_key_and_every_schema():
    page = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert schema_file.parse(tomllib.loads(example), "own-data.md").tasks == ("click", "order")
    kinds = (schema_file.ImportSchema, schema_file.Impressions, schema_file.Events)
    kinds += (schema_file.Catalogue, schema_file.Negatives, schema_file.Split, schema_file.Ids)
    kinds += (inputs.Input, inputs.Label, inputs.Condition, schema_file.Table)
    kinds += (counters.CounterConfig,)
    keys = {f.name for kind in kinds for f in dataclasses.fields(kind)}
    assert not {k for k in keys if not re.search(rf"`{k}`|`\[+{k}[\].]", page)}
    for path in SCHEMAS.glob("*.toml"):
        command = re.search(r"^# command +(.*)$", head(path), re.MULTILINE)[1]
        row = next(x for x in page.splitlines() if f"(../experiments/schemas/{path.name})" in x)
        assert f"`{command.split('experiments/schemas/')[1]}`" in row


def test_kuairand(tmp_path):
    files, shown, videos = publishers.kuairand(tmp_path)
    log = opened("kuairand_1k", files, tmp_path)
    items = numbered([*range(40), *(row["video_id"] for row in shown)])
    times = [row["time_ms"] // 1000 for row in shown]
    tasks = ("click", "like", "follow", "comment", "forward", "long_view")
    acts = [tuple(row.get(f"is_{x}", row["long_view"]) for x in tasks) for row in shown]
    wanted = [
        (t, row["user_id"] + 1, items[row["video_id"]], span, *act)
        for row, t, span, act in zip(shown, times, spans(times, *cuts(times)), acts)
    ]
    assert rows_of(log, "impressions", "time", "user", "item", "span", *tasks) == wanted
    assert len(set(log.column("impressions", "request"))) == 400
    train = {row["tab"] for row, w in zip(shown, wanted) if w[3] == 0}
    check_ids(log.column("impressions", "tab"), [row["tab"] for row in shown], train)
    clicks = [row for row in wanted if row[4]]
    assert rows_of(log, "events", "time", "user", "item") == [row[:3] for row in clicks]
    by_user = sorted(clicks, key=lambda row: (row[1], row[0]))
    check_ids(log.column("events", "like"), [row[5] for row in by_user], {0, 1})
    acted = [row[2] for rows in (wanted, clicks) for row in rows if row[3] == 0]
    known = {i for i, n in collections.Counter(acted).items() if n >= 5}
    check_ids(log.column("items", "item")[1:], list(items.values()), known)
    check_past(log, collections.Counter((row[1], row[0]) for row in clicks))
    check_batches(log)
    check_kuairand_catalogues(log, videos)


def check_kuairand_catalogues(log: event_log.EventLog, videos: list[dict]) -> None:
    tags = log.column("items", "tag")
    lengths = [len(v["tag"].split(",")) if v["tag"] else 0 for v in videos]
    assert np.count_nonzero(tags[1:41], axis=1).tolist() == [min(n, 4) for n in lengths]
    assert len(set(tags[tags > 0])) == 6 and not tags[41:].any() and log.rows("items") == 45
    assert log.column("items", "birth")[2] == publishers.china(2022, 3, 2)
    seconds = [v["video_duration"] and np.log1p(v["video_duration"]) for v in videos]
    check_dense(log.column("items", "video_duration")[1:41], seconds, seconds)
    active = [None if u == 3 else u % 2 for u in range(12)]
    check_ids(log.column("users", "user_active_degree")[1:], active, {0, 1})


def test_yambda(tmp_path):
    files, listens, both = publishers.yambda(tmp_path)
    log = opened("yambda", files, tmp_path)
    users, items = numbered(both["uid"]), numbered(both["item_id"])
    shown = listens.filter(pl.col("is_organic") == 0)
    span = spans(shown["timestamp"], *cuts(shown["timestamp"]))
    rows = shown["timestamp", "uid", "item_id", "played_ratio_pct"].rows()
    wanted = [(t, users[u], items[i], s, int(p >= 50)) for (t, u, i, p), s in zip(rows, span)]
    assert rows_of(log, "impressions", "time", "user", "item", "span", "listened") == sorted(wanted)
    happened = [(t, users[u], items[i]) for t, u, i in both["timestamp", "uid", "item_id"].rows()]
    assert rows_of(log, "events", "time", "user", "item") == sorted(happened)
    kind = log.column("events", "event_type")
    assert sorted(collections.Counter(kind.tolist()).values()) == [50, 600]
    assert not log.column("events", "played")[kind == np.bincount(kind)[2:].argmin() + 2].any()
    action = {f.name: f.action for f in log.schema.of("event")}
    assert action["event_type"] and action["played"] and not action["is_organic"]
    check_past(log, collections.Counter((u, t) for t, u, _ in happened))
    check_batches(log)


def test_criteo(tmp_path):
    files, rows = publishers.criteo(tmp_path)
    log = opened("criteo_kaggle", files, tmp_path)
    assert log.column("impressions", "click").tolist() == [row[0] for row in rows]
    assert log.column("impressions", "span").tolist() == [0] * 240 + [1] * 30 + [2] * 30
    assert (log.rows("users"), log.rows("items"), log.rows("events")) == (2, 1, 0)
    assert not log.schema.time_exact and not log.column("impressions", "item").any()
    for i in range(1, 14):
        cells = [None if row[i] is None else np.float64(row[i]) for row in rows]
        logs = [x if x is None else np.sign(x) * np.log1p(abs(x)) for x in cells]
        check_dense(log.column("impressions", f"I{i}"), logs, logs[:240])
    for i in range(1, 27):
        cells = [row[13 + i] for row in rows]
        table = log.schema.table(f"C{i}")
        assert (table.rows, table.hashed) == (100_000, True)
        check_ids(log.column("impressions", f"C{i}") * 2, cells, set(cells))  # 1 is a hash too
    check_batches(log)


@pytest.mark.skipif(shutil.which("awk") is None, reason="awk is not there")
def test_taobao_user_behavior(tmp_path):
    rows = publishers.user_behavior(tmp_path)
    for line in re.findall(r"^# +(awk .*)$", head(SCHEMAS / "taobao_user_behavior.toml"), re.M):
        subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True)
    files = [tmp_path / "UserBehavior.csv", tmp_path / "categories.csv"]
    log = opened("taobao_user_behavior", files, tmp_path)
    users, items = numbered(row[0] for row in rows), numbered(row[1] for row in rows)
    happened = [(row[4], users[row[0]], items[row[1]]) for row in rows]
    assert rows_of(log, "events", "time", "user", "item") == sorted(happened)
    category = {items[row[1]]: row[2] for row in rows}
    names = [category[item] for item in sorted(category)]
    check_ids(log.column("items", "category")[1:], names, set(names))
    views = [h for h, row in zip(happened, rows) if row[3] == "pv"]
    check_sampled(log, views, negatives=4)
    check_past(log, collections.Counter((u, t) for t, u, _ in happened))
    check_batches(log)


def check_sampled(log: event_log.EventLog, clicks: list[tuple], negatives: int) -> None:
    """Every click (time, user, item) is a request of itself and of items clicked in its hour, that
    its user never clicks."""
    requests = collections.defaultdict(list)
    for request, *row in rows_of(log, "impressions", "request", "time", "user", "item", "click"):
        requests[request].append(tuple(row))
    of_hour, of_user = collections.defaultdict(set), collections.defaultdict(set)
    for time, user, item in clicks:
        of_hour[time // 3600].add(item)
        of_user[user].add(item)
    found = []
    for rows in requests.values():
        ((time, user, item),) = [row[:3] for row in rows if row[3]]
        drawn = {row[2] for row in rows if not row[3]}
        assert {row[:2] for row in rows} == {(time, user)} and len(drawn) == len(rows) - 1
        assert drawn <= of_hour[time // 3600] - of_user[user]
        found.append((time, user, item))
    assert sorted(found) == sorted(clicks)
    given_up = len(clicks) * (negatives + 1) - log.rows("impressions")
    assert given_up == log.info["negatives_given_up"] < 0.02 * len(clicks)
    assert log.info["negatives"]["per_click"] == negatives
    assert any("sampled negatives" in " ".join(note.split()) for note in log.info["notes"])


def test_taobao_display_ads(tmp_path):
    files, shown, ads, behavior = publishers.display_ads(tmp_path)
    log = opened("taobao_display_ads", files, tmp_path)
    day = lambda d: publishers.china(2017, 5, d, 23, 59, 59)
    span = spans([row[1] for row in shown], day(11), day(12))
    wanted = sorted((row[1], row[0], row[2], s, row[5]) for row, s in zip(shown, span))
    assert rows_of(log, "impressions", "time", "user", "item", "span", "click") == wanted
    pages = set(rows_of(log, "impressions", "request", "time", "user"))
    assert len(pages) == 150 == len({page[0] for page in pages})
    happened = sorted((row[1], row[0]) for row in behavior)
    assert rows_of(log, "events", "time", "user") == happened
    assert not log.column("events", "item").any()
    newest = [row for row in behavior if row[1] <= day(11)]
    by_user = sorted(behavior, key=lambda row: row[:2])
    brands = {row[4] for row in newest} | {ad[4] for ad in ads} - {"NULL"}
    check_ids(
        np.concatenate([log.column("items", "brand")[1:], log.column("events", "seen_brand")]),
        [None if ad[4] == "NULL" else ad[4] for ad in ads] + [row[4] for row in by_user],
        brands,
    )
    levels = [None if u == 2 else 4 for u in range(1, 9)] + [None]
    check_ids(log.column("users", "new_user_class_level")[1:], levels, {4})
    prices = [np.log1p(ad[5]) for ad in ads]
    check_dense(log.column("items", "price")[1:], prices, prices)
    check_past(log, collections.Counter((u, t) for t, u in happened))
    check_batches(log)


def test_ml_latest_small(tmp_path):
    raw = real("ml-latest-small")
    ratings, movies = (pl.read_parquet(raw / f"{x}.parquet") for x in ("interactions", "items"))
    log = opened("ml_latest_small", raw.glob("*.parquet"), tmp_path)
    assert (log.rows("users"), log.rows("items")) == (611, 9743)
    users, items = numbered(ratings["user_id"]), numbered(movies["item_id"])
    rows = ratings["timestamp", "user_id", "item_id", "rating"].rows()
    span = spans(ratings["timestamp"], 1458635171, 1498029450)
    wanted = [(t, users[u], items[i], s, int(r >= 4)) for (t, u, i, r), s in zip(rows, span)]
    assert rows_of(log, "impressions", "time", "user", "item", "span", "positive") == sorted(wanted)
    assert rows_of(log, "events", "time", "user", "item") == sorted(row[:3] for row in wanted)
    assert len(set(log.column("events", "rating").tolist())) == 10
    rated = ratings.filter(pl.Series(span) == 0)["item_id"].unique()  # in training
    known = set(movies.filter(pl.col("item_id").is_in(rated.implode()))["year"])
    check_ids(log.column("items", "year")[1:], movies.sort("item_id")["year"], known)
    genres = np.count_nonzero(log.column("items", "genres")[1:], axis=1)
    assert genres.tolist() == movies.sort("item_id")["genres"].list.len().to_list()
    check_batches(log)


def test_open_bandit(tmp_path):
    raw = real("open-bandit-40k")
    shown, items = (pl.read_parquet(raw / f"{x}.parquet") for x in ("impressions", "items"))
    log = opened("open_bandit_40k", raw.glob("*.parquet"), tmp_path)
    person = shown.select("policy", pl.col("^user_feature_.$")).n_unique()
    assert (log.rows("users"), log.rows("items"), log.rows("events")) == (person + 1, 161, 0)
    label, span = (log.column("impressions", name) for name in ("click", "span"))
    assert (len(label), label.sum()) == (40_000, 207)
    assert len(set(log.column("impressions", "request"))) == 40_000
    cut = spans(shown["timestamp"], 1575024868, 1575094870)
    assert np.bincount(span).tolist() == np.bincount(cut).tolist()
    own = shown.select(
        "timestamp",
        item=pl.concat_str("policy", "campaign", "item_id", separator="\x1f"),
        affinity=pl.col("user_item_affinity").list.get(pl.col("item_id")).log1p().cast(pl.Float64),
    )
    learned = own.filter(pl.Series(cut) == 0)["affinity"]
    own = own.with_columns((pl.col("affinity") - learned.mean()) / learned.std(ddof=0))
    names = numbered(own["item"])
    wanted = sorted((t, names[i], round(a, 3)) for t, i, a in own.rows())
    found = rows_of(log, "impressions", "time", "item", "affinity")
    assert [(t, i, round(a, 3)) for t, i, a in found] == wanted
    features = items.select(
        pl.concat_str("policy", "campaign", "item_id", separator="\x1f").alias("id"),
        "item_feature_1",
    ).sort("id")["item_feature_1"]
    check_ids(log.column("items", "item_feature_1")[1:], features, set(features))
    assert not any("propensity" in f.name for f in log.schema.features)
    check_batches(log)


def test_mind(tmp_path):
    raw = real("mind-5k-requests")
    shown, requests = (pl.read_parquet(raw / f"{x}.parquet") for x in ("impressions", "requests"))
    log = opened("mind_5k_requests", raw.glob("*.parquet"), tmp_path)
    assert log.rows("users") == 1 + 4637 and not log.schema.time_exact
    every = [shown["item_id"], requests["history"].explode().drop_nulls()]
    every = [*every, pl.read_parquet(raw / "items.parquet")["item_id"]]
    users, items = numbered(shown["user_id"]), numbered(pl.concat(every))
    assert log.rows("items") == 1 + len(items)
    rows = shown["timestamp", "user_id", "item_id", "click"].rows()
    span = spans(shown["timestamp"], 1573677682, 1573728831)
    wanted = [(t, users[u], items[i], s, c) for (t, u, i, c), s in zip(rows, span)]
    assert rows_of(log, "impressions", "time", "user", "item", "span", "click") == sorted(wanted)
    before = {users[u]: len(h) for u, h in requests["user_id", "history"].rows()}
    assert log.rows("events") == sum(before.values()) + 7542
    clicked = collections.defaultdict(list)
    for t, u, _, _, click in wanted:
        clicked[u] += [t] * click
    user, time = (log.column("impressions", name) for name in ("user", "time"))
    past = samples.past_events(log, np.arange(len(user))) - log.event_start[user]
    pairs = zip(user.tolist(), time.tolist())
    assert past.tolist() == [before[u] + sum(t < now for t in clicked[u]) for u, now in pairs]
    one, history = requests["user_id", "history"].row(0)
    start = log.event_start[users[one]]
    first = log.column("events", "item")[start : start + len(history)]
    assert first.tolist() == [items[i] for i in history]
    check_batches(log)


@pytest.mark.slow
def test_globo_news(tmp_path):
    raw = real("globo_news")
    clicks = pl.read_parquet(raw / "interactions.parquet")
    log = opened("globo_news", raw.glob("*.parquet"), tmp_path)
    assert (log.rows("users"), log.rows("items")) == (322_898, 46_034)
    assert log.rows("events") == 2_988_181
    label, span, request = (log.column("impressions", x) for x in ("click", "span", "request"))
    assert label.sum() == 2_988_181 == len(np.unique(request))
    cut = np.bincount(spans(clicks["timestamp"], 1507843212, 1508028513))
    assert np.bincount(span[label == 1]).tolist() == cut.tolist()
    user, item, time = (log.column("impressions", x) for x in ("user", "item", "time"))
    own = clicks.select(
        user=pl.col("user_id").rank("dense"), item=pl.col("item_id").rank("dense"), time="timestamp"
    ).cast(pl.Int64)
    shown = pl.DataFrame({"user": user, "item": item, "time": time, "click": label}).cast(pl.Int64)
    drawn = shown.filter(pl.col("click") == 0)
    assert not len(drawn.join(own, on=["user", "item"], how="semi"))
    hour = pl.col("time") // 3600
    there = own.select("item", hour.alias("hour"))
    assert not len(drawn.with_columns(hour=hour).join(there, on=["item", "hour"], how="anti"))
    assert log.info["negatives"] and log.info["notes"]
