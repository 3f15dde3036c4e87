"""What came before each row: how often its key occurred, and how long ago; all rows at once.

Time enters as bounds only: with the counted rows in order of time, "before t" means "above row b".
Sorted by (key, row), the counted rows of one key above row b end where a binary search for
(key, b) lands, and a window of time is the difference of two such places.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from rankjax.data import event_log, samples, tally

PARTITION = 1 << 22  # rows whose keys are sorted at once, unless a single key has more

# (user int32 [n], item int32 [n]) -> int64 [n]; rows with key 0 are neither counted nor answered
Key = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """The rows that are counted, in order of time: n impressions, or n events.

    time: int64 [n], seconds. user, item: int32 [n].
    labels: int8 [n] of 0 and 1 each; a row is a click where all of them are 1 (none: every row).
    """

    time: np.ndarray
    user: np.ndarray
    item: np.ndarray
    labels: tuple[np.ndarray, ...] = ()

    def clicks(self, rows: np.ndarray | slice) -> np.ndarray:
        """bool, one per row of `rows`: whether it is a click."""
        clicks = np.ones(len(self.item[rows]), bool)
        for label in self.labels:
            clicks &= label[rows] == 1
        return clicks


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Before:
    """Of each asked row's key, what lies above the row's bound: int64 [m] each."""

    rows: np.ndarray
    clicks: np.ndarray


def mapped(path: pathlib.Path, rows: int, dtype: type[np.generic]) -> np.ndarray:
    """A new file of zeros as an array [rows]: what it holds is the page cache's, not the heap's."""
    return np.memmap(path, dtype, "w+", shape=(max(rows, 1),))[:rows]  # no file maps with 0 bytes


def in_order_of_time(log: event_log.EventLog, folder: pathlib.Path) -> Sources:
    """The log's events as sources; the sorted columns become files in `folder`."""
    order = np.argsort(log.column("events", "time"), kind="stable")
    found = {}
    for name in ("time", "user", "item"):
        column = log.column("events", name)
        found[name] = mapped(folder / f"events.{name}", len(order), column.dtype.type)
        for chunk in tally.chunks(len(order)):
            found[name][chunk] = column[order[chunk]]
    return Sources(**found)


def bound(times: np.ndarray, when: np.ndarray, back: int, path: pathlib.Path) -> np.ndarray:
    """For each of `when` [N] the first row of sorted `times` at or after when - back: int64 [N].

    Mapped from a new file `path`.
    """
    found = mapped(path, len(when), np.int64)
    for chunk in tally.chunks(len(when)):
        found[chunk] = np.searchsorted(times, when[chunk] - back)
    return found


def clicks_above(sources: Sources, path: pathlib.Path) -> np.ndarray:
    """Clicks of all keys above each row, int64 [n + 1], mapped from a new file `path`."""
    found = mapped(path, len(sources.item) + 1, np.int64)
    for chunk in tally.chunks(len(sources.item)):
        total = found[chunk.start] + np.cumsum(sources.clicks(chunk), dtype=np.int64)
        found[chunk.start + 1 : chunk.stop + 1] = total
    return found


def _part(
    key: Key, user: np.ndarray, item: np.ndarray, part: int, parts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of one part of the keys: distinct keys [G], first place [G + 1], rows [m].

    Keys ascend and so do the rows of a key: those of key g are rows[first[g] : first[g + 1]].
    """
    rows, keys = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for chunk in tally.chunks(len(item)):
        found = key(user[chunk], item[chunk])
        # Fibonacci hashing: the keys of pairs differ in regular steps, their parts must not.
        mixed = (found.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
        at = np.flatnonzero((found > 0) & (mixed % np.uint64(parts) == part))
        rows.append(at + chunk.start)
        keys.append(found[at])
    keys = np.concatenate(keys)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    change = np.ones(len(keys), bool)
    change[1:] = keys[1:] != keys[:-1]
    first = np.flatnonzero(change)
    keys = keys[first]  # one array of all rows less before the rows are sorted
    rows = np.concatenate(rows)
    return keys, np.append(first, len(rows)), rows[order]


def before(
    key: Key,
    sources: Sources,
    user: np.ndarray,
    item: np.ndarray,
    bounds: dict[int, np.ndarray],
) -> Iterator[tuple[np.ndarray, dict[int, Before]]]:
    """Counts, for the asked rows (user, item int32 [N]), the sources of the same key.

    bounds: {name: int64 [N]}, 0 .. n: the sources above that row are counted.
    Yields (rows int64 [m], {name: Before [m]}), every asked row at most once and in no promised
    order; what is never yielded has no source of its key at all. Memory: about 50 bytes for each
    of the PARTITION rows that are sorted at once, or of the rows of one key where it has more.
    """
    stride = len(sources.item)  # (key, row) as one number, below 2^62 for 2^31 rows
    parts = max(1, -(-max(len(sources.item), len(item)) // PARTITION))
    for part in range(parts):
        keys, first, rows = _part(key, sources.user, sources.item, part, parts)
        clicks = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(sources.clicks(rows), out=clicks[1:])
        places = np.repeat(np.arange(len(keys)) * stride, np.diff(first))
        places += rows
        asked, start, rows = _part(key, user, item, part, parts)
        same = np.searchsorted(keys, asked)
        there = np.append(keys, 0)[same] == asked  # a source of this key exists
        for chunk in tally.chunks(len(rows)):
            group = np.searchsorted(start, np.arange(chunk.start, chunk.stop), side="right") - 1
            r, g = rows[chunk][there[group]], same[group[there[group]]]
            found = {}
            for name, above in bounds.items():
                place = np.searchsorted(places, g * stride + above[r])
                count = clicks[place] - clicks[first[g]]
                found[name] = Before(rows=place - first[g], clicks=count)
            yield r, found


def log_hours(seconds: np.ndarray) -> np.ndarray:
    """log10(1 + hours) of int64 seconds >= 0, float64."""
    return np.log10(1 + seconds / 3600)


def item_ages(
    log: event_log.EventLog, seen_in: tuple[str, ...], late: int = 0
) -> Iterator[np.ndarray]:
    """Of each impression's item at that time, chunk by chunk: log10(1 + hours), float64 [m].

    Since the item's birth, or where items have none since its first row in the files `seen_in`
    (impressions `late` seconds after their time); 0 before it and for item 0.
    """
    if "birth" in log.columns["items"]:
        since = log.column("items", "birth")
    else:
        since = np.full(log.rows("items"), np.iinfo(np.int64).max)
        for file in seen_in:
            item, time = (log.column(file, name) for name in ("item", "time"))
            for chunk in tally.chunks(len(item)):
                at = time[chunk] + (late if file == "impressions" else 0)
                np.minimum.at(since, item[chunk], at)
    item, time = (log.column("impressions", name) for name in ("item", "time"))
    for chunk in tally.chunks(len(item)):
        first, now = since[item[chunk]], time[chunk]
        past = (item[chunk] > 0) & (first < now)
        yield log_hours(np.where(past, now - np.where(past, first, now), 0))


def user_pasts(log: event_log.EventLog) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each impression's user before it, chunk by chunk: events, int64 [m]; idle, float64 [m].

    idle: log10(1 + hours) since the last of these events, 0 where there is none.
    """
    user, time = (log.column("impressions", name) for name in ("user", "time"))
    happened = log.column("events", "time")
    for chunk in tally.chunks(len(user)):
        after = samples.past_events(log, np.arange(chunk.start, chunk.stop))
        events = after - log.event_start[user[chunk]]
        some = np.flatnonzero(events > 0)
        idle = np.zeros(len(events))
        idle[some] = log_hours(time[chunk][some] - happened[after[some] - 1])
        yield events, idle
