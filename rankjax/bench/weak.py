"""Weak scaling, from the compiled step: what one device computes and exchanges as devices grow.

The rows of a device stay the same, so that a batch grows with the devices. Compiled for simulated
CPU devices from shapes alone; nothing is run.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from rankjax import plan, sharding, step
from rankjax.layers import stack
from rankjax.schema import Schema

DEVICES = (2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a batch, or one device's part of it: rows, history slots S, candidate slots C."""

    rows: int = 32
    history: int = 50
    candidates: int = 16


def run(
    models: dict[str, Any],
    schema: Schema,
    *,
    strategies: Sequence[str] = ("data", "fsdp"),
    devices: Sequence[int] = DEVICES,
    shape: Shape = Shape(),
    settings: step.TrainConfig = step.TrainConfig(),  # noqa: B008 (frozen)
    on_case: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """{"shape", "models": {model: {strategy: {"devices": {n: figures}, "spread": {...}}}}}.

    Figures are those of `plan.figures`, the collectives' sum and the seconds to compile. spread:
    by how much of its mean, at most, what a device computes and exchanges differs between sizes.
    Raises ValueError for more devices than there are.
    """
    if max(devices) > len(jax.devices()):
        raise ValueError(
            f"bench weak: {len(jax.devices())} devices, expected {max(devices)}: start with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={max(devices)}"
        )
    found: dict[str, Any] = {}
    for name, model in models.items():
        for strategy in strategies:
            of: dict[int, Any] = {}
            for n in devices:
                on_case(f"{name}, {strategy}, {n} devices")
                config = sharding.MeshConfig(strategy=strategy)
                place = sharding.placement(config, jax.devices()[:n])
                sizes = shape.rows * n, shape.history, shape.candidates
                began = time.monotonic()
                lowered = plan.lowered(
                    model, settings, plan.batch(schema, *sizes), place, stack.PLAIN
                )
                of[n] = plan.figures(lowered.compile())
                of[n]["collective_bytes"] = sum(of[n]["collectives"].values())
                of[n]["compile_seconds"] = time.monotonic() - began
            spread = {key: _spread([x[key] for x in of.values()]) for key in SPREAD}
            found.setdefault(name, {})[strategy] = {"devices": of, "spread": spread}
    return {"shape": dataclasses.asdict(shape), "models": found}


SPREAD = ("flops", "collective_bytes")


def _spread(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return max(abs(x - mean) for x in values) / mean
