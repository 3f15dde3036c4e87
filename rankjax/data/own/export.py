"""A log as files that people and other tools read, and the schema.toml by which they come back.

Users, items, events and impressions become users.csv, ... (or Parquet) in the log's order. Ids are
the log's own: a user is the row of the users file, ids of features stay as they are, so importing
the files with the schema that lies beside them gives back equal columns and an equal schema.
"""

import dataclasses
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Literal

import numpy as np
import polars as pl
import pyarrow.parquet

from rankjax.data import columns, event_log
from rankjax.data.own import schema_file, toml_tables
from rankjax.data.own.inputs import Input, Label
from rankjax.schema import Feature, Schema

Format = Literal["csv", "parquet"]
FORMATS = ("csv", "parquet")
SEPARATOR = "|"  # between the ids of one CSV cell


def export(
    log: event_log.EventLog, folder: str | os.PathLike, format: Format = "csv", parts: int = 1
) -> pathlib.Path:
    """Writes the log's files and their schema.toml into `folder`; returns the path of the latter.

    parts: of each file, as users-00000.parquet and so on; 1: users.parquet.

    Row 0 of users and items, the missing one, is left out, and so are counters (said on stderr),
    which can be counted again. Memory is bounded by event_log.CHUNK rows.

    Raises ValueError: the format is unknown, no parts, `folder` is not empty, the users or items
    have no id feature of their own ("user", "item"), only some rows name no item.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format={format!r}, expected one of {FORMATS}")
    if parts < 1:
        raise ValueError(f"export: parts={parts}, expected 1 or more")
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: found a folder that is not empty, expected none")
    kept = log.schema.without_counters()
    if left := len(log.schema.features) - len(kept.features):
        print(
            f"{log.folder}: {left} counters are not exported; `[counters]` in the schema.toml "
            "counts them again",
            file=sys.stderr,
        )
    written = _schema(log, kept, format, parts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for file in columns.FILES:
            first = int(file in ("users", "items"))  # row 0 is the missing one
            ends = [first + (log.rows(file) - first) * k // parts for k in range(parts + 1)]
            for k in range(parts):
                name = f"{file}.{format}" if parts == 1 else f"{file}-{k:05d}.{format}"
                frames = _frames(log, kept, file, format, ends[k], ends[k + 1])
                _write(temporary / name, frames)
        head = f"# A log of rankjax as {format} files; ids are rows of its files and tables.\n"
        text = head + toml_tables.text(written)
        (temporary / "schema.toml").write_text(text, encoding="utf-8")
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / "schema.toml"


def _write(path: pathlib.Path, frames: Iterator[pl.DataFrame]) -> None:
    """One file from frames of the same columns, the first of which may be empty."""
    first = next(frames)
    if path.suffix == ".csv":
        with path.open("wb") as stream:
            first.write_csv(stream)
            for frame in frames:
                frame.write_csv(stream, include_header=False)
        return
    table = first.to_arrow()
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        for frame in frames:
            writer.write_table(frame.to_arrow())


def _frames(
    log: event_log.EventLog, kept: Schema, file: str, format: Format, first: int, end: int
) -> Iterator[pl.DataFrame]:
    """The rows first .. end of one file; at least one frame."""
    names = [*columns.kinds(file, kept), *(["birth"] if _has_birth(log, file) else [])]
    if "item" in names and file in ("events", "impressions") and not _items_named(log, file):
        names.remove("item")
    for start in range(first, max(end, first + 1), event_log.CHUNK):
        rows = slice(start, min(start + event_log.CHUNK, end))
        found = [_series(name, log.column(file, name)[rows], format) for name in names]
        if file in ("users", "items"):
            ids = np.arange(start, start + len(found[0]))
            found.insert(0, pl.Series(_id_column(kept, file), ids))
        yield pl.DataFrame(found)


def _series(name: str, x: np.ndarray, format: Format) -> pl.Series:
    """[n], or [n, M] as lists or as text."""
    if x.ndim == 1:
        return pl.Series(name, x)
    lists = pl.Series(name, x.ravel()).reshape(x.shape).arr.to_list()
    return lists if format == "parquet" else lists.cast(pl.List(pl.String)).list.join(SEPARATOR)


def _id_column(kept: Schema, file: str) -> str:
    """The column of the rows' numbers, which no feature may be called."""
    taken, name = columns.kinds(file, kept), "id"
    while name in taken:
        name = f"{name}_"
    return name


def _has_birth(log: event_log.EventLog, file: str) -> bool:
    return file == "items" and "birth" in log.columns[file]


def _items_named(log: event_log.EventLog, file: str) -> bool:
    """Whether rows name an item: all of them, or none; ValueError where only some do."""
    items = log.column(file, "item")
    named, missing = 0, -1
    for start in range(0, len(items), event_log.CHUNK):
        chunk = items[start : start + event_log.CHUNK]
        here = int(np.count_nonzero(chunk))
        if missing < 0 and here < len(chunk):
            missing = start + int(np.argmax(chunk == 0))
        named += here
    if named and missing >= 0:
        raise ValueError(
            f'{log.folder / file}.arrow, column "item": row {missing} holds 0 (missing), expected '
            f"an item as in {named} other rows, or none in any row, which a file says by a column "
            "that it lacks"
        )
    return named > 0 or not len(items)


def _schema(
    log: event_log.EventLog, kept: Schema, format: Format, parts: int
) -> schema_file.ImportSchema:
    """What the files hold, so that an import says the same as the log's schema."""
    exact = kept.time_exact
    end = f".{format}" if parts == 1 else f"-*.{format}"

    def features(*sides: str, but: str = "") -> dict[str, Input]:
        return {f.name: _input(kept, f, format) for f in kept.of(*sides) if f.name != but}

    def acts(file: str) -> dict[str, object]:
        item = {"item": "item"} if _items_named(log, file) else {}
        order = {} if exact else {"order": "order"}
        return {"files": (f"{file}{end}",), "user": "user", "time": "time", **item, **order}

    def catalogue(file: str, side: str) -> schema_file.Catalogue:
        return schema_file.Catalogue(
            files=(f"{file}{end}",),
            id=_id_column(kept, file),
            birth="birth" if _has_birth(log, file) else "",
            features=features(side, but=side),
        )

    impressions = schema_file.Impressions(
        **acts("impressions"),
        request="request",
        split="span",
        labels={t.name: Label(column=t.name, weight=t.weight) for t in kept.tasks},
        features=features("context"),
    )
    earliest = _earliest(log)
    default = schema_file.seconds(schema_file.ImportSchema.earliest)
    return schema_file.ImportSchema(
        name=log.info.get("name", log.folder.name),
        task=kept.primary_task,
        time_exact=exact,
        order=tuple(f"{f.side}.{f.name}" for f in kept.features),
        **({"earliest": earliest} if earliest < default else {}),
        impressions=(impressions,),
        events=(schema_file.Events(**acts("events"), features=features("event")),),
        users=catalogue("users", "user"),
        items=catalogue("items", "item"),
        user=_own(log, kept, "users", "user", format),
        item=_own(log, kept, "items", "item", format),
        split=schema_file.Split(train_values=(0,), validation_values=(1,), test_values=(2,)),
        tables={t.name: schema_file.Table(rows=t.rows, hashed=t.hashed) for t in kept.tables},
        info={k: log.info[k] for k in ("notes", "negatives", "request_spread") if log.info.get(k)},
    )


def _input(kept: Schema, f: Feature, format: Format) -> Input:
    given = bool(f.table) and not f.derive
    return Input(
        column="" if f.derive else f.name,
        kind=f.kind,
        group=f.group,
        table=f.table,
        ids="given" if given else "",
        rows=kept.table(f.table).rows if f.table else None,
        values=f.values if f.kind == "ids" else Input.values,
        separator=SEPARATOR if f.kind == "ids" and format == "csv" else "",
        transform="none" if f.kind == "dense" and not f.derive else Input.transform,
        action=f.action,
        derive=f.derive,
    )


def _own(
    log: event_log.EventLog, kept: Schema, file: str, side: Literal["user", "item"], format: Format
) -> Input:
    """The ids themselves as a feature: the rows' numbers where it holds them, else its column."""
    own = next((f for f in kept.of(side) if f.name == side and f.kind == "id"), None)
    if own is None:
        found = [f.name for f in kept.of(side)]
        raise ValueError(
            f"{log.folder / 'log.json'}: found features {found} of side {side!r}, expected one of "
            f"kind 'id' named {side!r}, the {file}' own id"
        )
    x, rows = log.column(file, side), kept.table(own.table).rows
    whole = rows == len(x) and all(
        np.array_equal(chunk, np.arange(start, start + len(chunk)))
        for start in range(0, len(x), event_log.CHUNK)
        for chunk in (x[start : start + event_log.CHUNK],)
    )
    given = _input(kept, own, format)
    return dataclasses.replace(given, column="") if whole else given


def _earliest(log: event_log.EventLog) -> int:
    """The smallest time of the log, seconds."""
    times = [log.column(file, "time") for file in ("events", "impressions")]
    if _has_birth(log, "items"):
        times.append(log.column("items", "birth")[1:])
    return min(int(x.min()) for x in times if len(x))
