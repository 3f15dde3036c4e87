"""Lowers programs for an NVIDIA GPU with none at hand, down to Triton's own representation."""

import collections
import re
from typing import Any

import jax

# What the custom call that carries Triton code is called; its operands hold one letter a byte.
TRITON = "__gpu$xla.gpu.triton"


def lowered(function: Any, *shapes: Any, kind: str = "NVIDIA H200") -> str:
    """StableHLO of `function` for CUDA."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types=auto, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.export.export(
            jax.jit(function),
            platforms=["cuda"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(TRITON)],
        )(*shapes).mlir_module()


def launches(text: str) -> dict[str, list[tuple[int, int, int]]]:
    """{kernel: [(grid, warps, stages)]} of the calls to Triton, the grid's sizes multiplied."""
    found = collections.defaultdict(list)
    for line in text.splitlines():
        if TRITON in line:
            number = lambda name, line=line: int(re.search(rf"{name} = (\d+)", line).group(1))
            grid = number("grid_x") * number("grid_y") * number("grid_z")
            name = re.search(r'name = "(\w+)"', line).group(1)
            found[name].append((grid, number("num_warps"), number("num_stages")))
    return dict(found)
