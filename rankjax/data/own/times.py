"""Columns of times, as numbers, text, timestamps or dates, become whole seconds since 1970 UTC."""

import re
import time

import polars as pl

from rankjax.data.own import cells, schema_file


def when(
    x: pl.Series,
    spec: schema_file.Files,
    schema: schema_file.ImportSchema,
    place: cells.Place,
    *,
    empty: bool = False,
) -> pl.Series:
    """A column of times as whole seconds, rounded down; null only where it may be `empty`."""
    column, unit = x.name, spec.time_unit
    seconds = _seconds(x, spec, place)
    if not empty:
        place.refuse(column, x, seconds.is_null(), "a time")
    earliest, latest = schema_file.seconds(schema.earliest), int(time.time()) + 86_400
    bad = (seconds < earliest) | (seconds > latest)
    expected = f"a time from {_date(earliest)} to today"
    if not x.dtype.is_temporal():
        expected += f" (time_unit = {unit!r})"
    if x.dtype.is_numeric() and unit in schema_file.UNITS and bad.any():
        found = x.filter(bad.fill_null(False))[0]
        for other, n in schema_file.UNITS.items():
            if earliest <= found // n <= latest:
                expected += f"; time_unit = {other!r} would fit: {_date(int(found // n))}"
    place.refuse(column, x, bad, expected)
    return seconds


def _seconds(x: pl.Series, spec: schema_file.Files, place: cells.Place) -> pl.Series:
    """int64 seconds since 1970 UTC of any column of times; null stays null."""
    column, unit, moment = x.name, spec.time_unit, x
    if x.dtype.is_numeric() and unit in schema_file.UNITS:
        if x.dtype.is_float():
            x = x.fill_nan(None)
            place.refuse(column, x, x.abs() >= 2.0**63, "a time")
        x = cells.int64(x, column, place) if x.dtype.is_integer() else x.floor().cast(pl.Int64)
        return x // schema_file.UNITS[unit]
    if x.dtype == pl.Date:
        moment = x.cast(pl.Datetime("us"))
    elif unit not in schema_file.UNITS and (x.dtype in cells.TEXT or x.dtype.is_integer()):
        text, pattern = x.cast(pl.String), unit
        if re.search("%[HIkl]", unit) and not re.search("%[MRTXcr]", unit):
            text, pattern = text + ":00", unit + ":%M"  # Polars knows no hour without a minute
        moment = text.str.to_datetime(pattern, strict=False, time_unit="us")
        place.refuse(column, x, moment.is_null() & text.is_not_null(), f"a time as {unit!r}")
    if not isinstance(moment.dtype, pl.Datetime):
        hint = "; text needs a format such as '%Y-%m-%d %H:%M:%S'" if x.dtype in cells.TEXT else ""
        place.refuse_type(column, x.dtype, f"times with time_unit = {unit!r}{hint}")
    if moment.dtype.time_zone is None:
        zone, local = spec.time_zone, moment
        moment = local.dt.replace_time_zone(zone, ambiguous="earliest", non_existent="null")
        lost = moment.is_null() & local.is_not_null()
        place.refuse(column, x, lost, f"a time that clocks of {zone} show")
    return moment.dt.epoch("s")


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
