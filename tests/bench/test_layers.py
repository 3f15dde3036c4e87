"""A scanned step does not grow with its layers; recomputing saves memory in a loop."""

from rankjax import embedding, step
from rankjax.bench import layers, weak
from rankjax.layers import stack
from rankjax.models import rankmixer
from tests import tiny

SCHEMA = tiny.tiny_schema(users=10, items=20, time_exact=True, tasks=("click", "like"))


def test_a_scanned_step_does_not_grow():
    make = lambda name, L: rankmixer.Config(tokens=4, layers=L, width=8, expansion=2, tasks=2)
    settings = step.TrainConfig(tables=embedding.TableConfig(width=4))
    shape = weak.Shape(rows=8, history=6, candidates=2)
    cases = []
    found = layers.run(
        make,
        ("rankmixer",),
        SCHEMA,
        layers=(2, 4),
        remat_layers=4,
        shape=shape,
        settings=settings,
        on_case=cases.append,
    )["models"]["rankmixer"]
    size = {how: [x["instructions"] for x in of["layers"].values()] for how, of in found.items()}
    assert size["scanned"][1] <= 1.01 * size["scanned"][0]
    assert size["one by one"][1] > 1.3 * size["one by one"][0]
    memory = found["scanned"]["remat"]
    assert set(memory) == set(stack.REMAT) and memory["full"] < memory["none"]
    assert len(cases) == 2 * (2 + len(stack.REMAT))
