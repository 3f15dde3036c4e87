"""A first look at files: separators, names, first rows, and columns that tell time."""

import datetime
import gzip

import polars as pl
import pyarrow as pa
import pytest

from rankjax.data.own import glance

UTC = datetime.UTC
FRAME = pl.DataFrame(
    {"user": [7, 8, 9], "name": ["a", 'b "c"', "d,e"], "x": [0.5, None, -1.0], "n": [1, 2, 3]}
)


def write(folder, name):
    """FRAME as a file of this name."""
    path = folder / name
    if name.endswith((".parquet", ".pq")):
        FRAME.write_parquet(path)
    elif name == "stream.arrow":
        table = FRAME.to_arrow(compat_level=pl.CompatLevel.oldest())
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    elif name.endswith((".arrow", ".feather", ".ipc")):
        FRAME.write_ipc(path)
    else:
        separator = {"semicolon": ";", "tab": "\t", "pipe": "|"}.get(name.split(".")[0], ",")
        text = FRAME.write_csv(separator=separator).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


@pytest.mark.parametrize(
    ("name", "separator"),
    [
        ("a.parquet", ","),
        ("A.PQ", ","),
        ("a.arrow", ","),
        ("stream.arrow", ","),
        ("a.feather", ","),
        ("a.csv", ","),
        ("semicolon.csv", ";"),
        ("pipe.txt", "|"),
        ("tab.tsv", "\t"),
        ("a.csv.gz", ","),
    ],
)
def test_every_format_gives_the_same_rows(name, separator, tmp_path):
    seen = glance.look(write(tmp_path, name.lower()))
    assert seen.frame.equals(FRAME)
    assert (seen.separator, seen.header) == (separator, None)
    assert seen.gaps == {"x"}


def test_only_the_first_rows_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(glance, "ROWS", 2)
    for name in ("a.parquet", "a.csv", "a.arrow"):
        assert glance.look(write(tmp_path, name)).frame.equals(FRAME.head(2))


def test_the_footer_of_parquet_tells_more_than_the_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(glance, "ROWS", 1)
    path = tmp_path / "a.parquet"
    FRAME.write_parquet(path, row_group_size=1)
    seen = glance.look(path)
    assert seen.bounds["user"] == (7, 9) and seen.bounds["name"] == ("a", "d,e")
    assert seen.gaps == {"x"} and not seen.frame["x"].null_count()
    assert "x" not in seen.bounds  # a row group of nothing tells no bounds
    FRAME.with_columns(user=pl.lit(50), x=pl.lit(0.0)).write_parquet(tmp_path / "b.parquet")
    both = glance.together([seen, glance.look(tmp_path / "b.parquet")])
    assert both.bounds["user"] == (7, 50) and both.gaps == {"x"}
    assert both.frame["user"].to_list() == [7, 50]
    csv = dict(bounds={}, gaps=frozenset({"n"}))
    again = glance.together([both, glance.Glance(path, ",", None, seen.frame, **csv)])
    assert again.bounds == {} and again.gaps == {"x", "n"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", b"", "found an empty file, expected rows"),
        ("a.csv", b"user,item\n", "found no rows, expected at least one"),
        ("a.json", b"{}", "found suffix '.json', expected one of"),
        ("noend", b"a,b\n1,2\n", "found suffix '', expected one of"),
        ("a.parquet", b"PAR1 not really PAR1", "expected"),
        ("a.arrow", b"not really", "expected"),
        ("a.csv", b"a,b\n1,2\n3,4,5\n", "xpected 2"),
        ("a.csv.gz", b"a,b\n1,2\n", "expected a readable CSV file"),
    ],
)
def test_files_that_cannot_be_read_are_named(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        glance.look(path)
    assert str(path) in str(caught.value)


def test_missing_files_are_named(tmp_path):
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(ValueError, match=rf"{name}: found no such file"):
            glance.look(tmp_path / name)


@pytest.mark.parametrize(
    ("lines", "separator", "header"),
    [
        # MovieLens 100K, u.data
        (
            [f"{u}\t{300 - u}\t{u % 5 + 1}\t{880_000_000 + u}" for u in range(1, 200)],
            "\t",
            ("user", "item", "rating", "time"),
        ),
        # user, item, category, behaviour, time, as in Taobao's UserBehavior
        (
            [
                f"{u},{9 * u},{u % 90},{'pv' if u % 3 else 'buy'},{1_511_544_070 + u}"
                for u in range(99)
            ],
            ",",
            ("user", "item", "column_3", "column_4", "time"),
        ),
        # a label, counts and hashes without time, as in Criteo's: nobody tells who or what
        (
            [f"{u % 2}\t{u * 7}\tab{u:04x}\t" for u in range(99)],
            "\t",
            ("label", "column_2", "column_3", "column_4"),
        ),
        (["1.5;x", "2;y"], ";", ("rating", "column_2")),
    ],
)
def test_files_without_a_line_of_names_get_names(lines, separator, header, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines) + "\n")
    seen = glance.look(path)
    assert (seen.separator, seen.header) == (separator, header)
    assert seen.frame.columns == list(header) and seen.frame.height == len(lines)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("userId", "user_id"),
        ("USER_ID", "user_id"),
        ("user-id ", "user_id"),
        ("User ID", "user_id"),
        ("movieId", "movie_id"),
        ("is_click", "is_click"),
        ("timestampMS", "timestamp_ms"),
        ("HTMLPage2", "html_page_2"),
        ("größe", "größe"),
        ("", ""),
    ],
)
def test_plain_names(name, wanted):
    assert glance.plain(name) == wanted


def moment(*x):
    return datetime.datetime(*x, tzinfo=UTC)


FIRST, LAST = moment(2020, 1, 2, 3, 4, 5), moment(2021, 12, 31, 23, 0, 1)


@pytest.mark.parametrize(
    ("unit", "factor"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)]
)
@pytest.mark.parametrize("dtype", [pl.Int64, pl.UInt64, pl.Float64])
def test_numbers_since_1970(unit, factor, dtype):
    x = pl.Series([int(t.timestamp()) * factor for t in (LAST, FIRST)] + [None], dtype=dtype)
    assert glance.clock(x) == glance.Clock(unit, False, FIRST, LAST)


@pytest.mark.parametrize("format", glance.MOMENTS)
def test_texts_of_moments(format):
    """Written by Python, read as the same format, and as no format before it."""
    texts = [t.strftime(format.replace("%.f", "")) for t in (FIRST, LAST)]
    found = glance.clock(pl.Series(texts))
    assert found is not None and not found.whole_days
    whole = "%S" in format
    assert found.first == (FIRST if whole else FIRST.replace(second=0))
    assert found.last == (LAST if whole else LAST.replace(second=0))
    parsed = pl.Series(texts).str.to_datetime(found.unit)
    assert parsed.dt.epoch("s").to_list() == [int(t.timestamp()) for t in (found.first, found.last)]
    if "%.f" not in format:  # without a fraction, the format without one comes first
        assert found.unit == format


@pytest.mark.parametrize("format", glance.DATES)
def test_texts_of_days(format):
    days = [moment(2020, 1, 25), moment(2021, 12, 31)]
    found = glance.clock(pl.Series([t.strftime(format) for t in days]))
    assert found == glance.Clock(format, True, *days)


def test_columns_of_time_types():
    naive = pl.Series([FIRST.replace(tzinfo=None), LAST.replace(tzinfo=None)])
    assert glance.clock(naive) == glance.Clock("", False, FIRST, LAST)
    berlin = pl.Series([FIRST, LAST]).dt.convert_time_zone("Europe/Berlin")
    found = glance.clock(berlin)
    assert (found.unit, found.first) == ("", FIRST)
    days = pl.Series([datetime.date(2020, 1, 2), None, datetime.date(2021, 1, 2)])
    assert glance.clock(days) == glance.Clock("", True, moment(2020, 1, 2), moment(2021, 1, 2))


def test_whole_days_in_seconds():
    found = glance.clock(pl.Series([86_400 * 18_000, 86_400 * 18_001]))
    assert found.whole_days and found.unit == "s"


TOMORROW = int(datetime.datetime.now(UTC).timestamp()) + 2 * 86_400


@pytest.mark.parametrize(
    "values",
    [
        [],
        [None],
        [0, 1_600_000_000],
        [631_151_999],  # 1989
        [1_600_000_000, TOMORROW],
        [-1_600_000_000],
        [1, 2, 3],
        [float("nan"), 1.6e9],
        ["2020-01-02 03:04:05", "yesterday"],
        ["1960-01-02 03:04:05"],
        ["2020-13-02"],
        ["abc"],
        [True, False],
        [[1_600_000_000]],
    ],
)
def test_what_tells_no_time(values):
    assert glance.clock(pl.Series(values)) is None


@pytest.mark.parametrize("dtype", [pl.Int8, pl.UInt16, pl.Int32, pl.UInt64, pl.Float32])
def test_numbers_of_every_size_are_looked_at(dtype):
    assert glance.clock(pl.Series([1, 100], dtype=dtype)) is None
    assert glance.clock(pl.Series([2**64 - 1], dtype=pl.UInt64)) is None
