"""commands: one JSON object, on disk and on stdout, and a table for people."""

import io
import json

import pytest
import rich.console
import tyro

from rankjax.bench import commands, rounds, steps, tables
from tests import tiny

ONCE = rounds.Rounds(rounds=1, repeats=1)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tables, "IDS", (16, 5))


def test_embedding_writes_json(small, tmp_path, capsys):
    out = tmp_path / "deep" / "bench.json"
    commands.measure_embedding(rows=(100, 200), width=4, config=ONCE, out=out, json=True)
    printed, written = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert printed == written and {"machine", "embedding"} == set(written)


def test_show_has_a_row_per_figure():
    out = io.StringIO()
    found = {"a": {"b": {"min": 1.0, "median": 2.0, "max": 3.5, "n": 3}, "c": "[x]"}}
    commands.show(found, rich.console.Console(file=out, width=120))
    line = next(line for line in out.getvalue().splitlines() if "a / b" in line)
    assert "2" in line and "3.5" in line and "[x]" in out.getvalue()


def test_the_command_line_reaches_every_field(small, capsys):
    arguments = ["embedding", "--rows", "100", "200", "--rounds", "1", "--repeats", "1", "--json"]
    tyro.extras.subcommand_cli_from_dict(commands.COMMANDS, args=arguments)
    found = json.loads(capsys.readouterr().out)
    assert found["embedding"]["zipf"]["seconds"]["200"]["n"] == 1


def test_all_compares_the_loader_with_hstu(small, tmp_path, monkeypatch):
    asked = []

    def run(log, models, config, *, organisation, history, batch):
        asked.append((organisation, sorted(models), history, batch))
        return {"models": {"hstu": {"impressions_per_second": 2.0}}}

    monkeypatch.setattr(steps, "run", run)  # test_steps runs it; compiling it all takes minutes
    log = tiny.log(tmp_path / "log")
    sizes = {"history": 8, "batch": 12, "rows": (100, 200), "impressions": 10_000}
    found = commands.measure_all(log, **sizes, config=ONCE)
    assert found["world"]["impressions"] >= 10_000
    names = ["dcnv2_din", "dlrm_mlp", "hstu", "rankmixer"]
    assert asked == [(organisation, names, 8, 12) for organisation in ("request", "impression")]
    loaded = found["loader"]["rankjax"]["stream"]["impressions_per_second"]["median"]
    assert found["loader_over_hstu"] == loaded / 2
