"""Which impressions are one request, and the negatives of a log that holds clicks only."""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from rankjax.data.own import rows, runs, schema_file

TRIES = 20  # draws of a negative before it is given up
BUCKETS = {"hour": 3600, "day": 86_400}


def gathered(frame: pl.DataFrame, spec: schema_file.Impressions, own: bool) -> pl.DataFrame:
    """Rows sorted by `keys_of(spec)` with a request's time, clock and span on all of its rows.

    A request's time is that of its oldest row. Adds `key`, which sorts requests of one time: the
    file's number where `own`, else the first row.
    Raises ValueError where a request has two users, or rows that the split column parts.
    """
    gap = spec.request_gap or 0
    new = np.ones(frame.height, bool)
    if spec.request:
        new[1:] = ~frame["request"].eq_missing(frame["request"].shift(1)).to_numpy()[1:]
    else:
        user, time = frame["user"].to_numpy(), frame["time"].to_numpy()
        new[1:] = (user[1:] != user[:-1]) | (time[1:] - time[:-1] > gap)
    first = np.flatnonzero(new)[np.cumsum(new) - 1]
    for name, what in (("user", "users"), ("split", "values of the split column")):
        x = frame[name].to_numpy()
        if (x != x[first]).any():
            at = int(np.argmax(x != x[first]))
            when = f"at time {frame['time'][int(first[at])]}"
            which = repr(frame["request"][at]) if spec.request else when
            raise ValueError(
                f"[impressions]: found request {which} with two {what}, expected one (rows of one "
                "request share it)"
            )
    return frame.with_columns(
        frame["time"].gather(first),
        frame["clock"].gather(first),
        frame["span"].gather(first),
        (frame["request"] if own else frame["row"].gather(first)).alias("key"),
        (frame["time"] - frame["time"].gather(first)).alias("late"),
    )


def families(specs: Sequence[schema_file.Impressions]) -> list[tuple[int, ...]]:
    """Which [[impressions]] are gathered together: all whose requests a column names, the others
    each by itself."""
    named = tuple(i for i, x in enumerate(specs) if x.request not in ("", schema_file.ROW))
    return [*([named] if named else []), *((i,) for i in range(len(specs)) if i not in named)]


def own_numbers(specs: Sequence[schema_file.Impressions], paths: Sequence[pathlib.Path]) -> bool:
    """Whether the log keeps the files' request numbers (text and rows are numbered anew).

    paths: all runs of impressions.
    """
    if len(families(specs)[0]) < len(specs) or specs[0].request in ("", schema_file.ROW):
        return False
    return all(x["request"].dtype == pl.Int64 for x in map(runs.read, paths) if x.height)


def keys_of(spec: schema_file.Impressions) -> tuple[str, ...]:
    """What sorts the runs that are gathered."""
    if spec.request:
        return ("group", "request", "time", "row")
    return ("group", "time", "row")


def numbered(frames: Iterator[pl.DataFrame], own: bool) -> Iterator[pl.DataFrame]:
    """Adds `number`, int64: the file's own request numbers, or 1, 2, ... in the log's order."""
    done, last = 0, None
    for frame in frames:
        key = frame["key"].to_numpy()
        if own:
            yield frame.with_columns(pl.Series("number", key))
            continue
        new = np.ones(len(key), bool)
        new[1:] = key[1:] != key[:-1]
        new[0] = last is None or key[0] != last
        number = done + np.cumsum(new)
        done, last = int(number[-1]), key[-1]
        yield frame.with_columns(pl.Series("number", number))


def rule(spec: schema_file.Negatives) -> str:
    """The sentence that every report of such a log shows."""
    every = (
        "that the user clicks anywhere in the log" if spec.of is None else "of the user's events"
    )
    excluded = {
        "user": f"never an item {every} (so one of the user's own past is always the click)",
        "bucket": f"never an item that the user clicks in that {spec.within} and span",
    }[spec.exclude]
    return (
        f"The log holds clicks only: each is a request of the click and {spec.per_click} sampled "
        f"negatives, drawn from the clicks of the same {spec.within} and span (an item as often "
        f"as it is clicked there), {excluded}. Metrics compare clicks with these negatives, not "
        "with what was shown."
    )


def with_negatives(
    paths: Sequence[pathlib.Path],
    spec: schema_file.Negatives,
    pairs: np.ndarray,
    items: int,
    count: int,
) -> Iterator[tuple[pl.DataFrame, int]]:
    """(impressions in the log's order, negatives given up) from runs of clicks.

    The runs are sorted by bucket, time, row. pairs: sorted distinct user * items + item of all
    events, these clicks among them (exclude = "user"). A bucket's draws depend on the seed and the
    bucket alone.
    """
    number = 0
    for frame in runs.merged(paths, ("bucket", "time", "row"), count):
        bucket = frame["bucket"].to_numpy()
        starts = np.flatnonzero(np.diff(bucket, prepend=bucket[0] - 1))
        for start, end in zip(starts, np.append(starts[1:], len(bucket))):
            found, given_up = _bucket(frame.slice(start, end - start), spec, pairs, items, number)
            number += int(end - start)
            yield found, given_up


def _bucket(
    frame: pl.DataFrame, spec: schema_file.Negatives, pairs: np.ndarray, items: int, number: int
) -> tuple[pl.DataFrame, int]:
    """The impressions of one hour or day."""
    pool = frame["item"].to_numpy()
    rng = np.random.default_rng([spec.seed, int(frame["bucket"][0]) % 2**64])  # 1969 is negative
    frame = frame.with_columns(pl.Series("number", number + 1 + np.arange(frame.height)))
    frame = frame.filter("sampled")
    user, clicked = frame["user"].to_numpy().astype(np.int64), frame["item"].to_numpy()
    if spec.exclude == "bucket":
        pairs = np.unique(user * items + clicked)
    drawn = np.zeros((frame.height, spec.per_click), np.int32)
    open_ = np.ones(drawn.shape, bool)
    todo = np.arange(frame.height)
    for _ in range(TRIES):
        mine, redo = drawn[todo], open_[todo]
        mine[redo] = pool[rng.integers(0, len(pool), np.count_nonzero(redo))]
        redo = _member(pairs, user[todo, None] * items + mine)
        redo |= _repeats(mine)
        drawn[todo], open_[todo] = mine, redo
        todo = todo[redo.any(axis=1)]
    slots = np.concatenate([clicked[:, None], drawn], axis=1)
    keep = np.concatenate([np.ones((frame.height, 1), bool), ~open_], axis=1)
    shuffle = rng.permuted(np.tile(np.arange(slots.shape[1]), (frame.height, 1)), axis=1)
    slots, keep = (np.take_along_axis(x, shuffle, 1) for x in (slots, keep))
    row = np.repeat(np.arange(frame.height), keep.sum(axis=1))
    found = frame[row].with_columns(
        pl.Series("item", slots[keep]),
        pl.Series(f"label:{spec.task}", (shuffle == 0)[keep].astype(np.int8)),
    )
    return found, int(open_.sum())


def _member(pairs: np.ndarray, x: np.ndarray) -> np.ndarray:
    if not len(pairs):
        return np.zeros(x.shape, bool)
    at = np.minimum(np.searchsorted(pairs, x.ravel()), len(pairs) - 1)
    return (pairs[at] == x.ravel()).reshape(x.shape)


def _repeats(drawn: np.ndarray) -> np.ndarray:
    """bool [n, M]: the same item stands further left in its row."""
    order = np.argsort(drawn, axis=1, kind="stable")
    ordered = np.take_along_axis(drawn, order, 1)
    twice = np.zeros(drawn.shape, bool)
    twice[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    out = np.zeros(drawn.shape, bool)
    np.put_along_axis(out, order, twice, 1)
    return out


def log_columns(frame: pl.DataFrame, names: dict[str, tuple]) -> dict[str, np.ndarray]:
    """{column of the log: array} of a frame of rows; names as of columns.kinds.

    A feature or label stands in front of a key of the same name.
    """
    found = {}
    for name, (dtype, _) in names.items():
        plain = "number" if name == "request" else name
        options = (rows.FEATURE + name, f"label:{name}", plain)
        values = frame[next(x for x in options if x in frame.columns)].to_numpy()
        found[name] = np.ascontiguousarray(values.astype(dtype, copy=False))
    return found
