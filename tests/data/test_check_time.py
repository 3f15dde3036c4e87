"""Histories that know the future and items before their birth, against loops over rows."""

import numpy as np
import pytest

from rankjax.data import check_time, event_log, tally
from tests import tiny
from tests.data import worlds

future = check_time.event_from_the_future


def just_before(shown, happened, within):
    """For each impression: has its user an event of its item less than `within` s before it?"""
    out = []
    for user, time, item in zip(shown["user"], shown["time"], shown["item"]):
        own = (happened["user"] == user) & (happened["item"] == item)
        out.append(
            ((happened["time"][own] < time) & (happened["time"][own] >= time - within)).any()
        )
    return np.array(out)


@pytest.mark.parametrize("within", [900, 4 * 3600, 6 * 86_400])
def test_events_just_before_are_those_of_a_loop(tmp_path, monkeypatch, within):
    monkeypatch.setattr(check_time, "JUST_BEFORE", within)
    monkeypatch.setattr(event_log, "CHUNK", 17)
    found, files = tiny.columns(items=4, events=400, requests=100)
    log = worlds.written(tmp_path, found, files)
    parts = tally.chunks(log.rows("impressions"))
    got = np.concatenate([check_time._just_before(log, part) for part in parts])
    want = just_before(files["impressions"], files["events"], within)
    assert 0 < want.mean() < 0.95
    np.testing.assert_array_equal(got, want)


def with_clicks_as_events(seconds, share_of_clicks=1.0, share_of_others=0.0):
    """The world, in which shares of the impressions are events `seconds` before themselves."""
    found, files = worlds.clean()
    shown, rng = files["impressions"], np.random.default_rng(0)
    share = np.where(shown["click"], share_of_clicks, share_of_others)
    own = worlds.rows(shown, np.flatnonzero(rng.random(len(share)) < share))
    early = {name: own[name] for name in ("user", "item")}
    early |= {"time": own["time"] - seconds, "action": np.ones_like(own["item"])}
    files["events"] = worlds.in_order(worlds.joined(files["events"], early), "user", "time")
    return found, files


@pytest.mark.parametrize(
    ("seconds", "clicks", "others", "rings"),
    [
        (1, 1.0, 0.0, True),
        (60, 0.3, 0.0, True),
        (61, 1.0, 0.0, False),  # long before
        (0, 1.0, 0.0, False),  # not readable: strictly before
        (-5, 1.0, 0.0, False),  # after it
        (1, 0.15, 0.0, False),  # too few
        (1, 0.5, 0.2, False),  # others are repeated as well
        (1, 0.9, 0.1, True),
    ],
)
def test_the_click_in_its_own_history(tmp_path, seconds, clicks, others, rings):
    found, files = with_clicks_as_events(seconds, clicks, others)
    told = future(worlds.written(tmp_path, found, files))
    assert [x.severity for x in told] == ["error"] * rings
    if rings:
        before = just_before(
            worlds.rows(files["impressions"], np.arange(2000)), files["events"], 60
        )
        clicked = files["impressions"]["click"][:2000] == 1
        share = float(told[0].evidence.split("(")[1].split("%")[0])
        assert share == pytest.approx(100 * before[clicked].mean(), abs=5)
        assert "positives of 'click'" in told[0].evidence and "negatives (" in told[0].evidence


def test_the_click_in_its_own_history_of_order(tmp_path):
    found, files = with_clicks_as_events(1)
    told = future(worlds.written(tmp_path, worlds.without_times(found, files), files))
    assert [x.severity for x in told] == ["warning"]
    assert told[0].where == 'events.arrow, column "order"' and "newest event" in told[0].evidence


def by_order(lead):
    """The order-only world in which every tenth event is read `lead` seconds before its time."""
    found, files = worlds.clean()
    found = worlds.without_times(found, files)
    files["events"]["order"][::10] -= lead
    files["events"] = worlds.in_order(files["events"], "user", "order")
    return found, files


@pytest.mark.parametrize(("lead", "rings"), [(86_400, True), (59, False)])
def test_readable_events_of_later_times(tmp_path, monkeypatch, lead, rings):
    found, files = by_order(lead)
    log = worlds.written(tmp_path, found, files)
    told = future(log)
    assert [(x.severity, x.where) for x in told] == (
        [("error", 'events.arrow, columns "order", "time"')] if rings else []
    )
    if rings:
        events, count, readers, lead = files["events"], 0, 0, 0
        shown = files["impressions"]
        for user, time, order in zip(shown["user"], shown["time"], shown["order"]):
            readable = slice(log.event_start[user], log.event_start[user + 1])
            times = events["time"][readable][events["order"][readable] < order]
            readers += len(times) > 0
            ahead = times.max(initial=0) - time
            count += ahead > 60
            lead = max(lead, ahead)
        assert f"{count:,} of {readers:,} impressions" in told[0].evidence
        assert f"{lead:,} s later" in told[0].evidence
        monkeypatch.setattr(event_log, "CHUNK", 333)
        assert future(log) == told


def test_times_that_are_bounds_are_silent(tmp_path):
    """Order is exact, and every time is the end of its day, of events and impressions alike."""
    found, files = worlds.clean()
    found = worlds.without_times(found, files)
    for file in ("events", "impressions"):
        files[file]["time"] = files[file]["time"] // 86_400 * 86_400 + 86_399
    files["impressions"] = worlds.in_order(files["impressions"], "time", "request")
    assert future(worlds.written(tmp_path, found, files)) == []


@pytest.mark.parametrize(("days", "rings"), [(-5, False), (50, False), (70, True), (10_000, True)])
def test_events_after_the_last_impression(tmp_path, days, rings):
    """Half of the world's events lie in the last 50 days or so of 120."""
    found, files = worlds.clean()
    files["events"]["time"] += days * 86_400
    told = future(worlds.written(tmp_path, found, files))
    assert [x.severity for x in told] == ["warning"] * rings
    if rings:
        late = int((files["events"]["time"] > files["impressions"]["time"].max()).sum())
        assert f"{late:,} of {len(files['events']['time']):,} events" in told[0].evidence


def test_births_after_impressions_and_events(tmp_path, monkeypatch):
    found, files = worlds.clean()
    birth = files["items"]["birth"]
    birth[5::10] += 60 * 86_400
    log = worlds.written(tmp_path, found, files)
    told = check_time.seen_before_birth(log)
    assert [x.severity for x in told] == ["error", "error"]
    for one, file in zip(told, ("impressions", "events")):
        early = birth[files[file]["item"]] - files[file]["time"]
        count, rows = int((early > 0).sum()), len(early)
        assert f"{count:,} of {rows:,} {file}" in one.evidence
        assert f"up to {early.max():,} s" in one.evidence
        assert one.where == f'items.arrow, column "birth"; {file}.arrow, column "time"'
    monkeypatch.setattr(event_log, "CHUNK", 100)
    assert check_time.seen_before_birth(log) == told


def test_a_birth_at_the_first_impression_is_silent_and_one_second_later_a_warning(tmp_path):
    found, files = worlds.clean()
    shown, birth = files["impressions"], files["items"]["birth"]
    birth[1:] = np.iinfo(np.int64).max
    for file in ("impressions", "events"):
        np.minimum.at(birth, files[file]["item"], files[file]["time"])
    birth[0] = 0
    assert check_time.seen_before_birth(worlds.written(tmp_path, found, files)) == []
    birth[shown["item"][0]] += 1
    told = check_time.seen_before_birth(worlds.written(tmp_path / "later", found, files))
    assert [x.severity for x in told] == ["warning"]
    assert "by up to 1 s" in told[0].evidence


def test_items_without_birth_are_silent(tmp_path):
    found, files = worlds.clean()
    found = worlds.without_times(found, files)
    del files["items"]["birth"]
    assert check_time.seen_before_birth(worlds.written(tmp_path, found, files)) == []
