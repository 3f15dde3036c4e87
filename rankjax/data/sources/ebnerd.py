"""EB-NeRD (Ekstra Bladet News Recommendation Dataset): requests with their lists, long histories.

JP/Politikens Hus, RecSys Challenge 2024; https://recsys.eb.dk/. Cite Kruse et al., EB-NeRD,
arXiv:2410.03432. The publisher's own licence, for research.

Reads the publisher's files ({train,validation}/{behaviors,history}.parquet) or a copy with the
lists exploded (impressions.parquet, requests.parquet, history.parquet).

Every request holds a click, so click rates are conditional on one. Three things of the set are no
input: the place in the published list (shuffled), `next_*` (outcomes of the click), and `read_time`
and `scroll_percentage` of the page on which the list stood (measured over the whole visit, also
after the request).

Events: the union of both history files without repeated (user, item, time), and the clicked
impressions that have no history row of the same (user, item) within the next 15 minutes, at the
time of their request. Read time and scroll of an event are known when the reading is over: where
the user's next request came before that, they count as unknown.
Spans: the last 10% of the time of the publisher's train split are validation; its validation split
is test.
"""

import os
import pathlib
from typing import NamedTuple

import numpy as np
import polars as pl

from rankjax.data import event_log, samples
from rankjax.data.sources import files
from rankjax.schema import Feature, Schema, Table, Task

PUBLISHER = "https://recsys.eb.dk/"
SPLITS = ("train", "validation")
KEPT = ("impressions.parquet", "requests.parquet", "history.parquet")
PUBLISHED = tuple(
    f"{split}/{name}.parquet" for split in SPLITS for name in ("behaviors", "history")
)
SAME_CLICK = 900  # seconds after a request in which a history row is the click itself

# Published name -> (our name, kind), for what both layouts hold once per request.
REQUEST = {
    "impression_id": ("request_id", "int"),
    "user_id": ("user_id", "int"),
    "impression_time": ("timestamp", "time"),
    "article_id": ("page_item_id", "int?"),  # null on the front page
    "device_type": ("device_type", "int?"),
    "is_subscriber": ("is_subscriber", "bool?"),
    "is_sso_user": ("is_sso_user", "bool?"),
    "gender": ("gender", "int?"),
    "age": ("age", "int?"),
}
HISTORY = {
    "article_id_fixed": ("item_id", "int"),
    "impression_time_fixed": ("timestamp", "time"),
    "read_time_fixed": ("read_time", "float?"),
    "scroll_percentage_fixed": ("scroll_percentage", "float?"),
}
DEVICES = 3  # 1 desktop, 2 mobile, 3 tablet; 0 unknown
AGES = 11  # 1 + decade
LENGTHS = 8  # of the list, in view: 1 + floor(log2(n))
READ_TIMES = 13  # 1 unknown, 2 below a second, then 3 + floor(log2(seconds))
SCROLLS = 12  # 1 unknown, then 2 + floor(percent / 10)


class Raw(NamedTuple):
    """Both layouts in one form.

    shown: request_id, item_id, position, click. requests: split and the columns of REQUEST.
    history: user_id and the columns of HISTORY, of both splits. not_shown: clicked articles that
    are in no list.
    """

    shown: pl.DataFrame
    requests: pl.DataFrame
    history: pl.DataFrame
    paths: list[pathlib.Path]
    not_shown: int = 0


def _read_kept(folder: pathlib.Path) -> Raw:
    shown_path, requests_path, history_path = paths = files.require(folder, KEPT)
    kinds = {"request_id": "int", "item_id": "int", "position": "int", "click": "int"}
    shown = files.read_parquet(shown_path, kinds)
    wrong = ~shown["click"].is_in([0, 1])
    if wrong.any():
        row = wrong.arg_true()[0]
        raise ValueError(
            f'{shown_path}, column "click": row {row} holds {shown["click"][row]}, expected 0 or 1'
        )
    requests = files.read_parquet(requests_path, {"split": "text", **dict(REQUEST.values())})
    wrong = ~requests["split"].is_in(SPLITS)
    if wrong.any():
        row = wrong.arg_true()[0]
        raise ValueError(
            f'{requests_path}, column "split": row {row} holds {requests["split"][row]!r}, '
            f"expected one of {SPLITS}"
        )
    history = files.read_parquet(history_path, {"user_id": "int", **dict(HISTORY.values())})
    return Raw(shown, requests, history, paths)


def _read_published(folder: pathlib.Path) -> Raw:
    paths = files.require(folder, PUBLISHED)
    shown, requests, history, not_shown = [], [], [], 0
    lists = {"article_ids_inview": "list of int", "article_ids_clicked": "list of int"}
    for split, behaviors, past in zip(SPLITS, paths[::2], paths[1::2]):
        kinds = {name: kind for name, (_, kind) in REQUEST.items()}
        table = files.read_parquet(behaviors, {**kinds, **lists})
        table = table.rename({name: ours for name, (ours, _) in REQUEST.items()})
        requests.append(table.drop(*lists).with_columns(pl.lit(split).alias("split")))
        in_view = (
            table.select(
                "request_id",
                pl.col("article_ids_inview").alias("item_id"),
                pl.int_ranges(pl.col("article_ids_inview").list.len()).alias("position"),
                "article_ids_clicked",
            )
            .filter(pl.col("item_id").list.len() > 0)
            .explode("item_id", "position")
            .with_columns(pl.col("item_id").is_in("article_ids_clicked").cast(int).alias("click"))
        )
        files.check_nulls(behaviors, in_view, ["item_id"])
        shown.append(in_view.drop("article_ids_clicked"))
        not_shown += table["article_ids_clicked"].list.n_unique().sum() - in_view["click"].sum()
        history.append(_read_published_history(past))
    return Raw(pl.concat(shown), pl.concat(requests), pl.concat(history), paths, not_shown)


def _read_published_history(path: pathlib.Path) -> pl.DataFrame:
    kinds = {name: f"list of {kind}" for name, (_, kind) in HISTORY.items()}
    table = files.read_parquet(path, {"user_id": "int", **kinds})
    lengths = table.select(pl.col(name).list.len() for name in HISTORY)
    first = lengths["article_id_fixed"]
    for name in HISTORY:
        if (wrong := (lengths[name] != first)).any():
            row = wrong.arg_true()[0]
            raise ValueError(
                f'{path}, column "{name}": row {row} has {lengths[name][row]} values, expected '
                f'{first[row]} as in "article_id_fixed"'
            )
    table = table.filter(first > 0).explode(*HISTORY)
    table = table.rename({name: ours for name, (ours, _) in HISTORY.items()})
    files.check_nulls(path, table, ["item_id", "timestamp"])
    return table


def read(folder: str | os.PathLike) -> Raw:
    """The set in `folder`, in either layout; ValueError for files, columns, types and values."""
    folder = pathlib.Path(folder)
    published = any((folder / split).is_dir() for split in SPLITS)
    raw = _read_published(folder) if published else _read_kept(folder)
    for what, table in (("impressions", raw.shown), ("requests", raw.requests)):
        if table.height == 0:
            raise ValueError(f"{folder}: found no {what}, expected at least one")
    if (twice := raw.requests["request_id"].is_duplicated()).any():
        found = raw.requests["request_id"][twice.arg_true()[0]]
        raise ValueError(f"{folder}: request {found} occurs twice, expected once over both splits")
    unknown = ~raw.shown["request_id"].is_in(raw.requests["request_id"].implode())
    if unknown.any():
        row = unknown.arg_true()[0]
        raise ValueError(
            f'{raw.paths[0]}, column "request_id": row {row} holds '
            f"{raw.shown['request_id'][row]}, expected one of those in {raw.paths[1]}"
        )
    return raw


def schema(users: int, items: int) -> Schema:
    """What the log holds; users and items are the vocabularies' sizes without the missing row."""
    tables = {"user": users, "item": items, "device": DEVICES, "list_length": LENGTHS}
    tables |= {"subscriber": 2, "sso": 2, "gender": 2, "age": AGES}
    tables |= {"read_time": READ_TIMES, "scroll": SCROLLS}
    derived = {name: samples.DERIVED[name].rows - 1 for name in ("log_age", "hour", "weekday")}
    place = (("page_item", "item"), ("device", "device"), ("list_length", "list_length"))
    person = tuple((name, name) for name in ("subscriber", "sso", "gender", "age"))
    return Schema(
        tables=tuple(Table(name=name, rows=n + 1) for name, n in {**tables, **derived}.items()),
        features=(
            Feature(name="user", side="user", group="user", table="user"),
            Feature(name="item", side="item", group="item", table="item"),
            Feature(name="read_time", side="event", group="event", table="read_time", action=True),
            Feature(name="scroll", side="event", group="event", table="scroll", action=True),
            Feature(name="log_age", side="event", group="event", table="log_age", derive="log_age"),
            *(Feature(name=n, side="context", group="page", table=table) for n, table in place),
            *(Feature(name=n, side="context", group="person", table=table) for n, table in person),
            *(
                Feature(name=name, side="context", group="time", table=name, derive=name)
                for name in ("hour", "weekday")
            ),
        ),
        tasks=(Task(name="click"),),
        primary_task="click",
    )


def _coded(values: pl.Series, low: int, high: int) -> np.ndarray:
    """value - low + 1 as int32 in 1 .. high - low + 1; 0 where null or outside."""
    inside = values.cast(pl.Int64).is_between(low, high).fill_null(False)
    return (inside * (values.cast(pl.Int64).fill_null(0) - low + 1)).to_numpy().astype(np.int32)


def _impressions(raw: Raw, users: np.ndarray, items: np.ndarray) -> dict[str, np.ndarray]:
    """The impressions file, sorted by time, request, position."""
    requests = raw.requests.sort("request_id")
    train = requests.filter(pl.col("split") == "train")["timestamp"]
    # The publisher's validation split is test; with it alone there is nothing to cut.
    cut = train.max() - (train.max() - train.min()) // 10 if train.len() else 0
    span = np.where(requests["timestamp"].to_numpy() > cut, 1, 0)
    span[(requests["split"] == "validation").to_numpy()] = 2
    at = files.index(requests["request_id"].to_numpy(), raw.shown["request_id"]) - 1
    n_in_view = np.bincount(at, minlength=requests.height)
    per_request = {
        "request": requests["request_id"].to_numpy(),
        "user": files.index(users, requests["user_id"]),
        "time": requests["timestamp"].to_numpy(),
        "span": span.astype(np.int8),
        "page_item": files.index(items, requests["page_item_id"]),
        "device": _coded(requests["device_type"], 1, DEVICES),
        "list_length": np.minimum(np.frexp(n_in_view)[1], LENGTHS).astype(np.int32),
        "subscriber": _coded(requests["is_subscriber"], 0, 1),
        "sso": _coded(requests["is_sso_user"], 0, 1),
        "gender": _coded(requests["gender"], 0, 1),
        "age": _coded(requests["age"] // 10, 0, AGES - 1),
    }
    order = np.lexsort(
        (raw.shown["position"].to_numpy(), at, per_request["time"][at])
    )  # the requests are sorted by their id
    out = {name: x[at[order]] for name, x in per_request.items()}
    out["item"] = files.index(items, raw.shown["item_id"])[order]
    out["click"] = raw.shown["click"].to_numpy().astype(np.int8)[order]
    return out


def _happens(
    key: np.ndarray, low: np.ndarray, high: np.ndarray, keys: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """bool [n]: is there an entry of `keys`, `times` [m] with this key and low <= time <= high?"""
    groups = np.unique(np.concatenate([key, keys]))
    start = min(low.min(initial=0), times.min(initial=0))
    width = max(low.max(initial=0), high.max(initial=0), times.max(initial=0)) - start + 1
    known = np.sort(np.searchsorted(groups, keys) * width + (times - start))
    base = np.searchsorted(groups, key) * width - start
    next_one = np.append(known, np.iinfo(np.int64).max)[np.searchsorted(known, base + low)]
    return next_one <= base + high


def _events(
    raw: Raw, impressions: dict[str, np.ndarray], users: np.ndarray, items: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The events file, sorted by user, time, item, and how many rows came from where."""
    measured = ["read_time", "scroll_percentage"]
    history = (
        raw.history.with_columns(
            pl.when(pl.col(name).is_finite()).then(pl.col(name)).alias(name) for name in measured
        )
        .sort(
            "user_id",
            "timestamp",
            "item_id",
            *measured,
            descending=[False] * 3 + [True] * 2,
            nulls_last=True,
        )
        .unique(["user_id", "timestamp", "item_id"], keep="first", maintain_order=True)
    )
    past = {
        "user": files.index(users, history["user_id"]),
        "item": files.index(items, history["item_id"]),
        "time": history["timestamp"].to_numpy(),
    }
    click = impressions["click"] == 1
    clicks = {name: impressions[name][click] for name in past}
    pair, past_pair = (x["user"] * np.int64(len(items) + 1) + x["item"] for x in (clicks, past))
    until = clicks["time"] + SAME_CLICK
    new = ~_happens(pair, clicks["time"], until, past_pair, past["time"])
    read = history["read_time"].fill_null(0).to_numpy()
    known = history["read_time"].is_not_null().to_numpy()
    scrolled = history["scroll_percentage"].is_not_null().to_numpy()
    # The user's next request came while the article was still being read.
    until = past["time"] + np.ceil(read).astype(np.int64) - 1
    request_key = impressions["user"], impressions["time"]
    unfinished = _happens(past["user"], past["time"] + 1, until, *request_key)
    read_id = np.minimum(np.frexp(np.floor(np.maximum(read, 0)))[1] + 2, READ_TIMES)
    tenths = history["scroll_percentage"].fill_null(0).to_numpy() // 10
    scroll_id = np.clip(tenths, 0, SCROLLS - 2).astype(np.int32) + 2
    past["read_time"] = np.where(known & ~unfinished, read_id, 1).astype(np.int32)
    past["scroll"] = np.where(scrolled & ~unfinished, scroll_id, 1).astype(np.int32)
    clicks = {name: x[new] for name, x in clicks.items()}
    clicks |= {name: np.ones(new.sum(), np.int32) for name in ("read_time", "scroll")}
    events = {name: np.concatenate([past[name], clicks[name]]) for name in past}
    order = np.lexsort((events["item"], events["time"], events["user"]))
    counts = {
        "history_rows": raw.history.height,
        "history_events": history.height,
        "clicks": int(click.sum()),
        "click_events": int(new.sum()),
        "unfinished_events": int((unfinished & (known | scrolled)).sum()),
        "clicked_not_shown": int(raw.not_shown),
    }
    return {name: x[order] for name, x in events.items()}, counts


def prepare(raw: str | os.PathLike, folder: str | os.PathLike) -> pathlib.Path:
    """Writes the log of the set in `raw`, in either layout, into `folder` and returns it.

    Twice does nothing. Users and items are numbered from 1 in the order of their published ids,
    over both splits, lists, pages and histories.
    Raises ValueError for a missing or malformed file or column, a request that occurs twice, an
    impression of an unknown request, or a folder that holds another log.
    """
    found = read(raw)
    fingerprint = {"source": "ebnerd", "version": 1}
    fingerprint |= {"files": files.fingerprint(raw, found.paths)}
    if event_log.is_prepared(folder, fingerprint):
        return pathlib.Path(folder)
    users = files.vocabulary(found.requests["user_id"], found.history["user_id"])
    items = files.vocabulary(
        found.shown["item_id"], found.history["item_id"], found.requests["page_item_id"]
    )
    impressions = _impressions(found, users, items)
    events, counts = _events(found, impressions, users, items)
    return event_log.write_log(
        folder,
        schema(len(users), len(items)),
        users={"user": np.arange(len(users) + 1, dtype=np.int32)},
        items={"item": np.arange(len(items) + 1, dtype=np.int32)},
        events=events,
        impressions=impressions,
        fingerprint=fingerprint,
        publisher=PUBLISHER,
        counts=counts,
    )
