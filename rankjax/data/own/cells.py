"""What the cells of one column say: ids, whole numbers, conditions, labels, features.

Every function takes a column as a file holds it and returns it in one type, or refuses the first
row that does not fit: a ValueError names file, column, row, what was found and expected.
"""

import dataclasses
import datetime
import math
import pathlib

import numpy as np
import polars as pl

from rankjax.data.own import schema_file

TEXT = (pl.String, pl.Categorical, pl.Enum)
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a chunk's rows stand, for messages."""

    path: pathlib.Path
    rows: pl.Series  # the file's row of each row of the chunk

    def refuse(self, column: str, x: pl.Series, bad: pl.Series, expected: str) -> None:
        """Raises ValueError for the first row where `bad` (null counts as no) holds."""
        if bad.any():
            at = int(bad.arg_true()[0])
            found = x[at].to_list() if isinstance(x[at], pl.Series) else x[at]
            found = "nothing" if found is None else repr(found)
            raise ValueError(
                f'{self.path}, column "{column}": row {self.rows[at]} holds {found}, '
                f"expected {expected}"
            )

    def refuse_type(self, column: str, dtype: pl.DataType, expected: str) -> None:
        raise ValueError(f'{self.path}, column "{column}": found type {dtype}, expected {expected}')


def ids(x: pl.Series, column: str, place: Place, *, empty: bool) -> pl.Series:
    """Whole numbers as int64, anything else that is no number as text."""
    if x.dtype.is_float():
        expected = (
            "whole numbers or text (empty cells turn them into floats; a CSV column that the table "
            "names under `text` stays as it is)"
        )
        place.refuse_type(column, x.dtype, expected)
    if not empty:
        place.refuse(column, x, x.is_null(), "an id")
    if x.dtype.is_integer():
        return int64(x, column, place)
    if x.dtype in (*TEXT, pl.Boolean, pl.Null):
        return x.cast(pl.String)
    place.refuse_type(column, x.dtype, "whole numbers or text")


def int64(x: pl.Series, column: str, place: Place) -> pl.Series:
    """Whole numbers of any type as int64; null stays null."""
    if x.dtype == pl.UInt64:
        place.refuse(column, x, x > 2**63 - 1, "whole numbers up to 2**63 - 1")
    return x.cast(pl.Int64)


def given(
    x: pl.Series, spec: schema_file.Input, column: str, place: Place, low: int = 0
) -> pl.Series:
    """The ids, checked where ids = "given"."""
    if spec.ids == "given":
        if x.dtype != pl.Int64:
            place.refuse_type(column, x.dtype, "whole numbers (ids = 'given')")
        expected = f"{low} .. {spec.rows - 1} (ids = 'given', rows = {spec.rows}; int32)"
        place.refuse(column, x, (x < low) | (x >= spec.rows), expected)
    return x


def whole(x: pl.Series, column: str, place: Place) -> pl.Series:
    """Whole numbers as int64, none of them missing."""
    if not x.dtype.is_integer():
        place.refuse_type(column, x.dtype, "whole numbers")
    place.refuse(column, x, x.is_null(), "a whole number")
    return int64(x, column, place)


def holds(x: pl.Series, condition: schema_file.Condition, place: Place) -> pl.Series:
    """Where a condition holds; bool without nulls (an empty cell, or NaN, does not hold)."""
    column, dtype = condition.column, x.dtype
    if dtype.is_integer():
        x = x.cast(pl.Int128)  # so that no number of the schema is too large to compare with
    elif dtype.is_numeric():
        x = (x if dtype.is_float() else x.cast(pl.Float64)).fill_nan(None)
    bounds = (condition.at_least, condition.above, condition.below)
    if any(bound is not None for bound in bounds):
        if not dtype.is_numeric():
            place.refuse_type(column, dtype, "numbers, which at_least, above and below compare")
        return _between(x, *bounds, whole=dtype.is_integer())
    wanted = [condition.equals] if condition.one_of is None else list(condition.one_of)
    if dtype in TEXT:
        x, kind = x.cast(pl.String), str
    elif dtype == pl.Boolean:
        wanted, kind = [BOOLEANS.get(str(w).lower(), w) for w in wanted], bool
    elif dtype.is_numeric():
        kind = int if dtype.is_integer() else int | float
    else:
        kind = datetime.date
    if not all(isinstance(w, kind) for w in wanted):
        place.refuse_type(column, dtype, f"values to compare with {wanted}")
    wanted = pl.Series(wanted).cast(x.dtype).implode()
    return x.is_in(wanted).fill_null(False)


def _between(
    x: pl.Series,
    at_least: float | None,
    above: float | None,
    below: float | None,
    whole: bool,
) -> pl.Series:
    """at_least <= x, above < x, x < below, as far as given; bounds of whole numbers are whole."""
    found = x.is_not_null()
    if at_least is not None:
        found &= x >= (math.ceil(at_least) if whole else at_least)
    if above is not None:
        found &= x > (math.floor(above) if whole else above)
    if below is not None:
        found &= x < (math.ceil(below) if whole else below)
    return found.fill_null(False)


def binary(x: pl.Series, label: schema_file.Label, place: Place) -> pl.Series:
    """A label as int8, 0 or 1; the column's own, or where its condition holds."""
    column = label.column
    known = x.fill_nan(None) if x.dtype.is_float() else x
    place.refuse(column, x, known.is_null(), "a label")
    if label.condition is not None:
        return holds(x, label.condition, place).cast(pl.Int8)
    if x.dtype != pl.Boolean and not x.dtype.is_numeric():
        place.refuse_type(column, x.dtype, "0 and 1, true and false, or a condition in the schema")
    if x.dtype != pl.Boolean:
        place.refuse(column, x, (x != 0) & (x != 1), "0 or 1")
    return x.cast(pl.Int8)


def value(raw: pl.DataFrame, spec: schema_file.Input, place: Place) -> pl.Series:
    """A feature's column as its kind is read; null = missing."""
    x = raw[spec.column]
    if spec.kind == "id":
        return given(ids(x, spec.column, place, empty=True), spec, spec.column, place)
    if spec.kind == "ids":
        lists = values(x, spec.column, spec.separator, place)
        return _given_lists(lists, spec, place) if spec.ids == "given" else lists
    if spec.at:
        x = _element(x, raw[spec.at], spec, place)
    if not x.dtype.is_numeric() and x.dtype not in (pl.Boolean, pl.Null):
        place.refuse_type(spec.column, x.dtype, "numbers")
    numbers = x.cast(pl.Float64)
    numbers = numbers.fill_nan(None)
    large = numbers.abs() > float(np.finfo(np.float32).max)  # inf too
    place.refuse(spec.column, x, large, "a finite number (float32)")
    if spec.transform == "log":
        place.refuse(spec.column, x, numbers < 0, "no negative number (transform = 'log')")
    return numbers


def values(x: pl.Series, column: str, separator: str, place: Place) -> pl.Series:
    """A column of lists, or of text parted by `separator`, as lists of ids; null is empty."""
    if x.dtype in (*TEXT, pl.Null):
        if not separator:
            place.refuse_type(column, x.dtype, "a list, or a `separator` for text")
        x = x.cast(pl.String).str.split(separator)
        x = x.list.eval(pl.element().filter(pl.element().str.len_bytes() > 0))
    elif isinstance(x.dtype, pl.Array):
        x = x.arr.to_list()
    if not isinstance(x.dtype, pl.List):
        place.refuse_type(column, x.dtype, "a list, or text with a `separator`")
    inner = x.dtype.inner
    if not inner.is_integer() and inner not in (*TEXT, pl.Null):
        place.refuse_type(column, x.dtype, "lists of whole numbers or text")
    if inner == pl.UInt64:
        large = x.list.max() > 2**63 - 1
        place.refuse(column, x, large, "lists of whole numbers up to 2**63 - 1")
    return x.cast(pl.List(pl.Int64 if inner.is_integer() else pl.String)).list.drop_nulls()


def _given_lists(lists: pl.Series, spec: schema_file.Input, place: Place) -> pl.Series:
    """Lists of given ids, which may be text, as lists of checked int64."""
    numbers = lists.cast(pl.List(pl.Int64), strict=False)
    inside = pl.element().is_between(0, spec.rows - 1).fill_null(False)
    bad = numbers.list.eval(~inside).list.any()
    expected = f"whole numbers 0 .. {spec.rows - 1} (ids = 'given', rows = {spec.rows}; int32)"
    place.refuse(spec.column, lists, bad, expected)
    return numbers


def _element(x: pl.Series, at: pl.Series, spec: schema_file.Input, place: Place) -> pl.Series:
    """Of each list the element at the other column's value."""
    if isinstance(x.dtype, pl.Array):
        x = x.arr.to_list()
    if not isinstance(x.dtype, pl.List):
        place.refuse_type(spec.column, x.dtype, f"a list (at = {spec.at!r})")
    index = whole(at, spec.at, place)
    outside = (index < 0) | (index >= x.list.len().cast(pl.Int64))
    place.refuse(spec.at, at, outside, f"a place in the list of column {spec.column!r}")
    return x.list.get(index, null_on_oob=True)
