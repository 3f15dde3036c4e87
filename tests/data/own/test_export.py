"""A log as files: what stands in them, and that importing them gives the log back."""

import csv
import dataclasses
import tomllib

import numpy as np
import polars as pl
import pyarrow.parquet
import pytest

from rankjax import schema
from rankjax.data import event_log, importer, samples
from rankjax.data.own import export, schema_file
from rankjax.data.sources import synthetic
from rankjax.scaling import presets
from tests import tiny


def tiny_log(folder, *, change=None, info=None, **options):
    """A tiny log; `change` (schema, files) -> schema may rework both before they are written."""
    found, files = tiny.columns(**options)
    if change is not None:
        found = change(found, files)
    path = event_log.write_log(folder, found, **files, fingerprint={"tiny": 1}, **(info or {}))
    return event_log.EventLog.open(path)


def back(path, out):
    """The log that the files beside a schema.toml are imported to."""
    files = [p for p in path.parent.iterdir() if p != path]
    return event_log.EventLog.open(importer.run(schema_file.load(path), files, out), verify=True)


def assert_equal(found, log, *, but=()):
    assert found.schema == log.schema
    for file in event_log.FILES:
        assert found.columns[file].keys() == log.columns[file].keys()
        for name in log.columns[file].keys() - set(but):
            x, y = found.column(file, name), log.column(file, name)
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=f"{file}.{name}")
            assert x.tobytes() == y.tobytes()  # -0.0 is not 0.0
    assert found.event_start.tobytes() == log.event_start.tobytes()


def cells(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_csv_files_hold_the_logs_columns(tmp_path):
    log = tiny_log(tmp_path / "log")
    path = export.export(log, tmp_path / "out")
    assert path == tmp_path / "out" / "schema.toml"
    names = {"users.csv", "items.csv", "events.csv", "impressions.csv", "schema.toml"}
    assert {p.name for p in path.parent.iterdir()} == names
    for file in event_log.FILES:
        rows = cells(path.parent / f"{file}.csv")
        first = 1 if file in ("users", "items") else 0
        assert len(rows) == log.rows(file) - first
        if first:
            assert [int(row.pop("id")) for row in rows] == list(range(1, log.rows(file)))
        assert rows[0].keys() == log.columns[file].keys()
        for name, x in log.columns[file].items():
            for row, value in zip(rows, x[first:]):
                if x.ndim == 2:
                    assert [int(i) for i in row[name].split("|")] == value.tolist()
                elif x.dtype == np.float32:
                    assert np.float32(row[name]).tobytes() == value.tobytes()
                    assert row[name].lstrip("-") == str(abs(value))  # as short as NumPy's
                else:
                    assert row[name] == str(value)


def test_parquet_files_hold_lists_and_types(tmp_path):
    log = tiny_log(tmp_path / "log")
    path = export.export(log, tmp_path / "out", "parquet")
    for file in event_log.FILES:
        table = pyarrow.parquet.read_table(path.parent / f"{file}.parquet")
        for name, x in log.columns[file].items():
            first = 1 if file in ("users", "items") else 0
            assert table[name].to_pylist() == x[first:].tolist()
            if x.ndim == 1:
                assert table[name].type == str(x.dtype).replace("float32", "float")


@pytest.mark.parametrize("format", export.FORMATS)
def test_parts_are_the_file_and_come_back_as_it_does(format, tmp_path):
    log = tiny_log(tmp_path / "log")
    whole = export.export(log, tmp_path / "whole", format)
    parts = export.export(log, tmp_path / "parts", format, parts=3)
    for file in event_log.FILES:
        paths = [parts.parent / f"{file}-{k:05d}.{format}" for k in range(3)]
        read = pl.read_parquet if format == "parquet" else pl.read_csv
        assert pl.concat(map(read, paths)).equals(read(whole.parent / f"{file}.{format}"))
    one, other = (back(path, tmp_path / f"back {k}") for k, path in enumerate((whole, parts)))
    assert one.schema == other.schema
    for file in event_log.FILES:
        for name, x in one.columns[file].items():
            np.testing.assert_array_equal(other.column(file, name), x)
    with pytest.raises(ValueError, match=r"parts=0, expected 1 or more"):
        export.export(log, tmp_path / "none", parts=0)


@pytest.mark.parametrize("format", export.FORMATS)
def test_chunks_do_not_show(format, tmp_path, monkeypatch):
    log = tiny_log(tmp_path / "log")
    whole = export.export(log, tmp_path / "whole", format).parent
    monkeypatch.setattr(event_log, "CHUNK", 7)
    parts = export.export(log, tmp_path / "parts", format).parent
    for path in whole.iterdir():
        if format == "csv" or path.suffix == ".toml":
            assert (parts / path.name).read_bytes() == path.read_bytes()
        else:
            one, many = (pyarrow.parquet.read_table(x / path.name) for x in (whole, parts))
            assert one.equals(many)
    assert (
        export.export(log, tmp_path / "again", format).read_bytes()
        == (whole / "schema.toml").read_bytes()
    )


def test_what_the_schema_says(tmp_path):
    log = tiny_log(tmp_path / "log")
    found = tomllib.loads(export.export(log, tmp_path / "out").read_text())
    (shown,) = found["impressions"]
    assert found["earliest"] == min(
        *(int(log.column(file, "time").min()) for file in ("events", "impressions")),
        int(log.column("items", "birth")[1:].min()),
    )
    assert found["task"] == "click" and shown["labels"]["like"]["weight"] == "click"
    assert found["items"]["features"]["tags"] == {
        **{"column": "tags", "kind": "ids", "group": "item", "table": "tag"},
        **{"ids": "given", "rows": 12, "values": 3, "separator": "|"},
    }
    assert shown["split"] == "span" and found["split"]["test_values"] == [2]
    assert [*found["tables"]] == [t.name for t in log.schema.tables]


def vocabularies(found, files):
    """Own ids that are no rows (1 = unknown), smaller and hashed tables, one that nobody reads."""
    for side in ("users", "items"):
        name = side.removesuffix("s")
        files[side][name] = np.where(files[side][name] % 3 == 1, 1, files[side][name]).astype("i4")
    sizes = {"category": (9, True), "item": (40, False), "surface": (5, True)}
    tables = [
        dataclasses.replace(t, rows=sizes[t.name][0], hashed=sizes[t.name][1])
        if t.name in sizes
        else t
        for t in found.tables
    ]
    tables.insert(2, schema.Table(name="nobody's", rows=2))
    return dataclasses.replace(found, tables=tuple(tables), primary_task="like")


def roomy(found, files):
    """Own ids that are the rows, in tables with room for more."""
    tables = [dataclasses.replace(t, rows=t.rows + 5) for t in found.tables]
    return dataclasses.replace(found, tables=tuple(tables))


ODD = {
    "surface": 'a "b"\\',
    "tags": "t.g,|ü",
    "segment": "id",
    "dwell": "position",
    "quality": "x y",
}


def odd_names(found, files):
    """Names that TOML and CSV must quote, and names of columns that files have besides."""
    for columns in files.values():
        for name in [n for n in columns if n in ODD]:
            columns[ODD[name]] = columns.pop(name)
    features = [dataclasses.replace(f, name=ODD.get(f.name, f.name)) for f in found.features]
    return dataclasses.replace(found, features=tuple(reversed(features)))


def numbers(found, files):
    """Numbers whose bits a careless text loses."""
    x = files["events"]["dwell"]
    odd = [-0.0, 1e-45, 3.4028e38, -1.1754944e-38, 16777216, 1 / 3, 0.1]
    bits = np.random.default_rng(0).integers(0, 2**32, len(x), np.uint32).view(np.float32)
    files["events"]["dwell"] = np.where(np.isfinite(bits), bits, np.float32(0.5))
    files["events"]["dwell"][: len(odd)] = odd
    return found


def context_position(found, files):
    """A context feature with the name of a role, several ids an impression."""
    rng = np.random.default_rng(1)
    n = len(files["impressions"]["request"])
    files["impressions"]["position"] = rng.integers(0, 12, (n, 2), dtype=np.int32)
    files["impressions"]["key"] = rng.normal(size=n).astype(np.float32)
    more = (
        schema.Feature(
            name="position", side="context", group="context", kind="ids", table="tag", values=2
        ),
        schema.Feature(name="key", side="context", group="context", kind="dense"),
    )
    return dataclasses.replace(found, features=found.features + more)


def without_items(found, files):
    """Nobody says which item; nothing ever happened before; no birth."""
    files["impressions"]["item"] *= 0
    files["events"] = {name: x[:0] for name, x in files["events"].items()}
    files["events"] = {name: files["events"][name] for name in ("user", "time", "item")}
    del files["items"]["birth"]
    kept = [f for f in found.features if f.side != "event" and f.derive != "item_age"]
    return dataclasses.replace(found, features=tuple(kept))


def late(found, files):
    """Times after 1990, which need no `earliest`."""
    for file, name in (("events", "time"), ("impressions", "time"), ("items", "birth")):
        files[file][name] += 1_700_000_000 * (file != "items" or np.arange(31) > 0)
    return found


@pytest.mark.parametrize("format", export.FORMATS)
@pytest.mark.parametrize(
    "change",
    [None, vocabularies, roomy, odd_names, numbers, context_position, without_items, late],
    ids=lambda x: x.__name__ if x else "plain",
)
def test_a_log_comes_back(change, format, tmp_path):
    log = tiny_log(tmp_path / "log", change=change)
    path = export.export(log, tmp_path / "out", format)
    assert ("earliest" in path.read_text()) == (change is not late)
    assert_equal(back(path, tmp_path / "back"), log)


@pytest.mark.parametrize("format", export.FORMATS)
def test_a_log_without_exact_times_comes_back(format, tmp_path):
    """Its `order` may be counted anew: what every impression may read is the same."""
    log = tiny_log(tmp_path / "log", time_exact=False)
    once = back(export.export(log, tmp_path / "out", format), tmp_path / "back")
    assert_equal(once, log, but=("order",))
    rows = np.arange(log.rows("impressions"))
    np.testing.assert_array_equal(samples.past_events(once, rows), samples.past_events(log, rows))
    twice = back(export.export(once, tmp_path / "out 2", format), tmp_path / "back 2")
    assert_equal(twice, once)


def test_a_world_comes_back(tmp_path):
    config = presets.world("small", 3000, 0)
    log = event_log.EventLog.open(synthetic.prepare(config, tmp_path / "world", workers=1))
    assert_equal(back(export.export(log, tmp_path / "out"), tmp_path / "back"), log)


def test_what_every_report_must_show_is_kept(tmp_path):
    info = {"notes": ['Made "up".', "Twice."], "negatives": {"per_click": 4, "within": "hour"}}
    info["request_spread"] = 70  # what counters must know is not lost on the way
    log = tiny_log(tmp_path / "log", info={**info, "name": "shop", "rows": 3})
    path = export.export(log, tmp_path / "out")
    read = schema_file.load(path)
    assert read.info == info and read.name == "shop"
    found = back(path, tmp_path / "back").info
    assert {name: found[name] for name in info} == info and found["name"] == "shop"


def test_counters_are_left_out_and_said_so(tmp_path, capsys):
    def counted(found, files):
        n = len(files["impressions"]["request"])
        files["impressions"]["item_clicks_1h"] = np.ones(n, np.float32)
        more = schema.Feature(
            name="item_clicks_1h", side="context", group="item", kind="dense", counter=True
        )
        return dataclasses.replace(found, features=(*found.features, more))

    log = tiny_log(tmp_path / "log", change=counted)
    path = export.export(log, tmp_path / "out")
    assert "1 counters are not exported" in capsys.readouterr().err
    assert "item_clicks_1h" not in path.read_text()
    assert "item_clicks_1h" not in cells(path.parent / "impressions.csv")[0]
    plain = tiny_log(tmp_path / "plain")
    export.export(plain, tmp_path / "out 2")
    assert capsys.readouterr().err == ""
    assert_equal(back(path, tmp_path / "back"), plain)


def test_refusals_leave_nothing(tmp_path):
    log = tiny_log(tmp_path / "log")
    with pytest.raises(ValueError, match=r"format='json', expected one of \('csv', 'parquet'\)"):
        export.export(log, tmp_path / "out", "json")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="full: found a folder that is not empty, expected none"):
        export.export(log, full)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file: found a folder that is not empty"):
        export.export(log, tmp_path / "file")
    assert {p.name for p in tmp_path.iterdir()} == {"log", "full", "file"}
    assert [p.name for p in full.iterdir()] == ["mine.txt"]


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    log = tiny_log(tmp_path / "log")

    def full(path, frames):
        path.write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "_write", full)
    with pytest.raises(OSError, match="no space left"):
        export.export(log, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    assert export.export(tiny_log(tmp_path / "log"), tmp_path / "out").is_file()


@pytest.mark.parametrize("row", [0, 3])
def test_only_some_items_are_refused(row, tmp_path, monkeypatch):
    def change(found, files):
        files["impressions"]["item"][[row, row + 4]] = 0
        return found

    log = tiny_log(tmp_path / "log", change=change)
    items = log.column("impressions", "item")
    for chunk in (1 << 20, 2):
        monkeypatch.setattr(event_log, "CHUNK", chunk)
        message = (
            rf'impressions.arrow, column "item": row {row} holds 0 .*in {len(items) - 2} other'
        )
        with pytest.raises(ValueError, match=message):
            export.export(log, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_users_without_ids_of_their_own_are_refused(tmp_path):
    def change(found, files):
        del files["users"]["user"]
        return dataclasses.replace(found, features=found.features[1:])

    log = tiny_log(tmp_path / "log", change=change)
    message = r"log.json: found features \['segment', 'activity'\] of side 'user', expected one of"
    with pytest.raises(ValueError, match=message):
        export.export(log, tmp_path / "out")
