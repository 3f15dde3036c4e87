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

`order` int32 joins events and impressions where not `schema.time_exact`. A candidate may read the
events of its user with time < its time, or else with order < its order.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from typing import Any

import numpy as np
import pyarrow as pa

from rankjax.data import columns
from rankjax.schema import Schema

VERSION = 1
FILES = columns.FILES
SPANS = columns.SPANS  # codes 0, 1, 2 of impressions.span
CHUNK = 1 << 20  # rows or bytes that a pass over a file holds at once


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
    if found["version"] != VERSION:
        raise ValueError(f"{path}: found log version {found['version']}, expected {VERSION}")
    return found


def is_prepared(folder: str | os.PathLike, fingerprint: dict[str, Any]) -> bool:
    """Whether a complete log with this fingerprint lies in `folder`.

    Raises ValueError where a log with another fingerprint does.
    """
    path = pathlib.Path(folder) / "log.json"
    if not path.exists():
        return False
    found = _read_json(path)["fingerprint"]
    if found != (wanted := _json(fingerprint)):
        differ = [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
        have, want = ({k: x.get(k) for k in differ} for x in (found, wanted))
        raise ValueError(
            f"{path}: found a log with fingerprint {have}, expected {want}: it was made of "
            "something else; take another folder"
        )
    return True


def check_free(folder: str | os.PathLike) -> None:
    """Raises ValueError where something lies in the folder that a log shall be written to."""
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: found a folder that is not empty, expected none")


def _crc32(path: pathlib.Path) -> int:
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(CHUNK):
            crc = zlib.crc32(block, crc)
    return crc


def _arrow(values: np.ndarray) -> pa.Array:
    """[n] or [n, M] contiguous, zero-copy; [n, M] becomes a FixedSizeList."""
    flat = pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), values.size, [None, pa.py_buffer(values)]
    )
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _write_arrow(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """Writes one record batch; returns the file's rows, bytes and crc32."""
    batch = pa.RecordBatch.from_arrays([_arrow(x) for x in arrays.values()], names=list(arrays))
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, batch.schema) as writer:
        writer.write_batch(batch)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"rows": batch.num_rows, "bytes": path.stat().st_size, "crc32": _crc32(path)}


class _Spool:
    """The columns of one file, appended to one raw file each."""

    def __init__(self, folder: pathlib.Path, name: str):
        self.folder, self.name, self.rows = folder, name, 0
        self.kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self.streams: dict[str, Any] = {}

    def _path(self, column: int) -> pathlib.Path:
        return self.folder / f"{self.name}.{column}.raw"

    def append(self, arrays: dict[str, np.ndarray]) -> None:
        if not self.kinds:
            self.kinds = {name: (x.dtype, x.shape[1:]) for name, x in arrays.items()}
            for number, name in enumerate(arrays):
                self.streams[name] = self._path(number).open("wb")
        for name, x in arrays.items():
            self.streams[name].write(np.ascontiguousarray(x).data)
        self.rows += len(next(iter(arrays.values())))

    def close(self) -> None:
        """Closes every column's file, even where one of them fails (a full disk)."""
        with contextlib.ExitStack() as stack:
            for stream in self.streams.values():
                stack.callback(stream.close)

    def arrays(self) -> dict[str, np.ndarray]:
        """The columns, memory-mapped; `close` comes first."""
        if not self.rows:
            return {
                name: np.empty((0, *shape), dtype) for name, (dtype, shape) in self.kinds.items()
            }
        return {
            name: np.memmap(self._path(number), dtype, "r", shape=(self.rows, *shape))
            for number, (name, (dtype, shape)) in enumerate(self.kinds.items())
        }

    def delete(self) -> None:
        for number in range(len(self.kinds)):
            self._path(number).unlink()


class LogWriter:
    """Writes a log in a stream: chunks of rows in their final order, memory bounded by a chunk.

    Use as a context manager; what is not finished is removed, and a log already there stays as it
    is. Chunks of the four files may come in any interleaving.

    Raises:
      ValueError: a column is missing, unknown, of a wrong dtype or shape; a file is not sorted; a
        time is NaN; a label is not 0 or 1; an id lies outside its table, a user outside the users
        file, an item outside the items file. The message names file, column, row, found, expected.
      OSError: the disk is full; the temporary folder is gone by then.
    """

    def __init__(self, folder: str | os.PathLike, schema: Schema, fingerprint: dict[str, Any]):
        self.folder = pathlib.Path(folder)
        self.schema, self.fingerprint = schema, _json(fingerprint)
        self._checks = {file: columns.Checker(self.folder, file, schema) for file in FILES}
        check_free(self.folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = pathlib.Path(
            tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent)
        )
        self._spools = {file: _Spool(self._temporary, file) for file in FILES}

    def __enter__(self) -> "LogWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._abort()

    def _abort(self) -> None:
        """Removes what is not finished; after `finish` there is nothing left to remove."""
        with contextlib.suppress(OSError):  # a full disk: what cannot be flushed is thrown away
            self._close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:
            for spool in self._spools.values():
                stack.callback(spool.close)

    def append(self, file: str, arrays: dict[str, np.ndarray]) -> None:
        """Appends rows to one of FILES: {column: [n] or [n, M]}, the same columns every time."""
        try:
            if file not in FILES:
                raise ValueError(f"LogWriter.append: found file {file!r}, expected one of {FILES}")
            arrays = self._checks[file].check(arrays)
            self._spools[file].append(arrays)
        except BaseException:
            self._abort()
            raise

    def finish(self, **info: Any) -> pathlib.Path:
        """Writes the Arrow files, then log.json, moves the folder into place and returns it.

        `info` (JSON values: source, licence, counts, ...) is kept as `EventLog.info`. Where another
        process has finished the same log meanwhile, that one stays.
        """
        try:
            self._close()
            self._write(info)
            try:
                os.rename(self._temporary, self.folder)
            except OSError:
                if not is_prepared(self.folder, self.fingerprint):
                    raise
        finally:
            self._abort()
        return self.folder

    def _write(self, info: dict[str, Any]) -> None:
        rows = {file: self._spools[file].rows for file in FILES}
        for file in FILES:
            if not self._spools[file].kinds:  # nothing was ever appended: an empty file
                if file in ("users", "items"):
                    raise ValueError(f"{self.folder / file}.arrow: found 0 rows, expected row 0")
                empty = columns.empty(file, self.schema)
                self._spools[file].append(self._checks[file].check(empty))
        self._close()
        files = {}
        for file in FILES:
            spool = self._spools[file]
            arrays = spool.arrays()
            self._checks[file].finish(arrays, users=rows["users"], items=rows["items"])
            if file == "events":
                start = {"event_start": _offsets(arrays["user"], rows["users"])}
                files["offsets"] = _write_arrow(self._temporary / "offsets.arrow", start)
            files[file] = _write_arrow(self._temporary / f"{file}.arrow", arrays)
            spool.delete()
        record = {
            "version": VERSION,
            "schema": self.schema.to_json(),
            "fingerprint": self.fingerprint,
            "files": files,
            "info": info,
        }
        with (self._temporary / "log.json").open("w") as stream:
            json.dump(record, stream, indent=1, sort_keys=True)
            stream.flush()
            os.fsync(stream.fileno())


def _offsets(user: np.ndarray, users: int) -> np.ndarray:
    """First row of each user's events: int64 [users + 1], from the sorted column, in chunks."""
    counts = np.zeros(users + 1, np.int64)
    for start in range(0, len(user), CHUNK):
        chunk = user[start : start + CHUNK]
        first = int(chunk[0])
        part = np.bincount(chunk - first)
        counts[first + 1 : first + 1 + len(part)] += part
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


def _open_arrow(path: pathlib.Path, expected: dict[str, int]) -> pa.RecordBatch:
    """The file's record batch, memory-mapped; ValueError where it is not what was written."""
    if not path.exists():
        raise ValueError(f"{path}: found no such file, expected {expected['bytes']} bytes")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(f"{path}: found {size} bytes, expected {expected['bytes']} (log.json)")
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            if reader.num_record_batches != 1:
                found = reader.num_record_batches
                raise ValueError(f"{path}: found {found} record batches, expected 1")
            batch = reader.get_batch(0)
            batch.validate()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: found a corrupted file ({error}), expected an Arrow IPC file"
        ) from error
    if batch.num_rows != expected["rows"]:
        raise ValueError(f"{path}: found {batch.num_rows} rows, expected {expected['rows']}")
    return batch


def _view(column: pa.Array) -> np.ndarray:
    """Zero-copy [n] or [n, M]."""
    if pa.types.is_fixed_size_list(column.type):
        flat = column.flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(len(column), column.type.list_size)
    return column.to_numpy(zero_copy_only=True)


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
    columns: dict[str, dict[str, np.ndarray]]

    @classmethod
    def open(
        cls, folder: str | os.PathLike, *, verify: bool = False, counters: bool = True
    ) -> "EventLog":
        """Opens a folder that `LogWriter` wrote.

        Sizes, rows, column names and types are always checked; `verify` also reads every byte and
        compares checksums. counters=False leaves the counters out of the schema, and says so in
        the fingerprint, so that a study cannot mix both.
        Raises ValueError that names the file, what was found and expected.
        """
        folder = pathlib.Path(folder)
        if not (folder / "log.json").exists():
            raise ValueError(f"{folder}: found no log.json, expected the folder of a prepared log")
        record = _read_json(folder / "log.json")
        try:
            schema = Schema.from_json(record["schema"])
        except (KeyError, TypeError) as error:
            message = f"{folder / 'log.json'}: found a schema that does not read ({error!r})"
            raise ValueError(f"{message}, expected one of version {VERSION}") from error
        views: dict[str, dict[str, np.ndarray]] = {}
        for file in (*FILES, "offsets"):
            path, expected = folder / f"{file}.arrow", record["files"][file]
            batch = _open_arrow(path, expected)
            if verify and (found := _crc32(path)) != expected["crc32"]:
                raise ValueError(f"{path}: found crc32 {found}, expected {expected['crc32']}")
            views[file] = {name: _view(batch.column(name)) for name in batch.schema.names}
            if file in FILES:
                columns.check_kinds(folder, file, schema, views[file])
        event_start = views.pop("offsets").get("event_start", np.empty(0, np.int64))
        wanted, events = record["files"]["users"]["rows"] + 1, record["files"]["events"]["rows"]
        if len(event_start) != wanted or event_start[-1] != events:
            raise ValueError(
                f"{folder / 'offsets.arrow'}: found {len(event_start)} offsets, expected {wanted}, "
                f"the last one {events}"
            )
        fingerprint = record["fingerprint"]
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
        """A column, [n] or [n, M], a read-only contiguous view of the mapped file."""
        found = self.columns[file]
        if name not in found:
            path = self.folder / f"{file}.arrow"
            raise ValueError(f"{path}: found columns {sorted(found)}, expected {name!r}")
        return found[name]
