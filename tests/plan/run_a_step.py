"""Runs one training step of a plan on this CPU: `python -m tests.plan.run_a_step '{JSON}'`.

Prints JSON: the plan's bill, and what the step then took: the FLOPs of what was run, and the bytes
by which the process grew at most, from before the state was made.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from rankjax import catalogue, step
from rankjax.plan import bill, compiled, targets
from rankjax.scaling import presets

asked = json.loads(sys.argv[1])


def resident(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) * 1024


def main() -> None:
    schema = catalogue.world_schema()
    model = presets.model(asked["model"], len(schema.tasks), **asked["sizes"])
    shape = asked["rows"], asked["history"], asked["candidates"]
    names = ("rows", "history", "candidates")
    ask = bill.Ask(model=model, schema=schema, **dict(zip(names, shape)))
    found = bill.make(ask, targets.find("cpu:1"))

    args = model, schema, ask.training
    shapes = compiled.batch(schema, *shape)
    state, batch = compiled.arguments(model, ask.training, shapes)
    rates, key = step.rates_of(ask.training, 1)(0), jax.random.key(0)
    run = step.program(*args).step.lower(state, batch, rates, key).compile()
    flops = run.cost_analysis()["flops"]
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    # Ones: every id and every event is there.
    state, batch = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), (state, batch))
    jax.block_until_ready(run(state, batch, rates, key))
    grown = resident("VmHWM") - before
    print(json.dumps({"bill": found, "flops": flops, "bytes": grown}))


if __name__ == "__main__":
    main()
