"""Sorting more rows than fit in memory: sorted runs on disk, merged by ranges of the first key.

A run is one chunk, sorted and written as an uncompressed Arrow file, so that its rows between two
keys are found by binary search in the mapped file and read alone. The result depends on the rows
only, not on how they were cut into runs, because the keys end with one that orders all rows.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
import pyarrow as pa


def write(path: pathlib.Path, frame: pl.DataFrame) -> None:
    """Writes a frame as one record batch, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    table = frame.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    with pa.OSFile(str(partial), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(table.num_rows, 1))
    partial.rename(path)


def read(path: pathlib.Path) -> pl.DataFrame:
    """The frame, memory-mapped."""
    return pl.from_arrow(_table(path))


def _table(path: pathlib.Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def write_run(path: pathlib.Path, frame: pl.DataFrame, keys: Sequence[str]) -> None:
    """Sorts a chunk by its keys and writes it; the first key is of whole numbers."""
    write(path, frame.sort(keys))


def merged(paths: Sequence[pathlib.Path], keys: Sequence[str], rows: int) -> Iterator[pl.DataFrame]:
    """All rows of the runs sorted by `keys`, in frames of about `rows`, memory bounded by one.

    Rows that share the first key come in one frame, however many they are.
    """
    opened = _Runs.of(paths, keys)
    for low, last in ranges(paths, keys, rows):
        yield opened.between(low, last)


def between(
    paths: Sequence[pathlib.Path], keys: Sequence[str], low: int | None, last: int
) -> pl.DataFrame:
    """The frame of `merged` with the rows whose first key is > low (None: any) and <= last."""
    return _Runs.of(paths, keys).between(low, last)


def ranges(
    paths: Sequence[pathlib.Path], keys: Sequence[str], rows: int
) -> list[tuple[int | None, int]]:
    """(low, last) of every frame of `merged`."""
    cuts = [int(x) for x in _cuts(_Runs.of(paths, keys).firsts, rows)]
    return list(zip([None, *cuts[:-1]], cuts))


@dataclasses.dataclass(frozen=True)
class _Runs:
    """Runs that hold rows, mapped; firsts: their first keys."""

    # As tables, because a frame holds 16 bytes in memory for every text of a mapped file.
    tables: list[pa.Table]
    firsts: list[np.ndarray]
    keys: Sequence[str]

    @classmethod
    def of(cls, paths: Sequence[pathlib.Path], keys: Sequence[str]) -> "_Runs":
        tables = [table for table in map(_table, paths) if table.num_rows]
        return cls(tables, [table[keys[0]].chunk(0).to_numpy() for table in tables], keys)

    def between(self, low: int | None, last: int) -> pl.DataFrame:
        at = lambda x, key: int(np.searchsorted(x, key, side="right"))
        bounds = [(0 if low is None else at(x, low), at(x, last)) for x in self.firsts]
        parts = [t.slice(a, b - a) for t, (a, b) in zip(self.tables, bounds) if b > a]
        return pl.concat(map(pl.from_arrow, parts)).sort(self.keys)


def _cuts(firsts: list[np.ndarray], rows: int) -> np.ndarray:
    """The last keys of the frames: quantiles of every k-th key of all runs, and the largest key."""
    total = sum(map(len, firsts))
    if not total:
        return np.empty(0, np.int64)
    step = max(1, rows // (8 * len(firsts)))
    sampled = np.sort(np.concatenate([x[::step] for x in firsts]))
    inner = sampled[max(1, rows // step) :: max(1, rows // step)]
    return np.unique(np.append(inner, max(x[-1] for x in firsts)))
