"""A small clean world as columns, to plant one fault in, and what `check` finds then."""

import copy
import dataclasses
import functools
import pathlib
import tempfile

import numpy as np

from rankjax import schema
from rankjax.data import check, event_log
from rankjax.data.sources import synthetic

Files = dict[str, dict[str, np.ndarray]]


@functools.cache
def _clean() -> tuple[schema.Schema, Files]:
    with tempfile.TemporaryDirectory() as folder:
        config = synthetic.World(users=200)
        log = event_log.EventLog.open(synthetic.prepare(config, folder, workers=1))
        files = {f: {k: np.array(x) for k, x in log.columns[f].items()} for f in event_log.FILES}
        return log.schema, files


def clean() -> tuple[schema.Schema, Files]:
    """The schema and the columns of a world of 200 users (45 thousand impressions), to change."""
    found, files = _clean()
    return found, copy.deepcopy(files)


def with_feature(found: schema.Schema, **feature: object) -> schema.Schema:
    """The schema with one more context feature; ids read the table "planted" of 1000 rows."""
    added = schema.Feature(side="context", group="planted", **feature)
    tables = found.tables
    if added.table and added.table not in {t.name for t in tables}:
        tables = (*tables, schema.Table(name=added.table, rows=1000))
    return dataclasses.replace(found, tables=tables, features=(*found.features, added))


def without_times(found: schema.Schema, files: Files) -> schema.Schema:
    """Gives events and impressions the `order` of their times; returns the schema of order only."""
    for file in ("events", "impressions"):
        files[file]["order"] = files[file]["time"].astype(np.int32)
    kept = tuple(f for f in found.features if f.derive not in ("item_age", "log_age"))
    return dataclasses.replace(found, features=kept, time_exact=False)


def rows(columns: dict[str, np.ndarray], at: np.ndarray) -> dict[str, np.ndarray]:
    """The rows `at` of every column."""
    return {name: x[at] for name, x in columns.items()}


def in_order(columns: dict[str, np.ndarray], *keys: str) -> dict[str, np.ndarray]:
    """The rows sorted by the keys, the first one first; equal rows stay as they lie."""
    return rows(columns, np.lexsort([columns[name] for name in reversed(keys)]))


def joined(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([x, b[name]]) for name, x in a.items()}


def written(
    folder: pathlib.Path, found: schema.Schema, files: Files, **info: object
) -> event_log.EventLog:
    """Writes the columns into folder/log and opens the log."""
    event_log.write_log(folder / "log", found, **files, fingerprint={"planted": 1}, **info)
    return event_log.EventLog.open(folder / "log")


def findings(folder: pathlib.Path, found: schema.Schema, files: Files) -> list[check.Finding]:
    """What `check` finds in the log of these columns."""
    return check.check(written(folder, found, files))


def kinds(found: list[check.Finding]) -> set[str]:
    return {x.kind for x in found}
