"""From a chunk of values to rows of the log: ids, numbers, and the keys that sort them."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from rankjax.data import columns as log_columns
from rankjax.data.own import encoding, learning, plan, schema_file

LISTED = -(2**62)  # the clock of events that are known to lie before everything else
FEATURE = "x:"  # in front of a feature's name, so that it can be called like a key
EVENT_KEYS = ("user", "clock", "row", "place")
CLICK_KEYS = ("bucket", "time", "row")


def user_rows(
    schema: schema_file.ImportSchema, learned: learning.Learned, x: pl.Series
) -> np.ndarray:
    """int32 [n]: rows of the users file."""
    if schema.user.ids == "given":
        return x.to_numpy().astype(np.int32)
    return (encoding.place(learned.users, x) + 1).astype(np.int32)


def item_rows(
    schema: schema_file.ImportSchema, learned: learning.Learned, x: pl.Series
) -> np.ndarray:
    """int32 [n]: rows of the items file; null gives 0."""
    if schema.item.ids == "given":
        return x.fill_null(0).to_numpy().astype(np.int32)
    return (encoding.place(learned.items, x) + 1).astype(np.int32)


def counts(schema: schema_file.ImportSchema, learned: learning.Learned) -> dict[str, int]:
    """Rows of the users and the items file, the missing row 0 included."""
    of = {"users": (schema.user, learned.users), "items": (schema.item, learned.items)}
    return {k: x.rows if x.ids == "given" else len(ids) + 1 for k, (x, ids) in of.items()}


def feature(
    slot: plan.Slot, learned: learning.Learned, x: pl.Series
) -> tuple[np.ndarray, dict[str, int]]:
    """A slot's column of the log [n] or [n, M], and what was lost: {"missing", "cut"}."""
    spec = slot.input
    lost = {"missing": x.null_count(), "cut": 0}
    if spec.kind == "dense":
        return encoding.dense(x, spec, learned.dense[learning.dense_key(slot)]), lost
    if spec.kind == "id":
        return _ids(spec, learned, x), lost
    flat, slots, lost["cut"] = encoding.padded(x, spec.values)
    out = np.zeros(len(x) * spec.values, np.int32)
    out[slots] = _ids(spec, learned, flat)
    return out.reshape(len(x), spec.values), lost


def _ids(spec: schema_file.Input, learned: learning.Learned, x: pl.Series) -> np.ndarray:
    if spec.ids == "given":
        return x.cast(pl.Int64).fill_null(0).cast(pl.Int32).to_numpy()
    if spec.ids == "hash":
        return encoding.hash_ids(x if x.dtype == pl.Int64 else x.cast(pl.String), spec.rows)
    return encoding.vocabulary_ids(learned.words[spec.table], x)


def features(
    slots: Sequence[plan.Slot],
    side: str,
    part: plan.Part,
    frame: pl.DataFrame,
    learned: learning.Learned,
    lost: dict[str, dict[str, int]],
) -> list[pl.Series]:
    """Every stored feature of a side but the ids themselves; 0 where this part does not hold it.

    What was lost is added to `lost`.
    """
    stored = [s for s in slots if s.side == side and s.number is not None and not s.input.derive]
    mine = {s.name: s for s in stored if (s.table, s.number) == (part.table, part.number)}
    found = []
    for name, slot in {s.name: s for s in stored}.items():
        if name in mine:
            slot = mine[name]
            values, now = feature(slot, learned, frame[slot.column])
            total = lost.setdefault(f"{side}.{name}", dict.fromkeys(now, 0))
            for what, n in now.items():
                total[what] += n
        else:
            shape = (frame.height, slot.input.values) if slot.input.kind == "ids" else frame.height
            values = np.zeros(shape, np.float32 if slot.input.kind == "dense" else np.int32)
        found.append(pl.Series(FEATURE + name, values))
    return found


def _keys(part: plan.Part, frame: pl.DataFrame) -> dict[str, pl.Series]:
    """time, clock (what orders a user's past) and row, of a chunk with times."""
    clock = frame["order"] if "order" in frame.columns else frame["time"]
    return {"time": frame["time"], "clock": clock, "row": frame["row"] + (part.order << 40)}


def events(
    schema: schema_file.ImportSchema,
    part: plan.Part,
    frame: pl.DataFrame,
    learned: learning.Learned,
    slots: Sequence[plan.Slot],
    lost: dict[str, dict[str, int]],
) -> pl.DataFrame:
    """Rows of the events file, with the keys user, clock, row, place."""
    if part.spec.list:
        # An empty list is one row at place -1: it says that there was no past yet.
        n = pl.col("item").list.len()
        nothing, before = pl.lit([None], frame["item"].dtype), pl.lit([-1], pl.List(pl.Int32))
        place = pl.when(n == 0).then(before).otherwise(pl.int_ranges(n, dtype=pl.Int32))
        item = pl.when(n == 0).then(nothing).otherwise("item")
        frame = frame.with_columns(item=item, place=place).explode("item", "place")
        keys = {
            "time": pl.Series([LISTED]).new_from_index(0, frame.height),
            "clock": pl.Series([LISTED]).new_from_index(0, frame.height),
            "row": frame["row"] + (part.order << 40),
            "place": frame["place"],
        }
    else:
        keys = _keys(part, frame)
        keys["place"] = pl.Series([0], dtype=pl.Int32).new_from_index(0, frame.height)
    item = np.zeros(frame.height, np.int32)
    if part.spec.item:
        item = item_rows(schema, learned, frame["item"])
    columns = {"user": pl.Series(user_rows(schema, learned, frame["user"]))}
    columns |= {**keys, "item": pl.Series(item)}
    found = [x.alias(name) for name, x in columns.items()]
    return pl.DataFrame(found + features(slots, "event", part, frame, learned, lost))


def clicks(
    schema: schema_file.ImportSchema,
    part: plan.Part,
    frame: pl.DataFrame,
    learned: learning.Learned,
    slots: Sequence[plan.Slot],
    lost: dict[str, dict[str, int]],
    bucket: int,
) -> pl.DataFrame:
    """The events that become requests, with the keys bucket (of `bucket` seconds, within a span),
    time, row."""
    frame = frame.filter("click")
    span = learned.cuts.span(frame["time"].to_numpy(), None).astype(np.int64)
    columns = {
        # Never over the end of a span: a training request's negatives would be the test's items.
        "bucket": frame["time"] // bucket * len(log_columns.SPANS) + span,
        "time": frame["time"],
        "row": frame["row"] + (part.order << 40),
        "user": pl.Series(user_rows(schema, learned, frame["user"]), dtype=pl.Int32),
        "item": pl.Series(item_rows(schema, learned, frame["item"]), dtype=pl.Int32),
        "sampled": sampled(schema, frame["user"]),
    }
    found = [x.alias(name) for name, x in columns.items()]
    return pl.DataFrame(found + features(slots, "context", part, frame, learned, lost))


def sampled(schema: schema_file.ImportSchema, user: pl.Series) -> pl.Series:
    """bool [n]: whether a user is among `users_share`, told by the hash of the id."""
    if schema.users_share >= 1:
        return pl.Series([True]).new_from_index(0, len(user))
    below = np.uint64(int(schema.users_share * 2**64))
    return pl.Series(encoding.hash_64(user) < below)


def impressions(
    schema: schema_file.ImportSchema,
    part: plan.Part,
    frame: pl.DataFrame,
    learned: learning.Learned,
    slots: Sequence[plan.Slot],
    lost: dict[str, dict[str, int]],
) -> pl.DataFrame:
    """Rows of the impressions file, with what groups them: `group` int64 and `request`.

    request: the file's own, int64 or text, or the row (null: rows are grouped by user and time).
    group: what brings a request's rows together when sorted: the number, the hash of the text, the
    user, or, where nobody is named, the time. split: the span that the split column names, else 0.
    """
    frame = frame.filter(sampled(schema, frame["user"]))
    user = pl.Series(user_rows(schema, learned, frame["user"]))
    item = np.zeros(frame.height, np.int32)
    if part.spec.item:
        item = item_rows(schema, learned, frame["item"])
    keys = _keys(part, frame)
    if "request" in frame.columns:
        request = frame["request"]
        group = request
        if request.dtype != pl.Int64:
            group = pl.Series(encoding.hash_64(request).view(np.int64))
    elif part.spec.request == schema_file.ROW:
        request = group = keys["row"]
    else:
        request = pl.Series([None], dtype=pl.Int64).new_from_index(0, frame.height)
        # All rows of a group are held at once: those of the one user of a log without users are
        # too many, and without a gap the rows of one time suffice.
        group = user.cast(pl.Int64) if part.spec.user or part.spec.request_gap else keys["time"]
    split = learning.split_of(frame)
    span = learned.cuts.span(frame["time"].to_numpy(), split)
    named = np.zeros(frame.height, np.int8) if split is None else learned.cuts.named(split)
    position = pl.Series([0], dtype=pl.Int64).new_from_index(0, frame.height)
    columns = {
        "group": group,
        "request": request,
        **keys,
        "position": frame["position"] if "position" in frame.columns else position,
        "user": user,
        "item": pl.Series(item),
        "span": pl.Series(span, dtype=pl.Int8),
        "split": pl.Series(named, dtype=pl.Int8),
    }
    columns |= {f"label:{t}": frame[f"label:{t}"] for t in schema.tasks}
    found = [x.alias(name) for name, x in columns.items()]
    return pl.DataFrame(found + features(slots, "context", part, frame, learned, lost))
