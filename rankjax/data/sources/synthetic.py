"""The synthetic world: a log in which the click probability of every impression is known.

Given everything that happened before a request, the labels of its candidates are independent
Bernoulli draws from that probability, so no model can honestly beat it. `prepare` streams a world
of any size to disk, in bounded memory and with the same bytes whatever the number of workers:

  folder/log/          the log (`rankjax.data.event_log`)
  folder/truth.arrow   the probabilities, in row order of the impressions

The process stands in `world_process`, its tables in `world_tables`.
"""

import dataclasses
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import rich.console
import rich.progress

from rankjax.data import event_log
from rankjax.data.sources import world_merge, world_tables
from rankjax.data.sources.world_merge import Spooled
from rankjax.data.sources.world_tables import World
from rankjax.data.sources.world_truth import TruthWriter, load_truth, truth_path
from rankjax.schema import Feature, Schema, Table, Task

__all__ = [
    "WORLD",
    "WORLD_550K",
    "WORLD_SMALL",
    "World",
    "at_least",
    "control",
    "floors",
    "load_truth",
    "prepare",
    "schema",
    "truth_path",
]

WORLD_SMALL = World(users=1000)  # 211 thousand impressions
WORLD_550K = World(users=2600, held_out=0.08)
WORLD = World(users=5000, slots=3000, creators=600, held_out=0.08)  # 1.06 million impressions

VERSION = 1  # of the process: raised when the same config gives other bytes
PARTS_UP_TO = 2_000_000  # expected impressions up to which the parts of the logit are kept
CHUNK = 1 << 20  # rows that a pass over a finished log holds at once
# Impressions of a user that asks for 30 requests on average: mean and standard deviation, measured.
PER_USER, PER_USER_SD = 211.0, 300.0


def at_least(impressions: int, base: World = WORLD) -> World:
    """`base` with so many users that it has at least this many impressions.

    The number of impressions is random; the margin is three of its standard deviations.
    """
    if impressions < 1:
        raise ValueError(f"at_least: impressions={impressions}, expected >= 1")
    scale = base.requests / 30
    mean, margin = PER_USER * scale, 3 * PER_USER_SD * scale
    # The smallest u with mean u - margin sqrt(u) >= impressions.
    root = (margin + math.sqrt(margin**2 + 4 * mean * impressions)) / (2 * mean)
    return dataclasses.replace(base, users=math.ceil(root**2))


def schema(config: World) -> Schema:
    """What the world's columns mean. An id is the process's 0-based value plus 1."""
    item_rows = {name: n + 1 for name, n in world_tables.ITEM.items()}
    item_rows["creator"] = config.creators_per_category * world_tables.ITEM["category"] + 1
    rows = {
        "user": config.users + 1,
        **{name: n + 1 for name, n in world_tables.USER.items()},
        "item": world_tables.tables(config).items + 1,
        **{name: item_rows[name] for name in ("category", "creator", "format", "price")},
        "language": item_rows["language"],
        **{"action": 4, "log_age": 40},
        "surface": world_tables.CONTEXT["surface"] + 1,
        **{"position": 18, "hour": 25, "weekday": 8},
    }

    def ids(side: str, group: str, *names: str) -> list[Feature]:
        return [Feature(name=n, side=side, group=group, table=n) for n in names]

    def derived(name: str, side: str, group: str) -> Feature:
        return Feature(name=name, side=side, group=group, table=name, derive=name)

    features = [
        *ids("user", "user", "user", "segment", "age", "country", "device"),
        *ids("item", "item", "item", "category", "creator", "format", "price", "language"),
        Feature(name="item_age", side="context", group="item", kind="dense", derive="item_age"),
        Feature(name="action", side="event", group="action", table="action", action=True),
        derived("log_age", "event", "history_time"),
        *ids("context", "context", "surface", "position"),
        derived("hour", "context", "context"),
        derived("weekday", "context", "context"),
    ]
    return Schema(
        tables=tuple(Table(name=name, rows=n) for name, n in rows.items()),
        features=tuple(features),
        tasks=(Task(name="click"), Task(name="like", weight="click")),
        primary_task="click",
    )


def prepare(
    config: World,
    folder: str | os.PathLike,
    *,
    workers: int | None = None,
    parts: bool | None = None,
) -> pathlib.Path:
    """Writes the world into `folder` and returns the log's directory, folder/log.

    Where the same world lies there already, nothing happens. An interrupted preparation leaves no
    log. With several workers, a script must call this under `if __name__ == "__main__":`, because
    worker processes import the script.

    Args:
      config: the world.
      folder: made if it does not exist.
      workers: processes that simulate blocks of users; None = one per core, or 1 for a world so
        small that starting them takes longer. Does not change a byte.
      parts: keep the parts of every click logit in the truth file (36 bytes an impression);
        None = in worlds of up to two million expected impressions.

    Raises:
      ValueError: another log lies in `folder`.
      FileNotFoundError: the log lies there, but its truth does not.
      OSError: the disk is full.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"synthetic.prepare: workers={workers}, expected >= 1")
    if parts is None:
        parts = config.users * PER_USER * config.requests / 30 <= PARTS_UP_TO
    folder = pathlib.Path(folder)
    log_dir = folder / "log"
    fingerprint = {
        **{"source": "world", "version": VERSION, "parts": parts},
        "config": dataclasses.asdict(config),
    }
    if event_log.is_prepared(log_dir, fingerprint):
        if truth_path(log_dir) is None:
            raise FileNotFoundError(
                f"{folder / 'truth.arrow'}: lost; delete {log_dir} to redo both"
            )
        return log_dir
    if workers is None:
        workers = min(os.cpu_count() or 1, config.blocks) if config.blocks >= 4 else 1
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".world.", dir=folder) as spool,
        event_log.LogWriter(log_dir, schema(config), fingerprint) as log,
        TruthWriter(folder / "truth.arrow") as truth,
        _progress() as progress,
    ):
        _append_items(log, config)
        spooled = _append_users(log, config, pathlib.Path(spool), parts, workers, progress)
        _append_impressions(log, truth, config, pathlib.Path(spool), spooled, parts, progress)
        # The log comes last: a log that lies in place has its truth beside it.
        truth.finish()
        return log.finish(source="world")


def _progress() -> rich.progress.Progress:
    console = rich.console.Console(stderr=True)
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn())
    return rich.progress.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    )


def _with_row_0(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Puts the missing row, all zeros, before the others."""
    return {name: np.concatenate([np.zeros(1, x.dtype), x]) for name, x in columns.items()}


def _append_items(log: event_log.LogWriter, config: World) -> None:
    W = world_tables.tables(config)
    columns = {"item": np.arange(1, W.items + 1, dtype=np.int32)}
    columns |= {name: x.astype(np.int32) + 1 for name, x in W.feature.items()}
    columns["birth"] = np.floor(W.birth).astype(np.int64)
    log.append("items", _with_row_0(columns))


def _append_users(
    log: event_log.LogWriter,
    config: World,
    spool: pathlib.Path,
    parts: bool,
    workers: int,
    progress: rich.progress.Progress,
) -> list[Spooled]:
    """Spools all blocks; users and events, which come in order of users, go straight on."""
    spooled = []
    bar = progress.add_task("simulating", total=config.blocks)
    for block in world_merge.blocks(config, spool, parts=parts, workers=workers):
        first = block.number * config.block + 1
        path = spool / f"{block.number}.users"
        users = np.fromfile(path, world_merge.USERS)
        path.unlink()
        columns = {"user": np.arange(first, first + len(users), dtype=np.int32)}
        columns |= {name: users[name].astype(np.int32) + 1 for name in users.dtype.names}
        log.append("users", columns if spooled else _with_row_0(columns))
        path = spool / f"{block.number}.events"
        events = np.fromfile(path, world_merge.EVENTS)
        path.unlink()
        columns = {name: events[name] for name in ("time", "action")}
        columns |= {"user": events["user"] + np.int32(first), "item": events["item"] + np.int32(1)}
        log.append("events", columns)
        spooled.append(block)
        progress.advance(bar)
    return spooled


def _append_impressions(
    log: event_log.LogWriter,
    truth: TruthWriter,
    config: World,
    spool: pathlib.Path,
    spooled: list[Spooled],
    parts: bool,
    progress: rich.progress.Progress,
) -> None:
    """Merges the blocks' impressions in the order of time, with the spans of that time."""
    dtype = world_merge.impression_dtype(parts)
    requests = np.array([block.requests for block in spooled])
    first_request = np.cumsum(requests) - requests
    test = round((1 - config.held_out) * config.horizon)
    validation = round(0.9 * test)
    total = sum(int(block.per_hour.sum()) for block in spooled)
    bar = progress.add_task("writing", total=total)
    truth_columns = [name for name in dtype.names if name.startswith(("p_", "part_"))]
    for rows, block in world_merge.partitions(spooled, spool, dtype):
        time = rows["time"].astype(np.int64)
        log.append(
            "impressions",
            {
                "request": rows["request"] + first_request[block],
                "user": rows["user"] + (block * config.block + 1).astype(np.int32),
                "time": time,
                "item": rows["item"] + np.int32(1),
                "span": (time >= validation).astype(np.int8) + (time >= test).astype(np.int8),
                "surface": rows["surface"].astype(np.int32) + 1,
                "position": rows["position"].astype(np.int32) + 1,
                "click": rows["click"],
                "like": rows["like"],
            },
        )
        truth.append({name: rows[name] for name in truth_columns})
        progress.advance(bar, len(rows))


def _chunks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, CHUNK):
        yield slice(start, min(rows, start + CHUNK))


def control(
    log_dir: str | os.PathLike, folder: str | os.PathLike, *, seed: int = 0
) -> pathlib.Path:
    """Copies a world's log with labels that nothing predicts; returns folder/log.

    In all spans click is redrawn from Bernoulli(the log's click rate), and like, where it is
    clicked, from Bernoulli(the log's like rate given click); the truth is these rates everywhere.
    Users, items and events stay. On it no model beats the truth, so that an alarm that rings here
    is wrong, or the evaluation is.

    Raises ValueError where another log lies in `folder` or the log has no clicks.
    """
    source = event_log.EventLog.open(log_dir)
    shown = source.columns["impressions"]
    rows, clicks = len(shown["click"]), int(np.sum(shown["click"], dtype=np.int64))
    if not clicks:
        raise ValueError(f"{log_dir}: found no clicks, expected some to take the base rate of")
    rates = {
        "p_click": clicks / rows,
        "p_like": int(np.sum(shown["like"], dtype=np.int64)) / clicks,
    }
    rates["p_known"] = rates["p_click"]
    of = source.fingerprint
    fingerprint = {"source": "world control", "version": VERSION, "seed": seed, "of": of}
    folder = pathlib.Path(folder)
    if event_log.is_prepared(folder / "log", fingerprint):
        return folder / "log"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with (
        event_log.LogWriter(folder / "log", source.schema, fingerprint) as log,
        TruthWriter(folder / "truth.arrow") as truth,
    ):
        for file in ("users", "items", "events"):
            for part in _chunks(source.rows(file)):
                log.append(file, {name: x[part] for name, x in source.columns[file].items()})
        for part in _chunks(rows):
            n = part.stop - part.start
            u_click, u_like = rng.random(n), rng.random(n)
            click = u_click < rates["p_click"]
            labels = {"click": click, "like": click & (u_like < rates["p_like"])}
            chunk = {name: x[part] for name, x in shown.items()}
            chunk |= {name: x.astype(np.int8) for name, x in labels.items()}
            log.append("impressions", chunk)
            truth.append({name: np.full(n, p) for name, p in rates.items()})
        truth.finish()
        return log.finish(source="world control")


def floors(log_dir: str | os.PathLike, span: str = "test") -> dict[str, Any]:
    """What can be reached on a span of a world's log.

    Returns {"span", "impressions", "click": {...}, "like": {...}}; each task's dict has rows (like:
    the clicked impressions), base_rate, and NE and log loss (nats) of the oracle (the true
    probability: no honest model beats it) and, for click, of the prior mean (the user's latent
    terms at their mean: what features of the user can reach, given infinite data).

    Raises ValueError where the span is unknown, or the labels of a task are all alike.
    """
    if span not in event_log.SPANS:
        raise ValueError(f"floors: span={span!r}, expected one of {event_log.SPANS}")
    log, truth = event_log.EventLog.open(log_dir), load_truth(log_dir)
    names = ("span", "click", "like")
    shown = {name: log.column("impressions", name) for name in names}
    sums = {name: np.zeros(3) for name in ("p_click", "p_known", "p_like")}
    for part in _chunks(len(shown["span"])):
        rows = np.flatnonzero(shown["span"][part] == event_log.SPANS.index(span))
        click, like = shown["click"][part][rows], shown["like"][part][rows]
        for name in ("p_click", "p_known"):
            sums[name] += _sums(click, truth[name][part][rows])
        sums["p_like"] += _sums(like[click == 1], truth["p_like"][part][rows][click == 1])
    out = {"span": span, "impressions": int(sums["p_click"][0])}
    kinds = {"click": {"oracle": "p_click", "prior_mean": "p_known"}, "like": {"oracle": "p_like"}}
    for task, floor in kinds.items():
        rows, positives, _ = sums[floor["oracle"]].tolist()
        if not 0 < positives < rows:
            raise ValueError(
                f"{log_dir}, span {span!r}: {positives:.0f} of {rows:.0f} {task} labels are 1, "
                "expected both classes: NE is undefined"
            )
        rate = positives / rows
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        out[task] = {"rows": int(rows), "base_rate": rate}
        for name, p in floor.items():
            log_loss = float(sums[p][2] / rows)
            out[task] |= {f"{name}_log_loss": log_loss, f"{name}_ne": log_loss / entropy}
    return out


def _sums(label: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Rows, positive labels and summed log loss in nats."""
    loss = -np.where(label == 1, np.log(p), np.log1p(-p)).sum()
    return np.array([len(label), label.sum(dtype=np.int64), loss])
