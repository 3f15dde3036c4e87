"""A first look at a file: how it is written, its first rows, and what its columns could mean."""

import csv
import dataclasses
import datetime
import gzip
import pathlib
import re
from collections.abc import Sequence

import polars as pl

from rankjax.data.own import formats, schema_file

ROWS = 10_000  # of a file that are looked at
HEAD = 1 << 16  # bytes of a CSV file that tell its separator
SEPARATORS = (",", "\t", ";", "|")
# Tried in this order; "%.f" is an optional fraction, "%z" an offset such as +01:00.
MOMENTS = (
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%dT%H:%M:%S",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.fZ",
    "%Y-%m-%d %H:%M:%S%.f%z",
    "%Y-%m-%dT%H:%M:%S%.f%z",
    "%Y-%m-%d %H:%M:%S%.f UTC",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%dT%H:%M",
    "%Y/%m/%d %H:%M:%S",
    "%Y/%m/%d %H:%M",
    "%m/%d/%Y %I:%M:%S %p",
    "%m/%d/%Y %H:%M:%S",
    "%d/%m/%Y %H:%M:%S",
    "%d.%m.%Y %H:%M:%S",
    "%d.%m.%Y %H:%M",
    "%a %b %d %H:%M:%S %z %Y",
    "%Y%m%d%H%M%S",
)
OLDEST = datetime.datetime(1990, 1, 1, tzinfo=datetime.UTC)  # as an import takes them
DATES = ("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%Y%m%d")


@dataclasses.dataclass(frozen=True, eq=False)
class Glance:
    """separator, header: as schema.toml says them; header is None where the file has a first line
    of names, else names made up by `names_of`. frame: the first rows, typed as an import reads
    them. bounds: {column: (lowest, highest)} of the whole file, where its footer tells. gaps:
    columns with empty cells.
    """

    path: pathlib.Path
    separator: str
    header: tuple[str, ...] | None
    frame: pl.DataFrame
    bounds: dict[str, tuple[object, object]]
    gaps: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Clock:
    """How a column tells time. unit: as schema.toml says it, "" where the column's type says it.
    first, last: of the rows looked at, UTC. relative: counted from who knows when."""

    unit: str
    whole_days: bool
    first: datetime.datetime
    last: datetime.datetime
    relative: bool = False


def look(path: pathlib.Path) -> Glance:
    """Reads the first ROWS rows; ValueError, naming the file, where there are none to read."""
    separator, header = ",", None
    kind = [s.lower() for s in path.suffixes if s.lower() != ".gz"][-1:]
    if path.is_file() and kind and kind[0] in formats.CSV:
        separator, header = _csv_dialect(path)
    frame = _first_rows(path, separator, header)
    if not frame.height:
        raise ValueError(f"{path}: found no rows, expected at least one")
    if header is not None:
        header = names_of(frame)
        frame = frame.rename(dict(zip(frame.columns, header)))
    bounds, gaps = _footer(path) if kind and kind[0] in formats.PARQUET else ({}, set())
    gaps |= {name for name in frame.columns if frame[name].null_count()}
    return Glance(path, separator, header, frame, bounds, frozenset(gaps))


def _first_rows(path: pathlib.Path, separator: str, header: tuple[str, ...] | None) -> pl.DataFrame:
    spec = schema_file.Files(files=(path.name,), separator=separator, header=header)
    held, rows = [], 0
    for frame in formats.raw_frames(path, spec, None, None):
        held.append(frame.head(ROWS - rows))
        rows += held[-1].height
        if rows >= ROWS:
            break
    return pl.concat(held)


def _csv_dialect(path: pathlib.Path) -> tuple[str, tuple[str, ...] | None]:
    """The separator that cuts the first line most often; names, if a number stands in it."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rb") as stream:
            text = stream.read(HEAD).decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise ValueError(f"{path}: found {error}, expected a readable CSV file") from error
    lines = text.splitlines()[:1]
    fields = {s: next(csv.reader(lines, delimiter=s), []) for s in SEPARATORS}
    separator = max(SEPARATORS, key=lambda s: len(fields[s]))
    if not any(re.fullmatch(r"[-+]?\d[\d.]*", x.strip()) for x in fields[separator]):
        return separator, None
    return separator, tuple(f"column_{i + 1}" for i in range(len(fields[separator])))


def together(seen: Sequence[Glance]) -> Glance:
    """Files of the same columns as one."""
    first = seen[0]
    names = [n for n in first.bounds if all(n in s.bounds for s in seen)]
    ends = {n: [s.bounds[n] for s in seen] for n in names}
    return dataclasses.replace(
        first,
        frame=pl.concat([s.frame for s in seen], how="vertical_relaxed"),
        bounds={n: (min(a for a, _ in x), max(b for _, b in x)) for n, x in ends.items()},
        gaps=frozenset().union(*(s.gaps for s in seen)),
    )


def _footer(path: pathlib.Path) -> tuple[dict[str, tuple[object, object]], set[str]]:
    """`bounds` and `gaps` as a Parquet file's row groups tell them."""
    bounds: dict[str, tuple[object, object]] = {}
    gaps: set[str] = set()
    lacking: set[str] = set()
    with formats.opened_parquet(path) as file:
        metadata = file.metadata
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            name, known = column.path_in_schema, column.statistics
            if known is not None and known.has_null_count and known.null_count:
                gaps.add(name)
            if known is None or not known.has_min_max:
                lacking.add(name)
            else:
                low, high = bounds.get(name, (known.min, known.max))
                bounds[name] = min(low, known.min), max(high, known.max)
    return {name: x for name, x in bounds.items() if name not in lacking}, gaps


def names_of(frame: pl.DataFrame) -> tuple[str, ...]:
    """Names for the columns of a file without a first line of them, by their values.

    The first column of plausible times is the time; where there is one, the first other columns of
    many values are user and item. The first column of numbers up to 10 is a label (0 and 1 only) or
    a rating.
    """
    clocks = [c for c in frame.columns if frame[c].dtype.is_integer() and clock(frame[c])]
    found = {clocks[0]: "time"} if clocks else {}
    roles = ["user", "item"] if clocks else []
    judged = False
    for name in [c for c in frame.columns if c not in found]:
        x = frame[name].drop_nulls()
        binary = x.dtype.is_numeric() and len(x) and ((x == 0) | (x == 1)).all()
        small = x.dtype.is_numeric() and len(x) and x.is_between(0, 10).all()
        if small and not judged:
            found[name], judged = ("label" if binary else "rating"), True
        elif roles and not small and (x.dtype.is_integer() or x.dtype == pl.String):
            found[name] = roles.pop(0)
    return tuple(found.get(c, c) for c in frame.columns)


def plain(name: str) -> str:
    """A column's name as lower-case words: "userId", "USER-ID " and "user_id" are one."""
    bounds = r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])"
    return "_".join(re.findall(r"[^\W_]+", re.sub(bounds, "_", name))).lower()


def clock(x: pl.Series) -> Clock | None:
    """How the column tells time: all values of the rows looked at lie between 1990 and tomorrow.

    None where it does not.
    """
    x = x.drop_nulls()
    if not len(x):
        return None
    if isinstance(x.dtype, pl.Datetime | pl.Date):
        moments = x.cast(pl.Datetime("us"))
        return _plausible("", isinstance(x.dtype, pl.Date), moments.min(), moments.max())
    if x.dtype.is_float() and not x.is_finite().all():
        return None
    if x.dtype.is_numeric():
        for unit, factor in schema_file.UNITS.items():
            low, high = (float(v) / factor for v in (x.min(), x.max()))
            if not 0 < low <= high < 1e11:
                continue
            ends = (datetime.datetime.fromtimestamp(v, datetime.UTC) for v in (low, high))
            if (found := _plausible(unit, False, *ends)) is not None:
                days = (x.cast(pl.Int64) % (86_400 * factor) == 0).all()
                return dataclasses.replace(found, whole_days=days)
        return None
    return _text_clock(x) if x.dtype == pl.String else None


def relative_clock(x: pl.Series) -> Clock | None:
    """Whole numbers that may be seconds since an unknown start, where a name calls them times."""
    if not x.dtype.is_integer() or x.null_count() or x.n_unique() < 2 or x.min() < 0:
        return None
    if x.max() >= OLDEST.timestamp():
        return None
    first, last = (datetime.datetime.fromtimestamp(t, datetime.UTC) for t in (x.min(), x.max()))
    return Clock("s", False, first, last, relative=True)


def _text_clock(x: pl.Series) -> Clock | None:
    for format in (*MOMENTS, *DATES):
        if x.head(1).str.to_datetime(format, strict=False, time_unit="us").null_count():
            continue  # most formats fail at once
        moments = x.str.to_datetime(format, strict=False, time_unit="us")
        if moments.null_count():
            continue
        found = _plausible(format, format in DATES, moments.min(), moments.max())
        if found is not None:
            return found
    return None


def _plausible(
    unit: str, whole_days: bool, first: datetime.datetime, last: datetime.datetime
) -> Clock | None:
    first, last = (t if t.tzinfo else t.replace(tzinfo=datetime.UTC) for t in (first, last))
    newest = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    return Clock(unit, whole_days, first, last) if OLDEST <= first <= last <= newest else None
