"""One step planned in several ways: strategies, meshes, batch sizes, recompute."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import plotly.graph_objects as go
import rich.table

from rankjax import screen, sharding
from rankjax.layers import stack
from rankjax.plan import bill, targets

COLUMNS = ("strategy", "model", "rows", "remat", "memory_bytes", "memory_share", "seconds", "limit")


def cases(
    ask: bill.Ask,
    devices: int,
    rows: Sequence[int],
    model_axes: Sequence[int] = (2, 4),
    remat: Sequence[str] = ("none", "full"),
) -> Iterator[bill.Ask]:
    """Every strategy, with every size of the mesh's axis "model" where it has one."""
    for strategy, count, policy in itertools.product(sharding.STRATEGIES, rows, remat):
        axes = [n for n in model_axes if devices % n == 0] if "tensor" in strategy else [1]
        for model in axes:
            yield dataclasses.replace(
                ask,
                rows=count,
                mesh=sharding.MeshConfig(strategy=strategy, model=model),
                compute=stack.Compute(scan=ask.compute.scan, remat=policy),
            )


def run(
    asks: Sequence[bill.Ask], target: targets.Target, on_case: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for every case, the fastest that fits first; "error" where it cannot be planned."""
    found = []
    for ask in asks:
        row = {
            "strategy": ask.mesh.strategy,
            "model": ask.mesh.model,
            "rows": ask.rows,
            "remat": ask.compute.remat,
        }
        on_case(", ".join(f"{key} {value}" for key, value in row.items()))
        try:
            made = bill.make(ask, target)
        except ValueError as error:
            found.append(row | {"error": str(error)})
            continue
        row["memory_bytes"] = made["memory_bytes"]
        if "limit" in made:
            row["memory_share"] = made["memory_share"]
            row["seconds"] = made["seconds_at_peaks"][made["limit"]]
            row["limit"] = made["limit"]
            row["requests_per_second_at_peaks"] = made["requests_per_second_at_peaks"]
            for key in ("seconds_by_compiler", "cost_of_a_billion_requests_at_peaks"):
                if key in made:
                    row[key] = made[key]
        row["fits"] = made["fits"]
        found.append(row)
    rate = lambda row: row.get("requests_per_second_at_peaks", 0.0)
    return sorted(found, key=lambda row: (not row.get("fits", False), -rate(row)))


def show(found: Sequence[dict[str, Any]]) -> None:
    """Bytes in GiB, seconds in ms: at the published peaks, and where it says by the compiler."""
    said = any("seconds_by_compiler" in row for row in found)
    more = ("by compiler",) if said else ()
    table = rich.table.Table(*COLUMNS, *more, "requests/s at the peaks", "fits")
    for row in found:
        if "error" in row:
            continue
        memory = f"{row['memory_bytes'] / 2**30:,.2f} GiB"
        share = f"{row['memory_share']:.0%}" if "memory_share" in row else ""
        seconds = f"{1e3 * row['seconds']:,.2f} ms" if "seconds" in row else ""
        rate = f"{row['requests_per_second_at_peaks']:,.0f}" if "seconds" in row else ""
        cells = [str(row[key]) for key in COLUMNS[:4]]
        fits = "yes" if row["fits"] else "no"
        expected = row.get("seconds_by_compiler")
        own = [f"{1e3 * expected:,.2f} ms" if expected else ""] if said else []
        table.add_row(*cells, memory, share, seconds, row.get("limit", ""), *own, rate, fits)
    console = screen.wide()
    console.print(table)
    for row in found:
        if "error" in row:
            console.print(f"{row['strategy']}, {row['rows']} rows: {row['error']}")


def figure(found: Sequence[dict[str, Any]], title: str, path: pathlib.Path) -> None:
    """Memory against requests per second, one point a case; a self-contained HTML file."""
    made = go.Figure(layout={"title": title})
    made.update_xaxes(title="memory of a device, GiB")
    made.update_yaxes(title="requests per second at the peaks", rangemode="tozero")
    for strategy in sharding.STRATEGIES:
        rows = [r for r in found if r["strategy"] == strategy and "memory_bytes" in r]
        if not rows:
            continue
        made.add_scatter(
            name=strategy,
            mode="markers",
            x=[r["memory_bytes"] / 2**30 for r in rows],
            y=[r.get("requests_per_second_at_peaks") for r in rows],
            text=[f"model {r['model']}, {r['rows']} rows, remat {r['remat']}" for r in rows],
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    made.write_html(path, include_plotlyjs=True)
