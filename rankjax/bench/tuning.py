"""`rankjax bench kernels --tune`: which tiles are fastest on this kind of device.

Kernel by kernel, the others held: the candidates take turns at several lengths, and the one whose
seconds, over those of the tiles in use, multiply to the least wins, if it wins by MARGIN at every
length on average, and again when the two are measured alone.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any

import jax
import numpy as np

from rankjax.bench import attention_cases as cases
from rankjax.bench import kernels, rounds
from rankjax.kernels.hstu_attention import tiles
from rankjax.kernels.hstu_attention.tiles import Tile, Tiles

MARGIN = 0.05  # what noise alone may give
WIDTHS = (64, 128, 256)
SIDES = {
    "xla": (64, 128, 256, 512),
    "pallas_tpu": (128, 256, 512, 1024),
    "pallas_gpu": (32, 64, 128),
}
SCHEDULES = {"pallas_gpu": tuple(itertools.product((4, 8), (1, 2, 3)))}  # warps, stages
# A TPU sums the tables' gradients with those of the queries. XLA sums all gradients at once, in
# tiles of `d_tables` with tables and of `d_queries` without.
KERNELS = {
    "xla": ("forward", "d_queries", "d_tables"),
    "pallas_tpu": ("forward", "d_queries", "d_keys"),
    "pallas_gpu": tiles.KERNELS,
}


def candidates(implementation: str, kernel: str) -> tuple[Tile, ...]:
    """What is tried: squares, and tiles up to four times as long as wide or wide as long."""
    found = []
    for queries, keys in itertools.product(SIDES[implementation], repeat=2):
        if max(queries, keys) > 4 * min(queries, keys):
            continue
        for more in SCHEDULES.get(implementation, ((),)):
            if kernel == "d_tables" and more and more[1] != 1:
                continue  # it always has one stage
            found.append(Tile(queries, keys, *more))
    return tuple(found)


def run(
    config: rounds.Rounds,
    *,
    lengths: tuple[int, ...],
    widths: tuple[int, ...] = WIDTHS,
    tokens: int = 4096,
    dtype: str = "float32",
    out: pathlib.Path = tiles.FILE,
    found: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Tunes every implementation of this platform and writes the winners into `out`.

    Returns {"tuned": {implementation: {width: {kernel: {"before", "after", "seconds_over": {tile:
    product over lengths of its seconds over those of "before"}, "skipped": {tile: why}}}}}}.
    """
    found = {} if found is None else found
    kind = jax.devices()[0].device_kind
    found["tuned"] = {}
    for implementation in kernels.OF_PLATFORM[kernels.platform()]:
        by_width = found["tuned"].setdefault(implementation, {})
        for width in widths:
            kernels.check(dtype, width, 2)
            best = tiles.best(implementation, width)
            report = by_width.setdefault(str(width), {})
            for kernel in KERNELS[implementation]:
                tables = (implementation, kernel) != ("xla", "d_queries")
                shapes = [
                    cases.shape("full", n, tokens, tables, width=width, dtype=dtype)
                    for n in lengths
                ]
                report[kernel] = _kernel(implementation, kernel, best, shapes, config)
                best = dataclasses.replace(best, **{kernel: Tile(*report[kernel]["after"])})
            if best != tiles.best(implementation, width):
                write(out, implementation, kind, width, best)
    return found


def _kernel(
    implementation: str, kernel: str, best: Tiles, shapes: list, config: rounds.Rounds
) -> dict[str, Any]:
    """One entry of "tuned"."""
    before = getattr(best, kernel)
    tried = tuple(dict.fromkeys((before, *candidates(implementation, kernel))))
    over, skipped = _over(implementation, kernel, best, tried, shapes, config)
    winner, enough = min(over, key=over.get), (1 - MARGIN) ** len(shapes)
    if over[winner] <= enough:
        again, _ = _over(implementation, kernel, best, (before, winner), shapes, config)
        over[winner] = max(over[winner], again[winner])
    winner = winner if over[winner] <= enough else before
    text = lambda tile: json.dumps(list(tile))
    return {
        **{"before": list(before), "after": list(winner)},
        "seconds_over": {text(t): x for t, x in sorted(over.items(), key=lambda item: item[1])},
        "skipped": {text(t): why for t, why in skipped.items()},
    }


def _over(
    implementation: str,
    kernel: str,
    best: Tiles,
    tried: tuple[Tile, ...],
    shapes: list,
    config: rounds.Rounds,
) -> tuple[dict[Tile, float], dict[Tile, str]]:
    """({tile: product over shapes of seconds over those of the first}, {tile that fails: why})."""
    part, before = ("forward" if kernel == "forward" else "forward_backward"), tried[0]
    over, skipped = dict.fromkeys(tried, 1.0), {}
    for s in shapes:
        p, jobs = cases.problem(s), {}
        for tile in [t for t in tried if t not in skipped]:
            chosen = dataclasses.replace(best, **{kernel: tile})
            attention = functools.partial(
                cases.silu_attention, implementation=implementation, tile=chosen
            )
            try:
                program, args = cases.programs(p, attention, (part,))[part]
                jax.block_until_ready(program(*args))
            except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as why:
                if tile == before:
                    raise
                skipped[tile] = str(why).splitlines()[0][:200]
                continue
            jobs[tile] = rounds.timed(functools.partial(program, *args))
        seconds, _ = rounds.measure(jobs, [], dataclasses.replace(config, peers=False))
        middle = {tile: float(np.median(own)) for tile, own in seconds.items()}
        over = {tile: over[tile] * middle[tile] / middle[before] for tile in middle}
    return over, skipped


def write(
    file: pathlib.Path, implementation: str, kind: str, width: int, best: Tiles
) -> dict[str, Any]:
    """Puts a row into the table of `file`, which starts as the table in use where it is missing."""
    table = json.loads(file.read_text()) if file.exists() else json.loads(tiles.FILE.read_text())
    # A new kind starts with the default's rows: a lone narrow one would serve all wider heads.
    rows = table[implementation].setdefault(kind, dict(table[implementation]["default"]))
    short = 2 if implementation != "pallas_gpu" else 4
    own = {name: list(getattr(best, name))[:short] for name in tiles.KERNELS}
    rows[str(width)] = own
    table[implementation][kind] = dict(sorted(rows.items(), key=lambda item: int(item[0])))
    file.write_text(dumps(table))
    return table


def dumps(table: dict[str, Any]) -> str:
    """JSON with a row of the table a line."""
    parts = []
    for implementation, kinds in table.items():
        inner = []
        for kind, rows in kinds.items():
            lines = [f"      {json.dumps(w)}: {json.dumps(row)}" for w, row in rows.items()]
            inner.append(f"    {json.dumps(kind)}: {{\n" + ",\n".join(lines) + "\n    }")
        parts.append(f"  {json.dumps(implementation)}: {{\n" + ",\n".join(inner) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"
