"""Weak scaling of a tiny model on few devices: the figures are there, and flat."""

import pytest

from rankjax import embedding, step
from rankjax.bench import weak
from rankjax.models import rankmixer
from tests import tiny

SCHEMA = tiny.tiny_schema(users=1000, items=2000, time_exact=True, tasks=("click", "like"))
MODEL = rankmixer.Config(tokens=8, layers=1, width=64, tasks=2)
SETTINGS = step.TrainConfig(tables=embedding.TableConfig(width=4))


@pytest.mark.slow
def test_what_a_device_does_stays_the_same_as_devices_grow():
    shape = weak.Shape(rows=64, history=20, candidates=4)
    found = weak.run(
        {"rankmixer": MODEL},
        SCHEMA,
        strategies=("data",),
        devices=(2, 4, 8),
        shape=shape,
        settings=SETTINGS,
    )
    case = found["models"]["rankmixer"]["data"]
    assert set(case["devices"]) == {2, 4, 8}
    assert case["spread"]["flops"] < 0.05 and case["spread"]["collective_bytes"] < 0.05
    for figures in case["devices"].values():
        assert figures["flops"] > 0
        assert set(figures["collectives"]) == {"all-reduce", "all-to-all"}


def test_too_many_devices_are_refused():
    with pytest.raises(ValueError, match="8 devices, expected 16: start with XLA_FLAGS"):
        weak.run({"rankmixer": MODEL}, SCHEMA, devices=(16,))
