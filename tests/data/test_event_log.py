import errno
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from rankjax.data import event_log
from tests import tiny


def test_what_is_written_is_read(tmp_path):
    found, files = tiny.columns()
    folder = event_log.write_log(tmp_path / "log", found, **files, fingerprint={"a": (1, 2)}, x=3)
    log = event_log.EventLog.open(folder, verify=True)
    assert (log.schema, log.fingerprint, log.info) == (found, {"a": [1, 2]}, {"x": 3})
    for file, arrays in files.items():
        assert log.rows(file) == len(next(iter(arrays.values())))
        for name, x in arrays.items():
            got = log.column(file, name)
            np.testing.assert_array_equal(got, x)
            assert got.dtype == x.dtype and got.flags.c_contiguous
            assert not got.flags.owndata and not got.flags.writeable  # a view of the mapped file
    user = files["events"]["user"]
    assert log.event_start.dtype == np.int64 and len(log.event_start) == log.rows("users") + 1
    for u in range(log.rows("users")):
        rows = np.arange(log.event_start[u], log.event_start[u + 1])
        np.testing.assert_array_equal(rows, np.flatnonzero(user == u))
    assert os.listdir(tmp_path) == ["log"]
    with pytest.raises(ValueError, match=r"users.arrow: found columns .* expected 'age'"):
        log.column("users", "age")


def test_chunks_make_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(event_log, "CHUNK", 13)
    found, files = tiny.columns()
    whole = tiny.log(tmp_path / "whole")
    with event_log.LogWriter(tmp_path / "parts", found, {"tiny": 1}) as writer:
        for start in range(0, 1000, 17):
            for file, arrays in files.items():
                part = {name: x[start : start + 17] for name, x in reversed(arrays.items())}
                writer.append(file, part)
        parts = writer.finish()
    assert sorted(os.listdir(whole)) == sorted(os.listdir(parts))
    for path in whole.iterdir():
        assert path.read_bytes() == (parts / path.name).read_bytes(), path.name


def test_a_log_without_events_or_impressions(tmp_path):
    found, files = tiny.columns()
    with event_log.LogWriter(tmp_path / "log", found, {}) as writer:
        writer.append("users", files["users"])
        writer.append("items", files["items"])
        log = event_log.EventLog.open(writer.finish(), verify=True)
    assert log.rows("events") == log.rows("impressions") == 0
    assert (log.event_start == 0).all()


def test_users_and_items_must_come(tmp_path):
    found, files = tiny.columns()
    writer = event_log.LogWriter(tmp_path / "log", found, {})
    writer.append("users", files["users"])
    with pytest.raises(ValueError, match=r"items.arrow: found 0 rows, expected row 0"):
        writer.finish()
    assert os.listdir(tmp_path) == []


def test_preparing_twice(tmp_path):
    fingerprint = {"source": "tiny", "users": 8, "range": (0, 1)}
    found, files = tiny.columns()
    assert not event_log.is_prepared(tmp_path / "log", fingerprint)
    event_log.write_log(tmp_path / "log", found, **files, fingerprint=fingerprint)
    assert event_log.is_prepared(tmp_path / "log", fingerprint)
    with pytest.raises(ValueError, match=r"'users': 8.*expected .*'users': 9"):
        event_log.is_prepared(tmp_path / "log", {**fingerprint, "users": 9})
    with pytest.raises(ValueError, match="found a folder that is not empty, expected none"):
        event_log.LogWriter(tmp_path / "log", found, fingerprint)


def test_memory_is_bounded_by_the_chunks(tmp_path, request):
    found, files = tiny.columns(events=100_000, users=50)
    chunk, user = files["events"], files["events"]["user"]
    size = sum(x.nbytes for x in chunk.values())
    ours, own = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    request.addfinalizer(lambda: pa.set_memory_pool(ours))
    pa.set_memory_pool(own)  # whose peak is not that of an earlier test
    tracemalloc.start()
    with event_log.LogWriter(tmp_path / "log", found, {}) as writer:
        writer.append("users", {name: np.tile(x, 40) * 0 for name, x in files["users"].items()})
        writer.append("items", files["items"])
        for n in range(30):
            writer.append("events", {**chunk, "user": user + np.int32(50 * n)})
        writer.finish()
    peak = tracemalloc.get_traced_memory()[1] + own.max_memory()
    tracemalloc.stop()
    assert peak < 10 * size, f"{peak / size} chunks of 30 in memory"
    assert event_log.EventLog.open(tmp_path / "log", verify=True).rows("events") == 30 * len(user)


def test_two_writers_of_one_log(tmp_path):
    found, files = tiny.columns()
    second = event_log.LogWriter(tmp_path / "log", found, {"a": 1})
    third = event_log.LogWriter(tmp_path / "log", found, {"a": 2})
    event_log.write_log(tmp_path / "log", found, **files, fingerprint={"a": 1}, who="first")
    for writer in (second, third):
        for file, arrays in files.items():
            writer.append(file, arrays)
    assert second.finish(who="second") == tmp_path / "log"
    with pytest.raises(ValueError, match="found a log with fingerprint"):
        third.finish(who="third")
    assert event_log.EventLog.open(tmp_path / "log").info == {"who": "first"}
    assert os.listdir(tmp_path) == ["log"]


def test_unfinished_and_failed_writers_leave_nothing(tmp_path):
    found, files = tiny.columns()
    with event_log.LogWriter(tmp_path / "log", found, {}) as writer:
        writer.append("items", files["items"])
    assert os.listdir(tmp_path) == []
    writer = event_log.LogWriter(tmp_path / "log", found, {})
    with pytest.raises(ValueError, match="found file 'clicks', expected one of"):
        writer.append("clicks", files["events"])
    assert os.listdir(tmp_path) == []


FULL = """
import errno, os, pathlib, resource, signal, sys
from rankjax.data import event_log
from tests import tiny
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
found, files = tiny.columns(events=20_000)
folder = pathlib.Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)  # stands for a full disk
try:
    event_log.write_log(folder / "new", found, **files, fingerprint={})
except OSError as error:
    sys.exit(0 if error.errno == errno.EFBIG else f"found {error!r}")
sys.exit("expected an OSError")
"""


@pytest.mark.parametrize("limit", [1_000, 100_000])  # in a column; in an Arrow file
def test_disk_full(tmp_path, limit):
    old = tiny.log(tmp_path / "old")
    command = [sys.executable, "-c", FULL, str(tmp_path), str(limit)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert os.listdir(tmp_path) == ["old"]
    event_log.EventLog.open(old, verify=True)


def test_disk_full_at_the_end(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(event_log.json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        tiny.log(tmp_path / "log")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("file", [*event_log.FILES, "offsets"])
def test_truncated_file(tmp_path, file):
    folder = tiny.log(tmp_path / "log")
    path = folder / f"{file}.arrow"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    match = f"{file}.arrow: found {len(data) - 100} bytes, expected {len(data)}"
    with pytest.raises(ValueError, match=match):
        event_log.EventLog.open(folder)
    path.unlink()
    with pytest.raises(ValueError, match=f"{file}.arrow: found no such file"):
        event_log.EventLog.open(folder)


@pytest.mark.parametrize("where", ["start", "end", "middle"])
def test_corrupted_file(tmp_path, where):
    folder = tiny.log(tmp_path / "log")
    path = folder / "impressions.arrow"
    data = bytearray(path.read_bytes())
    at = {"start": slice(0, 512), "end": slice(-512, None), "middle": slice(2_000, 2_008)}[where]
    data[at] = b"\xa5" * len(data[at])
    path.write_bytes(data)
    if where != "middle":  # damaged values are only found by reading all of them
        with pytest.raises(ValueError, match=r"impressions.arrow: found "):
            event_log.EventLog.open(folder)
    with pytest.raises(ValueError, match=r"impressions.arrow: found "):
        event_log.EventLog.open(folder, verify=True)


def test_swapped_files(tmp_path):
    folder = tiny.log(tmp_path / "log")
    record = json.loads((folder / "log.json").read_text())
    record["files"]["users"] = record["files"]["items"]
    (folder / "users.arrow").write_bytes((folder / "items.arrow").read_bytes())
    (folder / "log.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"users.arrow: found columns .* expected 'user' too"):
        event_log.EventLog.open(folder)


def test_log_json(tmp_path):
    with pytest.raises(ValueError, match=r"found no log.json, expected the folder of a prepared"):
        event_log.EventLog.open(tmp_path)
    folder = tiny.log(tmp_path / "log")
    path = folder / "log.json"
    text = path.read_text()
    for broken, match in [
        (text[:-20], "found no valid JSON"),
        ("[1]", "expected the keys"),
        (text.replace('"version": 1', '"version": 7'), "found log version 7, expected 1"),
        (text.replace('"primary_task"', '"primary"'), "found a schema that does not read"),
        (text.replace('"rows": 189', '"rows": 190'), "found 189 rows, expected 190"),
    ]:
        path.write_text(broken)
        with pytest.raises(ValueError, match=match):
            event_log.EventLog.open(folder)
