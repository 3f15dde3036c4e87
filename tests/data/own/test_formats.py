"""The same rows from every kind of file; what is no whole file is refused by name and row."""

import gzip
import random

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet
import pytest

from rankjax.data.own import formats, schema_file

Files, Input, Label = schema_file.Files, schema_file.Input, schema_file.Label
ROWS = [
    (7, "a", 0.5, True),
    (None, "b, c", -2.25, False),
    (-3, 'said "no"', None, True),
    (2**53 + 1, "ü\nline", 1e-300, False),
    (0, None, 3.0, None),
] * 7
NAMES = ("n", "word, with comma", "x", "yes")


def spec(**fields) -> Files:
    return Files(files=("f",), **fields)


def impressions(**fields) -> schema_file.Impressions:
    base = {"files": ("f",), "user": "u", "time": "t", "labels": {"click": Label(column="y")}}
    return schema_file.Impressions(**base | fields)


def frame() -> pl.DataFrame:
    return pl.DataFrame(ROWS, schema=list(NAMES), orient="row")


def table() -> pa.Table:
    return pa.table({name: [row[i] for row in ROWS] for i, name in enumerate(NAMES)})


def text(separator: str, header: bool) -> str:
    """The rows as a CSV file, written without a library."""

    def cell(x):
        if x is None:
            return ""
        if isinstance(x, str):
            return '"' + x.replace('"', '""') + '"'
        return {True: "true", False: "false"}[x] if isinstance(x, bool) else repr(x)

    lines = [[f'"{n}"' for n in NAMES]] * header + [[cell(x) for x in row] for row in ROWS]
    return "".join(separator.join(line) + "\n" for line in lines)


def write_arrow(path, found: pa.Table, kind: str = "file", rows: int = 1000, **options) -> list:
    """Writes an Arrow file or stream; returns where its batches end."""
    new, options = getattr(pa.ipc, f"new_{kind}"), pa.ipc.IpcWriteOptions(**options)
    with pa.OSFile(str(path), "wb") as sink, new(sink, found.schema, options=options) as out:
        ends = []
        for batch in found.to_batches(max_chunksize=rows):
            out.write_batch(batch)
            ends.append(sink.tell())
    return ends


def write(path, how: str) -> Files:
    """Writes ROWS as a file of this kind."""
    if how == "parquet":
        pa.parquet.write_table(table(), path, row_group_size=4)
    elif how in ("file", "stream"):
        write_arrow(path, table(), how, rows=3)
    elif how == "lz4":
        write_arrow(path, table(), compression="lz4")
    else:
        separator = "\t" if "tab" in how else ","
        data = text(separator, "bare" not in how).encode()
        if "windows" in how:
            data = b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n").replace(b"\r\nline", b"\nline")
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return spec(separator=separator, header=NAMES if "bare" in how else None)
    return spec()


KINDS = [
    *(("f.parquet", "parquet"), ("F.PQ", "parquet"), ("f.csv", "comma"), ("f.tsv", "tab")),
    *(("f.csv.gz", "comma"), ("f.2024.txt", "tab bare"), ("f.csv", "bare")),
    *(("f.arrow", "file"), ("f.ipc", "stream"), ("f.feather", "lz4")),
]


@pytest.mark.parametrize(("name", "how"), KINDS)
def test_every_kind_of_file_gives_the_same_rows(name, how, tmp_path):
    found = write(tmp_path / name, how)
    assert formats.columns_of(tmp_path / name, found) == list(NAMES)
    everything = pl.concat(formats.raw_frames(tmp_path / name, found, None, None))
    assert everything.equals(frame()) and everything.schema == frame().schema
    wanted = [NAMES[2], NAMES[0]]
    for some in formats.raw_frames(tmp_path / name, found, wanted, None):
        assert sorted(some.columns) == sorted(wanted)
    some = pl.concat(formats.raw_frames(tmp_path / name, found, wanted, None))
    assert some.select(wanted).equals(frame().select(wanted))


def test_a_file_of_another_system_reads_alike(tmp_path):
    """Byte order mark, carriage returns."""
    found = write(tmp_path / "f.csv", "windows")
    assert pl.concat(formats.raw_frames(tmp_path / "f.csv", found, None, None)).equals(frame())


@pytest.mark.parametrize("how", ["parquet", "file", "stream", "comma"])
def test_blocks_do_not_show(how, tmp_path, monkeypatch):
    """Rows that lie across blocks, quoted line ends at a block's end included."""
    monkeypatch.setattr(formats, "BATCH", 2)
    path = tmp_path / ("f.csv" if how == "comma" else f"f.{'ipc' if how == 'stream' else how}")
    found = write(path.with_suffix(".arrow") if how == "file" else path, how)
    path = path.with_suffix(".arrow") if how == "file" else path
    for block in (60, 61, 64, 100) if how == "comma" else (0,):
        monkeypatch.setattr(formats, "BLOCK", block)
        frames = list(formats.raw_frames(path, found, None, None))
        assert len(frames) > 5 and max(f.height for f in frames) <= 6
        assert pl.concat(frames).equals(frame())


@pytest.mark.parametrize("rows", [1, 3, 10, 34, 35, 36, 100])
def test_rechunk(rows):
    everything = pl.DataFrame({"x": range(35)})
    want = [list(range(start, min(start + rows, 35))) for start in range(0, 35, rows)]
    rng = random.Random(0)
    for _ in range(20):
        cuts = sorted(rng.choices(range(36), k=rng.randrange(12)))
        pieces = [everything[a:b] for a, b in zip([0, *cuts], [*cuts, 35])]
        found = list(formats.rechunk(iter(pieces), rows))
        assert [f["x"].to_list() for f in found] == want
        assert [f["@row"].to_list() for f in found] == want
        assert all(f.schema == {"@row": pl.Int64, "x": pl.Int64} for f in found)


def test_rechunk_of_nothing_keeps_the_columns():
    empty = pl.DataFrame({"x": [1]}).clear()
    (found,) = formats.rechunk(iter([empty, empty]), 5)
    assert found.height == 0 and found.columns == ["@row", "x"]


def test_dictionaries_of_batches_may_differ(tmp_path):
    batches = [pa.record_batch({"w": pa.array(x).dictionary_encode()}) for x in (["b", "a"], ["c"])]
    path = tmp_path / "f.arrow"
    write_arrow(path, pa.Table.from_batches(batches), "stream")
    (found,) = formats.rechunk(formats.raw_frames(path, spec(), ["w"], None), 10)
    assert found["w"].cast(pl.String).to_list() == ["b", "a", "c"]


def head_of(path, monkeypatch, of: Files, more=None) -> dict[str, pl.DataType]:
    """Types told from the first rows alone; 100 bytes are ten rows or more."""
    monkeypatch.setattr(formats, "HEAD", 100)
    monkeypatch.setattr(formats, "BLOCK", 100)
    names = formats.columns_of(path, of)
    return dict(pl.concat(formats.raw_frames(path, of, names, more)).schema)


def test_types_are_told_by_the_head_and_the_roles(tmp_path, monkeypatch):
    """A column that is empty or whole at first may hold fractions later where it is measured."""
    rows = ["1,,1,2,,2,2024-01-01,12,12"] * 20 + ["1,5.5,1.5,2.5,7,2,2024-01-01,b,3"]
    (tmp_path / "f.csv").write_text("u,a,b,r,z,y,t,g,i\n" + "\n".join(rows) + "\n")
    found = impressions(
        item="i",
        time_unit="%Y-%m-%d",
        labels={"good": Label(column="r", at_least=2)},
        features={
            "a": Input(column="a", kind="dense"),
            "b": Input(column="b", kind="dense"),
            "z": Input(column="z"),
            "g": Input(column="g", kind="ids", separator="|"),
        },
    )
    assert head_of(tmp_path / "f.csv", monkeypatch, found) == {
        **{"u": pl.Int64, "a": pl.Float64, "b": pl.Float64, "r": pl.Float64},
        **{"z": pl.String, "y": pl.Int64, "t": pl.String, "g": pl.String, "i": pl.Int64},
    }


def test_an_id_stays_whole_though_it_is_measured_too(tmp_path, monkeypatch):
    (tmp_path / "f.csv").write_text("u,age,t,k,m\n" + "1,30,5,0,2\n" * 30)
    features = {"years": Input(column="age", kind="dense"), "age": Input(column="age")}
    of = schema_file.Condition(column="k", above=0)
    more = schema_file.Negatives(features={"m": Input(column="m", kind="dense")}, of=of)
    events = schema_file.Events(files=("f",), user="u", time="t", features=features)
    found = head_of(tmp_path / "f.csv", monkeypatch, events, more)
    whole = dict.fromkeys(("u", "age", "t"), pl.Int64)
    assert found == whole | {"k": pl.Float64, "m": pl.Float64}


def test_births_may_be_missing_at_first(tmp_path, monkeypatch):
    (tmp_path / "f.csv").write_text("i,born\n" + "1,\n" * 60 + "2,17\n")
    found = schema_file.Catalogue(files=("f",), id="i", birth="born")
    assert head_of(tmp_path / "f.csv", monkeypatch, found)["born"] == pl.Int64


@pytest.mark.parametrize("header", [None, ("y", "u")])
def test_a_later_cell_of_another_type_is_refused_by_row(header, tmp_path, monkeypatch):
    lines = ["y,u"] * (header is None) + ["2,11"] * 50 + ["1,x7"] + ["1,1"] * 50
    path = tmp_path / "f.csv"
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(formats, "HEAD", 100)
    message = r'f\.csv, column "u": row 50: found invalid value \'x7\', expected int64, as in'
    with pytest.raises(ValueError, match=message):
        list(formats.raw_frames(path, spec(header=header), ["u", "y"], None))
    list(formats.raw_frames(path, spec(header=header), ["y"], None))  # nobody asked for u


@pytest.mark.parametrize("header", [None, ("u", "y")])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3,a, b", "holds 3 cells, '3,a, b', expected 2"),  # a comma that lacks its quotes
        ("3", "holds 1 cells, '3', expected 2"),  # the last line of half a file
        ('"half a c', """holds 1 cells, '"half a c', expected 2"""),
    ],
)
@pytest.mark.parametrize("before", [3, 900])
def test_a_line_that_does_not_fit_is_refused_by_row(
    header, line, message, before, tmp_path, monkeypatch
):
    monkeypatch.setattr(formats, "HEAD", 1000)
    monkeypatch.setattr(formats, "BLOCK", 1000)
    path = tmp_path / "f.csv"
    path.write_text("\n".join(["u,y"] * (header is None) + ["1,2"] * before + [line]))
    end = r"\(separator ','; a cell that holds it needs quotes\)"
    with pytest.raises(ValueError, match=rf"f\.csv: row {before} {message} {end}"):
        list(formats.raw_frames(path, spec(header=header), ["u"], None))


def refused(path, message: str, of: Files | None = None, wanted=("n",)) -> None:
    with pytest.raises(ValueError, match=message) as error:
        list(formats.raw_frames(path, of or spec(), list(wanted), None))
    assert str(path) in str(error.value) and ", expected " in str(error.value)


@pytest.mark.parametrize("name", ["f.csv", "f.parquet", "f.arrow", "f.csv.gz", "f.txt"])
def test_no_file_and_an_empty_file(name, tmp_path):
    path = tmp_path / name
    refused(path, "found no such file, expected rows")
    (tmp_path / "folder.csv").mkdir()
    refused(tmp_path / "folder.csv", "found no such file")
    path.write_bytes(b"")
    refused(path, "found an empty file, expected rows")
    with pytest.raises(ValueError, match="found an empty file"):
        formats.columns_of(path, spec())


@pytest.mark.parametrize("name", ["f.xlsx", "f", "f.gz", "f.parquet.zip"])
def test_an_unknown_suffix(name, tmp_path):
    (tmp_path / name).write_bytes(b"n\n1\n")
    refused(tmp_path / name, r"found suffix '.*', expected one of \['.parquet', '.pq', '.csv'")


@pytest.mark.parametrize(("name", "how"), KINDS)
def test_a_missing_column_is_said_with_those_that_are_there(name, how, tmp_path):
    found = write(tmp_path / name, how)
    message = r"found columns \['n', 'word, with comma', 'x', 'yes'\], expected \['m', 'N'\] too"
    refused(tmp_path / name, message, found, ["m", "n", "N"])


def test_a_column_that_is_there_twice(tmp_path):
    (tmp_path / "f.csv").write_text("n,m,n\n1,2,3\n")
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["n", "n"])
    pa.parquet.write_table(twice, tmp_path / "f.parquet")
    write_arrow(tmp_path / "f.arrow", twice)
    for name in ("f.csv", "f.parquet", "f.arrow"):
        refused(tmp_path / name, r"found columns \['n'\] more than once, expected one of each")
    found = pl.concat(formats.raw_frames(tmp_path / "f.csv", spec(), ["m"], None))
    assert found.rows() == [(2,)]  # the others do not matter where nobody asks
    (*_, found) = formats.raw_frames(tmp_path / "f.csv", spec(), None, None)
    assert found.columns == ["n", "m"]


LARGE = pa.table({"n": np.arange(20_000), "x": np.random.default_rng(0).normal(size=20_000)})


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_parts_of_parquet_files(dictionary, compression, tmp_path):
    path = tmp_path / "f.parquet"
    options = {"use_dictionary": dictionary, "compression": compression}
    pa.parquet.write_table(LARGE, path, row_group_size=5000, **options)
    whole = path.read_bytes()
    assert sum(f.height for f in formats.raw_frames(path, spec(), ["n", "x"], None)) == 20_000
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for end in (2, len(whole) // 2, len(whole) - footer, len(whole) - 1):  # half-written
        path.write_bytes(whole[:end])
        refused(path, "expected a whole file", wanted=["n", "x"])
    # Bytes are lost in the middle; without a dictionary nothing else notices at the end.
    for at in (5, len(whole) // 2, len(whole) - footer - 2000):
        path.write_bytes(whole[:at] + whole[at + 1000 :])
        refused(path, r"found \d+ bytes before the footer, expected at least \d+", wanted=["x"])


def test_parquet_pages_are_checked_where_they_hold_a_sum(tmp_path):
    path = tmp_path / "f.parquet"
    options = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
    pa.parquet.write_table(LARGE, path, **options)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    refused(path, "expected a whole file", wanted=["n", "x"])


def test_parts_of_arrow_files(tmp_path):
    path = tmp_path / "f.arrow"
    for kind, end in (("file", 6), ("stream", 8)):
        ends = write_arrow(path, LARGE, kind, rows=4000)
        whole = path.read_bytes()
        for cut in (3, 100, *ends, ends[1] - 64, len(whole) - end, len(whole) - 1):
            path.write_bytes(whole[:cut])
            refused(path, "expected a whole file")
            with pytest.raises(ValueError, match="expected a whole file"):
                formats.columns_of(path, spec())


def test_arrow_files_with_broken_offsets(tmp_path):
    """Text whose offsets run backwards must not be read at all."""
    path, table_ = tmp_path / "f.arrow", pa.table({"n": ["a", "bc", "def"]})
    write_arrow(path, table_)
    good, bad = (np.array(x, np.int32).tobytes() for x in ([0, 1, 3, 6], [0, 5, 3, 6]))
    assert path.read_bytes().count(good) == 1
    path.write_bytes(path.read_bytes().replace(good, bad))
    refused(path, "expected a whole file")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([(1, 2, 3)], pa.month_day_nano_interval()),
        pa.array([1], pa.decimal256(50)),
        pa.array([[1]], pa.list_view(pa.int64())),
    ],
)
def test_types_that_frames_do_not_know(column, tmp_path):
    """Refused where they are wanted, no matter where they are not."""
    write_arrow(tmp_path / "f.arrow", pa.table({"n": [1], "odd": column}))
    assert formats.columns_of(tmp_path / "f.arrow", spec()) == ["n", "odd"]
    found = pl.concat(formats.raw_frames(tmp_path / "f.arrow", spec(), ["n"], None))
    assert found.rows() == [(1,)]
    refused(tmp_path / "f.arrow", "expected a whole file", wanted=["odd"])


@pytest.mark.parametrize("cut", [5, 200, 1])
def test_parts_of_compressed_text(cut, tmp_path, monkeypatch):
    lines = "n\n" + "\n".join(str(x) for x in np.random.default_rng(0).integers(0, 10**9, 1000))
    path = tmp_path / "f.csv.gz"
    path.write_bytes(gzip.compress(lines.encode())[:-cut])
    refused(path, "Truncated compressed stream")
    monkeypatch.setattr(formats, "HEAD", 1000)  # and no more is read to see what there is
    assert formats.columns_of(path, spec()) == ["n"]
    path.write_bytes(lines.encode())
    refused(path, "incorrect header check")


def test_text_that_is_no_utf_8(tmp_path):
    (tmp_path / "f.csv").write_bytes(b"u,n\na,1\nb,1\n\xfc,2\n")
    refused(tmp_path / "f.csv", r'f.csv, column "u": row 2: found invalid UTF8 data', wanted=["u"])
    (tmp_path / "f.csv").write_bytes(b"\xfc,n\na,1\n")
    refused(tmp_path / "f.csv", "'utf-8' codec can't decode byte 0xfc")
    for name in ("utf-16-le", "utf-16-be"):
        (tmp_path / "f.csv").write_bytes("\ufeffu,n\na,1\n".encode(name))
        refused(tmp_path / "f.csv", "found UTF-16 text, expected UTF-8")


@pytest.mark.parametrize("content", ["\n", "\n\n", "n"])
def test_text_without_a_header_and_rows(content, tmp_path):
    (tmp_path / "f.csv").write_text(content)
    refused(tmp_path / "f.csv", "Empty CSV file")


@pytest.mark.parametrize("name", ["f.csv", "f.parquet", "f.arrow", "f.ipc"])
def test_a_file_of_no_rows_has_columns(name, tmp_path):
    path, none = tmp_path / name, pa.table({"n": pa.array([], pa.int64()), "m": []})
    if path.suffix == ".csv":
        path.write_text("n,m\n")
    elif path.suffix == ".parquet":
        pa.parquet.write_table(none, path)
    else:
        write_arrow(path, none, "file" if path.suffix == ".arrow" else "stream")
    assert formats.columns_of(path, spec()) == ["n", "m"]
    found = list(formats.raw_frames(path, spec(), ["m", "n"], None))
    assert found and all(f.height == 0 and sorted(f.columns) == ["m", "n"] for f in found)


def test_too_little_memory_is_not_said_to_be_the_file_s_fault(tmp_path, monkeypatch):
    write(tmp_path / "f.parquet", "parquet")

    def full(*_, **__):
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", full)
    with pytest.raises(MemoryError, match="malloc of size 64"):
        list(formats.raw_frames(tmp_path / "f.parquet", spec(), None, None))


def test_a_row_longer_than_a_block_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 100)
    (tmp_path / "f.csv").write_text("n,m\n" + "1,2\n" * 10 + '1,"' + "x,\n" * 200 + '"\n')
    refused(tmp_path / "f.csv", "found a row of more than 0 MiB, expected less")


def test_a_large_file_comes_in_blocks(tmp_path, monkeypatch):
    """One row is cut by the end of the head; a block holds at most 26,215 rows of 10 bytes."""
    monkeypatch.setattr(formats, "HEAD", 1 << 20)
    monkeypatch.setattr(formats, "BLOCK", 1 << 18)
    path = tmp_path / "f.csv"
    path.write_text("n,m\n" + "1234567,x\n" * 400_000)
    assert formats.columns_of(path, spec()) == ["n", "m"]
    frames = formats.raw_frames(path, spec(), ["n"], None)
    sizes = [f.height for f in frames]
    assert sum(sizes) == 400_000 and max(sizes) <= 26_215


def test_words_that_mean_missing_are_so_in_numbers_only(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text('n,country\n1,NA\nNA,\nNULL,null\n4,""\n')
    found = pl.concat(formats.raw_frames(path, spec(), None, None))
    assert found["n"].to_list() == [1, None, None, 4]
    assert found["country"].to_list() == ["NA", None, "null", None]


def test_columns_named_as_text_are_text(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("id,n\n007,1\n12,2\n")
    plain = pl.concat(formats.raw_frames(path, spec(), None, None))
    named = pl.concat(formats.raw_frames(path, spec(text=("id",)), None, None))
    assert plain["id"].to_list() == [7, 12] and named["id"].to_list() == ["007", "12"]
    assert named["n"].to_list() == [1, 2]
