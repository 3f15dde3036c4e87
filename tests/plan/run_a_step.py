"""Runs one training step of a plan on this CPU: `python -m tests.plan.run_a_step '{JSON}'`.

Prints JSON: the plan's bill, and what the step then took: the FLOPs of what was run, and the bytes
by which the process grew at most, from before the state was made.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from rankjax import catalogue, sharding, step
from rankjax.plan import bill, compiled, targets
from rankjax.scaling import presets

asked = json.loads(sys.argv[1])


def resident(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) * 1024


def ones(x: jax.ShapeDtypeStruct) -> jax.Array:
    """Made where it lies, so that no device holds more than its part."""
    part = lambda where: np.ones(
        [len(range(*s.indices(n))) for s, n in zip(where, x.shape)], x.dtype
    )
    where = x.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.make_array_from_callback(x.shape, where, part)


def main() -> None:
    schema = catalogue.world_schema()
    model = presets.model(asked["model"], len(schema.tasks), **asked["sizes"])
    shape = asked["rows"], asked["history"], asked["candidates"]
    names = ("rows", "history", "candidates")
    mesh = sharding.MeshConfig(strategy=asked["strategy"])
    ask = bill.Ask(model=model, schema=schema, mesh=mesh, **dict(zip(names, shape)))
    target = targets.find(f"cpu:{asked['devices']}")
    found = bill.make(ask, target)

    place = sharding.placement(mesh, target.devices) if asked["devices"] > 1 else None
    shapes = compiled.batch(schema, *shape)
    state, batch = compiled.arguments(model, ask.training, shapes, place)
    rates, key = step.rates_of(ask.training, 1)(0), jax.random.key(0)
    if place is not None:
        rates, key = jax.device_put((rates, key), place.whole)
    program = step.program(model, schema, ask.training, place)
    run = program.step.lower(state, batch, rates, key).compile()
    flops = run.cost_analysis()["flops"]
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    # Ones: every id and every event is there.
    state, batch = jax.tree.map(ones, (state, batch))
    jax.block_until_ready(run(state, batch, rates, key))
    grown = resident("VmHWM") - before
    print(json.dumps({"bill": found, "flops": flops, "bytes": grown}))


if __name__ == "__main__":
    main()
