"""Checks of rows and requests: rows twice, spans that mix, places that tell, one class."""

import numpy as np

from rankjax.data import event_log, finding, tally
from rankjax.data.finding import Finding
from rankjax.schema import Task

# Fewer than one row in a thousand twice is a retry here and there, which no metric notices.
DUPLICATE_SHARE = 1e-3
DUPLICATE_ERROR = 1e-2
# Readers prefer upper places, which moves the AUC by .1 or .2; beyond this the place is the label.
PLACE_AUC = 0.8
PLACE_SHARE = 0.99  # of the positives at one place; a few rows may be wrong
FEWEST_REQUESTS = 200  # with both classes: the mean AUC's standard error is about .02
PLACES = 5  # whose rates the evidence tells
PLACE_WORDS = ("position", "rank", "slot")


def duplicated_impressions(log: event_log.EventLog) -> list[Finding]:
    """Rows that repeat another's request and item, or its user, item and time (and order)."""
    names = ("user", "item", "time", *(() if log.schema.time_exact else ("order",)))
    repeats, example = np.zeros(log.rows("impressions"), bool), None
    for keys in (("request", "item"), names):
        columns = [log.column("impressions", name) for name in keys]
        order = np.lexsort(columns)
        same = np.ones(max(len(order) - 1, 0), bool)
        for column in columns:
            x = column[order]
            same &= x[1:] == x[:-1]
        at = np.flatnonzero(same)
        repeats[order[at + 1]] = True
        if len(at) and example is None:
            example = int(order[at[0]]), int(order[at[0] + 1]), keys
    count = int(repeats.sum())
    if count < DUPLICATE_SHARE * len(repeats) or not count:
        return []
    first, second, keys = example
    return [
        Finding(
            kind="duplicated_impressions",
            severity="error" if count >= DUPLICATE_ERROR * len(repeats) else "warning",
            where=finding.place("impressions", *keys),
            evidence=f"{finding.of(count, len(repeats), 'impressions')} repeat another one; rows "
            f"{first} and {second} have the same {', '.join(keys)}",
            advice="keep one row of each; copies weigh a row twice, and on both sides of a cut "
            "they show the test to the training",
        )
    ]


def split_shares_requests(log: event_log.EventLog) -> list[Finding]:
    """Requests that stand in two spans, and spans that overlap in time."""
    span, request, time = (log.column("impressions", name) for name in ("span", "request", "time"))
    of = [np.unique(request[span == k]) for k in range(len(event_log.SPANS))]
    first = [int(time[np.argmax(span == k)]) if len(of[k]) else None for k in range(len(of))]
    out = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        earlier, later = event_log.SPANS[a], event_log.SPANS[b]
        shared = np.intersect1d(of[a], of[b], assume_unique=True)
        if len(shared):
            out.append(
                Finding(
                    kind="split_shares_requests",
                    severity="error",
                    where=finding.place("impressions", "request", "span"),
                    evidence=f"{finding.of(len(shared), len(of[b]), f'requests of {later}')} stand "
                    f"in {earlier} too, for instance request {shared[0]}",
                    advice="cut by time, and whole requests at once",
                )
            )
        if first[b] is None:
            continue
        late = int(np.count_nonzero((span == a) & (time > first[b])))
        if late:
            rows = int(np.count_nonzero(span == a))
            out.append(
                Finding(
                    kind="split_shares_requests",
                    severity="warning",
                    where=finding.place("impressions", "time", "span"),
                    evidence=f"{finding.of(late, rows, f'impressions of {earlier}')} are later "
                    f"than the first one of {later}",
                    advice="cut by time: what is learned of the future helps on the test",
                )
            )
    return out


def position_encodes_click(log: event_log.EventLog) -> list[Finding]:
    """Labels that follow, within requests, from the row's place or from a stored position."""
    starts, out = tally.request_starts(log), []
    for task in log.schema.tasks:
        auc, requests, shown, clicked = _within(log, task, starts, None)
        if requests < FEWEST_REQUESTS:
            continue
        at = int(np.argmax(clicked))
        alone = clicked[at] >= PLACE_SHARE * clicked.sum()
        if alone or not 1 - PLACE_AUC < auc < PLACE_AUC:
            rates = ", ".join(f"{y / n:.3g}" for n, y in zip(shown[:PLACES], clicked[:PLACES]))
            out.append(
                Finding(
                    kind="position_encodes_click",
                    severity="error" if alone else "warning",
                    where=f"{finding.place('impressions', task.name)}, rows of a request",
                    evidence=f"the row's place has AUC {auc:.3f} within {requests:,} requests with "
                    f"both classes; rates at places 1, 2, ..: {rates}; place {at + 1} holds "
                    f"{finding.of(int(clicked[at]), int(clicked.sum()), 'positives')}",
                    advice="order the rows of a request by what was known when it was shown, or "
                    "shuffle them",
                )
            )
        out += _stored(log, task, starts)
    return out


def _stored(log: event_log.EventLog, task: Task, starts: np.ndarray) -> list[Finding]:
    """Features named like a position whose AUC within requests is too far from one half."""
    out = []
    for f in log.schema.of("item", "context"):
        if f.derive or f.kind == "ids" or not any(w in f.name.lower() for w in PLACE_WORDS):
            continue
        file = "items" if f.side == "item" else "impressions"
        column, item = log.column(file, f.name), log.column("impressions", "item")
        read = lambda part: column[item[part]] if file == "items" else column[part]  # noqa: B023
        auc, requests, _, _ = _within(log, task, starts, read)
        if requests >= FEWEST_REQUESTS and not 1 - PLACE_AUC < auc < PLACE_AUC:
            out.append(
                Finding(
                    kind="position_encodes_click",
                    severity="error",
                    where=finding.place(file, f.name),
                    evidence=f"AUC {auc:.3f} for {task.name!r} within {requests:,} requests with "
                    f"both classes (expected between {1 - PLACE_AUC:.1f} and {PLACE_AUC:.1f})",
                    advice="leave it out unless it is the place on the screen, known before the "
                    "click: lists are often stored with the clicked item first",
                )
            )
    return out


def _within(
    log: event_log.EventLog, task: Task, starts: np.ndarray, read: tally.Values | None
) -> tuple[float, int, np.ndarray, np.ndarray]:
    """Mean AUC within the requests that hold both classes, of `read` or else of the row's place.

    Returns it, the number of these requests, and their rows and positives by place, int64 [places].
    """
    n, total, requests = log.rows("impressions"), 0.0, 0
    by_place = np.zeros((2, 1), np.int64)
    for part in tally.request_chunks(starts, n):
        own = starts[slice(*np.searchsorted(starts, (part.start, part.stop)))]
        sizes = np.diff(np.append(own, part.stop))
        group = np.repeat(np.arange(len(own)), sizes)
        place = np.arange(part.start, part.stop) - np.repeat(own, sizes)
        label, counts = tally.labels(log, task, part)
        x = place if read is None else read(part)
        auc = _grouped_auc(x, group, label & counts, ~label & counts)
        both = ~np.isnan(auc)
        total += float(auc[both].sum())
        requests += int(both.sum())
        keep = both[group] & counts
        by_place = tally.grown(by_place, int(sizes.max()))
        for k, rows in enumerate((keep, keep & label)):
            by_place[k] += np.bincount(place[rows], minlength=by_place.shape[1])
    return total / max(requests, 1), requests, by_place[0], by_place[1]


def _grouped_auc(
    x: np.ndarray, group: np.ndarray, positive: np.ndarray, negative: np.ndarray
) -> np.ndarray:
    """AUC of x [n] within groups 0 .. G - 1 of sorted `group`, float64 [G]; NaN without both."""
    order = np.lexsort((x, group))
    x, p, q = x[order], positive[order].astype(np.int64), negative[order].astype(np.int64)
    # entries of a group with equal x form a block, within which order is a draw
    block = np.flatnonzero(np.append(True, (x[1:] != x[:-1]) | (group[1:] != group[:-1])))
    of = group[block]
    p, q = np.add.reduceat(p, block), np.add.reduceat(q, block)
    P, Q = (np.bincount(of, weights=w) for w in (p, q))
    below = np.cumsum(q) - q - (np.cumsum(Q) - Q)[of]
    pairs = np.bincount(of, weights=p * (below + q / 2))
    return np.divide(pairs, P * Q, out=np.full(len(P), np.nan), where=P * Q > 0)


def one_class(log: event_log.EventLog) -> list[Finding]:
    """Spans without a positive or without a negative label, or without any impression."""
    table, out = tally.days(log), []
    for task in log.schema.tasks:
        for k, name in enumerate(event_log.SPANS):
            own = table.filter(table["span"] == k)
            rows, positives = own[f"{task.name}.rows"].sum(), own[f"{task.name}.positives"].sum()
            if 0 < positives < rows:
                continue
            out.append(
                Finding(
                    kind="one_class",
                    severity="error",
                    where=finding.place("impressions", task.name),
                    evidence=f"span {name!r}: {positives:,} positives among {rows:,} impressions "
                    "that count",
                    advice="cut the spans elsewhere, or leave the task out: entropy and AUC are "
                    "undefined there",
                )
            )
    return out


def no_request_with_both(log: event_log.EventLog) -> list[Finding]:
    """Tasks of which no request holds a positive and a negative label."""
    starts, n, out = tally.request_starts(log), log.rows("impressions"), []
    for task in log.schema.tasks:
        both = 0
        for part in tally.request_chunks(starts, n):
            own = starts[slice(*np.searchsorted(starts, (part.start, part.stop)))] - part.start
            label, counts = tally.labels(log, task, part)
            flags = [np.logical_or.reduceat(y & counts, own) for y in (label, ~label)]
            both += int((flags[0] & flags[1]).sum())
        if not both:
            out.append(
                Finding(
                    kind="no_request_with_both",
                    severity="warning",
                    where=finding.place("impressions", "request", task.name),
                    evidence=f"none of {len(starts):,} requests holds both classes of "
                    f"{task.name!r}",
                    advice="read no metric within requests (AUC, MRR, nDCG): they are undefined",
                )
            )
    return out
