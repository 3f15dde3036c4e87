"""schema.toml: which column of which file plays which role (docs/own-data.md shows it whole).

`load` reads and checks the file without opening any data; what it returns says everything that an
import does. The tables [impressions], [events], [users] and [items] name files and columns; any of
the first two may be an array of tables ([[events]]), whose rows are put together.
"""

import dataclasses
import datetime
import math
import os
import pathlib
import tomllib
import zoneinfo
from typing import Any, Literal

from rankjax.data import counters as counters_module
from rankjax.data import samples
from rankjax.data.own import inputs, toml_tables
from rankjax.data.own.inputs import Condition, Input, Label

UNITS = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}  # in one second
ROW = "@row"  # in place of a column: the row's own number

Columns = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """What every table says of its files.

    files: names or globs, matched to the files of the command. separator, header: of CSV files;
    `header` names the columns of files without a first line, `text` those whose cells are text even
    where they look like numbers (007). where: only these rows.
    time_unit: "s", "ms", "us", "ns", or a strptime format such as "%Y-%m-%d %H:%M:%S"; times of
      Arrow type timestamp need none. time_zone: of times without one.
    """

    files: tuple[str, ...]
    separator: str = ","
    header: tuple[str, ...] | None = None
    text: tuple[str, ...] = ()
    where: Condition | None = None
    time_unit: str = "s"
    time_zone: str = "UTC"
    features: dict[str, Input] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files: found none, expected at least one name or glob")
        if len(self.separator) != 1:
            raise ValueError(f"separator: found {self.separator!r}, expected one character")
        try:
            zoneinfo.ZoneInfo(self.time_zone)
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"time_zone: found {self.time_zone!r}, expected a name such as 'Europe/Berlin'"
            ) from error
        if self.time_unit not in UNITS and "%" not in self.time_unit:
            raise ValueError(
                f"time_unit: found {self.time_unit!r}, expected one of {list(UNITS)} or a format "
                "such as '%Y-%m-%d %H:%M:%S'"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Catalogue(Files):
    """[users] or [items]: one row each, features that do not change.

    id: the column, or columns, that impressions and events name. birth: when an item appeared.
    """

    id: Columns = ""
    birth: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.id:
            raise ValueError("expected `id`, the column that impressions and events name")
        inputs.check_side(self.features, "catalogue")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Events(Files):
    """[events]: what users did. order: only the order is known (time_exact = false).

    list: the column `item` holds a list, old to new, all before the user's first impression; of
    every user the list of the first row counts.
    """

    user: Columns
    item: Columns = ""
    time: str = ""
    order: str = ""
    list: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.list and (self.time or self.order or self.features):
            raise ValueError("a list has no time, order or features; expected only user and item")
        if self.list and not self.item:
            raise ValueError("a list is the column `item`, found none")
        if not self.list and self.time in ("", ROW):
            raise ValueError(
                f"expected `time`, the column of when it happened, found {self.time!r}"
            )
        inputs.check_side(self.features, "event")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Impressions(Files):
    """[impressions]: items that were shown, with labels and context.

    request: a column, or "@row" = every row by itself; without it rows of one user at most
      `request_gap` seconds after the row before are one request, at the time of its first row.
    time: a column, or "@row" = the order of the rows (only with time_exact = false).
    position: sorts within a request.
    """

    user: Columns = ""
    item: Columns = ""
    time: str
    order: str = ""
    request: str = ""
    request_gap: int | None = None
    position: str = ""
    split: str = ""
    labels: dict[str, Label]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.labels:
            raise ValueError("labels: found none, expected at least one")
        for name, label in self.labels.items():
            others = sorted(self.labels.keys() - {name})
            if label.weight and label.weight not in others:
                raise ValueError(
                    f"labels.{name}.weight: found {label.weight!r}, expected one of {others}"
                )
        told = {label.column: name for name, label in self.labels.items()}
        if leaks := [name for name, x in self.features.items() if x.column in told]:
            column = self.features[leaks[0]].column
            raise ValueError(
                f"features.{leaks[0]}: found column {column!r}, which labels.{told[column]} reads; "
                "expected no label among the features"
            )
        if self.request and self.request_gap is not None:
            raise ValueError("found both request and request_gap, expected one of them")
        if self.request_gap is not None and self.request_gap < 0:
            raise ValueError(f"request_gap: found {self.request_gap}, expected >= 0 seconds")
        inputs.check_side(self.features, "context")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Negatives:
    """[negatives]: a log of clicks only. Every event (or where `of` holds) becomes a request of one
    click and `per_click` other items, drawn from the clicks of the same hour or day, so an item in
    proportion to its clicks there.

    exclude: "user" = never an item that the user clicks anywhere in the log; "bucket" = in that
      hour or day. features: columns of the events file that describe the request.
    """

    per_click: int = 4
    within: Literal["hour", "day"] = "hour"
    exclude: Literal["user", "bucket"] = "user"
    of: Condition | None = None
    seed: int = 0
    task: str = "click"
    features: dict[str, Input] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.per_click <= 1000:
            raise ValueError(f"per_click: found {self.per_click}, expected 1 .. 1000")
        inputs.check_side(self.features, "context")


Instant = int | str | datetime.datetime | datetime.date


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """[split]: by time, either at instants (`train_until`, `validation_until`, both inclusive) or
    at shares of the impressions (`train`, `validation`); or by the impressions' column `split`,
    whose values `train_values`, ... name the spans. Where it names no validation, the newest
    `validation` of the training impressions are it."""

    train: float = 0.8
    validation: float = 0.1
    train_until: Instant | None = None
    validation_until: Instant | None = None
    train_values: tuple[Any, ...] = ()
    validation_values: tuple[Any, ...] = ()
    test_values: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if not (0 < self.train < 1 and 0 < self.validation < 1):
            raise ValueError(
                f"found train={self.train}, validation={self.validation}, expected shares in (0, 1)"
            )
        if not self.train_values and self.train + self.validation >= 1:
            raise ValueError(
                f"found train={self.train}, validation={self.validation}, expected less than 1 "
                "together: the rest is test"
            )
        if (self.train_until is None) != (self.validation_until is None):
            raise ValueError("expected train_until and validation_until together")
        if bool(self.train_values) != bool(self.test_values):
            raise ValueError("expected train_values and test_values together")
        if self.train_until is not None:
            if self.train_values:
                raise ValueError("found both train_values and train_until, expected one of them")
            if seconds(self.train_until) >= seconds(self.validation_until):
                raise ValueError(
                    f"found train_until={self.train_until}, expected it before "
                    f"validation_until={self.validation_until}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ids:
    """[ids]: what features and the users' and items' own ids take where they say nothing."""

    ids: Literal["vocabulary", "hash", "given"] = "vocabulary"
    min_count: int = 1
    rows: int | None = None
    learn: Literal["train", "all"] = "train"

    def __post_init__(self) -> None:
        if self.min_count < 1:
            raise ValueError(f"min_count: found {self.min_count}, expected >= 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """[tables.NAME]: an embedding table whose size is settled, whatever the files hold.

    hashed: ids = "given" that somebody hashed, so that distinct values may collide.
    """

    rows: int
    hashed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportSchema:
    """A whole schema.toml.

    user, item: the ids themselves as features; `column`: of [users] or [items], in their place.
    users_share: only impressions of this share of the users become samples; events, vocabularies
      and negatives come from all.
    earliest: times before it are refused. order: features as "side.name", the order of the schema.
    tables: these first, in this order. info: kept in the log's info as it is (notes, negatives).
    """

    name: str
    impressions: tuple[Impressions, ...] = ()
    events: tuple[Events, ...] = ()
    users: Catalogue | None = None
    items: Catalogue | None = None
    negatives: Negatives | None = None
    split: Split = Split()
    ids: Ids = Ids()
    user: Input = Input(group="user", table="user")
    item: Input = Input(group="item", table="item")
    counters: counters_module.CounterConfig | None = None
    task: str = ""
    time_exact: bool = True
    users_share: float = 1.0
    earliest: Instant = "1990-01-01"
    order: tuple[str, ...] = ()
    tables: dict[str, Table] = dataclasses.field(default_factory=dict)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.impressions) == (self.negatives is not None):
            raise ValueError(
                "expected either [impressions], or [negatives] for a log of clicks only"
            )
        if self.negatives is not None and not self.events:
            raise ValueError("[negatives] draws from [events], found none")
        if not 0 < self.users_share <= 1:
            raise ValueError(f"users_share: found {self.users_share}, expected in (0, 1]")
        _ = seconds(self.earliest)  # a text that is no instant fails here
        if self.task and self.task not in self.tasks:
            raise ValueError(f"task: found {self.task!r}, expected one of {self.tasks}")
        labels = [x.labels for x in self.impressions]
        if any(set(x) != set(labels[0]) for x in labels):
            raise ValueError("[[impressions]]: found different labels, expected the same in each")
        by_column = {bool(i.split) for i in self.impressions} or {False}
        if by_column != {bool(self.split.train_values)}:
            raise ValueError(
                "expected impressions.split, the column, and split.train_values, .test_values, "
                "what it holds, together"
            )
        for name, x in (("user", self.user), ("item", self.item)):
            if x.kind != "id" or x.derive or x.action:
                raise ValueError(f"{name}: found {x.kind!r} {x.derive!r}, expected an id")
            if x.column and getattr(self, f"{name}s") is None:
                raise ValueError(f"{name}.column: found {x.column!r}, expected [{name}s] with it")
        ordered = [e.list or e.order for e in self.events]
        ordered += [i.order or i.time == ROW for i in self.impressions]
        if self.time_exact and any(ordered):
            raise ValueError(
                "found lists, order or time = '@row' with time_exact = true; expected "
                "time_exact = false, where only the order of a user's events is known"
            )
        rows = (*self.events, *self.impressions, *filter(None, (self.negatives,)))
        for derive in sorted({x.derive for r in rows for x in r.features.values()} - {""}):
            if samples.DERIVED[derive].difference and not self.time_exact:
                raise ValueError(f"derive={derive!r} needs exact times, found time_exact = false")
            if samples.DERIVED[derive].birth and (self.items is None or not self.items.birth):
                raise ValueError(f"derive={derive!r} needs items.birth, found none")
        if self.counters is not None and not self.time_exact:
            raise ValueError("[counters] need exact times, found time_exact = false")

    @property
    def tasks(self) -> tuple[str, ...]:
        if self.negatives is not None:
            return (self.negatives.task,)
        return tuple(self.impressions[0].labels)


def seconds(instant: Instant, zone: str = "UTC") -> int:
    """An instant of the schema as whole seconds since 1970 UTC; ValueError for a text that is none.

    A text is ISO 8601; `zone`: of instants without one.
    """
    if isinstance(instant, int):
        return instant
    if isinstance(instant, str):
        try:
            instant = datetime.datetime.fromisoformat(instant)
        except ValueError as error:
            raise ValueError(
                f"found {instant!r}, expected an instant such as '2024-01-31' or "
                "'2024-01-31T12:00:00+01:00'"
            ) from error
    if not isinstance(instant, datetime.datetime):
        instant = datetime.datetime(instant.year, instant.month, instant.day)
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=zoneinfo.ZoneInfo(zone))
    return math.floor(instant.timestamp())


def load(path: str | os.PathLike) -> ImportSchema:
    """Reads a schema.toml.

    Raises ValueError: no such file, no TOML, an unknown or missing key, a value of a wrong type or
    that fits nothing else; the message names the file and the key.
    """
    path = pathlib.Path(path)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: found no readable file ({error}), expected a schema") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        twice = " (a key that stands twice?)" if "overwrite" in str(error) else ""
        raise ValueError(f"{path}: found {error}{twice}, expected valid TOML") from error
    return parse(found, str(path))


def parse(found: dict[str, Any], where: str) -> ImportSchema:
    """The schema of a TOML document; `where` names it in errors."""
    found = dict(found)
    for name in ("impressions", "events"):  # [events] and [[events]] alike
        if isinstance(found.get(name), dict):
            found[name] = [found[name]]
    asked = found.get("counters")
    if isinstance(asked, dict) and isinstance(asked.get("windows"), list):
        windows = [None if w == "ever" else w for w in asked["windows"]]
        found["counters"] = {**asked, "windows": windows}
    return toml_tables.build(ImportSchema, found, where)
