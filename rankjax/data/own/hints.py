"""What a column could be as a feature, guessed from its name and its first values."""

import dataclasses
from typing import Any

import polars as pl

from rankjax.data.own import glance, roles

FEW = 1000  # distinct values of the rows looked at up to which every one of them gets an id
SELDOM = 5  # of more, those seen at least so often
# Texts of several values; only "|" may stand between words.
LISTS = {
    "|": r"^[^|]+(\|[^|]+)+$",
    ",": r"^[^\s,]+(,[^\s,]+)+$",
    ";": r"^[^\s;]+(;[^\s;]+)+$",
}
A_TIME = "a time; hour, weekday and ages come from `time` and `birth`"
# Whole numbers that measure something, so that their sizes mean more than their being equal.
QUANTITY = (
    r"(n|num|number|count|total|sum|avg|mean)_.*",
    r".*_(count|counts|cnt|num|words|chars|length|len|duration|seconds|ms|size|price|amount|ratio)",
    r"(count|duration|length|price|amount|views|words|popularity|distance|width|height)",
)


@dataclasses.dataclass(frozen=True)
class Hint:
    """given: the feature's entry but its column, None where it is left out; why: the reason."""

    given: dict[str, Any] | None
    why: str


def hint(x: pl.Series, *, happened: bool) -> Hint:
    """The guess for one column. happened: it describes an event, of which outcomes may be known."""
    known, rows = x.drop_nulls(), len(x)
    if not len(known):
        return Hint(None, "empty in the rows looked at")
    if roles.fits(x.name, roles.LATER):
        return Hint(None, "known only when the visit is over")
    if not happened and roles.fits(x.name, (*roles.OUTCOME, *roles.RATING, *roles.LABEL)):
        return Hint(None, "may be known only afterwards, or the old system's own choice")
    found = _list(known) if isinstance(x.dtype, pl.List | pl.Array) else _one(known, rows)
    if found.given is not None and happened and acted(x.name):
        found = Hint({**found.given, "action": True}, f"{found.why}; what the user did")
    return found


def acted(name: str) -> bool:
    """Whether a column of events tells, by its name, what the user did."""
    return roles.fits(name, (*roles.ACTION, *roles.RATING, *roles.LABEL, *roles.OUTCOME))


def _one(known: pl.Series, rows: int) -> Hint:
    distinct, dtype = known.n_unique(), known.dtype
    many = "" if distinct <= FEW else f"; ids for those seen {SELDOM} times or more"
    given = {} if distinct <= FEW else {"min_count": SELDOM}
    if dtype == pl.Boolean:
        return Hint({}, "true and false")
    if dtype in (pl.String, pl.Categorical, pl.Enum):
        return _text(known.cast(pl.String), rows, Hint(given, f"texts, {distinct} different{many}"))
    if glance.clock(known) is not None and roles.fits(known.name, (*roles.TIME, *roles.BIRTH)):
        return Hint(None, A_TIME)
    if dtype.is_integer():
        days = known.min() >= 1990_01_01 and known.max() <= 2100_01_01  # as 20240131
        if days and roles.fits(known.name, (r"(.*_)?(date|day|dt)",)):
            return Hint(None, A_TIME)
        if roles.fits(known.name, (r"(.*_)?(timestamp|time|ts|date)_.*",)):
            return Hint(None, "a part of a time, by its name")
        if rows > 20 and distinct == rows and (known.diff().drop_nulls() == 1).all():
            return Hint(None, "numbers the rows")
        if roles.fits(known.name, QUANTITY):
            return Hint({"kind": "dense", "transform": "symlog"}, "measures something, by its name")
        return Hint(given, f"whole numbers, {distinct} different{many}")
    if dtype.is_float():
        return _number(known.drop_nans())
    return Hint(None, f"type {dtype}")


def _number(known: pl.Series) -> Hint:
    if known.is_infinite().any():
        return Hint(None, "holds infinite numbers")
    if not len(known):
        return Hint(None, "empty in the rows looked at")
    middle, high = known.abs().quantile(0.9) or 0.0, known.abs().max()
    if high > 20 * max(middle, 1.0):
        return Hint({"kind": "dense", "transform": "symlog"}, "numbers of very different sizes")
    return Hint({"kind": "dense"}, "numbers")


def _text(known: pl.Series, rows: int, as_one: Hint) -> Hint:
    if glance.clock(known) is not None:
        return Hint(None, A_TIME)
    for separator, pattern in LISTS.items():
        listed, parts = known.str.contains(pattern), known.str.split(separator)
        if listed.mean() >= 0.2 and parts.explode().n_unique() < max(2, known.n_unique()):
            given = {"kind": "ids", "separator": separator, "values": _most(parts.list.len())}
            return Hint(given, f"texts parted by {separator}")
    words = known.str.split(" ").list.len().mean()
    if rows > 20 and known.n_unique() > 0.5 * rows and (words > 2 or known.n_unique() > 0.9 * rows):
        return Hint(None, "text, nearly every row another")
    return as_one


def _list(known: pl.Series) -> Hint:
    lists = known.arr.to_list() if isinstance(known.dtype, pl.Array) else known
    inner = lists.dtype.inner
    if not inner.is_integer() and inner not in (pl.String, pl.Categorical, pl.Enum):
        return Hint(None, f"lists of {inner}; `at` with kind = 'dense' reads one element of each")
    most = _most(lists.list.len())
    return Hint({"kind": "ids", "values": most}, f"lists, most of {most} or fewer")


def _most(lengths: pl.Series) -> int:
    """As many values as 95 of 100 rows have, at most 32."""
    return max(1, min(32, int(lengths.quantile(0.95, "higher"))))


def telling(frame: pl.DataFrame, labels: tuple[str, ...]) -> dict[str, str]:
    """{column: label} of the columns whose value says the label in all rows looked at.

    Only columns whose values mostly repeat: what is new in every row says nothing.
    """
    found = {}
    for column in [c for c in frame.columns if c not in labels and not frame[c].dtype.is_nested()]:
        counts = frame.group_by(column).agg(
            pl.len().alias("@rows"), *(pl.col(n).n_unique().alias(f"@{n}") for n in labels)
        )
        repeated = counts.filter(pl.col("@rows") > 1)
        if repeated["@rows"].sum() < 0.5 * frame.height:
            continue
        told = [n for n in labels if frame[n].n_unique() > 1 and (repeated[f"@{n}"] == 1).all()]
        found |= dict.fromkeys([column] if told else [], next(iter(told), ""))
    return found


def determined(frame: pl.DataFrame, key: tuple[str, ...]) -> set[str]:
    """The columns that are the same in all rows of equal `key`, as far as enough rows show."""
    others = [c for c in frame.columns if c not in key and not frame[c].dtype.is_nested()]
    if not key or not others:
        return set()
    groups = frame.group_by(key).agg(
        pl.len().alias("@rows"), *(pl.col(c).n_unique().alias(c) for c in others)
    )
    repeated = groups.filter(pl.col("@rows") > 1)
    if repeated.height < 20:
        return set()
    return {c for c in others if (repeated[c] == 1).all() and frame[c].n_unique() > 1}
