"""MovieLens (100K, latest-small, 1M, 20M): ratings as impressions with a label, and as events.

GroupLens, University of Minnesota; https://grouplens.org/datasets/movielens/. Cite Harper and
Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5(4), 2015. Research use; most of the
sets may not be passed on.

A rating is an impression (task "positive": rating >= 4) that is a request of its own, and an event
whose action is the rating. So every impression was answered: there are no negatives that the user
did not rate. An impression reads the events of its user strictly before it.
Spans: by global time; the first 80% of the ratings train, the next 10% validation, the rest test,
cut where the time changes.
"""

import os
import pathlib
from typing import NamedTuple

import numpy as np
import polars as pl

from rankjax.data import event_log, samples
from rankjax.data.sources import files
from rankjax.schema import Feature, Schema, Table, Task

PUBLISHER = "https://files.grouplens.org/datasets/movielens"
# md5 as GroupLens publishes it beside the archive; latest-small changes over time and has none.
ARCHIVES = {
    "ml-100k": "md5:0e33842e24a9c977be4e0107933c0723",
    "ml-latest-small": None,
    "ml-1m": "md5:c4d9eecfca2ab87c1945afe126590906",
    "ml-20m": "md5:cd245b17a1ae2cc31bb14903e1204af3",
}
# Which files tell which format; the first whose files are all there is read.
FORMATS = {
    "100k": {"ratings": "u.data", "users": "u.user", "items": "u.item"},
    "dat": {"ratings": "ratings.dat", "users": "users.dat", "items": "movies.dat"},
    "csv": {"ratings": "ratings.csv", "items": "movies.csv"},
    "kept": {"ratings": "interactions.parquet", "items": "items.parquet"},
}
AGES = (1, 18, 25, 35, 45, 50, 56)  # lower bounds, the codes of 1M; exact ages fall into them
GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance"),
    *("Sci-Fi", "Thriller", "War", "Western"),
)
NO_GENRE = ("unknown", "(no genres listed)", "")
GENRES = 6  # values kept of an item's genres; a few items have more
YEARS = 21  # 1 = before 1930, then five years each, the last from 2025 on
POSITIVE = 8  # half stars: rating >= 4


class Raw(NamedTuple):
    """One set as its files hold it.

    ratings: user_id, item_id, rating, timestamp (s UTC), and order where times are not exact.
    users: user_id, gender, age, occupation, zip_code, or None. items: item_id, year, genres (list).
    """

    ratings: pl.DataFrame
    users: pl.DataFrame | None
    items: pl.DataFrame
    paths: dict[str, pathlib.Path]  # of "ratings", "items" and "users"
    time_exact: bool = True


def _year(title: str) -> pl.Expr:
    return pl.col(title).str.extract(r"\((\d{4})[^()]*\)\s*$").cast(pl.Int64).alias("year")


def _read_100k(paths: dict[str, pathlib.Path]) -> Raw:
    names = ("user_id", "item_id", "rating", "timestamp")
    ratings = {k: (name, "int") for k, name in enumerate(names)}
    users = {0: ("user_id", "int"), 1: ("age", "int")}
    users |= {2: ("gender", "text"), 3: ("occupation", "text"), 4: ("zip_code", "text")}
    items = {0: ("item_id", "int"), 2: ("date", "text")}
    items |= {5 + k: (name, "int") for k, name in enumerate(GENRES_100K)}
    table = files.read_separated(paths["items"], "|", 5 + len(GENRES_100K), items)
    flags = [pl.when(pl.col(g) == 1).then(pl.lit(g)) for g in GENRES_100K]
    return Raw(
        files.read_separated(paths["ratings"], "\t", 4, ratings),
        files.read_separated(paths["users"], "|", 5, users),
        table.select(
            "item_id",
            pl.col("date").str.extract(r"(\d{4})$").cast(pl.Int64).alias("year"),
            pl.concat_list(flags).list.drop_nulls().alias("genres"),
        ),
        paths,
    )


def _read_dat(paths: dict[str, pathlib.Path]) -> Raw:
    names = ("user_id", "item_id", "rating", "timestamp")
    ratings = {k: (name, "int") for k, name in enumerate(names)}
    users = {0: ("user_id", "int"), 1: ("gender", "text"), 2: ("age", "int")}
    users |= {3: ("occupation", "text"), 4: ("zip_code", "text")}
    items = {0: ("item_id", "int"), 1: ("title", "text"), 2: ("genres", "text")}
    return Raw(
        files.read_separated(paths["ratings"], "::", 4, ratings),
        files.read_separated(paths["users"], "::", 5, users),
        files.read_separated(paths["items"], "::", 3, items).select(
            "item_id", _year("title"), pl.col("genres").str.split("|")
        ),
        paths,
    )


def _read_csv(paths: dict[str, pathlib.Path]) -> Raw:
    names = {
        "userId": "user_id",
        "movieId": "item_id",
        "rating": "rating",
        "timestamp": "timestamp",
    }
    kinds = {name: "float" if name == "rating" else "int" for name in names}
    items = files.read_csv(paths["items"], {"movieId": "int", "title": "text", "genres": "text"})
    return Raw(
        files.read_csv(paths["ratings"], kinds).rename(names),
        None,
        items.select(
            pl.col("movieId").alias("item_id"), _year("title"), pl.col("genres").str.split("|")
        ),
        paths,
    )


def _read_kept(paths: dict[str, pathlib.Path]) -> Raw:
    """Parquet copies; 1M's hold the exact order within a user and an upper bound of the time."""
    names = ("user_id", "item_id", "rating", "timestamp", "order")
    found = files.parquet_columns(paths["ratings"])
    time_exact = "user_seq_pos" not in found
    kinds = {"user_id": "int", "item_id": "int", "rating": "float"}
    kinds |= (
        {"timestamp": "time"} if time_exact else {"timestamp_hi": "time", "user_seq_pos": "int"}
    )
    ratings = files.read_parquet(paths["ratings"], kinds)
    ratings = ratings.rename(dict(zip(kinds, names)))
    year = "release_year" if "release_year" in files.parquet_columns(paths["items"]) else "year"
    kinds = {"item_id": "int", year: "int?", "genres": "list of text"}
    items = files.read_parquet(paths["items"], kinds).rename({year: "year"})
    users, path = None, paths["ratings"].parent / "users.parquet"
    if path.exists():
        paths = {**paths, "users": path}
        occupation = files.parquet_columns(path).get("occupation")
        kinds = {"user_id": "int", "gender": "text", "age": "int"}
        kinds |= {"occupation": "text" if occupation == pl.String else "int", "zip_code": "text"}
        users = files.read_parquet(path, kinds)
    return Raw(ratings, users, items, paths, time_exact)


READERS = {"100k": _read_100k, "dat": _read_dat, "csv": _read_csv, "kept": _read_kept}


def read(folder: str | os.PathLike) -> Raw:
    """The set in `folder`, its format told by its files.

    Raises ValueError where no format's files are there, or one of them does not read.
    """
    folder = pathlib.Path(folder)
    for name, wanted in FORMATS.items():
        paths = {role: folder / file for role, file in wanted.items()}
        if all(path.is_file() for path in paths.values()):
            return READERS[name](paths)
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no folder"
    expected = [list(wanted.values()) for wanted in FORMATS.values()]
    raise ValueError(f"{folder}: found {found}, expected one of the sets of files {expected}")


def schema(raw: Raw, users: int, items: int, genres: int, occupations: int) -> Schema:
    """What the log holds; the counts are the vocabularies' sizes without the missing row 0."""
    tables = {"user": users, "item": items, "genre": genres, "year": YEARS, "rating": 10}
    features = [Feature(name="user", side="user", group="user", table="user")]
    if raw.users is not None:
        tables |= {"gender": 2, "age": len(AGES), "occupation": occupations, "zip": 11}
        for name in ("gender", "age", "occupation", "zip"):
            features.append(Feature(name=name, side="user", group="demography", table=name))
    features += [
        Feature(name="item", side="item", group="item", table="item"),
        Feature(
            name="genres", side="item", group="content", kind="ids", table="genre", values=GENRES
        ),
        Feature(name="year", side="item", group="content", table="year"),
        Feature(name="rating", side="event", group="event", table="rating", action=True),
    ]
    if raw.time_exact:
        for name, side in (("log_age", "event"), ("hour", "context"), ("weekday", "context")):
            tables[name] = samples.DERIVED[name].rows - 1
            group = "event" if side == "event" else "context"
            features.append(Feature(name=name, side=side, group=group, table=name, derive=name))
    return Schema(
        tables=tuple(Table(name=name, rows=max(n, 1) + 1) for name, n in tables.items()),
        features=tuple(features),
        tasks=(Task(name="positive"),),
        primary_task="positive",
        time_exact=raw.time_exact,
    )


def _user_columns(raw: Raw, words: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """The users file, row 0 missing, and the number of occupations."""
    columns = {"user": np.arange(len(words) + 1, dtype=np.int32)}
    if raw.users is None:
        return columns, 0
    table = raw.users.unique("user_id", keep="first", maintain_order=True).sort("user_id")
    occupations = files.vocabulary(table["occupation"])
    digit = table["zip_code"].str.extract(r"^\s*(\d)").cast(pl.Int32)
    found = {
        "gender": files.index(np.array(["F", "M"]), table["gender"]),
        "age": np.searchsorted(AGES, table["age"].to_numpy(), side="right"),
        "occupation": files.index(occupations, table["occupation"]),
        "zip": (digit.fill_null(10) + 1).to_numpy(),  # 11: no digit first (Canada)
    }
    return columns | {k: np.r_[0, x].astype(np.int32) for k, x in found.items()}, len(occupations)


def _item_columns(raw: Raw, words: np.ndarray) -> tuple[dict[str, np.ndarray], int, int]:
    """The items file, row 0 missing, the number of genres, and of items with more than GENRES."""
    table = raw.items.unique("item_id", keep="first", maintain_order=True).sort("item_id")
    exploded = (
        table.select(pl.int_range(1, pl.len() + 1).alias("row"), "genres")
        .explode("genres")
        .filter(pl.col("genres").is_not_null() & ~pl.col("genres").is_in(NO_GENRE))
        .with_columns(pl.int_range(pl.len()).over("row").alias("slot"))
    )
    names = files.vocabulary(exploded["genres"])
    kept = exploded.filter(pl.col("slot") < GENRES)
    genres = np.zeros((len(words) + 1, GENRES), np.int32)
    genres[kept["row"].to_numpy(), kept["slot"].to_numpy()] = files.index(names, kept["genres"])
    year = ((table["year"].cast(pl.Int64) - 1930) // 5 + 2).clip(1, YEARS).fill_null(0)
    columns = {
        "item": np.arange(len(words) + 1, dtype=np.int32),
        "genres": genres,
        "year": np.r_[0, year.to_numpy()].astype(np.int32),
    }
    return columns, len(names), exploded.filter(pl.col("slot") == GENRES).height


def _half_stars(path: pathlib.Path, rating: pl.Series) -> np.ndarray:
    """rating * 2 as int32, 1 .. 10."""
    value = rating.to_numpy().astype(np.float64)
    half = np.round(value * 2)
    wrong = ~((half >= 1) & (half <= 10) & (half == value * 2))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f'{path}, column "rating": row {row} holds {value[row]}, expected 0.5 to 5 by 0.5'
        )
    return half.astype(np.int32)


def _known(raw: Raw, column: str, ids: np.ndarray, catalogue: str) -> None:
    """Raises ValueError where a rating's user or item (id 0) has no row in its own file."""
    if not ids.all():
        row = int(np.argmin(ids != 0))
        raise ValueError(
            f'{raw.paths["ratings"]}, column "{column}": row {row} holds '
            f"{raw.ratings[column][row]}, expected one of those in {raw.paths[catalogue]}"
        )


def _cuts(time: np.ndarray) -> tuple[int, int]:
    """The last times of train and of validation: those of the ratings at 80% and 90% in time."""
    n = len(time)
    train, validation = -(-8 * n // 10) - 1, -(-9 * n // 10) - 1
    ordered = np.partition(time, [train, validation])
    return int(ordered[train]), int(ordered[validation])


def _rows(raw: Raw, users: np.ndarray, items: np.ndarray) -> pl.DataFrame:
    """user, item (ids), rating (half stars), time (s), and order, of every rating, checked."""
    ratings = raw.ratings
    if ratings.height == 0:
        raise ValueError(f"{raw.paths['ratings']}: found no ratings, expected at least one")
    user = files.index(users, ratings["user_id"])
    item = files.index(items, ratings["item_id"])
    if raw.users is not None:
        _known(raw, "user_id", user, "users")
    _known(raw, "item_id", item, "items")
    rating = _half_stars(raw.paths["ratings"], ratings["rating"])
    table = pl.DataFrame({"user": user, "item": item, "rating": rating})
    table = table.with_columns(ratings["timestamp"].cast(pl.Int64).alias("time"))
    if raw.time_exact:
        return table
    # Ranked anew, so that an event's order is its index among its user's events.
    order = (pl.col("order").rank("ordinal").over("user") - 1).cast(pl.Int32)
    return table.with_columns(ratings["order"]).with_columns(order.alias("order"))


def _columns(table: pl.DataFrame, *names: str) -> dict[str, np.ndarray]:
    return {name: table[name].to_numpy() for name in names}


def download(name: str, folder: str | os.PathLike, *, publisher: str = PUBLISHER) -> pathlib.Path:
    """Downloads one of ARCHIVES from GroupLens into `folder`; returns where its files lie.

    Shows progress, checks the hash (`files.fetch`) and unpacks safely (`files.unpack`). An archive
    that lies there already is checked and used.
    Raises ValueError for an unknown name, a wrong hash, a bad archive; OSError for the network.
    """
    if name not in ARCHIVES:
        raise ValueError(f"movielens.download: found {name!r}, expected one of {list(ARCHIVES)}")
    folder = pathlib.Path(folder)
    archive = files.fetch(f"{publisher}/{name}.zip", folder, pinned=ARCHIVES[name])
    unpacked = files.unpack(archive, folder / name)
    return unpacked / name if (unpacked / name).is_dir() else unpacked


def prepare(raw: str | os.PathLike, folder: str | os.PathLike) -> pathlib.Path:
    """Writes the log of a MovieLens set into `folder` and returns it; twice does nothing.

    Args:
      raw: folder with the files of one of FORMATS, told by their names; Parquet copies with
        `user_seq_pos` (1M whose times are bounds) give a log with time_exact=False.
      folder: where the log goes.
    Raises: ValueError for a file or column that is missing or malformed, a rating of an unknown
      item or user, or a folder with another log.
    """
    found = read(raw)
    fingerprint = {"source": "movielens", "version": 1}
    fingerprint |= {"files": files.fingerprint(raw, found.paths.values())}
    if event_log.is_prepared(folder, fingerprint):
        return pathlib.Path(folder)
    users = files.vocabulary((found.ratings if found.users is None else found.users)["user_id"])
    items = files.vocabulary(found.items["item_id"])
    rows = _rows(found, users, items)
    train, validation = _cuts(rows["time"].to_numpy())
    order = [] if found.time_exact else ["order"]
    events = rows.sort("user", *(order or ["time", "item"]))
    shown = rows.sort("time", "user", *(order or ["item"])).with_columns(
        ((pl.col("time") > train).cast(pl.Int8) + (pl.col("time") > validation)).alias("span"),
        (pl.col("rating") >= POSITIVE).cast(pl.Int8).alias("positive"),
    )
    impressions = {"request": np.arange(rows.height, dtype=np.int64)}
    impressions |= _columns(shown, "user", "time", "item", "span", "positive", *order)
    user_columns, occupations = _user_columns(found, users)
    item_columns, genres, cut = _item_columns(found, items)
    return event_log.write_log(
        folder,
        schema(found, len(users), len(items), genres, occupations),
        users=user_columns,
        items=item_columns,
        events=_columns(events, "user", "time", "item", "rating", *order),
        impressions=impressions,
        fingerprint=fingerprint,
        publisher=PUBLISHER,
        last_times={"train": train, "validation": validation},
        items_with_more_genres=cut,
    )
