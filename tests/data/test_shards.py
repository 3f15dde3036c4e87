"""shards: a log in shards is the log; some of its shards are a log of their users."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from rankjax.data import check, counters, describe, event_log, loader, samples, shards, split
from tests import tiny
from tests.data.own import scenarios


@pytest.fixture(scope="module", params=[True, False], ids=["times", "order"])
def logs(request, tmp_path_factory):
    """(the log as one, the same in three shards)."""
    folder = tmp_path_factory.mktemp("logs")
    whole = tiny.log(folder / "whole", time_exact=request.param)
    return whole, split.split(whole, folder / "shards", 3)


def same_columns(one: event_log.EventLog, other: event_log.EventLog) -> None:
    np.testing.assert_array_equal(one.event_start, other.event_start)
    for file in event_log.FILES:
        assert list(one.columns[file]) == list(other.columns[file])
        for name, x in one.columns[file].items():
            np.testing.assert_array_equal(np.asarray(other.column(file, name)), x)
            assert other.column(file, name).dtype == x.dtype


def test_all_shards_are_the_log(logs):
    one, other = (event_log.EventLog.open(folder, verify=True) for folder in logs)
    same_columns(one, other)
    assert (one.schema, one.fingerprint, one.info) == (other.schema, other.fingerprint, other.info)
    assert [one.rows(f) for f in event_log.FILES] == [other.rows(f) for f in event_log.FILES]


def test_some_shards_are_a_log_of_their_users(logs):
    one = event_log.EventLog.open(logs[0])
    starts = (*shards.starts(one.rows("users"), 3), one.rows("users"))
    for chosen in ((0, 2), (1,)):
        some = event_log.EventLog.open(logs[1], shards=chosen)
        users = np.concatenate([np.arange(starts[k], starts[k + 1]) for k in chosen])
        for file in ("events", "impressions"):
            rows = np.flatnonzero(np.isin(one.column(file, "user"), users))
            assert some.rows(file) == len(rows) > 0
            for name, x in one.columns[file].items():
                np.testing.assert_array_equal(np.asarray(some.column(file, name)), x[rows])
        counts = np.diff(one.event_start) * np.isin(np.arange(one.rows("users")), users)
        np.testing.assert_array_equal(np.diff(some.event_start), counts)
        assert some.fingerprint == {**one.fingerprint, "shards": f"{list(chosen)} of 3"}


def test_shards_that_are_not_read_may_be_elsewhere(logs, tmp_path):
    copy = shutil.copytree(logs[1], tmp_path / "log")
    shutil.rmtree(copy / "00001")
    assert event_log.EventLog.open(copy, verify=True, shards=(2, 0)).rows("events") > 0
    with pytest.raises(ValueError, match=r"00001.events\.arrow: found no such file"):
        event_log.EventLog.open(copy)


@pytest.mark.parametrize("organisation", samples.ORGANISATIONS)
def test_the_loader_gives_the_same_batches(logs, organisation):
    config = samples.SampleConfig(organisation=organisation, history=7, max_candidates=3)
    opened = [event_log.EventLog.open(folder) for folder in logs]
    of = [
        loader.Batches(log, samples.build(log, config, "train"), batch_samples=8, shares=2)
        for log in opened
    ]
    assert len(of[0]) == len(of[1]) > 2
    for step in range(len(of[0])):
        jax.tree.map(np.testing.assert_array_equal, of[0][step], of[1][step])


def test_a_subset_is_read_as_its_own_log_would_be(logs, tmp_path):
    """Opened in place, or written out as one: the same samples and batches."""
    alone = split.split(logs[1], tmp_path / "alone", None, only=(0, 2))
    of = []
    for log in (
        event_log.EventLog.open(logs[1], shards=(0, 2)),
        event_log.EventLog.open(alone, verify=True),
    ):
        config = samples.SampleConfig(organisation="request", history=7)
        of.append(loader.Batches(log, samples.build(log, config, "train"), batch_samples=8))
        assert log.fingerprint["shards"] == "[0, 2] of 3"
    two = split.split(alone, tmp_path / "two", 2)
    log = event_log.EventLog.open(two, shards=(1, 1))
    assert log.fingerprint["shards"] == "[1] of 2 of [0, 2] of 3"
    for step in range(len(of[0])):
        jax.tree.map(np.testing.assert_array_equal, of[0][step], of[1][step])


def test_put_together_again_it_has_the_same_bytes(logs, tmp_path):
    again = split.split(logs[1], tmp_path / "again", None)
    assert split.split(logs[1], again, None) == again  # twice does nothing
    for path in logs[0].iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_counters_and_description_are_the_same(logs, tmp_path):
    one, other = (event_log.EventLog.open(folder) for folder in logs)
    assert describe.describe(one) | {"name": ""} == describe.describe(other) | {"name": ""}
    found = [str(check.check(log)).replace(str(log.folder), "log") for log in (one, other)]
    assert found[0] == found[1]
    if one.schema.time_exact:
        counted = [
            counters.add(folder, tmp_path / f"{k}", shards=k or None)
            for k, folder in zip((0, 2), logs)
        ]
        same_columns(*map(event_log.EventLog.open, counted))


def test_starts():
    assert shards.starts(9, None) is None
    assert shards.starts(9, 1) == (0,)
    assert shards.starts(9, 3) == (0, 3, 6)  # users 0 (missing) to 2, 3 to 5, 6 to 8
    assert shards.starts(9, 8) == (0, 2, 3, 4, 5, 6, 7, 8)
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=rf"shards: found {wrong}, expected 1 \.\. 8"):
            shards.starts(9, wrong)
    shards.check(None)
    with pytest.raises(ValueError, match="shards: found 0, expected 1 or more"):
        shards.check(0)


def test_refused(logs):
    with pytest.raises(ValueError, match=r"found 3 shards, 0 \.\. 2, expected \[3\]"):
        event_log.EventLog.open(logs[1], shards=(3,))
    with pytest.raises(ValueError, match="found a log that is not in shards"):
        event_log.EventLog.open(logs[0], shards=(0,))
    log = event_log.EventLog.open(logs[0])
    for folder, count, have in ((logs[1], 2, 3), (logs[1], None, 3), (logs[0], 3, "no")):
        with pytest.raises(ValueError, match=f"found this log in {have} shards"):
            event_log.is_prepared(folder, log.fingerprint, count)


def test_a_writer_of_shards_checks_the_whole_order(tmp_path):
    found, files = tiny.columns()
    early = {name: x[::-1] for name, x in files["impressions"].items()}
    writer = event_log.LogWriter(tmp_path / "log", found, {}, (0, 4))
    with pytest.raises(ValueError, match="expected rows sorted by time, then request"):
        writer.append("impressions", early)
    assert list(tmp_path.iterdir()) == []


def test_a_user_that_is_not_there(tmp_path):
    found, files = tiny.columns()
    files["events"] = {**files["events"], "user": files["events"]["user"] + np.int32(100)}
    wide = dataclasses.replace(
        found, tables=tuple(dataclasses.replace(t, rows=t.rows + 200) for t in found.tables)
    )
    with (
        event_log.LogWriter(tmp_path / "log", wide, {}, (0, 4)) as writer,
        pytest.raises(ValueError, match=r"00001.events\.arrow.*expected 1 \.\. 8"),
    ):
        for file, arrays in files.items():
            writer.append(file, arrays)
        writer.finish()


@pytest.mark.parametrize("name", ["requests", "gap", "lists", "clicks"])
def test_an_import_into_shards(name, tmp_path):
    """With counters and without, with negatives, in order of time and of clocks."""
    config, files = scenarios.config(name), scenarios.split_off(scenarios.world())
    one = scenarios.run(tmp_path / "one", config, files)
    other = scenarios.run(tmp_path / "other", config, files, shards=3)
    assert (other.folder / "00002").is_dir()
    same_columns(one, other)
    assert (one.schema, one.fingerprint, one.info) == (other.schema, other.fingerprint, other.info)
    whole = split.split(one.folder, tmp_path / "split", 3)
    for path in (p for p in whole.rglob("*") if p.is_file()):
        same = other.folder / path.relative_to(whole)
        assert path.read_bytes() == same.read_bytes(), path
