"""The commands of `rankjax data`: make a log, look at it, check it, hand it on."""

import contextlib
import dataclasses
import json as json_module
import pathlib
import sys
import time
from typing import Annotated, Any, Literal

import rich
import rich.table
import tyro

from rankjax import memory
from rankjax.data import (
    check,
    counters,
    describe,
    describe_page,
    describe_text,
    event_log,
    importer,
    split,
)
from rankjax.data import engine as engine_lib
from rankjax.data.own import export, guess, places, schema_file

Folder = Annotated[pathlib.Path, tyro.conf.Positional]
Files = Annotated[tuple[str, ...], tyro.conf.Positional]


def show(found: dict[str, Any], as_json: bool) -> None:
    """Prints a result: a table for people, one JSON object for machines."""
    if as_json:
        print(json_module.dumps(found))
        return
    table = rich.table.Table(show_header=False)
    for key, value in found.items():
        table.add_row(str(key), f"{value:.6g}" if isinstance(value, float) else str(value))
    rich.print(table)


def summary(path: pathlib.Path) -> dict[str, Any]:
    """What a command that made a log says of it."""
    log = event_log.EventLog.open(path)
    rows = {f: log.rows(f) for f in event_log.FILES}
    found = {"log": str(path), "rows": rows, "tasks": [t.name for t in log.schema.tasks]}
    names = ("notes", "unused_columns", "lost", "negatives_given_up", "users_without_a_row")
    names += ("items_without_a_row", "items_without_birth")
    return found | {name: log.info[name] for name in names if log.info.get(name)}


def data_schema(files: Files, out: pathlib.Path | None = None, json: bool = False) -> None:
    """Write a starter schema.toml for your files, with roles guessed from names and values.

    Args:
      files: Parquet, CSV or Arrow files.
      out: where to write it; default: print it.
      json: print JSON.
    """
    text = guess.starter(places.expanded(files))
    if out is not None:
        if out.exists():
            raise ValueError(f"{out}: found a file, expected none: it may hold your changes")
        out.write_text(text, encoding="utf-8")
        show({"schema": str(out)}, json)
    elif json:
        print(json_module.dumps({"schema": text}))
    else:
        print(text)


def data_import(
    files: Files,
    schema: pathlib.Path,
    out: pathlib.Path,
    counters: bool = True,
    shards: int | None = None,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    json: bool = False,
) -> None:
    """Make a log of your own files, as schema.toml says (docs/own-data.md).

    Args:
      files: Parquet, CSV or Arrow files; globs are fine. Parquet also from an object store: gs://...
      schema: which column plays which role (rankjax data schema writes a starter).
      out: folder for the log.
      counters: add what the schema's [counters] asks for.
      shards: write the log in so many shards, ranges of users; by default as one.
      engine: ray: the workers of a Ray cluster, which share this file system, do the pieces.
      address: of the cluster; by default that of this machine, or of RAY_ADDRESS.
      json: print JSON.
    """
    began = time.monotonic()
    if address is not None and engine != "ray":
        raise ValueError(f"data import: found --address with --engine {engine}, expected ray")
    asked = schema_file.load(schema)
    if not counters:
        asked = dataclasses.replace(asked, counters=None)
    paths, done = places.expanded(files), engine_lib.here
    with contextlib.ExitStack() as stack:
        if engine == "ray":
            here = [path for path in paths if not places.is_remote(path)]
            folder = importer.checked_out(out).parent
            done = stack.enter_context(engine_lib.on_ray(address, folder, here))
        found = summary(importer.run(asked, paths, out, shards=shards, engine=done))
        found["seconds"] = time.monotonic() - began
        if peak := memory.peak_mib():
            found["peak_memory_mib"] = peak
        if engine == "ray":
            found["peak_memory_mib_of_workers"] = done.peak_mib
    show(found, json)


def data_describe(log: Folder, html: pathlib.Path | None = None, json: bool = False) -> None:
    """Counts, spans, label rates, histories, candidates, cardinalities, unseen ids, missing values.

    Args:
      log: a prepared log.
      html: write one page with plots there too.
      json: print JSON.
    """
    found = describe.describe(event_log.EventLog.open(log))
    print(json_module.dumps(found) if json else describe_text.text(found))
    if html is not None:
        html.write_text(describe_page.page(found), encoding="utf-8")
        print(f"page: {html}", file=sys.stderr)


def data_check(log: Folder, json: bool = False) -> None:
    """Look for what ruins a study: leaks, duplicates, drifting labels, splits that share requests.

    Ends with exit status 1 where something is an error.

    Args:
      log: a prepared log.
      json: print JSON.
    """
    found = check.check(event_log.EventLog.open(log, verify=True))
    if json:
        print(json_module.dumps([dataclasses.asdict(f) for f in found]))
    else:
        print(check.text(found))
    sys.exit(1 if any(f.severity == "error" for f in found) else 0)


def data_counters(
    log: Folder,
    out: Folder,
    config: Annotated[counters.CounterConfig, tyro.conf.arg(name="")] = counters.CounterConfig(),  # noqa: B008
    json: bool = False,
) -> None:
    """Add time-safe counters to a log: impressions, clicks and rates strictly before each request.

    Args:
      log: a prepared log.
      out: folder for the log with counters.
      config: what is counted, over which windows (seconds).
      json: print JSON.
    """
    show(summary(counters.add(log, out, config)), json)


def data_split(
    log: Folder,
    out: Folder,
    shards: int | None = None,
    only: tuple[int, ...] = (),
    json: bool = False,
) -> None:
    """Write a log again in shards (ranges of users), in other shards, or as one.

    Args:
      log: a prepared log.
      out: folder for it.
      shards: how many; by default as one.
      only: of a log in shards, the numbers of those to take.
      json: print JSON.
    """
    show(summary(split.split(log, out, shards, only or None)), json)


def data_export(
    log: Folder,
    out: Folder,
    format: Literal["csv", "parquet"] = "csv",
    parts: int = 1,
    json: bool = False,
) -> None:
    """Write a log as plain files with a schema.toml that imports them back.

    Args:
      log: a prepared log.
      out: folder for users, items, events, impressions and schema.toml.
      format: of the files.
      parts: of each file.
      json: print JSON.
    """
    opened = event_log.EventLog.open(log)
    show({"schema": str(export.export(opened, out, format, parts))}, json)
