"""A kernel on a mesh: every device takes its own rows, and its own heads where they are split.

The compiler cannot cut a kernel written by hand, nor a loop over tiles that rows share; here they
run inside of a `shard_map`. The mesh is that of the context (`sharding.on`); without one, or on one
device, the kernel is called as it is.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from rankjax import sharding


def run(function: Callable[..., jax.Array], args: tuple, axes: tuple[str, ...], out: str) -> Any:
    """function(*args), its rows and heads split as the mesh splits them.

    Args:
      args: pytrees of arrays.
      axes: of every argument a letter for each axis of its arrays: "r" rows, "h" heads, "." any
        other; "" for arrays that every device has whole. An axis of size 1 is broadcast, and whole.
      out: the same of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*args)
    sizes = {letter: _size(args, axes, letter) for letter in "rh"}
    split = {
        letter: _axes(mesh, names, sizes[letter])
        for letter, names in (("r", sharding.BATCH), ("h", ("model",)))
    }

    def spec(letters: str, shape: tuple[int, ...] | None = None) -> PartitionSpec:
        parts = [split.get(letter) for letter in letters]
        if shape is not None:
            parts = [part if size > 1 else None for part, size in zip(parts, shape)]
        return PartitionSpec(*parts)

    in_specs = tuple(
        jax.tree.map(lambda x, letters=letters: spec(letters, x.shape), arg)
        for arg, letters in zip(args, axes, strict=True)
    )
    mapped = jax.shard_map(function, in_specs=in_specs, out_specs=spec(out), check_vma=False)
    return mapped(*args)


def _size(args: tuple, axes: tuple[str, ...], letter: str) -> int:
    """The largest, as those of size 1 are broadcast."""
    found = [
        x.shape[letters.index(letter)]
        for arg, letters in zip(args, axes)
        if letter in letters
        for x in jax.tree.leaves(arg)
    ]
    return max(found, default=1)


def _axes(mesh: Any, names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """The axes of the mesh that split `size` evenly; None = whole."""
    found = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
    parts = math.prod(mesh.shape[name] for name in found)
    return found if found and size % parts == 0 else None
