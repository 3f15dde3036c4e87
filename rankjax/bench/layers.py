"""What scanning and recomputing layers do to the training step: its size, compile time, memory.

Compiled from shapes alone; nothing is run.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from rankjax import plan, step
from rankjax.bench import weak
from rankjax.layers import stack
from rankjax.schema import Schema

SHAPE = weak.Shape(rows=16, candidates=8)


def run(
    make: Callable[[str, int], Any],
    names: Sequence[str],
    schema: Schema,
    *,
    layers: Sequence[int] = (2, 32),
    remat_layers: int = 8,
    shape: weak.Shape = SHAPE,
    settings: step.TrainConfig = step.TrainConfig(),  # noqa: B008 (frozen)
    on_case: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """{"models": {name: {"scanned" | "one by one": {"layers": ..., "remat": ...}}}, ...}.

    Args:
      make: (architecture, L) -> Config.
      layers: L whose steps are compared: "instructions" (StableHLO), "compile_seconds".
      remat_layers: L of the steps whose "temporary_bytes" are compared, by policy.
    """
    batch = plan.batch(schema, shape.rows, shape.history, shape.candidates)
    models: dict[str, Any] = {}
    for name in names:
        models[name] = {}
        for scan in (True, False):
            how = "scanned" if scan else "one by one"
            found: dict[str, Any] = {"layers": {}, "remat": {}}
            for L in layers:
                on_case(f"{name}, {how}, {L} layers")
                compute = stack.Compute(scan=scan)
                lowered = plan.lowered(make(name, L), settings, batch, compute=compute)
                began = time.monotonic()
                lowered.compile()
                found["layers"][L] = {
                    "instructions": lowered.as_text().count(" = "),
                    "compile_seconds": time.monotonic() - began,
                }
            for remat in stack.REMAT:
                on_case(f"{name}, {how}, {remat}")
                compute = stack.Compute(scan=scan, remat=remat)
                lowered = plan.lowered(make(name, remat_layers), settings, batch, compute=compute)
                memory = lowered.compile().memory_analysis()
                found["remat"][remat] = int(memory.temp_size_in_bytes)
            models[name][how] = found
    return {"shape": dataclasses.asdict(shape), "remat_layers": remat_layers, "models": models}
