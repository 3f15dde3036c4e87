"""Counters: what was known of the item, its category and the user's taste before each request.

`add` makes a new log of a log, with counts, clicks and smoothed click rates over windows of time as
dense context features. Every value depends on what happened strictly before the request only,
also its smoothing: no statistic of the whole log enters.
"""

import dataclasses
import math
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from rankjax.data import counting, event_log, samples, tally
from rankjax.data import shards as shards_lib
from rankjax.schema import Feature, Schema

VERSION = 1
PRIOR = 20  # pseudo-impressions that a rate starts with, at the rate of the log so far
HOUR, DAY = 3600, 86_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class CounterConfig:
    """What is counted, and over which time.

    windows: seconds before the request, distinct; None = ever.
    of: item features of kind "id" to count by, besides the item itself; None = all but those that
      are the item's own identity (more than half as many distinct values as there are items).
    user: count the user's own impressions and clicks by each of `of`, too.
    task: whose label is a click (where the task has a weight: and the weight is 1); "" = the
      primary task.
    delay: seconds until it is known whether an impression was clicked: its label counts for
      requests later than its time + delay only.
    """

    windows: tuple[int | None, ...] = (HOUR, DAY, 7 * DAY, None)
    of: tuple[str, ...] | None = None
    user: bool = True
    task: str = ""
    delay: int = 0

    def __post_init__(self) -> None:
        if not self.windows or any(w is not None and w < 1 for w in self.windows):
            raise ValueError(
                f"CounterConfig: windows={self.windows}, expected seconds >= 1, or None for ever"
            )
        for name in ("windows", "of"):
            found = getattr(self, name) or ()
            if len(set(found)) < len(found):
                raise ValueError(f"CounterConfig: {name}={found}, expected no entry twice")
        if self.delay < 0:
            raise ValueError(f"CounterConfig: delay={self.delay}, expected seconds >= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Counter:
    """One column: `measure` over `window` by the item (of = ""), or by one of its features."""

    of: str
    user: bool
    measure: str  # "impressions", "clicks" or "rate"
    window: int | None

    @property
    def name(self) -> str:
        by = ("user_" if self.user else "") + (self.of or "item")
        return f"{by}_{self.measure}_{_label(self.window)}"

    @property
    def group(self) -> str:
        return "cross" if self.user else "item"


# Not counted by a key: {name: group}
_BESIDES = {
    "item_known_age": "item",
    "user_idle": "cross",
    "user_has_past": "cross",
    "user_events": "cross",
}


def _label(window: int | None) -> str:
    """1h, 24h, 7d, 90s; ever."""
    if window is None:
        return "ever"
    if window > DAY and window % DAY == 0:
        return f"{window // DAY}d"
    return f"{window // HOUR}h" if window % HOUR == 0 else f"{window}s"


def _clicks_only(log: event_log.EventLog) -> bool:
    """Whether the log was made of clicks, so that its impressions are no counts of anything."""
    return "negatives" in log.info


def _late(log: event_log.EventLog) -> int:
    """Seconds after their time that impressions count: a request's rows all bear the time of its
    oldest, so that some of them may have been shown later by so much."""
    return 0 if _clicks_only(log) else log.info.get("request_spread", 0)


def _by(config: CounterConfig, log: event_log.EventLog) -> tuple[str, ...]:
    """The item features to count by; ValueError where one cannot be."""
    stored = [f.name for f in log.schema.of("item") if f.kind == "id"]
    if config.of is None:
        most = (log.rows("items") - 1) / 2
        # Rare items may share one id, so the name tells the item's own id too.
        stored = [n for n in stored if n != "item"]
        distinct = {n: np.count_nonzero(np.unique(log.column("items", n))) for n in stored}
        return tuple(name for name in stored if distinct[name] <= most)
    if unknown := [name for name in config.of if name not in stored]:
        raise ValueError(
            f"{log.folder / 'log.json'}: found no item feature of kind 'id' named {unknown} "
            f"(CounterConfig.of), expected some of {stored}"
        )
    return config.of


def _labels(config: CounterConfig, log: event_log.EventLog) -> tuple[str, ...]:
    """The columns that are all 1 where an impression was a click; ValueError: no such task."""
    primary, tasks = log.schema.primary_task, {t.name: t for t in log.schema.tasks}
    name = config.task or primary
    where = f"{log.folder / 'log.json'}: found task={name!r} (CounterConfig)"
    if name not in tasks:
        raise ValueError(f"{where}, expected one of {list(tasks)}")
    if _clicks_only(log) and name != primary:
        raise ValueError(
            f"{where} for a log of clicks with sampled negatives, whose events are counted; "
            f"expected {primary!r}"
        )
    weight = tasks[name].weight
    return (name, weight) if weight else (name,)


def _counters(config: CounterConfig, log: event_log.EventLog) -> list[_Counter]:
    """The counters by key, those of one key together; ValueError where two have one name."""
    of = _by(config, log)
    keys = [("", False), *((name, False) for name in of)]
    keys += [(name, True) for name in of] if config.user else []
    measures = ("clicks",) if _clicks_only(log) else ("impressions", "clicks", "rate")
    late = _late(log)
    # nothing of a window as short is known yet
    least = {m: late if m == "impressions" else late + config.delay for m in measures}
    found = [
        _Counter(of=name, user=user, measure=measure, window=window)
        for name, user in keys
        for window in config.windows
        for measure in measures
        if window is None or window > least[measure]
    ]
    names = [c.name for c in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"CounterConfig: of={of} gives two counters the names {twice}, expected one each"
        )
    return found


def describe(config: CounterConfig, log: event_log.EventLog) -> list[str]:
    """Names of the features that `add` gives this log, in the schema's order.

    Raises ValueError: config.of or config.task names what the log lacks.
    """
    _labels(config, log)
    return [*(c.name for c in _counters(config, log)), *_BESIDES]


def _schema(log: event_log.EventLog, counters: list[_Counter]) -> Schema:
    groups = {c.name: c.group for c in counters} | _BESIDES
    if clash := sorted(set(groups) & {f.name for f in log.schema.features}):
        raise ValueError(
            f"{log.folder / 'log.json'}: found features {clash}, the names of counters; expected "
            "none of these"
        )
    added = tuple(
        Feature(name=name, side="context", group=group, kind="dense", counter=True)
        for name, group in groups.items()
    )
    return dataclasses.replace(log.schema, features=log.schema.features + added)


def _check(log: event_log.EventLog) -> None:
    where = log.folder / "log.json"
    if log.schema != log.schema.without_counters():
        raise ValueError(
            f"{where}: found a log with counters, expected one without: count the log that it was "
            "made of"
        )
    if not log.schema.time_exact:
        raise ValueError(
            f"{where}: found a log whose times are not exact (time_exact=false), where windows and "
            "ages mean nothing; expected exact times: prepare the log from files that have them"
        )


def fingerprint(log: dict[str, Any], config: CounterConfig) -> dict[str, Any]:
    """The fingerprint of a log with counters, from that of the log without."""
    made_of = {"source": "counters", "version": VERSION}
    return {**made_of, "config": dataclasses.asdict(config), "log": log}


def add(
    log_folder: str | os.PathLike,
    out: str | os.PathLike,
    config: CounterConfig = CounterConfig(),
    shards: int | None = None,
) -> pathlib.Path:
    """Writes the log of `log_folder` with counters into the folder `out`, and returns `out`.

    shards: how many to write; None: a log of one.

    Rows and their order stay, so that the truth.arrow of a world holds for an `out` in the world's
    folder too. Where the same log lies in `out` already, nothing happens.

    Of impressions with t - window <= time < t, t the request's time, by the item, each of
    config.of, and the user with each of config.of:
      {by}_impressions_{window}, {by}_clicks_{window}: log10(1 + count)
      {by}_rate_{window}: logit((clicks + PRIOR p) / (impressions + PRIOR)) - logit(p), 0 where
        nothing is known, of impressions whose label is known; p = (clicks + 1) / (impressions + 2)
        over all of them before t
    A window not longer than config.delay gives impressions only. What has id 0 counts as nothing.
    Where log.info says that the rows of a request were shown at several times (`request_spread`
    seconds apart at most), impressions count so many seconds after their request's time, and labels
    `delay` after that.
    Where log.info has "negatives", the impressions were drawn and not shown: then only clicks are
    counted, from the events file (each known after config.delay too).
    Besides:
      item_known_age: log10(1 + hours) since the item's birth, where items have one; else since the
        item was first seen in impressions (not where these were drawn) or events; 0 before it
      user_idle: log10(1 + hours) since the user's last event; 0 and user_has_past 0 before any
      user_events: log10(1 + events of the user)

    Raises ValueError: the log has counters already, its times are not exact, `of` or `task` names
    what it lacks, a counter would take the name of another feature, or `out` holds something else.
    """
    log, out = event_log.EventLog.open(log_folder), pathlib.Path(out)
    _check(log)
    labels, counters = _labels(config, log), _counters(config, log)
    schema = _schema(log, counters)
    made_of = fingerprint(log.fingerprint, config)
    starts = shards_lib.starts(log.rows("users"), shards)
    if event_log.is_prepared(out, made_of, shards):
        return out
    event_log.check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.counts.", dir=out.parent) as temporary:
        folder, rows = pathlib.Path(temporary), log.rows("impressions")
        added = {
            f.name: counting.mapped(folder / f"{number}.column", rows, np.float32)
            for number, f in enumerate(schema.features)
            if f.counter
        }
        _count(log, config, counters, labels, folder, added)
        _beside(log, added)
        schema = _scaled(log, schema, added)
        with event_log.LogWriter(out, schema, made_of, starts) as writer:
            _append(log, writer, added)
            return writer.finish(**{**log.info, "counters": _info(log, config, counters)})


def _scaled(log: event_log.EventLog, schema: Schema, added: dict[str, np.ndarray]) -> Schema:
    """The schema with `shift` and `scale` of counters and of derived dense context features.

    They are mean and deviation over the training span. The columns themselves stay what was
    counted, which nothing at or after their request has touched.
    """
    features = []
    for f in schema.features:
        if f.side == "context" and f.kind == "dense" and (f.counter or f.derive):
            n, total, squares = 0, 0.0, 0.0
            for chunk in tally.chunks(log.rows("impressions")):
                x = _training_values(log, f, added, chunk)
                n, total, squares = n + len(x), total + x.sum(), squares + (x**2).sum()
            mean = float(total) / max(n, 1)
            deviation = math.sqrt(max(float(squares) / max(n, 1) - mean**2, 0.0))
            scale = deviation if deviation > 1e-6 else 1.0  # a constant stays one
            # Six digits, so that the order of the sums leaves no trace.
            f = dataclasses.replace(f, shift=float(f"{mean:.6g}"), scale=float(f"{scale:.6g}"))
        features.append(f)
    return dataclasses.replace(schema, features=tuple(features))


def _training_values(
    log: event_log.EventLog, f: Feature, added: dict[str, np.ndarray], chunk: slice
) -> np.ndarray:
    """float64 [m]: a dense context feature of the chunk's impressions of the training span."""
    rows = np.flatnonzero(log.column("impressions", "span")[chunk] == 0) + chunk.start
    if not f.derive:
        return added[f.name][rows].astype(np.float64)
    rule, time = samples.DERIVED[f.derive], log.column("impressions", "time")[rows]
    item = log.column("impressions", "item")[rows]
    birth = log.column("items", "birth")[item] if rule.birth else time
    return rule.rule(time, time, birth).astype(np.float64)


def _info(
    log: event_log.EventLog, config: CounterConfig, counters: list[_Counter]
) -> dict[str, Any]:
    return {
        "of": list(_by(config, log)),
        "user": config.user,
        "windows": [_label(window) for window in config.windows],
        "task": config.task or log.schema.primary_task,
        "delay": config.delay,
        "counted": "events" if _clicks_only(log) else "impressions",
        "features": [*(c.name for c in counters), *_BESIDES],
    }


def _key(log: event_log.EventLog, of: str, user: bool) -> counting.Key:
    if not of:
        return lambda _, item: item.astype(np.int64)
    values = log.column("items", of)
    if not user:
        return lambda _, item: values[item].astype(np.int64)
    rows = log.schema.table(next(f.table for f in log.schema.of("item") if f.name == of)).rows

    def pair(user: np.ndarray, item: np.ndarray) -> np.ndarray:
        value = values[item].astype(np.int64)
        return np.where(value > 0, user.astype(np.int64) * rows + value, 0)

    return pair


def _count(
    log: event_log.EventLog,
    config: CounterConfig,
    counters: list[_Counter],
    labels: tuple[str, ...],
    folder: pathlib.Path,
    added: dict[str, np.ndarray],
) -> None:
    """Fills `added` (zeros) with the counters, key by key."""
    user, item, time = (log.column("impressions", name) for name in ("user", "item", "time"))
    if _clicks_only(log):
        sources = counting.in_order_of_time(log, folder)
    else:
        columns = tuple(log.column("impressions", name) for name in labels)
        sources = counting.Sources(time=time, user=user, item=item, labels=columns)
    late = _late(log)
    delay = late + config.delay
    backs = {late, delay, *(w for w in config.windows if w is not None)}
    bounds = {
        back: counting.bound(sources.time, time, back, folder / f"{back}.bound")
        for back in sorted(backs)
    }
    clicks = counting.clicks_above(sources, folder / "clicks")
    for of, by_user in dict.fromkeys((c.of, c.user) for c in counters):
        wanted = [c for c in counters if (c.of, c.user) == (of, by_user)]
        key = _key(log, of, by_user)
        for rows, before in counting.before(key, sources, user, item, bounds):
            known = bounds[delay][rows]
            p = (clicks[known] + 1) / (known + 2)
            for c in wanted:
                added[c.name][rows] = _value(c, before, late, delay, p)


def _value(
    counter: _Counter, before: dict[int, counting.Before], late: int, delay: int, p: np.ndarray
) -> np.ndarray:
    """float64 [m], from the counts up to t - late, t - delay and the window's start."""
    since = before[counter.window] if counter.window else counting.Before(rows=0, clicks=0)
    if counter.measure == "impressions":
        return np.log10(1 + before[late].rows - since.rows)
    k = before[delay].clicks - since.clicks
    if counter.measure == "clicks":
        return np.log10(1 + k)
    n = before[delay].rows - since.rows
    # The difference of the two logits, arranged so that it is exactly 0 where nothing is known.
    return np.log1p(k / (PRIOR * p)) - np.log1p((n - k) / (PRIOR * (1 - p)))


def _beside(log: event_log.EventLog, added: dict[str, np.ndarray]) -> None:
    """Fills what is not counted by a key."""
    seen_in = ("events",) if _clicks_only(log) else ("events", "impressions")
    chunks = tally.chunks(log.rows("impressions"))
    ages, pasts = counting.item_ages(log, seen_in, _late(log)), counting.user_pasts(log)
    for chunk, age, (events, idle) in zip(chunks, ages, pasts, strict=True):
        added["item_known_age"][chunk] = age
        added["user_idle"][chunk] = idle
        added["user_has_past"][chunk] = events > 0
        added["user_events"][chunk] = np.log10(1 + events)


def _append(
    log: event_log.EventLog, writer: event_log.LogWriter, added: dict[str, np.ndarray]
) -> None:
    """Copies the log's rows, with the added columns, chunk by chunk."""
    for file in event_log.FILES:
        columns = log.columns[file] | (added if file == "impressions" else {})
        for chunk in tally.chunks(log.rows(file)):
            writer.append(file, {name: x[chunk] for name, x in columns.items()})
