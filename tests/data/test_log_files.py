"""log_files: what is appended comes back, mapped; what is damaged is refused."""

import numpy as np
import pytest

from rankjax.data import log_files


def test_a_spool_gives_back_what_was_appended(tmp_path):
    spool = log_files.Spool(tmp_path, "events")
    parts = [{"a": np.arange(k, dtype=np.int32), "b": np.ones((k, 2))} for k in (3, 0, 4)]
    for part in parts:
        spool.append(part)
    assert spool.rows == 7
    for name, found in spool.arrays().items():
        np.testing.assert_array_equal(found, np.concatenate([p[name] for p in parts]))
    spool.delete()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_spool_has_its_columns(tmp_path):
    spool = log_files.Spool(tmp_path, "events")
    spool.append({"a": np.empty((0, 2), np.float32)})
    assert spool.arrays()["a"].shape == (0, 2) and spool.arrays()["a"].dtype == np.float32


def test_a_file_is_what_was_written(tmp_path):
    path, arrays = tmp_path / "x.arrow", {"a": np.arange(5), "b": np.ones((5, 2), np.float32)}
    said = log_files.write_arrow(path, arrays)
    assert said == {"rows": 5, "bytes": path.stat().st_size, "crc32": log_files.crc32(path)}
    batch = log_files.open_arrow(path, said)
    for name, x in arrays.items():
        np.testing.assert_array_equal(log_files.view(batch.column(name)), x)
    with pytest.raises(ValueError, match=r"found 5 rows, expected 6"):
        log_files.open_arrow(path, {**said, "rows": 6})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.arrow: found \d+ bytes, expected \d+"):
        log_files.open_arrow(path, said)
    with pytest.raises(ValueError, match="found no such file"):
        log_files.open_arrow(tmp_path / "y.arrow", said)
