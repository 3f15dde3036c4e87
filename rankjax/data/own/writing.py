"""Stage write of an import: the sorted chunks merged, in ranges of their keys, into the log.

Users and items come from what was learned and from their catalogues; events lie by user and clock;
impressions are gathered into requests, or made of clicks and sampled negatives.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from rankjax.data import columns, event_log, samples
from rankjax.data import engine as engine_lib
from rankjax.data import shards as shards_lib
from rankjax.data.own import learning, plan, requests, rows, runs, schema_file
from rankjax.schema import Schema

ASKED_KEYS = ("time", "key", "position", "row")
NEVER = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True)
class Job:
    """What the stages share; `work` holds what they leave for each other."""

    schema: schema_file.ImportSchema
    log_schema: Schema | None  # known once the vocabularies are
    parts: tuple[plan.Part, ...]
    slots: tuple[plan.Slot, ...]
    work: pathlib.Path
    chunk: int

    def paths(self, part: plan.Part) -> list[pathlib.Path]:
        """Of the chunks that stage read left of a part."""
        return sorted(self.work.glob(f"read.{part.tag}.*.arrow"))

    def chunks(self, part: plan.Part) -> Iterator[pl.DataFrame]:
        return map(runs.read, self.paths(part))


def write(
    job: Job,
    learned: learning.Learned,
    target: pathlib.Path,
    made_of: dict[str, Any],
    info: dict[str, Any],
    shards: int | None = None,
    engine: engine_lib.Engine = engine_lib.here,
) -> None:
    """Writes the whole log into `target`; `info` and the schema's own go into the log's.

    Raises ValueError: a request has two users or two spans, a span is left without impressions, or
    more shards than users.
    """
    schema = job.schema
    found = {**schema.info, "name": schema.name, **info}
    notes = list(schema.info.get("notes", ()))
    starts = shards_lib.starts(rows.counts(schema, learned)["users"], shards)
    with event_log.LogWriter(target, job.log_schema, made_of, starts) as log:
        for file in ("users", "items"):
            log.append(file, _catalogue(job, learned, file, found))
        past = _events(job, learned, log, found)
        if schema.negatives is None:
            shown = _impressions(job, log, past, found, engine)
        else:
            notes.append(requests.rule(schema.negatives))
            shown = _sampled(job, learned, log, past, found)
            said = dataclasses.asdict(schema.negatives)
            found["negatives"] = said | {"features": None, "of": None}
        if not shown.all():
            spans = dict(zip(columns.SPANS, shown.tolist()))
            raise ValueError(
                f"[impressions]: found {spans} rows to write (users_share = {schema.users_share}), "
                "expected some in each span"
            )
        if schema.users_share < 1:
            notes.append(
                f"Only impressions of {schema.users_share:.4g} of the users, chosen by the hash of "
                "their ids, became samples; events, vocabularies and negatives are of all users."
            )
            if schema.counters is not None and schema.negatives is None:
                notes.append("Counters count the impressions of these users only.")
        log.finish(**found | {"notes": notes})


def _catalogue(
    job: Job, learned: learning.Learned, file: str, info: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The users or the items file: row 0 missing, then one row an id."""
    schema, n = job.schema, rows.counts(job.schema, learned)[file]
    side = file.removesuffix("s")
    known = getattr(learned, file)
    row_of = rows.user_rows if file == "users" else rows.item_rows
    kinds = columns.kinds(file, job.log_schema)
    found = {name: np.zeros((n, *shape), dtype) for name, (dtype, shape) in kinds.items()}
    for own in (s for s in job.slots if s.number is None and s.side == side):
        found[side][row_of(schema, learned, known)] = rows.feature(own, learned, known)[0]
    filled, birth = np.zeros(n, bool), np.full(n, rows.LISTED)
    lost: dict[str, dict[str, int]] = {}
    parts = [p for p in job.parts if p.table == file]
    for part in parts:
        for frame in job.chunks(part):
            at = row_of(schema, learned, frame["id"])
            filled[at] = True
            for x in rows.features(job.slots, side, part, frame, learned, lost):
                found[x.name.removeprefix(rows.FEATURE)][at] = x.to_numpy()
            if part.spec.birth:
                birth[at] = frame["birth"].fill_null(rows.LISTED).to_numpy()
    if parts:
        used = np.zeros(n, bool)
        used[row_of(schema, learned, known)] = True
        info[f"{file}_without_a_row"] = int(np.count_nonzero(used & ~filled))
        info["lost"] = info["lost"] | {name: x for name, x in lost.items() if any(x.values())}
        if parts[0].spec.birth:
            unknown = birth == rows.LISTED
            info["items_without_birth"] = int(np.count_nonzero(used & unknown))
            birth[unknown] = 0 if unknown.all() else birth[~unknown].min()
            birth[0] = 0
            found["birth"] = birth
    return found


@dataclasses.dataclass(frozen=True)
class Past:
    """What impressions need of the events: where each user's lie and, by order, their clocks; the
    sorted pairs user * items + item of all events, for negatives."""

    start: np.ndarray
    clock: np.ndarray
    pairs: np.ndarray


def _events(
    job: Job, learned: learning.Learned, log: event_log.LogWriter, info: dict[str, Any]
) -> Past:
    """Writes the events file."""
    exact = job.log_schema.time_exact
    names = columns.kinds("events", job.log_schema)
    sizes = rows.counts(job.schema, learned)
    first = None if exact else _first_times(job, sizes["users"])
    counted = np.zeros(sizes["users"] + 1, np.int64)
    clocks, pairs = job.work / "clock.raw", job.work / "pairs.raw"
    exclude = job.schema.negatives is not None and job.schema.negatives.exclude == "user"
    paths = sorted(job.work.glob("past.*.arrow"))
    with clocks.open("wb") as clock_file, pairs.open("wb") as pair_file:
        for frame in runs.merged(paths, rows.EVENT_KEYS, job.chunk):
            if not exact:
                frame, longer = _in_order(frame, first)
                info["longer_lists"] = info.get("longer_lists", 0) + longer
                frame["clock"].to_numpy().tofile(clock_file)
            user = frame["user"].to_numpy()
            counted += np.bincount(user + 1, minlength=len(counted))
            log.append("events", requests.log_columns(frame, names))
            if exclude:
                both = user.astype(np.int64) * sizes["items"] + frame["item"].to_numpy()
                np.unique(both).tofile(pair_file)
    return Past(np.cumsum(counted), _mapped(clocks), _mapped(pairs))


def _mapped(path: pathlib.Path) -> np.ndarray:
    return np.memmap(path, np.int64, "r") if path.stat().st_size else np.empty(0, np.int64)


def _first_times(job: Job, users: int) -> np.ndarray:
    """int64 [users]: each user's first impression; of users without one the log's."""
    first = np.full(users, NEVER)
    for path in sorted(job.work.glob("shown.*.arrow")):
        frame = runs.read(path)
        np.minimum.at(first, frame["user"].to_numpy(), frame["time"].to_numpy())
    return np.where(first == NEVER, first.min(), first)


def _in_order(frame: pl.DataFrame, first: np.ndarray) -> tuple[pl.DataFrame, int]:
    """Whole users' events where only the order is known, and how many lists were too long.

    Of lists each user's shortest is kept, times that cannot be known become the user's first
    impression's, and `order` counts.

    A longer list of the same user holds what came after the shortest, so it is no past of all of
    the user's impressions.
    """
    listed = pl.col("clock") == rows.LISTED
    lists = (
        frame.filter(listed).group_by("user", "row").agg((pl.col("place") >= 0).sum().alias("n"))
    )
    best = lists.sort("n", "row").unique("user", keep="first", maintain_order=True)
    longer = lists.join(best, on="user").filter(pl.col("n") > pl.col("n_right")).height
    frame = frame.join(
        best.select("user", best="row"), on="user", how="left", maintain_order="left"
    ).filter(~listed | ((pl.col("row") == pl.col("best")) & (pl.col("place") >= 0)))
    user = frame["user"].to_numpy()
    time = np.where(frame["time"] == rows.LISTED, first[user], frame["time"])
    order = pl.int_range(pl.len(), dtype=pl.Int32).over("user")
    return frame.with_columns(pl.Series("time", time), order.alias("order")), longer


def _impressions(
    job: Job, log: event_log.LogWriter, past: Past, info: dict[str, Any], engine: engine_lib.Engine
) -> np.ndarray:
    """Writes the impressions file; returns its rows in each span.

    info["request_spread"]: seconds from a request's time, its oldest row's, to its newest row's, of
    the request where they are most. Counters must know: rows of it were shown so much later. What
    the schema says of it (an exported log's rows have their request's time already) counts too.
    """
    specs = job.schema.impressions
    info["request_spread"] = info.get("request_spread", 0)
    own = requests.own_numbers(specs, sorted(job.work.glob("shown.*.arrow")))
    pieces = [
        (family, k, low, last)
        for family in requests.families(specs)
        for k, (low, last) in enumerate(
            runs.ranges(_shown(job, family), requests.keys_of(specs[family[0]]), job.chunk)
        )
    ]
    for late in engine(functools.partial(_gather, job, own), pieces):
        info["request_spread"] = max(info["request_spread"], late)
    paths = sorted(job.work.glob("asked.*.arrow"))
    names = columns.kinds("impressions", job.log_schema)
    shown = np.zeros(len(columns.SPANS), np.int64)
    for frame in requests.numbered(runs.merged(paths, ASKED_KEYS, job.chunk), own):
        if not job.log_schema.time_exact:
            user, clock = frame["user"].to_numpy(), frame["clock"].to_numpy()
            before = samples.count_before(past.clock, past.start[user], past.start[user + 1], clock)
            order = pl.Series("order", (before - past.start[user]).astype(np.int32))
            frame = frame.with_columns(order)
        log.append("impressions", requests.log_columns(frame, names))
        shown += np.bincount(frame["span"].to_numpy(), minlength=len(shown))
    return shown


def _shown(job: Job, family: tuple[int, ...]) -> list[pathlib.Path]:
    return [p for i in family for p in sorted(job.work.glob(f"shown.{i}.*.arrow"))]


def _gather(job: Job, own: bool, piece: tuple[tuple[int, ...], int, int | None, int]) -> int:
    """Requests put together: the rows of a family with keys in a range, as a run.

    Returns the most seconds from a request's time to a row of it.
    """
    family, number, low, last = piece
    spec = job.schema.impressions[family[0]]
    rows_ = runs.between(_shown(job, family), requests.keys_of(spec), low, last)
    frame = requests.gathered(rows_, spec, own)
    path = job.work / f"asked.{family[0]}.{number:06d}.arrow"
    runs.write_run(path, frame.drop("request", "late"), ASKED_KEYS)
    return int(frame["late"].max() or 0)


def _sampled(
    job: Job,
    learned: learning.Learned,
    log: event_log.LogWriter,
    past: Past,
    info: dict[str, Any],
) -> np.ndarray:
    """Writes the impressions of a log of clicks; returns their number in each span."""
    names = columns.kinds("impressions", job.log_schema)
    items = rows.counts(job.schema, learned)["items"]
    paths = sorted(job.work.glob("click.*.arrow"))
    shown, info["negatives_given_up"] = np.zeros(len(columns.SPANS), np.int64), 0
    for frame, given_up in requests.with_negatives(
        paths, job.schema.negatives, past.pairs, items, job.chunk
    ):
        span = learned.cuts.span(frame["time"].to_numpy(), None)
        frame = frame.with_columns(pl.Series("span", span, dtype=pl.Int8))
        log.append("impressions", requests.log_columns(frame, names))
        shown += np.bincount(span, minlength=len(shown))
        info["negatives_given_up"] += given_up
    return shown
