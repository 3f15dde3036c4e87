"""describe: what a log holds, in numbers: rows, spans, labels by day, histories, ids, features.

`describe` returns JSON types, which `text` prints for a terminal and `page` draws as one HTML page.
"""

from typing import Any

import numpy as np
import polars as pl

from rankjax.data import describe_page, describe_text, event_log, samples, spread, tally
from rankjax.schema import Feature


def describe(log: event_log.EventLog) -> dict[str, Any]:
    """What the log holds; times in seconds since 1970, days as "2024-05-31" (UTC).

    Passes over the log in chunks; holds one array of the log's length at a time.

    Keys:
      name, source, time_exact, notes, negatives: from the folder, log.json and its info.
      not_applicable: sentences on what the log does not allow to tell.
      rows: of users and items (row 0, missing, left out), events, impressions, requests.
      time: {impressions, events: {first, last}}; events_after_last_impression: count.
      spans: {span: {impressions, requests, share, first, last}}.
      tasks: {task: {weight, all, train, validation, test: {rows, positives, rate}}}; rows count
        where the task's weight is 1.
      days: {day, spans: {span: impressions by day}, tasks: {task: {rows, positives by day}}}.
      history: {all, train, validation, test: distribution of the events each impression may read}.
      candidates: distribution over requests. events_per_user: distribution over users.
      users, items: {known, shown, never_shown, unseen: {validation, test}}.
      tables: [{name, rows, hashed, distinct}]: ids other than 0 met in impressions and events.
      id_features: [{name, side, kind, table, rows, derive, of, distinct, missing, unseen}].
      dense_features: [{name, side, counter, derive, of, and a distribution}]; `of`: the rows
        counted, users, items, events or impressions.
      Shares lie in 0 .. 1 and are None where nothing could be counted. A distribution holds count,
      mean, std, zeros (share), min, p1, p10, p25, p50, p75, p90, p99, max. `missing` is the share
      of rows without an id; `unseen` the share of a span's ids that no impression of train holds.

    Raises ValueError where a derived feature of the schema cannot be computed.
    """
    samples.check_derived(log)
    starts = tally.request_starts(log)
    info = log.info
    return {
        "name": log.folder.name,
        "source": info.get("source") or log.fingerprint.get("source"),
        "time_exact": log.schema.time_exact,
        "notes": list(info.get("notes", [])),
        "negatives": info.get("negatives"),
        "not_applicable": _not_applicable(log),
        **_rows(log, starts),
        **_labels(log),
        "history": _history(log),
        "candidates": spread.of_counts(
            np.bincount(np.diff(np.append(starts, log.rows("impressions"))).astype(np.int64))
        ),
        "events_per_user": spread.of_counts(np.bincount(np.diff(log.event_start)[1:])),
        **_ids(log),
        "dense_features": _dense(log),
    }


text = describe_text.text
page = describe_page.page


def _not_applicable(log: event_log.EventLog) -> list[str]:
    out = []
    if not log.schema.time_exact:
        out.append(
            "Times are not exact: ranges, spans and days show the times as the log holds them, "
            "histories are cut by order, and no feature is a difference of times."
        )
    late = [f.name for f in log.schema.of("event") if f.derive]
    if late:
        out.append(
            f"Made when a batch is gathered, and not described: {', '.join(late)} of events."
        )
    if "birth" not in log.columns["items"]:
        out.append("Items have no birth, so that their age is not known.")
    if log.info.get("negatives"):
        out.append(
            "Negatives were sampled, so that label rates, candidates and how often an item was "
            "shown say how they were sampled, not what users saw."
        )
    return out


def _range(time: np.ndarray) -> dict[str, int | None]:
    parts = [time[part] for part in tally.chunks(len(time))]
    return {
        "first": min((int(x.min()) for x in parts), default=None),
        "last": max((int(x.max()) for x in parts), default=None),
    }


def _rows(log: event_log.EventLog, starts: np.ndarray) -> dict[str, Any]:
    """Counts of rows, the range of time, and the spans."""
    shown, happened = log.column("impressions", "time"), log.column("events", "time")
    span, n = log.column("impressions", "span"), len(shown)
    late = sum(
        int((happened[part] > shown[-1]).sum()) for part in tally.chunks(n and len(happened))
    )
    of_request, spans = np.bincount(span[starts], minlength=len(event_log.SPANS)), {}
    for k, name in enumerate(event_log.SPANS):
        rows = np.flatnonzero(span == k)  # in order of time
        spans[name] = {
            "impressions": len(rows),
            "requests": int(of_request[k]),
            "share": len(rows) / n if n else None,
            "first": int(shown[rows[0]]) if len(rows) else None,
            "last": int(shown[rows[-1]]) if len(rows) else None,
        }
    rows = {file: log.rows(file) - (file in ("users", "items")) for file in event_log.FILES}
    return {
        "rows": rows | {"requests": len(starts)},
        "time": {"impressions": _range(shown), "events": _range(happened)},
        "events_after_last_impression": late,
        "spans": spans,
    }


def _labels(log: event_log.EventLog) -> dict[str, Any]:
    """Label rates overall, by span and by day."""
    table, tasks = tally.days(log), {}
    by_day = table.drop("span").group_by("day").agg(pl.all().sum()).sort("day")
    for task in log.schema.tasks:
        names = [f"{task.name}.rows", f"{task.name}.positives"]
        spans = {name: table.filter(pl.col("span") == k) for k, name in enumerate(event_log.SPANS)}
        tasks[task.name] = {"weight": task.weight}
        for name, own in {"all": table, **spans}.items():
            rows, positives = (int(own[column].sum()) for column in names)
            rate = positives / rows if rows else None
            tasks[task.name][name] = {"rows": rows, "positives": positives, "rate": rate}
    shown = {}
    for k, name in enumerate(event_log.SPANS):
        own = table.filter(pl.col("span") == k).select("day", "impressions")
        own = by_day.select("day").join(own, on="day", how="left", maintain_order="left")
        shown[name] = own["impressions"].fill_null(0).to_list()
    of_task = {
        t.name: {x: by_day[f"{t.name}.{x}"].to_list() for x in ("rows", "positives")}
        for t in log.schema.tasks
    }
    days = [tally.date(day) for day in by_day["day"]]
    return {"tasks": tasks, "days": {"day": days, "spans": shown, "tasks": of_task}}


def _history(log: event_log.EventLog) -> dict[str, Any]:
    """Distributions of the number of events that an impression may read."""
    span, user = (log.column("impressions", name) for name in ("span", "user"))
    total = np.zeros((len(event_log.SPANS), 1), np.int64)
    for part in tally.chunks(len(span)):
        cut = samples.past_events(log, np.arange(part.start, part.stop))
        length = cut - log.event_start[user[part]]
        total = tally.grown(total, int(length.max()) + 1)
        for k in range(len(total)):
            total[k] += np.bincount(length[span[part] == k], minlength=total.shape[1])
    of = {name: spread.of_counts(total[k]) for k, name in enumerate(event_log.SPANS)}
    return {"all": spread.of_counts(total.sum(axis=0)), **of}


def _unseen(counts: np.ndarray) -> dict[str, float | None]:
    return dict(zip(event_log.SPANS[1:], tally.unseen(counts)))


def _missing(ids: np.ndarray) -> np.ndarray:
    """Whether an entry [E] or [E, M] holds no id: bool [E]."""
    return (ids.reshape(len(ids), -1) == 0).all(axis=1)


def _ids(log: event_log.EventLog) -> dict[str, Any]:
    """Users, items, id features and tables: what was met, and what of it train does not hold."""
    shown = {
        side: tally.by_span(log, log.column("impressions", side).__getitem__)
        for side in ("user", "item")
    }
    out: dict[str, Any] = {"id_features": []}
    for side, counts in shown.items():
        known = log.rows(f"{side}s") - 1
        met = int((counts.sum(axis=0)[1:] > 0).sum())
        out[f"{side}s"] = {"known": known, "shown": met, "never_shown": known - met}
        out[f"{side}s"]["unseen"] = _unseen(counts)
    acted = tally.count(log.rows("events"), log.column("events", "item").__getitem__)
    met = {t.name: np.zeros(1, bool) for t in log.schema.tables}
    for f in log.schema.features:
        if f.kind == "dense" or (f.side == "event" and f.derive):
            continue
        counts, missing = _counts(log, f, shown)
        in_tables = counts.sum(axis=0) > 0
        out["id_features"].append(
            {
                **{"name": f.name, "side": f.side, "kind": f.kind, "table": f.table},
                **{"rows": log.schema.table(f.table).rows, "derive": f.derive},
                "of": "events" if f.side == "event" else "impressions",
                "distinct": int(in_tables[1:].sum()),
                "missing": missing,
                "unseen": None if f.side == "event" else _unseen(counts),
            }
        )
        if f.side == "item":  # a history holds the features of its items too
            in_tables = _either(in_tables, tally.through(log.column("items", f.name), acted) > 0)
        met[f.table] = _either(met[f.table], in_tables)
    out["tables"] = [
        {"name": t.name, "rows": t.rows, "hashed": t.hashed, "distinct": int(met[t.name][1:].sum())}
        for t in log.schema.tables
    ]
    return out


def _either(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = max(len(a), len(b))
    return tally.grown(a, size) | tally.grown(b, size)


def _counts(
    log: event_log.EventLog, f: Feature, shown: dict[str, np.ndarray]
) -> tuple[np.ndarray, float | None]:
    """How often each id of a feature is met, int64 [3, V] by span ([1, V] over events), and the
    share of rows that hold none."""
    if f.side in shown:
        ids, rows = log.column(f"{f.side}s", f.name), shown[f.side].sum(axis=0)
        n, without = int(rows.sum()), int(rows[_missing(ids[: len(rows)])].sum())
        return tally.through(ids, shown[f.side]), without / n if n else None
    if f.side == "event":
        n, read = log.rows("events"), log.column("events", f.name).__getitem__
        counts = tally.count(n, read)[None]
    else:
        n, read = log.rows("impressions"), tally.values(log, f)
        counts = tally.by_span(log, read)
    without = sum(int(_missing(read(part)).sum()) for part in tally.chunks(n))
    return counts, without / n if n else None


def _dense(log: event_log.EventLog) -> list[dict[str, Any]]:
    """Dense features over the rows that hold them; row 0 of users and items is no value."""
    out = []
    for f in log.schema.features:
        if f.kind != "dense" or (f.side == "event" and f.derive):
            continue
        file = {"user": "users", "item": "items", "event": "events"}.get(f.side, "impressions")
        if f.derive:
            read, parts = tally.values(log, f), tally.chunks(log.rows(file))
            x = np.concatenate([np.empty(0, np.float32), *(read(part) for part in parts)])
        else:
            x = log.column(file, f.name)[file in ("users", "items") :]
        names = {"name": f.name, "side": f.side, "counter": f.counter, "derive": f.derive}
        out.append(names | {"of": file} | spread.of_values(x))
    return out
