import os
import pathlib
import zipfile

import numpy as np
import polars as pl
import pytest

from rankjax.data import event_log
from rankjax.data.sources import movielens

ROOT = pathlib.Path(__file__).parents[3]
DATA = pathlib.Path(os.environ.get("RANKJAX_DATA", ROOT.parent / "shared" / "data"))

# user, item, rating, time; not sorted, item 40 is never rated.
RATINGS = [
    *((7, 20, 4, 1000), (3, 20, 5, 100), (3, 10, 3, 100), (7, 30, 2, 50), (3, 30, 4, 900)),
    *((9, 10, 1, 2000), (9, 30, 4, 2000), (7, 10, 5, 2500), (3, 40, 2, 1500), (9, 20, 3, 1600)),
]
USERS = [(3, "F", 1, "10", "48067"), (7, "M", 56, "16", "T8H1N"), (9, "M", 24, "9", "00231")]
ITEMS = [
    (10, "Café (1925)", ["Drama"]),
    (20, "Toy Story (1995)", ["Comedy", "Animation"]),
    (30, "No Year", ["Action", "Drama", "Comedy", "War", "Crime", "Sci-Fi", "Horror"]),
    (40, "New (2004)", []),
    (50, "Unseen (1930)", ["War"]),
]


def write_dat(folder):
    folder.mkdir()

    def write(name, rows):
        text = "".join("::".join(map(str, row)) + "\n" for row in rows)
        (folder / name).write_bytes(text.encode("latin-1"))

    write("ratings.dat", RATINGS)
    write("users.dat", [(u, g, 18 if a == 24 else a, o, z) for u, g, a, o, z in USERS])
    write("movies.dat", [(i, title, "|".join(genres)) for i, title, genres in ITEMS])
    return folder


def write_100k(folder):
    folder.mkdir()
    (folder / "u.data").write_text("".join("\t".join(map(str, r)) + "\n" for r in RATINGS))
    users = "".join(f"{u}|{a}|{g}|{o}|{z}\n" for u, g, a, o, z in USERS)
    (folder / "u.user").write_text(users)
    lines = []
    for i, title, genres in ITEMS:
        year = title[-5:-1] if title.endswith(")") else ""
        flags = "|".join(str(int(g in genres)) for g in movielens.GENRES_100K)
        lines.append(f"{i}|{title}|{year and '01-Jan-' + year}||http://x|{flags}\n")
    (folder / "u.item").write_bytes("".join(lines).encode("latin-1"))
    return folder


def write_csv(folder):
    folder.mkdir()
    rows = "".join(f"{u},{i},{r}.0,{t}\n" for u, i, r, t in RATINGS)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + rows)
    items = "".join(f'{i},"{t}",{"|".join(g) or "(no genres listed)"}\n' for i, t, g in ITEMS)
    (folder / "movies.csv").write_text("movieId,title,genres\n" + items)
    return folder


def write_kept(folder, order=None):
    """Parquet copies; `order`: the place of each rating within its user, times are then bounds."""
    folder.mkdir()
    names = ["user_id", "item_id", "rating", "timestamp"]
    ratings = pl.DataFrame(RATINGS, schema=names, orient="row").cast({"rating": pl.Int8})
    if order is not None:
        ratings = ratings.rename({"timestamp": "timestamp_hi"})
        ratings = ratings.with_columns(pl.Series("user_seq_pos", order, pl.Int16))
    ratings.write_parquet(folder / "interactions.parquet")
    names = ["user_id", "gender", "age", "occupation", "zip_code"]
    pl.DataFrame(USERS, schema=names, orient="row").write_parquet(folder / "users.parquet")
    items = {
        "item_id": [i for i, _, _ in ITEMS],
        "release_year": [int(t[-5:-1]) if t.endswith(")") else None for _, t, _ in ITEMS],
        "genres": [g for _, _, g in ITEMS],
    }
    pl.DataFrame(items).write_parquet(folder / "items.parquet")
    return folder


WRITERS = {"dat": write_dat, "100k": write_100k, "csv": write_csv, "kept": write_kept}


def columns(log, file, *names):
    return list(zip(*(log.column(file, name).tolist() for name in names)))


@pytest.mark.parametrize("layout", WRITERS)
def test_every_format_gives_the_same_log(tmp_path, layout):
    folder = movielens.prepare(WRITERS[layout](tmp_path / "raw"), tmp_path / "log")
    assert folder == tmp_path / "log"
    log = event_log.EventLog.open(folder)
    user, item = {3: 1, 7: 2, 9: 3}, {10: 1, 20: 2, 30: 3, 40: 4, 50: 5}
    events = sorted((user[u], t, item[i], 2 * r) for u, i, r, t in RATINGS)
    assert columns(log, "events", "user", "time", "item", "rating") == events
    # 8 of 10 ratings are at or before 2000, which two share, so the cut falls behind them.
    shown = sorted((t, user[u], item[i], int(r >= 4)) for u, i, r, t in RATINGS)
    assert columns(log, "impressions", "time", "user", "item", "positive") == shown
    assert log.column("impressions", "span").tolist() == [0] * 9 + [2]
    assert log.column("impressions", "request").tolist() == list(range(10))
    genres = ["Action", "Animation", "Comedy", "Crime", "Drama", "Horror", "Sci-Fi", "War"]
    got = [{genres[g - 1] for g in row if g} for row in log.column("items", "genres")]
    assert got[0] == set() and got[1:3] == [{"Drama"}, {"Comedy", "Animation"}]
    assert len(got[3]) == 6 and got[4] == set()
    assert log.info["items_with_more_genres"] == 1
    assert log.column("items", "year").tolist() == [0, 1, 15, 0, 16, 2]
    assert log.schema.time_exact and log.schema.primary_task == "positive"
    assert {f.name for f in log.schema.features if f.derive} == {"log_age", "hour", "weekday"}
    if layout != "csv":
        assert columns(log, "users", "user", "gender", "age", "zip") == [
            *((0, 0, 0, 0), (1, 1, 1, 5), (2, 2, 7, 11), (3, 2, 2, 1))
        ]
        codes = log.column("users", "occupation").tolist()
        assert codes[0] == 0 and sorted(codes[1:]) == [1, 2, 3]
    else:
        assert [f.name for f in log.schema.user] == ["user"]


def test_preparing_twice_does_nothing(tmp_path):
    raw = write_csv(tmp_path / "raw")
    movielens.prepare(raw, tmp_path / "log")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "log").iterdir()}
    raw = raw.rename(tmp_path / "moved")
    movielens.prepare(raw, tmp_path / "log")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "log").iterdir()} == before
    with (raw / "ratings.csv").open("a") as f:
        f.write("3,50,0.5,3000\n")
    with pytest.raises(ValueError, match="found a log with fingerprint"):
        movielens.prepare(raw, tmp_path / "log")


def test_bounded_times_are_cut_by_order(tmp_path):
    # Users 3, 7, 9 in the order of RATINGS; the times of user 3 tie against its order.
    order = [4, 6, 5, 2, 7, 1, 2, 8, 9, 0]
    raw = write_kept(tmp_path / "raw", order)
    log = event_log.EventLog.open(movielens.prepare(raw, tmp_path / "log"))
    assert not log.schema.time_exact
    assert not any(f.derive for f in log.schema.features)
    events = columns(log, "events", "user", "order", "item", "rating")
    assert events == [
        *((1, 0, 1, 6), (1, 1, 2, 10), (1, 2, 3, 8), (1, 3, 4, 4)),
        *((2, 0, 3, 4), (2, 1, 2, 8), (2, 2, 1, 10)),
        *((3, 0, 2, 6), (3, 1, 1, 2), (3, 2, 3, 8)),
    ]
    shown = columns(log, "impressions", "user", "order", "item")
    assert sorted(shown) == [row[:3] for row in events]
    # Ratings that tie in time stand in their user's order.
    for u in (1, 2, 3):
        assert [o for who, o, _ in shown if who == u] == sorted(o for w, o, _ in shown if w == u)


def test_half_stars(tmp_path):
    raw = write_csv(tmp_path / "raw")
    text = (raw / "ratings.csv").read_text()
    (raw / "ratings.csv").write_text(text.replace("7,20,4.0", "7,20,3.5"))
    log = event_log.EventLog.open(movielens.prepare(raw, tmp_path / "log"))
    assert (2, 2, 7) in columns(log, "events", "user", "item", "rating")
    assert (2, 2, 0) in columns(log, "impressions", "user", "item", "positive")
    (raw / "ratings.csv").write_text(text.replace("7,20,4.0", "7,20,3.7"))
    with pytest.raises(ValueError, match=r'ratings\.csv, column "rating": row 0 holds 3\.7'):
        movielens.prepare(raw, tmp_path / "other")


def test_refusals_name_file_row_and_what_was_expected(tmp_path):
    raw = write_dat(tmp_path / "raw")
    ratings, users, movies = ((raw / f"{n}.dat") for n in ("ratings", "users", "movies"))
    good = {path: path.read_bytes() for path in (ratings, users, movies)}
    for path, old, new, message in (
        (ratings, b"7::30::2::50", b"7::31::2::50", r'"item_id": row 3 holds 31, .*movies\.dat'),
        (ratings, b"7::30::2::50", b"8::30::2::50", r'"user_id": row 3 holds 8, .*users\.dat'),
        (ratings, b"7::30::2::50", b"7::30::2::nan", r"line 4 holds 'nan', expected int"),
        (ratings, b"7::30::2::50", b"7::30::9::50", r'"rating": row 3 holds 9'),
        (movies, b"10::", b"10:", r"movies\.dat: line 1 has 2 fields"),
    ):
        path.write_bytes(good[path].replace(old, new))
        with pytest.raises(ValueError, match=message):
            movielens.prepare(raw, tmp_path / "log")
        path.write_bytes(good[path])
    ratings.write_bytes(b"")
    with pytest.raises(ValueError, match=r"ratings\.dat: found no ratings"):
        movielens.prepare(raw, tmp_path / "log")
    movies.unlink()
    with pytest.raises(ValueError, match=r"found \['ratings.dat', 'users.dat'\], expected one"):
        movielens.prepare(raw, tmp_path / "log")
    with pytest.raises(ValueError, match="found no folder"):
        movielens.prepare(tmp_path / "none", tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_download_takes_an_archive_that_is_there(tmp_path):
    """latest-small has no published hash, so any archive will do; nothing goes to the network."""
    raw = write_csv(tmp_path / "csv")
    (tmp_path / "raw").mkdir()
    with zipfile.ZipFile(tmp_path / "raw" / "ml-latest-small.zip", "w") as z:
        for path in raw.iterdir():
            z.write(path, f"ml-latest-small/{path.name}")
    folder = movielens.download("ml-latest-small", tmp_path / "raw", publisher="http://127.0.0.1:9")
    log = event_log.EventLog.open(movielens.prepare(folder, tmp_path / "log"))
    assert log.rows("impressions") == len(RATINGS)
    assert (tmp_path / "raw" / "ml-latest-small.zip.sha256.json").exists()
    with pytest.raises(ValueError, match="found 'ml-2m', expected one of"):
        movielens.download("ml-2m", tmp_path / "raw")


@pytest.mark.parametrize(
    ("name", "ratings", "users", "items", "cuts"),
    [
        ("ml-1m", 1_000_209, 6040, 3883, (975865999, 978407132)),
        ("ml-100k", 100_000, 943, 1682, (889237269, 891382267)),
        ("ml-latest-small", 100_836, 610, 9742, (1458635171, 1498029450)),
    ],
)
def test_kept_copies_have_the_published_counts(tmp_path, name, ratings, users, items, cuts):
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not there (RANKJAX_DATA names the folder of real data)")
    log = event_log.EventLog.open(movielens.prepare(DATA / name, tmp_path / "log"))
    assert log.rows("events") == log.rows("impressions") == ratings
    assert (log.rows("users") - 1, log.rows("items") - 1) == (users, items)
    assert tuple(log.info["last_times"].values()) == cuts
    assert log.schema.time_exact == (name != "ml-1m")
    span, time = log.column("impressions", "span"), log.column("impressions", "time")
    np.testing.assert_array_equal(span, np.searchsorted(cuts, time, side="left"))
    if name == "ml-1m":
        counts = np.bincount(log.column("events", "rating"))[2::2]
        assert counts.tolist() == [56174, 107557, 261197, 348971, 226310]
        index = np.arange(ratings) - log.event_start[log.column("events", "user")]
        np.testing.assert_array_equal(log.column("events", "order"), index)
