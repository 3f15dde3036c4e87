"""`rankjax data` from raw files to a log that is described, checked and exported."""

import json

import numpy as np
import polars as pl
import pytest

from rankjax import cli
from rankjax.data import event_log


@pytest.fixture
def files(tmp_path):
    """300 requests of 20 users: three items each, one of them clicked most of the time."""
    rng = np.random.default_rng(0)
    row = np.arange(900)
    request = row // 3
    shown = pl.DataFrame(
        {
            "request_id": request,
            "user_id": [f"u{u}" for u in rng.integers(20, size=300)[request]],
            "item_id": [f"i{i}" for i in (rng.integers(40, size=300)[request] + row % 3) % 40],
            "timestamp": 1_700_000_000 + 3600 * request,
            "device": rng.choice(["phone", "desk"], 900),
            "clicked": (rng.random(900) < 0.3).astype(int),
        }
    )
    shown.write_csv(tmp_path / "impressions.csv")
    clicks = shown.filter(pl.col("clicked") == 1).select("user_id", "item_id", "timestamp")
    clicks.write_parquet(tmp_path / "events.parquet")
    return tmp_path


def run(capsys, *argv: object) -> str:
    cli.main([str(a) for a in argv])
    return capsys.readouterr().out


@pytest.fixture
def log(files, capsys):
    """The folder with a log made as the page says, a starter schema unchanged."""
    names = [files / "impressions.csv", files / "events.parquet"]
    run(capsys, "data", "schema", *names, "--out", files / "schema.toml")
    found = json.loads(
        run(
            capsys,
            *("data", "import", *names, "--schema", files / "schema.toml"),
            *("--out", files / "log", "--json"),
        )
    )
    assert found["rows"] == {
        "users": 21,
        "items": 41,
        "events": found["rows"]["events"],
        "impressions": 900,
    }
    assert found["seconds"] > 0 and found["tasks"] == ["clicked"]
    return files / "log"


def test_the_starter_is_imported_with_counters_and_without(files, log, capsys):
    opened = event_log.EventLog.open(log, verify=True)
    assert any(f.counter for f in opened.schema.features)
    run(
        capsys,
        *(
            "data",
            "import",
            files / "*.csv",
            files / "*.parquet",
            "--schema",
            files / "schema.toml",
        ),
        *("--out", files / "plain", "--no-counters"),
    )
    plain = event_log.EventLog.open(files / "plain")
    assert not any(f.counter for f in plain.schema.features)
    raw = pl.read_csv(files / "impressions.csv")
    np.testing.assert_array_equal(plain.column("impressions", "clicked"), raw["clicked"])
    np.testing.assert_array_equal(plain.column("impressions", "request"), raw["request_id"])


def test_a_starter_never_overwrites(files, log, capsys):
    before = (files / "schema.toml").read_text()
    with pytest.raises(SystemExit) as stopped:
        run(capsys, "data", "schema", files / "impressions.csv", "--out", files / "schema.toml")
    assert stopped.value.code == 2 and "it may hold your changes" in capsys.readouterr().err
    assert (files / "schema.toml").read_text() == before
    text = run(capsys, "data", "schema", files / "impressions.csv")
    assert "[impressions]" in text
    assert (
        json.loads(run(capsys, "data", "schema", files / "impressions.csv", "--json"))["schema"]
        in text
    )


def test_describe_prints_text_json_and_a_page(files, log, capsys):
    assert "Label rates" in run(capsys, "data", "describe", log)
    found = json.loads(run(capsys, "data", "describe", log, "--json", "--html", files / "log.html"))
    assert found["rows"]["impressions"] == 900
    assert (files / "log.html").read_text().startswith("<!doctype html>")


def test_check_ends_with_1_where_something_is_an_error(files, log, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(capsys, "data", "check", log)
    assert stopped.value.code == 0
    capsys.readouterr()
    shown = pl.read_csv(files / "impressions.csv")
    shown.with_columns(paid=pl.col("clicked") * 3 + 1).write_csv(files / "leaky.csv")
    schema = (files / "schema.toml").read_text().replace('"impressions.csv"', '"leaky.csv"')
    schema = schema.replace("[impressions.features]", '[impressions.features]\npaid = "paid"')
    (files / "leaky.toml").write_text(schema)
    names = [files / "leaky.csv", files / "events.parquet"]
    run(
        capsys,
        *("data", "import", *names, "--schema", files / "leaky.toml", "--out", files / "leaky"),
    )
    with pytest.raises(SystemExit) as stopped:
        run(capsys, "data", "check", files / "leaky", "--json")
    assert stopped.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert [f["kind"] for f in found if "paid" in f["where"]] == ["feature_predicts_label"]


def test_counters_and_export(files, log, capsys):
    run(
        capsys,
        *(
            "data",
            "import",
            files / "*.csv",
            files / "*.parquet",
            "--schema",
            files / "schema.toml",
        ),
        *("--out", files / "plain", "--no-counters"),
    )
    run(capsys, "data", "counters", files / "plain", files / "hourly", "--windows", "3600")
    hourly = event_log.EventLog.open(files / "hourly")
    windows = {f.name.rsplit("_", 1)[1] for f in hourly.schema.features if "_rate_" in f.name}
    assert windows == {"1h"}
    found = json.loads(
        run(
            capsys,
            "data",
            "export",
            files / "plain",
            files / "again",
            "--format",
            "parquet",
            "--json",
        )
    )
    names = sorted((files / "again").glob("*.parquet"))
    run(capsys, "data", "import", *names, "--schema", found["schema"], "--out", files / "back")
    plain, back = (event_log.EventLog.open(files / name) for name in ("plain", "back"))
    assert back.schema == plain.schema
    for file in event_log.FILES:
        for name, x in plain.columns[file].items():
            np.testing.assert_array_equal(back.column(file, name), x)


def test_files_that_are_not_there(files, log, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(
            capsys,
            *("data", "import", files / "nothing*.csv", "--schema", files / "schema.toml"),
            *("--out", files / "other"),
        )
    assert stopped.value.code == 2 and "nothing*.csv: found no such file" in capsys.readouterr().err
