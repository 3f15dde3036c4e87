"""`rankjax plan`: what a training step takes on devices that are not here."""

import dataclasses
import json as json_text
import pathlib
import sys
from typing import Any

import rich
import rich.table

from rankjax import catalogue, embedding, sharding, step
from rankjax.layers import stack
from rankjax.plan import bill, targets
from rankjax.plan import sweep as sweep_lib
from rankjax.schema import Schema, Table


def plan(
    model: str,
    target: str,
    rows: int | None = None,
    history: int | None = None,
    candidates: int = 16,
    table_rows: tuple[int, ...] = (),
    embedding_width: int = 16,
    table_pack: int = 1,
    mesh: sharding.MeshConfig = sharding.MeshConfig(),  # noqa: B008 (frozen)
    compute: stack.Compute = stack.PLAIN,
    price: float | None = None,
    sweep: bool = False,
    sweep_rows: tuple[int, ...] = (),
    html: pathlib.Path | None = None,
    json: bool = False,
) -> dict[str, Any] | list[dict[str, Any]]:
    """Compile the training step for a target without having it: memory, time, cost.

    Args:
      model: a size or an architecture that `rankjax models` lists.
      target: KIND:SIZE, as v5e:16x16, v5p:8x8x8, v6e:16x16, h200:8, cpu:1.
      rows: requests of the whole batch; by default 32 for each device.
      history: S; by default the model's own, or 50.
      candidates: C of each request.
      table_rows: rows of the largest tables, as many as are named; the others keep those of the
        small synthetic world.
      embedding_width: E.
      table_pack: rows of a table side by side in memory (rankjax train --tables.pack).
      mesh: how devices are used; all of them by rows where not said. A sweep tries its own.
      compute: layers scanned, recomputed. A sweep tries its own recompute.
      price: of one device for an hour; gives the cost of a billion requests.
      sweep: compare strategies, meshes, batch sizes and recompute instead; fastest that fits first.
      sweep_rows: batch sizes to compare; by default `rows`.
      html: of a sweep, also a figure in this file.
      json: print JSON.

    Raises ValueError, before anything is compiled, for what is unknown or cannot be planned.
    """
    _check_flags(mesh, compute, sweep, sweep_rows, html)
    config, _ = catalogue.find(model)
    config, note = catalogue.fitting(config)
    fields = dataclasses.asdict(config)
    schema = sized(catalogue.world_schema(), table_rows)
    if "tasks" in fields:
        config = dataclasses.replace(config, tasks=len(schema.tasks))
    found = targets.find(target)
    length = (fields.get("history") or 50) if history is None else history
    if history is not None and "history" in fields:
        config = dataclasses.replace(config, history=history)
    tables = embedding.TableConfig(width=embedding_width, pack=table_pack)
    ask = bill.Ask(
        model=config,
        schema=schema,
        rows=32 * len(found.devices) if rows is None else rows,
        history=length,
        candidates=candidates,
        mesh=mesh,
        compute=compute,
        training=step.TrainConfig(tables=tables),
        price=price,
    )
    if sweep:
        return _sweep(ask, found, sweep_rows, f"{model} on {target}", html, json)
    made = {"model": model, **({"note": note} if note else {}), **bill.make(ask, found)}
    if json:
        print(json_text.dumps(made))
    else:
        show(made)
    return made


def _check_flags(
    mesh: sharding.MeshConfig,
    compute: stack.Compute,
    sweep: bool,
    sweep_rows: tuple[int, ...],
    html: pathlib.Path | None,
) -> None:
    """Raises ValueError for what a sweep would ignore, or only a sweep heeds."""
    if not sweep:
        for name, value in (("html", html), ("sweep-rows", " ".join(map(str, sweep_rows)))):
            if value:
                raise ValueError(f"plan: found --{name} {value} without --sweep, expected both")
    elif mesh != sharding.MeshConfig() or compute.remat != stack.PLAIN.remat:
        raise ValueError(
            "plan: found --mesh or --compute.remat with --sweep, expected neither: a sweep tries "
            "all strategies, with and without recompute"
        )


def _sweep(
    ask: bill.Ask,
    target: targets.Target,
    rows: tuple[int, ...],
    title: str,
    html: pathlib.Path | None,
    json: bool,
) -> list[dict[str, Any]]:
    cases = list(sweep_lib.cases(ask, len(target.devices), rows or (ask.rows,)))
    for case in cases:
        bill.check_rows(case.rows, target)
    tell = lambda case: print(case, file=sys.stderr)
    found = sweep_lib.run(cases, target, tell)
    if all("error" in row for row in found):
        raise ValueError(found[0]["error"])
    if html is not None:
        sweep_lib.figure(found, title, html)
    if json:
        print(json_text.dumps(found))
    else:
        sweep_lib.show(found)
    return found


def sized(schema: Schema, rows: tuple[int, ...]) -> Schema:
    """The schema with so many rows in its largest tables, the largest first.

    Raises ValueError for more than it has.
    """
    names = [t.name for t in sorted(schema.tables, key=lambda t: -t.rows)]
    if len(rows) > len(names):
        raise ValueError(f"plan: rows for {len(rows)} tables, expected at most {len(names)}")
    given = dict(zip(names, rows))
    tables = tuple(
        Table(name=t.name, rows=given[t.name], hashed=True) if t.name in given else t
        for t in schema.tables
    )
    return dataclasses.replace(schema, tables=tables)


def show(made: dict[str, Any]) -> None:
    """Bytes in MiB, FLOPs in GFLOP, seconds in ms."""
    table = rich.table.Table(show_header=False)
    for key, value in made.items():
        if key == "advice":
            for line in value:
                table.add_row("does not fit", line)
        elif isinstance(value, dict):
            for name, part in value.items():
                table.add_row(f"{key}: {name}", _text(key, part))
        else:
            table.add_row(key, _text(key, value))
    rich.print(table)


def _text(key: str, value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if key.endswith("bytes") or key == "collectives":
            return f"{value / 2**20:,.1f} MiB"
        if key in ("flops", "flops_counted"):
            return f"{value / 1e9:,.2f} GFLOP"
        if key.startswith("seconds"):
            return f"{1e3 * value:,.3f} ms"
        return f"{value:,.4g}"
    return str(value)
