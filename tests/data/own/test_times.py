"""Every kind of time against datetime; what cannot be a time is refused by its row."""

import datetime
import decimal
import math
import pathlib
import time
import zoneinfo

import polars as pl
import pytest

from rankjax.data.own import cells, schema_file, times

DAY, NOW = 86_400, int(time.time())
UTC = datetime.UTC


def series(x, dtype=None) -> pl.Series:
    return pl.Series("c", x, dtype=dtype)


def refused(row: int | None, message: str, call, *args, **options) -> None:
    """Where: the file and column, and the row where it is one row's fault."""
    with pytest.raises(ValueError, match=message) as error:
        call(*args, **options)
    where = 'folder/f.csv, column "c": ' + ("found type" if row is None else f"row {row} holds ")
    assert str(error.value).startswith(where) and ", expected " in str(error.value)


def seconds(x, *, empty: bool = False, earliest="1900-01-01", **spec) -> list:
    files = schema_file.Files(files=("f",), **spec)
    events = schema_file.Events(files=("f",), user="u", item="i", time="t")
    schema = schema_file.ImportSchema(
        name="s", events=(events,), negatives=schema_file.Negatives(), earliest=earliest
    )
    place = cells.Place(pathlib.Path("folder/f.csv"), pl.Series(range(len(x))))
    found = times.when(x, files, schema, place, empty=empty)
    assert found.dtype == pl.Int64
    return found.to_list()


@pytest.mark.parametrize("unit", [*schema_file.UNITS])
def test_numbers_of_every_unit_are_rounded_down(unit):
    n = schema_file.UNITS[unit]
    whole = [1_700_000_000 * n, 1_700_000_000 * n + n - 1, -n - 1, -1, 0, n]
    want = [1_700_000_000, 1_700_000_000, -2, -1, 0, 1]
    assert seconds(series(whole), time_unit=unit) == want
    floats = [x * n for x in (1.6e9, 1.6e9 + 0.25, -0.25, -1.0, 0.0)]
    want = [1_600_000_000, 1_600_000_000, -1, -1, 0]
    assert seconds(series(floats), time_unit=unit) == want
    exact = [decimal.Decimal("1700000000.5") * n, decimal.Decimal("-0.5") * n]
    assert seconds(series(exact, pl.Decimal(38, 9)), time_unit=unit) == [1_700_000_000, -1]


@pytest.mark.parametrize("dtype", [pl.Int32, pl.UInt32, pl.UInt64])
def test_narrow_numbers_are_times(dtype):
    assert seconds(series([1_700_000_000, 5], dtype)) == [1_700_000_000, 5]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin", "America/St_Johns"])
@pytest.mark.parametrize("of_file", ["UTC", "Asia/Tokyo", "Europe/Berlin"])
def test_timestamps_with_and_without_a_zone(unit, zone, of_file):
    """A zone of the column's own counts before the schema's."""
    walls = [
        *((2024, 7, 1, 12, 30, 15, 900_000), (2024, 1, 1), (1969, 12, 31, 23, 59, 59, 500_000)),
        (2024, 10, 27, 2, 30),  # twice in Berlin: the first counts
    ]
    moments = [datetime.datetime(*x, tzinfo=zoneinfo.ZoneInfo(zone or of_file)) for x in walls]
    want = [math.floor(m.timestamp()) for m in moments]
    x = series([datetime.datetime(*x) for x in walls], pl.Datetime(unit))
    if zone is not None:
        x = x.dt.replace_time_zone(zone, ambiguous="earliest")
    for time_unit in ("s", "%Y"):  # neither matters
        assert seconds(x, time_zone=of_file, time_unit=time_unit) == want


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_dates_are_midnights_of_the_zone(zone):
    x = series([datetime.date(2024, 2, 29), datetime.date(1960, 1, 1)])
    want = [
        int(datetime.datetime(*d, tzinfo=zoneinfo.ZoneInfo(zone)).timestamp())
        for d in ((2024, 2, 29), (1960, 1, 1))
    ]
    assert seconds(x, time_zone=zone) == want


@pytest.mark.parametrize(
    ("pattern", "text", "moment"),
    [
        ("%Y-%m-%d %H:%M:%S", "2024-07-01 12:30:15", (2024, 7, 1, 12, 30, 15)),
        ("%Y-%m-%d %H:%M:%S%.f", "2024-07-01 12:30:15.987", (2024, 7, 1, 12, 30, 15)),
        ("%Y-%m-%d", "2024-07-01", (2024, 7, 1)),
        ("%Y%m%d", "20240701", (2024, 7, 1)),
        ("%y%m%d%H", "24070112", (2024, 7, 1, 12)),
        ("%d.%m.%Y, %H h", "01.07.2024, 12 h", (2024, 7, 1, 12)),
        ("%m/%d/%Y %I:%M:%S %p", "7/1/2024 9:03:02 PM", (2024, 7, 1, 21, 3, 2)),
        ("%Y-%m-%d %T", "2024-07-01 12:30:15", (2024, 7, 1, 12, 30, 15)),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
def test_text_by_format(pattern, text, moment, zone):
    want = int(datetime.datetime(*moment, tzinfo=zoneinfo.ZoneInfo(zone)).timestamp())
    for dtype in (pl.String, pl.Categorical):
        x = series([text, text], dtype)
        assert seconds(x, time_unit=pattern, time_zone=zone) == [want, want]
    if text.isdigit():
        assert seconds(series([int(text)]), time_unit=pattern, time_zone=zone) == [want]
    x = series([text, None, "2024/x", None])
    refused(2, "'2024/x', expected a time as '%", seconds, x, time_unit=pattern, empty=True)


def test_text_with_a_zone_of_its_own():
    x = series(["2024-07-01T12:00:00+0200", "2024-07-01T12:00:00-0330"])
    noon = int(datetime.datetime(2024, 7, 1, 12, tzinfo=UTC).timestamp())
    found = seconds(x, time_unit="%Y-%m-%dT%H:%M:%S%z", time_zone="Asia/Tokyo")
    assert found == [noon - 2 * 3600, noon + 3 * 3600 + 1800]


def test_times_that_no_clock_showed():
    walls = [datetime.datetime(2024, 3, 31, 1, 59), datetime.datetime(2024, 3, 31, 2, 30)]
    message = r"2024, 3, 31, 2, 30\), expected a time that clocks of Europe/Berlin show"
    refused(1, message, seconds, series(walls), time_zone="Europe/Berlin")
    text = series([w.strftime("%F %T") for w in walls])
    refused(1, "'2024-03-31 0", seconds, text, time_unit="%F %T", time_zone="Europe/Berlin")


@pytest.mark.parametrize(
    "x",
    [
        series([NOW, None]),
        series([float(NOW), math.nan]),
        series([datetime.datetime(2024, 1, 1), None]),
        series([datetime.date(2024, 1, 1), None]),
    ],
)
def test_missing_times(x):
    refused(1, "(nothing|nan), expected a time", seconds, x)
    found = seconds(x, empty=True)
    assert found[0] is not None and found[1] is None


@pytest.mark.parametrize("bad", [math.inf, -math.inf, 1e300, -1e19])
def test_numbers_that_are_no_times(bad):
    refused(1, "expected a time", seconds, series([0.0, bad]))


def test_unsigned_times_above_the_largest_int64():
    x = series([1, 2**64 - 1], pl.UInt64)
    refused(1, "expected whole numbers up to", seconds, x, time_unit="ns")


@pytest.mark.parametrize(
    ("x", "unit", "type_"),
    [
        (series(["5"]), "s", "String.*text needs a format such as '%Y-%m-%d"),
        (series([5.0]), "%Y", "Float64, expected times with time_unit = '%Y'"),
        (series([True]), "s", "Boolean"),
        (series([datetime.time(1)]), "s", "Time"),
        (series([datetime.timedelta(1)]), "s", "Duration"),
        (series([None, None]), "s", "Null"),
    ],
)
def test_types_that_are_no_times(x, unit, type_):
    refused(None, type_, seconds, x, time_unit=unit)


@pytest.mark.parametrize("earliest", ["1990-01-01", "2020-06-01T12:00:00", 0])
def test_times_before_the_earliest_and_after_tomorrow(earliest):
    low = schema_file.seconds(earliest)
    good = [low, NOW, NOW + DAY - 60]
    assert seconds(series(good), earliest=earliest) == good
    date = datetime.datetime.fromtimestamp(low, UTC).strftime("%Y-%m-%d")
    message = rf"expected a time from {date} to today \(time_unit = 's'\)"
    for bad in (low - 1, NOW + DAY + 7200):  # the clock goes on
        refused(1, f"{bad}, {message}", seconds, series([NOW, bad, bad]), earliest=earliest)
    late = datetime.datetime.now() + datetime.timedelta(days=3)
    x = series([late])
    refused(0, rf"{late.year}.*{date} to today$", seconds, x, earliest=earliest)


@pytest.mark.parametrize("right", [*schema_file.UNITS])
@pytest.mark.parametrize("said", [*schema_file.UNITS])
@pytest.mark.parametrize("of", [int, float, decimal.Decimal])
def test_a_wrong_unit_is_told(right, said, of):
    moment = 1_600_000_000  # 2020-09-13
    x = series([None, of(moment * schema_file.UNITS[right])])
    if right == said:
        assert seconds(x, time_unit=said, empty=True) == [None, moment]
        return
    message = rf"\(time_unit = '{said}'\); time_unit = '{right}' would fit: 2020-09-13$"
    refused(1, message, seconds, x, time_unit=said, empty=True, earliest="1990-01-01")


@pytest.mark.parametrize("sentinel", [0, -1])
def test_no_unit_fits_a_sentinel(sentinel):
    x = series([sentinel])
    refused(0, r"\(time_unit = 's'\)$", seconds, x, earliest="1990-01-01")
