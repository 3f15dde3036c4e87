"""The log on disk: columnar Arrow files, written once in a stream, read by memory mapping.

Four files (`FILES`) and the offsets of each user's events; `log.json` is written last and names
the schema, the rows, sizes and checksums, so that a folder with it is complete:

  users.arrow        row = user id, row 0 missing (zeros); one column per user feature
  items.arrow        row = item id, row 0 missing (zeros); one column per item feature, `birth`
                     int64 seconds where known
  events.arrow       sorted by (user, time), or (user, order) where times are not exact;
                     user int32, time int64 seconds, item int32, one column per stored event
                     feature
  impressions.arrow  sorted by (time, request), then position; request int64, user int32,
                     time int64, item int32, span int8 (index into SPANS), one column per stored
                     context feature, one int8 column of 0 and 1 per task
  offsets.arrow      event_start int64 [U + 2]

A log may be in shards, which are ranges of users: each has a folder 00000, 00001, .. with events,
impressions and offsets of its own (offsets from its first user on), and log.json lists them.

`order` int32 joins events and impressions where not `schema.time_exact`. A candidate may read the
events of its user with time < its time, or else with order < its order.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from rankjax.data import columns, joined, log_files, stores
from rankjax.data import shards as shards_lib
from rankjax.schema import Schema

VERSION = 1
VERSION_OF_SHARDS = 2  # which readers of version 1 would not understand
FILES = columns.FILES
SHARDED = ("events", "impressions")  # and their offsets; users and items lie in the log's folder
SPANS = columns.SPANS  # codes 0, 1, 2 of impressions.span
CHUNK = 1 << 20  # rows that a pass over a file holds at once


def _json(value: Any) -> Any:
    """The value as it will be read back (tuples become lists), so that it may be compared."""
    return json.loads(json.dumps(value, sort_keys=True))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: found no valid JSON ({error}), expected a log's log.json"
        ) from error
    wanted = {"version", "schema", "fingerprint", "files", "info"}
    if not isinstance(found, dict) or not wanted <= set(found):
        raise ValueError(f"{path}: found {sorted(found)}, expected the keys {sorted(wanted)}")
    if (have := found["version"]) != (want := VERSION_OF_SHARDS if "shards" in found else VERSION):
        raise ValueError(f"{path}: found log version {have}, expected {want}")
    return found


def is_prepared(
    folder: str | os.PathLike, fingerprint: dict[str, Any], shards: int | None = None
) -> bool:
    """Whether a complete log with this fingerprint lies in `folder`, in so many shards.

    Raises ValueError where a log with another fingerprint, or other shards, does.
    """
    path = stores.mounted(folder) / "log.json"
    if not path.exists():
        return False
    record = _read_json(path)
    found = record["fingerprint"]
    if found != (wanted := _json(fingerprint)):
        differ = [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
        have, want = ({k: x.get(k) for k in differ} for x in (found, wanted))
        raise ValueError(
            f"{path}: found a log with fingerprint {have}, expected {want}: it was made of "
            "something else; take another folder"
        )
    have = len(record["shards"]) if "shards" in record else None
    if have != shards:
        raise ValueError(
            f"{path}: found this log in {have or 'no'} shards, expected {shards or 'none'}; take "
            "another folder"
        )
    return True


def check_free(folder: str | os.PathLike) -> None:
    """Raises ValueError where something lies in the folder that a log shall be written to."""
    folder = stores.mounted(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: found a folder that is not empty, expected none")


class LogWriter:
    """Writes a log in a stream: chunks of rows in their final order, memory bounded by a chunk.

    Use as a context manager; what is not finished is removed, and a log already there stays as it
    is. Chunks of the four files may come in any interleaving, and in the order of the whole log,
    also where it is written in shards.

    starts: the first user of each shard, ascending from 0 (`shards.starts`); None: a log of one.

    Raises:
      ValueError: a column is missing, unknown, of a wrong dtype or shape; a file is not sorted; a
        time is NaN; a label is not 0 or 1; an id lies outside its table, a user outside the users
        file, an item outside the items file. The message names file, column, row, found, expected.
      OSError: the disk is full; the temporary folder is gone by then.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        schema: Schema,
        fingerprint: dict[str, Any],
        starts: Sequence[int] | None = None,
    ):
        self.folder = pathlib.Path(folder)
        self.schema, self.fingerprint = schema, _json(fingerprint)
        self._checks = {file: columns.Checker(self.folder, file, schema) for file in FILES}
        self._starts = None if starts is None else np.asarray(starts, np.int64)
        check_free(self.folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = pathlib.Path(
            tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent)
        )
        self._spools = {file: self._spools_of(file) for file in FILES}

    def _spools_of(self, file: str) -> list[log_files.Spool]:
        """One, or one a shard."""
        if self._starts is None or file not in SHARDED:
            return [log_files.Spool(self._temporary, file)]
        found = [self._temporary / shards_lib.name(k) for k in range(len(self._starts))]
        for folder in found:
            folder.mkdir(exist_ok=True)
        return [log_files.Spool(folder, file) for folder in found]

    def __enter__(self) -> "LogWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._abort()

    def _abort(self) -> None:
        """Removes what is not finished; after `finish` there is nothing left to remove."""
        shutil.rmtree(self._temporary, ignore_errors=True)

    def append(self, file: str, arrays: dict[str, np.ndarray]) -> None:
        """Appends rows to one of FILES: {column: [n] or [n, M]}, the same columns every time."""
        try:
            if file not in FILES:
                raise ValueError(f"LogWriter.append: found file {file!r}, expected one of {FILES}")
            self._put(file, self._checks[file].check(arrays))
        except BaseException:
            self._abort()
            raise

    def _put(self, file: str, arrays: dict[str, np.ndarray]) -> None:
        spools = self._spools[file]
        if len(spools) == 1:
            spools[0].append(arrays)
            return
        shard = np.searchsorted(self._starts, arrays["user"], side="right") - 1
        shard = np.maximum(shard, 0)  # a user below 0 is refused by `finish`
        rows = np.argsort(shard, kind="stable")
        ends = np.searchsorted(shard[rows], np.arange(len(spools) + 1))
        for k, spool in enumerate(spools):
            mine = rows[ends[k] : ends[k + 1]]
            if len(mine) or not spool.kinds:
                spool.append({name: x[mine] for name, x in arrays.items()})

    def finish(self, **info: Any) -> pathlib.Path:
        """Writes the Arrow files, then log.json, moves the folder into place and returns it.

        `info` (JSON values: source, licence, counts, ...) is kept as `EventLog.info`. Where another
        process has finished the same log meanwhile, that one stays.
        """
        try:
            self._write(info)
            try:
                os.rename(self._temporary, self.folder)
            except OSError:
                if not is_prepared(self.folder, self.fingerprint, self._count):
                    raise
        finally:
            self._abort()
        return self.folder

    @property
    def _count(self) -> int | None:
        return None if self._starts is None else len(self._starts)

    def _write(self, info: dict[str, Any]) -> None:
        for file in FILES:
            if not self._spools[file][0].kinds:  # nothing was ever appended: an empty file
                if file in ("users", "items"):
                    raise ValueError(f"{self.folder / file}.arrow: found 0 rows, expected row 0")
                self._put(file, self._checks[file].check(columns.empty(file, self.schema)))
        rows = {file: self._spools[file][0].rows for file in ("users", "items")}
        files = {file: self._arrow(file, 0, rows) for file in ("users", "items")}
        record = {
            "version": VERSION if self._starts is None else VERSION_OF_SHARDS,
            "schema": self.schema.to_json(),
            "fingerprint": self.fingerprint,
            "files": files,
            "info": info,
        }
        if self._starts is None:
            files |= self._acts(0, (0, rows["users"]), rows)
        else:
            ends = [*self._starts[1:].tolist(), rows["users"]]
            record["shards"] = [
                {"users": [first, end], "files": self._acts(k, (first, end), rows)}
                for k, (first, end) in enumerate(zip(self._starts.tolist(), ends))
            ]
        with (self._temporary / "log.json").open("w") as stream:
            json.dump(record, stream, indent=1, sort_keys=True)
            stream.flush()
            os.fsync(stream.fileno())

    def _acts(self, shard: int, users: tuple[int, int], rows: dict[str, int]) -> dict[str, Any]:
        """Writes a shard's events, their offsets and its impressions; what log.json says of them.

        users: its first user and the one after its last.
        """
        found = {file: self._arrow(file, shard, rows) for file in SHARDED}
        folder = self._spools["events"][shard].folder
        batch = log_files.open_arrow(folder / "events.arrow", found["events"])
        start = {"event_start": _offsets(log_files.view(batch.column("user")), *users)}
        return found | {"offsets": log_files.write_arrow(folder / "offsets.arrow", start)}

    def _arrow(self, file: str, shard: int, rows: dict[str, int]) -> dict[str, int]:
        spool = self._spools[file][shard]
        arrays = spool.arrays()
        final = self.folder / spool.folder.relative_to(self._temporary)
        check = columns.Checker(final, file, self.schema)
        check.finish(arrays, users=rows["users"], items=rows["items"])
        found = log_files.write_arrow(spool.folder / f"{file}.arrow", arrays)
        spool.delete()
        return found


def _offsets(user: np.ndarray, low: int, high: int) -> np.ndarray:
    """First row of the events of each user from `low` to `high`, int64 [high - low + 1].

    From the sorted column, in chunks.
    """
    counts = np.zeros(high - low + 1, np.int64)
    for start in range(0, len(user), CHUNK):
        chunk = user[start : start + CHUNK]
        first = int(chunk[0])
        part = np.bincount(chunk - first)
        counts[first - low + 1 : first - low + 1 + len(part)] += part
    return np.cumsum(counts)


def write_log(
    folder: str | os.PathLike,
    schema: Schema,
    *,
    users: dict[str, np.ndarray],
    items: dict[str, np.ndarray],
    events: dict[str, np.ndarray],
    impressions: dict[str, np.ndarray],
    fingerprint: dict[str, Any],
    **info: Any,
) -> pathlib.Path:
    """`LogWriter` for a log that fits in memory; raises as it does."""
    with LogWriter(folder, schema, fingerprint) as writer:
        files = {"users": users, "items": items, "events": events, "impressions": impressions}
        for file, arrays in files.items():
            writer.append(file, arrays)
        return writer.finish(**info)


def _columns(
    folder: pathlib.Path, file: str, files: dict[str, dict[str, int]], schema: Schema, verify: bool
) -> dict[str, np.ndarray]:
    """The columns of an Arrow file, checked, as views of it."""
    path, expected = folder / f"{file}.arrow", files[file]
    batch = log_files.open_arrow(path, expected)
    if verify and (found := log_files.crc32(path)) != expected["crc32"]:
        raise ValueError(f"{path}: found crc32 {found}, expected {expected['crc32']}")
    views = {name: log_files.view(batch.column(name)) for name in batch.schema.names}
    if file in FILES:
        columns.check_kinds(folder, file, schema, views)
    return views


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # hashed by identity: it holds arrays
class EventLog:
    """A prepared log, memory-mapped: columns are read from disk as they are touched.

    event_start: int64 [U + 2]; the events of user u are rows event_start[u]:event_start[u + 1].
    info: what the source told `LogWriter.finish`.
    """

    folder: pathlib.Path
    schema: Schema
    fingerprint: dict[str, Any]
    info: dict[str, Any]
    event_start: np.ndarray
    columns: dict[str, dict[str, np.ndarray | joined.Joined]]

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        *,
        verify: bool = False,
        counters: bool = True,
        shards: Sequence[int] | None = None,
    ) -> "EventLog":
        """Opens a folder that `LogWriter` wrote.

        Sizes, rows, column names and types are always checked; `verify` also reads every byte and
        compares checksums. counters=False leaves the counters out of the schema, and says so in
        the fingerprint, so that a study cannot mix both. shards: numbers of those to read, in a log
        that has some; the others' users have no events and no impressions, and the fingerprint
        says so. None = all: the same rows and fingerprint as of the log that is not in shards.
        Raises ValueError that names the file, what was found and expected.
        """
        folder = stores.mounted(folder)
        if not (folder / "log.json").exists():
            raise ValueError(f"{folder}: found no log.json, expected the folder of a prepared log")
        record = _read_json(folder / "log.json")
        try:
            schema = Schema.from_json(record["schema"])
        except (KeyError, TypeError) as error:
            message = f"{folder / 'log.json'}: found a schema that does not read ({error!r})"
            raise ValueError(f"{message}, expected one of version {VERSION}") from error
        fingerprint = record["fingerprint"]
        parts = shards_lib.parts(folder, record, shards)
        if shards is not None and len(parts) < len(record["shards"]):
            said = [f"{sorted(set(shards))} of {len(record['shards'])}"]
            said += [fingerprint["shards"]] if "shards" in fingerprint else []
            fingerprint = {**fingerprint, "shards": " of ".join(said)}
        read = functools.partial(_columns, schema=schema, verify=verify)
        views = {f: read(folder, f, record["files"]) for f in ("users", "items")}
        acts = {f: [read(p.folder, f, p.files) for p in parts] for f in (*SHARDED, "offsets")}
        event_start = shards_lib.event_start(
            parts, acts.pop("offsets"), record["files"]["users"]["rows"]
        )
        views |= shards_lib.together(acts)
        if not counters and schema != schema.without_counters():
            schema, fingerprint = schema.without_counters(), {**fingerprint, "counters": False}
        return cls(
            folder=folder,
            schema=schema,
            fingerprint=fingerprint,
            info=record["info"],
            event_start=event_start,
            columns=views,
        )

    def rows(self, file: str) -> int:
        """Rows of one of FILES; users and items count the missing row 0."""
        return len(next(iter(self.columns[file].values())))

    def column(self, file: str, name: str) -> np.ndarray:
        """A column, [n] or [n, M], a read-only contiguous view of the mapped file.

        Of several shards it is a `joined.Joined`, which reads like an array.
        """
        found = self.columns[file]
        if name not in found:
            path = self.folder / f"{file}.arrow"
            raise ValueError(f"{path}: found columns {sorted(found)}, expected {name!r}")
        return found[name]
