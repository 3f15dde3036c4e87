"""Rows that no import takes, each with the message that says so."""

import dataclasses

import numpy as np
import polars as pl

START = 1_600_000_000
SCHEMA = """
name = "bad"
[impressions]
files = "shown*"
user = "u"
item = "i"
time = "t"
request = "r"
labels = {y = "y"}
features = {n = {kind = "dense", transform = "log"}}
"""
THINGS = '[items]\nfiles = "things*"\nid = "i"\n'
PEOPLE = '[users]\nfiles = "people*"\nid = "u"\n'
SPLIT = 'split = "part"\n[split]\ntrain_values = "a"\ntest_values = "b"\n'


def plain() -> pl.DataFrame:
    n = np.arange(60)
    columns = {"u": n % 7, "i": 1 + n % 11, "t": START + 60 * n, "r": n, "y": n % 2, "n": n}
    return pl.DataFrame(columns).with_columns(part=pl.lit("a"))


def with_row(column: str, row: int, value: object) -> pl.DataFrame:
    """The plain rows with one other cell."""
    values = plain()[column].to_list()
    values[row] = value
    return plain().with_columns(pl.Series(column, values, strict=False))


def as_text(column: str) -> pl.DataFrame:
    return plain().with_columns(pl.col(column).cast(pl.String))


@dataclasses.dataclass(frozen=True)
class Case:
    """files: {stem: rows, or bytes}; schema: lines behind SCHEMA; message: a regular expression."""

    files: dict[str, pl.DataFrame | bytes]
    message: str
    schema: str = ""


CASES = {
    "missing column": Case(
        {"shown": plain().drop("t")},
        r"shown\.parquet: found columns .*'r'.* expected 't' too",
    ),
    "users int and text": Case(
        {"shown-a": plain(), "shown-b": as_text("u")},
        r"shown-b\.parquet: found user ids of type String, expected Int64 as in .*shown-a",
    ),
    "items int and text": Case(
        {"shown": plain(), "things": as_text("i").head(11)},
        r"shown\.parquet: found item ids of type Int64, expected String as in .*things",
        THINGS,
    ),
    "requests int and text": Case(
        {"shown-a": plain(), "shown-b": as_text("r")},
        r"shown-b\.parquet: found request ids of type String, expected Int64",
    ),
    "seconds and milliseconds": Case(
        {"shown-a": plain(), "shown-b": plain().with_columns(pl.col("t") * 1000)},
        r'shown-b\.parquet, column "t": row 0 holds 1600000000000, expected a time from 1990-01-01',
    ),
    "future": Case(
        {"shown": with_row("t", 31, 4_102_444_800)},
        r'shown\.parquet, column "t": row 31 holds 4102444800, expected a time',
    ),
    "before 1990": Case(
        {"shown": with_row("t", 4, 600_000_000)},
        r'shown\.parquet, column "t": row 4 holds 600000000, expected a time',
    ),
    "negative count": Case(
        {"shown": with_row("n", 17, -1)},
        r'shown\.parquet, column "n": row 17 holds -1, expected no negative number',
    ),
    "label of text": Case(
        {"shown": as_text("y")},
        r'shown\.parquet, column "y": found type String, expected 0 and 1',
    ),
    "label of 2": Case(
        {"shown": with_row("y", 9, 2)},
        r'shown\.parquet, column "y": row 9 holds 2, expected 0 or 1',
    ),
    "no user": Case(
        {"shown": with_row("u", 59, None)},
        r'shown\.parquet, column "u": row 59 holds nothing, expected an id',
    ),
    "empty file": Case({"shown": b""}, r"shown\.parquet: found an empty file, expected rows"),
    "items twice": Case(
        {"shown": plain(), "things": pl.DataFrame({"i": [1, 2, 1]})},
        r"things\.parquet: found id 1 2 times in \[items\], expected once \(1 ids",
        THINGS,
    ),
    "users twice, in two files": Case(
        {"shown": plain(), "people-a": plain().head(7), "people-b": plain().slice(5, 4)},
        r"people-a\.parquet, .*people-b\.parquet: found id 0 2 times in \[users\].* \(4 ids",
        PEOPLE,
    ),
    "float ids": Case(
        {"shown": plain().with_columns(pl.col("u").cast(pl.Float64))},
        r'shown\.parquet, column "u": found type Float64, expected whole numbers or text',
    ),
    "int32": Case(
        {"shown": with_row("i", 5, 2**31 + 3)},
        r'shown\.parquet, column "i": row 5 holds 2147483651, expected 1 \.\. 999 .*int32',
        '[item]\nids = "given"\nrows = 1000\n',
    ),
    "nothing left": Case(
        {"shown": plain()},
        r"\[impressions\]: found no row after filtering, expected at least one impression",
        'where = {column = "n", above = 1000}\n',
    ),
    "two users": Case(
        {"shown": with_row("r", 8, 7)},
        r"\[impressions\]: found request 7 with two users, expected one",
    ),
    "unknown split": Case(
        {"shown": with_row("part", 8, "x")},
        r"\[impressions\] split: found \['x'\], expected one of \['a', 'b'\]",
        SPLIT,
    ),
    "no split": Case(
        {"shown": with_row("part", 8, None)},
        r"\[impressions\] split: found \[None\], expected one of \['a', 'b'\]",
        SPLIT,
    ),
    "empty span": Case(
        {"shown": plain()},
        r"\[split\]: found {'train': 54, 'validation': 6, 'test': 0} impressions from time 160",
        SPLIT,
    ),
}
