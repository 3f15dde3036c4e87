"""Every kind of cell as its role is read; what does not fit is refused by its row."""

import datetime
import decimal
import math
import pathlib

import numpy as np
import polars as pl
import pytest

from rankjax.data.own import cells, schema_file

Condition, Input, Label = schema_file.Condition, schema_file.Input, schema_file.Label
INTEGERS = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64)


def place(n: int, first: int = 0) -> cells.Place:
    return cells.Place(pathlib.Path("folder/f.csv"), pl.Series(range(first, first + n)))


def series(x, dtype=None) -> pl.Series:
    return pl.Series("c", x, dtype=dtype)


def refused(row: int | None, message: str, call, *args, **options) -> None:
    """Where: the file and column, and the row where it is one row's fault."""
    with pytest.raises(ValueError, match=message) as error:
        call(*args, **options)
    where = 'folder/f.csv, column "c": ' + ("found type" if row is None else f"row {row} holds ")
    assert str(error.value).startswith(where) and ", expected " in str(error.value)


# ids


@pytest.mark.parametrize("dtype", INTEGERS)
def test_whole_numbers_are_ids(dtype):
    x = series([0, 127, 3, None], dtype)
    found = cells.ids(x, "c", place(4), empty=True)
    assert found.dtype == pl.Int64 and found.to_list() == [0, 127, 3, None]
    refused(13, "nothing, expected an id", cells.ids, x, "c", place(4, 10), empty=False)
    assert cells.whole(x.head(3), "c", place(3)).to_list() == [0, 127, 3]
    refused(3, "nothing, expected a whole number", cells.whole, x, "c", place(4))


@pytest.mark.parametrize("dtype", [pl.String, pl.Categorical, pl.Enum(["b", "a", ""])])
def test_text_is_an_id(dtype):
    found = cells.ids(series(["b", "", None, "a"], dtype), "c", place(4), empty=True)
    assert found.dtype == pl.String and found.to_list() == ["b", "", None, "a"]


def test_booleans_and_nothing_are_ids_of_text():
    found = cells.ids(series([True, None, False]), "c", place(3), empty=True)
    assert found.dtype == pl.String and found.to_list() == ["true", None, "false"]
    found = cells.ids(series([None, None]), "c", place(2), empty=True)
    assert found.dtype == pl.String and found.to_list() == [None, None]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (series([1.0, None]), r"found type Float64, expected .*\(empty cells turn them into"),
        (series([1.0], pl.Float32), "found type Float32, expected whole numbers or text"),
        (series([datetime.date(2024, 1, 1)]), "found type Date, expected whole numbers or text"),
        (series([[1]]), r"found type List\(Int64\), expected whole numbers or text"),
        (series([decimal.Decimal(1)]), "found type Decimal"),
        (series([b"x"]), "found type Binary"),
    ],
)
def test_other_types_are_no_ids(x, message):
    refused(None, message, cells.ids, x, "c", place(len(x)), empty=True)
    refused(None, "expected whole numbers", cells.whole, x, "c", place(len(x)))


def test_ids_above_the_largest_int64():
    x = series([1, 2**63 - 1, 2**63], pl.UInt64)
    assert cells.ids(x.head(2), "c", place(2), empty=True).to_list() == [1, 2**63 - 1]
    message = r"9223372036854775808, expected whole numbers up to 2\*\*63 - 1"
    refused(2, message, cells.ids, x, "c", place(3), empty=True)
    refused(2, message, cells.whole, x, "c", place(3))


@pytest.mark.parametrize(("value", "row"), [(-1, 1), (10, 1), (2**31, 1), (2**40, 1), (9, None)])
def test_given_ids_lie_in_their_table(value, row):
    spec = Input(column="c", ids="given", rows=10)
    frame = pl.DataFrame({"c": [3, value, None, 0]})
    if row is None:
        assert cells.value(frame, spec, place(4)).to_list() == [3, 9, None, 0]
        return
    message = rf"{value}, expected 0 .. 9 \(ids = 'given', rows = 10; int32\)"
    refused(row, message, cells.value, frame, spec, place(4))
    lists = pl.DataFrame({"c": [[3], [0, value], None, []]})
    spec = Input(column="c", kind="ids", ids="given", rows=10)
    refused(row, r"expected whole numbers 0 .. 9", cells.value, lists, spec, place(4))


def test_given_ids_of_users_start_at_one_and_are_numbers():
    spec = Input(ids="given", rows=10)
    assert cells.given(series([1, 9]), spec, "c", place(2), low=1).to_list() == [1, 9]
    refused(1, "expected 1 .. 9", cells.given, series([1, 0]), spec, "c", place(2), low=1)
    text = series(["1"])
    refused(None, r"whole numbers \(ids = 'given'", cells.given, text, spec, "c", place(1))
    assert cells.given(text, Input(), "c", place(1)) is text


# conditions and labels


def holds(x, **condition) -> list:
    found = cells.holds(x, Condition(column="c", **condition), place(len(x)))
    assert found.dtype == pl.Boolean and not found.null_count()
    return found.to_list()


NUMBERS = [*INTEGERS, pl.Float32, pl.Float64, pl.Decimal(10, 3)]


@pytest.mark.parametrize("dtype", NUMBERS)
def test_conditions_on_numbers(dtype):
    values = [0, 1, None, 2, 3, 100]
    x = series(values, dtype)
    for low in (-5, 0, 0.5, 1, 1.0, 2.5, 300, 1e30, -1e30):
        assert holds(x, at_least=low) == [v is not None and v >= low for v in values]
        assert holds(x, above=low) == [v is not None and v > low for v in values]
        assert holds(x, below=low) == [v is not None and v < low for v in values]
        for high in (0, 1.5, 3):
            want = [v is not None and low <= v < high for v in values]
            assert holds(x, at_least=low, below=high) == want
            want = [v is not None and low < v < high for v in values]
            assert holds(x, above=low, below=high) == want
    for wanted in ((1,), (1, 3), (0, -7), (300, 2), (True,), (2**70,)):
        want = [v is not None and v in wanted for v in values]
        assert holds(x, one_of=wanted) == want
        if len(wanted) == 1:
            assert holds(x, equals=wanted[0]) == want


@pytest.mark.parametrize("dtype", [pl.Float32, pl.Float64, pl.Decimal(10, 3)])
def test_conditions_on_fractions(dtype):
    x = pl.Series("c", [0.1, 0.5, 4.5, 4.0, None]).cast(dtype)
    assert holds(x, equals=0.5) == [False, True, False, False, False]
    assert holds(x, one_of=(0.1, 4)) == [True, False, False, True, False]
    assert holds(x, at_least=0.1) == [True, True, True, True, False]
    assert holds(x, above=0.1) == [False, True, True, True, False]


def test_nan_is_an_empty_cell():
    x = series([math.nan, math.inf, 1.0])
    assert holds(x, at_least=0) == holds(x, above=0) == [False, True, True]
    assert holds(x, below=2) == [False, False, True]
    assert holds(x, equals=1) == [False, False, True]
    assert holds(x, equals=math.inf) == [False, True, False]
    for label in (Label(column="c"), Label(column="c", above=0.5)):
        refused(0, "nan, expected a label", cells.binary, x, label, place(3))


def test_large_numbers_are_compared_exactly():
    x = series([2**53, 2**53 + 1])
    assert holds(x, equals=2**53 + 1) == [False, True]
    assert holds(x, at_least=2**53 + 1) == [False, True]
    x = series([2**64 - 1, 0], pl.UInt64)
    assert holds(x, equals=-1) == [False, False] and holds(x, above=-1) == [True, True]
    assert holds(x, one_of=(2**64 - 1, 5)) == [True, False]


@pytest.mark.parametrize("dtype", [pl.String, pl.Categorical, pl.Enum(["pv", "buy", ""])])
def test_conditions_on_text(dtype):
    x = series(["pv", "buy", None, "", "pv"], dtype)
    assert holds(x, equals="pv") == [True, False, False, False, True]
    assert holds(x, one_of=("buy", "", "other")) == [False, True, False, True, False]
    refused(None, r"expected values to compare with \[1\]", holds, x, equals=1)
    refused(None, r"expected values to compare with", holds, x, one_of=("pv", 1))
    refused(None, "expected numbers, which at_least, above and below comp", holds, x, at_least=1)


@pytest.mark.parametrize(("wanted", "want"), [(True, 1), ("true", 1), (1, 1), (False, 0), ("0", 0)])
def test_conditions_on_booleans(wanted, want):
    x = series([True, False, None])
    assert holds(x, equals=wanted) == [bool(want), not want, False]
    refused(None, r"found type Boolean, expected values to comp", holds, x, equals="yes")
    refused(None, "expected numbers", holds, x, above=0)


def test_conditions_on_dates():
    day = datetime.date(2024, 1, 1)
    x = series([day, None, datetime.date(2024, 1, 2)])
    assert holds(x, equals=day) == [True, False, False]
    refused(None, "found type Date", holds, x, equals="2024-01-01")


def test_numbers_are_not_compared_with_text_or_fractions():
    refused(None, r"found type Int64, .* with \['1'\]", holds, series([1]), equals="1")
    refused(None, r"found type Int64, .* with \[0.5\]", holds, series([1]), equals=0.5)
    refused(None, r"found type Float64", holds, series([1.0]), equals="1")


@pytest.mark.parametrize("dtype", [*NUMBERS, pl.Boolean])
def test_labels_of_zero_and_one(dtype):
    values = [False, True, True, False] if dtype == pl.Boolean else [0, 1, 1, 0]
    found = cells.binary(series(values, dtype), Label(column="c"), place(4))
    assert found.dtype == pl.Int8 and found.to_list() == [0, 1, 1, 0]
    missing = series([*values, None], dtype)
    for label in (Label(column="c"), Label(column="c", equals=True)):
        refused(4, "nothing, expected a label", cells.binary, missing, label, place(5))


@pytest.mark.parametrize("bad", [2, -1, 0.5])
def test_labels_of_something_else(bad):
    x = pl.Series([0, 1, bad, 1], strict=False)
    refused(9, f"{bad}, expected 0 or 1", cells.binary, x, Label(column="c"), place(4, 7))


@pytest.mark.parametrize("x", [series(["0", "1"]), series([[0]]), series(["a"], pl.Categorical)])
def test_labels_of_other_types(x):
    message = "expected 0 and 1, true and false, or a condition in the schema"
    refused(None, message, cells.binary, x, Label(column="c"), place(len(x)))


def test_labels_of_a_condition():
    rating = series([1.0, 4.0, 3.5, 5.0])
    found = cells.binary(rating, Label(column="c", at_least=4), place(4))
    assert found.dtype == pl.Int8 and found.to_list() == [0, 1, 0, 1]
    found = cells.binary(series(["buy", "pv"]), Label(column="c", equals="buy"), place(2))
    assert found.to_list() == [1, 0]


# features


@pytest.mark.parametrize("dtype", [*INTEGERS, pl.Float32, pl.Float64, pl.Decimal(9, 2), pl.Boolean])
def test_numbers(dtype):
    values = [True, None, False] if dtype == pl.Boolean else [1, None, 0]
    found = cells.value(pl.DataFrame({"c": series(values, dtype)}), dense(), place(3))
    assert found.dtype == pl.Float64 and found.to_list() == [1.0, None, 0.0]


def dense(**fields) -> Input:
    return Input(column="c", kind="dense", **fields)


def test_numbers_that_are_missing_or_none():
    frame = pl.DataFrame({"c": [math.nan, -0.5, None]})
    assert cells.value(frame, dense(), place(3)).to_list() == [None, -0.5, None]
    nothing = cells.value(pl.DataFrame({"c": [None, None]}), dense(), place(2))
    assert nothing.dtype == pl.Float64 and nothing.to_list() == [None, None]
    largest = float(np.finfo(np.float32).max)
    assert cells.value(pl.DataFrame({"c": [-largest]}), dense(), place(1)).to_list() == [-largest]
    for bad in (math.inf, -math.inf, 1e39):
        frame = pl.DataFrame({"c": [0.0, bad]})
        message = r"expected a finite number \(float32\)"
        refused(1, message, cells.value, frame, dense(), place(2))
    frame = pl.DataFrame({"c": ["1.5"]})
    refused(None, "String, expected numbers", cells.value, frame, dense(), place(1))


@pytest.mark.parametrize("transform", ["none", "log", "symlog", "standard", "quantile"])
def test_only_the_logarithm_refuses_negative_numbers(transform):
    frame = pl.DataFrame({"c": [0, None, 5, -1]})
    args = frame, dense(transform=transform), place(4)
    if transform == "log":
        message = r"-1, expected no negative number \(transform = 'log'\)"
        refused(3, message, cells.value, *args)
    else:
        assert cells.value(*args).to_list() == [0, None, 5, -1]


LISTS = [[3, 1], [], None, [2, None, 3], [None]]


@pytest.mark.parametrize(
    "x",
    [
        *(series(LISTS, pl.List(d)) for d in (pl.Int8, pl.Int64, pl.UInt64)),
        series([None if x is None else [None if v is None else str(v) for v in x] for x in LISTS]),
        series([[3, 1], [None, None], None, [2, 3], [None, None]], pl.Array(pl.Int32, 2)),
        series([["3", "1"], [], None, ["2", "3"], []], pl.List(pl.Categorical)),
    ],
)
def test_lists(x):
    found = cells.values(x, "c", "", place(5))
    of = int if x.dtype.inner.is_integer() else str
    assert found.dtype == pl.List(pl.Int64 if of is int else pl.String)
    assert found.to_list() == [[of(3), of(1)], [], None, [of(2), of(3)], []]


@pytest.mark.parametrize("separator", ["|", ", ", " "])
@pytest.mark.parametrize("dtype", [pl.String, pl.Categorical])
def test_lists_of_text(separator, dtype):
    parts = [["a", "b"], ["a"], None, [], ["", "c", ""]]
    x = series([None if p is None else separator.join(p) for p in parts], dtype)
    found = cells.value(
        pl.DataFrame({"c": x}), Input(column="c", kind="ids", separator=separator), place(5)
    )
    assert found.to_list() == [["a", "b"], ["a"], None, [], ["c"]]


def test_text_of_given_ids():
    spec = Input(column="c", kind="ids", separator="|", ids="given", rows=10)
    frame = pl.DataFrame({"c": ["1|9", None, "", "0"]})
    found = cells.value(frame, spec, place(4))
    assert found.dtype == pl.List(pl.Int64) and found.to_list() == [[1, 9], None, [], [0]]
    for bad in ("1|x", "1|10", "-1", "99999999999999999999"):
        frame = pl.DataFrame({"c": ["1|9", bad]})
        message = r"\['.*'\], expected whole numbers 0 .. 9 \(ids = 'given', rows = 10; int32\)"
        refused(1, message, cells.value, frame, spec, place(2))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (series(["a|b"]), "found type String, expected a list, or a `separator` for text"),
        (series([5]), "found type Int64, expected a list, or text with a `separator`"),
        (series([[0.5]]), r"found type List\(Float64\), expected lists of whole numbers or text"),
        (series([[[1]]]), r"expected lists of whole numbers or text"),
    ],
)
def test_no_lists(x, message):
    refused(None, message, cells.values, x, "c", "", place(1))


def test_lists_of_numbers_above_the_largest_int64():
    x = series([[1], [2, 2**63]], pl.List(pl.UInt64))
    refused(1, r"\[2, 9223372036854775808\], expected", cells.values, x, "c", "", place(2))


@pytest.mark.parametrize("array", [False, True])
def test_the_element_at_another_column(array):
    lists = [[0.5, 1.5], [2.5, None], None, [4.5, 5.5]]
    x = series(lists, pl.Array(pl.Float32, 2) if array else None)
    frame = pl.DataFrame({"c": x, "k": pl.Series([1, 1, 5, 0], dtype=pl.UInt8)})
    found = cells.value(frame, dense(at="k"), place(4))
    assert found.dtype == pl.Float64 and found.to_list() == [1.5, None, None, 4.5]
    for row, bad in ((0, 2), (3, -1)):
        at = [1, 1, 5, 0]
        at[row] = bad
        wrong = frame.with_columns(pl.Series("k", at))
        where = rf'column "k": row {row} holds {bad}, expected a place in the list of column \'c\''
        with pytest.raises(ValueError, match=where):
            cells.value(wrong, dense(at="k"), place(4))
    numbers = pl.DataFrame({"c": [1.0], "k": [0]})
    refused(None, r"a list \(at = 'k'\)", cells.value, numbers, dense(at="k"), place(1))
    without = frame.with_columns(pl.Series("k", [1, None, 0, 0]))
    with pytest.raises(ValueError, match='column "k": row 1 holds nothing, expected a whole numb'):
        cells.value(without, dense(at="k"), place(4))
