"""Samples: pointers into a log that say which impressions are trained on together.

A sample is one user, one slice of the user's events and C >= 1 candidates (impressions):
  impression  every impression alone, C = 1
  request     all impressions of one request, which share user and time (HSTU)
  window      all impressions of one user in one window of time, cut where the span ends and,
              greedily from the oldest, into parts of at most `max_candidates` candidates and
              `max_realtime` in-window events (MTGR, GRAB)
Its slice of events is S, the `history` newest before its first candidate, then R, all events from
then to before its last candidate, never truncated. A user's events lie in the log once, however
many samples point at them.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from rankjax.data import event_log

Organisation = Literal["impression", "request", "window"]
ORGANISATIONS = ("impression", "request", "window")
CHUNK = 1 << 20  # impressions whose cuts are searched at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derived:
    """A feature that is computed when a batch is gathered.

    rule: (time, reference, birth) -> values, all of one shape, int64 seconds: when the event
      happened or the candidate was shown, the sample's reference time, the item's birth.
    sides: where it may stand. rows: ids are 1 .. rows - 1; 0 = dense float32.
    difference: it is made of a difference of times, so it needs `time_exact`.
    """

    rule: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    sides: tuple[str, ...]
    rows: int
    difference: bool
    birth: bool = False

    @property
    def kind(self) -> str:
        return "id" if self.rows else "dense"


def _hour(time: np.ndarray, reference: np.ndarray, birth: np.ndarray) -> np.ndarray:
    return 1 + time // 3600 % 24


def _weekday(time: np.ndarray, reference: np.ndarray, birth: np.ndarray) -> np.ndarray:
    return 1 + (time // 86_400 + 3) % 7  # day 0 was a Thursday


def _item_age(time: np.ndarray, reference: np.ndarray, birth: np.ndarray) -> np.ndarray:
    return np.log1p(np.maximum(time - birth, 0) / 86_400)


def _log_age(time: np.ndarray, reference: np.ndarray, birth: np.ndarray) -> np.ndarray:
    # frexp's exponent e says 2^(e-1) <= x < 2^e: exact at powers of two, where a log is not
    return np.clip(np.frexp(np.maximum(reference - time, 1).astype(np.float64))[1], 1, 32)


DERIVED = {
    # hour of the day, UTC: 1 .. 24
    "hour": Derived(rule=_hour, sides=("context", "event"), rows=25, difference=False),
    # Monday = 1 .. Sunday = 7, UTC
    "weekday": Derived(rule=_weekday, sides=("context", "event"), rows=8, difference=False),
    # log(1 + days) since items.birth, 0 before it
    "item_age": Derived(
        rule=_item_age, sides=("context", "event"), rows=0, difference=True, birth=True
    ),
    # 1 + floor(log2(seconds)) from the event to the reference time, 1 for less than two seconds
    # and for later events: 1 .. 32
    "log_age": Derived(rule=_log_age, sides=("event",), rows=33, difference=True),
}


def check_derived(log: event_log.EventLog) -> None:
    """Raises ValueError where the schema asks for a derived feature that cannot be computed."""
    for f in log.schema.features:
        if not f.derive:
            continue
        where = f"{log.folder / 'log.json'}, feature {f.name!r}"
        if f.derive not in DERIVED:
            raise ValueError(f"{where}: found derive={f.derive!r}, expected one of {list(DERIVED)}")
        d = DERIVED[f.derive]
        if f.side not in d.sides or f.kind != d.kind:
            raise ValueError(
                f"{where}: found side={f.side!r}, kind={f.kind!r}, expected one of {d.sides} and "
                f"{d.kind!r} for derive={f.derive!r}"
            )
        if d.rows and log.schema.table(f.table).rows < d.rows:
            found = log.schema.table(f.table).rows
            raise ValueError(f"{where}: found {found} rows in {f.table!r}, expected {d.rows}")
        if d.difference and not log.schema.time_exact:
            raise ValueError(
                f"{where}: found derive={f.derive!r}, a difference of times, in a log whose times "
                "are not exact (time_exact=false); expected none"
            )
        if d.birth and "birth" not in log.columns["items"]:
            raise ValueError(f"{where}: found no column 'birth' in items.arrow, expected one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How impressions become samples."""

    organisation: Organisation
    history: int  # S: the newest events before the first candidate
    max_candidates: int = 32  # more are split into several samples that repeat the history
    max_realtime: int = 100  # R of a window's part
    window: int = 86_400  # seconds; windows start at multiples of it since 1970

    def __post_init__(self) -> None:
        if self.organisation not in ORGANISATIONS:
            raise ValueError(
                f"SampleConfig: organisation={self.organisation!r}, expected one of {ORGANISATIONS}"
            )
        least = {"history": 0, "max_candidates": 1, "max_realtime": 0, "window": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(
                    f"SampleConfig: {name}={getattr(self, name)}, expected at least {low}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """N samples in the order of their first candidates' times; rows are the log's.

    user: int32 [N]. event_start, event_end: int64 [N], the slice of the events file.
    reference: int64 [N], the first event row at or after the first candidate: events before it are
      S, the others R. time: int64 [N], seconds, the first candidate's.
    candidate_offsets: int64 [N + 1] into the next two.
    impressions: int64 [n], rows of the impressions file, a sample's in order of time.
    order: int32 [n], how many of the events from `reference` on the candidate may read.
    one_time: every sample's candidates share one time.
    stats: counts to print: samples, impressions, groups (requests or windows), split (samples
      beyond the first of their group), history and realtime (mean events), candidates (mean).
    """

    config: SampleConfig
    span: str
    user: np.ndarray
    event_start: np.ndarray
    event_end: np.ndarray
    reference: np.ndarray
    time: np.ndarray
    candidate_offsets: np.ndarray
    impressions: np.ndarray
    order: np.ndarray
    one_time: bool
    stats: dict[str, float]

    def __len__(self) -> int:
        return len(self.user)

    @property
    def event_counts(self) -> np.ndarray:
        """S + R of each sample, int64 [N]."""
        return self.event_end - self.event_start

    @property
    def candidate_counts(self) -> np.ndarray:
        """C of each sample, int64 [N]."""
        return np.diff(self.candidate_offsets)


def past_events(log: event_log.EventLog, rows: np.ndarray) -> np.ndarray:
    """For impressions `rows` [n]: the row after the last event that each may read, int64 [n].

    It may read events event_start[user]:result, those strictly before its time (its order where
    times are not exact). A binary search of all impressions side by side, CHUNK at a time.
    """
    key = "time" if log.schema.time_exact else "order"
    happened = log.column("events", key)
    user, when = log.column("impressions", "user"), log.column("impressions", key)
    found = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        u = user[chunk]
        low, high = log.event_start[u], log.event_start[u + 1]
        found[start : start + CHUNK] = count_before(happened, low, high, when[chunk])
    return found


def count_before(
    happened: np.ndarray, low: np.ndarray, high: np.ndarray, when: np.ndarray
) -> np.ndarray:
    """int64 [n]: low + how many of the ascending happened[low:high] are < when, side by side."""
    longest = int((high - low).max(initial=0))
    for _ in range(longest.bit_length()):
        middle = (low + high) // 2
        open_ = low < high
        earlier = open_ & (happened.take(middle, mode="clip") < when)
        low = np.where(earlier, middle + 1, low)
        high = np.where(open_ & ~earlier, middle, high)
    return low


def _span_rows(log: event_log.EventLog, span: str, newest: int | None) -> np.ndarray:
    """Rows of the span's impressions, or of its `newest` ones, oldest first."""
    if span not in event_log.SPANS:
        raise ValueError(f"samples.build: span={span!r}, expected one of {event_log.SPANS}")
    rows = np.flatnonzero(log.column("impressions", "span") == event_log.SPANS.index(span))
    if newest is not None:
        if not 0 < newest <= len(rows):
            raise ValueError(
                f"samples.build: newest={newest}, expected 1 .. {len(rows)}, the impressions of "
                f"span {span!r} in {log.folder / 'impressions.arrow'}"
            )
        rows = rows[-newest:]
    return rows


def _starts(*keys: np.ndarray) -> np.ndarray:
    """First index of each run of equal keys."""
    if not len(keys[0]):
        return np.empty(0, np.int64)
    change = np.zeros(len(keys[0]), bool)
    change[0] = True
    for key in keys:
        change[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(change)


def _check_requests(log: event_log.EventLog, rows: np.ndarray, starts: np.ndarray) -> None:
    """Raises ValueError where a request's impressions do not share user and time (or order)."""
    path = log.folder / "impressions.arrow"
    request = log.column("impressions", "request")[rows]
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(rows))))
    for name in ("user", "time") if log.schema.time_exact else ("user", "time", "order"):
        x = log.column("impressions", name)[rows]
        differs = x != x[starts][group]
        if differs.any():
            at = int(np.argmax(differs))
            raise ValueError(
                f'{path}, column "{name}": row {rows[at]} holds {x[at]}, expected '
                f"{x[starts][group][at]} as in row {rows[starts][group][at]} of the same request "
                f"{request[at]}"
            )
    first = np.sort(request[starts])
    twice = first[1:][first[1:] == first[:-1]]
    if len(twice):
        times = log.column("impressions", "time")[rows[starts][request[starts] == twice[0]]]
        raise ValueError(
            f'{path}, column "time": found request {twice[0]} at {times.tolist()}, expected one '
            "time for all impressions of a request"
        )


def _check_order(log: event_log.EventLog, rows: np.ndarray, cut: np.ndarray) -> None:
    """Raises ValueError where a user's later window reads fewer events than an earlier one.

    Rows are sorted by user, window, cut; only an `order` that contradicts the times does this.
    """
    falls = np.flatnonzero(cut[1:] < cut[:-1])
    if len(falls):
        row, before = rows[falls[0] + 1], rows[falls[0]]
        order = log.column("impressions", "order")
        raise ValueError(
            f'{log.folder / "impressions.arrow"}, column "order": row {row} holds {order[row]}, '
            f"expected at least {order[before]} as in row {before}, an earlier time of that user"
        )


def _parts(group_end: np.ndarray, cut: np.ndarray, config: SampleConfig) -> np.ndarray:
    """First indices of the parts that groups are cut into, greedily from each group's oldest.

    group_end [n]: where each entry's group ends. cut [n]: the events before each entry (rows of
    the events file), never falling within a user. The loop runs once per part of the group with
    most parts, all groups side by side.
    """
    # The first entry that a part starting here could not hold. Users follow each other in the
    # events file, so `cut` never falls over all of the sorted entries either.
    full = np.arange(len(cut)) + config.max_candidates
    if config.organisation == "window":
        full = np.minimum(full, np.searchsorted(cut, cut + config.max_realtime, side="right"))
    full = np.minimum(full, group_end)
    part = _starts(group_end)
    found = [part]
    while len(part):
        after = full[part]
        part = after[after < group_end[part]]
        found.append(part)
    return np.sort(np.concatenate(found))


def build(
    log: event_log.EventLog, config: SampleConfig, span: str, newest: int | None = None
) -> Samples:
    """The samples of one span (of SPANS), or of its `newest` impressions (a data budget).

    Raises ValueError: an unknown span, more impressions asked for than there are, a request whose
    impressions differ in user or time.
    """
    rows = _span_rows(log, span, newest)
    cut = past_events(log, rows)
    user, time = (log.column("impressions", name)[rows] for name in ("user", "time"))
    if config.organisation == "window":
        # rows run in order of time, and the sort is stable
        window = time // config.window
        sort = np.lexsort((cut, window, user))
        rows, cut, user, time = rows[sort], cut[sort], user[sort], time[sort]
        starts = _starts(user, window[sort])
        _check_order(log, rows, cut)
    elif config.organisation == "request":
        starts = _starts(log.column("impressions", "request")[rows])
        _check_requests(log, rows, starts)
    else:
        starts = np.arange(len(rows))
    group_end = np.repeat(np.append(starts, len(rows))[1:], np.diff(np.append(starts, len(rows))))
    first = _parts(group_end, cut, config)
    counts = np.diff(np.append(first, len(rows)))
    order = (cut - np.repeat(cut[first], counts)).astype(np.int32)
    return _assemble(
        log,
        config,
        span,
        groups=len(starts),
        first=first,
        counts=counts,
        rows=rows,
        order=order,
        user=user[first],
        time=time[first],
        reference=cut[first],
        event_end=cut[first + counts - 1],
    )


def _assemble(
    log: event_log.EventLog,
    config: SampleConfig,
    span: str,
    *,
    groups: int,
    first: np.ndarray,
    counts: np.ndarray,
    rows: np.ndarray,
    order: np.ndarray,
    user: np.ndarray,
    time: np.ndarray,
    reference: np.ndarray,
    event_end: np.ndarray,
) -> Samples:
    """Puts the parts into the order of their first candidates (rows run in order of time)."""
    N = len(first)
    sort = np.argsort(rows[first], kind="stable")
    first, counts = first[sort], counts[sort]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    if config.organisation == "window":  # the other two are in order already
        flat = np.repeat(first - offsets[:-1], counts) + np.arange(len(rows))
        rows, order = rows[flat], order[flat]
    event_start = np.maximum(reference - config.history, log.event_start[user])
    mean = lambda x: float(x.mean()) if N else 0.0
    stats = {
        "samples": N,
        "impressions": len(rows),
        "groups": groups,
        "split": N - groups,
        "candidates": mean(counts),
        "history": mean(reference - event_start),
        "realtime": mean(event_end - reference),
    }
    return Samples(
        config=config,
        span=span,
        user=user[sort],
        event_start=event_start[sort],
        event_end=event_end[sort],
        reference=reference[sort],
        time=time[sort],
        candidate_offsets=offsets,
        impressions=rows,
        order=order,
        one_time=config.organisation != "window",
        stats=stats,
    )
