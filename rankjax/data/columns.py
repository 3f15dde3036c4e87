"""Which columns a log's files have, and the checks that every chunk passes on its way to disk."""

import os
import pathlib
from collections.abc import Callable

import numpy as np

from rankjax.schema import Feature, Schema

FILES = ("users", "items", "events", "impressions")
SPANS = ("train", "validation", "test")
SIDE = {"users": "user", "items": "item", "events": "event", "impressions": "context"}
BASE = {
    "users": {},
    "items": {},
    "events": {"user": np.int32, "time": np.int64, "item": np.int32},
    "impressions": {
        **{"request": np.int64, "user": np.int32, "time": np.int64, "item": np.int32},
        "span": np.int8,
    },
}
CHUNK = 1 << 20  # rows that the checks of a finished column hold at once

Kind = tuple[np.dtype, tuple[int, ...]]


def _feature_kind(feature: Feature) -> Kind:
    dtype = np.float32 if feature.kind == "dense" else np.int32
    return np.dtype(dtype), (feature.values,) if feature.kind == "ids" else ()


def kinds(file: str, schema: Schema) -> dict[str, Kind]:
    """{column: (dtype, shape of a row)} of one of FILES, without the optional items.birth.

    Raises ValueError where two columns would have one name, a user or item feature is derived, or
    the users or items file would have no column at all.
    """
    found: dict[str, Kind] = {name: (np.dtype(dtype), ()) for name, dtype in BASE[file].items()}
    if file in ("events", "impressions") and not schema.time_exact:
        found["order"] = np.dtype(np.int32), ()
    more = [(f.name, _feature_kind(f)) for f in schema.of(SIDE[file]) if not f.derive]
    if file == "impressions":
        more += [(task.name, (np.dtype(np.int8), ())) for task in schema.tasks]
    for name, kind in more:
        if name in found or (file, name) == ("items", "birth"):
            raise ValueError(f"Schema: found two columns {name!r} in {file}, expected one")
        found[name] = kind
    if file in ("users", "items"):
        derived = [f.name for f in schema.of(SIDE[file]) if f.derive]
        if derived:
            raise ValueError(f"Schema: {derived} of {file} are derived, expected stored features")
        if not found:
            raise ValueError(f"Schema: found no {SIDE[file]} feature, expected at least one")
    return found


def empty(file: str, schema: Schema) -> dict[str, np.ndarray]:
    """The columns of `file` with no rows."""
    return {
        name: np.empty((0, *shape), dtype) for name, (dtype, shape) in kinds(file, schema).items()
    }


def check_kinds(
    folder: str | os.PathLike, file: str, schema: Schema, arrays: dict[str, np.ndarray]
) -> None:
    """Raises ValueError where columns are missing, unknown, or of another dtype or shape."""
    path, wanted = pathlib.Path(folder) / f"{file}.arrow", kinds(file, schema)
    if file == "items" and "birth" in arrays:
        wanted["birth"] = np.dtype(np.int64), ()
    for name, (dtype, shape) in wanted.items():
        if name not in arrays:
            raise ValueError(f"{path}: found columns {sorted(arrays)}, expected {name!r} too")
        x = arrays[name]
        if name in ("time", "birth") and x.dtype.kind == "f" and not np.isfinite(x).all():
            row = int(np.argmax(~np.isfinite(x)))
            raise ValueError(
                f'{path}, column "{name}": row {row} holds {x[row]}, expected whole seconds (int64)'
            )
        if x.dtype != dtype:
            raise ValueError(f'{path}, column "{name}": found dtype {x.dtype}, expected {dtype}')
        if x.shape[1:] != shape or x.ndim == 0:
            raise ValueError(
                f'{path}, column "{name}": found shape {x.shape}, expected {("n", *shape)}'
            )
    if unknown := sorted(set(arrays) - set(wanted)):
        raise ValueError(f"{path}: found columns {unknown} too, expected only {sorted(wanted)}")
    lengths = {name: len(x) for name, x in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path}: found columns of lengths {lengths}, expected one length")


class Checker:
    """The checks of one file, chunk by chunk; rows in messages count from the file's start."""

    def __init__(self, folder: pathlib.Path, file: str, schema: Schema):
        self.folder, self.file, self.schema = folder, file, schema
        self.path = folder / f"{file}.arrow"
        self.rows = 0
        self.names: tuple[str, ...] = ()
        self.sorted_by = {
            "events": ("user", "time" if schema.time_exact else "order"),
            "impressions": ("time", "request"),
        }.get(file)
        self.last: tuple[np.ndarray, np.ndarray] | None = None
        kinds(file, schema)  # a schema that cannot be written fails here, before any row

    def _refuse(self, name: str, x: np.ndarray, bad: np.ndarray, expected: str) -> None:
        """Raises ValueError for the first row of the chunk where `bad` ([n] or [n, M]) holds."""
        if bad.any():
            at = np.unravel_index(int(np.argmax(bad)), bad.shape)
            raise ValueError(
                f'{self.path}, column "{name}": row {self.rows + int(at[0])} holds {x[at]}, '
                f"expected {expected}"
            )

    def check(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Checks a chunk {column: [n] or [n, M]}; returns it in the file's column order."""
        arrays = {name: np.asarray(x) for name, x in arrays.items()}
        check_kinds(self.folder, self.file, self.schema, arrays)
        names = (*kinds(self.file, self.schema), *(("birth",) if "birth" in arrays else ()))
        if self.names and names != self.names:
            raise ValueError(f"{self.path}: found columns {names}, expected {self.names} as before")
        self.names = names
        if len(arrays[names[0]]):
            self._values(arrays)
            self._sorted(arrays)
        self.rows += len(arrays[names[0]])
        return {name: arrays[name] for name in names}

    def _values(self, arrays: dict[str, np.ndarray]) -> None:
        for f in self.schema.of(SIDE[self.file]):
            if f.derive:
                continue
            x = arrays[f.name]
            if f.kind == "dense":
                self._refuse(f.name, x, ~np.isfinite(x), "a finite number")
            else:
                rows = self.schema.table(f.table).rows
                self._refuse(f.name, x, (x < 0) | (x >= rows), f"0 .. {rows - 1} ({f.table!r})")
        if self.file in ("users", "items") and self.rows == 0:
            for name, x in arrays.items():
                self._refuse(name, x, (x[:1] != 0), "0 in row 0, which means missing")
        if self.file == "impressions":
            x = arrays["span"]
            self._refuse("span", x, (x < 0) | (x >= len(SPANS)), f"0 .. 2 ({', '.join(SPANS)})")
            for task in self.schema.tasks:
                x = arrays[task.name]
                self._refuse(task.name, x, (x != 0) & (x != 1), "0 or 1")

    def _sorted(self, arrays: dict[str, np.ndarray]) -> None:
        if self.sorted_by is None:
            return
        first, second = (arrays[name] for name in self.sorted_by)
        if self.last is not None:  # the row before this chunk
            first, second = np.append(self.last[0], first), np.append(self.last[1], second)
        down = (first[1:] < first[:-1]) | ((first[1:] == first[:-1]) & (second[1:] < second[:-1]))
        if down.any():
            at = int(np.argmax(down))
            row = self.rows + at + (self.last is None)
            raise ValueError(
                f'{self.path}, columns "{self.sorted_by[0]}", "{self.sorted_by[1]}": row {row} '
                f"holds ({first[at + 1]}, {second[at + 1]}) after ({first[at]}, {second[at]}), "
                f"expected rows sorted by {self.sorted_by[0]}, then {self.sorted_by[1]}"
            )
        self.last = first[-1:], second[-1:]

    def finish(self, arrays: dict[str, np.ndarray], *, users: int, items: int) -> None:
        """Checks what needs the other files: the written columns' users and items exist."""
        if self.file not in ("events", "impressions"):
            return
        user, item = arrays["user"], arrays["item"]
        expected = f"1 .. {users - 1} (the rows of users.arrow)"
        self._whole("user", user, lambda x: (x < 1) | (x >= users), expected)
        expected = f"0 .. {items - 1} (the rows of items.arrow)"
        self._whole("item", item, lambda x: (x < 0) | (x >= items), expected)

    def _whole(
        self, name: str, x: np.ndarray, bad: Callable[[np.ndarray], np.ndarray], expected: str
    ) -> None:
        for start in range(0, len(x), CHUNK):
            self.rows = start
            chunk = np.asarray(x[start : start + CHUNK])
            self._refuse(name, chunk, bad(chunk), expected)
