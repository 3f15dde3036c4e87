"""The bill of a step: what a CPU then takes, what devices hold, and what is advised."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from rankjax import catalogue, embedding, sharding, step
from rankjax.layers import stack
from rankjax.plan import bill, targets
from rankjax.scaling import presets

ROOT = pathlib.Path(__file__).parents[2]
SCHEMA = catalogue.world_schema()
MODEL = presets.model("rankmixer", len(SCHEMA.tasks), width=16, layers=2)
ASK = bill.Ask(model=MODEL, schema=SCHEMA, rows=16, history=10, candidates=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, sizes, rows, history, devices, strategy",
    [
        ("rankmixer", {"width": 64}, 1024, 50, 1, "data"),
        ("hstu", {}, 1024, 200, 1, "data"),
        ("rankmixer", {"width": 64}, 1024, 50, 2, "fsdp"),
    ],
)
def test_a_plan_for_this_cpu_is_what_the_cpu_takes(model, sizes, rows, history, devices, strategy):
    """FLOPs exactly, memory within 15%: of what arrays took, not shapes."""
    asked = {"model": model, "rows": rows, "history": history, "candidates": 16}
    asked |= {"sizes": {**sizes, "history": history}, "devices": devices, "strategy": strategy}
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.plan.run_a_step", json.dumps(asked)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["flops"] == found["bill"]["flops"] > 0
    assert found["bytes"] == pytest.approx(devices * found["bill"]["memory_bytes"], rel=0.15)
    assert found["bytes"] > 2**28  # far more than what a process takes anyway


def test_a_device_holds_its_part():
    one, four = (
        bill.make(dataclasses.replace(ASK, mesh=mesh), targets.find(name))
        for name, mesh in (
            ("cpu:1", sharding.MeshConfig()),
            ("cpu:4", sharding.MeshConfig(strategy="fsdp")),
        )
    )
    assert four["devices"] == 4 and four["mesh"] == {"replica": 1, "data": 4, "model": 1}
    a, b = one["held_bytes"], four["held_bytes"]
    assert a["tables"] / 4 <= b["tables"] < a["tables"] / 4 + 4 * 1000
    assert b["batch"] * 4 == a["batch"]
    assert a["parameters"] / 4 < b["parameters"] < a["parameters"] / 2
    assert b["optimizer"] == pytest.approx(2 * b["parameters"], rel=0.01)
    assert set(four["collectives"]) >= {"all-gather", "all-to-all"} and not one["collectives"]
    assert sum(a.values()) <= one["memory_bytes"]


def test_rows_that_devices_cannot_share():
    with pytest.raises(ValueError, match="18 rows on the 4 devices of cpu:4, expected a multiple"):
        bill.make(dataclasses.replace(ASK, rows=18), targets.find("cpu:4"))


class Refused:
    """As a TPU's compiler refuses a step that its memory cannot hold."""

    def __init__(self, said):
        self.said = said

    def compile(self):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.said}\nmore lines")


@pytest.mark.parametrize(
    "said",
    [
        "Ran out of memory on HBM, the total memory required for HLO temporaries (97.50G) exceeds "
        "available HBM (15.75G).",
        "Ran out of memory in memory space hbm. Used 97.50G of 15.75G hbm.",
    ],
)
def test_a_step_that_the_compiler_refuses_says_what_it_would_take(said):
    """The compiler's sum holds what a device holds between steps too."""
    found = bill._compiled(Refused(said))
    assert found["refused"] == f"RESOURCE_EXHAUSTED: {said}"
    memory = bill._memory(found, {"tables": 90 * GIB, "parameters": GIB})
    assert memory == {"temporary_bytes": 6.5 * GIB, "memory_bytes": 97.5 * GIB}
    work = bill._work(found, ASK, 1)
    assert work.keys() == {"flops_counted", "compiler"}
    made = {**PLANNED, **work, **memory}
    assert bill._time(made, 0.0, ASK, TARGET) == {"memory_share": 97.5 / 16}


class Broken:
    """As a compiler refuses a kernel that it cannot lower."""

    def compile(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile\nmore\nlines")


def test_another_refusal_is_one_line():
    with pytest.raises(ValueError, match=r"refuses the step: INTERNAL: Mosaic failed to compile$"):
        bill._compiled(Broken())


@pytest.mark.parametrize(
    "change, match",
    [
        ({"rows": 0}, "found rows 0, expected >= 1"),
        ({"history": -1}, "found history -1"),
        ({"candidates": 0}, "found candidates 0"),
        ({"price": -0.1}, "found price -0.1, expected >= 0"),
        ({"price": float("nan")}, "found price nan"),
    ],
)
def test_what_nobody_can_ask_for(change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(ASK, **change)


def test_one_device_is_no_mesh_of_two():
    mesh = sharding.MeshConfig(model=2)
    with pytest.raises(ValueError, match="1 devices, expected replica 1 x data -1 x model 2"):
        bill.make(dataclasses.replace(ASK, mesh=mesh), targets.find("cpu:1"))


@pytest.mark.parametrize("model", ["rankmixer", "hstu"])
def test_rankjax_counts_too(model):
    """Within a fifth of what a CPU's compiler counts of the same step, which has more in it."""
    config = presets.model(model, len(SCHEMA.tasks), width=64, layers=2)
    ask = dataclasses.replace(ASK, model=config, history=50)
    found = bill.make(ask, targets.find("cpu:1"))
    assert found["flops_counted"] == pytest.approx(found["flops"], rel=0.2)
    none = {"flops": 0.0, "bytes": 0.0, "collectives": {}}
    eighth = bill._work(none, ask, 8)
    assert eighth == {"flops_counted": found["flops_counted"] / 8, "collectives": {}}
    made = {k: v for k, v in PLANNED.items() if k not in ("flops", "bytes")}
    times = bill._time(made | eighth, 0.0, ask, TARGET)
    assert times["seconds_at_peaks"].keys() == {"arithmetic", "network"}
    assert times["seconds_at_peaks"]["arithmetic"] == eighth["flops_counted"] / CHIP.peak


GIB = 2**30
PLAIN = presets.model("dlrm_mlp", len(SCHEMA.tasks), width=16)  # has no layers to scan
WIDE = step.TrainConfig(tables=embedding.TableConfig(width=128))
PACKED = step.TrainConfig(tables=embedding.TableConfig(width=32, pack=4))
ODD = step.TrainConfig(tables=embedding.TableConfig(width=48))
CHIP = targets.CHIPS["v5e"]
TARGET = targets.Target(name="v5e:2x2", devices=jax.devices()[:4], chip=CHIP)
HELD = {"parameters": 1, "optimizer": 2, "tables": 0.1, "table_optimizer": 0, "batch": 0}
PLANNED = {
    "devices": 4,
    "flops": 197e12,
    "flops_counted": 98e12,
    "bytes": 2 * 0.819e12,
    "collectives": {"all-reduce": 20e9},
    "held_bytes": {k: v * GIB for k, v in HELD.items()},
    "temporary_bytes": 2 * GIB,
    "memory_bytes": 6 * GIB,
}


def test_time_is_what_takes_longest():
    found = bill._time(PLANNED, 0.0, dataclasses.replace(ASK, price=1.2), TARGET)
    assert found["seconds_at_peaks"] == pytest.approx(
        {"arithmetic": 1.0, "memory": 2.0, "network": 0.1}
    )
    assert found["limit"] == "memory" and found["mfu_at_peaks"] == pytest.approx(0.5)
    assert found["requests_per_second_at_peaks"] == pytest.approx(8)
    assert found["memory_share"] == pytest.approx(6 / 16)
    more = bill._time(PLANNED | {"flops_counted": 591e12}, 0.0, ASK, TARGET)  # kernels, loops
    assert more["limit"] == "arithmetic" and more["mfu_at_peaks"] == 1
    assert more["seconds_at_peaks"]["arithmetic"] == pytest.approx(3.0)
    # 1e9 / 8 seconds, four devices.
    cost = found["cost_of_a_billion_requests_at_peaks"]
    assert cost == pytest.approx(1e9 / 8 / 3600 * 4 * 1.2)


@pytest.mark.parametrize(
    "by_compiler, said", [(2.4, True), (1.9, False), (-2.0, False), (0, False)]
)
def test_seconds_by_the_compiler_stand_there_where_it_knows_all(by_compiler, said):
    """It takes one off for each part that it does not know; arithmetic and memory take 2 s."""
    found = bill._time(PLANNED, by_compiler, ASK, TARGET)
    assert found.get("seconds_by_compiler") == (by_compiler if said else None)
    assert found["seconds_at_peaks"]["memory"] == pytest.approx(2.0)  # the bound stays


@pytest.mark.parametrize(
    "held, temporary, change, want",
    [
        ({}, 2, {}, []),
        (
            {"tables": 0.9},
            2,
            {},
            ["tables 16 wide are copied in every step"],
        ),
        ({"tables": 1}, 2, {}, ["as a TPU looks up rows of 128: --table-pack 8"]),
        ({"tables": 1}, 2, {"training": PACKED}, []),
        ({"tables": 1}, 2, {"training": ODD}, ["a width that divides it"]),
        ({"tables": 1}, 2, {"training": WIDE}, []),
        ({"tables": 14}, 2, {}, ["tables alone take 14.0 GiB: more devices (about 7)"]),
        ({"optimizer": 20}, 2, {}, ["--mesh.strategy fsdp"]),
        ({}, 20, {}, ["--compute.remat full", "fewer --rows (at least 4)"]),
        ({}, 20, {"model": PLAIN}, ["fewer --rows (at least 4)"]),
        ({}, 20, {"compute": stack.Compute(remat="full"), "rows": 4}, ["--mesh.model 2"]),
        (
            {"optimizer": 20},
            0,
            {"mesh": sharding.MeshConfig(strategy="fsdp")},
            ["more devices: everything that can be split is"],
        ),
    ],
)
def test_what_is_advised_where_a_step_does_not_fit(held, temporary, change, want):
    held = {k: v * GIB for k, v in (HELD | held).items()}
    total = sum(held.values()) + temporary * GIB
    made = PLANNED | {
        "held_bytes": held,
        "temporary_bytes": temporary * GIB,
        "memory_bytes": total,
        "fits": total <= CHIP.memory,
    }
    found = bill.advice(made, dataclasses.replace(ASK, **change), TARGET)
    assert len(found) == len(want)
    for line, part in zip(found, want):
        assert part in line


def test_what_the_compiler_refuses_gets_advice_though_the_chip_has_a_little_more():
    held = {"tables": 3 * GIB, "table_optimizer": 0, "parameters": 0, "optimizer": 0, "batch": 0}
    made = PLANNED | {"held_bytes": held, "temporary_bytes": 12.95 * GIB, "fits": False}
    found = bill.advice(made | {"memory_bytes": 15.95 * GIB}, ASK, TARGET)
    assert any("temporaries take" in line for line in found)
