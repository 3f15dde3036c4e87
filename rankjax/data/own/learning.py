"""What an import learns before it writes: who and what there is, where the spans end, which ids are
known, and what dense features are scaled by.

Two passes over the chunks that `importer` read: first the users, the items and how many
impressions lie at which time; then, on the training span alone, vocabularies and moments.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import polars as pl

from rankjax.data.own import encoding, plan, runs, schema_file

T = TypeVar("T", pl.Series, pl.DataFrame)
Chunks = Callable[[plan.Part], Iterator[pl.DataFrame]]


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Where the spans end. Train: time <= train, validation: time <= validation, else test.

    values: a split column's {value as text: 0 train, 1 validation, 2 test}; then `train` only cuts
    the validation off the train value's rows (time > train), and events.
    """

    train: int
    validation: int
    values: dict[str, int] | None = None

    def span(self, time: np.ndarray, split: pl.Series | None) -> np.ndarray:
        """int8 [n] of impressions."""
        if split is None or self.values is None:
            return ((time > self.train).astype(np.int8) + (time > self.validation)).astype(np.int8)
        code = self.named(split)
        return np.where((code == 0) & (time > self.train), np.int8(1), code)

    def named(self, split: pl.Series) -> np.ndarray:
        """int8 [n]: the span that each value of the split column names."""
        values = self.values or {}
        return split.cast(pl.String).replace_strict(values, return_dtype=pl.Int8).to_numpy()


@dataclasses.dataclass(frozen=True)
class Learned:
    """users, items: their ids as written, sorted; row i + 1 of the log is value i. words: the known
    values of each table. dense: what each dense feature's column learned."""

    users: pl.Series
    items: pl.Series
    cuts: Cuts
    words: dict[str, pl.Series]
    dense: dict[str, dict[str, list[float]]]


def dense_key(slot: plan.Slot) -> str:
    """Features of one name and side learn together, whatever files they stand in."""
    return f"{slot.side}.{slot.name}"


def learn(
    schema: schema_file.ImportSchema,
    parts: Sequence[plan.Part],
    chunks: Chunks,
    folder: pathlib.Path,
) -> Learned:
    """Both passes; what is in `folder` already is read instead. Raises ValueError as they do."""
    done = folder / "learned.json"
    if not done.exists():
        users, items, times = _first_pass(schema, parts, chunks)
        cuts = cut(schema, times)
        words, dense = _second_pass(schema, parts, chunks, cuts)
        tables = {"users": users, "items": items, **{f"words.{k}": w for k, w in words.items()}}
        for number, x in enumerate(tables.values()):
            runs.write(folder / f"learned.{number:04d}.arrow", pl.DataFrame({"x": x}))
        text = {"tables": list(tables), "cuts": dataclasses.asdict(cuts), "dense": dense}
        partial = folder / ".learned.json"
        partial.write_text(json.dumps(text))
        partial.rename(done)
    return load(folder)


def load(folder: pathlib.Path) -> Learned:
    """What `learn` left in a folder, mapped."""
    found = json.loads((folder / "learned.json").read_text())
    tables = {
        name: runs.read(folder / f"learned.{number:04d}.arrow")["x"]
        for number, name in enumerate(found["tables"])
    }
    words = {k.removeprefix("words."): x for k, x in tables.items() if k.startswith("words.")}
    cuts = Cuts(**found["cuts"])
    return Learned(tables["users"], tables["items"], cuts, words, found["dense"])


class _Types:
    """The type of every id, which must be the same in all files: {id: (type, file)}."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[pl.DataType, pathlib.Path]] = {}

    def check(self, what: str, x: pl.Series, path: pathlib.Path) -> None:
        x = _flat(x)
        if not len(x):  # a file without values does not say their type
            return
        dtype, first = self.seen.setdefault(what, (x.dtype, path))
        if dtype != x.dtype:
            raise ValueError(
                f"{path}: found {what} of type {x.dtype}, expected {dtype} as in {first}; write "
                "them alike in all files"
            )


def _flat(x: pl.Series) -> pl.Series:
    """The values, of lists their elements, without null."""
    return (x.explode() if isinstance(x.dtype, pl.List) else x).drop_nulls()


def _first_pass(
    schema: schema_file.ImportSchema, parts: Sequence[plan.Part], chunks: Chunks
) -> tuple[pl.Series, pl.Series, pl.DataFrame]:
    """Users, items, and {time, split, n} of the impressions (of the clicks, if there are none)."""
    types = _Types()
    keys: dict[str, list[pl.Series]] = {"user": [], "item": []}
    times: list[pl.DataFrame] = []
    ids: dict[str, list[tuple[pathlib.Path, pl.Series]]] = {"users": [], "items": []}
    shown = "events" if schema.negatives is not None else "impressions"
    for part in parts:
        for frame in filter(len, chunks(part)):
            if part.table in ids:
                ids[part.table].append((part.path, frame["id"]))
                frame = frame.select(pl.col("id").alias(part.table.removesuffix("s")))
            for name in ("user", "item", "request"):
                if name in frame.columns:
                    types.check(f"{name} ids", frame[name], part.path)
                    if name in keys and len(flat := _flat(frame[name])):
                        _add(keys[name], encoding.distinct(None, flat), encoding.distinct)
            if part.table == shown:
                _add(times, _times(frame), _sum)
    for table, found in ids.items():
        _check_twice(table, found)
    counted = functools.reduce(_sum, times) if times else pl.DataFrame()
    if not counted.height:
        raise ValueError(
            f"[{shown}]: found no row after filtering, expected at least one impression"
        )
    empty = pl.Series([], dtype=pl.Int64)
    users, items = (
        functools.reduce(encoding.distinct, x, x[0] if x else empty) for x in keys.values()
    )
    return users, items, counted


def _add(pieces: list[T], new: T, together: Callable[[T, T], T]) -> None:
    """Adds a piece of what all chunks together hold, merged with the pieces before it that are not
    much longer, so that a row is merged a few times only, however many chunks there are."""
    while pieces and len(pieces[-1]) <= 2 * len(new):
        new = together(pieces.pop(), new)
    pieces.append(new)


def _sum(one: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
    """Both counts {keys, n} as one, sorted by the keys."""
    keys = [name for name in one.columns if name != "n"]
    return pl.concat([one, other]).group_by(keys).agg(pl.col("n").sum()).sort(keys)


def _times(frame: pl.DataFrame) -> pl.DataFrame:
    if "click" in frame.columns:
        frame = frame.filter("click")
    split = split_of(frame)
    split = pl.lit(None, pl.String) if split is None else split.cast(pl.String)
    return frame.select("time", split=split).group_by("time", "split").agg(pl.len().alias("n"))


def _check_twice(table: str, found: list[tuple[pathlib.Path, pl.Series]]) -> None:
    """Raises ValueError where a user or item has two rows."""
    if not found:
        return
    ids = pl.concat([x for _, x in found])
    if len(twice := ids.filter(ids.is_duplicated())):
        paths = sorted({str(path) for path, x in found if twice[0] in x})
        times = int((ids == twice[0]).sum())
        raise ValueError(
            f"{', '.join(paths)}: found id {twice[0]!r} {times} times in [{table}], expected once "
            f"({twice.n_unique()} ids stand there more than once)"
        )


def cut(schema: schema_file.ImportSchema, times: pl.DataFrame) -> Cuts:
    """Where the spans end, from {time, split, n}.

    Shares are of impressions, cut where the time changes. Raises ValueError: a span would be empty,
    a value of the split column that the schema does not name.
    """
    s = schema.split
    if s.train_values:
        named = (s.train_values, s.validation_values, s.test_values)
        values = {_text(v): code for code, group in enumerate(named) for v in group}
        unknown = times.filter(~pl.col("split").is_in(list(values)) | pl.col("split").is_null())
        if unknown.height:
            raise ValueError(
                f"[impressions] split: found {unknown['split'].unique().to_list()}, expected one "
                f"of {list(values)}"
            )
        train = times.filter(pl.col("split").is_in([_text(v) for v in s.train_values]))
        last = int(train["time"].max()) if train.height else 0
        if not s.validation_values and train.height:
            last = _at_share(train, 1 - s.validation)
        cuts = Cuts(train=last, validation=last, values=values)
    elif s.train_until is not None:
        until = (schema_file.seconds(t) for t in (s.train_until, s.validation_until))
        cuts = Cuts(*until)
    else:
        cuts = Cuts(_at_share(times, s.train), _at_share(times, s.train + s.validation))
    code = cuts.span(times["time"].to_numpy(), times["split"])
    counted = np.bincount(code, weights=times["n"].to_numpy(), minlength=3).astype(int)
    if not counted.all():
        names = dict(zip(("train", "validation", "test"), counted.tolist()))
        low, high = times["time"].min(), times["time"].max()
        raise ValueError(
            f"[split]: found {names} impressions from time {low} to {high}, expected some in each"
        )
    return cuts


def _text(value: object) -> str:
    """A value of the schema as a column of it is cast to text."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _at_share(times: pl.DataFrame, share: float) -> int:
    """The last time of the oldest `share` of the rows."""
    by_time = times.group_by("time").agg(pl.col("n").sum()).sort("time")
    reached = by_time["n"].cum_sum().to_numpy()
    wanted = share * reached[-1] - 1e-6  # 60 * (0.8 + 0.05) is a little more than 51
    return int(by_time["time"][int(np.searchsorted(reached, wanted))])


def _second_pass(
    schema: schema_file.ImportSchema,
    parts: Sequence[plan.Part],
    chunks: Chunks,
    cuts: Cuts,
) -> tuple[dict[str, pl.Series], dict[str, dict[str, list[float]]]]:
    """The words of every vocabulary, what every dense feature learned."""
    slots = [s for s in plan.slots(schema) if not s.input.derive]
    counted: dict[str, list[pl.DataFrame]] = {}
    moments: dict[str, encoding.Moments] = {}
    types = _Types()
    acting: dict[str, pl.Series | None] = {"user": None, "item": None}
    for part in sorted(parts, key=_turn):
        mine = [s for s in slots if _reads(s, part)]
        for frame in chunks(part):
            train = _training(schema, part, frame, cuts, acting)
            for side in acting if part.table in ("events", "impressions") else ():
                if side in train.columns and len(flat := _flat(train[side]).drop_nulls()):
                    acting[side] = encoding.distinct(acting[side], flat)
            rows = train["row"].to_numpy() + (part.order << 40)
            for slot in mine:
                column, spec = _column(slot, part), slot.input
                if spec.kind == "dense":
                    found = moments.setdefault(dense_key(slot), encoding.Moments())
                    values = encoding.linear(train[column], spec.transform)
                    moments[dense_key(slot)] = found.add(values, rows)
                    continue
                types.check(f"values of table {spec.table!r}", frame[column], part.path)
                if spec.ids == "vocabulary" and len(flat := _flat(train[column])):
                    _add(counted.setdefault(spec.table, []), encoding.count(None, flat), _sum)
    least, transforms = settings(slots)
    words = {
        table: encoding.vocabulary(functools.reduce(_sum, counted[table]).sort("word"), n)
        if table in counted
        else pl.Series([], dtype=pl.Int64)
        for table, n in least.items()
    }
    dense = {
        name: moments.get(name, encoding.Moments()).learned("standard" if t.endswith("log") else t)
        for name, t in transforms.items()
    }
    return words, dense


def settings(slots: Sequence[plan.Slot]) -> tuple[dict[str, int], dict[str, str]]:
    """{table: min_count} of vocabularies, {dense feature: transform}.

    Raises ValueError where features that learn together say different things.
    """
    least: dict[str, int] = {}
    transforms: dict[str, str] = {}
    for slot in slots:
        x = slot.input
        if x.derive or x.ids in ("hash", "given"):
            continue
        if x.kind == "dense":
            found, expected = x.transform, transforms.setdefault(dense_key(slot), x.transform)
            what = "transform"
        else:
            found, expected = x.min_count, least.setdefault(x.table, x.min_count)
            what = "min_count"
        if found != expected:
            raise ValueError(
                f"schema, feature {slot.name!r} of side {slot.side!r}: found {what} = {found!r}, "
                f"expected {expected!r} as in another feature that it learns together with"
            )
    return least, transforms


def _reads(slot: plan.Slot, part: plan.Part) -> bool:
    """Whether a part's rows count for a slot: its own features, and everybody's users and items."""
    if slot.number is None:  # the ids of users and items: where they act
        acts = part.table in ("events", "impressions")
        has = bool(getattr(part.spec, slot.name, "")) or slot.name == "user"
        return acts and has
    return (slot.table, slot.number) == (part.table, part.number)


def _column(slot: plan.Slot, part: plan.Part) -> str:
    return slot.name if slot.number is None else slot.column


def _turn(part: plan.Part) -> int:
    """Who acts in training is known before lists and catalogues say more of them."""
    if part.table in ("users", "items"):
        return 2
    return int(part.table == "events" and part.spec.list)


def _training(
    schema: schema_file.ImportSchema,
    part: plan.Part,
    frame: pl.DataFrame,
    cuts: Cuts,
    acting: dict[str, pl.Series | None],
) -> pl.DataFrame:
    """The rows that may be learned from: those of the training span; lists, users and items of
    whom or what acts in it (`acting`, where None = nobody is named)."""
    if schema.ids.learn == "all":
        return frame
    if _turn(part):
        column, side = ("user", "user") if _turn(part) == 1 else ("id", part.table[:-1])
        known = acting[side]
        return frame if known is None else frame.filter(pl.col(column).is_in(known.implode()))
    if part.table == "events":
        return frame.filter(pl.col("time") <= cuts.train)
    span = cuts.span(frame["time"].to_numpy(), split_of(frame))
    return frame.filter(pl.Series(span == 0))


def sizes(learned: Learned) -> dict[str, int]:
    return {name: len(words) for name, words in learned.words.items()}


def split_of(frame: pl.DataFrame) -> pl.Series | None:
    return frame["split"] if "split" in frame.columns else None
