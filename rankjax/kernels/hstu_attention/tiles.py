"""Which tiles the kernels walk: measured by `rankjax bench kernels --tune`, kept in tiles.json.

The file: {implementation: {kind of device: {width: {kernel: [queries, keys, warps, stages]}}}}. A
row serves heads up to its width, the largest row all that are wider. "default" stands for every
kind that is not listed: nobody has measured there.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax

FILE = pathlib.Path(__file__).with_name("tiles.json")


class Tile(NamedTuple):
    """Queries and keys of one tile; what a GPU's compiler is told beside it."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tile of every kernel; a TPU's tables go with `d_queries`. xla's backward pass is one loop
    over tiles, of `d_tables` where there are tables and of `d_queries` where not.

    d_queries makes the gradient of the queries, d_keys those of keys and values, d_tables those of
    the bias tables (a kernel of its own on GPUs).
    """

    forward: Tile
    d_queries: Tile
    d_keys: Tile
    d_tables: Tile

    @classmethod
    def of(cls, found: dict[str, Any]) -> "Tiles":
        """From a row of the file."""
        return cls(**{field.name: Tile(*found[field.name]) for field in dataclasses.fields(cls)})

    @classmethod
    def same(cls, tile: tuple[int, ...]) -> "Tiles":
        """One tile for all kernels."""
        return cls(**{field.name: Tile(*tile) for field in dataclasses.fields(cls)})


KERNELS = tuple(field.name for field in dataclasses.fields(Tiles))


def best(implementation: str, width: int, kind: str | None = None) -> Tiles:
    """The row for heads `width` wide on a kind of device; None = the one compiled for."""
    kinds = table()[implementation]
    rows = kinds.get(device_kind() if kind is None else kind, kinds["default"])
    serves = [int(w) for w in rows if int(w) >= width]
    return Tiles.of(rows[str(min(serves) if serves else max(int(w) for w in rows))])


@functools.cache
def table() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def device_kind() -> str:
    """Of the mesh that is set (a plan for a device that is not there), else of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind
