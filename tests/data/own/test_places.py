"""places: files here and in object stores, which a memory filesystem stands for."""

import pathlib

import polars as pl
import pytest

from rankjax.data import event_log, importer
from rankjax.data.own import formats, places, schema_file
from tests.data.own import scenarios

upath = pytest.importorskip("upath", reason="universal-pathlib is not installed")


@pytest.fixture
def store():
    """An empty bucket in memory."""
    root = upath.UPath("memory://bucket")
    root.fs.store.clear()
    yield root
    root.fs.store.clear()


def test_local_paths_are_paths(tmp_path):
    (tmp_path / "a.parquet").touch()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.parquet").touch()
    for text in (tmp_path / "a.parquet", f"file://{tmp_path}/a.parquet"):
        assert places.expanded([text]) == [tmp_path / "a.parquet"]
    found = places.expanded([tmp_path / "**" / "*.parquet"])
    assert found == [tmp_path / "a.parquet", tmp_path / "in" / "b.parquet"]
    assert all(isinstance(p, pathlib.Path) and not places.is_remote(p) for p in found)
    with pytest.raises(ValueError, match=r"none\.parquet: found no such file, expected one"):
        places.expanded([tmp_path / "none.parquet"])


def test_globs_of_a_store(store):
    for name in ("x/part-1.parquet", "x/part-0.parquet", "x/y/part-2.parquet"):
        path = store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    found = places.expanded(["memory://bucket/x/part-*.parquet"])
    assert [p.name for p in found] == ["part-0.parquet", "part-1.parquet"]
    assert all(places.is_remote(p) and p.is_file() for p in found)
    assert len(places.expanded(["memory://bucket/**/*.parquet"])) == 3
    assert places.expanded([str(store / "x/part-1.parquet")])[0].name == "part-1.parquet"
    for none in ("memory://bucket/x/z-*.parquet", "memory://bucket/none.parquet"):
        with pytest.raises(ValueError, match=r"found no such file or bucket, expected one"):
            places.expanded([none])


def test_stores_that_cannot_be_read():
    with pytest.raises(ValueError, match=r"what://x/y: .*'what'.*gs:// needs the package gcsfs"):
        places.place("what://x/y")


@pytest.mark.parametrize("name", ["x.parquet", "*.parquet", "day=*/x.parquet"])
def test_a_store_that_refuses_is_not_an_empty_one(name, monkeypatch, store):
    """fsspec's own isfile and glob take a refusal for a file that is not there."""

    def refused(*_, **__):
        raise PermissionError("Anonymous caller has no access")

    for method in ("info", "ls"):
        monkeypatch.setattr(type(store.fs), method, refused)
    with pytest.raises(ValueError, match=r"found PermissionError: Anonymous .* credentials\?"):
        places.expanded([f"memory://bucket/{name}"])


def test_a_bucket_that_is_not_there(store):
    for name in ("x.parquet", "**/*.parquet"):
        with pytest.raises(ValueError, match=r"memory://none/.*: found no such file or bucket"):
            places.expanded([f"memory://none/{name}"])


def test_order_and_spelling(tmp_path, store):
    mixed = [store / "b", tmp_path / "z", store / "a", tmp_path / "c"]
    ordered = sorted(mixed, key=places.sort_key)
    assert ordered == [tmp_path / "c", tmp_path / "z", store / "a", store / "b"]
    assert places.same(tmp_path / "x" / ".." / "z") == places.same(tmp_path / "z")
    assert places.same(store / "a") != places.same(store / "b")


def test_columns_that_folders_name(tmp_path):
    path = (
        tmp_path / "date=2024-05-31" / "hour=07" / "none=__HIVE_DEFAULT_PARTITION__" / "p.parquet"
    )
    assert places.hive(path) == {"date": "2024-05-31", "hour": "07", "none": None}
    path.parent.mkdir(parents=True)
    pl.DataFrame({"x": [1, 2], "hour": [8, 9]}).write_parquet(path)
    spec = schema_file.Files(files=("p.parquet",))
    assert formats.columns_of(path, spec) == ["x", "hour", "date", "none"]
    found = pl.concat(formats.raw_frames(path, spec, ["date", "x", "hour", "none"], None))
    assert found.rows() == [("2024-05-31", 1, 8, None), ("2024-05-31", 2, 9, None)]
    alone = pl.concat(formats.raw_frames(path, spec, ["date"], None))
    assert alone.rows() == [("2024-05-31",)] * 2


def test_a_store_is_imported_as_a_folder_is(tmp_path, store):
    config = scenarios.config("requests")
    files = scenarios.used(config, scenarios.split_off(scenarios.world()))
    for root in (tmp_path / "raw", store):
        root.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            frame = pl.DataFrame(rows, infer_schema_length=None)
            for k in range(2):  # of one name, in two folders
                path = root / f"part={k}" / f"{name.partition('.')[0]}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                size = -(-frame.height // 2)
                with path.open("wb") as stream:
                    frame.slice(k * size, size).write_parquet(stream)
    schema = schema_file.parse(config, "schema")
    logs = [
        importer.run(schema, places.expanded([glob]), tmp_path / name, chunk=40)
        for name, glob in (("one", tmp_path / "raw/**/*.parquet"), ("two", f"{store}/**/*.parquet"))
    ]
    for path in logs[0].iterdir():
        assert path.read_bytes() == (logs[1] / path.name).read_bytes(), path.name
    assert event_log.EventLog.open(logs[1], verify=True).rows("impressions") > 50


def test_what_a_store_cannot_hold(tmp_path, store):
    path = store / "x.csv"
    path.write_bytes(b"a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"found a \.csv file in an object store, expected Parqu"):
        formats.columns_of(path, schema_file.Files(files=("x.csv",)))
    with pytest.raises(ValueError, match=r"gs://b/log: found a path of an object store"):
        importer.checked_out("gs://b/log")
    path = store / "empty.parquet"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="found an empty file"):
        formats.columns_of(path, schema_file.Files(files=("empty.parquet",)))
