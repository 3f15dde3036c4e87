"""Checks of times: histories that know the future, and items before their birth."""

import numpy as np
import polars as pl

from rankjax.data import event_log, finding, samples, tally
from rankjax.data.finding import Finding

# Two clocks may differ by a little: only an event later than this is from the future.
LATER = 60  # s
# A click that was logged as an event before its own impression lies this close to it.
JUST_BEFORE = 60  # s
# Fast reloads and replays put a few positives' items into the last minute; a leak puts most there.
JUST_BEFORE_SHARE = 0.2
JUST_BEFORE_RATIO = 5.0  # ... and hardly any negatives'
FEWEST_POSITIVES = 20  # shares of fewer say nothing
# Below one in a thousand it is a few bad rows, which no metric notices.
ERROR_SHARE = 1e-3
# Actions go on after the last request of a log, but not the most of them.
AFTER_SHARE = 0.5


def event_from_the_future(log: event_log.EventLog) -> list[Finding]:
    """Readable events later than their candidate; clicks in their own history; late events."""
    out = _clicks_in_their_own_history(log) + _events_after_all(log)
    return out if log.schema.time_exact else _later_though_readable(log) + out


def _latest(log: event_log.EventLog) -> np.ndarray:
    """The latest time of the user's events up to each event: int64 [events]."""
    user, time = (log.column("events", name) for name in ("user", "time"))
    out = np.empty(len(time), np.int64)
    for part in tally.request_chunks(log.event_start[:-1], len(time)):  # whole users
        rows = pl.DataFrame({"user": user[part], "time": time[part]})
        out[part] = rows.select(pl.col("time").cum_max().over("user")).to_series().to_numpy()
    return out


def _later_though_readable(log: event_log.EventLog) -> list[Finding]:
    user, time = (log.column("impressions", name) for name in ("user", "time"))
    if not log.rows("events"):
        return []
    latest, count, readers, lead, row = _latest(log), 0, 0, 0, -1
    for part in tally.chunks(len(time)):
        cut = samples.past_events(log, np.arange(part.start, part.stop))
        reads = cut > log.event_start[user[part]]
        ahead = np.where(reads, latest[cut - 1] - time[part], 0)
        late = ahead > LATER
        readers += int(reads.sum())
        count += int(late.sum())
        if late.any() and ahead.max() > lead:
            lead, row = int(ahead.max()), part.start + int(np.argmax(ahead))
    if not count:
        return []
    return [
        Finding(
            kind="event_from_the_future",
            severity="error" if count > ERROR_SHARE * readers else "warning",
            where=finding.place("events", "order", "time"),
            evidence=finding.of(count, readers, "impressions with a history")
            + f' may read, by "order", an event that is more than {LATER} s later; impression '
            f"{row} one that is {lead:,} s later",
            advice="count order in the order of time, over a user's events and impressions "
            "together; such events tell what the candidate's user did afterwards",
        )
    ]


def _just_before(log: event_log.EventLog, part: slice) -> np.ndarray:
    """Whether an event of the same user and item lies just before each impression: bool [n].

    Within JUST_BEFORE seconds; where times are not exact, whether it is the newest readable event.
    All impressions step back side by side through their users' last events.
    """
    user, time, item = (log.column("impressions", name)[part] for name in ("user", "time", "item"))
    happened, of = log.column("events", "time"), log.column("events", "item")
    at = samples.past_events(log, np.arange(part.start, part.stop)) - 1
    first = log.event_start[user]
    found, looking = np.zeros(len(user), bool), np.arange(len(user))
    while len(looking):
        looking = looking[at[looking] >= first[looking]]
        if log.schema.time_exact:
            looking = looking[happened[at[looking]] >= time[looking] - JUST_BEFORE]
        hit = of[at[looking]] == item[looking]
        found[looking[hit]] = True
        looking = looking[~hit] if log.schema.time_exact else looking[:0]
        at[looking] -= 1
    return found


def _clicks_in_their_own_history(log: event_log.EventLog) -> list[Finding]:
    tasks = log.schema.tasks
    # by task and label: impressions, and those with their own item just before them
    counts = np.zeros((len(tasks), 2, 2), np.int64)
    for part in tally.chunks(log.rows("impressions")):
        before = _just_before(log, part)
        for k, task in enumerate(tasks):
            label, weight = tally.labels(log, task, part)
            for y in (0, 1):
                rows = weight & (label == y)
                counts[k, y] += int(rows.sum()), int((rows & before).sum())
    when = f"in the {JUST_BEFORE} s before it" if log.schema.time_exact else "as its newest event"
    out = []
    for task, ((negatives, among), (positives, hits)) in zip(tasks, counts.tolist()):
        share, other = hits / max(positives, 1), among / max(negatives, 1)
        if positives < FEWEST_POSITIVES or share < JUST_BEFORE_SHARE:
            continue
        if share < JUST_BEFORE_RATIO * other:
            continue
        out.append(
            Finding(
                kind="event_from_the_future",
                # without times a true repetition looks the same
                severity="error" if log.schema.time_exact else "warning",
                where=finding.place("events", "time" if log.schema.time_exact else "order"),
                evidence=f"the readable history holds the impression's own item {when} for "
                + finding.of(hits, positives, f"positives of {task.name!r}")
                + f", and for {finding.of(among, negatives, 'negatives')}",
                advice="the click itself seems to stand in the history of its impression: give "
                "the event the time at which it happened, at or after its impression",
            )
        )
    return out


def _events_after_all(log: event_log.EventLog) -> list[Finding]:
    shown, happened = log.column("impressions", "time"), log.column("events", "time")
    if not len(shown) or not len(happened):
        return []
    last = int(shown[-1])
    late = sum(int((happened[part] > last).sum()) for part in tally.chunks(len(happened)))
    if late <= AFTER_SHARE * len(happened):
        return []
    return [
        Finding(
            kind="event_from_the_future",
            severity="warning",
            where=finding.place("events", "time"),
            evidence=f"{finding.of(late, len(happened), 'events')} are later than the last "
            "impression, so that none may read them",
            advice="compare the clocks of events and impressions: unit, time zone, period",
        )
    ]


def seen_before_birth(log: event_log.EventLog) -> list[Finding]:
    """Impressions and events of items whose `birth` is later."""
    if "birth" not in log.columns["items"]:
        return []
    birth, out = log.column("items", "birth"), []
    for file in ("impressions", "events"):
        item, time = (log.column(file, name) for name in ("item", "time"))
        count, lead = 0, 0
        for part in tally.chunks(len(item)):
            ahead = birth[item[part]] - time[part]
            count += int((ahead > 0).sum())
            lead = max(lead, int(ahead.max()))
        if count:
            out.append(
                Finding(
                    kind="seen_before_birth",
                    severity="error" if count > ERROR_SHARE * len(item) else "warning",
                    where=f"{finding.place('items', 'birth')}; {finding.place(file, 'time')}",
                    evidence=f"{finding.of(count, len(item), file)} are earlier than their item's "
                    f"birth, by up to {lead:,} s",
                    advice="correct birth, or leave it and item_age out: a birth that lies after "
                    "the first impression was taken from the future, or from another clock",
                )
            )
    return out
