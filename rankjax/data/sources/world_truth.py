"""The truth file of a world: the probabilities that its labels were drawn from.

It lies beside the log, not in it, in row order of the log's impressions; nothing that feeds a model
knows where. Columns: p_click, p_like (given click), p_known (p_click with the user's latent terms
at their mean), float64, and optionally part_*, the float32 terms of the click logit.
"""

import os
import pathlib
import shutil
import tempfile

import numpy as np
import pyarrow as pa

PROBABILITIES = ("p_click", "p_like", "p_known")


def truth_path(log_dir: str | os.PathLike) -> pathlib.Path | None:
    """Where the truth of a log lies, or None where the log has none (any real data set)."""
    path = pathlib.Path(log_dir).absolute().parent / "truth.arrow"
    return path if path.exists() else None


def load_truth(log_dir: str | os.PathLike) -> dict[str, np.ndarray]:
    """{column: [N]}, memory-mapped, row i belongs to row i of the log's impressions.

    Raises:
      FileNotFoundError: the log has no truth file.
      ValueError: the file is no such Arrow file.
    """
    path = truth_path(log_dir)
    if path is None:
        raise FileNotFoundError(
            f"{log_dir}: found no truth.arrow beside it, expected a world's log"
        )
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: found no complete Arrow file ({error})") from error
    if missing := [name for name in PROBABILITIES if name not in batch.schema.names]:
        raise ValueError(f"{path}: found columns {batch.schema.names}, expected {missing} too")
    return {
        name: column.to_numpy(zero_copy_only=True)
        for name, column in zip(batch.schema.names, batch.columns)
    }


class TruthWriter:
    """Streams columns to raw files, then makes one record batch of them; memory is one chunk.

    Use as a context manager: what is not finished is removed.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix=".truth.", dir=path.parent))
        self._dtypes: dict[str, np.dtype] = {}

    def __enter__(self) -> "TruthWriter":
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """{column: [n]} float64 or float32, the same columns every time."""
        for name, x in columns.items():
            self._dtypes[name] = x.dtype
            with (self._folder / name).open("ab") as stream:
                stream.write(np.ascontiguousarray(x).data)

    def finish(self) -> pathlib.Path:
        """Writes the file and moves it into place in one step."""
        arrays = []
        for name, dtype in self._dtypes.items():
            raw = self._folder / name
            values = np.memmap(raw, dtype, "r") if raw.stat().st_size else np.empty(0, dtype)
            kind = pa.from_numpy_dtype(dtype)
            arrays.append(pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)]))
        batch = pa.RecordBatch.from_arrays(arrays, names=list(self._dtypes))
        whole = self._folder / "truth.arrow"
        with whole.open("wb") as stream:
            with pa.ipc.new_file(stream, batch.schema) as writer:
                writer.write_batch(batch)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(whole, self.path)
        return self.path
