"""`rankjax plan`: what it prints, and a pod's step compiled with no pod."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from rankjax import catalogue, cli
from rankjax.plan import commands, compiled

ROOT = pathlib.Path(__file__).parents[2]
MIXER = ("--model", "rankmixer", "--target")
SMALL = ("--rows", "8", "--history", "10", "--candidates", "4")


def run(capsys, *argv):
    try:
        cli.main(["plan", *map(str, argv)])
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    out = capsys.readouterr()
    return status, out.out, out.err


def apart(*argv):
    """In a process of its own, as libtpu reads its environment once."""
    return subprocess.run(
        [sys.executable, "-c", f"from rankjax import cli; cli.main({['plan', *map(str, argv)]!r})"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_plan_as_json_and_as_text(capsys):
    argv = ("--model", "dlrm_mlp", "--target", "cpu:1", *SMALL)
    status, out, _ = run(capsys, *argv, "--json")
    found = json.loads(out)
    assert status == 0 and found["target"] == "cpu:1" and found["rows"] == 8
    assert found["held_bytes"]["tables"] > 0 and found["flops"] > 0 and found["advice"] == []
    status, out, _ = run(capsys, *argv)
    assert status == 0 and "held_bytes: tables" in out and "MiB" in out


@pytest.mark.slow
def test_a_sweep_as_json_and_as_a_figure(capsys, tmp_path):
    argv = ("--model", "dlrm_mlp", "--target", "cpu:2", *SMALL, "--sweep", "--json")
    status, out, err = run(capsys, *argv, "--html", tmp_path / "sweep.html")
    found = json.loads(out)
    assert status == 0 and all(row["fits"] for row in found) and "remat none" in err
    assert {row["strategy"] for row in found} == {"data", "fsdp", "tensor", "fsdp_tensor"}
    assert (tmp_path / "sweep.html").stat().st_size > 1e6


def test_tables_of_any_size_cost_no_memory_here(capsys):
    """Two thousand million rows: shapes only."""
    argv = ("--model", "dlrm_mlp", "--target", "cpu:2", *SMALL, "--json")
    rows = [2_000_000_000] * 5
    status, out, err = run(capsys, *argv, "--table-rows", *rows, "--embedding-width", 64)
    assert status == 0, err
    held = json.loads(out)["held_bytes"]["tables"]
    assert held == pytest.approx(5 * 1e9 * (64 + 2) * 4, rel=0.01)


@pytest.mark.parametrize(
    "argv, match",
    [
        (("--model", "rankmixr", "--target", "cpu:1"), "near it: rankmixer"),
        ((*MIXER, "v9:1"), "kinds: v4, v5e, v5p, v6e, h200, cpu"),
        ((*MIXER, "cpu:4", "--rows", 6), "as 8"),
        ((*MIXER, "cpu:4", "--mesh.data", 3), "4 devices, expected"),
        ((*MIXER, "cpu:1", "--mesh.model", 2), "1 devices, expected"),
        ((*MIXER, "cpu:2", "--rows", 0), "found rows 0, expected >= 1"),
        ((*MIXER, "cpu:2", "--history", 0), "found history 0, expected >= 1"),
        ((*MIXER, "cpu:2", "--candidates", -1), "found candidates -1, expected >= 1"),
        ((*MIXER, "cpu:2", "--embedding-width", 0), "width=0, expected >= 1"),
        ((*MIXER, "cpu:2", "--table-rows", -5), "rows=-5, expected 2 .."),
        ((*MIXER, "cpu:2", "--table-rows", *[9] * 99), "rows for 99 tables"),
        ((*MIXER, "cpu:2", "--price", -1), "found price -1.0, expected >= 0"),
        ((*MIXER, "cpu:2", "--sweep", "--sweep-rows", 0), "found rows 0, expected >= 1"),
        ((*MIXER, "cpu:2", "--sweep", "--sweep-rows", 8, 9), "9 rows on the 2 devices"),
        ((*MIXER, "cpu:2", "--html", "x.html"), "found --html x.html without --sweep"),
        ((*MIXER, "cpu:2", "--sweep-rows", 8, 16), "found --sweep-rows 8 16 without --sweep"),
        ((*MIXER, "cpu:2", "--sweep", "--mesh.model", 2), "found --mesh or --compute.remat with"),
        ((*MIXER, "cpu:2", "--sweep", "--compute.remat", "full"), "expected neither"),
        ((*MIXER, "h200:9"), "expected h200:1 to h200:8"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(capsys, monkeypatch, argv, match):
    monkeypatch.setattr(compiled, "lowered", None)  # said before anything is compiled
    status, _, err = run(capsys, *argv)
    assert status == 2 and match in err and len(err.splitlines()) == 1


def test_what_is_not_installed_is_said_in_a_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    status, _, err = run(capsys, *MIXER, "v5e:2x2")
    assert status == 2 and "pip install 'jax[tpu]'" in err and len(err.splitlines()) == 1


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="the CUDA plugin is here"
)
def test_a_plugin_that_is_not_installed_is_said_in_a_line(capsys):
    status, _, err = run(capsys, *MIXER, "h200:8")
    assert status == 2 and "pip install 'jax[cuda12]'" in err and len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_slice_that_there_is_not_is_said_in_a_line():
    done = apart(*MIXER, "v5e:3x3")
    assert done.returncode == 2 and "libtpu knows no such slice" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("rankjax: plan: v5e:3x3")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_slice_of_tpus_with_none_at_hand():
    argv = ("--target", "v5e:2x2", *SMALL, "--price", "1.2", "--json")
    done = apart("--model", "hstu", *argv)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 4 and 0 < found["memory_share"] < 1
    assert found["collectives"]["all-to-all"] > 0 and found["limit"] in found["seconds_at_peaks"]
    assert found["cost_of_a_billion_requests_at_peaks"] > 0
    assert found["seconds_by_compiler"] >= found["seconds_at_peaks"]["memory"] > 0


def test_sized_changes_the_largest_tables_and_nothing_else():
    schema = catalogue.world_schema()
    assert commands.sized(schema, ()) == schema
    found = commands.sized(schema, (9000, 8000))
    rows = {t.name: t.rows for t in schema.tables}
    assert {t.name: t.rows for t in found.tables} == rows | {"item": 9000, "user": 8000}
    assert found.features == schema.features
    with pytest.raises(ValueError, match="rows for 99 tables, expected at most"):
        commands.sized(schema, (2,) * 99)
