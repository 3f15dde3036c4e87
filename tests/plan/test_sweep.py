"""A sweep plans every case, tells which fit, and draws them."""

import dataclasses

import pytest

from rankjax import catalogue
from rankjax.plan import bill, sweep, targets
from rankjax.scaling import presets

SCHEMA = catalogue.world_schema()
MODEL = presets.model("dlrm_mlp", len(SCHEMA.tasks), width=16)
ASK = bill.Ask(model=MODEL, schema=SCHEMA, rows=8, history=10, candidates=4)


def test_every_strategy_with_every_mesh_that_divides_the_devices():
    found = [
        (a.mesh.strategy, a.mesh.model, a.rows)
        for a in sweep.cases(ASK, 2, (8, 16), remat=("none",))
    ]
    assert found[:2] == [("data", 1, 8), ("data", 1, 16)]
    assert ("tensor", 2, 8) in found and ("tensor", 4, 8) not in found
    assert len(found) == len(set(found)) == 2 * 4


def test_cases_that_cannot_be_planned_are_rows_too(tmp_path, capsys):
    target = targets.find("cpu:2")
    # As if it were a chip whose memory holds the smaller batch only.
    told = []
    asks = list(sweep.cases(ASK, 2, (7, 8), remat=("none",)))[:2]
    found = sweep.run(asks, target, told.append)
    assert len(told) == 2 and [row["rows"] for row in found] == [8, 7]
    assert found[0]["fits"] and "expected a multiple" in found[1]["error"]
    sweep.show(found)
    assert "expected a multiple" in " ".join(capsys.readouterr().out.split())
    sweep.figure(found, "here", tmp_path / "sweep.html")
    page = (tmp_path / "sweep.html").read_text()
    assert "memory of a device" in page and "cdn.plot.ly" not in page.split("plotly.js")[0]


def test_the_fastest_that_fits_comes_first(monkeypatch, capsys):
    chip = targets.CHIPS["v5e"]
    target = dataclasses.replace(targets.find("cpu:2"), chip=chip)

    def planned(ask, _):
        large = ask.rows > 8
        return {
            "memory_bytes": (20 if large else 2) * 2**30,
            "memory_share": 1.25 if large else 0.125,
            "fits": not large,
            "limit": "memory",
            "seconds_at_peaks": {"memory": 0.5},
            **({} if large else {"seconds_by_compiler": 0.75}),
            "cost_of_a_billion_requests_at_peaks": 3.0,
            "requests_per_second_at_peaks": 2.0 * ask.rows + (ask.mesh.strategy == "fsdp"),
        }

    monkeypatch.setattr(bill, "make", planned)
    asks = sweep.cases(ASK, 2, (8, 16), model_axes=(), remat=("none",))
    found = sweep.run(list(asks), target, lambda case: None)
    assert [(row["strategy"], row["rows"], row["fits"]) for row in found] == [
        ("fsdp", 8, True),
        ("data", 8, True),
        ("fsdp", 16, False),
        ("data", 16, False),
    ]
    assert found[0]["seconds"] == pytest.approx(0.5)
    assert found[0]["seconds_by_compiler"] == 0.75 and "seconds_by_compiler" not in found[2]
    assert found[0]["cost_of_a_billion_requests_at_peaks"] == 3.0
    sweep.show(found)
    shown = capsys.readouterr().out
    assert "by compiler" in shown and shown.count("750.00 ms") == 2
    sweep.show(found[2:])
    assert "by compiler" not in capsys.readouterr().out
