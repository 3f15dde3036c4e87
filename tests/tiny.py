"""A tiny random log and batch, for tests of every room."""

import os
import pathlib

import numpy as np

from rankjax import batch as batch_module
from rankjax import schema
from rankjax.data import event_log

DAY = 86_400


def tiny_schema(
    *, users: int, items: int, time_exact: bool, tasks: tuple[str, ...]
) -> schema.Schema:
    """Every side and kind of feature; the second task counts where the first holds."""
    feature = schema.Feature
    derived = (
        ()
        if not time_exact
        else (
            feature(
                name="log_age", side="event", group="action", table="log_age", derive="log_age"
            ),
            feature(name="item_age", side="context", group="item", kind="dense", derive="item_age"),
        )
    )
    return schema.Schema(
        tables=(
            schema.Table(name="user", rows=users + 1),
            schema.Table(name="item", rows=items + 1),
            schema.Table(name="category", rows=8),
            schema.Table(name="tag", rows=12),
            schema.Table(name="action", rows=4),
            schema.Table(name="hour", rows=25),
            schema.Table(name="surface", rows=5),
            schema.Table(name="log_age", rows=33),
        ),
        features=(
            feature(name="user", side="user", group="user", table="user"),
            feature(name="segment", side="user", group="user", table="category"),
            feature(name="activity", side="user", group="user", kind="dense"),
            feature(name="item", side="item", group="item", table="item"),
            feature(name="category", side="item", group="item", table="category"),
            feature(name="tags", side="item", group="item", kind="ids", table="tag", values=3),
            feature(name="quality", side="item", group="item", kind="dense"),
            feature(name="action", side="event", group="action", table="action", action=True),
            feature(name="dwell", side="event", group="action", kind="dense", action=True),
            feature(name="surface", side="context", group="context", table="surface"),
            feature(name="hour", side="context", group="context", table="hour", derive="hour"),
            *derived,
        ),
        tasks=tuple(
            schema.Task(name=name, weight=tasks[0] if k else "") for k, name in enumerate(tasks)
        ),
        primary_task=tasks[0],
        time_exact=time_exact,
    )


def _things(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Random features of `rows` users or items; row 0 is missing."""
    tags = rng.integers(0, 12, (rows, 3), dtype=np.int32)
    category = rng.integers(1, 8, rows, dtype=np.int32)
    dense = rng.normal(size=rows).astype(np.float32)
    birth = rng.integers(0, 3 * DAY, rows)
    for x in (tags, category, dense, birth):
        x[0] = 0
    ids = np.arange(rows, dtype=np.int32)
    return {"ids": ids, "tags": tags, "category": category, "dense": dense, "birth": birth}


def columns(
    *,
    users: int = 8,
    items: int = 30,
    events: int = 200,
    requests: int = 60,
    candidates: int = 5,
    days: int = 6,
    seed: int = 0,
    time_exact: bool = True,
    tasks: tuple[str, ...] = ("click", "like"),
) -> tuple[schema.Schema, dict[str, dict[str, np.ndarray]]]:
    """The schema, and {file: {column: array}} of a log as `event_log.write_log` takes it.

    User 1 has impressions and no events, the last user neither. Times are whole quarters of an
    hour, so that events and requests tie often. Requests hold 1 .. `candidates` impressions. The
    days are split 4 : 1 : 1 into the spans.
    """
    rng = np.random.default_rng(seed)
    person, thing = _things(rng, users + 1), _things(rng, items + 1)
    user = np.sort(rng.integers(min(2, users), max(users, 3), events)).astype(np.int32)
    when = rng.integers(0, days * 96, events) * 900
    order = np.lexsort((when, user))
    happened = {
        "user": user,
        "time": when[order],
        "item": rng.integers(1, items + 1, events, dtype=np.int32),
        "action": rng.integers(1, 4, events, dtype=np.int32),
        "dwell": rng.exponential(size=events).astype(np.float32),
    }
    counts = rng.integers(1, candidates + 1, requests)
    request = np.repeat(np.arange(requests), counts)
    at = np.sort(rng.integers(DAY // 2, days * DAY, requests) // 900 * 900)
    who = rng.integers(1, max(users, 2), requests, dtype=np.int32)
    n = len(request)
    shown = {
        "request": request + 100,
        "user": who[request],
        "time": at[request],
        "item": rng.integers(1, items + 1, n, dtype=np.int32),
        "span": np.clip(at[request] * 6 // (days * DAY) - 3, 0, 2).astype(np.int8),
        "surface": rng.integers(1, 5, n, dtype=np.int32),
    }
    for task in tasks:
        shown[task] = (rng.random(n) < 0.3).astype(np.int8)
    if not time_exact:  # the order of what happens to a user: here simply quarters of an hour
        happened["order"] = (happened["time"] // 900).astype(np.int32)
        shown["order"] = (shown["time"] // 900).astype(np.int32)
    files = {
        "users": {
            "user": person["ids"],
            "segment": person["category"],
            "activity": person["dense"],
        },
        "items": {
            "item": thing["ids"],
            "category": thing["category"],
            "tags": thing["tags"],
            "quality": thing["dense"],
            "birth": thing["birth"],
        },
        "events": happened,
        "impressions": shown,
    }
    return tiny_schema(users=users, items=items, time_exact=time_exact, tasks=tasks), files


def log(folder: str | os.PathLike, **options: object) -> pathlib.Path:
    """Writes the log of `columns(**options)` into `folder`, which must not exist; returns it."""
    found, files = columns(**options)
    return event_log.write_log(folder, found, **files, fingerprint={"tiny": 1, **options})


def batch(
    *,
    samples: int = 6,
    history: int = 10,
    candidates: int = 4,
    users: int = 8,
    items: int = 30,
    seed: int = 0,
    one_time: bool = True,
    time_exact: bool = True,
    tasks: tuple[str, ...] = ("click", "like"),
    full: bool = False,
) -> batch_module.Batch:
    """A random unpacked Batch [R = samples, S = history, C = candidates], made without a log.

    Lengths are ragged (sample 0 has an empty history) unless `full`. With one_time=False events
    and candidates interleave: time and order of some events lie at or after the first candidate's.
    """
    rng = np.random.default_rng(seed)
    found = tiny_schema(users=users, items=items, time_exact=time_exact, tasks=tasks)
    R, S, C, K = samples, history, candidates, len(tasks)
    lengths = np.full(R, S) if full else rng.integers(0, S + 1, R)
    counts = np.full(R, C) if full else rng.integers(1, C + 1, R)
    if not full:
        lengths[0] = 0
    in_history = np.arange(S) < lengths[:, None]
    in_candidates = np.arange(C) < counts[:, None]
    past = lengths if one_time else rng.integers(0, lengths + 1)  # events before candidate 0
    event_order = np.where(in_history, np.arange(S) - past[:, None], 0)
    later = np.sort(rng.integers(0, (lengths - past + 1)[:, None], (R, C)), axis=1)
    candidate_order = np.where(in_candidates, later - later[:, :1], 0)
    event_time = 600 * event_order + 300  # order o happens at 600 o + 300, its candidates at 600 o
    if one_time:
        event_time -= 600

    def values(feature: schema.Feature, mask: np.ndarray) -> np.ndarray:
        shape = (*mask.shape, feature.values) if feature.kind == "ids" else mask.shape
        mask = mask.reshape(*mask.shape, *(1,) * (len(shape) - mask.ndim))
        if feature.kind == "dense":
            return (rng.normal(size=shape) * mask).astype(np.float32)
        low = 0 if feature.kind == "ids" else 1
        rows = found.table(feature.table).rows
        return (rng.integers(low, rows, shape) * mask).astype(np.int32)

    labels = (rng.random((R, C, K)) < 0.3) & in_candidates[..., None]
    weights = np.repeat(in_candidates[..., None], K, axis=2)
    weights[..., 1:] &= labels[..., :1]
    return batch_module.Batch(
        user={f.name: values(f, np.ones((R, 1), bool)) for f in found.user},
        history={f.name: values(f, in_history) for f in found.history},
        candidate={f.name: values(f, in_candidates) for f in found.candidate},
        history_sample=np.where(in_history, 0, -1).astype(np.int32),
        candidate_sample=np.where(in_candidates, 0, -1).astype(np.int32),
        history_time=np.where(in_history, event_time, 0).astype(np.int32),
        candidate_time=(600 * candidate_order).astype(np.int32),
        history_order=event_order.astype(np.int32),
        candidate_order=candidate_order.astype(np.int32),
        labels=labels.astype(np.float32),
        weights=weights.astype(np.float32),
        impression=np.where(in_candidates, np.arange(R * C).reshape(R, C), -1),
        schema=found,
        one_time=one_time,
    )
