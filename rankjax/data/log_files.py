"""The files of a log: Arrow files of one record batch, written from raw columns and mapped."""

import os
import pathlib
import zlib

import numpy as np
import pyarrow as pa

CHUNK = 1 << 20  # bytes that a pass over a file holds at once


def crc32(path: pathlib.Path) -> int:
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


def write_arrow(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """Writes one record batch; returns the file's rows, bytes and crc32."""
    batch = pa.RecordBatch.from_arrays([_arrow(x) for x in arrays.values()], names=list(arrays))
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, batch.schema) as writer:
        writer.write_batch(batch)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"rows": batch.num_rows, "bytes": path.stat().st_size, "crc32": crc32(path)}


class Spool:
    """The columns of one file, appended to one raw file each."""

    def __init__(self, folder: pathlib.Path, name: str):
        self.folder, self.name, self.rows = folder, name, 0
        self.kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}

    def _path(self, column: int) -> pathlib.Path:
        return self.folder / f"{self.name}.{column}.raw"

    def append(self, arrays: dict[str, np.ndarray]) -> None:
        """{column: [n] or [n, M]}. Files are open no longer than this takes: a log in many shards
        has more columns than a process may have open files."""
        self.kinds = self.kinds or {name: (x.dtype, x.shape[1:]) for name, x in arrays.items()}
        for number, x in enumerate(arrays.values()):
            with self._path(number).open("ab") as stream:
                stream.write(np.ascontiguousarray(x).data)
        self.rows += len(next(iter(arrays.values())))

    def arrays(self) -> dict[str, np.ndarray]:
        """The columns, memory-mapped."""
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


def open_arrow(path: pathlib.Path, expected: dict[str, int]) -> pa.RecordBatch:
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


def view(column: pa.Array) -> np.ndarray:
    """Zero-copy [n] or [n, M]."""
    if pa.types.is_fixed_size_list(column.type):
        flat = column.flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(len(column), column.type.list_size)
    return column.to_numpy(zero_copy_only=True)
