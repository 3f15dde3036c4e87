"""Checks of what a model reads: inputs that tell the label, ids that were never trained."""

from collections.abc import Iterator

import numpy as np

from rankjax.data import event_log, finding, tally
from rankjax.data.finding import Finding
from rankjax.schema import Feature, Task

# An honest model over all inputs reaches .6 to .9: one input alone at .95 was made of the label.
AUC = 0.95
FEWEST = 20  # positives, and negatives, below which chance reaches such an AUC
# One pseudo-impression at the base rate, so that an id met once does not stand above a sure one.
PRIOR = 1.0
# Of ids with fewer values (surfaces, devices) a new one is a launch, not a renumbering.
FEWEST_VALUES = 10
# New users and items are normal, a span where most are new tests what was never trained.
UNSEEN_SHARE = 0.5

Way = tuple[str, float]  # how a feature was read, and its AUC


def feature_predicts_label(log: event_log.EventLog) -> list[Finding]:
    """Single inputs whose AUC on the train span no honest input reaches.

    A dense feature is read as it is, and as "is 0". An id is read through label rates per value,
    learned on the older half of the span and applied to the newer, and as "is missing". Features
    of events are history and have no label.
    """
    out = []
    for task in log.schema.tasks:
        for side, file in (("user", "users"), ("item", "items")):
            counts = tally.by_label(log, task, log.column("impressions", side).__getitem__)
            for f in log.schema.of(side):
                column = log.column(file, f.name)[: counts.shape[-1]]
                ways = (_dense_ways if f.kind == "dense" else _id_ways)(column, counts)
                out += _told(task, f, file, ways)
        for f in log.schema.of("context"):
            out += _told(task, f, "impressions", _row_ways(log, task, f))
    return out


def _told(task: Task, f: Feature, file: str, ways: list[Way]) -> list[Finding]:
    """The feature's finding, if any of its ways rings; the most telling way is the evidence."""
    rings = [(how, auc) for how, auc in ways if auc >= AUC or auc <= 1 - AUC]
    if not rings:
        return []
    how, auc = max(rings, key=lambda way: abs(way[1] - 0.5))
    where = f'log.json, derived feature "{f.name}"' if f.derive else finding.place(file, f.name)
    kind = "counter" if f.counter else f"{f.side} feature"
    advice = (
        "it counts what happened at or after the request: count only what is strictly before"
        if f.counter
        else "it was made of the label, or after it: leave it out, or take its value from before "
        "the request"
    )
    return [
        Finding(
            kind="feature_predicts_label",
            severity="error",
            where=where,
            evidence=f"this {kind} alone, {how}, has AUC {auc:.4f} for {task.name!r} on the train "
            f"span (expected between {1 - AUC:.2f} and {AUC:.2f})",
            advice=advice,
        )
    ]


def _enough(positives: np.ndarray, negatives: np.ndarray) -> bool:
    return min(positives.sum(), negatives.sum()) >= FEWEST


def _dense_ways(values: np.ndarray, counts: np.ndarray) -> list[Way]:
    """Ways of a dense feature [E] of entities with counts [2, 2, E]."""
    q, p = counts.sum(axis=0)
    if not _enough(p, q):
        return []
    return [
        ("as it is", tally.auc(values, p, q)),
        ("by whether it is 0", tally.auc(values == 0, p, q)),
    ]


def _rates(counts: np.ndarray) -> np.ndarray:
    """Label rates by value from the older half, drawn to the base rate: float64 [V]."""
    q, p = counts[0]
    base = p.sum() / max(p.sum() + q.sum(), 1)
    return (p + PRIOR * base) / (p + q + PRIOR)


def _scores(ids: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Mean rate of the used ids of each entry [E] or [E, M]; the rate of 0 where none is used."""
    ids = ids.reshape(len(ids), -1)
    used = ids > 0
    used[:, 0] |= ~used.any(axis=1)
    return (rates[ids] * used).sum(axis=1) / used.sum(axis=1)


def _missing(ids: np.ndarray) -> np.ndarray:
    return (ids.reshape(len(ids), -1) == 0).all(axis=1)


def _id_ways(ids: np.ndarray, counts: np.ndarray) -> list[Way]:
    """Ways of an id feature [E] or [E, M] of entities with counts [2, 2, E]."""
    q, p = counts[1]
    both = counts.sum(axis=0)
    out = []
    if _enough(p, q):
        scores = _scores(ids, _rates(tally.through(ids, counts)))
        out.append(("by its values' label rates", tally.auc(scores, p, q)))
    if _enough(*both):
        out.append(("by whether it is missing", tally.auc(_missing(ids), both[1], both[0])))
    return out


def _row_ways(log: event_log.EventLog, task: Task, f: Feature) -> list[Way]:
    """Ways of a context feature."""
    read = tally.values(log, f)
    if f.kind == "dense":
        return _dense_row_ways(log, task, read)
    counts = tally.by_label(log, task, read)
    if f.kind == "id":
        return _id_ways(np.arange(counts.shape[-1]), counts)
    return _ids_row_ways(log, task, read, _rates(counts))


def _rows(
    log: event_log.EventLog, task: Task, read: tally.Values
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Chunk by chunk what `read` gives, the label and "newer" of rows that train and count."""
    for part, train, newer in tally.train_rows(log):
        label, counts = (flag[train] for flag in tally.labels(log, task, part))
        yield read(part)[train][counts], label[counts], newer[counts]


def _dense_row_ways(log: event_log.EventLog, task: Task, read: tally.Values) -> list[Way]:
    """Sorts the values of those features only that a histogram does not acquit."""
    coarse, zeros = np.zeros((2, tally.BINS), np.int64), np.zeros((2, 2), np.int64)
    for x, label, _ in _rows(log, task, read):
        coarse += tally.histogram(x, label)
        zeros += np.bincount(2 * label + (x == 0), minlength=4).reshape(2, 2)
    q, p = zeros
    if not _enough(p, q):
        return []
    out = [("by whether it is 0", tally.auc(np.arange(2), p, q))]
    low, high = tally.auc_range(coarse)
    if low <= 1 - AUC or high >= AUC:
        x, label, _ = (np.concatenate(parts) for parts in zip(*_rows(log, task, read)))
        out.insert(0, ("as it is", tally.auc_rows(x, label)))
    return out


def _ids_row_ways(
    log: event_log.EventLog, task: Task, read: tally.Values, rates: np.ndarray
) -> list[Way]:
    scores = lambda part: np.column_stack([_scores(read(part), rates), _missing(read(part))])
    out, found = [], list(_rows(log, task, lambda part: scores(part).astype(np.float32)))
    if found:
        x, label, newer = (np.concatenate(parts) for parts in zip(*found))
        if _enough(label[newer], ~label[newer]):
            auc = tally.auc_rows(x[newer, 0].copy(), label[newer])
            out.append(("by its values' label rates", auc))
        if _enough(label, ~label):
            out.append(("by whether it is missing", tally.auc_rows(x[:, 1].copy(), label)))
    return out


def unseen_in_evaluation(log: event_log.EventLog) -> list[Finding]:
    """Users, items and id features most of whose values in a later span are new to train.

    A feature that repeats the user's or item's own number is told with the user or item.
    """
    out = []
    for side, file in (("user", "users"), ("item", "items")):
        counts = tally.by_span(log, log.column("impressions", side).__getitem__)
        columns = [(finding.place("impressions", side), counts)]
        for f in log.schema.of(side):
            ids = log.column(file, f.name)
            if f.kind != "dense" and not _numbers(ids, counts.shape[-1]):
                columns.append((finding.place(file, f.name), tally.through(ids, counts)))
        out += [x for where, of_span in columns for x in _new(where, of_span)]
    for f in log.schema.of("context"):
        if f.kind != "dense" and not f.derive:
            counts = tally.by_span(log, tally.values(log, f))
            out += _new(finding.place("impressions", f.name), counts)
    return out


def _numbers(ids: np.ndarray, size: int) -> bool:
    """Whether the column's first `size` rows hold their own numbers."""
    return ids.ndim == 1 and bool((ids[:size] == np.arange(min(size, len(ids)))).all())


def _new(where: str, counts: np.ndarray) -> list[Finding]:
    """The finding of one column with counts [3, V] by span, if there is one."""
    if np.count_nonzero(counts[:, 1:].sum(axis=0)) < FEWEST_VALUES or not counts[0].sum():
        return []
    shares = dict(zip(event_log.SPANS[1:], tally.unseen(counts)))
    high = {span: share for span, share in shares.items() if (share or 0) > UNSEEN_SHARE}
    if not high:
        return []
    words = " and ".join(f"{100 * share:.1f}% in {span}" for span, share in high.items())
    return [
        Finding(
            kind="unseen_in_evaluation",
            severity="warning",
            where=where,
            evidence=f"of the ids {words} stand in no impression of train",
            advice="such ids are met in the future only and were never trained: number ids over "
            "the whole log in one way, or, where most are truly new, give features that carry over",
        )
    ]
