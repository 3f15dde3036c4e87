"""Reading the user's files in chunks: Parquet, CSV and Arrow, each column checked for its role.

`chunks` yields frames whose columns are roles instead of names:
  row       int64, the row of the file, from 0
  user, item, request   int64 or text (several columns are joined to one text)
  time      int64, seconds since 1970 UTC
  order, position       int64; split: as it is
  label:<task>          int8, 0 or 1
  f:<feature>           id: int64 or text; ids: a list of one; dense: float64; null = missing
  c:<feature>, click    of events that become impressions ([negatives])
Whatever does not fit is a ValueError that names file, column, row, what was found and expected.
"""

import pathlib
from collections.abc import Iterator

import polars as pl

from rankjax.data.own import cells, formats, schema_file, times

SEPARATOR = "\x1f"  # between the parts of an id made of several columns
ONE_USER = "everyone"  # who acts in a log without users


def wanted_columns(spec: schema_file.Files, more: schema_file.Negatives | None) -> dict[str, str]:
    """{column: role} of everything that is read; of a column with several roles the first."""
    found: dict[str, str] = {}
    if isinstance(spec, schema_file.Catalogue):
        roles = {"id": spec.id, "birth": spec.birth}
    else:
        roles = {"user": spec.user, "item": spec.item, "time": spec.time, "order": spec.order}
        if isinstance(spec, schema_file.Impressions):
            roles |= {"request": spec.request, "position": spec.position, "split": spec.split}
            roles |= {f"label {k}": x.column for k, x in spec.labels.items()}
    if spec.where is not None:
        roles["where"] = spec.where.column
    if more is not None and more.of is not None:
        roles["negatives.of"] = more.of.column
    inputs = {f"feature {k}": x for k, x in spec.features.items()}
    inputs |= {f"feature {k} of [negatives]": x for k, x in (more.features if more else {}).items()}
    for role, x in inputs.items():
        roles[role] = tuple(c for c in (x.column, x.at) if c)
    for role, names in roles.items():
        for name in (names,) if isinstance(names, str) else names:
            if name and name != schema_file.ROW:
                found.setdefault(name, role)
    return found


def chunks(
    path: pathlib.Path,
    spec: schema_file.Files,
    schema: schema_file.ImportSchema,
    rows: int,
) -> Iterator[tuple[int, pl.DataFrame]]:
    """(rows read so far, the chunk by role) for every `rows` rows of the file.

    The schema's defaults are written out (plan.resolve). Rows that `where` leaves out are counted
    but not in the frame. Times before `earliest` are refused, as are times later than tomorrow.
    """
    more = schema.negatives if isinstance(spec, schema_file.Events) else None
    names = [n for n in wanted_columns(spec, more) if n != schema_file.ROW]
    for raw in formats.rechunk(formats.raw_frames(path, spec, names, more), rows):
        if not raw.height:  # a file without rows does not tell what types its columns have
            return
        first, last = raw["@row"][0], raw["@row"][-1]
        try:
            frame = _by_role(path, raw, spec, schema, more)
        except (pl.exceptions.PolarsError, OverflowError) as error:
            raise ValueError(f"{path}, rows {first} to {last}: found {error}") from error
        yield last + 1, frame


def _by_role(
    path: pathlib.Path,
    raw: pl.DataFrame,
    spec: schema_file.Files,
    schema: schema_file.ImportSchema,
    more: schema_file.Negatives | None,
) -> pl.DataFrame:
    """A chunk's rows where `where` holds, its columns called by their roles."""
    place = cells.Place(path, raw["@row"])
    if spec.where is not None:
        raw = raw.filter(cells.holds(raw[spec.where.column], spec.where, place))
        place = cells.Place(path, raw["@row"])
    found = {"row": raw["@row"]}
    if isinstance(spec, schema_file.Catalogue):
        own = schema.users is not None and spec is schema.users
        found["id"] = key(raw, spec.id, schema.user if own else schema.item, place)
        if spec.birth:
            found["birth"] = times.when(raw[spec.birth], spec, schema, place, empty=True)
    else:
        found |= _acts(raw, spec, schema, place)
    inputs = {f"f:{k}": x for k, x in spec.features.items()}
    if more is not None:
        inputs |= {f"c:{k}": x for k, x in more.features.items()}
        found["click"] = pl.Series([True]).new_from_index(0, raw.height)
        if more.of is not None:
            found["click"] = cells.holds(raw[more.of.column], more.of, place)
    found |= {k: cells.value(raw, x, place) for k, x in inputs.items() if not x.derive}
    return pl.DataFrame([x.alias(name) for name, x in found.items()])


def _acts(
    raw: pl.DataFrame,
    spec: schema_file.Events | schema_file.Impressions,
    schema: schema_file.ImportSchema,
    place: cells.Place,
) -> dict[str, pl.Series]:
    """The roles of an events or impressions file but its features."""
    found = {"user": key(raw, spec.user, schema.user, place)}
    if isinstance(spec, schema_file.Events) and spec.list:
        found["item"] = cells.values(raw[spec.item], spec.item, "", place)
    elif spec.item:
        found["item"] = key(raw, spec.item, schema.item, place)
    if spec.time == schema_file.ROW:
        found["time"] = raw["@row"] + schema_file.seconds(schema.earliest)
    elif spec.time:
        found["time"] = times.when(raw[spec.time], spec, schema, place)
    if spec.order:
        found["order"] = cells.whole(raw[spec.order], spec.order, place)
    if isinstance(spec, schema_file.Impressions):
        if spec.request and spec.request != schema_file.ROW:
            found["request"] = key(raw, spec.request, None, place)
        if spec.position:
            found["position"] = cells.whole(raw[spec.position], spec.position, place)
        if spec.split:
            found["split"] = raw[spec.split]
        labels = spec.labels.items()
        found |= {f"label:{k}": cells.binary(raw[x.column], x, place) for k, x in labels}
    return found


def key(
    raw: pl.DataFrame,
    names: schema_file.Columns,
    own: schema_file.Input | None,
    place: cells.Place,
) -> pl.Series:
    """An id of one column, or of several joined to a text; never missing.

    own: how the ids become a feature; given ids must lie in their table, from 1 on.
    """
    if not names:
        return pl.Series([ONE_USER], dtype=pl.String).new_from_index(0, raw.height)
    if isinstance(names, str):
        x = cells.ids(raw[names], names, place, empty=False)
    else:
        parts = [cells.ids(raw[n], n, place, empty=False).cast(pl.String).alias(n) for n in names]
        x = pl.DataFrame(parts).select(pl.concat_str(pl.all(), separator=SEPARATOR)).to_series()
        names = '", "'.join(names)
    return x if own is None else cells.given(x, own, names, place, low=1)
