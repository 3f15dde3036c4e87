"""What an import will do, said before any row is read: which file is which table, which column is
which feature, and what the log's schema will be."""

import dataclasses
import fnmatch
import pathlib
from collections.abc import Sequence
from typing import Literal

from rankjax.data import samples
from rankjax.data.own import formats, places, reading, schema_file
from rankjax.schema import Feature, Schema, Table, Task

TableName = Literal["users", "items", "events", "impressions"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One file in one role. number: which [[events]] or [[impressions]]; file: which of its files.

    order: of all parts; it stands in front of a row's number where rows of all files are sorted.
    """

    table: TableName
    number: int
    file: int
    order: int
    path: pathlib.Path
    spec: schema_file.Files

    @property
    def tag(self) -> str:
        return f"{self.table}.{self.number}.{self.file:04d}"


@dataclasses.dataclass(frozen=True)
class Slot:
    """A feature: the log's side and file it stands in, and the chunks' column that it comes from.

    number: of which [[events]] or [[impressions]]; None = of all (the ids of users and items).
    """

    side: Literal["user", "item", "event", "context"]
    name: str
    column: str  # "user" and "item" are the ids themselves
    table: TableName
    number: int | None
    input: schema_file.Input


def resolve(schema: schema_file.ImportSchema) -> schema_file.ImportSchema:
    """The schema with every default of [ids], table and group written out.

    Where `user` or `item` names a column of [users] or [items], it becomes a feature of theirs, and
    the ids that rows name only tell who they are of.
    Raises ValueError: ids = "hash" or "given" without rows, rows with ids = "vocabulary", another
    feature of that name.
    """

    def features(side: str, one: schema_file.Files | schema_file.Negatives | None):
        if one is None:
            return None
        found = {name: _resolved(schema.ids, name, side, x) for name, x in one.features.items()}
        return dataclasses.replace(one, features=found)

    def own(side: str, catalogue: schema_file.Catalogue | None):
        x = _resolved(schema.ids, side, side, getattr(schema, side))
        catalogue = features(side, catalogue)
        if not x.column:
            return x, catalogue
        if side in catalogue.features:
            raise ValueError(
                f"schema, {side}.column: found {x.column!r} and [{side}s.features] {side} too, "
                "expected one of them"
            )
        catalogue = dataclasses.replace(catalogue, features={side: x, **catalogue.features})
        return dataclasses.replace(x, ids="vocabulary", rows=None), catalogue

    user, users = own("user", schema.users)
    item, items = own("item", schema.items)
    return dataclasses.replace(
        schema,
        user=user,
        item=item,
        users=users,
        items=items,
        events=tuple(features("event", x) for x in schema.events),
        impressions=tuple(features("context", x) for x in schema.impressions),
        negatives=features("context", schema.negatives),
    )


def _resolved(
    ids_: schema_file.Ids, name: str, side: str, x: schema_file.Input
) -> schema_file.Input:
    """A feature with its defaults written out."""
    derived = samples.DERIVED.get(x.derive)
    kind = x.kind if derived is None else derived.kind
    table = "" if kind == "dense" else x.table or name
    x = dataclasses.replace(x, kind=kind, group=x.group or side, table=table)
    if kind == "dense" or derived is not None:
        return x
    ids = x.ids or ids_.ids
    rows = x.rows if ids == "vocabulary" else x.rows or ids_.rows
    if (ids == "vocabulary") != (rows is None):
        raise ValueError(
            f"schema, feature {name!r}: found ids={ids!r} with rows={rows}, expected `rows`, there "
            "or in [ids], with 'hash' and 'given' only"
        )
    return dataclasses.replace(x, ids=ids, rows=rows, min_count=x.min_count or ids_.min_count)


def parts(schema: schema_file.ImportSchema, files: Sequence[pathlib.Path]) -> list[Part]:
    """Which file plays which role, in order; one file may play several.

    Raises ValueError: a name of the schema that fits no file, a file that fits no name, a file
    that lacks a column.
    """
    specs: list[tuple[TableName, int, schema_file.Files]] = []
    for table in ("users", "items"):
        if (one := getattr(schema, table)) is not None:
            specs.append((table, 0, one))
    specs += [("events", i, x) for i, x in enumerate(schema.events)]
    specs += [("impressions", i, x) for i, x in enumerate(schema.impressions)]
    ordered = sorted(files, key=places.sort_key)
    files = sorted({places.same(f): f for f in ordered}.values(), key=places.sort_key)
    found: list[Part] = []
    for table, number, spec in specs:
        matched = []
        for pattern in spec.files:
            fits = [f for f in files if f.name == pattern or fnmatch.fnmatchcase(f.name, pattern)]
            if not fits:
                names = [f.name for f in files]
                raise ValueError(f"[{table}]: found files {names}, expected one like {pattern!r}")
            matched += [f for f in fits if f not in matched]
        for i, path in enumerate(matched):
            found.append(Part(table, number, i, len(found), path, spec))
    if unused := [str(f) for f in files if f not in [p.path for p in found]]:
        expected = sorted({pattern for _, _, spec in specs for pattern in spec.files})
        raise ValueError(
            f"found files {unused} that no table names, expected names like {expected}; leave them "
            "out, or name them in the schema"
        )
    return found


def check_columns(schema: schema_file.ImportSchema, found: Sequence[Part]) -> list[str]:
    """Opens every file's header; ValueError for a missing column. Returns what is not used."""
    used: dict[pathlib.Path, set[str]] = {}
    there: dict[pathlib.Path, list[str]] = {}
    for part in found:
        columns = formats.columns_of(part.path, part.spec)
        wanted = reading.wanted_columns(part.spec, negatives_of(schema, part.table))
        if missing := {c: role for c, role in wanted.items() if c not in columns}:
            column, role = next(iter(missing.items()))
            raise ValueError(
                f"{part.path}: found columns {list(columns)}, expected {column!r} too, which the "
                f"schema names as {role} of [{part.table}]"
            )
        used.setdefault(part.path, set()).update(wanted)
        there[part.path] = list(columns)
    return [f"{p.name}: {c}" for p, names in there.items() for c in names if c not in used[p]]


def negatives_of(schema: schema_file.ImportSchema, table: str) -> schema_file.Negatives | None:
    return schema.negatives if table == "events" else None


def slots(schema: schema_file.ImportSchema) -> list[Slot]:
    """All features of the log, derived ones included, in the order of the schema.

    A feature that several [[events]] or [[impressions]] hold has one slot for each.
    """
    found: list[Slot] = []
    for side in ("user", "item"):
        table, own = f"{side}s", getattr(schema, side)
        if not own.column:  # else it is among the features of the catalogue
            found.append(Slot(side, side, side, table, None, own))
        if (catalogue := getattr(schema, table)) is not None:
            found += _slots(side, table, 0, catalogue.features, "f:")
    for i, x in enumerate(schema.events):
        found += _slots("event", "events", i, x.features, "f:")
    for i, x in enumerate(schema.impressions):
        found += _slots("context", "impressions", i, x.features, "f:")
    if schema.negatives is not None:
        for i in range(len(schema.events)):
            found += _slots("context", "events", i, schema.negatives.features, "c:")
    return found


def _slots(
    side: str, table: str, number: int, features: dict[str, schema_file.Input], prefix: str
) -> list[Slot]:
    return [Slot(side, n, prefix + n, table, number, x) for n, x in features.items()]


def log_schema(
    schema: schema_file.ImportSchema, found: Sequence[Slot], words: dict[str, int]
) -> Schema:
    """The log's schema; `words` holds the size of every learned vocabulary.

    Raises ValueError where features that share a name or a table contradict each other, or a table
    of the schema is too small.
    """
    features: dict[tuple[str, str], Feature] = {}
    tables: dict[str, Table] = {}
    for slot in found:
        x = slot.input
        feature = Feature(
            name=slot.name,
            side=slot.side,
            group=x.group,
            kind=x.kind,
            table=x.table,
            values=x.values if x.kind == "ids" else 1,
            derive=x.derive,
            action=x.action,
        )
        what = f"feature {slot.name!r} of side {slot.side!r}"
        _same(what, features, (slot.side, slot.name), feature)
        if x.table:
            table = _table(schema, slot, words.get(x.table, 0))
            _same(f"table {x.table!r}", tables, x.table, table)
    settled = {n: Table(name=n, rows=t.rows, hashed=t.hashed) for n, t in schema.tables.items()}
    tables = settled | tables
    order = {name: i for i, name in enumerate(schema.order)}
    named = {f"{side}.{name}": f for (side, name), f in features.items()}
    if unknown := [name for name in schema.order if name not in named]:
        raise ValueError(f"schema, order: found {unknown}, expected some of {list(named)}")
    arranged = sorted(named, key=lambda name: order.get(name, len(order)))
    used = dict.fromkeys([*settled, *(named[name].table for name in arranged)])
    weights: dict[str, str] = {}
    for name, label in (pair for x in schema.impressions for pair in x.labels.items()):
        _same(f"weight of label {name!r}", weights, name, label.weight)
    return Schema(
        tables=tuple(tables[name] for name in used if name),
        features=tuple(named[name] for name in arranged),
        tasks=tuple(Task(name=t, weight=weights.get(t, "")) for t in schema.tasks),
        primary_task=schema.task or schema.tasks[0],
        time_exact=schema.time_exact,
    )


def _table(schema: schema_file.ImportSchema, slot: Slot, words: int) -> Table:
    """The table of a slot: as large as the schema settles it, or as its ids need."""
    x = slot.input
    rows = x.rows or (samples.DERIVED[x.derive].rows if x.derive else words + 2)
    hashed = x.ids == "hash" and not x.derive
    if (settled := schema.tables.get(x.table)) is not None:
        if settled.rows < rows:
            raise ValueError(
                f"schema, tables.{x.table}: found rows={settled.rows}, expected at least {rows} "
                f"for feature {slot.name!r} of side {slot.side!r}"
            )
        rows, hashed = settled.rows, hashed or settled.hashed
    return Table(name=x.table, rows=rows, hashed=hashed)


def _same(what: str, found: dict, key, value) -> None:
    if found.setdefault(key, value) != value:
        raise ValueError(f"schema: found {what} twice, as {found[key]!r} and {value!r}")
