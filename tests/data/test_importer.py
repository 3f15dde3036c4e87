"""The importer: whole logs against plain loops; the same bytes however the rows come; interrupted
imports go on; what does not fit is refused by file, row and column."""

import json
import os
import pathlib
import subprocess
import sys
import tomllib
import types

import numpy as np
import polars as pl
import pytest

from rankjax.data import counters, event_log, importer
from rankjax.data.own import reading, runs, schema_file
from tests.data.own import bad_rows, memory, scenarios
from tests.references import own_import


def check(log: event_log.EventLog, wanted: dict, files=event_log.FILES) -> None:
    """Every column of the log is the reference's."""
    for file in files:
        columns = wanted.get(file, {})
        found = log.columns[file]
        if columns:
            assert set(found) == set(columns), file
        else:
            assert log.rows(file) == 0
        for name, values in columns.items():
            what = f"{file}.{name}"
            if found[name].dtype == np.float32:
                np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=what)
            else:
                np.testing.assert_array_equal(found[name], np.array(values), err_msg=what)


@pytest.mark.parametrize("name", scenarios.SCHEMAS)
def test_a_log_is_what_plain_loops_make_of_the_rows(name, tmp_path):
    config, files = scenarios.config(name), scenarios.split_off(scenarios.world())
    log = scenarios.run(tmp_path, config, files)
    wanted = own_import.log(config, scenarios.used(config, files))
    sampled = "negatives" in config
    check(log, wanted, event_log.FILES[:-1] if sampled else event_log.FILES)
    assert {t: log.schema.table(t).rows for t in wanted["tables"]} == wanted["tables"]
    lost = {k: x for k, x in log.info["lost"].items() if not (sampled and k.startswith("context"))}
    assert lost == wanted["lost"]
    assert not list(tmp_path.glob(".log*"))


def crcs(log: event_log.EventLog) -> dict[str, int]:
    record = json.loads((log.folder / "log.json").read_text())
    return {file: x["crc32"] for file, x in record["files"].items()}


def check_same(one: event_log.EventLog, other: event_log.EventLog) -> None:
    """Equal schemas and columns; numbers up to the last bits of sums in another order."""
    assert one.schema == other.schema
    for file in event_log.FILES:
        for name, x in one.columns[file].items():
            y = other.columns[file][name]
            if x.dtype == np.float32:
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-6, err_msg=f"{file}.{name}")
            else:
                np.testing.assert_array_equal(x, y, err_msg=f"{file}.{name}")


# The first learns means of dense features, whose last bits may depend on the chunks.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["requests", "gap", "lists", "mixed_impressions", "clicks"])
def test_chunks_do_not_matter(name, tmp_path):
    config, files = scenarios.config(name), scenarios.split_off(scenarios.world())
    logs = [
        scenarios.run(tmp_path / str(chunk), config, files, chunk=chunk) for chunk in (7, 50, 10**6)
    ]
    for log in logs[1:]:
        check_same(log, logs[0])
        assert log.info == logs[0].info
        if name in ("gap", "lists"):
            assert crcs(log) == crcs(logs[0])


def test_rows_in_one_file_or_in_three_and_files_named_in_any_order(tmp_path):
    config, files = scenarios.config("several_events"), scenarios.world()
    whole = scenarios.run(tmp_path / "whole", config, files)
    parts = {}
    for name, rows in scenarios.used(config, files).items():
        stem, suffix = name.split(".")
        cuts = [0, 1, len(rows) // 2, len(rows)]
        parts |= {f"{stem}-{i}.{suffix}": rows[cuts[i] : cuts[i + 1]] for i in range(3)}
    apart = scenarios.run(tmp_path / "parts", config, parts)
    check_same(apart, whole)
    paths = [tmp_path / "parts" / "raw" / name for name in reversed(parts)]
    schema = schema_file.parse(config, "schema")
    again = importer.run(schema, paths, tmp_path / "again")
    assert (again / "log.json").read_bytes() == (apart.folder / "log.json").read_bytes()
    files = {name: len(rows) for name, rows in parts.items()}
    assert {n.split(": ")[1]: x["read"] for n, x in apart.info["rows"].items()} == files


def test_files_of_one_name_in_two_folders_are_two_files(tmp_path):
    config, files = scenarios.config("one_second"), scenarios.world()
    both = [
        *scenarios.write(tmp_path / "a", {"shown.csv": files["shown.csv"][:100]}),
        *scenarios.write(tmp_path / "b", {"shown.csv": files["shown.csv"][100:]}),
    ]
    schema = schema_file.parse(config, "schema")
    log = event_log.EventLog.open(importer.run(schema, both, tmp_path / "log"))
    check(log, own_import.log(config, {"shown.csv": files["shown.csv"]}))
    scenarios.write(tmp_path / "a", {"shown.csv": files["shown.csv"][:99]})
    with pytest.raises(ValueError, match="found a log with fingerprint"):
        importer.run(schema, both, tmp_path / "log")


def test_twice_does_nothing_and_another_log_is_refused_before_anything_is_read(
    tmp_path, monkeypatch
):
    config, files = scenarios.config("one_second"), scenarios.world()
    log = scenarios.run(tmp_path, config, files)
    before = {p: p.stat().st_mtime_ns for p in log.folder.iterdir()}
    monkeypatch.setattr(reading, "chunks", None)
    scenarios.run(tmp_path, config, files)
    assert {p: p.stat().st_mtime_ns for p in log.folder.iterdir()} == before
    for other in ({"name": "other"}, {"split": {"train": 0.7}}):
        with pytest.raises(ValueError, match=r"log\.json: found a log with fingerprint"):
            scenarios.run(tmp_path, config | other, files)
    with pytest.raises(ValueError, match=r"log\.json: found a log with fingerprint"):
        scenarios.run(tmp_path, config, files | {"shown.csv": files["shown.csv"][:-1]})
    assert not list(tmp_path.glob(".log*"))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_log_is_refused_before_the_files_are_opened(kind, tmp_path):
    out = tmp_path / "log"
    if kind == "folder":
        out.mkdir()
    (out / "notes.txt" if kind == "folder" else out).write_text("mine")
    schema = schema_file.parse(scenarios.config("one_second"), "schema")
    with pytest.raises(ValueError, match="log: found something that is no log, expected none"):
        importer.run(schema, [tmp_path / "shown.csv"], out)
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["mine"]


def test_features_in_another_order_are_another_log(tmp_path):
    config, files = scenarios.config("several_events"), scenarios.world()
    config["events"][0]["features"] = dict(reversed(config["events"][0]["features"].items()))
    scenarios.run(tmp_path, scenarios.config("several_events"), files)
    with pytest.raises(ValueError, match="found a log with fingerprint"):
        scenarios.run(tmp_path, config, files)


class Killed(BaseException):
    """What a killed process does not catch."""


def dying(monkeypatch, owner: object, name: str, after: int) -> list:
    """`owner.name` works `after` times, then the process dies; returns the first arguments of the
    calls that worked, but of methods the second."""
    real, calls = getattr(owner, name), []

    def call(*args, **options):
        if len(calls) >= after:
            raise Killed
        result = real(*args, **options)
        calls.append(args[isinstance(owner, type)])
        return result

    monkeypatch.setattr(owner, name, call)
    return calls


def names(paths: list[pathlib.Path], *starts: str) -> list[str]:
    return [p.name for p in paths if p.name.startswith(starts)]


COUNTED = "\n[counters]\nwindows = [3600]\ndelay = 60\n"


def counted_config(name: str) -> dict:
    return scenarios.config(name) | tomllib.loads(COUNTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["requests", "clicks"])
def test_an_import_killed_in_any_stage_goes_on_and_writes_the_same(name, tmp_path, monkeypatch):
    config, files = counted_config(name), scenarios.world()
    with monkeypatch.context() as patched:
        every = dying(patched, runs, "write", 10**6)
        whole = scenarios.run(tmp_path / "whole", config, files, chunk=60)
    kept = names(every, "read.", "past.", "click.", "shown.")
    assert len(set(kept)) == len(kept) > 15
    kills = [(runs, "write", n) for n in range(0, len(every), 5)]
    kills += [(event_log.LogWriter, "append", n) for n in (0, 2, 4, 6)]
    kills += [(counters, "add", 0)]
    for number, (owner, what, after) in enumerate(kills):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patched:
            read = dying(patched, reading, "chunks", 10**6)
            first = dying(patched, runs, "write", 10**6)
            calls = dying(patched, owner, what, after)
            with pytest.raises(Killed):
                scenarios.run(folder, config, files, chunk=60)
        first = calls if owner is runs else first
        finished = read if names(first, "learned.") else read[:-1]
        with monkeypatch.context() as patched:
            second = dying(patched, runs, "write", 10**6)
            again = dying(patched, reading, "chunks", 10**6)
            log = scenarios.run(folder, config, files, chunk=60)
        # An events chunk is finished when both of its runs are written.
        both = names(first, "read.", "past.", "click.", "shown.")
        both += names(second, "read.", "past.", "click.", "shown.")
        assert sorted(set(both)) == sorted(kept) and len(both) <= len(kept) + 1
        assert not set(again) & set(finished)
        assert (log.folder / "log.json").read_bytes() == (whole.folder / "log.json").read_bytes()
        assert not list(folder.glob(".log*"))


def test_what_an_import_killed_at_its_very_end_left_is_removed(tmp_path, monkeypatch):
    config, files = scenarios.config("gap"), scenarios.world()
    with monkeypatch.context() as patched:
        patched.setattr(importer, "shutil", types.SimpleNamespace(rmtree=None))
        with pytest.raises(TypeError):
            scenarios.run(tmp_path, config, files)
    assert (tmp_path / ".log.import").exists() and (tmp_path / "log" / "log.json").exists()
    monkeypatch.setattr(reading, "chunks", None)
    scenarios.run(tmp_path, config, files)
    assert not (tmp_path / ".log.import").exists()


def test_another_schema_begins_anew(tmp_path, monkeypatch, capsys):
    config, files = scenarios.config("gap"), scenarios.world()
    with monkeypatch.context() as patched:
        dying(patched, event_log.LogWriter, "append", 0)
        with pytest.raises(Killed):
            scenarios.run(tmp_path / "log", config, files)
    config["impressions"][0]["request_gap"] = 5
    found = scenarios.run(tmp_path / "log", config, files)
    assert "begun anew" in capsys.readouterr().err
    assert crcs(found) == crcs(scenarios.run(tmp_path / "other", config, files))


def test_negatives_are_counted_and_said(tmp_path):
    config, files = scenarios.config("clicks"), scenarios.world()
    config["negatives"]["per_click"] = 12
    log = scenarios.run(tmp_path, config, files)
    clicks = sum(row["kind"] in ("view", "buy") for row in files["acts.parquet"])
    label, request = (log.column("impressions", name) for name in ("click", "request"))
    assert label.sum() == clicks == len(set(request))
    assert log.rows("impressions") == 13 * clicks - log.info["negatives_given_up"]
    assert log.info["negatives_given_up"] > 0
    (note,) = log.info["notes"]
    assert "12 sampled negatives, drawn from the clicks of the same day and span" in note
    assert log.info["negatives"]["per_click"] == 12


def test_only_a_share_of_the_users_becomes_samples(tmp_path):
    config, files = scenarios.config("clicks"), scenarios.world()
    log = scenarios.run(tmp_path / "all", config, files)
    part = scenarios.run(tmp_path / "part", config | {"users_share": 0.6}, files)
    for file in ("users", "items", "events"):
        for name, x in log.columns[file].items():
            np.testing.assert_array_equal(part.column(file, name), x)
    users = sorted({row["u"] for file in ("acts.parquet", "people.csv") for row in files[file]})
    sampled = [i + 1 for i, u in enumerate(users) if own_import.hash_64(u) < 0.6 * 2**64]
    kept = np.isin(log.column("impressions", "user"), sampled)
    assert 0 < kept.sum() < len(kept)
    clicks = lambda x: x.column("impressions", "click") == 1
    for name in ("request", "user", "time", "item"):
        wanted = log.column("impressions", name)[kept & clicks(log)]
        found = part.column("impressions", name)[clicks(part)]
        assert sorted(found) == sorted(wanted)
    assert set(part.column("impressions", "user")) <= set(sampled)
    assert any("0.6 of the users" in note for note in part.info["notes"])


@pytest.mark.parametrize("name", bad_rows.CASES)
def test_bad_rows_are_refused_by_file_row_and_column(name, tmp_path):
    case = bad_rows.CASES[name]
    paths = [tmp_path / f"{file}.parquet" for file in case.files]
    for path, rows in zip(paths, case.files.values()):
        path.write_bytes(rows) if isinstance(rows, bytes) else rows.write_parquet(path)
    with pytest.raises(ValueError, match=case.message):
        importer.run(parsed(bad_rows.SCHEMA + case.schema), paths, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def parsed(text: str) -> schema_file.ImportSchema:
    return schema_file.parse(tomllib.loads(text), "schema")


def test_a_share_of_users_that_leaves_a_span_empty_is_refused(tmp_path):
    kept, left = (
        next(u for u in range(99) if (own_import.hash_64(u) < 2**63) == x) for x in (True, False)
    )
    validation = pl.int_range(60).is_between(48, 53)
    rows = bad_rows.plain().with_columns(u=pl.when(validation).then(left).otherwise(kept))
    rows.write_parquet(tmp_path / "shown.parquet")
    schema = parsed("users_share = 0.5\n" + bad_rows.SCHEMA)
    with pytest.raises(ValueError, match=r"found {'train': 48, 'validation': 0, 'test': 6} rows"):
        importer.run(schema, [tmp_path / "shown.parquet"], tmp_path / "log")


def cut_short(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def unquoted(path: pathlib.Path) -> None:
    lines = path.read_text().splitlines()
    lines[12] = lines[12].replace("a", "a,b", 1)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("suffix", "spoil", "message"),
    [
        ("parquet", cut_short, r"shown\.parquet: found .*expected a whole file of rows"),
        ("csv", unquoted, r"shown\.csv: row 11 holds 8 cells, '.*,a,b', expected 7"),
    ],
)
def test_spoilt_files_are_refused(suffix, spoil, message, tmp_path):
    path = tmp_path / f"shown.{suffix}"
    rows = bad_rows.plain()
    rows.write_csv(path) if suffix == "csv" else rows.write_parquet(path)
    spoil(path)
    with pytest.raises(ValueError, match=message):
        importer.run(parsed(bad_rows.SCHEMA), [path], tmp_path / "log")


HEAD, TABLE = bad_rows.SCHEMA.split("[impressions]")
SHOWN = "[impressions]" + TABLE
EVENTS = '[events]\nfiles = "shown*"\nuser = "u"\nitem = "i"\ntime = "t"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            scenarios.INEXACT + HEAD + EVENTS + "[negatives]\n",
            r"\[negatives\] need exact times, found time_exact = false",
        ),
        (scenarios.INEXACT + HEAD + SHOWN + EVENTS + 'order = "n"\n', "do not compare"),
        (
            scenarios.INEXACT + HEAD + SHOWN.replace('"t"', '"@row"') + EVENTS,
            "found `order`, or time = '@row', in some of them only",
        ),
        (
            HEAD + SHOWN.replace("{n =", "{time ="),
            "found two columns 'time' in impressions, expected one",
        ),
        (
            HEAD
            + SHOWN
            + "[item]\nmin_count = 9\n"
            + EVENTS
            + 'features = {n = {table = "item"}}\n',
            "feature 'n' of side 'event': found min_count = 1, expected 9",
        ),
        (
            HEAD
            + SHOWN.replace("[i", "[[i").replace("s]", "s]]")
            + SHOWN.replace("[i", "[[i").replace("s]", "s]]").replace('"log"', '"quantile"'),
            "feature 'n' of side 'context': found transform = 'quantile', expected 'log'",
        ),
    ],
)
def test_a_schema_that_contradicts_itself_is_refused_before_any_file_is_opened(
    text, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        importer.run(parsed(text), [tmp_path / "shown.parquet"], tmp_path / "log")


@pytest.mark.slow
@pytest.mark.skipif(not memory.is_measurable(), reason="/proc/self/status has no RssAnon here")
def test_memory_is_bounded_by_a_chunk(tmp_path):
    peaks = []
    for n in (500_000, 1_500_000):
        path = tmp_path / f"shown-{n}.csv"
        memory.write_rows(path, n)
        command = [sys.executable, "-c", memory.MEASURE, str(path), str(tmp_path / f"log-{n}")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < 0.7 * path.stat().st_size
    assert peaks[1] < 1.3 * peaks[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process may map")
def test_parquet_larger_than_the_memory_limit_is_imported_within_it(tmp_path):
    path, mib = tmp_path / "shown.parquet", 700
    memory.write_parquet(path, 4_000_000)
    assert path.stat().st_size > 1.4 * mib * 2**20
    # What allocators set aside for speed counts too.
    frugal = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}

    def within(what: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", memory.LIMITED, path, tmp_path / "log", what, str(mib)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | frugal)

    assert "memory" in within("read").stderr  # all of it at once does not fit
    done = within("import")
    assert done.returncode == 0, done.stderr
    assert event_log.EventLog.open(tmp_path / "log").rows("impressions") == 4_000_000


def test_what_is_at_its_default_does_not_change_the_fingerprint():
    impressions = {"files": "i.csv", "time": "t", "labels": {"click": "c"}}
    said = {"time_unit": "s", "request_gap": 0, "features": {"device": {"kind": "id"}}}

    def made_of(**more) -> dict:
        found = {"name": "x", "impressions": impressions | more}
        return importer.fingerprint(schema_file.parse(found, "schema.toml"), [], 10)

    plain = made_of(features={"device": {}})
    assert made_of(**said | {"time_zone": "UTC"})["schema"] != made_of()["schema"]
    assert made_of(time_unit="s", features={"device": {"kind": "id"}}) == plain
    assert made_of(time_unit="ms", features={"device": {}}) != plain
    assert made_of(features={"device": {}, "place": {}}) != made_of(
        features={"place": {}, "device": {}}
    )


def test_given_users_must_be_named_everywhere(tmp_path):
    found = {
        "name": "x",
        "user": {"ids": "given", "rows": 5},
        "impressions": {"files": "i.csv", "time": "t", "labels": {"click": "c"}},
    }
    schema = schema_file.parse(found, "schema.toml")
    with pytest.raises(ValueError, match="found a table without `user`, expected it in all"):
        importer.run(schema, [tmp_path / "i.csv"], tmp_path / "log")


def test_no_negative_comes_from_another_span(tmp_path):
    """Items 0 .. 4 are clicked before noon, 5 .. 9 until six, 10 .. 14 after; all on one day."""
    rng, n = np.random.default_rng(0), 600
    hour = np.sort(rng.integers(0, 24, n))
    item = rng.integers(0, 5, n) + 5 * np.digitize(hour, (12, 18))
    clicks = {"u": rng.integers(0, 200, n), "i": item, "t": 1_700_006_400 + 3600 * hour}
    pl.DataFrame(clicks).write_csv(tmp_path / "c.csv")
    found = {
        "name": "x",
        "events": {"files": "c.csv", "user": "u", "item": "i", "time": "t"},
        "negatives": {"within": "day", "per_click": 3, "exclude": "bucket"},
        "split": {"train_until": 1_700_049_599, "validation_until": 1_700_071_199},
    }
    schema = schema_file.parse(found, "schema.toml")
    log = event_log.EventLog.open(importer.run(schema, [tmp_path / "c.csv"], tmp_path / "log"))
    span, shown = log.column("impressions", "span"), log.column("impressions", "item") - 1
    assert np.bincount(span).all()
    np.testing.assert_array_equal(shown // 5, span)


def test_counters_do_not_count_what_a_request_shows_later(tmp_path):
    """Item 8 is shown and clicked 5000 seconds after its request began; request 2 comes between."""
    start, rows = 1_700_000_000, [(1, 1, 7, 0, 0), (1, 1, 8, 5000, 1), (2, 2, 8, 10, 0)]
    rows += [(3, 3, 8, 5020, 0), (4, 1, 7, 9000, 1), (5, 2, 8, 20_000, 0)]
    names = ("request", "user", "item", "t", "click")
    frame = pl.DataFrame(rows, schema=list(names), orient="row")
    frame.with_columns(pl.col("t") + start).write_csv(tmp_path / "i.csv")
    shown = {"files": "i.csv", "user": "user", "item": "item", "time": "t", "request": "request"}
    found = {
        "name": "x",
        "impressions": shown | {"labels": {"click": "click"}},
        "counters": {"windows": [86_400]},
        "split": {"train": 0.5, "validation": 0.2},
    }
    schema = schema_file.parse(found, "schema.toml")
    log = event_log.EventLog.open(importer.run(schema, [tmp_path / "i.csv"], tmp_path / "log"))
    assert log.info["request_spread"] == 5000
    request = log.column("impressions", "request")
    # At 5020 the rows of request 1 may all have been shown; at 10 none need have been.
    for name, counts in (("item_impressions_24h", (0, 2, 3)), ("item_clicks_24h", (0, 1, 1))):
        x = [log.column("impressions", name)[request == r][0] for r in (2, 3, 5)]
        np.testing.assert_array_equal(x, np.log10(1.0 + np.array(counts)).astype(np.float32))
    assert (log.column("impressions", "item_known_age")[request == 2] == 0).all()
