import datetime
import functools
import hashlib
import http.server
import json
import stat
import threading
import zipfile

import numpy as np
import polars as pl
import pytest

from rankjax.data.sources import files

KINDS = {"id": "int", "seen": "time", "score": "float?", "past": "list of time"}


def table(**change):
    day = datetime.datetime(1970, 1, 2, 0, 0, 7)
    columns = {"id": [4, 5], "seen": [day, day], "score": [0.5, None], "past": [[day], []]}
    return pl.DataFrame(columns | change, strict=False)


def test_read_parquet_types_and_times(tmp_path):
    path = tmp_path / "a.parquet"
    table(extra=["x", "y"]).write_parquet(path)
    got = files.read_parquet(path, KINDS)
    assert got.columns == list(KINDS) and got.dtypes[:3] == [pl.Int64, pl.Int64, pl.Float64]
    assert got.rows() == [(4, 86407, 0.5, [86407]), (5, 86407, None, [])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": [0.5, 1.0]}, r'"id": found type Float64, expected int'),
        ({"id": ["4", "5"]}, r'"id": found type String, expected int'),
        ({"id": [4, None]}, r'"id": row 1 is empty'),
        ({"seen": [1.5, float("nan")]}, r'"seen": found type Float64, expected time'),
        ({"past": [1, 2]}, r'"past": found type Int64, expected list of time'),
    ],
)
def test_read_parquet_refuses_by_column(tmp_path, change, message):
    path = tmp_path / "a.parquet"
    table(**change).write_parquet(path)
    with pytest.raises(ValueError, match=rf"a\.parquet, column {message}"):
        files.read_parquet(path, KINDS)


def test_read_parquet_refuses_missing_columns_and_torn_files(tmp_path):
    path = tmp_path / "a.parquet"
    table().drop("seen").write_parquet(path)
    with pytest.raises(ValueError, match=r"a\.parquet: found columns .*, expected \['seen'\] too"):
        files.read_parquet(path, KINDS)
    table().write_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet: .*expected a readable Parquet"):
        files.read_parquet(path, KINDS)


def test_read_csv(tmp_path):
    path = tmp_path / "a.csv"
    kinds = {"id": "int", "title": "text", "rating": "float"}
    path.write_text('title,extra,id,rating\n"A, b",x,3,4.5\nC,y,4,1\n')
    assert files.read_csv(path, kinds).rows() == [(3, "A, b", 4.5), (4, "C", 1.0)]
    for text, message in (
        ("title,id\nA,3\n", r"expected \['rating'\] too"),
        ("title,id,rating\nA,x3,1\n", "x3"),
        ("title,id,rating\nA,3,\n", r'"rating": row 0 is empty'),
        ("", r"a\.csv: found"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            files.read_csv(path, kinds)


def test_read_separated(tmp_path):
    path = tmp_path / "a.dat"
    kinds = {0: ("id", "int"), 2: ("title", "text")}
    path.write_bytes(b"7::x::Caf\xe9 \x85 (1995)\r\n8::y::B\n")
    assert files.read_separated(path, "::", 3, kinds).rows() == [(7, "Café \x85 (1995)"), (8, "B")]
    path.write_bytes(b"7::x::A\n8::B\n")
    with pytest.raises(ValueError, match="line 2 has 2 fields parted by '::', expected 3"):
        files.read_separated(path, "::", 3, kinds)
    path.write_bytes(b"7::x::A\nseven::y::B\n")
    with pytest.raises(ValueError, match=r'field 0 \("id"\): line 2 holds \'seven\', expected int'):
        files.read_separated(path, "::", 3, kinds)


def test_require_names_what_is_missing(tmp_path):
    (tmp_path / "a").write_text("")
    assert files.require(tmp_path, ["a"]) == [tmp_path / "a"]
    with pytest.raises(ValueError, match=r"found \['a'\], expected the file 'b'"):
        files.require(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match="found no folder"):
        files.require(tmp_path / "none", ["a"])


def test_ids_are_one_based_and_zero_where_unknown():
    words = files.vocabulary(pl.Series([30, 10, None, 30]), pl.Series([20]))
    np.testing.assert_array_equal(words, [10, 20, 30])
    got = files.index(words, pl.Series([30, None, 10, 15, 99]))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, [3, 0, 1, 0, 0])
    assert files.index(words[:0], pl.Series([1])).tolist() == [0]


# Archives.


def archive(path, members):
    """A zip of {name or ZipInfo: text}."""
    with zipfile.ZipFile(path, "w") as z:
        for name, text in members.items():
            z.writestr(name, text)
    return path


def link(name):
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def test_unpack_and_again(tmp_path):
    path = archive(tmp_path / "a.zip", {"set/": "", "set/u.data": "1", "set/..b": "2"})
    folder = files.unpack(path, tmp_path / "out")
    assert (folder / "set" / "u.data").read_text() == "1"
    assert (folder / "set" / "..b").read_text() == "2"
    (folder / "set" / "u.data").write_text("kept")
    assert files.unpack(path, folder) == folder
    assert (folder / "set" / "u.data").read_text() == "kept"


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        ("../evil", "climbs out"),
        ("set/../../evil", "climbs out"),
        ("..\\evil", "climbs out"),
        ("/etc/evil", "an absolute path"),
        ("C:/evil", "an absolute path"),
        ("C:\\evil", "an absolute path"),
        ("set\\evil", "backslashes"),
        (link("set/evil"), "a link"),
    ],
)
def test_unpack_refuses_members_that_leave_the_folder(tmp_path, member, problem):
    path = archive(tmp_path / "a.zip", {"set/good": "1", member: "/etc/passwd"})
    with pytest.raises(ValueError, match=rf"a\.zip: member '.*evil' is .*{problem}"):
        files.unpack(path, tmp_path / "box" / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["a.zip"]


def test_unpack_refuses_bombs_and_torn_archives(tmp_path):
    path = archive(tmp_path / "a.zip", {"big": "x" * 1000})
    with pytest.raises(ValueError, match="holds 1000 bytes, expected at most 999"):
        files.unpack(path, tmp_path / "out", max_bytes=999)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="expected a zip archive"):
        files.unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: (its address, the folder it serves)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Says nothing."""

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()
        thread.join(timeout=10)


def test_fetch_checks_a_published_hash(tmp_path, server):
    url, served = server
    (served / "a.zip").write_bytes(b"archive")
    good = "md5:" + hashlib.md5(b"archive").hexdigest()
    path = files.fetch(f"{url}/a.zip", tmp_path / "raw", pinned=good)
    assert path == tmp_path / "raw" / "a.zip" and path.read_bytes() == b"archive"
    assert [p.name for p in path.parent.iterdir()] == ["a.zip"]
    with pytest.raises(ValueError, match="hash"):
        files.fetch(f"{url}/a.zip", tmp_path / "other", pinned="md5:" + "0" * 32)
    assert not (tmp_path / "other" / "a.zip").exists()


def test_fetch_records_a_hash_and_holds_to_it(tmp_path, server, capsys):
    url, served = server
    (served / "a.zip").write_bytes(b"archive")
    path = files.fetch(f"{url}/a.zip", tmp_path / "raw")
    record = json.loads((tmp_path / "raw" / "a.zip.sha256.json").read_text())
    assert record["sha256"] == hashlib.sha256(b"archive").hexdigest() and record["bytes"] == 7
    assert "recorded at first use" in capsys.readouterr().err
    (served / "a.zip").write_bytes(b"another")
    assert files.fetch(f"{url}/a.zip", tmp_path / "raw").read_bytes() == b"archive"
    path.unlink()
    with pytest.raises(ValueError, match="hash"):
        files.fetch(f"{url}/a.zip", tmp_path / "raw")
    with pytest.raises(OSError, match=r"none\.zip: the download failed .* by hand"):
        files.fetch(f"{url}/none.zip", tmp_path / "raw")
